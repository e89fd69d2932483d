"""Whether a cache of latents is what was written."""

import numpy as np
from tqdm import tqdm

from common.errors import UserError

from .latent_cache import COMPLETE, LABELS, MOMENTS, NAMES, SUMS, LatentCache, read_record, sha256

FEW = 100  # images at once, where there are no chunks to go by


def check_cache(folder):
    """Read a whole cache against its checksums; returns what was found, in one line. Raises UserError naming what is damaged.

    A cache of an earlier version has no checksums: only that its numbers are numbers can be seen.
    """
    cache = LatentCache(folder)
    file = cache.path / SUMS
    sums = _read_sums(cache, file) if file.exists() else None
    size = sums["images_a_chunk"] if sums else FEW
    for name in (COMPLETE, LABELS, NAMES) if sums else ():
        if sha256((cache.path / name).read_bytes()) != sums[name]:
            raise UserError(f"{cache.path / name}: not what was written, by its checksum")
    damaged, starts = [], range(0, len(cache), size)
    with tqdm(total=len(cache), disable=None, unit="image") as progress:
        for chunk, first in enumerate(starts):
            moments = cache.moments[first : first + size]
            whole = sha256(moments.tobytes()) == sums[MOMENTS][chunk] if sums else bool(np.isfinite(moments).all())
            damaged += [] if whole else [first]
            progress.update(len(moments))
    if damaged:
        last = min(damaged[0] + size, len(cache)) - 1
        example = f"one holds images {damaged[0]} to {last}, {cache.name(damaged[0])} first"
        reason = "are not what was written, by their checksums" if sums else "hold what are no numbers"
        raise UserError(f"{cache.path / MOMENTS}: {len(damaged)} of {len(starts)} chunks {reason}; {example}")
    if sums:
        return f"{folder}: {len(cache):,} images, all as they were written"
    return f"{folder}: {len(cache):,} images, all finite; an earlier version wrote it, without checksums to compare with"


def _read_sums(cache, file):
    sums = read_record(file)
    size, moments = sums.get("images_a_chunk"), sums.get(MOMENTS)
    if type(size) is not int or size < 1 or not isinstance(moments, list) or len(moments) != -(-len(cache) // size):
        raise UserError(f"{file}: no checksums of this cache's {len(cache):,} images in it")
    return {COMPLETE: None, LABELS: None, NAMES: None} | sums
