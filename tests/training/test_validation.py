"""The loss of held-out images while training."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cli import DIGITS, ROOT, call, launch, one_line
from common.checkpoint import load_checkpoint
from common.recipe import recipe_of
from common.streams import generator
from data.autoencoder import load_autoencoder
from data.folders import FolderDataset
from data.images import DigitsDataset, to_pixels
from data.parts import split
from pictures import write_folders, write_labelled, write_zip

SMALL = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 8, "--num-workers", 0, "--sample-every", 1000]
HELD = ["--val-fraction", 0.01, "--val-images", 45]


def rows(results, name="validations.csv"):
    (file,) = results.glob(f"*/{name}")
    with open(file) as lines:
        return list(csv.DictReader(lines))


def numbers(row):
    return {name: float(value) for name, value in row.items() if name != "step"}


def test_a_fresh_network_s_loss_is_that_of_saying_nothing(tmp_path, capsys):
    """It answers zero, so that the loss is the mean square of x1 - noise: drawn here by hand. At a learning rate of zero it
    stays what it is."""
    result = call(capsys, "train", *SMALL, *HELD, "--val-every", 2, "--max-steps", 4, "--lr", 0, "--results-dir", tmp_path)
    assert result.code == 0, result.err
    assert "Validation every 2 steps: 45 of 50 images of --val-fraction 0.01" in result.out
    held_out = split(DigitsDataset(32), 0.01)[1]
    losses = []
    for j in range(45):
        g = generator("cpu", 0, "validation", j)
        _, noise = torch.randn(3, 32, 32, generator=g), torch.randn(3, 32, 32, generator=g)
        x1 = to_pixels(held_out[j * 50 // 45][0][None])
        losses.append((x1 - noise).square().mean().item())
    first, second = rows(tmp_path)
    assert numbers(first) == numbers(second) and (first["step"], second["step"]) == ("2", "4")
    for name in ("loss", "ema_loss"):
        assert float(first[name]) == pytest.approx(np.mean(losses), rel=1e-5)
        for tenth in range(10):
            assert float(first[f"{name}_t{tenth}"]) == pytest.approx(np.mean(losses[tenth::10]), rel=1e-5)
    assert f"(step=0000002) Validation of 45 images: loss {np.mean(losses):.4f}, of the EMA {np.mean(losses):.4f}" in result.out
    with Image.open(next(tmp_path.glob("*/loss.png"))) as picture:
        assert picture.size[0] > 1.5 * picture.size[1] * 1.5  # two panels


def test_the_loss_is_that_of_the_network_and_of_its_average_under_the_images_labels(tmp_path, capsys):
    """By hand from a checkpoint, on the latents of an autoencoder."""
    vae = str(ROOT / "assets" / "digits-vae")
    flags = [*DIGITS, "--vae", vae, "--model", "SiT-T/4", "--global-batch-size", 8, "--num-workers", 0, "--lr", 2e-2]
    flags += [*HELD, "--val-every", 8, "--max-steps", 8, "--ema-decay", 0.5, "--results-dir", tmp_path]
    assert call(capsys, "train", *flags).code == 0
    content = load_checkpoint(next(tmp_path.glob("*/checkpoints/*.pt")))
    held_out, autoencoder = split(DigitsDataset(32), 0.01)[1], load_autoencoder(vae)
    items = [held_out[j * 50 // 45] for j in range(45)]
    streams = [generator("cpu", 0, "validation", j) for j in range(45)]
    posterior, noise = (torch.stack([torch.randn(4, 8, 8, generator=g) for g in streams]) for _ in range(2))
    t = torch.tensor([(j % 10 + torch.rand(1, generator=g).item()) / 10 for j, g in enumerate(streams)])
    mean, std = autoencoder.moments(to_pixels(torch.stack([image for image, _ in items])))
    x1, y = (mean + std * posterior) * autoencoder.scale, torch.tensor([label for _, label in items])
    (row,) = map(numbers, rows(tmp_path))
    for name, part in (("loss", "model"), ("ema_loss", "ema")):
        model = recipe_of(content, content[part]).build().eval()
        model.load_state_dict(content[part])
        tt = t.view(-1, 1, 1, 1)
        with torch.no_grad():
            error = model(tt * x1 + (1 - tt) * noise, t, y) - (x1 - noise)
        losses = error.square().flatten(1).mean(1).numpy()
        assert row[name] == pytest.approx(losses.mean(), rel=1e-4)
        assert row[f"{name}_t3"] == pytest.approx(losses[3::10].mean(), rel=1e-4)
    assert abs(row["loss"] - row["ema_loss"]) > 1e-3  # they can be told apart


def test_a_validation_that_a_kill_left_undone_is_made_up_for(tmp_path, capsys, monkeypatch):
    """Killed between a step's checkpoint and its validation."""
    from training.monitor import Monitor

    flags = [*SMALL, *HELD, "--val-every", 2, "--ckpt-every", 2, "--results-dir", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "validate", lambda *_: sys.exit(9))
        assert call(capsys, "train", *flags, "--max-steps", 4).code == 9
    assert call(capsys, "train", *flags, "--max-steps", 4, "--resume").code == 0
    assert [row["step"] for row in rows(tmp_path)] == ["2", "4"]


def test_times_lie_in_their_tenths_of_the_training_interval(tmp_path, capsys, monkeypatch):
    from transport import Transport

    asked, losses = [], Transport.training_losses

    def watched(self, model, x1, model_kwargs, **more):
        t0, t1 = self.train_interval
        asked.append(((more["t"] - t0) / (t1 - t0), model_kwargs))
        return losses(self, model, x1, model_kwargs, **more)

    monkeypatch.setattr(Transport, "training_losses", watched)
    flags = ["--prediction", "data", "--val-every", 1, "--max-steps", 1, "--results-dir", tmp_path]
    assert call(capsys, "train", *SMALL, *HELD, *flags, "--time-law", "logit-normal").code == 0
    validation = [(t, more) for t, more in asked if len(t) != 8]  # of the model and of its average, two chunks each
    times = torch.cat([t for t, _ in validation[:2]])
    assert len(validation) == 4 and ((10 * times).floor() == torch.arange(45) % 10).all()
    assert not any(more["force_drop_ids"].any() for _, more in validation)


@pytest.mark.slow
def test_any_number_of_processes_gets_the_same_numbers_and_a_resumed_run_too(tmp_path):
    """Of the same weights, which answer something: those of a checkpoint."""
    flags = [*SMALL, *HELD, "--val-every", 1, "--results-dir"]
    first = launch("train", *flags, tmp_path / "first", "--lr", 1e-2, "--max-steps", 4)
    assert first.code == 0, first.err
    flags = ["--lr", 1e-2, "--ckpt", next(tmp_path.glob("first/*/checkpoints/*.pt")), *flags]
    for processes in (1, 2):  # each validates before its first step
        done = launch("train", *flags, tmp_path / str(processes), "--max-steps", 5, processes=processes)
        assert done.code == 0, done.err
    one, two = (rows(tmp_path / name) for name in "12")
    assert [row["step"] for row in one] == ["4", "5"] and numbers(one[0]) == numbers(two[0])
    assert numbers(one[1]) == pytest.approx(numbers(two[1]), rel=1e-5)  # of weights that agree to rounding
    flags = flags[:2] + flags[4:]
    done = launch("train", *flags, tmp_path / "1", "--max-steps", 6, "--resume")
    assert done.code == 0 and [row["step"] for row in rows(tmp_path / "1")] == ["4", "5", "6"], done.err


def test_what_is_held_out_is_not_trained_on(tmp_path, capsys, monkeypatch):
    seen, item = set(), DigitsDataset.__getitem__
    monkeypatch.setattr(DigitsDataset, "__getitem__", lambda self, i: seen.add(i) or item(self, i))
    flags = [*SMALL, "--val-fraction", 0.5, "--val-images", 5, "--max-steps", 40, "--results-dir", tmp_path]
    result = call(capsys, "train", *flags)
    assert result.code == 0 and "2,500 images in 10 classes" in result.out, result.err
    held_out = set(split(DigitsDataset(32), 0.5)[1].indices.tolist())
    assert len(seen) > 300 and len(seen & held_out) == 5
    (path,) = tmp_path.glob("*/checkpoints/*.pt")
    assert load_checkpoint(path)["num_images"] == 2500
    (file,) = tmp_path.glob("*/flags.json")
    file.write_text(file.read_text().replace('"total_steps": 40', '"total_steps": 90'))
    other = [*SMALL, "--max-steps", 60, "--results-dir", tmp_path, "--resume"]
    one_line(call(capsys, "train", *other), 2, "--val-fraction 0.5 (now None)")
    assert json.loads(file.read_text())["val_fraction"] == 0.5


def test_a_path_of_any_kind_and_what_does_not_fit(tmp_path, capsys):
    data, val = write_folders(tmp_path / "data", 4), write_zip(write_folders(tmp_path / "v", 3, seed=1), tmp_path / "val.zip")
    flags = [
        *SMALL[6:],
        "--image-size",
        16,
        "--data-path",
        data,
        "--vae",
        "none",
        "--max-steps",
        1,
        "--results-dir",
        tmp_path / "r",
    ]
    result = call(capsys, "train", *flags, "--val-path", val)
    assert result.code == 0 and f"Validation every 5,000 steps: 9 of 9 images of {val}" in result.out, result.err
    row = numbers(rows(tmp_path / "r")[0])
    assert "loss_t8" in row and "loss_t9" not in row  # nine images
    numbered = write_labelled(FolderDataset(tmp_path / "v", 8), tmp_path / "numbered")  # classes without names
    assert call(capsys, "train", *flags[:-1], tmp_path / "r2", "--val-path", numbered).code == 0
    assert numbers(rows(tmp_path / "r2")[0]) == row
    (tmp_path / "v" / "d").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "v" / "d" / "1.png")
    for more, code, words in (
        (["--val-path", tmp_path / "v"], 2, ["--val-path", "classes are not those of"]),
        (["--val-path", tmp_path / "none"], 1, [f"--val-path {tmp_path / 'none'}", "no such folder"]),
        (["--val-path", val, "--val-fraction", 0.1], 2, ["give one of them"]),
        (["--val-every", 3], 2, ["--val-every goes with"]),
        (["--val-fraction", 1.0], 2, ["below 1"]),
        (["--val-fraction", 0.01], 2, ["--val-fraction 0.01 of 12 images"]),
    ):
        one_line(call(capsys, "train", *flags, *more), code, *words)
    broken = tmp_path / "v2"
    write_folders(broken, 3)
    (broken / "a" / "1.png").write_bytes(b"no picture")
    result = call(capsys, "train", *flags, "--val-path", broken)
    assert result.code == 0 and f"WARNING: skipped unreadable image {broken / 'a' / '1.png'}" in result.out
