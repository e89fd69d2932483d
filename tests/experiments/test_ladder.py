"""The ladder in miniature: real trainings, its page, what a second call does, and what stops it."""

import json
import signal
import subprocess
import sys
import time

import pytest

from cli import ENV, ROOT, Result, one_line
from experiments.ladder import alone

SMALL = [
    "--images",
    "192",
    "--batch-size",
    "32",
    "--model",
    "SiT-T/8",
    "--vae",
    "none",
    "--samples",
    "40",
    "--likelihoods",
    "2",
]
SOME = ["--rungs", "vp-score-weighted", "linear-velocity", "--seeds", "0", "1"]


def command(out, *more):
    return [sys.executable, str(ROOT / "experiments" / "ladder.py"), *SMALL, *SOME, "--out", str(out), *map(str, more)]


def call(out, *more):
    done = subprocess.run(command(out, *more), capture_output=True, text=True, env=ENV, timeout=600)
    return Result(done.returncode, done.stdout, done.stderr)


def left_over(words):
    """Processes whose command line has these words."""
    return subprocess.run(["pgrep", "-f", str(words)], capture_output=True, text=True).stdout.split()


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """A finished one, which was interrupted once."""
    out = tmp_path_factory.mktemp("ladder") / "out"
    process = subprocess.Popen(command(out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    until = time.time() + 300
    while not list(out.glob("trained-*.json")):
        assert process.poll() is None and time.time() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and not left_over(out)
    with_term = subprocess.Popen(command(out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    while not left_over(f"measuring.py {out}"):
        assert with_term.poll() is None and time.time() < until
        time.sleep(0.1)
    with_term.send_signal(signal.SIGTERM)
    _, err = with_term.communicate(timeout=60)
    assert with_term.returncode == 143 and "Traceback" not in err and not left_over(out)
    done = call(out)
    assert done.code == 0, done.err
    assert "are there already" in done.out
    return out


@pytest.mark.slow
def test_the_page_has_every_step_and_its_pictures(ladder):
    page = (ladder / "ladder.md").read_text()
    assert "{" not in page
    for title, paper in (("VP, score, weighted", "39.1"), ("Linear, velocity", "34.84 | 33.02")):
        row = next(line for line in page.splitlines() if line.startswith(f"| {title} |"))
        assert paper in row and row.count("±") == 9
    assert "| the SDE instead of the ODE | 34.84 to 33.02, better |" in page
    for name in ("ladder", "ladder_losses", "ladder_samples"):
        assert f"pictures/{name}.png" in page and (ladder / "pictures" / f"{name}.png").stat().st_size > 5000
    assert "pictures/ladder_samplers.png" not in page  # they are compared on a step that was left out


@pytest.mark.slow
def test_numbers_are_made_again_by_the_same_command(ladder, tmp_path):
    """Those of one seed and step, elsewhere, by a run that was not interrupted."""
    assert call(tmp_path / "again", "--rungs", "linear-velocity", "--seeds", "1").code == 0

    def numbers(out):
        found = json.loads((out / "linear-velocity-1.json").read_text())
        for mode in ("ODE", "SDE"):
            assert found[mode].pop("seconds") > 0
        return found

    assert numbers(tmp_path / "again") == numbers(ladder)


@pytest.mark.slow
def test_a_finished_one_is_not_made_again_and_other_numbers_are_refused(ladder):
    before = {path: path.stat().st_mtime_ns for path in ladder.glob("*-[01].json")}
    assert len(before) == 8 and call(ladder).code == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    one_line(call(ladder, "--samples", 41), 2, "--samples 40", "41", ladder)
    one_line(call(ladder, "--image-size", "16x16"), 2, "16")
    with alone(ladder):
        one_line(call(ladder), 1, ladder, "another")


def test_wrong_flags_are_one_line(tmp_path):
    one_line(call(tmp_path / "a", "--rungs", "vp-nois"), 2, "vp-nois", "vp-noise")
    one_line(call(tmp_path / "b", "--data-path", tmp_path / "nothing"), 1, "nothing")
    one_line(call(tmp_path / "c", "--image-size", 33), 2, "33")
    one_line(call(tmp_path / "a", "--seeds", 0, 1, 0), 2, "--seeds", "twice")
    one_line(call(tmp_path / "a", "--samples", 19), 2, "--samples", "19", "10 classes")
    assert not any((tmp_path / name / "runs").exists() for name in "abc")


def test_a_piece_that_fails_ends_all_with_its_line(tmp_path):
    """An autoencoder that is not there is seen by the trainings alone."""
    one_line(call(tmp_path / "out", "--vae", tmp_path / "vae"), 1, "trained-", "vae", "logs")
    assert not left_over(tmp_path / "out")
