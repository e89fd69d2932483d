"""The tensors of a nested content by name, and the rest of it: dicts, lists and tuples, with texts and ints for keys."""

import copy
import re

import torch

TENSOR = "sharded tensor"  # the key by which a dict stands for a tensor


def name_of(*keys):
    """The name of a tensor from the keys that lead to it: name_of("opt", "state", 0, "step") is "opt/state/0/step". Texts that
    hold a "/" or "~", or look like an int, are written with "~", so that keys_of has the same keys again."""
    if unknown := [key for key in keys if type(key) not in (int, str)]:
        raise TypeError(f"a key of a checkpoint is a text or an int, not {unknown[0]!r}")
    texts = [key if isinstance(key, int) else key.replace("~", "~0").replace("/", "~1") for key in keys]
    return "/".join(f"~2{text}" if isinstance(text, str) and _is_int(text) else str(text) for text in texts)


def keys_of(name):
    """The keys of which name_of made a name."""
    parts = [part if part.startswith("~2") or not _is_int(part) else int(part) for part in name.split("/")]
    return tuple(
        part if isinstance(part, int) else part.removeprefix("~2").replace("~1", "/").replace("~0", "~") for part in parts
    )


def _is_int(text):
    return re.fullmatch("-?[0-9]+", text) is not None


def split(content):
    """({name: tensor}, the same content with a dict in the place of each tensor that says its name, shape and dtype)."""
    tensors = {}

    def visit(value, *keys):
        if isinstance(value, torch.Tensor):
            name = name_of(*keys)
            tensors[name] = value.detach()
            return {TENSOR: name, "shape": tuple(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if isinstance(value, dict) and TENSOR in value:
            raise ValueError(f"{TENSOR!r} cannot be a key of a checkpoint")
        return rebuilt(value, lambda key, each: visit(each, *keys, key))

    return tensors, visit(content)


def join(rest, tensor):
    """The content that split took apart; tensor(name, shape, dtype) is what stands in the place of each."""
    if isinstance(rest, dict) and TENSOR in rest:
        return tensor(rest[TENSOR], torch.Size(rest["shape"]), _dtype(rest["dtype"]))
    return rebuilt(rest, lambda _, each: join(each, tensor))


def rebuilt(value, change):
    """A dict, list or tuple with change(key, each) in the place of each of its values; another value as it is."""
    if isinstance(value, dict):
        made = copy.copy(value)  # of its kind
        made.update({key: change(key, each) for key, each in value.items()})
        return made
    return type(value)(change(*pair) for pair in enumerate(value)) if type(value) in (list, tuple) else value


def _dtype(name):
    if not isinstance(found := getattr(torch, name), torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return found
