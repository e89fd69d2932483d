"""Noise that becomes images by the ODE and by the SDE, as the README shows it: python scripts/way_picture.py CKPT"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from inference import ODE, SDE, Guidance, Pipeline

PICTURE = Path(__file__).resolve().parent.parent / "assets" / "way.png"
TIMES = np.linspace(0, 1, 11)
SOLVERS = {"ODE": ODE("heun", num_steps=51), "SDE": SDE(num_steps=50, last_step_size=0.02)}
LABELS, SCALE = (3, 7, 8), 3  # classes, and pixels on the screen for one of an image


def rows_of(pipe, solver):
    """One image (rows of samples, columns of times) of the states on the way."""
    states = pipe.draw(LABELS, solver=solver, guidance=Guidance(2.75, channels=None), trajectory=True)
    chosen = [states[round(t * (len(states) - 1))] for t in TIMES]  # both step evenly through time
    frames = np.stack([pipe.decode(state) for state in chosen], axis=2)  # (N, H, times, W, 3)
    return frames.reshape(-1, frames.shape[2] * frames.shape[3], 3)


def main(ckpt):
    pipe = Pipeline.load(ckpt)
    pictures = {name: rows_of(pipe, solver).repeat(SCALE, 0).repeat(SCALE, 1) for name, solver in SOLVERS.items()}
    height, width, _ = next(iter(pictures.values())).shape
    left, top, gap, dpi = 62, 26, 14, 100
    whole = top + height * len(pictures) + gap * (len(pictures) - 1)
    figure = plt.figure(figsize=((left + width) / dpi, whole / dpi), dpi=dpi)
    for i, (name, picture) in enumerate(pictures.items()):
        first = top + i * (height + gap)
        figure.figimage(picture, xo=left, yo=whole - first - height)
        figure.text(left / 2 / (left + width), 1 - (first + height / 2) / whole, name, ha="center", va="center", fontsize=13)
    for i, t in enumerate(TIMES):
        middle = left + (i + 0.5) * width / len(TIMES)
        text = f"t = {t:g}" if i in (0, len(TIMES) - 1) else f"{t:.1f}"
        figure.text(middle / (left + width), 1 - top / 2 / whole, text, ha="center", va="center", fontsize=10)
    figure.savefig(PICTURE, pil_kwargs=dict(optimize=True))
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1])
