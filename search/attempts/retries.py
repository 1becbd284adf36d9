"""Which attempt of a trial runs with which share, and what becomes of a trial whose attempt ended without a result."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Protocol

from search.attempts.deaths import Cause, deaths_text, exhausted, is_of_memory
from search.attempts.shares import Nodes, Share, Shares
from search.recipe import Recipe
from search.studies.records import Death
from search.study import Assignment, Study


class Stored(Protocol):
    """The trials' folders."""

    def stored_at(self, key: str, teacher: str | None) -> float | None:
        """Unix time of the last state that a trial stored, that of the teacher that it trains included."""


@dataclass(frozen=True)
class Attempt:
    """A run of a trial that is on."""

    number: int
    share: Share
    places: float  # of ordinary trials, whose room it takes
    deaths: str  # of those before, in a line
    started: float | None = None  # Unix time; None: it waits in Ray's queue


class Retries:
    """Counts attempts and keeps the account of those that were lost, in the study.

    Args:
        study: keeps what was learned and lost.
        files: tell how far a trial's work was stored.
        teacher_of: the key of the teacher that a trial needs, or None.
        node: as for `Shares`.
        clock: Unix time.
    """

    def __init__(
        self,
        study: Study,
        files: Stored,
        teacher_of: Callable[[Assignment], str | None],
        node: Nodes,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._study, self._files, self._teacher_of, self._clock = study, files, teacher_of, clock
        self._shares = Shares(study.config.resources, study.shares, node, study.store_shares)
        self._left = set(study.unfinished())  # by an earlier driver; how their last attempt ended nobody knows
        self._running: dict[int, Attempt] = {}
        # Tune asks for both after each report, so they follow what begins and ends, and nobody adds up all runs.
        self._load: float | None = 0.0
        self._queued: dict[int, Share] = {}  # those that are not ordinary

    def begin(self, assignment: Assignment) -> Attempt:
        """The run of a trial that starts now."""
        number, share = assignment.number, self._shares.of(self._recipe(assignment), anew=True)
        if number in self._left:
            self._left.remove(number)
            self._study.begin_again(number)
        if share != self._shares.ordinary:
            self._study.note_accelerators(number, share.gpu or share.cpu)
        known = self._study.trials()[number]
        places = self._shares.places(share)
        self._running[number] = Attempt(known.attempt, share, places, deaths_text(known.deaths))
        self._load = None
        if share != self._shares.ordinary:
            self._queued[number] = share
        return self._running[number]

    def started(self, assignment: Assignment) -> None:
        """Its worker has what it needs and begins."""
        self._running[assignment.number] = replace(self._running[assignment.number], started=self._clock())
        self._queued.pop(assignment.number, None)

    def ended(self, assignment: Assignment) -> None:
        """Its run is over, and told."""
        self._running.pop(assignment.number, None)
        self._queued.pop(assignment.number, None)
        self._load = None

    def died(self, assignment: Assignment, cause: Cause, *, on_gpu: bool = False) -> str | None:
        """Note that its run ended without a result; why the trial is not tried again, or None: it is.

        Args:
            on_gpu: of a run that ran out of memory, whether it was the GPU's.
        """
        attempt, now = self._running[assignment.number], self._clock()
        stored = self._files.stored_at(assignment.key, self._teacher_of(assignment))
        start = now if attempt.started is None else attempt.started
        since = max(start, stored or 0.0)
        at = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
        lost = max(0.0, now - since)  # another machine's clock, which dates its files, may be ahead
        death = Death(cause.reason, cause.node, at, attempt.number, lost, advanced=start < (stored or 0.0) <= now)
        self._study.note_death(assignment.number, death)
        lacked = is_of_memory(cause.reason)
        if lacked and (on_gpu or self._shares.knows_a_node):
            larger = self._shares.raise_for(self._recipe(assignment), attempt.share, on_gpu=on_gpu)
            all_of = "a whole GPU" if on_gpu else "nearly all the memory of a node"
            return f"{cause.reason}; it had {all_of}" if larger is None else None
        return exhausted(self._study.trials()[assignment.number].deaths, even_of_memory=lacked)

    def load(self) -> float:
        """In the room of how many ordinary trials all runs are that are on."""
        if self._load is None:
            self._load = sum(attempt.places for attempt in self._running.values())
        return self._load

    def too_large(self) -> set[int]:
        """The trials in Ray's queue for which the node has gone: they would wait for ever."""
        return {number for number, share in self._queued.items() if self._shares.is_too_large(share)}

    def places(self, number: int) -> float:
        """In the room of how many ordinary trials a trial would run."""
        if not self._shares.is_any_raised:
            return 1.0
        return self._shares.places(self._shares.of(self._recipe(self._study.assignment(number))))

    @property
    def has_raised(self) -> bool:
        """Whether some trials need more room than others."""
        return self._shares.is_any_raised

    def _recipe(self, assignment: Assignment) -> Recipe:
        return self._study.space.recipe(assignment.params, assignment.number)
