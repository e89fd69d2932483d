"""The forms of D(t) that have an argument: the minimum of the paper's bound, found by trying."""

import math

import pytest
import torch

from gaussian import PATHS
from transport import Sampler, create_transport
from transport.diffusion import PenalisedKL
from transport.path import PATHS as PLANS

every_path = pytest.mark.parametrize("path", PATHS)


@every_path
def test_an_error_of_the_velocity_is_one_of_the_drift(path):
    """(1 + D/g) times itself, which the bound is made of."""
    plan, t = PLANS[path](), torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    x, v, error = torch.randn(3, 9, 2, dtype=torch.float64)
    diffusion = 0.7
    drifts = [velocity + diffusion * plan.get_score_from_velocity(velocity, x, t) for velocity in (v, v + error)]
    _, g = plan.compute_drift(x, t)
    torch.testing.assert_close(drifts[1] - drifts[0], (1 + diffusion / g) * error)


@every_path
@pytest.mark.parametrize("eta", [1e-3, 0.02, 1.0])
def test_it_minimises_the_penalised_bound(path, eta):
    """(1 + D/g)^2 L / (4 D) + 2 eta D, by trying 200,000 D at each time."""
    plan, t = PLANS[path](), torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    loss = lambda t: 0.3 + 0.5 * torch.sin(3 * t) ** 2  # noqa: E731
    g = plan.compute_g_t(t)
    tried = torch.logspace(-6, 4, 200_000, dtype=torch.float64)[:, None]
    bound = (1 + tried / g) ** 2 * loss(t) / (4 * tried) + 2 * eta * tried
    best = tried[bound.argmin(0), 0]
    torch.testing.assert_close(PenalisedKL(eta, loss)(plan, t, 1.0), best, rtol=2e-4, atol=0)


@every_path
def test_without_a_penalty_it_is_sbdm(path):
    plan, t = PLANS[path](), torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    torch.testing.assert_close(PenalisedKL(1e-14, torch.ones_like)(plan, t, 1.3), plan.compute_diffusion(t, t, "SBDM", 1.3))
    assert torch.equal(plan.compute_diffusion(t, t, "KL", 1.3), plan.compute_diffusion(t, t, "SBDM", 1.3))


@pytest.mark.parametrize("path", ["Linear", "GVP"])
def test_it_is_finite_at_both_ends(path):
    """sqrt(L / (8 eta)) at t = 0, where SBDM's is not; so the SDE starts there."""
    ends = PenalisedKL(0.02, lambda t: 0 * t + 0.5)(PLANS[path](), torch.tensor([0.0, 1.0]), 2.0)
    assert ends.tolist() == pytest.approx([2 * math.sqrt(0.5 / 0.16), 0.0], abs=1e-6)
    transport = create_transport(path)
    assert transport.sde_interval(PenalisedKL(0.02, torch.ones_like), 0.04)[0] == 0
    assert transport.sde_interval("KL", 0.04)[0] > 0


@every_path
def test_the_sde_has_it(path):
    """Of one Gaussian, whose marginals any D keeps."""
    from gaussian import Gaussian

    exact, z = Gaussian(path, "velocity"), torch.randn(20_000, 2)
    settings = dict(sampling_method="Multistep", num_steps=60, last_step_size=0.01)
    form = PenalisedKL(0.05, lambda t: 0 * t + 0.5)
    sample = Sampler(create_transport(path)).sample_sde(diffusion_form=form, **settings)(z, exact)[-1]
    torch.testing.assert_close(sample.mean(0), exact.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(sample.std(0), exact.std, rtol=0.03, atol=0)
