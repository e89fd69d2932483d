"""measure_loss.py and what reads its file, on real command lines."""

import json
import shutil

import pytest
from PIL import Image

from cli import call, launch, one_line

SMALL = ["--data-path", "builtin:digits", "--num-images", 20, "--bins", 4]


@pytest.fixture
def ckpt(trained, tmp_path):
    """A copy, to have files beside it."""
    return shutil.copy(trained, tmp_path / "0000006.pt")


def test_measured_once_and_used(ckpt, tmp_path, capsys):
    for processes, name in ((1, "0000006.loss.json"), (2, "two.json")):
        done = launch("measure_loss", ckpt, *SMALL, "--out", tmp_path / name, processes=processes)
        assert done.code == 0, done.err
    assert (tmp_path / "two.json").read_text() == (tmp_path / "0000006.loss.json").read_text()
    assert Image.open(tmp_path / "two.png").size[0] > 300
    assert "t = 0.125: " in done.out and "20 images in each of 4 bins" in done.out
    pictures = []
    for more in (
        [],
        ["--diffusion-eta", 0.02],
        ["--diffusion-eta", 2],
        ["--diffusion-eta", 2, "--diffusion-loss", tmp_path / "two.json"],
    ):
        flags = ["--diffusion-form", "KL", "--num-sampling-steps", 6, "--cfg-scale", 1, "--out", tmp_path / "a.png"]
        assert call(capsys, "sample", "SDE", "--ckpt", ckpt, *flags, *more).code == 0
        pictures.append((tmp_path / "a.png").read_bytes())
    assert pictures[0] != pictures[1] != pictures[2] == pictures[3]


def test_the_loss_is_part_of_a_number(ckpt, tmp_path, capsys):
    """The .json says which losses it was; those of others are another run."""
    assert call(capsys, "measure_loss", ckpt, *SMALL).code == 0
    flags = [
        "--ckpt",
        ckpt,
        "--diffusion-form",
        "KL",
        "--diffusion-eta",
        0.1,
        "--num-sampling-steps",
        4,
        "--num-fid-samples",
        2,
    ]
    flags += ["--sample-dir", tmp_path / "samples", "--no-png"]
    for seed in (0, 1):
        assert call(capsys, "measure_loss", ckpt, *SMALL, "--seed", seed).code == 0
        assert call(capsys, "sample_ddp", "SDE", *flags).code == 0
    records = [json.loads(file.read_text()) for file in (tmp_path / "samples").glob("*.json")]
    assert len({record["settings"]["diffusion_loss_sha256"] for record in records}) == 2


def test_bad_settings_are_one_line(ckpt, tmp_path, capsys):
    sde = ("sample", "SDE", "--ckpt", ckpt, "--out", tmp_path / "a.png")
    one_line(call(capsys, *sde, "--diffusion-eta", 0.1), 2, "--diffusion-eta", "--diffusion-form KL")
    one_line(call(capsys, *sde, "--diffusion-form", "KL", "--diffusion-eta", 0), 2, "above 0")
    one_line(call(capsys, *sde, "--diffusion-form", "KL", "--diffusion-eta", 0.1), 1, "measure_loss.py", "0000006.loss.json")
    many = ("sample_ddp", "SDE", "--ckpt", ckpt, "--sample-dir", tmp_path / "s", "--diffusion-form", "KL")
    one_line(call(capsys, *many, "--diffusion-eta", 0.1), 1, "run measure_loss.py", "0000006.loss.json")
    one_line(call(capsys, *sde, "--diffusion-loss", "x"), 2, "--diffusion-loss goes with --diffusion-eta")
    measure = ("measure_loss", ckpt, *SMALL)
    one_line(call(capsys, *measure, "--num-images", 1), 2, "--num-images 1")
    one_line(call(capsys, *measure, "--time-shift", 2), 2, "--time-shift")
    Image.new("RGB", (32, 32)).save(tmp_path / "one.png")
    one_line(call(capsys, "measure_loss", ckpt, "--data-path", tmp_path), 1, "its classes are not those of")
    (tmp_path / "one.png").unlink()
    one_line(call(capsys, *measure, "--out", tmp_path), 2, "--out", ".json")
    one_line(call(capsys, "measure_loss", tmp_path / "no.pt", "--data-path", "builtin:digits"), 1, "there is no such file")
    one_line(call(capsys, "measure_loss", ckpt, "--data-path", tmp_path / "no"), 1, "no")
    assert not list(tmp_path.glob("*.json")) and not list(tmp_path.glob("*.png"))
