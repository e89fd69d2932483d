import math
import re
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cli import DIGITS, ROOT, call, launch
from common.sizes import height_width
from models import SiT, model_config
from training.cost_tables import TABLES
from training.costs import (
    all_reduced_bytes,
    cache_bytes,
    forward_flops,
    hours,
    on_paper,
    parameters,
    step_flops,
    training_bytes,
)

LATENTS = dict(input_size=32, in_channels=4, num_classes=1000, class_dropout_prob=0.1, learn_sigma=False)


def config(name, **changes):
    return model_config(name, **LATENTS | changes)


CONFIGS = {
    "XL/2 at 256 px": config("SiT-XL/2"),
    "8B/2 at 256 px": config("SiT-8B/2"),
    "S/2 at 512 px": config("SiT-S/2", input_size=64),
    "B/4 with a second output": config("SiT-B/4", learn_sigma=True),
    "T/8 of digits in pixel space": config("SiT-T/8", in_channels=3, num_classes=10),
    "no null class, narrow MLP": config("SiT-T/2", class_dropout_prob=0.0, mlp_ratio=2.5),
    "wide images": config("SiT-S/4", input_size=(16, 48)),
}
SMALL = config("SiT-T/2", hidden_size=192, depth=4)


def paper(config):
    with torch.device("meta"):  # shapes without data
        return SiT(**config)


def inputs(config, count):
    shape = (count, config["in_channels"], *height_width(config["input_size"]))
    return torch.randn(shape), torch.rand(count), torch.zeros(count, dtype=torch.long)


def network(config):
    """In training, and with no weight at zero, so that nothing is left out of the backward pass."""
    model = SiT(**config).train()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.02)
    return model


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made under it and are still there: now, and at their peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {value.untyped_storage()._cdata for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return out

    def gone(self, key, size):
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_flops_and_parameters_are_those_of_the_architecture(config):
    """Counted layer by layer from the paper's figure, independent of the network that costs.py asks."""
    height, width = height_width(config["input_size"])
    tokens, dim, features = height * width // config["patch_size"] ** 2, config["hidden_size"], 256
    mlp, patch = int(dim * config["mlp_ratio"]), config["in_channels"] * config["patch_size"] ** 2
    out = patch * (1 + config["learn_sigma"])
    linear = lambda inputs, outputs: (inputs + 1) * outputs  # noqa: E731
    rows = config["num_classes"] + (config["class_dropout_prob"] > 0)
    block = linear(dim, 4 * dim) + linear(dim, mlp) + linear(mlp, dim) + linear(dim, 6 * dim)
    embedders = linear(patch, dim) + linear(features, dim) + linear(dim, dim) + rows * dim
    count = embedders + config["depth"] * block + linear(dim, 2 * dim) + linear(dim, out)
    assert parameters(paper(config)) == count

    attention = tokens * 4 * dim**2 + 2 * tokens**2 * dim  # four projections; queries x keys, weights x values
    products = config["depth"] * (attention + tokens * 2 * dim * mlp + 6 * dim**2)
    products += tokens * patch * dim + (features + dim) * dim + 2 * dim**2 + tokens * dim * out
    assert forward_flops(paper(config)) == 2 * products


def test_another_backbone_is_counted_as_it_is_and_what_is_not_known_is_said():
    class Gate(torch.nn.Module):
        def __init__(self, width, hidden):
            super().__init__()
            self.up, self.down = torch.nn.Linear(width, 2 * hidden), torch.nn.Linear(hidden, width)

        def forward(self, x):
            a, b = self.up(x).chunk(2, dim=-1)
            return self.down(torch.nn.functional.silu(a) * b)

    plain, gated = paper(SMALL), paper(SMALL)
    with torch.device("meta"):
        for block in gated.blocks:
            block.mlp = Gate(192, 512)
    tokens, extra = 256, 3 * 512 - 2 * 768  # numbers in the MLP's products, a token and channel
    assert forward_flops(gated) - forward_flops(plain) == 2 * 4 * tokens * 192 * extra
    assert not math.isnan(sum(training_bytes(plain, 4)))
    states, activations = training_bytes(gated, 4)
    assert states == 20 * parameters(gated) and math.isnan(activations)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_is_three_or_four_forward_passes(checkpointing):
    small = config("SiT-S/2")
    model = paper(small).train()
    with torch.device("meta"):
        model.grad_checkpointing = checkpointing
        with FlopCounterMode(display=False) as counter:
            model(*inputs(small, 2)).sum().backward()
    # not quite: the input needs no gradient, and checkpointing repeats the blocks alone
    assert step_flops(model, 2, checkpointing) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_the_tensors_that_a_step_holds(precision, checkpointing):
    model, batch = network(SMALL), inputs(SMALL, 4)
    model.grad_checkpointing = checkpointing
    with LiveBytes() as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = model(*batch)
        kept = live.now
        out.square().mean().backward()
    states, activations = training_bytes(paper(SMALL), 4, precision, checkpointing)
    assert states == 20 * parameters(model)
    if not checkpointing:
        assert activations == pytest.approx(kept, rel=0.02)
    assert 0.7 < live.peak / (activations + 4 * parameters(model)) < 1


def test_a_cache_of_imagenet_its_traffic_and_its_hours():
    assert cache_bytes(1_281_167, (4, 32, 32)) == 1_281_167 * 2 * 2 * 4 * 32 * 32 * 2
    assert cache_bytes(1000, (4, 64, 64)) == 4 * cache_bytes(1000, (4, 32, 32))
    assert cache_bytes(1000, (4, 32, 32)) == 2 * cache_bytes(1000, (4, 32, 32), variants=1)
    xl = on_paper("SiT-XL/2")
    assert all_reduced_bytes(xl, 1) == 0
    assert all_reduced_bytes(xl, 8) == pytest.approx(1.75 * 4 * 674.8e6, rel=1e-3)
    # the paper counts 118.6 G multiply-adds an image
    expected = 400_000 * 256 * 3 * 2 * 118.6e9 / (8 * 0.4 * 312e12) / 3600
    assert hours(xl, 400_000, "A100") == pytest.approx(expected, rel=1e-3)
    assert hours(xl, 400_000, "A100", "tf32", checkpointing=True) == pytest.approx(expected * 2 * 4 / 3, rel=1e-3)
    encoding = 400_000 * 256 * 273e9 / (8 * 0.4 * 156e12) / 3600
    assert hours(xl, 400_000, "A100", encoding=273e9) == pytest.approx(expected + encoding, rel=1e-3)


def test_the_page_shows_the_tables_as_they_are():
    page = (ROOT / "docs" / "scaling.md").read_text()
    for table in TABLES:
        assert table() in page, (
            f"{table.__name__} has changed: paste the output of python -m training.costs into docs/scaling.md"
        )


@pytest.mark.parametrize("flags", [["--vae", "none", "--model", "SiT-T/8"], ["--vae", ROOT / "assets" / "digits-vae"]])
def test_a_dry_run_says_what_a_run_costs_and_leaves_nothing(flags, tmp_path, capsys):
    steps = ["--max-steps", 100, "--global-batch-size", 16, "--grad-accum-steps", 2, "--num-workers", 0]
    extra = ["--grad-checkpointing", "--precision", "bf16", "--sample-every", 1, "--results-dir", tmp_path / "runs"]
    result = call(capsys, "train", *DIGITS, "--model", "SiT-T/2", *flags, *steps, *extra, "--dry-run")
    assert result.code == 0, result.err
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in result.out.splitlines())
    names = {
        "model",
        "batch",
        "forward",
        "training step",
        "memory",
        "all-reduced",
        "1 x A100",
        "1 x H100",
        "first step",
        "checkpoint",
    }
    assert lines.keys() - {"latent cache", "encoding"} == names
    assert lines["batch"] == "16 images on 1 process(es), 8 at a time, bf16"
    assert "h for 100 steps at 40 %" in lines["1 x H100"]
    assert ("latent cache" in lines) == ("encoding" in lines) == ("none" not in flags)
    assert float(lines["first step"].split()[0]) > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_dry_run_of_two_processes_speaks_once(tmp_path):
    flags = ["--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 16, "--num-workers", 0, "--dry-run"]
    done = launch("train", *DIGITS, *flags, "--results-dir", tmp_path / "runs", processes=2, cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out.count("first step") == 1 and "16 images on 2 process(es), 8 at a time" in done.out
    more = ["--shard", "--shard-size", 1]
    done = launch("train", *DIGITS, *flags, *more, "--results-dir", tmp_path / "runs", processes=2, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "GB among 2 replicas" in done.out and "in the host memory of the main process" in done.out
    assert not list(tmp_path.iterdir())
