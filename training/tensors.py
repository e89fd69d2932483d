"""Plain tensors and sharded ones (DTensor) alike: what this process holds of one, and all of it."""

import torch
from torch.distributed.tensor import DTensor

from common.checkpoint import load_weights
from common.nested import rebuilt


def whole(tensor):
    """A tensor with all its rows, on every process; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def own(tensor):
    """What this process holds of a tensor: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(saved, tensor):
    """A tensor of a file, whole or read in shards, in the layout of tensor; one of another shape stays as it is."""
    if saved.shape != tensor.shape:
        return saved
    if not isinstance(tensor, DTensor):
        return whole(saved)
    return _sharded(own(saved) if isinstance(saved, DTensor) else saved[_rows(tensor)], tensor)


def _rows(tensor):
    """The rows of a sharded tensor that are this process's, as a slice."""
    mesh = tensor.device_mesh
    return rows(tensor.shape[0], mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1))


def rows(count, shards, index):
    """The rows of a tensor of count rows that belong to shard index, as torch.chunk deals them out: the last may have none."""
    each = -(-count // shards)
    return slice(min(index * each, count), min((index + 1) * each, count))


def _sharded(held, tensor, mesh=None):
    """What a process holds as a sharded tensor like another, on another mesh if need be."""
    layout = dict(shape=tensor.shape, stride=tensor.stride())
    return DTensor.from_local(held, mesh or tensor.device_mesh, tensor.placements, run_check=False, **layout)


def host_copy(content, keep=True):
    """A nested content with its tensors in host memory of their own, sharded ones whole: these are gathered one by one, so
    that no device holds more than one. Every process must call it; those that do not keep it get None for each tensor."""
    if not isinstance(content, torch.Tensor):
        return rebuilt(content, lambda _, each: host_copy(each, keep))
    gathered = whole(content.detach())
    return gathered.to("cpu", copy=True) if keep else None


def host_shards(content, mesh):
    """The same with this process's shards of sharded tensors, which are on mesh, of CPUs."""
    if not isinstance(content, torch.Tensor):
        return rebuilt(content, lambda _, each: host_shards(each, mesh))
    held = own(content.detach()).to("cpu", copy=True)
    return _sharded(held, content, mesh) if isinstance(content, DTensor) else held


def load_shards(module, state, path):
    """load_weights for a module that may be sharded. Raises UserError with the first mismatch."""
    there = module.state_dict()
    laid_out = {name: like(value, there[name]) if name in there else value for name, value in state.items()}
    return load_weights(module, laid_out, path)
