"""How a run's processes share the work of a step, and its states: each holds them all, or a shard of each.

Replicas is DistributedDataParallel. Shards is PyTorch's fully_shard (FSDP2): of every weight, gradient, moment and average a
process keeps the rows that are its own, along the first dimension; a block's weights are gathered for as long as it computes,
and its gradients are reduced to shards at once. Both answer to the same calls, and the functions here take a plain tensor
and a sharded one (DTensor) alike: the rest of the training does not know which it has.
"""

import contextlib
import warnings
from copy import deepcopy

import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from common.checkpoint import load_weights
from common.distributed import join_alone
from common.recipe import build_with

from .first_weights import first_shards


def whole(tensor):
    """A tensor with all its rows, on every process; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def own(tensor):
    """What this process holds of a tensor: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(saved, tensor):
    """A whole tensor of a file as the shard of it that belongs to tensor, if that is sharded; any other stays as it is."""
    if not isinstance(tensor, DTensor) or isinstance(saved, DTensor) or saved.shape != tensor.shape:
        return saved
    return _sharded(saved[_rows(tensor)], tensor)


def _rows(tensor):
    """The rows of a sharded tensor that are this process's, as a slice."""
    mesh = tensor.device_mesh
    return rows(tensor.shape[0], mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1))


def rows(count, shards, index):
    """The rows of a tensor of count rows that belong to shard index, as torch.chunk deals them out: the last may have none."""
    each = -(-count // shards)
    return slice(min(index * each, count), min((index + 1) * each, count))


def _sharded(rows, tensor):
    return DTensor.from_local(
        rows, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def host_copy(content, keep=True):
    """A nested content with its tensors in host memory of their own, sharded ones whole: these are gathered one by one, so
    that no device holds more than one. Every process must call it; those that do not keep it get None for each tensor."""
    if isinstance(content, dict):
        return {name: host_copy(value, keep) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(host_copy(value, keep) for value in content)
    if not isinstance(content, torch.Tensor):
        return content
    gathered = whole(content.detach())
    return gathered.to("cpu", copy=True) if keep else None


def load_shards(module, state, path):
    """load_weights for a module that may be sharded. Raises UserError with the first mismatch."""
    there = module.state_dict()
    return load_weights(module, {name: like(value, there.get(name)) for name, value in state.items()}, path)


class Replicas:
    """Every process holds everything."""

    def __init__(self, world):
        self.world = world

    def build(self, recipe, log):
        """A new model on the device, with its first weights."""
        return recipe.build().to(self.world.device)

    def build_with(self, recipe, state, path):
        """A model with these weights. Raises UserError where they do not fit."""
        return build_with(recipe, state, path).to(self.world.device)

    def copy(self, model, recipe):
        """Another model with the same weights."""
        return deepcopy(model)

    def place(self, objective):
        """An objective, with what it has beside the model, on the device."""
        return objective.to(self.world.device)

    def connect(self, objective):
        """What to call for the losses, so that gradients are the mean over the processes."""
        if not self.world.distributed:
            return objective
        device_ids = [self.world.device.index] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(objective, device_ids=device_ids, gradient_as_bucket_view=True)

    def accumulating(self, forward):
        """A context in which gradients do not meet yet, as they do once a step, after its last part."""
        return forward.no_sync() if self.world.distributed else contextlib.nullcontext()

    @contextlib.contextmanager
    def together(self, model, latent_shape):
        """The model for each process to ask as often as it likes."""
        yield model


class Shards:
    """Groups of processes of which each holds a shard of everything, and replicas of such a group.

    size: processes in a group (None: all). In bf16 the blocks' weights, nearly all there are, travel in bfloat16; those of
    the ends are used in float32 by what must not be rounded, such as the embedding of times. Gradients are summed, and all
    states kept, in float32.
    """

    def __init__(self, world, size, precision):
        join_alone(world)
        size = size or world.size
        kind, shape, names = world.device.type, (world.size,), ("shard",)
        if size < world.size:
            shape, names = (world.size // size, size), ("replicate", "shard")
        self.precision, self.world, self.mesh = precision, world, init_device_mesh(kind, shape, mesh_dim_names=names)
        halves = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # which nobody writes into
        self.blocks_policy = MixedPrecisionPolicy(**halves) if precision == "bf16" else MixedPrecisionPolicy()

    def _shard(self, model, policy=None):
        """Shard a model on the meta device, and give its tensors memory on the device, of no values yet."""
        for block in getattr(model, "blocks", None) or []:
            fully_shard(block, mesh=self.mesh, mp_policy=policy or MixedPrecisionPolicy(), reshard_after_forward=True)
        # Its own rest, too, is gathered anew each time: else what a forward pass without a backward one had gathered would be
        # used again when the weights have moved on.
        fully_shard(model, mesh=self.mesh, reshard_after_forward=True)
        device = self.world.device
        return model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))

    def build(self, recipe, log):
        """A new model with the first weights that it has unsharded, of which no process ever holds more than a piece."""
        index, count = self.mesh.get_local_rank(self.mesh.ndim - 1), self.mesh.size(self.mesh.ndim - 1)
        model, shards = first_shards(recipe.build, lambda tensor: tensor[rows(len(tensor), count, index)], log)
        for name, parameter in self._shard(model, self.blocks_policy).named_parameters():
            own(parameter).copy_(shards[name])
        return model

    def _on_paper(self, recipe):
        with torch.device("meta"):
            return recipe.build()

    def build_with(self, recipe, state, path):
        """A model with these weights. Raises UserError where they do not fit."""
        return load_shards(self._shard(self._on_paper(recipe), self.blocks_policy), state, path)

    @torch.no_grad()
    def copy(self, model, recipe):
        """Another model with the same weights, which is used in float32."""
        other = self._shard(self._on_paper(recipe))
        theirs = model.state_dict()
        for name, tensor in other.state_dict().items():
            own(tensor).copy_(own(theirs[name]))
        return other

    def place(self, objective):
        """An objective, with what it has beside the model, in shards too."""
        objective.to(self.world.device)
        if any(not isinstance(p, DTensor) for p in objective.parameters()):  # of what an objective has beside the model
            fully_shard(objective, mesh=self.mesh, reshard_after_forward=True)
        return objective

    def connect(self, objective):
        """What to call for the losses, so that gradients are the mean over the processes."""
        return objective

    def accumulating(self, forward):
        """Gradients of each part of a step are reduced at once: kept until its end they would be whole on every process."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def together(self, model, latent_shape):
        """The model for each process to ask as often as it likes: until all have left the context, those that have need
        no more lend their shards."""
        network = Together(model, self.world)
        yield network
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            network.lend(latent_shape)  # not after an error, which ends the run


class Together(nn.Module):
    """A sharded network that answers one process while the others have other questions, or none.

    A forward pass is one of all processes. So each call is announced, by a small message on the CPU.
    """

    def __init__(self, network, world):
        super().__init__()
        self.network, self.world = network, world

    def forward(self, *args, **kwargs):
        self.world.max_later(1)()
        try:
            return self.network(*args, **kwargs)
        except torch.cuda.OutOfMemoryError as error:  # which a caller might pass over, with the others still in their pass
            raise RuntimeError("out of memory in the middle of a pass of all processes") from error

    def forward_with_cfg(self, *args, **kwargs):
        return type(self.network).forward_with_cfg(self, *args, **kwargs)

    @torch.no_grad()
    def lend(self, latent_shape):
        """Take part in the others' calls until all are done."""
        device = self.world.device
        x, t, y = torch.zeros(1, *latent_shape), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        while self.world.max_later(0)():
            self.network(x.to(device), t.to(device), y.to(device))


def parallel_of(flags, world, precision):
    return Shards(world, flags.shard_size, precision) if flags.shard else Replicas(world)
