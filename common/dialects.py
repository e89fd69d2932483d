"""Checkpoints of this architecture that other code wrote, in our terms: which code it was, and what its weights mean here.

SiT's own are as they are. REPA (Yu et al., arXiv 2410.06940) runs its time the other way and learns noise - data; both fold
into the weights. DiT (Peebles & Xie, arXiv 2212.09748) learns the noise of a discrete diffusion, which is the VP path asked at
other times (time_maps.py). What is opened so has a recipe, as if it were ours.
"""

import re
from dataclasses import replace

import torch

from models import TimestepEmbedder
from transport import TransportSettings

from .checkpoint import load_checkpoint, weights_of
from .errors import UsageError, UserError
from .kinds import KINDS
from .recipe import build_with, check_backbone, flags_in, recipe_of

TOLD = ("num_heads", "image_size", "num_classes", "input_size")  # by a caller, or by the file's own args or config
DIT = dict(transport=TransportSettings("VP", "noise"), time_map="ddpm")
REPA_PATHS = {"linear": "Linear", "cosine": "GVP"}
REPA_FLAGS = {"enc_type", "proj_coeff", "projector_embed_dims"}  # which SiT's training does not have
# Published weights that shapes do not tell from DiT's, by their size in bytes: SiT-XL-2-256.pt.
KNOWN_SIT = {2_700_608_707}


def open_checkpoint(path, kind="auto", **told):
    """load_checkpoint's content of a file of any of KINDS, in our terms. told: what a bare file cannot say, as recipe_of takes
    it, and path_type or prediction, which are SiT's words and so say the kind. Raises UserError or UsageError naming the file:
    for a file that contradicts kind, or that may be SiT's or DiT's alike."""
    if kind not in KINDS:
        raise UsageError(f"--kind {kind}: choose from {', '.join(KINDS)}")
    content = load_checkpoint(path)
    settled = {"path_type", "prediction"} & {key for key, value in told.items() if value is not None}
    path_type, told = told.get("path_type"), {key: told.get(key) for key in ("model", "num_heads", "image_size", "num_classes")}
    found = "sit" if isinstance(content.get("recipe"), dict) else _kind_of(content, path, told, kind, settled)
    if kind not in ("auto", found):
        raise UsageError(f"--kind {kind} contradicts {path}, which is of kind {found}")
    if found == "repa":
        return _from_repa(content, path, told, path_type)
    return _from_dit(content, path, told) if found == "dit" else content


def _kind_of(content, path, told, kind, settled):
    """The kind of a checkpoint that no recipe describes."""
    state = weights_of(content, path)
    check_backbone(state, path)
    if extra := sorted(key for key in state if re.search(r"\.[qk]_norm\.", key)):
        raise UserError(f"--ckpt {path}: its attention normalises queries and keys ({extra[0]}), which models.py does not")
    flags = flags_in(content)
    if REPA_FLAGS & flags.keys() or any(key.startswith(("projectors.", "decoder_blocks.")) for key in state):
        return "repa"
    channels, patch = state["x_embedder.proj.weight"].shape[1:3]
    doubled = len(state["final_layer.linear.bias"]) == 2 * channels * patch**2
    if path.stat().st_size in KNOWN_SIT:
        return "sit"
    if kind != "auto":
        if kind == "dit" and not doubled:
            raise UsageError(f"--kind dit contradicts {path}: a DiT gives twice as many channels as this file does")
        return kind
    if doubled and str(flags.get("model")).startswith("DiT"):
        return "dit"
    if not doubled or settled or {"path_type", "prediction"} & flags.keys():
        return "sit"
    return _ask(content, state, path, told)


def _ask(content, state, path, told):
    """SiT's or DiT's: asked what it sees in pure noise x. A velocity at SiT's t = 0 is nearly -x, whatever the data; the noise
    at DiT's step 999 is nearly x. A SiT's noise is nearly x at 0, and may be at 999 too; but at its other end, t = 1, it is
    another thing, while to a DiT 0 and 1 are two steps of a thousand, at which it says the same."""
    model = build_with(recipe_of(content, state, path, **told), state, path).eval()
    height, width = (side * model.patch_size for side in model.grid)
    x = torch.randn(1, model.in_channels, height, width, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    with torch.no_grad():
        first, second, last = model(x, torch.tensor([0.0, 1.0, 999.0]), torch.zeros(3, dtype=torch.long)).flatten(1)
    like = [torch.corrcoef(torch.stack([answer, x[0].flatten()]))[0, 1].item() for answer in (first, last)]
    if like[0] < -0.5:
        return "sit"
    changed = ((second - first).norm() / first.norm().clamp(min=1e-9)).item()
    if like[0] > -0.25 and like[1] > 0.9 and changed < 0.1:
        return "dit"
    raise UsageError(
        f"--ckpt {path}: its shapes are those of SiT and of DiT alike, and its answers to pure noise tell neither "
        f"({like[0]:.2f} at t = 0, {like[1]:.2f} at step 999); give --kind sit, with its --prediction, or --kind dit"
    )


def _described(content, path, told, states, what, **meaning):
    """A content of these states with the recipe of what they mean, and in words under "translated" what was made of them."""
    said = {key: value for key, value in flags_in(content).items() if key in TOLD}
    bare = {"config": content["config"]} if "config" in content else {"args": said}
    recipe = replace(recipe_of(bare, weights_of(states, path), path, **told), **meaning)
    return states | bare | {"recipe": recipe.to_dict(), "translated": f"{path}: {what}"}


def _states(content, path):
    """The weights to sample with, and beside an average the model's own."""
    both = all(isinstance(content.get(name), dict) for name in ("model", "ema"))
    return {"ema": weights_of(content, path)} | ({"model": weights_of(content, path, "model")} if both else {})


def _from_dit(content, path, told):
    said = "DiT's weights, read as noise prediction on the path VP, at its 1,000 steps and between them"
    return _described(content, path, told, _states(content, path), said, **DIT)


def _from_repa(content, path, told, path_type):
    """path_type: what a caller says, in our word, for a file that does not."""
    word = flags_in(content).get("path_type", "cosine" if path_type == "GVP" else "linear")
    if word not in REPA_PATHS:
        raise UserError(f"--ckpt {path}: its path is {word!r}; REPA knows {', '.join(REPA_PATHS)}")
    states = {name: fold_repa(state) for name, state in _states(content, path).items()}
    left = " and its optimizer's state" if "opt" in content else ""
    said = f"REPA's weights: its time and sign are folded into them, its projectors{left} left out"
    return _described(content, path, told, states, said, transport=TransportSettings(REPA_PATHS[word], "velocity"))


def fold_repa(state):
    """A state dict of REPA as one of SiT: the same network of 1 - t, negated, without the projectors that only training uses.

    The embedding of a time is [cos(t f), sin(t f)] of frequencies f, and that of 1 - t a rotation of it, which the first
    Linear takes in; in float64, as are the rotation's own cosines.
    """
    state = {key: value for key, value in state.items() if not key.startswith("projectors.")}
    depth = 1 + max((int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key)), default=-1)
    moved = re.compile(r"decoder_blocks\.(\d+)\.")  # of its first version
    state = {moved.sub(lambda found: f"blocks.{int(found[1]) + depth}.", key): value for key, value in state.items()}
    first, last = "t_embedder.mlp.0.weight", "final_layer.linear"
    weight = state[first].double()
    by_cos, by_sin = weight.chunk(2, dim=1)
    turn = TimestepEmbedder.frequencies(by_cos.shape[1], torch.float64)
    cos, sin = turn.cos(), turn.sin()
    folded = torch.cat([by_cos * cos + by_sin * sin, by_cos * sin - by_sin * cos], dim=1)
    negated = {f"{last}.{part}": -state[f"{last}.{part}"] for part in ("weight", "bias")}
    return state | {first: folded.to(state[first].dtype)} | negated
