"""Checkpoints on their way to disk: a thread of its own writes them, while the steps go on."""

import time
from concurrent.futures import Future
from copy import copy, deepcopy
from functools import partial
from queue import SimpleQueue
from threading import Thread

import torch

from common.checkpoint import save_checkpoint

PATIENCE = 5  # seconds for a file to be given up


def snapshot(content):
    """A copy in host memory of nested dicts, lists and tensors, which the steps to come do not change."""
    if isinstance(content, torch.Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        copied = copy(content)  # with what a state dict says of its modules beside the tensors
        copied.update((key, snapshot(value)) for key, value in content.items())
        return copied
    if type(content) in (list, tuple):
        return type(content)(snapshot(value) for value in content)
    return deepcopy(content)


class Writer:
    """Writes contents to files, one after another in the order in which they are given.

    Of each kind ("checkpoints" are one) a single content is kept in memory: who has another one waits for the last.
    """

    def __init__(self, log):
        self.log, self.jobs, self.last, self.thread, self.leaving = log, SimpleQueue(), {}, None, False

    def give(self, kind, path, content, waited, then=lambda: None):
        """Have content written to path, and then() called in the thread. waited: seconds of the steps, for the log."""
        if self.thread is None:
            # A daemon: no disk that has stopped answering may keep the process from its end.
            self.thread = Thread(target=self._work, name="writer", daemon=True)
            self.thread.start()
        self.last[kind] = Future()
        self.jobs.put((self.last[kind], partial(self._write, kind, path, content, waited, then)))

    def wait(self, kind):
        """Wait for the last content of a kind; returns whether its file is there, None without any. Raises what broke."""
        return self.last[kind].result() if kind in self.last else None

    def close(self, at_once=False):
        """Wait for all files, or give up those that are not written yet, as a KeyboardInterrupt in the wait does."""
        if self.thread is None:
            return
        self.jobs.put(None)
        try:
            if not at_once:
                self.thread.join()
        finally:
            # An interpreter that ends amid torch's writing would abort, so the thread is to leave that first.
            self.leaving = True
            self.thread.join(PATIENCE)

    def _work(self):
        while job := self.jobs.get():
            done, write = job
            try:
                tell = partial(done.set_result, write())
            except BaseException as error:  # for who waits
                tell = partial(done.set_exception, error)
            del job, write  # the content's memory, before another content is copied
            tell()

    def _write(self, kind, path, content, waited, then):
        started = time.time()
        try:
            path.parent.mkdir(exist_ok=True)
            save_checkpoint(content, path, self._stay)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError when its writer meets a full disk
            self.log(f"ERROR: could not write {path}: {str(error).splitlines()[0]}; the older {kind} are untouched")
            return False
        self.log(f"Saved {path} (steps waited {waited:.2f} s, written in {time.time() - started:.2f} s)")
        then()
        return True

    def _stay(self):
        if self.leaving:
            raise OSError("interrupted")
