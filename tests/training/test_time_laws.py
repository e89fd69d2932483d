"""Times by a law and a shift in a whole run: resumed bit for bit, the same for any number of processes, part of the run."""

import csv

import pytest
import torch
from PIL import Image

from cli import DIGITS, call, launch, one_line
from common.checkpoint import load_checkpoint

RUN = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 8, "--num-workers", 0, "--log-every", 1]
RUN += ["--lr", 1e-3, "--time-law", "mode", "--time-scale", 0.8, "--time-shift", 2.5]


def weights(folder):
    return load_checkpoint(next(folder.glob("*/checkpoints/0000004.pt")))["ema"]


def test_a_run_with_a_law_is_resumed_bit_for_bit(tmp_path, capsys):
    for steps in (2, 4):
        assert call(capsys, "train", *RUN, "--results-dir", tmp_path / "two", "--max-steps", steps, "--resume").code == 0
    assert call(capsys, "train", *RUN, "--results-dir", tmp_path / "one", "--max-steps", 4).code == 0
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    one_line(
        call(capsys, "train", *RUN, "--results-dir", tmp_path / "two", "--max-steps", 9, "--ckpt",
             next((tmp_path / "two").glob("*/checkpoints/*4.pt")), "--time-shift", 1),
        2, "--time-shift 2.5 (now 1.0)",
    )  # fmt: skip


@pytest.mark.slow
def test_any_number_of_processes_sees_the_same_times(tmp_path):
    losses = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = launch("train", *RUN, "--results-dir", folder, "--max-steps", 4, processes=processes)
        assert done.code == 0, done.err
        with open(next(folder.glob("*/metrics.csv"))) as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(weights(tmp_path / "1"), weights(tmp_path / "2"), rtol=0, atol=1e-5)


def test_auto_becomes_a_number_that_the_samplers_take_over(tmp_path, capsys):
    """Pixels of 64 x 128 x 3 are more numbers than 4096."""
    from inference import Pipeline

    for number in range(8):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (128, 64), (10 * number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    own = ["--data-path", tmp_path / "photos", "--num-classes", 1, "--image-size", "64x128", "--results-dir", tmp_path / "runs"]
    flags = [*RUN, *own, "--time-shift", "auto", "--max-steps", 1, "--sample-every", 9]
    assert call(capsys, "train", *flags).code == 0
    ckpt = next(tmp_path.glob("runs/*/checkpoints/*.pt"))
    assert Pipeline.load(ckpt).transport.settings.time_shift == pytest.approx((64 * 128 * 3 / 4096) ** 0.5)
    assert Pipeline.load(ckpt, time_shift=1.0).transport.settings.time_shift == 1
    assert Pipeline.load(ckpt).recipe.transport.time_law == "mode"
