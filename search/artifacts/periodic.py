"""An action repeated in the background for the time of a context."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def repeated(action: Callable[[], None], interval_s: float) -> Iterator[None]:
    """Call the action at once, then every interval, and once more when the context ends.

    A call that raises is dropped: the storage behind it may be away for a moment, and the next call tries again.
    """
    ended = threading.Event()

    def attempt() -> None:
        with suppress(Exception):
            action()

    def repeat() -> None:
        attempt()
        while not ended.wait(interval_s):
            attempt()
        attempt()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
