"""Results of a study's trials as arrays: what the rules of `stopping` and `resumption` compare.

Legend: N trials that a call is about, ascending by number; an objective pair is (standard, certified) accuracy.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from search.studies.records import TrialRecord

# Guards look at so many finished trials, the latest: their pairs cost the square of it, and a sampler that has moved
# on makes old trials bad witnesses.
WITNESSES = 256
_ABSENT = math.nan  # no record may hold it, so it marks what a trial does not have


class Boxes(NamedTuple):
    """COMPLETE trials: they are known to lie in [worst, best] in both objectives."""

    numbers: NDArray[np.intp]  # shape [N]
    worst: NDArray[np.float64]  # shape [N, 2]
    best: NDArray[np.float64]  # shape [N, 2]


class Witnesses(NamedTuple):
    """COMPLETE trials that have passed a rung: what it promised, and what came of it."""

    rung: NDArray[np.float64]  # shape [N, 2]
    worst: NDArray[np.float64]  # shape [N, 2]
    best: NDArray[np.float64]  # shape [N, 2]
    final: NDArray[np.float64]  # shape [N, 2], certified accuracy absent (NaN) where the verification was stopped


class Standings:
    """Arrays over all trials of a study, which follow its records at the cost of those that changed.

    Nothing here is state: made anew from the same records, in whatever order, it answers the same.
    """

    def __init__(self, trials: Sequence[TrialRecord] = ()) -> None:
        self._seen: Sequence[TrialRecord] = ()
        self._records: dict[int, TrialRecord] = {}
        self._numbers: dict[str, int] = {}  # by key
        self._runs: dict[str, set[int]] = {}  # by configuration
        self._ends = np.full((0, 3, 2), _ABSENT)  # by number: worst, best, final
        self._rungs: dict[str, NDArray[np.float64]] = {}  # by name, then number
        self._complete: Boxes | None = None  # until a trial changes
        self.update(trials)

    def update(self, trials: Sequence[TrialRecord]) -> None:
        """Follow the records; those that are the very object of the last time are taken as unchanged.

        Raises:
            ValueError: a record holds a number that is not finite.
        """
        if trials is self._seen:
            return
        known = len(self._seen)
        changed = [new for old, new in zip(self._seen, trials, strict=False) if old is not new]
        for record in (*changed, *trials[known:]):
            self._follow(record)
        self._seen = trials if isinstance(trials, tuple) else list(trials)  # a list may change

    def number_of(self, key: str) -> int | None:
        """The number of the trial with that key, if there is one."""
        return self._numbers.get(key)

    def record(self, number: int) -> TrialRecord:
        return self._records[number]

    def runs(self, configuration: str) -> list[TrialRecord]:
        """The trials of a configuration with whatever seed, ascending, without FAILED ones."""
        return [self._records[number] for number in sorted(self._runs.get(configuration, ()))]

    def complete(self) -> Boxes:
        """All COMPLETE trials, also those whose verification was stopped: what they have proved stands."""
        if self._complete is None:
            numbers = _present(self._ends[:, 0])
            self._complete = Boxes(numbers, self._ends[numbers, 0], self._ends[numbers, 1])
        return self._complete

    def at_rung(self, rung: str) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Numbers, shape [N], and values, shape [N, 2], of all trials but FAILED ones that have reached a rung."""
        values = self._rungs.get(rung, np.empty((0, 2)))
        numbers = _present(values)
        return numbers, values[numbers]

    def witnesses(self, rung: str) -> Witnesses:
        """The latest COMPLETE trials with values at a rung."""
        numbers, values = self.at_rung(rung)
        latest = np.flatnonzero(~np.isnan(self._ends[numbers, 0, 0]))[-WITNESSES:]
        worst, best, final = self._ends[numbers[latest]].transpose(1, 0, 2)
        return Witnesses(values[latest], worst, best, final)

    def _follow(self, record: TrialRecord) -> None:
        number, self._complete = record.number, None
        ends, rungs = _ends(record), {} if record.state == "FAILED" else _rungs(record)
        self._records[number] = record
        self._numbers[record.key] = number
        runs = self._runs.setdefault(record.configuration, set())
        (runs.discard if record.state == "FAILED" else runs.add)(number)
        self._ends = _grown(self._ends, number)
        self._ends[number] = _ABSENT if ends is None else ends
        for name in self._rungs.keys() | rungs.keys():
            values = _grown(self._rungs.get(name, np.full((0, 2), _ABSENT)), number)
            values[number] = rungs.get(name, _ABSENT)
            self._rungs[name] = values


def _ends(record: TrialRecord) -> tuple[tuple[float, float], ...] | None:
    """Worst corner, best corner and result of a COMPLETE trial."""
    if record.objectives is None:
        return None
    standard, lower = record.objectives
    upper = lower if record.certified_upper is None else record.certified_upper
    _check_finite(record, "its result", (standard, lower, upper))
    final = _ABSENT if record.verification_state == "stopped" else lower
    return (standard, lower), (standard, upper), (standard, final)


def _rungs(record: TrialRecord) -> dict[str, tuple[float, float]]:
    for name, values in record.rungs.items():
        _check_finite(record, f"rung {name}", (values.standard_accuracy, values.certified_accuracy))
    return {name: (values.standard_accuracy, values.certified_accuracy) for name, values in record.rungs.items()}


def _check_finite(record: TrialRecord, what: str, values: Sequence[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise ValueError(f"trial {record.key}: {what} holds {list(values)}; only finite numbers can be compared")


def _present(values: NDArray[np.float64]) -> NDArray[np.intp]:
    return np.flatnonzero(~np.isnan(values[:, 0]))


def _grown(values: NDArray[np.float64], number: int) -> NDArray[np.float64]:
    """The array with room for a trial of that number: doubled, so that growth costs nothing in the mean."""
    if number < len(values):
        return values
    grown = np.full((max(16, 2 * number), *values.shape[1:]), _ABSENT)
    grown[: len(values)] = values
    return grown
