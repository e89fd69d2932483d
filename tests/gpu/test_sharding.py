"""Sharded training on devices: two processes, by NCCL where there are two GPUs, by gloo where there is none; one on one GPU."""

import csv
import subprocess
import sys

import pytest
import torch

from cli import DIGITS, ENV, ROOT
from common.checkpoint import load_checkpoint

from .conftest import CUDA, error, no_waiting, training

ONE_GPU = torch.cuda.device_count() == 1
TWO = pytest.mark.skipif(ONE_GPU, reason="needs two GPUs")
# On CPUs tests/training/test_parallel.py shows the same, and more.
GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
pytestmark = pytest.mark.gpu
SMALL = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 16, "--lr", 1e-3, "--sample-every", 1000]
SMALL += ["--num-workers", 0, "--log-every", 1]
# Of weights after six steps, and of losses: kernels of the backward pass may add in any order on a GPU.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


def processes(*command, timeout=300):
    """Output of a script's two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, *map(str, command)], capture_output=True, text=True, env=ENV, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def trained(folder, *flags, steps=6):
    """(checkpoint, losses) of a run of train.py by two processes."""
    said = processes(ROOT / "train.py", *SMALL, "--max-steps", steps, "--results-dir", folder, *flags)
    assert f"2 process(es) on {'cuda' if CUDA else 'cpu'}" in said
    run = max(folder.glob("???-*"))
    with open(run / "metrics.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    return load_checkpoint(max((run / "checkpoints").glob("*.pt"))), losses


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("ddp"), "--precision", "fp32")


@GPUS
@pytest.mark.parametrize("precision", TOLERANCE)
def test_six_steps_equal_those_of_ddp(precision, ddp, tmp_path):
    content, losses = trained(tmp_path, "--shard", "--precision", precision)
    expected, expected_losses = ddp
    assert losses == pytest.approx(expected_losses, abs=TOLERANCE[precision])
    for part in ("model", "ema"):
        for name, weight in expected[part].items():
            assert (content[part][name] - weight).abs().max() <= TOLERANCE[precision], (part, name)


@GPUS
def test_a_sharded_run_goes_on_from_a_folder_of_shards(ddp, tmp_path):
    flags = ["--shard", "--resume", "--precision", "fp32"]
    half = ["--max-steps", 3, "--results-dir", tmp_path, "--ckpt-format", "sharded"]
    processes(ROOT / "train.py", *SMALL, *flags, *half)
    content, losses = trained(tmp_path, *flags)
    assert losses == pytest.approx(ddp[1], abs=1e-5)
    for name, weight in ddp[0]["ema"].items():
        assert error(content["ema"][name], weight) < (1e-2 if CUDA else 1e-3), name


STEPS = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
from gpu.conftest import held, no_waiting, training

with training(sys.argv[1], *sys.argv[2:]) as (trainer, monitor):
    for _ in range(3):
        monitor.add(*trainer.take_step(*trainer.next_batch()))
    with no_waiting():
        for _ in range(2):
            monitor.add(*trainer.take_step(*trainer.next_batch()))
    before, losses = held(trainer), trainer.objective.transport.training_losses
    if trainer.run.world.rank == 1:  # whose gradients alone are bad
        bad = lambda *a, **k: {{"loss": losses(*a, **k)["loss"] * float("nan")}}
        trainer.objective.transport.training_losses = bad
    with no_waiting():
        _, norm, good = trainer.take_step(*trainer.next_batch())
    assert good.item() == 0 and not norm.isfinite()
    assert all(torch.equal(a, b) for a, b in zip(held(trainer), before, strict=True))
    trainer.objective.transport.training_losses = losses
    trainer.take_step(*trainer.next_batch())
    assert not all(torch.equal(a, b) for a, b in zip(held(trainer), before, strict=True))
    trainer.check(monitor.log)
"""
AVERAGES = ["--ema-decay", 0.9, 0.99, "--ema-power", 0.1, "--grad-clip", 1, "--max-steps", 9]


@TWO
@pytest.mark.parametrize(
    "precision, more",
    [("fp32", ["--grad-checkpointing", "--grad-accum-steps", 2]), pytest.param("bf16", [], marks=GPUS)],
)
def test_steps_wait_for_nothing_and_a_bad_gradient_of_one_process_touches_no_state(precision, more, tmp_path):
    script = tmp_path / "steps.py"
    script.write_text(STEPS.format(root=str(ROOT)))
    flags = ["--shard", "--precision", precision, "--skip-nonfinite", 1, *AVERAGES, *more]
    assert "non-finite loss or gradient at step 6: rank 1" in processes(script, tmp_path / "runs", *SMALL, *flags)


@pytest.mark.parametrize("precision", TOLERANCE)
def test_a_step_of_one_process_waits_for_nothing(precision, tmp_path):
    """Which one GPU can show."""
    try:
        with training(tmp_path, *SMALL, "--shard", "--precision", precision, *AVERAGES) as (trainer, monitor):
            for _ in range(3):
                monitor.add(*trainer.take_step(*trainer.next_batch()))
            with no_waiting():
                for _ in range(2):
                    monitor.add(*trainer.take_step(*trainer.next_batch()))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@GPUS
def test_a_process_holds_less_than_with_ddp(monkeypatch):
    """Little more than half: what is gathered is a few blocks."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import shards

    ddp, sharded = shards.lines(2, "SiT-S/8", 256, 8, ["DDP", "shards"])
    assert sharded["measured"] < 0.75 * ddp["measured"]
    assert sharded["measured"] == pytest.approx(sharded["paper"], rel=0.2)
