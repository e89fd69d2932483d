import re
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cli import DIGITS, ROOT, call, launch
from costs import (
    TABLES,
    all_reduced_bytes,
    cache_bytes,
    config_of,
    forward_flops,
    hours,
    parameters,
    step_flops,
    training_bytes,
)
from models import SiT

CONFIGS = {
    "XL/2 at 256 px": config_of("SiT-XL/2"),
    "S/2 at 512 px": config_of("SiT-S/2", 512),
    "B/4 with a second output": config_of("SiT-B/4", learn_sigma=True),
    "T/8 of digits in pixel space": config_of("SiT-T/8", input_size=32, in_channels=3, num_classes=10),
    "no null class, narrow MLP": config_of("SiT-T/2", class_dropout_prob=0.0, mlp_ratio=2.5),
}
SMALL = config_of("SiT-T/2", input_size=32, hidden_size=192, depth=4)


def inputs(config, count):
    shape = (count, config["in_channels"], config["input_size"], config["input_size"])
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
def test_flops_and_parameters_are_the_network_s(config):
    with torch.device("meta"):  # shapes without data
        model = SiT(**config)
        with FlopCounterMode(display=False) as counter:
            model.eval()(*inputs(config, 3))
    assert 3 * forward_flops(config) == counter.get_total_flops()
    assert parameters(config) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_is_three_or_four_forward_passes(checkpointing):
    config = config_of("SiT-S/2")
    with torch.device("meta"):
        model = SiT(**config).train()
        model.grad_checkpointing = checkpointing
        with FlopCounterMode(display=False) as counter:
            model(*inputs(config, 2)).sum().backward()
    # not quite: the input needs no gradient, and checkpointing repeats the blocks alone
    assert step_flops(config, 2, checkpointing) == pytest.approx(counter.get_total_flops(), rel=0.01)


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
    states, activations = training_bytes(SMALL, 4, precision, checkpointing)
    assert states == 20 * parameters(SMALL)
    if not checkpointing:
        assert activations == pytest.approx(kept, rel=0.02)
    assert 0.7 < live.peak / (activations + 4 * parameters(SMALL)) < 1


def test_a_cache_of_imagenet_its_traffic_and_its_hours():
    assert cache_bytes(1_281_167, 4, 32) == 1_281_167 * 2 * 2 * 4 * 32 * 32 * 2
    assert cache_bytes(1000, 4, 64) == 4 * cache_bytes(1000, 4, 32) == 8 * cache_bytes(1000, 4, 32, variants=1)
    config = config_of("SiT-XL/2")
    assert all_reduced_bytes(config, 1) == 0
    assert all_reduced_bytes(config, 8) == pytest.approx(1.75 * 4 * 674.8e6, rel=1e-3)
    # the paper counts 118.6 G multiply-adds an image
    expected = 400_000 * 256 * 3 * 2 * 118.6e9 / (8 * 0.4 * 312e12) / 3600
    assert hours(config, 400_000, "A100") == pytest.approx(expected, rel=1e-3)
    assert hours(config, 400_000, "A100", "tf32", checkpointing=True) == pytest.approx(expected * 2 * 4 / 3, rel=1e-3)
    encoding = 400_000 * 256 * 273e9 / (8 * 0.4 * 156e12) / 3600
    assert hours(config, 400_000, "A100", encoding=273e9) == pytest.approx(expected + encoding, rel=1e-3)


def test_the_page_shows_the_tables_as_they_are():
    page = (ROOT / "docs" / "scaling.md").read_text()
    for table in TABLES:
        assert table() in page, f"{table.__name__} has changed: paste the output of python costs.py into docs/scaling.md"


@pytest.mark.parametrize("flags", [["--vae", "none", "--model", "SiT-T/8"], ["--vae", ROOT / "assets" / "digits-vae"]])
def test_a_dry_run_says_what_a_run_costs_and_leaves_nothing(flags, tmp_path, capsys):
    steps = ["--max-steps", 100, "--global-batch-size", 16, "--grad-accum-steps", 2, "--num-workers", 0]
    extra = ["--grad-checkpointing", "--precision", "bf16", "--sample-every", 1, "--results-dir", tmp_path / "runs"]
    result = call(capsys, "train", *DIGITS, "--model", "SiT-T/2", *flags, *steps, *extra, "--dry-run")
    assert result.code == 0, result.err
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in result.out.splitlines())
    names = {"model", "batch", "forward", "training step", "memory", "all-reduced", "1 x A100", "1 x H100", "first step"}
    assert lines.keys() - {"latent cache", "encoding"} == names
    assert lines["batch"] == "16 images on 1 process(es), 8 at a time, bf16"
    assert "h for 100 steps at 40 %" in lines["1 x H100"]
    assert ("latent cache" in lines) == ("encoding" in lines) == ("none" not in flags)
    assert float(lines["first step"].split()[0]) > 0
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_two_processes_speaks_once(tmp_path):
    flags = ["--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 16, "--num-workers", 0, "--dry-run"]
    done = launch("train", *DIGITS, *flags, "--results-dir", tmp_path / "runs", processes=2, cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out.count("first step") == 1 and "16 images on 2 process(es), 8 at a time" in done.out
    assert not list(tmp_path.iterdir())
