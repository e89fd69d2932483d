"""The loss by time: measured as training has it, kept, and read where it is wanted."""

import json
from dataclasses import replace

import pytest
import torch

from common.distributed import World
from common.errors import UserError
from data.sources import LabelledImages
from inference import SDE, Pipeline
from inference.velocity_loss import Points, VelocityLoss, beside, loss_of, measure
from transport.diffusion import PenalisedKL

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def pipe(trained):
    return Pipeline.load(trained)


@pytest.fixture(scope="module")
def points(pipe):
    dataset = LabelledImages("builtin:digits", pipe.recipe)
    return Points(pipe, dataset, list(range(0, 400, 20)), bins=4, seed=3, name="builtin:digits")


@pytest.fixture
def kept(points, pipe, tmp_path):
    loss = measure(points, ALONE)
    loss.save(tmp_path / "loss.json")
    return loss, tmp_path / "loss.json"


def test_a_point_is_the_loss_of_training(points, pipe, monkeypatch):
    """By Transport.training_losses of the same images, noise and times."""
    seen = {}
    plan = pipe.transport.path_sampler
    real = plan.plan
    monkeypatch.setattr(plan, "plan", lambda t, x0, x1: seen.update(t=t, x0=x0, x1=x1) or real(t, x0, x1))
    found = points.losses(range(8))
    labels = points.dataset.batch(points.chosen[:2])[1].repeat_interleave(4)
    losses = pipe.transport.training_losses(pipe.model, seen["x1"], dict(y=labels), x0=seen["x0"], t=seen["t"])["loss"]
    torch.testing.assert_close(found.float(), losses.detach())
    assert [int(t * 4) for t in seen["t"]] == [0, 1, 2, 3] * 2
    for part in (slice(0, 4), slice(4, 8)):  # each image once in each bin, with its own noise
        x1, x0 = seen["x1"][part], seen["x0"][part]
        assert (x1 == x1[:1]).all() and (x0[1:] != x0[:1]).any()
    torch.testing.assert_close(points.losses([5]), found[5:6], rtol=1e-5, atol=0)  # whatever it is measured with


def test_a_compiled_network_is_asked_compiled(pipe, monkeypatch):
    compiled = []
    monkeypatch.setattr("inference.pipeline.compile_network", lambda model, gradients: compiled.append(model))
    fast = replace(pipe, compile=True, _compiled={})
    Points(fast, LabelledImages("builtin:digits", pipe.recipe), [0], bins=2, seed=0, name="digits").losses([0, 1])
    assert len(compiled) == 1


def test_means_and_errors_are_those_of_the_bins(points):
    loss, losses = measure(points, ALONE), points.losses(range(80))
    for i in range(4):
        assert loss.mean[i] == pytest.approx(losses[i::4].mean().item(), rel=1e-5)
        assert loss.standard_error[i] == pytest.approx(losses[i::4].std().item() / 20**0.5, rel=1e-4)
    assert loss.times == [0.125, 0.375, 0.625, 0.875]


def test_any_number_of_processes_measures_the_same(points, monkeypatch):
    """The parts that three processes give, put together in the order of the points."""
    alone, parts = measure(points, ALONE), {}
    chunks = {chunk: points.losses(range(chunk * 32, min(80, chunk * 32 + 32))).tolist() for chunk in range(3)}
    monkeypatch.setattr(World, "gather", lambda self, value: [{2: chunks[2]}, parts.setdefault("own", value), {0: chunks[0]}])
    assert measure(points, World(1, 3, torch.device("cpu"))) == alone
    assert parts["own"] == {1: chunks[1]}


def test_values_between_the_bins():
    loss = VelocityLoss(0.0, 1.0, [1.0, 3.0], [0.1, 0.1], {}, {})
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert loss(t).tolist() == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert loss(t[:, None, None]).shape == (5, 1, 1)
    assert VelocityLoss(0.0, 1.0, [2.0], [0.1], {}, {})(t).tolist() == [2.0] * 5


def test_it_is_kept_and_read(kept, pipe):
    loss, file = kept
    assert VelocityLoss.load(file) == loss == loss_of(pipe, file)
    solver = SDE(form="KL", eta=0.02, loss=str(file), num_steps=5)
    form = solver.diffusion(pipe, pipe.transport)
    assert isinstance(form, PenalisedKL) and form.loss(torch.tensor([0.3])) == loss(torch.tensor([0.3]))
    images = pipe.sample([1, 2], solver=solver)
    assert images.shape == (2, 32, 32, 3)


def test_on_another_path_it_is_the_loss_there(kept, pipe):
    """Of Gaussian errors: the velocity's error on the other path is c s' times as large."""
    from transport.transfer import TransferredTransport

    loss, _ = kept
    transport = TransferredTransport(pipe.transport, "GVP")
    t = torch.tensor([0.3], dtype=torch.float64)
    x, output, error = torch.randn(3, 1, 2, dtype=torch.float64)
    read = transport.prediction.velocity
    scale = ((read(output + error, x, t) - read(output, x, t)) / error).square().mean().item()
    own_time = transport.prediction.own_time(t)
    assert transport.loss_of_path(loss)(t).item() == pytest.approx(scale * loss(own_time).item(), rel=1e-9)


def test_names_of_files():
    assert beside("a/0000100.pt").name == "0000100.loss.json"
    assert beside("a/0000100.pt", "ema-0.999").name == "0000100.loss-ema-0.999.json"


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(of=dict(checkpoint_sha256="0" * 64)), "loss of something else"),
        (dict(of="weights"), "not a file of measure_loss.py"),
        (dict(mean=[1.0, -1.0]), "no positive numbers"),
        (dict(mean=[1.0, float("nan")]), "no positive numbers"),
        (dict(mean="x"), "not a file of measure_loss.py"),
        (dict(extra=1), "not a file of measure_loss.py"),
    ],
)
def test_a_wrong_file_is_told(kept, pipe, change, words):
    _, file = kept
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=words):
        loss_of(pipe, file)
    file.write_text("{")
    with pytest.raises(UserError, match="not a file"):
        loss_of(pipe, file)
    with pytest.raises(UserError, match=r"run measure_loss\.py .* first"):
        loss_of(pipe, file.with_name("none.json"))


@pytest.mark.parametrize(
    "what, other", [("path_type", "GVP"), ("prediction", "noise"), ("weights", "model"), ("vae_hash", "x")]
)
def test_the_loss_of_another_reading_is_refused(kept, pipe, what, other):
    _, file = kept
    content = json.loads(file.read_text())
    content["of"][what] = other
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"of {what.replace('_', ' ')} {other}, not"):
        loss_of(pipe, file)


def test_the_checkpoint_is_hashed_once(kept, pipe, monkeypatch):
    from inference import velocity_loss

    _, file = kept
    velocity_loss._hash_once.cache_clear()
    hashed, real = [], velocity_loss.file_hash
    monkeypatch.setattr(velocity_loss, "file_hash", lambda path: hashed.append(path) or real(path))
    for _ in range(3):
        loss_of(pipe, file)
    assert len(hashed) == 1
