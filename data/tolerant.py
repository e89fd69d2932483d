"""Unreadable images: passed over, named once, and the end of a run when they are many."""

from torch.utils.data import Dataset

from common.errors import UserError
from common.pixels import are_many


class Tolerant(Dataset):
    """A data set whose unreadable images are replaced by the next readable one: (image, label, index that was read)."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        for tried in range(100):
            read = (index + tried) % len(self)
            try:
                return *self.dataset[read], read
            except UserError:
                continue
        raise UserError(f"100 images in a row cannot be read, the first is {self.dataset.name(index)}")


class DataGuard:
    """Warns once of each unreadable image, and stops when more than 1 % of the data, and more than three, are."""

    def __init__(self, dataset, warn):
        self.dataset, self.warn, self.bad = dataset, warn, set()

    def check(self, asked, read):
        """asked: indices of the batch; read: those that Tolerant gave instead (N,)."""
        for index, got in zip(asked, read.tolist()):
            if got != index and index not in self.bad:
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
        if are_many(len(self.bad), len(self.dataset)):
            raise UserError(
                f"{len(self.bad)} of {len(self.dataset)} images cannot be read, more than 1 % and more than 3; "
                f"one is {self.dataset.name(index)}"
            )
