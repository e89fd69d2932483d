"""FID, sFID, Inception Score, precision and recall, of features.

The metrics are those of ADM's evaluation suite (Dhariwal & Nichol, arXiv 2105.05233).
"""

import numpy as np
import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

NEIGHBOURS = 3  # a ball of precision and recall reaches to its centre's third neighbour


def statistics(features):
    """Mean (D,) and covariance (D, D) of features (N, D), in float64, the covariance over N - 1."""
    mu = features.mean(0, dtype=torch.float64)
    centred = (chunk.double() - mu for chunk in features.split(4096))
    return mu.numpy(), (sum(chunk.T @ chunk for chunk in centred) / (len(features) - 1)).numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance of two Gaussians, means (D,), covariances (D, D): |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^1/2).

    With S = F F^T, the trace of that root is the sum of the singular values of F1^T F2. This is exact where roots of the
    eigenvalues of S1 S2 turn rounding errors of 1e-16 into 1e-8 each: covariances of fewer images than dimensions.
    """

    def factor(sigma):
        values, vectors = np.linalg.eigh(sigma)
        kept = values > values[-1] * len(values) * np.finfo(values.dtype).eps
        return vectors[:, kept] * np.sqrt(values[kept])

    cross = np.linalg.svd(factor(sigma1).T @ factor(sigma2), compute_uv=False).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


def inception_score(logits, split=5000):
    """Mean over consecutive splits, of which the last may be shorter, of exp(mean KL(p(y|x), p(y))); logits (N, C)."""
    scores = [isc_features_to_metric(part, splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN] for part in logits.split(split)]
    return float(np.mean(scores))


def precision_recall(samples, reference, device="cpu", rows=1024):
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991) of features (N, D) against (M, D).

    Precision is the fraction of samples in the ball of some reference image, recall the other way around; a ball reaches
    to its centre's third neighbour. In float64, so that neither TF32 nor the chunks of rows decide who is inside.
    """

    def covered(points, centres):
        radii = [torch.cdist(part, centres).kthvalue(NEIGHBOURS + 1).values for part in centres.split(rows)]  # 1st: itself
        inside = [(torch.cdist(part, centres) <= torch.cat(radii)).any(1) for part in points.split(rows)]
        return torch.cat(inside).double().mean().item()

    samples, reference = (torch.as_tensor(x).to(device, torch.float64) for x in (samples, reference))
    return covered(samples, reference), covered(reference, samples)


def evaluate(samples, reference, device="cpu"):
    """All metrics, by name, of samples' Features against a Reference; None those for which it has no features or
    statistics."""
    precision = recall = sfid = None
    if reference.mu_s is not None:
        sfid = frechet_distance(*statistics(samples.spatial), reference.mu_s, reference.sigma_s)
    if reference.features is not None:
        precision, recall = precision_recall(samples.pool, reference.features, device)
    return {
        "fid": frechet_distance(*statistics(samples.pool), reference.mu, reference.sigma),
        "sfid": sfid,
        "inception_score": inception_score(samples.logits),
        "precision": precision,
        "recall": recall,
    }
