import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gaussian import PATHS, coefficients
from transport import DIFFUSION_FORMS, GVPCPlan, ICPlan, VPCPlan

REFERENCE = np.load(Path(__file__).parents[1] / "data" / "reference.npz")
PLANS = dict(zip(PATHS, (ICPlan(), GVPCPlan(), VPCPlan())))
TIMES = torch.linspace(0.02, 0.98, 13)

every_path = pytest.mark.parametrize("path", PATHS)


@pytest.mark.parametrize("path", ["Linear", "VP"])
def test_agrees_with_the_published_code(path):
    plan, rng = PLANS[path], np.random.default_rng(3)
    x0, x1, v = (torch.from_numpy(rng.standard_normal((13, 2, 3, 3))).float() for _ in range(3))

    def check(name, ours, tolerance=1e-5):
        theirs = torch.from_numpy(REFERENCE[f"path/{path}/{name}"])
        ours = ours.reshape(13, 1, 1, 1) if theirs.dim() == 4 and ours.numel() == 13 else ours
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())

    check("coef", torch.stack([*plan.compute_alpha_t(TIMES), *plan.compute_sigma_t(TIMES)]))
    t, xt, ut = plan.plan(TIMES, x0, x1)
    assert t is TIMES
    check("xt", xt)
    check("ut", ut)
    drift, drift_var = plan.compute_drift(xt, t)
    check("drift", drift)
    check("drift_var", drift_var)
    check("score", plan.get_score_from_velocity(v, xt, t), 1e-3)
    check("noise", plan.get_noise_from_velocity(v, xt, t))
    check("velocity", plan.get_velocity_from_score(v, xt, t))
    for form in DIFFUSION_FORMS.keys() - {"KL"}:  # which has another name there
        check(f"w/{form}", plan.compute_diffusion(xt, t, form, 1.7))


@every_path
def test_coefficients_and_their_derivatives(path):
    plan, t = PLANS[path], TIMES.double().requires_grad_(True)
    alpha, d_alpha = plan.compute_alpha_t(t)
    sigma, d_sigma = plan.compute_sigma_t(t)
    expected_alpha, _, expected_sigma, _ = coefficients(path, t)
    torch.testing.assert_close(alpha, expected_alpha)
    torch.testing.assert_close(sigma, expected_sigma)
    torch.testing.assert_close(d_alpha, torch.autograd.grad(alpha.sum(), t, retain_graph=True)[0])
    torch.testing.assert_close(d_sigma, torch.autograd.grad(sigma.sum(), t, retain_graph=True)[0])
    torch.testing.assert_close(plan.compute_d_alpha_alpha_ratio_t(t), d_alpha / alpha)


@every_path
def test_a_path_runs_from_noise_to_data(path):
    x0, x1 = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    xt = PLANS[path].plan(torch.tensor([0.0, 1.0]), x0, x1)[1]
    torch.testing.assert_close(xt[0], x0[0], rtol=0, atol=0.03)  # VP keeps 0.7% of the data
    torch.testing.assert_close(xt[1], x1[1], rtol=0, atol=1e-6)


@every_path
def test_conversions_recover_what_the_path_was_made_of(path):
    plan, t = PLANS[path], TIMES.double()
    x0, x1 = torch.randn(2, 13, 2, 3, 3, dtype=torch.float64)
    _, x, v = plan.plan(t, x0, x1)
    score = -x0 / coefficients(path, t)[2].reshape(13, 1, 1, 1)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)  # noqa: E731
    close(plan.get_noise_from_velocity(v, x, t), x0)
    close(plan.get_data_from_velocity(v, x, t), x1)
    close(plan.get_score_from_velocity(v, x, t), score)
    close(plan.get_velocity_from_noise(x0, x, t), v)
    close(plan.get_velocity_from_score(score, x, t), v)


@every_path
def test_drift_is_the_part_of_the_velocity_without_the_score(path):
    plan, t, x = PLANS[path], TIMES.double(), torch.randn(13, 5, dtype=torch.float64)
    alpha, d_alpha, sigma, sigma_d_sigma = coefficients(path, t[:, None])
    drift, g = plan.compute_drift(x, t)
    torch.testing.assert_close(drift, -d_alpha / alpha * x)
    torch.testing.assert_close(g, d_alpha / alpha * sigma**2 - sigma_d_sigma)


@pytest.mark.parametrize("path, ends", [("Linear", (0.0, 1.0)), ("GVP", (0.0, 1.0)), ("VP", (0.0, 0.99999))])
def test_noise_and_data_from_velocity_are_accurate_at_the_ends(path, ends):
    plan, t, x, v = PLANS[path], torch.tensor(ends), torch.randn(2, 6), torch.randn(2, 6)
    for convert in (plan.get_noise_from_velocity, plan.get_data_from_velocity):
        accurate = convert(v.double(), x.double(), t.double()).float()
        torch.testing.assert_close(convert(v, x, t), accurate, rtol=1e-5, atol=1e-5)


def test_vp_sigma_is_accurate_next_to_the_data():
    t = torch.tensor([1 - 1e-5])
    sigma, d_sigma = VPCPlan().compute_sigma_t(t)
    exact_sigma, exact_d_sigma = VPCPlan().compute_sigma_t(t.double())
    h = 1 - t.double()  # sigma^2 = 0.1 h to first order
    torch.testing.assert_close(exact_sigma, (0.1 * h).sqrt(), rtol=1e-3, atol=0)
    torch.testing.assert_close(sigma.double(), exact_sigma, rtol=1e-6, atol=0)
    torch.testing.assert_close(d_sigma.double(), exact_d_sigma, rtol=1e-6, atol=0)


@every_path
def test_diffusion_forms(path):
    plan, t, x, n = PLANS[path], TIMES.double(), torch.randn(13, 2, 3, 3), 1.7
    alpha, d_alpha, sigma, sigma_d_sigma = coefficients(path, t)
    expected = {
        "constant": torch.full_like(t, n),
        "SBDM": n * (d_alpha / alpha * sigma**2 - sigma_d_sigma),
        "sigma": n * sigma,
        "linear": n * (1 - t),
        "decreasing": (n * torch.cos(math.pi * t) + 1) ** 2 / 4,
        "increasing-decreasing": n * torch.sin(math.pi * t) ** 2,
    }
    expected["KL"] = expected["SBDM"]  # the bound's best, without a penalty
    assert set(expected) == set(DIFFUSION_FORMS)
    for form, value in expected.items():
        diffusion = plan.compute_diffusion(x, t, form, n)
        assert diffusion.dim() == 4
        torch.testing.assert_close(diffusion.expand(x.shape), value.reshape(13, 1, 1, 1).expand(x.shape))


def test_unknown_diffusion_form():
    with pytest.raises(ValueError, match="quadratic"):
        ICPlan().compute_diffusion(torch.randn(13, 2), TIMES, form="quadratic")


@every_path
def test_times_may_come_already_broadcast(path):
    plan, x, v, wide = PLANS[path], torch.randn(13, 2, 3, 3), torch.randn(13, 2, 3, 3), TIMES.reshape(13, 1, 1, 1)
    torch.testing.assert_close(plan.plan(TIMES, v, x)[1:], plan.plan(wide, v, x)[1:])
    for convert in (
        plan.get_noise_from_velocity,
        plan.get_data_from_velocity,
        plan.get_score_from_velocity,
        plan.get_velocity_from_noise,
        plan.get_velocity_from_score,
    ):
        torch.testing.assert_close(convert(v, x, TIMES), convert(v, x, wide))
    torch.testing.assert_close(plan.compute_drift(x, TIMES), plan.compute_drift(x, wide))
    for form in DIFFUSION_FORMS:
        torch.testing.assert_close(plan.compute_diffusion(x, TIMES, form), plan.compute_diffusion(x, wide, form))
