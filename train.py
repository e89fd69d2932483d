"""Train a SiT on the latents of a frozen autoencoder.

    python train.py --data-path builtin:digits --vae assets/digits-vae --model SiT-T/2 ...     one process
    torchrun --nproc_per_node=8 train.py --data-path /imagenet/train                           one process a GPU

All randomness of a step is a function of (--global-seed, step), drawn for the whole global batch, of which each process
takes its share: the number of processes changes nothing but rounding, and continuing is exact.

What is trained, and by which losses, is in training/objective.py; a step of it in training/trainer.py.
"""

from importlib.util import find_spec

from common.errors import UsageError, UserError
from common.kinds import KINDS
from metrics.names import DEFAULT, METRICS, unused_weights, word
from train_utils import (
    Listed,
    Parser,
    below_one,
    check_given,
    fraction,
    free,
    non_negative,
    non_negative_int,
    parse_data_args,
    parse_precision_args,
    parse_transport_args,
    parse_vae_arg,
    positive_int,
    run,
    seed,
    sigma_rel,
    transport_settings,
)


def make_parser():
    """Every flag makes the run what it is, and is refused when it is continued with another value, unless it is free."""
    parser = Parser(prog="train.py", description="Train a SiT under torchrun or alone.")
    add_data_args(parser.add_argument_group("data and model"))
    add_optimization_args(parser.add_argument_group("optimization").add_argument)
    add_speed_args(parser.add_argument_group("speed and memory"))
    add_running_args(parser.add_argument_group("running").add_argument)
    validation = parser.add_argument_group("validation while training", "the loss of held-out images, of the model and its EMA")
    add_validation_args(validation.add_argument)
    evaluation = parser.add_argument_group("evaluation while training", "of EMA samples, drawn by dopri5 without guidance")
    add_evaluation_args(evaluation.add_argument)
    parse_transport_args(parser)
    return parser


def add_data_args(group):
    data = "class folders, a folder, .zip, parquet, a cache of encode_latents.py, or builtin:digits"
    free(group.add_argument("--data-path", required=True, help=data))  # but its images and classes are compared
    group.add_argument("--no-flip", action="store_true", help="never mirror images, for data such as text (digits never are)")
    parse_data_args(group, "classes (those of the data)", default=None)
    parse_vae_arg(group, "ema")
    group.add_argument("--channels", type=int, choices=[1, 3], help="of an image, 1 being grey (the autoencoder's; none: 3)")
    group.add_argument("--val-fraction", type=below_one, help="share of the data that is held out, evenly, for validation")
    group.add_argument("--class-dropout-prob", type=fraction, default=0.1, help="share of labels hidden, for guidance")


def add_optimization_args(add):
    free(add("--epochs", type=positive_int, default=1400, help="passes over the data"))
    free(add("--max-steps", type=positive_int, help="stop here if that comes before --epochs (no limit)"))
    add("--global-batch-size", type=positive_int, default=256, help="images a step over all processes")
    add("--global-seed", type=seed, default=0, help="of everything random")
    add("--lr", type=non_negative, default=1e-4, help="AdamW's learning rate, at its peak")
    add("--lr-schedule", default="constant", choices=["constant", "cosine"], help="after the warm-up")
    add("--warmup-steps", type=non_negative_int, default=0, help="steps of linear warm-up")
    add("--grad-clip", type=non_negative, default=0.0, help="largest gradient norm; 0 is no clipping")
    decays = "of the weights' moving average, or of several: the first is sampled from"
    add("--ema-decay", action=Listed, item=fraction, default=0.9999, metavar="DECAY", help=decays)
    widths = "averages by a power of time too, as wide as this share of the training; reconstruct_ema.py makes others of them"
    add("--ema-power", action=Listed, item=sigma_rel, metavar="SIGMA_REL", help=widths)
    skip = "steps with bad numbers to pass over before giving up"
    free(add("--skip-nonfinite", type=non_negative_int, default=0, help=skip))


def add_speed_args(group):
    parse_precision_args(group)
    add = group.add_argument
    free(add("--compile", action="store_true", help="torch.compile the network"))
    free(add("--grad-checkpointing", action="store_true", help="recompute activations: less memory, more time"))
    free(add("--grad-accum-steps", type=positive_int, default=1, help="parts in which a process does its batch"))
    shard = "each process holds a shard of the weights, gradients, moments and averages: for models larger than a GPU"
    free(add("--shard", action="store_true", help=shard))
    free(add("--shard-size", type=positive_int, help="processes that share one copy, which divide those there are (all)"))
    workers = "data loading processes for each training process"
    free(add("--num-workers", type=non_negative_int, default=4, help=workers))


def add_running_args(add):
    free(add("--dry-run", action="store_true", help="print what a run costs, do one step of it, write nothing"))
    free(add("--results-dir", default="results", help="where run folders go"))
    free(add("--ckpt", help="continue from this checkpoint, in a new run folder"))
    init = "begin with these weights: a checkpoint, published name or hub:REPO/FILE of any classes and size"
    free(add("--init", help=init))  # but its SHA-256 is compared
    free(add("--kind", default="auto", choices=KINDS, help="whose weights --init or --ckpt has, if that must be said"))
    free(add("--resume", action="store_true", help="continue the newest run of these flags, or start it"))
    free(add("--log-every", type=positive_int, default=100, help="steps between log lines"))
    free(add("--ckpt-every", type=positive_int, default=50_000, help="steps between checkpoints"))
    formats = "one file, or one folder that all processes write (scripts/gather.py makes a file of it)"
    free(add("--ckpt-format", default="whole", choices=["whole", "sharded"], help=formats))
    free(add("--keep-last", type=positive_int, help="checkpoints to keep (all)"))
    free(add("--keep-every", type=positive_int, help="keep those at multiples of this too"))
    free(add("--ema-snapshot-every", type=positive_int, help="steps between snapshots of --ema-power (--ckpt-every)"))
    free(add("--sample-every", type=positive_int, default=10_000, help="steps between sample pictures"))
    free(add("--cfg-scale", type=non_negative, default=4.0, help="guidance of those pictures; 1 is none"))
    free(add("--wandb", action="store_true", help="log to Weights & Biases (reads WANDB_KEY, ENTITY, PROJECT)"))


def add_validation_args(add):
    free(add("--val-path", help="held-out images with the same classes, of any kind that --data-path has"))
    free(add("--val-every", type=positive_int, default=5_000, help="steps between validations"))
    free(add("--val-images", type=positive_int, default=1_000, help="images of each, evenly spread; the same each time"))


def add_evaluation_args(add):
    free(add("--eval-every", type=positive_int, help="steps between evaluations (never)"))
    free(add("--eval-samples", type=positive_int, default=5_000, help="samples for each"))
    free(add("--eval-ref", help="reference: .npz of images or statistics, or a folder of images"))
    words = f"what is measured, of {' '.join(METRICS)} ({' '.join(DEFAULT)})"
    free(add("--eval-metrics", action=Listed, item=word, metavar="METRIC", help=words))
    free(add("--inception-weights", help="file, for machines without network"))
    free(add("--dinov2-weights", help="the same for metrics of DINOv2: ViT-L/14, facebook's or timm's file"))


def check_flags(args):
    """Raises UsageError for what one flag cannot know of another."""
    if args.ckpt and (args.resume or args.dry_run):
        raise UsageError(f"--ckpt and --{'resume' if args.resume else 'dry-run'}: give one of them")
    if args.ckpt and args.init:
        raise UsageError("--ckpt and --init: give one of them; the first continues a run, the second begins one")
    if not (args.ckpt or args.init):
        check_given(args, ("kind",), " goes with --init or --ckpt")
    if args.keep_every and not args.keep_last:
        raise UsageError("--keep-every goes with --keep-last")
    if args.val_path and args.val_fraction:
        raise UsageError("--val-path and --val-fraction: give one of them")
    if not (args.val_path or args.val_fraction):
        check_given(args, ("val_every", "val_images"), " goes with --val-path or --val-fraction")
    if not args.eval_every:
        own = ("eval_ref", "eval_samples", "eval_metrics", "inception_weights", "dinov2_weights")
        check_given(args, own, " goes with --eval-every")
    if args.eval_every and not args.eval_ref:
        raise UsageError("--eval-every needs a reference: give --eval-ref")
    check_given(args, unused_weights(args.eval_metrics or DEFAULT), ": none of --eval-metrics needs it")
    if args.wandb and find_spec("wandb") is None:
        raise UserError("--wandb: the package is not installed; pip install wandb, or leave the flag out")
    if isinstance(args.ema_decay, list) and len(set(args.ema_decay)) < len(args.ema_decay):
        raise UsageError(f"--ema-decay {args.ema_decay}: give each decay once")
    if args.ema_power and len(set(args.ema_power)) < len(args.ema_power):
        raise UsageError(f"--ema-power {args.ema_power}: give each width once")
    if not args.shard:
        check_given(args, ("shard_size", *["ckpt_format"] * (args.ckpt_format == "sharded")), " goes with --shard")
    if not args.ema_power:
        check_given(args, ("ema_snapshot_every",), " goes with --ema-power")


def main(args):
    check_flags(args)
    transport = transport_settings(args)

    from training.dry_run import DryRun
    from training.monitor import Monitor
    from training.run import begin_run, plan_run

    planned = plan_run(args, transport)
    if args.dry_run:
        planned.total_steps, steps = 1, planned.total_steps
        return train(planned, DryRun(planned, steps))
    warnings = begin_run(planned)
    with Monitor(planned) as monitor:
        for line in warnings:
            monitor.log(line)
        return train(planned, monitor)


def train(run, monitor):
    """From where the run starts to its end, or to a signal; returns the exit code."""
    from common import distributed
    from training.trainer import Trainer

    trainer = Trainer(run, monitor)
    monitor.begin(trainer)
    if trainer.is_complete:
        monitor.log(f"Step {trainer.step:,} of {run.total_steps:,}: this run is complete, there is nothing to do")
        distributed.cleanup()
        return 0

    with trainer.reading():
        received = loop(run, trainer, monitor)
        monitor.save(trainer)
        saved = monitor.written()
    monitor.finish(f"{f'Stopped by signal {received}' if received else 'Done'} at step {trainer.step:,}")
    distributed.cleanup()
    if not saved:
        raise UserError(f"the last checkpoint, of step {trainer.step}, could not be written: see {run.folder.path}/log.txt")
    return 128 + received if received else 0


def loop(run, trainer, monitor):
    """Step after step to the run's end; returns 0, or the signal that any process has received before it."""
    flags, received = run.flags, 0
    while not trainer.is_complete and not (received := trainer.signal()):
        monitor.waiting()
        images, labels = trainer.next_batch()
        monitor.working()
        losses, norm, good = trainer.take_step(images, labels)
        monitor.add(losses, norm, good)

        step = trainer.step
        if step % flags.log_every == 0 or trainer.is_complete:
            trainer.check(monitor.log)
            trainer.images.share(run.world)
            monitor.report(step, trainer.lr)
        if trainer.is_snapshot_due:
            monitor.snapshot(trainer)  # before the checkpoint: a run that goes on from there has all snapshots until there
        if step % flags.ckpt_every == 0 and not trainer.is_complete:
            monitor.save(trainer)
        if step % flags.sample_every == 0:
            monitor.draw_samples(trainer, step)
        if run.held_out is not None and (step % flags.val_every == 0 or trainer.is_complete):
            monitor.validate(trainer, step)
        if flags.eval_every and step % flags.eval_every == 0:
            monitor.evaluate(trainer, step)
    return received


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "train.py")
