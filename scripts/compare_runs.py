"""Plot the training losses of several runs in one picture: python scripts/compare_runs.py OUT.png NAME=RUN_FOLDER ..."""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def losses(folder):
    """(steps, losses) of a run folder's metrics.csv."""
    with open(Path(folder) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]


def main(out, runs):
    figure, axes = plt.subplots(figsize=(6.4, 3.6), dpi=110)
    for name, folder in runs:
        axes.plot(*losses(folder), label=name, linewidth=1.4)
    axes.set(xlabel="step", ylabel="training loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all("=" in argument for argument in sys.argv[2:]):
        sys.exit(f"usage: {sys.argv[0]} OUT.png NAME=RUN_FOLDER ...")
    main(sys.argv[1], [argument.split("=", 1) for argument in sys.argv[2:]])
