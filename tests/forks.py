"""Runs of train.py by forks of a process that has imported all they need: to be killed often, without a start each time.

As a script it is that process: a line of JSON, the flags, gets it to run them and to say the number of the process, and then
how it ended.
"""

import json
import os
import select
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path


class Run:
    """As much of Popen as a test needs."""

    def __init__(self, server):
        self.server, self.pid, self.returncode = server, int(server.stdout.readline()), None

    def poll(self):
        if self.returncode is None and select.select([self.server.stdout], [], [], 0)[0]:
            self.returncode = int(self.server.stdout.readline())
        return self.returncode

    def wait(self):
        while self.poll() is None:
            select.select([self.server.stdout], [], [])


@contextmanager
def forks(log):
    """start(*flags) -> Run, one at a time; what they say goes to the file log."""
    from cli import ENV

    with open(log, "w") as file:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file)
        server = subprocess.Popen([sys.executable, __file__], **pipes, bufsize=0, env=ENV)

    def start(*flags):
        server.stdin.write(json.dumps(list(map(str, flags))).encode() + b"\n")
        return Run(server)

    try:
        yield start
    finally:
        server.kill()
        server.wait()


def serve():
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import train
    from train_utils import run

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        if not (pid := os.fork()):
            os.setsid()
            flags = train.make_parser().parse_args(json.loads(line))
            run(partial(train.main, flags), "train.py")
        print(pid, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    serve()
