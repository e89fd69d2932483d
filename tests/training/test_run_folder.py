"""A run on disk: checkpoints in the order of their steps, a plot that does not grow with the run, one W&B run."""

import time

import pytest
import torch

from cli import DIGITS, call, launch, one_line
from common.checkpoint import save_checkpoint
from training.plot import POINTS, save_plot
from training.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "000-x")


def fill(folder, *steps):
    for step in steps:
        save_checkpoint({"step": step}, folder.checkpoint_path(step))


def test_checkpoints_are_ordered_by_number(folder):
    fill(folder, 9_999_998, 9_999_999, 10_000_000)
    (folder.checkpoints / "best.pt").write_bytes(b"a user's own")
    assert list(folder.saved()) == [9_999_998, 9_999_999, 10_000_000]
    path, content = folder.newest_checkpoint(print)
    assert path.name == "10000000.pt" and content["step"] == 10_000_000
    folder.prune(2, None)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["10000000.pt", "9999999.pt", "best.pt"]
    (folder.path / "flags.json").write_text('{"total_steps": 10000000}')
    assert folder.is_finished()
    fill(folder, 12_000_000)
    folder.prune(1, 10_000_000)
    assert list(folder.saved()) == [10_000_000, 12_000_000]


def test_a_plot_of_a_long_run_is_made_at_once(tmp_path):
    rows = [{"step": str(100 * i), "loss": str(1 / (i + 1)), "grad_norm": "1"} for i in range(140_000)]
    started = time.time()
    save_plot(tmp_path / "loss.png", "long", rows, [])
    assert time.time() - started < 8 and (tmp_path / "loss.png").stat().st_size > 5_000  # 53 s, were it a slice a point
    assert len(rows) > POINTS


SMALL = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 8, "--num-workers", 0, "--lr", 1e-3]
SMALL += ["--log-every", 1, "--sample-every", 1000, "--resume"]


@pytest.mark.slow
def test_a_wandb_run_is_resumed_and_a_complete_one_is_not_opened(tmp_path):
    flags = [*SMALL, "--results-dir", tmp_path, "--wandb"]
    quiet = dict(WANDB_MODE="offline", WANDB_KEY="", WANDB_SILENT="true")
    for steps in (1, 2, 2):
        done = launch("train", *flags, "--max-steps", steps, **quiet)
        assert done.code == 0, done.err
    (file,) = tmp_path.glob("000-*/wandb-id.txt")
    runs = list(tmp_path.glob("000-*/wandb/offline-run-*"))
    assert len(runs) == 2 and all(run.name.endswith(file.read_text().strip()) for run in runs)


def test_wandb_that_is_missing_is_one_line_before_anything_is_made(tmp_path, capsys, monkeypatch):
    import train

    monkeypatch.setattr(train, "find_spec", lambda name: None)
    result = call(capsys, "train", *SMALL, "--results-dir", tmp_path / "r", "--wandb", "--max-steps", 1)
    one_line(result, 1, "--wandb", "pip install wandb")
    assert not (tmp_path / "r").exists()


def test_a_step_that_is_a_tensor_is_read(tmp_path, trained):
    from training.optimizer import step_of

    assert step_of({"step": torch.tensor(7)}) == 7
