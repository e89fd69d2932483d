"""What a run will cost, and its first step."""

import math
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from common.machine import PeakMemory, matrix_peak, precision_warning, synchronize
from common.sizes import height_width

from .costs import (
    PEAKS,
    all_reduced_bytes,
    cache_bytes,
    checkpoint_bytes,
    forward_flops,
    gathered_bytes,
    gb,
    hours,
    sharded_traffic,
    step_flops,
    training_bytes,
)
from .run import backbone_on_paper


class DryRun:
    """In a Monitor's place: prints what the run costs and what its first step took, and writes nothing.

    total_steps: of the run itself, where this one has a single step.
    """

    def __init__(self, run, total_steps):
        self.run, self.total_steps = run, total_steps
        self.memory = PeakMemory(run.device)

    def _print(self, name, value):
        if self.run.world.is_main:
            print(f"{name:<16}{value}", flush=True)

    def begin(self, trainer):
        run, flags, processes = self.run, self.run.flags, self.run.world.size
        network, again = backbone_on_paper(run.recipe), flags.grad_checkpointing
        batch, count = flags.global_batch_size, sum(p.numel() for p in trainer.trained)
        self.flops, self.peak = step_flops(network, batch, again), matrix_peak(run.device, run.precision)
        self._print("model", f"{flags.model}, latents {run.recipe.latent_shape}, {count:,} parameters")
        self._print("batch", f"{batch} images on {processes} process(es), {run.micro} at a time, {run.precision}")
        if warning := precision_warning(run.device, run.precision, self.peak):
            self._print("warning", warning)
        self._print("forward", f"{forward_flops(network) / 1e9:.3g} GFLOP an image")
        self._print("training step", f"{self.flops / 1e12:.3g} TFLOP")
        self._memory_and_traffic(network, len(trainer.averages.models))
        encoding = self._encoding()
        for gpu in PEAKS:
            settings = dict(precision=run.precision, batch=batch, gpus=processes, checkpointing=again, encoding=encoding)
            needed = hours(network, self.total_steps, gpu, **settings)
            speed = f"40 % of {run.precision}'s peak"
            self._print(f"{processes} x {gpu}", f"{needed:,.2f} h for {self.total_steps:,} steps at {speed}")

    def _memory_and_traffic(self, network, averages):
        run, flags, processes = self.run, self.run.flags, self.run.world.size
        shards = (flags.shard_size or processes) if flags.shard else None
        states, activations = training_bytes(network, run.micro, run.precision, flags.grad_checkpointing, averages, shards)
        known = f"{gb(activations)} activations" if not math.isnan(activations) else "activations unknown for these blocks"
        gathered = f" + {gb(gathered_bytes(network, run.precision, shards))} gathered" if flags.shard else ""
        self._print("memory", f"{gb(states)} states{gathered} + {known} a process, uncompiled")
        if flags.shard:
            parts = (run.precision, flags.grad_accum_steps)
            gathered, reduced, averaged = sharded_traffic(network, processes, shards, *parts)
            others = f", and {gb(averaged)} among {processes // shards} replicas" if shards < processes else ""
            self._print("gathered", f"{gb(gathered)} a step from each process")
            self._print("reduced", f"{gb(reduced)} a step from each process{others}")
        else:
            self._print("all-reduced", f"{gb(all_reduced_bytes(network, processes))} a step from each process")
        size, whose = checkpoint_bytes(network, averages), "the main process"
        copy = size
        if flags.ckpt_format == "sharded":
            copy, whose = size / (shards or 1), "each process"
        self._print("checkpoint", f"{gb(size)}; {gb(copy)} in the host memory of {whose} until it is written")

    def _encoding(self):
        """FLOPs of encoding an image, where that is done while training."""
        run, encoding = self.run, 0
        if run.autoencoder.name == "none":
            return encoding
        if not run.dataset.encoded:
            image = torch.zeros(1, run.autoencoder.image_channels, *height_width(run.recipe.image_size), device=run.device)
            with FlopCounterMode(display=False) as counter:
                run.autoencoder.moments(image)
            encoding = counter.get_total_flops()
            batch = run.flags.global_batch_size
            self._print("encoding", f"{batch * encoding / 1e12:.3g} TFLOP a step, none with a latent cache")
        size = cache_bytes(len(run.dataset), run.recipe.latent_shape, variants=1 + run.dataset.mirrors)
        self._print("latent cache", f"{gb(size)} for {len(run.dataset):,} images")
        return encoding

    def working(self):
        self.started = time.time()

    def report(self, step, lr):
        synchronize(self.run.device)
        self.seconds = time.time() - self.started

    def written(self):
        return True

    def finish(self, line):
        speed = self.flops / self.run.world.size / self.seconds
        share = f"{speed / 1e12:.3g} TFLOP/s ({speed / max(self.peak, speed):.0%} of what its matrix products reach)"
        took = f"{self.seconds:.2f} s; in a process, {share} and {gb(self.memory.read())} at the peak"
        self._print("first step", f"{took}; it includes warming up")

    def _nothing(self, *args):
        """What else a Monitor does."""

    log = warn = waiting = add = save = snapshot = draw_samples = validate = evaluate = _nothing
