"""The functions of names.METRICS: numbers of what a network sees in samples, and of its Reference.

Each takes Features, a Reference that has the fields which the metric needs, and the device to compute on.
"""

from . import scores


def fd(samples, reference, device):
    """Frechet distance of the features' Gaussians: FID, and FD of other networks."""
    return scores.frechet_distance(*scores.statistics(samples.pool), reference.mu, reference.sigma)


def spatial_fd(samples, reference, device):
    return scores.frechet_distance(*scores.statistics(samples.spatial), reference.mu_s, reference.sigma_s)


def score(samples, reference, device):
    return scores.inception_score(samples.logits)


def coverage(samples, reference, device):
    return scores.precision_recall(samples.pool, reference.features, device)


def kid(samples, reference, device):
    return scores.kernel_distance(samples.pool, reference.features, device)


def mind(samples, reference, device):
    return scores.sliced_distance(samples.pool, reference.features, device)
