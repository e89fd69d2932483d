"""The loss of held-out images while training."""

from contextlib import nullcontext

import numpy as np
import torch

from common.spread import spread
from common.streams import generator
from data.images import to_latents
from data.tolerant import Tolerant

CHUNK = 32  # images at once
BINS = 10  # tenths of the training interval


class Validation:
    """The loss of the same held-out images each time, at the same times and with the same noise, under their own labels.

    Of the j-th image the time lies in tenth j mod 10 of the training interval, whatever the time law. Chunks of images go to
    the processes by their number, and their losses are put together in order: any number of processes gets the same numbers.
    Making one reads and encodes this process's chunks, which are kept; it tells warn of images that cannot be read.
    """

    def __init__(self, run, warn):
        self.run = run
        self.chosen = spread(len(run.held_out), run.flags.val_images)
        self.count = -(-len(self.chosen) // CHUNK)
        images = Tolerant(run.held_out)
        self.chunks = {chunk: self._prepare(images, chunk, warn) for chunk in range(run.world.rank, self.count, run.world.size)}

    @torch.no_grad()
    def _prepare(self, images, chunk, warn):
        """(x1, labels, noise, times) of a chunk, on the CPU."""
        run, first = self.run, chunk * CHUNK
        asked = self.chosen[first : first + CHUNK]
        batch, labels, read = zip(*(images[i] for i in asked))
        for index, got in zip(asked, read):
            if got != index:
                warn(f"WARNING: skipped unreadable image {run.held_out.name(index)}")
        streams = [generator("cpu", run.flags.global_seed, "validation", first + j) for j in range(len(asked))]
        posterior, noise = (torch.stack([torch.randn(run.recipe.latent_shape, generator=g) for g in streams]) for _ in range(2))
        u = torch.cat([((first + j) % BINS + torch.rand(1, generator=g)) / BINS for j, g in enumerate(streams)])
        t0, t1 = run.transport.train_interval
        flip = torch.zeros(len(asked), dtype=torch.bool, device=run.device)
        x1 = to_latents(run.autoencoder, torch.stack(batch).to(run.device), flip, posterior.to(run.device))
        return x1.cpu(), torch.tensor(labels), noise, t0 + (t1 - t0) * u

    @torch.no_grad()
    def _losses(self, asking):
        """The loss of each image, float64 (N,). Every process must call it."""
        run, found = self.run, {}
        with asking as model:
            for chunk, tensors in self.chunks.items():
                x1, y, noise, t = (tensor.to(run.device, non_blocking=True) for tensor in tensors)
                kept = torch.zeros(len(y), dtype=torch.bool, device=run.device)  # no label is dropped
                with torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
                    losses = run.transport.training_losses(model, x1, dict(y=y, force_drop_ids=kept), x0=noise, t=t)["loss"]
                found[chunk] = losses.double()
        found = {chunk: losses.tolist() for chunk, losses in found.items()}
        together = {chunk: losses for part in run.world.gather(found) for chunk, losses in part.items()}
        return np.concatenate([together[chunk] for chunk in range(self.count)])

    def measure(self, models, together=nullcontext):
        """{name: mean loss, name_t0 to name_t9: those of the tenths of time, from noise to data} of models by their names.
        together(model): the context of a network to ask for it, as Trainer.together makes it."""
        values = {}
        for name, model in models.items():
            losses = self._losses(together(model))
            values[name] = losses.mean()
            values |= {f"{name}_t{tenth}": losses[tenth::BINS].mean() for tenth in range(min(BINS, len(losses)))}
        return {name: float(value) for name, value in values.items()}
