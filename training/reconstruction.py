"""The average of any width that a run could have kept, from the snapshots of those that it did (Karras et al., arXiv
2312.02696, section 3.2): reconstruct_ema.py shows it, and other commands may ask for it."""

from pathlib import Path

import torch
from tqdm import tqdm

from common.checkpoint import load_checkpoint
from common.errors import UsageError, UserError, told_as

from .ema import POWER
from .identity import END
from .power_ema import gamma_of
from .profiles import fit
from .run_folder import SNAPSHOTS, by_step, recorded_flags

DOUBTFUL = 0.05  # a residual above which one is warned: docs/ema.md shows how near weights come below it


def _widths(folder):
    """The widths of the averages that a run keeps. Raises UserError where it is no run, or keeps none."""
    if not folder.is_dir():
        found = "it is a file; give the run's folder" if folder.is_file() else "there is no such folder"
        raise UsageError(f"{folder}: {found}")
    if (recorded := recorded_flags(folder)) is None:
        raise UserError(f"{folder}: it is not the folder of a run of train.py (no flags.json)")
    if not recorded.get("ema_power"):
        raise UserError(f"{folder}: it was trained without --ema-power, so it kept no averages to make others of")
    return [float(width) for width in recorded["ema_power"]]


def find_snapshots(folders, at_step=None):
    """({step: snapshot's path} up to a step, in order, the widths in each) of one training, which later folders continue from
    a checkpoint of an earlier one. Where both have a step, the one that went on has it. Raises UserError naming a folder,
    and UsageError for a step that the snapshots do not reach."""
    folders = [Path(folder) for folder in folders]
    widths = [_widths(folder) for folder in folders]
    found, recorded = [by_step(folder / SNAPSHOTS) for folder in folders], [recorded_flags(folder) for folder in folders]
    for folder, own, flags in zip(folders, found, recorded):
        if not own:
            raise UserError(f"{folder}: it has no snapshots yet; --ema-snapshot-every says when they are written")
        keys = sorted(key for key in flags.keys() | recorded[0].keys() if flags.get(key) != recorded[0].get(key) and key != END)
        if keys:
            what = ", ".join(f"--{key.replace('_', '-')}" for key in keys)
            raise UserError(f"{folder}: it does not continue the run {folders[0]}, whose {what} differs")
    chosen = {}
    for own in sorted(found, key=min):
        chosen = {step: path for step, path in chosen.items() if step < min(own)} | own
    if at_step is not None and not min(chosen) <= at_step <= max(chosen):
        there = f"{len(chosen)} snapshots, of steps {min(chosen):,} to {max(chosen):,}"
        raise UsageError(f"--at-step {at_step}: {', '.join(map(str, folders))} has {there}")
    return {step: path for step, path in chosen.items() if at_step is None or step <= at_step}, widths[0]


def reconstruct(folders, sigma_rel, at_step=None):
    """(content of a checkpoint whose "ema" is the average of width sigma_rel at a step, the last by default, residual).

    folders: of one run, and of those that continued it. Of the snapshots up to that step one is in memory at a time, beside
    the sum, which is float64: hundreds of terms of both signs leave a tensor that all share bit for bit as it is. Raises
    UserError or UsageError as find_snapshots does, and naming a file that is damaged or of another model.
    """
    snapshots, widths = find_snapshots(folders, at_step)
    step = at_step or max(snapshots)
    profiles = [(own, width) for own in snapshots for width in widths]
    gammas = [gamma_of(width) for _, width in profiles]
    try:
        weights, residual = fit([own for own, _ in profiles], gammas, step, gamma_of(sigma_rel))
    except ValueError as error:
        raise UsageError(f"--sigma-rel {sigma_rel:g}: the snapshots up to step {step:,} cannot make it, {error}") from error
    shares = {f"{own:07d}": {} for own in snapshots}
    for (own, width), weight in zip(profiles, weights.tolist()):
        shares[f"{own:07d}"][f"{POWER}{width}"] = weight
    state, last = _sum(snapshots, shares)
    about = dict(sigma_rel=sigma_rel, residual=residual, tracks=widths, weights=shares)
    return {"ema": state, "recipe": last["recipe"], "args": last["args"], "step": step, "reconstruction": about}, residual


def _sum(snapshots, shares):
    """(weighted sum of the snapshots' states, float32, the last snapshot's recipe and args)."""
    total, first = {}, None
    for path, share in zip(tqdm(snapshots.values(), disable=None, unit="snapshot"), shares.values()):
        with told_as("snapshot"):
            content = load_checkpoint(path)
        first = first or {"recipe": content.get("recipe")} | {name: _shapes(content.get(name)) for name in share}
        for what, wanted in first.items():
            found = _shapes(content.get(what)) if what in share else content.get(what)
            if not wanted or found != wanted:
                raise UserError(f"snapshot {path}: its {what} is missing, or not that of the snapshots before it")
        for name, weight in share.items():
            for key, value in content[name].items():
                if not value.is_floating_point():
                    total[key] = value.clone()  # a count: the last
                elif key in total:
                    total[key].add_(value, alpha=weight)
                else:
                    total[key] = value.double() * weight
        about = {"recipe": content["recipe"], "args": content.get("args", {})}
        del content, value  # its memory, before the next
    for key, value in total.items():  # in place: both precisions at once would be half as much memory again
        total[key] = value.float() if value.is_floating_point() else value
    return total, about


def _shapes(state):
    """{name: shape} of a state dict, or None where it is none."""
    whole = isinstance(state, dict) and all(map(torch.is_tensor, state.values()))
    return {name: tuple(value.shape) for name, value in state.items()} if whole else None


def doubts(content):
    """What a person should know of reconstruct's content before trusting it: lines, or none."""
    residual = content["reconstruction"]["residual"]
    if residual > DOUBTFUL:
        near = "more snapshots, and widths of --ema-power around the wanted one, bring it nearer"
        yield f"the residual {residual:.1%} is above {DOUBTFUL:.0%}: this is not quite that average; {near}"
