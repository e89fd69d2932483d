"""What a run says while it trains: log lines, progress, metrics, checkpoints on disk, sample pictures, evaluations."""

import logging
import sys
import time
from contextlib import contextmanager
from functools import partial

import torch
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from autoencoder import to_uint8
from checkpoint import save_checkpoint
from costs import matrix_peak, step_flops
from errors import UserError
from evaluate import (
    NEIGHBOURS,
    evaluate,
    extract_features,
    gather_features,
    load_inception,
    measure_reference,
    open_reference,
    shared_features,
)
from run_folder import EVALUATIONS, METRICS
from sampling import GuidedModel
from streams import SampleStreams
from train_utils import set_precision
from transport import Sampler, SolverError


class Monitor:
    """The main process logs; the others keep silent, except of their own failures. As a context, it ends log.txt with
    the reason for a failure, whichever process it befalls."""

    def __init__(self, args, world, folder, recipe, transport, autoencoder, latent_shape):
        self.args, self.world, self.folder = args, world, folder
        self.recipe, self.transport, self.autoencoder, self.latent_shape = recipe, transport, autoencoder, latent_shape
        self.logger = folder.logger() if world.is_main else logging.getLogger("silent")
        self.wandb, self.progress = None, tqdm(disable=True)
        self.sums = torch.zeros(3, device=world.device)  # loss, gradient norm, steps: since the last report

    def log(self, line):
        if self.world.is_main:
            self.logger.info(line)

    def warn(self, line):
        """A warning from any process."""
        if self.world.is_main:
            self.logger.info(line)
        else:
            self.attempt("log", self.folder.append, f"[rank {self.world.rank}] {line}")
            print(line, file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None:
            reason = (str(error).strip().splitlines() or [""])[0]
            self.attempt("log", self.folder.append, f"[rank {self.world.rank}] FAILED: {kind.__name__}: {reason}")
            self.progress.close()

    def attempt(self, what, call, *args, **kwargs):
        """call(*args, **kwargs), whose failure to write is told and otherwise passed over: the run matters more."""
        try:
            return call(*args, **kwargs)
        except OSError as error:
            self.log(f"ERROR: could not write {what}: {error}")

    def begin(self, trained, dataset, precision, start_step, total_steps, path):
        """Describe the run, and open what it writes to."""
        args, world = self.args, self.world
        # The arithmetic of a step in this process, and the rate at which it could be done.
        self.flops = step_flops(self.recipe.model_args, args.global_batch_size // world.size, args.grad_checkpointing)
        self.peak = matrix_peak(world.device, precision)
        self.total_images, self.logged_step, self.logged_time, self.waited = len(dataset), start_step, time.time(), 0.0
        if not world.is_main:
            return
        self.log(f"Run folder {self.folder.path}")
        self.log(
            f"{args.model}: {sum(p.numel() for p in trained):,} trained parameters, latents {self.latent_shape}, {precision}"
        )
        self.log(f"{len(dataset):,} images in {args.num_classes} classes from {args.data_path}")
        share = args.global_batch_size // world.size
        self.log(
            f"{world.size} process(es) on {world.device.type}, {share} images each, matrix products reach "
            f"{self.peak / 1e12:.3g} TFLOP/s; steps {start_step:,} to {total_steps:,}"
        )
        if path:
            self.log(f"Continuing from {path}, step {start_step:,}")
        self.folder.write_flags(args, total_steps)
        self.folder.rewind(start_step)
        self.wandb = self.folder.start_wandb(args) if args.wandb else None
        self.progress = tqdm(total=total_steps, initial=start_step, disable=None, unit="step")

    def waiting(self):
        self.wait_began = time.time()

    def working(self):
        self.waited += time.time() - self.wait_began

    def add(self, loss, norm, good):
        """Count a step; good is 0 for one with bad numbers. Stays on the device."""
        values = torch.stack([loss, norm, torch.ones_like(loss)])
        self.sums += torch.where(good > 0, values, torch.zeros_like(values))
        self.progress.update()

    def report(self, step, lr):
        """Mean over the steps and processes since the last report. Every process must call it."""
        loss, norm, count = self.world.sum(self.sums.clone()).tolist()
        count = max(count, 1.0)
        seconds = time.time() - self.logged_time
        steps_per_second = (step - self.logged_step) / seconds
        values = dict(loss=loss / count, grad_norm=norm / count, lr=lr)
        values["images_per_second"] = steps_per_second * self.args.global_batch_size
        values["share_of_peak"] = steps_per_second * self.flops / self.peak
        if self.world.is_main:
            self.log(
                f"(step={step:07d}) Train Loss: {values['loss']:.4f}, Train Steps/Sec: {steps_per_second:.2f}, "
                f"Images/Sec: {values['images_per_second']:.1f}, Share of Peak: {values['share_of_peak']:.0%}, "
                f"Grad Norm: {values['grad_norm']:.3f}, LR: {lr:.2e}, "
                f"Epoch: {step * self.args.global_batch_size / self.total_images:.2f}, "
                f"Waited for Data: {self.waited / seconds:.0%}"
            )
            self.progress.set_postfix(loss=f"{values['loss']:.4f}", images_s=f"{values['images_per_second']:.0f}")
            self.attempt(METRICS, self.folder.add_row, METRICS, step=step, **values)
            if self.wandb:
                self.wandb.log(values, step=step)
        self.sums.zero_()
        self.logged_step, self.logged_time, self.waited = step, time.time(), 0.0

    def save(self, step, content):
        """Write a checkpoint; a failure is logged, leaves the older ones, and returns False. Main process only."""
        path = self.folder.checkpoint_path(step)
        try:
            save_checkpoint(content, path)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError when its writer meets a full disk
            self.log(f"ERROR: could not write {path}: {str(error).splitlines()[0]}; the older checkpoints are untouched")
            return False
        self.log(f"Saved {path}")
        self.attempt("checkpoints", self.folder.prune, self.args.keep_last, self.args.keep_every)
        self.attempt("loss.png", self.folder.plot_loss_rarely)
        return True

    @torch.no_grad()
    def draw_samples(self, ema, step):
        """A picture of the EMA's samples: the same noise and classes each time."""
        guided = self.args.cfg_scale if self.recipe.null_class is not None else 1.0
        network = GuidedModel(ema, guided, self.recipe.null_class)
        device = self.world.device
        z = SampleStreams(self.args.global_seed, range(16)).randn(self.latent_shape, device)
        y = torch.arange(16, device=device) % self.args.num_classes
        try:
            latents = Sampler(self.transport).sample_ode()(z, network, y=y)[-1]
        except SolverError as error:  # of a network that has not learnt much yet
            self.log(f"WARNING: no sample picture: {error}")
            return
        picture = make_grid(self.autoencoder.decode(latents).clamp(-1, 1), nrow=4, normalize=True, value_range=(-1, 1))
        file = self.folder.samples / f"{step:07d}.png"
        self.attempt(file, save_image, picture, file)
        self.log(f"Sampled {file} ({network.calls} network calls)")
        if self.wandb:
            import wandb

            self.wandb.log({"samples": wandb.Image(str(file))}, step=step)

    def open_evaluation(self):
        """Load what evaluate() needs, so that a missing file is told at the start and not after hours."""
        args, world = self.args, self.world
        opened = open_reference(args.eval_ref)
        if opened[1] is not None and len(opened[1]) <= NEIGHBOURS:
            raise UserError(f"--eval-ref {args.eval_ref}: {len(opened[1])} images; the metrics need {NEIGHBOURS + 1} or more")
        inception = load_inception(args.inception_weights, world.device)
        self.measure = partial(shared_features, inception=inception, batch_size=64, world=world)
        with self.full_precision():
            self.reference = measure_reference(opened, self.measure)
        self.log(f"Evaluation every {args.eval_every:,} steps: {args.eval_samples:,} EMA samples against {args.eval_ref}")

    @contextmanager
    def full_precision(self):
        """Metrics are measured in float32 whatever the training is in."""
        set_precision("fp32", self.world.device)
        try:
            yield
        finally:
            set_precision(self.args.precision, self.world.device)

    @torch.no_grad()
    def evaluate(self, ema, step):
        """FID and the rest of EMA samples, by the functions of evaluate.py. Every process draws and measures its share."""
        args, world, device = self.args, self.world, self.world.device
        started, images = time.time(), []
        own = range(args.eval_samples * world.rank // world.size, args.eval_samples * (world.rank + 1) // world.size)
        for first in range(own.start, own.stop, 32):
            indices = range(first, min(first + 32, own.stop))
            z = SampleStreams(args.global_seed, indices).randn(self.latent_shape, device)
            y = torch.tensor(indices, device=device) % args.num_classes
            images.append(to_uint8(self.autoencoder.decode(Sampler(self.transport).sample_ode()(z, ema, y=y)[-1])).cpu())
        with self.full_precision():
            drawn = torch.cat(images)
            features = gather_features(extract_features(drawn, self.measure.keywords["inception"]), world)
            if not world.is_main:
                return
            values = evaluate(features, self.reference, device)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if value is not None)
        self.log(f"(step={step:07d}) Evaluation of {args.eval_samples:,} samples: {shown} ({time.time() - started:.0f} s)")
        self.attempt(EVALUATIONS, self.folder.add_row, EVALUATIONS, step=step, **values)
        self.attempt("loss.png", self.folder.plot_loss)
        if self.wandb:
            self.wandb.log(values, step=step)

    def finish(self, line):
        self.progress.close()
        if self.world.is_main:
            self.attempt("loss.png", self.folder.plot_loss)
        self.log(line)
        if self.wandb:
            self.wandb.finish()
