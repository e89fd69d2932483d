"""A cache of latents trains as the images do, survives kills, and is refused where it is not what was asked for."""

import csv
import errno
import itertools
import json
import os
import pickle
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import encode_latents
from cli import ROOT, call, launch, one_line
from common.checkpoint import load_checkpoint
from common.errors import UserError
from data.autoencoder import LatentSpace, load_autoencoder
from data.folders import FolderDataset
from data.images import DigitsDataset, to_latents, to_pixels
from data.latent_cache import LatentCache
from training.draws import draw_step

VAE = str(ROOT / "assets" / "digits-vae")
SIZE, COUNT, CHUNK = 32, 24, 4
CLOSE = dict(rtol=2**-10, atol=2e-5)  # the rounding of float16, and of float32 in other batches


def make_images(root, classes=3, count=COUNT // 3, seed=0):
    """Class folders of noise on a gradient, which no mirror leaves unchanged."""
    rng = np.random.default_rng(seed)
    gradient = np.linspace(0, 128, SIZE)[:, None] * np.ones((SIZE, 1, 3))
    for name in "abc"[:classes]:
        (root / name).mkdir(parents=True)
        for i in range(count):
            image = np.rot90(gradient, i) + rng.uniform(0, 127, (SIZE, SIZE, 3))
            Image.fromarray(image.astype(np.uint8)).save(root / name / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "images")


def flags(images, out, *more):
    common = ["--vae", VAE, "--image-size", SIZE, "--batch-size", CHUNK, "--num-workers", 0]
    return ["--data-path", images, "--out", out, *common, *more]


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A cache that one process made without being killed."""
    out = tmp_path_factory.mktemp("cache") / "whole"
    done = launch("encode_latents", *flags(images, out), "--num-workers", 2)
    assert done.code == 0, done.err
    assert f"{COUNT} images, moments of shape (24, 2, 2, 4, 8, 8), 4.92e-05 GB" in done.out and "images/s" in done.out
    return out


@pytest.fixture(scope="module")
def autoencoder():
    return load_autoencoder(VAE)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_moments_are_those_of_the_image_and_of_its_mirror_image(whole, images, autoencoder):
    cache, dataset = LatentCache(whole), FolderDataset(images, SIZE)
    assert len(cache) == len(dataset) == COUNT and cache.classes == dataset.classes and cache.mirrors
    for i in (0, 9, COUNT - 1):
        (moments, label), (image, expected) = cache[i], dataset[i]
        assert label == expected and cache.name(i) == dataset.name(i)
        assert moments.dtype == torch.float16 and moments.shape == (2, 2, 4, 8, 8)
        for variant, view in enumerate((image, image.flip(-1))):
            mean, std = autoencoder.moments(to_pixels(view[None]))
            torch.testing.assert_close(moments[variant].float(), torch.cat([mean, std]), **CLOSE)
        assert (moments[0].flip(-1) - moments[1]).abs().max() > 0.2  # convolutions are not symmetric


def test_same_draws_give_the_latents_of_training_on_images(whole, images, autoencoder):
    cache, dataset = LatentCache(whole), FolderDataset(images, SIZE)
    batch = list(range(16))
    pixels, moments = (torch.stack([data[i][0] for i in batch]) for data in (dataset, cache))
    draws = draw_step(0, 1, len(batch), (4, 8, 8), torch.device("cpu"))
    assert 0 < draws.flip.sum() < len(batch)
    for mirrors in (True, False):
        ours, theirs = (to_latents(autoencoder, x, draws.flip & mirrors, draws.posterior) for x in (moments, pixels))
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2**-9, atol=2**-9)
    straight = to_latents(autoencoder, moments, torch.zeros_like(draws.flip), draws.posterior)
    mirrored = to_latents(autoencoder, moments, draws.flip, draws.posterior)
    changed = (straight != mirrored).flatten(1).any(1)
    assert torch.equal(changed, draws.flip)


def test_many_draws_have_the_mean_and_spread_of_the_posterior(whole, images, autoencoder):
    image = FolderDataset(images, SIZE)[5][0]
    mean, std = (x[0] * autoencoder.scale for x in autoencoder.moments(to_pixels(image[None])))
    count = 20_000
    moments = LatentCache(whole)[5][0].expand(count, -1, -1, -1, -1, -1)
    x = to_latents(autoencoder, moments, torch.zeros(count, dtype=bool), torch.randn(count, 4, 8, 8))
    assert ((x.mean(0) - mean).abs() < 5 * std / count**0.5 + 1e-3).all()
    assert torch.allclose(x.std(0), std, rtol=5 / (2 * count) ** 0.5)


def test_digits_have_no_mirror_images(monkeypatch, capsys, tmp_path, autoencoder):
    digits = DigitsDataset(SIZE)
    digits.images, digits.labels = digits.images[::700], digits.labels[::700]
    monkeypatch.setattr("data.sources.open_dataset", lambda *_: digits)
    assert call(capsys, "encode_latents", *flags("builtin:digits", tmp_path / "cache")).code == 0
    cache = LatentCache(tmp_path / "cache")
    assert not cache.mirrors and len(cache) == 8 and [cache[i][1] for i in range(8)] == digits.labels.tolist()
    moments = torch.cat(autoencoder.moments(to_pixels(digits.images[7:8])))
    torch.testing.assert_close(cache[7][0][0].float(), moments, **CLOSE)
    assert cache[7][0].shape == (1, 2, 4, 8, 8)


def killed(argv, deed):
    """Encode in a forked process that dies by SIGKILL before the deed-th flush, rename or removal; whether it did."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = itertools.count(deed - 1, -1)

    def dying(function):
        def deadly(*args, **kwargs):
            if not next(left):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return deadly

    try:
        os.fsync, os.replace, os.unlink = map(dying, (os.fsync, os.replace, os.unlink))
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        encode_latents.main(encode_latents.make_parser().parse_args([str(arg) for arg in argv]))
    finally:
        os._exit(0)


def chunks(out):
    return len(list(out.glob("chunks/*.npz")))


def test_killed_anywhere_and_resumed_makes_the_same_files(capsys, monkeypatch, autoencoder, whole, images, tmp_path):
    monkeypatch.setattr("data.autoencoder.load_autoencoder", lambda name: autoencoder)  # once will do
    for deed in itertools.count(1):
        out = tmp_path / str(deed)
        if not killed(flags(images, out), deed):
            break
        made = f"{COUNT - CHUNK * chunks(out)} images encoded"
        expected = "was complete already" if (out / "cache.json").exists() else made
        result = call(capsys, "encode_latents", *flags(images, out))
        assert result.code == 0 and expected in result.out, (deed, result.err)
        assert contents(out) == contents(whole), deed
    assert deed > 3 * COUNT // CHUNK + 8 and contents(out) == contents(whole)  # it was killed at every deed
    again = call(capsys, "encode_latents", *flags(images, out))
    assert again.code == 0 and "was complete already" in again.out and contents(out) == contents(whole)


@pytest.mark.slow
def test_two_processes_go_on_where_killed_ones_stopped(capsys, whole, images, tmp_path):
    out = tmp_path / "cache"
    assert killed(flags(images, out), 11) and chunks(out) == 1
    assert killed(flags(images, out), 6) and chunks(out) == 2
    train = ["--data-path", out, "--image-size", SIZE, "--vae", VAE, "--num-classes", 3, "--results-dir", tmp_path / "r"]
    one_line(call(capsys, "train", *train), 1, "incomplete cache", "encode_latents.py again")
    one_line(call(capsys, "encode_latents", *flags(images, out, "--batch-size", 8)), 2, "batch size 4, not 8")
    done = launch("encode_latents", *flags(images, out), processes=2)
    assert done.code == 0 and "16 images encoded" in done.out, done.err
    assert contents(out) == contents(whole)


def test_a_cache_whose_moments_are_gone_is_begun_again(capsys, whole, images, tmp_path):
    assert killed(flags(images, tmp_path / "cache"), 12) and chunks(tmp_path / "cache")
    (tmp_path / "cache" / "moments.npy").unlink()
    assert call(capsys, "encode_latents", *flags(images, tmp_path / "cache")).code == 0
    assert contents(tmp_path / "cache") == contents(whole)


def test_a_full_disk_is_one_clear_line_and_costs_nothing(capsys, monkeypatch, whole, images, tmp_path):
    fsync, left = os.fsync, itertools.count(5, -1)

    def full(descriptor):
        if next(left) <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        one_line(call(capsys, "encode_latents", *flags(images, tmp_path / "out")), 1, "--out", "No space left")
        one_line(call(capsys, "encode_latents", *flags(images, tmp_path / "new")), 1, "--out", "No space left")
    assert chunks(tmp_path / "out") == 1
    assert call(capsys, "encode_latents", *flags(images, tmp_path / "out")).code == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_what_cannot_be_encoded(capsys, monkeypatch, images, tmp_path):
    run = lambda *more, out="out", data=images: call(capsys, "encode_latents", *flags(data, tmp_path / out, *more))  # noqa: E731
    one_line(run("--vae", "none"), 2, "--vae none")
    one_line(run("--num-workers", -1), 2, "--num-workers", "at least 0")
    one_line(run("--precision", "bf16"), 2, "--precision", "bf16")
    one_line(run("--image-size", 34), 2, "--image-size 34", "shrinks by 4")
    one_line(run(data=tmp_path / "nowhere"), 1, "nowhere", "no such folder")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    one_line(run(out="file"), 1, "--out", "cannot write")
    one_line(call(capsys, "encode_latents", *flags(images, images)), 1, "holds other files")

    moments = LatentSpace.moments

    def huge(self, pixels):
        mean, std = moments(self, pixels)
        mean[1, 0, 0, 0] = 7e4
        return mean, std

    monkeypatch.setattr(LatentSpace, "moments", huge)
    one_line(run(), 1, "001.png", "float16")


def test_unreadable_images_are_skipped_unless_they_are_many(capsys, tmp_path):
    images = make_images(tmp_path / "images", classes=2, count=55)
    (images / "a" / "054.png").write_bytes(b"\x89PNG broken")
    result = call(capsys, "encode_latents", *flags(images, tmp_path / "one"))
    assert result.code == 0 and result.err.count("skipped unreadable image") == 1 and "a/054.png" in result.err
    cache = LatentCache(tmp_path / "one")
    assert cache.record["skipped"] == [str(images / "a" / "054.png")]
    assert torch.equal(cache[54][0], cache[55][0]) and cache[54][1] == 1 and cache.name(54).endswith("b/000.png")
    for number in (52, 53, 54):
        (images / "b" / f"{number:03d}.png").write_bytes(b"\x89PNG broken")
    one_line(call(capsys, "encode_latents", *flags(images, tmp_path / "two")), 1, "more than 1 %", "b/054.png")
    assert killed(flags(images, tmp_path / "three"), 65) and 14 < chunks(tmp_path / "three") < 28  # one in each run
    one_line(call(capsys, "encode_latents", *flags(images, tmp_path / "three")), 1, "more than 1 %", "delete")
    one_line(
        call(capsys, "encode_latents", *flags(tmp_path / "one", tmp_path / "four")), 2, "--data-path", "a cache of latents"
    )


def training(data, folder, *more):
    model = ["--model", "SiT-T/2", "--image-size", SIZE, "--num-classes", 3, "--vae", VAE]
    steps = ["--max-steps", 3, "--log-every", 1, "--global-batch-size", 16, "--lr", 1e-3, "--num-workers", 0]
    return ["--data-path", data, *model, *steps, "--results-dir", folder, *more]


def test_training_is_that_on_the_images(capsys, monkeypatch, whole, images, tmp_path):
    losses, contents = [], []
    for name, data, workers in (("images", images, 0), ("cache", whole, 1)):
        if name == "cache":  # nothing is encoded any more
            monkeypatch.setattr(LatentSpace, "moments", None)
        result = call(capsys, "train", *training(data, tmp_path / name, "--num-workers", workers))
        assert result.code == 0, result.err
        (checkpoint,) = (tmp_path / name).glob("*/checkpoints/0000003.pt")
        contents.append(load_checkpoint(checkpoint))
        with open(checkpoint.parents[1] / "metrics.csv") as rows:
            losses.append([float(row["loss"]) for row in csv.DictReader(rows)])
    assert len(losses[0]) == 3 and np.allclose(*losses, rtol=2e-3) and losses[0] != losses[1]
    ours, theirs = contents[1], contents[0]
    assert ours["recipe"] == theirs["recipe"] and ours["num_images"] == COUNT and ours.keys() == theirs.keys()


def test_training_with_another_autoencoder_or_size_is_refused(capsys, whole, tmp_path):
    train = lambda *more: call(capsys, "train", *training(whole, tmp_path / "r", *more))  # noqa: E731
    one_line(train("--image-size", 64), 2, "--image-size 64", "images of size 32")
    one_line(train("--num-classes", 4), 2, "--num-classes 4", "3 classes")
    config_hash = load_autoencoder(VAE).config_hash
    one_line(train("--vae", "none", "--model", "SiT-T/8"), 2, "--vae none", "config none", VAE, config_hash)
    other = shutil.copytree(VAE, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    one_line(train("--vae", other), 2, f"--vae {other}", load_autoencoder(str(other)).config_hash, config_hash)
    autoencoder = load_autoencoder(VAE)  # of the same config, trained further
    autoencoder.vae.encoder.conv_in.bias += 0.1
    autoencoder.vae.save_pretrained(other)
    one_line(train("--vae", other), 2, f"--vae {other}", "encoder weights")
    autoencoder = load_autoencoder(VAE)  # another decoder changes no latents
    autoencoder.vae.decoder.conv_in.bias += 0.1
    autoencoder.vae.save_pretrained(other)
    assert train("--vae", other, "--max-steps", 1).code == 0


def edit(**values):
    """A defect: other values in cache.json; None is a missing one."""

    def damage(folder):
        record = json.loads((folder / "cache.json").read_text()) | values
        (folder / "cache.json").write_text(json.dumps({key: value for key, value in record.items() if value is not None}))

    return damage


def array(name, values):
    """A defect: another array."""
    return lambda folder: np.save(folder / name, values)


def write(name, content):
    """A defect: other bytes."""
    return lambda folder: (folder / name).write_bytes(content)


def archive(folder):
    with open(folder / "moments.npy", "wb") as file:
        np.savez(file, np.zeros(3))


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-ran",)


DEFECTS = {
    "no json": (lambda folder: (folder / "cache.json").unlink(), ["incomplete", "encode_latents.py again"]),
    "not json": (write("cache.json", b"{"), ["cache.json", "cannot be read"]),
    "bytes in the json": (write("cache.json", b"\xff\xfe"), ["cache.json", "cannot be read"]),
    "deep json": (write("cache.json", b"[" * 100_000), ["cache.json", "cannot be read"]),
    "a list": (write("cache.json", b"[1]"), ["cache.json", "holds a list"]),
    "a key is missing": (edit(vae_hash=None), ["cache.json", "no valid vae_hash"]),
    "a key is zero": (edit(factor=0), ["cache.json", "no valid factor"]),
    "a key is a text": (edit(count="24"), ["cache.json", "no valid count"]),
    "another format": (edit(format=2), ["cache.json", "format 2", "format 1"]),
    "another count": (edit(count=23), ["moments.npy", "(24, 2, 2, 4, 8, 8)", "(23, 2, 2, 4, 8, 8)"]),
    "fewer classes": (edit(classes=["a", "b"]), ["labels.npy", "0 to 2", "2 classes"]),
    "no moments": (lambda folder: (folder / "moments.npy").unlink(), ["moments.npy", "No such file"]),
    "truncated": (lambda folder: os.truncate(folder / "moments.npy", 40_000), ["moments.npy", "cannot be read"]),
    "truncated header": (lambda folder: os.truncate(folder / "moments.npy", 30), ["moments.npy", "cannot be read"]),
    "empty": (write("moments.npy", b""), ["moments.npy", "cannot be read"]),
    "not an array": (write("moments.npy", b"moments"), ["moments.npy", "cannot be read"]),
    "an archive": (archive, ["moments.npy", "an archive"]),
    "float32": (array("moments.npy", np.zeros((24, 2, 2, 4, 8, 8), np.float32)), ["moments.npy", "float32", "float16"]),
    "big-endian": (array("moments.npy", np.zeros((24, 2, 2, 4, 8, 8), ">f2")), ["moments.npy", ">f2"]),
    "objects": (array("moments.npy", np.array([Evil()] * 24)), ["moments.npy", "objects"]),
    "pickled labels": (write("labels.npy", pickle.dumps(Evil())), ["labels.npy", "pickle"]),
    "negative label": (array("labels.npy", np.full(24, -1)), ["labels.npy", "from -1", "3 classes"]),
    "labels of another length": (array("labels.npy", np.zeros(25, np.int64)), ["labels.npy", "(25,)", "(24,)"]),
    "objects for names": (array("names.npy", np.array([Evil()] * 24)), ["names.npy", "objects"]),
}


@pytest.mark.parametrize("damage, words", DEFECTS.values(), ids=DEFECTS.keys())
def test_a_damaged_cache_is_one_clear_line(whole, tmp_path, monkeypatch, damage, words):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(whole, tmp_path / "cache")
    damage(folder)
    with pytest.raises(UserError) as caught:
        LatentCache(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message and "again" in message
    assert all(word in message for word in words), message
    assert not (tmp_path / "evil-ran").exists()


def test_damaged_headers_never_crash(whole, tmp_path):
    folder, rng = shutil.copytree(whole, tmp_path / "cache"), np.random.default_rng(0)
    good = (folder / "moments.npy").read_bytes()
    for _ in range(300):
        bad = bytearray(good)
        for place in rng.integers(0, 128, rng.integers(1, 4)):
            bad[place] = rng.integers(256)
        (folder / "moments.npy").write_bytes(bad)
        try:
            LatentCache(folder)
        except UserError as error:
            assert "moments.npy" in str(error) and "\n" not in str(error)


def test_a_worker_gets_the_path_and_not_the_array(whole):
    cache = LatentCache(whole)
    packed = pickle.dumps(cache)
    assert len(packed) < 1000 and torch.equal(pickle.loads(packed)[3][0], cache[3][0])
