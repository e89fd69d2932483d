"""Many samples from many processes: PNGs and one .npz for an FID, or the likelihood of a data set.

    torchrun --nproc_per_node=8 sample_ddp.py SDE --ckpt ... --num-fid-samples 50000
    python sample_ddp.py ODE --likelihood --data-path builtin:digits --ckpt ...

Image i depends on (--global-seed, i) alone, and work is cut into chunks of --per-proc-batch-size by index, so that any
number of processes makes the same .npz, bit for bit. Killed and started again, it makes only the chunks that are missing.
"""

import argparse
import hashlib
from pathlib import Path

from common.errors import UsageError
from common.flags import flags_of
from inference.presets import PRESETS, settings_of
from sample_utils import check_likelihood_args, guidance_from, parse_modes, pipeline_from, solver_from
from train_utils import Listed, Parser, check_given, free, positive_int, run, seed, warn


def make_parser():
    def add_own(group):
        preset = "the paper's settings for flags that are left out (presets.py)"
        free(group.add_argument("--preset", choices=PRESETS, help=preset))
        group.add_argument("--num-fid-samples", type=positive_int, default=50_000, help="how many samples")
        group.add_argument("--per-proc-batch-size", type=positive_int, default=4, help="samples a chunk")
        group.add_argument("--global-seed", type=seed, default=0, help="sample i depends on it and on i alone")
        group.add_argument("--labels", default="random", choices=["random", "balanced"], help="how labels are drawn")
        group.add_argument("--class-labels", action=Listed, metavar="ID", help="sample i gets label i mod their number")
        free(group.add_argument("--sample-dir", default="samples", help="where the folder, .npz and .json go"))
        group.add_argument("--no-png", action="store_true", help="only the .npz")
        tf32 = dict(default=True, action=argparse.BooleanOptionalAction, help="on GPUs, unless --precision says")
        free(group.add_argument("--tf32", **tf32))

    parser = Parser(prog="sample_ddp.py", description="Many samples, or the likelihood of a data set, under torchrun or alone.")
    parse_modes(parser, add_own, vae="ema", cfg_scale=1.0, num_images=None)
    return parser


def apply_preset(args):
    """Fill the flags that were not typed from --preset; returns the FID-50K to expect, or None where what was typed
    differs from it."""
    settings, fid = settings_of(args.preset, args.mode)
    if "tf32" in args.given and "precision" not in args.given:
        args.precision, args.given = "tf32" if args.tf32 else "fp32", args.given | {"precision"}
    changed = [key for key, value in settings.items() if key in args.given and getattr(args, key) != value]
    for key, value in settings.items():
        if key not in args.given:
            setattr(args, key, value)
    args.given = args.given | {"model", "image_size"}  # a checkpoint of another model is a contradiction
    return None if changed else fid


def check_flags(args):
    """(the paper's FID for these flags or None, whether they ask for a likelihood). Raises UsageError."""
    expected_fid = apply_preset(args) if args.preset else None
    scores = check_likelihood_args(args)
    if args.mode == "ODE" and args.reverse:
        raise UsageError("--reverse encodes images to look at: use sample.py; here --likelihood is the task of --data-path")
    if scores:
        drawn = ("class_labels", "labels", "num_fid_samples", "preset", "no_png")
        check_given(args, drawn, " does not go with --likelihood")
    if {"precision", "tf32"} <= args.given and (args.precision == "tf32") != args.tf32:
        raise UsageError(f"--precision {args.precision} and --{'' if args.tf32 else 'no-'}tf32: give one of them")
    return expected_fid, scores


def describe(args, pipe, guidance, precision, data):
    """(name of the run, all that decides its images): no run is mistaken for another's remains."""
    from common.checkpoint import file_hash
    from inference.records import identity_hash, identity_of
    from inference.velocity_loss import beside, loss_of

    paths = {"model": pipe.path} | ({"guidance": guidance.weak.path} if guidance.weak else {})
    settings = {key: value for key, value in flags_of(args).items() if key in args.identity}
    if settings.get("diffusion_eta") is not None:
        loss_of(pipe, args.diffusion_loss)  # which says it where it is not there, or another's
        settings["diffusion_loss_sha256"] = file_hash(args.diffusion_loss or beside(pipe.path, pipe.weights))
    identity = identity_of(settings | dict(cfg_scale=guidance.scale, precision=precision), pipe, paths) | data
    model, task = pipe.recipe.model.replace("/", "-"), f"{args.mode}-{args.num_sampling_steps}-{args.sampling_method}"
    task = "likelihood" if data else task
    about = f"cfg-{guidance.scale:g}-seed-{args.global_seed}-{identity_hash(identity, args.identity)}"
    return f"{model}-{pipe.path.stem}-{task}-{about}", identity


def make_work(args, pipe, settings, expected_fid, scores):
    """(what makes the chunks, how many items there are, what is said of their data)"""
    from common.spread import spread
    from data.sources import LabelledImages
    from inference.chunked import Labels, Samples, Scores

    if not scores:
        pipe.check_classes(args.class_labels or ())
        labels = Labels(pipe.recipe.num_classes, args.global_seed, args.labels, args.class_labels)
        return Samples(pipe, labels, args.global_seed, settings, expected_fid=expected_fid), args.num_fid_samples, {}
    dataset = LabelledImages(args.data_path, pipe.recipe)
    if dataset.note:
        warn(f"{args.data_path}: {dataset.note}")
    chosen = spread(len(dataset), args.num_images)
    names = repr([dataset.name(i) for i in chosen])
    data = {"data": {"path": args.data_path, "names_sha256": hashlib.sha256(names.encode()).hexdigest()}}
    probes = dict(num_probes=args.num_probes, exact_divergence=args.exact_divergence, dequantize=args.dequantize)
    return Scores(pipe, dataset, chosen, args.global_seed, settings | probes), len(chosen), data


def report(summary, result, done):
    """The lines that a user came for."""
    if "bits_per_dim" in summary:
        for what in ("bits_per_dim", "nats"):
            error = summary[f"{what}_standard_error"]
            print(f"{what.replace('_', ' ')}: {summary[what]:.4f}" + (f" +- {error:.4f}" if error is not None else ""))
        calls = summary["network_calls_per_image"]
    else:
        calls = summary["network_calls_per_sample"]
    print(f"{result}{' was complete already' if done else ''}: {calls:g} network calls an image", end=", ")
    print(f"{summary['wall_seconds']:.1f} s, {summary['images_per_second']:.2f} images/s")
    if summary.get("expected_fid_50k"):
        print(f"the paper's FID-50K with these settings: {summary['expected_fid_50k']}")


def main(args):
    expected_fid, scores = check_flags(args)
    solver = solver_from(args)

    from common import distributed
    from common.precision import set_precision
    from inference.chunked import complete

    world = distributed.setup(timeout_hours=24)  # a slow process may end long after the others
    precision = set_precision(args.precision, world.device, args.tf32)

    def load():
        pipe = pipeline_from(args, world.device, precision)
        return pipe, guidance_from(args, pipe, precision)

    pipe, guidance = world.main_first(load)
    settings = dict(solver=solver, guidance=guidance)
    pipe.network(settings["guidance"])  # it can be guided so
    work, total, data = make_work(args, pipe, settings, expected_fid, scores)
    name, identity = world.from_main(lambda: describe(args, pipe, settings["guidance"], precision, data))
    base = Path(args.sample_dir) / name
    if not (args.no_png or scores):
        work.png_folder = base
    result, summary, done = complete(work, total, args.per_proc_batch_size, base, identity, world)
    if world.is_main:
        report(summary, result, done)
    distributed.cleanup()
    return 0


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "sample_ddp.py")
