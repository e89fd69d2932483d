"""Checkpoints are written behind the steps: what is in them, in which order, and whatever befalls the run meanwhile."""

import random
import signal
import subprocess
import sys
import time
import weakref
from collections import OrderedDict
from threading import Event, Thread
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from cli import DIGITS, ENV, ROOT, call, kill_tree, launch, one_line
from common.checkpoint import load_checkpoint, save_checkpoint
from forks import forks
from training.plot import Plotting
from training.tensors import host_copy
from training.writer import Writer

from .test_resume import assert_equal, wait_for

SMALL = [*DIGITS, "--vae", "none", "--model", "SiT-T/8", "--global-batch-size", 8, "--num-workers", 0, "--lr", 1e-3]
SMALL += ["--log-every", 100, "--sample-every", 1000, "--ckpt-every", 2]


@pytest.fixture
def writer():
    """A Writer with what it logged."""
    lines = []
    made = Writer(lines.append)
    made.lines = lines
    yield made
    made.close()


@pytest.fixture
def gate(monkeypatch):
    """Writing waits at it until it is set; .begun is set when it gets there, and what is to be raised is in .raised."""
    gate = SimpleNamespace(begun=Event(), open=Event(), raised=None, written=[])

    def waiting(content, path, *more):
        gate.begun.set()
        assert gate.open.wait(60)
        if gate.raised:
            raise gate.raised
        save_checkpoint(content, path, *more)
        gate.written.append(path.name)

    monkeypatch.setattr("training.writer.save_checkpoint", waiting)
    yield gate
    gate.open.set()


def trained_states():
    """States of a model and its optimizer after a step, and both."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step = lambda: (model(torch.randn(5, 4)).square().mean().backward(), optimizer.step())  # noqa: E731
    step()
    return lambda: {"model": model.state_dict(), "opt": optimizer.state_dict(), "args": {"a": [1, None]}, "step": 3}, step


def test_a_snapshot_is_the_content_in_the_same_file(tmp_path):
    content, _ = trained_states()
    content = content() | {"tuple": (torch.arange(3), 0.5), "bf16": torch.ones(2, 3, dtype=torch.bfloat16).T}
    copied = host_copy(content)
    assert isinstance(copied["model"], OrderedDict) and copied["model"]._metadata == content["model"]._metadata
    for name, what in (("a", content), ("b", copied)):
        (tmp_path / name).mkdir()
        save_checkpoint(what, tmp_path / name / "c.pt")
    assert (tmp_path / "a" / "c.pt").read_bytes() == (tmp_path / "b" / "c.pt").read_bytes()


def test_what_changes_after_a_snapshot_does_not_reach_it():
    content, step = trained_states()
    before, again = host_copy(content()), host_copy(content())
    step()
    assert not torch.equal(before["model"]["0.weight"], content()["model"]["0.weight"])
    assert not torch.equal(before["opt"]["state"][0]["exp_avg"], content()["opt"]["state"][0]["exp_avg"])
    assert_equal(before["model"], again["model"])
    assert_equal(before["opt"]["state"], again["opt"]["state"])
    nested = {"list": [torch.zeros(2), {"x": torch.zeros(2)}]}
    copied = host_copy(nested)
    nested["list"][0].fill_(1)
    nested["list"][1]["x"].fill_(1)
    assert copied["list"][0].sum() == copied["list"][1]["x"].sum() == 0
    shared = torch.zeros(2, requires_grad=True)
    assert not host_copy([shared])[0].requires_grad and host_copy(shared).data_ptr() != shared.data_ptr()


def test_a_plot_that_the_writer_begins_is_waited_for_at_the_end():
    plotting, begun, drawn = Plotting(), Event(), Event()
    Thread(target=lambda: (plotting.begin(drawn.wait, 60), begun.set()), daemon=True).start()
    assert begun.wait(60) and not plotting.thread.daemon
    drawn.set()
    plotting.end()


def test_files_come_in_the_order_in_which_they_were_given(writer, gate, tmp_path):
    for i, kind in enumerate(["snapshots", "checkpoints", "others"]):
        writer.give(kind, tmp_path / kind / f"{i}.pt", {"i": i}, 0.25, then=lambda i=i: gate.written.append(i))
    assert gate.begun.wait(60) and gate.written == [] and not list(tmp_path.glob("*/*.pt"))  # nobody waited
    gate.open.set()
    assert writer.wait("others") is True and writer.wait("none of these") is None
    assert gate.written == ["0.pt", 0, "1.pt", 1, "2.pt", 2]
    path = tmp_path / "checkpoints" / "1.pt"
    assert load_checkpoint(path) == {"i": 1}
    assert writer.lines[1].startswith(f"Saved {path} (steps waited 0.25 s, written in 0.0")


def test_a_content_is_forgotten_once_it_is_written(writer, gate, tmp_path):
    tensor = torch.zeros(3)
    kept = weakref.ref(tensor)
    writer.give("checkpoints", tmp_path / "1.pt", {"x": tensor}, 0.0)
    del tensor
    assert gate.begun.wait(60) and kept() is not None
    gate.open.set()
    assert writer.wait("checkpoints") and kept() is None


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("failed writing file\nat 3")])
def test_a_full_disk_is_told_and_passed_over(error, writer, gate, tmp_path):
    done = []
    gate.raised = error
    gate.open.set()
    writer.give("checkpoints", tmp_path / "1.pt", {}, 0.0, then=lambda: done.append(1))
    assert writer.wait("checkpoints") is False and not done
    reason = str(error).splitlines()[0]
    assert writer.lines == [f"ERROR: could not write {tmp_path / '1.pt'}: {reason}; the older checkpoints are untouched"]
    gate.raised = None
    writer.give("checkpoints", tmp_path / "2.pt", {"a": 1}, 0.0)
    assert writer.wait("checkpoints") is True and [path.name for path in tmp_path.iterdir()] == ["2.pt"]


def test_what_nobody_expected_reaches_who_waits(writer, gate, tmp_path):
    gate.raised = ZeroDivisionError("broken on purpose")
    gate.open.set()
    writer.give("checkpoints", tmp_path / "1.pt", {}, 0.0)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        writer.wait("checkpoints")


def test_a_file_that_is_given_up_is_not_there(writer, tmp_path):
    """In its middle, and the next one before it begins."""
    parts, stay = [], writer._stay

    def in_the_middle():
        parts.append(1)
        writer.leaving = len(parts) > 5
        stay()

    writer._stay = in_the_middle
    for name in "12":
        writer.give(name, tmp_path / f"{name}.pt", {str(i): torch.zeros(9) for i in range(9)}, 0.0)
    writer.close()
    assert not list(tmp_path.iterdir()) and not writer.thread.is_alive()
    assert len(writer.lines) == 2 and all("ERROR: could not write" in line for line in writer.lines)


def train(capsys, folder, *more):
    return call(capsys, "train", *SMALL, "--results-dir", folder, *more)


def log_of(folder):
    return next(folder.glob("*/log.txt")).read_text()


def saved(folder):
    return {int(path.stem): load_checkpoint(path) for path in sorted(folder.glob("*/checkpoints/*.pt"))}


def test_steps_go_on_and_a_second_save_waits_for_the_first(gate, tmp_path, capsys, monkeypatch):
    """The first write is held until step 3 is done, of which its file shows nothing; step 4's save waits for it."""
    from training.monitor import Monitor
    from training.trainer import Trainer

    straight = tmp_path / "straight"
    gate.open.set()
    assert train(capsys, straight, "--max-steps", 5).code == 0
    gate.open.clear()
    gate.begun.clear()
    gate.written.clear()
    seen, take_step, save, content = [], Trainer.take_step, Monitor.save, Trainer.content

    def steps(self, *batch):
        seen.append((self.step, list(gate.written)))
        return take_step(self, *batch)

    def saves(self, trainer):
        if trainer.step == 4:
            assert gate.begun.wait(60)
            self.saving.writer.wait, wait = lambda kind: (gate.open.set(), wait(kind))[1], self.saving.writer.wait
        save(self, trainer)

    def copies(self):
        assert self.step != 4 or gate.written == ["0000002.pt"]  # else two contents were in memory
        return content(self)

    monkeypatch.setattr(Trainer, "take_step", steps)
    monkeypatch.setattr(Trainer, "content", copies)
    monkeypatch.setattr(Monitor, "save", saves)
    assert train(capsys, tmp_path / "held", "--max-steps", 5).code == 0
    assert seen[:4] == [(step, []) for step in (1, 2, 3, 4)]  # while the first file was being written
    assert gate.written == ["0000002.pt", "0000004.pt", "0000005.pt"]
    assert_equal(saved(tmp_path / "held"), saved(straight))


def test_a_full_disk_at_the_end_is_the_end_s_error(gate, tmp_path, capsys):
    gate.raised = OSError(28, "No space left on device")
    gate.open.set()
    result = train(capsys, tmp_path, "--max-steps", 4)
    one_line(result, 1, "the last checkpoint, of step 4, could not be written", "log.txt")
    assert log_of(tmp_path).count("ERROR: could not write") == 2 and "Done at step 4" in log_of(tmp_path)


def test_an_exception_of_a_step_leaves_the_file_that_was_being_written_whole(gate, tmp_path, capsys, monkeypatch):
    from training.trainer import Trainer

    take_step = Trainer.take_step

    def breaks(self, *batch):
        if self.step == 3:
            assert gate.begun.wait(60) and not gate.written
            gate.open.set()
            raise ZeroDivisionError("broken on purpose")
        return take_step(self, *batch)

    monkeypatch.setattr(Trainer, "take_step", breaks)
    with pytest.raises(ZeroDivisionError):
        train(capsys, tmp_path, "--max-steps", 4)
    assert list(saved(tmp_path)) == [2]
    *_, before, last = log_of(tmp_path).splitlines()
    assert "/0000002.pt (steps waited" in before and "FAILED: ZeroDivisionError" in last


# A run whose checkpoints take seconds: each of the 1,800 parts of a file waits a little.
SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import train, training.writer
from train_utils import run

save, count = training.writer.save_checkpoint, 0

def slowly(content, path, watch):
    def part():
        time.sleep(0.001)
        watch()
    save(content, path, part)

training.writer.save_checkpoint = slowly
arguments = train.make_parser().parse_args()
run(lambda: train.main(arguments), "train.py")
"""


@pytest.fixture
def slow_run(tmp_path):
    """A process that trains, is amid writing its first checkpoint, and has done a step more."""
    file = tmp_path / "slow.py"
    file.write_text(SLOW.format(root=str(ROOT)))
    argv = [sys.executable, str(file), *map(str, SMALL), "--results-dir", str(tmp_path / "r"), "--log-every", "1"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV)
    try:
        wait_for(lambda: list(tmp_path.glob("r/*/log.txt")) and "(step=0000003)" in log_of(tmp_path / "r"), process)
        assert list(tmp_path.glob("r/*/checkpoints/.0000002.pt.*.tmp"))
        yield process
    finally:
        kill_tree(process)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_a_write_ends_the_run_when_its_last_file_is_whole(number, slow_run, tmp_path):
    slow_run.send_signal(number)
    out, _ = slow_run.communicate(timeout=120)
    assert slow_run.returncode == 128 + number, out
    steps = list(saved(tmp_path / "r"))
    assert steps[0] == 2 and len(steps) == 2 and f"Stopped by signal {int(number)} at step {steps[1]}" in out
    assert all(f"/{step:07d}.pt (steps waited" in log_of(tmp_path / "r") for step in steps)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_second_ctrl_c_gives_the_write_up(slow_run, tmp_path):
    slow_run.send_signal(signal.SIGINT)
    time.sleep(0.3)
    slow_run.send_signal(signal.SIGINT)
    started = time.time()
    out, _ = slow_run.communicate(timeout=120)
    assert slow_run.returncode == 128 + signal.SIGINT and "interrupted" in out and "Traceback" not in out, out
    assert time.time() - started < 20
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.tmp"))
    assert "FAILED: KeyboardInterrupt" in log_of(tmp_path / "r").splitlines()[-1]


KILLS = 20
STEPS = 70


@pytest.mark.slow
def test_twenty_kills_during_writes(tmp_path):
    """Files of 100 MB, for their many averages: after each SIGKILL amid one, those that were whole still are, with all
    snapshots until there; the last run ends as one that nobody disturbed, bit for bit."""
    decays, rng, hits, cut = [0.9 + i / 1000 for i in range(9)], random.Random(0), 0, []
    flags = [*SMALL, "--keep-last", 3, "--max-steps", STEPS, "--ema-decay", *decays, "--ema-power", 0.1, "--resume"]
    files = lambda name="killed", kind="checkpoints": sorted(tmp_path.glob(f"{name}/*/{kind}/*.pt"))  # noqa: E731
    with forks(tmp_path / "said.txt") as begin:
        while hits < KILLS:
            before, victim = files(), begin(*flags, "--results-dir", tmp_path / "killed")
            writing = lambda pid=victim.pid: list(tmp_path.glob(f"killed/*/checkpoints/.*.{pid}.tmp"))  # noqa: E731
            try:
                if rng.random() < 0.6:
                    wait_for(lambda before=before: files() != before, victim)
                wait_for(writing, victim)
                time.sleep(0.4 * rng.random() ** 2)
                before = files()
            finally:
                kill_tree(victim)
            hits += len(writing())
            cut += [path.stat().st_size for path in writing()]
            assert {*files()} >= {*sorted({*before, *files()})[-3:]}, "one was lost"
            for path in files():
                step = load_checkpoint(path)["step"]
                assert step == int(path.stem)
                assert {*range(2, step + 1, 2)} <= {int(snapshot.stem) for snapshot in files(kind="snapshots")}
    assert len({*cut}) > KILLS / 4, cut  # at different moments
    for name in ("killed", "straight"):
        done = launch("train", *flags, "--results-dir", tmp_path / name)
        assert done.code == 0, done.err
    for kind in ("checkpoints", "snapshots"):
        ours, theirs = files("killed", kind), files("straight", kind)
        assert [path.name for path in ours] == [path.name for path in theirs] and theirs[-1].stem == f"{STEPS:07d}"
        for one, other in zip(ours[-3:], theirs[-3:]):
            assert_equal(load_checkpoint(one), load_checkpoint(other))
    assert not list(tmp_path.rglob("*.tmp"))
    print(f"cut at {sorted(cut)}")
