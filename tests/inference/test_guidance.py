from functools import partial

import pytest
import torch

from common.errors import UsageError
from inference import Guidance
from inference.guidance import GuidedNetwork, compile_network
from models import SiT, SiT_models
from transport import Sampler, create_transport


class Linear(torch.nn.Module):
    """A network whose output shows its inputs: x plus the class id."""

    def forward(self, x, t, y):
        return x + y.view(-1, 1, 1, 1)

    forward_with_cfg = SiT.forward_with_cfg


def test_guidance_acts_where_it_should():
    x, y, null = torch.zeros(2, 4, 1, 1), torch.tensor([1, 2]), 10
    at = lambda model, t: model(x, torch.full((2,), t), y)[:, :, 0, 0]  # noqa: E731
    network = lambda **settings: GuidedNetwork(Linear(), Guidance(**settings), null)  # noqa: E731
    plain = torch.tensor([[1.0] * 4, [2.0] * 4])
    guided = 10 + 3 * (plain - 10)
    model = network(scale=3.0, channels=None, low=0.3, high=0.6)
    assert torch.equal(at(model, 0.2), plain) and torch.equal(at(model, 0.7), plain) and torch.equal(at(model, 0.5), guided)
    assert model.calls == 3 and model.guidance.edges == (0.3, 0.6)
    ends = network(scale=3.0, channels=None, low=0.7, high=0.8)  # float32 has them just below and just above
    assert torch.equal(at(ends, 0.7), guided) and torch.equal(at(ends, 0.8), guided)
    paper = network(scale=3.0)
    assert torch.equal(at(paper, 0.5), torch.cat([guided[:, :3], plain[:, 3:]], 1)) and paper.guidance.edges == ()

    class Weak(torch.nn.Module):
        def forward(self, x, t, y):
            return torch.full_like(x, -1.0)

    auto = GuidedNetwork(Linear(), Guidance(2.0, channels=None, weak="a pipeline"), None, Weak())
    assert torch.equal(at(auto, 0.5), 2 * plain + 1) and auto.calls == 2


@pytest.mark.parametrize("settings, words", [
    (dict(scale=-1.0), "--cfg-scale -1.0"),
    (dict(scale=float("nan")), "--cfg-scale nan"),
    (dict(scale=2.0, low=0.5, high=0.2), "--guidance-low 0.5 is above --guidance-high 0.2"),
    (dict(scale=2.0, high=1.5), "must be in"),
    (dict(scale=2.0, channels=0), "--cfg-channels 0"),
    (dict(low=0.3), "--guidance-low needs a --cfg-scale other than 1"),
    (dict(high=0.3), "--guidance-high needs"),
    (dict(weak="a pipeline"), "--guidance-ckpt or --guidance-weights needs"),
])  # fmt: skip
def test_guidance_that_makes_no_sense_is_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        Guidance(**settings)


@pytest.mark.parametrize("scale, low, graphs", [(1.0, 0.0, 1), (3.0, 0.0, 1), (3.0, 0.5, 2)])
def test_a_solve_compiles_one_graph_for_each_batch_size(scale, low, graphs, monkeypatch):
    """The last step too must ask for nothing new."""
    seen = []

    def backend(graph, inputs, mode=None):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    network = SiT_models["SiT-T/8"](input_size=8, num_classes=10).eval()
    compile_network(network)
    model = GuidedNetwork(network, Guidance(scale, low=low), 10)
    for method in ("Euler", "Heun"):
        sample = Sampler(create_transport()).sample_sde(sampling_method=method, num_steps=4)
        sample(torch.randn(2, 4, 8, 8), model, y=torch.tensor([1, 2]))
    sample = Sampler(create_transport()).sample_ode(sampling_method="heun", num_steps=4)
    sample(torch.randn(2, 4, 8, 8), model, y=torch.tensor([1, 2]))
    assert len(seen) == graphs
