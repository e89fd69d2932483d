"""The guard against bad numbers."""

import torch

from common.errors import UserError

from .optimizer import holds_contract


class NumberGuard:
    """Keeps steps with a non-finite gradient away from the weights, without waiting for the device where it can.

    An optimizer that holds the contract of optimizer.py skips such a step on the device; the host learns of it at the
    next call of check(). Any other takes its steps only if may_step() says so, which waits for the device. The gradient
    is the mean over processes, so all of them skip alike; the loss tells whose batch it was.
    """

    def __init__(self, optimizer, allowed, device):
        self.optimizer, self.allowed, self.reported = optimizer, allowed, 0
        self.waits = not holds_contract(optimizer, device)
        self.state = torch.zeros(3, dtype=torch.int64, device=device)  # bad steps, the latest of them, was our loss bad

    def watch(self, step, loss, norm):
        """Before the optimizer's step: returns 1.0 where the step is good, else 0.0, on the device."""
        self.bad = ~torch.isfinite(norm)
        if not self.waits:
            self.optimizer.found_inf = self.bad.float()
        latest = torch.stack([self.state[0] + 1, torch.full_like(self.state[0], step), (~torch.isfinite(loss)).long()])
        self.state = torch.where(self.bad & (self.state[0] <= self.allowed), latest, self.state)
        return 1.0 - self.bad.float()

    def may_step(self):
        """Whether the optimizer is to be called for the step that was watched."""
        return not self.waits or not bool(self.bad)

    def check(self, world, indices_of, warn):
        """Raises UserError naming step, ranks and images once more steps were bad than are allowed; else warns of new ones.

        indices_of(step): this process's images at that step.
        """
        count, step, ours = self.state.tolist()
        if count == self.reported:
            return
        self.reported = count
        reports = world.gather((ours, list(indices_of(step)) if ours else []))
        culprits = [f"rank {rank}, images {indices}" for rank, (bad, indices) in enumerate(reports) if bad]
        where = "; ".join(culprits) if culprits else "every rank's gradient, though each loss was finite"
        message = f"non-finite loss or gradient at step {step}: {where}"
        if count > self.allowed:
            raise UserError(f"{message}; the weights were not touched, and the newest checkpoint is good")
        warn(f"WARNING: skipped {message} ({count} of {self.allowed} such steps allowed)")
