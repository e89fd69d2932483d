"""Samples as files for a person's eye."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

GAP = 4  # pixels between the images of a labelled picture


def grid(images, columns):
    """uint8 images (N, H, W, 3) -> one, with white lines between them."""
    tensor = torch.as_tensor(np.asarray(images)).permute(0, 3, 1, 2)
    return Image.fromarray(make_grid(tensor, nrow=columns, padding=2, pad_value=255).permute(1, 2, 0).numpy())


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
    font = ImageFont.load_default(max(13, side // 9))
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


def save_picture(images, path, columns):
    """uint8 images (N, H, W, 3) as one picture."""
    grid(images, columns).save(path)


def save_gif(frames, path, columns, seconds=3.0):
    """Frames, each uint8 images (N, H, W, 3), as a GIF that ends with a pause."""
    pictures = [grid(frame, columns) for frame in frames]
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
