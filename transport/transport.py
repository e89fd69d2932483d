"""Transport: what the network is asked to predict, how it is trained, and where on [0, 1] it may be asked."""

import enum
from functools import cached_property

import torch

from .path import PATHS
from .prediction import LOSS_WEIGHTS, PREDICTIONS, Point
from .settings import TransportSettings
from .times import shifted, shifted_density

# The words of the tables as the published code spells them.
ModelType = enum.Enum("ModelType", {name.upper(): name for name in PREDICTIONS})
PathType = enum.Enum("PathType", {name.upper(): name for name in PATHS})
WeightType = enum.Enum("WeightType", {str(name).upper(): name for name in LOSS_WEIGHTS})

HUGE = 1e15
SDE_EPS = 1e-3  # how far an SDE stays from an end that is singular, unless the user says


def create_transport(*choices, **settings):
    """Transport of the words that the command line uses, the fields of TransportSettings in their order:

    create_transport(path_type="Linear", prediction="velocity", loss_weight=None, train_eps=None, sample_eps=None).
    Raises ValueError for a word that is unknown or does not go with the others.
    """
    return Transport(TransportSettings(*choices, **settings))


class Transport:
    """What TransportSettings choose, at work: path_sampler is the plan, prediction how the network's output is read."""

    margin = 0.0  # at which the drift is asked beside an edge, where the network's times are not those of the path

    def __init__(self, settings):
        self.settings = settings
        self.path_sampler = plan = PATHS[settings.path_type]()
        self.prediction = PREDICTIONS[settings.prediction](plan)
        self.train_eps = _first(settings.train_eps, self.prediction.train_eps, plan.train_eps, self.prediction.eps)
        self.sample_eps = _first(settings.sample_eps, plan.sample_eps, self.prediction.eps)

    @cached_property
    def train_interval(self):
        """(t0, t1) from which training draws its times. Raises ValueError where the loss is not finite inside of it; at the
        ends themselves it may be, which uniform numbers do not meet."""
        t0, t1 = interval = self.path_sampler.interval(self.train_eps)
        inside = [t0 + (t1 - t0) * u for u in (2**-12, 0.5, 1 - 2**-12)]

        def loss(output, x, t):
            return self._loss(output, Point(x, -x, *self.path_sampler.plan(t, x, -x)))

        self._check_finite("loss", loss, inside, "train_eps")
        return interval

    @property
    def sampling_interval(self):
        """(t0, t1): where the path and the network may be asked."""
        return self.path_sampler.interval(self.sample_eps)

    @cached_property
    def ode_interval(self):
        """(t0, t1) of the sampling ODE; reverse and likelihood run it backwards.

        Raises ValueError where the velocity is not finite at one of them: a sample_eps of 0, or a plan that is singular.
        """
        interval = self.sampling_interval
        self._check_finite("velocity", self.prediction.velocity, interval)
        return interval

    def sde_interval(self, diffusion_form, last_step_size):
        """(t0, t1) of the sampling SDE before its last step.

        It starts where the ODE does, or at eps where its drift is infinite there, as SBDM's is at t = 0 of Linear and
        GVP; it ends where the last step begins, or at 1 - eps where there is none, since the score is infinite at t = 1.
        Raises ValueError where no time is left between them, or the drift is not finite at one of them.
        """

        def drift(output, x, t):
            diffusion = self.path_sampler.compute_diffusion(x, t, diffusion_form)
            return self.prediction.velocity(output, x, t) + diffusion * self.prediction.score(output, x, t)

        eps = _first(self.settings.sample_eps, SDE_EPS)
        t0, end = self.sampling_interval
        if not self._is_finite(drift, t0):
            t0 = max(t0, eps)
        t1 = 1.0 - last_step_size if last_step_size else min(1.0 - eps, end)
        if t0 >= t1:
            raise ValueError(f"last_step_size {last_step_size} leaves no time for the SDE, which starts at t = {t0:g}")
        self._check_finite(f"drift of the SDE of form {diffusion_form}", drift, (t0, t1), "sample_eps, or last step,")
        return t0, t1

    def _is_finite(self, quantity, t):
        """Whether quantity(output, x, t) of an ordinary output and state is finite at time t. In float64, in which cos(pi/2)
        is not 0 but 6e-17: what is infinite on paper is at least HUGE."""
        t = torch.tensor(t, dtype=torch.float32).item()  # as it will be asked: 1 - 1e-8 is 1
        output, x, t = (torch.tensor([[value]], dtype=torch.float64) for value in (0.7, 0.3, t))
        return bool((quantity(output, x, t[0]).abs() < HUGE).all())

    def _check_finite(self, what, quantity, interval, eps="sample_eps"):
        for t in interval:
            if not self._is_finite(quantity, t):
                settings = f"path {self.settings.path_type} with {self.settings.prediction} prediction"
                raise ValueError(f"{settings}: the {what} is not finite at t = {t:g}; a larger {eps} keeps away from there")

    def scale(self, t):
        """By what a state of the network's own is multiplied to be one of the path at t, an end of the interval."""
        return 1.0

    def times_of(self, own_times):
        """The times of the path at which the network is asked at own_times, a list."""
        return tuple(own_times)

    def loss_of_path(self, loss):
        """The velocity loss by the path's time of the network's own, a function of times."""
        return loss

    def training_times(self, u):
        """Times (N,) in the training interval, of uniform u (N,) in [0, 1), as often as the time law wants them."""
        t0, t1 = self.train_interval
        return t0 + (t1 - t0) * shifted(self.settings.make_law().times(u), self.settings.time_shift)

    def training_density(self, t):
        """How often training sees times t (N,) inside of its interval, over which the density's integral is 1."""
        t0, t1 = self.train_interval
        law, shift = self.settings.make_law(), self.settings.time_shift
        return shifted_density(law.density, (t - t0) / (t1 - t0), shift) / (t1 - t0)

    def training_losses(self, model, x1, model_kwargs=None, x0=None, t=None):
        """Loss of each sample of x1 (N, ...): {"loss": (N,), "pred": the network's output, shaped like x1}.

        Noise x0 and then times t (N,) are drawn from torch's default generator on x1's device unless given.
        Losses: SiT eq. 4 (velocity), eq. 7 (score, multiplied by sigma), and the usual noise loss.
        """
        if x0 is None:
            x0 = torch.randn_like(x1)
        if t is None:
            t = self.training_times(torch.rand(x1.shape[0], device=x1.device, dtype=x1.dtype))
        t, xt, ut = self.path_sampler.plan(t, x0, x1)
        pred = self._ask(model, xt, t, model_kwargs or {})
        return {"loss": self._loss(pred, Point(x0, x1, t, xt, ut)), "pred": pred}

    def _loss(self, output, point):
        error = self.prediction.error(output, point)
        return LOSS_WEIGHTS[self.settings.loss_weight](self.path_sampler, point.t) * error.flatten(1).square().mean(1)

    def predict(self, model, x, t, model_kwargs):
        """(v, score) at x (N, ...) and t (N,), both read off one network call."""
        output = self._ask(model, x, t, model_kwargs)
        return self.prediction.velocity(output, x, t), self.prediction.score(output, x, t)

    def predict_velocity(self, model, x, t, model_kwargs):
        """v at x and t from one network call; regular also where the score is not."""
        return self.prediction.velocity(self._ask(model, x, t, model_kwargs), x, t)

    def predict_data(self, model, x, t, model_kwargs):
        """E[x1 | x], what the network expects the data to be at x and t, from one network call."""
        return self.path_sampler.get_data_from_velocity(self.predict_velocity(model, x, t, model_kwargs), x, t)

    def _ask(self, model, x, t, model_kwargs):
        output = model(*self.prediction.inputs(x, t), **model_kwargs)
        if output.shape != x.shape:
            raise ValueError(f"the network returned {tuple(output.shape)} for an input of {tuple(x.shape)}")
        return output


def _first(*values):
    """The first value that is not None."""
    return next(value for value in values if value is not None)
