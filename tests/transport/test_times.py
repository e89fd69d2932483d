"""The laws of training's times, against quantiles of their densities."""

import math

import pytest
import torch

from transport import TIME_LAWS, create_transport


def test_uniform_times_are_the_uniform_numbers_in_the_interval():
    u = torch.rand(100)
    assert torch.equal(TIME_LAWS["uniform"](u), u)
    transport = create_transport(train_eps=0.1)
    assert torch.equal(transport.training_times(u), 0.1 + 0.8 * u)


@pytest.mark.parametrize("t", [0.1, 0.3, 0.5, 0.8])
def test_logit_normal_times_have_their_distribution(t):
    """P(sigmoid(n) <= t) = Phi(logit t), at which u the law must give t."""
    u = 0.5 * (1 + math.erf(math.log(t / (1 - t)) / math.sqrt(2)))
    assert TIME_LAWS["logit-normal"](torch.tensor(u, dtype=torch.float64)).item() == pytest.approx(t, rel=1e-9)


@pytest.mark.parametrize("law", TIME_LAWS)
def test_times_rise_from_one_end_of_the_training_interval_to_the_other(law):
    transport = create_transport("VP", "noise", time_law=law)
    times = transport.training_times(torch.linspace(0, 1 - 2**-24, 1001))
    t0, t1 = transport.train_interval
    assert times.isfinite().all() and times.min() >= t0 and times.max() <= t1 and (times.diff() >= 0).all()


def test_the_law_changes_the_times_of_the_loss_alone():
    seen = []
    for law in ("uniform", "logit-normal"):
        torch.manual_seed(0)
        create_transport(time_law=law).training_losses(lambda x, t: seen.append(t) or x, torch.zeros(4000, 1))
    torch.testing.assert_close(seen[1], TIME_LAWS["logit-normal"](seen[0]))
