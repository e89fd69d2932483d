"""Forms of the diffusion coefficient D(t) of dX = (v + D score) dt + sqrt(2 D) dW, SiT's table 2.

The paper writes w = 2 D (SiT eq. 5). Each form is a function of the plan, the times t and the factor norm, and
returns values of t's shape.
"""

import math
from dataclasses import dataclass


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


@dataclass(frozen=True)
class PenalisedKL:
    """D that minimises the bound on KL(data, samples) plus eta w, w = 2 D (SiT, section 3.4, w^{KL, eta}).

    An error of the velocity, of mean square L(t), becomes one of 1 + D/g times itself in the SDE's drift, so that the bound is
    the integral of (1 + D/g)^2 L / (4 D), and D = g sqrt(L / (L + 8 eta g^2)); it stays finite where g does not. loss(t) is
    L(t), a mean over dimensions, as the loss of training is: of their sum the same D has that many times the eta.
    """

    eta: float
    loss: object

    def __str__(self):
        return f"KL with eta {self.eta:g}"

    def __call__(self, plan, t, norm):
        alpha, (noise, _), loss = plan.compute_alpha_t(t)[0], plan.compute_sigma_t(t), self.loss(t)
        one_over_g = alpha / (noise * plan.compute_determinant_t(t))
        return norm * (loss / (loss * one_over_g**2 + 8 * self.eta)).sqrt()


# --diffusion-form: a new form is a function and a line here. Without a penalty, the bound's best D is SBDM's (PenalisedKL).
DIFFUSION_FORMS = {
    "constant": constant,
    "SBDM": sbdm,
    "sigma": sigma,
    "linear": linear,
    "decreasing": decreasing,
    "increasing-decreasing": increasing_decreasing,
    "KL": sbdm,
}
