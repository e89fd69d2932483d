"""What a network is told as the time, where that is not t in [0, 1] itself: for networks that were trained elsewhere.

A map is a module: times t (N,), 0 being noise, to what the network's time embedding sees.
"""

import torch
import torch.nn as nn

from transport.path import VPCPlan


class DiscreteTimes(nn.Module):
    """The steps of a discrete diffusion, 0 (data) to 999 (noise), at which it has the noise of the VP path at t.

    Betas rise in equal steps from 1e-4 to 0.02 (DDPM, Ho et al., arXiv 2006.11239; DiT), and VP is their continuum: the step
    is the k, not a whole number, where the logarithm of the product of 1 - beta up to k is that of alpha(t)^2, linear between
    whole k. In float64, since neighbouring steps near the data differ by 1e-4 in it; t = 1, beyond the last of them, is step 0.
    """

    STEPS, FIRST, LAST = 1000, 1e-4, 0.02

    def __init__(self):
        super().__init__()
        betas = torch.linspace(self.FIRST, self.LAST, self.STEPS, dtype=torch.float64, device="cpu")
        self.register_buffer("log_products", (1 - betas).log().cumsum(0), persistent=False)

    def _apply(self, function, recurse=True):
        """Moves with the network, whose change of precision is not for this table."""
        exact = self.log_products
        super()._apply(function, recurse)
        self.log_products = exact.to(self.log_products.device)
        return self

    def forward(self, t):
        table, wanted = self.log_products, 2 * VPCPlan().log_alpha(t.double())
        right = torch.searchsorted(-table, -wanted.contiguous()).clamp(1, self.STEPS - 1)  # the table falls
        left = right - 1
        k = left + (wanted - table[left]) / (table[right] - table[left])
        return k.clamp(0, self.STEPS - 1)


# A recipe's time_map: a new one is a module and a line here.
TIME_MAPS = {None: None, "ddpm": DiscreteTimes}
