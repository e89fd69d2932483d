"""Data for which the best network is known: N(mean, std^2) in each dimension, independent.

Then x_t is Gaussian too, with mean alpha mean and variance alpha^2 std^2 + sigma^2, and everything that a network may
predict is affine in x. Written apart from transport/path.py, which these formulas check.
"""

import math

import torch

PATHS = ("Linear", "GVP", "VP")
PREDICTIONS = ("velocity", "score", "noise", "data")


def coefficients(path, t):
    """(alpha, alpha', sigma, sigma sigma'); the last is finite also where sigma' is not."""
    if path == "Linear":
        return t, torch.ones_like(t), 1 - t, t - 1
    if path == "GVP":
        alpha, sigma = torch.sin(math.pi / 2 * t), torch.cos(math.pi / 2 * t)
        return alpha, math.pi / 2 * sigma, sigma, -math.pi / 2 * alpha * sigma
    log_alpha = -19.9 / 4 * (1 - t) ** 2 - 0.05 * (1 - t)
    alpha, beta = log_alpha.exp(), 0.1 + 19.9 * (1 - t)
    return alpha, alpha * beta / 2, (-torch.expm1(2 * log_alpha)).sqrt(), -(alpha**2) * beta / 2


class Gaussian:
    """The exact network model(x, t) of one path and prediction, for x (N, D) and t (N,)."""

    def __init__(self, path, prediction, mean=(0.5, -1.0), std=(0.5, 1.5)):
        self.path, self.prediction = path, prediction
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    def marginal(self, t):
        """Mean and variance of x_t."""
        alpha, _, sigma, _ = coefficients(self.path, t)
        return alpha * self.mean, alpha**2 * self.std**2 + sigma**2

    def __call__(self, x, t):
        alpha, d_alpha, sigma, sigma_d_sigma = coefficients(self.path, t[:, None])
        centred, variance = x - alpha * self.mean, alpha**2 * self.std**2 + sigma**2
        if self.prediction == "score":
            return -centred / variance
        if self.prediction == "noise":
            return sigma * centred / variance
        if self.prediction == "data":
            return self.mean + alpha * self.std**2 / variance * centred
        return d_alpha * self.mean + (alpha * d_alpha * self.std**2 + sigma_d_sigma) / variance * centred

    def flow(self, x, t0, t1):
        """Where the probability flow takes x from t0 to t1, and the log of each dimension's stretch."""
        (mean0, variance0), (mean1, variance1) = (self.marginal(torch.tensor(t, dtype=x.dtype)) for t in (t0, t1))
        stretch = (variance1 / variance0).sqrt()
        return mean1 + stretch * (x - mean0), stretch.log()


class Recorder:
    """Wraps a network and keeps the time of every call."""

    def __init__(self, model):
        self.model, self.times = model, []

    def __call__(self, x, t, **kwargs):
        assert t.shape == (len(x),)
        assert (t == t[0]).all()
        self.times.append(t[0].item())
        return self.model(x, t, **kwargs)
