"""Many settings of one checkpoint's samples: which there are, and what they gave, as a table and a plot."""

from dataclasses import asdict, dataclass, fields, replace
from itertools import product

from common.errors import UsageError
from common.spread import mean_and_error
from transport.solvers import ADAPTIVE, ODE_METHODS

from .settings import ODE, SDE, Guidance


@dataclass(frozen=True)
class Setting:
    """One choice of every lever."""

    solver: str  # ODE:METHOD, or SDE:METHOD:FORM
    num_sampling_steps: int  # None of an adaptive solver, which needs none
    cfg_scale: float = 1.0
    cfg_channels: str = "3"
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    weights: str = "ema"
    precision: str = None  # the device's own
    labels: str = "random"
    num_fid_samples: int = 50_000

    def solve(self):
        """The library's object. Raises UsageError for a solver that there is not."""
        kind, _, method = self.solver.partition(":")
        steps = {} if self.num_sampling_steps is None else {"num_steps": self.num_sampling_steps}
        if kind == "ODE" and method:
            return ODE(method, **steps)
        method, _, form = method.partition(":")
        if kind == "SDE" and method:
            return SDE(method, **steps, **({"form": form} if form else {}))
        raise UsageError(f"--solver {self.solver}: give ODE:METHOD, SDE:METHOD or SDE:METHOD:FORM, such as ODE:heun")

    def guide(self):
        if self.cfg_scale == 1:
            return Guidance()
        channels = None if self.cfg_channels == "all" else int(self.cfg_channels)
        return Guidance(self.cfg_scale, channels, self.guidance_low, self.guidance_high)

    def plain(self):
        """Itself without what it does not use, so that two settings which are one are seen to be."""
        self.solve(), self.guide()
        if self.is_adaptive:
            self = replace(self, num_sampling_steps=None)
        kind, method, *form = self.solver.split(":")
        if form == [SDE.form]:
            self = replace(self, solver=f"{kind}:{method}")
        if self.cfg_scale == 1:
            self = replace(self, cfg_channels="3", guidance_low=0.0, guidance_high=1.0)
        return self

    @property
    def is_adaptive(self):
        kind, _, method = self.solver.partition(":")
        return kind == "ODE" and ODE_METHODS[method] == ADAPTIVE

    def value(self, lever):
        """Its value of a lever, or None of one that it has no use for."""
        return None if lever in GUIDED and self.cfg_scale == 1 else getattr(self, lever)

    def words(self, levers):
        """Its values of some levers, as a person types them; a dash for None."""
        shown = map(self.value, levers)
        return ["-" if value is None else f"{value:g}" if isinstance(value, float) else str(value) for value in shown]

    @property
    def drawn(self):
        """What its samples depend on: of fewer samples, they are the first ones."""
        return {key: value for key, value in asdict(self).items() if key != "num_fid_samples"}


GUIDED = ("cfg_channels", "guidance_low", "guidance_high")  # of which a guidance of 1 has none
LEVERS = tuple(entry.name for entry in fields(Setting))


def plan(levers, one_at_a_time=False):
    """The Settings of {lever: [values]}: every combination, or the first values and each other value beside those."""
    if one_at_a_time:
        base = {name: values[0] for name, values in levers.items()}
        chosen = [base] + [base | {name: value} for name, values in levers.items() for value in values[1:]]
    else:
        chosen = [dict(zip(levers, values)) for values in product(*levers.values())]
    return list(dict.fromkeys(Setting(**each).plain() for each in chosen))


@dataclass
class Row:
    """A Setting and what it gave: {name of a metric: [a value of each seed]}, and network calls for a sample."""

    setting: Setting
    values: dict
    calls: float

    def mean(self, name):
        """(mean over seeds or None, its standard error or None)"""
        values = self.values[name]
        return (None, None) if None in values else mean_and_error(values)


def varied(settings):
    """The levers that have more than one value."""
    return [lever for lever in LEVERS if len({setting.value(lever) for setting in settings} - {None}) > 1]


def best(rows, name, higher):
    """The row of the best mean of a metric, or None."""
    known = [row for row in rows if row.mean(name)[0] is not None]
    return (max if higher else min)(known, key=lambda row: row.mean(name)[0], default=None)


def table(rows, titles, higher, digits):
    """Markdown: a row for each setting, its varied levers, calls, and metrics with standard errors, the best ones bold.

    titles: {name of a metric: its title}; higher: names of those of which more is better; digits: {name: digits}.
    """
    levers = varied([row.setting for row in rows])
    lines = [f"| {' | '.join([*map(_title, levers), 'calls', *titles.values()])} |"]
    lines.append(f"|{'---|' * len(levers)}{'---:|' * (1 + len(titles))}")
    winners = {name: best(rows, name, name in higher) for name in titles}
    for row in rows:
        cells = [*row.setting.words(levers), f"{row.calls:g}"]
        for name in titles:
            mean, error = row.mean(name)
            cell = "-" if mean is None else f"{mean:.{digits[name]}f}"
            cell += "" if error is None else f" ± {error:.{digits[name]}f}"
            cells.append(f"**{cell}**" if row is winners[name] else cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _title(lever):
    return lever.removeprefix("num_").replace("_", " ")


def differences(rows, name, digits=4):
    """Lines of how a metric changes from the first row to each row that differs from it in one lever, the largest first."""
    base, found, all_varied = rows[0], [], varied([row.setting for row in rows])
    for row in rows[1:]:
        levers = varied([base.setting, row.setting])
        values = [pair for pair in zip(row.values[name], base.values[name]) if None not in pair]
        steps = {"num_sampling_steps"} if "solver" in levers else set()  # another solver's are no lever of their own
        if not values or len(set(levers) - steps) != 1:
            continue
        # Seeds are paired: the same noise and labels were drawn for both.
        change, error = mean_and_error([ours - theirs for ours, theirs in values])
        details = steps | set(GUIDED if "cfg_scale" in levers and 1 in (base.setting.cfg_scale, row.setting.cfg_scale) else ())
        shown = [lever for lever in all_varied if lever in levers or lever in details]
        was, now = (" ".join(word for word in each.setting.words(shown) if word != "-") for each in (base, row))
        plus_minus = "" if error is None else f" ± {error:.{digits}f}"
        found.append((abs(change), f"{', '.join(map(_title, shown))} {was} -> {now}: {change:+.{digits}f}{plus_minus}"))
    return [line for _, line in sorted(found, reverse=True)]


def _lines(rows, others):
    """{label: rows} of rows that are alike in these levers. One that has no use for another lever, such as the steps of an
    adaptive solver, is on the line of each of that lever's values."""
    lines = {}
    for row in rows:
        key = tuple(map(row.setting.value, others))
        if None not in key:
            lines.setdefault(key, []).append(row)
    for row in rows:
        key = tuple(map(row.setting.value, others))
        if None in key:
            fits = [own for own in lines if all(mine in (None, theirs) for mine, theirs in zip(key, own))]
            for own in fits or [key]:
                lines.setdefault(own, []).append(row)
    lines = {" ".join(line[0].setting.words(others)): line for line in lines.values()}
    return {label: line for label, line in lines.items() if len(line) > 1} or lines


def draw(rows, name, title, path):
    """A panel for each varied lever: the metric by its values, with standard errors; a line for each choice of the others."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row.mean(name)[0] is not None]
    levers = varied([row.setting for row in rows]) or ["cfg_scale"]
    figure, panels = plt.subplots(1, len(levers), figsize=(4.2 * len(levers) + 0.6, 4), dpi=110, squeeze=False, sharey=True)
    for axes, lever in zip(panels.flat, levers):
        values = [value for value in dict.fromkeys(row.setting.value(lever) for row in rows) if value is not None]
        numeric = all(isinstance(value, (int, float)) for value in values)
        place = (lambda value: value) if numeric else values.index
        lines = _lines(
            [row for row in rows if row.setting.value(lever) in values], [other for other in levers if other != lever]
        )
        for label, line in lines.items():
            points = sorted(((place(row.setting.value(lever)), *row.mean(name)) for row in line), key=lambda point: point[0])
            x, means, errors = zip(*((at, mean, error or 0) for at, mean, error in points))
            axes.errorbar(x, means, errors, fmt="o-", capsize=3, markersize=4, label=label or None)
        if not numeric:
            axes.set_xticks(range(len(values)), [str(value) for value in values], fontsize=8)
        axes.set(xlabel=_title(lever))
        axes.grid(alpha=0.3)
        if 1 < len(lines) <= 12:
            axes.legend(frameon=False, fontsize=8)
    panels[0, 0].set_ylabel(title)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
