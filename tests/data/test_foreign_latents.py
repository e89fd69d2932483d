"""Latents that REPA's code encoded, imported into a cache; those that only look alike are refused."""

import json

import numpy as np
import pytest
import torch

from cli import ROOT, call, one_line
from data.autoencoder import load_autoencoder
from data.folders import FolderDataset
from data.images import to_pixels
from data.latent_cache import LatentCache
from pictures import write_folders

VAE = str(ROOT / "assets" / "digits-vae")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("images"), count=5, size=(16, 16))


@pytest.fixture
def foreign(images, tmp_path):
    """vae-sd, as REPA's preprocessing leaves it."""
    dataset, autoencoder, labels = FolderDataset(images, 16), load_autoencoder(VAE), []
    for i in range(len(dataset)):
        name = f"{i // 1000:05d}/img-mean-std-{i:08d}.npy"
        (tmp_path / "vae-sd" / name).parent.mkdir(parents=True, exist_ok=True)
        image, label = dataset[i]
        np.save(tmp_path / "vae-sd" / name, torch.cat(autoencoder.moments(to_pixels(image[None])), 1)[0].numpy())
        labels.append([name, label])
    (tmp_path / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    return tmp_path / "vae-sd"


def run(capsys, foreign, out, *more):
    return call(capsys, "encode_latents", "--data-path", foreign, "--out", out, "--vae", VAE, "--batch-size", 4, *more)


def test_what_is_imported_is_what_would_be_encoded_without_mirror_images(foreign, images, tmp_path, capsys):
    """Killed in between or not: it is a cache like others."""
    result = run(capsys, foreign, tmp_path / "imported", "--num-workers", 0)
    assert result.code == 0 and "one variant: images will not be mirrored" in result.out, result.err
    flags = ["--data-path", images, "--image-size", 16, "--vae", VAE, "--batch-size", 4, "--num-workers", 0]
    assert call(capsys, "encode_latents", *flags, "--out", tmp_path / "encoded").code == 0
    ours, theirs = LatentCache(tmp_path / "imported"), LatentCache(tmp_path / "encoded")
    assert not ours.mirrors and theirs.mirrors and len(ours) == 15 and ours.record["image_size"] == 16
    assert ours.labels.tolist() == theirs.labels.tolist() and ours.classes == ["0", "1", "2"]
    for i in range(15):
        torch.testing.assert_close(ours[i][0][0].float(), theirs[i][0][0].float(), rtol=2**-9, atol=2e-5)
    assert "was complete already" in run(capsys, foreign, tmp_path / "imported").out
    train = ["--data-path", tmp_path / "imported", "--vae", VAE, "--image-size", 16, "--model", "SiT-T/4", "--max-steps", 2]
    train += ["--global-batch-size", 4, "--num-workers", 0, "--results-dir", tmp_path / "r"]
    assert call(capsys, "train", *train).code == 0
    assert call(capsys, "encode_latents", "--out", tmp_path / "imported", "--check").code == 0


def test_edm2_s_look_alikes_are_refused_by_their_means(foreign, tmp_path, capsys):
    """Whatever else they are: here made of numbers of those means and widths."""
    rng = np.random.default_rng(0)
    mean, std = (np.array(values)[:, None, None] for values in ((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)))
    for file in foreign.rglob("*.npy"):
        values = np.concatenate([mean + std * rng.standard_normal((4, 16, 16)), np.full((4, 16, 16), 0.1)])
        np.save(file, values.astype(np.float32))
    one_line(run(capsys, foreign, tmp_path / "out"), 1, foreign, "those of EDM2's latents", "[0, 1] and not in [-1, 1]")
    assert not (tmp_path / "out").exists()


def change(file, how):
    values = np.load(file)
    if how == "half":
        np.save(file, values.astype(np.float16))
    elif how == "odd":
        np.save(file, values[:7])
    elif how == "negative":
        np.save(file, -np.abs(values))
    elif how == "pickle":
        np.save(file, np.array([print] * 3, dtype=object), allow_pickle=True)
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:200])
    elif how == "empty":
        file.write_bytes(b"")


WRONG = {
    "half": "float16 of shape",
    "odd": "(7, 4, 4), expected float32 of (2 C, h, w)",
    "negative": "its numbers are not means and standard deviations",
    "pickle": "",
    "cut": "",
    "empty": "",
}


@pytest.mark.parametrize("how", WRONG)
def test_what_are_no_latents_is_one_line(how, foreign, tmp_path, capsys):
    for file in foreign.rglob("*.npy"):
        change(file, how)
    one_line(run(capsys, foreign, tmp_path / "out"), 1, "cannot read", foreign, WRONG[how])


def test_another_autoencoder_or_size_is_one_line(foreign, tmp_path, capsys):
    one_line(run(capsys, foreign, tmp_path / "out", "--image-size", 32), 2, "--image-size 32", "size 16")
    labels = json.loads((foreign / "dataset.json").read_text())
    labels["labels"][3][0] = "gone.npy"
    (foreign / "dataset.json").write_text(json.dumps(labels))
    one_line(run(capsys, foreign, tmp_path / "out"), 1, foreign, "have no label")
    flags = ["--data-path", foreign, "--vae", VAE, "--image-size", 16, "--model", "SiT-T/4", "--max-steps", 1]
    one_line(call(capsys, "train", *flags, "--results-dir", tmp_path / "r"), 1, foreign, "encode_latents.py imports")
