"""Samples on one path by a network of another, against the exact network of that other path."""

import pytest
import torch

from gaussian import PATHS, PREDICTIONS, Gaussian, Recorder, coefficients
from transport import Sampler, create_transport
from transport.path import PATHS as PLANS
from transport.path import Plan
from transport.transfer import TransferredTransport

every_pair = pytest.mark.parametrize("own, path", [(own, path) for own in PATHS for path in PATHS if own != path])
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def double(exact):
    exact.mean, exact.std = exact.mean.double(), exact.std.double()
    return exact


def transferred(own, path, prediction):
    return TransferredTransport(create_transport(own, prediction), path)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_knows_the_time_of_its_coefficients(path):
    """In closed form as by halving, and of a pair of any length."""
    plan, t = PLANS[path](), torch.linspace(0.001, 0.999, 201, dtype=torch.float64)
    alpha, sigma = plan.compute_alpha_t(t)[0], plan.compute_sigma_t(t)[0]
    torch.testing.assert_close(plan.time_of(3 * alpha, 3 * sigma), t, rtol=0, atol=1e-12)
    torch.testing.assert_close(Plan.time_of(plan, alpha, sigma), t, rtol=0, atol=1e-12)
    nothing, all_of_it = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert (
        plan.time_of(nothing, all_of_it).item() == pytest.approx(0, abs=1e-15) and plan.time_of(all_of_it, nothing).item() == 1
    )


@pytest.mark.parametrize("path", PATHS)
def test_polar_coordinates_and_their_derivatives(path):
    plan, t = PLANS[path](), torch.linspace(0.02, 0.98, 13, dtype=torch.float64).requires_grad_(True)
    alpha, _, sigma, _ = coefficients(path, t)
    for value, derivative in plan.compute_polar_t(t):
        (expected,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative, expected, rtol=1e-9, atol=1e-12)
    (radius, _), (angle, _) = plan.compute_polar_t(t)
    torch.testing.assert_close((radius * angle.sin(), radius * angle.cos()), (alpha, sigma))


@every_pair
@every_prediction
def test_velocity_and_score_are_those_of_the_other_path(own, path, prediction):
    """At every time of the common interval, also at its ends."""
    transport = transferred(own, path, prediction)
    network, t0, t1 = double(Gaussian(own, prediction)), *transport.ode_interval
    t = torch.tensor([t0, t0 + 1e-3, 0.3, 0.7, t1 - 1e-3], dtype=torch.float64)
    x = torch.randn(5, 2, dtype=torch.float64)
    velocity, score = transport.predict(network, x, t, {})
    torch.testing.assert_close(velocity, double(Gaussian(path, "velocity"))(x, t), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(score, double(Gaussian(path, "score"))(x, t), rtol=1e-7, atol=1e-7)


@every_pair
@every_prediction
def test_the_ode_is_the_networks_own_flow(own, path, prediction):
    """x / c follows it, from and to the times of the ends; at ends that are the network's, with its own states."""
    transport = transferred(own, path, prediction)
    network, z = Recorder(double(Gaussian(own, prediction))), torch.randn(8, 2, dtype=torch.float64)
    t0, t1 = transport.ode_interval
    tight = dict(sampling_method="dopri8", rtol=1e-9, atol=1e-9)
    sample = Sampler(transport).sample_ode(**tight)(z, network)[-1]
    flow, _ = double(Gaussian(path, "velocity")).flow(transport.scale(t0) * z, t0, t1)
    torch.testing.assert_close(sample, flow / transport.scale(t1), rtol=0, atol=1e-6)
    begin, end = create_transport(own, prediction).ode_interval
    assert min(network.times) >= begin and max(network.times) <= end
    back = Sampler(transport).sample_ode(**tight, reverse=True)(sample, network)[-1]
    torch.testing.assert_close(back, z, rtol=0, atol=1e-6)


def test_a_vp_network_on_the_linear_path_gives_its_own_samples():
    """Its interval lies inside of the linear path's, so that both ends are its own."""
    transport, network = transferred("VP", "Linear", "velocity"), double(Gaussian("VP", "velocity"))
    z = torch.randn(8, 2, dtype=torch.float64)
    tight = dict(sampling_method="dopri8", rtol=1e-9, atol=1e-9)
    own = Sampler(create_transport("VP")).sample_ode(**tight)(z, network)[-1]
    there = Sampler(transport).sample_ode(**tight)(z, network)[-1]
    torch.testing.assert_close(there, own, rtol=0, atol=1e-6)
    probes = dict(**tight, exact_divergence=True)
    likelihoods = [Sampler(t).sample_ode_likelihood(**probes)(own, network) for t in (create_transport("VP"), transport)]
    torch.testing.assert_close(likelihoods[1], likelihoods[0], rtol=0, atol=1e-5)


@every_pair
@every_prediction
@pytest.mark.parametrize("last_step", [None, "Mean"])
def test_the_sde_gives_the_data(own, path, prediction, last_step):
    transport, network, z = transferred(own, path, prediction), Recorder(Gaussian(own, prediction)), torch.randn(20_000, 2)
    settings = dict(sampling_method="Multistep", diffusion_form="sigma", num_steps=40, last_step=last_step)
    sample = Sampler(transport).sample_sde(**settings, last_step_size=0.02)(z, network)[-1]
    torch.testing.assert_close(sample.mean(0), network.model.mean, rtol=0, atol=0.06)
    torch.testing.assert_close(sample.std(0), network.model.std, rtol=0.04, atol=0)
    begin, end = create_transport(own, prediction).ode_interval
    assert min(network.times) >= begin - 1e-7 and max(network.times) <= end + 1e-7


@every_pair
@pytest.mark.parametrize("reverse", [False, True])
def test_each_side_of_an_edge_sees_its_own_drift(own, path, reverse):
    """No piece between edges asks the network at a time of another, in float32, whose mapping of times is not exact."""
    edges = [0.11, 0.3, 0.47, 0.7, 0.93]
    transport, asked = transferred(own, path, "velocity"), []
    side = lambda t: (sum(t > edge for edge in edges), sum(t >= edge for edge in edges))  # noqa: E731
    network = lambda x, t: asked.append(t[0].item()) or x * 0  # noqa: E731
    Sampler(transport).sample_ode(sampling_method="dopri5", edges=edges, reverse=reverse)(torch.randn(2, 2), network)
    assert all(above == at for above, at in map(side, asked))  # none on an edge
    sides = [side(t)[0] for t in asked]
    assert sides == sorted(sides, reverse=reverse) and set(sides) == set(range(6))


def test_edges_are_times_of_the_network():
    transport = transferred("Linear", "GVP", "velocity")
    (edge,) = transport.times_of([0.5])
    assert edge == pytest.approx(0.5)  # where alpha = sigma on both
    (edge,) = transport.times_of([0.25])
    assert edge == pytest.approx(2 / torch.pi * torch.tensor(1 / 3).atan().item())


def test_a_last_step_beyond_the_networks_end_is_told():
    with pytest.raises(ValueError, match=r"network ends at t = 0\.9896.*last_step_size of 0\.011"):
        transferred("VP", "Linear", "velocity").sde_interval("sigma", 0.001)


def test_what_is_learnt_stays_the_networks():
    own, x1 = create_transport("VP", "noise"), torch.randn(16, 2)
    losses = []
    for transport in (own, TransferredTransport(own, "Linear")):
        torch.manual_seed(0)
        losses.append(transport.training_losses(lambda x, t: x, x1)["loss"])
    assert torch.equal(*losses)
