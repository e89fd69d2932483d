"""Unreadable images: named once, and the end of the work when they are many."""

from .errors import UserError


class DataGuard:
    """Warns once of each unreadable image of a data set, which has len() and name(i), and stops when more than 1 % of the
    data, and more than three, are."""

    def __init__(self, dataset, warn):
        self.dataset, self.warn, self.bad = dataset, warn, set()

    def check(self, asked, read):
        """asked: indices of the batch; read: those that Tolerant gave instead (N,)."""
        for index, got in zip(asked, read.tolist()):
            if got != index:
                self.pass_over(index)

    def pass_over(self, index):
        """Image index cannot be read."""
        if index not in self.bad:
            self.bad.add(index)
            self.warn(f"WARNING: skipped unreadable image {self.dataset.name(index)}")
            self._stop_if_many(index)

    def share(self, world):
        """Add what the other processes found. Every process must call it."""
        found = set().union(*world.gather(self.bad))
        if found - self.bad:
            self.bad = found
            self._stop_if_many(max(found))

    def _stop_if_many(self, index):
        if len(self.bad) > max(3, 0.01 * len(self.dataset)):
            raise UserError(
                f"{len(self.bad)} of {len(self.dataset)} images cannot be read, more than 1 % and more than 3; "
                f"one is {self.dataset.name(index)}"
            )
