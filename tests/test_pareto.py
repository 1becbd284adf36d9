"""Front, layers, hypervolume and its parts against hand numbers, slow oracles, moocore, and their properties."""

import itertools
import time
from collections.abc import Sequence

import moocore
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from search.pareto import contributions, dominates, front, hypervolume, hypervolume_trace, layers

# Both sides sum at most a few hundred products in float64; each rounding is below 2.3e-16 of the value.
ROUNDING = 1e-12

# Steps of 1/8 make ties and repeated points common, and products of them are exact in float64.
COORDINATE = st.integers(-4, 12).map(lambda eighths: eighths / 8)
PAIRS = st.lists(st.tuples(COORDINATE, COORDINATE), max_size=25)
REFERENCE = st.tuples(COORDINATE, COORDINATE)

#  b
#  3 +--a        a = (1, 3), b = (2, 2), c = (4, 1), reference (0, 0):
#  2 |  +-b      slabs of height 1 and widths 4, 2, 1 have area 7
#  1 |    +--c
STAIRS = [(1.0, 3.0), (2.0, 2.0), (4.0, 1.0)]


def array(points: Sequence[tuple[float, ...]], num_objectives: int = 2) -> NDArray[np.float64]:
    return np.array(points, dtype=float).reshape(len(points), num_objectives)


def naive_front(points: NDArray[np.float64]) -> list[int]:
    def beaten(p: NDArray[np.float64]) -> bool:
        return any(all(q[k] >= p[k] for k in range(len(p))) and any(q[k] > p[k] for k in range(len(p))) for q in points)

    return [index for index, p in enumerate(points) if not beaten(p)]


def naive_area(points: NDArray[np.float64], reference: tuple[float, float]) -> float:
    """Cut the plane at every coordinate and add the cells that some point covers."""
    xs = sorted({reference[0], *(x for x, _ in points if x > reference[0])})
    ys = sorted({reference[1], *(y for _, y in points if y > reference[1])})
    return sum(
        (x1 - x0) * (y1 - y0)
        for x0, x1 in itertools.pairwise(xs)
        for y0, y1 in itertools.pairwise(ys)
        if any(x >= x1 and y >= y1 for x, y in points)
    )


def naive_layers(points: NDArray[np.float64]) -> list[int]:
    """Peel front after front."""
    found, rest, number = [-1] * len(points), list(range(len(points))), 0
    while rest:
        peeled = [rest[k] for k in naive_front(points[rest])]
        for index in peeled:
            found[index] = number
        rest, number = [index for index in rest if index not in peeled], number + 1
    return found


def test_staircase_of_known_area() -> None:
    assert hypervolume(STAIRS, (0, 0)) == 7.0
    assert hypervolume(STAIRS, (-1, 0)) == 10.0  # one more column of height 3
    assert hypervolume(STAIRS, (1, 1)) == 1.0  # only b is above the reference in both
    assert hypervolume_trace(STAIRS, (0, 0)).tolist() == [3.0, 5.0, 7.0]
    assert contributions(STAIRS, (0, 0)).tolist() == [1.0, 1.0, 2.0]
    # Behind c lies (3, 0.5): 0.5 of c's own area stays when c goes. (2, 1) is behind both b and c and changes nothing.
    assert contributions([*STAIRS, (3.0, 0.5), (2.0, 1.0)], (0, 0)).tolist() == [1.0, 1.0, 1.5, 0.0, 0.0]


def test_layers_of_a_known_picture() -> None:
    assert layers([*STAIRS, (2, 1), (1, 2), (1, 1), (2, 1), (4, 1)]).tolist() == [0, 0, 0, 1, 1, 2, 1, 0]
    assert layers([(1, 1), (1, 2), (1, 3), (0, 3)]).tolist() == [2, 1, 0, 1]  # a tie in one objective is dominance


def test_points_not_strictly_above_the_reference_add_nothing() -> None:
    assert hypervolume([(0.5, 0.0), (0.0, 0.5), (-1.0, 9.0), (9.0, -1.0)], (0, 0)) == 0.0
    assert hypervolume([*STAIRS, (-1.0, 9.0), (9.0, 0.0)], (0, 0)) == 7.0


def test_no_points() -> None:
    for points in ([], np.empty((0, 2))):
        assert front(points).tolist() == []
        assert hypervolume(points, (0, 0)) == 0.0
        assert hypervolume_trace(points, (0, 0)).shape == (0,)
        assert contributions(points, (0, 0)).shape == (0,)
        assert layers(points).shape == (0,)


def test_equal_points_are_all_kept_in_ascending_order() -> None:
    assert front([(1, 2), (2, 1), (1, 2), (0, 2), (2, 1)]).tolist() == [0, 1, 2, 4]
    assert front([(0.0, -0.0), (-0.0, 0.0)]).tolist() == [0, 1]
    assert front([(1, 1, 1), (1, 1, 1), (0, 1, 1)]).tolist() == [0, 1]


def test_a_tie_in_one_objective_is_dominance_not_a_draw() -> None:
    assert front([(1, 1), (1, 2)]).tolist() == [1]
    assert front([(2, 1), (1, 1)]).tolist() == [0]
    assert dominates((1, 2), (1, 1))
    assert not dominates((1, 1), (1, 1))
    assert not dominates((1, 2), (2, 1))


@given(PAIRS)
def test_front_agrees_with_the_definition(points: list[tuple[float, float]]) -> None:
    assert front(array(points)).tolist() == naive_front(array(points))


@given(st.lists(st.tuples(COORDINATE, COORDINATE, COORDINATE), max_size=15))
def test_front_of_three_objectives_agrees_with_the_definition(
    points: list[tuple[float, float, float]],
) -> None:
    assert front(array(points, 3)).tolist() == naive_front(array(points, 3))


@given(PAIRS, REFERENCE)
def test_hypervolume_agrees_with_counting_cells(
    points: list[tuple[float, float]], reference: tuple[float, float]
) -> None:
    assert hypervolume(array(points), reference) == naive_area(array(points), reference)


@given(PAIRS)
def test_layers_agree_with_peeling(points: list[tuple[float, float]]) -> None:
    assert layers(array(points)).tolist() == naive_layers(array(points))


@given(PAIRS, REFERENCE)
def test_contributions_agree_with_leaving_each_point_out(
    points: list[tuple[float, float]], reference: tuple[float, float]
) -> None:
    values = array(points)
    whole = naive_area(values, reference)
    expected = [whole - naive_area(np.delete(values, k, axis=0), reference) for k in range(len(points))]
    assert contributions(values, reference).tolist() == expected


@pytest.mark.parametrize("num_points", [1, 7, 300])
@pytest.mark.parametrize("digits", [1, 15])
def test_agrees_with_moocore(num_points: int, digits: int) -> None:
    points = np.random.default_rng(num_points).random((num_points, 2)).round(digits)
    kept = moocore.is_nondominated(points, maximise=True, keep_weakly=True)
    assert front(points).tolist() == np.flatnonzero(kept).tolist()
    for reference in [(0.0, 0.0), (0.6, 0.4), (2.0, 2.0)]:
        expected = moocore.hypervolume(points, ref=np.array(reference), maximise=True)
        assert hypervolume(points, reference) == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING)
        assert hypervolume_trace(points, reference)[-1] == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING)
        lost = moocore.hv_contributions(points, ref=np.array(reference), maximise=True, ignore_dominated=False)
        np.testing.assert_allclose(contributions(points, reference), lost, rtol=0, atol=ROUNDING)
    np.testing.assert_array_equal(layers(points), moocore.pareto_rank(points, maximise=True))


@given(PAIRS, REFERENCE, st.randoms(use_true_random=False))
def test_permuting_points_keeps_front_and_hypervolume(
    points: list[tuple[float, float]], reference: tuple[float, float], random: object
) -> None:
    order = list(range(len(points)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = array(points)[order]
    assert sorted(order[index] for index in front(shuffled)) == front(array(points)).tolist()
    assert hypervolume(shuffled, reference) == hypervolume(array(points), reference)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=25), st.data())
def test_adding_a_dominated_point_keeps_the_hypervolume_to_the_bit(
    points: list[tuple[float, float]], data: st.DataObject
) -> None:
    x, y = data.draw(st.sampled_from(points))
    worse = (data.draw(st.floats(-1, x)), data.draw(st.floats(-1, y)))
    assert hypervolume([*points, worse], (0, 0)) == hypervolume(points, (0, 0))


@given(PAIRS, REFERENCE)
def test_trace_is_the_hypervolume_of_each_prefix_and_never_falls(
    points: list[tuple[float, float]], reference: tuple[float, float]
) -> None:
    trace = hypervolume_trace(array(points), reference)
    assert trace.tolist() == [hypervolume(array(points[: n + 1]), reference) for n in range(len(points))]
    assert np.all(np.diff(trace) >= 0)


@given(PAIRS)
def test_every_point_is_on_the_front_or_dominated_by_a_member(points: list[tuple[float, float]]) -> None:
    members = front(array(points)).tolist()
    for index, point in enumerate(points):
        assert (index in members) != any(dominates(points[member], point) for member in members)


@given(PAIRS, REFERENCE)
def test_inputs_are_not_mutated(points: list[tuple[float, float]], reference: tuple[float, float]) -> None:
    values, corner = array(points), np.array(reference)
    before = values.copy(), corner.copy()
    values.flags.writeable = corner.flags.writeable = False
    front(values)
    hypervolume(values, corner)
    hypervolume_trace(values, corner)
    contributions(values, corner)
    layers(values)
    np.testing.assert_array_equal(values, before[0])
    np.testing.assert_array_equal(corner, before[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_with_their_place(value: float) -> None:
    points = [(0.1, 0.2), (0.3, value)]
    with pytest.raises(ValueError, match=r"points must be finite, got .* at \[1, 1\]"):
        front(points)
    with pytest.raises(ValueError, match="points must be finite"):
        hypervolume(points, (0, 0))
    with pytest.raises(ValueError, match="points must be finite"):
        hypervolume_trace(points, (0, 0))
    with pytest.raises(ValueError, match="points must be finite"):
        contributions(points, (0, 0))
    with pytest.raises(ValueError, match="points must be finite"):
        layers(points)
    with pytest.raises(ValueError, match=r"reference must be finite, got .* at \[0\]"):
        hypervolume([(0.1, 0.2)], (value, 0))
    with pytest.raises(ValueError, match="b must be finite"):
        dominates((0.1, 0.2), (value, 0.2))


def test_wrong_shapes_are_refused_with_the_shape_that_came() -> None:
    with pytest.raises(ValueError, match=r"\[N, M\] with M >= 1, got \(2,\)"):
        front([0.1, 0.2])
    with pytest.raises(ValueError, match=r"got \(3, 0\)"):
        front(np.empty((3, 0)))
    with pytest.raises(ValueError, match=r"\[N, 2\], got \(1, 3\)"):
        hypervolume([(0.1, 0.2, 0.3)], (0, 0))
    with pytest.raises(ValueError, match=r"\[N, 2\], got \(0, 3\)"):
        hypervolume_trace(np.empty((0, 3)), (0, 0))
    with pytest.raises(ValueError, match=r"\[N, 2\], got \(1, 3\)"):
        layers([(0.1, 0.2, 0.3)])
    with pytest.raises(ValueError, match=r"shape \[2\], got \(3,\)"):
        hypervolume([(0.1, 0.2)], (0, 0, 0))
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3,\)"):
        dominates((1, 2), (1, 2, 3))


def test_many_points_do_not_take_quadratic_time() -> None:
    points = np.random.default_rng(0).random((200_000, 2))
    started = time.process_time()
    assert len(front(points)) < 100
    assert time.process_time() - started < 2  # 4e10 comparisons would take minutes
