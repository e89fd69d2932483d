"""Averages of the weights by a power of time (Karras et al., arXiv 2312.02696, section 3.1).

At step T the weights of time t count as p(t) = (g + 1) t^g / T^(g + 1), 0 < t <= T: a share of the training so far, however
long that was, where a constant decay is a number of steps. sigma_rel, the width of an average, is the standard deviation of t/T
under p. Nothing but mathematics here, and no package, for the flags are checked by it.
"""

# Narrower than any use; and the plain mean, g = 0. Wider averages would count the first steps most, without bound at t = 0, and
# end with g = (sqrt(5) - 3) / 2 at sigma_rel = 0.3003, beyond which there is none.
NARROWEST, WIDEST = 1e-4, 12**-0.5


def gamma_of(sigma_rel):
    """The exponent g >= 0 of a width: the largest root of g^3 + 7 g^2 + (16 - s) g + (12 - s), s = sigma_rel^-2, which is
    sigma_rel^2 = (g + 1) / ((g + 2)^2 (g + 3)) (equations 123 and 126). Raises ValueError for a width that has none."""
    if not NARROWEST <= sigma_rel <= WIDEST:
        raise ValueError(f"sigma_rel {sigma_rel:g} is not from {NARROWEST:g} to {WIDEST:.7g}")
    s, g = sigma_rel**-2, 1 / sigma_rel  # above the root, since sigma_rel < 1 / (g + 2); the polynomial is convex from there
    for _ in range(100):
        value = ((g + 7) * g + 16 - s) * g + 12 - s
        lower = g - value / ((3 * g + 14) * g + 16 - s)  # Newton: downwards, to the root
        if lower >= g:  # which is as near as numbers come
            break
        g = lower
    return max(g, 0.0)


def decay_at(step, gamma):
    """The decay of the average at a step, counted from 1, whose decay is 0 (equation 127, with the time after the step).

    Then the weights of step k count as the integral of p from k - 1 to k: what is averaged is p itself, and not nearly p.
    """
    return (1 - 1 / step) ** (gamma + 1)
