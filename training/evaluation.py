"""The metrics of evaluate.py while training."""

from contextlib import contextmanager
from functools import partial

import torch

from common.errors import UserError
from common.precision import set_precision
from inference import ODE
from metrics.features import extract_features, gather_features, load_inception, shared_features
from metrics.reference import measure_reference, open_reference
from metrics.scores import NEIGHBOURS, evaluate
from transport import SolverError

CHUNK = 32  # samples at once


class Evaluation:
    """FID and the rest of EMA samples against --eval-ref: sample i is of class i mod their number. Making one loads what
    it needs, tells warn what is unreadable of it, and raises UserError naming a file that is missing."""

    def __init__(self, run, warn):
        self.run, flags = run, run.flags
        opened = open_reference(flags.eval_ref, flags.image_size, warn)  # the folder that one trains on is a reference too
        if opened[1] is not None and len(opened[1]) <= NEIGHBOURS:
            raise UserError(f"--eval-ref {flags.eval_ref}: {len(opened[1])} images; the metrics need {NEIGHBOURS + 1} or more")
        self.inception = load_inception(flags.inception_weights, run.device)
        with self._full_precision():
            measure = partial(shared_features, inception=self.inception, batch_size=64, world=run.world)
            self.reference = measure_reference(opened, measure)

    @contextmanager
    def _full_precision(self):
        """Metrics are measured in float32 whatever the training is in."""
        set_precision("fp32", self.run.device)
        try:
            yield
        finally:
            set_precision(self.run.precision, self.run.device)

    @torch.no_grad()
    def measure(self, ema, warn):
        """All metrics by name, on the main process; None elsewhere, and where samples could not be drawn, of which warn
        tells. Every process draws and measures its share."""
        world = self.run.world
        try:
            images, failure = self._draw(ema), None
        except (SolverError, UserError) as error:  # of a network that has not learnt much yet: no reason to end the run
            images, failure = None, f"[rank {world.rank}] {error}"
        if failures := [each for each in world.gather(failure) if each]:
            warn(failures[0])
            return None
        with self._full_precision():
            features = gather_features(extract_features(images, self.inception), world)
            return evaluate(features, self.reference, self.run.device) if world.is_main else None

    def _draw(self, ema):
        """This process's share of the samples, uint8 (n, H, W, 3)."""
        run, count, images = self.run, self.run.flags.eval_samples, []
        pipe, world = run.pipeline(ema), run.world
        own = range(count * world.rank // world.size, count * (world.rank + 1) // world.size)
        for first in range(own.start, own.stop, CHUNK):
            indices = range(first, min(first + CHUNK, own.stop))
            labels = [i % run.flags.num_classes for i in indices]
            latents = pipe.draw(labels, seed=run.flags.global_seed, indices=indices, solver=ODE())[-1]
            images.append(pipe.to_images(latents).cpu())
        return torch.cat(images)
