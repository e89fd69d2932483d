"""Noise that becomes images by the ODE and by the SDE, as the README shows it: python scripts/way_picture.py CKPT"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from inference import ODE, SDE, Guidance, Pipeline
from inference.rows import labelled

PICTURE = Path(__file__).resolve().parent.parent / "assets" / "way.png"
TIMES = np.linspace(0, 1, 11)
SOLVERS = {"ODE": ODE("heun", num_steps=51), "SDE": SDE(num_steps=50, last_step_size=0.02)}
LABELS = (3, 7, 8)


def main(ckpt):
    pipe, rows, names = Pipeline.load(ckpt), [], []
    for name, solver in SOLVERS.items():
        states = pipe.draw(LABELS, solver=solver, guidance=Guidance(2.75, channels=None), trajectory=True)
        chosen = [states[round(t * (len(states) - 1))] for t in TIMES]  # both step evenly through time
        rows += list(np.stack([pipe.decode(state) for state in chosen], axis=1))
        names += [name] * len(LABELS)
    times = [f"t = {t:g}" if t in TIMES[[0, -1]] else f"{t:.1f}" for t in TIMES]
    labelled(rows, above=times, beside=names, width=1100).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1])
