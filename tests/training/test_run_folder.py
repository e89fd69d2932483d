"""A run on disk: checkpoints in the order of their steps, a plot that does not grow with the run, one W&B run."""

import os
import shutil
import time

import pytest
import torch

from cli import DIGITS, call, launch, one_line
from common.checkpoint import save_checkpoint
from common.sharded import write_sharded
from training.plot import POINTS, save_plot
from training.run_folder import RunFolder, by_step


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


def test_folders_of_checkpoints_count_like_files(folder):
    fill(folder, 3, 7)
    for step in (5, 7, 10, 11):
        write_sharded({"step": step, "w": torch.ones(step)}, folder.checkpoint_path(step, ""))
    (folder.checkpoints / "12").mkdir()  # a user's own
    names = {3: "0000003.pt", 5: "0000005", 7: "0000007.pt", 10: "0000010", 11: "0000011"}
    assert {step: path.name for step, path in folder.saved().items()} == names  # of a step that has both, the file
    assert list(by_step(folder.checkpoints)) == [3, 7]
    (folder.path / "flags.json").write_text('{"total_steps": 11}')
    assert folder.is_finished()

    (folder.checkpoints / "0000011" / "__0_0.distcp").write_bytes(b"")
    (folder.checkpoints / "0000011.damaged" / "older").mkdir(parents=True)
    warnings = []
    path, content = folder.newest_checkpoint(warnings.append)
    assert path.name == "0000010" and content["step"] == 10 and content["w"].is_meta and len(content["w"]) == 10
    assert "now 0000011.damaged: " in warnings[0] and "__0_0.distcp" in warnings[0] and len(warnings) == 1
    assert not folder.is_finished() and (folder.checkpoints / "0000011.damaged" / "content.pt").exists()
    (folder.checkpoints / "0000010" / "manifest.json").unlink()
    (folder.checkpoints / "0000007.pt").write_bytes(b"")
    path, _ = folder.newest_checkpoint(warnings.append)
    assert path.name == "0000007" and len(warnings) == 3  # after the file, the folder of its step


def test_folders_of_checkpoints_are_pruned_whole(folder, monkeypatch):
    for step in (5, 6, 7, 8):
        write_sharded({"step": step}, folder.checkpoint_path(step, ""))
    folder.prune(1, 6)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["0000006", "0000008"]

    def cut(path, **settings):
        if path.exists():
            (path / "content.pt").unlink()
            raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut)
        with pytest.raises(OSError, match="killed"):
            folder.prune(1, None)
    assert list(folder.saved()) == [8]
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == [f".0000006.{os.getpid()}.old.tmp", "0000008"]
    (folder.checkpoints / ".0000009.pt.1.tmp").write_bytes(b"half a file")
    folder.rewind(8)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["0000008"]


def test_of_a_step_that_has_a_file_and_a_folder_both_are_pruned(folder):
    fill(folder, 5, 7)
    for step in (5, 6):
        write_sharded({"step": step}, folder.checkpoint_path(step, ""))
    folder.prune(1, None)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["0000007.pt"]


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
