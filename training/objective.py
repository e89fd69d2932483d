"""What is trained, and by which losses: the one place of an idea that adds a loss, a head or a second network."""

import torch.nn as nn


class Own:
    """The parameters and buffers of a module itself, without those of its parts, as a state."""

    def __init__(self, module):
        self.tensors = {**module._parameters, **module._buffers}

    def state_dict(self):
        return {name: tensor.detach() for name, tensor in self.tensors.items()}

    def load_state_dict(self, state, strict=True):
        if state.keys() != self.tensors.keys():
            raise RuntimeError(f"tensors\n{', '.join(sorted(state.keys() ^ self.tensors.keys()))} are there or missing")
        for name, tensor in state.items():
            self.tensors[name].detach().copy_(tensor)


class Objective(nn.Module):
    """A model and its loss. Whatever modules an objective holds are trained, saved by their names and loaded again, and so
    are parameters and buffers of its own, under the name "objective". A module whose parameters need no gradient, such as
    another model's encoder, is neither trained nor saved; one that changes all the same is added to states(). With --shard
    all of them are sharded; a parameter that is a scalar cannot be, and wants the shape (1,).

    Called with latents x1 (N, C, h, w), class ids y (N,) and the step's Draws, it returns losses by name, each (N,): the
    mean of "loss" is what is minimised; the others are logged beside it, in log.txt, metrics.csv, W&B and the plot.
    """

    def __init__(self, model, transport):
        super().__init__()
        self.model, self.transport = model, transport

    def states(self):
        """{name: what has a state_dict} of what a checkpoint holds: the modules with something to train, or to count."""
        own = {"objective": Own(self)} if self._parameters or self._buffers else {}
        frozen = lambda part: any(True for _ in part.parameters()) and not any(p.requires_grad for p in part.parameters())  # noqa: E731
        return {name: part for name, part in self.named_children() if part.state_dict() and not frozen(part)} | own

    def forward(self, x1, y, draws):
        model_kwargs = dict(y=y, force_drop_ids=draws.drop < self.model.class_dropout_prob)
        time = self.transport.training_times(draws.time)
        losses = self.transport.training_losses(self.model, x1, model_kwargs, x0=draws.noise, t=time)
        return {"loss": losses["loss"]}


def make_objective(model, transport, flags):
    """The objective of a run. An idea of your own is another class, made here."""
    return Objective(model, transport)
