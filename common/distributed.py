"""One code path for one process and many: torchrun's environment when there is one, a world of one otherwise."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from .errors import UserError


@dataclass
class World:
    """This process among its peers. Every method works alone too."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def distributed(self):
        return dist.is_initialized()

    def barrier(self):
        if self.distributed:
            dist.barrier()

    def main_first(self, call):
        """call() on every process, the others only when the main one is done: it may download what they then find, and a
        UserError of it is raised by every process."""
        kept = []
        self.from_main(lambda: kept.append(call()))
        return kept[0] if self.is_main else call()

    def from_main(self, call):
        """call()'s picklable value, made by the main process alone. A UserError of it is raised by every process: one that
        waited for the others would only see that they are gone."""
        made = error = None
        if self.is_main:
            try:
                made = call()
            except UserError as raised:
                error = raised
        made, error = self.broadcast((made, error))
        if error is not None:
            raise error
        return made

    def another_group(self):
        """A group of the same processes for another thread of each: the messages of two threads must not meet in one."""
        return dist.new_group(backend="gloo") if self.distributed else None

    def sum(self, tensor):
        """Sum over the processes, in place where there are several."""
        if self.distributed:
            dist.all_reduce(tensor)
        return tensor

    def max_later(self, value):
        """What waits for the largest of one int per process, and returns it: the message travels meanwhile. On the CPU, so
        that no GPU is waited for."""
        if not self.distributed:
            return lambda: value
        tensor = torch.tensor(value)
        message = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True)

        def received():
            message.wait()
            return int(tensor)

        return received

    def gather(self, value):
        """List of every process's picklable value, by rank."""
        if not self.distributed:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value):
        """The main process's picklable value, on every process."""
        if not self.distributed:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]


def backend_of(device):
    """Small CPU messages (signals, errors) go by gloo, so that they never wait for a GPU."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def join_alone(world):
    """A process that torchrun has not started becomes a group of one, for what needs a group."""
    if not world.distributed:
        dist.init_process_group(backend_of(world.device), store=dist.HashStore(), rank=0, world_size=1)


def setup(timeout_hours=0.5):
    """Join the job that torchrun started, or be alone; one GPU a process where there are GPUs, else the CPU."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        joining = dict(store=_fresh_store(), rank=rank, world_size=size, timeout=timedelta(hours=timeout_hours))
        dist.init_process_group(backend_of(device), **joining)
    return World(rank, size, device)


def _fresh_store():
    """torchrun's key-value store, without what an attempt before a restart left in it.

    torchrun hands its restarted workers the store of the attempt that failed; a worker that reads a dead peer's
    address there waits for it for ever. The restart count tells attempts apart, but only within a node: nodes count
    their own, so several need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 beside --max-restarts.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return store
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def cleanup():
    if dist.is_initialized():
        dist.destroy_process_group()
