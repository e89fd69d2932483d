import re

import numpy as np
import pytest
import torch
from PIL import Image

from cli import call, launch
from common.checkpoint import load_checkpoint
from inference.pictures import Layout

FAST = ["--num-sampling-steps", 6]


def test_a_checkpoint_needs_no_further_flag(trained, tmp_path):
    done = launch("sample", "ODE", "--ckpt", trained, cwd=tmp_path)
    assert done.code == 0, done.err
    assert re.search(r"sample\.png: 10 samples, \d+ network calls, [\d.]+ s", done.out)
    assert Image.open(tmp_path / "sample.png").size == (4 * 162 + 2, 3 * (162 + 25) + 2)  # five times enlarged, with names


def drawn(path, count, columns):
    """int (count, 32, 32, 3): the images of a picture, whose pixels must be squares."""
    layout = Layout(count, 32, 32, columns, named=True)
    with Image.open(path) as picture:
        assert picture.size == layout.size
        images = layout.cut(picture)
        for i, image in enumerate(images):
            x, y = layout.corner(i)
            square = np.asarray(picture)[y : y + 32 * layout.scale, x : x + 32 * layout.scale]
            assert (square == image.repeat(layout.scale, 0).repeat(layout.scale, 1)).all()
    return images.astype(int)


def test_same_seed_same_picture_and_sample_i_does_not_depend_on_the_rest(trained, tmp_path, capsys):
    for name, more in (("a", []), ("b", []), ("c", ["--seed", 1]), ("d", ["--class-labels", 0, 1])):
        out = tmp_path / f"{name}.png"
        result = call(capsys, "sample", "SDE", "--ckpt", trained, *FAST, "--out", out, *more)
        assert result.code == 0, result.err
    a, b, c = (drawn(tmp_path / f"{name}.png", 10, 4) for name in "abc")
    assert (a == b).all() and (a != c).any()
    assert np.abs(a[:2] - drawn(tmp_path / "d.png", 2, 2)).max() <= 1


@pytest.mark.parametrize("mode, flags", [
    ("ODE", ["--sampling-method", "heun"]),
    ("SDE", ["--sampling-method", "Heun", "--diffusion-form", "linear", "--last-step", "Tweedie"]),
    ("SDE", ["--last-step", "None"]),
    ("ODE", ["--guidance-low", 0.2, "--guidance-high", 0.7, "--cfg-channels", "all"]),
])  # fmt: skip
def test_samplers_and_a_trajectory(trained, tmp_path, capsys, mode, flags):
    gif = tmp_path / "way.gif"
    flags = [*FAST, *flags, "--class-labels", 3, "--num-samples-per-class", 2, "--trajectory", gif]
    result = call(capsys, "sample", mode, "--ckpt", trained, *flags, "--out", tmp_path / "s.png")
    assert result.code == 0, result.err
    first, second = drawn(tmp_path / "s.png", 2, 2)
    assert (first != second).any()
    states = 6 + (mode == "SDE" and "None" not in flags)
    assert f"way.gif: {states} of {states} states" in result.out
    with Image.open(gif) as frames:
        assert 2 <= frames.n_frames <= states  # a GIF merges frames that are the same


def test_reverse_encodes_and_returns(trained, tmp_path, capsys):
    flags = ["--reverse", "--data-path", "builtin:digits", "--num-images", 4, "--out", tmp_path / "r.png", "--rtol", 1e-6]
    result = call(capsys, "sample", "ODE", "--ckpt", trained, *flags)
    assert result.code == 0, result.err
    with np.load(tmp_path / "r.npz") as file:
        assert file["z"].shape == (4, 3, 32, 32) and file["labels"].tolist() == [0, 2, 5, 7]
    left, right, *_ = drawn(tmp_path / "r.png", 8, 8)
    assert left.max() > 200 and np.abs(left - right).max() <= 1  # the digit, and its way to noise and back


def test_likelihood_is_that_of_the_images(trained, tmp_path, capsys):
    flags = ["--likelihood", "--num-images", 2, "--num-probes", 2]
    digits = call(capsys, "sample", "ODE", "--ckpt", trained, *flags, "--data-path", "builtin:digits")
    assert digits.code == 0, digits.err
    assert re.search(r"digit 2500: \d\.\d{4} bits/dim \(-?[\d.]+ nats\)", digits.out)
    for i in range(2):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    noise = call(capsys, "sample", "ODE", "--ckpt", trained, *flags, "--data-path", tmp_path)
    mean = lambda result: float(re.search(r"mean ([\d.]+) bits/dim", result.out)[1])  # noqa: E731
    assert noise.code == 0 and mean(noise) != mean(digits)


def test_autoguidance_by_a_weaker_checkpoint(trained, tmp_path, capsys):
    content = load_checkpoint(trained)
    content["ema"] = content["model"]
    weak = tmp_path / "weak.pt"
    torch.save(content, weak)
    flags = [
        "ODE",
        "--ckpt",
        trained,
        "--sampling-method",
        "euler",
        *FAST,
        "--out",
        tmp_path / "s.png",
        "--guidance-ckpt",
        weak,
    ]
    result = call(capsys, "sample", *flags)
    assert result.code == 0 and " 10 network calls" in result.out  # five steps, two networks


def test_bf16_weights_sample(trained, tmp_path, capsys):
    for precision in ("fp32", "bf16"):
        flags = ["--precision", precision, "--out", tmp_path / f"{precision}.png"]
        assert call(capsys, "sample", "ODE", "--ckpt", trained, *flags).code == 0
    difference = np.abs(np.subtract(*(drawn(tmp_path / f"{precision}.png", 10, 4) for precision in ("fp32", "bf16"))))
    assert 0 < difference.max() < 40 and difference.mean() < 2
