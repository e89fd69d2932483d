"""Error against network calls, of every solver and form of D(t): python scripts/solver_study.py [CKPT [SAMPLES]]

On a mixture of Gaussians, whose velocity is known, and on a checkpoint of builtin:digits if one is given. Writes the pictures
and the tables of docs/solvers.md.
"""

import math
import re
import sys
import time
from functools import partial
from itertools import chain
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.images import read_digits
from inference import ODE, SDE, Pipeline
from inference.chunked import Labels
from inference.velocity_loss import beside
from metrics.networks import Pixels
from metrics.scores import frechet_distance, sliced_distance, statistics
from transport import DIFFUSION_FORMS, Sampler, create_transport

PAGE = Path(__file__).resolve().parent.parent / "docs" / "solvers.md"
CALLS = (6, 10, 20, 40, 80)  # network calls for a sample
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)  # of adaptive solvers
POINTS, DIRECTIONS = 100_000, 64  # of the mixture, and along which its MIND is measured
ODES = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4, "explicit_adams": 1, "multistep": 1}  # calls a step
ADAPTIVE = ("dopri5", "bosh3", "dopri8")
SDES = [("Euler", form, 1) for form in DIFFUSION_FORMS if form != "KL"]
SDES += [("Heun", "sigma", 2), ("Multistep", "sigma", 1), ("Multistep", "SBDM", 1)]
ETAS = (0.003, 0.03, 0.3)  # of form KL, for which the checkpoint's loss by time is needed


class Mixture:
    """Eight Gaussians on a circle, and the exact velocity of the linear path between noise and them."""

    std = 0.1

    def __init__(self):
        angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
        self.means = 1.5 * torch.stack([angle.cos(), angle.sin()], 1)

    def sample(self, count, seed):
        g = torch.Generator().manual_seed(seed)
        which = torch.randint(8, (count,), generator=g)
        return self.means[which] + self.std * torch.randn(count, 2, generator=g, dtype=torch.float64)

    def __call__(self, x, t):
        t = t[:, None, None]
        variance = t**2 * self.std**2 + (1 - t) ** 2
        away = x[:, None] - t * self.means
        share = (-0.5 * away.square().sum(2, keepdim=True) / variance).softmax(1)
        return (share * (self.means + (t * self.std**2 - (1 - t)) / variance * away)).sum(1)


def solvers(etas=()):
    """(name, settings but for the last, which is one of these) of what is compared: points in time for so many calls, of
    which the SDE's last step is one, or tolerances."""
    for method, each in ODES.items():
        numbers = [calls // each + 1 for calls in CALLS if calls >= each]
        yield f"ODE {method}", [ODE(method, num_steps=number) for number in numbers]
    for method in ADAPTIVE:
        yield f"ODE {method}", [ODE(method, rtol=tolerance, atol=tolerance / 1000) for tolerance in TOLERANCES]
    for method, form, each in SDES:
        numbers = [(calls - 1) // each + 1 for calls in CALLS]
        yield f"SDE {method}, {form}", [SDE(method, form, num_steps=number) for number in numbers]
    for eta in etas:
        yield f"SDE Euler, KL, eta {eta:g}", [SDE("Euler", "KL", eta=eta, num_steps=calls) for calls in CALLS]


class Plain:
    """As much of a Pipeline as settings ask for."""

    transport = create_transport("Linear")


def on_mixture():
    """{solver: [(calls, distance of the ends of the flow or None, MIND against the mixture)]}"""
    exact, z = Mixture(), torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference, found = exact.sample(POINTS, 1), {}
    apart = partial(sliced_distance, reference=reference, directions=DIRECTIONS)
    flow = Sampler(Plain.transport).sample_ode(sampling_method="dopri8", rtol=1e-10, atol=1e-10)(z, exact)[-1]
    for name, settings in solvers():
        for solver in settings:
            calls = []
            network = lambda x, t, calls=calls: calls.append(1) or exact(x, t)  # noqa: E731
            torch.manual_seed(0)
            x = solver.sampling(Plain, torch.randn_like)(z, network)[-1]
            distance = (x - flow).square().sum(1).mean().sqrt().item() if isinstance(solver, ODE) else None
            found.setdefault(name, []).append((len(calls), distance, apart(x)))
    return found, apart(exact.sample(POINTS, 2))


def on_digits(ckpt, count):
    """{solver: [(calls, Frechet distance of grey pixels to all real digits)]}, and that of as many real digits."""
    pipe, pixels = Pipeline.load(ckpt), Pixels("cpu")
    see = lambda images: pixels(torch.as_tensor(images))[0]  # noqa: E731
    images, _ = read_digits()
    real = see(np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None].repeat(3, 1))
    reference, labels, found = statistics(real), Labels(10, 0, "balanced"), {}
    indices = range(count)
    for name, settings in solvers(ETAS if beside(ckpt).exists() else ()):
        for solver in settings if "dopri8" not in name else ():  # whose 54 calls at the least buy nothing here
            before, started = pipe.calls, time.time()
            features = []
            for first in range(0, count, 250):
                chunk = indices[first : first + 250]
                latents = pipe.draw([labels.of(i) for i in chunk], indices=chunk, solver=solver)[-1]
                features.append(see(pipe.to_images(latents).permute(0, 3, 1, 2)))
            calls = (pipe.calls - before) * 250 / count
            distance = frechet_distance(*statistics(torch.cat(features)), *reference)
            found.setdefault(name, []).append((calls, None, distance))
            print(f"{name}: {calls:g} calls, {distance:.4f} ({time.time() - started:.0f} s)", flush=True)
    some = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:count]
    return found, frechet_distance(*statistics(real[some]), *reference)


def draw(results, floor, ylabel, path, what=2, kinds=("ODE", "SDE"), yscale="log"):
    figure, panels = plt.subplots(1, len(kinds), figsize=(6.2 * len(kinds) + 0.4, 5.2), dpi=110, sharey=True, squeeze=False)
    for axes, kind in zip(panels.flat, kinds):
        for i, (name, rows) in enumerate((name, rows) for name, rows in results.items() if name.startswith(kind)):
            calls, values = zip(*((row[0], row[what]) for row in rows))
            style = "o-" if i < 10 else "s--"  # there are ten colours
            label = name.removeprefix(f"{kind} ")
            axes.plot(calls, values, style, markersize=3, linewidth=1.2, color=f"C{i}", label=label)
        if floor:
            axes.axhline(floor, color="black", linewidth=0.8, linestyle=":")
        axes.set(xlabel="network calls", title=kind, xscale="log", yscale=yscale, xlim=(3.5, 200))
        axes.set_xticks(CALLS, map(str, CALLS))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    panels[0, 0].set_ylabel(ylabel)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def table(results, what, digits):
    """Rows of solvers, columns of network calls; where an adaptive solver took other numbers, they stand with them."""
    lines = [f"| solver | {' | '.join(map(str, CALLS))} |", f"|---|{'---:|' * len(CALLS)}"]
    for name, rows in results.items():
        if any(method in name for method in ADAPTIVE):
            cells = [f"{row[what]:.{digits}g} ({row[0]:g})" for row in rows] + [""] * (len(CALLS) - len(rows))
        else:
            by_calls = {min(CALLS, key=lambda c, row=row: abs(math.log(c / row[0]))): f"{row[what]:.{digits}g}" for row in rows}
            cells = [by_calls.get(calls, "") for calls in CALLS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(**tables):
    """Put each table between its marks in the page."""
    text = PAGE.read_text()
    for name, content in tables.items():
        mark = f"<!-- {name} -->"
        text = re.sub(f"{mark}.*?{mark}", lambda _, m=mark, c=content: f"{m}\n\n{c}\n\n{m}", text, flags=re.S)
    PAGE.write_text(text)


def main(ckpt=None, count=500):
    pictures = PAGE.parent / "pictures"
    mixture, floor = on_mixture()
    flows = {name: rows for name, rows in mixture.items() if name.startswith("ODE")}
    draw(flows, None, "distance from the flow's end (rms)", pictures / "solvers_flow.png", what=1, kinds=("ODE",))
    draw(mixture, floor, "MIND against the mixture", pictures / "solvers_mixture.png")
    lowest = f"As many points of the mixture itself: {floor:.2g}."
    write(flow=table(flows, 1, 2), mixture=f"{table(mixture, 2, 2)}\n\n{lowest}")
    if ckpt is None:
        return
    digits, real = on_digits(ckpt, count)
    draw(digits, None, "Frechet distance of pixels", pictures / "solvers_digits.png", yscale="linear")
    value, name, calls = min(chain.from_iterable([(row[2], name, row[0]) for row in rows] for name, rows in digits.items()))
    lowest = f"As many real digits: {real:.3g}. The lowest: {name}, {value:.3g} at {calls:g} calls."
    write(digits=f"{table(digits, 2, 3)}\n\n{lowest}")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
