"""Latents that REPA's code encoded (Yu et al., arXiv 2410.06940), to be imported into a cache.

Its folder vae-sd has a .npy an image, float32 (2 C, h, w): the posterior's mean, then its standard deviation, before shift and
scale, of the image and not of its mirror image; and a dataset.json with their classes.
"""

import os
from pathlib import Path

import numpy as np
import torch

from common.errors import UsageError, UserError
from common.sizes import height_width, image_size_of
from common.spread import spread

from .images import ImageData
from .listing import LABELS, read_labels
from .names import Names

LOOKED_AT = 256  # items whose statistics are taken
# EDM2 prepares files of the same names and shapes, whose encoder saw pixels in [0, 1] instead of [-1, 1]: means by channel.
OF_EDM2, NEAR = (5.81, 3.25, 0.12, -2.15), 1.5


def latent_files(folder):
    """Paths of the .npy below a folder, from there, sorted."""
    found = []
    for place, _, names in os.walk(folder):
        inside = os.path.relpath(place, folder).replace(os.sep, "/")
        found += [name if inside == "." else f"{inside}/{name}" for name in names if name.endswith(".npy")]
    return sorted(found)


def is_foreign(path):
    """Whether path is a folder of such latents."""
    folder = Path(path)
    if not (folder / LABELS).is_file():
        return False
    inside = [folder, *(entry for entry in folder.iterdir() if entry.is_dir())][:3]
    return any(next(place.glob("*.npy"), None) for place in inside)


class ForeignLatents(ImageData):
    """Moments (1, 2, C, h, w) float16 and class id by index. Raises UserError naming what is no such latent."""

    mirrors, encoded = False, True
    variants = 1

    def __init__(self, root):
        self.root = Path(root)
        names = latent_files(self.root)
        self.classes, self.labels, order = read_labels((self.root / LABELS).read_bytes(), names, self.root / LABELS)
        self.files = Names(names[i] for i in order)
        self.shape = self._load(0).shape[2:]

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return str(self.root / self.files[index])

    def _load(self, index):
        """(1, 2, C, h, w) float32, finite."""
        try:
            array = np.load(self.name(index), mmap_mode="r", allow_pickle=False)
            if array.dtype != np.float32 or array.ndim != 3 or array.shape[0] % 2:
                raise ValueError(f"{array.dtype} of shape {array.shape}, expected float32 of (2 C, h, w)")
            moments = torch.from_numpy(np.array(array)).unflatten(0, (1, 2, -1))
        except Exception as error:  # NumPy raises half a dozen unrelated types for a damaged header
            reason = (str(error).splitlines() or ["empty"])[0]
            raise UserError(f"cannot read {self.name(index)}: {reason}") from error
        if not moments.isfinite().all() or moments[:, 1].min() < 0:
            raise UserError(f"cannot read {self.name(index)}: its numbers are not means and standard deviations")
        return moments

    def __getitem__(self, index):
        moments = self._load(index)
        if moments.shape[2:] != self.shape:
            raise UserError(
                f"cannot read {self.name(index)}: of shape {tuple(moments.shape[2:])}, others are {tuple(self.shape)}"
            )
        return moments.half(), int(self.labels[index])

    def check(self, image_size, autoencoder):
        """Raises UsageError unless the latents may be this autoencoder's, of images of this size (None: any)."""
        found = image_size_of(tuple(self.shape[1:]), autoencoder)
        if self.shape[0] != autoencoder.channels:
            raise UsageError(f"--vae {autoencoder.name} has {autoencoder.channels} channels, {self.root} has {self.shape[0]}")
        if image_size is not None and height_width(image_size) != height_width(found):
            raise UsageError(f"--image-size {image_size}: {self.root} holds latents of images of size {found}")
        means = torch.stack([self._load(i)[0, 0] for i in spread(len(self), LOOKED_AT)])
        by_channel = means.mean((0, 2, 3))
        if len(by_channel) == len(OF_EDM2) and (by_channel - torch.tensor(OF_EDM2)).abs().max() < NEAR:
            told = ", ".join(f"{mean:.2f}" for mean in by_channel)
            raise UserError(
                f"--data-path {self.root}: its channels' means are ({told}), those of EDM2's latents, whose encoder saw pixels "
                "in [0, 1] and not in [-1, 1]; SiT and REPA learn others: encode the images"
            )
        width = autoencoder.latents(means, 0, 0).std().item()
        if not 0.4 < width < 2.5:
            self.note = (
                f"--vae {autoencoder.name} scales these latents to a spread of {width:.2f} instead of about 1: are they its?"
            )
        return found
