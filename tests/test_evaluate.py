"""evaluate.py: its formulas against NumPy and SciPy, its features by hand, its files, and its command line."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.metric_fid import fid_statistics_to_metric

import evaluate
from errors import UserError
from image_files import open_images

ROOT = Path(evaluate.__file__).parent
NUMPY_RNG = np.random.default_rng


# Inputs: a random Inception whose features differ between images, and images that differ.


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="session")
def weights(inception_weights):
    return inception_weights


def pictures(count, seed):
    """uint8 (count, 32, 32, 3): waves of random direction, colour and contrast."""
    rng = NUMPY_RNG(seed)
    y, x = np.mgrid[:32, :32]
    frequency = rng.normal(0, 0.4, (count, 2, 1, 1))
    waves = np.sin(frequency[:, 0] * y + frequency[:, 1] * x + rng.uniform(0, 6, (count, 1, 1)))
    pixels = 127 + rng.uniform(-90, 90, (count, 1, 1, 3)) * waves[..., None] + rng.uniform(-60, 60, (count, 1, 1, 3))
    return pixels.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def inception(weights):
    return evaluate.load_inception(weights)


@pytest.fixture(scope="session")
def sample_images():
    return pictures(7, seed=1)


@pytest.fixture(scope="session")
def reference_images():
    return pictures(8, seed=2)


@pytest.fixture(scope="session")
def sample_features(sample_images, inception):
    return evaluate.extract_features(sample_images, inception, batch_size=4)


@pytest.fixture(scope="session")
def reference_features(reference_images, inception):
    return evaluate.extract_features(reference_images, inception, batch_size=4)


@pytest.fixture(scope="session")
def samples(folder, sample_images):
    """The samples as a folder of PNGs."""
    path = folder / "samples"
    path.mkdir()
    for i, image in enumerate(sample_images):
        Image.fromarray(image).save(path / f"{i:06d}.png")
    (path / "notes.txt").write_text("not an image")
    return path


@pytest.fixture(scope="session")
def reference(folder, reference_images):
    """The reference images as a .npz."""
    np.savez(folder / "reference.npz", arr_0=reference_images, arr_1=np.arange(len(reference_images)))
    return folder / "reference.npz"


def small_features(count, seed, dims=(24, 20, 10)):
    rng = NUMPY_RNG(seed)
    return evaluate.Features(*(torch.tensor(rng.gamma(2.0, 1.0 + seed / 10, (count, d)), dtype=torch.float32) for d in dims))


# The formulas.


def test_statistics_match_numpy():
    features = NUMPY_RNG(0).normal(3, 2, (5000, 12)).astype(np.float32)  # more than one chunk
    mu, sigma = evaluate.statistics(torch.from_numpy(features))
    assert mu.dtype == sigma.dtype == np.float64
    np.testing.assert_allclose(mu, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)


def test_frechet_distance_matches_scipy():
    first, second = (small_features(300, seed).pool.double().numpy() for seed in (1, 2))
    mu1, sigma1, mu2, sigma2 = first.mean(0), np.cov(first.T), second.mean(0), np.cov(second.T)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert evaluate.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)
    arguments = dict(mu=mu1, sigma=sigma1), dict(mu=mu2, sigma=sigma2), False
    assert fid_statistics_to_metric(*arguments)["frechet_inception_distance"] == pytest.approx(expected, rel=1e-9)


def low_rank_distance(first, second):
    """Frechet distance of features (N, D), (M, D), exact where N and M are small: it takes no root of a covariance."""
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (first, second))  # covariances a^T a and b^T b
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return ((first.mean(0) - second.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross


def test_frechet_distance_is_exact_for_singular_covariances():
    first, second = (NUMPY_RNG(seed).normal(0, seed, (10, 400)) for seed in (1, 2))
    statistics = first.mean(0), np.cov(first.T), second.mean(0), np.cov(second.T)
    assert evaluate.frechet_distance(*statistics) == pytest.approx(low_rank_distance(first, second), rel=1e-12)
    assert evaluate.frechet_distance(*statistics[:2], *statistics[:2]) == pytest.approx(0, abs=1e-9)


def test_inception_score_of_consecutive_splits():
    logits = NUMPY_RNG(0).normal(0, 2, (13, 7))
    scores = []
    for part in (logits[:5], logits[5:10], logits[10:]):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        scores.append(np.exp(np.mean(np.sum(p * np.log(p / p.mean(0)), axis=1))))
    assert evaluate.inception_score(torch.tensor(logits), split=5) == pytest.approx(np.mean(scores), rel=1e-9)
    assert evaluate.inception_score(torch.ones(8, 5)) == pytest.approx(1)
    assert evaluate.inception_score(100 * torch.eye(6)) == pytest.approx(6)


def test_precision_and_recall_match_a_count_by_hand():
    first, second = (small_features(count, seed).pool[:, :5] for count, seed in ((41, 6), (29, 1)))

    def covered(points, centres):
        count = 0
        for point in points:
            for i, centre in enumerate(centres):
                to_others = sorted(np.linalg.norm(centre - other) for j, other in enumerate(centres) if j != i)
                if np.linalg.norm(point - centre) <= to_others[2]:
                    count += 1
                    break
        return count

    a, b = first.double().numpy(), second.double().numpy()
    expected = covered(a, b) / 41, covered(b, a) / 29
    assert 0 < expected[0] < expected[1] < 1
    assert evaluate.precision_recall(first, second) == pytest.approx(expected, abs=1e-12)
    assert evaluate.precision_recall(first, second, rows=7) == pytest.approx(expected, abs=1e-12)


def test_reference_of_statistics_alone_has_no_precision_and_recall(capsys):
    features, others = small_features(60, seed=1), small_features(50, seed=2)
    statistics = *evaluate.statistics(others.pool), *evaluate.statistics(others.spatial)
    known, unknown = evaluate.Reference(*statistics, others.pool.numpy(), 50), evaluate.Reference(*statistics)
    full, part = evaluate.evaluate(features, known), evaluate.evaluate(features, unknown)
    assert part == {**full, "precision": None, "recall": None} and full["precision"] is not None
    evaluate.show(part, 50_000, unknown)
    output = capsys.readouterr()
    assert output.err.splitlines() == [
        "evaluate.py: warning: no precision and recall: the reference has neither images nor their features"
    ]
    assert [line.split()[-1] for line in output.out.splitlines()][-2:] == ["-", "-"]


# The features.


def test_spatial_features_are_seven_channels_last(inception, sample_images, sample_features):
    block = inception.network.Mixed_6d
    seen = []
    hook = block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].numpy()))
    inception.network(torch.from_numpy(sample_images[:1]).permute(0, 3, 1, 2))
    hook.remove()
    conv, bn = block.branch1x1.conv, block.branch1x1.bn
    kernel, x = conv.weight[:, :, 0, 0].numpy(), seen[0][0].astype(np.float64)
    maps = np.einsum("oi,ihw->ohw", kernel, x)
    maps = (maps - bn.running_mean.numpy()[:, None, None]) / np.sqrt(bn.running_var.numpy()[:, None, None] + bn.eps)
    expected = [max(maps[channel, row, column], 0) for row in range(17) for column in range(17) for channel in range(7)]
    assert sample_features.spatial.shape == (7, 2023) and np.ptp(expected) > 0.1
    np.testing.assert_allclose(sample_features.spatial[0], expected, rtol=1e-3, atol=1e-4)


def test_batches_and_shares_do_not_matter(inception, sample_images, sample_features):
    assert np.ptp(sample_features.pool.numpy(), axis=0).mean() > 0.05  # or nothing here would prove anything
    again = evaluate.extract_features(torch.from_numpy(sample_images), inception, batch_size=2, start=3, stop=6)
    for part, whole in zip(again, sample_features):
        torch.testing.assert_close(part, whole[3:6], rtol=1e-4, atol=1e-4)
    assert [len(field) for field in evaluate.extract_features(sample_images, inception, start=4, stop=4)] == [0, 0, 0]


def test_torch_fidelity_agrees(weights, sample_images, reference_images, sample_features, reference_features):
    datasets = [torch.from_numpy(images).permute(0, 3, 1, 2) for images in (sample_images, reference_images)]
    theirs = torch_fidelity.calculate_metrics(
        **{f"input{i + 1}": TensorImages(images) for i, images in enumerate(datasets)},
        **dict(fid=True, isc=True, prc=True, isc_splits=1, samples_shuffle=False, prc_neighborhood=3, batch_size=4),
        **dict(feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights)),
        **dict(cuda=False, verbose=False, save_cpu_ram=True),
    )
    arguments = *evaluate.statistics(sample_features.pool), *evaluate.statistics(reference_features.pool)
    # Theirs has rounding errors to this order where covariances are singular.
    assert evaluate.frechet_distance(*arguments) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert evaluate.inception_score(sample_features.logits) == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    ours = evaluate.precision_recall(sample_features.pool, reference_features.pool)
    assert ours == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


class TensorImages(torch.utils.data.Dataset):
    """uint8 images (N, 3, H, W) as torch-fidelity wants them."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


# The files.


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_images_are_read_in_slices(tmp_path, sample_images, save):
    save(tmp_path / "images.npz", arr_0=sample_images, other=np.array([None, {}], dtype=object))
    images = open_images(tmp_path / "images.npz")
    assert len(images) == 7
    for rows in (slice(0, 4), slice(4, 20), slice(1, 3)):
        np.testing.assert_array_equal(images[rows], sample_images[rows])


def test_damage_inside_an_npz_is_named(tmp_path, sample_images):
    np.savez(tmp_path / "images.npz", arr_0=sample_images)
    content = bytearray((tmp_path / "images.npz").read_bytes())
    content[5000] ^= 255
    (tmp_path / "images.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"images\.npz: Bad CRC"):
        open_images(tmp_path / "images.npz")[0:7]


def test_folder_images_are_read_in_sorted_order(samples, sample_images):
    np.testing.assert_array_equal(open_images(samples)[2:5], sample_images[2:5])


def test_statistics_and_images_in_one_file(tmp_path, reference_images):
    shapes = evaluate.STATISTICS
    arrays = {key: NUMPY_RNG(i).normal(size=shape).astype(np.float32) for i, (key, shape) in enumerate(shapes.items())}
    np.savez(tmp_path / "adm.npz", arr_0=reference_images, **arrays)
    limits = []

    def measure(images, limit):
        np.testing.assert_array_equal(images[0:8], reference_images)
        limits.append(limit)
        return small_features(8, seed=1, dims=(2048, 2023, 1008))

    found = evaluate.measure_reference(evaluate.open_reference(tmp_path / "adm.npz"), measure)
    assert limits == [10_000] and found.features.shape == (8, 2048) and found.count is None
    for key, array in arrays.items():
        assert getattr(found, key).dtype == np.float64
        np.testing.assert_array_equal(getattr(found, key), array)


# The command line.


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


def test_bf16_features_are_near_and_say_so(alone, call, weights, samples, reference, tmp_path):
    flags = "--ref", reference, "--inception-weights", weights, "--batch-size", 4, "--out", tmp_path / "bf16.json"
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
    expected["inception_score"] = evaluate.inception_score(sample_features.logits)
    expected["precision"], expected["recall"] = evaluate.precision_recall(sample_features.pool, reference_features.pool)
    assert {name: results[name] for name in METRICS} == pytest.approx(expected, rel=1e-6)
    assert [line.rsplit(None, 1)[0] for line in table.splitlines()] == [*TITLES]
    assert [float(line.split()[-1]) for line in table.splitlines()] == pytest.approx(list(expected.values()), abs=1e-4)
    warnings = errors.splitlines()
    assert len(warnings) == 2 and "7 do not compare with FID-50K" in warnings[0] and "7 samples is singular" in warnings[1]
    settings = results["settings"]
    assert settings["samples"] == str(samples) and settings["ref"] == str(reference) and settings["precision"] == "fp32"
    assert settings["num_samples"] == 7 and settings["num_reference"] == 8 and settings["processes"] == 1
    digest = subprocess.run(["sha256sum", weights], capture_output=True, text=True, check=True).stdout.split()[0]
    assert settings["inception_sha256"] == digest and settings["torch_fidelity"] == torch_fidelity.__version__
    assert settings["device"] == "cpu" and settings["seconds"] > 0 and settings["images_per_second"] > 0


def test_saved_statistics_are_the_reference(alone, sample_features, reference_features):
    results, _, _, stats = alone
    saved = evaluate.measure_reference(evaluate.open_reference(stats), None)
    assert saved.count == 8 and saved.features.dtype == np.float32 and not list(stats.parent.glob(".*.tmp"))
    again = evaluate.evaluate(sample_features, saved)
    assert again == pytest.approx({name: results[name] for name in METRICS}, rel=1e-9)


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

    statistics = {key: np.zeros(shape) for key, shape in evaluate.STATISTICS.items()}
    npz("objects", arr_0=np.array([None, {}], dtype=object))
    npz("floats", arr_0=sample_images.astype(np.float32))
    npz("channels_first", arr_0=sample_images.transpose(0, 3, 1, 2))
    npz("other_key", images=sample_images)
    npz("three", arr_0=sample_images[:3])
    npz("half", mu=statistics["mu"], sigma=statistics["sigma"])
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
        ("{samples} --ref {half}", 1, "cannot read mu_s of"),
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
        ("{samples} --reff {reference}", 2, "--ref"),
        ("{samples} --ref {reference} --batchsize 4", 2, "did you mean --batch-size?"),
    ],
)
def test_wrong_input_is_one_line(call, files, line, code, message):
    found, output, errors = call(*line.format(**files).split())
    assert (found, output, len(errors.splitlines())) == (code, "", 1), errors
    assert errors.startswith("evaluate.py: error: ") and message in errors
    assert not (files["samples"].parent / "harm").exists()


def test_without_a_network_the_mend_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    with pytest.raises(UserError, match=r"cannot read the Inception weights \(download https://.*--inception-weights"):
        evaluate.load_inception()


def refuse(*args, **kwargs):
    raise OSError("no network")
