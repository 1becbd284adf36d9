"""Fronts and hypervolume of boxes: a picture, definitions over corners, points drawn from boxes, replayed searches."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from search.pareto import (
    beaten_by,
    certain_front,
    dominates,
    front,
    hypervolume,
    hypervolume_bounds,
    possible_front,
    surely_dominated,
    uncertainty,
)

# Sums of up to a hundred products of numbers below 1.
ROUNDING = 1e-13

Points = NDArray[np.float64]
Box = tuple[tuple[float, float], tuple[float, float]]

# A coarse grid makes equal corners, touching boxes and boxes that are points common, with exact areas.
RANGE = st.tuples(st.integers(-1, 5), st.integers(-1, 5)).map(sorted)
BOX = st.tuples(RANGE, RANGE).map(lambda ranges: tuple(zip(*ranges, strict=True)))
BOXES = st.lists(BOX, max_size=12)
REFERENCE = st.tuples(st.integers(-1, 2), st.integers(-1, 2))


def corners(boxes: Sequence[Box]) -> tuple[Points, Points]:
    values = np.array(boxes, dtype=float).reshape(len(boxes), 2, 2)
    return values[:, 0], values[:, 1]


def replaced(points: Points, index: int, point: Points) -> Points:
    changed = points.copy()
    changed[index] = point
    return changed


#  4 +-----+          a = (1, 3) to (2, 4), b = (3, 1) to (3, 3), c = (0, 0) to (1, 1), d = (2, 0) to (4, 1)
#  3 |  a  +--+
#  2 |     |  b
#  1 +--c--+--+--d
A, B, C, D = ((1, 3), (2, 4)), ((3, 1), (3, 3)), ((0, 0), (1, 1)), ((2, 0), (4, 1))


def test_boxes_of_a_known_picture() -> None:
    lower, upper = corners([A, B, C, D])
    # c at its best, (1, 1), is dominated by a and b at their worst; d at its best by nobody.
    assert surely_dominated(lower, upper).tolist() == [False, False, True, False]
    assert possible_front(lower, upper).tolist() == [0, 1, 3]
    # Nobody's best reaches over a at its worst: b's (3, 3) does. Over b's (3, 1): d's (4, 1) does.
    assert certain_front(lower, upper).tolist() == []
    assert certain_front(*corners([A, C])).tolist() == [0]
    # Worst corners: 1 x 3 + 2 x 1; best corners: 4 x 1 + 3 x 2 + 2 x 1.
    assert hypervolume_bounds(lower, upper, (0, 0)) == (5.0, 12.0)
    # a: (2, 4) makes 5 to 3 x 1 + 2 x 3, (1, 3) takes (2, 4)'s own 2 x 1. b: (3, 3) makes 5 to 3 x 3, (3, 1) takes
    # (3, 3)'s own 1 x 2. c: nothing. d: (4, 1) makes 5 to 6, (2, 0) takes (4, 1)'s own 1 x 1.
    assert uncertainty(lower, upper, (0, 0)).tolist() == [3.0, 3.0, 0.0, 1.0]


def test_who_beats_whom() -> None:
    lower, upper = corners([A, B, C, D])
    assert [beaten_by(lower, upper, index) for index in range(4)] == [None, None, 0, None]
    # A worst corner that equals the best corner: only the smaller number stays.
    assert [beaten_by(*corners([B, ((1, 1), (3, 1))]), index) for index in range(2)] == [None, 0]
    assert [beaten_by(*corners([((1, 1), (3, 1)), B]), index) for index in range(2)] == [None, None]
    same = corners([((1, 1), (1, 1))] * 3)
    assert [beaten_by(*same, index) for index in range(3)] == [None, 0, 0]
    assert certain_front(*same).tolist() == possible_front(*same).tolist() == [0, 1, 2]


@given(BOXES)
def test_dominance_agrees_with_its_definition_over_corners(boxes: list[Box]) -> None:
    lower, upper = corners(boxes)
    numbers = range(len(boxes))
    others = [[other for other in numbers if other != number] for number in numbers]
    surely = [any(dominates(lower[j], upper[i]) for j in others[i]) for i in numbers]
    assert surely_dominated(lower, upper).tolist() == surely
    assert possible_front(lower, upper).tolist() == [i for i in numbers if not surely[i]]
    certain = [i for i in numbers if not any(dominates(upper[j], lower[i]) for j in others[i])]
    assert certain_front(lower, upper).tolist() == certain
    for i in numbers:
        beating = [j for j in others[i] if dominates(lower[j], upper[i]) or (boxes[j][0] == boxes[i][1] and j < i)]
        assert beaten_by(lower, upper, i) == (beating[0] if beating else None)


@given(BOXES, REFERENCE)
def test_uncertainty_is_the_mean_shrinkage_of_the_bounds(boxes: list[Box], reference: tuple[float, float]) -> None:
    lower, upper = corners(boxes)

    def width(worst: Points, best: Points) -> float:
        low, high = hypervolume_bounds(worst, best, reference)
        return high - low

    before = width(lower, upper)
    expected = [
        before - (width(replaced(lower, i, upper[i]), upper) + width(lower, replaced(upper, i, lower[i]))) / 2
        for i in range(len(boxes))
    ]
    found = uncertainty(lower, upper, reference)
    assert found.tolist() == expected
    assert not np.any(found[surely_dominated(lower, upper)])


def test_uncertainty_of_uneven_numbers_is_right_up_to_rounding() -> None:
    generator = np.random.default_rng(0)
    ends = np.sort(generator.random((60, 2, 2)), axis=1)
    ends[:, 1] = ends[:, 0] + (ends[:, 1] - ends[:, 0]) / 4
    lower, upper, reference = ends[:, 0], ends[:, 1], (0.2, 0.1)
    low, high = hypervolume_bounds(lower, upper, reference)
    assert (low, high) == (hypervolume(lower, reference), hypervolume(upper, reference))
    expected = [
        (hypervolume(replaced(lower, i, upper[i]), reference) - low)
        + (high - hypervolume(replaced(upper, i, lower[i]), reference))
        for i in range(len(lower))
    ]
    np.testing.assert_allclose(2 * uncertainty(lower, upper, reference), expected, rtol=0, atol=ROUNDING)


@given(BOXES, REFERENCE, st.randoms(use_true_random=False))
def test_points_anywhere_in_the_boxes_keep_every_promise(
    boxes: list[Box], reference: tuple[float, float], chance: random.Random
) -> None:
    lower, upper = corners(boxes)
    low, high = hypervolume_bounds(lower, upper, reference)
    certain, possible = set(certain_front(lower, upper)), set(possible_front(lower, upper))
    assert certain <= possible
    for _ in range(10):
        drawn = [[chance.randint(*ends) for ends in zip(*box, strict=True)] for box in boxes]
        members = set(front(drawn))
        assert certain <= members <= possible
        assert low <= hypervolume(drawn, reference) <= high
    # Neither set could be closer: each box has its own best and worst case.
    for i in range(len(boxes)):
        assert (i in possible) == (i in front(replaced(lower, i, upper[i])))
        assert (i in certain) == (i in front(replaced(upper, i, lower[i])))


@given(BOXES)
def test_boxes_that_are_points_have_the_front_of_the_points(boxes: list[Box]) -> None:
    points = corners(boxes)[0]
    members = front(points).tolist()
    assert possible_front(points, points).tolist() == certain_front(points, points).tolist() == members
    low, high = hypervolume_bounds(points, points, (0, 0))
    assert low == high == hypervolume(points, (0, 0))
    assert not np.any(uncertainty(points, points, (0, 0)))


def replay(chance: random.Random, *, largest: int) -> tuple[list[int], list[int]]:
    """The trials that are left, and those that should be, after trials with ends on a grid narrow in any order.

    A step takes a random trial that was not dropped, narrows its box towards its true point by random amounts, and
    drops whatever the rule then says; a dropped trial keeps its box, which may still beat others. It ends when every
    trial is dropped or known.
    """
    truth = [(chance.randint(0, largest), chance.randint(0, largest)) for _ in range(chance.randint(1, 7))]
    lower = np.zeros((len(truth), 2))
    upper = np.full((len(truth), 2), float(largest))
    if chance.random() < 0.5:  # as in verification, where standard accuracy is known at once
        lower[:, 0] = upper[:, 0] = [first for first, _ in truth]
    kept = set(range(len(truth)))
    while moving := [i for i in sorted(kept) if np.any(lower[i] < upper[i])]:
        i = chance.choice(moving)
        k = chance.randrange(2)
        lower[i, k] = chance.randint(int(lower[i, k]), truth[i][k])
        upper[i, k] = chance.randint(truth[i][k], int(upper[i, k]))
        kept -= {other for other in kept if beaten_by(lower, upper, other) is not None}
    return sorted(kept), [i for i in front(truth).tolist() if truth[i] not in truth[:i]]


@pytest.mark.parametrize("largest", [1, 3, 20])
def test_no_order_of_refinements_drops_a_point_of_the_final_front(largest: int) -> None:
    for seed in range(100):
        left, expected = replay(random.Random(seed), largest=largest)
        # Of a single trial the rule says nothing; once all are points it leaves the front and nothing else.
        assert left == expected, f"seed {seed}"


def test_no_boxes() -> None:
    for empty in ([], np.empty((0, 2))):
        assert surely_dominated(empty, empty).shape == uncertainty(empty, empty, (0, 0)).shape == (0,)
        assert possible_front(empty, empty).tolist() == certain_front(empty, empty).tolist() == []
        assert hypervolume_bounds(empty, empty, (0, 0)) == (0.0, 0.0)


def test_wrong_boxes_are_refused_with_what_came() -> None:
    for ask in (surely_dominated, possible_front, certain_front):
        with pytest.raises(ValueError, match=r"lower must not be above upper, got 0\.3 above 0\.2 at \[1, 0\]"):
            ask([(0.1, 0.1), (0.3, 0.1)], [(0.2, 0.2), (0.2, 0.2)])
    with pytest.raises(ValueError, match=r"lower must be finite, got nan at \[0, 1\]"):
        uncertainty([(0.1, float("nan"))], [(0.2, 0.2)], (0, 0))
    with pytest.raises(ValueError, match="upper must be finite"):
        beaten_by([(0.1, 0.1)], [(0.2, float("inf"))], 0)
    with pytest.raises(ValueError, match=r"one shape \[N, 2\], got \(2, 2\) and \(1, 2\)"):
        hypervolume_bounds([(0, 0), (0, 0)], [(1, 1)], (0, 0))
    with pytest.raises(ValueError, match=r"upper must have shape \[N, 2\], got \(1, 3\)"):
        certain_front([(0, 0)], [(1, 1, 1)])
    with pytest.raises(ValueError, match="the reference must have shape"):
        uncertainty([(0, 0)], [(1, 1)], (0, 0, 0))
    for index in (-1, 1):
        with pytest.raises(ValueError, match=f"one of the 1 boxes, got {index}"):
            beaten_by([(0, 0)], [(1, 1)], index)


def test_boxes_are_not_mutated() -> None:
    lower, upper = corners([A, B, C, D])
    before = lower.copy(), upper.copy()
    beaten_by(lower, upper, 2)
    certain_front(lower, upper)
    uncertainty(lower, upper, (0, 0))
    np.testing.assert_array_equal((lower, upper), before)
