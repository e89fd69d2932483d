"""Sampling from a SiT with diffusers alone:

pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
images = pipe(["golden retriever", 360], guidance_scale=4.0).images
"""

from itertools import pairwise
from types import SimpleNamespace

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

# Some of these are for others of these: diffusers copies what is imported here, and no further.
from .autoencoder import LatentSpace, PixelSpace, to_uint8
from .diffusion import DIFFUSION_FORMS  # noqa: F401
from .errors import UserError  # noqa: F401
from .guidance import GuidedNetwork
from .integrators import integrate_ode  # noqa: F401
from .likelihood import divergence  # noqa: F401
from .path import PATHS  # noqa: F401
from .prediction import PREDICTIONS  # noqa: F401
from .sampler import Sampler
from .settings import TransportSettings
from .solvers import ODE_METHODS, SDE_METHODS
from .streams import SampleStreams
from .times import TIME_LAWS  # noqa: F401
from .transport import Transport


def euler(drift, x, times, plan):
    for t, following in pairwise(times):
        x = x + (following - t) * drift(t, x)
        yield x


def heun(drift, x, times, plan):
    for t, following in pairwise(times):
        here = drift(t, x)
        x = x + (following - t) * (here + drift(following, x + (following - t) * here)) / 2
        yield x


ODE_METHODS |= {"euler": euler, "heun": heun}  # which need no further package; the others are torchdiffeq's


class SiTPipeline(DiffusionPipeline):
    """A SiT and its autoencoder. Labels are class ids, or names where the model has them."""

    _optional_components = ["vae"]  # noqa: RUF012  None in pixel space; diffusers wants a list

    def __init__(self, transformer, vae):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        class_labels,
        seed=0,
        guidance_scale=1.0,
        guidance_channels=3,
        guidance_interval=(0.0, 1.0),
        method="heun",
        num_steps=50,
        latents=None,
        output_type="pil",
        **sde,
    ):
        """Images of these classes, of which image i depends on (seed, i) and its label alone.

        method: a solver of the ODE (heun, euler; dopri5 and others with torchdiffeq), or Euler or Heun, with a capital, of the
        SDE; num_steps counts points in time. sde: diffusion_form (sigma), diffusion_norm, last_step, last_step_size.
        guidance_channels: latent channels that are guided, None being all. latents: noise (N, C, h, w) instead of the seed's.
        output_type: pil, np (uint8 (N, H, W, 3)) or latent.
        """
        network, recipe = self.transformer, self.transformer.config.recipe
        y = torch.tensor(self._ids(class_labels, recipe["classes"]), device=self.device)
        transport = Transport(TransportSettings(**recipe["transport"]))
        guidance = SimpleNamespace(scale=guidance_scale, channels=guidance_channels)
        guidance.low, guidance.high = guidance_interval
        guided = GuidedNetwork(network, guidance, network.num_classes)
        streams = SampleStreams(seed, range(len(y)))
        rows, columns = (side * network.patch_size for side in network.grid)
        noise = streams.randn((network.in_channels, rows, columns), self.device)
        x = noise if latents is None else latents.to(self.device)
        if method in SDE_METHODS:
            settings = dict(diffusion_form="sigma") | sde
            sample = Sampler(transport).sample_sde(
                sampling_method=method, num_steps=num_steps, randn=streams.randn_like, **settings
            )
        else:
            edges = [t for t in guidance_interval if 0 < t < 1]
            sample = Sampler(transport).sample_ode(sampling_method=method, num_steps=num_steps, edges=edges, **sde)
        x = sample(x, guided, y=y)[-1]
        if output_type == "latent":
            return x
        space = PixelSpace(network.in_channels) if self.vae is None else LatentSpace(self.vae, "vae").to(self.device)
        images = to_uint8(space.decode(x)).cpu().numpy()
        return ImagePipelineOutput(images if output_type == "np" else [Image.fromarray(image) for image in images])

    def _ids(self, labels, names):
        """Class ids of labels, which are ids or names."""
        ids = [names.index(label) if isinstance(label, str) and label in names else label for label in labels]
        for label in ids:
            if isinstance(label, str) or not 0 <= label < self.transformer.num_classes:
                known = f"0 to {self.transformer.num_classes - 1}" + (f", or {', '.join(names[:5])}, ..." if names else "")
                raise ValueError(f"unknown class {label!r}: this model knows {known}")
        return ids
