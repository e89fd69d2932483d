"""Threads that yield to busy others."""

import os
import subprocess
import sys
import threading
import time

import pytest

from cli import ENV, ROOT
from common.cores import VARIABLES, Team, are_shared, cpu_seconds, share_cores

REGIONS = """
import sys, time
import torch
from common.cores import share_cores
if sys.argv[1] == "shared":
    share_cores()
x = torch.ones(1 << 18)
def rate(seconds):
    until, count = time.time() + seconds, 0
    while time.time() < until:
        x.add_(1)
        count += 1
    return count / seconds
rate(3.5)  # long enough for the others to be noticed
print(rate(3))
"""


def regions(how):
    """Parallel regions a second of a process with a thread a core, which yields ("shared") or not."""
    env = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "OMP_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", REGIONS, how], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def threads(name):
    return sum(thread.name == name for thread in threading.enumerate())


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/stat") or (os.cpu_count() or 1) < 2, reason="one core, or not Linux")
@pytest.mark.alone
def test_threads_yield_to_a_busy_process_and_lose_nothing_alone():
    alone = regions("shared") / regions("alone")
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        beside = regions("shared") / regions("alone")
    finally:
        busy.kill()
    print(f"alone {alone:.2f}, beside a busy process {beside:.2f} times as fast")
    assert beside > 1.5 and alone > 0.6


@pytest.mark.parametrize(
    "machine, own, shared",
    [
        (2.0, 2.0, False),  # two cores for a second, all ours
        (2.0, 1.0, True),
        (1.2, 0.1, False),  # others, and cores left
        (1.95, 1.85, False),  # a loader's process, say
        (0.0, 0.0, False),
    ],
)
def test_cores_are_shared_when_they_are_all_in_use_by_others_too(machine, own, shared):
    assert are_shared((100.0, 10.0), (100.0 + machine, 10.0 + own), 1.0, 2) == shared


def test_cpu_seconds_are_those_of_the_cores_that_were_given():
    own = os.sched_getaffinity(0)
    (of_all, mine), (of_one, _), (of_none, _) = (cpu_seconds(cores) for cores in (own, {min(own)}, set()))
    assert of_all >= of_one > 0 == of_none and mine > 0


def test_a_team_is_one_thread_until_it_is_released():
    team = Team()
    team.release()
    team.hold()
    team.hold()
    assert threads("team") == 1
    team.release()
    until = time.time() + 10
    while threads("team") and time.time() < until:
        time.sleep(0.01)
    assert threads("team") == 0


def test_who_has_set_how_threads_wait_has_decided(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    share_cores()
    assert threads("cores") == 0


def test_a_process_that_ends_at_once_ends_as_it_wants():
    """Also while the second team is being made: PyTorch's threads must not be killed in the middle of it."""
    code = (
        "import sys; from common import cores; cores.SECONDS = 0.01; cores.are_shared = lambda *a: True; cores.share_cores()\n"
        "import time, torch; time.sleep({}); sys.exit(3)"
    )
    env = {key: value for key, value in ENV.items() if key not in VARIABLES and key != "OMP_NUM_THREADS"}
    for wait in (0.0, 0.005, 0.01, 0.015, 0.02, 0.03):
        done = subprocess.run([sys.executable, "-c", code.format(wait)], capture_output=True, text=True, env=env)
        assert (done.returncode, done.stderr) == (3, "")
