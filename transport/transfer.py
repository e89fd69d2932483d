"""Samples along one path by a network that was trained on another (Lipman et al., flow_matching, arXiv 2412.06264, 4.8).

Paths between the same noise and data differ by when, and how large, their states are alike: with a state x of the sampling
path at t goes x / c at time s of the network's path, where s is the time of the same angle (path.compute_polar_t) and
c = r~(t) / r(s). Hence v~(x, t) = (c'/c) x + c s' v(x / c, s), and score~(x, t) = score(x / c, s) / c.
"""

from functools import cached_property

import torch

from .path import PATHS, expand_t
from .prediction import Prediction
from .transport import Transport


class Transferred(Prediction):
    """A prediction on its own path, asked and read on another. own_interval: where the network may be asked."""

    def __init__(self, own, plan, own_interval):
        super().__init__(plan)
        self.own, self.own_interval = own, own_interval

    def own_time(self, t):
        """s, of the network's path."""
        alpha, sigma = self.plan.compute_alpha_t(t)[0], self.plan.compute_sigma_t(t)[0]
        return self.own.plan.time_of(alpha, sigma).clamp(*self.own_interval)

    def sizes(self, t):
        """(c, c'/c, s')."""
        (radius, d_radius), (_, turning) = self.plan.compute_polar_t(t)
        (own_radius, own_d_radius), (_, own_turning) = self.own.plan.compute_polar_t(self.own_time(t))
        speed = turning / own_turning
        return radius / own_radius, d_radius / radius - own_d_radius / own_radius * speed, speed

    def inputs(self, x, t):
        return x / self.sizes(expand_t(t, x))[0], self.own_time(t)

    def velocity(self, output, x, t):
        c, growth, speed = self.sizes(expand_t(t, x))
        return growth * x + c * speed * self.own.velocity(output, x / c, self.own_time(t))

    def score(self, output, x, t):
        c = self.sizes(expand_t(t, x))[0]
        return self.own.score(output, x / c, self.own_time(t)) / c


class TransferredTransport(Transport):
    """Another Transport's network on the path called path_type, for a Sampler. What is learnt stays the other's.

    The interval is where both the path and the network may be asked. At an end which is the network's, states begin or are
    returned in the size that they have on its path: a sample of the ODE is then the network's own.
    """

    margin = 1e-5  # float32 maps times to the network's with errors up to some 1e-6

    def __init__(self, own, path_type):
        self.own, self.settings, plan = own, own.settings, PATHS[path_type]()
        self.path_sampler, self.path_type = plan, path_type
        self.prediction = Transferred(own.prediction, plan, own.ode_interval)
        self.sample_eps = plan.sample_eps or 0.0

    @cached_property
    def _network_ends(self):
        """The times of the sampling path at which the network's interval begins and ends."""
        return self.times_of(self.own.ode_interval)

    @property
    def sampling_interval(self):
        (t0, t1), (begin, end) = self.path_sampler.interval(self.sample_eps), self._network_ends
        return max(t0, begin), min(t1, end)

    def sde_interval(self, diffusion_form, last_step_size):
        t0, t1 = super().sde_interval(diffusion_form, last_step_size)
        end = self._network_ends[1]
        if t1 > end:
            raise ValueError(
                f"on the path {self.path_type} this network ends at t = {end:g}, but the SDE's last step begins at {t1:g}; "
                f"a last_step_size of {1 - end + 5e-4:.3f} or more begins before"
            )
        return t0, t1

    def scale(self, t):
        own_ends = [end for end in self._network_ends if end not in self.path_sampler.interval(self.sample_eps)]
        return self.prediction.sizes(torch.tensor([t], dtype=torch.float64))[0].item() if t in own_ends else 1.0

    def times_of(self, own_times):
        s, plan = torch.tensor(own_times, dtype=torch.float64), self.own.path_sampler
        return tuple(self.path_sampler.time_of(plan.compute_alpha_t(s)[0], plan.compute_sigma_t(s)[0]).tolist())

    def loss_of_path(self, loss):
        def of_path(t):
            c, _, speed = self.prediction.sizes(t)
            return (c * speed) ** 2 * loss(self.prediction.own_time(t))

        return of_path

    def training_losses(self, *args, **kwargs):
        return self.own.training_losses(*args, **kwargs)


def on_path(transport, path_type):
    """The same network on the path called path_type, None being its own."""
    return transport if path_type in (None, transport.settings.path_type) else TransferredTransport(transport, path_type)
