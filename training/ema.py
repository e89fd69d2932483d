"""Moving averages of the weights: one, or several side by side."""

from copy import deepcopy

import torch


@torch.no_grad()
def update_ema(ema_params, params, decay):
    """ema = decay ema + (1 - decay) params, all tensors in one call."""
    torch._foreach_lerp_(ema_params, params, 1 - decay)


class Averages:
    """The averages of a model's trained weights by their names: ema, and ema-DECAY for each further decay."""

    def __init__(self, model, decays):
        decays = decays if isinstance(decays, list) else [decays]
        self.decays = {"ema" if i == 0 else f"ema-{decay}": decay for i, decay in enumerate(decays)}
        self.models = {name: deepcopy(model).requires_grad_(False).eval() for name in self.decays}
        self.weights = [p for p in model.parameters() if p.requires_grad]
        kept = [p.requires_grad for p in model.parameters()]
        self.averaged = {
            name: [average for average, trained in zip(copy.parameters(), kept) if trained]
            for name, copy in self.models.items()
        }

    def update(self):
        for name, decay in self.decays.items():
            update_ema(self.averaged[name], self.weights, decay)
