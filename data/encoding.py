"""Filling a latent cache: chunk by chunk, by any number of processes, so that a killed one is continued."""

import hashlib
import os
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from common.atomic import as_bytes, writable_folder, write_atomically, write_json, writing
from common.chunks import written_behind
from common.errors import UsageError, UserError
from common.unreadable import DataGuard

from .images import to_pixels
from .latent_cache import COMPLETE, FORMAT, LABELS, MOMENTS, NAMES, SUMS, encoder_hash, open_array, read_record, sha256
from .loader import read_ahead

UNFINISHED = "unfinished.json"  # what cache.json is going to say


def make_record(settings, dataset, autoencoder, shape):
    """All that decides the latents, as a dict for cache.json; the longest value is the last. settings: by flag."""
    names = repr([dataset.name(i) for i in range(len(dataset))])
    return {
        "format": FORMAT,
        **settings,
        "vae": autoencoder.name,
        "vae_hash": autoencoder.config_hash,
        "encoder_hash": encoder_hash(autoencoder),
        "channels": autoencoder.channels,
        "factor": autoencoder.factor,
        "scale": autoencoder.scale,
        "shift": autoencoder.shift,
        "count": len(dataset),
        "variants": shape[1],
        "names_sha256": hashlib.sha256(names.encode()).hexdigest(),
        "classes": list(dataset.classes),
    }


def begin(folder, record, store, shape):
    """Make the folder, or see that it is that of the same cache: whether it is complete. Main process only.

    Raises UsageError where it was begun with another record, UserError where it holds anything else.
    """
    writable_folder(folder, "--out")
    found = next((folder / name for name in (COMPLETE, UNFINISHED) if (folder / name).exists()), None)
    if found:
        begun = read_record(found)
        for key, value in record.items():
            if begun.get(key) != value:
                what = f"{key.replace('_', ' ')} {begun.get(key)}, not {value}"
                raise UsageError(f"--out {folder} was begun with {what}; give the same flags, or another --out")
        if found.name == COMPLETE:
            return True
    elif any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise UserError(f"--out {folder}: holds other files; give a new folder")
    else:
        write_json(folder / UNFINISHED, record)
    if not (folder / MOMENTS).exists():
        if store.folder.is_dir():
            store.remove()  # chunks whose moments are gone
        temporary = folder / f".{MOMENTS}.tmp"
        np.lib.format.open_memmap(temporary, "w+", np.float16, shape)  # zeros, which take no space on disk yet
        os.replace(temporary, folder / MOMENTS)
    open_array(folder / MOMENTS, shape, np.float16)
    store.folder.mkdir(exist_ok=True)
    return False


@torch.no_grad()
def encode(autoencoder, images, variants):
    """Moments (N, variants, 2, C, h, w) float16, of uint8 images (N, C, H, W) and of their mirror images; moments that were
    encoded elsewhere are what they are."""
    if images.dtype != torch.uint8:
        return images
    views = (images, images.flip(-1))[:variants]
    return torch.stack([torch.stack(autoencoder.moments(to_pixels(view)), dim=1) for view in views], dim=1).half()


def indices_of(dataset, store):
    """A call that gives the indices of a chunk: in the order in which the data are read with least effort."""
    order = dataset.reading_order
    return store.indices if order is None else lambda chunk: order[store.indices(chunk)].tolist()


def runs(indices):
    """(place in indices, first index, how many) of each run of indices that follow each other."""
    starts = [i for i, index in enumerate(indices) if not i or index != indices[i - 1] + 1]
    return [(i, indices[i], following - i) for i, following in zip(starts, [*starts[1:], len(indices)])]


def write_chunk(folder, store, chunk, indices, dataset, moments, labels, read):
    """Put moments (n, V, 2, C, h, w), which the device may still be making, in their place and flush them; then the chunk's own
    file says that they are there. Raises UserError for numbers that cannot be stored.

    By writing, not through a memory map: a full disk is an error then and not a SIGBUS, and machines that share the
    folder may write to the same page.
    """
    moments = moments.cpu()
    finite = moments.isfinite().flatten(1).all(1)
    if not finite.all():
        name = dataset.name(int(read[~finite][0]))
        raise UserError(f"{name}: its latents are beyond float16's 65504, or not numbers; they cannot be cached")
    content, size = moments.numpy().tobytes(), moments[0].nbytes
    with writing(folder, "--out"):
        with open(folder / MOMENTS, "r+b") as file:
            for place, first, count in runs(indices):
                file.seek((first - store.total) * size, os.SEEK_END)
                file.write(content[place * size : (place + count) * size])
            file.flush()
            os.fsync(file.fileno())
        store.save(chunk, labels=labels.numpy(), read=read.numpy(), sha256=np.array(sha256(content)))


def encode_chunks(folder, world, dataset, autoencoder, store, chunks, variants, num_workers):
    """Encode this process's chunks, while others are read, and the last one written; returns the share of time that was spent
    waiting for images. Raises UserError for images that cannot be read, encoded or stored."""
    waited, started = 0.0, time.time()
    guard = DataGuard(dataset, lambda line: tqdm.write(line, file=sys.stderr))
    total = sum(len(store.indices(chunk)) for chunk in chunks)
    indices = indices_of(dataset, store)
    batches = [list(indices(chunk)) for chunk in chunks]
    with (
        tqdm(total=total, disable=None if world.is_main else True, unit="image", desc=_share(world)) as progress,
        read_ahead(dataset, batches, num_workers, world.device) as loaded,
        written_behind() as write,
    ):
        for chunk, batch in zip(chunks, batches):
            asked = time.time()
            images, labels, read = next(loaded)
            waited += time.time() - asked
            guard.check(batch, read)
            moments = encode(autoencoder, images.to(world.device, non_blocking=True), variants)
            write(write_chunk, folder, store, chunk, batch, dataset, moments, labels, read)
            progress.set_postfix_str(f"waited for images: {waited / (time.time() - started):.0%}", refresh=False)
            progress.update(len(labels))
    return waited / max(time.time() - started, 1e-9)


def _share(world):
    return f"1 of {world.size} processes" if world.size > 1 else None


def finish(folder, record, store, shape, dataset):
    """Labels and names from the chunks, then cache.json. Raises UserError where too many images could not be read."""
    parts = [store.load(chunk, "labels", "read") for chunk in range(store.count)]
    labels, read = (np.concatenate(part) for part in zip(*parts))
    if dataset.reading_order is not None:
        back = np.argsort(dataset.reading_order)
        labels, read = labels[back], read[back]
    guard = DataGuard(dataset, lambda line: None)
    try:
        guard.check(range(store.total), read)  # the processes, and runs before this one, each knew of their own alone
    except UserError as error:
        raise UserError(f"{error}; mend them, delete {folder} and start again") from error
    names = np.array([os.fsencode(dataset.name(i)) for i in read.tolist()])
    write_atomically(folder / LABELS, lambda file: np.save(file, labels))
    write_atomically(folder / NAMES, lambda file: np.save(file, names))
    record = record | {"skipped": [dataset.name(i) for i in sorted(guard.bad)]}
    in_place = dataset.reading_order is None
    write_json(folder / SUMS, sums(folder, store, shape, in_place) | {COMPLETE: sha256(as_bytes(record))})
    write_json(folder / COMPLETE, record)


def sums(folder, store, shape, in_place):
    """What checksums.json says: SHA-256 of so many images' moments each, and of labels and names. in_place: whether a chunk
    of the store holds just those, whose checksum it knows."""
    moments = open_array(folder / MOMENTS, shape, np.float16)

    def of_chunk(chunk):
        try:
            known = in_place and str(store.load(chunk, "sha256")[0])
        except UserError:  # an earlier version wrote it, without
            known = None
        return known or sha256(moments[store.indices(chunk).start : store.indices(chunk).stop].tobytes())

    small = {name: sha256((folder / name).read_bytes()) for name in (LABELS, NAMES)}
    return {"images_a_chunk": store.size, MOMENTS: [of_chunk(chunk) for chunk in range(store.count)], **small}


def tidy(folder, store):
    """Remove what only an unfinished cache needs, and what kills left behind."""
    (folder / UNFINISHED).unlink(missing_ok=True)
    for leftover in (*folder.glob(".*.tmp"), *folder.glob(".write-test-*")):
        leftover.unlink()
    if store.folder.is_dir():
        store.remove()
