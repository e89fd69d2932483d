"""Reading ahead: the processes that load batches, and their end."""

import signal
from contextlib import contextmanager

from torch.utils.data import DataLoader

from common.signals import ignore_stop_signals

from .tolerant import Tolerant


@contextmanager
def read_ahead(dataset, batches, num_workers, device):
    """Yields an iterator over (images, labels, indices that were read) of a data set, a batch for each list of indices in
    batches, read by num_workers processes, which end with the block however it ends.

    They leave signals to their parent, so that torch's own farewell, a SIGTERM that it waits upon, would never end one
    that did not hear of the end because the parent failed: they are killed. Of that torch's handler of SIGCHLD, which
    raises when a loading process dies, must not hear.
    """
    loader = DataLoader(
        Tolerant(dataset),
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_stop_signals,
        prefetch_factor=4 if num_workers else None,
    )
    iterator = iter(loader)
    try:
        yield iterator
    finally:
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        workers = getattr(iterator, "_workers", ())
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()
        signal.signal(signal.SIGCHLD, handler)
