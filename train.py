"""Train a SiT on the latents of a frozen autoencoder.

    python train.py --data-path builtin:digits --vae assets/digits-vae --model SiT-T/2 ...     one process
    torchrun --nproc_per_node=8 train.py --data-path /imagenet/train                           one process a GPU

All randomness of a step is a function of (--global-seed, step), drawn for the whole global batch, of which each process
takes its share: the number of processes changes nothing but rounding, and continuing is exact.
"""

import math
import signal
import time
from copy import deepcopy

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import distributed
from autoencoder import load_autoencoder
from checkpoint import Recipe, load_checkpoint, load_weights, recipe_of, save_checkpoint, weights_of
from data import DIGITS, StepSampler, open_dataset, to_pixels
from download import locate
from errors import UsageError
from models import SIT_CONFIGS
from run_folder import RunFolder
from sampling import GuidedModel
from streams import SampleStreams
from train_utils import (
    TRANSPORT_KEYS,
    Parser,
    fraction,
    latent_shape,
    non_negative,
    parse_precision_args,
    parse_transport_args,
    parse_vae_arg,
    positive_int,
    run,
    set_precision,
    transport_from,
)
from training import Draws, check_identity, draw_step, learning_rate, update_ema
from transport import Sampler

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def ignore_stop_signals(worker_id):
    """In a data loading process: Ctrl-C reaches it too, but the training process decides when the end is."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def make_parser():
    parser = Parser(prog="train.py", description="Train a SiT under torchrun or alone.")
    group = parser.add_argument_group("data and model")
    group.add_argument("--data-path", required=True, help=f"folder with one sub-folder of images a class, or {DIGITS}")
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
    group.add_argument("--warmup-steps", type=int, default=0, help="steps of linear warm-up")
    group.add_argument("--grad-clip", type=non_negative, default=0.0, help="largest gradient norm; 0 is no clipping")
    group.add_argument("--ema-decay", type=fraction, default=0.9999, help="of the weights' moving average")
    parse_precision_args(group)
    group = parser.add_argument_group("running")
    group.add_argument("--results-dir", default="results", help="where run folders go")
    group.add_argument("--ckpt", help="continue from this checkpoint")
    group.add_argument("--num-workers", type=int, default=4, help="data loading processes for each training process")
    group.add_argument("--log-every", type=positive_int, default=100, help="steps between log lines")
    group.add_argument("--ckpt-every", type=positive_int, default=50_000, help="steps between checkpoints")
    group.add_argument("--sample-every", type=positive_int, default=10_000, help="steps between sample pictures")
    group.add_argument("--cfg-scale", type=non_negative, default=4.0, help="guidance of those pictures; 1 is none")
    group.add_argument("--wandb", action="store_true", help="log to Weights & Biases (reads WANDB_KEY, ENTITY, PROJECT)")
    parse_transport_args(parser)
    return parser


def main(args):
    world = distributed.setup()
    device = world.device
    precision = set_precision(args.precision, device)
    if args.global_batch_size % world.size:
        raise UsageError(f"--global-batch-size {args.global_batch_size} does not divide by {world.size} processes")
    batch = args.global_batch_size // world.size
    own = slice(world.rank * batch, (world.rank + 1) * batch)

    # What is trained: data, autoencoder, transport, model.
    transport = transport_from(args)
    dataset = open_dataset(args.data_path, args.image_size)
    if len(dataset.classes) != args.num_classes:
        raise UsageError(f"--num-classes {args.num_classes}: {args.data_path} has {len(dataset.classes)} classes")
    mirrors = dataset.mirrors and not args.no_flip
    autoencoder = load_autoencoder(args.vae).to(device)
    shape = latent_shape(args.image_size, autoencoder, SIT_CONFIGS[args.model]["patch_size"])
    model_args = {
        **SIT_CONFIGS[args.model],
        "input_size": shape[1],
        "in_channels": shape[0],
        "mlp_ratio": 4.0,
        "class_dropout_prob": args.class_dropout_prob,
        "num_classes": args.num_classes,
        "learn_sigma": False,
    }
    recipe = Recipe(
        model=args.model,
        model_args=model_args,
        image_size=args.image_size,
        vae=args.vae,
        vae_hash=autoencoder.config_hash,
        classes=list(dataset.classes),
        **{key: getattr(args, key) for key in TRANSPORT_KEYS},
    )

    # Where it starts: fresh, or from a checkpoint.
    content, start_step = None, 0
    if args.ckpt:
        path = locate(args.ckpt)
        content = load_checkpoint(path)
        weights = weights_of(content, path)
        check_identity(args, content, path)
        found = recipe_of(content, weights, path, args.model).model_args
        recipe.model_args = {**model_args, "learn_sigma": found["learn_sigma"]}
    torch.manual_seed(args.global_seed)  # the same initial weights on every process
    model = recipe.build().to(device)
    ema = deepcopy(model).requires_grad_(False).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    averaged = [e for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=device.type == "cuda")
    if content is not None:
        load_weights(ema, weights, path)
        load_weights(model, content.get("model", weights), path)
        if "opt" in content:
            optimizer.load_state_dict(content["opt"])
            states = list(content["opt"]["state"].values())
            start_step = content.get("step", int(states[0]["step"]) if states else 0)
        del content, weights

    total_steps = max(1, args.epochs * len(dataset) // args.global_batch_size)
    total_steps = min(total_steps, args.max_steps or total_steps)
    if world.is_main:
        name = f"{args.model.replace('/', '-')}-{args.path_type}-{args.prediction}-{args.loss_weight}"
        folder = RunFolder.new(args.results_dir, name)
        logger = folder.logger()
        logger.info(f"Run folder {folder.path}")
        logger.info(f"{args.model}: {sum(p.numel() for p in trained):,} trained parameters, latents {shape}, {precision}")
        logger.info(f"{len(dataset):,} images in {args.num_classes} classes from {args.data_path}")
        logger.info(f"{world.size} process(es) on {device.type}, {batch} images each; steps {start_step:,} to {total_steps:,}")
        wandb_run = folder.start_wandb(args) if args.wandb else None

    if world.distributed:
        forward = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    else:
        forward = model
    loader = DataLoader(
        dataset,
        batch_sampler=StepSampler(
            len(dataset), args.global_batch_size, args.global_seed, start_step, total_steps, world.rank, world.size
        ),
        num_workers=args.num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_stop_signals,
    )

    def save(step):
        content = {
            "model": model.state_dict(),
            "ema": ema.state_dict(),
            "opt": optimizer.state_dict(),
            "args": {key: value for key, value in vars(args).items() if key != "given"},
            "step": step,
            "recipe": recipe.to_dict(),
        }
        save_checkpoint(content, folder.checkpoint_path(step))
        logger.info(f"Saved {folder.checkpoint_path(step)}")

    @torch.no_grad()
    def draw_samples(step):
        """A picture of the EMA's samples: the same noise and classes each time."""
        guided = args.cfg_scale if recipe.null_class is not None else 1.0
        network = GuidedModel(ema, guided, recipe.null_class)
        z = SampleStreams(args.global_seed, range(16)).randn(shape, device)
        y = torch.arange(16, device=device) % args.num_classes
        latents = Sampler(transport).sample_ode()(z, network, y=y)[-1]
        picture = make_grid(autoencoder.decode(latents).clamp(-1, 1), nrow=4, normalize=True, value_range=(-1, 1))
        file = folder.samples / f"{step:07d}.png"
        save_image(picture, file)
        logger.info(f"Sampled {file} ({network.calls} network calls)")
        if wandb_run:
            import wandb

            wandb_run.log({"samples": wandb.Image(str(file))}, step=step)

    # A signal asks for an end; the ranks agree on it after each step. A second Ctrl-C does not wait.
    asked = []

    def on_signal(received, frame):
        if received == signal.SIGINT and asked:
            raise KeyboardInterrupt
        asked.append(received)

    for number in STOP_SIGNALS:
        signal.signal(number, on_signal)

    model.train()
    running = torch.zeros(2, device=device)  # sums of the loss and of the gradient norm since the last log line
    logged_step, logged_time = start_step, time.time()
    step = start_step
    progress = tqdm(total=total_steps, initial=start_step, disable=None if world.is_main else True, unit="step")
    for step, (images, labels) in enumerate(loader, start=start_step + 1):
        draws = draw_step(args.global_seed, step, args.global_batch_size, shape, device)
        draws = Draws(*(values[own] for values in draws))
        pixels = to_pixels(images.to(device, non_blocking=True), draws.flip & mirrors)
        x1 = autoencoder.latents(*autoencoder.moments(pixels), draws.posterior)
        y = labels.to(device, non_blocking=True)
        t0, t1 = transport.train_interval
        model_kwargs = dict(y=y, force_drop_ids=draws.drop < args.class_dropout_prob)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            losses = transport.training_losses(forward, x1, model_kwargs, x0=draws.noise, t=t0 + (t1 - t0) * draws.time)
        loss = losses["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, args.grad_clip or math.inf)
        lr = learning_rate(step - 1, args, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        update_ema(averaged, trained, args.ema_decay)
        running += torch.stack([loss.detach(), norm])
        progress.update()

        received = world.max(asked[0] if asked else 0)
        last = step == total_steps or received
        if step % args.log_every == 0 or last:
            mean_loss, mean_norm = (world.sum(running) / world.size / (step - logged_step)).tolist()
            steps_per_second = (step - logged_step) / (time.time() - logged_time)
            images_per_second = steps_per_second * args.global_batch_size
            if world.is_main:
                logger.info(
                    f"(step={step:07d}) Train Loss: {mean_loss:.4f}, Train Steps/Sec: {steps_per_second:.2f}, "
                    f"Images/Sec: {images_per_second:.1f}, Grad Norm: {mean_norm:.3f}, LR: {lr:.2e}, "
                    f"Epoch: {step * args.global_batch_size / len(dataset):.2f}"
                )
                progress.set_postfix(loss=f"{mean_loss:.4f}", images_s=f"{images_per_second:.0f}")
                values = dict(loss=mean_loss, grad_norm=mean_norm, lr=lr, images_per_second=images_per_second)
                folder.add_metrics(step=step, **values)
                if wandb_run:
                    wandb_run.log(values, step=step)
            running.zero_()
            logged_step, logged_time = step, time.time()
        if world.is_main and (step % args.ckpt_every == 0 or last):
            save(step)
            folder.plot_loss()
        if world.is_main and step % args.sample_every == 0:
            draw_samples(step)
        if received:
            break
    progress.close()
    if world.is_main:
        logger.info(f"Stopped by signal {received} at step {step:,}" if received else f"Done at step {step:,}")
        if wandb_run:
            wandb_run.finish()
    distributed.cleanup()
    return 128 + received if received else 0


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run(lambda: main(arguments), "train.py")
