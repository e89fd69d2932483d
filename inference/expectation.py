"""What the network expects the image to be, on the way to it."""

import torch

from .inputs import checked_labels
from .settings import Guidance


@torch.no_grad()
def expected_data(pipeline, states, times, labels, guidance=Guidance()):  # noqa: B008
    """E[x1 | x_t] at each of these states, a list of latents such as they are: what the pictures would be on average, going
    by the network's answer there, guided as the solver saw it.

    states: latents (N, *latent_shape) of a trajectory on the network's own path; times: of each, as ODE.times and SDE.times
    give them; labels (N,). One network call a state. A time at which the network cannot be asked, such as the end of VP, is
    taken as the nearest at which it can.
    """
    network, transport, y = (
        pipeline.network(guidance),
        pipeline.transport,
        checked_labels(labels, len(states[0])).to(pipeline.device),
    )
    first, last = transport.sampling_interval
    answers = []
    for x, time in zip(states, times):
        t = torch.full((len(x),), min(max(time, first), last), device=x.device, dtype=x.dtype)
        answers.append(transport.predict_data(network, x, t, dict(y=y)))
    pipeline.calls += network.calls
    return answers
