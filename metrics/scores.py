"""The formulas: Frechet distance, Inception Score, precision and recall, KID and MIND, of features.

Those before KID are the metrics of ADM's evaluation suite (Dhariwal & Nichol, arXiv 2105.05233).
"""

import numpy as np
import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

from common.spread import spread
from common.streams import generator

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


def kernel_distance(samples, reference, device="cpu", subsets=100, size=1000):
    """KID (Binkowski et al., arXiv 1801.01401) of features (N, D) against (M, D): the squared MMD of k(x, y) = (x y / D + 1)^3.

    It is unbiased, so near 0, and as often below, for samples that are as the reference: the mean over random subsets of size
    images of each, or of all there are of the fewer. In float64, the same subsets each time. Often printed times 1000; not so
    here.
    """
    numbers, size, values = generator("cpu", 0, "kid"), min(size, len(samples), len(reference)), []
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3  # noqa: E731
    for _ in range(subsets):
        rows = (torch.randperm(len(features), generator=numbers)[:size] for features in (samples, reference))
        x, y = (torch.as_tensor(f)[r].to(device, torch.float64) for f, r in zip((samples, reference), rows))
        pairs = sum(k.sum() - k.diagonal().sum() for k in (kernel(x, x), kernel(y, y)))  # none of an image with itself
        values.append((pairs / (size * (size - 1)) - 2 * kernel(x, y).mean()).item())
    return float(np.mean(values))


def sliced_distance(samples, reference, device="cpu", directions=1000):
    """MIND (arXiv 2605.06797) of features (N, D) against (M, D): 3 D times the mean, over random unit directions, of the mean
    squared difference of the sorted projections, which is the squared Wasserstein distance along each.

    It takes equally many features: of the more, evenly spread ones. In float64, along the same directions each time.
    """
    count, width = min(len(samples), len(reference)), samples.shape[1]
    x, y = (torch.as_tensor(f)[spread(len(f), count)].to(device, torch.float64) for f in (samples, reference))
    units = torch.randn(directions, width, dtype=torch.float64, generator=generator("cpu", 0, "mind"))
    units = (units / units.norm(dim=1, keepdim=True)).to(device)
    total = sum((_sorted(x, part) - _sorted(y, part)).square().mean(0).sum() for part in units.split(100))
    return 3 * width * total.item() / directions


def _sorted(features, units):
    """Features (N, D) along each of K unit vectors (K, D), in order: (N, K)."""
    return (features @ units.T).sort(0).values
