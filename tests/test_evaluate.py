"""The command line of evaluate.py."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image

import evaluate
from metrics import report, scores
from metrics.reference import STATISTICS, Reference, measure_reference, open_reference
from metrics.results import evaluate as measured
from small_features import low_rank_distance, small_features

ROOT = Path(evaluate.__file__).parent


def test_reference_of_statistics_alone_has_no_precision_and_recall():
    features, others = small_features(60, seed=1), small_features(50, seed=2)
    statistics = *scores.statistics(others.pool), *scores.statistics(others.spatial)
    known, unknown = Reference(*statistics, others.pool.numpy(), 50), Reference(*statistics)
    full, part = (measured({"inception": features}, {"inception": each}) for each in (known, unknown))
    assert part == {**full, "precision": None, "recall": None} and full["precision"] is not None
    told = ["no precision and recall: the reference has neither images nor their features"]
    assert [*report.limits(part, 50_000, {"inception": 24})] == told
    assert [line.split()[-1] for line in report.table([part])][-2:] == ["-", "-"]


def command_line(arguments, folder):
    """Run evaluate.py as a program in this process, its output in files of the folder."""
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream.fileno())
    sys.argv = ["evaluate.py", *map(str, arguments)]
    torch.set_num_threads(1)
    runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")


@pytest.fixture(scope="session")
def call(folder):
    """Run a command line in a process of its own, with imports done: call(*arguments) -> (exit code, stdout, stderr)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evaluate"])

    def call(*arguments):
        process = context.Process(target=command_line, args=(arguments, folder))
        process.start()
        process.join()
        return process.exitcode, (folder / "stdout").read_text(), (folder / "stderr").read_text()

    return call


METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
TITLES = ("FID", "sFID", "Inception Score", "Precision", "Recall")


@pytest.fixture(scope="session")
def alone(folder, call, weights, samples, reference):
    """Results of one process, with the reference saved."""
    stats = folder / "stats.npz"
    flags = "--ref", reference, "--inception-weights", weights, "--batch-size", 4, "--save-stats", stats
    code, table, errors = call(samples, *flags)
    assert code == 0, errors
    return json.loads((folder / "samples.eval.json").read_text()), table, errors, stats


def test_bf16_features_are_near_and_say_so(alone, call, weights, samples, tmp_path):
    """Against statistics of float32: fewer images are done in bf16, which many a CPU is slow at."""
    flags = "--ref", alone[3], "--inception-weights", weights, "--batch-size", 4, "--out", tmp_path / "bf16.json"
    code, _, errors = call(samples, *flags, "--precision", "bf16")
    assert code == 0, errors
    assert "bf16: their FID does not compare" in errors
    results = json.loads((tmp_path / "bf16.json").read_text())
    assert results["settings"]["precision"] == "bf16"
    assert results["fid"] != alone[0]["fid"] and results["fid"] == pytest.approx(alone[0]["fid"], rel=0.05)


def test_command_line_measures_and_records(alone, weights, samples, reference, sample_features, reference_features):
    results, table, errors, _ = alone
    pairs = {"fid": (sample_features.pool, reference_features.pool)}
    pairs["sfid"] = sample_features.spatial, reference_features.spatial
    expected = {name: low_rank_distance(*(x.double().numpy() for x in pair)) for name, pair in pairs.items()}
    expected["inception_score"] = scores.inception_score(sample_features.logits)
    expected["precision"], expected["recall"] = scores.precision_recall(sample_features.pool, reference_features.pool)
    assert {name: results[name] for name in METRICS} == pytest.approx(expected, rel=1e-6)
    assert [line.rsplit(None, 1)[0] for line in table.splitlines()] == [*TITLES]
    assert [float(line.split()[-1]) for line in table.splitlines()] == pytest.approx(list(expected.values()), abs=1e-4)
    warnings = errors.splitlines()
    told = ["passed over: 1 .txt", "7 do not compare with FID-50K", "7 samples is singular"]
    assert all(words in line for words, line in zip(told, warnings, strict=True))
    settings = results["settings"]
    assert settings["samples"] == str(samples) and settings["ref"] == str(reference) and settings["precision"] == "fp32"
    assert settings["num_samples"] == 7 and settings["num_reference"] == 8 and settings["processes"] == 1
    digest = subprocess.run(["sha256sum", weights], capture_output=True, text=True, check=True).stdout.split()[0]
    assert settings["inception_sha256"] == digest and settings["torch_fidelity"] == torch_fidelity.__version__
    assert (
        settings["device"] and "torch" in settings["versions"] and settings["seconds"] > 0 and settings["images_per_second"] > 0
    )


def test_saved_statistics_are_the_reference(alone, sample_features, reference_features):
    found, _, _, stats = alone
    saved = measure_reference(open_reference(stats), None)["inception"]
    assert saved.count == 8 and saved.features.dtype == np.float32 and not list(stats.parent.glob(".*.tmp"))
    again = measured({"inception": sample_features}, {"inception": saved})
    assert again == pytest.approx({name: found[name] for name in METRICS}, rel=1e-9)


def test_two_processes_equal_one(alone, folder, weights, samples, reference):
    expected, _, _, stats = alone
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "evaluate.py"]
    flags = ["--ref", reference, "--inception-weights", weights, "--batch-size", "4"]
    outputs = ["--out", folder / "two.json", "--save-stats", folder / "two.npz"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*torchrun, samples, *flags, *outputs], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "two.json").read_text())
    assert results["settings"]["processes"] == 2
    assert {name: results[name] for name in METRICS} == pytest.approx({name: expected[name] for name in METRICS}, rel=1e-5)
    with np.load(stats) as one, np.load(folder / "two.npz") as two:  # in which the order of the images shows
        np.testing.assert_allclose(two["features"], one["features"], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="session")
def files(folder, samples, reference, weights, sample_images):
    """Inputs by name, good and bad."""
    paths = {"samples": samples, "reference": reference, "weights": weights, "nothing": folder / "nothing.npz"}

    def npz(name, **arrays):
        paths[name] = folder / f"{name}.npz"
        np.savez(paths[name], **arrays)

    statistics = {key: np.zeros(shape) for key, shape in STATISTICS.items()}
    npz("zeros", **statistics)
    npz("objects", arr_0=np.array([None, {}], dtype=object))
    npz("floats", arr_0=sample_images.astype(np.float32))
    npz("channels_first", arr_0=sample_images.transpose(0, 3, 1, 2))
    npz("other_key", images=sample_images)
    npz("three", arr_0=sample_images[:3])
    npz("half", **{key: value for key, value in statistics.items() if key != "sigma_s"})
    npz("wrong_size", **{**statistics, "mu_s": np.zeros(2048)})
    npz("object_statistics", **{**statistics, "mu": np.array([None] * 2048, dtype=object)})
    npz("nan", **{**statistics, "mu": np.full(2048, np.nan)})
    for name, content in (("text", b"hello"), ("cut", reference.read_bytes()[:3000]), ("no_weights", b"hello")):
        paths[name] = folder / f"{name}.npz"
        paths[name].write_bytes(content)
    for name in ("empty", "sizes"):
        paths[name] = folder / name
        paths[name].mkdir()
    for size in (8, 9, 10, 11):
        Image.new("RGB", (size, 8)).save(paths["sizes"] / f"{size:02d}.png")
    paths["code"], paths["other_weights"] = folder / "code.pth", folder / "other.pth"
    torch.save(Harmful(folder / "harm"), paths["code"])
    torch.save({"weight": torch.zeros(3)}, paths["other_weights"])
    return paths


class Harmful:
    """What touches a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize(
    "line, code, message",
    [
        ("{nothing} --ref {reference}", 1, "nothing.npz: there is no such file or folder"),
        ("{samples} --ref {nothing}", 1, "nothing.npz: there is no such file or folder"),
        ("{objects} --ref {reference}", 1, "objects.npz: arr_0 is object of shape (2,); expected uint8 (N, H, W, 3)"),
        ("{floats} --ref {reference}", 1, "floats.npz: arr_0 is float32 of shape (7, 32, 32, 3); expected uint8 (N, H, W, 3)"),
        ("{channels_first} --ref {reference}", 1, "arr_0 is uint8 of shape (7, 3, 32, 32); expected uint8 (N, H, W, 3)"),
        ("{other_key} --ref {reference}", 1, "other_key.npz: holds images; expected arr_0"),
        ("{three} --ref {reference}", 1, "three.npz: 3 images; the metrics need 4 or more"),
        ("{text} --ref {reference}", 1, "text.npz: not a .npz file, or a damaged one"),
        ("{cut} --ref {reference}", 1, "cut.npz: not a .npz file, or a damaged one"),
        ("{empty} --ref {reference}", 1, "empty: no images in it"),
        ("{sizes} --ref {reference} --inception-weights {weights}", 1, "09.png: 9 x 8 pixels, but 08.png has 8 x 8"),
        ("{samples} --ref {other_key}", 1, "other_key.npz: holds images; expected arr_0, or mu, sigma, mu_s, sigma_s"),
        ("{samples} --ref {half}", 1, "cannot read sigma_s of"),
        ("{samples} --ref {wrong_size}", 1, "mu_s is float64 of shape (2048,); expected finite numbers of shape (2023,)"),
        ("{samples} --ref {object_statistics}", 1, "object_statistics.npz: Object arrays cannot be loaded"),
        ("{samples} --ref {nan}", 1, "nan.npz: mu is float64 of shape (2048,); expected finite"),
        ("{samples} --ref {reference} --inception-weights {nothing}", 1, "nothing.npz: No such file or directory"),
        ("{samples} --ref {reference} --inception-weights {no_weights}", 1, "no_weights.npz: damaged, or not the weights"),
        ("{samples} --ref {reference} --inception-weights {code}", 1, "code.pth: refused"),
        ("{samples} --ref {reference} --inception-weights {other_weights}", 1, "other.pth: damaged, or not the weights"),
        ("{samples} --ref {reference} --out {empty}", 2, "empty: it is a folder; give a file"),
        ("{samples} --ref {reference} --out {text}/x.json", 1, "cannot write there"),
        ("{samples} --ref {reference} --precision fp16", 2, "invalid choice: 'fp16'"),
        ("{samples} --ref {reference} --precision bf16 --save-stats x.npz", 2, "--save-stats with --precision bf16"),
        ("{samples} --ref {reference} --precision tf32", 2, "this device (cpu) has no TF32"),
        ("{samples} --ref {reference} --metrics fid,fud", 2, "there is no metric 'fud'; choose from fid sfid is"),
        ("{samples} --ref {reference} --metrics fd-pixels --dinov2-weights {text}", 2, "--dinov2-weights: none of --metrics"),
        ("{samples} --ref {reference} --dinov2-weights {text}", 2, "--dinov2-weights: none of --metrics needs it"),
        ("{samples} --ref {reference} --metrics fd-dinov2 --dinov2-weights {code}", 1, "code.pth: refused"),
        ("{samples} --ref {zeros} --metrics kid", 1, "zeros.npz: it has no features for kid, and no images"),
        ("{samples} --ref {zeros} --metrics fd-pixels", 1, "zeros.npz: it has no mu_pixels and sigma_pixels for fd-pixels"),
        ("{samples} --ref {reference} --metrics is --save-stats x.npz", 2, "--save-stats: is measures nothing of a reference"),
        ("{samples} --ref {reference} --splits 1", 2, "--splits 1: a standard error takes 2 or more"),
        ("{samples} --ref {reference} --splits 2", 2, "would have 3 images; the metrics need 4 or more"),
        ("{samples} {samples} --ref {reference}", 2, "give each once"),
        ("{samples} --reff {reference}", 2, "--ref"),
        ("{samples} --ref {reference} --batchsize 4", 2, "did you mean --batch-size?"),
    ],
)
def test_wrong_input_is_one_line(call, files, line, code, message):
    found, output, errors = call(*line.format(**files).split())
    assert (found, output, len(errors.splitlines())) == (code, "", 1), errors
    assert errors.startswith("evaluate.py: error: ") and message in errors
    assert not (files["samples"].parent / "harm").exists()


@pytest.mark.slow
def test_folders_as_people_have_them(call, weights, samples, sample_images, reference, folder, tmp_path):
    """Class sub-folders of mixed sizes, cropped as training does; and a reference with mu and sigma alone."""
    for i, image in enumerate(sample_images):
        file = tmp_path / "classes" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        wide = np.pad(image, ((0, 0), (3, 3), (0, 0))) if i % 3 == 0 else image
        Image.fromarray(wide).save(file)
    stats = tmp_path / "stats.npz"
    flags = "--ref", reference, "--inception-weights", weights, "--batch-size", 4
    code, _, errors = call(samples, *flags, "--out", tmp_path / "flat.json", "--save-stats", stats)
    assert code == 0, errors
    code, _, errors = call(tmp_path / "classes", *flags)
    assert code == 1 and "--image-size to crop" in errors
    code, _, errors = call(tmp_path / "classes", *flags, "--image-size", 32, "--out", tmp_path / "classes.json")
    assert code == 0, errors
    flat, classes = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("flat", "classes"))
    assert classes["fid"] == pytest.approx(flat["fid"], rel=1e-6) and classes["recall"] == flat["recall"]
    with np.load(stats) as file:
        np.savez(tmp_path / "pool.npz", mu=file["mu"], sigma=file["sigma"])
    argv = "--ref", tmp_path / "pool.npz", "--inception-weights", weights, "--out", tmp_path / "pool.json"
    code, _, errors = call(samples, *argv)
    pool = json.loads((tmp_path / "pool.json").read_text())
    assert code == 0 and pool["fid"] == pytest.approx(flat["fid"], rel=1e-6) and pool["sfid"] is None
    assert "no sFID: the reference has no mu_s and sigma_s" in errors
