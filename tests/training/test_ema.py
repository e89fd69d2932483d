"""Averages by a power of time: the mathematics against other ways to it, and snapshots, whatever befalls a run."""

import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn
from scipy.integrate import quad

from cli import DIGITS, call, launch, one_line
from common.checkpoint import load_checkpoint, save_checkpoint
from training.ema import Averages
from training.power_ema import NARROWEST, WIDEST, decay_at, gamma_of
from training.profiles import fit, inner_products
from training.run_folder import RunFolder

SMALL = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 8, "--num-workers", 0, "--lr", 1e-3]
SMALL += ["--log-every", 100, "--sample-every", 1000, "--ema-power", "0.05,0.10"]
WIDTHS = (0.001, 0.02, 0.05, 0.1, 0.12, 0.2, 0.28)


@pytest.mark.parametrize("width", [NARROWEST, *WIDTHS, WIDEST])
def test_the_exponent_of_a_width(width):
    g = gamma_of(width)
    assert (g + 1) ** 0.5 / ((g + 2) * (g + 3) ** 0.5) == pytest.approx(width, rel=1e-9)
    s = width**-2
    assert g == pytest.approx(np.roots([1, 7, 16 - s, 12 - s]).real.max(), rel=1e-9, abs=1e-9) and g >= 0


@pytest.mark.parametrize("width", WIDTHS)
def test_a_width_is_the_standard_deviation_of_its_profile(width):
    g = gamma_of(width)
    mean, square = (quad(lambda t, n=n: t**n * (g + 1) * t**g, 0, 1, points=[0.9, 0.99])[0] for n in (1, 2))
    assert (square - mean**2) ** 0.5 == pytest.approx(width, rel=1e-4)


def test_widths_that_no_exponent_has_are_refused(capsys):
    assert gamma_of(WIDEST) == pytest.approx(0, abs=1e-9)  # the mean over all steps
    for width in (0, -0.1, 1e-5, 0.2887, 1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"is not from 0\.0001 to 0\.28867"):
            gamma_of(width)
        one_line(call(capsys, "train", "--data-path", "x", f"--ema-power={width}"), 2, "--ema-power", "must be from 0.0001")
    one_line(call(capsys, "train", "--data-path", "x", "--ema-power", "0.05", "0.050"), 2, "--ema-power", "once")
    one_line(call(capsys, "train", "--data-path", "x", "--ema-snapshot-every", "5"), 2, "goes with --ema-power")


@pytest.mark.parametrize("width", [0.05, 0.1, 0.28])
def test_an_average_is_the_sum_of_the_weights_of_its_steps(width):
    """Against the products of the decays, and against the integrals of the profile, in float64; the first step's decay is 0."""
    steps, g, rng = 50, gamma_of(width), np.random.default_rng(0)
    history = rng.normal(size=(steps, 3))
    model = nn.Linear(3, 1, bias=False)
    nn.init.constant_(model.weight, 1e6)  # the initial weights, which do not count
    averages = Averages(model, 0.9, [width])
    for step, weights in enumerate(history, start=1):
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(weights))
        averages.update(step)
    decays = np.array([(1 - 1 / t) ** (g + 1) for t in range(1, steps + 1)])
    shares = np.array([(1 - decays[k]) * np.prod(decays[k + 1 :]) for k in range(steps)])
    edges = (np.arange(steps + 1) / steps) ** (g + 1)
    assert np.allclose(shares, np.diff(edges)) and shares.sum() == pytest.approx(1) and decay_at(1, g) == 0
    average = averages.models[f"ema-power-{width}"].weight[0].numpy()
    assert np.abs(average - shares @ history).max() < 1e-6


def test_averages_by_a_power_leave_the_others_as_they_are():
    alone, beside = [Averages(nn.Linear(2, 2), 0.9, widths) for widths in (None, [0.1])]
    assert list(alone.models) == ["ema"] and list(beside.models) == ["ema", "ema-power-0.1"]
    assert alone.by_power() == {} and list(beside.by_power()) == ["ema-power-0.1"]


PAIRS = [(100, 0.05, 100, 0.1), (60, 0.05, 100, 0.1), (100, 0.05, 60, 0.1), (30, 0.2, 100, 0.28), (100, 0.28, 99, 0.02)]


@pytest.mark.parametrize("pair", PAIRS)
def test_inner_products_are_the_integrals(pair):
    ta, ga, tb, gb = pair[0], gamma_of(pair[1]), pair[2], gamma_of(pair[3])
    product = lambda t: (ga + 1) * t**ga / ta ** (ga + 1) * (gb + 1) * t**gb / tb ** (gb + 1)  # noqa: E731
    integral, _ = quad(product, 0, min(ta, tb), epsabs=0, epsrel=1e-10, limit=500)
    assert inner_products(ta, ga, tb, gb) == pytest.approx(integral, rel=1e-8)
    assert inner_products(tb, gb, ta, ga) == pytest.approx(inner_products(ta, ga, tb, gb), rel=1e-12)


def test_least_squares_give_back_a_profile_that_is_there():
    steps, gammas = np.repeat(np.arange(10, 101, 10), 2), np.tile([gamma_of(0.05), gamma_of(0.1)], 10)
    for i in (0, 7, 19):
        weights, residual = fit(steps, gammas, steps[i], gammas[i])
        assert residual < 1e-6 and np.abs(weights - np.eye(20)[i]).max() < 1e-6


def test_the_residual_is_the_distance_of_the_profiles():
    """Against a sum over a fine grid of times; the weights that come out are no worse than any nearby of the same sum."""
    steps, gammas = [40, 100, 100], [gamma_of(0.1), gamma_of(0.05), gamma_of(0.1)]
    weights, residual = fit(steps, gammas, 100, gamma_of(0.14))
    t = (np.arange(400_000) + 0.5) / 4000
    profile = lambda step, g: np.where(t <= step, (g + 1) * t**g / step ** (g + 1), 0)  # noqa: E731
    wanted = profile(100, gamma_of(0.14))
    parts = np.stack([profile(step, g) for step, g in zip(steps, gammas)])
    distance = lambda weights: np.sqrt(np.sum((wanted - weights @ parts) ** 2) / np.sum(wanted**2))  # noqa: E731
    assert weights.sum() == pytest.approx(1) and residual == pytest.approx(distance(weights), rel=1e-4) and residual > 0.05
    with pytest.raises(ValueError, match="no time in common"):
        fit([100], [gamma_of(0.001)], 5000, gamma_of(0.001))


def train(capsys, folder, *more):
    result = call(capsys, "train", *SMALL, "--results-dir", folder, *more)
    assert result.code == 0, result.err
    return result


def snapshots(folder, run="000"):
    (path,) = folder.glob(f"{run}-*")
    return {int(file.stem): file for file in sorted((path / "snapshots").glob("*"))}


def assert_same(ours, theirs):
    """Snapshots of the same steps with the same averages, bit for bit."""
    assert list(ours) == list(theirs) and len(ours)
    for step in ours:
        one, other = (torch.load(files[step], weights_only=True) for files in (ours, theirs))
        assert one.keys() == other.keys() == {"step", "recipe", "args", "ema-power-0.05", "ema-power-0.1"}
        assert one["step"] == step and one["recipe"] == other["recipe"]
        for name in ("ema-power-0.05", "ema-power-0.1"):
            assert all(torch.equal(one[name][key], value) for key, value in other[name].items()), (step, name)
            assert all(value.dtype == torch.float32 for value in one[name].values())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Six steps at once, with a snapshot every second, in a real process."""
    folder = tmp_path_factory.mktemp("straight")
    done = launch("train", *SMALL, "--results-dir", folder, "--max-steps", 6, "--ckpt-every", 3, "--ema-snapshot-every", 2)
    assert done.code == 0, done.err
    return folder


def test_a_run_with_such_averages_is_otherwise_the_same_run(straight, tmp_path, capsys):
    assert list(snapshots(straight)) == [2, 4, 6]
    plain = SMALL[: SMALL.index("--ema-power")]
    assert call(capsys, "train", *plain, "--max-steps", 6, "--results-dir", tmp_path).code == 0
    assert not list(tmp_path.glob("*/snapshots"))
    ours, theirs = (load_checkpoint(next(folder.glob("*/checkpoints/0000006.pt"))) for folder in (straight, tmp_path))
    assert ours.keys() - theirs.keys() == {"ema-power-0.05", "ema-power-0.1"}
    for name in ("model", "ema"):
        assert all(torch.equal(ours[name][key], value) for key, value in theirs[name].items())
    assert not torch.equal(ours["ema-power-0.05"]["blocks.0.mlp.fc1.weight"], ours["ema-power-0.1"]["blocks.0.mlp.fc1.weight"])
    result = call(capsys, "train", *plain, "--ema-power", 0.2, "--resume", "--max-steps", 9, "--results-dir", tmp_path)
    assert result.code == 0 and len(list(tmp_path.iterdir())) == 2  # beside a finished run, a new one


@pytest.mark.parametrize("left", [[], [4, 5, 6]], ids=str)
def test_killed_at_any_time_and_resumed_the_snapshots_are_those_of_the_straight_run(left, straight, tmp_path, capsys):
    """Killed after the checkpoint of step 3, with snapshots that came after it: whole, of another time, and half-written."""
    more = ["--max-steps", 6, "--ckpt-every", 3, "--ema-snapshot-every", 2, "--resume"]
    train(capsys, tmp_path, *more)
    (run,) = tmp_path.iterdir()
    (run / "checkpoints" / "0000006.pt").unlink()
    for step, file in snapshots(tmp_path).items():
        if step > 3 and step not in left:
            file.unlink()
    for step in left:  # what a rewind is to remove
        shutil.copy(run / "snapshots" / "0000002.pt", run / "snapshots" / f"{step:07d}.pt")
    (run / "snapshots" / ".0000006.pt.1.tmp").write_bytes(b"half")
    result = train(capsys, tmp_path, *more)
    assert "Continuing from" in result.out
    assert_same(snapshots(tmp_path), snapshots(straight))
    ours, theirs = (load_checkpoint(next(folder.glob("*/checkpoints/0000006.pt"))) for folder in (tmp_path, straight))
    for name in ("model", "ema", "ema-power-0.05", "ema-power-0.1"):
        assert all(torch.equal(ours[name][key], value) for key, value in theirs[name].items()), name


def test_a_snapshot_comes_before_the_checkpoint_of_its_step(tmp_path, capsys, monkeypatch):
    written, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda one, path: replace(one, path) or written.append(path.parts[-2:]))
    train(capsys, tmp_path, "--max-steps", 3, "--ckpt-every", 2)  # and at the end
    names = [("0000002.pt", "0000002.pt"), ("0000003.pt", "0000003.pt")]
    written = [parts for parts in written if parts[1].endswith(".pt")]
    assert written == [(what, name) for pair in names for what, name in zip(("snapshots", "checkpoints"), pair)]
    assert train(capsys, tmp_path, "--max-steps", 3, "--ckpt-every", 2, "--resume").out.count("Saved") == 0


def test_a_snapshot_that_could_not_be_written_is_told_and_made_up_for(straight, tmp_path, capsys, monkeypatch):
    def full(content, path, *more):
        if path.parent.name == "snapshots":
            raise OSError(28, "No space left on device")
        save_checkpoint(content, path, *more)

    with monkeypatch.context() as patch:
        patch.setattr("training.writer.save_checkpoint", full)
        result = train(capsys, tmp_path, "--max-steps", 2, "--ema-snapshot-every", 2)
    assert result.out.count("ERROR: could not write") == 1 and "the older snapshots are untouched" in result.out
    assert not snapshots(tmp_path)
    train(capsys, tmp_path, "--max-steps", 6, "--ema-snapshot-every", 2, "--resume")
    assert_same(snapshots(tmp_path), snapshots(straight))


def test_what_a_checkpoint_of_other_code_lacks_is_told(straight, tmp_path, capsys):
    content = load_checkpoint(next(straight.glob("*/checkpoints/0000003.pt")))
    torch.save({key: content[key] for key in ("model", "ema", "opt")} | {"args": {"path_type": "Linear"}}, tmp_path / "c.pt")
    result = train(capsys, tmp_path / "r", "--ckpt", tmp_path / "c.pt", "--max-steps", 4)
    assert "has no ema-power-0.05: it starts from the weights that are sampled from" in result.out
    ((_, file),) = snapshots(tmp_path / "r").items()
    average = torch.load(file, weights_only=True)["ema-power-0.1"]["blocks.0.mlp.fc1.weight"]
    last = load_checkpoint(next((tmp_path / "r").glob("*/checkpoints/0000004.pt")))["model"]["blocks.0.mlp.fc1.weight"]
    decay = decay_at(4, gamma_of(0.1))
    assert torch.allclose(average, decay * content["ema"]["blocks.0.mlp.fc1.weight"] + (1 - decay) * last, atol=1e-6)


@pytest.mark.slow
def test_two_processes_keep_the_averages_of_one_to_rounding(straight, tmp_path):
    """One process to step 3, then two: the main one alone writes."""
    more = ["--results-dir", tmp_path, "--ckpt-every", 3, "--ema-snapshot-every", 2, "--resume"]
    for steps, processes in ((3, 1), (6, 2)):
        done = launch("train", *SMALL, *more, "--max-steps", steps, processes=processes)
        assert done.code == 0, done.err
    ours, theirs = snapshots(tmp_path), snapshots(straight)
    assert list(ours) == [2, 3, 4, 6]  # 3 was an end
    for step in theirs:
        one, other = (torch.load(files[step], weights_only=True) for files in (ours, theirs))
        for name in ("ema-power-0.05", "ema-power-0.1"):
            assert all(torch.allclose(one[name][key], value, atol=1e-5) for key, value in other[name].items()), (step, name)


def test_a_rewind_and_pruning_leave_the_snapshots_of_the_past(tmp_path):
    folder = RunFolder(tmp_path / "000-x")
    folder.snapshots.mkdir()
    for name in ("0000001.pt", "0000002.pt", "0000003.pt", "mine.pt"):
        (folder.snapshots / name).touch()
    folder.prune(1, None)
    folder.rewind(2)
    assert sorted(path.name for path in folder.snapshots.iterdir()) == ["0000001.pt", "0000002.pt", "mine.pt"]
