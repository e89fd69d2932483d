"""The demo as one page for a browser, demo/index.html: pictures, curves, numbers and what they mean, with nothing to fetch."""

import csv
import os
import platform
import re
import shlex
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template

import numpy as np
import torch
from PIL import Image

from common.checkpoint import load_checkpoint
from common.machine import processor
from demo_pictures import curve, data_uri, film, png, strip
from digit_classifier import features
from inference import ODE, SDE, Guidance, Pipeline
from inference.pictures import Layout, grid
from train import make_parser
from training.monitor import SAMPLES
from training.run_folder import METRICS, by_step

ROOT = Path(__file__).resolve().parent.parent
DERIVED = ("channels",)  # flags that training fills in by itself
# How a film's samples are drawn; the page shows the same as code.
SOLVERS = {"ODE": ODE("heun", num_steps=40), "SDE": SDE(num_steps=60)}
CODE = """from inference import ODE, SDE, Guidance, Pipeline

pipe = Pipeline.load("{path}")
for solver in (ODE("heun", num_steps=40), SDE(num_steps=60)):
    frames = pipe.sample({labels}, seed=0, solver=solver, guidance=Guidance({scale:g}, channels=None), trajectory=True)"""
NEXT = (
    ("docs/app.md", "Play with the model", "make app opens a page: the way from noise, guidance, ODE beside SDE"),
    ("run_SiT.ipynb", "A notebook", "the same by hand, and what lies between two noises or two digits"),
    (
        "docs/training.md#your-own-data",
        "Your own pictures",
        "train.py takes a folder with a sub-folder for each class",
    ),
    ("docs/solvers.md", "Other solvers", "what each gives for its network calls, from Euler's 10 to the SDE's 250"),
    ("docs/diffusion.md", "More or less noise in the SDE", "and the form that is best for a network"),
    ("docs/finetuning.md", "Begin with trained weights", "instead of with none"),
    ("docs/change_one_idea.md", "An idea of your own", "a path, a loss, a backbone or a solver, each in one place"),
    ("docs/paper_to_code.md", "The paper's formulas", "and where each is in the code"),
    ("docs/scaling.md", "What a large run costs", "in time and memory, before you start it"),
)


def training_command(args):
    """The flags of a checkpoint as they are typed: those whose value is not the default."""
    words = ["python", "train.py"]
    for action in make_parser()._actions:
        value = args.get(action.dest)
        if action.dest in DERIVED or value is None or [value] == [action.default] or value == [action.default]:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [action.option_strings[-1], *map(str, values)]
    return shlex.join(words)


def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def training_time(log):
    """Minutes and seconds between the first and the last line of a log.txt."""
    times = [datetime.fromisoformat(time) for time in re.findall(r"^\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\]", log, flags=re.M)]
    seconds = round((times[-1] - times[0]).total_seconds())
    return f"{seconds // 60} min {seconds % 60} s" if seconds >= 60 else f"{seconds} s"


def trained_weights(log):
    """How many a log.txt says there are."""
    return int(re.search(r"([\d,]+) trained parameters", log)[1].replace(",", ""))


def pictures_while_training(run, size, classifier):
    """(HTML of the pictures, [(step, share of its samples that the classifier recognises)])"""
    shown, shares = [], []
    labels = np.arange(SAMPLES) % 10
    for file in sorted((run / "samples").glob("*.png")):
        step, layout, note = int(file.stem), Layout(SAMPLES, *size, columns=4, named=True), ""
        with Image.open(file) as picture:
            if drawn_so := picture.size == layout.size:  # and not as an earlier version did
                images = layout.cut(picture)
                right = int((classifier.predict(features(images)) == labels).sum())
                shares.append((step, right / SAMPLES))
                note = f": {right} of {SAMPLES} recognised"
        source = png(np.asarray(grid(images, 4))) if drawn_so else data_uri(file.read_bytes())  # names would be too small here
        shown.append(
            f'<figure><img src="{source}" alt="samples at step {step}"><figcaption>step {step:,}{note}</figcaption></figure>'
        )
    return "".join(shown), shares


def grid_rows(judged):
    """HTML of all samples of a sampler, a row a class, which a narrow screen breaks in two."""
    rows = []
    for label in np.unique(judged.labels):
        own = judged.images[judged.labels == label]
        parts = [part for part in np.array_split(own, 2) if len(part)]
        pictures = "".join(f'<img src="{png(strip(part, 2))}" alt="samples of class {label}">' for part in parts)
        rows.append(f'<div class="row"><b>{label}</b><div class="halves">{pictures}</div></div>')
    return (
        f"<figure><h3>{escape(judged.title)}</h3>"
        f"<figcaption>{judged.right:.1%} of these {len(judged.images)} recognised as the class that stands before their row."
        f'</figcaption><div class="rows">{"".join(rows)}</div></figure>'
    )


def ways(pipe, labels, scale):
    """The frames of each of SOLVERS, from the same noise."""
    guidance = Guidance(scale, channels=None)
    return [pipe.sample(labels, seed=0, solver=each, guidance=guidance, trajectory=True) for each in SOLVERS.values()]


def numbers(judged, real_diversity):
    """HTML of what was measured of each sampler, with what it means."""
    rows = {
        "Recognised": (
            "samples that a classifier, trained on real digits alone, takes for the class that was asked for",
            [f"{each.right:.1%}" for each in judged],
        ),
        "Diversity": (
            f"mean distance between two samples of a class; that of real digits is {real_diversity:.2f}. "
            "Guidance trades it for clearer digits",
            [f"{each.spread:.2f}" for each in judged],
        ),
        "Network calls": (
            "how often the network is asked for one sample: what sampling costs on any machine",
            [f"{each.calls:g}" for each in judged],
        ),
        "Seconds": ("for all samples, on this machine", [f"{each.record['wall_seconds']:.1f}" for each in judged]),
    }
    cells = lambda values: "".join(f'<td class="number">{value}</td>' for value in values)  # noqa: E731
    return "".join(f"<tr><th>{name}<small>{what}</small></th>{cells(values)}</tr>" for name, (what, values) in rows.items())


def facts(content, log, accuracy):
    """HTML of what was trained, and where."""
    args, versions = content["args"], f"PyTorch {torch.__version__}"
    batch, steps, weights = args["global_batch_size"], content["step"], trained_weights(log)
    rows = {
        f"{weights:,} parameters": f"of {args['model']}: small enough for a CPU, built as the paper's large ones are",
        f"{steps:,} steps": f"of {batch} images each, {steps * batch:,} in all; the data are {content['num_images']:,} digits",
        f"{training_time(log)} of training": "from the first line of its log to the last, samples and checkpoint included",
        f"{accuracy:.1%} of real digits": "new to it are recognised by the classifier, a good judge and not a perfect one",
        f"{processor()}, {cores()} cores": f"wrote this page, with {versions} and Python {platform.python_version()}",
    }
    return "".join(f"<tr><th>{escape(name)}<small>{escape(what)}</small></th></tr>" for name, what in rows.items())


def curves(rows, shares):
    """HTML of the loss by step, and of the share of samples that are recognised where pictures of two steps or more tell."""
    losses = [(int(row["step"]), float(row["loss"])) for row in rows]
    found = [(losses, "training loss", "", False, "The loss: mean squared error of the velocity that the network predicts.")]
    found += [(shares, "samples recognised", "second", True, f"The learning curve: {SAMPLES} samples at each step, judged.")]
    return "".join(
        f"<figure>{curve(points, 'step', name, kind, percent)}<figcaption>{what}</figcaption></figure>"
        for points, name, kind, percent, what in found
        if len(points) > 1
    )


def links(folder):
    """HTML of what to try next, with paths that lead from the page's folder to the repository's."""
    root = Path(os.path.relpath(ROOT, folder.resolve())).as_posix()
    return "".join(f'<li><a href="{escape(f"{root}/{to}")}">{name}</a>: {what}.</li>' for to, name, what in NEXT)


def write_page(folder, run, judged, classifier, accuracy, real_diversity):
    """Write folder/index.html and return its path. run: the folder of the training; judged: a Judged for each sampler."""
    path = [*by_step(run / "checkpoints").values()][-1]
    pipe, content, log = Pipeline.load(path), load_checkpoint(path), (run / "log.txt").read_text()
    with open(run / METRICS) as file:
        rows = list(csv.DictReader(file))
    labels, scale = [int(label) for label in np.unique(judged[0].labels)], judged[0].record["settings"]["cfg_scale"]
    reel, frames, ratio = film(ways(pipe, labels, scale))
    steps, shares = pictures_while_training(run, judged[0].images.shape[1:3], classifier)
    commands = [training_command(content["args"]), *(shlex.join(["python", *each.record["command"]]) for each in judged)]
    page = Template((Path(__file__).parent / "demo_page.html").read_text(encoding="utf-8")).substitute(
        title="Digits drawn by a SiT",
        headline="Handwritten digits that nobody wrote",
        lead=(
            f"A Scalable Interpolant Transformer of {trained_weights(log) / 1e6:.1f} million parameters learnt to turn noise "
            f"into digits in {training_time(log)}, on {cores()} CPU cores. This page shows what it draws, how it came to "
            "that, and how good it is."
        ),
        way=(
            "Both rows begin with the same noise. The network says in which direction each of them is to be changed to become "
            "the digit above it: the ODE (upper row) follows just that, the SDE (lower row) adds fresh noise on its way and "
            "takes it out again, and so arrives at a digit of its own."
        ),
        film=reel,
        frames=frames,
        last=frames - 1,
        film_ratio=ratio,
        heads="".join(f"<span>{escape(pipe.recipe.classes[label])}</span>" for label in labels),
        grids="".join(map(grid_rows, judged)),
        learnt=(
            "The network is shown a digit mixed with noise and learns to tell which way is the digit. That cannot be told for "
            "certain, so the loss falls fast at first and then towards a floor far above zero, while the samples go on getting "
            "better."
        ),
        charts=curves(rows, shares),
        while_training=(
            f"The same noise and classes each time, 0 to 9 and again 0 to 5, drawn by the ODE from the moving average of the "
            "weights, which at first still remembers their random beginning. Their guidance is another than above "
            f"({content['args']['cfg_scale']:g}, of three channels alone), and so is the share that is recognised."
        ),
        steps=steps,
        count=len(judged[0].images),
        samplers="".join(f'<th class="number">{escape(each.mode)}</th>' for each in judged),
        numbers=numbers(judged, real_diversity),
        facts=facts(content, log, accuracy),
        commands=escape("\n\n".join(commands)),
        code=escape(CODE.format(path=path, labels=labels, scale=scale)),
        next=links(folder),
    )
    file = folder / "index.html"
    file.write_text(page, encoding="utf-8")
    return file
