"""What several runs of one method attained: exact empirical attainment surfaces, and curves over what was spent.

A run attains an accuracy pair (x, y) when one of its points has a standard accuracy of at least x and a certified
accuracy of at least y. The k-th attainment surface is the border of what at least k of R runs attain: at each x it is
the k-th largest, over runs, of the best certified accuracy among points with a standard accuracy of at least x. That is
a staircase, as every run's own front is one, with its corners at points' coordinates; nothing is sampled.

Legend: N points of a run, R runs, B distinct standard accuracies of all points, P corners, T steps of a curve,
Q queries.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from search.pareto import front

Array = NDArray[np.float64]
FEW = 4  # with fewer runs a quarter of them is no run, and a band goes from the best to the worst


@dataclass(frozen=True)
class Attainment:
    """All attainment surfaces of R runs.

    Args:
        standard: shape [B], rising.
        certified: shape [R, B]; row k - 1 is the surface of k runs at those standard accuracies, and stays what it is
            at standard[b] down to standard[b - 1]; -inf where fewer than k runs have points.
    """

    standard: Array
    certified: Array

    @property
    def num_runs(self) -> int:
        return len(self.certified)

    def at(self, standard: ArrayLike, runs: int) -> Array:
        """The largest certified accuracy that at least `runs` runs attain at these standard accuracies, shape [Q]."""
        level = np.append(self._level(runs), -np.inf)
        return np.asarray(level[np.searchsorted(self.standard, np.asarray(standard, dtype=np.float64))])

    def corners(self, runs: int) -> Array:
        """The outer corners of the surface of at least `runs` runs, by rising standard accuracy, shape [P, 2]."""
        level = self._level(runs)
        is_corner = level > np.append(level[1:], -np.inf)
        return np.column_stack([self.standard[is_corner], level[is_corner]])

    def _level(self, runs: int) -> Array:
        if not 1 <= runs <= self.num_runs:
            raise ValueError(f"no surface of {runs} runs: there are {self.num_runs}, expected 1 to {self.num_runs}")
        return np.asarray(self.certified[runs - 1])


def attainment(runs: Sequence[ArrayLike]) -> Attainment:
    """The attainment surfaces of some runs; dominated points change nothing.

    Costs O(M log M + R B log R) for M points in all.

    Args:
        runs: of each run its points (standard, certified), shape [N, 2], larger is better; may be none.

    Raises:
        ValueError: there is no run, or points have another shape or a value that is not finite.
    """
    if not runs:
        raise ValueError("no runs, so nothing is attained; expected the points of at least one")
    fronts = [_rising_front(points) for points in runs]
    standard = np.unique(np.concatenate([points[:, 0] for points in fronts]))
    best = np.stack([_best_certified(points, standard) for points in fronts])
    return Attainment(standard, -np.sort(-best, axis=0))


def median_runs(num_runs: int) -> int:
    """How many runs are at least half of them."""
    return math.ceil(num_runs / 2)


def band_runs(num_runs: int) -> tuple[int, int]:
    """How many runs attain the upper and the lower edge of the band: a quarter, three quarters; of few, one and all."""
    if num_runs < FEW:
        return 1, num_runs
    return math.ceil(num_runs / 4), math.ceil(3 * num_runs / 4)


def _rising_front(points: ArrayLike) -> Array:
    """The front by rising standard, hence falling certified accuracy, shape [N, 2]; checked by `front`."""
    kept = front(points)
    values = np.asarray(points, dtype=np.float64).reshape(-1, 2)[kept]
    return values[np.lexsort((-values[:, 1], values[:, 0]))]


def _best_certified(rising_front: Array, standard: Array) -> Array:
    """Best certified accuracy among points with at least these standard accuracies, shape [B]; -inf without any."""
    heights = np.append(rising_front[:, 1], -np.inf)
    return np.asarray(heights[np.searchsorted(rising_front[:, 0], standard)])


# ---- over what was spent -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """A step curve from (0, 0): the value after each step, and what had been spent by then, both shape [T]."""

    spent: Array  # never falls
    values: Array

    @property
    def total(self) -> float:
        return float(self.spent[-1]) if len(self.spent) else 0.0

    @property
    def final(self) -> float:
        return float(self.values[-1]) if len(self.values) else 0.0

    def at(self, spent: ArrayLike) -> Array:
        """The value when so much had been spent, shape [Q]: that of the last step by then, 0 before the first."""
        values = np.append(0.0, self.values)
        return np.asarray(values[np.searchsorted(self.spent, np.asarray(spent, dtype=np.float64), side="right")])


@dataclass(frozen=True)
class MeanCourse:
    """Mean and band of courses up to what all of them spent: both ends and where something changes, shape [T]."""

    spent: Array
    mean: Array
    low: Array
    high: Array

    def first_to_reach(self, value: float) -> float | None:
        """The least spending at which the mean is at least the value, up to rounding; None: never."""
        reached = np.flatnonzero(self.mean >= value * (1 - ROUNDING))
        return float(self.spent[reached[0]]) if len(reached) else None


# A hypervolume is a sum of up to 10,000 additions, a mean one more: each may be off by 1.1e-16 of it.
ROUNDING = 1e-11


def mean_course(courses: Sequence[Course]) -> MeanCourse:
    """The mean of some courses, and the quarter of them below and above; of few, the lowest and the highest.

    Raises:
        ValueError: there is none.
    """
    if not courses:
        raise ValueError("no courses, so no mean; expected at least one")
    end = min(course.total for course in courses)
    steps = np.unique(np.concatenate([[0.0, end], *(course.spent for course in courses)]))
    spent = steps[steps <= end]
    values = np.stack([course.at(spent) for course in courses])
    shares = (0.0, 1.0) if len(courses) < FEW else (0.25, 0.75)
    curves = np.stack([spent, values.mean(axis=0), *np.quantile(values, shares, axis=0)])
    # Most trials change nothing; without them the curve of 10,000 has some hundred steps.
    kept = np.append(True, np.any(np.diff(curves[1:]) != 0, axis=0))
    kept[-1] = True
    return MeanCourse(*curves[:, kept])
