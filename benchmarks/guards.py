"""What exact resume and the guards cost: steps/s of train.py with them and without, in turn, in one process.

    python benchmarks/guards.py [--model SiT-T/8] [--steps 60] [--rounds 5]

Without: noise and times drawn for this process's share from a running generator, no watch for bad numbers or images.
"""

import argparse
import contextlib
import csv
import io
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from common.unreadable import DataGuard
from training import trainer
from training.draws import Draws
from training.guards import NumberGuard


def plain_draws(seed, step, batch, shape, device):
    normal = lambda: torch.randn((batch, *shape), device=device)  # noqa: E731
    uniform = lambda: torch.rand(batch, device=device)  # noqa: E731
    return Draws(flip=uniform() < 0.5, posterior=normal(), noise=normal(), time=uniform(), drop=uniform())


def plain_watch(self, step, loss, norm):
    return torch.ones_like(norm)


def steps_per_second(args, plain):
    """Of one short run, its first half left out."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if plain:
            stack.enter_context(mock.patch.object(trainer, "draw_step", plain_draws))
            stack.enter_context(mock.patch.object(NumberGuard, "watch", plain_watch))
            stack.enter_context(mock.patch.object(DataGuard, "check", lambda self, asked, read: None))
        flags = ["--data-path", "builtin:digits", "--image-size", "32", "--num-classes", "10", "--vae", "none"]
        flags += ["--model", args.model, "--global-batch-size", "32", "--num-workers", "0", "--results-dir", folder]
        flags += ["--max-steps", str(args.steps), "--log-every", str(args.steps // 2)]
        train.main(train.make_parser().parse_args(flags))
        with open(next(Path(folder).glob("*/metrics.csv"))) as rows:
            return float(list(csv.DictReader(rows))[-1]["images_per_second"]) / 32


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-T/8")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    pairs = [(steps_per_second(args, False), steps_per_second(args, True)) for _ in range(args.rounds)]
    guarded, plain = (statistics.median(speeds) for speeds in zip(*pairs))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{args.model}: {guarded:.2f} steps/s with, {plain:.2f} without; median ratio of {args.rounds} pairs {ratio:.3f}")


if __name__ == "__main__":
    main()
