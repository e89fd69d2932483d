"""Measure samples against a reference: FID, sFID, Inception Score, precision and recall.

python evaluate.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz
torchrun --nproc-per-node=8 evaluate.py samples/ --ref photos/ --save-stats photos.npz

The metrics are those of ADM's evaluation suite (Dhariwal & Nichol, arXiv 2105.05233), on torch-fidelity's Inception.
"""

import hashlib
import sys
import time
from functools import partial
from pathlib import Path

from common.errors import UsageError, UserError
from common.flags import flags_of
from common.precision import PRECISIONS
from train_utils import Parser, image_size, positive_int, run, warn, warn_of_precision


def make_parser():
    parser = Parser(prog="evaluate.py", description="FID, sFID, Inception Score, precision and recall of samples.")
    parser.add_argument(
        "samples",
        metavar="SAMPLES",
        help=".npz with arr_0, uint8 (N, H, W, 3), or a folder of images, with or without sub-folders",
    )
    parser.add_argument("--ref", required=True, help="the same, or a .npz with mu, sigma, mu_s, sigma_s")
    crop = "crop the images of folders to N or HxW pixels, as training does (all must be of one size)"
    parser.add_argument("--image-size", type=image_size, metavar="N|HxW", help=crop)
    parser.add_argument("--inception-weights", metavar="FILE", help="torch-fidelity's Inception (its own download)")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images at once, in each process")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the Inception; published FIDs are fp32")
    parser.add_argument("--save-stats", metavar="FILE.npz", help="also save the measured reference, for a later --ref")
    parser.add_argument("--out", metavar="FILE.json", help="results and settings (SAMPLES.eval.json beside the samples)")
    return parser


def check_outputs(args):
    """Settle --out and see that all can be written, before the work."""
    from common.atomic import writable_folder

    samples = Path(args.samples).resolve()
    if args.precision == "bf16" and args.save_stats:
        raise UsageError("--save-stats with --precision bf16: statistics to compare with must be those of float32 features")
    args.out = args.out or str(samples.with_name(f"{samples.name.removesuffix('.npz')}.eval.json"))
    for flag, path in (("--out", args.out), ("--save-stats", args.save_stats)):
        if path and Path(path).is_dir():
            raise UsageError(f"{flag} {path}: it is a folder; give a file")
        if path:
            writable_folder(Path(path).parent, flag)


def show(results, num_samples, reference, precision="fp32"):
    """Print what evaluate gives as a table, and one line for each thing that limits what it means."""
    from metrics.features import POOL

    warnings = {
        "features in bf16: their FID does not compare with that of float32 features": precision == "bf16",
        f"FID is biased upwards by few samples: {num_samples} do not compare with FID-50K": num_samples < 50_000,
        f"the covariance of {POOL} features of {num_samples} samples is singular": num_samples <= POOL,
        "no sFID: the reference has no mu_s and sigma_s": reference.mu_s is None,
        "no precision and recall: the reference has neither images nor their features": reference.features is None,
    }
    for warning in (line for line, holds in warnings.items() if holds):
        warn(warning)
    for name, value in zip(("FID", "sFID", "Inception Score", "Precision", "Recall"), results.values()):
        print(f"{name:15} {'-' if value is None else f'{value:.4f}':>10}")


def main(args):
    import torch

    from common import distributed
    from common.precision import set_precision
    from metrics.features import load_inception, shared_features
    from metrics.image_files import open_images
    from metrics.reference import measure_reference, open_reference
    from metrics.scores import NEIGHBOURS, evaluate

    world = distributed.setup()
    set_precision(args.precision, world.device)
    samples = open_images(args.samples, image_size=args.image_size)
    opened = open_reference(args.ref, args.image_size, warn=partial(print, file=sys.stderr))  # of any process
    for path, images in ((args.samples, samples), (args.ref, opened[1])):
        if images is not None and len(images) <= NEIGHBOURS:
            raise UserError(f"{path}: {len(images)} images; the metrics need {NEIGHBOURS + 1} or more")
    check_outputs(args)
    warn_of_precision(world.device, args.precision)
    inception = load_inception(args.inception_weights, world.device)
    measure = partial(shared_features, inception=inception, batch_size=args.batch_size, world=world)
    for note in {getattr(images, "note", None) for images in (samples, opened[1])} - {None}:
        warn(note)
    started = time.time()
    with torch.autocast(world.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        features = measure(samples, title="samples")
        speed = len(samples) / (time.time() - started)
        reference = measure_reference(opened, partial(measure, title="reference"))
    if world.is_main:
        results = evaluate(features, reference, world.device)
        show(results, len(samples), reference, args.precision)
        spent = dict(seconds=time.time() - started, images_per_second=speed)
        save(args, results, len(samples), reference, world, spent)
    distributed.cleanup()
    return 0


def save(args, results, num_samples, reference, world, spent):
    """The results with all that they were made of, and the reference if it is asked for."""
    import numpy as np
    import torch
    import torch_fidelity

    from common.atomic import write_atomically, write_json

    weights = args.inception_weights
    settings = flags_of(args) | dict(
        num_samples=num_samples,
        num_reference=reference.count,
        inception_sha256=weights and hashlib.sha256(Path(weights).read_bytes()).hexdigest(),
        torch_fidelity=torch_fidelity.__version__,
        device=torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
        processes=world.size,
        **spent,
    )
    try:
        write_json(args.out, {**results, "settings": settings})
        if args.save_stats:
            fields = {key: value for key, value in vars(reference).items() if value is not None}
            write_atomically(args.save_stats, lambda file: np.savez(file, **fields))
    except OSError as error:
        raise UserError(f"cannot write {error.filename or 'the results'}: {error.strerror}") from error


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "evaluate.py")
