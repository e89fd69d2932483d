"""The first weights of a model, made piece by piece: of each tensor only a shard stays in memory."""

import contextlib

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.machine import trim_memory

# What fills a tensor whatever was in it.
FILLS = {name: getattr(torch.ops.aten, name) for name in ("uniform_", "normal_", "zero_", "fill_", "copy_", "bernoulli_")}


PIECE = 1 << 28  # bytes that are given back to the system at a time: the allocator alone would keep them, in pieces


class ReadAgain(Exception):
    """An initialisation reads a tensor of which a shard alone is left."""


class Pieces(TorchDispatchMode):
    """While it is entered, models are built as ever, operation after operation, with the same random numbers. But of a
    parameter's memory only cut(parameter) stays once another parameter is worked on; filled anew, it comes back.

    shards: what stayed, by the address of a parameter's storage. Raises ReadAgain where values are read that have gone.
    """

    def __init__(self, cut):
        super().__init__()
        self.cut, self.parameters, self.shards, self.latest, self.freed = cut, {}, {}, {}.keys(), 0

    def __enter__(self):
        self.hook = register_module_parameter_registration_hook(self._register)
        return super().__enter__()

    def __exit__(self, *error):
        self.hook.remove()
        return super().__exit__(*error)

    def _register(self, module, name, parameter):
        if parameter is not None:
            self.parameters[_address(parameter)] = parameter

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not func.is_view:
            tensors = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)]
            used = {_address(tensor): tensor for tensor in tensors if _address(tensor) in self.parameters}
            for address in self.latest - used.keys() if used else ():
                self.leave(self.parameters[address])
            self.latest = used.keys() or self.latest
            for address, tensor in used.items():
                fills = func.overloadpacket in FILLS.values() and tensor is args[0]
                self._work_on(self.parameters[address], fills and tensor.numel(), func)
        return func(*args, **kwargs)

    def _work_on(self, parameter, filled, func):
        """The memory of a parameter is about to be used, of which an operation fills so many numbers."""
        address = _address(parameter)
        if address in self.shards:
            if filled != parameter.numel():
                raise ReadAgain(f"{func} reads a tensor of {tuple(parameter.shape)}")
            parameter.untyped_storage().resize_(parameter.numel() * parameter.element_size())
            del self.shards[address]

    def leave(self, parameter):
        """Keep a shard of a parameter, and give its memory back."""
        address = _address(parameter)
        if address not in self.shards:
            with torch.utils._python_dispatch._disable_current_modes():
                self.shards[address] = self.cut(parameter.detach()).clone()
            self.freed += parameter.untyped_storage().nbytes()
            parameter.untyped_storage().resize_(0)
            if self.freed > PIECE:
                self.freed = 0
                with contextlib.suppress(OSError, AttributeError):
                    trim_memory()


def _address(tensor):
    return tensor.untyped_storage()._cdata


@torch.no_grad()
def first_shards(build, cut, log):
    """(a model of build() whose parameters are on the meta device, {name: cut(parameter)}): the values that build() gives
    them, from the same random numbers, without a whole model in memory.

    An initialisation that looks back at tensors it has left is told to log, and done on a whole model.
    """
    before, pieces = torch.get_rng_state(), Pieces(cut)
    try:
        with pieces:
            model = build()
    except ReadAgain as error:
        log(f"WARNING: the first weights are made in whole in host memory, by every process: {error}")
        torch.set_rng_state(before)
        model, pieces = build(), Pieces(cut)
    shards, on_paper = {}, {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):  # shared ones stay shared
        pieces.leave(parameter)
        shards[name] = pieces.shards[_address(parameter)]
        if parameter not in on_paper:
            data = torch.empty_like(parameter, device="meta")
            on_paper[parameter] = torch.nn.Parameter(data, requires_grad=parameter.requires_grad)
        module, _, own = name.rpartition(".")
        model.get_submodule(module)._parameters[own] = on_paper[parameter]
    return model, shards
