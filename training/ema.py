"""Moving averages of the weights: one, or several side by side."""

from copy import deepcopy

import torch

from .power_ema import decay_at, gamma_of

POWER = "ema-power-"  # before the width of an average by a power of time, in its name


@torch.no_grad()
def update_ema(ema_params, params, decay):
    """ema = decay ema + (1 - decay) params, all tensors in one call."""
    torch._foreach_lerp_(ema_params, params, 1 - decay)


class Averages:
    """The averages of a model's trained weights by their names: ema, ema-DECAY for each further decay, and
    ema-power-SIGMA_REL for each width of an average by a power of time."""

    def __init__(self, model, decays, widths=None):
        decays = decays if isinstance(decays, list) else [decays]
        self.decays = {"ema" if i == 0 else f"ema-{decay}": decay for i, decay in enumerate(decays)}
        self.gammas = {f"{POWER}{width}": gamma_of(width) for width in widths or ()}
        self.models = {name: deepcopy(model).requires_grad_(False).eval() for name in (*self.decays, *self.gammas)}
        self.weights = [p for p in model.parameters() if p.requires_grad]
        kept = [p.requires_grad for p in model.parameters()]
        self.averaged = {
            name: [average for average, trained in zip(copy.parameters(), kept) if trained]
            for name, copy in self.models.items()
        }

    def update(self, step):
        """Take in the weights after a step, counted from 1."""
        for name, decay in self.decays.items():
            update_ema(self.averaged[name], self.weights, decay)
        for name, gamma in self.gammas.items():
            update_ema(self.averaged[name], self.weights, decay_at(step, gamma))

    def by_power(self):
        """{name: state dict} of the averages by a power of time."""
        return {name: self.models[name].state_dict() for name in self.gammas}
