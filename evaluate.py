"""Measure samples against a reference: FID, sFID, Inception Score, precision and recall, and what else --metrics asks for.

python evaluate.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz
torchrun --nproc-per-node=8 evaluate.py samples/ --ref photos/ --save-stats photos.npz
python evaluate.py seed-0.npz seed-1.npz seed-2.npz --ref photos.npz --metrics fid kid fd-dinov2

The default ones are those of ADM's evaluation suite (Dhariwal & Nichol, arXiv 2105.05233), on torch-fidelity's Inception. The
images are seen once by each network that the metrics need; metrics/names.py has them all.
"""

import sys
import time
from functools import partial
from pathlib import Path

from common.errors import UsageError, UserError
from common.flags import flags_of
from common.precision import PRECISIONS
from metrics.names import DEFAULT, METRICS, WEIGHTS, networks_of, unused_weights, word
from train_utils import Listed, Parser, check_given, image_size, positive_int, run, warn, warn_of_precision


def make_parser():
    parser = Parser(prog="evaluate.py", description="FID, sFID, Inception Score, precision and recall of samples, and more.")
    samples = ".npz with arr_0, uint8 (N, H, W, 3), or a folder of images, with or without sub-folders; several, such as those "
    parser.add_argument("samples", metavar="SAMPLES", nargs="+", help=samples + "of other seeds, give a standard error")
    parser.add_argument("--ref", required=True, help="the same, or a .npz with mu, sigma, mu_s, sigma_s")
    words = f"what is measured, of {' '.join(METRICS)} ({' '.join(DEFAULT)})"
    parser.add_argument("--metrics", action=Listed, item=word, metavar="METRIC", help=words)
    splits = "also measure so many disjoint parts of the samples, for a standard error"
    parser.add_argument("--splits", type=positive_int, metavar="K", help=splits)
    crop = "crop the images of folders to N or HxW pixels, as training does (all must be of one size)"
    parser.add_argument("--image-size", type=image_size, metavar="N|HxW", help=crop)
    parser.add_argument("--inception-weights", metavar="FILE", help="torch-fidelity's Inception (its own download)")
    parser.add_argument("--dinov2-weights", metavar="FILE", help="DINOv2's ViT-L/14, facebook's or timm's file (the Hub's)")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images at once, in each process")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the networks; published FIDs are fp32")
    parser.add_argument("--save-stats", metavar="FILE.npz", help="also save the measured reference, for a later --ref")
    out = "results and settings (SAMPLES.eval.json beside the samples); of several SAMPLES, the summary beside those"
    parser.add_argument("--out", metavar="FILE.json", help=out)
    return parser


def check_flags(args):
    """The metrics asked for. Raises UsageError for flags that do not go together."""
    words = list(dict.fromkeys(args.metrics or DEFAULT))
    check_given(args, unused_weights(words), ": none of --metrics needs it")
    if args.splits == 1:
        raise UsageError("--splits 1: a standard error takes 2 or more")
    if args.precision == "bf16" and args.save_stats:
        raise UsageError("--save-stats with --precision bf16: statistics to compare with must be those of float32 features")
    if args.save_stats and not any(METRICS[each].needs for each in words):
        raise UsageError(f"--save-stats: {', '.join(words)} measures nothing of a reference")
    return words


def check_outputs(args):
    """{SAMPLES: where its results go}. Sees that all can be written, before the work. Raises UsageError, UserError."""
    from common.atomic import writable_folder

    paths = {path: Path(path).resolve() for path in args.samples}
    beside = {path: str(whole.with_name(f"{whole.name.removesuffix('.npz')}.eval.json")) for path, whole in paths.items()}
    if len(set(beside.values())) < len(args.samples):
        raise UsageError(f"{' '.join(args.samples)}: give each once, and none whose results would have another's name")
    if args.out and len(paths) == 1:
        beside = dict.fromkeys(paths, args.out)
    for flag, path in (*(("--out", path) for path in (*beside.values(), args.out)), ("--save-stats", args.save_stats)):
        if path and Path(path).is_dir():
            raise UsageError(f"{flag} {path}: it is a folder; give a file")
        if path:
            writable_folder(Path(path).parent, flag)
    return beside


def check_counts(args, samples, opened):
    """Raises UserError for images that are too few."""
    from metrics.scores import NEIGHBOURS

    for path, images in (*samples.items(), (args.ref, opened.images)):
        if images is not None and len(images) <= NEIGHBOURS:
            raise UserError(f"{path}: {len(images)} images; the metrics need {NEIGHBOURS + 1} or more")
    for path, images in samples.items():
        if args.splits and len(images) // args.splits <= NEIGHBOURS:
            parts = f"--splits {args.splits}: parts of {path} would have {len(images) // args.splits} images"
            raise UsageError(f"{parts}; the metrics need {NEIGHBOURS + 1} or more")


def main(args):
    words = check_flags(args)

    import torch

    from common import distributed
    from common.precision import set_precision
    from metrics.features import shared_features
    from metrics.image_files import open_images
    from metrics.networks import load_networks
    from metrics.reference import measure_reference, open_reference
    from metrics.results import evaluate, split_summary

    world = distributed.setup(timeout_hours=24)  # the others wait for the metrics of the main process
    set_precision(args.precision, world.device)
    samples = {path: open_images(path, image_size=args.image_size) for path in args.samples}
    told = partial(print, file=sys.stderr)  # of any process
    opened = open_reference(args.ref, args.image_size, told, words, strict="metrics" in args.given)
    check_counts(args, samples, opened)
    outputs = check_outputs(args)
    warn_of_precision(world.device, args.precision)
    weights = {name: getattr(args, f"{name}_weights") for name in WEIGHTS}
    networks = world.main_first(lambda: load_networks(networks_of(words), weights, world.device))
    opened.check(networks)
    for note in {getattr(images, "note", None) for images in (*samples.values(), opened.images)} - {None}:
        warn(note)

    def measure(images, network, title="reference"):
        with torch.autocast(world.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            return shared_features(images, networks[network], args.batch_size, world, title)

    started, everything, shared = time.time(), {}, None
    references = measure_reference(opened, measure)
    before = time.time() - started
    for path, images in samples.items():
        started = time.time()
        features = {network: measure(images, network, "samples") for network in networks}
        speed = len(images) / (time.time() - started)
        if world.is_main:
            results = evaluate(features, references, words, world.device)
            if args.splits:
                results["splits"] = split_summary(features, references, args.splits, words, world.device)
            spent = dict(seconds=before + time.time() - started, images_per_second=speed)
            own = dict(samples=path, samples_sha256=sha256(path), out=outputs[path], num_samples=len(images), **spent)
            shared = shared or settings_of(args, words, references, world)
            everything[path] = results | {"settings": shared | own}
            keep(outputs[path], everything[path])
    if world.is_main:
        report(args, everything, {name: network.widths[0] for name, network in networks.items()})
        save(args, everything, references)
    distributed.cleanup()
    return 0


def sha256(path):
    """Of a file; None of a folder."""
    from common.checkpoint import file_hash

    return file_hash(path) if Path(path).is_file() else None


def keep(path, results):
    """Write the results of one SAMPLES: those of the next may fail."""
    from common.atomic import write_json, writing

    with writing(path, "--out"):
        write_json(path, results)


def report(args, everything, widths):
    """Warnings and the table of all SAMPLES' results."""
    from metrics.report import limits, table

    counts = [results["settings"]["num_samples"] for results in everything.values()]
    lines = (limits(each, n, widths, args.precision, args.splits) for each, n in zip(everything.values(), counts))
    for line in dict.fromkeys(line for some in lines for line in some):
        warn(line)
    columns, over, heads = list(everything.values()), None, ()
    if len(columns) > 1:
        over, heads = summary_of(everything), [*map(str, range(1, len(columns) + 1)), "mean"]
        print(*(f"{number}: {path}" for number, path in enumerate(everything, 1)), sep="\n")
    elif args.splits:
        over, heads = columns[0]["splits"], ["all", f"{args.splits} parts"]
    print(*table(columns, over, heads), sep="\n")


def summary_of(everything):
    """metrics.results.summary of all SAMPLES' results."""
    from metrics.results import summary

    kept = ("splits", "settings")
    return summary([{name: value for name, value in each.items() if name not in kept} for each in everything.values()])


def settings_of(args, words, references, world):
    """What all results were made of, but for the samples."""
    import torch_fidelity

    from inference.records import machine_of
    from metrics.reference import suffix

    weights = {name: getattr(args, f"{name}_weights") for name in WEIGHTS}
    return flags_of(args) | dict(
        metrics=words,
        **{f"num_reference{suffix(name)}": reference.count for name, reference in references.items()},
        **{f"{name}_sha256": file and sha256(file) for name, file in weights.items()},
        ref_sha256=sha256(args.ref),
        torch_fidelity=torch_fidelity.__version__,
        **machine_of(world),
    )


def save(args, everything, references):
    """The summary of several SAMPLES with all that it was made of, and the reference, if they are asked for."""
    import numpy as np

    from common.atomic import write_atomically, write_json

    try:
        if args.out and len(everything) > 1:
            over = summary_of(everything)
            means = {key: {name: about[key] for name, about in over.items()} for key in ("mean", "standard_error")}
            shared = next(iter(everything.values()))["settings"]
            own = ("out", "num_samples", "samples_sha256", "seconds", "images_per_second")
            settings = {key: value for key, value in shared.items() if key not in own} | {"samples": list(everything)}
            write_json(args.out, {"samples": everything, **means, "settings": settings})
        if args.save_stats:
            fields = {key: value for name, each in references.items() for key, value in each.arrays(name).items()}
            write_atomically(args.save_stats, lambda file: np.savez(file, **fields))
    except OSError as error:
        raise UserError(f"cannot write {error.filename or 'the results'}: {error.strerror}") from error


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "evaluate.py")
