"""Names of images, from wherever they are, as classes and an order."""

import json

import numpy as np

from common.errors import UserError

LABELS = "dataset.json"
SPLITS = {"train", "val", "valid", "validation", "test"}


def check_parts(classes, root):
    """Raises UserError where what look like classes are the parts of a data set."""
    if classes and {name.lower() for name in classes} <= SPLITS:
        found = " and ".join(classes)
        raise UserError(f"--data-path {root}: {found} are parts of a data set, not classes; give one of them")


def by_folder(name):
    """What a path is sorted by: its folder, then its name."""
    folder, _, file = name.rpartition("/")
    return folder, file


def in_order(names, labels):
    """Indices of names sorted by label, folder and name."""
    return sorted(range(len(names)), key=lambda i: (labels[i], by_folder(names[i])))


def number_classes(labels, where):
    """Names of classes 0 to the largest of labels (N,), ints. Raises UserError for what are no classes."""
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= max(10_000, len(labels)):
        raise UserError(f"{where}: {least if least < 0 else most} is no class of {len(labels):,} images; they count from 0")
    return [str(label) for label in range(most + 1)]


def read_labels(text, names, where):
    """(classes, labels int32 (N,) of the images in order, order) of the names of images by a dataset.json, which is text.

    Its labels are [name, class id] pairs, or null, where the images have no classes. Raises UserError, naming where, for a
    file that is none, or that does not fit the names.
    """
    try:
        pairs = json.loads(text)["labels"]
        known = None if pairs is None else dict(pairs)
        twice = [name for name, label in pairs or () if known[name] != label]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = "no labels in it" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise UserError(f"{where}: cannot be read ({reason}); it holds {{'labels': [['NAME', CLASS], ...]}}") from error
    if twice:
        raise UserError(f"{where}: it gives {twice[0]} two labels")
    if known is None:
        return (), np.zeros(len(names), np.int32), in_order(names, np.zeros(len(names)))
    if without := [name for name in names if name not in known]:
        raise UserError(f"{where}: {len(without):,} of {len(names):,} images have no label, one is {without[0]}")
    if len(known) > len(names):
        missing = min(map(str, known.keys() - set(names)))
        raise UserError(f"{where}: {len(known) - len(names):,} labels are of images that are not there, one is {missing}")
    labels = [known[name] for name in names]
    if wrong := [label for label in labels if type(label) is not int or abs(label) >= 2**31]:
        raise UserError(f"{where}: a label is {str(wrong[0])[:50]}; they must be class ids")
    order = in_order(names, labels)
    labels = np.array([labels[i] for i in order], np.int64)
    return number_classes(labels, where), labels.astype(np.int32), order
