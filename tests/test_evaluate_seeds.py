"""The command line of evaluate.py for other networks, parts of the samples and several of them; no weights are needed."""

import json

import numpy as np
import pytest

from cli import call, launch, one_line
from conftest import pictures
from metrics.features import extract_features
from metrics.networks import Pixels
from metrics.scores import frechet_distance, kernel_distance, sliced_distance, statistics

WORDS = ["--metrics", "fd-pixels,kid-pixels", "mind-pixels"]


@pytest.fixture
def files(tmp_path):
    """Paths of three seeds' samples and of a reference, and their features."""
    paths, features = [], []
    for seed in range(4):
        paths.append(tmp_path / (f"seed-{seed}.npz" if seed < 3 else "ref.npz"))
        np.savez(paths[-1], arr_0=pictures(12 + (seed == 3), seed))
        features.append(extract_features(pictures(12 + (seed == 3), seed), Pixels("cpu")).pool)
    return paths, features


def by_hand(samples, reference):
    return {
        "fd_pixels": frechet_distance(*statistics(samples), *statistics(reference)),
        "kid_pixels": kernel_distance(samples, reference),
        "mind_pixels": sliced_distance(samples, reference),
    }


def test_parts_and_a_saved_reference(files, capsys):
    (samples, *_, reference), (features, *_, others) = files
    stats = reference.with_name("stats.npz")
    done = call(capsys, "evaluate", samples, "--ref", reference, *WORDS, "--splits", 3, "--save-stats", stats)
    assert done.code == 0, done.err
    results = json.loads(samples.with_name("seed-0.eval.json").read_text())
    whole, parts = by_hand(features, others), [by_hand(features[k::3], others) for k in range(3)]
    assert {name: results[name] for name in whole} == pytest.approx(whole, rel=1e-9)
    for name, about in results["splits"].items():
        values = [part[name] for part in parts]
        assert about["values"] == pytest.approx(values, rel=1e-9) and about["mean"] == pytest.approx(np.mean(values))
        assert about["standard_error"] == pytest.approx(np.std(values, ddof=1) / 3**0.5)
    heads, *rows = done.out.splitlines()
    assert heads.split() == ["all", "3", "parts"] and [row.split()[0] for row in rows] == [
        "FD-pixels",
        "KID-pixels",
        "MIND-pixels",
    ]
    assert all(row.split()[3] == "+-" for row in rows) and "4 samples are biased upwards against those of all 12" in done.err
    assert results["settings"]["num_reference_pixels"] == 13 and results["settings"]["metrics"][0] == "fd-pixels"
    again = call(capsys, "evaluate", samples, "--ref", stats, *WORDS)
    assert again.code == 0, again.err
    assert json.loads(samples.with_name("seed-0.eval.json").read_text())["mind_pixels"] == results["mind_pixels"]
    one_line(call(capsys, "evaluate", samples, "--ref", stats, "--metrics", "fid"), 1, stats, "no mu and sigma for fid")


def test_several_samples_against_one_reference(files, capsys, monkeypatch):
    (*seeds, reference), (*features, others) = files
    passes, measure = [], "metrics.features.shared_features"
    from metrics.features import shared_features

    monkeypatch.setattr(measure, lambda images, *rest: passes.append(len(images)) or shared_features(images, *rest))
    summary = reference.with_name("summary.json")
    done = call(capsys, "evaluate", *seeds, "--ref", reference, *WORDS, "--out", summary)
    assert done.code == 0, done.err
    assert passes == [13, 12, 12, 12]  # three metrics, one pass over each
    expected = [by_hand(each, others) for each in features]
    found = json.loads(summary.read_text())
    assert [*found] == ["samples", "mean", "standard_error", "settings"] and [*found["samples"]] == [*map(str, seeds)]
    for path, numbers in zip(seeds, expected):
        own = json.loads(path.with_name(f"{path.stem}.eval.json").read_text())
        assert own == found["samples"][str(path)] and own["settings"]["samples"] == str(path)
        assert {name: own[name] for name in numbers} == pytest.approx(numbers, rel=1e-9)
    for name in expected[0]:
        values = [numbers[name] for numbers in expected]
        assert found["mean"][name] == pytest.approx(np.mean(values))
        assert found["standard_error"][name] == pytest.approx(np.std(values, ddof=1) / 3**0.5)
    lines = done.out.splitlines()
    assert lines[:3] == [f"{i}: {path}" for i, path in enumerate(seeds, 1)] and lines[3].split() == ["1", "2", "3", "mean"]
    assert [float(cell) for cell in lines[4].split()[1:4]] == pytest.approx([n["fd_pixels"] for n in expected], abs=1e-4)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(files):
    (samples, *_, reference), (features, *_, others) = files
    done = launch("evaluate", samples, "--ref", reference, *WORDS, "--splits", 2, processes=2)
    assert done.code == 0, done.err
    results = json.loads(samples.with_name("seed-0.eval.json").read_text())
    whole = by_hand(features, others)
    assert results["settings"]["processes"] == 2
    assert {name: results[name] for name in whole} == pytest.approx(whole, rel=1e-6)
