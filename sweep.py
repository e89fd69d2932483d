"""Measure one checkpoint's samples by many settings: guidance, averages, solvers, steps, seeds.

    python sweep.py CKPT --ref photos/ --cfg-scale 1 1.5 2 --num-sampling-steps 50 250 --seeds 0 1 2
    python sweep.py CKPT --ref photos/ --weights ema ema-0.999 sigma-0.08 sigma-0.12
    python sweep.py CKPT --ref photos/ --one-at-a-time --solver ODE:dopri5 ODE:heun SDE:Euler --precision fp32 bf16 \\
        --labels random balanced --num-fid-samples 50000 10000           why does my FID differ

Samples and what was measured of them stay in --out: the same command goes on where it was stopped, and one with more values
or metrics makes only what is new, but that a larger --num-fid-samples draws its sets anew, as do new metrics of samples that
were discarded. sigma-S is the average of width S, of the snapshots in the checkpoint's run (reconstruct_ema.py). sweep.md,
sweep.json and sweep.png are those of the last command.
"""

import sys
from argparse import ArgumentTypeError
from dataclasses import asdict
from pathlib import Path

from common.errors import UsageError, as_usage_error, told_as
from common.precision import PRECISIONS
from inference.sweep import LEVERS, plan, varied
from metrics.names import DEFAULT, METRICS, WEIGHTS, unused_weights, word
from sample_utils import parse_model_args, pipeline_from
from train_utils import (
    Listed,
    Parser,
    check_given,
    fraction,
    non_negative,
    parse_transport_args,
    positive_int,
    run,
    say,
    seed,
    warn,
)


def make_parser():
    parser = Parser(prog="sweep.py", description="Measure one checkpoint's samples by many settings.")
    parser.add_argument("ckpt", metavar="CKPT", help="checkpoint, or a name as sample.py's --ckpt takes it")
    several = parser.add_argument_group("levers", "one value or more of each; every combination is measured")
    add = lambda flag, item, default, help: several.add_argument(  # noqa: E731
        flag, action=Listed, item=item, default=default, metavar="VALUE", help=help
    )
    add("--solver", str, ["ODE:dopri5"], "ODE:METHOD, SDE:METHOD or SDE:METHOD:FORM")
    add("--num-sampling-steps", positive_int, [250], "points in time of fixed solvers and of the SDE")
    add("--cfg-scale", non_negative, [1.0], "guidance; 1 is none")
    add("--cfg-channels", one_of("3", "all"), ["3"], "latent channels that are guided: 3 or all")
    add("--guidance-low", fraction, [0.0], "guide only from this time on (0 is noise)")
    add("--guidance-high", fraction, [1.0], "guide only up to this time (1 is data)")
    add("--weights", str, ["ema"], "states of the checkpoint, or sigma-WIDTH of its run's snapshots")
    add("--precision", one_of(*PRECISIONS), [None], f"of {', '.join(PRECISIONS)} (tf32 on a GPU, fp32 on a CPU)")
    add("--labels", one_of("random", "balanced"), ["random"], "how labels are drawn: random or balanced")
    add("--num-fid-samples", positive_int, [50_000], "samples that are measured; fewer are the first of more")
    add("--seeds", seed, [0], "each is another set of samples: error bars are over them")
    parser.add_argument("--one-at-a-time", action="store_true", help="the first values, and each other value beside them")
    group = parser.add_argument_group("measurement")
    group.add_argument("--ref", required=True, help="reference of evaluate.py: images or statistics")
    group.add_argument("--metrics", action=Listed, item=word, metavar="METRIC", help=f"of {' '.join(METRICS)}")
    group.add_argument("--inception-weights", metavar="FILE", help="torch-fidelity's Inception (its own download)")
    group.add_argument("--dinov2-weights", metavar="FILE", help="DINOv2's ViT-L/14 (the Hub's)")
    group.add_argument("--out", default="sweep", help="folder for samples, results, table and plot")
    group.add_argument("--discard-samples", action="store_true", help="delete a set of samples once it is measured")
    group.add_argument("--per-proc-batch-size", type=positive_int, default=32, help="samples a chunk")
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    parse_model_args(parser, vae="ema", left_out=("ckpt", "weights"))
    parse_transport_args(parser)
    parser.set_defaults(vae_batch_size=None, vae_tiling=False)
    return parser


def one_of(*words):
    def parse(text):
        if text not in words:
            raise ArgumentTypeError(f"choose from {', '.join(words)}, not {text}")
        return text

    return parse


def check_flags(args):
    """(Settings, metrics). Raises UsageError before anything is loaded."""
    words = list(dict.fromkeys(args.metrics or DEFAULT))
    check_given(args, unused_weights(words), ": none of --metrics needs it")
    levers = {name: list(dict.fromkeys(getattr(args, name))) for name in LEVERS}
    args.seeds = list(dict.fromkeys(args.seeds))
    if min(levers["num_fid_samples"]) < 4:
        raise UsageError(f"--num-fid-samples {min(levers['num_fid_samples'])}: the metrics need 4")
    settings = plan(levers, args.one_at_a_time)
    if "time_shift" in args.given and (adaptive := next((each.solver for each in settings if each.is_adaptive), None)):
        raise UsageError(f"--time-shift: {adaptive} chooses its own points; it goes with fixed solvers")
    return settings, words


def main(args):
    settings, words = check_flags(args)

    from common import distributed
    from common.atomic import writable_folder
    from inference.sweep_run import Judge, Sets

    world = distributed.setup(timeout_hours=24)
    out = Path(args.out)
    world.from_main(lambda: [str(writable_folder(out / name, "--out")) for name in ("samples", "results")])
    files = {name: getattr(args, f"{name}_weights") for name in WEIGHTS}
    key = pipe = sets = None
    rows = []
    for weights, precision in dict.fromkeys((each.weights, each.precision) for each in settings):
        check(args, [each for each in settings if (each.weights, each.precision) == (weights, precision)], world)
    # Weights are loaded once for all of their settings.
    for setting in sorted(settings, key=lambda each: (args.weights.index(each.weights), args.precision.index(each.precision))):
        if key != (setting.weights, setting.precision):
            key, pipe = (setting.weights, setting.precision), load(args, setting, world)
        if sets is None:
            judge = Judge(args.ref, pipe.recipe.image_size, words, files, out, warn, world, strict="metrics" in args.given)
            sets = Sets(out, args.seeds, args.per_proc_batch_size, settings, judge, args.discard_samples)
        rows.append(sets.row(pipe, setting))
        if world.is_main:
            announce(rows[-1], len(rows), settings)
    if world.is_main:
        report(sorted(rows, key=lambda row: settings.index(row.setting)), words, args, out)
    distributed.cleanup()
    return 0


def check(args, settings, world):
    """Load the weights that some settings share, and see that they can be sampled so, before any are."""
    pipe = load(args, settings[0], world)
    for setting in settings:
        pipe.network(setting.guide())
        with as_usage_error():
            setting.solve().sampling(pipe, None)


def announce(row, number, settings):
    """A line of what a setting gave."""
    name = next(iter(row.values))
    mean, error = row.mean(name)
    shown = "-" if mean is None else f"{mean:.4f}" + ("" if error is None else f" ± {error:.4f}")
    what = " ".join(row.setting.words(varied(settings))) or row.setting.solver
    say(f"{number} of {len(settings)}: {what}: {row.calls:g} network calls, {name.replace('_', ' ')} {shown}")


def load(args, setting, world):
    """The pipeline of a setting's weights in its precision."""
    from argparse import Namespace

    from common.precision import set_precision

    precision = set_precision(setting.precision, world.device)
    weights, width = {"weights": setting.weights}, setting.weights.removeprefix("sigma-")
    if width != setting.weights:
        weights = {"weights": "ema", "ckpt": world.from_main(lambda: str(reconstructed(args.ckpt, width, args.out)))}
    return world.main_first(lambda: pipeline_from(Namespace(**vars(args) | weights), world.device, precision))


def reconstructed(ckpt, width, out):
    """File of the average of that width at the checkpoint's step, made as reconstruct_ema.py makes it. Raises UserError."""
    from common.atomic import writable_folder, writing
    from common.checkpoint import file_hash, save_checkpoint
    from training.reconstruction import doubts, reconstruct

    ckpt = Path(ckpt).resolve()
    try:
        step, sigma_rel = int(ckpt.stem), float(width)
    except ValueError as error:
        raise UsageError(
            f"--weights sigma-{width}: a width of the snapshots of {ckpt}'s run is wanted, as sigma-0.1"
        ) from error
    path = Path(out) / "weights" / f"{step:07d}-{file_hash(ckpt)[:8]}-sigma-{sigma_rel:g}.pt"  # of this training alone
    if path.exists():
        return path
    with told_as(f"--weights sigma-{width}", f"--sigma-rel {sigma_rel:g}"):
        content, residual = reconstruct([ckpt.parent.parent], sigma_rel, step)
    say(f"{path}: the average of width {sigma_rel:g}, to a residual of {residual:.2%}")
    for line in doubts(content):
        warn(line)
    with writing(writable_folder(path.parent, "--out"), "--out"):
        save_checkpoint(content, path)
    return path


def report(rows, words, args, out):
    """The table, the plot, and what changed the first metric by how much."""
    from common.atomic import write_atomically, write_json, writing
    from inference.sweep import differences, draw, table
    from metrics.names import HIGHER_IS_BETTER

    metrics = [METRICS[each] for each in words]
    titles = {name: title for metric in metrics for name, title in metric.titles.items()}
    digits = {name: metric.digits for metric in metrics for name in metric.titles}
    first = next(iter(titles))
    text = table(rows, titles, HIGHER_IS_BETTER, digits)
    changes = differences(rows, first, digits[first])
    seeds = (
        f"{len(args.seeds)} seeds, ± the standard error over them" if len(args.seeds) > 1 else "1 seed, so no standard errors"
    )
    text += f"\n\nAgainst {args.ref}; {seeds}; the best of each column is bold."
    if changes:
        text += f"\n\nWhat changes {titles[first]} from the first row:\n\n" + "\n".join(f"- {line}" for line in changes)
    print(text)
    few = min(row.setting.num_fid_samples for row in rows)
    if few < 50_000 and any(metric.function == "fd" for metric in metrics):
        warn(f"Frechet distances are biased upwards by few samples: those of {few} do not compare with FID-50K")
    with writing(out, "--out"):
        write_atomically(out / "sweep.md", lambda file: file.write(text + "\n"), "w")
        records = [dict(asdict(row.setting), calls=row.calls, values=row.values) for row in rows]
        write_json(out / "sweep.json", {"command": sys.argv, "ckpt": args.ckpt, "ref": args.ref, "rows": records})
        draw(rows, first, titles[first], out / "sweep.png")
    print(f"{out}/sweep.md, sweep.json, sweep.png")


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "sweep.py")
