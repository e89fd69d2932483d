"""The choices that make a Transport, in one place: flags, checkpoints and create_transport take theirs from here."""

import enum
from dataclasses import dataclass, field, fields

from .path import PATHS
from .prediction import LOSS_WEIGHTS, PREDICTIONS
from .times import TIME_LAWS


def _word(value):
    """A word of a table, or that of a member of ModelType, PathType or WeightType."""
    return value.value if isinstance(value, enum.Enum) else value


def choice(default, table, help):
    return field(default=default, metadata=dict(choices=table, help=help))


def distance(help):
    return field(default=None, metadata=dict(choices=None, help=help))


@dataclass(frozen=True)
class TransportSettings:
    """One choice of path, prediction, loss weight, time intervals and time law, by the words of the command line.

    train_eps, sample_eps: how far training and sampling stay from the ends of [0, 1]; None is the path's or the
    prediction's own distance. Raises ValueError for a word that is in no table, for a loss weight with a prediction
    that takes none, and for an eps outside [0, 0.5).
    """

    path_type: str = choice("Linear", PATHS, "interpolant")
    prediction: str = choice("velocity", PREDICTIONS, "what the network's output means")
    loss_weight: str = choice(None, LOSS_WEIGHTS, "weight of the score and noise losses over time")
    train_eps: float = distance("training's distance from the ends of [0, 1] (path's own)")
    sample_eps: float = distance("sampling's distance from the ends of [0, 1] (path's own)")
    time_law: str = choice("uniform", TIME_LAWS, "how often training sees which time")

    def __post_init__(self):
        for entry in fields(self):
            object.__setattr__(self, entry.name, _word(getattr(self, entry.name)))
            value, choices = getattr(self, entry.name), entry.metadata["choices"]
            if choices is not None and value not in choices:
                what = entry.name.replace("_", " ")
                raise ValueError(f"unknown {what} {value!r}; choose from {', '.join(map(str, choices))}")
            if choices is None and value is not None and not 0 <= value < 0.5:
                raise ValueError(f"{entry.name} must be in [0, 0.5), not {value}")
        if self.loss_weight is not None and not PREDICTIONS[self.prediction].takes_weight:
            weighted = " or ".join(name for name, kind in PREDICTIONS.items() if kind.takes_weight)
            raise ValueError(f"loss weight {self.loss_weight!r} needs {weighted} prediction; {self.prediction} has no weight")
