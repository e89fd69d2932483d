"""Wrong input ends in one clear line and the right exit code, with nothing left behind."""

import os
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image

from cli import DIGITS, ROOT, call, launch, one_line
from common.checkpoint import load_checkpoint

VAE = ROOT / "assets" / "digits-vae"
TRAIN = ["--vae", "none", "--model", "SiT-T/8", "--max-steps", 1, "--global-batch-size", 2, "--num-workers", 0]


@pytest.fixture
def images(tmp_path):
    """Two classes of four images; those of class b are broken."""
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / "images" / name / f"{i}.png")
            if name == "b":
                (tmp_path / "images" / name / f"{i}.png").write_bytes(b"\x89PNG broken")
    return tmp_path / "images"


USAGE = {
    "misspelt flag": ([*DIGITS, "--image-sise", 32], ["--image-sise", "did you mean --image-size"]),
    "missing flag": ([], ["--data-path"]),
    "unknown model": ([*DIGITS, "--model", "SiT-Q/2"], ["SiT-Q/2"]),
    "not a number": ([*DIGITS, "--lr", "fast"], ["--lr", "fast"]),
    "negative": ([*DIGITS, "--lr", "-1"], ["--lr", "-1"]),
    "zero batch": ([*DIGITS, "--global-batch-size", 0], ["--global-batch-size", "at least 1"]),
    "wrong class count": ([*DIGITS, *TRAIN, "--num-classes", 1000], ["--num-classes 1000", "10 classes"]),
    "patch does not divide": (
        [*DIGITS, *TRAIN, "--vae", VAE, "--model", "SiT-T/8", "--image-size", 36],
        ["--image-size 36"],
    ),
    "digits of another size": (["--data-path", "builtin:digits", "--image-size", 64], ["--image-size 64", "32 x 32"]),
    "weight for velocity": ([*DIGITS, *TRAIN, "--loss-weight", "velocity"], ["velocity has no weight"]),
    "eps too large": ([*DIGITS, *TRAIN, "--train-eps", 0.7], ["train_eps", "0.7"]),
    "dry run of a checkpoint": ([*DIGITS, *TRAIN, "--ckpt", "x.pt", "--dry-run"], ["--ckpt and --dry-run"]),
    "tf32 without GPU": ([*DIGITS, *TRAIN, "--precision", "tf32"], ["--precision tf32"]),
}


@pytest.mark.parametrize("argv, words", USAGE.values(), ids=USAGE.keys())
def test_wrong_command_lines_of_train(capsys, tmp_path, argv, words):
    one_line(call(capsys, "train", *argv, "--results-dir", tmp_path / "results"), 2, *words)
    assert not (tmp_path / "results").exists()


def test_size_that_does_not_divide(capsys, images, tmp_path):
    argv = [
        "--data-path",
        images,
        "--num-classes",
        2,
        *TRAIN,
        "--vae",
        VAE,
        "--image-size",
        36,
        "--results-dir",
        tmp_path / "r",
    ]
    one_line(call(capsys, "train", *argv), 2, "--image-size 36", "multiple of 32", "shrinks by 4", "8 wide")


def test_wrong_folders_of_train(capsys, images, tmp_path):
    argv = ["--image-size", 32, "--num-classes", 2, *TRAIN, "--results-dir", tmp_path / "r"]
    run = lambda path, *more: call(capsys, "train", "--data-path", path, *argv, *more)  # noqa: E731
    one_line(run(tmp_path / "nowhere"), 1, tmp_path / "nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    one_line(run(tmp_path / "empty"), 1, tmp_path / "empty")
    (tmp_path / "file").touch()
    one_line(run(tmp_path / "file"), 1, "it is a file")
    one_line(run(images, "--max-steps", 8), 1, ".png", "4 of 8 images cannot be read")
    argv = [*DIGITS, *TRAIN, "--vae", tmp_path / "empty", "--results-dir", tmp_path / "r"]
    one_line(call(capsys, "train", *argv), 1, "--vae", "config.json")


def test_no_permission_to_write(capsys, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "r", "/proc/results"):  # the second is read-only even for root
        one_line(call(capsys, "train", *DIGITS, *TRAIN, "--results-dir", folder), 1, f"--results-dir {folder}", "cannot write")


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/evil-ran",)


def test_wrong_checkpoints(capsys, trained, tmp_path):
    sample = lambda path, *more: call(capsys, "sample", "ODE", "--ckpt", path, "--out", tmp_path / "s.png", *more)  # noqa: E731
    (tmp_path / "text.pt").write_text("not a checkpoint")
    one_line(sample(tmp_path / "text.pt"), 1, "text.pt", "not a checkpoint")
    one_line(sample(tmp_path / "nowhere.pt"), 1, "nowhere.pt", "no such file")
    torch.save({"ema": Evil()}, tmp_path / "evil.pt")
    one_line(sample(tmp_path / "evil.pt"), 1, "evil.pt", "run code")
    (tmp_path / "legacy.pt").write_bytes(pickle.dumps(Evil()))
    one_line(sample(tmp_path / "legacy.pt"), 1, "legacy.pt")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "resnet.pt")
    one_line(sample(tmp_path / "resnet.pt"), 1, "resnet.pt", "no SiT weights")
    assert not os.path.exists("/tmp/evil-ran") and not (tmp_path / "s.png").exists()

    one_line(sample(trained, "--model", "SiT-XL/2"), 2, "--model SiT-XL/2", "SiT-T/8")
    one_line(sample(trained, "--num-classes", 1000), 2, "--num-classes 1000", "has 10")
    one_line(sample(trained, "--image-size", 256), 2, "--image-size 256", "has 32")
    one_line(sample(trained, "--prediction", "score"), 2, "--prediction score", "velocity")
    one_line(sample(trained, "--vae", VAE), 2, "--vae", "another autoencoder")
    one_line(sample(trained, "--class-labels", 3, 10), 2, "--class-labels 10", "0 to 9")
    one_line(call(capsys, "sample", "ODE", "--model", "SiT-S/8"), 2, "--ckpt is missing", "SiT-S/8")

    content = load_checkpoint(trained)
    content["recipe"]["model_args"]["class_dropout_prob"] = 0.0
    for part in ("model", "ema"):
        content[part]["y_embedder.embedding_table.weight"] = content[part]["y_embedder.embedding_table.weight"][:10]
    torch.save(content, tmp_path / "unguided.pt")
    one_line(sample(tmp_path / "unguided.pt", "--cfg-scale", 3), 2, "--cfg-scale 3", "null class")
    assert sample(tmp_path / "unguided.pt").code == 0  # the default guidance is not insisted on

    one_line(
        call(capsys, "train", *DIGITS, *TRAIN, "--ckpt", trained, "--results-dir", tmp_path),
        2,
        "--global-batch-size 16 (now 2)",
    )
    small = ["--model", "SiT-T/4", "--global-batch-size", 16, "--lr", 1e-3]
    one_line(
        call(capsys, "train", *DIGITS, *TRAIN, "--ckpt", trained, *small, "--results-dir", tmp_path), 2, "SiT-T/8", "SiT-T/4"
    )


SAMPLERS = {
    "no subcommand": ([], ["ODE|SDE"]),
    "wrong subcommand": (["PDE"], ["PDE"]),
    "flag of the other": (["SDE", "--atol", 1], ["--atol"]),
    "unknown solver": (["ODE", "--sampling-method", "leapfrog"], ["leapfrog"]),
    "likelihood without images": (["ODE", "--likelihood"], ["--data-path"]),
    "images without purpose": (["ODE", "--data-path", "builtin:digits"], ["--data-path goes with"]),
    "decoding for a likelihood": (
        ["ODE", "--likelihood", "--data-path", "builtin:digits", "--vae-tiling"],
        ["--vae-tiling", "decodes no images"],
    ),
    "guided likelihood": (["ODE", "--likelihood", "--data-path", "builtin:digits", "--cfg-scale", 4], ["must be 1"]),
}


def test_two_precisions(capsys, trained, tmp_path):
    for flags in (["--precision", "tf32", "--no-tf32"], ["--precision", "bf16", "--tf32"]):
        argv = ["SDE", "--ckpt", trained, *flags, "--sample-dir", tmp_path]
        one_line(call(capsys, "sample_ddp", *argv), 2, " ".join(flags[:2]), flags[2], "one of them")


@pytest.mark.parametrize("script", ["sample", "sample_ddp"])
@pytest.mark.parametrize("argv, words", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_wrong_command_lines_of_the_samplers(capsys, script, argv, words):
    one_line(call(capsys, script, *argv), 2, *words)


def test_settings_that_the_sampler_refuses(capsys, trained, tmp_path):
    run = lambda *argv: call(capsys, "sample", *argv, "--ckpt", trained, "--out", tmp_path / "s.png")  # noqa: E731
    one_line(run("SDE", "--num-sampling-steps", 1), 2, "num_steps", "at least 2")
    one_line(run("SDE", "--last-step-size", 1), 2, "last_step_size")
    one_line(run("SDE", "--diffusion-form", "SBDM", "--sample-eps", 0), 2, "sample_eps")
    one_line(run("ODE", "--vae-tiling"), 2, "--vae-tiling", "pixel space")
    one_line(run("ODE", "--vae-batch-size", 2), 2, "--vae-batch-size", "pixel space")
    one_line(run("ODE", "--guidance-low", 0.5, "--guidance-high", 0.2), 2, "--guidance-low 0.5")
    (tmp_path / "file").touch()
    one_line(call(capsys, "sample", "ODE", "--ckpt", trained, "--out", tmp_path / "file" / "s.png"), 1, "--out")


def test_as_a_real_command(trained, tmp_path):
    np.save(tmp_path / "array.npy", np.zeros(3))
    one_line(launch("sample", "ODE", "--ckpt", tmp_path / "array.npy"), 1, "array.npy", "not a checkpoint")
    two = launch("sample_ddp", "ODE", "--ckpt", trained, "--class-labels", 11, "--sample-dir", tmp_path, processes=2)
    assert two.code != 0 and "--class-labels 11" in two.err


REFUSED = {
    "train": [*DIGITS, "--model", "SiT-T/8", "--vae", "/nowhere", "--results-dir", "{folder}/r"],
    "sample_ddp": ["ODE", "--ckpt", "/nowhere.pt", "--sample-dir", "{folder}/s"],
    "encode_latents": [*DIGITS[:4], "--vae", "/nowhere", "--out", "{folder}/c"],
}


@pytest.mark.parametrize("script", ["train", *(pytest.param(name, marks=pytest.mark.slow) for name in list(REFUSED)[1:])])
def test_what_one_process_refuses_all_refuse(script, tmp_path):
    """In one line each: none waits for the main one, to see in a traceback that it is gone. torchrun, which ends the others
    when one has left, may be faster than a line."""
    done = launch(script, *(flag.format(folder=tmp_path) for flag in REFUSED[script]), processes=2)
    assert done.code == 1 and "Connection closed" not in done.err
    lines = [line for line in done.err.splitlines() if re.match(rf"{script}.py.*: error: ", line)]
    assert lines and done.err.count(": error: ") == len(lines) and all("/nowhere" in line for line in lines), done.err
    assert not list(tmp_path.rglob("*"))


@pytest.mark.slow
def test_names_that_no_locale_can_write(trained, tmp_path):
    """A byte that is no UTF-8, under LANG=C: warnings, likelihoods and files are written all the same."""
    rng, folder = np.random.default_rng(0), os.fsencode(tmp_path / "images")
    for label in (b"a", b"b"):
        os.makedirs(os.path.join(folder, label))
        for i in range(4):
            name = os.path.join(folder, label, b"%d\xfe.png" % i)
            with open(name, "wb") as file:
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
    with open(os.path.join(folder, b"a", b"1\xfe.png"), "wb") as file:
        file.write(b"broken")
    plain = dict(LANG="C", LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    data = ["--data-path", tmp_path / "images"]
    argv = [*data, "--image-size", 32, "--num-classes", 2, *TRAIN, "--max-steps", 6, "--log-every", 1]
    done = launch("train", *argv, "--results-dir", tmp_path / "r", **plain)
    assert done.code == 0, done.err
    log = next(tmp_path.glob("r/*/log.txt")).read_bytes()
    assert b"skipped unreadable image" in log and b"1\xfe.png" in log and "1\\udcfe.png" in done.out
    os.remove(os.path.join(folder, b"a", b"1\xfe.png"))
    flags = ["ODE", "--likelihood", *data, "--ckpt", trained, "--sampling-method", "euler", "--num-sampling-steps", 2]
    one = launch("sample", *flags, "--num-images", 2, **plain)
    assert one.code == 0 and "\\udcfe.png: " in one.out, one.err
    many = launch("sample_ddp", *flags, "--sample-dir", tmp_path / "s", **plain)
    assert many.code == 0, many.err
    assert next(tmp_path.glob("s/*.csv")).read_bytes().count(b"\xfe.png") == 7


def test_a_seed_of_too_many_digits(capsys):
    one_line(call(capsys, "train", *DIGITS, *TRAIN, "--global-seed", 10**30), 2, "--global-seed", "64 bits")
    one_line(call(capsys, "sample", "ODE", "--seed", 10**30), 2, "--seed", "64 bits")
