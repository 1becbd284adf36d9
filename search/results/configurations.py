"""The configurations of a study, each a mean over its seeds, and which of them are on the front.

Trials of one configuration differ in nothing but the seed, so together they say more about it than the best of them:
a configuration's point is the mean of its COMPLETE trials, and its certified accuracy is an interval whose ends are the
means of their ends. With one seed the point is the trial's. The front and the hypervolume count from the lower ends.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from search.pareto import certain_front, front, hypervolume, hypervolume_bounds, hypervolume_trace, possible_front
from search.studies.records import OBJECTIVES, StudyRecord, TrialRecord


class Configuration(NamedTuple):
    """One point of a study; accuracies are means over its trials, fractions of the validation images."""

    trials: tuple[TrialRecord, ...]  # COMPLETE, one for each seed, by number
    standard_accuracy: float
    certified_accuracy: float  # lower end
    certified_upper: float

    @property
    def number(self) -> int:
        """The number of its first trial, by which figures call it."""
        return self.trials[0].number

    @property
    def num_seeds(self) -> int:
        return len(self.trials)

    @property
    def objectives(self) -> tuple[float, float]:
        """(standard accuracy, lower end of certified accuracy)."""
        return self.standard_accuracy, self.certified_accuracy

    @property
    def standard_range(self) -> tuple[float, float]:
        """Lowest and highest standard accuracy of its seeds."""
        if self.num_seeds == 1:
            return self.standard_accuracy, self.standard_accuracy
        return _extremes(trial.standard_accuracy for trial in self.trials)

    @property
    def certified_range(self) -> tuple[float, float]:
        """Lowest and highest lower end of its seeds."""
        if self.num_seeds == 1:
            return self.certified_accuracy, self.certified_accuracy
        return _extremes(trial.certified_accuracy for trial in self.trials)


@dataclass(frozen=True)
class Front:
    """The configurations of a study, and what is known of the front whatever the undecided images turn out to be."""

    study: StudyRecord
    configurations: tuple[Configuration, ...]  # by number
    members: tuple[Configuration, ...]  # on the front of the lower ends, by number
    doubtful: frozenset[int]  # numbers of members that undecided images of others could push off the front
    possible: tuple[Configuration, ...]  # no members, but their undecided images could bring them there, by number
    hypervolume_bounds: tuple[float, float]
    repeated: tuple[Configuration, ...]  # those with several seeds, by number


def study_front(study: StudyRecord) -> Front:
    """The front of a study.

    Raises:
        ValueError: a result is NaN or infinite; the text names the trial.
    """
    found = configurations(study)
    ends = np.array([each[1:] for each in found]).reshape(len(found), 3)
    lower, upper = ends[:, [0, 1]], ends[:, [0, 2]]
    low, high = as_compared(lower), as_compared(upper)
    members, certain = front(low), set(certain_front(low, high).tolist())
    possible = np.setdiff1d(possible_front(low, high), members)
    return Front(
        study,
        found,
        tuple(found[index] for index in members),
        frozenset(found[index].number for index in members.tolist() if index not in certain),
        tuple(found[index] for index in possible),
        hypervolume_bounds(lower, upper, study.reference),
        tuple(each for each in found if each.num_seeds > 1),
    )


def as_compared(points: ArrayLike) -> NDArray[np.float64]:
    """Accuracies as the front compares them: equal means may differ in their last digit, which pushes nobody off it."""
    return np.asarray(points, dtype=np.float64).round(9)


def configurations(study: StudyRecord) -> tuple[Configuration, ...]:
    """The configurations with a COMPLETE trial, by the number of the first one.

    Raises:
        ValueError: a result is NaN or infinite; the text names the trial.
    """
    check_finite(study)
    grouped: dict[str, list[TrialRecord]] = defaultdict(list)
    for trial in study.complete:
        grouped[_name(trial)].append(trial)
    return tuple(_configuration(trials) for trials in grouped.values())


def check_finite(study: StudyRecord) -> None:
    """Refuse a study with numbers that would be ranked or drawn wrongly.

    Raises:
        ValueError: a result is NaN or infinite; the text names the trial.
    """
    for trial in study.trials:
        for name in (*OBJECTIVES, "adversarial_accuracy", "certified_upper", "seconds"):
            value = getattr(trial, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"trial {trial.key} has {name} = {value}: a report shows finite results only")


def hypervolume_course(trials: Sequence[TrialRecord], reference: tuple[float, float]) -> NDArray[np.float64]:
    """Hypervolume of the configurations' points after each of these COMPLETE trials, shape [number of trials].

    It never falls while every trial is the first of its configuration; a further seed moves a point, and may lower it.
    Costs O(N log N) for the trials between two further seeds, and as much again for each of those.
    """
    seeds: dict[str, list[TrialRecord]] = defaultdict(list)
    rows: dict[str, int] = {}
    points = np.empty((len(trials), 2))  # one row for each configuration so far
    course = np.empty(len(trials))
    base, first_row, begin = points[:0], 0, 0  # the front at the last further seed, and what came after it
    for index, trial in enumerate(trials):
        name = _name(trial)
        seeds[name].append(trial)
        row = rows.setdefault(name, len(rows))
        if len(seeds[name]) > 1:
            course[begin:index] = _continued(base, points[first_row : len(rows)], reference)
            points[row] = _configuration(seeds[name]).objectives
            base = points[: len(rows)][front(points[: len(rows)])]
            course[index] = hypervolume(base, reference)
            first_row, begin = len(rows), index + 1
        else:
            points[row] = trial.objectives
    course[begin:] = _continued(base, points[first_row : len(rows)], reference)
    return course


def _continued(
    base: NDArray[np.float64], further: NDArray[np.float64], reference: tuple[float, float]
) -> NDArray[np.float64]:
    return hypervolume_trace(np.concatenate([base, further]), reference)[len(base) :]


def _name(trial: TrialRecord) -> str:
    """What trials of one configuration share; a trial without a stored hash stands alone."""
    return trial.configuration or trial.key


def _configuration(trials: Sequence[TrialRecord]) -> Configuration:
    """The mean of these trials; of those with one seed, which are one measurement, the best known one counts."""
    if len(trials) == 1:
        return Configuration((trials[0],), *_ends(trials[0]))
    by_seed: dict[int, TrialRecord] = {}
    for trial in sorted(trials, key=open_share):
        by_seed.setdefault(trial.seed, trial)
    kept = sorted(by_seed.values(), key=lambda trial: trial.number)
    # math.fsum rounds once, so a mean of lower ends is never above that of the upper ends.
    standard, lower, upper = (math.fsum(part) / len(kept) for part in zip(*map(_ends, kept), strict=True))
    return Configuration(tuple(kept), standard, lower, upper)


def _ends(trial: TrialRecord) -> tuple[float, float, float]:
    """Standard accuracy and both ends of the certified accuracy of a COMPLETE trial."""
    assert trial.standard_accuracy is not None
    assert trial.certified_accuracy is not None
    lower, upper = trial.certified_accuracy, trial.certified_upper
    return trial.standard_accuracy, lower, lower if upper is None else max(lower, upper)


def open_share(trial: TrialRecord) -> float:
    """The share of images that verification left undecided, 0 for a trial without results."""
    if trial.certified_accuracy is None or trial.certified_upper is None:
        return 0.0
    return max(trial.certified_upper - trial.certified_accuracy, 0.0)


def _extremes(values: Iterable[float | None]) -> tuple[float, float]:
    known = [value for value in values if value is not None]
    return min(known), max(known)
