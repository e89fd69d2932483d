"""Bits per dimension against sums and integrals that need no network."""

import math
from types import SimpleNamespace

import pytest
import torch

from common.errors import UsageError
from common.streams import SampleStreams
from data.autoencoder import PixelSpace
from inference import ODE
from inference.likelihood import log_likelihood
from transport import create_transport

MEAN, STD, SHAPE = 0.2, 0.3, (3, 2, 2)


def exact_velocity(x, t, y):
    """Velocity of the linear path from N(0, 1) to N(MEAN, STD^2), each dimension alike."""
    t = t.view(-1, 1, 1, 1)
    variance = t**2 * STD**2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


SOLVER = ODE(rtol=1e-5)


@pytest.fixture
def pipeline():
    device = torch.device("cpu")
    settings = dict(transport=create_transport(), autoencoder=PixelSpace(), latent_shape=SHAPE, device=device)
    return SimpleNamespace(model=exact_velocity, **settings)


def score(pipeline, images, **settings):
    settings = dict(exact_divergence=True) | settings
    streams = SampleStreams(0, range(len(images)))
    return log_likelihood(pipeline, images, torch.zeros(len(images)), streams, SOLVER, **settings)


def draw_levels(count):
    """8-bit images whose levels are N(MEAN, STD^2) in [-1, 1], quantised to bins of 1/128."""
    x = MEAN + STD * torch.randn(count, *SHAPE)
    return ((x + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


def normal_cdf(x):
    return 0.5 * (1 + torch.erf((x - MEAN) / STD / math.sqrt(2)))


def test_density_in_pixels_counts_the_change_of_variables(pipeline):
    images = draw_levels(64)
    nats, bits = score(pipeline, images)
    x = images.double() / 127.5 - 1
    expected = (-0.5 * ((x - MEAN) / STD) ** 2 - math.log(STD * math.sqrt(2 * math.pi)) - math.log(127.5)).flatten(1).sum(1)
    assert torch.allclose(nats, expected, rtol=1e-4)
    assert torch.allclose(bits, -expected / math.log(2) / 12, rtol=1e-4)


def test_probes_agree_with_the_closed_form_within_their_own_error(pipeline):
    images = draw_levels(400)
    nats, _ = score(pipeline, images, exact_divergence=False, num_probes=2)
    x = images.double() / 127.5 - 1
    expected = (-0.5 * ((x - MEAN) / STD) ** 2 - math.log(STD * math.sqrt(2 * math.pi)) - math.log(127.5)).flatten(1).sum(1)
    difference = nats - expected
    assert difference.mean().abs() < 3 * difference.std() / 20 + 1e-3 * expected.abs().mean()


def test_dequantised_levels_against_an_exact_sum(pipeline):
    """Uniform dequantisation bounds log P(level) from below; with bins this fine the bound is tight."""
    images = draw_levels(2000)
    nats, bits = score(pipeline, images, dequantize="uniform")
    low = images.double() / 128 - 1
    exact = torch.log(normal_cdf(low + 1 / 128) - normal_cdf(low)).flatten(1).sum(1)
    difference = exact - nats
    error = difference.std() / math.sqrt(len(images))
    assert difference.mean() > -3 * error
    assert difference.mean() < 3 * error + 0.01 * exact.abs().mean()
    assert bits.mean() == pytest.approx(-exact.mean().item() / 12 / math.log(2), rel=0.01)


def test_latents_cannot_be_dequantised(pipeline):
    pipeline.autoencoder = SimpleNamespace(name="somewhere")
    with pytest.raises(UsageError, match="--dequantize uniform needs pixel space"):
        score(pipeline, draw_levels(1), dequantize="uniform")
