"""What a process of train.py --shard holds, measured and on paper: python benchmarks/shards.py --processes 1 2 4

Real processes under torchrun, on GPUs where there are that many, else on the CPU, where memory is the whole process's. A line
is a training of its own, with random latents: memory from before its model is made until after its third step, which is
timed, of the process that took most.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.errors import UserError
from train_utils import Parser, positive_int, run

SETTINGS = {
    "DDP": [],
    "shards": ["--shard"],
    "DDP, bf16": ["--precision", "bf16"],
    "shards, bf16": ["--shard", "--precision", "bf16"],
    "shards, checkpointing": ["--shard", "--grad-checkpointing"],
}


def measure(world, name, image_size, batch, flags):
    """A training's figures, on every process."""
    from types import SimpleNamespace

    from gpu_training import open_trainer
    from measure import Bench

    from common.machine import PeakMemory
    from train import make_parser
    from training.costs import gathered_bytes, on_paper, training_bytes

    asked = make_parser().parse_args(["--data-path", "random", *flags])
    precision, bench = asked.precision or "fp32", Bench(world.device)
    bench.forget()
    memory = PeakMemory(world.device)
    trainer, step = open_trainer(bench, name, image_size, batch, precision, flags, world)
    trainer.prepare()
    step()
    step()
    seconds = bench.seconds(step)
    held = max(world.gather(memory.read()))
    network, shards = on_paper(name, image_size), (asked.shard_size or world.size) if asked.shard else None
    states, activations = training_bytes(network, batch // world.size, precision, asked.grad_checkpointing, shards=shards)
    figures = SimpleNamespace(states=states, gathered=gathered_bytes(network, precision, shards or 1), activations=activations)
    paper = states + figures.gathered + activations
    return vars(figures) | dict(paper=paper, measured=held, seconds=max(world.gather(seconds)))


def work(args):
    """In a process of torchrun: a line of JSON for each setting."""
    from common import distributed

    with contextlib.suppress(AttributeError):  # where there is no Linux
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: torchrun, once killed, ends nobody
    world = distributed.setup()
    measure(world, "SiT-T/8", args.image_size, world.size, ["--shard"])  # what libraries take once
    for setting in args.only or SETTINGS:
        figures = measure(world, args.model, args.image_size, args.batch_size, SETTINGS[setting])
        if world.is_main:
            print(json.dumps(dict(setting=setting, processes=world.size, **figures)), flush=True)
    distributed.cleanup()


def lines(processes, model, image_size, batch, settings, device=None):
    """The figures of each setting, in bytes and seconds, by so many processes. Raises UserError where one fails.

    device: cpu or cuda (GPUs where there are that many).
    """
    import torch

    own = [__file__, "--work", "--model", model, "--image-size", image_size, "--batch-size", batch, "--only", *settings]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    # What is freed goes back to the system at once, or the process's memory would say nothing of its tensors.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if device == "cpu" or torch.cuda.device_count() < processes:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([*map(str, [*launcher, *own])], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{processes} processes failed:\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def make_parser():
    parser = Parser(prog="shards.py", description="Measure the memory of a process that trains, beside what it is on paper.")
    parser.add_argument("--processes", nargs="+", type=positive_int, default=[1, 2, 4], metavar="N", help="how many, by turns")
    parser.add_argument("--model", default="SiT-B/8", help="backbone")
    parser.add_argument("--image-size", type=positive_int, default=256, help="pixels a side")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="images a step, of all processes")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, metavar="NAME", help=f"of {', '.join(SETTINGS)} (all)")
    parser.add_argument("--work", action="store_true", help="be one of the processes")
    return parser


def main(args):
    if args.work:
        work(args)
        return 0
    columns = ("states", "gathered", "activations", "paper", "measured")
    print(f"| processes | {args.model}, batch {args.batch_size} | {', GB | '.join(columns)}, GB | ratio | step, s |")
    print(f"| --- | --- |{' ---: |' * (len(columns) + 2)}")
    for processes in args.processes:
        for line in lines(processes, args.model, args.image_size, args.batch_size, args.only or list(SETTINGS)):
            cells = " | ".join(f"{line[column] / 1e9:.3f}" for column in columns)
            ratio = line["measured"] / line["paper"]
            print(f"| {processes} | {line['setting']} | {cells} | {ratio:.2f} | {line['seconds']:.3g} |", flush=True)
    return 0


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "shards.py")
