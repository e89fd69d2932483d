"""Pictures of any kind as 8-bit RGB, as a person would see them, and which files are pictures."""

import os
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .sizes import height_width

# What Pillow knows by name and does not decode, or runs another program for.
NO_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}


@lru_cache(maxsize=1)
def image_endings():
    """Endings of file names, in lower case, of the formats that Pillow reads."""
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(ending for ending, kind in known if kind in Image.OPEN and kind not in NO_PICTURES)


def is_image(name):
    """Whether a file's name is that of a picture; one that starts with a dot is some program's own."""
    return not name.startswith(".") and Path(name).suffix.lower() in image_endings()


def scan(folder):
    """(pictures below a folder, sorted by folder and name; {ending: how many other files there are}).

    Links to folders are followed, but to none twice, so that a link to its own parent does not multiply the pictures.
    Names that start with a dot are passed over without a word.
    """
    found, others, seen = [], Counter(), set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = () if real in seen else [name for name in folders if not name.startswith(".")]
        if real in seen:
            continue
        seen.add(real)
        found += [(place, name) for name in names if is_image(name)]
        others.update(Path(name).suffix or name for name in names if not is_image(name) and not name.startswith("."))
    return [os.path.join(*parts) for parts in sorted(found)], others


def to_rgb(image):
    """A PIL image as RGB: upright as its EXIF orientation says, 16-bit levels divided by 257, transparency on white.

    Photographs of 8 bits without an orientation, which is to say ImageNet's, are as `convert("RGB")` gives them. Raises
    ValueError for levels whose range is not known: 32-bit integers and floats.
    """
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    image = ImageOps.exif_transpose(image)
    if sixteen:
        levels = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((levels + 128) // 257).clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise ValueError(f"its levels are {kind}, whose range is not known; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_crop(image, size):
    """ADM's crop of a PIL image to size, a side or (height, width) (Dhariwal & Nichol, arXiv 2105.05233).

    Halve with a box filter while both sides are at least twice the target's, bicubic until it covers the target, crop
    the centre.
    """
    height, width = height_width(size)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
