import re
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoint import load_checkpoint
from cli import call, launch
from models import SiT, SiT_models
from sample import make_parser
from sampling import GuidedModel, compile_network, load_pipeline
from transport import Sampler, create_transport

FAST = ["--num-sampling-steps", 6]


def test_a_checkpoint_needs_no_further_flag(trained, tmp_path):
    done = launch("sample", "ODE", "--ckpt", trained, cwd=tmp_path)
    assert done.code == 0, done.err
    assert re.search(r"sample\.png: 10 samples, \d+ network calls, [\d.]+ s", done.out)
    assert Image.open(tmp_path / "sample.png").size == (4 * 34 + 2, 3 * 34 + 2)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_same_seed_same_picture_and_sample_i_does_not_depend_on_the_rest(trained, tmp_path, capsys):
    for name, more in (("a", []), ("b", []), ("c", ["--seed", 1]), ("d", ["--class-labels", 0, 1])):
        out = tmp_path / f"{name}.png"
        result = call(capsys, "sample", "SDE", "--ckpt", trained, *FAST, "--out", out, *more)
        assert result.code == 0, result.err
    a, b, c, d = (pixels(tmp_path / f"{name}.png") for name in "abcd")
    assert (a == b).all() and (a != c).any()
    assert np.abs(a[:36, :68] - d[:36, :68]).max() <= 1


@pytest.mark.parametrize("mode, flags", [
    ("ODE", ["--sampling-method", "heun"]),
    ("SDE", ["--sampling-method", "Heun", "--diffusion-form", "linear", "--last-step", "Tweedie"]),
    ("SDE", ["--last-step", "None"]),
    ("ODE", ["--guidance-low", 0.2, "--guidance-high", 0.7, "--cfg-channels", "all"]),
])  # fmt: skip
def test_samplers_and_a_trajectory(trained, tmp_path, capsys, mode, flags):
    gif = tmp_path / "way.gif"
    flags = [*FAST, *flags, "--class-labels", 3, "--num-samples-per-class", 2, "--trajectory", gif]
    result = call(capsys, "sample", mode, "--ckpt", trained, *flags, "--out", tmp_path / "s.png")
    assert result.code == 0, result.err
    assert pixels(tmp_path / "s.png").shape == (36, 70, 3)
    states = 6 + (mode == "SDE" and "None" not in flags)
    assert f"way.gif: {states} of {states} states" in result.out
    with Image.open(gif) as frames:
        assert 2 <= frames.n_frames <= states  # a GIF merges frames that are the same


def test_reverse_encodes_and_returns(trained, tmp_path, capsys):
    flags = ["--reverse", "--data-path", "builtin:digits", "--num-images", 4, "--out", tmp_path / "r.png", "--rtol", 1e-6]
    result = call(capsys, "sample", "ODE", "--ckpt", trained, *flags)
    assert result.code == 0, result.err
    with np.load(tmp_path / "r.npz") as file:
        assert file["z"].shape == (4, 3, 32, 32) and file["labels"].tolist() == [0, 2, 5, 7]
    picture = pixels(tmp_path / "r.png")
    left, right = picture[2:34, 2:34], picture[2:34, 36:68]
    assert left.max() > 200 and np.abs(left - right).max() <= 1  # the digit, and its way to noise and back


def test_likelihood_is_that_of_the_images(trained, tmp_path, capsys):
    flags = ["--likelihood", "--num-images", 2, "--num-probes", 2]
    digits = call(capsys, "sample", "ODE", "--ckpt", trained, *flags, "--data-path", "builtin:digits")
    assert digits.code == 0, digits.err
    assert re.search(r"digit 2500: \d\.\d{4} bits/dim \(-?[\d.]+ nats\)", digits.out)
    for i in range(2):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    noise = call(capsys, "sample", "ODE", "--ckpt", trained, *flags, "--data-path", tmp_path)
    mean = lambda result: float(re.search(r"mean ([\d.]+) bits/dim", result.out)[1])  # noqa: E731
    assert noise.code == 0 and mean(noise) != mean(digits)


class Linear(torch.nn.Module):
    """A network whose output shows its inputs: x plus the class id."""

    def forward(self, x, t, y):
        return x + y.view(-1, 1, 1, 1)

    forward_with_cfg = SiT.forward_with_cfg


def test_guidance_acts_where_it_should():
    x, y, null = torch.zeros(2, 4, 1, 1), torch.tensor([1, 2]), 10
    at = lambda model, t: model(x, torch.full((2,), t), y)[:, :, 0, 0]  # noqa: E731
    plain = torch.tensor([[1.0] * 4, [2.0] * 4])
    guided = 10 + 3 * (plain - 10)
    model = GuidedModel(Linear(), 3.0, null, channels=None, low=0.3, high=0.6)
    assert torch.equal(at(model, 0.2), plain) and torch.equal(at(model, 0.7), plain) and torch.equal(at(model, 0.5), guided)
    assert model.calls == 3 and model.edges == (0.3, 0.6)
    ends = GuidedModel(Linear(), 3.0, null, channels=None, low=0.7, high=0.8)  # float32 has them just below and just above
    assert torch.equal(at(ends, 0.7), guided) and torch.equal(at(ends, 0.8), guided)
    paper = GuidedModel(Linear(), 3.0, null)
    assert torch.equal(at(paper, 0.5), torch.cat([guided[:, :3], plain[:, 3:]], 1)) and paper.edges == ()

    class Weak(torch.nn.Module):
        def forward(self, x, t, y):
            return torch.full_like(x, -1.0)

    auto = GuidedModel(Linear(), 2.0, None, channels=None, weak=Weak())
    assert torch.equal(at(auto, 0.5), 2 * plain + 1) and auto.calls == 2
    assert GuidedModel(Linear(), 1.0, null, low=0.3).edges == ()


def test_autoguidance_by_a_weaker_checkpoint(trained, tmp_path, capsys):
    content = load_checkpoint(trained)
    content["ema"] = content["model"]
    weak = tmp_path / "weak.pt"
    torch.save(content, weak)
    flags = [
        "ODE",
        "--ckpt",
        trained,
        "--sampling-method",
        "euler",
        *FAST,
        "--out",
        tmp_path / "s.png",
        "--guidance-ckpt",
        weak,
    ]
    result = call(capsys, "sample", *flags)
    assert result.code == 0 and " 10 network calls" in result.out  # five steps, two networks


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
    model = GuidedModel(network, scale, 10, low=low)
    for method in ("Euler", "Heun"):
        sample = Sampler(create_transport()).sample_sde(sampling_method=method, num_steps=4)
        sample(torch.randn(2, 4, 8, 8), model, y=torch.tensor([1, 2]))
    sample = Sampler(create_transport()).sample_ode(sampling_method="heun", num_steps=4)
    sample(torch.randn(2, 4, 8, 8), model, y=torch.tensor([1, 2]))
    assert len(seen) == graphs


def test_bf16_samples_with_a_float32_time(trained):
    args = make_parser().parse_args(["ODE", "--ckpt", str(trained)])
    args.encodes = False
    model = load_pipeline(args, torch.device("cpu"), "bf16").model.model
    assert {p.dtype for p in model.t_embedder.parameters()} == {torch.float32}
    assert model.pos_embed.dtype == model.y_embedder.embedding_table.weight.dtype == torch.bfloat16


def test_bf16_weights_sample(trained, tmp_path, capsys):
    for precision in ("fp32", "bf16"):
        flags = ["--precision", precision, "--out", tmp_path / f"{precision}.png"]
        assert call(capsys, "sample", "ODE", "--ckpt", trained, *flags).code == 0
    difference = np.abs(pixels(tmp_path / "fp32.png") - pixels(tmp_path / "bf16.png"))
    assert 0 < difference.max() < 40 and difference.mean() < 2
