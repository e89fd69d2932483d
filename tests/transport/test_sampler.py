import itertools
import math

import pytest
import torch

from gaussian import PATHS, PREDICTIONS, Gaussian, Recorder
from transport import DIFFUSION_FORMS, LAST_STEPS, ODE_METHODS, SDE_METHODS, Sampler, SolverError, create_transport

ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")
# Network calls of one step of each fixed solver but the Adams ones, which start with Runge-Kutta steps.
CALLS = {"euler": 1, "midpoint": 2, "heun": 2, "heun2": 2, "heun3": 3, "rk4": 4}

every_path = pytest.mark.parametrize("path", PATHS)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
every_solver = pytest.mark.parametrize("solver", ODE_METHODS)


def ode(path, prediction="velocity", sample_eps=None, **settings):
    return Sampler(create_transport(path, prediction, sample_eps=sample_eps)).sample_ode(**settings)


def sde(path, prediction="velocity", sample_eps=None, **settings):
    return Sampler(create_transport(path, prediction, sample_eps=sample_eps)).sample_sde(**settings)


def close(actual, expected, atol, rtol=0.0):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


# ODE


def test_every_solver_is_there():
    published = "dopri8 dopri5 bosh3 fehlberg2 adaptive_heun euler midpoint heun2 heun3 rk4 explicit_adams implicit_adams"
    assert set(ODE_METHODS) == {*published.split(), "scipy_solver", "heun", "multistep"}


@every_path
@every_prediction
@every_solver
def test_ode_follows_the_flow(path, prediction, solver):
    exact, z = Gaussian(path, prediction), torch.randn(8, 2)
    settings = dict(sampling_method=solver, num_steps=100, atol=1e-5, rtol=1e-4)
    sample = ode(path, prediction, **settings)(z, exact)[-1]
    t0, t1 = create_transport(path, prediction).ode_interval
    flow, _ = exact.flow(z, t0, t1)
    close(sample, flow, atol=0.06 if solver == "euler" else 0.02)
    close(sample, exact.mean + exact.std * z, atol=0.06)  # the ends that are left out do not show
    close(ode(path, prediction, **settings, reverse=True)(flow, exact)[-1], z, atol=0.1 if solver == "euler" else 0.02)


@pytest.mark.parametrize(
    "solver, order", [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4), ("multistep", 2)]
)
@pytest.mark.parametrize("reverse", [False, True])
def test_order_of_convergence(solver, order, reverse):
    exact, x = Gaussian("GVP", "velocity"), torch.randn(8, 2, dtype=torch.float64)
    flow, _ = exact.flow(x, *((1.0, 0.0) if reverse else (0.0, 1.0)))
    errors = []
    for num_steps in (17, 33):  # 16 and 32 steps
        out = ode("GVP", sampling_method=solver, num_steps=num_steps, reverse=reverse)(x, exact)[-1]
        errors.append((out - flow).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_error_falls_with_the_tolerance(solver):
    exact, z = Gaussian("GVP", "velocity"), torch.randn(8, 2, dtype=torch.float64)
    flow, _ = exact.flow(z, 0.0, 1.0)
    errors = [
        (ode("GVP", sampling_method=solver, rtol=tol, atol=tol)(z, exact)[-1] - flow).abs().max() for tol in (1e-3, 1e-5, 1e-7)
    ]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[2] < 1e-4


@every_path
@every_prediction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reverse_then_forward_returns_the_start(path, prediction, dtype):
    exact, x = Gaussian(path, prediction), torch.randn(8, 2, dtype=dtype)
    for settings in (dict(sampling_method="rk4", num_steps=100), dict(atol=1e-7, rtol=1e-6)):
        z = ode(path, prediction, **settings, reverse=True)(x, exact)[-1]
        close(ode(path, prediction, **settings)(z, exact)[-1], x, atol=1e-3)


@every_solver
@every_path
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("speed", [1.0, 1e-4])
def test_ode_never_asks_outside_the_interval(solver, path, reverse, speed):
    """Far states that hardly move tempt a solver's first probing step, 0.01 |x| / |v|, beyond the end."""
    network = Recorder(lambda x, t: speed * torch.sin(5 * t)[:, None].expand_as(x))
    x = torch.randn(4, 2) / speed
    ode(path, sample_eps=0.1, sampling_method=solver, num_steps=20, reverse=reverse)(x, network)
    t0, t1 = create_transport(path, sample_eps=0.1).ode_interval
    assert t0 - 1e-6 <= min(network.times)
    assert max(network.times) <= t1 + 1e-6
    assert network.times[0] == pytest.approx(t1 if reverse else t0)


@pytest.mark.parametrize("solver, calls", CALLS.items())
def test_fixed_solvers_take_one_step_less_than_points(solver, calls):
    network = Recorder(Gaussian("Linear", "velocity"))
    ode("Linear", sampling_method=solver, num_steps=11)(torch.randn(4, 2), network)
    assert len(network.times) == 10 * calls
    close(torch.tensor(network.times[::calls]), torch.linspace(0, 1, 11)[:-1], atol=1e-6)


@every_solver
@pytest.mark.parametrize("reverse", [False, True])
def test_ode_trajectory(solver, reverse):
    exact, z = Gaussian("VP", "noise"), torch.randn(8, 2)
    settings = dict(sampling_method=solver, num_steps=60, atol=1e-5, rtol=1e-4, reverse=reverse)
    states = ode("VP", "noise", **settings, trajectory=True)(z, exact)
    t0, t1 = (0.999, 0.0) if reverse else (0.0, 0.999)
    assert len(states) == 60
    assert torch.equal(states[0], z)
    for state, t in list(zip(states, torch.linspace(t0, t1, 60).tolist()))[::10]:
        close(state, exact.flow(z, t0, t)[0], atol=0.3 if solver == "euler" else 0.02)
    (plain,) = ode("VP", "noise", **settings)(z, exact)
    close(states[-1], plain, atol=0.01 if solver in ADAPTIVE else 1e-6)


@every_solver
def test_ode_keeps_no_state_on_the_way(solver):
    z = torch.randn(64, 2)
    (sample,) = ode("Linear", sampling_method=solver, num_steps=50)(z, Gaussian("Linear", "velocity"))
    assert sample.untyped_storage().nbytes() <= 2 * z.untyped_storage().nbytes()


def jumping(x, t):
    """Velocity 2 within [0.3, 0.7] and -1 outside: 0.2 over the whole of [0, 1]."""
    within = (t >= 0.3) & (t <= 0.7)
    return torch.where(within, 2.0, -1.0)[:, None].expand_as(x)


@pytest.mark.parametrize("solver", ADAPTIVE)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges_make_a_jumping_drift_exact_and_cheap(solver, reverse, dtype):
    x, with_edges, without = torch.randn(4, 2, dtype=dtype), Recorder(jumping), Recorder(jumping)
    settings = dict(sampling_method=solver, rtol=1e-5, atol=1e-5, reverse=reverse)
    out = ode("Linear", **settings, edges=(0.7, 0.3))(x, with_edges)[-1]
    close(out, x - 0.2 if reverse else x + 0.2, atol=1e-5)
    ode("Linear", **settings)(x, without)
    if solver in ("dopri8", "dopri5", "bosh3"):  # the others may step over a jump and not see it
        assert len(with_edges.times) < len(without.times)


@pytest.mark.parametrize("reverse", [False, True])
def test_trajectory_has_the_points_that_are_edges_too(reverse):
    network = lambda x, t: torch.where(t < 0.5, 1.0, 3.0)[:, None].expand_as(x)  # noqa: E731
    states = ode("Linear", num_steps=5, edges=(0.5,), trajectory=True, reverse=reverse)(torch.zeros(1, 2), network)
    expected = [0.0, -0.75, -1.5, -1.75, -2.0] if reverse else [0.0, 0.25, 0.5, 1.25, 2.0]
    close(torch.stack(states)[:, 0, 0], torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("edges", [(0.5, 0.5), (0.0, 1.0), (-0.5, 1.5)])
def test_edges_may_coincide_or_lie_outside(edges):
    exact, z = Gaussian("Linear", "velocity"), torch.randn(4, 2)
    sample = ode("Linear", edges=edges, rtol=1e-5, atol=1e-5)(z, exact)[-1]
    close(sample, exact.flow(z, 0.0, 1.0)[0], atol=1e-3)


# SDE


def moments(sampler, exact, num_steps, start=1.0):
    """Mean and standard deviation of the samples, without chance.

    A Gaussian's SDE is linear, so its result is a constant plus the sum of its responses to every normal draw. Row k of
    the batch sees the draw of step k alone, the last but one row that of z, of standard deviation start, and the last none.
    """
    step = itertools.count()

    def randn(x):
        noise = torch.zeros_like(x)
        noise[next(step)] = 1
        return noise

    z = torch.zeros(num_steps + 1, 2, dtype=exact.mean.dtype)
    z[-2] = start
    out = sampler(randn=randn, num_steps=num_steps)(z, exact)[-1]
    assert next(step) == num_steps - 1
    return out[-1], (out[:-1] - out[-1]).square().sum(0).sqrt()


@every_path
@every_prediction
@pytest.mark.parametrize("method", SDE_METHODS)
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_sde_recovers_the_data(path, prediction, method, form, last_step):
    settings = dict(sampling_method=method, diffusion_form=form, last_step=last_step, last_step_size=0.004)
    exact = Gaussian(path, prediction)
    mean, std = moments(lambda **more: sde(path, prediction, **settings, **more), exact, num_steps=250)
    close(mean, exact.mean, atol=0.01)
    # D = 1 to the end: the Mean step's drift contracts and no noise makes up for it.
    close(std, exact.std, atol=0, rtol=0.03 if form == "constant" else 0.006)


def test_sde_with_its_own_noise():
    exact, z = Gaussian("GVP", "score"), torch.randn(20_000, 2)
    sample = sde("GVP", "score", num_steps=100)(z, exact)[-1]
    close(sample.mean(0), exact.mean, atol=0.05)
    close(sample.std(0), exact.std, atol=0.05)
    assert torch.corrcoef(torch.stack([z[:, 0], sample[:, 0]]))[0, 1].abs() < 0.05  # SBDM forgets where it began


@pytest.mark.parametrize("method", ["Euler", "Heun"])
def test_sde_error_halves_with_the_step(method):
    """Weak order 1, seen in the standard deviation."""
    exact, errors = Gaussian("VP", "velocity"), []
    settings = dict(sampling_method=method, diffusion_form="constant", last_step=None, sample_eps=0.1)
    for num_steps in (41, 81):
        _, std = moments(lambda **more: sde("VP", **settings, **more), exact, num_steps)
        errors.append((std - exact.marginal(torch.tensor(0.9))[1].sqrt()).abs())
    close(errors[0] / errors[1], torch.tensor([2.0, 2.0]), atol=0.2)


@every_path
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
def test_multistep_sde_has_weak_order_2(path, form):
    """Seen in the standard deviation, in float64, from the right one at the start."""
    exact, errors = Gaussian(path, "velocity"), []
    exact.mean, exact.std = exact.mean.double(), exact.std.double()
    t0, t1 = create_transport(path, sample_eps=0.1).sde_interval(form, 0)
    begin, end = (exact.marginal(torch.tensor(t, dtype=torch.float64))[1].sqrt() for t in (t0, t1))
    settings = dict(sample_eps=0.1, sampling_method="Multistep", diffusion_form=form, last_step=None)
    for num_steps in (161, 321):
        _, std = moments(lambda **more: sde(path, **settings, **more), exact, num_steps, begin)
        errors.append((std - end).norm())
    assert math.log2(errors[0] / errors[1]) > 1.5  # 1 for Euler and Heun; nearly 2 but where the SDE is stiff


@every_path
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
def test_multistep_sde_is_exact_for_one_data_point(path, form):
    """Four steps to t1 give alpha x1 + sigma n, n standard normal."""
    exact = Gaussian(path, "velocity", mean=(0.5, -1.0), std=(0.0, 0.0))
    settings = dict(sampling_method="Multistep", diffusion_form=form, last_step=None)
    t0, t1 = create_transport(path, sample_eps=0.1).sde_interval(form, 0)
    begin = exact.marginal(torch.tensor(t0))[1].sqrt()
    _, std = moments(lambda **more: sde(path, sample_eps=0.1, **settings, **more), exact, 5, begin)
    expected = exact.marginal(torch.tensor(t1))[1].sqrt()
    close(std, expected, atol=1e-4)


@pytest.mark.parametrize("method, solver", [("Euler", "euler"), ("Heun", "heun")])
def test_sde_without_diffusion_is_the_ode(method, solver):
    exact, z = Gaussian("GVP", "noise"), torch.randn(8, 2)
    settings = dict(num_steps=50, sampling_method=method, diffusion_norm=0.0, diffusion_form="sigma", last_step=None)
    expected = ode("GVP", "noise", num_steps=50, sampling_method=solver)(z, exact)[-1]
    close(sde("GVP", "noise", **settings)(z, exact)[-1], expected, atol=1e-5)


@pytest.mark.parametrize("method", ["Euler", "Heun"])
@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_sde_steps_by_hand(method, last_step):
    """Two steps of 0.4 on the linear path from t = 0.1, then the last one from t = 0.9 with h = 0.1. D = 3 sigma."""
    x, noise = torch.randn(5, 2), torch.randn(2, 5, 2)

    def v(x, t):
        return torch.sin(3 * x + t)

    def drift(x, t):  # score = -(x - t v) / (1 - t)
        return v(x, t) + 3 * (1 - t) * -(x - t * v(x, t)) / (1 - t)

    draws = iter(noise)
    settings = dict(sampling_method=method, diffusion_form="sigma", diffusion_norm=3.0, last_step=last_step)
    sampler = sde("Linear", sample_eps=0.1, **settings, last_step_size=0.1, num_steps=3, randn=lambda x: next(draws))
    out = sampler(x, lambda x, t: v(x, t[:, None]))[-1]

    dt = 0.4
    for t, n in zip((0.1, 0.5), noise):
        jump = math.sqrt(2 * 3 * (1 - t) * dt) * n
        if method == "Euler":
            x = x + drift(x, t) * dt + jump
        else:
            x = x + jump
            k1 = drift(x, t)
            x = x + (k1 + drift(x + dt * k1, t + dt)) / 2 * dt
    x = {
        "None": x,
        "Mean": x + 0.1 * drift(x, 0.9),
        "Euler": x + 0.1 * v(x, 0.9),
        "Tweedie": x + 0.1 * v(x, 0.9),  # E[x1 | x] = x + (1 - t) v, the same on this path as h = 1 - t
    }[last_step]
    close(out, x, atol=1e-4)


@pytest.mark.parametrize("method, calls", [("Euler", 1), ("Heun", 2), ("Multistep", 1)])
@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_sde_makes_one_network_call_per_drift(method, calls, last_step):
    network = Recorder(Gaussian("VP", "noise"))
    sde("VP", "noise", sampling_method=method, last_step=last_step, num_steps=11)(torch.randn(4, 2), network)
    assert len(network.times) == 10 * calls + (last_step != "None")
    assert network.times[0] == 0
    if last_step != "None":
        assert network.times[-1] == pytest.approx(0.96)


@every_path
@every_prediction
@pytest.mark.parametrize("method", SDE_METHODS)
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize("last_step", [None, "Mean"])
def test_sde_never_asks_outside_the_interval(path, prediction, method, form, last_step):
    network = Recorder(Gaussian(path, prediction))
    transport = create_transport(path, prediction)
    settings = dict(sampling_method=method, diffusion_form=form, last_step=last_step)
    Sampler(transport).sample_sde(**settings, num_steps=11)(torch.randn(4, 2), network)
    t0, t1 = transport.sde_interval(form, 0.04 if last_step else 0)
    assert min(network.times) == pytest.approx(t0)
    assert max(network.times) <= t1 + 1e-6


@pytest.mark.parametrize("method, calls", [("Euler", 1), ("Heun", 2), ("Multistep", 1)])
def test_noise_is_drawn_once_per_step_before_the_network_is_called(method, calls):
    events = []
    network = lambda x, t: events.append("network") or x  # noqa: E731
    randn = lambda x: events.append("randn") or torch.randn_like(x)  # noqa: E731
    sde("Linear", sampling_method=method, num_steps=4, randn=randn)(torch.randn(4, 2), network)
    assert events == 3 * ["randn", *calls * ["network"]] + ["network"]


@pytest.mark.parametrize("method", SDE_METHODS)
@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_sde_trajectory(method, last_step):
    exact, z = Gaussian("Linear", "score"), torch.randn(8, 2)
    settings = dict(sampling_method=method, last_step=last_step, num_steps=10)
    torch.manual_seed(1)
    (plain,) = sde("Linear", "score", **settings)(z, exact)
    torch.manual_seed(1)
    states = sde("Linear", "score", **settings, trajectory=True)(z, exact)
    assert len(states) == 10 + (last_step != "None")
    assert torch.equal(states[0], z)
    assert torch.equal(states[-1], plain)


def test_last_step_none_may_be_the_word():
    exact, z, samples = Gaussian("Linear", "velocity"), torch.randn(8, 2), []
    for last_step in (None, "None"):
        torch.manual_seed(1)
        samples.append(sde("Linear", last_step=last_step, num_steps=10)(z, exact)[-1])
    assert torch.equal(*samples)


# Both


@pytest.mark.parametrize(
    "sample, settings",
    [
        (ode, dict(sampling_method="rk5")),
        (ode, dict(num_steps=1)),
        (sde, dict(sampling_method="Milstein")),
        (sde, dict(diffusion_form="quadratic")),
        (sde, dict(last_step="mean")),
        (sde, dict(num_steps=1)),
        (sde, dict(diffusion_norm=-1.0)),
        (sde, dict(last_step_size=1.0)),
        (sde, dict(last_step_size=-0.1)),
        (sde, dict(last_step_size=0.9995)),  # would begin after its end, at 1e-3
    ],
)
def test_settings_that_make_no_sense_are_refused(sample, settings):
    with pytest.raises(ValueError, match=str(*settings.values())):
        sample("Linear", **settings)


@pytest.mark.parametrize("sample", [ode, sde])
def test_model_kwargs_reach_the_network_and_nothing_needs_gradients(sample):
    weight = torch.ones(1, requires_grad=True)
    seen = []

    def network(x, t, y):
        seen.append(y)
        return weight * x

    (out,) = sample("Linear", num_steps=3)(torch.randn(4, 2), network, y="label")
    assert set(seen) == {"label"}
    assert not out.requires_grad


@pytest.mark.parametrize(
    "sample, settings", [(ode, dict(sampling_method="heun")), (sde, dict(sampling_method="Heun")), (sde, {})]
)
def test_on_step_is_called_at_every_step(sample, settings):
    steps = []
    sample("Linear", **settings, num_steps=11, on_step=lambda: steps.append(1))(
        torch.randn(4, 2), Gaussian("Linear", "velocity")
    )
    assert len(steps) == 10


# Solvers of our own: generators of states


def adams_bashforth(drift, x, times, plan):
    before = None
    for t, following in itertools.pairwise(times):
        v = drift(t, x)
        x = x + (following - t) * (v if before is None else 1.5 * v - 0.5 * before)
        before = v
        yield x


def through_data(drift, x, times, plan):
    """Euler's method on E[x1 | x], which it asks the path for: x moves on the line between its noise and its data."""
    for t, following in itertools.pairwise(times):
        v = drift(t, x)
        x1, x0 = plan.get_data_from_velocity(v, x, t), plan.get_noise_from_velocity(v, x, t)
        x = plan.compute_alpha_t(following)[0] * x1 + plan.compute_sigma_t(following)[0] * x0
        yield x


@pytest.fixture
def own(monkeypatch):
    monkeypatch.setitem(ODE_METHODS, "ab2", adams_bashforth)
    monkeypatch.setitem(ODE_METHODS, "data", through_data)


@every_path
def test_multistep_is_exact_for_one_data_point_at_one_call_a_step(path):
    network = Recorder(Gaussian(path, "velocity", mean=(0.5, -1.0), std=(0.0, 0.0)))
    z, (t0, t1) = torch.randn(8, 2, dtype=torch.float64), create_transport(path).ode_interval
    sample = ode(path, sampling_method="multistep", num_steps=4)(z, network)[-1]
    close(sample, network.model.flow(z, t0, t1)[0].double(), atol=1e-5)
    assert len(network.times) == 3


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("edge", [0.5, 0.53])
def test_multistep_begins_anew_where_the_drift_jumps(reverse, edge):
    """Two data points, one before the edge and one behind it: each piece is exact but for the step across."""
    points = torch.tensor([1.0, -2.0], dtype=torch.float64)
    network = lambda x, t: (points[(t >= edge).long()][:, None] - x) / (1 - t)[:, None]  # noqa: E731
    z = torch.randn(4, 2, dtype=torch.float64)

    def solve(**more):
        settings = dict(sampling_method="multistep", num_steps=11, reverse=reverse, trajectory=True)
        return torch.stack(ode("Linear", sample_eps=0.05, **settings, **more)(z, network))

    def ddim(x, t, following):
        data = points[int(t >= edge)]
        return following * data + (1 - following) / (1 - t) * (x - t * data)

    x, times = z, torch.linspace(*((0.95, 0.05) if reverse else (0.05, 0.95)), 11, dtype=torch.float64)
    for t, following, state in zip(times, times[1:], solve(edges=(edge,))[1:]):
        x = ddim(x, t, following)
        close(state, x, atol=1e-9)
    assert (solve()[-1] - x).abs().max() > 1e-3  # as it would be, did it remember


@pytest.mark.parametrize("method", ["Euler", "Multistep"])
def test_the_sde_gets_its_edges(method):
    """Multistep forgets at an edge, so that what lies before it counts in the state alone; Euler remembers nothing."""
    network = lambda x, t: torch.where(t < 0.5, 3.0, 0.0)[:, None].expand_as(x)  # noqa: E731
    samples = []
    for edges in ((), (0.5,)):
        settings = dict(sampling_method=method, num_steps=9, edges=edges, last_step=None, diffusion_norm=0.0)
        samples.append(sde("Linear", **settings, diffusion_form="sigma", sample_eps=0.1)(torch.ones(1, 2), network)[-1])
    assert torch.equal(*samples) == (method == "Euler")


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep", "Euler", "Multistep"])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_shift_moves_the_points_of_fixed_solvers(solver, reverse):
    network, z = Recorder(Gaussian("Linear", "noise")), torch.randn(4, 2, dtype=torch.float64)
    transport = create_transport("Linear", "noise", time_shift=3.0)
    settings = dict(sampling_method=solver, num_steps=6)
    if solver in SDE_METHODS:
        if reverse:
            return
        Sampler(transport).sample_sde(**settings, last_step=None)(z, network)
    else:
        Sampler(transport).sample_ode(**settings, reverse=reverse)(z, network)
    asked = sorted(set(network.times))
    low, high = 1e-3, 1 - 1e-3
    u = torch.linspace(0, 1, 6, dtype=torch.float64)
    expected = (low + (high - low) * u / (3 - 2 * u)).tolist()
    expected = expected if solver == "heun" else expected[1:] if reverse else expected[:-1]
    assert asked == pytest.approx(expected, abs=1e-7)


def test_a_shifted_sde_has_the_right_moments():
    exact = Gaussian("Linear", "velocity")
    sample = Sampler(create_transport("Linear", time_shift=2.0)).sample_sde
    mean, std = moments(lambda **more: sample(diffusion_form="sigma", last_step_size=0.004, **more), exact, num_steps=400)
    close(mean, exact.mean, atol=0.01)
    close(std, exact.std, atol=0, rtol=0.01)


@pytest.mark.parametrize("solver", ["explicit_adams", "implicit_adams"])
def test_solvers_of_equal_steps_refuse_a_shift(solver):
    with pytest.raises(ValueError, match="takes equal steps alone"):
        Sampler(create_transport(time_shift=2.0)).sample_ode(sampling_method=solver)


@every_path
@every_prediction
@pytest.mark.parametrize("solver, order", [("ab2", 2), ("data", 1), ("multistep", 2)])
def test_solvers_of_our_own_have_their_order(own, path, prediction, solver, order):
    exact, z = Gaussian(path, prediction), torch.randn(16, 2, dtype=torch.float64)
    exact.mean, exact.std = exact.mean.double(), exact.std.double()
    t0, t1 = create_transport(path, prediction, sample_eps=0.05).ode_interval
    expected, _ = exact.flow(z, t0, t1)
    errors = []
    for steps in (160, 320):
        sample = ode(path, prediction, 0.05, sampling_method=solver, num_steps=steps + 1)(z, exact)[-1]
        errors.append((sample - expected).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_solver_of_ones_own_keeps_the_rules_of_the_others(own, reverse):
    network, z, steps = Recorder(Gaussian("Linear", "noise")), torch.randn(4, 2), []
    settings = dict(sampling_method="ab2", num_steps=11, reverse=reverse, trajectory=True, on_step=lambda: steps.append(1))
    states = ode("Linear", "noise", **settings)(z, network)
    assert len(states) == 11 and torch.equal(states[0], z) and len(steps) == len(network.times) == 10
    assert min(network.times) >= 1e-3 and max(network.times) <= 1 - 1e-3 + 1e-7
    plain = ode("Linear", "noise", sampling_method="ab2", num_steps=11, reverse=reverse)(z, network)
    assert len(plain) == 1 and torch.equal(plain[0], states[-1])


def test_a_network_that_gives_no_numbers_is_named_and_no_looser_tolerances():
    with pytest.raises(SolverError, match="output is not a finite number") as caught:
        ode("Linear")(torch.randn(4, 2), lambda x, t: x * float("nan"))
    assert "looser" not in str(caught.value)
