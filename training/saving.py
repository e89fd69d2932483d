"""Checkpoints, and snapshots of averages, of a run: copied at once, written behind the steps."""

import time
from functools import partial

from common.sharded import write_sharded

from .writer import Writer


class Saving:
    """What of a run goes to disk in the form that --ckpt-format says: one file, which the main process writes, or a folder
    that all of them write. saved() is called on the main process, in the writer's thread, after each checkpoint."""

    def __init__(self, run, log, saved):
        self.run, self.saved, self.writer = run, saved, Writer(log)
        self.sharded, self.group = run.flags.ckpt_format == "sharded", None

    def begin(self):
        """Before the first step; every process must call it."""
        if self.sharded:
            self.group = self.run.world.another_group()

    def checkpoint(self, trainer):
        """Have a checkpoint written. Every process must call it."""
        path = self.run.folder.checkpoint_path(trainer.step, "" if self.sharded else ".pt")
        self._write("checkpoints", path, trainer.content, trainer, self.sharded)

    def snapshot(self, trainer):
        """Have the averages by a power of time written, if they are not there: then they are the same already. Every process
        must call it."""
        path = self.run.folder.snapshot_path(trainer.step)
        if not self.run.world.broadcast(path.exists()):
            self._write("snapshots", path, trainer.snapshot, trainer)

    def _write(self, kind, path, content, trainer, sharded=False):
        """Copy content() as it is now, once the last of its kind is written, and hand it to the writer."""
        started, is_main = time.time(), self.run.world.is_main
        self.writer.wait(kind)
        copied = trainer.on_host(content(), sharded)
        if sharded or is_main:
            then = self.saved if is_main and kind == "checkpoints" else lambda: None
            write = partial(write_sharded, group=self.group) if sharded else None
            self.writer.give(kind, path, copied, time.time() - started, then, write)

    def done(self):
        """Wait until all is written; returns whether the last checkpoint is there, or None before one. Every process must call
        it."""
        self.writer.wait("snapshots")
        return self.run.world.broadcast(self.writer.wait("checkpoints"))

    def close(self, at_once=False):
        """Wait for all files, or give those up that are not written yet."""
        self.writer.close(at_once)
