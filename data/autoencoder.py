"""The frozen autoencoder between pixels and the latents that SiT learns.

Channels, down-sampling factor, scale and shift come from the autoencoder's own config; nothing here knows Stable
Diffusion's numbers.
"""

import hashlib
import json
import warnings
from pathlib import Path

import torch

from common.errors import UserError

PUBLISHED = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


def _slice(height, width):
    """Images of so many pixels that the autoencoder does at once: Stable Diffusion's largest tensors are then 2 GB."""
    return max(1, 32 * 256**2 // (height * width))


class PixelSpace:
    """--vae none: the latents are the pixels, with 3 channels or, of grey images, 1."""

    name, factor = "none", 1
    config_hash = "none"

    def __init__(self, channels=3):
        self.channels = self.image_channels = channels

    def to(self, device):
        return self

    def moments(self, pixels):
        return pixels, torch.zeros_like(pixels)

    def latents(self, mean, std, noise):
        return mean

    def decode(self, latents, batch_size=None, tiling=False):
        return latents


class LatentSpace:
    """A diffusers AutoencoderKL, frozen. Pixels and reconstructions are in [-1, 1]."""

    def __init__(self, vae, name):
        self.name = name
        # channels_last is the layout that convolutions are fastest in.
        self.vae = vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        config = vae.config
        self.channels, self.image_channels = config.latent_channels, config.in_channels
        if (self.image_channels, config.out_channels) not in ((1, 1), (3, 3)):
            found = f"from images of {self.image_channels} channels to such of {config.out_channels}"
            raise UserError(f"--vae {name}: it goes {found}; images have 3, or 1 where they are grey")
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.scale = config.scaling_factor
        self.shift = config.get("shift_factor") or 0.0
        self.center, self.spread = (self._by_channel(config.get(key), name) for key in ("latents_mean", "latents_std"))
        numbers = {key: config[key] for key in sorted(config) if not key.startswith("_")}
        self.config_hash = hashlib.sha256(json.dumps(numbers, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def _by_channel(self, numbers, name):
        """A config's number for each channel, to broadcast against latents; None where it has none."""
        if numbers is None:
            return None
        if len(numbers) != self.channels:
            raise UserError(f"--vae {name}: {len(numbers)} numbers in latents_mean or latents_std for {self.channels} channels")
        return torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1)

    def to(self, device):
        self.vae.to(device)
        self.center, self.spread = (x if x is None else x.to(device) for x in (self.center, self.spread))
        return self

    @torch.no_grad()
    def moments(self, pixels):
        """Mean and standard deviation of the posterior, each (N, channels, H / factor, W / factor), unscaled."""
        parts = [self.vae.encode(part).latent_dist for part in pixels.split(_slice(*pixels.shape[-2:]))]
        return torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])

    def latents(self, mean, std, noise):
        """A sample of the posterior, scaled to what the network sees: shift and scale, and where the config has them a mean
        and standard deviation of each channel."""
        latents = mean + std * noise - self.shift
        if self.center is not None:
            latents = latents - self.center
        if self.spread is not None:
            latents = latents / self.spread
        return latents * self.scale

    @torch.no_grad()
    def decode(self, latents, batch_size=None, tiling=False):
        """Latents as the network sees them -> pixels, batch_size images at a time (None: 32 of 256 px, fewer if larger).

        tiling: images larger than the autoencoder was trained on in overlapping tiles of that size, blended where they
        meet. It bounds memory, and changes pixels somewhat: normalisation and attention see a tile, not the image.
        """
        sides = (side * self.factor for side in latents.shape[-2:])
        latents = latents / self.scale
        if self.spread is not None:
            latents = latents * self.spread
        if self.center is not None:
            latents = latents + self.center
        parts = (latents + self.shift).split(batch_size or _slice(*sides))
        self.vae.use_tiling = tiling
        pixels = torch.cat([self.vae.decode(part).sample for part in parts])
        self.vae.use_tiling = False  # never for encoding: training has seen latents of whole images
        return pixels


def image_channels(name):
    """How many channels the images of the autoencoder called name have, before it is loaded: what a folder's config says; 3
    else, also of a folder that is none, as whoever loads it will tell."""
    try:
        return int(json.loads((Path(name) / "config.json").read_text())["in_channels"])
    except (OSError, ValueError, KeyError, TypeError):
        return 3


def load_autoencoder(name, channels=3):
    """The autoencoder called name: ema or mse (Stable Diffusion's), a folder in diffusers' format, or none, whose images have
    so many channels.

    Raises UserError with what to download, or what is wrong with the folder.
    """
    if name == "none":
        return PixelSpace(channels)
    source = PUBLISHED.get(name, name)
    if name not in PUBLISHED and not (Path(name) / "config.json").is_file():
        raise UserError(
            f"--vae {name}: no autoencoder there (no config.json); give ema, mse, none, or a folder in diffusers' format"
        )
    from diffusers import AutoencoderKL  # seconds to import, and pixel space needs none of it
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()  # its retries without network are a page long; ours is one line
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LatentSpace(AutoencoderKL.from_pretrained(source), name)
    except UserError:
        raise
    except Exception as error:  # diffusers and the hub raise a dozen unrelated types here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if name in PUBLISHED:
            raise UserError(
                f"--vae {name}: cannot load {source} ({reason}); without network, download "
                f"https://huggingface.co/{source} elsewhere (config.json, diffusion_pytorch_model.safetensors) "
                "and give its folder as --vae"
            ) from error
        raise UserError(f"--vae {name}: not a readable AutoencoderKL: {reason}") from error


def to_uint8(pixels):
    """Pixels in [-1, 1] (N, C, H, W), float -> uint8 images (N, H, W, 3), rounded to the nearest level; grey has three times
    the same, as every picture and every metric takes it."""
    levels = (pixels.float() * 127.5 + 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
