"""How samples are drawn: solver and guidance, as small objects that check themselves. Bad ones raise UsageError."""

from dataclasses import dataclass

from common.errors import UsageError, as_usage_error
from transport.path import PATHS
from transport.solvers import check_ode, check_sde

DEQUANTIZE = ("none", "uniform")  # what is added to 8-bit levels before their likelihood


def check_path(path):
    if path not in (None, *PATHS):
        raise UsageError(f"--sampling-path {path}: choose from {', '.join(PATHS)}")


def sampler_on(path, pipeline):
    """transport's Sampler of a pipeline's network, on the path of that name."""
    from transport import Sampler
    from transport.transfer import on_path

    return Sampler(on_path(pipeline.transport, path))


@dataclass(frozen=True)
class ODE:
    """The probability flow. method: a word of transport's ODE_METHODS; num_steps counts points in time and is for fixed
    solvers, atol and rtol are for adaptive ones. path: a word of PATHS to sample along, None being the network's own."""

    method: str = "dopri5"
    num_steps: int = 250
    atol: float = 1e-6
    rtol: float = 1e-3
    path: str = None

    def __post_init__(self):
        check_path(self.path)
        with as_usage_error():
            check_ode(self.method, self.num_steps)
        for name, value in (("atol", self.atol), ("rtol", self.rtol)):
            if not 0 <= value < float("inf"):
                raise UsageError(f"--{name} {value}: must be a finite number of at least 0")

    @property
    def settings(self):
        return dict(sampling_method=self.method, num_steps=self.num_steps, atol=self.atol, rtol=self.rtol)

    def sampler(self, pipeline):
        """transport's Sampler on the path."""
        return sampler_on(self.path, pipeline)

    def times(self, pipeline):
        """Times of a trajectory's states, noise first, a list."""
        return self.sampler(pipeline).ode_times(self.method, self.num_steps).tolist()

    def sampling(self, pipeline, randn, **more):
        """fn(z, model, y=labels) -> states, of transport's Sampler. more: edges, reverse, trajectory, on_step."""
        return self.sampler(pipeline).sample_ode(**self.settings, **more)


@dataclass(frozen=True)
class SDE:
    """dX = (v + D score) dt + sqrt(2 D) dW. form and norm are those of D(t); the paper writes w = 2 D. num_steps counts
    points in time, before the last step. path: as the ODE's. eta: price of the noise in form KL's bound, for which loss is
    the file of measure_loss.py, None being the one beside the checkpoint."""

    method: str = "Euler"
    form: str = "sigma"
    norm: float = 1.0
    last_step: str = "Mean"
    last_step_size: float = 0.04
    num_steps: int = 250
    path: str = None
    eta: float = None
    loss: str = None

    def __post_init__(self):
        check_path(self.path)
        object.__setattr__(self, "last_step", str(self.last_step))  # Python's None is the word None
        with as_usage_error():
            check_sde(self.method, self.form, self.norm, self.last_step, self.last_step_size, self.num_steps)
        if self.eta is not None and (self.form != "KL" or not 0 < self.eta < float("inf")):
            raise UsageError(f"--diffusion-eta {self.eta}: it goes with --diffusion-form KL, and must be above 0")
        if self.loss is not None and self.eta is None:
            raise UsageError("--diffusion-loss goes with --diffusion-eta")

    def diffusion(self, pipeline, transport):
        """The word, or function, of D(t)."""
        if self.eta is None:
            return self.form
        from transport.diffusion import PenalisedKL

        from .velocity_loss import loss_of

        return PenalisedKL(self.eta, transport.loss_of_path(loss_of(pipeline, self.loss)))

    def times(self, pipeline):
        """Times of a trajectory's states, noise first, a list."""
        sampler = sampler_on(self.path, pipeline)
        form = self.diffusion(pipeline, sampler.transport)
        return sampler.sde_times(form, self.last_step, self.last_step_size, self.num_steps).tolist()

    def sampling(self, pipeline, randn, **more):
        """fn(z, model, y=labels) -> states, of transport's Sampler. randn(x): its noise. more: edges, trajectory, on_step."""
        sampler = sampler_on(self.path, pipeline)
        return sampler.sample_sde(
            sampling_method=self.method,
            diffusion_form=self.diffusion(pipeline, sampler.transport),
            diffusion_norm=self.norm,
            last_step=self.last_step,
            last_step_size=self.last_step_size,
            num_steps=self.num_steps,
            randn=randn,
            **more,
        )


@dataclass(frozen=True)
class Guidance:
    """out + (scale - 1) (out - away), scale 1 being none.

    away is the network's answer for the null class (classifier-free guidance, Ho & Salimans, arXiv 2207.12598), or
    that of weak, the Pipeline of a weaker model (autoguidance, Karras et al., arXiv 2406.02507). Only the first channels
    are guided, 3 in the published numbers, None being all; and only for low <= t <= high (Kynkaanniemi et al., arXiv
    2404.07724), t = 0 being noise.
    """

    scale: float = 1.0
    channels: int = 3
    low: float = 0.0
    high: float = 1.0
    weak: object = None

    def __post_init__(self):
        if not 0 <= self.scale < float("inf"):
            raise UsageError(f"--cfg-scale {self.scale}: must be a finite number of at least 0")
        if not (0 <= self.low <= 1 and 0 <= self.high <= 1):
            raise UsageError(f"--guidance-low {self.low} and --guidance-high {self.high} must be in [0, 1]")
        if self.low > self.high:
            raise UsageError(f"--guidance-low {self.low} is above --guidance-high {self.high}")
        if self.channels is not None and not (isinstance(self.channels, int) and self.channels >= 1):
            raise UsageError(f"--cfg-channels {self.channels}: must be at least 1, or None for all")
        weaker = "--guidance-ckpt or --guidance-weights"
        for flag, given in ((weaker, self.weak), ("--guidance-low", self.low), ("--guidance-high", self.high < 1)):
            if given and self.scale == 1:
                raise UsageError(f"{flag} needs a --cfg-scale other than 1, which is no guidance")

    def refuse_density(self):
        """Raises UsageError for any guidance: the likelihood is that of the network itself."""
        if self.scale != 1:
            raise UsageError("--likelihood is that of the model itself: --cfg-scale must be 1, a guided flow has no density")

    @property
    def edges(self):
        """Times at which the output jumps, for adaptive solvers."""
        return tuple(t for t in (self.low, self.high) if 0 < t < 1) if self.scale != 1 else ()
