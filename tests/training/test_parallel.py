"""Sharded training is the training that it shards: the same numbers, files and pictures, by any number of processes."""

import csv
import itertools
import json
import random
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cli import DIGITS, ENV, ROOT, call, kill_tree, launch, one_line
from common.checkpoint import load_checkpoint
from common.distributed import World, cleanup
from common.sharded import open_sharded, verify, write_sharded
from conftest import pictures
from inference import Pipeline
from models import SiT, SiT_models
from training.ema import update_ema
from training.first_weights import Pieces, first_shards
from training.parallel import Shards
from training.tensors import host_shards, rows
from training.tensors import whole as whole_tensor

from .test_resume import start, wait_for

SMALL = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 16, "--num-workers", 0, "--lr", 1e-3]
SMALL += ["--log-every", 1, "--sample-every", 1000]


def runs(processes, folder, flags, steps=30):
    """{name: (last checkpoint, losses)} of runs of train.py with {name: flags}, all by the same processes."""
    each = lambda name, more: [*SMALL, "--max-steps", steps, "--results-dir", folder / name, *more]  # noqa: E731
    asked = json.dumps({name: list(map(str, each(name, more))) for name, more in flags.items()})
    done = launch("tests/training/several_runs", asked, processes=processes, timeout=1500)
    assert done.code == 0, done.err
    return {name: result(folder / name) for name in flags}


def result(folder):
    run = max(folder.glob("???-*"))
    with open(run / "metrics.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    return load_checkpoint(max(run.glob("checkpoints/*"))), losses


def difference(ours, theirs):
    """The largest of two nested contents' tensors; what else they hold must be equal, but for how they were run."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        return max((difference(ours[key], theirs[key]) for key in theirs if key != "args"), default=0.0)
    if isinstance(theirs, torch.Tensor):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        return (ours - theirs).abs().max().item()
    assert ours == theirs
    return 0.0


def assert_near(ours, theirs, tolerance=1e-5):
    (checkpoint, losses), (expected, expected_losses) = ours, theirs
    assert len(losses) == len(expected_losses) and max(abs(a - b) for a, b in zip(losses, expected_losses)) <= tolerance
    assert difference(checkpoint, expected) <= tolerance


# What is on a process, and in a file.


@pytest.mark.parametrize("count, shards", list(itertools.product((0, 1, 2, 7, 10, 12, 64), (1, 2, 3, 4, 7))))
def test_rows_are_dealt_out_as_torch_does(count, shards):
    tensor = torch.arange(count)
    dealt = [tensor[rows(count, shards, index)] for index in range(shards)]
    assert torch.equal(torch.cat(dealt), tensor)
    for ours, theirs in zip(dealt, tensor.chunk(shards)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("changes", [{}, dict(class_dropout_prob=0.0), dict(num_classes=1, learn_sigma=False)])
def test_first_weights_piece_by_piece_are_the_whole_ones(changes):
    build = lambda: SiT_models["SiT-T/2"](input_size=8, **changes)  # noqa: E731
    whole, after = build(), torch.rand(3)
    for index in range(3):
        torch.manual_seed(0)
        model, shards = first_shards(build, lambda tensor, index=index: tensor[rows(len(tensor), 3, index)], pytest.fail)
        assert torch.equal(torch.rand(3), after)  # what comes next draws the same
        assert all(parameter.is_meta for parameter in model.parameters())
        for name, tensor in whole.named_parameters():
            assert torch.equal(shards[name], tensor[rows(len(tensor), 3, index)]), name
            assert model.get_parameter(name).requires_grad == tensor.requires_grad


class Buffered(SiT):
    """With a buffer that is in no file, and one that is."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.register_buffer("made", torch.rand(3), persistent=False)
        self.register_buffer("kept", torch.rand(3))


def test_buffers_are_those_of_the_whole_model(tmp_path):
    whole = lambda: Buffered(input_size=8, hidden_size=16, depth=1, num_heads=2)  # noqa: E731
    torch.manual_seed(0)
    expected, after = whole(), torch.rand(1)
    torch.manual_seed(0)
    world = World(0, 1, torch.device("cpu"))
    try:
        shards = Shards(world, None, "fp32")
        model = shards.build(SimpleNamespace(build=whole), pytest.fail)
        assert torch.equal(torch.rand(1), after)
        recipe, before = SimpleNamespace(build=whole), torch.get_rng_state()
        state = {name: tensor.clone() for name, tensor in expected.state_dict().items()}
        copied, loaded = shards.copy(model, recipe), shards.build_with(recipe, state, "file")
        write_sharded(host_shards({"model": model.state_dict()}, shards.host_mesh), tmp_path / "0000001")
        read = shards.read(open_sharded(tmp_path / "0000001"), tmp_path / "0000001")["model"]
        again = shards.build_with(recipe, read, "folder")
        assert torch.equal(torch.get_rng_state(), before)
        for each in (model, copied, loaded, again):
            assert torch.equal(each.kept, expected.kept) and torch.equal(whole_tensor(each.pos_embed), expected.pos_embed)
        assert torch.equal(model.made, expected.made) and torch.equal(copied.made, expected.made)
        assert 0 <= loaded.made.min() < loaded.made.max() <= 1
    finally:
        cleanup()


def test_a_piece_at_a_time_is_in_memory():
    with Pieces(lambda tensor: tensor[:1]) as pieces:
        model = SiT_models["SiT-T/2"](input_size=8)
    whole = {name for name, parameter in model.named_parameters() if parameter.untyped_storage().nbytes()}
    assert whole == {"pos_embed", "final_layer.linear.weight"}  # which nobody has worked on, and the latest
    assert len(pieces.shards) == sum(1 for _ in model.parameters()) - 2


class Related(torch.nn.Module):
    """A layer that starts as another, which no operation has touched since it was there, and one that is another."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Parameter(torch.randn(40, 40))
        self.second = torch.nn.Parameter(torch.empty(40, 40))
        with torch.no_grad():
            self.second.copy_(self.first)
        self.tied = torch.nn.Linear(40, 40)
        self.tied.weight = self.second


def test_tensors_of_one_operation_are_there_together_and_shared_ones_stay_shared():
    torch.manual_seed(0)
    whole = Related()
    torch.manual_seed(0)
    model, shards = first_shards(Related, lambda tensor: tensor[:3], pytest.fail)
    for name, tensor in whole.named_parameters(remove_duplicate=False):
        assert torch.equal(shards[name], tensor[:3]) and model.get_parameter(name).is_meta
    assert model.tied.weight is model.second


@pytest.mark.parametrize("decay", [0.9999, 0.9, 0.6, 0.5, 0.3, 0.0])
def test_an_average_that_may_be_told_not_to_change_is_the_average_to_the_bit(decay):
    ema, weights = ([torch.randn(shape) for shape in ((300, 7), (5,), (0, 3))] for _ in range(2))
    before, plain, told = ([tensor.clone() for tensor in ema] for _ in range(3))
    update_ema(plain, weights, decay)
    update_ema(told, weights, decay, bad=torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(told, before))
    update_ema(told, weights, decay, bad=torch.zeros(()))
    assert all(torch.equal(a, b) for a, b in zip(told, plain)) and not torch.equal(plain[0], before[0])


class LooksBack(torch.nn.Module):
    """Its last layer starts as the mean of the others: no piece of which can be made without them."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(3))
        torch.nn.init.trunc_normal_(self.layers[0].weight, std=0.02)
        with torch.no_grad():
            self.layers[2].weight.copy_((self.layers[0].weight + self.layers[1].weight) / 2)


def test_an_initialisation_that_looks_back_is_done_in_whole_and_told():
    torch.manual_seed(0)
    whole, told = LooksBack(), []
    torch.manual_seed(0)
    _, shards = first_shards(LooksBack, lambda tensor: tensor[:2], told.append)
    assert len(told) == 1 and "made in whole" in told[0]
    assert all(torch.equal(shards[name], tensor[:2]) for name, tensor in whole.named_parameters())


# Runs.


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Six steps by two processes, sharded and not, that draw, validate and evaluate, with four averages."""
    folder = tmp_path_factory.mktemp("both")
    more = ["--sample-every", 6, "--val-fraction", 0.02, "--val-every", 3, "--val-images", 80, "--grad-clip", 0.5]
    np.savez(folder / "reference.npz", arr_0=pictures(80, seed=2))
    more += ["--eval-every", 6, "--eval-samples", 90, "--eval-ref", folder / "reference.npz", "--eval-metrics", "kid-pixels"]
    more += ["--ema-decay", 0.9, 0.5, "--ema-power", 0.1, "--ema-snapshot-every", 3]
    return folder, runs(2, folder, {"ddp": more, "shard": ["--shard", *more]}, steps=6)


def test_shards_make_the_same_files(both):
    folder, results = both
    assert_near(results["shard"], results["ddp"], 1e-6)
    ours, theirs = (next((folder / name).glob("???-*")) for name in ("shard", "ddp"))
    files = lambda run: sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())  # noqa: E731
    assert files(ours) == files(theirs) and (ours / "samples" / "0000006.png").is_file()
    for step in (3, 6):
        snapshots = [load_checkpoint(run / "snapshots" / f"{step:07d}.pt") for run in (ours, theirs)]
        assert difference(*snapshots) <= 1e-6
    for table in ("validations.csv", "evaluations.csv"):
        rows = [list(csv.reader((run / table).read_text().splitlines())) for run in (ours, theirs)]
        assert rows[0][0] == rows[1][0] and len(rows[0]) == len(rows[1]) > 1
        for a, b in zip(rows[0][1:], rows[1][1:]):
            assert [float(x or 0) for x in a] == pytest.approx([float(x or 0) for x in b], rel=1e-4)


def test_a_picture_is_drawn_from_shards(both):
    folder, _ = both
    pictures = [Image.open(next((folder / name).glob("*/samples/0000006.png"))) for name in ("shard", "ddp")]
    ours, theirs = (torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).int() for picture in pictures)
    assert (ours - theirs).abs().max() <= 1


def test_its_file_is_read_like_any_other(both):
    folder, results = both
    pipe = Pipeline.load(next((folder / "shard").glob("*/checkpoints/*.pt")))
    assert pipe.sample([3], seed=0).shape == (1, 32, 32, 3)
    assert results["shard"][0]["args"]["shard"] is True
    log = next((folder / "shard").glob("*/log.txt")).read_text()
    assert "2 process(es) on cpu, in shards over 2, 8 images each" in log


PARTS, CLIP = ["--grad-accum-steps", 2], ["--grad-clip", 0.3]  # which change the numbers of DDP too
FASTER = [["--compile"], ["--grad-checkpointing"], PARTS, CLIP]
# Each two of them are together, apart, and one without the other.
PAIRS = [(0, 0, 0, 0), (0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)]


@pytest.mark.slow
def test_thirty_steps_equal_those_of_ddp(tmp_path):
    flags, expected = {}, {}
    for choice in PAIRS:
        chosen = [each for each, on in zip(FASTER, choice) if on]
        plain = [flag for each in chosen if each in (PARTS, CLIP) for flag in each]
        flags[f"ddp {plain}"] = plain
        flags[f"shard {chosen}"] = ["--shard", *itertools.chain(*chosen)]
        expected[f"shard {chosen}"] = f"ddp {plain}"
    results = runs(2, tmp_path, flags)
    for ours, theirs in expected.items():
        assert_near(results[ours], results[theirs])


@pytest.mark.slow
def test_thirty_steps_of_four_processes(tmp_path):
    """With uneven and empty shards, in replicas of two, and in bfloat16."""
    half = ["--precision", "bf16"]
    flags = {"ddp": [], "shard": ["--shard"], "replicas": ["--shard", "--shard-size", 2]}
    results = runs(4, tmp_path, flags | {"ddp, bf16": half, "shard, bf16": ["--shard", *half]})
    assert_near(results["shard"], results["ddp"])
    assert_near(results["replicas"], results["ddp"])
    ours, theirs = results["shard, bf16"][1], results["ddp, bf16"][1]
    assert max(abs(a - b) for a, b in zip(ours, theirs)) < 2e-4


@pytest.mark.slow
def test_a_run_goes_on_by_any_number_of_processes(capsys, tmp_path):
    """Of 2, 4 and 1, sharded or not, each time as if there had been but one."""
    flags = [*SMALL, "--results-dir", tmp_path / "straight", "--ckpt-every", 3]
    assert call(capsys, "train", *flags, "--max-steps", 12).code == 0
    stages = [(2, 3, ["--shard"]), (4, 6, ["--shard", "--shard-size", 2]), (1, 9, ["--shard"]), (2, 12, [])]
    for processes, steps, more in stages:
        argv = [*SMALL, "--resume", "--max-steps", steps, "--results-dir", tmp_path / "run", *more]
        done = launch("train", *argv, processes=processes)
        assert done.code == 0, done.err
        assert steps == 3 or f"step {steps - 3}" in done.out
    ours = result(tmp_path / "run")
    assert len(ours[1]) == 12
    assert_near(ours, result(tmp_path / "straight"))


BAD = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
from gpu.conftest import held, training

same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
with training(sys.argv[1], *sys.argv[2:]) as (trainer, monitor):
    for _ in range(2):
        trainer.take_step(*trainer.next_batch())
    before, rank = held(trainer), trainer.run.world.rank
    losses = trainer.objective.transport.training_losses
    if rank == 1:  # whose gradients alone are bad
        bad = lambda *a, **k: {{"loss": losses(*a, **k)["loss"] * float("nan")}}
        trainer.objective.transport.training_losses = bad
    _, norm, good = trainer.take_step(*trainer.next_batch())
    assert good.item() == 0 and not norm.isfinite(), (rank, norm)
    assert same(held(trainer), before), rank
    trainer.objective.transport.training_losses = losses
    _, norm, good = trainer.take_step(*trainer.next_batch())
    assert good.item() == 1 and not same(held(trainer), before), rank
    trainer.check(monitor.log)
"""


@pytest.mark.parametrize("more", [["--shard", "--grad-clip", "1"], []])
def test_a_bad_gradient_of_one_process_changes_nothing_anywhere(more, tmp_path):
    """No shard of a weight, moment or average; and the next step does."""
    script = tmp_path / "bad.py"
    script.write_text(BAD.format(root=str(ROOT)))
    flags = [*SMALL, "--max-steps", 9, "--skip-nonfinite", 1, "--ema-decay", 0.9, 0.5, "--ema-power", 0.1, *more]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    done = subprocess.run(
        [*map(str, [*launcher, tmp_path / "runs", *flags])], capture_output=True, text=True, env=ENV, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "non-finite loss or gradient at step 3: rank 1" in done.stdout


def test_a_folder_of_shards_goes_on_in_any_form(tmp_path):
    """--ckpt-format sharded: read by two processes again, bit for bit; by one without shards; and by sample.py."""
    more = ["--ema-decay", 0.9, 0.5, "--ema-power", 0.1, "--ckpt-every", 2, "--keep-last", 2]
    folders = ["--shard", "--ckpt-format", "sharded", *more]
    straight = runs(2, tmp_path, {"a": folders, "b": folders}, steps=6)["a"]
    kept = sorted(path.name for path in next((tmp_path / "a").glob("*/checkpoints")).iterdir())
    assert kept == ["0000004", "0000006"]
    for name in ("b", "c"):
        shutil.copytree(tmp_path / "a", tmp_path / name, dirs_exist_ok=True)
        shutil.rmtree(next((tmp_path / name).glob("*/checkpoints/0000006")))
    again = runs(2, tmp_path, {"b": [*folders, "--resume"]}, steps=6)["b"]
    assert difference(again[0], straight[0]) == 0 and again[1] == straight[1]
    alone = runs(1, tmp_path, {"c": [*more, "--resume"]}, steps=6)["c"]
    assert_near(alone, straight)
    sample = [next((tmp_path / name).glob(f"*/checkpoints/0000006{end}")) for name, end in (("a", ""), ("c", ".pt"))]
    ours, theirs = (Pipeline.load(path).sample([3], seed=0).astype(int) for path in sample)
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.slow
def test_killed_while_all_processes_write_a_folder(tmp_path):
    """Whenever that is, each folder that is there is whole, none that was there is lost, and the run ends as if undisturbed."""
    flags = ["--shard", "--ckpt-format", "sharded", "--ckpt-every", 2, "--ema-decay", 0.9, *(f"0.9{i}" for i in range(1, 9))]
    straight = runs(2, tmp_path, {"straight": flags}, steps=10)["straight"]
    argv = [*SMALL, "--max-steps", 10, "--results-dir", tmp_path / "run", "--resume", *flags]
    rng, kept = random.Random(0), set()
    for _ in range(2):
        victim = start(*argv, processes=2)
        try:
            wait_for(lambda: {path.name for path in tmp_path.glob("run/*/checkpoints/[0-9]*")} - kept, victim)  # noqa: B023
            wait_for(lambda: list(tmp_path.glob("run/*/checkpoints/.*.tmp")), victim)
            time.sleep(rng.uniform(0, 0.1))
        finally:
            kill_tree(victim)
        folder = next(tmp_path.glob("run/*/checkpoints"))
        there = {path.name for path in folder.glob("[0-9]*")}
        assert kept < there
        kept = there
        for name in kept:
            verify(folder / name)
    done = launch("train", *argv, processes=2)
    assert done.code == 0, done.err
    assert not list(folder.glob(".*"))
    assert difference(result(tmp_path / "run")[0], straight[0]) == 0


def test_wrong_flags_are_one_line(capsys, tmp_path):
    one_line(call(capsys, "train", *SMALL, "--shard-size", 2), 2, "--shard-size", "goes with --shard")
    flags = [*SMALL, "--shard", "--shard-size", 3, "--results-dir", tmp_path]
    one_line(call(capsys, "train", *flags), 2, "--shard-size 3 does not divide 1 processes")
    one_line(call(capsys, "train", *SMALL, "--ckpt-format", "sharded"), 2, "--ckpt-format", "goes with --shard")
    write_sharded({"args": {}}, tmp_path / "0000001")
    flags = [*SMALL, "--ckpt", tmp_path / "0000001", "--kind", "dit", "--results-dir", tmp_path]
    one_line(call(capsys, "train", *flags), 2, "--kind dit", "so it is sit")
