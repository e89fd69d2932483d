import itertools
import math

import pytest
import torch

from gaussian import PATHS, PREDICTIONS, Gaussian, Recorder
from transport import ODE_METHODS, Sampler, create_transport
from transport.likelihood import divergence, standard_normal_logp

every_path = pytest.mark.parametrize("path", PATHS)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def likelihood(path="Linear", prediction="velocity", **settings):
    return Sampler(create_transport(path, prediction)).sample_ode_likelihood(**settings)


def normal_logp(x, mean, std):
    return (-0.5 * ((x - mean) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)).sum(1)


@every_path
@every_prediction
def test_gaussian_data(path, prediction):
    exact = Gaussian(path, prediction)
    x = exact.mean + exact.std * torch.randn(16, 2)
    logp, z = likelihood(path, prediction, exact_divergence=True, atol=1e-6, rtol=1e-5)(x, exact)
    t0, t1 = create_transport(path, prediction).ode_interval
    flow, log_stretch = exact.flow(x, t1, t0)
    torch.testing.assert_close(z, flow, rtol=0, atol=1e-3)
    torch.testing.assert_close(logp, normal_logp(flow, torch.zeros(2), torch.ones(2)) + log_stretch.sum(), rtol=0, atol=2e-3)
    torch.testing.assert_close(logp, normal_logp(x, exact.mean, exact.std), rtol=0, atol=0.05)  # the ends left out do not show


@pytest.mark.parametrize("solver", ["dopri5", "rk4", "scipy_solver"])
def test_one_probe_is_exact_where_no_dimension_moves_another(solver):
    exact = Gaussian("VP", "score")
    x = exact.mean + exact.std * torch.randn(16, 2)
    settings = dict(sampling_method=solver, num_steps=50, atol=1e-6, rtol=1e-5)
    estimate, _ = likelihood("VP", "score", **settings)(x, exact)
    expected, _ = likelihood("VP", "score", **settings, exact_divergence=True)(x, exact)
    torch.testing.assert_close(estimate, expected, rtol=0, atol=1e-3)


def test_divergence_is_exact_for_a_nonlinear_field():
    weight, x = torch.randn(6, 6), torch.randn(5, 2, 3)

    def velocity(x):
        return torch.tanh(x.flatten(1) @ weight.T).view_as(x)

    v, trace = divergence(velocity, x)
    torch.testing.assert_close(v, velocity(x))
    assert not v.requires_grad
    assert not trace.requires_grad
    expected = [torch.autograd.functional.jacobian(velocity, one[None]).reshape(6, 6).trace() for one in x]
    torch.testing.assert_close(trace, torch.stack(expected))


@pytest.mark.parametrize("num_probes", [1, 4])
def test_probes_are_unbiased_and_more_of_them_better(num_probes):
    """Var e^T A e = sum of (a_ij + a_ji)^2 over i < j for random signs e."""
    matrix, x = torch.randn(5, 5), torch.randn(4000, 5)
    network = lambda x, t: x @ matrix.T  # noqa: E731
    settings = dict(sampling_method="euler", num_steps=2, num_probes=num_probes)
    logp, z = likelihood(**settings)(x, network)
    estimate = standard_normal_logp(z) - logp  # one step of length 1 back in time: the divergence itself
    std = ((matrix + matrix.T).triu(1).square().sum() / num_probes).sqrt().item()
    assert estimate.mean().item() == pytest.approx(matrix.trace().item(), abs=4 * std / math.sqrt(4000))
    assert estimate.std().item() == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize("num_probes", [1, 3])
def test_probes_are_fixed_for_the_whole_solve(num_probes):
    drawn = []

    def rademacher(x, n):
        drawn.append(torch.randint(0, 2, (n, *x.shape)).float() * 2 - 1)
        return drawn[-1]

    matrix, x = torch.randn(3, 3), torch.randn(7, 3)
    settings = dict(sampling_method="euler", num_steps=11, num_probes=num_probes, rademacher=rademacher)
    logp, z = likelihood(**settings)(x, lambda x, t: t[:, None] * (x @ matrix.T))
    (probes,) = drawn
    assert probes.shape == (num_probes, 7, 3)
    quadratic = torch.einsum("kni,ij,knj->kn", probes, matrix, probes).mean(0)
    time = 0.1 * sum(k / 10 for k in range(1, 11))  # Euler's sum of t dt, from 1 down
    torch.testing.assert_close(logp, standard_normal_logp(z) - time * quadratic, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [dict(num_probes=3), dict(exact_divergence=True)])
def test_one_network_call_per_evaluation(settings):
    network = Recorder(Gaussian("Linear", "noise"))
    likelihood("Linear", "noise", sampling_method="heun", num_steps=11, **settings)(torch.randn(4, 2), network)
    assert len(network.times) == 10 * 2
    assert network.times[0] == pytest.approx(0.999)
    assert network.times[-1] == pytest.approx(0.001, abs=1e-6)


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_encoding_is_that_of_reverse_sampling(solver):
    exact, x = Gaussian("GVP", "noise"), torch.randn(8, 2)
    settings = dict(sampling_method=solver, num_steps=50, atol=1e-7, rtol=1e-6)
    _, z = likelihood("GVP", "noise", **settings)(x, exact)
    expected = Sampler(create_transport("GVP", "noise")).sample_ode(**settings, reverse=True)(x, exact)[-1]
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_gradients_on_or_off_outside_change_nothing(grad):
    weight = torch.full((1,), 0.5, requires_grad=True)
    x = torch.randn(4, 3)
    with torch.set_grad_enabled(grad):
        logp, z = likelihood(atol=1e-7, rtol=1e-6)(x, lambda x, t: weight * x)
        assert torch.is_grad_enabled() == grad
    assert not logp.requires_grad
    assert not z.requires_grad
    torch.testing.assert_close(z, x * math.exp(-0.5), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logp, standard_normal_logp(z) - 1.5, rtol=1e-4, atol=1e-4)


def test_images_and_model_kwargs():
    x = torch.randn(4, 3, 2, 2)
    settings = dict(exact_divergence=True, atol=1e-7, rtol=1e-6)
    logp, z = likelihood(**settings)(x, lambda x, t, y: y.reshape(-1, 1, 1, 1) * x, y=torch.tensor([0.0, 0.5, 1.0, 2.0]))
    torch.testing.assert_close(logp, standard_normal_logp(z) - 12 * torch.tensor([0.0, 0.5, 1.0, 2.0]), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(standard_normal_logp(z), normal_logp(z.flatten(1), torch.zeros(12), torch.ones(12)))


def test_edges():
    """The growth rate jumps from 1 to 3 at t = 0.5: the log-density loses 2 a dimension."""
    x = torch.randn(4, 3)
    network = Recorder(lambda x, t: torch.where(t < 0.5, 1.0, 3.0)[:, None] * x)
    logp, z = likelihood(edges=(0.5,), atol=1e-7, rtol=1e-6)(x, network)
    torch.testing.assert_close(z, x * math.exp(-2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logp, standard_normal_logp(z) - 3 * 2, rtol=1e-4, atol=1e-4)
    beside = {t for t in network.times if abs(t - 0.5) < 1e-6}
    assert min(beside) < 0.5 < max(beside)  # asked just before the edge and just after it, never on it
    assert 0.5 not in beside


@pytest.mark.parametrize("settings", [dict(num_probes=0), dict(sampling_method="rk5"), dict(num_steps=1)])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=str(*settings.values())):
        likelihood(**settings)


def test_a_solver_of_ones_own_scores_too(monkeypatch):
    """It sees a single tensor, in which the log-density travels with the state."""

    def euler(drift, x, times, plan):
        for t, following in itertools.pairwise(times):
            x = x + (following - t) * drift(t, x)
            yield x

    monkeypatch.setitem(ODE_METHODS, "own", euler)
    exact, x = Gaussian("GVP", "velocity"), torch.randn(5, 2)
    for settings in (dict(exact_divergence=True), dict(num_probes=1, rademacher=lambda x, n: torch.ones(n, *x.shape))):
        ours, z = likelihood("GVP", "velocity", sampling_method="own", num_steps=20, **settings)(x, exact)
        theirs, z2 = likelihood("GVP", "velocity", sampling_method="euler", num_steps=20, **settings)(x, exact)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(z, z2)
