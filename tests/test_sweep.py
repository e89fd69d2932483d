"""sweep.py on real command lines: its numbers are those of the other commands, made once."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from cli import DIGITS, call, launch, one_line

PIXELS = ["--metrics", "fd-pixels", "mind-pixels"]


@pytest.fixture(scope="module")
def ref(tmp_path_factory):
    """A reference of random images."""
    file = tmp_path_factory.mktemp("reference") / "images.npz"
    np.savez(file, arr_0=np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8))
    return file


@pytest.fixture
def ask(trained, ref, tmp_path, capsys):
    def sweep(*flags, out="sweep", ckpt=trained, metrics=PIXELS):
        fixed = ["--ref", ref, "--out", tmp_path / out, *metrics]
        return call(capsys, "sweep", ckpt, *fixed, *flags)

    return sweep


SMALL = ["--solver", "ODE:heun", "--num-sampling-steps", 4, "--num-fid-samples", 12]


def test_numbers_are_those_of_sample_ddp_and_evaluate(ask, trained, ref, tmp_path, capsys):
    done = ask(*SMALL, "--cfg-scale", 1, 2, "--seeds", 0, 7, "--per-proc-batch-size", 12)
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]
    flags = ["--ckpt", trained, "--cfg-scale", 2, "--sampling-method", "heun", "--num-sampling-steps", 4, "--no-png"]
    flags += ["--num-fid-samples", 12, "--per-proc-batch-size", 12, "--sample-dir", tmp_path / "own", "--global-seed", 7]
    assert call(capsys, "sample_ddp", "ODE", *flags).code == 0
    (samples,) = (tmp_path / "own").glob("*.npz")
    assert call(capsys, "evaluate", samples, "--ref", ref, *PIXELS, "--out", tmp_path / "own.json").code == 0
    expected = json.loads((tmp_path / "own.json").read_text())
    assert rows[1]["cfg_scale"] == 2 and rows[1]["calls"] == 6
    for name in ("fd_pixels", "mind_pixels"):
        assert rows[1]["values"][name][1] == expected[name]
    table = (tmp_path / "sweep" / "sweep.md").read_text()
    assert "| cfg scale | calls | FD-pixels | MIND-pixels |" in table and "2 seeds" in table
    assert "- cfg scale 1 -> 2: " in table and (tmp_path / "sweep" / "sweep.png").stat().st_size > 5000


def test_what_was_made_is_not_made_again(ask, tmp_path, monkeypatch):
    from inference import sweep_run

    made, seen = [], []
    complete, measure = sweep_run.complete, sweep_run.Judge.measure
    monkeypatch.setattr(sweep_run, "complete", lambda *args: made.append((result := complete(*args))[2]) or result)
    monkeypatch.setattr(sweep_run.Judge, "measure", lambda self, *args: seen.append(args[2]) or measure(self, *args))
    one = ["--metrics", "fd-pixels"]
    assert ask(*SMALL, "--seeds", 0, 1, metrics=one).code == 0
    first = (tmp_path / "sweep" / "sweep.md").read_text()
    assert made == [False, False]
    assert ask(*SMALL, "--seeds", 0, 1, metrics=one).code == 0
    assert (tmp_path / "sweep" / "sweep.md").read_text() == first and len(made) == 2  # nothing was drawn or measured
    assert ask(*SMALL, "--seeds", 0, 1, 2, metrics=one).code == 0 and made == [False] * 3  # one more seed
    assert ask(*SMALL, "--seeds", 0, 1, 2).code == 0
    assert made[3:] == [True] * 3 and seen[3:] == [["mind-pixels"]] * 3  # one more metric, of samples that are there
    next((tmp_path / "sweep" / "results").iterdir()).write_text("{")
    assert ask(*SMALL, "--seeds", 0, 1, 2).code == 0 and made[6:] == [True]  # a damaged record


def test_fewer_samples_are_the_first_of_more(ask, ref, tmp_path, capsys):
    assert ask("--solver", "ODE:heun", "--num-sampling-steps", 4, "--num-fid-samples", 12, 8).code == 0
    (samples,) = (tmp_path / "sweep" / "samples").glob("*.npz")
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]
    with np.load(samples) as file:
        np.savez(tmp_path / "first.npz", arr_0=file["arr_0"][:8])
    assert call(capsys, "evaluate", tmp_path / "first.npz", "--ref", ref, *PIXELS).code == 0
    expected = json.loads((tmp_path / "first.eval.json").read_text())
    assert rows[1]["num_fid_samples"] == 8
    assert rows[1]["values"]["fd_pixels"] == [pytest.approx(expected["fd_pixels"], rel=1e-9)]


def test_discarded_samples_leave_their_numbers(ask, tmp_path):
    assert ask(*SMALL, "--discard-samples").code == 0
    assert not list((tmp_path / "sweep" / "samples").glob("*.npz"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inference.sweep_run.complete", None)  # nothing is to be drawn
        assert ask(*SMALL, "--discard-samples").code == 0


def test_features_are_those_of_float32_whatever_is_sampled_in(ask, monkeypatch):
    from inference import sweep_run

    seen, real = [], sweep_run.shared_features
    allowed = lambda: (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)  # noqa: E731
    monkeypatch.setattr(sweep_run, "shared_features", lambda *args: seen.append(allowed()) or real(*args))
    assert ask(*SMALL, "--precision", "bf16").code == 0
    assert set(seen) == {(False, False)}


def test_a_reference_that_has_changed_is_measured_again(ask, tmp_path, capsys, trained):
    rng, values = np.random.default_rng(0), []
    for seed in (0, 0, 1):
        (tmp_path / "photos").mkdir(exist_ok=True)
        for i in range(6) if len(values) != 1 else ():
            Image.fromarray(rng.integers(0, 200 + 20 * seed, (32, 32, 3), dtype=np.uint8)).save(
                tmp_path / "photos" / f"{i}.png"
            )
        flags = ["sweep", trained, *SMALL, "--ref", tmp_path / "photos", *PIXELS, "--out", tmp_path / "sweep"]
        assert call(capsys, *flags).code == 0
        values.append(json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"][0]["values"]["fd_pixels"])
    assert values[0] == values[1] != values[2]
    record = json.loads(next((tmp_path / "sweep" / "results").iterdir()).read_text())
    assert len(record["reference"]["sha256"]) == 64 and "timm" in record["versions"]


def test_what_cannot_be_sampled_is_told_before_anything_is(ask, tmp_path):
    one_line(ask(*SMALL, "--weights", "ema", "nope"), 1, "no weights 'nope'")
    one_line(ask("--solver", "ODE:heun", "SDE:Euler:cubic", "--num-fid-samples", 12), 2, "cubic")
    assert not (tmp_path / "sweep" / "samples").exists() or not list((tmp_path / "sweep" / "samples").iterdir())


def test_fewer_samples_than_there_are_draw_nothing(ask, tmp_path):
    assert ask("--solver", "ODE:heun", "--num-sampling-steps", 4, "--num-fid-samples", 12).code == 0
    assert ask("--solver", "ODE:heun", "--num-sampling-steps", 4, "--num-fid-samples", 8).code == 0
    assert len(list((tmp_path / "sweep" / "samples").glob("*.npz"))) == 1


@pytest.mark.slow
def test_two_processes_and_averages_of_any_width(ref, tmp_path):
    """A run with snapshots; two processes give the numbers of one."""
    run = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 8, "--num-workers", 0, "--max-steps", 20]
    run += ["--ema-power", 0.05, 0.1, "--ema-snapshot-every", 5, "--lr", 1e-3, "--results-dir", tmp_path / "runs"]
    assert launch("train", *run).code == 0
    (ckpt,) = tmp_path.glob("runs/*/checkpoints/*.pt")
    tables = []
    for processes in (1, 2):
        flags = [ckpt, "--ref", ref, *PIXELS, *SMALL, "--weights", "ema", "ema-power-0.1", "sigma-0.08", "model"]
        done = launch("sweep", *flags, "--per-proc-batch-size", 4, "--out", tmp_path / str(processes), processes=processes)
        assert done.code == 0, done.err
        tables.append((tmp_path / str(processes) / "sweep.md").read_text())
        assert tables[-1].splitlines()[4].startswith("| sigma-0.08 | 6 |")
    assert tables[0] == tables[1]
    assert len(list(tmp_path.glob("1/weights/0000020-*-sigma-0.08.pt"))) == 1


def test_bad_settings_are_one_line(ask, trained, ref, tmp_path, capsys):
    one_line(ask(*SMALL, "--solver", "ODE:rk5"), 2, "rk5")
    one_line(ask(*SMALL, "--solver", "heun"), 2, "--solver heun", "ODE:METHOD")
    one_line(ask(*SMALL, "--weights", "ema-0.5"), 1, "no weights 'ema-0.5'")
    one_line(ask(*SMALL, "--weights", "sigma-wide"), 2, "--weights sigma-wide")
    one_line(ask(*SMALL, "--weights", "sigma-0.1"), 1, "without --ema-power")
    one_line(ask(*SMALL, "--labels", "some"), 2, "choose from random, balanced")
    one_line(ask(*SMALL, "--num-fid-samples", 2), 2, "--num-fid-samples 2")
    one_line(ask(*SMALL, "--solver", "ODE:dopri5", "--time-shift", 2), 2, "--time-shift", "ODE:dopri5")
    one_line(ask(*SMALL, metrics=["--metrics", "fid"], ckpt=tmp_path / "no.pt"), 1, "there is no such file")
    one_line(ask(*SMALL, metrics=["--metrics", "fd"]), 2, "no metric")
    one_line(ask(*SMALL, "--inception-weights", "x"), 2, "--inception-weights", "none of --metrics")
    flags = ["sweep", trained, *SMALL, *PIXELS, "--out", tmp_path / "sweep"]
    one_line(call(capsys, *flags, "--ref", tmp_path / "none"), 1, "there is no such file")
    assert not list((tmp_path / "sweep").rglob("*.npz"))
    shutil.rmtree(tmp_path / "sweep")
    (tmp_path / "sweep").write_text("")
    one_line(call(capsys, *flags, "--ref", ref), 1, "--out", "cannot write there")


@pytest.mark.slow
def test_a_reference_of_statistics_alone_has_a_dash_for_the_rest(trained, inception_weights, tmp_path, capsys):
    """As evaluate.py has it: of the metrics that are measured by default, those that it cannot give."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(2048, 64)) / 8
    np.savez(tmp_path / "stats.npz", mu=rng.normal(size=2048), sigma=root @ root.T)
    flags = [trained, "--ref", tmp_path / "stats.npz", "--inception-weights", inception_weights, "--out", tmp_path / "sweep"]
    assert call(capsys, "sweep", *flags, *SMALL).code == 0
    (row,) = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]
    assert row["values"]["fid"][0] > 0 and row["values"]["precision"] == row["values"]["sfid"] == [None]
    assert (tmp_path / "sweep" / "sweep.md").read_text().splitlines()[2].count(" - |") == 3
    one_line(call(capsys, "sweep", *flags, *SMALL, "--metrics", "sfid"), 1, "sfid")
