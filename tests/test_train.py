import csv
import re
import signal
import socket
import subprocess
import time
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from cli import DIGITS, ENV, call, command, launch
from common.checkpoint import load_checkpoint
from models import SiT_models
from train import make_parser
from training.monitor import Monitor

SMALL = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 16, "--num-workers", 0, "--lr", 1e-3]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def losses(run):
    with open(run / "metrics.csv") as rows:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(rows)}


def test_published_flags_and_defaults():
    args = vars(make_parser().parse_args(["--data-path", "x"]))
    published = dict(
        results_dir="results",
        model="SiT-XL/2",
        image_size=256,
        num_classes=None,  # that of the data: 1000 where they have it
        epochs=1400,
        global_batch_size=256,
        global_seed=0,
        vae="ema",
        num_workers=4,
        log_every=100,
        ckpt_every=50_000,
        sample_every=10_000,
        cfg_scale=4.0,
        wandb=False,
        ckpt=None,
        path_type="Linear",
        prediction="velocity",
        loss_weight=None,
        sample_eps=None,
        train_eps=None,
        lr=1e-4,
        ema_decay=0.9999,
    )
    assert published.items() <= args.items()


def test_a_run_leaves_log_checkpoint_curve_and_samples(trained):
    run = trained.parents[1]
    assert run.name == "000-SiT-T-8-Linear-velocity-None"
    log = (run / "log.txt").read_text()
    assert re.search(r"\(step=0000004\) Train Loss: \d\.\d{4}, Train Steps/Sec: \d+\.\d\d, Images/Sec", log)
    assert re.search(r"matrix products reach [\d.]+ TFLOP/s; steps 0 to 6", log)
    assert len(re.findall(r"Share of Peak: \d+%", log)) == 3
    assert re.search(r"\(step=0000002\).*, Waited for Data: \d+%, Time Left: 0:00:\d\d\n", log)
    assert re.search(r"\(step=0000006\).*, Time Left: 0:00:00\n", log)
    assert "Done at step 6" in log
    assert list(losses(run)) == [2, 4, 6]
    assert Image.open(run / "loss.png").size[0] > 300
    assert Image.open(run / "samples" / "0000006.png").size == (4 * 162 + 2, 4 * (162 + 25) + 2)
    content = load_checkpoint(trained)
    assert {"model", "ema", "opt", "args", "step", "recipe"} <= content.keys() and content["step"] == 6
    assert content["args"]["model"] == "SiT-T/8" and content["recipe"]["classes"] == [str(i) for i in range(10)]


def test_the_time_left_is_that_of_the_last_ten_reports_pace(monkeypatch):
    """Without the first one, in which a run warms up."""
    clock, left = [0.0], []
    monkeypatch.setattr("training.monitor.time.time", lambda: clock[0])
    monitor = Mock(marks=[(100, 0.0)], run=Mock(total_steps=10_000))
    for report in range(1, 25):
        clock[0] += 500 if report == 1 else 50 if report < 14 else 100
        left.append(Monitor._time_left(monitor, 100 + 100 * report))
    assert left[:3] == ["13:36:40", "1:20:50", "1:20:00"]  # 9,800 steps of 5 s; 9,700 of half a second, 9,600
    assert left[23] == "2:05:00"  # 7,500 steps of a second


def test_continuing_is_the_uninterrupted_run(trained, tmp_path):
    done = launch("train", *SMALL, "--max-steps", 3, "--log-every", 1, "--results-dir", tmp_path)
    assert done.code == 0, done.err
    half = tmp_path / "000-SiT-T-8-Linear-velocity-None" / "checkpoints" / "0000003.pt"
    done = launch("train", *SMALL, "--max-steps", 6, "--results-dir", tmp_path, "--ckpt", half, "--num-workers", 1)
    assert done.code == 0, done.err
    ours = load_checkpoint(tmp_path / "001-SiT-T-8-Linear-velocity-None" / "checkpoints" / "0000006.pt")
    theirs = load_checkpoint(trained)
    for part in ("model", "ema"):
        for key, value in theirs[part].items():
            assert torch.equal(ours[part][key], value), (part, key)
    assert torch.equal(ours["opt"]["state"][0]["exp_avg"], theirs["opt"]["state"][0]["exp_avg"])
    # a fresh model is changed by training, and its average trails behind it
    assert not torch.equal(theirs["model"]["final_layer.linear.weight"], theirs["ema"]["final_layer.linear.weight"])


def test_two_processes_train_as_one(trained, tmp_path):
    flags = ["--max-steps", 6, "--log-every", 2, "--results-dir", tmp_path]
    done = launch("train", *SMALL, *flags, processes=2)
    assert done.code == 0, done.err
    run = tmp_path / "000-SiT-T-8-Linear-velocity-None"
    two, one = losses(run), losses(trained.parents[1])
    assert two.keys() == one.keys()
    assert np.allclose(list(two.values()), list(one.values()), rtol=1e-5)
    ours, theirs = load_checkpoint(run / "checkpoints" / "0000006.pt")["ema"], load_checkpoint(trained)["ema"]
    for key, value in theirs.items():
        assert torch.allclose(ours[key], value, atol=1e-5), key


def test_ctrl_c_saves_a_checkpoint(tmp_path):
    process = subprocess.Popen(
        command("train", *SMALL, "--log-every", 1, "--results-dir", tmp_path, "--epochs", 100),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENV,
    )
    for line in process.stdout:
        if "(step=0000002)" in line:
            break
    process.send_signal(signal.SIGINT)
    out = process.stdout.read()
    assert process.wait(timeout=60) == 128 + signal.SIGINT, out
    assert "Traceback" not in out and "Stopped by signal 2" in out
    (saved,) = tmp_path.glob("*/checkpoints/*.pt")
    assert load_checkpoint(saved)["step"] == int(saved.stem) >= 2


def test_bf16_trains_float32_weights(tmp_path, trained, capsys):
    flags = ["--max-steps", 6, "--log-every", 6, "--results-dir", tmp_path, "--precision", "bf16"]
    result = call(capsys, "train", *SMALL, *flags)
    assert result.code == 0, result.err
    (path,) = tmp_path.glob("*/checkpoints/*.pt")
    bf16, fp32 = load_checkpoint(path)["ema"], load_checkpoint(trained)["ema"]
    weight = "blocks.3.mlp.fc1.weight"
    assert bf16[weight].dtype == torch.float32
    assert not torch.equal(bf16[weight], fp32[weight]) and torch.allclose(bf16[weight], fp32[weight], atol=1e-2)


def agrees(tmp_path, trained, atol):
    """The run in tmp_path ended with the weights and losses of trained."""
    (path,) = tmp_path.glob("*/checkpoints/0000006.pt")
    ours, theirs = load_checkpoint(path), load_checkpoint(trained)
    for part in ("model", "ema"):
        for key, value in theirs[part].items():
            assert torch.allclose(ours[part][key], value, atol=atol), (part, key)
    ours, theirs = losses(path.parents[1]), losses(trained.parents[1])
    assert np.allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


@pytest.mark.parametrize("flags", [
    ["--grad-accum-steps", 4],
    ["--grad-checkpointing"],
    ["--compile"],
], ids=lambda flags: " ".join(map(str, flags)))  # fmt: skip
def test_what_saves_time_or_memory_changes_rounding_alone(tmp_path, trained, capsys, flags):
    result = call(capsys, "train", *SMALL, "--max-steps", 6, "--log-every", 2, "--results-dir", tmp_path, *flags)
    assert result.code == 0, result.err
    agrees(tmp_path, trained, 1e-5)


COMPILED = pytest.param(["--compile", "--grad-checkpointing"], marks=pytest.mark.slow)


@pytest.mark.parametrize("more", [[], COMPILED], ids=["eager", "compiled"])
def test_gradients_meet_once_a_step(tmp_path, trained, capsys, monkeypatch, more):
    """Under DDP with accumulation; and each step's graph is the same, as DDP itself finds."""
    from training import parallel

    kept = []

    class Counting(parallel.DistributedDataParallel):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            kept.append(self)
            self.met, self.alone = 0, 0

        def no_sync(self):
            self.alone += 1
            return super().no_sync()

        def forward(self, *args, **kwargs):
            self.met += self.require_backward_grad_sync
            return super().forward(*args, **kwargs)

    monkeypatch.setattr(parallel, "DistributedDataParallel", Counting)
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()).items():
        monkeypatch.setenv(name, str(value))
    flags = ["--max-steps", 6, "--log-every", 2, "--results-dir", tmp_path, "--grad-accum-steps", 4]
    result = call(capsys, "train", *SMALL, *flags, *more)
    assert result.code == 0, result.err
    (model,) = kept
    assert (model.met, model.alone) == (6, 6 * 3)
    agrees(tmp_path, trained, 1e-5)


def test_the_network_s_graph_is_static():
    """Every step uses every parameter alike, whatever labels are dropped, so DDP need not look for unused ones."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        network = SiT_models["SiT-T/8"](input_size=8, num_classes=3).train()
        torch.nn.init.normal_(network.final_layer.linear.weight)
        model = torch.nn.parallel.DistributedDataParallel(network, static_graph=True)
        inputs = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1])
        for dropped in ([True, True], [False, True], [False, False]):
            gradients = []
            for forward in (network, model):
                network.zero_grad()
                forward(*inputs, force_drop_ids=torch.tensor(dropped)).square().mean().backward()
                gradients.append([p.grad.clone() for p in network.parameters() if p.requires_grad])
            for alone, together in zip(*gradients):
                assert torch.equal(alone, together)
        assert not list(network.buffers())  # nothing to broadcast either
    finally:
        dist.destroy_process_group()


def test_fine_tuning_from_a_bare_state_dict(trained, tmp_path, capsys):
    bare = tmp_path / "bare.pt"
    torch.save(load_checkpoint(trained)["ema"], bare)
    result = call(capsys, "train", *SMALL, "--max-steps", 1, "--results-dir", tmp_path, "--ckpt", bare, "--lr", 0)
    assert result.code == 0, result.err
    (path,) = tmp_path.glob("*/checkpoints/0000001.pt")
    assert torch.equal(load_checkpoint(path)["model"]["blocks.0.attn.qkv.weight"], torch.load(bare)["blocks.0.attn.qkv.weight"])


def test_wandb_offline_needs_no_key(tmp_path):
    started = time.time()
    flags = ["--max-steps", 1, "--log-every", 1, "--results-dir", tmp_path, "--wandb"]
    done = launch("train", *SMALL, *flags, WANDB_MODE="offline", WANDB_KEY="")
    assert done.code == 0, done.err
    assert list(tmp_path.glob("000-*/wandb/offline-run-*")) and time.time() - started < 120
