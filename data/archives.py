"""Images in a .zip: class folders, images alone, or with a dataset.json, read in place."""

import io
import os
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

LIMIT = 1 << 30  # bytes of a member, unpacked; no picture comes near
HEADER = struct.Struct("<4s3H4x3L2H")  # of a member: signature, version, flags, method; CRC, sizes; lengths of name and extra


def is_zip(path):
    return Path(path).suffix.lower() == ".zip" or (Path(path).is_file() and zipfile.is_zipfile(path))


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
                members = [member for member in archive.infolist() if not member.is_dir()]
                for member in members:
                    self._check(member)
                members = [member for member in members if self._is_data(member.filename)]
                self._list(archive, members)
        except (OSError, zipfile.BadZipFile, NotImplementedError, UnicodeError, struct.error) as error:
            found = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise UserError(f"--data-path {path}: not a readable .zip ({found})") from error

    def _is_data(self, name):
        return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))

    def _check(self, member):
        """Raises UserError for a member that means harm, or that cannot be read."""
        name, found = member.filename, None
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or ":" in name.split("/")[0]:
            found = "leads out of the archive"
        elif member.flag_bits & 1:
            found = "is encrypted"
        elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            found = f"is compressed by method {member.compress_type}; stored and deflated ones are read"
        elif max(member.file_size, member.compress_size) > LIMIT:
            found = f"has {member.file_size:,} bytes, which no picture has"
        if found:
            raise UserError(f"--data-path {self.path}: its member {name[:200]} {found}")

    def _list(self, archive, members):
        """Classes, and the index of the images among members."""
        images = {member.filename: member for member in members if is_image(Path(member.filename).name)}
        others = other_files(Path(member.filename).name for member in members)
        if not images:
            raise UserError(f"--data-path {self.path}: no images in it{in_words(others)}")
        listed = [member for member in members if Path(member.filename).name == LABELS]
        if listed:
            listed = min(listed, key=lambda member: member.filename.count("/"))
            root = listed.filename[: -len(LABELS)]
            names = [name[len(root) :] for name in images if name.startswith(root)]
            others[".json"] -= 1
            where = f"{self.path}/{listed.filename}"
            try:
                text = archive.read(listed)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise UserError(f"{where}: cannot be read ({error})") from error
            self.classes, self.labels, order = read_labels(text, names, where)
        else:
            root = _root(images)
            names, labels = self._by_class(root, images, others)
            order = in_order(names, labels)
            self.labels = np.array([labels[i] for i in order], np.int32)
        members = [images[root + names[i]] for i in order]
        self.offsets = np.array([member.header_offset for member in members], np.int64)
        self.sizes = np.array([member.compress_size for member in members], np.uint32)
        inside = [f"its classes are the folders of {root}"] if root and self.classes else []
        self.note = "; ".join(inside + ([f"passed over{in_words(+others)}"] if +others else [])) or None

    def _by_class(self, root, images, others):
        """(names below root, labels) by the first folder of each; sets classes."""
        names = [name[len(root) :] for name in images]
        self.classes = sorted({name.split("/")[0] for name in names if "/" in name})
        check_parts(self.classes, self.path)
        if not self.classes:
            return names, [0] * len(names)
        ids, within = {name: i for i, name in enumerate(self.classes)}, [name for name in names if "/" in name]
        if beside := len(names) - len(within):
            others += Counter({"beside the class folders": beside})
        return within, [ids[name.split("/")[0]] for name in within]

    def __len__(self):
        return len(self.labels)

    def label(self, index):
        return self.labels[index]

    def name(self, index):
        _, flags, *_, length, _ = self._header(index)
        name = self._read(length, int(self.offsets[index]) + HEADER.size)
        return f"{self.path}/{name.decode('utf-8' if flags & 0x800 else 'cp437', 'replace')}"

    def source(self, index):
        """The member's content, checked where its header has a checksum."""
        method, flags, crc, _, _, length, extra = self._header(index)
        data = self._read(int(self.sizes[index]), int(self.offsets[index]) + HEADER.size + length + extra)
        if method == zipfile.ZIP_DEFLATED:
            unpack = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                data = unpack.decompress(data, LIMIT)
            except zlib.error as error:
                raise UserError(f"cannot read image {self.name(index)}: {error}") from error
            if not unpack.eof:
                found = "it ends too early, or has more bytes than a picture has"
                raise UserError(f"cannot read image {self.name(index)}: {found}")
        if not flags & 8 and zlib.crc32(data) != crc:  # with 8, the numbers come after the data
            raise UserError(f"cannot read image {self.name(index)}: it does not match its checksum")
        return io.BytesIO(data)

    def _header(self, index):
        """(method, flags, CRC, sizes, lengths of name and extra)"""
        signature, _, flags, method, *rest = HEADER.unpack(self._read(HEADER.size, int(self.offsets[index])))
        if signature != b"PK\3\4":
            raise UserError(f"cannot read image {index} of {self.path}: the archive is not what it was, or damaged")
        return method, flags, *rest

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


def _root(names):
    """The folder whose folders are the classes: the outermost that holds more than one folder, or images."""
    folders, root = {name[: name.rfind("/") + 1] for name in names}, ""
    while True:
        tops = {folder[len(root) :].split("/")[0] for folder in folders}
        if root in folders or len(tops) > 1 or (inner := f"{root}{tops.pop()}/") in folders:
            return root
        root = inner
