"""The functions of names.METRICS: numbers of what a network sees in samples, and of its Reference.

Each takes Features, a Reference that has the fields which the metric needs, and the device to compute on.
"""

from .scores import (
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    sliced_distance,
    statistics,
)


def fd(samples, reference, device):
    """Frechet distance of the features' Gaussians: FID, and FD of other networks."""
    return frechet_distance(*statistics(samples.pool), reference.mu, reference.sigma)


def spatial_fd(samples, reference, device):
    return frechet_distance(*statistics(samples.spatial), reference.mu_s, reference.sigma_s)


def score(samples, reference, device):
    return inception_score(samples.logits)


def coverage(samples, reference, device):
    return precision_recall(samples.pool, reference.features, device)


def kid(samples, reference, device):
    return kernel_distance(samples.pool, reference.features, device)


def mind(samples, reference, device):
    return sliced_distance(samples.pool, reference.features, device)
