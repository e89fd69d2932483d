"""Rows of images as one picture with words around them: what a notebook shows."""

import numpy as np
from PIL import Image, ImageDraw

from .pictures import font_for

GAP = 4  # pixels between the images


def _lines(words, font, room):
    """A line of words, broken at those spaces behind which it would be wider than room."""
    lines = []
    for word in words.split():
        longer = f"{lines[-1]} {word}" if lines else word
        lines[-1:] = [longer] if not lines or font.getlength(longer) < room else [lines[-1], word]
    return "\n".join(lines)


def labelled(rows, above=(), beside=(), width=800):
    """Rows of uint8 images (N, H, W, 3) as one picture with words above its columns and beside its rows.

    Pixels stay squares: each is enlarged by the largest whole number that keeps the images within width. Words above
    are broken at spaces where their column ends.
    """
    height, side = rows[0][0].shape[:2]
    scale = max(1, (width // len(rows[0]) - GAP) // side)
    height, side = height * scale + GAP, side * scale + GAP
    font = font_for([*above, *beside], max(13, side // 9))
    above = ["\n".join(_lines(line, font, side) for line in word.splitlines()) for word in above]
    pen = ImageDraw.Draw(Image.new("L", (1, 1)))
    left, top = 0, 0
    if beside:
        left = 3 * GAP + max(round(pen.multiline_textbbox((0, 0), word, font)[2]) for word in beside)
    if above:
        top = 3 * GAP + max(round(pen.multiline_textbbox((0, 0), word, font)[3]) for word in above)
    picture = Image.new("RGB", (left + side * len(rows[0]), top + height * len(rows)), "white")
    pen = ImageDraw.Draw(picture)
    for i, word in enumerate(above):
        pen.multiline_text((left + i * side + side // 2, top - 2 * GAP), word, "black", font, anchor="md", align="center")
    for j, word in enumerate(beside):
        pen.multiline_text((left - 2 * GAP, top + j * height + height // 2), word, "black", font, anchor="rm", align="right")
    for j, images in enumerate(rows):
        for i, image in enumerate(images):
            enlarged = np.asarray(image).repeat(scale, 0).repeat(scale, 1)
            picture.paste(Image.fromarray(enlarged), (left + i * side, top + j * height))
    return picture
