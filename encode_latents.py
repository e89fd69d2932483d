"""Encode a data set once, so that training need not do it every epoch.

    torchrun --nproc_per_node=8 encode_latents.py --data-path /imagenet/train --out imagenet-256
    torchrun --nproc_per_node=8 train.py --data-path imagenet-256 ...

Work is cut into chunks of --batch-size images by index, so that any number of processes writes the same files. Killed and
started again, it encodes only the chunks that are missing. What a cache holds is told in data/latent_cache.py.

    python encode_latents.py --data-path repa/vae-sd --out imagenet-256       latents that REPA's code encoded, imported
    python encode_latents.py --out imagenet-256 --check                       a copied cache, against its checksums
"""

import math
import time
from pathlib import Path

from common.errors import UsageError
from train_utils import Parser, check_given, image_size, non_negative_int, positive_int, run, warn_of_precision


def make_parser():
    parser = Parser(prog="encode_latents.py", description="Encode a data set for train.py, under torchrun or alone.")
    data = "images of any kind that train.py takes, or REPA's folder vae-sd"
    parser.add_argument("--data-path", help=data)
    parser.add_argument("--vae", default="ema", help="autoencoder: ema, mse, or a diffusers folder")
    size = "pixels a side, or height x width (those of latents that are imported)"
    parser.add_argument("--image-size", type=image_size, default=256, metavar="N|HxW", help=size)
    parser.add_argument("--out", required=True, help="folder of the cache, for train.py --data-path")
    parser.add_argument("--check", action="store_true", help="read the cache --out against its checksums, and encode nothing")
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images a chunk")
    parser.add_argument(
        "--precision", choices=["fp32", "tf32"], help="of the autoencoder (tf32 on a GPU, as train.py but for its own fp32)"
    )
    parser.add_argument(
        "--num-workers", type=non_negative_int, default=4, help="data loading processes for each encoding process"
    )
    return parser


def main(args):
    if args.check:
        check_given(args, sorted(args.given - {"check", "out"}), " does not go with --check")
        return check(args)
    if not args.data_path:
        raise UsageError("--data-path is missing: the images to encode")
    if args.vae == "none":
        raise UsageError("--vae none: pixels need no cache, train.py reads the images themselves as fast")

    from common import distributed
    from common.atomic import writing
    from common.chunks import ChunkStore
    from common.precision import set_precision
    from common.sizes import latent_shape
    from data.autoencoder import load_autoencoder
    from data.encoding import begin, encode_chunks, finish, make_record, tidy
    from data.latent_cache import LatentCache

    world = distributed.setup(timeout_hours=24)
    precision = set_precision(args.precision, world.device)
    warn_of_precision(world.device, precision)
    dataset = open_data(args, world)
    autoencoder = world.main_first(lambda: load_autoencoder(args.vae)).to(world.device)
    size = args.image_size
    if dataset.encoded:
        size = dataset.check(args.image_size if "image_size" in args.given else None, autoencoder)
    variants = 2 if dataset.mirrors else 1
    shape = (len(dataset), variants, 2, *latent_shape(size, autoencoder, patch_size=1))
    settings = dict(data_path=args.data_path, image_size=size, batch_size=args.batch_size, precision=precision)
    record = make_record(settings, dataset, autoencoder, shape) if world.is_main else None  # of every image's name
    folder = Path(args.out)
    store = ChunkStore(folder / "chunks", len(dataset), args.batch_size)
    if world.is_main:
        gigabytes = math.prod(shape) * 2 / 1e9  # float16
        print(f"{folder}: {len(dataset):,} images, moments of shape {shape}, {gigabytes:.3g} GB", flush=True)
        if dataset.note:
            print(f"{args.data_path}: {dataset.note}", flush=True)

    def start():
        with writing(folder, "--out"):
            return begin(folder, record, store, shape)

    done = world.from_main(start)
    if not done:
        missing, started = world.from_main(store.missing), time.time()
        own = missing[world.rank :: world.size]
        waited = world.gather(encode_chunks(folder, world, dataset, autoencoder, store, own, variants, args.num_workers))
    if world.is_main:
        if not done:
            made, seconds = sum(len(store.indices(chunk)) for chunk in missing), time.time() - started
            speed = f"{made / seconds:.1f} images/s, {sum(waited) / world.size:.0%} of the time waiting for images"
            print(f"{made:,} images encoded in {seconds:.1f} s, {speed}")
            with writing(folder, "--out"):
                finish(folder, record, store, shape, dataset)
        LatentCache(folder)  # it can be read
        tidy(folder, store)
        print(f"{folder} {'was complete already' if done else 'is complete'}")
    distributed.cleanup()
    return 0


def open_data(args, world):
    """The data set to encode or import, the same on every process."""
    from data.autoencoder import image_channels
    from data.foreign_latents import ForeignLatents, is_foreign
    from data.sources import open_dataset

    if is_foreign(args.data_path):
        if world.is_main:
            print(f"{args.data_path}: latents of REPA, one variant: images will not be mirrored while training on them")
        return world.from_main(lambda: ForeignLatents(args.data_path))
    dataset = world.from_main(lambda: open_dataset(args.data_path, args.image_size, image_channels(args.vae)))
    if dataset.encoded:
        raise UsageError(f"--data-path {args.data_path}: it is a cache of latents already")
    return dataset


def check(args):
    from data.cache_check import check_cache

    print(check_cache(args.out))
    return 0


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "encode_latents.py")
