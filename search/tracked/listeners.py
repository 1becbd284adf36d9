"""Several listeners of a search as one."""

from collections.abc import Sequence

from search.searcher import Listener
from search.studies.records import TrialResult


class Listeners:
    """Tells each of them, in their order."""

    def __init__(self, each: Sequence[Listener]) -> None:
        self._each = tuple(each)

    def started(self, key: str) -> None:
        for listener in self._each:
            listener.started(key)

    def lost(self, key: str, reason: str, *, goes_on: bool = True) -> None:
        for listener in self._each:
            listener.lost(key, reason, goes_on=goes_on)

    def advanced(self, key: str, phase: str, done: int, of: int) -> None:
        for listener in self._each:
            listener.advanced(key, phase, done, of)

    def finished(self, key: str, result: TrialResult) -> None:
        for listener in self._each:
            listener.finished(key, result)

    def stopped(self, key: str, reason: str) -> None:
        for listener in self._each:
            listener.stopped(key, reason)

    def failed(self, key: str, reason: str) -> None:
        for listener in self._each:
            listener.failed(key, reason)
