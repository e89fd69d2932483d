"""slurm/train.sbatch on a real Slurm of one node: time limits, cancellation, a node that fails.

`make test-slurm` installs Slurm, from Debian's packages, and runs these.
"""

import re
import shutil
import subprocess
import sys

import pytest
import torch

from cli import DIGITS, ROOT
from common.checkpoint import load_checkpoint
from slurm_cluster import Cluster

pytestmark = pytest.mark.slurm
STEPS = 1200  # about a minute
FLAGS = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 8, "--num-workers", 1, "--lr", 1e-3]
FLAGS += ["--sample-every", 100_000, "--log-every", 20, "--ckpt-every", 100_000]
NODE = ["--nodes=1", "--gpus-per-node=0", "--cpus-per-task=2"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if not Cluster.is_installed():
        pytest.fail("these tests need Slurm: make test-slurm installs it")
    folder = tmp_path_factory.mktemp("slurm")
    with Cluster(folder) as cluster:
        yield cluster


@pytest.fixture
def job(cluster, tmp_path):
    """submit(*sbatch's flags, steps=..., more=train.py's) -> job id, of train.sbatch as it stands, in a folder of its own."""
    jobs = []

    def submit(*flags, steps=STEPS, more=()):
        env = dict(PYTHON=sys.executable, NPROC_PER_NODE="2", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
        argv = ["--output", tmp_path / "job.out", *NODE, *flags, ROOT / "slurm" / "train.sbatch", *FLAGS]
        argv += ["--max-steps", steps, "--results-dir", tmp_path / "results", *more]
        jobs.append(cluster.submit(*argv, cwd=ROOT, **env))
        return jobs[-1]

    yield submit
    for each in jobs:
        cluster.call("scancel", each)
        cluster.wait(lambda each=each: cluster.state(each) not in ("RUNNING", "PENDING", "COMPLETING"), 60)


def text(tmp_path, file="job.out"):
    found = list(tmp_path.glob(file))
    return found[0].read_text(errors="replace") if found else ""


def reached(tmp_path, step):
    """Whether the run has logged that step."""
    steps = re.findall(r"\(step=(\d+)\)", text(tmp_path, "results/*/log.txt"))
    return bool(steps) and int(steps[-1]) >= step


def training():
    """Processes of train.py."""
    return subprocess.run(["pgrep", "-f", "train.py --resume"], capture_output=True, text=True).stdout.split()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The last checkpoint of the run without Slurm and without a stop, by two processes too."""
    from cli import launch

    folder = tmp_path_factory.mktemp("straight")
    more = ["--max-steps", STEPS, "--results-dir", folder, "--keep-last", 3, "--keep-every", 50_000]
    done = launch("train", *FLAGS, *more, processes=2)
    assert done.code == 0, done.err
    return load_checkpoint(next(folder.glob(f"*/checkpoints/{STEPS:07d}.pt")))


def assert_ended_as(straight, tmp_path):
    ours = load_checkpoint(next(tmp_path.glob(f"results/*/checkpoints/{STEPS:07d}.pt")))
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][key], value) for key, value in straight[part].items()), part


def test_a_time_limit_saves_requeues_and_ends_as_if_it_had_not_been(cluster, job, straight, tmp_path):
    """A limit of two minutes, of which the script is told a minute before, or up to half a minute earlier."""
    each = job("--time=2", "--signal=B:USR1@60")
    cluster.wait(lambda: "requeued (restart 1)" in text(tmp_path), 120, lambda: text(tmp_path))
    log = text(tmp_path, "results/*/log.txt")
    assert "Stopped by signal 15 at step" in log and "FAILED" not in log, log
    cluster.finish(each, 300, lambda: text(tmp_path))
    assert "Continuing from" in text(tmp_path, "results/*/log.txt")
    assert_ended_as(straight, tmp_path)
    assert not training()


def test_a_cancelled_job_stays_cancelled(cluster, job, tmp_path):
    each = job(steps=100_000)
    cluster.wait(lambda: reached(tmp_path, 20), 90, lambda: text(tmp_path))
    cluster.call("scancel", each)
    cluster.wait(lambda: cluster.state(each) == "CANCELLED", 60)
    cluster.wait(lambda: not training(), 60)
    assert "requeued" not in text(tmp_path) and cluster.state(each) == "CANCELLED"


def test_a_step_that_is_killed_as_by_a_failing_node_starts_again(cluster, job, tmp_path):
    """Here a run in shards, which goes on from a folder that its processes wrote."""
    each = job(steps=150, more=["--shard", "--ckpt-format", "sharded", "--ckpt-every", 40])
    cluster.wait(lambda: reached(tmp_path, 60), 90, lambda: text(tmp_path))
    cluster.call("scancel", "--signal=KILL", f"{each}.0")
    cluster.wait(lambda: "killed, requeued (restart 1)" in text(tmp_path), 60, lambda: text(tmp_path))
    cluster.finish(each, 300, lambda: text(tmp_path))
    assert "checkpoints/0000040, step 40" in text(tmp_path, "results/*/log.txt")
    assert load_checkpoint(next(tmp_path.glob("results/*/checkpoints/0000150")))["step"] == 150


def test_a_wrong_flag_is_not_tried_again(cluster, job, tmp_path):
    shutil.rmtree(tmp_path / "results", ignore_errors=True)
    each = job(steps=0)
    cluster.wait(lambda: cluster.state(each) == "FAILED", 90, lambda: text(tmp_path))
    assert "--max-steps: must be at least 1" in text(tmp_path) and "requeued" not in text(tmp_path)
