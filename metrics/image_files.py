"""Files that hold images or statistics, read in parts and never by running code."""

import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.pixels import center_crop, image_endings, in_words, opened, scan, to_rgb
from common.unreadable import DataGuard

# What a broken or unsuitable file may raise in NumPy and the standard library.
BROKEN = (OSError, ValueError, SyntaxError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)


@contextmanager
def reading(name):
    """What a broken file may raise becomes a UserError with its name."""
    try:
        yield
    except BROKEN as error:
        raise UserError(f"cannot read {name}: {str(error) or type(error).__name__}") from error


class FolderImages:
    """The images of a folder and of its sub-folders, by folder and name; a slice reads uint8 (n, H, W, 3).

    image_size: crop each as training does; otherwise they must be of one size. warn: told of each file that cannot be read,
    which a slice then lacks, as long as they are as few as training passes over; without, the first is an error. Raises
    UserError naming a file.
    """

    def __init__(self, path, image_size=None, warn=None):
        (files, others), self.image_size = scan(path), image_size
        self.files, self.guard = [Path(file) for file in files], DataGuard(self, warn) if warn else None
        if not self.files:
            raise UserError(f"{path}: no images in it ({' '.join(sorted(image_endings()))})")
        self.note = f"{path}: passed over{in_words(others)}" if others else None
        self.readers = ThreadPoolExecutor(min(16, os.cpu_count()))
        self.first = next(((f, i.shape) for f in self.files if not isinstance(i := self._read(f), UserError)), None)
        if self.first is None:
            raise UserError(f"{path}: none of its {len(self):,} images can be read")

    def _read(self, file):
        try:
            with opened(file) as image:
                image = to_rgb(image)
                return np.asarray(center_crop(image, self.image_size) if self.image_size else image)
        except UserError as error:
            if self.guard is None:
                raise
            return error

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return str(self.files[index])

    def __getitem__(self, rows):
        images, files = [], self.files[rows]
        for index, file, image in zip(range(len(self))[rows], files, self.readers.map(self._read, files)):
            if isinstance(image, UserError):
                self.guard.pass_over(index)
                continue
            if image.shape != self.first[1]:
                sizes = [f"{width} x {height}" for height, width, _ in (image.shape, self.first[1])]
                mend = "give --image-size to crop them as training does"
                raise UserError(f"{file}: {sizes[0]} pixels, but {self.first[0].name} has {sizes[1]}; {mend}")
            images.append(image)
        return np.stack(images) if images else np.empty((0, 1, 1, 3), np.uint8)


class NpzImages:
    """The images of a .npz; a slice reads uint8 (n, H, W, 3) and no more, best in order. Raises UserError."""

    def __init__(self, path, archive):
        self.name, self.archive = f"arr_0 of {path}", archive  # which closes its file when nobody holds it
        with reading(self.name):
            self.file = archive.zip.open("arr_0.npy")
            version = np.lib.format.read_magic(self.file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, fortran, dtype = header(self.file)
        if dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3 or fortran:
            order = " in Fortran order" if fortran else ""
            raise UserError(f"{path}: arr_0 is {dtype} of shape {self.shape}{order}; expected uint8 (N, H, W, 3)")
        self.start = self.file.tell()

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        start, stop, _ = rows.indices(len(self))
        size = np.prod(self.shape[1:], dtype=int)
        with reading(self.name):
            self.file.seek(self.start + start * size)
            return np.frombuffer(self.file.read((stop - start) * size), np.uint8).reshape(stop - start, *self.shape[1:])


class Chosen:
    """The images at indices of others, in the order of these; a slice reads uint8 (n, H, W, 3)."""

    def __init__(self, images, indices):
        self.images, self.indices = images, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, rows):
        return np.concatenate([self.images[i : i + 1] for i in self.indices[rows]])


def open_npz(path):
    """The .npz at path, its arrays not read yet. Raises UserError where there is none."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not a .npz file, or a damaged one")
    with reading(path):
        return np.load(path, allow_pickle=False)


def read_array(archive, path, key, shape):
    """An array of finite numbers of this shape, in which None is any length. Raises UserError where it is not that."""
    with reading(f"{key} of {path}"):
        array = archive[key]
    fits = len(array.shape) == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape))
    if not fits or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise UserError(f"{path}: {key} is {array.dtype} of shape {array.shape}; expected finite numbers of shape {shape}")
    return array


def open_images(path, archive=None, expected="arr_0", image_size=None, warn=None):
    """The images of a folder, or of a .npz that has them: len() is their number, a slice reads uint8 (n, H, W, 3).

    image_size and warn are FolderImages'.
    """
    path = Path(path)
    if path.is_dir():
        return FolderImages(path, image_size, warn)
    archive = archive or open_npz(path)
    if "arr_0" not in archive.files:
        raise UserError(f"{path}: holds {', '.join(archive.files[:6]) or 'nothing'}; expected {expected}")
    return NpzImages(path, archive)
