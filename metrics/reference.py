"""What samples are measured against: statistics and features of a reference, from a file or measured from images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .features import POOL, SPATIAL
from .image_files import open_images, open_npz, read_array
from .scores import statistics

MANIFOLD_IMAGES = 10_000  # reference images that precision and recall use
STATISTICS = {"mu": (POOL,), "sigma": (POOL, POOL), "mu_s": (SPATIAL,), "sigma_s": (SPATIAL, SPATIAL)}


@dataclass
class Reference:
    """What samples are measured against: float64 means and covariances of pool and spatial features, and more."""

    mu: np.ndarray  # (2048,)
    sigma: np.ndarray  # (2048, 2048)
    mu_s: np.ndarray = None  # (2023,); None: no sFID
    sigma_s: np.ndarray = None  # (2023, 2023)
    features: np.ndarray = None  # float32 pool features (M, 2048) of up to 10,000 images; None: no precision and recall
    count: int = None  # images behind the statistics; None if the file does not say


def open_reference(path, image_size=None, warn=None):
    """What a reference holds, checked and not yet measured: (a Reference's fields by name or {}, images or None).

    Statistics are mu and sigma, from which FID alone follows, or mu_s and sigma_s too. image_size and warn, of
    a folder, are FolderImages'.
    """
    path = Path(path)
    archive = None if path.is_dir() else open_npz(path)
    if archive is None or not STATISTICS.keys() & set(archive.files):
        return {}, open_images(path, archive, f"arr_0, or {', '.join(STATISTICS)}", image_size, warn)
    spatial = {"mu_s", "sigma_s"} & set(archive.files)
    wanted = {key: shape for key, shape in STATISTICS.items() if spatial or not key.endswith("_s")}
    fields = {key: read_array(archive, path, key, shape).astype(np.float64) for key, shape in wanted.items()}
    if "count" in archive.files:
        fields["count"] = int(read_array(archive, path, "count", ()))
    if "features" in archive.files:
        fields["features"] = read_array(archive, path, "features", (None, POOL)).astype(np.float32)
    has_images = "arr_0" in archive.files and "features" not in fields
    return fields, open_images(path, archive) if has_images else None


def measure_reference(opened, measure):
    """Reference of what open_reference gave; measure(images, limit=...) gives Features, or None to give None."""
    fields, images = opened
    if images is None:
        return Reference(**fields)
    features = measure(images, limit=MANIFOLD_IMAGES if fields else None)
    if features is None:
        return None
    if not fields:
        found = *statistics(features.pool), *statistics(features.spatial)
        fields = dict(zip(STATISTICS, found), count=len(features.pool))
    return Reference(**fields, features=features.pool[:MANIFOLD_IMAGES].numpy())
