"""What the network expects the data to be, on the way to it: Tweedie's formula, for any prediction and path."""

from types import SimpleNamespace

import pytest
import torch

from gaussian import PATHS, PREDICTIONS, Gaussian, Recorder, coefficients
from inference import ODE, SDE
from inference.expectation import expected_data
from transport import create_transport

LABELS = [0, 0, 0]


def pipeline_of(path, prediction, network=None):
    """What expected_data asks of a Pipeline, around the exact network of a Gaussian."""
    network = network or Gaussian(path, prediction)

    def forward(x, t, y):
        forward.calls += 1
        return network(x, t)

    forward.calls = 0
    transport = create_transport(path, prediction)
    return SimpleNamespace(transport=transport, device=torch.device("cpu"), calls=0, network=lambda guidance: forward)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_it_is_the_posterior_mean_of_a_gaussian(path, prediction):
    data = Gaussian(path, "data")
    pipe, times = pipeline_of(path, prediction), [0.05, 0.4, 0.9]
    states = [torch.randn(3, 2, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    expected = expected_data(pipe, states, times, LABELS)
    assert pipe.calls == 3
    for x, time, found in zip(states, times, expected):
        alpha, _, sigma, _ = coefficients(path, torch.tensor(time))
        gain = alpha * data.std**2 / (alpha**2 * data.std**2 + sigma**2)
        torch.testing.assert_close(found, data.mean + gain * (x - alpha * data.mean), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("path", PATHS)
def test_at_the_end_it_is_the_state_itself_and_at_noise_the_mean(path):
    x = torch.tensor([[0.3, -0.2]])
    pipe = pipeline_of(path, "velocity")
    begin, end = expected_data(pipe, [x, x], [0.0, 1.0], [0])
    torch.testing.assert_close(end, x, rtol=0.01, atol=0.01)
    torch.testing.assert_close(begin, Gaussian(path, "data").mean[None], rtol=0.02, atol=0.02)


def test_with_guidance_it_is_the_guided_networks(trained):
    from inference import Guidance, Pipeline

    pipe, labels, guidance = Pipeline.load(trained, weights="model"), [3, 7], Guidance(3.0, channels=2)
    x, t = torch.randn(2, *pipe.latent_shape), torch.full((2,), 0.25)
    (found,) = expected_data(pipe, [x], [0.25], labels, guidance)
    with torch.no_grad():
        own, null = (pipe.model(x, t, torch.tensor(y)) for y in (labels, [10, 10]))
    own[:, :2] = null[:, :2] + 3 * (own - null)[:, :2]
    torch.testing.assert_close(found, x + 0.75 * own, rtol=1e-4, atol=1e-4)
    (plain,) = expected_data(pipe, [x], [0.25], labels)
    assert (plain - found).abs().max() > 1e-3


@pytest.mark.parametrize("solver", [
    ODE("euler", 7), ODE("multistep", 7), SDE(num_steps=7), SDE(num_steps=5, last_step="None"),
    SDE("Euler", "constant", last_step="Tweedie", last_step_size=0.1, num_steps=5),
])  # fmt: skip
@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_times_are_those_at_which_the_solver_asks(solver, shift):
    transport = create_transport("Linear", "velocity", time_shift=shift)
    network = Recorder(Gaussian("Linear", "velocity"))
    pipe = SimpleNamespace(transport=transport)
    states = solver.sampling(pipe, torch.randn_like, trajectory=True)(torch.randn(2, 2), network)
    times = solver.times(pipe)
    assert len(times) == len(states)
    asked = network.times  # at each state but the last, after which nothing follows
    assert times[:-1] == pytest.approx(asked, abs=1e-6)
    assert times[-1] == pytest.approx(0.999 if getattr(solver, "last_step", "") == "None" else 1.0)
