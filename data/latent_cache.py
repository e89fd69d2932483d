"""Latents encoded once: for every image, and for its mirror image, the moments of the autoencoder's posterior.

A cache is a folder that encode_latents.py fills: moments.npy (N, V, 2, C, h, w) float16, mean and standard deviation as
the autoencoder gives them, before shift and scale; labels.npy (N,) int64; names.npy (N,), the images' names as bytes;
and cache.json, written last, which says whose latents they are. V is 2, image and mirror image, or 1 for data that are
never mirrored. Moments and not samples, so that training goes on drawing from the posterior. checksums.json has SHA-256s, of
each chunk of moments and of the two small files, for whoever copies a cache.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch

from common.errors import UsageError, UserError
from common.sizes import height_width

from .images import ImageData

FORMAT = 1
COMPLETE, MOMENTS, LABELS, NAMES, SUMS = "cache.json", "moments.npy", "labels.npy", "names.npy", "checksums.json"
# what a reader needs; classes may be none
FIELDS = dict(format=int, image_size=(int, str), count=int, variants=int, channels=int, factor=int)
FIELDS |= dict(vae=str, vae_hash=str, encoder_hash=str, classes=list)
AGAIN = "delete the folder and run encode_latents.py again"


def is_cache(path):
    """Whether path is a cache of latents, complete or not."""
    return any((Path(path) / name).exists() for name in (COMPLETE, MOMENTS))


def encoder_hash(autoencoder):
    """16 hex digits of the encoder's weights: a config cannot tell an autoencoder from one that was trained further."""
    digest = hashlib.sha256()
    for name, weights in autoencoder.vae.state_dict().items():
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(weights.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def read_record(file):
    """The dict in a .json. Raises UserError naming the file."""
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error}); {AGAIN}") from error
    if not isinstance(record, dict):
        raise UserError(f"{file}: holds a {type(record).__name__}, not the description of a cache; {AGAIN}")
    return record


def open_array(file, shape, kind):
    """The array of a .npy, mapped and not read, running no code from it. Raises UserError unless it has shape and kind."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises half a dozen unrelated types for a damaged header
        raise UserError(f"{file}: cannot be read ({str(error).splitlines()[0] if str(error) else 'empty'}); {AGAIN}") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{file}: an archive, not a single array; {AGAIN}")
    if array.shape != shape or array.dtype.type is not kind or not array.dtype.isnative:
        raise UserError(f"{file}: {array.dtype} of shape {array.shape}, expected {kind.__name__} of {shape}; {AGAIN}")
    return array


class LatentCache(ImageData):
    """A complete cache: moments (V, 2, C, h, w) float16 and class id by index. Raises UserError naming what is wrong."""

    encoded = True

    def __init__(self, path):
        self.path = Path(path)
        file = self.path / COMPLETE
        if not is_cache(path):
            raise UserError(f"{path}: there is no cache of latents (no {COMPLETE})")
        if not file.exists():
            raise UserError(f"{path}: an incomplete cache (no {COMPLETE}); run encode_latents.py again, to go on with it")
        record = self.record = read_record(file)
        wrong = [
            key for key, kind in FIELDS.items() if not isinstance(record.get(key), kind) or not (record[key] or kind is list)
        ]
        if wrong:
            raise UserError(f"{file}: no valid {wrong[0]} in it; {AGAIN}")
        if record["format"] != FORMAT:
            raise UserError(f"{file}: a cache of format {record['format']}, this is a reader of format {FORMAT}; {AGAIN}")
        count, sides = record["count"], self._latent_sides(file)
        shape = (count, record["variants"], 2, record["channels"], *sides)
        self.moments = open_array(self.path / MOMENTS, shape, np.float16)
        self.file = open(self.path / MOMENTS, "rb", buffering=0)  # noqa: SIM115, for as long as the data set is
        self.labels = open_array(self.path / LABELS, (count,), np.int64)
        self.names = open_array(self.path / NAMES, (count,), np.bytes_)
        self.classes, self.mirrors = record["classes"], record["variants"] == 2
        if self.labels.min() < 0 or self.labels.max() >= (len(self.classes) or 1):
            found = f"labels from {self.labels.min()} to {self.labels.max()}, but {len(self.classes)} classes"
            raise UserError(f"{self.path / LABELS}: {found}; {AGAIN}")

    def _latent_sides(self, file):
        try:
            return tuple(side // self.record["factor"] for side in height_width(self.record["image_size"]))
        except ValueError as error:
            raise UserError(f"{file}: {error}; {AGAIN}") from error

    def __reduce__(self):
        return LatentCache, (self.path,)  # a process that gets a copy maps the files itself

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return os.fsdecode(self.names[index])

    def __getitem__(self, index):
        return torch.from_numpy(self._read(index)), int(self.labels[index])

    def _read(self, index):
        """Moments by one read of just their bytes: a mapped file is read ahead, which random access has no use of."""
        item = np.empty(self.moments.shape[1:], self.moments.dtype)
        try:
            got = os.preadv(self.file.fileno(), [item.data.cast("B")], self.moments.offset + index * item.nbytes)
        except OSError as error:
            raise UserError(f"cannot read item {index} of {self.path / MOMENTS}: {error}") from error
        if got != item.nbytes:
            raise UserError(f"{self.path / MOMENTS} ends within item {index}: {AGAIN}")
        return item

    def check(self, image_size, autoencoder):
        """Raises UsageError unless the latents are this autoencoder's, of images of this size."""
        record = self.record
        if height_width(image_size) != height_width(record["image_size"]):
            raise UsageError(f"--image-size {image_size}: {self.path} holds latents of images of size {record['image_size']}")
        differ = f"--vae {autoencoder.name}: %s %s, but {self.path} was encoded by {record['vae']}, %s %s"
        if autoencoder.config_hash != record["vae_hash"]:
            raise UsageError(differ % ("config", autoencoder.config_hash, "config", record["vae_hash"]))
        if (weights := encoder_hash(autoencoder)) != record["encoder_hash"]:
            raise UsageError(differ % ("encoder weights", weights, "encoder weights", record["encoder_hash"]))
