"""Signals that end a run at the next step."""

import signal


class Stop:
    """Ends a run at the next step on SIGINT, SIGTERM, SIGHUP or SIGUSR1; a second SIGINT ends it at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self):
        self.received = 0
        for number in self.SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = self.received or number


def ignore_stop_signals(worker_id):
    """In a data loading process: Ctrl-C reaches it too, but the training process decides when the end is."""
    for number in Stop.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
