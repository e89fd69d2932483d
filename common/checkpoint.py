"""Checkpoint files: written whole or not at all, and read without running code.

Read are torch's files, safetensors, and folders in diffusers' layout, from here or from elsewhere: what other code wrapped the
weights in, or put before their names, is seen through.

A checkpoint of train.py is a dict with "model", "ema", "opt", "args" as published, plus other states by name, "step" and
"recipe" (recipe.py): all that is needed to rebuild the model and to sample from it.
"""

import argparse
import hashlib
import json
import pathlib
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from .atomic import write_atomically
from .errors import UserError

# What else than tensors and Python's own values the args of a checkpoint may hold: values alone, which run no code. A pair is
# what stands for a name, of other versions or of another system.
_number = np.float64(0).__reduce__()[0]
VALUES = [argparse.Namespace, np.dtype, _number, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]
VALUES += [(_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
for _module in ("pathlib", "pathlib._local"):
    VALUES += [(kind, f"{_module}.Pure{kind.__name__[4:]}") for kind in (pathlib.PurePosixPath, pathlib.PureWindowsPath)]
    VALUES += [(pathlib.PurePosixPath, f"{_module}.PosixPath"), (pathlib.PureWindowsPath, f"{_module}.WindowsPath")]
WRAPPERS = ("ema", "model_ema", "model", "state_dict", "model_state_dict", "net")  # of weights, the best first
PREFIX = re.compile(r"(module\.|_orig_mod\.)+")  # of DDP and of torch.compile
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"  # of a folder in diffusers' layout, beside its config.json


class DamagedFile(UserError):
    """A checkpoint that is no whole one."""


class Watched:
    """A file that calls watch() before it is written to."""

    def __init__(self, file, watch):
        self.file, self.watch, self.flush = file, watch, file.flush

    def write(self, data):
        self.watch()
        return self.file.write(data)


def save_checkpoint(content, path, watch=lambda: None):
    """Write content to path so that path always holds a whole file. watch() is called before each part of it, and gives the
    file up by raising."""
    write_atomically(path, lambda file: torch.save(content, Watched(file, watch)))


def _read_whole(path):
    """The content of a file. torch's are first read against their own checksums (the CRC-32 of each tensor)."""
    if path.suffix == ".safetensors":
        return load_file(path)
    is_zip = zipfile.is_zipfile(path)  # else a file of before torch 1.6, or none of torch's
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} does not match its checksum")
    # Published checkpoints carry their args as a Namespace.
    with torch.serialization.safe_globals(VALUES), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols; what matters is raised
        settings = dict(map_location="cpu", weights_only=True)
        if is_zip and str(path).isprintable():  # which torch can map
            return torch.load(path, mmap=True, **settings)
        with open(path, "rb") as file:
            return torch.load(file, **settings)


def load_checkpoint(path):
    """The content of a checkpoint file, tensors on the CPU, running no code from it. Raises UserError naming the file, which
    is a DamagedFile where it is not what was once written.

    A folder in diffusers' layout (transformer/config.json and its weights, or these alone) becomes a content whose "ema" are
    the weights, and whose "config" is the config. A folder that many processes wrote (sharded.py) is read like a file.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise UserError(f"--ckpt {path}: there is no such file")
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


def _part(path):
    """Where the transformer of a folder in diffusers' layout is."""
    return path / "transformer" if (path / "transformer").is_dir() else path


def _hashed(path):
    """The file that stands for a file, or for a folder: its weights, or the list of its files' checksums."""
    from .sharded import MANIFEST, is_sharded

    if not path.is_dir():
        return path
    return path / MANIFEST if is_sharded(path) else _part(path) / WEIGHTS_FILE


def file_hash(path):
    """SHA-256 of a file, or of a folder's weights. Raises UserError where there are none."""
    path, digest = Path(path), hashlib.sha256()
    try:
        with open(_hashed(path), "rb") as file:
            while part := file.read(1 << 24):
                digest.update(part)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _load_folder(path):
    from . import sharded  # which reads its files by this module

    if sharded.is_sharded(path):
        sharded.verify(path)
        return sharded.load_whole(path)
    part = _part(path)
    if not (part / "config.json").is_file():
        raise UserError(f"--ckpt {path}: it is a folder, and not one in diffusers' layout (no transformer/config.json)")
    try:
        config = dict(json.loads((part / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DamagedFile(f"--ckpt {path}: its config.json cannot be read ({error})") from error
    recipe = {"recipe": dict(config["recipe"])} if isinstance(config.get("recipe"), dict) else {}
    places = [place / "vae" for place in (path, path.resolve().parent) if part == path or place == path]
    if recipe and (vae := next(filter(Path.is_dir, places), None)):
        recipe["recipe"]["vae"] = str(vae)  # where it is now
    return {"ema": load_checkpoint(part / WEIGHTS_FILE), "config": config} | recipe


def _bare(state):
    """A state dict without what DDP and torch.compile put before names."""
    return {PREFIX.sub("", key, 1) if PREFIX.match(str(key)) else key: value for key, value in state.items()}


def _is_sit(state):
    return (
        isinstance(state, dict)
        and all(isinstance(key, str) for key in state)
        and "pos_embed" in state
        and "x_embedder.proj.weight" in state
    )


def weights_of(content, path="file", name=None):
    """A state dict of a checkpoint: the one called name (ema, ema-0.999, model), or the one to sample with, which is the
    EMA where there is one, else the model, else the content itself. Raises UserError naming what there is."""
    if name is not None and name not in content:
        there = ", ".join(key for key, value in content.items() if _is_sit(value)) or "bare weights alone"
        raise UserError(f"--ckpt {path}: it has no weights {name!r}; it has {there}")
    for key in WRAPPERS if name is None else (name,):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    content = _bare(content)
    if not _is_sit(content):
        if states := [key for key, value in content.items() if _is_sit(value)]:
            raise UserError(f"--ckpt {path}: it has no ema; name one of its weights, such as --weights {states[0]}")
        found = ", ".join(map(str, list(content)[:3])) or "nothing"
        raise UserError(f"--ckpt {path}: holds no SiT weights (no pos_embed and x_embedder.proj.weight; it has {found}, ...)")
    return content


def load_weights(model, state, path="file", **options):
    """Load a state dict strictly, with load_state_dict's options. Raises UserError with the first mismatch."""
    try:
        model.load_state_dict(state, strict=True, **options)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"--ckpt {path}: the weights do not fit the model: {' '.join(lines[1:2])}") from error
    return model
