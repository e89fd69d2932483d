"""A run that is killed and started again by the same command is the run that would have been."""

import argparse
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from cli import DIGITS, ENV, call, command, kill_tree, launch, one_line
from common.checkpoint import load_checkpoint, weights_of
from common.errors import UserError
from common.recipe import recipe_of
from forks import forks
from training import trainer

STEPS = 24
RUN = "000-SiT-T-8-Linear-velocity-None"


def flags(folder, *more, workers=0):
    small = ["--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 8, "--lr", 1e-3, "--lr-schedule", "cosine"]
    ending = ["--max-steps", STEPS, "--ckpt-every", 2, "--keep-last", 3, "--log-every", 4, "--sample-every", 1000]
    return [*DIGITS, *small, *ending, "--num-workers", workers, "--results-dir", folder, "--resume", *more]


def checkpoints(folder):
    return sorted((folder / RUN / "checkpoints").glob("*.pt"))


def assert_equal(ours, theirs, where=""):
    """Every tensor and number of two checkpoints, bit for bit."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            if key not in ("results_dir", "num_workers"):
                assert_equal(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The last checkpoint of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    done = launch("train", *flags(folder))
    assert done.code == 0, done.err
    return load_checkpoint(folder / RUN / "checkpoints" / f"{STEPS:07d}.pt")


def start(*argv, processes=1):
    return subprocess.Popen(
        command("train", *argv, processes=processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENV,
        start_new_session=True,
    )


def wait_for(condition, process, seconds=120):
    """Until condition(); fails when the process ends before that, or time does."""
    until = time.time() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.time() < until, "too slow"
        time.sleep(0.003)


def kill_at_random(folder, rng, begin=start, workers=0, steps=STEPS):
    """SIGKILL the run some while after it made progress, or in the middle of writing a checkpoint."""
    before = checkpoints(folder)[-1:]
    victim = begin(*flags(folder, "--max-steps", steps, workers=workers))
    try:
        wait_for(lambda: checkpoints(folder)[-1:] != before, victim)
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0, 0.1))
        else:
            wait_for(lambda: list((folder / RUN / "checkpoints").glob(".*.tmp")), victim)
    finally:
        alive = victim.poll() is None
        kill_tree(victim)
    assert alive, "it was to be killed before it had finished"


def test_killed_and_resumed_is_the_uninterrupted_run(whole, tmp_path):
    folder = tmp_path / "results"
    for seed in range(2):
        kill_at_random(folder, random.Random(seed), workers=1)
    done = launch("train", *flags(folder, workers=2))
    assert done.code == 0, done.err
    assert_equal(load_checkpoint(checkpoints(folder)[-1]), whole)
    assert [path.name for path in folder.iterdir()] == [RUN] and len(checkpoints(folder)) == 3
    assert not list(folder.rglob("*.tmp"))
    rows = (folder / RUN / "metrics.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(4, STEPS + 1, 4))
    assert "Continuing from" in (folder / RUN / "log.txt").read_text()
    again = launch("train", *flags(folder))  # safe to requeue for ever
    assert again.code == 0 and "nothing to do" in again.out and len(list(folder.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ten_kills(tmp_path, processes):
    """Ten times killed, at random or during a checkpoint's write; then equal to the uninterrupted run, bit for bit."""
    folder, steps = tmp_path / "results", 120
    with forks(tmp_path / "said.txt") if processes == 1 else nullcontext(partial(start, processes=processes)) as begin:
        for kill in range(10):
            kill_at_random(folder, random.Random(kill), begin, steps=steps)
    for name in ("results", "straight"):
        done = launch("train", *flags(tmp_path / name, "--max-steps", steps), processes=processes)
        assert done.code == 0, done.err
    ours, theirs = (checkpoints(tmp_path / name)[-1] for name in ("results", "straight"))
    assert ours.stem == theirs.stem == f"{steps:07d}"
    assert_equal(load_checkpoint(ours), load_checkpoint(theirs))


@pytest.mark.slow
def test_sigterm_under_torchrun(tmp_path):
    """Both processes end the step, save and leave; resumed, the run is the uninterrupted one, bit for bit."""
    straight = launch("train", *flags(tmp_path / "straight"), processes=2)
    assert straight.code == 0, straight.err
    folder = tmp_path / "results"
    victim = start(*flags(folder), processes=2)
    try:
        wait_for(lambda: checkpoints(folder), victim)
        os.kill(victim.pid, signal.SIGTERM)  # torchrun hands it on
        out, _ = victim.communicate(timeout=60)
    finally:
        kill_tree(victim)
    stopped = int(checkpoints(folder)[-1].stem)
    assert f"Stopped by signal 15 at step {stopped}" in (folder / RUN / "log.txt").read_text(), out
    assert stopped < STEPS and "FAILED" not in out
    done = launch("train", *flags(folder), processes=2)
    assert done.code == 0, done.err
    ours, theirs = (load_checkpoint(checkpoints(tmp_path / name)[-1]) for name in ("results", "straight"))
    assert_equal(ours, theirs)


@pytest.mark.slow
def test_two_processes_and_back(tmp_path):
    """One process, then two, then one: equal to rounding. The constant schedule lets --max-steps move."""
    plain = ["--lr-schedule", "constant"]
    assert launch("train", *flags(tmp_path / "a", *plain)).code == 0
    for steps, processes in ((6, 1), (14, 2), (STEPS, 1)):
        done = launch("train", *flags(tmp_path / "b", *plain, "--max-steps", steps), processes=processes)
        assert done.code == 0, done.err
    ours, theirs = (load_checkpoint(checkpoints(tmp_path / name)[-1]) for name in "ab")
    for key, value in theirs["ema"].items():
        assert torch.allclose(ours["ema"][key], value, atol=1e-5), key


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])  # SIGTERM is sent to torchrun below
def test_exit_code_of_a_signal(tmp_path, number):
    victim = start(*flags(tmp_path, "--max-steps", 1000))
    try:
        wait_for(lambda: checkpoints(tmp_path), victim)
        victim.send_signal(number)
        out, _ = victim.communicate(timeout=60)
    finally:
        kill_tree(victim)
    assert victim.returncode == 128 + number and f"Stopped by signal {int(number)}" in out


def resume(capsys, folder, *more):
    return call(capsys, "train", *flags(folder, *more))


def test_damaged_checkpoints_are_named_and_skipped(whole, tmp_path, capsys):
    assert resume(capsys, tmp_path, "--max-steps", 6, "--lr-schedule", "constant").code == 0
    *_, older, newest = checkpoints(tmp_path)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 0xFF  # one flipped byte
    newest.write_bytes(content)
    cut = newest.with_name("0000099.pt")
    (tmp_path / RUN / "metrics.csv").write_text("")  # a row that was being written when the disk was full
    cut.write_bytes(older.read_bytes()[:-1000])
    result = resume(capsys, tmp_path, "--max-steps", 8, "--lr-schedule", "constant")
    assert result.code == 0, result.err
    log = (tmp_path / RUN / "log.txt").read_text()
    for damaged in (newest, cut):
        assert f"now {damaged.name}.damaged: --ckpt {damaged}" in log
    assert newest.exists() and not cut.exists()  # made anew; set aside
    assert f"Continuing from {older}, step 4" in log


def test_any_flipped_byte_is_a_user_error(tmp_path):
    path = tmp_path / "c.pt"
    torch.save({"pos_embed": torch.arange(8.0), "step": 3}, path)
    whole_file = path.read_bytes()
    harmless = 0
    for place in range(0, len(whole_file), 3):
        damaged = bytearray(whole_file)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            load_checkpoint(path)
            harmless += 1  # a date, or padding
        except UserError as error:
            assert "\n" not in str(error)
    assert harmless < len(whole_file) / 3 / 2


def test_a_published_optimizer_state_is_understood(tmp_path, capsys):
    """It counts pos_embed among its parameters, says nothing of the step, and has its args in a Namespace."""
    assert resume(capsys, tmp_path, "--max-steps", 2, "--lr-schedule", "constant").code == 0
    content = load_checkpoint(checkpoints(tmp_path)[-1])
    model = recipe_of(content, weights_of(content)).build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    places = [i for i, p in enumerate(model.parameters()) if p.requires_grad]
    states = {old: content["opt"]["state"][new] for new, old in enumerate(places)}
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    args = argparse.Namespace(**{key: content["args"][key] for key in ("model", "image_size", "num_classes", "path_type")})
    published = tmp_path / "published.pt"
    torch.save({"model": content["model"], "ema": content["ema"], "opt": optimizer.state_dict(), "args": args}, published)
    more = ["--max-steps", 4, "--lr-schedule", "constant"]
    assert resume(capsys, tmp_path, *more).code == 0
    argv = [flag for flag in flags(tmp_path / "p", "--ckpt", published, *more) if flag != "--resume"]
    result = call(capsys, "train", *argv)
    assert result.code == 0, result.err
    ours, theirs = (load_checkpoint(checkpoints(folder)[-1]) for folder in (tmp_path / "p", tmp_path))
    assert_equal(ours["model"], theirs["model"])
    assert ours["step"] == 4


def test_other_flags_are_refused_by_name(tmp_path, capsys):
    assert resume(capsys, tmp_path, "--max-steps", 2).code == 0
    (path,) = checkpoints(tmp_path)
    argv = [flag for flag in flags(tmp_path, "--ckpt", path, "--ema-decay", 0.5) if flag != "--resume"]
    one_line(call(capsys, "train", *argv), 2, "--ema-decay 0.9999 (now 0.5)", path)
    one_line(resume(capsys, tmp_path, "--ckpt", path), 2, "--ckpt and --resume")
    assert len(list(tmp_path.iterdir())) == 1
    unfinished = tmp_path / "unfinished"
    shutil.copytree(tmp_path / RUN, unfinished / RUN)
    file = unfinished / RUN / "flags.json"
    file.write_text(file.read_text().replace('"total_steps": 2', '"total_steps": 24'))
    one_line(resume(capsys, unfinished, "--lr", 2e-3), 2, "--lr 0.001 (now 0.002)", RUN)
    assert len(list(unfinished.iterdir())) == 1
    assert resume(capsys, tmp_path, "--max-steps", 2, "--lr", 2e-3).code == 0  # beside a finished run, a new one
    assert (tmp_path / RUN.replace("000", "001")).is_dir()


def test_bad_numbers_stop_the_run_before_the_weights(tmp_path, capsys, monkeypatch):
    draw_step = trainer.draw_step

    def poisoned(seed, step, batch, shape, device):
        draws = draw_step(seed, step, batch, shape, device)
        if step == 3:
            draws.noise[2] = float("nan")
        return draws

    monkeypatch.setattr(trainer, "draw_step", poisoned)
    one_line(resume(capsys, tmp_path, "--ckpt-every", 1), 1, "non-finite loss or gradient at step 3: rank 0, images [")
    assert all(torch.isfinite(v).all() for path in checkpoints(tmp_path) for v in load_checkpoint(path)["model"].values())
    assert checkpoints(tmp_path)[-1].stem == "0000002"
    assert "FAILED: UserError: non-finite loss" in (tmp_path / RUN / "log.txt").read_text().splitlines()[-1]
    result = resume(capsys, tmp_path, "--ckpt-every", 1, "--skip-nonfinite", 1, "--max-steps", 6)
    assert result.code == 0 and "WARNING: skipped non-finite loss or gradient at step 3" in result.out
    assert all(torch.isfinite(v).all() for v in load_checkpoint(checkpoints(tmp_path)[-1])["ema"].values())


@pytest.fixture
def folder_of(tmp_path):
    def make(broken, count=200):
        rng = np.random.default_rng(0)
        for i in range(count):
            file = tmp_path / "images" / str(i % 2) / f"{i:04d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
            if i in broken:
                file.write_bytes(file.read_bytes()[:200])
        return tmp_path / "images"

    return make


def test_one_broken_image_is_skipped_and_many_stop_the_run(folder_of, tmp_path, capsys):
    argv = lambda data: flags(tmp_path / "r", "--data-path", data, "--num-classes", 2, "--max-steps", 25)  # noqa: E731
    result = call(capsys, "train", *argv(folder_of({30})))
    assert result.code == 0, result.err
    assert result.out.count("skipped unreadable image") == 1 and "0030.jpg" in result.out
    many = flags(tmp_path / "s", "--data-path", folder_of(set(range(0, 200, 20))), "--num-classes", 2, "--max-steps", 25)
    one_line(call(capsys, "train", *many), 1, "more than 1 %", ".jpg")


@pytest.mark.slow
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path):
    assert launch("train", *flags(tmp_path, "--max-steps", 2, "--lr-schedule", "constant")).code == 0
    (older,) = checkpoints(tmp_path)
    whole_file = older.read_bytes()
    limit = len(whole_file) // 2  # no file may grow beyond: writes fail as on a full disk
    argv = flags(tmp_path, "--max-steps", 6, "--lr-schedule", "constant")
    done = subprocess.run(
        command("train", *argv),
        capture_output=True,
        text=True,
        env=ENV,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: the last checkpoint, of step 6, could not be written" in done.stderr
    log = (tmp_path / RUN / "log.txt").read_text()
    assert "ERROR: could not write" in log and "(step=0000006)" in log  # it said so, and went on
    assert checkpoints(tmp_path) == [older] and older.read_bytes() == whole_file
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_a_dead_rank_takes_the_job_down_and_restarts_bring_it_back(tmp_path):
    argv = [*flags(tmp_path), "--max-steps", 4000]
    launcher = command("train", *argv, processes=2)
    launcher.insert(launcher.index("--standalone"), "--max-restarts=1")
    process = subprocess.Popen(launcher, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV)
    log = tmp_path / RUN / "log.txt"
    try:
        wait_for(lambda: checkpoints(tmp_path), process)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]), signal.SIGKILL)
        wait_for(lambda: "FAILED" in log.read_text().splitlines()[-1], process, 60)
        wait_for(lambda: "Continuing from" in log.read_text(), process)
    finally:
        kill_tree(process)


def test_a_folder_whose_name_is_no_utf8_resumes(tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"r\xfe")
    argv = [*flags(folder), "--lr-schedule", "constant"]
    assert call(capsys, "train", *argv, "--max-steps", 2).code == 0
    result = call(capsys, "train", *argv, "--max-steps", 3)
    assert result.code == 0 and "step 2\n" in result.out, result.err
    assert [path.name for path in checkpoints(folder)] == ["0000002.pt", "0000003.pt"]


def test_a_checkpoint_that_the_disk_does_not_give_is_no_damaged_one(tmp_path, capsys, monkeypatch):
    """It may be read another day: the run stops, and the file keeps its name."""
    argv = [*flags(tmp_path), "--lr-schedule", "constant"]
    assert call(capsys, "train", *argv, "--max-steps", 2).code == 0

    def read(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("common.checkpoint._read_whole", read)
    one_line(call(capsys, "train", *argv, "--max-steps", 3), 1, "0000002.pt: cannot be read (Input/output error)")
    assert [path.name for path in (tmp_path / RUN / "checkpoints").iterdir()] == ["0000002.pt"]
