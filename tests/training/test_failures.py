"""Whatever raises, wherever it is, a run ends with its traceback, exit code 1, and no process left behind."""

import subprocess
import sys
import time

import pytest

from cli import DIGITS, ENV, ROOT

FLAGS = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 8, "--num-workers", 2, "--max-steps", 50]
FLAGS += ["--ckpt-every", 2, "--sample-every", 3, "--log-every", 1]

# Where it breaks: a line that replaces something by break_(), which raises what no code of ours expects.
PLACES = {
    "the optimizer's step": "torch.optim.AdamW.step = break_",
    "the loss": "transport.transport.Transport.training_losses = break_",
    "a sample picture": "inference.pipeline.Pipeline.draw = break_",
    "saving": "training.monitor.save_checkpoint = break_",
    "a loading process": "data.images.DigitsDataset.__getitem__ = break_",
}
SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import torch
import train, training.trainer, training.monitor, inference.pipeline, transport.transport, data.images
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


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_no_failure_leaves_a_process_behind(place, processes, tmp_path):
    file = tmp_path / "broken_train.py"
    file.write_text(SCRIPT.format(root=str(ROOT), line=PLACES[place]))
    launcher = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc_per_node={processes}"] if processes > 1 else []
    argv = [*launcher, str(file), *map(str, FLAGS), "--results-dir", str(tmp_path / "r")]
    done = subprocess.run(argv, capture_output=True, text=True, env=ENV, timeout=90)  # 12 s of imports on a busy machine
    assert done.returncode == 1, done.stderr
    assert "ZeroDivisionError: broken on purpose" in done.stderr and "Traceback" in done.stderr
    until = time.time() + 5
    while descendants(str(file)) and time.time() < until:
        time.sleep(0.1)
    assert not descendants(str(file))
    assert "FAILED: ZeroDivisionError" in next(tmp_path.glob("r/*/log.txt")).read_text()
