"""The picture of a run's losses."""

from itertools import accumulate, cycle

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NO_LOSSES = ("step", "grad_norm", "lr", "images_per_second", "share_of_peak")  # columns of metrics.csv
POINTS = 2000  # of a curve, which has no room for more
COLOURS = ("tab:blue", "tab:green", "tab:red", "tab:purple", "tab:brown")


def column(rows, x, y):
    """Two columns of a table as numbers, where both are there."""
    kept = [row for row in rows if row.get(x) and row.get(y)]
    return [float(row[x]) for row in kept], [float(row[y]) for row in kept]


def running_mean(values, window):
    """Mean of each value and up to window before it."""
    sums = [0.0, *accumulate(values)]
    starts = [max(0, i - window) for i in range(len(values))]
    return [(sums[i + 1] - sums[start]) / (i + 1 - start) for i, start in enumerate(starts)]


def save_plot(path, title, rows, evaluations):
    """Draw every loss in rows of metrics.csv, with a running mean where there are many, and the FIDs of evaluations.csv."""
    evaluated, fids = column(evaluations, "step", "fid")
    figure, panels = plt.subplots(1, 2 if fids else 1, figsize=(11 if fids else 6, 4), dpi=120, squeeze=False)
    axes, names = panels[0, 0], [name for name in rows[0] if name not in NO_LOSSES]
    for name, colour in zip(names, cycle(COLOURS)):
        steps, losses = column(rows, "step", name)
        window, some = len(losses) // 20, slice(None, None, max(1, len(losses) // POINTS))
        label = "mean since last log" if len(names) == 1 else name.replace("_", " ")
        axes.plot(steps[some], losses[some], color=colour, alpha=0.35 if window > 1 else 1, linewidth=1, label=label)
        if window > 1:
            axes.plot(steps[some], running_mean(losses, window)[some], color=colour, label=f"running mean of {window + 1}")
    axes.set(xlabel="step", ylabel="training loss", title=title)
    axes.legend(frameon=False)
    if fids:
        panels[0, 1].plot(evaluated, fids, "o-", color="tab:orange")
        panels[0, 1].set(xlabel="step", ylabel="FID of EMA samples", title="lower is better")
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
