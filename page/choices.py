"""What a visitor chooses, as the library's objects. Bad choices raise UsageError, a line for the page."""

from dataclasses import dataclass, field

from common.errors import UsageError
from inference import ODE, SDE, Guidance

MODES = ("ODE", "SDE")
MOST_NORM = 1e6  # of D(t)
MOST_PICTURES, MOST_FRAMES, MOST_STEPS = 32, 40, 2000


@dataclass(frozen=True)
class Choices:
    """labels: class ids of the first checkpoint, each drawn so many times; modes: words of MODES; frames: states of the
    trajectory that are shown, 0 being none but the last."""

    labels: tuple = (0,)
    each: int = 1
    seed: int = 0
    modes: tuple = MODES
    guidance: Guidance = field(default_factory=Guidance)
    ode: ODE = field(default_factory=ODE)
    sde: SDE = field(default_factory=SDE)
    frames: int = 16

    def __post_init__(self):
        if not self.labels:
            raise UsageError("classes: choose one or more")
        if not self.modes:
            raise UsageError("draw by: choose ODE, SDE or both")
        _within("pictures of each class", self.each, 1, MOST_PICTURES)
        if len(self.all_labels) > MOST_PICTURES:
            raise UsageError(f"{len(self.all_labels)} pictures: the page draws up to {MOST_PICTURES}, sample_ddp.py any number")
        _within("seed", self.seed, -(2**63), 2**64 - 1)
        _within("frames", self.frames, 0, MOST_FRAMES)
        _within("norm", self.sde.norm, 0, MOST_NORM)
        for mode in self.modes:
            _within(f"steps of the {mode}", self.solver(mode).num_steps, 2, MOST_STEPS)

    @property
    def all_labels(self):
        """A class id for each picture, as sample.py orders them."""
        return [label for label in self.labels for _ in range(self.each)]

    def solver(self, mode):
        return self.ode if mode == "ODE" else self.sde


def _within(what, value, low, high):
    if not low <= value <= high:
        raise UsageError(f"{what}: must be from {low:,} to {high:,}, not {value:,}")


def number(values, name, kind=float):
    """values[name] as a number. Raises UsageError where a field was left empty, or is no such number."""
    value, called = values.get(name), name.replace("_", " ")
    try:
        if kind is int and int(value) != float(value):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        wanted = "a whole number" if kind is int else "a number"
        raise UsageError(f"{called}: give {wanted}" + ("" if value is None else f", not {value}")) from error


def read(values):
    """The Choices of a page's fields, {name: value} with the names of layout.py."""
    modes = tuple(mode for mode in MODES if mode in (values.get("modes") or ()))
    channels = None if values.get("channels") == "all" else 3
    sde = dict(method=values.get("sde_method"), form=values.get("form"), last_step=values.get("last_step"))
    return Choices(
        labels=tuple(values.get("labels") or ()),
        each=number(values, "pictures", int),
        seed=number(values, "seed", int),
        modes=modes,
        guidance=Guidance(number(values, "guidance"), channels, number(values, "low"), number(values, "high")),
        ode=ODE(values.get("ode_method"), number(values, "ode_steps", int)),
        sde=SDE(
            **sde,
            norm=number(values, "norm"),
            last_step_size=number(values, "last_step_size"),
            num_steps=number(values, "sde_steps", int),
        ),
        frames=number(values, "frames", int),
    )
