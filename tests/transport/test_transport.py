import math

import pytest
import torch

from gaussian import PATHS, PREDICTIONS, Gaussian, coefficients
from transport import ModelType, PathType, Sampler, TransportSettings, WeightType, create_transport, path

EPS = 1e-3  # the default distance from the ends wherever one is singular

# Linear and GVP behave alike: path -> (default train_eps, sample_eps) with velocity, and with score or noise.
DEFAULTS = {"Linear": ((0, 0), (EPS, EPS)), "GVP": ((0, 0), (EPS, EPS)), "VP": ((1e-5, EPS), (1e-5, EPS))}

every_path = pytest.mark.parametrize("path", PATHS)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def interval(path, eps):
    return (0.0 if path == "VP" else eps), 1 - eps


@every_path
@every_prediction
@pytest.mark.parametrize("train_eps, sample_eps", [(None, None), (0.02, None), (None, 0.03), (0.02, 0.03)])
def test_intervals(path, prediction, train_eps, sample_eps):
    transport = create_transport(path, prediction, train_eps=train_eps, sample_eps=sample_eps)
    train_default, sample_default = DEFAULTS[path][prediction != "velocity"]
    train_default = 0.05 if prediction == "data" else train_default  # whatever the path
    assert transport.train_interval == interval(path, train_default if train_eps is None else train_eps)
    assert transport.ode_interval == interval(path, sample_default if sample_eps is None else sample_eps)


@every_path
@every_prediction
@pytest.mark.parametrize("sample_eps", [None, 0.03])
def test_sde_interval_ends_at_the_last_step_or_before_the_infinite_score(path, prediction, sample_eps):
    transport = create_transport(path, prediction, sample_eps=sample_eps)
    eps, ode_start = sample_eps or EPS, transport.ode_interval[0]
    assert transport.sde_interval("sigma", 0.04) == (ode_start, 1 - 0.04)
    assert transport.sde_interval("sigma", 0) == (ode_start, 1 - eps)
    assert transport.sde_interval("SBDM", 0.04) == (0.0 if path == "VP" else eps, 1 - 0.04)


@pytest.mark.parametrize("path, prediction", [("Linear", "score"), ("Linear", "noise"), ("GVP", "noise"), ("VP", "noise")])
def test_sample_eps_of_zero_is_refused_where_the_velocity_is_infinite(path, prediction):
    with pytest.raises(ValueError, match="sample_eps"):
        Sampler(create_transport(path, prediction, sample_eps=0)).sample_ode()


@pytest.mark.parametrize("settings", [dict(diffusion_form="SBDM"), dict(diffusion_form="sigma", last_step=None)])
def test_sample_eps_of_zero_is_refused_where_the_sde_is_singular(settings):
    with pytest.raises(ValueError, match="sample_eps"):
        Sampler(create_transport("Linear", "velocity", sample_eps=0)).sample_sde(**settings)


@pytest.mark.parametrize("loss_weight", ["velocity", "likelihood"])
def test_velocity_prediction_has_no_loss_weight(loss_weight):
    with pytest.raises(ValueError, match="loss weight"):
        create_transport(prediction="velocity", loss_weight=loss_weight)


@pytest.mark.parametrize(
    "settings",
    [
        dict(path_type="linear"),
        dict(prediction="momentum"),
        dict(prediction="noise", loss_weight="snr"),
        dict(train_eps=-0.1),
        dict(sample_eps=0.5),
    ],
)
def test_unknown_settings_are_refused(settings):
    with pytest.raises(ValueError, match=str(list(settings.values())[-1])):
        create_transport(**settings)


def weight(path, loss_weight, t):
    alpha, d_alpha, sigma, sigma_d_sigma = coefficients(path, t)
    g = d_alpha / alpha * sigma**2 - sigma_d_sigma
    return {None: torch.ones_like(t), "velocity": (g / sigma) ** 2, "likelihood": g / sigma**2}[loss_weight]


CHOICES = [("velocity", None), ("data", None), *((p, w) for p in ("score", "noise") for w in (None, "velocity", "likelihood"))]


@every_path
@pytest.mark.parametrize("prediction, loss_weight", CHOICES)
def test_losses_by_hand(path, prediction, loss_weight):
    """The same seed gives the same losses: noise is drawn first, then times, both from the default generator."""
    transport = create_transport(path, prediction, loss_weight, train_eps=0.1)
    x1 = torch.randn(16, 3, 2, 2)
    network = lambda x, t, shift: x.sin() + t.reshape(-1, 1, 1, 1) + shift  # noqa: E731
    torch.manual_seed(5)
    result = transport.training_losses(network, x1, dict(shift=0.5))

    torch.manual_seed(5)
    x0, u = torch.randn(16, 3, 2, 2), torch.rand(16)
    t0, t1 = interval(path, 0.1)
    t = (t0 + (t1 - t0) * u).reshape(-1, 1, 1, 1)
    alpha, d_alpha, sigma, sigma_d_sigma = coefficients(path, t)
    xt = alpha * x1 + sigma * x0
    pred = network(xt, t, 0.5)
    error = {
        "velocity": pred - (d_alpha * x1 + sigma_d_sigma / sigma * x0),
        "noise": pred - x0,
        "score": sigma * pred + x0,
        # (d / sigma) (x1_hat - x1), d / sigma = (alpha' sigma - alpha sigma') / sigma
        "data": (d_alpha * sigma - alpha * sigma_d_sigma / sigma) / sigma * (pred - x1),
    }[prediction]
    expected = (weight(path, loss_weight, t) * error**2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(result["loss"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result["pred"], pred)


def test_noise_and_times_may_be_given():
    transport, x1, x0, t = create_transport(), torch.randn(4, 3), torch.randn(4, 3), torch.rand(4)
    before = torch.get_rng_state()
    loss = transport.training_losses(lambda x, t: x, x1, x0=x0, t=t)["loss"]
    assert torch.equal(torch.get_rng_state(), before)
    xt = t[:, None] * x1 + (1 - t[:, None]) * x0
    torch.testing.assert_close(loss, (xt - (x1 - x0)).square().mean(1))


@every_path
def test_times_are_drawn_from_the_whole_training_interval(path):
    times = []
    transport = create_transport(path, train_eps=0.2)
    transport.training_losses(lambda x, t: times.append(t) or x, torch.randn(10_000, 1))
    t0, t1 = interval(path, 0.2)
    assert t0 <= times[0].min() < t0 + 0.01
    assert t1 - 0.01 < times[0].max() <= t1


@every_path
@pytest.mark.parametrize("prediction, loss_weight", CHOICES)
def test_the_exact_network_has_no_loss_on_a_single_point(path, prediction, loss_weight):
    """All data at one point: x_t then determines the noise, so the best network predicts without error."""
    transport = create_transport(path, prediction, loss_weight, train_eps=0.05)
    exact = Gaussian(path, prediction, std=(0.0, 0.0))
    x1 = exact.mean.double().repeat(64, 1)
    loss = transport.training_losses(exact, x1)["loss"]
    assert loss.max() < 1e-9
    torch.manual_seed(0)
    assert transport.training_losses(lambda x, t: 1.01 * exact(x, t), x1)["loss"].min() > loss.max()


@every_path
@every_prediction
def test_predict_converts_the_output_to_velocity_and_score(path, prediction):
    transport, x, t = create_transport(path, prediction), torch.randn(9, 2), torch.linspace(0.1, 0.9, 9)
    velocity, score = transport.predict(Gaussian(path, prediction), x, t, {})
    torch.testing.assert_close(velocity, Gaussian(path, "velocity")(x, t), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(score, Gaussian(path, "score")(x, t), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(transport.predict_velocity(Gaussian(path, prediction), x, t, {}), velocity)


def test_output_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(4, 6\).*\(4, 3\)"):
        create_transport().training_losses(lambda x, t: torch.cat([x, x], dim=1), torch.randn(4, 3))


class SinSquared(path.Plan):
    """alpha = sin^2, sigma = cos^2: the determinant is 0 at both ends, where the velocity says nothing of the noise."""

    def compute_alpha_t(self, t):
        return (math.pi / 2 * t).sin() ** 2, math.pi / 2 * (math.pi * t).sin()

    def compute_sigma_t(self, t):
        return (math.pi / 2 * t).cos() ** 2, -math.pi / 2 * (math.pi * t).sin()


class Still(path.Plan):
    """no data and no noise at any time: nothing can be told from the velocity."""

    def compute_alpha_t(self, t):
        return 0 * t, 0 * t

    compute_sigma_t = compute_alpha_t


@pytest.fixture
def paths(monkeypatch):
    monkeypatch.setitem(path.PATHS, "SinSquared", SinSquared)
    monkeypatch.setitem(path.PATHS, "Still", Still)


def test_a_path_of_ones_own_needs_its_coefficients_alone(paths):
    transport, x0 = create_transport("SinSquared"), torch.randn(64, 2)
    assert transport.train_interval == transport.ode_interval == (0, 1)
    assert transport.sde_interval("sigma", 0.04) == transport.sde_interval("SBDM", 0.04) == (EPS, 0.96)
    mean, std = torch.tensor([0.5, -1.0]), torch.tensor([0.5, 1.5])

    def exact(x, t):  # of data N(mean, std^2)
        t = t[:, None]
        (alpha, d_alpha), (sigma, d_sigma) = SinSquared().compute_alpha_t(t), SinSquared().compute_sigma_t(t)
        variance = alpha**2 * std**2 + sigma**2
        return d_alpha * mean + (alpha * d_alpha * std**2 + sigma * d_sigma) / variance * (x - alpha * mean)

    sample = Sampler(transport).sample_ode(atol=1e-6, rtol=1e-5)(x0, exact)[-1]
    torch.testing.assert_close(sample, mean + std * x0, rtol=1e-3, atol=1e-3)
    many = Sampler(transport).sample_sde(diffusion_form="sigma", num_steps=100)(torch.randn(4000, 2), exact)[-1]
    torch.testing.assert_close(many.mean(0), mean, rtol=0, atol=0.1)
    torch.testing.assert_close(many.std(0), std, rtol=0.1, atol=0)


ODE, SDE = (lambda sampler: sampler.sample_ode()), (lambda sampler: sampler.sample_sde())
TRAIN = lambda sampler: sampler.transport.train_interval  # noqa: E731
SINGULAR = {
    "determinant 0": (dict(path_type="SinSquared", sample_eps=0), SDE, "drift of the SDE of form SBDM is not finite at t = 0;"),
    "alpha 0": (dict(path_type="SinSquared", prediction="noise", sample_eps=0), ODE, "velocity is not finite at t = 0;"),
    "sigma 0": (dict(path_type="SinSquared", prediction="data", sample_eps=0), ODE, "velocity is not finite at t = 1;"),
    "determinant 0 everywhere": (dict(path_type="Still"), SDE, "drift of the SDE of form SBDM is not finite at t ="),
    "Linear, data": (dict(path_type="Linear", prediction="data", sample_eps=0), ODE, "velocity is not finite at t = 1;"),
    "GVP, data": (dict(path_type="GVP", prediction="data", sample_eps=0), ODE, "velocity is not finite at t = 1;"),
    "VP": (dict(path_type="VP", sample_eps=0), lambda s: s.sample_sde(last_step=None), "a larger sample_eps, or last step,"),
    "loss": (dict(path_type="Still", prediction="data"), TRAIN, "the loss is not finite at t = .*; a larger train_eps"),
    "float32": (dict(path_type="Linear", prediction="data", sample_eps=1e-8), ODE, "velocity is not finite at t = 1;"),
}


@pytest.mark.parametrize("settings, ask, words", SINGULAR.values(), ids=SINGULAR)
def test_a_plan_that_is_singular_where_it_is_asked_is_one_clear_line(paths, settings, ask, words):
    with pytest.raises(ValueError, match=words) as caught:
        ask(Sampler(create_transport(**settings)))
    assert "\n" not in str(caught.value) and settings["path_type"] in str(caught.value)


def test_enums_spell_the_tables_as_the_published_code_does():
    assert {m.name: m.value for m in ModelType} == dict(VELOCITY="velocity", SCORE="score", NOISE="noise", DATA="data")
    assert {m.name: m.value for m in PathType} == dict(LINEAR="Linear", GVP="GVP", VP="VP")
    assert {m.name: m.value for m in WeightType} == dict(NONE=None, VELOCITY="velocity", LIKELIHOOD="likelihood")
    members = PathType.VP, ModelType.NOISE, WeightType.VELOCITY
    assert (
        create_transport(*members).settings
        == create_transport("VP", "noise", "velocity").settings
        == TransportSettings("VP", "noise", "velocity")
    )


@pytest.mark.parametrize(
    "settings", [("VP", "velocity", None), ("Linear", "noise", "likelihood"), ("GVP", "score", "velocity")]
)
def test_times_may_reach_ends_that_uniform_numbers_do_not_meet(settings):
    """A train_eps of 0 goes on training, as it always did."""
    transport = create_transport(*settings, train_eps=0)
    assert transport.train_interval == (0, 1)
