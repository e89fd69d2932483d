"""Pictures of any kind as 8-bit RGB, as a person would see them, and which files are pictures."""

import os
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import UserError
from .sizes import height_width

# What Pillow knows by name and does not decode, or runs another program for.
NO_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}
ORIENTATION = 0x0112  # EXIF's tag, and what turns a picture upright that has it
UPRIGHT = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
UPRIGHT |= {6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}


@lru_cache(maxsize=1)
def image_endings():
    """Endings of file names, in lower case, of the formats that Pillow reads."""
    Image.init()
    known = Image.registered_extensions().items()
    # MPO, of cameras with two lenses, is opened as the JPEG that it begins with.
    return frozenset(end for end, kind in known if kind in (*Image.OPEN, "MPO") and kind not in NO_PICTURES)


def is_image(name):
    """Whether a file's name is that of a picture; one that starts with a dot is some program's own."""
    return not name.startswith(".") and Path(name).suffix.lower() in image_endings()


def subfolders(folder):
    """Sorted names of the folders in a folder that may hold data: none that starts with a dot, and no link to the folder
    itself or to one that it lies in, which would multiply the pictures."""
    real, found = os.path.realpath(folder), []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or not entry.is_dir():
                continue
            if not entry.is_symlink() or os.path.commonpath([target := os.path.realpath(entry.path), real]) != target:
                found.append(entry.name)
    return sorted(found)


def in_words(others):
    """{ending: how many}, or nothing, as part of a line."""
    return ": " + ", ".join(f"{count:,} {ending}" for ending, count in others.most_common(5)) if others else ""


def scan(folder):
    """(pictures below a folder, sorted by folder and name; {ending: how many other files there are}).

    Links to folders are followed, but none twice and none back, as subfolders says. Names that start with a dot are passed
    over without a word.
    """
    found, others, seen = [], Counter(), set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = () if real in seen else subfolders(place)
        if real in seen:
            continue
        seen.add(real)
        found += [(place, name) for name in names if is_image(name)]
        others += other_files(names)
    return [os.path.join(*parts) for parts in sorted(found)], others


def other_files(names):
    """{ending: how many} of names that are no pictures' and do not start with a dot."""
    return Counter(Path(name).suffix or name for name in names if not is_image(name) and not name.startswith("."))


@contextmanager
def opened(source, name=None):
    """The PIL image of a path or an open file, for a block that reads it. Raises UserError naming the path, or what name()
    gives, whatever goes wrong with it: Pillow's readers of damaged files raise a dozen unrelated types."""
    try:
        with Image.open(source) as image:
            yield image
    except Exception as error:
        called = name() if name else source
        raise UserError(f"cannot read image {called}: {str(error) or type(error).__name__}") from error


def upright(image):
    """A PIL image as its EXIF orientation says; as it is where that cannot be read, for its pixels may still be whole."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
    except Exception:  # of a damaged block, in as many types as those of damaged pixels
        return image
    return image.transpose(Image.Transpose[turn]) if turn else image


def to_rgb(image):
    """A PIL image as RGB: upright as its EXIF orientation says, 16-bit levels divided by 257, transparency on white.

    Photographs of 8 bits without an orientation, which is to say ImageNet's, are as `convert("RGB")` gives them. Raises
    ValueError for levels whose range is not known: 32-bit integers and floats.
    """
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    image = upright(image)
    if sixteen:
        levels, clear = np.asarray(image).astype(np.uint32), image.info.get("transparency")
        grey = ((levels + 128) // 257).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(np.where(levels == clear, np.uint8(255), grey) if isinstance(clear, int) else grey)
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
