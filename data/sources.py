"""Which data set a --data-path is."""

from pathlib import Path

import torch
from torch.utils.data import Dataset

from common.errors import UserError
from common.pixels import subfolders

from .archives import ZipImages, is_zip
from .folders import FlatFolder, FolderDataset, LabelledFolder
from .images import DIGITS, DigitsDataset
from .latent_cache import LatentCache, is_cache
from .listing import LABELS
from .parquet import ParquetImages, is_parquet


def is_labelled(path):
    """Whether path is a folder with a dataset.json."""
    return (Path(path) / LABELS).is_file()


def is_flat(path):
    """Whether path is a folder of files without sub-folders."""
    return Path(path).is_dir() and not subfolders(path)


# (whether a path is of this kind, the data set of a path, image size and channels): the first that fits is taken. A new kind
# is a class that has what ImageData lists, and a line here.
KINDS = [
    (lambda path: path == DIGITS, lambda path, image_size, channels: DigitsDataset(image_size, channels)),
    (is_cache, lambda path, image_size, channels: LatentCache(path)),
    (is_parquet, ParquetImages),
    (is_zip, ZipImages),
    (is_labelled, LabelledFolder),
    (is_flat, FlatFolder),
    (lambda path: True, FolderDataset),
]


def open_dataset(path, image_size, channels=3):
    """The data set that --data-path names, of images with so many channels, 3 or 1. Raises UserError where there is none."""
    return next(make(path, image_size, channels) for fits, make in KINDS if fits(path))


class LabelledImages(Dataset):
    """Images of a folder or data set with the labels that a checkpoint knows: (uint8 (3, H, W), class id), and name(i).

    Labels are the class folders' where their names are those of the checkpoint's classes, or where it has none recorded
    and their number is right; otherwise the null class. Raises UserError where there is no image or no label to give.
    """

    def __init__(self, path, recipe):
        self.dataset = open_dataset(path, recipe.image_size)
        if self.dataset.encoded:
            raise UserError(f"--data-path {path}: a cache of latents; give the images themselves")
        classes = list(self.dataset.classes)
        alike = classes == recipe.classes or (not recipe.classes and len(classes) == recipe.num_classes)
        known = alike if classes else recipe.num_classes == 1 and not recipe.classes  # images without classes are of one
        if not known and recipe.null_class is None:
            raise UserError(f"--data-path {path}: its classes are not the checkpoint's, which has no null class instead")
        self.null_class = None if known else recipe.null_class
        self.name, self.note = self.dataset.name, self.dataset.note

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return image, label if self.null_class is None else self.null_class

    def batch(self, indices):
        """(uint8 (N, 3, H, W), labels (N,))"""
        images, labels = zip(*(self[i] for i in indices))
        return torch.stack(images), torch.tensor(labels)
