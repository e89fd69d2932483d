"""Samples as files for a person's eye."""

import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid


def grid(images, columns):
    """uint8 images (N, H, W, 3) -> one, with white lines between them."""
    tensor = torch.as_tensor(np.asarray(images)).permute(0, 3, 1, 2)
    return Image.fromarray(make_grid(tensor, nrow=columns, padding=2, pad_value=255).permute(1, 2, 0).numpy())


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
