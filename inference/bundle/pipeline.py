"""Sampling from a SiT with diffusers alone:

pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
images = pipe(["golden retriever", 360], guidance_scale=4.0).images
"""

from itertools import pairwise
from types import SimpleNamespace

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

from .autoencoder import LatentSpace, PixelSpace, to_uint8
from .guidance import GuidedNetwork
from .sampler import Sampler
from .settings import TransportSettings
from .solvers import ODE_METHODS, SDE_METHODS
from .streams import SampleStreams
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
    model_cpu_offload_seq = "transformer->vae"

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
        num_inference_steps=50,
        diffusion_form="sigma",
        diffusion_norm=1.0,
        last_step="Mean",
        last_step_size=0.04,
        generator=None,
        latents=None,
        output_type="pil",
        return_dict=True,
    ):
        """Images of these classes, of which image i depends on (seed, i) and its label alone.

        method: a solver of the ODE (heun, euler; dopri5 and others with torchdiffeq), or Euler or Heun, with a capital, of the
        SDE, for which diffusion_form and what follows it are. num_inference_steps counts points in time. guidance_channels:
        latent channels that are guided, None being all. generator: a torch.Generator, of which the seed is drawn. latents:
        noise (N, C, h, w) instead of the seed's. output_type: pil, np (uint8 (N, H, W, 3)), pt (floats in [0, 1], (N, 3, H, W))
        or latent.
        """
        network, device = self.transformer, self._execution_device
        recipe = network.config.recipe
        y = torch.tensor(self._ids(class_labels, recipe["classes"]), device=device)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r}: choose from pil, np, pt, latent")
        if guidance_scale != 1 and not network.config.class_dropout_prob:
            raise ValueError("guidance_scale: this model was trained without a null class, so only 1 is possible")
        if generator is not None:
            seed = torch.randint(2**62, (1,), generator=generator, device=generator.device).item()
        guidance = SimpleNamespace(scale=guidance_scale, channels=guidance_channels)
        guidance.low, guidance.high = guidance_interval
        guided = GuidedNetwork(network, guidance, network.num_classes)
        streams = SampleStreams(seed, range(len(y)))
        rows, columns = (side * network.patch_size for side in network.grid)
        noise = streams.randn((network.in_channels, rows, columns), device)
        x = noise if latents is None else latents.to(device, torch.float32)  # a solver's states are float32 in any precision
        sampler = Sampler(Transport(TransportSettings(**recipe["transport"])))
        if method in SDE_METHODS:
            sample = sampler.sample_sde(
                sampling_method=method,
                diffusion_form=diffusion_form,
                diffusion_norm=diffusion_norm,
                last_step=last_step,
                last_step_size=last_step_size,
                num_steps=num_inference_steps,
                randn=streams.randn_like,
            )
        else:
            edges = [t for t in guidance_interval if 0 < t < 1]
            sample = sampler.sample_ode(sampling_method=method, num_steps=num_inference_steps, edges=edges)
        images = self._images(sample(x, guided, y=y)[-1], output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def _images(self, latents, output_type):
        if output_type == "latent":
            return latents
        if self.vae is None and self.transformer.config.recipe["vae"] != "none":
            raise ValueError("this model makes latents, and the pipeline has no vae; output_type='latent' gives them")
        space = PixelSpace(self.transformer.in_channels)
        if self.vae is not None:
            space = LatentSpace(self.vae, "vae").to(latents.device)
            latents = latents.to(self.vae.dtype)
        images = to_uint8(space.decode(latents)).cpu()
        if output_type == "pt":
            return images.permute(0, 3, 1, 2) / 255
        return images.numpy() if output_type == "np" else [Image.fromarray(image) for image in images.numpy()]

    def _ids(self, labels, names):
        """Class ids of labels, or of one, which are ids or names."""
        labels = [labels] if isinstance(labels, (str, int)) else list(labels)
        ids = [names.index(label) if isinstance(label, str) and label in names else label for label in labels]
        for label in ids:
            if isinstance(label, (str, bool)) or label != int(label) or not 0 <= label < self.transformer.num_classes:
                known = f"0 to {self.transformer.num_classes - 1}" + (f", or {', '.join(names[:5])}, ..." if names else "")
                raise ValueError(f"unknown class {label!r}: this model knows {known}")
        return list(map(int, ids))
