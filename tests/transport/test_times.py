"""The laws of training's times: quantiles, densities by quadrature, and the shift."""

import math

import pytest
import torch

from transport import TIME_LAWS, TransportSettings, create_transport
from transport.times import TimeLaw, automatic_shift, make_law, shifted

LAWS = [("uniform", {}), ("logit-normal", {}), ("logit-normal", dict(mean=-0.5, scale=0.7)), ("mode", {}), ("cosmap", {})]
LAWS += [("mode", dict(scale=-0.8))]
every_law = pytest.mark.parametrize("name, numbers", LAWS)


def test_uniform_times_are_the_uniform_numbers_in_the_interval():
    u = torch.rand(100)
    assert torch.equal(make_law("uniform").times(u), u)
    transport = create_transport(train_eps=0.1)
    assert torch.equal(transport.training_times(u), 0.1 + 0.8 * u)


@pytest.mark.parametrize("t", [0.1, 0.3, 0.5, 0.8])
def test_logit_normal_times_have_their_distribution(t):
    """P(sigmoid(m + s n) <= t) = Phi((logit t - m) / s), at which u the law must give t."""
    for mean, scale in ((0, 1), (-0.5, 0.7)):
        u = 0.5 * (1 + math.erf((math.log(t / (1 - t)) - mean) / scale / math.sqrt(2)))
        times = make_law("logit-normal", mean=mean, scale=scale).times(torch.tensor(u, dtype=torch.float64))
        assert times.item() == pytest.approx(t, rel=1e-9)


@pytest.mark.parametrize("u", [0.1, 0.2, 0.5, 0.9])
def test_mode_and_cosmap_are_their_formulas(u):
    law, at = make_law, torch.tensor(u, dtype=torch.float64)
    assert law("mode").times(at).item() == pytest.approx(1 - u - 1.29 * (math.cos(math.pi * u / 2) ** 2 - 1 + u), abs=1e-12)
    assert law("cosmap").times(at).item() == pytest.approx(1 - 1 / (math.tan(math.pi * u / 2) + 1), abs=1e-12)


@every_law
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_density_is_that_of_the_times(name, numbers, shift):
    """The share of uniform u whose times lie below t is the density's integral up to t."""
    settings = {f"time_{key}": value for key, value in numbers.items()}
    transport = create_transport("Linear", "noise", time_law=name, time_shift=shift, **settings)
    t0, t1 = transport.train_interval
    times = transport.training_times((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    middles = t0 + (t1 - t0) * (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    integral = transport.training_density(middles).cumsum(0) * (t1 - t0) / 20_000
    assert integral[-1].item() == pytest.approx(1, abs=2e-3)
    for i in (2_000, 7_000, 10_000, 15_000, 19_000):
        share = (times <= t0 + (t1 - t0) * i / 20_000).double().mean()
        assert integral[i - 1].item() == pytest.approx(share.item(), abs=1e-3), i


@every_law
def test_the_density_by_halving_is_the_closed_form(name, numbers):
    law, t = make_law(name, **numbers), torch.linspace(0.05, 0.9, 25, dtype=torch.float64)
    torch.testing.assert_close(TimeLaw.density(law, t), law.density(t), rtol=1e-5, atol=0)


@every_law
@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_times_go_from_one_end_of_the_training_interval_to_the_other(name, numbers, shift):
    settings = {f"time_{key}": value for key, value in numbers.items()}
    transport = create_transport("VP", "noise", time_law=name, time_shift=shift, **settings)
    times = transport.training_times(torch.linspace(0, 1 - 2**-24, 1001))
    t0, t1 = transport.train_interval
    assert times.isfinite().all() and times.min() >= t0 and times.max() <= t1
    assert (times.diff() >= 0).all() or (times.diff() <= 0).all()
    assert times.max() - times.min() > 0.7 * (t1 - t0)


def test_no_law_gives_the_end_of_the_data_itself():
    """Where a loss may be infinite; uniform numbers in [0, 1) have 0 among them, though not 1."""
    for name in TIME_LAWS:
        times = make_law(name).times(torch.tensor([0.0, 1 - 2**-24]))
        assert times.max() < 1 or name == "cosmap", name
    loss = create_transport("VP", train_eps=0.0, time_law="mode").training_losses
    t = create_transport("VP", train_eps=0.0, time_law="mode").training_times(torch.zeros(1, dtype=torch.float64))
    assert loss(lambda x, t: x, torch.ones(1, 2, dtype=torch.float64), t=t)["loss"].isfinite().all()


def test_the_law_changes_the_times_of_the_loss_alone():
    seen = []
    for law in ("uniform", "logit-normal"):
        torch.manual_seed(0)
        create_transport(time_law=law).training_losses(lambda x, t: seen.append(t) or x, torch.zeros(4000, 1))
    torch.testing.assert_close(seen[1], make_law("logit-normal").times(seen[0]))


def test_the_shift():
    """t / (a - (a - 1) t): that of noise to data stays, and on the linear path sigma / alpha becomes a times as much."""
    t = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    moved = shifted(t, 3.0)
    assert moved[0] == 0 and moved[-1] == 1
    torch.testing.assert_close((1 - moved) / moved, 3 * (1 - t) / t)
    assert automatic_shift(4 * 32 * 32) == 1 and automatic_shift(4 * 64 * 64) == 2 and automatic_shift(100) == 1
    assert TransportSettings(time_shift="auto").fitted(4 * 64 * 64).time_shift == 2


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(time_law="uniform", time_scale=1.0), "goes with time_law logit-normal and mode, not uniform"),
        (dict(time_law="mode", time_mean=1.0), "goes with time_law logit-normal, not mode"),
        (dict(time_law="mode", time_scale=2.0), r"\[-1, 1.75"),
        (dict(time_law="logit-normal", time_scale=0.0), "above 0"),
        (dict(time_law="beta"), "choose from"),
        (dict(time_shift=0.5), "at least 1, or auto"),
        (dict(time_mean=math.nan, time_law="logit-normal"), "finite"),
    ],
)
def test_bad_settings_are_told(settings, words):
    with pytest.raises(ValueError, match=words):
        create_transport(**settings)


def test_every_law_is_there():
    assert set(TIME_LAWS) == {"uniform", "logit-normal", "mode", "cosmap"}
