"""Features that need no network, and a distance by another formula."""

import numpy as np
import torch

from metrics.features import Features


def small_features(count, seed, dims=(24, 20, 10)):
    rng = np.random.default_rng(seed)
    return Features(*(torch.tensor(rng.gamma(2.0, 1.0 + seed / 10, (count, d)), dtype=torch.float32) for d in dims))


def low_rank_distance(first, second):
    """Frechet distance of features (N, D), (M, D), exact where N and M are small: it takes no root of a covariance."""
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (first, second))  # covariances a^T a and b^T b
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return ((first.mean(0) - second.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross
