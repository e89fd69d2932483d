"""Encode a data set once, so that training need not do it every epoch.

    torchrun --nproc_per_node=8 encode_latents.py --data-path /imagenet/train --out imagenet-256
    torchrun --nproc_per_node=8 train.py --data-path imagenet-256 ...

Work is cut into chunks of --batch-size images by index, so that any number of processes writes the same files. Killed and
started again, it encodes only the chunks that are missing. What a cache holds is told in latent_cache.py.
"""

import hashlib
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import distributed
from atomic import write_atomically, write_json
from autoencoder import PUBLISHED, load_autoencoder
from chunks import ChunkStore, written_behind
from data import DIGITS, open_dataset, to_pixels
from errors import UsageError, UserError
from latent_cache import COMPLETE, FORMAT, LABELS, MOMENTS, NAMES, LatentCache, encoder_hash, open_array, read_record
from train_utils import Parser, latent_shape, non_negative_int, positive_int, run, set_precision, writable_folder, writing
from training import DataGuard, Tolerant, ignore_stop_signals

UNFINISHED = "unfinished.json"  # what cache.json is going to say


def make_parser():
    parser = Parser(prog="encode_latents.py", description="Encode a data set for train.py, under torchrun or alone.")
    parser.add_argument("--data-path", required=True, help=f"folder with one sub-folder of images a class, or {DIGITS}")
    parser.add_argument("--vae", default="ema", help=f"autoencoder: {', '.join(PUBLISHED)}, or a diffusers folder")
    parser.add_argument("--image-size", type=positive_int, default=256, help="pixels a side")
    parser.add_argument("--out", required=True, help="folder of the cache, for train.py --data-path")
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images a chunk")
    parser.add_argument(
        "--precision", choices=["fp32", "tf32"], help="of the autoencoder (tf32 on a GPU, as train.py but for its own fp32)"
    )
    parser.add_argument(
        "--num-workers", type=non_negative_int, default=4, help="data loading processes for each encoding process"
    )
    return parser


def make_record(args, dataset, autoencoder, shape):
    """All that decides the latents, as a dict for cache.json; the longest value is the last."""
    names = repr([dataset.name(i) for i in range(len(dataset))])
    return {
        "format": FORMAT,
        "data_path": args.data_path,
        "image_size": args.image_size,
        "batch_size": args.batch_size,
        "precision": args.precision,
        "vae": args.vae,
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
    """Moments (N, variants, 2, C, h, w) float16, of uint8 images (N, 3, H, W) and of their mirror images."""
    views = (images, images.flip(-1))[:variants]
    return torch.stack([torch.stack(autoencoder.moments(to_pixels(view)), dim=1) for view in views], dim=1).half()


def write_chunk(folder, store, chunk, moments, labels, read):
    """Put moments (n, V, 2, C, h, w) in their place and flush them; then the chunk's own file says that they are there.

    By writing, not through a memory map: a full disk is an error then and not a SIGBUS, and machines that share the
    folder may write to the same page.
    """
    first, size = store.indices(chunk)[0], moments[0].nbytes
    with writing(folder, "--out"):
        with open(Path(folder) / MOMENTS, "r+b") as file:
            file.seek((first - store.total) * size, os.SEEK_END)
            file.write(moments.numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
        store.save(chunk, labels=labels.numpy(), read=read.numpy())


def encode_chunks(args, world, dataset, autoencoder, store, chunks, variants):
    """Encode this process's chunks. Raises UserError for images that cannot be read, encoded or stored."""
    loader = DataLoader(
        Tolerant(dataset),
        batch_sampler=[list(store.indices(chunk)) for chunk in chunks],
        num_workers=args.num_workers,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=ignore_stop_signals,
    )
    guard = DataGuard(dataset, lambda line: tqdm.write(line, file=sys.stderr))
    total = sum(len(store.indices(chunk)) for chunk in chunks)
    with tqdm(total=total, disable=None if world.is_main else True, unit="image") as progress, written_behind() as write:
        for chunk, (images, labels, read) in zip(chunks, loader):
            guard.check(store.indices(chunk), read)
            moments = encode(autoencoder, images.to(world.device, non_blocking=True), variants).cpu()
            finite = moments.isfinite().flatten(1).all(1)
            if not finite.all():
                name = dataset.name(int(read[~finite][0]))
                raise UserError(f"{name}: its latents are beyond float16's 65504, or not numbers; they cannot be cached")
            write(write_chunk, args.out, store, chunk, moments, labels, read)
            progress.update(len(labels))


def finish(folder, record, store, dataset):
    """Labels and names from the chunks, then cache.json. Raises UserError where too many images could not be read."""
    parts = [store.load(chunk, "labels", "read") for chunk in range(store.count)]
    labels, read = (np.concatenate(part) for part in zip(*parts))
    guard = DataGuard(dataset, lambda line: None)
    try:
        guard.check(range(store.total), read)  # the processes, and runs before this one, each knew of their own alone
    except UserError as error:
        raise UserError(f"{error}; mend them, delete {folder} and start again") from error
    names = np.array([os.fsencode(dataset.name(i)) for i in read.tolist()])
    write_atomically(folder / LABELS, lambda file: np.save(file, labels))
    write_atomically(folder / NAMES, lambda file: np.save(file, names))
    write_json(folder / COMPLETE, record | {"skipped": [dataset.name(i) for i in sorted(guard.bad)]})


def tidy(folder, store):
    """Remove what only an unfinished cache needs, and what kills left behind."""
    (folder / UNFINISHED).unlink(missing_ok=True)
    for leftover in (*folder.glob(".*.tmp"), *folder.glob(".write-test-*")):
        leftover.unlink()
    if store.folder.is_dir():
        store.remove()


def main(args):
    if args.vae == "none":
        raise UsageError("--vae none: pixels need no cache, train.py reads the images themselves as fast")
    world = distributed.setup(timeout_hours=24)
    args.precision = set_precision(args.precision, world.device)
    dataset = open_dataset(args.data_path, args.image_size)
    autoencoder = load_autoencoder(args.vae).to(world.device)
    shape = (len(dataset), 2 if dataset.mirrors else 1, 2, *latent_shape(args.image_size, autoencoder, patch_size=1))
    record = make_record(args, dataset, autoencoder, shape)
    folder = Path(args.out)
    store = ChunkStore(folder / "chunks", len(dataset), args.batch_size)
    if world.is_main:
        gigabytes = math.prod(shape) * np.dtype(np.float16).itemsize / 1e9
        print(f"{folder}: {len(dataset):,} images, moments of shape {shape}, {gigabytes:.3g} GB", flush=True)
    with writing(folder, "--out"):
        done = world.broadcast(begin(folder, record, store, shape) if world.is_main else None)
    if not done:
        missing, started = world.broadcast(store.missing() if world.is_main else None), time.time()
        encode_chunks(args, world, dataset, autoencoder, store, missing[world.rank :: world.size], shape[1])
        world.barrier()
    if world.is_main:
        if not done:
            made, seconds = sum(len(store.indices(chunk)) for chunk in missing), time.time() - started
            print(f"{made:,} images encoded in {seconds:.1f} s, {made / seconds:.1f} images/s")
            with writing(folder, "--out"):
                finish(folder, record, store, dataset)
        LatentCache(folder)  # it can be read
        tidy(folder, store)
        print(f"{folder} {'was complete already' if done else 'is complete'}")
    distributed.cleanup()
    return 0


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "encode_latents.py")
