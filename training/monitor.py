"""What a run says while it trains: log lines, progress, metrics, checkpoints on disk, sample pictures, evaluations."""

import logging
import sys
import time

import torch
from tqdm import tqdm

from common.errors import UserError
from common.machine import matrix_peak, precision_warning
from inference import ODE, Guidance
from inference.pictures import class_names, save_picture
from transport import SolverError

from .costs import step_flops
from .evaluation import Evaluation
from .plot import Plotting
from .run import backbone_on_paper
from .run_folder import EVALUATIONS, METRICS, VALIDATIONS
from .saving import Saving
from .validation import Validation

SAMPLES = 16  # in a picture


class Monitor:
    """The main process logs; the others keep silent, except of their own failures. As a context, it ends log.txt with
    the reason for a failure, whichever process it befalls, after the files that are being written then."""

    def __init__(self, run):
        self.run, self.flags, self.world, self.folder = run, run.flags, run.world, run.folder
        self.logger = self.folder.logger() if self.world.is_main else logging.getLogger("silent")
        self.saving, self.plotting = Saving(run, self.log, self._saved), Plotting()
        self.wandb, self.progress, self.sums = None, tqdm(disable=True), {}
        self.evaluation = self.validation = None

    def log(self, line):
        if self.world.is_main:
            self.logger.info(line)

    def warn(self, line):
        """A warning from any process."""
        if self.world.is_main:
            self.logger.info(line)
        else:
            self.attempt("log", self.folder.append, f"[rank {self.world.rank}] {line}")
            sys.stderr.write(f"{line}\n")  # in one piece, as print would not

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            self.saving.close(at_once=kind is KeyboardInterrupt)
        finally:
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

    def begin(self, trainer):
        """Describe the run, and open what it writes to."""
        run, flags, world, step = self.run, self.flags, self.world, trainer.step
        # The arithmetic of a step in this process, and the rate at which it could be done.
        self.flops = step_flops(backbone_on_paper(run.recipe), run.batch, flags.grad_checkpointing)
        self.peak = matrix_peak(world.device, run.precision)
        if warning := precision_warning(world.device, run.precision, self.peak):
            self.log(f"WARNING: {warning}")
        self.logged_step, self.logged_time, self.waited = step, time.time(), 0.0
        self.marks = [(step, self.logged_time)]
        if world.is_main:
            count = sum(p.numel() for p in trainer.trained)
            self.log(f"Run folder {self.folder.path}")
            self.log(f"{flags.model}: {count:,} trained parameters, latents {run.recipe.latent_shape}, {run.precision}")
            self.log(f"{len(run.dataset):,} images in {flags.num_classes} classes from {flags.data_path}")
            if run.dataset.note:
                self.log(f"{flags.data_path}: {run.dataset.note}")
            shards = f", in shards over {flags.shard_size or world.size}" if flags.shard else ""
            self.log(
                f"{world.size} process(es) on {world.device.type}{shards}, {run.batch} images each, matrix products reach "
                f"{self.peak / 1e12:.3g} TFLOP/s; steps {step:,} to {run.total_steps:,}"
            )
            if trainer.numbers.waits:
                optimizer = type(trainer.optimizer).__name__
                self.log(f"{optimizer} does not skip bad steps by itself: each step waits for the device to check its numbers")
            if run.path:
                self.log(f"Continuing from {run.path}, step {step:,}")
            self.folder.write_flags(flags, run.total_steps)
            self.folder.rewind(step)
            self.wandb = self.folder.start_wandb(flags) if flags.wandb and not trainer.is_complete else None
            self.progress = tqdm(total=run.total_steps, initial=step, disable=None, unit="step")
        self.saving.begin()
        if trainer.is_snapshot_due:
            self.snapshot(trainer)  # which a full disk prevented, or another --ema-snapshot-every did not ask for
            self.written()  # before the data's processes are forked
        if run.held_out is not None:
            self.validation = Validation(run, self.warn)
            count, held_out = len(self.validation.chosen), flags.val_path or f"--val-fraction {flags.val_fraction:g}"
            self.log(f"Validation every {flags.val_every:,} steps: {count:,} of {len(run.held_out):,} images of {held_out}")
            done = world.is_main and any(row["step"] == str(step) for row in self.folder.read_rows(VALIDATIONS))
            if step and step % flags.val_every == 0 and not world.broadcast(done):
                self.validate(trainer, step)  # which a kill after that step's checkpoint left undone
        if flags.eval_every:  # a missing file is told at the start and not after hours
            self.evaluation = Evaluation(run, self.warn)
            self.log(
                f"Evaluation every {flags.eval_every:,} steps: {flags.eval_samples:,} EMA samples against {flags.eval_ref}"
            )
            self.log(f"Evaluations can be made again by evaluate.py of {self.evaluation.command}")

    def waiting(self):
        self.wait_began = time.time()

    def working(self):
        self.waited += time.time() - self.wait_began

    def add(self, losses, norm, good):
        """Count a step; good is 0 for one with bad numbers. Stays on the device."""
        values = {**losses, "grad_norm": norm, "steps": torch.ones_like(norm)}
        for name, value in values.items():
            counted = torch.where(good > 0, value, torch.zeros_like(value))
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + counted
        self.progress.update()

    def report(self, step, lr):
        """Mean over the steps and processes since the last report. Every process must call it."""
        sums = dict(zip(self.sums, self.world.sum(torch.stack(list(self.sums.values()))).tolist()))
        count, seconds = max(sums.pop("steps"), 1.0), time.time() - self.logged_time
        steps_per_second = (step - self.logged_step) / seconds
        values = {name: value / count for name, value in sums.items()} | dict(lr=lr)
        values["images_per_second"] = steps_per_second * self.flags.global_batch_size
        # A peak that was measured beside other work is too low, and what was reached since is the better figure.
        self.peak = max(self.peak, steps_per_second * self.flops)
        values["share_of_peak"] = steps_per_second * self.flops / self.peak
        if self.world.is_main:
            losses = {name: values[name] for name in sums if name not in ("loss", "grad_norm")}
            named = "".join(f"{name.replace('_', ' ').title()}: {value:.4f}, " for name, value in losses.items())
            self.log(
                f"(step={step:07d}) Train Loss: {values['loss']:.4f}, {named}Train Steps/Sec: {steps_per_second:.2f}, "
                f"Images/Sec: {values['images_per_second']:.1f}, Share of Peak: {values['share_of_peak']:.0%}, "
                f"Grad Norm: {values['grad_norm']:.3f}, LR: {lr:.2e}, "
                f"Epoch: {step * self.flags.global_batch_size / len(self.run.dataset):.2f}, "
                f"Waited for Data: {self.waited / seconds:.0%}, Time Left: {self._time_left(step)}"
            )
            self.progress.set_postfix(loss=f"{values['loss']:.4f}", images_s=f"{values['images_per_second']:.0f}")
            self.attempt(METRICS, self.folder.add_row, METRICS, step=step, **values)
            if self.wandb:
                self.wandb.log(values, step=step)
        self.sums = {}
        self.logged_step, self.logged_time, self.waited = step, time.time(), 0.0

    def _time_left(self, step):
        """Until the run's end at the pace of the last ten reports, as h:mm:ss; the first, in which all is slower, counts only
        while it is alone."""
        self.marks = [*self.marks[-10:], (step, time.time())]
        began, then = self.marks[: len(self.marks) - 1][:2][-1]
        seconds = round((time.time() - then) / (step - began) * (self.run.total_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def save(self, trainer):
        """Have a checkpoint written behind the next steps; a failure is logged and leaves the older ones. Every process must
        call it."""
        trainer.check(self.log)
        self.saving.checkpoint(trainer)

    def written(self):
        """Wait until all is written; returns whether the last checkpoint is there. Every process must call it."""
        return self.saving.done()

    def snapshot(self, trainer):
        """Keep the averages by a power of time as they are; a failure is logged. Every process must call it."""
        self.saving.snapshot(trainer)

    def _saved(self):
        """After a checkpoint, in the writer's thread."""
        self.attempt("checkpoints", self.folder.prune, self.flags.keep_last, self.flags.keep_every)
        self._plot(self.folder.plot_loss_rarely)

    def draw_samples(self, trainer, step):
        """A picture of the EMA's samples: the same noise and classes each time. Every process must call it."""
        with trainer.together(trainer.ema) as ema:
            if self.world.is_main:
                self._draw_samples(ema, step)

    def _draw_samples(self, ema, step):
        """A network that has not learnt much yet may have none to give: that is a warning."""
        pipe = self.run.pipeline(ema)
        scale = self.flags.cfg_scale if self.run.recipe.null_class is not None else 1.0
        labels = [i % self.flags.num_classes for i in range(SAMPLES)]
        try:
            images = pipe.sample(labels, seed=self.flags.global_seed, solver=ODE(), guidance=Guidance(scale))
        except (SolverError, UserError, torch.cuda.OutOfMemoryError) as error:  # the step itself may well fit
            self.log(f"WARNING: no sample picture: {str(error).splitlines()[0]}")
            return
        file = self.folder.samples / f"{step:07d}.png"
        self.attempt(file, save_picture, images, file, columns=4, names=class_names(self.run.recipe, labels))
        self.log(f"Sampled {file} ({pipe.calls} network calls)")
        if self.wandb:
            import wandb

            self.wandb.log({"samples": wandb.Image(str(file))}, step=step)

    def validate(self, trainer, step):
        """The loss of held-out images under the model and its average. Every process must call it."""
        started = time.time()
        values = self.validation.measure({"loss": trainer.objective.model, "ema_loss": trainer.ema}, trainer.together)
        self.log(
            f"(step={step:07d}) Validation of {len(self.validation.chosen):,} images: loss {values['loss']:.4f}, "
            f"of the EMA {values['ema_loss']:.4f} ({time.time() - started:.0f} s)"
        )
        if self.world.is_main:
            self.attempt(VALIDATIONS, self.folder.add_row, VALIDATIONS, step=step, **values)
            self._plot(self.folder.plot_loss)
            if self.wandb:
                self.wandb.log({f"validation/{name}": value for name, value in values.items()}, step=step)

    def evaluate(self, trainer, step):
        """FID and the rest of EMA samples, by the functions of evaluate.py. Every process draws and measures its share."""
        started, warn = time.time(), lambda line: self.log(f"WARNING: no evaluation: {line}")
        values = self.evaluation.measure(trainer.together(trainer.ema), warn)
        if values is None:
            return
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if value is not None)
        count = self.flags.eval_samples
        self.log(f"(step={step:07d}) Evaluation of {count:,} samples: {shown} ({time.time() - started:.0f} s)")
        self.attempt(EVALUATIONS, self.folder.add_row, EVALUATIONS, step=step, **values)
        self._plot(self.folder.plot_loss)
        if self.wandb:
            self.wandb.log(values, step=step)

    def _plot(self, plot):
        self.plotting.begin(self.attempt, "loss.png", plot)

    def finish(self, line):
        self.progress.close()
        if self.world.is_main:
            self.plotting.end()
            self.attempt("loss.png", self.folder.plot_loss)
        self.log(line)
        if self.wandb:
            self.wandb.finish()
