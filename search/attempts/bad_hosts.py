"""Hosts on which one attempt after another died before it had come any further: nothing new starts there for a while.

A node without the study's folder, or with a full scratch disk, ends each attempt within a minute. Then it has a free
place, and the next trial is sent to it: left alone, it would use up the attempts of all trials, one after the other.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from search.attempts.deaths import STORAGE_AWAY, WORKER_FAILED, WORKER_KILLED, Cause, kind

# So many in a row are no accident of a trial.
IN_A_ROW = 3
# Seconds without a start there; after each further death that follows them twice as many, up to the most.
AVOID_S, AVOID_MOST_S = 600.0, 6 * 3600.0
_OF_HOSTS = (STORAGE_AWAY, WORKER_FAILED, WORKER_KILLED)


@dataclass
class _Host:
    deaths: int = 0  # in a row, while something might start there
    until: float = 0.0


class BadHosts:
    """Counts deaths by host; a report of progress from a host clears it.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._hosts: dict[str, _Host] = {}

    def died(self, cause: Cause) -> None:
        """An attempt ended there. Nodes that are lost are gone anyway, and memory is a matter of the trial."""
        if cause.node and kind(cause.reason) in _OF_HOSTS:
            host, now = self._hosts.setdefault(cause.node, _Host()), self._clock()
            if now < host.until:  # what ran there already, and ends by the same event as the ones before
                return
            host.deaths += 1
            if host.deaths >= IN_A_ROW:
                times = host.deaths - IN_A_ROW
                host.until = now + min(AVOID_MOST_S, AVOID_S * 2.0 ** min(times, 32))

    def advanced(self, host: str) -> None:
        """A trial has come further there."""
        self._hosts.pop(host, None)

    def avoided(self) -> frozenset[str]:
        """Where nothing is to start now."""
        now = self._clock()
        return frozenset(name for name, host in self._hosts.items() if now < host.until)
