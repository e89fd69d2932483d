"""What makes two runs the same: every flag but those that are declared free where they are added (train_utils.free)."""

import argparse

from common.errors import UsageError, UserError

END = "total_steps"  # recorded beside the flags; a run may be given another end


def identity_of(flags):
    """{name: value} of the flags that make a run what it is."""
    return {key: getattr(flags, key) for key in flags.identity}


def _words(value):
    """A value as it is typed: a list of one is no other than its entry."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def differences(flags, saved, whole=True):
    """What in saved flags (a dict or Namespace) contradicts flags, in words; empty if the run is the same.

    whole: saved by train.py, so that a flag it lacks is one that came later, and had its default; otherwise what is not
    said does not count.
    """
    saved = vars(saved) if isinstance(saved, argparse.Namespace) else saved
    changed = []
    for key, default in flags.identity.items():
        was, now = saved.get(key, default if whole else getattr(flags, key)), getattr(flags, key)
        if _words(was) != _words(now):
            changed.append(f"--{key.replace('_', '-')} {_words(was)} (now {_words(now)})")
    return ", ".join(changed)


def unknown(flags, recorded):
    """What of flags.json this version does not know, in words."""
    keys = recorded.keys() - flags.identity.keys() - {END}
    return ", ".join(f"--{key.replace('_', '-')} {recorded[key]} (unknown here)" for key in sorted(keys))


def refuse_differences(different, what):
    """Raises UsageError naming the differences between a saved run and this one, if there are any."""
    if different:
        raise UsageError(f"{what} was made with {different}; give the same flags, or start anew in another --results-dir")


def check_meaning(found, recipe, path):
    """The network of a checkpoint must be asked and read as this run does it. Raises UsageError."""
    ours, theirs = recipe.transport, found.transport
    if theirs is not None and (theirs.path_type, theirs.prediction) != (ours.path_type, ours.prediction):
        trained = f"--path-type {theirs.path_type} --prediction {theirs.prediction}"
        raise UsageError(f"--ckpt {path} is for {trained}, this run for {ours.path_type} and {ours.prediction}")
    if found.time_map != recipe.time_map:
        raise UsageError(
            f"--ckpt {path}: its times are those of {found.time_map}, which is not trained here; --init takes its weights"
        )


def check_data(dataset, recipe, num_images, path):
    """Class folders and the number of images must be those of the checkpoint (None: it does not say). Raises UserError."""
    if num_images is not None and num_images != len(dataset):
        raise UserError(f"--data-path: it has {len(dataset):,} images, but {path} was trained on {num_images:,}")
    classes = list(dataset.classes)
    if recipe.classes and recipe.classes != classes:
        new, old = set(classes), set(recipe.classes)
        example = f"{min(old - new)} is missing" if old - new else f"{min(new - old)} is new" if new - old else "another order"
        raise UserError(f"--data-path: its class folders are not those of {path}: {example}")
