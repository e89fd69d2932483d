"""What people hand to a Pipeline, checked: labels, images and noise. Raises UsageError with one line."""

import numpy as np
import torch

from common.errors import UsageError, UserError
from common.sizes import height_width
from data.images import to_grey


def checked_labels(labels, count=None):
    """Class ids as int64 (N,); count: how many there must be."""
    try:
        y = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"labels must be class ids, not {labels!r}") from error
    if y.dim() != 1 or not len(y) or y.is_floating_point() or y.is_complex():
        raise UsageError(f"labels must be one class id or more in a list, not {labels!r}")
    if count is not None and len(y) != count:
        raise UsageError(f"{len(y)} labels for {count} images: give one each")
    return y.long()


def checked_images(images, recipe, autoencoder):
    """uint8 images (N, H, W, 3) of the recipe's size -> a tensor (N, C, H, W), grey where the autoencoder's are."""
    images, size = torch.as_tensor(np.asarray(images)), (*height_width(recipe.image_size), 3)
    if images.dtype != torch.uint8 or images.dim() != 4 or not len(images) or tuple(images.shape[1:]) != size:
        found = f"{str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape)}"
        raise UsageError(f"images must be uint8 of shape (N, {', '.join(map(str, size))}), not {found}")
    images = images.permute(0, 3, 1, 2)
    return images if autoencoder.image_channels == 3 else to_grey(images)


def checked_noise(noise, count, latent_shape):
    """Latents to start from, a tensor or an array of numbers (count, *latent_shape)."""
    noise = torch.as_tensor(noise)
    if noise.shape != (count, *latent_shape) or not noise.is_floating_point():
        raise UsageError(f"noise must be floats of shape {(count, *latent_shape)}, not {noise.dtype} of {tuple(noise.shape)}")
    return noise


def checked_indices(indices, count):
    """The samples' numbers, by default 0, 1, ..."""
    indices = range(count) if indices is None else indices
    if len(indices) != count:
        raise UsageError(f"{len(indices)} indices for {count} labels: give one each")
    return indices


def check_finite(values, whose, why):
    """Raises UserError where values are not all finite numbers: of them would be made a black picture."""
    if not bool(values.isfinite().all()):
        raise UserError(f"{whose} are not finite numbers{why}")
