"""One code path for one process and many: torchrun's environment when there is one, a world of one otherwise."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


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

    def sum(self, tensor):
        """Sum over the processes, in place where there are several."""
        if self.distributed:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value):
        """Largest of one int per process. On the CPU, so that no GPU is waited for."""
        if not self.distributed:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

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


def setup():
    """Join the job that torchrun started, or be alone; one GPU a process where there are GPUs, else the CPU."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        # Small CPU messages (signals, errors) go by gloo, so that they never wait for a GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    return World(int(os.environ.get("RANK", 0)), size, device)


def cleanup():
    if dist.is_initialized():
        dist.destroy_process_group()
