"""Runs of the first format, before recipes said their format's number: a folder that was stopped half-way, as train.py
wrote it then, with the SiT-T/8 of these tests made tiny. It resumes, and its checkpoints are sampled."""

import json
import shutil

import numpy as np
import pytest
import torch

import models
from cli import DIGITS, call, one_line
from common.checkpoint import load_checkpoint
from common.recipe import FORMAT, recipe_of
from inference import ODE, Pipeline

RUN = "000-SiT-T-8-Linear-velocity-None"
FLAGS = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 8, "--num-workers", 0, "--lr", 1e-3]
FLAGS += ["--lr-schedule", "cosine", "--warmup-steps", 2, "--grad-clip", 1, "--ema-decay", 0.9, "--log-every", 1]
FLAGS += ["--ckpt-every", 4, "--sample-every", 1000, "--max-steps", 8]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(models.SIT_CONFIGS, "SiT-T/8", dict(depth=1, hidden_size=16, num_heads=2, patch_size=8))


@pytest.fixture
def old(tmp_path, tiny):
    """The run folder, without what it wrote after step 4."""
    shutil.copytree("tests/data/format1", tmp_path / "results")
    (tmp_path / "results" / RUN / "checkpoints" / "0000008.pt").unlink()
    return tmp_path / "results"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def assert_close(ours, theirs, where=""):
    """Bit for bit on the machine that wrote it, to rounding on others."""
    if isinstance(theirs, dict):
        for key, value in theirs.items():
            assert_close(ours[key], value, f"{where}/{key}")
    elif isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda text: f"{where}: {text}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for i, value in enumerate(theirs):
            assert_close(ours[i], value, f"{where}/{i}")
    else:
        assert ours == theirs, where


def test_a_run_goes_on_where_it_stopped(old, capsys):
    result = call(capsys, "train", *FLAGS, "--results-dir", old, "--resume")
    assert result.code == 0, result.err
    assert [path.name for path in old.iterdir()] == [RUN] and "step 4" in (old / RUN / "log.txt").read_text()
    ours = load_checkpoint(old / RUN / "checkpoints" / "0000008.pt")
    theirs = load_checkpoint(f"tests/data/format1/{RUN}/checkpoints/0000008.pt")
    for part in ("model", "ema", "opt", "step", "num_images"):
        assert_close(ours[part], theirs[part], part)
    assert ours["recipe"]["format"] == FORMAT and "format" not in theirs["recipe"]
    rows = (old / RUN / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", *map(str, range(1, 9))]


@pytest.mark.parametrize("more, words", [
    (["--lr", 2e-3], "--lr 0.001 (now 0.002)"),
    (["--time-law", "logit-normal"], "--time-law uniform (now logit-normal)"),
    (["--ema-decay", "0.9,0.99"], "--ema-decay 0.9 (now 0.9 0.99)"),
])  # fmt: skip
def test_a_flag_that_it_did_not_know_had_its_default(old, capsys, more, words):
    one_line(call(capsys, "train", *FLAGS, "--results-dir", old, "--resume", *more), 2, words, RUN)
    path = old / RUN / "checkpoints" / "0000004.pt"
    one_line(call(capsys, "train", *FLAGS, "--results-dir", old, "--ckpt", path, *more), 2, words, path)
    assert len(list(old.iterdir())) == 1


def test_a_flag_of_a_newer_version_is_named(old, capsys):
    file = old / RUN / "flags.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hologram": 3}))
    one_line(call(capsys, "train", *FLAGS, "--results-dir", old, "--resume"), 2, "--hologram 3 (unknown here)")


def test_its_checkpoints_are_sampled(old):
    path = old / RUN / "checkpoints" / "0000004.pt"
    content = load_checkpoint(path)
    recipe = recipe_of(content, content["ema"], path)
    assert (recipe.transport.path_type, recipe.transport.time_law, recipe.latent_shape) == ("Linear", "uniform", (3, 32, 32))
    images = Pipeline.load(path).sample([3, 7], solver=ODE("heun", num_steps=4))
    assert images.shape == (2, 32, 32, 3) and images.dtype == np.uint8
    assert (Pipeline.load(path, weights="model").sample([3, 7], solver=ODE("heun", num_steps=4)) != images).any()
