"""Which images a step sees."""

from functools import lru_cache

import torch
from torch.utils.data import Sampler

from common.streams import generator


class StepSampler(Sampler):
    """Indices of this process's share of the global batch, step after step, from start_step to end_step.

    The data order is one endless sequence, epoch after epoch, each a permutation drawn from (seed, epoch); step s
    takes entries [s B, (s + 1) B) and rank r the r-th part of them. It is a function of the step alone: to resume is to
    start later, and another number of processes sees the same global batches.
    """

    def __init__(self, length, global_batch_size, seed, start_step, end_step, rank=0, world_size=1):
        self.length, self.batch, self.seed = length, global_batch_size, seed
        self.steps = range(start_step, end_step)
        share = global_batch_size // world_size
        self.own = range(rank * share, (rank + 1) * share)
        self.order = lru_cache(maxsize=3)(self._order)  # the loader runs ahead of the step, into the next epoch

    def _order(self, epoch):
        return torch.randperm(self.length, generator=generator("cpu", self.seed, "order", epoch))

    def indices_of(self, step):
        """This process's images at a step, counted from 1 as the log counts."""
        position, last, found = (step - 1) * self.batch + self.own.start, (step - 1) * self.batch + self.own.stop, []
        while position < last:
            epoch, offset = divmod(position, self.length)
            found += self.order(epoch)[offset : offset + last - position].tolist()
            position = (step - 1) * self.batch + self.own.start + len(found)
        return found

    def __iter__(self):
        for done in self.steps:
            yield self.indices_of(done + 1)

    def __len__(self):
        return len(self.steps)
