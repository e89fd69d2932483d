"""Images of other shapes and of one channel, from training to numbers."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from cli import call, launch, one_line
from common.checkpoint import load_checkpoint
from data.autoencoder import load_autoencoder
from inference import ODE, Pipeline
from inference.pictures import Layout
from pictures import write_folders

SHAPES = {"32x64": ["--image-size", "32x64"], "grey": ["--image-size", 16, "--channels", 1]}


@pytest.fixture(scope="module", params=SHAPES)
def run(request, tmp_path_factory):
    """(name, images, checkpoint of 4 steps that was stopped and resumed)"""
    folder = tmp_path_factory.mktemp("run")
    images = write_folders(folder / "images", 4, size=(40, 80))
    flags = ["--data-path", images, "--vae", "none", *SHAPES[request.param], "--model", "SiT-T/8", "--global-batch-size", 4]
    flags += ["--num-workers", 0, "--lr", 1e-3, "--sample-every", 4, "--log-every", 1, "--val-path", images]
    for results, count, more in (("a", 4, []), ("b", 2, []), ("b", 4, ["--resume"])):
        done = launch("train", *flags, "--max-steps", count, "--results-dir", folder / results, *more)
        assert done.code == 0, done.err
    paths = [next(folder.glob(f"{results}/*/checkpoints/0000004.pt")) for results in "ab"]
    straight, resumed = map(load_checkpoint, paths)
    assert all(torch.equal(value, resumed["ema"][key]) for key, value in straight["ema"].items())
    return request.param, images, paths[1]


def size(name):
    return (32, 64) if name == "32x64" else (16, 16)


@pytest.mark.slow
def test_it_is_trained_and_its_pictures_have_the_shape(run):
    name, _, path = run
    channels = 1 if name == "grey" else 3
    pipe = Pipeline.load(path)
    assert pipe.latent_shape == (channels, *size(name))
    images = pipe.sample([0, 1], solver=ODE("euler", num_steps=3))
    assert images.shape == (2, *size(name), 3) and images.dtype == np.uint8
    if name == "grey":
        assert (images == images[..., :1]).all()
    with Image.open(path.parents[1] / "samples" / "0000004.png") as picture:
        height, width = size(name)
        layout = Layout(16, height, width, columns=4, named=True)
        assert picture.size == layout.size and layout.scale == (2 if name == "32x64" else 11)


@pytest.mark.slow
def test_it_is_sampled_by_both_scripts_and_scored(run, tmp_path, capsys, inception_weights):
    name, images, path = run
    few = ["--ckpt", path, "--sampling-method", "euler", "--num-sampling-steps", 3]
    drawn = call(capsys, "sample_ddp", "ODE", *few, "--sample-dir", tmp_path, "--num-fid-samples", 12, "--no-png")
    assert drawn.code == 0, drawn.err
    (file,) = tmp_path.glob("*.npz")
    assert np.load(file)["arr_0"].shape == (12, *size(name), 3)
    scored = call(capsys, "evaluate", file, "--ref", images, "--inception-weights", inception_weights)
    assert scored.code == 0 and "fid" in scored.out.lower(), scored.err


@pytest.mark.slow
def test_its_likelihood_and_its_noise(run, tmp_path, capsys):
    """Bits a dimension count one channel where there is one; grey pictures of a folder go the same way as the library's."""
    name, images, path = run
    few = ["--ckpt", path, "--sampling-method", "euler", "--num-sampling-steps", 4, "--data-path", images, "--num-images", 2]
    result = call(capsys, "sample", "ODE", *few, "--likelihood")
    dimensions = (1 if name == "grey" else 3) * np.prod(size(name))
    assert result.code == 0 and f"of {dimensions} dimensions in pixels" in result.out, result.err
    result = call(capsys, "sample", "ODE", *few, "--reverse", "--out", tmp_path / "z.png")
    assert result.code == 0, result.err
    assert np.load(tmp_path / "z.npz")["z"].shape == (2, *Pipeline.load(path).latent_shape)


@pytest.mark.slow
def test_it_is_exported_and_read_back(run, tmp_path, capsys):
    path = run[2]
    assert call(capsys, "export", path, "--out", tmp_path / "f", "--samples", 2).code == 0
    few = ODE("euler", num_steps=3)
    assert np.array_equal(Pipeline.load(tmp_path / "f").sample([1], solver=few), Pipeline.load(path).sample([1], solver=few))


def test_an_autoencoder_of_one_channel_says_so_itself(tmp_path, capsys):
    from diffusers import AutoencoderKL

    shape = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    torch.manual_seed(0)
    small = AutoencoderKL(1, 1, **shape, block_out_channels=[8, 8], norm_num_groups=4, latent_channels=2, sample_size=16)
    small.save_pretrained(tmp_path / "vae")
    images = write_folders(tmp_path / "images", 4)
    flags = ["--data-path", images, "--vae", tmp_path / "vae", "--image-size", 16]
    train = ["--model", "SiT-T/4", "--global-batch-size", 4, "--num-workers", 0, "--max-steps", 2, "--results-dir", tmp_path]
    assert call(capsys, "train", *flags, *train).code == 0
    (path,) = tmp_path.glob("*/checkpoints/*.pt")
    assert load_checkpoint(path)["args"]["channels"] == 1
    pipe = Pipeline.load(path)
    assert pipe.latent_shape == (2, 8, 8) and load_autoencoder(str(tmp_path / "vae")).image_channels == 1
    images_back = pipe.sample([0], solver=ODE("euler", num_steps=3))
    assert images_back.shape == (1, 16, 16, 3) and np.isfinite(pipe.likelihood(images_back, [0])[1]).all()
    assert call(capsys, "encode_latents", *flags, "--out", tmp_path / "cache", "--num-workers", 0).code == 0
    cached = ["--data-path", tmp_path / "cache", *flags[2:], *train[:-1], tmp_path / "r"]
    assert call(capsys, "train", *cached).code == 0
    with open(next((tmp_path / "r").glob("*/metrics.csv"))) as rows:
        assert float(list(csv.DictReader(rows))[-1]["loss"]) > 0
    one_line(call(capsys, "train", *flags, *train, "--channels", 3), 2, "--channels 3 contradicts --vae", "whose images have 1")
    odd = AutoencoderKL(2, 2, **shape, block_out_channels=[8, 8], norm_num_groups=4, latent_channels=2)
    odd.save_pretrained(tmp_path / "odd")
    flags[3] = tmp_path / "odd"
    one_line(call(capsys, "train", *flags, *train), 1, "--vae", "from images of 2 channels to such of 2")
