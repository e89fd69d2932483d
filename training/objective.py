"""What is trained, and by which losses: the one place of an idea that adds a loss, a head or a second network."""

import torch.nn as nn


class Objective(nn.Module):
    """A model and its loss. Whatever modules an objective holds are trained, saved by their names and loaded again; one
    whose parameters need no gradient, such as another model's encoder, is neither trained nor saved.

    Called with latents x1 (N, C, h, w), class ids y (N,) and the step's Draws, it returns losses by name, each (N,): the
    mean of "loss" is what is minimised; the others are logged beside it, in log.txt, metrics.csv, W&B and the plot.
    """

    def __init__(self, model, transport):
        super().__init__()
        self.model, self.transport = model, transport

    def states(self):
        """{name: module} of what a checkpoint holds: the modules with something to train."""
        return {name: part for name, part in self.named_children() if any(p.requires_grad for p in part.parameters())}

    def forward(self, x1, y, draws):
        model_kwargs = dict(y=y, force_drop_ids=draws.drop < self.model.class_dropout_prob)
        time = self.transport.training_times(draws.time)
        losses = self.transport.training_losses(self.model, x1, model_kwargs, x0=draws.noise, t=time)
        return {"loss": losses["loss"]}


def make_objective(model, transport, flags):
    """The objective of a run. An idea of your own is another class, made here."""
    return Objective(model, transport)
