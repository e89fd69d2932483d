"""Checkpoint files: written whole or not at all, and read without running code.

A checkpoint of train.py is a dict with "model", "ema", "opt", "args" as published, plus other states by name, "step" and
"recipe" (recipe.py): all that is needed to rebuild the model and to sample from it.
"""

import argparse
import pickle
import warnings
import zipfile
from pathlib import Path

import torch

from .atomic import write_atomically
from .errors import UserError


class DamagedFile(UserError):
    """A checkpoint that is no whole one."""


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
        settings = dict(map_location="cpu", weights_only=True)
        if is_zip and str(path).isprintable():  # which torch can map
            return torch.load(path, mmap=True, **settings)
        with open(path, "rb") as file:
            return torch.load(file, **settings)


def load_checkpoint(path):
    """The content of a checkpoint file, tensors on the CPU, running no code from it. Raises UserError naming the file, which
    is a DamagedFile where it is not what was once written."""
    path = Path(path)
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "there is no such file"
        raise UserError(f"--ckpt {path}: {found}")
    try:
        content = _read_whole(path)
    except (OSError, MemoryError) as error:  # of the disk and the machine: another day the file may be read
        reason = "out of memory" if isinstance(error, MemoryError) else error.strerror or error
        raise UserError(f"--ckpt {path}: cannot be read ({reason})") from error
    except Exception as error:  # a damaged file can raise nearly anything
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            name = str(error).split("GLOBAL ", 1)[-1].split()[0]
            raise UserError(f"--ckpt {path}: refused, loading it would run code from the file ({name})") from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DamagedFile(f"--ckpt {path}: not a checkpoint, or a damaged one ({reason[:200]})") from error
    if not isinstance(content, dict) or not content:
        raise DamagedFile(f"--ckpt {path}: not a checkpoint (it holds a {type(content).__name__})")
    return content


def _is_sit(state):
    return isinstance(state, dict) and "pos_embed" in state and "x_embedder.proj.weight" in state


def weights_of(content, path="file", name=None):
    """A state dict of a checkpoint: the one called name (ema, ema-0.999, model), or the one to sample with, which is the
    EMA where there is one, else the model, else the content itself. Raises UserError naming what there is."""
    if name is not None and name not in content:
        there = ", ".join(key for key, value in content.items() if _is_sit(value)) or "bare weights alone"
        raise UserError(f"--ckpt {path}: it has no weights {name!r}; it has {there}")
    for key in ("ema", "model") if name is None else (name,):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    if not _is_sit(content):
        raise UserError(f"--ckpt {path}: holds no SiT weights (no pos_embed and x_embedder.proj.weight)")
    return content


def load_weights(model, state, path="file", **options):
    """Load a state dict strictly, with load_state_dict's options. Raises UserError with the first mismatch."""
    try:
        model.load_state_dict(state, strict=True, **options)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"--ckpt {path}: the weights do not fit the model: {' '.join(lines[1:2])}") from error
    return model
