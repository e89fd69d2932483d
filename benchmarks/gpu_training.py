"""What gpu.py measures of training: steps and what they are made of, DDP's graphs, checkpoints.

An item is a function that yields (setting, {figure: number}). Weights and latents are random.
"""

import contextlib
import tempfile
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import shards as sharded
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

import train
from common.checkpoint import load_checkpoint, save_checkpoint, weights_of
from common.distributed import World
from common.machine import PeakMemory, matrix_peak, synchronize
from common.precision import set_precision
from common.recipe import Recipe, build_with
from common.sizes import height_width
from data.autoencoder import PixelSpace
from models import model_config
from training.costs import on_paper, step_flops, training_bytes
from training.run import Run
from training.trainer import Trainer
from transport import Transport, TransportSettings


def recipe_of(name, image_size):
    """Of a network with Stable Diffusion's latents, for ImageNet's classes."""
    sides = tuple(side // 8 for side in height_width(image_size))
    arguments = model_config(name, input_size=sides, in_channels=4, learn_sigma=False)
    return Recipe(name, arguments, image_size, vae="random", transport=TransportSettings())


def open_trainer(bench, name, image_size, batch, precision, more=(), world=None):
    """A Trainer as train.py has it, to be prepared, and its step on cached latents, of which batch are all processes'."""
    flags = ["--data-path", "random", "--model", name, "--global-batch-size", str(batch), *more]
    flags, recipe = train.make_parser().parse_args(flags), recipe_of(name, image_size)
    set_precision(precision, bench.device)
    transport, data = Transport(recipe.transport), SimpleNamespace(mirrors=True)
    world = world or World(0, 1, bench.device)
    work = Run(flags, world, precision, data, PixelSpace(), transport, recipe, total_steps=10**6)
    # The device draws a gigabyte of weights faster; shards are made piece by piece in the host's memory.
    with contextlib.nullcontext() if flags.shard else torch.device(bench.device):
        trainer = Trainer(work, SimpleNamespace(log=print, warn=print))
    moments = torch.randn(work.batch, 2, 2, *recipe.latent_shape, device=bench.device).half()
    labels = torch.randint(1000, (work.batch,), device=bench.device)

    def step():
        trainer.step += 1
        trainer.take_step(moments, labels)

    return trainer, step


def step_figures(bench, name, image_size, batch, precision, compile=None):
    """Of a training step. compile: None, blocks or whole."""
    bench.forget()
    set_precision(precision, bench.device)
    peak, memory = matrix_peak(bench.device, precision), PeakMemory(bench.device)
    trainer, step = open_trainer(bench, name, image_size, batch, precision, ["--compile"] * (compile == "blocks"))
    torch._dynamo.config.optimize_ddp = True  # PyTorch's default, which compile_blocks changes
    if compile == "whole":
        trainer.objective.model.compile()
    trainer.prepare()
    first = bench.seconds(step)
    step()
    seconds, network = bench.seconds(step, bench.small(10, 2)), on_paper(name, image_size)
    return {
        "first step, s": first,
        "ms": 1000 * seconds,
        "images/s": batch / seconds,
        "TFLOP/s": step_flops(network, batch) / seconds / 1e12,
        "of peak, %": 100 * step_flops(network, batch) / seconds / peak,
        "memory, GB": memory.read() / 1e9,
        "on paper, GB": sum(training_bytes(network, batch, precision)) / 1e9,
        "graphs": counters["aot_autograd"]["total"],
    }


def steps(bench, image_size, batch, compiled, defaults=True):
    """Of XL/2 in bf16, and with defaults in the scripts' own precision."""
    name, image_size, batch = bench.small(("SiT-XL/2", image_size, batch), ("SiT-T/8", 64, 2))
    for precision, compile in product(("bf16", *[bench.default] * defaults), compiled):
        setting = f"{name}, {image_size} px, batch {batch}, {precision}" + (f", compiled {compile}" if compile else "")
        try:
            yield setting, step_figures(bench, name, image_size, batch, precision, compile)
        except torch.cuda.OutOfMemoryError:
            yield f"{setting}: out of memory", {}


def ddp(bench):
    """One process that meets only itself: what the compiler makes of DDP's buckets does not depend on how many there are."""
    backend = "cpu:gloo,cuda:nccl" if bench.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield from steps(bench, 256, 32, ("blocks", "whole"), defaults=False)
    dist.destroy_process_group()


def shards(bench):
    """Of as many processes as there are GPUs: sharded training beside DDP. Alone, a GPU has nothing to share."""
    processes = torch.cuda.device_count() if bench.device.type == "cuda" else 2
    if processes < 2:
        yield "left out: it needs two GPUs", {}
        return
    name, image_size, each = bench.small(("SiT-XL/2", 256, 32), ("SiT-T/8", 64, 2))
    settings = ["DDP, bf16", "shards, bf16"]
    for line in sharded.lines(processes, name, image_size, each * processes, settings, device=bench.device.type):
        figures = {"ms": 1000 * line["seconds"], "images/s": each * processes / line["seconds"]}
        figures |= {"memory, GB": line["measured"] / 1e9, "on paper, GB": line["paper"] / 1e9}
        yield f"{name}, {image_size} px, batch {each} a process, {processes} processes, {line['setting']}", figures


def peaks(bench):
    for precision in bench.precisions:
        set_precision(precision, bench.device)
        sizes = bench.small((4096, 8192, 16384), (256,))
        yield precision, {"TFLOP/s": matrix_peak(bench.device, precision, sizes, seconds=5) / 1e12}
    one = torch.empty(bench.small(1 << 30, 1 << 22), dtype=torch.uint8, device=bench.device)
    other, gigabytes = one.clone(), len(one) / 1e9
    yield "copy", {"GB/s": 2 * gigabytes / bench.seconds(lambda: other.copy_(one), 10)}
    if bench.device.type == "cuda":
        host = torch.empty(len(one), dtype=torch.uint8, pin_memory=True)
        yield "from pinned memory", {"GB/s": gigabytes / bench.seconds(lambda: one.copy_(host), 5)}


def checkpoint(bench):
    name, image_size = bench.small(("SiT-XL/2", 256), ("SiT-T/8", 64))
    trainer, step = open_trainer(bench, name, image_size, 2, bench.default)
    trainer.prepare()
    step()
    trainer.run.dataset = ()  # of which a checkpoint holds the size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        saved = bench.seconds(lambda: save_checkpoint(trainer.content(), path))
        size, recipe = path.stat().st_size / 1e9, trainer.run.recipe
        yield f"save {name}", {"GB": size, "seconds": saved, "GB/s": size / saved}
        loaded = bench.seconds(lambda: load_checkpoint(path))
        yield f"load {name}, checked, from the page cache", {"GB": size, "seconds": loaded, "GB/s": size / loaded}
        state = weights_of(load_checkpoint(path), path)
        yield f"{name} onto the device", {"seconds": bench.seconds(lambda: build_with(recipe, state, path).to(bench.device))}


def profile(bench):
    """Where the time of a step goes: by kernel on a GPU, by operator on a CPU."""
    name, image_size, batch = bench.small(("SiT-S/2", 256, 32), ("SiT-T/8", 64, 2))
    trainer, step = open_trainer(bench, name, image_size, batch, "bf16")
    trainer.prepare()
    step()
    turns, cuda = bench.small(5, 1), bench.device.type == "cuda"
    seconds = bench.seconds(step, turns)
    with profiler(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiled:
        for _ in range(turns):
            step()
        synchronize(bench.device)
    events = profiled.key_averages()
    if cuda:  # the kernels alone: operators are given their time as well
        events = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    kind = "device" if cuda else "cpu"
    spent = {event.key: getattr(event, f"self_{kind}_time_total") / 1000 / turns for event in events}
    total = sum(spent.values())
    yield f"{name}, batch {batch}, bf16: a step", {"ms": 1000 * seconds, f"busy {kind}, ms": total}
    for key, took in sorted(spent.items(), key=lambda item: -item[1])[:12]:
        yield key[:70].replace("|", "/"), {"ms": took, "share, %": 100 * took / total}
