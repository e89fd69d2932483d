"""At which times the network is trained: each law makes times in [0, 1], 0 being noise, of uniform u (N,) in [0, 1).

Transport.training_times fits them into the training interval. A law says how often a time is seen; no loss weight makes
up for it (as in SD3, Esser et al., arXiv 2403.03206, section 3.1, whose time runs the other way). Tensors are used by their
methods alone, so that the names in TIME_LAWS are there without torch.
"""

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class TimeLaw:
    """A law has times(u), which rises or falls all the way, and numbers of its own as fields."""

    def density(self, t):
        """Of the times, at t in (0, 1): 1 / |d times/du| where times(u) = t, which is sought by halving."""
        low, high = t.double() * 0, t.double() * 0 + 1
        rises = bool(self.times(high[:1]) > self.times(low[:1]))
        for _ in range(60):
            middle = (low + high) / 2
            beyond = (self.times(middle) > t) == rises
            low, high = low.where(beyond, middle), high.where(~beyond, middle)
        h = 1e-4 * low * (1 - low)
        return (2 * h / (self.times(low + h) - self.times(low - h)).abs()).to(t.dtype)


class Uniform(TimeLaw):
    def times(self, u):
        return u

    def density(self, t):
        return t.new_ones(t.shape)


@dataclass(frozen=True)
class LogitNormal(TimeLaw):
    """sigmoid(mean + scale n), n standard normal (SD3, eq. 19): the middle more often. A mean above 0 leans to the data; SD3's,
    whose time runs the other way, to the noise."""

    mean: float = 0.0
    scale: float = 1.0

    def __post_init__(self):
        if self.scale <= 0:
            raise ValueError(f"time_scale {self.scale}: that of logit-normal times must be above 0")

    def times(self, u):
        normal = 2**0.5 * (2 * u - 1).erfinv()
        return (self.mean + self.scale * normal).sigmoid()

    def density(self, t):
        z = (t.logit() - self.mean) / self.scale
        return (-0.5 * z**2).exp() / (self.scale * math.sqrt(2 * math.pi) * t * (1 - t))


@dataclass(frozen=True)
class Mode(TimeLaw):
    """SD3's eq. 20: the middle more often, and the ends still; with a scale below 0 the ends more often."""

    scale: float = 1.29

    def __post_init__(self):
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(f"time_scale {self.scale}: that of mode times must be in [-1, {2 / (math.pi - 2):.4f}]")

    def times(self, u):
        u = u.clamp(min=2**-25)  # 0 comes, if rarely, and is the data's end, where a loss may be infinite
        return 1 - u - self.scale * ((u * math.pi / 2).cos() ** 2 - 1 + u)


class CosMap(TimeLaw):
    """On the linear path these have as much noise as uniform times on a cosine path (SD3, section 3.1)."""

    def times(self, u):
        return 1 - 1 / ((u * math.pi / 2).tan() + 1)

    def density(self, t):
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


# --time-law: a new law is a class and a line here.
TIME_LAWS = {"uniform": Uniform, "logit-normal": LogitNormal, "mode": Mode, "cosmap": CosMap}


def make_law(name, **numbers):
    """The law called name with those of its numbers that are not None. Raises ValueError for one that it has not."""
    numbers = {key: value for key, value in numbers.items() if value is not None}
    for key in numbers.keys() - {entry.name for entry in fields(TIME_LAWS[name])}:
        having = " and ".join(law for law, kind in TIME_LAWS.items() if key in {entry.name for entry in fields(kind)})
        raise ValueError(f"time_{key} {numbers[key]}: it goes with time_law {having}, not {name}")
    return TIME_LAWS[name](**numbers)


def shifted(t, shift):
    """t in [0, 1] moved towards noise, shift >= 1 (SD3, eq. 23): of larger images, noise of the same size hides less."""
    return t if shift == 1 else t / (shift - (shift - 1) * t)


def shifted_density(density, t, shift):
    """That of shifted times: density(t) is that of the times before."""
    before = shift * t / (1 + (shift - 1) * t)
    return density(before) * shift / (1 + (shift - 1) * t) ** 2


def automatic_shift(numbers):
    """That of --time-shift auto: the root of how many times more numbers a latent has than one of 256 px (4 x 32 x 32)."""
    return max(1.0, math.sqrt(numbers / 4096))
