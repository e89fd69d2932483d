"""What is trained, saved and logged: states by their names, several averages, an objective of one's own."""

import csv
import re
import subprocess
import sys
import threading
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

from cli import DIGITS, ENV, ROOT, call, launch, one_line
from common.checkpoint import load_checkpoint
from common.errors import UserError
from inference import ODE, Guidance, Pipeline
from inference.pictures import Layout
from training import trainer
from training.ema import Averages
from training.objective import Objective
from training.plot import running_mean
from training.run_folder import RunFolder
from transport import SolverError

SMALL = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 8, "--num-workers", 0, "--lr", 1e-3]
SMALL += ["--log-every", 1, "--sample-every", 1000]


def last(folder, name="0000006"):
    (path,) = folder.glob(f"*/checkpoints/{name}.pt")
    return path


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_averages_are_the_weighted_means_of_their_decays():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    averages = Averages(model, [0.9, 0.5, 0.99])
    assert list(averages.models) == ["ema", "ema-0.5", "ema-0.99"] and list(Averages(model, 0.9).models) == ["ema"]
    nn.init.ones_(model.weight)
    for step in range(1, 11):
        averages.update(step)
    for (name, average), decay in zip(averages.models.items(), (0.9, 0.5, 0.99)):
        assert average.weight.item() == pytest.approx(1 - decay**10), name


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A run with three averages."""
    folder = tmp_path_factory.mktemp("several")
    flags = ["--ema-decay", "0.9,0.5", 0.99, "--max-steps", 6, "--ckpt-every", 3, "--results-dir", folder]
    done = launch("train", *SMALL, *flags)
    assert done.code == 0, done.err
    return folder


def test_several_averages_are_saved_resumed_and_sampled(several, tmp_path, capsys):
    content = load_checkpoint(last(several))
    assert {"model", "ema", "ema-0.5", "ema-0.99", "opt"} <= content.keys()
    assert not same(content["ema"], content["ema-0.5"])
    decays = ["--ema-decay", 0.9, 0.5, 0.99]
    flags = [*SMALL, *decays, "--max-steps", 6, "--results-dir", tmp_path, "--ckpt", last(several, "0000003")]
    assert call(capsys, "train", *flags).code == 0
    resumed = load_checkpoint(last(tmp_path))
    assert all(same(resumed[name], content[name]) for name in ("model", "ema", "ema-0.5", "ema-0.99"))

    pictures = {}
    for name in ("ema", "ema-0.5", "model"):
        out = tmp_path / f"{name}.png"
        flags = ["--ckpt", last(several), "--weights", name, "--sampling-method", "euler", "--num-sampling-steps", 4]
        assert call(capsys, "sample", "ODE", *flags, "--class-labels", "1,2", "--cfg-scale", 1, "--out", out).code == 0
        images = Pipeline.load(last(several), weights=name).sample([1, 2], solver=ODE("euler", num_steps=4))
        pictures[name] = np.asarray(Image.open(out))
        with Image.open(out) as picture:
            assert (Layout(2, 32, 32, 2, named=True).cut(picture) == images).all()
    assert (pictures["ema"] != pictures["ema-0.5"]).any() and (pictures["ema-0.5"] != pictures["model"]).any()
    one_line(
        call(capsys, "sample", "ODE", "--ckpt", last(several), "--weights", "ema-0.7"), 1, "ema-0.7", "model, ema, ema-0.5"
    )
    one_line(
        call(capsys, "train", *SMALL, "--ema-decay", 0.9, "--ckpt", last(several)), 2, "--ema-decay 0.9 0.5 0.99 (now 0.9)"
    )


def test_one_average_guides_another(several, tmp_path, capsys):
    flags = ["--ckpt", last(several), "--sampling-method", "euler", "--num-sampling-steps", 4, "--class-labels", "1"]
    flags += ["--cfg-scale", 3, "--cfg-channels", "all", "--guidance-weights", "ema-0.99", "--out", tmp_path / "s.png"]
    result = call(capsys, "sample", "ODE", *flags)
    assert result.code == 0 and " 6 network calls" in result.out, result.err
    strong, weak = (Pipeline.load(last(several), weights=name) for name in ("ema", "ema-0.99"))
    images = strong.sample([1], solver=ODE("euler", num_steps=4), guidance=Guidance(3.0, channels=None, weak=weak))
    with Image.open(tmp_path / "s.png") as picture:
        assert (Layout(1, 32, 32, 1, named=True).cut(picture) == images).all()


class WithHead(Objective):
    """A head of its own on the tokens, and a second loss."""

    def __init__(self, model, transport):
        super().__init__(model, transport)
        self.head = nn.Linear(model.pos_embed.shape[2], 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.counts = nn.BatchNorm1d(1, affine=False)
        self.teacher = nn.Linear(3, 3).requires_grad_(False)  # neither trained nor saved
        model.blocks[-1].register_forward_hook(lambda block, inputs, tokens: setattr(self, "tokens", tokens))

    def forward(self, x1, y, draws):
        losses = super().forward(x1, y, draws)
        head_loss = (self.scale * self.counts(self.head(self.tokens)[..., 0].mean(1)[:, None])[:, 0] - 1).square()
        return {"loss": losses["loss"] + head_loss, "head_loss": head_loss}


@pytest.fixture
def with_head(monkeypatch):
    monkeypatch.setattr(trainer, "make_objective", lambda model, transport, flags: WithHead(model, transport))


COMPILED = pytest.param(["--compile"], marks=pytest.mark.slow)


@pytest.mark.parametrize("more", [[], ["--grad-accum-steps", "2"], COMPILED], ids=" ".join)
def test_what_an_objective_holds_is_trained_saved_logged_and_resumed(with_head, tmp_path, capsys, more):
    more = [*SMALL, *more]
    result = call(capsys, "train", *more, "--max-steps", 6, "--ckpt-every", 3, "--results-dir", tmp_path / "a")
    assert result.code == 0, result.err
    assert "Head Loss: " in result.out
    whole = load_checkpoint(last(tmp_path / "a"))
    assert (
        "teacher" not in whole
        and whole["head"].keys() == {"weight", "bias"}
        and len(whole["opt"]["state"]) == len(whole["model"]) - 1 + 3
    )
    with open(last(tmp_path / "a").parents[1] / "metrics.csv") as rows:
        columns = [float(row["head_loss"]) for row in csv.DictReader(rows)]
    assert len(columns) == 6 and len(set(columns)) == 6 and min(columns) > 0
    half = last(tmp_path / "a", "0000003")
    assert call(capsys, "train", *more, "--max-steps", 6, "--results-dir", tmp_path / "b", "--ckpt", half).code == 0
    resumed = load_checkpoint(last(tmp_path / "b"))
    assert all(same(resumed[name], whole[name]) for name in ("model", "head", "counts", "objective", "ema"))
    assert whole["objective"].keys() == {"scale"} and whole["counts"]["num_batches_tracked"] >= 6
    assert Pipeline.load(last(tmp_path / "b")).sample([3], solver=ODE("euler", num_steps=3)).shape == (1, 32, 32, 3)


def test_what_an_objective_adds_is_sharded_saved_and_resumed_too(with_head, tmp_path, capsys):
    for name, more in (("plain", []), ("shards", ["--shard"])):
        flags = [*SMALL, "--results-dir", tmp_path / name, "--ckpt-every", 3, *more]
        flags += ["--val-fraction", 0.01, "--val-every", 3, "--val-images", 20]
        assert call(capsys, "train", *flags, "--max-steps", 6).code == 0
    plain, shards = (load_checkpoint(last(tmp_path / name)) for name in ("plain", "shards"))
    for name in ("model", "head", "counts", "objective", "ema"):
        assert shards[name].keys() == plain[name].keys()
        for key, value in plain[name].items():
            torch.testing.assert_close(shards[name][key], value, rtol=1e-5, atol=1e-6)
    last(tmp_path / "shards").unlink()
    measured = next(tmp_path.glob("shards/*/validations.csv"))
    before = measured.read_text()
    measured.unlink()  # the first thing to do is then the validation of step 3
    assert call(capsys, "train", *flags, "--max-steps", 6, "--resume").code == 0
    resumed = load_checkpoint(last(tmp_path / "shards"))
    assert all(same(resumed[name], shards[name]) for name in ("model", "head", "counts", "objective", "ema"))
    assert measured.read_text() == before


def test_a_name_that_a_checkpoint_has_is_no_name_of_a_module(monkeypatch, tmp_path, capsys):
    class Taken(Objective):
        def __init__(self, model, transport):
            super().__init__(model, transport)
            self.ema = nn.Linear(1, 1)

    monkeypatch.setattr(trainer, "make_objective", lambda model, transport, flags: Taken(model, transport))
    with pytest.raises(ValueError, match="cannot be called ema"):
        call(capsys, "train", *SMALL, "--max-steps", 1, "--results-dir", tmp_path)


def test_a_state_that_a_checkpoint_lacks_starts_anew_and_says_so(with_head, trained, tmp_path, capsys):
    flags = [*SMALL, "--global-batch-size", 16, "--max-steps", 8, "--results-dir", tmp_path, "--ckpt", trained]
    one_line(call(capsys, "train", *flags), 1, "its optimizer state is that of another model")
    content = load_checkpoint(trained)
    del content["opt"]
    torch.save(content, tmp_path / "weights.pt")
    flags[-1] = tmp_path / "weights.pt"
    result = call(capsys, "train", *flags)
    assert result.code == 0 and "has no state 'head': it starts anew" in result.out, result.err


def test_a_column_that_came_later_is_added(tmp_path):
    from training.run_folder import RunFolder

    folder = RunFolder(tmp_path / "000-x")
    folder.add_row("m.csv", step=1, loss=0.5)
    folder.add_row("m.csv", step=2, loss=0.4, head_loss=0.3)
    folder.add_row("m.csv", step=3, loss=0.3, head_loss=0.2)
    assert folder.read_rows("m.csv") == [
        {"step": "1", "loss": "0.5", "head_loss": ""},
        {"step": "2", "loss": "0.4", "head_loss": "0.3"},
        {"step": "3", "loss": "0.3", "head_loss": "0.2"},
    ]


def test_the_running_mean_is_that_of_the_last_values():
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    assert running_mean(values, 2) == pytest.approx([3.0, 2.0, 8 / 3, 2.0, 10 / 3])


def test_images_that_are_not_square(tmp_path, capsys):
    """Trained, resumed, cached, sampled and scored at 32 x 64, in pixels and in latents."""
    rng = np.random.default_rng(0)
    for i in range(8):
        file = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (50, 90, 3), dtype=np.uint8)).save(file)
    wide = ["--data-path", tmp_path / "images", "--num-classes", 2, "--image-size", "32x64"]
    encode = ["--data-path", tmp_path / "images", "--image-size", "32x64", "--vae", "assets/digits-vae", "--num-workers", 0]
    assert call(capsys, "encode_latents", *encode, "--out", tmp_path / "cache").code == 0
    cached = [*wide, "--data-path", tmp_path / "cache", "--vae", "assets/digits-vae", "--model", "SiT-T/4"]
    for name, flags in (
        ("pixels", wide),
        ("latents", [*wide, "--vae", "assets/digits-vae", "--model", "SiT-T/4"]),
        ("cached", cached),
    ):
        flags = [*SMALL, *flags, "--results-dir", tmp_path / name, "--sample-every", 4]
        assert call(capsys, "train", *flags, "--max-steps", 2).code == 0
        result = call(capsys, "train", *flags, "--max-steps", 4, "--resume")
        assert result.code == 0 and "Continuing" in result.out, result.err
        pipe = Pipeline.load(last(tmp_path / name, "0000004"))
        assert pipe.latent_shape == ((3, 32, 64) if name == "pixels" else (4, 8, 16))
        images = pipe.sample([0, 1], solver=ODE("euler", num_steps=3))
        assert images.shape == (2, 32, 64, 3)
        nats, _ = pipe.likelihood(images, [0, 1], solver=ODE("euler", num_steps=3))
        assert np.isfinite(nats).all()
    ours, theirs = (load_checkpoint(last(tmp_path / name, "0000004"))["ema"] for name in ("latents", "cached"))
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-3) for key in theirs)
    flags = ["--ckpt", last(tmp_path / "pixels", "0000004"), "--num-fid-samples", 3, "--sample-dir", tmp_path / "s"]
    assert call(capsys, "sample_ddp", "SDE", *flags, "--num-sampling-steps", 3).code == 0
    assert np.load(next((tmp_path / "s").glob("*.npz")))["arr_0"].shape == (3, 32, 64, 3)
    one_line(call(capsys, "train", *SMALL, *wide, "--image-size", "32x60"), 2, "--image-size 32x60", "multiple of 8")


IMPORTS = """
import sys
sys.path.insert(0, {root!r})
import train
from train_utils import run

def show():
    maps = open("/proc/self/maps").read()
    print("MAPPED", sum(line.endswith(".pt") for line in maps.splitlines()))
    print("COMPILER", "torch._inductor.cudagraph_trees" in sys.modules)

import training.trainer
step = training.trainer.Trainer.take_step

def take_step(self, *args):
    if self.step == 8:
        show()
    return step(self, *args)

training.trainer.Trainer.take_step = take_step
arguments = train.make_parser().parse_args()
run(lambda: train.main(arguments), "train.py")
"""


def test_a_run_that_goes_on_has_let_go_of_its_checkpoint_and_imports_no_compiler(trained, tmp_path):
    (tmp_path / "show.py").write_text(IMPORTS.format(root=str(ROOT)))
    flags = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 16, "--num-workers", 0, "--lr", 1e-3]
    argv = [*flags, "--max-steps", 8, "--ckpt", trained, "--results-dir", tmp_path / "r", "--sample-every", 7]
    done = subprocess.run([sys.executable, tmp_path / "show.py", *map(str, argv)], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    assert re.findall("MAPPED.*|COMPILER.*", done.stdout) == ["MAPPED 0", "COMPILER False"]


NO_PICTURE = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    UserError("its samples are not finite numbers"),
    SolverError("dopri5 failed"),
]


@pytest.mark.parametrize("error", NO_PICTURE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["draw", "to_images"])
def test_a_picture_that_cannot_be_drawn_is_a_warning(where, error, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(f"inference.pipeline.Pipeline.{where}", Mock(side_effect=error))
    flags = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 8, "--num-workers", 0, "--max-steps", 2]
    result = call(capsys, "train", *flags, "--sample-every", 1, "--results-dir", tmp_path)
    assert result.code == 0, result.err
    assert result.out.count(f"WARNING: no sample picture: {error}") == 2
    assert not list(tmp_path.glob("*/samples/*"))


def test_the_plot_is_drawn_while_steps_go_on(tmp_path, capsys, monkeypatch):
    """In a thread, one at a time, and once more at the end."""
    drawn, plot = [], RunFolder.plot_loss

    def plot_loss(folder):
        drawn.append(threading.current_thread() is threading.main_thread())
        plot(folder)

    monkeypatch.setattr(RunFolder, "plot_loss", plot_loss)
    monkeypatch.setattr(RunFolder, "plot_loss_rarely", plot_loss)
    result = call(capsys, "train", *SMALL, "--max-steps", 4, "--ckpt-every", 1, "--results-dir", tmp_path)
    assert result.code == 0, result.err
    assert drawn[0] is False and drawn[-1] is True and drawn.count(True) == 1
    assert next(tmp_path.glob("*/loss.png")).stat().st_size > 1000


FORKS = """
import sys
sys.path.insert(0, {root!r})
import multiprocessing, train
from train_utils import run
import training.parallel
Parallel = training.parallel.DistributedDataParallel

def wrap(*args, **kwargs):
    print("CHILDREN", len(multiprocessing.active_children()), flush=True)
    return Parallel(*args, **kwargs)

training.parallel.DistributedDataParallel = wrap
arguments = train.make_parser().parse_args()
run(lambda: train.main(arguments), "train.py")
"""


def test_loading_processes_are_there_before_those_of_the_network_meet(tmp_path):
    """Processes are forked before NCCL has threads and memory to be forked: before DDP, which is the first to need it."""
    (tmp_path / "show.py").write_text(FORKS.format(root=str(ROOT)))
    argv = [*SMALL, "--num-workers", 2, "--max-steps", 1, "--results-dir", tmp_path / "r"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    done = subprocess.run([*launcher, tmp_path / "show.py", *map(str, argv)], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    assert re.findall("CHILDREN.*", done.stdout) == ["CHILDREN 2"]
