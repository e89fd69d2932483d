"""Training on the device: steps that wait for nothing, bad numbers, every precision and saver of memory, and the commands."""

import contextlib
import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from cli import DIGITS, ENV, ROOT, call, launch
from common.checkpoint import load_checkpoint
from inference import SDE, Guidance, Pipeline

from .conftest import CUDA, PRECISIONS, error, no_waiting, training

pytestmark = pytest.mark.gpu
SMALL = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 16, "--lr", 1e-3, "--sample-every", 1000]
SMALL += ["--num-workers", 0]
VAE = ["--vae", str(ROOT / "assets" / "digits-vae")]


def states(trainer):
    """Copies of all that a step may change."""
    return copy.deepcopy({name: state.state_dict() for name, state in trainer.states.items()})


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_bad_gradient_touches_no_state(precision, tmp_path):
    """Weights, moments, step counts and averages are bit-equal after it, and change with the next good step."""
    flags = ["--precision", precision, "--max-steps", 9, "--skip-nonfinite", 1, "--grad-clip", 1]
    flags += ["--ema-decay", 0.9, 0.4, "--ema-power", 0.1]  # by each of the rules that ema.py has
    with training(tmp_path, *SMALL, *flags) as (trainer, _):
        assert not trainer.numbers.waits  # the fused AdamW passes it over by itself
        for _ in range(2):
            _, _, good = trainer.take_step(*trainer.next_batch())
            assert good.item() == 1
        before = states(trainer)
        images, labels = trainer.next_batch()
        transport = trainer.objective.transport
        losses = transport.training_losses
        transport.training_losses = lambda *args, **kwargs: {"loss": losses(*args, **kwargs)["loss"] * math.nan}
        _, norm, good = trainer.take_step(images, labels)
        del transport.training_losses
        assert good.item() == 0 and not norm.isfinite()
        after = states(trainer)
        averages = ["ema", "ema-0.4", "ema-power-0.1"]
        for name in ("model", *averages):
            assert_equal(after[name], before[name])
        assert_equal(after["opt"]["state"], before["opt"]["state"])
        trainer.take_step(*trainer.next_batch())
        last = states(trainer)
        for name in ("model", *averages):
            assert not torch.equal(last[name]["x_embedder.proj.weight"], after[name]["x_embedder.proj.weight"]), name
        steps = [state["step"].item() for state in last["opt"]["state"].values()]
        assert set(steps) == {3.0}


SPEED = {
    "plain": [],
    "accumulation": ["--grad-accum-steps", 2],
    "checkpointing": ["--grad-checkpointing"],
    "compiled": ["--compile"],
    "all": ["--compile", "--grad-checkpointing", "--grad-accum-steps", 2],
}
ONLY_GPU = pytest.mark.skipif(not CUDA, reason="a compiled step shows its waits on a GPU alone")


@pytest.mark.parametrize("speed", [*list(SPEED)[:3], "encoding", pytest.param("compiled", marks=ONLY_GPU)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_waits_for_nothing(speed, precision, tmp_path):
    more = [*VAE, "--model", "SiT-T/2"] if speed == "encoding" else SPEED[speed]
    flags = ["--precision", precision, "--max-steps", 9, "--grad-clip", 1, "--ema-decay", 0.9, 0.99, "--ema-power", 0.1, *more]
    with training(tmp_path, *SMALL, *flags) as (trainer, monitor):
        for _ in range(3):
            monitor.add(*trainer.take_step(*trainer.next_batch()))
        with no_waiting():
            for _ in range(2):
                images, labels = trainer.next_batch()
                monitor.add(*trainer.take_step(images, labels))
        monitor.report(trainer.step, trainer.lr)


def test_the_detector_of_waits_finds_one(device):
    with pytest.raises((AssertionError, RuntimeError)), no_waiting():
        torch.ones(3, device=device).sum().item()


def test_an_sde_waits_for_nothing_between_its_steps(trained):
    steps = []
    with contextlib.ExitStack() as block:

        def on_step():
            steps.append(1)
            if len(steps) == 1:
                block.enter_context(no_waiting())
            if len(steps) == 4:
                block.close()

        Pipeline.load(trained).draw([1, 2], solver=SDE(num_steps=5), guidance=Guidance(2.0), on_step=on_step)
    assert len(steps) == 4


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Weights and losses of four plain steps in fp32."""
    return run_steps(tmp_path_factory.mktemp("reference"), "fp32", "plain")


def run_steps(folder, precision, speed):
    flags = ["--precision", precision, "--max-steps", 9, *SPEED[speed]]
    with training(folder, *SMALL, *flags) as (trainer, _):
        losses = [trainer.take_step(*trainer.next_batch())[0]["loss"].item() for _ in range(4)]
        return losses, copy.deepcopy(trainer.objective.model.state_dict())


LOOSE = {"fp32": 1e-4, "tf32": 2e-2, "bf16": 5e-2}


@pytest.mark.parametrize("speed", SPEED)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_setting_trains_alike(speed, precision, reference, tmp_path):
    losses, weights = run_steps(tmp_path, precision, speed)
    assert np.allclose(losses, reference[0], rtol=LOOSE[precision])
    moved = 4e-3  # at most: four steps of Adam at 1e-3
    for name, weight in weights.items():
        difference = (weight.float().cpu() - reference[1][name].cpu()).abs()
        assert difference.mean() < (0.05 if precision == "fp32" else 0.3) * moved, name


def last(folder):
    (path,) = folder.glob("*/checkpoints/0000008.pt")
    return load_checkpoint(path)


def assert_trained_alike(ours, theirs):
    """To the bit on a CPU. On a GPU kernels of the backward pass may add in any order."""
    for part in ("model", "ema"):
        for key, value in theirs[part].items():
            assert torch.equal(ours[part][key], value) if not CUDA else error(ours[part][key], value) < 1e-2, (part, key)
    assert ours["opt"]["state"][0]["step"] == theirs["opt"]["state"][0]["step"] == 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done = launch("train", *SMALL, "--max-steps", 8, "--precision", "fp32", "--results-dir", folder)
    assert done.code == 0, done.err
    return last(folder)


def test_a_resumed_run_is_the_uninterrupted_one(whole, tmp_path, capsys):
    flags = [*SMALL, "--precision", "fp32", "--results-dir", tmp_path, "--resume"]
    for steps in (3, 8):
        result = call(capsys, "train", *flags, "--max-steps", steps)
        assert result.code == 0, result.err
    assert "Continuing from" in result.out
    assert_trained_alike(last(tmp_path), whole)


TWO = pytest.mark.skipif(CUDA and torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=TWO)])
def test_processes_train_as_one(processes, whole, tmp_path):
    """By NCCL where there are GPUs, one for each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    flags = [*SMALL, "--max-steps", 8, "--precision", "fp32", "--num-workers", 1, "--results-dir", tmp_path]
    command = [*launcher, str(ROOT / "train.py"), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{processes} process(es) on {'cuda' if CUDA else 'cpu'}" in done.stdout
    ours = last(tmp_path)
    for key, value in whole["ema"].items():
        assert error(ours["ema"][key], value) < (1e-2 if CUDA else 1e-3), key


def test_cached_latents_train_as_images_do(tmp_path, capsys):
    """To the float16 that a cache keeps."""
    images = [*DIGITS, *VAE, "--num-workers", 0]
    encode = [flag for flag in images if flag not in ("--num-classes", "10")]
    more = ["--precision", "fp32", "--batch-size", 500]
    result = call(capsys, "encode_latents", *encode, "--out", tmp_path / "cache", *more)
    assert result.code == 0, result.err
    more = ["--model", "SiT-T/2", "--global-batch-size", 16, "--lr", 1e-3, "--sample-every", 1000, "--max-steps", 8]
    for name, data in (("online", []), ("cached", ["--data-path", tmp_path / "cache"])):
        result = call(capsys, "train", *images, *data, *more, "--precision", "fp32", "--results-dir", tmp_path / name)
        assert result.code == 0, result.err
    online, cached = last(tmp_path / "online"), last(tmp_path / "cached")
    for key, value in online["ema"].items():
        assert error(cached["ema"][key], value) < 2e-2, key
