"""Parts of a data set: what is trained on, and what is held out."""

import numpy as np

from common.errors import UsageError
from common.spread import spread

from .images import ImageData


class Part(ImageData):
    """The items of a data set at indices, in their order."""

    def __init__(self, dataset, indices):
        self.dataset, self.indices = dataset, np.asarray(indices, np.int64)
        self.classes, self.mirrors = dataset.classes, dataset.mirrors
        self.note, self.encoded = dataset.note, dataset.encoded

    def __len__(self):
        return len(self.indices)

    def name(self, index):
        return self.dataset.name(self.indices[index])

    def __getitem__(self, index):
        return self.dataset[int(self.indices[index])]

    def check(self, image_size, autoencoder):
        self.dataset.check(image_size, autoencoder)


def split(dataset, fraction):
    """(the rest, held out) of a data set: the latter evenly spread, and so a share of every class, which lie together.

    Raises UsageError where either would be empty.
    """
    held_out = spread(len(dataset), round(fraction * len(dataset)))
    if not 0 < len(held_out) < len(dataset):
        raise UsageError(f"--val-fraction {fraction} of {len(dataset):,} images leaves nothing to train or to validate on")
    rest = np.setdiff1d(np.arange(len(dataset)), held_out, assume_unique=True)
    return Part(dataset, rest), Part(dataset, held_out)
