"""What is measured of which network and part, and what is said of it."""

import numpy as np
import pytest

from metrics import measures
from metrics.features import Features
from metrics.names import METRICS, networks_of
from metrics.reference import Reference
from metrics.report import limits, table
from metrics.results import evaluate, split_summary, summary
from metrics.scores import kernel_distance, sliced_distance, statistics
from small_features import low_rank_distance, small_features


def reference_of(features):
    return Reference(*statistics(features.pool), *statistics(features.spatial), features.pool.numpy(), len(features.pool))


@pytest.fixture
def measured():
    """(samples, references) of two networks."""
    samples = {"inception": small_features(40, seed=1), "dinov2": Features(small_features(40, seed=2, dims=(9,)).pool)}
    others = {"inception": small_features(30, seed=3), "dinov2": small_features(30, seed=4, dims=(9, 3, 3))}
    return samples, {name: reference_of(features) for name, features in others.items()}


def test_every_metric_has_its_function_and_names_of_its_own():
    assert all(callable(getattr(measures, metric.function)) for metric in METRICS.values())
    names = [name for metric in METRICS.values() for name in metric.titles]
    assert len(names) == len(set(names)) and networks_of(METRICS) == ["inception", "dinov2", "pixels"]


def test_each_word_is_measured_by_its_own_network(measured):
    samples, references = measured
    words = ("kid", "mind-dinov2", "fd-dinov2", "precision-recall")
    found = evaluate(samples, references, words)
    assert [*found] == ["kid", "mind_dinov2", "fd_dinov2", "precision", "recall"]
    assert found["kid"] == kernel_distance(samples["inception"].pool, references["inception"].features)
    assert found["mind_dinov2"] == sliced_distance(samples["dinov2"].pool, references["dinov2"].features)
    pair = samples["dinov2"].pool.double().numpy(), references["dinov2"].features.astype(np.float64)
    assert found["fd_dinov2"] == pytest.approx(low_rank_distance(*pair), rel=1e-6)
    assert evaluate(samples, {}, ("is", "kid", "precision-recall"))["kid"] is None


def test_parts_are_every_so_many_samples(measured):
    samples, references = measured
    found = split_summary(samples, references, 4, ("kid", "precision-recall"))
    parts = [kernel_distance(samples["inception"].pool[k::4], references["inception"].features) for k in range(4)]
    error = np.std(parts, ddof=1) / 2
    assert found["kid"] == {"mean": pytest.approx(np.mean(parts)), "standard_error": pytest.approx(error), "values": parts}
    nothing = summary([{"sfid": None}, {"sfid": None}])["sfid"]
    assert nothing == {"mean": None, "standard_error": None, "values": [None, None]}


def test_the_table_and_the_limits():
    results = [{"fid": 2.0, "sfid": None, "kid": 0.0012345}, {"fid": 4.0, "sfid": None, "kid": 0.0012345}]
    lines = table(results, summary(results), heads=("1", "2", "mean"))
    assert [line.split() for line in lines] == [
        ["1", "2", "mean"],
        ["FID", "2.0000", "4.0000", "3.0000", "+-", "1.0000"],
        ["sFID", "-", "-", "-"],
        ["KID", "0.001234", "0.001234", "0.001234", "+-", "0.000000"],
    ]
    assert not [*limits({"kid": 0.1}, 100, {"inception": 2048}, splits=None)]
    told = [*limits({"fd_dinov2": 1.0}, 1000, {"dinov2": 1024}, splits=5)]
    assert len(told) == 3 and "1000 do not compare" in told[0] and "1024 features of 1000" in told[1]
    assert "of a part's 200 samples are biased upwards against those of all 1000" in told[2]
