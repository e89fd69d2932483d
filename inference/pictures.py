"""Samples as files for a person's eye."""

import unicodedata
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

WIDTH, HEIGHT, SIDE = 720, 1280, 256  # pixels that enlarged images do not exceed: those of a row, of a column, and one
GAP = 2  # pixels of white around each image


@dataclass(frozen=True)
class Layout:
    """Where the images of a picture are: count of them, height x width, in so many columns, named or not.

    Small images are enlarged by a whole number, so that each pixel becomes a square: by the largest with which those of a row
    are together no wider than 720 pixels, those of a column no higher than 1,280, and none has a side above 256. So images
    of 256 pixels stay as they are, and ten of 32 in four columns become five times as large.
    """

    count: int
    height: int
    width: int
    columns: int
    named: bool = False

    @property
    def across(self):
        return min(self.columns, self.count)

    @property
    def down(self):
        return -(-self.count // self.across)

    @property
    def scale(self):
        longest = max(self.height, self.width)
        return max(1, min(SIDE // longest, WIDTH // (self.across * self.width), HEIGHT // (self.down * self.height)))

    @property
    def font_size(self):
        return min(20, max(13, self.width * self.scale // 9))

    @property
    def gap(self):
        return GAP if self.count > 1 else 0

    @property
    def pitch(self):
        """(x, y) pixels from an image to its neighbours."""
        strip = self.font_size * 3 // 2 if self.named else 0
        return self.width * self.scale + self.gap, self.height * self.scale + strip + self.gap

    @property
    def size(self):
        """(width, height) of the picture."""
        x, y = self.pitch
        return self.across * x + self.gap, self.down * y + self.gap

    def corner(self, index):
        """(x, y) of an image's first pixel."""
        row, column = divmod(index, self.across)
        return self.gap + column * self.pitch[0], self.gap + row * self.pitch[1]

    def cut(self, picture):
        """The images of a picture, uint8 (count, height, width, 3), as they were before they were enlarged."""
        pixels = np.asarray(picture.convert("RGB"))
        corners = map(self.corner, range(self.count))
        high, wide = self.height * self.scale, self.width * self.scale
        return np.stack([pixels[y : y + high : self.scale, x : x + wide : self.scale] for x, y in corners])


@cache
def _letters_beyond_ascii():
    """(file, its code points) of a font for names that Pillow's own cannot write: that of matplotlib."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return str(file), frozenset(FT2Font(str(file)).get_charmap())


def class_names(recipe, labels):
    """The names of labels, a list of texts for save_picture; None where the recipe's classes have none. A name that the fonts
    here cannot write is the class's id, and the null class has none."""
    if not recipe.classes or not features.check("freetype2"):
        return None
    return [_writable(recipe.classes[int(i)], i) if int(i) < len(recipe.classes) else "" for i in labels]


def _writable(name, label):
    text = unicodedata.normalize("NFC", " ".join(name.split()))
    plain = text.isascii() and text.isprintable()
    return text if plain or all(ord(letter) in _letters_beyond_ascii()[1] for letter in text) else str(int(label))


def font_for(texts, size):
    """A font that has the letters of texts, Pillow's own where that does."""
    plain = all(text.isascii() for text in texts)
    return ImageFont.load_default(size) if plain else ImageFont.truetype(_letters_beyond_ascii()[0], size)


def _cut_to(text, font, room):
    """As much of a text as room pixels take, with an ellipsis for the rest; nothing where that is no letter."""
    if font.getlength(text[:500]) <= room:
        return text[:500]
    shorter = (f"{text[:end].rstrip()}…" for end in range(min(len(text), 500) - 1, 0, -1))
    return next((each for each in shorter if font.getlength(each) <= room), "")


def _write_names(picture, layout, names):
    """Below each image its name, or once below neighbours that share it."""
    draw, size = ImageDraw.Draw(picture), layout.font_size
    font = font_for(names, size)
    for _, group in groupby(range(layout.count), lambda i: (i // layout.across, names[i])):
        first, *_, last = [*group] * 2
        (left, top), right = layout.corner(first), layout.corner(last)[0] + layout.width * layout.scale
        below = (left + right) / 2, top + layout.height * layout.scale + size * 1.1
        draw.text(below, _cut_to(names[first], font, right - left), fill="black", font=font, anchor="ms")


def grid(images, columns, names=None):
    """uint8 images (N, H, W, 3) -> one, with white lines between them, enlarged as a Layout says; below each its name, where
    names, N texts, are given."""
    images = np.asarray(images)
    layout = Layout(*images.shape[:3], columns, named=names is not None)
    wide, high = layout.size
    pixels = np.full((high, wide, 3), 255, np.uint8)
    for i, image in enumerate(images.repeat(layout.scale, 1).repeat(layout.scale, 2)):
        x, y = layout.corner(i)
        pixels[y : y + image.shape[0], x : x + image.shape[1]] = image
    picture = Image.fromarray(pixels)
    if layout.named:
        _write_names(picture, layout, names)
    return picture


def save_picture(images, path, columns, names=None):
    """uint8 images (N, H, W, 3) as one picture, of the layout that grid gives."""
    grid(images, columns, names).save(path)


def save_gif(frames, path, columns, names=None, seconds=3.0):
    """Frames, each uint8 images (N, H, W, 3), as a GIF that ends with a pause."""
    pictures = [grid(frame, columns, names) for frame in frames]
    each = int(1000 * seconds / len(pictures))
    durations = [each] * (len(pictures) - 1) + [1500]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def save_velocity_loss(loss, path, title):
    """A VelocityLoss by time, with two standard errors around it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    means, errors = np.array(loss.mean), np.array(loss.standard_error)
    figure, axes = plt.subplots(figsize=(6.4, 3.6), dpi=120)
    axes.plot(loss.times, means, color="tab:blue", linewidth=1.4)
    axes.fill_between(loss.times, means - 2 * errors, means + 2 * errors, color="tab:blue", alpha=0.25, linewidth=0)
    axes.set(xlabel="time, from noise to data", ylabel="velocity loss, mean over dimensions", title=title, xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
