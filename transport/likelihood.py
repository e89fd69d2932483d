"""Divergence of a velocity field and the density of the noise it flows from."""

import math

import torch


def divergence(velocity, x, probes=None):
    """(v(x), div v(x) (N,)) from one call of velocity.

    probes (K, N, ...): mean over K of e^T (dv/dx) e, the Skilling-Hutchinson estimate, exact in expectation for random
    signs e (Hutchinson, 1990). None: the exact trace, one backward pass for each of x's dimensions. Samples of a batch
    must not influence each other, as in any network in evaluation mode.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        v = velocity(x)
        if not v.requires_grad:  # it does not depend on x
            return v, x.new_zeros(len(x))
        if probes is None:
            trace, flat = x.new_zeros(len(x)), v.flatten(1)
            for i in range(flat.shape[1]):
                (row,) = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)
                trace = trace + row.flatten(1)[:, i]
        else:
            trace = x.new_zeros(len(x))
            for probe in probes:
                (product,) = torch.autograd.grad((v * probe).sum(), x, retain_graph=True)
                trace = trace + (product * probe).flatten(1).sum(1) / len(probes)
    return v.detach(), trace.detach()


def standard_normal_logp(z):
    """log N(z; 0, I) in nats, (N,)."""
    z = z.flatten(1)
    return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))
