"""Attainment surfaces against their definition on a grid, by hand, by properties and against moocore; mean courses."""

import math
from collections.abc import Sequence
from itertools import pairwise

import moocore
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.comparing.attainment import Attainment, Course, attainment, band_runs, mean_course, median_runs
from search.pareto import front

Points = list[tuple[float, float]]
# Few values, so that points of one run and of several often share a coordinate or are equal.
coordinates = st.integers(0, 8).map(lambda value: value / 8)
points = st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=7)
runs = st.lists(points, min_size=1, max_size=6)
# Where surfaces are looked at: on all coordinates, between them, and beyond them.
PLACES = [step / 16 for step in range(-1, 18)]


def by_definition(given_runs: Sequence[Points], standard: float, num_runs: int) -> float:
    """The k-th largest, over runs, of the best certified accuracy among points with at least this standard accuracy."""
    best = [max((y for x, y in run if x >= standard), default=-math.inf) for run in given_runs]
    return sorted(best, reverse=True)[num_runs - 1]


def surfaces(found: Attainment) -> list[Points]:
    return [[(x, y) for x, y in found.corners(k).tolist()] for k in range(1, found.num_runs + 1)]


# Two runs that cross:   c
#   0.75  a a a . . .    a: attained by run A only, c: by run B only
#   0.50  b b b c c .    b: by both
#   0.25  b b b b c .
#         0 ... 0.5 ... 1
A: Points = [(0.5, 0.75), (0.625, 0.25)]
B: Points = [(0.875, 0.5)]


def test_two_runs_that_cross() -> None:
    found = attainment([A, B])
    assert surfaces(found) == [[(0.5, 0.75), (0.875, 0.5)], [(0.5, 0.5), (0.625, 0.25)]]
    assert found.at([0.0, 0.5, 0.51, 0.875, 0.9], 1).tolist() == [0.75, 0.75, 0.5, 0.5, -math.inf]
    assert found.at([0.0, 0.5, 0.51, 0.875], 2).tolist() == [0.5, 0.5, 0.25, -math.inf]


@given(runs)
def test_every_surface_is_its_definition(given_runs: list[Points]) -> None:
    found = attainment(given_runs)
    for k in range(1, len(given_runs) + 1):
        assert found.at(PLACES, k).tolist() == [by_definition(given_runs, place, k) for place in PLACES]


@given(runs)
def test_the_corners_are_the_surface(given_runs: list[Points]) -> None:
    """They are what a figure draws: each a place where the definition steps, and nothing but them is needed."""
    for k, corners in enumerate(surfaces(attainment(given_runs)), start=1):
        drawn = [max((y for x, y in corners if x >= place), default=-math.inf) for place in PLACES]
        assert drawn == [by_definition(given_runs, place, k) for place in PLACES]
        assert len(front(np.array(corners).reshape(-1, 2))) == len(set(corners)) == len(corners)


@given(runs)
def test_surfaces_are_falling_stairs_and_the_worst_is_below_the_median_below_the_best(given_runs: list[Points]) -> None:
    found, n = attainment(given_runs), len(given_runs)
    for corners in surfaces(found):
        assert corners == sorted(corners)
        assert all(left > right for (_, left), (_, right) in pairwise(corners))
    levels = [found.at(PLACES, k) for k in (1, band_runs(n)[0], median_runs(n), band_runs(n)[1], n)]
    for better, worse in pairwise(levels):
        assert np.all(better >= worse)


@given(runs, st.randoms(use_true_random=False))
def test_neither_the_order_of_runs_nor_that_of_points_matters(given_runs: list[Points], chance: object) -> None:
    shuffled = [list(run) for run in given_runs]
    for items in (shuffled, *shuffled):
        chance.shuffle(items)  # type: ignore[attr-defined]
    assert surfaces(attainment(shuffled)) == surfaces(attainment(given_runs))


@given(points)
def test_one_run_attains_its_own_front(run: Points) -> None:
    (corners,) = surfaces(attainment([run]))
    assert corners == sorted({run[index] for index in front(run).tolist()})


@given(points, st.integers(1, 5))
def test_equal_runs_have_one_surface(run: Points, count: int) -> None:
    assert surfaces(attainment([run] * count)) == surfaces(attainment([run])) * count


@given(runs)
def test_surfaces_are_those_of_moocore(given_runs: list[Points]) -> None:
    stacked = np.array([point for run in given_runs for point in run])
    sets = [number for number, run in enumerate(given_runs) for _ in run]
    theirs = moocore.eaf(-stacked, sets)  # which minimises
    shares = theirs[:, 2] * len(given_runs) / 100
    for k, corners in enumerate(surfaces(attainment(given_runs)), start=1):
        assert sorted({(-x, -y) for x, y in theirs[np.isclose(shares, k), :2].tolist()}) == corners


def test_runs_of_real_size() -> None:
    """Continuous values, runs of different sizes: moocore again, and the points stay as they were."""
    chance = np.random.default_rng(7)
    given_runs = [chance.random((size, 2)) for size in (1, 40, 200, 3, 77)]
    before = [run.copy() for run in given_runs]
    found = attainment(given_runs)
    sets = np.repeat(np.arange(5), [len(run) for run in given_runs])
    theirs = moocore.eaf(-np.concatenate(given_runs), sets, percentiles=[20, 40, 60, 80, 100])
    for k in range(1, 6):
        expected = -theirs[theirs[:, 2] == 20 * k, :2]
        np.testing.assert_array_equal(found.corners(k), expected[np.argsort(expected[:, 0])])
    for run, copy in zip(given_runs, before, strict=True):
        np.testing.assert_array_equal(run, copy)


def test_a_run_without_points_attains_nothing() -> None:
    empty = np.empty((0, 2))
    assert surfaces(attainment([A, empty])) == [A, []]
    assert surfaces(attainment([empty])) == [[]]


@pytest.mark.parametrize(
    ("num_runs", "upper", "median", "lower"),
    [(1, 1, 1, 1), (2, 1, 1, 2), (3, 1, 2, 3), (4, 1, 2, 3), (5, 2, 3, 4), (8, 2, 4, 6), (20, 5, 10, 15)],
)
def test_how_many_runs_are_half_and_a_quarter(num_runs: int, upper: int, median: int, lower: int) -> None:
    assert median_runs(num_runs) == median
    assert band_runs(num_runs) == (upper, lower)


def test_what_is_no_runs_is_refused() -> None:
    with pytest.raises(ValueError, match="no runs"):
        attainment([])
    with pytest.raises(ValueError, match="finite"):
        attainment([A, [(0.5, math.nan)]])
    with pytest.raises(ValueError, match="there are 2, expected 1 to 2"):
        attainment([A, B]).corners(3)
    with pytest.raises(ValueError, match="there are 2, expected 1 to 2"):
        attainment([A, B]).at([0.5], 0)


# ---- over what was spent -------------------------------------------------------------------------------------------

steps = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=6)  # (cost, gain) of each trial


def course(costs_and_gains: Sequence[tuple[int, int]]) -> Course:
    spent, values = np.cumsum(np.array(costs_and_gains, dtype=float), axis=0).T
    return Course(spent, values)


def value_after(costs_and_gains: Sequence[tuple[int, int]], spent: float) -> float:
    """The gains of the trials that had ended when so much had been spent."""
    total, value = 0, 0
    for cost, gain in costs_and_gains:
        total += cost
        value += gain if total <= spent else 0
    return value


@given(st.lists(steps, min_size=1, max_size=6))
def test_a_mean_course_is_the_mean_wherever_all_runs_are(given_courses: list[list[tuple[int, int]]]) -> None:
    found = mean_course([course(each) for each in given_courses])
    end = min(sum(cost for cost, _ in each) for each in given_courses)
    assert found.spent[-1] == end
    for place in np.arange(0, end + 0.5, 0.5):
        values = [value_after(each, place) for each in given_courses]
        at = np.searchsorted(found.spent, place, side="right") - 1  # the last step so far
        assert found.mean[at] == pytest.approx(np.mean(values))
        low, high = (min(values), max(values)) if len(values) < 4 else np.quantile(values, [0.25, 0.75])
        assert (found.low[at], found.high[at]) == pytest.approx((low, high))


def test_when_a_mean_reaches_a_value() -> None:
    found = mean_course([course([(1, 2), (1, 2), (2, 4)]), course([(3, 4), (3, 4)])])
    # After 1, 2, 3 and 4: means 1, 2, 4 and 6; after 4 the first run has ended.
    assert found.mean.tolist() == [0, 1, 2, 4, 6]
    assert [found.first_to_reach(value) for value in (0, 1, 1.5, 4, 6, 6.1)] == [0, 1, 2, 3, 4, None]
    assert found.first_to_reach(6 * (1 + 1e-13)) == 4  # a rounding is no difference
    assert found.first_to_reach(6 * (1 + 1e-6)) is None


def test_only_steps_that_change_something_are_kept() -> None:
    found = mean_course([course([(1, 0), (1, 2), (1, 0), (1, 0)]), course([(2, 2), (5, 3)])])
    assert (found.spent.tolist(), found.mean.tolist()) == ([0, 2, 4], [0, 2, 2])


def test_nothing_spent_is_worth_nothing_and_free_trials_count_at_once() -> None:
    assert course([(2, 5)]).at([0, 1.9, 2, 7]).tolist() == [0, 0, 5, 5]
    assert course([(0, 5), (0, 1), (1, 1)]).at([0]).tolist() == [6]
    with pytest.raises(ValueError, match="no courses"):
        mean_course([])
