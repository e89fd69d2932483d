"""The optimizer of a run, and what it owes the guard against bad numbers.

The contract: a step with a non-finite gradient must change neither a weight nor the optimizer's state. Fused optimizers
of PyTorch (AdamW, Adam, SGD, Adagrad) hold it by themselves: they read found_inf on the device and skip such a step, so
that the host need not wait. holds_contract tries it on a small weight when a run starts. For an optimizer that does not,
the guard asks the device before each step and leaves the bad ones out (guards.py): right for any optimizer, at the price
of one wait a step, which the log says.
"""

import inspect
import math

import torch
from torch.distributed.tensor import DTensor

from common.errors import UserError

from .tensors import like

MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg"}  # one number a weight
KERNELS = ("fused", "foreach", "capturable", "differentiable")  # how an optimizer computes, not what


def make_optimizer(objective, flags):
    """The optimizer of a run, here the paper's; groups of parameters may have their own settings, lr among them."""
    trained = [p for p in objective.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=flags.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


def learning_rate(step, peak, flags, total_steps):
    """Of step, counted from 0: linear warm-up to peak, then constant or a cosine to 0 at the last step."""
    if step < flags.warmup_steps:
        return peak * (step + 1) / flags.warmup_steps
    if flags.lr_schedule == "constant":
        return peak
    done = (step - flags.warmup_steps) / max(1, total_steps - flags.warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def holds_contract(optimizer, device):
    """Whether optimizers like this one skip a step on the device where found_inf is 1, tried on a small weight."""

    def after(*gradients):
        weight = torch.nn.Parameter(torch.ones(2, 2, device=device))
        twin = type(optimizer)([weight], **settings)
        for gradient in gradients:
            weight.grad = torch.full_like(weight, gradient)
            twin.found_inf = torch.tensor(float(not math.isfinite(gradient)), device=device)
            twin.step()
        return weight.detach()

    if any(group.get(key) != optimizer.defaults.get(key) for group in optimizer.param_groups for key in KERNELS):
        return False  # one group may skip a bad step and another not
    try:
        known = inspect.signature(type(optimizer)).parameters
        settings = {key: value for key, value in optimizer.defaults.items() if key in known}
        return torch.equal(after(0.5, math.nan, 0.25), after(0.5, 0.25))
    except Exception:  # it cannot be made so, or refuses found_inf: by whatever error its author chose
        return False


def _fitting(state, weight):
    """The state of one weight. Raises ValueError where its moments are those of a weight of another shape."""
    for name in sorted(MOMENTS & state.keys()):
        if state[name] is not None and state[name].shape != weight.shape:
            raise ValueError(f"{name} of shape {tuple(state[name].shape)} for a weight of shape {tuple(weight.shape)}")
    return state


def _own(state, weight):
    """In memory of its own, sharded as the weight is: a checkpoint's is a mapped file, which would be held open for as long as
    the run goes on."""
    return {name: value if not torch.is_tensor(value) else _copied(like(value, weight), value) for name, value in state.items()}


def _copied(tensor, saved):
    """Shards that were read for this process need no copy."""
    return tensor if isinstance(saved, DTensor) else tensor.clone()


def load_optimizer(optimizer, content, objective, path):
    """Load "opt" of a checkpoint's content, also a published one, which counts the fixed pos_embed among its parameters.

    Keeps the groups, and how this optimizer computes. Raises UserError where the state is of another model or optimizer.
    """
    ours, theirs = type(optimizer).__name__, content.get("optimizer", "AdamW")
    if ours != theirs:
        raise UserError(f"--ckpt {path}: it was trained with {theirs}, this run has {ours}")
    try:
        state, now = content["opt"], optimizer.state_dict()["param_groups"]
        saved, parameters = state["param_groups"], list(objective.parameters())
        places = [list(group["params"]) for group in saved]
        if len(places) == 1 and len(places[0]) == len(parameters):
            places = [[place for place, p in zip(places[0], parameters) if p.requires_grad]]
        sizes, theirs = [len(group["params"]) for group in now], [len(group) for group in places]
        if sizes != theirs:
            raise ValueError(f"groups of {', '.join(map(str, theirs))} parameters, not of {', '.join(map(str, sizes))}")
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        moments = {}
        for new, old in enumerate(place for group in places for place in group):
            if old in state["state"]:
                moments[new] = _own(_fitting(state["state"][old], trained[new]), trained[new])
        # Before loading, which puts the step counts where the kernels want them: on the device, for fused ones.
        kept = ("params", *KERNELS)
        groups = [g | s | {key: g[key] for key in kept if key in g} for g, s in zip(now, saved)]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--ckpt {path}: its optimizer state is that of another model ({error})") from error


def step_of(content, path="file"):
    """Optimizer steps behind a checkpoint's content; published ones do not say it but in their optimizer's state. Raises
    UserError where they are no number."""
    try:
        if "step" in content:
            return int(content["step"])
        states = (content.get("opt") or {}).get("state") or {}
        return max((int(state["step"]) for state in states.values() if "step" in state), default=0)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise UserError(f"--ckpt {path}: its step is no whole number ({str(error).splitlines()[0]})") from error
