"""From a checkpoint to something that makes images: what sample.py, sample_ddp.py and train.py share."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn

from autoencoder import PUBLISHED as PUBLISHED_VAES
from autoencoder import load_autoencoder, to_uint8
from checkpoint import Recipe, load_checkpoint, load_weights, recipe_of, weights_of
from download import PUBLISHED, locate
from errors import UsageError
from train_utils import TRANSPORT_KEYS, latent_shape, transport_from
from transport import Sampler, Transport


class GuidedModel(nn.Module):
    """The network as a sampler sees it, with guidance where it acts: (x, t, y) -> output. Counts its network calls.

    scale 1 is the bare network. Without a weak model this is classifier-free guidance: one call on twice the batch.
    With one it is autoguidance (Karras et al., arXiv 2406.02507): weak + scale (model - weak), one call of each.
    Guidance acts for low <= t <= high (Kynkaanniemi et al., arXiv 2404.07724), else the bare network runs.
    channels: how many of the leading channels are guided; None is all.
    """

    def __init__(self, model, scale=1.0, null_class=None, channels=3, low=0.0, high=1.0, weak=None):
        super().__init__()
        self.model, self.weak = model, weak
        self.scale, self.null_class, self.channels = scale, null_class, channels
        self.low, self.high = low, high
        self.calls = 0

    @property
    def edges(self):
        """Times at which the output jumps, for adaptive solvers."""
        return tuple(t for t in (self.low, self.high) if 0 < t < 1) if self.scale != 1 else ()

    def _acts(self, t):
        if self.scale == 1:
            return False
        # In t's own precision, which may hold low and high a little off; one wait for the device.
        return (self.low, self.high) == (0.0, 1.0) or bool((t[0] >= self.low) & (t[0] <= self.high))

    def forward(self, x, t, y):
        self.calls += 1
        torch.compiler.cudagraph_mark_step_begin()
        if not self._acts(t):
            return self.model(x, t, y).clone()  # a CUDA graph writes its next output over this one
        if self.weak is None:
            both = torch.cat([y, torch.full_like(y, self.null_class)])
            out = self.model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), both, self.scale, self.channels)
            return out[: len(x)]
        self.calls += 1
        out, weak = self.model(x, t, y), self.weak(x, t, y)
        guided = (weak + self.scale * (out - weak))[:, : self.channels]
        return torch.cat([guided, out[:, guided.shape[1] :]], dim=1)


@dataclass
class Pipeline:
    """A loaded checkpoint, ready to sample from."""

    path: Path
    recipe: Recipe
    model: GuidedModel
    transport: Transport
    autoencoder: object
    latent_shape: tuple
    device: torch.device
    decoding: dict  # LatentSpace.decode's batch_size and tiling

    @torch.no_grad()
    def decode(self, latents):
        """Latents (N, C, h, w) -> uint8 images (N, H, W, 3)."""
        return to_uint8(self.autoencoder.decode(latents.float(), **self.decoding))


def compile_network(model, encodes=False):
    """torch.compile the network in place, for sampling: one graph for each batch size, since guidance may double it.

    On GPUs the graphs are replayed as CUDA graphs, without launching kernel by kernel; not where gradients are wanted
    (encodes), which run through a graph more than once.
    """
    if encodes:
        from torch._functorch import config

        config.donated_buffer = False  # likelihood goes back through a graph that it keeps
    model.forward = torch.compile(model.forward, dynamic=False, mode=None if encodes else "reduce-overhead")


def _check_flags(args, recipe, path):
    """Typed flags against what the checkpoint says of itself."""
    found = {
        "model": recipe.model,
        "image_size": recipe.image_size,
        "num_classes": recipe.num_classes,
        **{key: getattr(recipe, key) for key in TRANSPORT_KEYS if key != "sample_eps"},  # sampling's own to choose
    }
    described = recipe.path_type is not None
    for name, value in found.items():
        unknown = name in TRANSPORT_KEYS and not described
        if name in args.given and not unknown and getattr(args, name) != value:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)} contradicts {path}, which has {value}")


def _open_autoencoder(args, recipe, path):
    """The autoencoder asked for, or the checkpoint's. A different one is an error, but ema and mse share their latents."""
    name = args.vae if "vae" in args.given or recipe.vae is None else recipe.vae
    autoencoder = load_autoencoder(name)
    same_latents = recipe.vae in PUBLISHED_VAES and name in PUBLISHED_VAES
    if not same_latents and recipe.vae_hash not in (None, autoencoder.config_hash):
        raise UsageError(f"--vae {name} contradicts {path}, which was trained with another autoencoder, {recipe.vae}")
    return autoencoder


def _load(name, device, dtype, args=None):
    path = locate(name)
    content = load_checkpoint(path)
    state = weights_of(content, path)
    recipe = recipe_of(content, state, path, args.model if args and "model" in args.given else None)
    if args:
        _check_flags(args, recipe, path)
    model = load_weights(recipe.build(), state, path).to(device=device, dtype=dtype).eval().requires_grad_(False)
    model.t_embedder.float()  # as in training: bfloat16 cannot tell neighbouring times apart
    return path, recipe, model


def load_pipeline(args, device, precision="fp32"):
    """Model, transport and autoencoder of args.ckpt. Raises UserError or UsageError, one line each.

    args: parse_model_args, parse_guidance_args and parse_transport_args' flags, with args.given.
    """
    ckpt = args.ckpt
    if ckpt is None:
        if (args.model, args.image_size, args.num_classes) != ("SiT-XL/2", 256, 1000):
            raise UsageError("--ckpt is missing: published weights are there only for SiT-XL/2 at 256 px and 1000 classes")
        ckpt = next(iter(PUBLISHED))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    path, recipe, model = _load(ckpt, device, dtype, args)
    settings = {key: getattr(args, key) for key in TRANSPORT_KEYS}
    if recipe.path_type is not None:
        own = {key: getattr(recipe, key) for key in TRANSPORT_KEYS}
        settings = {key: settings[key] if key == "sample_eps" and key in args.given else own[key] for key in own}
    transport = transport_from(settings)
    autoencoder = _open_autoencoder(args, recipe, path).to(device)
    recipe = replace(recipe, **settings, vae=autoencoder.name, vae_hash=autoencoder.config_hash)
    shape = latent_shape(recipe.image_size, autoencoder, recipe.model_args["patch_size"])
    expected = (recipe.model_args["in_channels"], recipe.model_args["input_size"], recipe.model_args["input_size"])
    if shape != expected:
        raise UsageError(f"--vae {autoencoder.name} makes latents of {shape}, but {path} was trained on {expected}")

    if args.guidance_low > args.guidance_high:
        raise UsageError(f"--guidance-low {args.guidance_low} is above --guidance-high {args.guidance_high}")
    scale, weak = args.cfg_scale, None
    for flag in {"guidance_ckpt", "guidance_low", "guidance_high"} & args.given if scale == 1 else ():
        raise UsageError(f"--{flag.replace('_', '-')} needs a --cfg-scale other than 1, which is no guidance")
    if args.guidance_ckpt:
        weak_path, weak_recipe, weak = _load(args.guidance_ckpt, device, dtype)
        for what in ("image_size", "num_classes", "path_type", "prediction", "vae_hash"):
            ours, theirs = getattr(recipe, what), getattr(weak_recipe, what)
            if theirs not in (None, ours):
                raise UsageError(f"--guidance-ckpt {weak_path} has {what} {theirs}, but {path} has {ours}")
    elif scale != 1 and recipe.null_class is None:
        if "cfg_scale" in args.given:
            raise UsageError(f"--cfg-scale {scale}: {path} was trained without a null class, so only 1 is possible")
        scale = 1.0
    if args.compile:
        compile_network(model, encodes=args.encodes)
        if weak:
            compile_network(weak, encodes=args.encodes)
    channels = None if args.cfg_channels == "all" else int(args.cfg_channels)
    guided = GuidedModel(model, scale, recipe.null_class, channels, args.guidance_low, args.guidance_high, weak)
    for flag in {"vae_batch_size", "vae_tiling"} & args.given if autoencoder.name == "none" else ():
        raise UsageError(f"--{flag.replace('_', '-')}: --vae none is pixel space, there is nothing to decode")
    decoding = dict(batch_size=args.vae_batch_size, tiling=args.vae_tiling)
    return Pipeline(path, recipe, guided, transport, autoencoder, shape, device, decoding)


def ode_settings(args):
    """The solver's flags, as sample_ode and sample_ode_likelihood take them."""
    return dict(sampling_method=args.sampling_method, num_steps=args.num_sampling_steps, atol=args.atol, rtol=args.rtol)


def sampler_from(args, transport, edges=(), randn=torch.randn_like, reverse=False, **more):
    """Sampling function for the subcommand and flags of args: ODE or SDE. A bad setting is a UsageError.

    edges: for the ODE, GuidedModel's. randn: for the SDE, where its noise comes from. more: trajectory, on_step.
    """
    sampler = Sampler(transport)
    try:
        if args.mode == "ODE":
            return sampler.sample_ode(**ode_settings(args), edges=edges, reverse=reverse, **more)
        return sampler.sample_sde(
            sampling_method=args.sampling_method,
            diffusion_form=args.diffusion_form,
            diffusion_norm=args.diffusion_norm,
            last_step=args.last_step,
            last_step_size=args.last_step_size,
            num_steps=args.num_sampling_steps,
            randn=randn,
            **more,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
