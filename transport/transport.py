"""Transport: what the network is asked to predict, how it is trained, and where on [0, 1] it may be asked."""

import enum

import torch

from .path import GVPCPlan, ICPlan, VPCPlan, expand_t


class ModelType(enum.Enum):
    """What the network's output means."""

    VELOCITY = "velocity"
    SCORE = "score"
    NOISE = "noise"


class PathType(enum.Enum):
    LINEAR = "Linear"
    GVP = "GVP"
    VP = "VP"


class WeightType(enum.Enum):
    """Weight of the noise and score losses over time (SiT table 8 and section 3.2)."""

    NONE = None
    VELOCITY = "velocity"
    LIKELIHOOD = "likelihood"


PLANS = {PathType.LINEAR: ICPlan, PathType.GVP: GVPCPlan, PathType.VP: VPCPlan}


class Transport:
    """One choice of path, prediction, loss weight and time interval. `create_transport` builds it from strings.

    Raises ValueError for a loss weight with velocity prediction, whose loss has none, and for an eps outside [0, 0.5).
    """

    def __init__(self, *, path_type, model_type, weight_type=WeightType.NONE, train_eps=None, sample_eps=None):
        if model_type is ModelType.VELOCITY and weight_type is not WeightType.NONE:
            raise ValueError(f"loss weight {weight_type.value!r} needs score or noise prediction; velocity has no weight")
        for name, eps in (("train_eps", train_eps), ("sample_eps", sample_eps)):
            if eps is not None and not 0 <= eps < 0.5:
                raise ValueError(f"{name} must be in [0, 0.5), not {eps}")
        self.path_type = path_type
        self.model_type = model_type
        self.weight_type = weight_type
        self.path_sampler = PLANS[path_type]()
        self.user_sample_eps = sample_eps
        if path_type is PathType.VP:
            default_train_eps, default_sample_eps = 1e-5, 1e-3
        elif model_type is ModelType.VELOCITY:
            default_train_eps, default_sample_eps = 0.0, 0.0
        else:
            default_train_eps, default_sample_eps = 1e-3, 1e-3
        self.train_eps = default_train_eps if train_eps is None else train_eps
        self.sample_eps = default_sample_eps if sample_eps is None else sample_eps

    def _interval(self, eps):
        return (0.0 if self.path_type is PathType.VP else eps), 1.0 - eps  # VP is regular at t = 0: alpha(0) > 0

    @property
    def train_interval(self):
        """(t0, t1) from which training draws its times."""
        return self._interval(self.train_eps)

    @property
    def ode_interval(self):
        """(t0, t1) of the sampling ODE; reverse and likelihood run it backwards.

        Raises ValueError where a sample_eps of 0 would ask for a velocity that is infinite.
        """
        linear_like = self.path_type is not PathType.VP and self.model_type is not ModelType.VELOCITY
        vp_noise = self.path_type is PathType.VP and self.model_type is ModelType.NOISE
        if self.sample_eps == 0 and (linear_like or vp_noise):
            where = "t = 0" if linear_like else "t = 1"
            raise ValueError(
                f"{self.path_type.value} with {self.model_type.value} prediction has an infinite velocity at {where}: "
                "sample_eps must be above 0"
            )
        return self._interval(self.sample_eps)

    def sde_interval(self, diffusion_form, last_step_size):
        """(t0, t1) of the sampling SDE before its last step.

        It starts where the ODE does, except that SBDM's diffusion is infinite at t = 0 of Linear and GVP; it ends where
        the last step begins, or at 1 - eps where there is none, since the score is infinite at t = 1.
        """
        eps = 1e-3 if self.user_sample_eps is None else self.user_sample_eps
        singular = diffusion_form == "SBDM" and self.path_type is not PathType.VP
        if eps == 0 and (singular or not last_step_size):
            raise ValueError("the SDE is singular at an end of [0, 1]: sample_eps must be above 0")
        starts_at_zero = self.path_type is PathType.VP  # and is not concerned by what the ODE meets at its end
        t0 = eps if singular else 0.0 if starts_at_zero else self.ode_interval[0]
        t1 = 1.0 - (last_step_size or eps)
        if t0 >= t1:
            raise ValueError(f"last_step_size {last_step_size} leaves no time for the SDE, which starts at t = {t0:g}")
        return t0, t1

    def training_losses(self, model, x1, model_kwargs=None, x0=None, t=None):
        """Loss of each sample of x1 (N, ...): {"loss": (N,), "pred": the network's output, shaped like x1}.

        Noise x0 and then times t (N,) are drawn from torch's default generator on x1's device unless given.
        Losses: SiT eq. 4 (velocity), eq. 7 (score, multiplied by sigma), and the usual noise loss.
        """
        if x0 is None:
            x0 = torch.randn_like(x1)
        if t is None:
            t = torch.rand(x1.shape[0], device=x1.device, dtype=x1.dtype)
            t0, t1 = self.train_interval
            t = t0 + (t1 - t0) * t
        t, xt, ut = self.path_sampler.plan(t, x0, x1)
        pred = self._ask(model, xt, t, model_kwargs or {})
        if self.model_type is ModelType.VELOCITY:
            error = pred - ut
        elif self.model_type is ModelType.NOISE:
            error = pred - x0
        else:
            error = self.path_sampler.compute_sigma_t(expand_t(t, x1))[0] * pred + x0
        return {"loss": self.loss_weight(t) * error.flatten(1).square().mean(1), "pred": pred}

    def loss_weight(self, t):
        """w(t) of shape (N,): 1, (g / sigma)^2 (as if velocity were learnt) or g / sigma^2 (a bound on the likelihood)."""
        sigma = self.path_sampler.compute_sigma_t(t)[0]
        g = self.path_sampler.compute_g_t(t)
        if self.weight_type is WeightType.VELOCITY:
            return (g / sigma) ** 2
        if self.weight_type is WeightType.LIKELIHOOD:
            return g / sigma**2
        return torch.ones_like(t)

    def velocity(self, output, x, t):
        """v(x, t) from the network's output at x (N, ...) and t (N,)."""
        if self.model_type is ModelType.VELOCITY:
            return output
        if self.model_type is ModelType.SCORE:
            return self.path_sampler.get_velocity_from_score(output, x, t)
        return self.path_sampler.get_velocity_from_noise(output, x, t)

    def score(self, output, x, t):
        """grad log p_t(x) from the network's output at x and t."""
        if self.model_type is ModelType.VELOCITY:
            return self.path_sampler.get_score_from_velocity(output, x, t)
        if self.model_type is ModelType.SCORE:
            return output
        return -output / self.path_sampler.compute_sigma_t(expand_t(t, x))[0]

    def predict(self, model, x, t, model_kwargs):
        """(v, score) at x (N, ...) and t (N,), both read off one network call."""
        output = self._ask(model, x, t, model_kwargs)
        return self.velocity(output, x, t), self.score(output, x, t)

    def predict_velocity(self, model, x, t, model_kwargs):
        """v at x and t from one network call; regular also where the score is not."""
        return self.velocity(self._ask(model, x, t, model_kwargs), x, t)

    @staticmethod
    def _ask(model, x, t, model_kwargs):
        output = model(x, t, **model_kwargs)
        if output.shape != x.shape:
            raise ValueError(f"the network returned {tuple(output.shape)} for an input of {tuple(x.shape)}")
        return output
