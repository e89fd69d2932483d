"""The pictures of docs/diffusion.md: python scripts/diffusion_plots.py [LOSS.json]

D(t) of every form on the three paths, with the penalised bound's for three eta on losses of measure_loss.py, and the densities
of the laws of training's times.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from inference.velocity_loss import VelocityLoss
from transport import DIFFUSION_FORMS, PATHS, create_transport
from transport.diffusion import PenalisedKL
from transport.transfer import on_path

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
ETAS = (0.003, 0.03, 0.3)
LAWS = [("uniform", {}), ("logit-normal", {}), ("mode", {}), ("cosmap", {}), ("uniform", dict(time_shift=3.0))]


def draw_forms(loss):
    """One panel a path; loss: a VelocityLoss, of a network of the linear path with velocity prediction."""
    t = torch.linspace(0, 0.999, 1000, dtype=torch.float64)
    figure, panels = plt.subplots(1, len(PATHS), figsize=(13, 4.2), dpi=110, sharey=True)
    for axes, path in zip(panels, PATHS):
        plan = PATHS[path]()
        for form in (form for form in DIFFUSION_FORMS if form != "KL"):
            style = dict(label=f"{form}, KL" if form == "SBDM" else form, linewidth=1.3)
            axes.plot(t, plan.compute_diffusion(t, t, form), color=f"C{list(DIFFUSION_FORMS).index(form)}", **style)
        if loss is not None:
            own = on_path(create_transport("Linear"), path).loss_of_path(loss)
            for eta, style in zip(ETAS, ("-", "--", ":")):
                diffusion = PenalisedKL(eta, own)(plan, t, 1.0)
                axes.plot(t, diffusion, style, color="black", linewidth=1.3, label=f"KL, eta {eta:g}")
        axes.set(title=path, xlabel="time, from noise to data", ylim=(0, 4), xlim=(0, 1))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("D(t)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside right center")
    figure.tight_layout(rect=(0, 0, 0.86, 1))
    figure.savefig(PICTURES / "diffusion.png")


def draw_laws():
    t = torch.linspace(0.002, 0.998, 500, dtype=torch.float64)
    figure, axes = plt.subplots(figsize=(6.4, 3.6), dpi=110)
    for law, more in LAWS:
        name = f"{law}, shift {more['time_shift']:g}" if more else law
        axes.plot(t, create_transport(time_law=law, **more).training_density(t), label=name, linewidth=1.4)
    axes.set(xlabel="time, from noise to data", ylabel="density of training's times", ylim=(0, 4), xlim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(PICTURES / "time_laws.png")


if __name__ == "__main__":
    draw_forms(VelocityLoss.load(sys.argv[1]) if len(sys.argv) > 1 else None)
    draw_laws()
