"""One piece of the ladder's measurements, as a process of its own: python experiments/measuring.py OUT PIECE

PIECE is judge; or RUNG-SEED, a trained step of the ladder; or samplers-SEED-GUIDANCE. Its numbers go to OUT/PIECE.json.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.atomic import write_atomically, write_json
from common.distributed import World
from common.spread import mean_and_error, spread
from common.streams import generator
from data.parts import split
from data.sources import LabelledImages, open_dataset
from experiments.judge import Judge, diversity, train_judge
from experiments.rungs import MAIN, SAMPLERS, TOP
from inference import Guidance, Pipeline
from inference.chunked import Labels
from inference.velocity_loss import Points, measure
from metrics.scores import frechet_distance, sliced_distance, statistics
from train_utils import run

REAL, HELD_OUT = 20_000, 5_000  # images that the judge sees at most
CHUNK = 125  # samples at once
BINS = 20  # of the loss by time
FLOORS = 5  # sets of real images for the floor


def images_of(part, limit):
    """(uint8 (N, 3, H, W), labels (N,)) of up to so many evenly spread items."""
    images, labels = zip(*(part[i] for i in spread(len(part), limit)))
    return torch.stack(images), np.array(labels)


def about(samples, held_out, real_diversity):
    """FD, MIND and diversity of (features, labels) against those of held-out images."""
    features, reference = samples[0], held_out[0]
    return dict(
        fd=frechet_distance(*statistics(features), *statistics(reference)),
        mind=sliced_distance(features, reference),
        diversity=diversity(*samples) / real_diversity,
    )


def as_many_of_each(labels, count, numbers):
    """Indices of up to count images, as many of each class as of the others, drawn by a torch generator."""
    order, classes = torch.randperm(len(labels), generator=numbers).numpy(), np.unique(labels)
    return np.concatenate([order[labels[order] == c][: count // len(classes)] for c in classes])


def make_judge(out, settings):
    """Train the judge on what SiT is trained on, and see how near real images come to held-out ones."""
    dataset = open_dataset(settings["data_path"], settings["image_size"])
    trained, held_out = split(dataset, settings["held_out"])
    images, labels = images_of(trained, REAL)
    judge = train_judge(images, torch.from_numpy(labels), len(dataset.classes), dataset.mirrors)
    others, other_labels = images_of(held_out, HELD_OUT)
    (own, _), (features, seen) = judge.see(images), judge.see(others)
    spread_of_real, floors = diversity(features, other_labels), []
    for i in range(FLOORS):
        some = as_many_of_each(labels, settings["samples"], generator("cpu", i, "floor"))
        floors.append(about((own[some], labels[some]), (features, other_labels), spread_of_real))
    state = dict(judge=judge.state_dict(), features=features, labels=torch.from_numpy(other_labels))
    write_atomically(out / "judge.pt", lambda file: torch.save(state, file))
    floor = {name: mean_and_error([each[name] for each in floors]) for name in floors[0]}
    return dict(
        accuracy=float((seen.numpy() == other_labels).mean()),
        floor=floor,
        trained_on=len(images),
        held_out=len(others),
        diversity=spread_of_real,
        classes=[str(name) for name in dataset.classes],
    )


class Bench:
    """Samples of a pipeline, beside held-out images in the judge's eyes."""

    def __init__(self, out, settings, seed):
        state = torch.load(out / "judge.pt", weights_only=True)
        self.judge = Judge(len(state["judge"]["head.bias"]))
        self.judge.load_state_dict(state["judge"])
        self.real = state["features"], state["labels"].numpy()
        self.spread_of_real = json.loads((out / "judge.json").read_text())["diversity"]
        self.seed, self.count = seed, settings["samples"]
        runs = (out / "runs" / f"{settings['rung']}-{seed}").glob("*/checkpoints/*.pt")
        self.pipe = Pipeline.load(max(runs, key=lambda path: path.name))
        self.labels = Labels(self.pipe.recipe.num_classes, seed, "balanced")

    def measure(self, solver, guidance=Guidance()):  # noqa: B008
        """(numbers of so many samples, the first of each class)"""
        images, calls, started = [], self.pipe.calls, time.time()
        labels = [self.labels.of(i) for i in range(self.count)]
        for first in range(0, self.count, CHUNK):
            rows = range(first, min(self.count, first + CHUNK))
            drawn = dict(seed=self.seed, indices=rows, solver=solver, guidance=guidance)
            images.append(self.pipe.to_images(self.pipe.draw(labels[first : rows.stop], **drawn)[-1]).cpu())
        seconds, chunks = time.time() - started, len(images)
        images, labels = torch.cat(images), np.array(labels)
        features, seen = self.judge.see(images.permute(0, 3, 1, 2))
        numbers = about((features, labels), self.real, self.spread_of_real)
        numbers |= dict(recognised=float((seen.numpy() == labels).mean()), seconds=seconds)
        first = [int(np.flatnonzero(labels == c)[0]) for c in np.unique(labels)[:10]]
        return numbers | dict(calls=(self.pipe.calls - calls) / chunks), images[first].numpy()


def measure_rung(out, settings, seed):
    """Samples by the paper's two samplers, the likelihood of held-out images, and the loss by time."""
    bench, pictures, found = Bench(out, settings, seed), [], {}
    for name, solver in MAIN.items():
        found[name], some = bench.measure(solver)
        pictures.append(some)
    write_atomically(out / f"{settings['rung']}-{seed}.npz", lambda file: np.savez(file, **dict(zip(MAIN, pictures))))
    dataset = LabelledImages(settings["data_path"], bench.pipe.recipe)
    held_out = spread(len(dataset), round(settings["held_out"] * len(dataset)))  # as data.parts.split takes them
    some = [held_out[i] for i in spread(len(held_out), settings["likelihoods"])]
    images, labels = dataset.batch(some)
    _, bits = bench.pipe.likelihood(images.permute(0, 2, 3, 1), labels, seed=seed)
    points = Points(bench.pipe, dataset, some, BINS, seed, settings["data_path"])
    loss = measure(points, World(0, 1, bench.pipe.device))
    return found | dict(bits=float(bits.mean()), loss=loss.mean, times=loss.times)


def measure_samplers(out, settings, seed, guidance):
    """Every sampler on the top of the ladder."""
    bench = Bench(out, settings | dict(rung=TOP), seed)
    guidance = Guidance(guidance, channels=None)
    return {name: bench.measure(solver, guidance)[0] for name, solver in SAMPLERS.items()}


def main(out, piece):
    torch.set_num_threads(1)  # the pieces run side by side, and their numbers do not depend on the machine's cores
    out, settings = Path(out), json.loads((Path(out) / "settings.json").read_text())
    rung, _, rest = piece.rpartition("-")
    if piece == "judge":
        numbers = make_judge(out, settings)
    elif piece.startswith("samplers-"):
        numbers = measure_samplers(out, settings, int(rung.removeprefix("samplers-")), float(rest))
    else:
        numbers = measure_rung(out, settings | dict(rung=rung), int(rest))
    write_json(out / f"{piece}.json", numbers)
    return 0


if __name__ == "__main__":
    run(partial(main, *sys.argv[1:3]), "ladder.py")
