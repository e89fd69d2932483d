"""The parts of a training step that are functions of its number, and what makes two runs the same."""

import math
from collections import namedtuple

import torch

from errors import UsageError
from streams import generator
from train_utils import TRANSPORT_KEYS

# Flags that make the run what it is: a checkpoint is continued only with the same.
IDENTITY = (
    "model",
    "image_size",
    "num_classes",
    "global_batch_size",
    "global_seed",
    "lr",
    "lr_schedule",
    "warmup_steps",
    "grad_clip",
    "ema_decay",
    "class_dropout_prob",
    "no_flip",
    "vae",
    *TRANSPORT_KEYS,
)

Draws = namedtuple("Draws", "flip posterior noise time drop")


def draw_step(seed, step, batch, shape, device):
    """All random numbers of a step, for the whole global batch: uniform flip, time and drop (batch,), normal posterior
    and noise (batch, *shape)."""
    g = generator(device, seed, "step", step)
    uniform = lambda: torch.rand(batch, generator=g, device=device)  # noqa: E731
    normal = lambda: torch.randn((batch, *shape), generator=g, device=device)  # noqa: E731
    return Draws(flip=uniform() < 0.5, posterior=normal(), noise=normal(), time=uniform(), drop=uniform())


def learning_rate(step, args, total_steps):
    """Linear warm-up, then constant or a cosine to 0 at the last step."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    if args.lr_schedule == "constant":
        return args.lr
    done = (step - args.warmup_steps) / max(1, total_steps - args.warmup_steps)
    return args.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@torch.no_grad()
def update_ema(ema_params, params, decay):
    """ema = decay ema + (1 - decay) params, all tensors in one call."""
    torch._foreach_lerp_(ema_params, params, 1 - decay)


def check_identity(args, content, path):
    """Refuse to continue a run under other flags, naming each difference."""
    saved = content.get("args") or {}
    saved = saved if isinstance(saved, dict) else vars(saved)
    different = [key for key in IDENTITY if key in saved and saved[key] != getattr(args, key)]
    if different:
        each = ", ".join(f"--{key.replace('_', '-')} {saved[key]} (now {getattr(args, key)})" for key in different)
        raise UsageError(f"--ckpt {path} was made with {each}; continue with the same, or start a new run without --ckpt")
