"""Moving averages of the weights: one, or several side by side."""

from copy import deepcopy

import torch

from .power_ema import decay_at, gamma_of
from .tensors import own

POWER = "ema-power-"  # before the width of an average by a power of time, in its name


@torch.no_grad()
def update_ema(ema_params, params, decay, bad=None):
    """ema = decay ema + (1 - decay) params, all tensors in one call. Nothing changes where bad, a scalar on their device, is 1,
    of which the host need not know."""
    weight = 1 - decay
    if bad is None:
        torch._foreach_lerp_(ema_params, params, weight)
    elif weight < 0.5:
        # The same sum (to the bit on a CPU): a step of gradient descent on half the squared distance to params. Its kernel can
        # be told on the device that it is not to happen.
        rule = dict(weight_decay=1.0, momentum=0.0, dampening=0.0, nesterov=False, maximize=True, is_first_step=False)
        torch._fused_sgd_(ema_params, params, [], lr=weight, **rule, found_inf=bad)
    else:  # rare: the first steps of an average by a power of time
        torch._foreach_lerp_(ema_params, params, [torch.where(bad > 0, 0.0, weight)] * len(params))


class Averages:
    """The averages of a model's trained weights by their names: ema, ema-DECAY for each further decay, and
    ema-power-SIGMA_REL for each width of an average by a power of time."""

    def __init__(self, model, decays, widths=None, copy=deepcopy):
        decays = decays if isinstance(decays, list) else [decays]
        self.decays = {"ema" if i == 0 else f"ema-{decay}": decay for i, decay in enumerate(decays)}
        self.gammas = {f"{POWER}{width}": gamma_of(width) for width in widths or ()}
        self.models = {name: copy(model).requires_grad_(False).eval() for name in (*self.decays, *self.gammas)}
        self.weights = [p for p in model.parameters() if p.requires_grad]
        kept = [p.requires_grad for p in model.parameters()]
        self.averaged = {
            name: [average for average, trained in zip(copy.parameters(), kept) if trained]
            for name, copy in self.models.items()
        }

    def update(self, step, bad=None):
        """Take in the weights after a step, counted from 1, unless bad, a scalar on the device, is 1."""
        decays = self.decays | {name: decay_at(step, gamma) for name, gamma in self.gammas.items()}
        weights = [own(p) for p in self.weights]
        for name, decay in decays.items():
            update_ema([own(p) for p in self.averaged[name]], weights, decay, bad)

    def by_power(self):
        """{name: state dict} of the averages by a power of time."""
        return {name: self.models[name].state_dict() for name in self.gammas}
