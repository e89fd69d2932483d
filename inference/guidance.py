"""The network as a sampler sees it, with guidance where it acts."""

import torch
import torch.nn as nn


class GuidedNetwork(nn.Module):
    """(x, t, y) -> output, guided as a Guidance says; of that scale 1 is the bare model. Counts its network calls.

    Without a weak model this is classifier-free guidance: one call on twice the batch. With one it is autoguidance: one
    call of each. Outside of the guidance's interval the bare network runs. compiled: whether one of them went through
    compile_network; without, nothing of the compiler is imported.
    """

    def __init__(self, model, guidance, null_class=None, weak=None, compiled=False):
        super().__init__()
        self.model, self.weak, self.compiled = model, weak, compiled
        self.guidance, self.null_class = guidance, null_class
        self.calls = 0

    def _acts(self, t):
        guidance = self.guidance
        if guidance.scale == 1:
            return False
        # In t's own precision, which may hold low and high a little off; one wait for the device.
        return (guidance.low, guidance.high) == (0.0, 1.0) or bool((t[0] >= guidance.low) & (t[0] <= guidance.high))

    def forward(self, x, t, y):
        self.calls += 1
        scale, channels = self.guidance.scale, self.guidance.channels
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        if not self._acts(t):
            out = self.model(x, t, y)
            return out.clone() if self.compiled else out  # a CUDA graph writes its next output over this one
        if self.weak is None:
            both = torch.cat([y, torch.full_like(y, self.null_class)])
            out = self.model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), both, scale, channels)
            return out[: len(x)]
        self.calls += 1
        out, weak = self.model(x, t, y), self.weak(x, t, y)
        guided = (weak + scale * (out - weak))[:, :channels]
        return torch.cat([guided, out[:, guided.shape[1] :]], dim=1)


def compile_network(model, gradients=False):
    """torch.compile the network in place, for sampling: one graph for each batch size, since guidance may double it.

    On GPUs the graphs are replayed as CUDA graphs, without launching kernel by kernel; not where gradients are wanted,
    which run through a graph more than once.
    """
    if gradients:
        from torch._functorch import config

        config.donated_buffer = False  # likelihood goes back through a graph that it keeps
    eager = type(model).forward.__get__(model)  # also where it was compiled before, for the other purpose
    model.forward = torch.compile(eager, dynamic=False, mode=None if gradients else "reduce-overhead")
