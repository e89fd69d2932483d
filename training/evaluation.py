"""The metrics of evaluate.py while training."""

from contextlib import contextmanager

import torch

from common.errors import UserError, told_as
from common.precision import set_precision
from inference import ODE
from inference.chunked import Labels
from metrics.features import extract_features, gather_features, shared_features, take
from metrics.names import DEFAULT, WEIGHTS, networks_of
from metrics.networks import load_networks
from metrics.reference import measure_reference, open_reference
from metrics.results import evaluate
from metrics.scores import NEIGHBOURS
from transport import SolverError

CHUNK = 32  # samples that are drawn at once: dopri5's steps are those of its whole batch
BATCH = 64  # images whose features are taken at once, as evaluate.py does


class Evaluation:
    """FID and the rest of EMA samples against --eval-ref: those that sample_ddp.py draws with balanced labels.

    Sample i has its label and its noise from (--global-seed, i), and is drawn in the same chunk and seen in the same batch
    for any number of processes. Making one loads what it needs, tells warn what is unreadable of it, and raises UserError
    naming a file that is missing.
    """

    def __init__(self, run, warn):
        self.run, flags = run, run.flags
        self.words = list(dict.fromkeys(flags.eval_metrics or DEFAULT))
        # The folder that one trains on is a reference too.
        with told_as("--eval-ref", "--ref"):
            opened = open_reference(flags.eval_ref, flags.image_size, warn, self.words, strict=flags.eval_metrics is not None)
        if opened.images is not None and len(opened.images) <= NEIGHBOURS:
            found = f"{len(opened.images)} images; the metrics need {NEIGHBOURS + 1} or more"
            raise UserError(f"--eval-ref {flags.eval_ref}: {found}")
        weights = {name: getattr(flags, f"{name}_weights") for name in WEIGHTS}
        self.networks = run.world.main_first(lambda: load_networks(networks_of(self.words), weights, run.device))
        with told_as("--eval-ref", "--ref"):
            opened.check(self.networks)
        see = lambda images, network: shared_features(images, self.networks[network], BATCH, run.world)  # noqa: E731
        with self._full_precision():
            self.references = measure_reference(opened, see)

    @property
    def command(self):
        """What draws the same samples from a checkpoint."""
        flags, fp32 = self.run.flags, self.run.device.type == "cuda" and self.run.precision == "fp32"
        return (
            f"sample_ddp.py ODE --labels balanced --cfg-scale 1 --per-proc-batch-size {CHUNK} --num-fid-samples "
            f"{flags.eval_samples} --global-seed {flags.global_seed}{' --precision fp32' if fp32 else ''} --ckpt CHECKPOINT"
        )

    @contextmanager
    def _full_precision(self):
        """Metrics are measured in float32 whatever the training is in."""
        set_precision("fp32", self.run.device)
        try:
            yield
        finally:
            set_precision(self.run.precision, self.run.device)

    @torch.no_grad()
    def measure(self, asking, warn):
        """All metrics by name, on the main process; None elsewhere, and where samples could not be drawn, of which warn
        tells. Every process draws and measures its share. asking: the context of a network, as Trainer.together makes it."""
        world = self.run.world
        with asking as ema:
            try:
                images, failure = self._draw(ema), None
            except (SolverError, UserError) as error:  # of a network that has not learnt much yet: no reason to end the run
                images, failure = None, f"[rank {world.rank}] {error}"
        if failures := [each for each in world.gather(failure) if each]:
            warn(failures[0])
            return None
        with self._full_precision():
            seen = {name: gather_features(extract_features(images, n, BATCH), world) for name, n in self.networks.items()}
            if not world.is_main:
                return None
            order = torch.tensor([i for rank in range(world.size) for batch in self._batches(rank) for i in batch]).argsort()
            seen = {name: take(features, order) for name, features in seen.items()}
            return evaluate(seen, self.references, self.words, self.run.device)

    def _batches(self, rank):
        """The indices of a process's samples: whole batches of all of them, dealt out in turn."""
        count, step = self.run.flags.eval_samples, BATCH * self.run.world.size
        return [range(first, min(first + BATCH, count)) for first in range(BATCH * rank, count, step)]

    def _draw(self, ema):
        """This process's share of the samples, uint8 (n, H, W, 3)."""
        run, pipe, images = self.run, self.run.pipeline(ema), []
        labels = Labels(run.flags.num_classes, run.flags.global_seed, "balanced")
        for batch in self._batches(run.world.rank):
            for first in range(0, len(batch), CHUNK):
                indices = batch[first : first + CHUNK]
                draws = dict(seed=run.flags.global_seed, indices=indices, solver=ODE())
                images.append(pipe.to_images(pipe.draw([labels.of(i) for i in indices], **draws)[-1]).cpu())
        return torch.cat(images) if images else torch.empty(0, 1, 1, 3, dtype=torch.uint8)  # more processes than batches
