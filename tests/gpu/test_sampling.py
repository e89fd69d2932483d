"""Samples of the device: those of the CPU in double-checked arithmetic, and the same after a second call or a kill."""

import subprocess
import time

import numpy as np
import pytest
import torch

from cli import ENV, call, command, kill_tree
from inference import ODE, SDE, Guidance, Pipeline

from .conftest import CUDA, PRECISIONS

pytestmark = pytest.mark.gpu
SOLVERS = [ODE("heun", num_steps=6), ODE("dopri5", num_steps=4), SDE(num_steps=6)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("solver", SOLVERS, ids=["heun", "dopri5", "SDE"])
def test_samples_are_the_cpus(solver, precision, trained):
    labels, settings = [3, 1, 4, 1, 5], dict(solver=solver, guidance=Guidance(2.0), indices=[9, 2, 6, 5, 3])
    cpus = Pipeline.load(trained, device="cpu", precision="fp32").draw(labels, **settings)[-1]
    ours = Pipeline.load(trained, precision=precision).draw(labels, **settings)[-1]
    assert ours.device.type == ("cuda" if CUDA else "cpu") and ours.dtype == torch.float32
    assert (ours.cpu() - cpus).abs().max() < {"fp32": 2e-3, "tf32": 3e-2, "bf16": 0.3}[precision]


@pytest.mark.parametrize("more", [[], ["--compile"]], ids=["eager", "compiled"])
def test_a_second_call_and_a_kill_make_the_same_npz(more, trained, tmp_path, capsys):
    flags = ["SDE", "--ckpt", trained, "--num-sampling-steps", 30, "--num-fid-samples", 50, "--per-proc-batch-size", 4]
    flags += ["--cfg-scale", 2, "--no-png", *more]
    for name in ("one", "two"):
        result = call(capsys, "sample_ddp", *flags, "--sample-dir", tmp_path / name)
        assert result.code == 0, result.err
    victim = subprocess.Popen(
        command("sample_ddp", *flags, "--sample-dir", tmp_path / "killed"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENV,
    )
    while victim.poll() is None and len(list(tmp_path.glob("killed/*.chunks/*.npz"))) < 2:
        time.sleep(0.005)
    assert victim.poll() is None, "it was to be killed before it had finished"
    kill_tree(victim)
    result = call(capsys, "sample_ddp", *flags, "--sample-dir", tmp_path / "killed")
    assert result.code == 0, result.err
    one, two, killed = (np.load(next(tmp_path.glob(f"{name}/*.npz")))["arr_0"] for name in ("one", "two", "killed"))
    assert one.shape == (50, 32, 32, 3) and one.std() > 10
    assert np.array_equal(one, two) and np.array_equal(one, killed)
