"""Threads that wait for each other, beside other busy processes.

OpenMP's threads spin while they wait, which is fastest on a machine of their own. Beside a busy process, though, a thread
that spins keeps the one it waits for off its core: a step of a small network takes ten times as long. GNU's OpenMP, which is
PyTorch's on Linux, lets threads sleep almost at once while the process has more of them than cores (do_spin of libgomp's
wait.h). So for as long as others want the cores, a second team of threads is kept, which does nothing but count. It changes
how threads wait, and no number.
"""

import atexit
import os
import sys
import threading
import time

SECONDS = 1.0  # between looks
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # a user who has set one of these has decided


def cpu_seconds(cores):
    """CPU seconds used so far: (of these cores of the machine, of this process)."""
    ticks, names = 0, {f"cpu{core}" for core in cores}
    with open("/proc/stat") as file:
        for line in file:
            name, *numbers = line.split()
            if name in names:
                user, nice, system, _idle, _iowait, irq, softirq = map(int, numbers[:7])
                ticks += user + nice + system + irq + softirq
    own = os.times()
    return ticks / os.sysconf("SC_CLK_TCK"), own.user + own.system


def are_shared(before, after, seconds, cores):
    """Whether the cores were all in use, by others too, between two results of cpu_seconds()."""
    machine, own = (b - a for a, b in zip(before, after, strict=True))
    return machine > 0.9 * cores * seconds and machine - own > 0.25 * seconds


class Team:
    """OpenMP threads of which nothing is asked, from hold() to release()."""

    def __init__(self):
        self._leave, self._thread, self._closed, self._lock = None, None, False, threading.Lock()

    def hold(self):
        with self._lock:
            if self._leave is None and not self._closed:
                self._leave = threading.Event()
                self._thread = threading.Thread(target=self._stay, args=(self._leave,), daemon=True, name="team")
                self._thread.start()

    def release(self):
        if self._leave is not None:
            self._leave.set()
            self._leave = None

    def close(self):
        """For good, at the interpreter's end: a thread that it kills inside of PyTorch takes the process down with it."""
        with self._lock:
            self._closed = True
        self.release()
        if self._thread is not None:
            self._thread.join(timeout=10)

    @staticmethod
    def _stay(leave):
        import torch

        torch.ones(1 << 18).add_(1)  # large enough for each thread of a team, which lives as long as the thread it is made by
        leave.wait()


def _watch():
    team, cores = Team(), os.sched_getaffinity(0)  # those that a cluster or a container gave
    atexit.register(team.close)
    before, since = cpu_seconds(cores), time.monotonic()
    while True:
        time.sleep(SECONDS)
        after, now = cpu_seconds(cores), time.monotonic()
        if "torch" in sys.modules and are_shared(before, after, now - since, len(cores)):
            team.hold()
        else:
            team.release()
        before, since = after, now


def share_cores():
    """From now on this process's threads yield to busy others. Does nothing where that cannot be seen: outside of Linux."""
    watched = any(thread.name == "cores" for thread in threading.enumerate())
    if os.path.exists("/proc/stat") and not watched and not any(name in os.environ for name in VARIABLES):
        threading.Thread(target=_watch, daemon=True, name="cores").start()
