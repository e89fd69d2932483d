"""Images in a .zip: class folders, images alone, or with a dataset.json, read in place."""

import io
import os
import re
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.pixels import in_words, is_image, other_files

from .images import Pictures
from .listing import LABELS, check_parts, in_order, read_labels

LIMIT = 1 << 28  # bytes of a member, unpacked; no picture comes near
LONGEST = 4096  # characters of a name
HEADER = struct.Struct("<4s3H4x3L2H")  # of a member: signature, version, flags, method; CRC, sizes; lengths of name and extra


def is_zip(path):
    return Path(path).suffix.lower() == ".zip" or (Path(path).is_file() and zipfile.is_zipfile(path))


def _text(name, flags):
    """A member's name, of bytes: UTF-8, also where an archive of Linux or macOS does not say so, else DOS's code page; with
    slashes alone, and without what stands for the folder that one is in."""
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        text = name.decode("utf-8" if flags & 0x800 else "cp437", "replace")
    return "/".join(part for part in text.replace("\\", "/").split("/") if part != ".")


class ZipImages(Pictures):
    """A .zip as `zip -r` or EDM's tools make it: 16 bytes of index an image, and two reads for each.

    The folders of the outermost folder that holds more than one are the classes; without folders there are none, and a
    dataset.json is what it says. The member's own header tells the rest, so that no list of names is kept.
    """

    def __init__(self, path, image_size, channels=3):
        super().__init__(image_size, channels)
        self.path, self.file = str(path), None
        try:
            with zipfile.ZipFile(path) as archive:
                self._list(archive)
        except (OSError, zipfile.BadZipFile, NotImplementedError, UnicodeError, struct.error) as error:
            found = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise UserError(f"--data-path {path}: not a readable .zip ({found})") from error

    def _list(self, archive):
        """Classes, and the index of the images, by class, folder and name."""
        images, others, folders, listed = {}, Counter(), set(), {}
        for member in archive.infolist():
            encoded = member.orig_filename.encode("utf-8" if member.flag_bits & 0x800 else "cp437")
            name = _text(encoded, member.flag_bits)
            self._check_name(name)
            if any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")):
                continue
            folders.add(name[: name.rfind("/") + 1])
            if name.endswith("/"):
                continue
            file = name.rpartition("/")[2]
            if is_image(file):
                images[name] = self._checked(name, member)
            elif file == LABELS:
                listed[name[: -len(LABELS)]] = member
            others += other_files([file])
        if not images:
            raise UserError(f"--data-path {self.path}: no images in it{in_words(others)}")
        root = next((folder for folder in listed if all(name.startswith(folder) for name in images)), None)
        if root is not None:
            names, labels, order = self._by_list(archive, root, self._checked(root + LABELS, listed[root]), images)
            others -= Counter({".json": 1})
        else:
            root = _root({name[: name.rfind("/") + 1] for name in images})
            names, labels = self._by_class(root, images, folders, others)
            order = in_order(names, labels)
            labels = np.array([labels[i] for i in order], np.int32)
        self.ends = np.searchsorted(labels, np.arange(max(1, len(self.classes))), side="right")  # of each class
        members = [images[root + names[i]] for i in order]
        self.offsets = np.array([member.header_offset for member in members], np.int64)
        self.sizes = np.array([member.compress_size for member in members], np.uint32)
        self.sums = np.array([member.CRC for member in members], np.uint32)
        inside = [f"its classes are the folders of {root}"] if root and self.classes else []
        self.note = "; ".join(inside + ([f"passed over{in_words(others)}"] if others else [])) or None

    def _check_name(self, name):
        """Raises UserError for a member that would be elsewhere if it were unpacked, or that only slows its reader down."""
        if name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:/", name):
            raise UserError(f"--data-path {self.path}: its member {name[:200]} leads out of the archive")
        if len(name) > LONGEST:
            raise UserError(f"--data-path {self.path}: a member has a name of {len(name):,} characters")

    def _checked(self, name, member):
        """The member, unless it cannot be read, or is larger than what it should be."""
        found = None
        if member.flag_bits & 1:
            found = "is encrypted"
        elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            found = f"is compressed by method {member.compress_type}; stored and deflated ones are read"
        elif max(member.file_size, member.compress_size) > LIMIT:
            found = f"has {member.file_size:,} bytes, which no picture has"
        if found:
            raise UserError(f"--data-path {self.path}: its member {name} {found}")
        return member

    def _by_list(self, archive, root, listed, images):
        """(names below root, labels in order, order) by its dataset.json; sets classes."""
        where, names = f"{self.path}/{root}{LABELS}", [name[len(root) :] for name in images]
        if listed.file_size > 1_000_000 + LONGEST * len(images):
            raise UserError(f"{where}: {listed.file_size:,} bytes are more than labels of {len(images):,} images need")
        try:
            text = archive.read(listed)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UserError(f"{where}: cannot be read ({error})") from error
        self.classes, labels, order = read_labels(text, names, where)
        return names, labels, order

    def _by_class(self, root, images, folders, others):
        """(names below root, labels) by the first folder of each; sets classes."""
        below = [folder[len(root) :] for folder in folders if folder.startswith(root) and folder != root]
        self.classes = sorted({folder.split("/")[0] for folder in below})
        check_parts(self.classes, self.path)
        names = [name[len(root) :] for name in images if name.startswith(root)]
        if not self.classes:
            return names, [0] * len(names)
        ids, within = {name: i for i, name in enumerate(self.classes)}, [name for name in names if "/" in name]
        labels = [ids[name.split("/")[0]] for name in within]
        if empty := set(range(len(ids))) - set(labels):
            raise UserError(f"--data-path {self.path}: no images in the class folder {self.classes[min(empty)]}")
        if beside := len(images) - len(within):
            others += Counter({"beside the class folders": beside})
        return within, labels

    def __len__(self):
        return len(self.offsets)

    def label(self, index):
        return int(np.searchsorted(self.ends, index, side="right"))

    def name(self, index):
        _, flags, _, length, _ = self._header(index)
        return f"{self.path}/{_text(self._read(length, int(self.offsets[index]) + HEADER.size), flags)}"

    def source(self, index):
        """The member's content, as its checksum says it was."""
        method, flags, size, length, extra = self._header(index)
        data = self._read(int(self.sizes[index]), int(self.offsets[index]) + HEADER.size + length + extra)
        if method == zipfile.ZIP_DEFLATED:
            unpack = zlib.decompressobj(-zlib.MAX_WBITS)
            try:  # to no more than was said; with flag 8, that comes after the data
                data = unpack.decompress(data, LIMIT if flags & 8 else size + 1)
            except zlib.error as error:
                raise UserError(f"cannot read image {self.name(index)}: {error}") from error
        if zlib.crc32(data) != self.sums[index]:
            raise UserError(f"cannot read image {self.name(index)}: it does not match its checksum")
        return io.BytesIO(data)

    def _header(self, index):
        """(method, flags, size when unpacked, lengths of name and extra)"""
        signature, _, flags, method, _, _, *rest = HEADER.unpack(self._read(HEADER.size, int(self.offsets[index])))
        if signature != b"PK\3\4":
            raise UserError(f"cannot read image {index} of {self.path}: the archive is not what it was, or damaged")
        return method, flags, min(rest[0], LIMIT), *rest[1:]

    def _read(self, size, offset):
        """So many bytes, by a call that moves no position that processes share."""
        try:
            if self.file is None:
                self.file = open(self.path, "rb", buffering=0)  # noqa: SIM115  for as long as the data set is
            data = os.pread(self.file.fileno(), size, offset)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error}") from error
        if len(data) != size:
            raise UserError(f"{self.path} ends within a member: the archive is not what it was, or damaged")
        return data

    def __getstate__(self):
        return self.__dict__ | {"file": None}  # a process that gets a copy opens the file itself


def _root(folders):
    """The folder whose folders are the classes, of the folders that hold images: the outermost with more than one, beside
    images that lie at the very top; or the one above a single folder of images."""
    folders = [folder.split("/")[:-1] for folder in folders if folder] or [[]]
    first, last = min(folders), max(folders)
    shared = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    if first[:shared] in folders:  # it holds images itself
        shared = max(0, shared - 1)
    return "".join(f"{part}/" for part in first[:shared])
