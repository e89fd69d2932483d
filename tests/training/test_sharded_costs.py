"""What costs.py says of train.py --shard, held against what processes send and hold."""

import importlib
import re
from types import SimpleNamespace

import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cli import DIGITS, ROOT, call
from common.distributed import World
from models import SiT, model_config
from training.costs import checkpoint_bytes, gathered_bytes, gb, parameters, sharded_traffic, state_bytes, training_bytes
from training.parallel import Shards

CONFIG = model_config("SiT-T/2", hidden_size=192, depth=4, learn_sigma=False)


def paper():
    with torch.device("meta"):
        return SiT(**CONFIG)


def test_states_are_counted_with_every_average_and_divided_by_the_shards():
    model = paper()
    count = parameters(model)
    assert state_bytes(model) == 20 * count and state_bytes(model, averages=3, shards=4) == 7 * count
    assert training_bytes(model, 4, "fp32", averages=3)[0] == 28 * count
    assert training_bytes(model, 4, "bf16", shards=2)[0] == 10 * count
    assert checkpoint_bytes(model, averages=2) == 20 * count
    # Gathered blocks are in bfloat16 themselves, of which autocast makes no copies.
    plain, sharded = (training_bytes(model, 4, "bf16", shards=shards)[1] for shards in (None, 2))
    assert plain - sharded == 2 * count
    block = parameters(model.blocks[0])
    ends = 8 * (count - 4 * block)
    assert gathered_bytes(model, "fp32", 1) == 0
    assert gathered_bytes(model, "fp32", 2) == 16 * block + ends and gathered_bytes(model, "bf16", 8) == 10 * block + ends


class Sent(TorchDispatchMode):
    """Bytes that a process sends by rings, for each kind of message, under it."""

    def __init__(self, shards, replicas):
        super().__init__()
        self.bytes = dict.fromkeys(("_allgather_base_", "_reduce_scatter_base_", "allreduce_"), 0.0)
        others = (shards - 1) / shards
        self.share = {"_allgather_base_": others, "_reduce_scatter_base_": others, "allreduce_": 2 * (replicas - 1) / replicas}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        if str(function).startswith("c10d."):
            largest = max(sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, torch.Tensor)) for arg in args[:2])
            self.bytes[name] += self.share[name] * largest
        return function(*args, **kwargs or {})


@pytest.fixture
def sixteen():
    """This process as the first of sixteen, whose messages go nowhere."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
    yield World(0, 16, torch.device("cpu"))
    distributed.destroy_process_group()


@pytest.mark.parametrize("shards, precision", [(16, "fp32"), (8, "fp32"), (8, "bf16")])
def test_traffic_of_shards_is_what_a_step_sends(shards, precision, sixteen):
    """In two parts; checkpointing gathers nothing more."""
    model = Shards(sixteen, shards, precision).build(SimpleNamespace(build=lambda: SiT(**CONFIG)), pytest.fail).train()
    model.grad_checkpointing = True
    with Sent(shards, 16 // shards) as sent, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for _ in range(2):
            model(torch.randn(1, 4, 32, 32), torch.rand(1), torch.zeros(1, dtype=torch.long)).square().mean().backward()
    expected = sharded_traffic(paper(), 16, shards, precision, parts=2)
    assert list(sent.bytes.values()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_dry_run_of_shards_says_what_they_take_and_send(precision, tmp_path, capsys):
    flags = ["--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 16, "--num-workers", 0, "--ema-power", 0.1]
    more = ["--precision", precision, "--results-dir", tmp_path / "runs", "--shard", "--ckpt-format", "sharded", "--dry-run"]
    result = call(capsys, "train", *DIGITS, *flags, *more)
    assert result.code == 0, result.err
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in result.out.splitlines())
    count = int(re.search(r"([\d,]+) parameters", lines["model"]).group(1).replace(",", ""))
    assert f"{gb(24 * count)} states + 0 GB gathered + " in lines["memory"]
    assert lines["gathered"] == lines["reduced"] == "0 GB a step from each process"
    assert lines["checkpoint"] == f"{gb(20 * count)}; {gb(20 * count)} in the host memory of each process until it is written"
    assert "all-reduced" not in lines and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_process_holds_what_the_formula_says(monkeypatch):
    """The whole process's memory, with 1, 2 and 4 shards."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    shards = importlib.import_module("shards")
    for processes in (1, 2, 4):
        for line in shards.lines(processes, "SiT-S/8", 256, 8, ["shards"]):
            assert line["measured"] == pytest.approx(line["paper"], rel=0.15), line
