"""The picture of a run's losses."""

from functools import partial
from itertools import accumulate, cycle
from threading import Lock, Thread

import matplotlib

from metrics.names import HIGHER_IS_BETTER, METRICS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NO_LOSSES = ("step", "grad_norm", "lr", "images_per_second", "share_of_peak")  # columns of metrics.csv
POINTS = 2000  # of a curve, which has no room for more
VALIDATED = ("loss", "held out", "tab:purple"), ("ema_loss", "held out, EMA", "tab:red")  # columns of validations.csv
COLOURS = ("tab:blue", "tab:green", "tab:brown", "tab:pink", "tab:olive")


class Plotting:
    """A thread that draws while the steps go on: one at a time, whichever threads ask, for matplotlib bears no more."""

    def __init__(self):
        self.thread, self.asking = Thread(), Lock()

    def begin(self, call, *args):
        """call(*args) in a thread, unless another is still at it."""
        with self.asking:
            if not self.thread.is_alive():
                # No daemon, as it would be of the writer's thread: the interpreter's end would abort amid matplotlib.
                self.thread = Thread(target=call, args=args, daemon=False)
                self.thread.start()

    def end(self):
        if self.thread.is_alive():
            self.thread.join()


def column(rows, x, y):
    """Two columns of a table as numbers, where both are there."""
    kept = [row for row in rows if row.get(x) and row.get(y)]
    return [float(row[x]) for row in kept], [float(row[y]) for row in kept]


def running_mean(values, window):
    """Mean of each value and up to window before it."""
    sums = [0.0, *accumulate(values)]
    starts = [max(0, i - window) for i in range(len(values))]
    return [(sums[i + 1] - sums[start]) / (i + 1 - start) for i, start in enumerate(starts)]


def save_plot(path, title, rows, validations=(), evaluations=()):
    """Draw every loss in rows of metrics.csv, with a running mean where there are many; beside them the validations' losses by
    time, and the evaluations' FIDs, or the first of their metrics, where there are any."""
    measured = [name for metric in METRICS.values() for name in metric.titles if column(evaluations, "step", name)[1]]
    draw = [partial(_losses, rows, validations, title)] + [partial(_by_time, validations)] * bool(validations)
    draw += [partial(_evaluated, evaluations, name) for name in measured[:1]]
    figure, panels = plt.subplots(1, len(draw), figsize=(0.5 + 5.5 * len(draw), 4), dpi=120, squeeze=False)
    for panel, draw_into in zip(panels.flat, draw):
        draw_into(panel)
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _losses(rows, validations, title, axes):
    names = [name for name in rows[0] if name not in NO_LOSSES]
    for name, colour in zip(names, cycle(COLOURS)):
        steps, losses = column(rows, "step", name)
        window, some = len(losses) // 20, slice(None, None, max(1, len(losses) // POINTS))
        label = "mean since last log" if len(names) == 1 else name.replace("_", " ")
        axes.plot(steps[some], losses[some], color=colour, alpha=0.35 if window > 1 else 1, linewidth=1, label=label)
        if window > 1:
            axes.plot(steps[some], running_mean(losses, window)[some], color=colour, label=f"running mean of {window + 1}")
    for name, label, colour in VALIDATED if validations else ():
        axes.plot(*column(validations, "step", name), "o-", color=colour, markersize=3, linewidth=1, label=label)
    axes.set(xlabel="step", ylabel="loss" if validations else "training loss", title=title)
    axes.legend(frameon=False)


def _by_time(validations, axes):
    """The newest validation, as steps over the tenths of time, and of a few before it the EMA's."""
    *before, newest = validations
    for age, row in enumerate(before[:: -max(1, len(before) // 4)]):
        axes.stairs(*_tenths(row, "ema_loss"), color="tab:red", alpha=0.4 / (1 + age), linewidth=1, baseline=None)
    for name, label, colour in VALIDATED:
        axes.stairs(*_tenths(newest, name), color=colour, baseline=None, label=f"{label}, step {newest['step']}")
    axes.set(xlabel="training interval, from noise to data", ylabel="loss", title="held-out images by time")
    axes.legend(frameon=False)


def _tenths(row, name):
    values = [float(row.get(f"{name}_t{tenth}") or "nan") for tenth in range(10)]
    return values, [tenth / 10 for tenth in range(11)]


def _evaluated(evaluations, name, axes):
    axes.plot(*column(evaluations, "step", name), "o-", color="tab:orange")
    title = next(metric.titles[name] for metric in METRICS.values() if name in metric.titles)
    better = "higher" if name in HIGHER_IS_BETTER else "lower"
    axes.set(xlabel="step", ylabel=f"{title} of EMA samples", title=f"{better} is better")
