"""The choices that make a Transport, in one place: flags, checkpoints and create_transport take theirs from here."""

import enum
import math
from dataclasses import dataclass, field, fields, replace

from .path import PATHS
from .prediction import LOSS_WEIGHTS, PREDICTIONS
from .times import TIME_LAWS, automatic_shift, make_law


def _word(value):
    """A word of a table, or that of a member of ModelType, PathType or WeightType."""
    return value.value if isinstance(value, enum.Enum) else value


def choice(default, table, help):
    return field(default=default, metadata=dict(choices=table, help=help))


def number(help, check, wanted, default=None, parse=float):
    """A number of which check holds; None too, where that is the default."""
    return field(default=default, metadata=dict(choices=None, help=help, check=check, wanted=wanted, parse=parse))


def float_or_auto(text):
    return text if text == "auto" else float(text)


float_or_auto.__name__ = "number, or auto"  # for the command line's message


def distance(help):
    return number(help, lambda value: 0 <= value < 0.5, "in [0, 0.5)")


@dataclass(frozen=True)
class TransportSettings:
    """One choice of path, prediction, loss weight, time intervals and time law, by the words of the command line.

    train_eps, sample_eps: how far training and sampling stay from the ends of [0, 1]; None is the path's or the
    prediction's own distance. time_mean, time_scale: numbers of the time law; None are its own. time_shift moves training's
    times and the points of fixed solvers towards noise; the word auto stands for a number until fitted() has made it one.
    Raises ValueError for a word that is in no table, for a loss weight with a prediction that takes none, for a number that
    the law has not, and for numbers outside their range.
    """

    path_type: str = choice("Linear", PATHS, "interpolant")
    prediction: str = choice("velocity", PREDICTIONS, "what the network's output means")
    loss_weight: str = choice(None, LOSS_WEIGHTS, "weight of the score and noise losses over time")
    train_eps: float = distance("training's distance from the ends of [0, 1] (path's own)")
    sample_eps: float = distance("sampling's distance from the ends of [0, 1] (path's own)")
    time_law: str = choice("uniform", TIME_LAWS, "how often training sees which time")
    time_mean: float = number("m of --time-law logit-normal (0)", math.isfinite, "finite")
    time_scale: float = number("s of --time-law logit-normal (1) and mode (1.29)", math.isfinite, "finite")
    time_shift: float = number(
        "of training's times and fixed solvers' points to noise; auto: by the size of the latents",
        lambda value: value == "auto" or 1 <= value < math.inf,
        "at least 1, or auto",
        default=1.0,
        parse=float_or_auto,
    )

    def __post_init__(self):
        for entry in fields(self):
            object.__setattr__(self, entry.name, _word(getattr(self, entry.name)))
            value, choices = getattr(self, entry.name), entry.metadata["choices"]
            if choices is not None and value not in choices:
                what = entry.name.replace("_", " ")
                raise ValueError(f"unknown {what} {value!r}; choose from {', '.join(map(str, choices))}")
            left_out = value is None and entry.default is None
            if choices is None and not left_out and not entry.metadata["check"](value):
                raise ValueError(f"{entry.name} must be {entry.metadata['wanted']}, not {value}")
        self.make_law()
        if self.loss_weight is not None and not PREDICTIONS[self.prediction].takes_weight:
            weighted = " or ".join(name for name, kind in PREDICTIONS.items() if kind.takes_weight)
            raise ValueError(f"loss weight {self.loss_weight!r} needs {weighted} prediction; {self.prediction} has no weight")

    def make_law(self):
        """The law of training's times."""
        return make_law(self.time_law, mean=self.time_mean, scale=self.time_scale)

    def fitted(self, numbers):
        """These settings for latents of so many numbers, which is what the shift called auto goes by."""
        return replace(self, time_shift=automatic_shift(numbers)) if self.time_shift == "auto" else self
