"""The formulas against NumPy and SciPy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric

from metrics.scores import frechet_distance, inception_score, precision_recall, statistics
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
