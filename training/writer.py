"""Checkpoints on their way to disk: a thread of its own writes them, while the steps go on."""

import os
import signal
import time
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Thread

from common.checkpoint import save_checkpoint

PATIENCE = 5  # seconds for a file to be given up


class Writer:
    """Writes contents to files, one after another in the order in which they are given.

    Of each kind ("checkpoints" are one) a single content is kept in memory: who has another one waits for the last.
    """

    def __init__(self, log):
        self.log, self.jobs, self.last, self.thread, self.leaving = log, SimpleQueue(), {}, None, False

    def give(self, kind, path, content, waited, then=lambda: None, write=None):
        """Have content written to path, by write(content, path) or as a whole file, and then() called in the thread. waited:
        seconds of the steps, for the log."""
        if self.thread is None:
            # A daemon: no disk that has stopped answering may keep the process from its end.
            self.thread = Thread(target=self._work, name="writer", daemon=True)
            self.thread.start()
        self.last[kind] = Future()
        self.jobs.put((self.last[kind], partial(self._write, kind, path, content, waited, then, write or self._file)))

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
            if at_once and self.thread.is_alive():  # it waits for other processes, which may not be there any more
                os._exit(128 + signal.SIGINT)

    def _work(self):
        while job := self.jobs.get():
            done, write = job
            try:
                tell = partial(done.set_result, write())
            except BaseException as error:  # for who waits
                tell = partial(done.set_exception, error)
            del job, write  # the content's memory, before another content is copied
            tell()

    def _write(self, kind, path, content, waited, then, write):
        started = time.time()
        try:
            write(content, path)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError when its writer meets a full disk
            self.log(f"ERROR: could not write {path}: {str(error).splitlines()[0]}; the older {kind} are untouched")
            return False
        self.log(f"Saved {path} (steps waited {waited:.2f} s, written in {time.time() - started:.2f} s)")
        then()
        return True

    def _file(self, content, path):
        path.parent.mkdir(exist_ok=True)
        save_checkpoint(content, path, self._stay)

    def _stay(self):
        if self.leaving:
            raise OSError("interrupted")
