"""Tells the study's journal how the search fares: front and hypervolume after each trial, new figures now and then.

A listener of the searcher, in the driver's loop: a call costs a comparison with the front and one line of a file.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, Self

from search.studies.records import StudyRecord, TrialRecord, TrialResult, TrialState
from search.tracked.moving_front import MovingFront
from search.tracked.redrawing import Artifacts, Redrawing
from search.tracked.run_names import ENDS, HYPERVOLUME, study_metrics
from tracking.journal import Journal, StudyRow, read_rows
from tracking.sender import sent_path

log = logging.getLogger(__name__)


class Told(Protocol):
    """A study whose trials are told by somebody else."""

    def trials(self) -> Sequence[TrialRecord]: ...
    def record(self) -> StudyRecord: ...


class FrontLog:
    """Writes a journal that nobody else writes from `with` to its end; what a killed driver left out is added first.

    Args:
        journal: the study's.
        study: told of a trial before this object is.
        redrawing: of the study's files.
        may_write: whether the study is still this driver's.
    """

    def __init__(self, journal: Path, study: Told, redrawing: Redrawing, may_write: Callable[[], bool]) -> None:
        self._path, self._study, self._redrawing, self._may_write = journal, study, redrawing, may_write
        self._drawn: Artifacts | None = None  # of which the journal does not know yet
        self._files_end = 0  # in bytes: where the last row that names files ends
        self._has_failed = False

    def __enter__(self) -> Self:
        before = self._study.record()
        known = _told_steps(self._path)
        self._journal = Journal(self._path)
        self._front = MovingFront(before)
        self._states: dict[str, TrialState] = {}
        self._counts: Counter[TrialState] = Counter()
        ended = [trial for trial in before.trials if trial.state in ENDS]
        for trial in sorted(ended, key=lambda trial: (trial.finished_at or 0.0, trial.number)):
            self._add(trial)
            if trial.state != "FAILED" and self._step not in known:
                self._tell_metrics()
        self._told: frozenset[str] = frozenset()
        self._tell_front()
        if ended:
            self._redrawing.want()
        return self

    def __exit__(self, *exc: object) -> None:
        self._redrawing.close()
        self._journal.close()

    # ---- As a listener ---------------------------------------------------------------------------------------------

    def started(self, key: str) -> None:
        self._safely(self._poll)

    def lost(self, key: str, reason: str, *, goes_on: bool = True) -> None:
        self._safely(self._poll)

    def advanced(self, key: str, phase: str, done: int, of: int) -> None:
        self._safely(self._poll)

    def finished(self, key: str, result: TrialResult) -> None:
        self._safely(lambda: self._ended(key))

    def stopped(self, key: str, reason: str) -> None:
        self._safely(lambda: self._ended(key))

    def failed(self, key: str, reason: str) -> None:
        self._safely(lambda: self._ended(key))

    # ---- What is told ----------------------------------------------------------------------------------------------

    def _ended(self, key: str) -> None:
        self._add(self._study.trials()[int(key.rpartition("-")[2])])
        self._tell_metrics()
        self._tell_front()
        self._redrawing.want()
        self._poll()

    def _add(self, trial: TrialRecord) -> None:
        if trial.key in self._states:  # its verification went on
            self._counts[self._states[trial.key]] -= 1
        self._states[trial.key] = trial.state
        self._counts[trial.state] += 1
        if trial.objectives is not None:
            self._front.add(trial)

    @property
    def _step(self) -> int:
        """Trials that count towards the budget."""
        return self._counts["COMPLETE"] + self._counts["STOPPED"]

    def _tell_metrics(self) -> None:
        metrics = study_metrics(self._front.hypervolume_bounds, self._counts)
        self._journal.study(metrics, {}, {}, step=self._step)

    def _tell_front(self) -> None:
        keys = self._front.keys
        if keys != self._told:
            self._journal.front(keys)
            self._told = keys

    def _poll(self) -> None:
        drawn = self._redrawing.poll(self._study.record)
        if drawn:
            self._drawn = drawn
        # A row that waits for an absent server sends the files as they are when it is back: a second one is no use.
        if self._drawn and self._is_sent() and self._may_write():
            self._journal.study({}, {}, self._drawn)
            self._drawn, self._files_end = None, os.path.getsize(self._path)

    def _is_sent(self) -> bool:
        """Whether tracking has the files that it was told of last."""
        try:
            return int(sent_path(self._path).read_text()) >= self._files_end
        except (FileNotFoundError, ValueError):
            return self._files_end == 0

    def _safely(self, tell: Callable[[], None]) -> None:
        """Do it; tracking must not end a search, whose next command and whose end tell what is missing."""
        try:
            tell()
        except Exception as error:
            if not self._has_failed:
                log.warning("%s is not up to date (%s: %s)", self._path, type(error).__name__, error)
            self._has_failed = True


def _told_steps(journal: Path) -> set[int]:
    """The numbers of finished trials after which the hypervolume was told."""
    rows = (line.row for line in read_rows(journal)[0]) if journal.exists() else ()
    return {row.step for row in rows if isinstance(row, StudyRow) and HYPERVOLUME in row.values}
