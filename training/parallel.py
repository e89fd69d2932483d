"""How a run's processes share the work of a step, and its states: each holds them all, or a shard of each.

Replicas is DistributedDataParallel. Shards is PyTorch's fully_shard (FSDP2): of every weight, gradient, moment and average a
process keeps the rows that are its own, along the first dimension; a block's weights are gathered for as long as it computes,
and its gradients are reduced to shards at once. Both answer to the same calls: the rest of the training does not know which it
has.
"""

import contextlib
import warnings
from copy import deepcopy

import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, zeros
from torch.nn.parallel import DistributedDataParallel

from common.distributed import join_alone
from common.machine import synchronize
from common.nested import join, split
from common.recipe import build_with
from common.sharded import is_sharded, load_whole, read_into

from .first_weights import first_shards
from .tensors import load_shards, own, rows


class Replicas:
    """Every process holds everything."""

    def __init__(self, world):
        self.world = world

    def build(self, recipe, log):
        """A new model on the device, with its first weights."""
        return recipe.build().to(self.world.device)

    def read(self, content, path):
        """A checkpoint's content with its tensors at hand, of which open_start may have none."""
        return load_whole(path) if is_sharded(path) else content

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

    size: processes in a group (None: all). host_mesh: the same processes, for shards in host memory.

    In bf16 the blocks' weights, nearly all there are, travel in bfloat16; those of the ends are used in float32 by what must
    not be rounded, such as the embedding of times. Gradients are summed, and all states kept, in float32.
    """

    def __init__(self, world, size, precision):
        join_alone(world)
        size = size or world.size
        kind, shape, names = world.device.type, (world.size,), ("shard",)
        if size < world.size:
            shape, names = (world.size // size, size), ("replicate", "shard")
        self.precision, self.world, self.mesh = precision, world, init_device_mesh(kind, shape, mesh_dim_names=names)
        self.host_mesh = self.mesh if kind == "cpu" else init_device_mesh("cpu", shape, mesh_dim_names=names)
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

    def read(self, content, path):
        """A checkpoint's content with its tensors at hand: of a folder's each process reads its shards alone, into
        host memory."""
        if not is_sharded(path):
            return content
        tensors, rest = split(content)
        layout = dict(device_mesh=self.host_mesh, placements=[Replicate()] * (self.mesh.ndim - 1) + [Shard(0)])
        tensors = {
            name: zeros(tensor.shape, dtype=tensor.dtype, **layout) if tensor.ndim else torch.zeros_like(tensor, device="cpu")
            for name, tensor in tensors.items()
        }
        read_into(path, tensors)
        return join(rest, lambda name, *_: tensors[name])

    def _on_paper(self, recipe):
        with torch.device("meta"):
            model = recipe.build()
        if {name for name, _ in model.named_buffers()} <= model.state_dict().keys():
            return model
        with torch.random.fork_rng(devices=[]):  # buffers that no file holds must be made
            return first_shards(recipe.build, lambda tensor: tensor[:0], bool)[0]

    def build_with(self, recipe, state, path):
        """A model with these weights. Raises UserError where they do not fit."""
        return load_shards(self._shard(self._on_paper(recipe), self.blocks_policy), state, path)

    @torch.no_grad()
    def copy(self, model, recipe):
        """Another model with the same weights, which is used in float32."""
        other = self._shard(self._on_paper(recipe))
        for ours, theirs in zip((*other.parameters(), *other.buffers()), (*model.parameters(), *model.buffers())):
            own(ours).copy_(own(theirs))
        return other

    def place(self, objective):
        """An objective, with what it has beside the model, in shards too."""
        objective.to(self.world.device)
        if any(not isinstance(p, DTensor) for p in objective.parameters()):  # of what an objective has beside the model
            fully_shard(objective, mesh=self.mesh, reshard_after_forward=True)
            fully_shard.state(objective)._lazy_init()  # the root, though a validation may ask the model first
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
        synchronize(self.world.device)  # weights are gathered in another stream, which waits for that of the steps at a root
        network = Together(model, self.world)
        yield network
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            network.lend(latent_shape)  # not after an error, which ends the run
        model.reshard()  # which torch before 2.8 leaves to a backward pass


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
        x, t, y, kept = (tensor.to(device) for tensor in (x, t, y, torch.zeros(1, dtype=torch.bool)))
        while self.world.max_later(0)():
            self.network(x, t, y, force_drop_ids=kept)  # none is drawn


def parallel_of(flags, world, precision):
    return Shards(world, flags.shard_size, precision) if flags.shard else Replicas(world)
