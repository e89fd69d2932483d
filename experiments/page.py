"""The page of a finished ladder: tables and pictures made of its numbers alone."""

import json
import shlex
import sys
from datetime import date
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student

from common.atomic import write_atomically
from common.machine import processor
from common.spread import mean_and_error

from .drawings import draw_ladder, draw_losses, draw_samplers, draw_samples
from .rungs import CALLS, CLAIMS, GUIDANCE, MAIN, SAMPLERS, TOP

FEW = {"fd": 3, "mind": 2, "recognised": 1, "diversity": 2, "bits": 3, "calls": 0}  # digits behind the point


FLOOR = {"fd": "FD", "mind": "MIND", "diversity": "diversity"}

TEXT = """# The ladder

The paper goes from DiT to SiT in steps: continuous times, what the network predicts, how the loss is weighted, which path leads
from noise to data, and how it is sampled. Here each step is trained on {data_path} with {model}: {images} images in batches of
{batch_size} from {number} seeds, the same images, noise and number of updates for each step of a seed, then sampled without
guidance by the paper's two samplers with {calls} network calls, and judged by a classifier of real images.

    {command}

made this page on {when}: {minutes} minutes of {machine}, torch {torch}; {each} seconds a training.
The same command goes on where it was stopped, and makes the same numbers again in another `--out`.

**The judge** is a small convolutional network, trained on {trained_on} of the images that SiT is trained on. It recognises
{accuracy} of {held_out} held-out ones, of {classes} classes. FD (Frechet distance) and MIND are those of its 64 features,
of {samples} samples, as many of each class, against the held-out images; as many real images of the training set reach
{floor}. Diversity is the mean distance between two images of a
class in those features, as a share of the held-out images'. Bits/dim is the likelihood of {likelihoods} held-out images'
latents (the autoencoder may have seen them) under the flow; where the flow ends a little before the data, it is that of latents
with a little noise. Numbers are means over the seeds ± their standard errors; for FD, MIND and bits/dim, less is better.

## The steps

![FD of each step](pictures/ladder.png)

{ladder}

The paper's columns are its FID-50K on ImageNet 256, of a B/2 after 400,000 steps of 256 images, with 250 network calls: other
data, scale and features, of which only the order of the steps can be compared. Its first step is DiT's, with discrete times;
the last two steps are not in it.

![samples of each step](pictures/ladder_samples.png)

*The first sample of each class, from the same noise throughout.*

## What agrees with the paper, and what does not

The change of FD, paired by seed. It is told apart from none by Student's t at 95 %, which with {number} seeds takes
{quantile:.1f} standard errors; where it is not, that is no proof that there is none.

{verdicts}

{agreement}

## Loss by time

![loss by time](pictures/ladder_losses.png)

The mean square by which the velocity, as each network's output means it, misses that of held-out images. Paths have velocities
of their own, so that only losses of one path can be compared.

## Samplers

All on the last step. Fixed solvers take {calls} network calls, of which the SDE's last step is one. On the linear path D(t) of
form `linear` is that of `sigma`, and `KL` without a price for noise is SBDM: they are not drawn twice.
"""

SAMPLERS_END = """
![FD of each sampler](pictures/ladder_samplers.png)

{lowest}
"""


def shown(values, name, percent=False):
    """Mean and standard error of one number over the seeds."""
    mean, error = mean_and_error([100 * value if percent else value for value in values])
    digits = FEW[name]
    return f"{mean:.{digits}f}" if error is None or name == "calls" else f"{mean:.{digits}f} ± {error:.{digits}f}"


def table(heads, rows):
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def verdict(mean, error, better, seeds):
    """What a change of FD, a mean over seeds with its standard error, says of a finding of the paper: that it is for the
    better, or that there is none. By Student's t at 95 %; that no change is seen is no proof that there is none."""
    if error is None or abs(mean) <= student.ppf(0.975, seeds - 1) * error:
        return "cannot be told"
    return ("better" if mean < 0 else "worse") + (": agrees" if better and mean < 0 else ": does not agree")


class Numbers:
    """What the pieces have written, by seed."""

    def __init__(self, out, rungs, seeds, pieces):
        read = lambda piece: json.loads((out / f"{piece}.json").read_text())  # noqa: E731
        self.rungs, self.seeds, self.out, self.judge = rungs, seeds, out, read("judge")
        self.of = {name: [read(f"{name}-{seed}") for seed in seeds] for name in rungs}
        self.times = {piece: seconds for piece, seconds in read("times").items() if piece in pieces}
        with_top = GUIDANCE if TOP in rungs else ()
        self.samplers = {scale: [read(f"samplers-{seed}-{scale}") for seed in seeds] for scale in with_top}

    def ladder(self):
        rows = []
        for name, rung in self.rungs.items():
            found = self.of[name]
            row = [rung.title]
            for mode in MAIN:
                row += [shown([each[mode][key] for each in found], key) for key in ("fd", "mind")]
                row += [shown([each[mode]["recognised"] for each in found], "recognised", percent=True)]
                row += [shown([each[mode]["diversity"] for each in found], "diversity")]
            bits = shown([each["bits"] for each in found], "bits")
            rows.append([*row, bits, *(f"{rung.paper[mode]:g}" if mode in rung.paper else "" for mode in MAIN)])
        per_mode = [f"{mode} {what}" for mode in MAIN for what in ("FD", "MIND", "recognised, %", "diversity")]
        return table(["step", *per_mode, "bits/dim", "paper's FID, ODE", "paper's FID, SDE"], rows)

    def sampler_table(self, scale):
        rows = []
        for name in SAMPLERS:
            found = [each[name] for each in self.samplers[scale]]
            row = [shown([each[key] for each in found], key) for key in ("calls", "fd", "mind")]
            row += [shown([each["recognised"] for each in found], "recognised", percent=True)]
            rows.append([name, *row, shown([each["diversity"] for each in found], "diversity")])
        return table(["sampler", "calls", "FD", "MIND", "recognised, %", "diversity"], rows)

    def verdicts(self):
        """Each of the paper's findings beside the change of FD here, paired by seed: lower is better."""
        rows = []
        for claim in CLAIMS:
            (before, first), (after, second) = claim.before, claim.after
            if before not in self.of or after not in self.of:
                continue
            change = [b[second]["fd"] - a[first]["fd"] for a, b in zip(self.of[before], self.of[after])]
            mean, error = mean_and_error(change)
            papers = [self.rungs[name].paper[mode] for name, mode in (claim.before, claim.after)]
            between = "" if error is None else f" ± {error:.3f}"
            wanted = "better" if claim.better else "about the same"
            rows.append(
                [
                    claim.text,
                    f"{papers[0]:g} to {papers[1]:g}, {wanted}",
                    f"{mean:+.3f}{between}",
                    verdict(mean, error, claim.better, len(self.seeds)),
                ]
            )
        return rows

    def lowest(self):
        """The samplers with the lowest FD, in a sentence for each guidance."""
        for scale, found in self.samplers.items():
            means = {name: np.mean([each[name]["fd"] for each in found]) for name in SAMPLERS}
            kinds = {mode: min((m for m in means if m.startswith(mode)), key=means.get) for mode in MAIN}
            told = ", ".join(f"{kinds[mode]} ({means[kinds[mode]]:.3f})" for mode in kinds)
            yield f"- {'without guidance' if scale == 1 else f'with guidance of {scale:g}'}, the lowest FD of each kind: {told}"


def write_page(path, out, settings, rungs, seeds, pieces, at_once):
    """Write the page to path and its pictures to pictures/ beside it."""
    numbers, pictures = Numbers(out, rungs, seeds, pieces), path.parent / "pictures"
    verdicts = numbers.verdicts()
    pictures.mkdir(parents=True, exist_ok=True)
    draw_ladder(numbers, pictures / "ladder.png")
    draw_losses(numbers, pictures / "ladder_losses.png")
    draw_samples(numbers, pictures / "ladder_samples.png")
    if numbers.samplers:
        draw_samplers(numbers, pictures / "ladder_samplers.png")
    text = TEXT.format(
        command=shlex.join(["python", *sys.argv]),
        when=date.today().isoformat(),
        machine=f"{processor()}, {at_once} at once",
        minutes=f"{sum(numbers.times.values()) / at_once / 60:.0f}",
        torch=torch.__version__,
        calls=CALLS,
        classes=len(numbers.judge["classes"]),
        accuracy=f"{numbers.judge['accuracy']:.1%}",
        floor=", ".join(f"{title} {floor_of(numbers, key)}" for key, title in FLOOR.items()),
        each=f"{np.mean([seconds for piece, seconds in numbers.times.items() if piece.startswith('trained-')]):.0f}",
        number=len(seeds),
        quantile=student.ppf(0.975, len(seeds) - 1) if len(seeds) > 1 else float("inf"),
        ladder=numbers.ladder(),
        verdicts=table(["what changes", "paper's FID", "change of FD here", "here"], verdicts),
        agreement=agreement(verdicts),
        **{name: f"{settings[name]:,}" for name in ("images", "batch_size", "samples", "likelihoods")},
        model=settings["model"],
        data_path=Path(settings["data_path"]).name,  # where it lies is nobody's business
        **{name: numbers.judge[name] for name in ("trained_on", "held_out")},
    )
    for scale in numbers.samplers:
        title = "Without guidance" if scale == 1 else f"Guidance {scale:g}, on all channels"
        text += f"\n### {title}\n\n{numbers.sampler_table(scale)}\n"
    text += SAMPLERS_END.format(lowest="\n".join(numbers.lowest())) if numbers.samplers else ""
    write_atomically(path, lambda file: file.write(text.encode()))


def agreement(verdicts):
    """How many of the findings agree, in a sentence."""
    kinds = {"agree": ": agrees", "do not agree": ": does not agree", "cannot be told": "cannot be told"}
    counts = [f"{sum(row[-1].endswith(end) for row in verdicts)} {kind}" for kind, end in kinds.items()]
    return f"Of {len(verdicts)} findings, at this scale, {', '.join(counts)}."


def floor_of(numbers, name):
    mean, error = numbers.judge["floor"][name]
    return f"{mean:.{FEW[name]}f} ± {error:.{FEW[name]}f}"
