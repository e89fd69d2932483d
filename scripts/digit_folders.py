"""The built-in digits as a folder of classes, for examples: python scripts/digit_folders.py OUT [SIDE]

The classes 5 to 9 are called five to nine, as if they were other classes than those of builtin:digits.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.images import read_digits

NAMES = ("0", "1", "2", "3", "4", "five", "six", "seven", "eight", "nine")


def main(out, side=32):
    """Each digit as OUT/CLASS/NUMBER.png, with builtin:digits' border, of so many pixels a side."""
    images, labels = read_digits()
    for number, (image, label) in enumerate(zip(np.pad(images, ((0, 0), (2, 2), (2, 2))), labels)):
        folder = Path(out) / NAMES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.png")
    print(f"{out}: {len(images):,} digits of {side} x {side} pixels")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(f"usage: {sys.argv[0]} OUT [SIDE]")
    main(sys.argv[1], *map(int, sys.argv[2:]))
