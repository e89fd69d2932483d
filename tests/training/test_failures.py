"""Whatever raises, wherever it is, a run ends with its traceback, exit code 1, and no process left behind."""

import contextlib
import multiprocessing
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from cli import DIGITS, ENV, ROOT, launch
from common.checkpoint import load_checkpoint
from data.images import DigitsDataset
from data.loader import read_ahead

FLAGS = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 8, "--num-workers", 2, "--max-steps", 50]
FLAGS += ["--ckpt-every", 2, "--sample-every", 3, "--log-every", 1]

# Where it breaks: a line that replaces something by break_(), which raises what no code of ours expects.
PLACES = {
    "the optimizer's step": "torch.optim.AdamW.step = break_",
    "the loss": "transport.transport.Transport.training_losses = break_",
    "a sample picture": "inference.pipeline.Pipeline.draw = break_",
    "an evaluation": "training.evaluation.Evaluation.measure = break_",
    "saving": "training.writer.save_checkpoint = break_",
    "a loading process": "data.images.DigitsDataset.__getitem__ = break_",
}
SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import torch
import train, training.trainer, training.monitor, training.writer, inference.pipeline, transport.transport, data.images
from train_utils import run

def break_(*args, **kwargs):
    raise ZeroDivisionError("broken on purpose")

{line}
arguments = train.make_parser().parse_args()
run(lambda: train.main(arguments), "train.py")
"""


def descendants(marker):
    """Processes whose command line has marker."""
    return subprocess.run(["pgrep", "-f", marker], capture_output=True, text=True).stdout.split()


def assert_over(done, file):
    """The script ended by what broke, and so did all that it had started."""
    assert done.returncode == 1, done.stderr
    assert "ZeroDivisionError: broken on purpose" in done.stderr and "Traceback" in done.stderr
    until = time.time() + 5
    while descendants(str(file)) and time.time() < until:
        time.sleep(0.1)
    assert not descendants(str(file))


ENCODE = """
import sys
sys.path.insert(0, {root!r})
import encode_latents, data.autoencoder, common.chunks
from train_utils import run

def break_(*args, **kwargs):
    raise ZeroDivisionError("broken on purpose")

{line}
arguments = encode_latents.make_parser().parse_args()
run(lambda: encode_latents.main(arguments), "encode_latents.py")
"""


@pytest.mark.parametrize("line", ["data.autoencoder.LatentSpace.moments = break_", "common.chunks.ChunkStore.save = break_"])
def test_no_failure_of_encoding_leaves_a_process_behind(line, tmp_path):
    file = tmp_path / "broken_encode.py"
    file.write_text(ENCODE.format(root=str(ROOT), line=line))
    flags = ["--data-path", "builtin:digits", "--image-size", "32", "--vae", ROOT / "assets" / "digits-vae"]
    argv = map(str, [sys.executable, file, *flags, "--out", tmp_path / "cache", "--num-workers", 2])
    assert_over(subprocess.run(list(argv), capture_output=True, text=True, env=ENV, timeout=90), file)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_no_failure_leaves_a_process_behind(place, processes, inception_weights, tmp_path):
    file = tmp_path / "broken_train.py"
    file.write_text(SCRIPT.format(root=str(ROOT), line=PLACES[place]))
    np.savez(tmp_path / "ref.npz", arr_0=np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8))
    evaluated = ["--eval-every", 1, "--eval-samples", 4, "--eval-ref", tmp_path / "ref.npz"]
    evaluated += ["--inception-weights", inception_weights]
    launcher = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc_per_node={processes}"] if processes > 1 else []
    argv = [*launcher, str(file), *map(str, FLAGS), "--results-dir", str(tmp_path / "r")]
    argv += map(str, evaluated if place == "an evaluation" else ())
    done = subprocess.run(argv, capture_output=True, text=True, env=ENV, timeout=90)  # 12 s of imports on a busy machine
    assert_over(done, file)
    assert "FAILED: ZeroDivisionError" in next(tmp_path.glob("r/*/log.txt")).read_text()


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_loading_processes_are_ended_however_slowly_they_are_reaped(error, monkeypatch):
    """torch's handler of SIGCHLD would raise for a process that was killed and not joined yet, and leave the others."""
    kill, seen = multiprocessing.Process.kill, []

    def kill_and_wait(process):
        kill(process)
        seen.append(process)
        time.sleep(0.1)  # in which the signal comes

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "kill", kill_and_wait, raising=False)
    monkeypatch.setattr(multiprocessing.Process, "kill", kill_and_wait)
    handler = signal.getsignal(signal.SIGCHLD)
    ahead = read_ahead(DigitsDataset(32), [[i] for i in range(50)], 3, torch.device("cpu"))
    with pytest.raises(error) if error else contextlib.nullcontext(), ahead as batches:
        assert next(batches)[1].tolist() == [0]
        if error:
            raise error
    assert len(seen) == 3 and not any(process.is_alive() for process in seen)
    assert signal.getsignal(signal.SIGCHLD) is not signal.SIG_DFL or handler is signal.SIG_DFL


# Each attempt at the run fails in a way of its own, drawn from its number, until FAILURES have been: of which process, where,
# at which call, and how. An attempt begins when nothing of the last one is left, but for a few seconds in which loading
# processes of a killed one find that out.
FAILURES = 20
MANY = """
import os, random, signal, subprocess, sys, time
sys.path.insert(0, {root!r})
import torch
import train, training.trainer, training.monitor, training.run, training.writer, inference.pipeline, data.images
from train_utils import run

attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
until = time.time() + 10
if rank == 0:  # torchrun, two processes of training, and none of the loaders' yet
    while len(left := subprocess.run(["pgrep", "-f", "[t]imes_broken"], capture_output=True, text=True).stdout.split()) > 3:
        assert time.time() < until, f"left behind: {{left}}"
        time.sleep(0.1)

def leave():
    raise ZeroDivisionError("broken on purpose")

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

PLACES = [
    (torch.optim.AdamW, "step", 30), (training.trainer, "draw_step", 30), (data.images.DigitsDataset, "__getitem__", 100),
    (training.writer, "save_checkpoint", 10), (os, "replace", 10), (inference.pipeline.Pipeline, "draw", 4),
    (training.monitor.Monitor, "report", 10), (training.trainer.Trainer, "_continue", 1), (training.run, "plan_run", 1),
]
chance = random.Random(attempt)
owner, name, most = chance.choice(PLACES)
who, calls, how = chance.randrange(2), chance.randint(1, most), chance.choice([leave, kill])
if os.path.basename(getattr(owner, "__file__", "")) in ("writer.py", "os.py") or name == "draw":
    who = 0  # the main process saves and draws
original, count = getattr(owner, name), 0

def breaks(*args, **kwargs):
    global count
    count += 1
    if count == calls:
        with open({told!r}, "a") as file:
            file.write(f"{{attempt}}: {{name}} of rank {{rank}}, call {{calls}}: {{how.__name__}}\\n")
        how()
    return original(*args, **kwargs)

if attempt < {failures} and rank == who:
    setattr(owner, name, breaks)
arguments = train.make_parser().parse_args()
run(lambda: train.main(arguments), "train.py")
"""


@pytest.mark.slow
def test_twenty_failures_leave_no_process_and_the_run_ends_as_if_they_had_not_been(tmp_path):
    flags = [*FLAGS, "--max-steps", 500, "--ckpt-every", 5, "--keep-last", 2, "--sample-every", 10]
    assert launch("train", *flags, "--results-dir", tmp_path / "straight", processes=2).code == 0
    file, told = tmp_path / "times_broken.py", tmp_path / "told"
    file.write_text(MANY.format(root=str(ROOT), told=str(told), failures=FAILURES))
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max-restarts={FAILURES}"]
    argv += [str(file), "--resume", *map(str, flags), "--results-dir", str(tmp_path / "broken")]
    done = subprocess.run(argv, capture_output=True, text=True, env=ENV, timeout=1200)
    assert done.returncode == 0, done.stderr[-5000:]
    print(told.read_text())
    assert {int(line.split(":")[0]) for line in told.read_text().splitlines()} == set(range(FAILURES))
    assert "left behind" not in done.stderr and not descendants(str(file))
    ours, straight = (
        load_checkpoint(next(tmp_path.glob(f"{name}/*/checkpoints/0000500.pt"))) for name in ("broken", "straight")
    )
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][key], value) for key, value in straight[part].items()), part
    assert not list(tmp_path.rglob("*.tmp"))
