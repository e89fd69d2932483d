"""What the machine reaches: measured quickly, and said."""

import os
import re
import time

import pytest
import torch

import common.machine
from cli import DIGITS, ENV, call
from common.machine import matrix_peak, precision_warning, slow_bf16

CPU = torch.device("cpu")
SMALL = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 8, "--num-workers", 0, "--max-steps", 2]


def test_a_cpu_without_bf16_is_measured_within_half_a_second(monkeypatch):
    def slow(a, b):
        time.sleep(2 * a.shape[0] ** 3 / 1e9)
        return a

    monkeypatch.setattr(torch.Tensor, "__matmul__", slow)  # 1 GFLOP/s, as bf16 has been seen to be there
    started = time.time()
    assert matrix_peak(CPU, "bf16") == pytest.approx(1e9, rel=0.1)
    assert time.time() - started < 0.6


def test_a_first_product_that_loads_libraries_does_not_count(monkeypatch):
    calls = []

    def cold(a, b):
        calls.append(a.shape[0])
        time.sleep(0.6 if len(calls) == 1 else 0.001)
        return a

    monkeypatch.setattr(torch.Tensor, "__matmul__", cold)
    assert matrix_peak(CPU, "fp32") > 1e12 and 1024 in calls


@pytest.fixture
def slow_machine(monkeypatch):
    """Each precision's peak as it was seen on a CPU without bf16, when it was busy besides."""
    peaks = {"bf16": 1e6, "fp32": 135e6}
    for module in ("common.machine", "training.monitor", "training.dry_run"):
        monkeypatch.setattr(f"{module}.matrix_peak", lambda device, precision, *_: peaks[precision])


def test_slow_bf16_is_one_line_and_fast_bf16_none(monkeypatch):
    peaks = {"bf16": 2e9, "fp32": 135e9}
    monkeypatch.setattr(common.machine, "matrix_peak", lambda device, precision: peaks[precision])
    assert "67.5 times slower in bf16 than in fp32; --precision fp32 is faster here" in slow_bf16(CPU)
    peaks["bf16"] = 130e9  # no slower than measurements differ
    assert slow_bf16(CPU) is None and slow_bf16(CPU, 1e9) is not None


def test_an_override_of_pytorchs_is_told(monkeypatch):
    cuda = torch.device("cuda")
    assert [precision_warning(cuda, precision) for precision in ("fp32", "tf32", "bf16")] == [None] * 3
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    assert "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1" in precision_warning(cuda, "fp32")
    assert precision_warning(cuda, "tf32") is precision_warning(cuda, "bf16") is precision_warning(CPU, "fp32") is None


def test_training_says_what_bf16_costs_and_shows_no_share_above_all(slow_machine, tmp_path, capsys):
    result = call(capsys, "train", *SMALL, "--precision", "bf16", "--log-every", 1, "--results-dir", tmp_path)
    assert result.code == 0, result.err
    assert result.out.count("WARNING: this cpu multiplies matrices 135 times slower in bf16") == 1
    first, second = (int(share) for share in re.findall(r"Share of Peak: (\d+)%", result.out))
    assert first == 100 and 0 < second <= 100  # of the most that was ever seen
    result = call(capsys, "train", *SMALL, "--precision", "bf16", "--dry-run")
    assert "warning         this cpu multiplies matrices 135 times slower" in result.out and "(100% of what" in result.out


def test_sampling_says_what_bf16_costs(slow_machine, trained, tmp_path, capsys):
    flags = ["--ckpt", trained, "--num-sampling-steps", 3, "--sampling-method", "euler", "--out", tmp_path / "s.png"]
    result = call(capsys, "sample", "ODE", *flags, "--precision", "bf16")
    assert result.code == 0 and result.err.count("WARNING: this cpu multiplies") == 1
    assert "WARNING" not in call(capsys, "sample", "ODE", *flags).err


def test_gpus_are_hidden_from_tests_that_do_not_ask_for_them(pytestconfig):
    """On a machine with one, the numbers here are a CPU's all the same, in the commands that a test starts too."""
    assert pytestconfig.option.markexpr == "gpu" or os.environ["CUDA_VISIBLE_DEVICES"] == ENV["CUDA_VISIBLE_DEVICES"] == ""
