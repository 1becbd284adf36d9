"""Waiting for what is away for a while: a database that is restarted, a file system that does not answer."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Patience:
    """How long something may be away, and how often it is tried meanwhile."""

    limit_s: float = 300.0
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0

    def attempts(self) -> Iterator[float]:
        """Yields at once, and then after longer and longer pauses until the time is over: seconds so far."""
        began, pause = time.monotonic(), self.first_pause_s
        while (waited := time.monotonic() - began) < self.limit_s:
            yield waited
            time.sleep(pause)
            pause = min(2 * pause, self.longest_pause_s)


PATIENCE = Patience()


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end a wait at once, by KeyboardInterrupt: Ray Tune's own handler would only make a note of it."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
