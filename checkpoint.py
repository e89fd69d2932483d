"""Checkpoint files: written whole or not at all, read without running code, and self-describing.

A checkpoint of train.py is a dict with "model", "ema", "opt", "args" as published, plus "step" and "recipe": all that is
needed to rebuild the model and to sample from it. Files without a recipe are described by their tensors' shapes.
"""

import argparse
import math
import pickle
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from atomic import write_atomically
from errors import UsageError, UserError
from models import SIT_CONFIGS, SiT


@dataclass
class Recipe:
    """What a trained model is: how to build it, and what its inputs and outputs mean."""

    model: str  # name in SiT_models
    model_args: dict  # SiT's constructor, complete
    image_size: int  # pixels
    vae: str = None  # --vae at training; None if the file does not say
    vae_hash: str = None  # of the autoencoder's config
    path_type: str = None  # transport settings, None if the file does not say
    prediction: str = None
    loss_weight: str = None
    train_eps: float = None
    sample_eps: float = None
    classes: list = field(default_factory=list)  # names, by class id

    @property
    def num_classes(self):
        return self.model_args["num_classes"]

    @property
    def null_class(self):
        """Id of the class that stands for none, or None where the model was not trained with one."""
        return self.num_classes if self.model_args["class_dropout_prob"] > 0 else None

    def build(self):
        return SiT(**self.model_args)

    def to_dict(self):
        return asdict(self)

    @classmethod
    def from_dict(cls, values):
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})


def save_checkpoint(content, path):
    """Write content to path so that path always holds a whole file."""
    write_atomically(path, lambda file: torch.save(content, file))


def _read_whole(path):
    """torch.load of a file that was first read against its own checksums (the CRC-32 of each tensor)."""
    is_zip = zipfile.is_zipfile(path)  # else a file of before torch 1.6, or none of torch's
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} does not match its checksum")
    # Published checkpoints carry their args as a Namespace.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols; what matters is raised
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip or None)


def load_checkpoint(path):
    """The content of a checkpoint file, tensors on the CPU, running no code from it. Raises UserError naming the file."""
    path = Path(path)
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "there is no such file"
        raise UserError(f"--ckpt {path}: {found}")
    try:
        content = _read_whole(path)
    except Exception as error:  # a damaged file can raise nearly anything
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            name = str(error).split("GLOBAL ", 1)[-1].split()[0]
            raise UserError(f"--ckpt {path}: refused, loading it would run code from the file ({name})") from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--ckpt {path}: not a checkpoint, or a damaged one ({reason[:200]})") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"--ckpt {path}: not a checkpoint (it holds a {type(content).__name__})")
    return content


def weights_of(content, path="file"):
    """The weights to sample with: EMA where there is one, else the model's, else the content as a bare state dict."""
    for key in ("ema", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    if "pos_embed" not in content or "x_embedder.proj.weight" not in content:
        raise UserError(f"--ckpt {path}: holds no SiT weights (no pos_embed and x_embedder.proj.weight)")
    return content


def recipe_of(content, state, path="file", model_name=None):
    """Recipe of a loaded checkpoint, from its own description or else from the shapes of its weights.

    model_name, from --model, settles what shapes cannot tell: the number of heads of an unknown width.
    """
    if isinstance(content.get("recipe"), dict):
        return Recipe.from_dict(content["recipe"])
    hidden, channels, patch, _ = state["x_embedder.proj.weight"].shape
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    rows = state["y_embedder.embedding_table.weight"].shape[0]
    input_size = math.isqrt(state["pos_embed"].shape[1]) * patch
    shape = {"depth": depth, "hidden_size": hidden, "patch_size": patch}
    names = [name for name, config in SIT_CONFIGS.items() if shape.items() <= config.items()]
    if model_name and model_name not in names:
        found = names[0] if names else f"a model of depth {depth}, width {hidden}, patch {patch}"
        raise UsageError(f"--model {model_name} contradicts {path}, which holds {found}")
    if not names:
        raise UserError(f"--ckpt {path}: no SiT configuration has depth {depth}, width {hidden} and patch {patch}")
    model_args = {
        **SIT_CONFIGS[names[0]],
        "input_size": input_size,
        "in_channels": channels,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / hidden,
        "num_classes": rows - 1,  # a bare file cannot say that it has no null class; published ones all have it
        "class_dropout_prob": 0.1,
        "learn_sigma": state["final_layer.linear.weight"].shape[0] == 2 * channels * patch**2,
    }
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    keys = ("vae", "path_type", "prediction", "loss_weight", "train_eps", "sample_eps")
    said = {key: args[key] for key in keys if key in args}
    return Recipe(model=names[0], model_args=model_args, image_size=args.get("image_size", input_size * 8), **said)


def load_weights(model, state, path="file"):
    """Load a state dict strictly. Raises UserError with the first mismatch."""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"--ckpt {path}: the weights do not fit the model: {' '.join(lines[1:2])}") from error
    return model
