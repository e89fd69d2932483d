"""Four processes that write and read sharded checkpoints, for test_sharded.py: sharded_job.py FOLDER

Each has the same numbers, so that it can say itself whether what it read is right.
"""

import os
import resource
import sys
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
from torch.distributed import checkpoint  # noqa: F401  once for all four
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.multiprocessing import start_processes

from common import sharded
from common.errors import UserError
from common.nested import split
from common.sharded import read_into, write_sharded

SHAPES = {"ten": (10, 3), "one": (1, 2), "seven": (7,), "many": (64, 33)}  # over 4: uneven, with empty shards, and even


def content():
    """The same on every process, and in the test."""
    g = torch.Generator().manual_seed(1)
    model = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    state = {i: {"step": torch.tensor(7.0), "exp_avg": each.bfloat16()} for i, each in enumerate(model.values())}
    plain = {"freqs": torch.arange(5), "empty": torch.zeros(0, 3), "done": torch.tensor(True), "3": torch.ones(2)}
    group = {"lr": 1e-4, "betas": (0.9, 0.999), "params": [0, 1, 2, 3]}
    return {"model": model | plain, "opt": {"state": state, "param_groups": [group]}, "args": {"a/b~": None}, "step": 50}


def spread(value, mesh, placements, fresh=False):
    """value with its float tensors of one dimension or more as DTensors; fresh: which hold nothing yet."""
    if isinstance(value, dict):
        return {key: spread(each, mesh, placements, fresh) for key, each in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    value = torch.full_like(value, 99) if fresh else value
    return distribute_tensor(value, mesh, placements) if value.is_floating_point() and value.dim() else value


def same(path, mesh, placements):
    """Whether this process reads of a folder what it should, its shards alone."""
    tensors, _ = split(spread(content(), mesh, placements, fresh=True))
    right, _ = split(spread(content(), mesh, placements))
    read_into(path, tensors)
    for name, tensor in tensors.items():
        ours, theirs = (each.to_local() if isinstance(each, DTensor) else each for each in (tensor, right[name]))
        assert torch.equal(ours, theirs), (path.name, name)
    assert any(isinstance(each, DTensor) for each in tensors.values())


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    writers = dist.new_group(backend="gloo")
    pair = dist.new_group([2, 3], backend="gloo")
    line, half = DeviceMesh("cpu", torch.arange(4)), DeviceMesh("cpu", torch.tensor([2, 3]))
    grid = DeviceMesh("cpu", torch.arange(4).view(2, 2))
    ways = {"four": (line, [Shard(0)]), "grid": (grid, [Replicate(), Shard(0)])}

    thread = Thread(target=write_sharded, args=(spread(content(), *ways["four"]), folder / "four", writers))
    thread.start()
    for _ in range(200):  # training goes on meanwhile
        dist.all_reduce(torch.ones(1000))
    thread.join()
    write_sharded(spread(content(), *ways["grid"]), folder / "grid", writers)
    if rank >= 2:
        write_sharded(spread(content(), half, [Shard(0)]), folder / "two", pair)
    dist.barrier()
    for name in ("four", "grid", "two", "alone"):
        same(folder / name, *ways["four"])
        same(folder / name, *ways["grid"])
        if rank >= 2:
            same(folder / name, half, [Shard(0)])
        sharded.verify(folder / name)
    try:
        read_into(folder / "four", {"model/ten": distribute_tensor(torch.zeros(10, 4), line, [Shard(0)])})
        raise AssertionError("of another shape")
    except UserError as error:
        assert "model/ten is (10, 3), torch.float32, and not (10, 4), torch.float32" in str(error)
    dist.barrier()

    # One process's disk is full, and later its file cannot be read again: all of them hear of it.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    for what in ("full", "unread"):
        try:
            write_sharded(spread(content(), *ways["four"]), folder / what, writers)
            raise AssertionError(what)
        except (OSError, RuntimeError) as error:
            (folder / f"{what}.{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        dist.barrier()
        if rank == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            sharded._measure = lambda file: os.stat(file / "nowhere")

    # What is no file's fault is raised as it is where it comes from, and not as one of a full disk anywhere.
    if rank == 1:
        sharded._measure = lambda file: {}["no such key"]
    try:
        write_sharded(spread(content(), *ways["four"]), folder / "fault", writers)
        raise AssertionError("fault")
    except Exception as error:
        assert not isinstance(error, (OSError, RuntimeError, AssertionError)), error
        assert isinstance(error, KeyError) == (rank == 1) and "no such key" in str(error)
    dist.destroy_process_group()


if __name__ == "__main__":
    start_processes(work, (Path(sys.argv[1]),), 4, start_method="fork")  # which have imported all of it already
