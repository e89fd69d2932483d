"""Train a SiT on the latents of a frozen autoencoder.

    python train.py --data-path builtin:digits --vae assets/digits-vae --model SiT-T/2 ...     one process
    torchrun --nproc_per_node=8 train.py --data-path /imagenet/train                           one process a GPU

All randomness of a step is a function of (--global-seed, step), drawn for the whole global batch, of which each process
takes its share: the number of processes changes nothing but rounding, and continuing is exact.
"""

import contextlib
from copy import deepcopy

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader

import distributed
from autoencoder import load_autoencoder
from checkpoint import Recipe, load_checkpoint, load_weights, recipe_of, weights_of
from costs import DryRun
from data import DIGITS, StepSampler, open_dataset, to_latents
from download import locate
from errors import UsageError, UserError
from latent_cache import LatentCache, is_cache
from models import SIT_CONFIGS
from monitor import Monitor
from run_folder import RunFolder
from train_utils import (
    TRANSPORT_KEYS,
    Parser,
    fraction,
    latent_shape,
    non_negative,
    non_negative_int,
    parse_precision_args,
    parse_transport_args,
    parse_vae_arg,
    positive_int,
    run,
    set_precision,
    transport_from,
    writable_folder,
)
from training import (
    DataGuard,
    Draws,
    NumberGuard,
    Stop,
    Tolerant,
    check_data,
    differences,
    draw_step,
    ignore_stop_signals,
    learning_rate,
    load_optimizer,
    refuse_differences,
    update_ema,
)


def make_parser():
    parser = Parser(prog="train.py", description="Train a SiT under torchrun or alone.")
    group = parser.add_argument_group("data and model")
    group.add_argument("--data-path", required=True, help=f"folder of class folders, {DIGITS}, or cache of encode_latents.py")
    group.add_argument("--no-flip", action="store_true", help="never mirror images, for data such as text (digits never are)")
    group.add_argument("--model", default="SiT-XL/2", choices=SIT_CONFIGS, metavar="SiT-{XL,L,B,S,T}/{2,4,8}", help="backbone")
    group.add_argument("--image-size", type=positive_int, default=256, help="pixels a side")
    group.add_argument("--num-classes", type=positive_int, default=1000, help="classes; checked against the data")
    parse_vae_arg(group, "ema")
    group.add_argument("--class-dropout-prob", type=fraction, default=0.1, help="share of labels hidden, for guidance")
    group = parser.add_argument_group("optimization")
    group.add_argument("--epochs", type=positive_int, default=1400, help="passes over the data")
    group.add_argument("--max-steps", type=positive_int, help="stop here if that comes before --epochs (no limit)")
    group.add_argument("--global-batch-size", type=positive_int, default=256, help="images a step over all processes")
    group.add_argument("--global-seed", type=int, default=0, help="of everything random")
    group.add_argument("--lr", type=non_negative, default=1e-4, help="AdamW's learning rate, at its peak")
    group.add_argument("--lr-schedule", default="constant", choices=["constant", "cosine"], help="after the warm-up")
    group.add_argument("--warmup-steps", type=non_negative_int, default=0, help="steps of linear warm-up")
    group.add_argument("--grad-clip", type=non_negative, default=0.0, help="largest gradient norm; 0 is no clipping")
    group.add_argument("--ema-decay", type=fraction, default=0.9999, help="of the weights' moving average")
    group.add_argument(
        "--skip-nonfinite", type=non_negative_int, default=0, help="steps with bad numbers to pass over before giving up"
    )
    group = parser.add_argument_group("speed and memory")
    parse_precision_args(group)
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    group.add_argument("--grad-checkpointing", action="store_true", help="recompute activations: less memory, more time")
    group.add_argument("--grad-accum-steps", type=positive_int, default=1, help="parts in which a process does its batch")
    group.add_argument(
        "--num-workers", type=non_negative_int, default=4, help="data loading processes for each training process"
    )
    group = parser.add_argument_group("running")
    group.add_argument("--dry-run", action="store_true", help="print what a run costs, do one step of it, write nothing")
    group.add_argument("--results-dir", default="results", help="where run folders go")
    group.add_argument("--ckpt", help="continue from this checkpoint, in a new run folder")
    group.add_argument("--resume", action="store_true", help="continue the newest run of these flags, or start it")
    group.add_argument("--log-every", type=positive_int, default=100, help="steps between log lines")
    group.add_argument("--ckpt-every", type=positive_int, default=50_000, help="steps between checkpoints")
    group.add_argument("--keep-last", type=positive_int, help="checkpoints to keep (all)")
    group.add_argument("--keep-every", type=positive_int, help="keep those at multiples of this too")
    group.add_argument("--sample-every", type=positive_int, default=10_000, help="steps between sample pictures")
    group.add_argument("--cfg-scale", type=non_negative, default=4.0, help="guidance of those pictures; 1 is none")
    group.add_argument("--wandb", action="store_true", help="log to Weights & Biases (reads WANDB_KEY, ENTITY, PROJECT)")
    group = parser.add_argument_group("evaluation while training", "of EMA samples, drawn by dopri5 without guidance")
    group.add_argument("--eval-every", type=positive_int, help="steps between evaluations (never)")
    group.add_argument("--eval-samples", type=positive_int, default=5_000, help="samples for each")
    group.add_argument("--eval-ref", help="reference: .npz of images or statistics, or a folder of images")
    group.add_argument("--inception-weights", help="file, for machines without network")
    parse_transport_args(parser)
    return parser


def find_start(args, name, warn):
    """(run folder or None for a new one, checkpoint path or None, its content or None) to begin from.

    Raises UsageError, naming each difference, rather than starting anew beside a run that other flags left unfinished.
    """
    if args.ckpt:
        path = locate(args.ckpt)
        content = load_checkpoint(path)
        refuse_differences(args, content.get("args") or {}, f"--ckpt {path}")
        return None, path, content
    runs = RunFolder.find(args.results_dir, name) if args.resume else []
    for folder in runs:
        if (flags := folder.flags()) is not None and not differences(args, flags):
            writable_folder(folder.path, "--results-dir")
            return folder, *folder.newest_checkpoint(warn)
    for folder in runs:
        if (flags := folder.flags()) is not None and not folder.is_finished():
            refuse_differences(args, flags, f"--resume: the run {folder.path}")
    return None, None, None


def make_recipe(args, dataset, autoencoder, shape):
    """What the checkpoint will say of itself."""
    model_args = {
        **SIT_CONFIGS[args.model],
        "input_size": shape[1],
        "in_channels": shape[0],
        "mlp_ratio": 4.0,
        "class_dropout_prob": args.class_dropout_prob,
        "num_classes": args.num_classes,
        "learn_sigma": False,  # published weights have it and never use it
    }
    transport = {key: getattr(args, key) for key in TRANSPORT_KEYS}
    vae = dict(vae=args.vae, vae_hash=autoencoder.config_hash)
    return Recipe(args.model, model_args, args.image_size, **vae, classes=list(dataset.classes), **transport)


def check_flags(args, world):
    """The transport; raises UsageError for what one flag cannot know of another."""
    parts = world.size * args.grad_accum_steps
    if args.global_batch_size % parts:
        by = f"{world.size} processes" + (f" x {args.grad_accum_steps} parts" if args.grad_accum_steps > 1 else "")
        raise UsageError(f"--global-batch-size {args.global_batch_size} does not divide by {by}")
    if args.ckpt and (args.resume or args.dry_run):
        raise UsageError(f"--ckpt and --{'resume' if args.resume else 'dry-run'}: give one of them")
    if args.keep_every and not args.keep_last:
        raise UsageError("--keep-every goes with --keep-last")
    for flag in ("eval_ref", "eval_samples", "inception_weights"):
        if flag in args.given and not args.eval_every:
            raise UsageError(f"--{flag.replace('_', '-')} goes with --eval-every")
    if args.eval_every and not args.eval_ref:
        raise UsageError("--eval-every needs a reference: give --eval-ref")
    if args.eval_samples < max(4, world.size):
        raise UsageError(f"--eval-samples {args.eval_samples}: the metrics need 4, and one for each process")
    transport = transport_from(args)
    try:
        _ = transport.ode_interval
    except ValueError as error:
        raise UsageError(f"{error}, for the pictures drawn while training too") from error
    return transport


def main(args):
    world = distributed.setup()
    device = world.device
    args.precision = precision = set_precision(args.precision, device)
    transport = check_flags(args, world)

    # What is trained: data, autoencoder, model.
    cached = is_cache(args.data_path)
    dataset = LatentCache(args.data_path) if cached else open_dataset(args.data_path, args.image_size)
    if len(dataset.classes) != args.num_classes:
        raise UsageError(f"--num-classes {args.num_classes}: {args.data_path} has {len(dataset.classes)} classes")
    autoencoder = load_autoencoder(args.vae).to(device)
    if cached:
        dataset.check(args.image_size, autoencoder)
    shape = latent_shape(args.image_size, autoencoder, SIT_CONFIGS[args.model]["patch_size"])
    recipe = make_recipe(args, dataset, autoencoder, shape)
    total_steps = max(1, args.epochs * len(dataset) // args.global_batch_size)
    total_steps = min(total_steps, args.max_steps or total_steps)
    if args.dry_run:
        dry_run = DryRun(args, world, recipe, transport, autoencoder, shape, total_steps)
        return train(args, world, dry_run, dataset, 1, precision, None, None)

    # Where it starts: fresh, or from a checkpoint that the main process chose.
    name = f"{args.model.replace('/', '-')}-{args.path_type}-{args.prediction}-{args.loss_weight}"
    warnings, content = [], None
    if world.is_main:
        folder, path, content = find_start(args, name, warnings.append)
        folder = folder or RunFolder.new(args.results_dir, name)
    folder, path = world.broadcast((folder, path) if world.is_main else None)
    if path and not world.is_main:
        content = load_checkpoint(path)
    monitor = Monitor(args, world, folder, recipe, transport, autoencoder, shape)
    for line in warnings:
        monitor.log(line)
    with monitor:
        return train(args, world, monitor, dataset, total_steps, precision, path, content)


def train(args, world, monitor, dataset, total_steps, precision, path, content):
    """Build the model, continue from content if there is any, and run to total_steps; returns the exit code."""
    device, recipe, transport, autoencoder = world.device, monitor.recipe, monitor.transport, monitor.autoencoder
    stop, start_step = Stop(), 0
    if content:
        weights = weights_of(content, path)
        found = recipe_of(content, weights, path, args.model)
        check_data(dataset, found, content.get("num_images"), path)
        recipe.model_args["learn_sigma"] = found.model_args["learn_sigma"]
    torch.manual_seed(args.global_seed)  # the same initial weights on every process
    model = recipe.build().to(device)
    ema = deepcopy(model).requires_grad_(False).eval()
    model.grad_checkpointing = args.grad_checkpointing
    trained = [p for p in model.parameters() if p.requires_grad]
    averaged = [e for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    if content:
        load_weights(ema, weights, path)
        load_weights(model, content.get("model", weights), path)
        if "opt" in content:
            load_optimizer(optimizer, content["opt"], model, path)
            states = list(content["opt"]["state"].values())
            start_step = content.get("step", int(states[0]["step"]) if states else 0)  # published ones do not say it
        del content, weights
    monitor.begin(trained, dataset, precision, start_step, total_steps, path)
    if args.eval_every:
        monitor.open_evaluation()
    if start_step >= total_steps:
        monitor.log(f"Step {start_step:,} of {total_steps:,}: this run is complete, there is nothing to do")
        distributed.cleanup()
        return 0

    batch = args.global_batch_size // world.size
    micro = batch // args.grad_accum_steps
    forward = torch.compile(model) if args.compile else model
    if world.distributed:
        if args.compile and args.grad_checkpointing:  # whose graph cannot be cut at the borders of DDP's buckets
            torch._dynamo.config.optimize_ddp = False
        device_ids = [device.index] if device.type == "cuda" else None
        forward = DistributedDataParallel(forward, device_ids=device_ids, gradient_as_bucket_view=True)
    steps = StepSampler(len(dataset), args.global_batch_size, args.global_seed, start_step, total_steps, world.rank, world.size)
    loader = DataLoader(  # of a single endless epoch, so its processes live as long as the run
        Tolerant(dataset),
        batch_sampler=steps,
        num_workers=args.num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_stop_signals,
        prefetch_factor=4 if args.num_workers else None,
    )
    t0, t1 = transport.train_interval
    mirrors = dataset.mirrors and not args.no_flip
    numbers = NumberGuard(optimizer, args.skip_nonfinite, device)
    images_guard = DataGuard(dataset, monitor.warn)

    def save(step):
        numbers.check(world, steps.indices_of, monitor.log)
        return world.broadcast(
            monitor.save(
                step,
                {
                    "model": model.state_dict(),
                    "ema": ema.state_dict(),
                    "opt": optimizer.state_dict(),
                    "args": {key: value for key, value in vars(args).items() if key != "given"},
                    "step": step,
                    "num_images": len(dataset),
                    "recipe": recipe.to_dict(),
                },
            )
            if world.is_main
            else None
        )

    model.train()
    step = start_step
    batches = iter(loader)
    while step < total_steps and not (received := world.max(stop.received)):
        step += 1
        monitor.waiting()
        images, labels, read = next(batches)
        monitor.working()
        images_guard.check(steps.indices_of(step), read)
        draws = draw_step(args.global_seed, step, args.global_batch_size, monitor.latent_shape, device)
        draws = Draws(*(values[world.rank * batch : (world.rank + 1) * batch] for values in draws))
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        loss = torch.zeros((), device=device)
        optimizer.zero_grad()
        for first in range(0, batch, micro):
            part = slice(first, first + micro)
            x1 = to_latents(autoencoder, images[part], draws.flip[part] & mirrors, draws.posterior[part])
            time_kwargs = dict(x0=draws.noise[part], t=t0 + (t1 - t0) * draws.time[part])
            model_kwargs = dict(y=labels[part], force_drop_ids=draws.drop[part] < args.class_dropout_prob)
            alone = world.distributed and first + micro < batch  # gradients meet once a step, after the last part
            with forward.no_sync() if alone else contextlib.nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    losses = transport.training_losses(forward, x1, model_kwargs, **time_kwargs)
                part_loss = losses["loss"].mean() / args.grad_accum_steps
                part_loss.backward()
            loss += part_loss.detach()
        norm = get_total_norm([p.grad for p in trained])
        if args.grad_clip:
            clip_grads_with_norm_(trained, args.grad_clip, norm)
        good = numbers.watch(step, loss, norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, args, total_steps)
        optimizer.step()
        update_ema(averaged, trained, args.ema_decay)
        monitor.add(loss, norm, good)

        if step % args.log_every == 0 or step == total_steps:
            numbers.check(world, steps.indices_of, monitor.log)
            images_guard.share(world)
            monitor.report(step, group["lr"])
        if step % args.ckpt_every == 0 and step < total_steps:
            save(step)
        if step % args.sample_every == 0 and world.is_main:
            monitor.draw_samples(ema, step)
        if args.eval_every and step % args.eval_every == 0:
            monitor.evaluate(ema, step)
    saved = save(step)
    monitor.finish(f"Stopped by signal {received} at step {step:,}" if received else f"Done at step {step:,}")
    distributed.cleanup()
    if not saved:
        raise UserError(f"the last checkpoint, of step {step}, could not be written: see {monitor.folder.path}/log.txt")
    return 128 + received if received else 0


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "train.py")
