"""The pictures of a finished ladder."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from common.spread import mean_and_error

from .rungs import GUIDANCE, MAIN, SAMPLERS


def save(figure, path):
    figure.savefig(path, bbox_inches="tight")  # whatever its words take
    plt.close(figure)


def draw_ladder(numbers, path):
    """FD of each step here, and the paper's FID beside it."""
    figure, (ours, papers) = plt.subplots(
        1, 2, figsize=(10.5, 4.2), dpi=110, sharey=True, gridspec_kw=dict(width_ratios=(2, 1))
    )
    places = np.arange(len(numbers.rungs))[::-1]
    for shift, (mode, colour) in zip((0.12, -0.12), (("ODE", "tab:blue"), ("SDE", "tab:orange"))):
        found = [mean_and_error([each[mode]["fd"] for each in numbers.of[name]]) for name in numbers.rungs]
        means, errors = zip(*((mean, error or 0) for mean, error in found))
        ours.errorbar(means, places + shift, xerr=errors, fmt="o", markersize=5, capsize=3, color=colour, label=mode)
        known = [(rung.paper[mode], place) for rung, place in zip(numbers.rungs.values(), places) if mode in rung.paper]
        if known:
            papers.plot(*zip(*known), "o", markersize=5, color=colour)
    ours.axvline(numbers.judge["floor"]["fd"][0], color="black", linestyle=":", linewidth=1, label="real images")
    ours.set(xlabel="FD to held-out images", xscale="log", title="here")
    ours.set_yticks(places, [rung.title for rung in numbers.rungs.values()])
    papers.set(xlabel="FID-50K, ImageNet 256", title="paper, B/2 at 400K steps")
    for axes in (ours, papers):
        axes.grid(alpha=0.3)
    ours.legend(frameon=False, fontsize=8)
    save(figure, path)


def draw_losses(numbers, path):
    figure, axes = plt.subplots(figsize=(7.5, 4.2), dpi=110)
    for i, (name, rung) in enumerate(numbers.rungs.items()):
        losses = np.mean([each["loss"] for each in numbers.of[name]], axis=0)
        axes.plot(numbers.of[name][0]["times"], losses, linewidth=1.4, color=f"C{i}", label=rung.title)
    axes.set(xlabel="time, from noise to data", ylabel="velocity loss, mean over dimensions", xlim=(0, 1), yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def draw_samplers(numbers, path):
    figure, panels = plt.subplots(1, len(GUIDANCE), figsize=(10.5, 4.6), dpi=110, sharey=True)
    places = np.arange(len(SAMPLERS))[::-1]
    for axes, scale in zip(panels, GUIDANCE):
        found = [mean_and_error([each[name]["fd"] for each in numbers.samplers[scale]]) for name in SAMPLERS]
        means, errors = zip(*((mean, error or 0) for mean, error in found))
        colours = ["tab:blue" if name.startswith("ODE") else "tab:orange" for name in SAMPLERS]
        axes.barh(places, means, xerr=errors, color=colours, capsize=2)
        axes.axvline(numbers.judge["floor"]["fd"][0], color="black", linestyle=":", linewidth=1)
        axes.set(xlabel="FD to held-out images", xscale="log", title="no guidance" if scale == 1 else f"guidance {scale:g}")
        axes.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(places, SAMPLERS, fontsize=8)
    save(figure, path)


def draw_samples(numbers, path):
    """The first sample of each class, of the first seed: a row for each step and sampler."""
    rows, names = [], []  # a row of images is one image
    for name, rung in numbers.rungs.items():
        with np.load(numbers.out / f"{name}-{numbers.seeds[0]}.npz", allow_pickle=False) as file:
            for mode in MAIN:
                rows.append(np.concatenate(list(file[mode]), axis=1))
                names.append(f"{rung.title}, {mode}")
    picture = np.concatenate(rows).repeat(4, 0).repeat(4, 1)
    figure, axes = plt.subplots(figsize=(7.5, 0.42 * len(rows) + 0.3), dpi=110)
    axes.imshow(picture, interpolation="nearest")
    height = picture.shape[0] / len(rows)
    axes.set_yticks([height * (i + 0.5) for i in range(len(rows))], names, fontsize=8)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    save(figure, path)
