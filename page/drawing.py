"""From choices to pictures: what the page shows, without how it looks."""

import time
from dataclasses import dataclass, field, fields

import numpy as np

from common.errors import UsageError, UserError
from common.pixels import opened
from data.images import load_image
from inference import Guidance, Pipeline
from inference.expectation import expected_data
from transport import SolverError

from .words import command, library, library_of_image

MOST_NUMBERS = 100_000_000  # of all states of one solve, 0.4 GB on the device
MOST_PIXELS = 16_000_000  # of all strips of one answer, so that a page stays some tens of megabytes
MOST_IMAGE = 50_000_000  # pixels of an image that is dropped in
EVERY = 0.2  # seconds between two words of progress


@dataclass
class Watched(Pipeline):
    """A pipeline for one request: the same network, its own count of calls, and on_call(t) before each of them."""

    on_call: object = bool

    @classmethod
    def of(cls, pipe, on_call):
        own = {entry.name: getattr(pipe, entry.name) for entry in fields(Pipeline)}
        return cls(**own | dict(calls=0), on_call=on_call)

    def network(self, guidance=Guidance(), gradients=False):  # noqa: B008
        network = super().network(guidance, gradients)
        network.register_forward_pre_hook(lambda module, inputs: self.on_call(inputs[1]))
        return network


@dataclass
class Source:
    """A checkpoint of the page. ckpt: as it was given; flags: those of sample.py that it was opened with, beside it; told: the
    same as Pipeline.load's keywords."""

    ckpt: str
    pipe: Pipeline
    flags: list = field(default_factory=list)
    told: dict = field(default_factory=dict)

    @property
    def name(self):
        return "/".join(self.pipe.path.parts[-3:])

    def class_name(self, label):
        names = self.pipe.recipe.classes
        return str(names[label]) if label < len(names) else f"class {label}"


def translated(label, source, first):
    """The id that a checkpoint has for the class that another calls label: that of its name, where both have names.

    Raises UsageError where it does not know the class.
    """
    names, theirs = first.pipe.recipe.classes, source.pipe.recipe.classes
    if source is first or names == theirs:
        known = label < source.pipe.recipe.num_classes
    elif names and theirs:
        known, label = names[label] in theirs, names[label]
        if known:
            return theirs.index(label)
    else:
        known = first.pipe.recipe.num_classes == source.pipe.recipe.num_classes
    if not known:
        raise UsageError(f"{source.name} does not know {label if isinstance(label, str) else first.class_name(label)}")
    return label


@dataclass
class Card:
    """What one checkpoint gives by one solver. states, expected: uint8 (frames, N, H, W, 3), noise first, at times."""

    title: str
    mode: str
    names: list = field(default_factory=list)
    states: np.ndarray = None
    expected: np.ndarray = None
    times: list = field(default_factory=list)
    calls: int = 0
    seconds: float = 0.0
    more_calls: int = 0  # for what the network expects
    notes: list = field(default_factory=list)
    error: str = None
    command: str = None
    library: str = None


@dataclass
class ImageCard:
    """What one checkpoint makes of an image: pictures is {caption: uint8 (H, W, 3)}."""

    title: str
    pictures: dict = field(default_factory=dict)
    bits: float = None
    nats: float = None
    facts: list = field(default_factory=list)
    error: str = None
    library: str = None


def spaced(count, most):
    """Up to most indices of count things, evenly, the first and the last among them; the last alone for most < 2."""
    most = min(count, most)
    return [count - 1] if most < 2 else [round(i * (count - 1) / (most - 1)) for i in range(most)]


def frames_for(choices, sources):
    """How many states of each trajectory are shown: as many as were asked for, if the page can hold them."""
    shapes = [source.pipe.autoencoder.factor**2 * np.prod(source.pipe.latent_shape[1:]) for source in sources]
    each = 2 * len(choices.modes) * len(choices.all_labels) * sum(shapes)
    return int(min(choices.frames, max(1, MOST_PIXELS // each)))


class Meter:
    """Tells of progress while the network is asked: say(share, line) with the share of the time from noise to data."""

    def __init__(self, check, say, done, total):
        self.check, self.say, self.done, self.total = check, say, done, total
        self.calls, self.latest, self.phase = 0, 0.0, ""

    def __call__(self, t):
        self.check()
        self.calls += 1
        if time.monotonic() - self.latest > EVERY:
            self.latest, share = time.monotonic(), float(t[0])
            self.say((self.done + share) / self.total, f"{self.phase}: {self.calls} network calls")


def _decoded(pipe, states, meter):
    """Frames of latents as uint8 (frames, N, H, W, 3)."""
    frames = []
    for state in states:
        meter.check()
        frames.append(pipe.decode(state))
    return np.stack(frames)


def _card(source, first, mode, choices, frames, meter):
    card, solver = Card(source.name, mode), choices.solver(mode)
    own = [translated(label, source, first) for label in choices.labels]
    labels = [label for label in own for _ in range(choices.each)]
    pipe = Watched.of(source.pipe, meter)
    if frames > 1 and solver.num_steps * len(labels) * np.prod(pipe.latent_shape) > MOST_NUMBERS:
        raise UsageError(f"{solver.num_steps} states of {len(labels)} pictures: too many to keep; fewer, or 0 frames")
    card.names = [source.class_name(label) for label in labels]
    started = time.monotonic()
    settings = dict(seed=choices.seed, solver=solver, guidance=choices.guidance)
    states = pipe.draw(labels, trajectory=frames > 1, **settings)
    card.calls, card.seconds = pipe.calls, time.monotonic() - started
    times, picked = solver.times(pipe)[-len(states) :], spaced(len(states), frames)
    card.times, states = [times[i] for i in picked], [states[i] for i in picked]
    card.states = _decoded(pipe, states, meter)
    if frames > 1:
        expected = expected_data(pipe, states, card.times, labels, choices.guidance)
        card.expected, card.more_calls = _decoded(pipe, expected, meter), pipe.calls - card.calls
    card.command, card.library = command(source, choices, mode, own), library(source, choices, mode, own)
    if frames < choices.frames:
        card.notes.append(f"{frames} frames instead of {choices.frames}: more would make the page too large")
    if source.pipe.latent_shape != first.pipe.latent_shape:
        shapes = f"{source.pipe.latent_shape}, not {first.pipe.latent_shape}"
        card.notes.append(f"its latents are {shapes}: the same seed is other noise")
    return card


def draw(sources, choices, first, check=bool, say=lambda share, line: None):
    """A Card for each checkpoint and mode, from the same noise. What one of them cannot do is its card's error.

    first: the Source by whose class ids the choices speak; check(): called before every network call, may raise to end it
    all; say(share, line): progress.
    """
    cards, total, frames = [], len(sources) * len(choices.modes), frames_for(choices, sources)
    for source in sources:
        for mode in choices.modes:
            meter = Meter(check, say, len(cards), total)
            meter.phase = f"{source.name}, {mode}" if len(sources) > 1 else mode
            try:
                cards.append(_card(source, first, mode, choices, frames, meter))
            except (UserError, SolverError) as error:
                cards.append(Card(source.name, mode, error=str(error)))
    return cards


def _image_card(source, first, file, label, choices, meter):
    card, pipe = ImageCard(source.name), Watched.of(source.pipe, meter)
    image = load_image(file, pipe.recipe.image_size, name=lambda: file.name).permute(1, 2, 0)[None].numpy()
    null = 0 if pipe.recipe.null_class is None else pipe.recipe.null_class
    if label is None and pipe.recipe.null_class is None and pipe.recipe.num_classes > 1:
        raise UsageError(f"{source.name} was trained without a null class: choose the image's class")
    own = null if label is None else translated(label, source, first)
    settings, latents = dict(solver=choices.ode, guidance=choices.guidance), pipe.to_latents(image)
    meter.phase, started = "to noise", time.monotonic()
    z = pipe.draw([own], noise=latents, reverse=True, **settings)[-1]
    meter.phase = "and back"
    back = pipe.draw([own], noise=z, **settings)[-1]
    calls = pipe.calls
    meter.phase = "likelihood"
    nats, bits = pipe.likelihood(image, [own], seed=choices.seed, solver=choices.ode)
    card.bits, card.nats = float(bits[0]), float(nats[0])
    card.pictures = {"image": image[0], "its noise": pipe.decode(z)[0], "decoded back": pipe.decode(back)[0]}
    error = (back - latents).square().mean().sqrt().item()
    where = "pixels" if pipe.autoencoder.name == "none" else "latents (not comparable between autoencoders)"
    card.facts = [
        f"bits/dim of {latents[0].numel():,} dimensions in {where}",
        f"the noise has mean {z.mean():.3f} and standard deviation {z.std():.3f}",
        f"the way to noise and back changed the latents by {error:.1e} (rms)",
        f"{calls} network calls there and back, {pipe.calls - calls} for the likelihood, {time.monotonic() - started:.1f} s",
    ]
    card.library = library_of_image(source, choices, own, file.name)
    return card


def refuse_large(file):
    """Raises UserError for an image of more pixels than anybody drops in: a file of kilobytes may have billions."""
    with opened(file, lambda: file.name) as image:
        pixels = image.width * image.height
    if pixels > MOST_IMAGE:
        raise UserError(f"{file.name}: {pixels:,} pixels; the page takes up to {MOST_IMAGE:,}")


def encode(sources, choices, file, label, first, check=bool, say=lambda share, line: None):
    """An ImageCard for each checkpoint: the image's way to noise and back by the ODE, and its likelihood, without guidance.

    file: a Path; label: a class id of first, or None for the null class. The rest is as draw has it.
    """
    cards = []
    for source in sources:
        try:
            refuse_large(file)
            cards.append(_image_card(source, first, file, label, choices, Meter(check, say, len(cards), len(sources))))
        except (UserError, SolverError) as error:
            cards.append(ImageCard(source.name, error=str(error).replace(str(file), file.name)))  # not where it lies
    return cards
