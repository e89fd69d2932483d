"""Run the scripts as a user does: in this process for speed, or as real commands and under torchrun."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIGITS = ["--data-path", "builtin:digits", "--image-size", "32", "--num-classes", "10"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


class Result:
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err


def call(capsys, script, *argv):
    """Exit code, stdout and stderr of `python SCRIPT.py ARGV`, run in this process."""
    module = importlib.import_module(script)
    from train_utils import run

    capsys.readouterr()
    try:
        arguments = module.make_parser().parse_args([str(arg) for arg in argv])
        run(lambda: module.main(arguments), f"{script}.py")
    except SystemExit as exit:
        captured = capsys.readouterr()
        return Result(exit.code or 0, captured.out, captured.err)
    raise AssertionError("a script must exit")


def command(script, *argv, processes=1):
    """The command line of a script, under torchrun if there are several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(ROOT / f"{script}.py"), *map(str, argv)]


def launch(script, *argv, processes=1, cwd=None, timeout=300, **env):
    """Exit code, stdout and stderr of the real command."""
    done = subprocess.run(
        command(script, *argv, processes=processes),
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=timeout,
        env={**ENV, **env},
    )
    return Result(done.returncode, done.stdout, done.stderr)


def kill_tree(process):
    """SIGKILL a command and all that it started: torchrun's workers are no children of its process group."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for pid in (process.pid, *map(int, children)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def one_line(result, code, *words):
    """The result is a single clear line: that exit code, no traceback, and every word in it."""
    assert result.code == code, (result.code, result.err)
    assert "Traceback" not in result.err
    lines = [line for line in result.err.splitlines() if ": error: " in line]
    assert len(lines) == 1, result.err
    for word in words:
        assert str(word) in lines[0], (word, lines[0])
