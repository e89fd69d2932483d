"""Who is drawing at the moment, and a way to stop them: each visitor's work by itself."""

import threading
from contextlib import contextmanager


class Cancelled(Exception):
    """A visitor wants no more of what is being drawn."""


class Work:
    """One visitor's request. check() is called at every network call, and raises Cancelled once stop() was."""

    def __init__(self):
        self._stopped = threading.Event()

    def stop(self):
        self._stopped.set()

    def check(self):
        if self._stopped.is_set():
            raise Cancelled


class Visits:
    """The requests under way, by visitor. One at a time has the network; the others wait for it."""

    def __init__(self):
        self._works, self._lock, self._network = {}, threading.Lock(), threading.Lock()

    @contextmanager
    def work(self, visitor):
        """A Work of this visitor, for a block that has the network to itself. Raises Cancelled where it is stopped before."""
        work = Work()
        with self._lock:
            self._works.setdefault(visitor, []).append(work)
        try:
            with self._network:
                work.check()
                yield work
        finally:
            with self._lock:
                self._works[visitor].remove(work)
                if not self._works[visitor]:
                    del self._works[visitor]

    def stop(self, visitor):
        """Stop all that this visitor has under way; how much that was."""
        with self._lock:
            works = list(self._works.get(visitor, ()))
        for work in works:
            work.stop()
        return len(works)
