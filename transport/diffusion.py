"""Forms of the diffusion coefficient D(t) of dX = (v + D score) dt + sqrt(2 D) dW, SiT's table 2.

The paper writes w = 2 D (SiT eq. 5). Each form is a function of the plan, the times t and the factor norm, and
returns values of t's shape.
"""

import math


def constant(plan, t, norm):
    return t.new_full(t.shape, norm)


def sbdm(plan, t, norm):
    """g of the plan's drift: the noising process of score-based diffusion, run backwards."""
    return norm * plan.compute_g_t(t)


def sigma(plan, t, norm):
    return norm * plan.compute_sigma_t(t)[0]


def linear(plan, t, norm):
    return norm * (1 - t)


def decreasing(plan, t, norm):
    return 0.25 * (norm * (math.pi * t).cos() + 1) ** 2


def increasing_decreasing(plan, t, norm):
    return norm * (math.pi * t).sin() ** 2


# --diffusion-form: a new form is a function and a line here.
DIFFUSION_FORMS = {
    "constant": constant,
    "SBDM": sbdm,
    "sigma": sigma,
    "linear": linear,
    "decreasing": decreasing,
    "increasing-decreasing": increasing_decreasing,
}
