"""The formulas against NumPy and SciPy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric

from common.streams import generator
from metrics.scores import (
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    sliced_distance,
    statistics,
)
from small_features import low_rank_distance, small_features


def test_statistics_match_numpy():
    features = np.random.default_rng(0).normal(3, 2, (5000, 12)).astype(np.float32)  # more than one chunk
    mu, sigma = statistics(torch.from_numpy(features))
    assert mu.dtype == sigma.dtype == np.float64
    np.testing.assert_allclose(mu, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)


def test_frechet_distance_matches_scipy():
    first, second = (small_features(300, seed).pool.double().numpy() for seed in (1, 2))
    mu1, sigma1, mu2, sigma2 = first.mean(0), np.cov(first.T), second.mean(0), np.cov(second.T)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)
    arguments = dict(mu=mu1, sigma=sigma1), dict(mu=mu2, sigma=sigma2), False
    assert fid_statistics_to_metric(*arguments)["frechet_inception_distance"] == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_exact_for_singular_covariances():
    first, second = (np.random.default_rng(seed).normal(0, seed, (10, 400)) for seed in (1, 2))
    statistics = first.mean(0), np.cov(first.T), second.mean(0), np.cov(second.T)
    assert frechet_distance(*statistics) == pytest.approx(low_rank_distance(first, second), rel=1e-12)
    assert frechet_distance(*statistics[:2], *statistics[:2]) == pytest.approx(0, abs=1e-9)


def test_inception_score_of_consecutive_splits():
    logits = np.random.default_rng(0).normal(0, 2, (13, 7))
    scores = []
    for part in (logits[:5], logits[5:10], logits[10:]):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        scores.append(np.exp(np.mean(np.sum(p * np.log(p / p.mean(0)), axis=1))))
    assert inception_score(torch.tensor(logits), split=5) == pytest.approx(np.mean(scores), rel=1e-9)
    assert inception_score(torch.ones(8, 5)) == pytest.approx(1)
    assert inception_score(100 * torch.eye(6)) == pytest.approx(6)


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
    assert precision_recall(first, second) == pytest.approx(expected, abs=1e-12)
    assert precision_recall(first, second, rows=7) == pytest.approx(expected, abs=1e-12)


def test_kernel_distance_matches_a_loop_over_pairs():
    first, second = (small_features(20, seed).pool.double() for seed in (6, 1))

    def mean_kernel(a, b, but_itself):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (but_itself and i == j)]
        return np.mean([(sum(x * y for x, y in zip(a[i], b[j])) / len(a[i]) + 1) ** 3 for i, j in pairs])

    a, b = first.tolist(), second.tolist()
    expected = mean_kernel(a, a, True) + mean_kernel(b, b, True) - 2 * mean_kernel(a, b, False)
    assert expected > 1 and kernel_distance(first, second.float().numpy(), subsets=3) == pytest.approx(expected, rel=1e-6)
    assert kernel_distance(first, first[:15]) == kernel_distance(first, first[:15])  # the same subsets each time


def test_kernel_distance_is_unbiased_and_that_of_gaussians():
    """Of N(0, 1) against N(m, 1) in one dimension: E k = E[(x y + 1)^3] = 1 + 3 E x E y + 3 E x^2 E y^2 + E x^3 E y^3."""
    numbers, m = np.random.default_rng(0), 0.5
    moments = {0: (0, 1, 0), m: (m, 1 + m**2, m**3 + 3 * m)}
    kernel = lambda a, b: 1 + sum(f * x * y for f, x, y in zip((3, 3, 1), moments[a], moments[b]))  # noqa: E731
    expected = {0: 0, m: kernel(0, 0) + kernel(m, m) - 2 * kernel(0, m)}
    for shift in expected:
        found = [
            kernel_distance(*(torch.tensor(numbers.normal(s, 1, (50, 1))) for s in (0, shift)), subsets=1, size=50)
            for _ in range(2000)
        ]
        error = np.std(found) / np.sqrt(len(found))
        assert abs(np.mean(found) - expected[shift]) < 4 * error and min(found) < 0
    assert expected[m] > 20 * error


def test_sliced_distance_of_shifted_copies():
    """Each projection is shifted by u s, and E[(u s)^2] = |s|^2 / D over directions: 3 |s|^2 in all."""
    features = small_features(200, seed=1).pool.double()
    shift = torch.linspace(0.5, 1.5, features.shape[1])
    assert sliced_distance(features, features) == 0
    expected = 3 * shift.double().square().sum().item()
    assert sliced_distance(features + shift, features, directions=20_000) == pytest.approx(expected, rel=0.05)
    line = torch.tensor([[0.0], [1.0], [5.0]])  # in one dimension every direction is the same
    assert sliced_distance(line, line[[2, 0, 1]] + 2) == pytest.approx(12)


def test_sliced_distance_matches_loops():
    """Of more features than the reference has it takes every so many, and the directions are those of its own seed."""
    first, second = small_features(7, seed=6).pool, small_features(3, seed=1).pool
    kept, width, total = [first[i].double().numpy() for i in (0, 2, 4)], first.shape[1], 0
    directions = torch.randn(50, width, dtype=torch.float64, generator=generator("cpu", 0, "mind")).numpy()
    for direction in directions:
        unit = direction / np.sqrt(sum(x * x for x in direction))
        ours, theirs = (sorted(sum(x * u for x, u in zip(f, unit)) for f in some) for some in (kept, second.double().numpy()))
        total += np.mean([(x - y) ** 2 for x, y in zip(ours, theirs)])
    assert sliced_distance(first, second.numpy(), directions=50) == pytest.approx(3 * width * total / 50, rel=1e-9)
