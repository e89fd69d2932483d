"""All randomness of a training step, as a function of the seed and the step's number."""

from typing import NamedTuple

import torch

from common.streams import generator


class Draws(NamedTuple):
    """Random numbers of N images: flip (N,) bool; posterior and noise (N, C, h, w) normal; time and drop (N,) uniform."""

    flip: torch.Tensor
    posterior: torch.Tensor
    noise: torch.Tensor
    time: torch.Tensor
    drop: torch.Tensor

    def part(self, some):
        """Those of the images that the slice some takes."""
        return Draws(*(values[some] for values in self))


def draw_step(seed, step, batch, shape, device):
    """Draws of a step for the whole global batch. Each process draws them all and takes its share: cheap beside the
    network, and the number of processes changes nothing."""
    g = generator(device, seed, "step", step)
    uniform = lambda: torch.rand(batch, generator=g, device=device)  # noqa: E731
    normal = lambda: torch.randn((batch, *shape), generator=g, device=device)  # noqa: E731
    return Draws(flip=uniform() < 0.5, posterior=normal(), noise=normal(), time=uniform(), drop=uniform())
