"""Sizes of images: an int is the side of a square; a text such as "256x384" is height x width."""

import re

from .errors import UsageError


def height_width(size):
    """(height, width) of an int, a text or a pair. Raises ValueError for anything else."""
    if isinstance(size, int):
        size = (size, size)
    elif isinstance(size, str):
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", size)
        if not match:
            raise ValueError(f"a size is pixels a side, or height x width such as 256x384, not {size!r}")
        size = (int(match[1]), int(match[2] or match[1]))
    height, width = size
    if min(height, width) < 1:
        raise ValueError(f"a size must be at least 1, not {height}x{width}")
    return height, width


def canonical(size):
    """The one way in which a size is written into flags and files: an int where it is square, else a text."""
    height, width = height_width(size)
    return height if height == width else f"{height}x{width}"


def image_size_of(input_size, autoencoder):
    """The size of images whose latents have that size."""
    return canonical(tuple(side * autoencoder.factor for side in height_width(input_size)))


def latent_shape(image_size, autoencoder, patch_size):
    """(channels, height, width) of an image's latents. Raises UsageError where the size does not divide."""
    multiple = autoencoder.factor * patch_size
    height, width = height_width(image_size)
    if height % multiple or width % multiple:
        raise UsageError(
            f"--image-size {image_size} is not a multiple of {multiple} "
            f"(autoencoder {autoencoder.name} shrinks by {autoencoder.factor}, patches are {patch_size} wide)"
        )
    return autoencoder.channels, height // autoencoder.factor, width // autoencoder.factor
