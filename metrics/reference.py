"""What samples are measured against: statistics and features of a reference, from a file or measured from images."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.spread import spread

from .features import POOL, SPATIAL
from .image_files import Chosen, open_images, open_npz, read_array
from .names import DEFAULT, METRICS
from .scores import statistics

MANIFOLD_IMAGES = 10_000  # reference images whose features are kept, for precision and recall, KID and MIND
STATISTICS = {"mu": (POOL,), "sigma": (POOL, POOL), "mu_s": (SPATIAL,), "sigma_s": (SPATIAL, SPATIAL)}  # the Inception's


@dataclass
class Reference:
    """What samples are measured against, as one network sees it: float64 means and covariances of its features, and more."""

    mu: np.ndarray  # (D,), D being 2048 of the Inception
    sigma: np.ndarray  # (D, D)
    mu_s: np.ndarray = None  # (2023,), the Inception's spatial features; None: no sFID
    sigma_s: np.ndarray = None  # (2023, 2023)
    features: np.ndarray = None  # float32 (M, D) of up to 10,000 images; None: none of the metrics that compare images
    count: int = None  # images behind the statistics; None if the file does not say

    def arrays(self, network):
        """What a file holds of it, by name."""
        return {key + suffix(network): value for key, value in vars(self).items() if value is not None}


@dataclass
class Opened:
    """What a reference holds, checked and not yet measured."""

    path: Path
    fields: dict  # {network: a Reference's fields by name, {} where all of them must be measured}
    images: object = None  # what open_images gives, where some network must see them
    seers: set = field(default_factory=set)  # these networks

    def check(self, networks):
        """Raises UserError for statistics of another network than that of this name."""
        for name, fields in self.fields.items():
            if fields and len(fields["mu"]) != (width := networks[name].widths[0]):
                found = f"mu{suffix(name)} has {len(fields['mu'])} numbers, but the weights give {width} features"
                raise UserError(f"--ref {self.path}: {found}; they are not those that it was made with")


def suffix(network):
    """What the names of a network's arrays end with in a file; the Inception's are those of ADM's files."""
    return "" if network == "inception" else f"_{network}"


def open_reference(path, image_size=None, warn=None, words=DEFAULT, strict=False):
    """Open a folder of images, or a .npz of images or of statistics, for the metrics called words.

    Statistics are mu and sigma, from which FID alone follows, or mu_s and sigma_s too; those of other networks than the
    Inception have its name at their ends. image_size and warn, of a folder, are FolderImages'. strict: a metric for which the
    file has neither statistics nor images raises UserError; else it is left out, unless its network has nothing at all.
    """
    path = Path(path)
    archive, wanted = None if path.is_dir() else open_npz(path), {}
    for metric in map(METRICS.get, words):
        if metric.needs:  # the Inception Score has no need of a reference
            wanted.setdefault(metric.network, set()).update(metric.needs)
    opened = Opened(path, {network: _read_fields(archive, path, network) for network in wanted})
    empty = [network for network, fields in opened.fields.items() if not fields]
    partly = [name for name, fields in opened.fields.items() if fields and "features" in wanted[name] - fields.keys()]
    has_images = archive is None or "arr_0" in archive.files
    for word in words if strict else ():
        _check_needs(word, opened, has_images)
    if empty or (partly and has_images):
        statistics_names = (key + suffix(network) for network in empty[:1] for key in _shapes(network))
        opened.images = open_images(path, archive, f"arr_0, or {', '.join(statistics_names)}", image_size, warn)
        opened.seers = {*empty, *partly}
    return opened


def _shapes(network):
    """{name: shape} of a network's statistics; None is any length."""
    return STATISTICS if network == "inception" else {"mu": (None,), "sigma": (None, None)}


def _read_fields(archive, path, network):
    """A Reference's fields that a .npz has for a network; none where it has no statistics of it, or is none."""
    end, shapes = suffix(network), _shapes(network)
    there = {key for key in (*shapes, "features", "count") if archive is not None and key + end in archive.files}
    if not there & shapes.keys():
        return {}
    spatial = {"mu_s", "sigma_s"} & there
    fields = {key: shape for key, shape in shapes.items() if spatial or not key.endswith("_s")}
    fields = {key: read_array(archive, path, key + end, shape).astype(np.float64) for key, shape in fields.items()}
    if fields["sigma"].shape != (width := len(fields["mu"]), width):
        raise UserError(f"{path}: mu{end} has {width} numbers, but sigma{end} is of shape {fields['sigma'].shape}")
    if "count" in there:
        fields["count"] = int(read_array(archive, path, f"count{end}", ()))
    if "features" in there:
        fields["features"] = read_array(archive, path, f"features{end}", (None, width)).astype(np.float32)
    return fields


def _check_needs(word, opened, has_images):
    """Raises UserError for a metric that the reference has not the statistics for, nor the images to measure them."""
    metric = METRICS[word]
    fields = opened.fields.get(metric.network, {})
    missing = [key for key in metric.needs if key not in fields]
    measured = has_images and (not fields or missing == ["features"])
    if missing and not measured:
        names = " and ".join(key + suffix(metric.network) for key in missing)
        images = "" if has_images else ", and no images (arr_0) to measure"
        raise UserError(f"--ref {opened.path}: it has no {names} for {word}{images}")


def measure_reference(opened, measure):
    """{network: Reference} of what open_reference gave. measure(images, network) gives Features; or None, in whose place a
    Reference is None too, on processes other than the main one."""
    references = {}
    for network, fields in opened.fields.items():
        seen = None
        if network in opened.seers:
            images = opened.images  # of statistics that are there, perhaps of more images, the features alone are measured
            seen = measure(Chosen(images, spread(len(images), MANIFOLD_IMAGES)) if fields else images, network)
            fields = fields if fields or seen is None else _statistics_of(seen)
        kept = {} if seen is None else {"features": seen.pool[spread(len(seen.pool), MANIFOLD_IMAGES)].numpy()}
        references[network] = Reference(**fields, **kept) if "mu" in fields else None
    return references


def _statistics_of(seen):
    """A Reference's fields, but for the features themselves."""
    found = [numbers for field in (seen.pool, seen.spatial) if field is not None for numbers in statistics(field)]
    return dict(zip(STATISTICS, found), count=len(seen.pool))
