"""Profiles p(t) = (g + 1) t^g / T^(g + 1) of averages by a power of time, and one of them as a sum of others (Karras et al.,
arXiv 2312.02696, section 3.2 and algorithm 3). A profile is a pair (T, g); float64 throughout."""

import numpy as np


def inner_products(steps_a, gammas_a, steps_b, gammas_b):
    """<a, b>, the integrals of pa(t) pb(t) over the times that both have, of arrays that broadcast to one shape:
    (ga + 1) (gb + 1) r^p / ((ga + gb + 1) max(Ta, Tb)), r = Ta / Tb, p = gb if Ta < Tb else -ga (equation 151)."""
    ta, ga, tb, gb = (np.asarray(values, dtype=np.float64) for values in (steps_a, gammas_a, steps_b, gammas_b))
    power = (np.minimum(ta, tb) / np.maximum(ta, tb)) ** np.where(ta < tb, gb, ga)
    return (ga + 1) * (gb + 1) * power / ((ga + gb + 1) * np.maximum(ta, tb))


def fit(steps, gammas, step, gamma):
    """(weights (N,) of sum 1, residual) of the sum of N profiles that is nearest to one more, by least squares.

    The residual is the distance that is left, relative: sqrt(<b - sum, b - sum> / <b, b>); rounding makes it up to 1e-7. The
    profiles are scaled to norm 1 first, so that early and late ones are alike to the solver. Raises ValueError where they
    have next to no time in common with the wanted one.
    """
    steps, gammas = np.asarray(steps, dtype=np.float64), np.asarray(gammas, dtype=np.float64)
    among = inner_products(steps[:, None], gammas[:, None], steps, gammas)
    wanted, norm = inner_products(steps, gammas, step, gamma), inner_products(step, gamma, step, gamma)
    scale = np.sqrt(np.diag(among))
    weights = np.linalg.lstsq(among / np.outer(scale, scale), wanted / scale, rcond=None)[0] / scale
    if not weights.sum() > 1e-3:
        raise ValueError("they have next to no time in common with it")
    weights /= weights.sum()
    left = norm - 2 * weights @ wanted + weights @ among @ weights
    return weights, float(np.sqrt(max(left, 0.0) / norm))
