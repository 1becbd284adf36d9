"""Dominance, front and hypervolume of points, and of boxes that hold them; every coordinate is better when larger.

A box is what is known of a point so far: it lies between a worst corner `lower` and a best corner `upper`, and may be
anywhere between them, whatever the other points are.

Legend: N points or boxes, M objectives.
"""

import bisect
import itertools
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from search.scheduling.sweeps import area, dominated, exclusive_areas, gains


def dominates(a: ArrayLike, b: ArrayLike) -> bool:
    """Whether a is at least b in every objective and above b in one.

    Args:
        a: one point, shape [M].
        b: one point, shape [M].

    Raises:
        ValueError: the shapes are not one and the same [M], or a value is not finite.
    """
    first, second = _finite(a, "a"), _finite(b, "b")
    if first.ndim != 1 or first.size == 0 or first.shape != second.shape:
        raise ValueError(f"dominates compares two points of one shape [M], got {first.shape} and {second.shape}")
    return bool(np.all(first >= second) and np.any(first > second))


def front(points: ArrayLike) -> NDArray[np.intp]:
    """Indices of the points that no other point dominates, ascending; equal points are all kept.

    Costs O(N log N) for two objectives and O(N * N * M) for any other number.

    Args:
        points: shape [N, M], larger is better; an empty sequence is no points.

    Raises:
        ValueError: points have another shape or hold a value that is not finite.
    """
    values = _points(points)
    if len(values) == 0:
        return np.empty(0, dtype=np.intp)
    by_others = dominated(values, values) if values.shape[1] == 2 else _dominated_by_comparison(values)
    return np.flatnonzero(~by_others)


def layers(points: ArrayLike) -> NDArray[np.intp]:
    """Layer of every point, shape [N]: 0 on the front, 1 on the front of the rest, and so on; equal points share one.

    Costs O(N log N).

    Args:
        points: shape [N, 2], larger is better; an empty sequence is no points.

    Raises:
        ValueError: points have another shape or hold a value that is not finite.
    """
    values = _pairs(points, "points")
    order = np.lexsort((-values[:, 1], -values[:, 0]))
    ordered = values[order]
    is_new = np.any(np.diff(ordered, axis=0, prepend=np.inf) != 0, axis=1)
    # In this order every dominator of a point comes before it, and those that come before it dominate it unless their
    # second objective is smaller: it belongs to the first layer whose best second objective so far is smaller.
    negated_best: list[float] = []  # of each layer; ascending, since a layer surpasses the next one
    numbers = []
    for second in ordered[is_new, 1].tolist():
        number = bisect.bisect_right(negated_best, -second)
        negated_best[number : number + 1] = [-second]
        numbers.append(number)
    found = np.empty(len(values), dtype=np.intp)
    found[order] = np.array(numbers, dtype=np.intp)[np.cumsum(is_new) - 1]
    return found


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Area of the union over the points of the boxes between the reference and each point.

    Points that are not above the reference in both objectives add nothing, and no points have area 0.

    Args:
        points: shape [N, 2], larger is better; an empty sequence is no points.
        reference: shape [2], the corner from which area counts.

    Raises:
        ValueError: points or reference have another shape or hold a value that is not finite.
    """
    return area(_pairs(points, "points"), _reference(reference))


def hypervolume_trace(points: ArrayLike, reference: ArrayLike) -> NDArray[np.float64]:
    """Hypervolume of the first n points for n = 1 to N, shape [N]; arguments as for `hypervolume`.

    Each value is the one before plus what the point adds, so the last may differ from `hypervolume` by N roundings.
    """
    values, corner = _pairs(points, "points"), _reference(reference)
    added = np.zeros(len(values))
    # The stairs so far by rising second objective, hence falling first, between two that no point reaches: every
    # search below ends at a stair. First objectives are negated because bisect wants them ascending.
    negated_firsts, seconds = [-math.inf, -float(corner[0])], [float(corner[1]), math.inf]
    for index in np.flatnonzero(np.all(values > corner, axis=1)).tolist():
        first, second = values[index].tolist()
        if -negated_firsts[bisect.bisect_left(seconds, second)] >= first:
            continue  # a stair equals or dominates the point
        begin, end = bisect.bisect_left(negated_firsts, -first), bisect.bisect_right(seconds, second)
        levels = [*seconds[begin - 1 : end], second]
        added[index] = math.fsum(
            (first + negated_firsts[begin + step]) * (level - below)
            for step, (below, level) in enumerate(itertools.pairwise(levels))
        )
        negated_firsts[begin:end], seconds[begin:end] = [-first], [second]
    return np.cumsum(added)


def contributions(points: ArrayLike, reference: ArrayLike) -> NDArray[np.float64]:
    """Hypervolume that is lost when one point goes and all others stay, shape [N]; O(N log N).

    Dominated points, repeated points and points that are not above the reference have 0. What a dominated point holds
    behind a point of the front is not lost with that point.

    Args:
        points: shape [N, 2], larger is better; an empty sequence is no points.
        reference: shape [2], the corner from which area counts.

    Raises:
        ValueError: points or reference have another shape or hold a value that is not finite.
    """
    return exclusive_areas(_pairs(points, "points"), _reference(reference))


def _dominated_by_comparison(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether a row of [N, M] is dominated, each row compared with all."""
    by_others = [bool(np.any(np.all(values >= point, axis=1) & np.any(values > point, axis=1))) for point in values]
    return np.array(by_others, dtype=np.bool_)


# ---- boxes ---------------------------------------------------------------------------------------------------------


def surely_dominated(lower: ArrayLike, upper: ArrayLike) -> NDArray[np.bool_]:
    """Whether another's worst corner dominates the box's best corner, shape [N]: dominated wherever the points are.

    Args:
        lower: worst corners, shape [N, 2]; an empty sequence is no boxes.
        upper: best corners, shape [N, 2], in no objective below lower.

    Raises:
        ValueError: a corner has another shape, is not finite, or a worst corner is above its best corner.
    """
    worst, best = _boxes(lower, upper)
    return dominated(best, worst)


def possible_front(lower: ArrayLike, upper: ArrayLike) -> NDArray[np.intp]:
    """Indices, ascending, of the boxes that hold a point of the front for some points in the boxes.

    Those are the boxes that are not `surely_dominated`; arguments and errors are the same.
    """
    return np.flatnonzero(~surely_dominated(lower, upper))


def certain_front(lower: ArrayLike, upper: ArrayLike) -> NDArray[np.intp]:
    """Indices, ascending, of the boxes that hold a point of the front for all points in the boxes.

    Those are the boxes whose worst corner no other's best corner dominates. Equal corners do not dominate, so points
    that are known and equal are all certain. Arguments and errors as for `surely_dominated`.
    """
    worst, best = _boxes(lower, upper)
    return np.flatnonzero(~dominated(worst, best, own=best))


def hypervolume_bounds(lower: ArrayLike, upper: ArrayLike, reference: ArrayLike) -> tuple[float, float]:
    """Smallest and largest hypervolume over all points in the boxes: that of the worst and of the best corners.

    Args:
        lower: worst corners, shape [N, 2]; an empty sequence is no boxes.
        upper: best corners, shape [N, 2], in no objective below lower.
        reference: shape [2], the corner from which area counts.

    Raises:
        ValueError: as for `surely_dominated`, or the reference has another shape or is not finite.
    """
    worst, best = _boxes(lower, upper)
    corner = _reference(reference)
    low = area(worst, corner)
    return low, max(low, area(best, corner))  # two nearly equal areas may be rounded past each other


def beaten_by(lower: ArrayLike, upper: ArrayLike, index: int) -> int | None:
    """The trial because of which `index` need not be known better, or None: the rule of verification by dominance.

    Trial j beats trial i when lower[j] dominates upper[i], or lower[j] equals upper[i] and j < i. Wherever the two
    points then are, j's dominates i's or equals it and has the smaller number. That relation has no cycles, so what is
    dropped by it in any order of refinements is never the smallest number of a point of the final front, even when
    the beating trial was dropped itself. Costs O(N).

    Args:
        lower: worst corners, shape [N, 2], ordered by trial number.
        upper: best corners, shape [N, 2], in no objective below lower.
        index: the trial that is asked about, in [0, N).

    Returns:
        The smallest index that beats it.

    Raises:
        ValueError: as for `surely_dominated`, or there is no trial of this index.
    """
    worst, best = _boxes(lower, upper)
    if not 0 <= index < len(best):
        raise ValueError(f"index must be that of one of the {len(best)} boxes, got {index}")
    reaches = np.all(worst >= best[index], axis=1)
    # A later trial, or the same, must be above the corner in one objective: the index itself never is.
    reaches[index:] &= np.any(worst[index:] > best[index], axis=1)
    beating = np.flatnonzero(reaches)
    return int(beating[0]) if len(beating) else None


def uncertainty(lower: ArrayLike, upper: ArrayLike, reference: ArrayLike) -> NDArray[np.float64]:
    """How much narrower `hypervolume_bounds` become when this box alone becomes a point, shape [N]; O(N log N).

        at best  = H(lower and upper[i]) - H(lower)               its best corner lifts the low end
        at worst = H(upper) - H(upper, lower[i] for upper[i])     its worst corner brings the high end down
        uncertainty = (at best + at worst) / 2

    The mean is the expectation when both corners are equally likely, and expectations may be divided by expected
    seconds. The larger of the two would not do: boxes that reach equally far would each count in full, although the
    high end stays where it is when one of them turns out badly. A box that is a point, is surely dominated or does not
    reach beyond the reference has 0.

    Arguments and errors as for `hypervolume_bounds`. At best is a difference of sums, with an error of at most
    N * 2.3e-16 of the hypervolume.
    """
    worst, best = _boxes(lower, upper)
    corner = _reference(reference)
    # Worst corners add nothing next to their best corners, except the one whose best corner is taken away.
    at_worst = contributions(np.concatenate([best, worst]), corner)[: len(best)]
    return (gains(worst, best, corner) + at_worst) / 2


# ---- arguments -----------------------------------------------------------------------------------------------------


def _boxes(lower: ArrayLike, upper: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    worst, best = _pairs(lower, "lower"), _pairs(upper, "upper")
    if worst.shape != best.shape:
        raise ValueError(f"lower and upper must have one shape [N, 2], got {worst.shape} and {best.shape}")
    if np.any(worst > best):
        row, column = (int(i) for i in np.argwhere(worst > best)[0])
        raise ValueError(
            f"lower must not be above upper, got {worst[row, column]} above {best[row, column]} at [{row}, {column}]"
        )
    return worst, best


def _reference(reference: ArrayLike) -> NDArray[np.float64]:
    corner = _finite(reference, "reference")
    if corner.shape != (2,):
        raise ValueError(f"the reference must have shape [2], got {corner.shape}")
    return corner


def _pairs(points: ArrayLike, name: str) -> NDArray[np.float64]:
    values = _points(points, name)
    if values.shape[1] != 2:
        raise ValueError(f"{name} must have shape [N, 2], got {values.shape}")
    return values


def _points(points: ArrayLike, name: str = "points") -> NDArray[np.float64]:
    """The points as [N, M] in float64; an empty sequence, which has no M of its own, as [0, 2]."""
    values = _finite(points, name)
    if values.shape == (0,):
        return values.reshape(0, 2)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"{name} must have shape [N, M] with M >= 1, got {values.shape}")
    return values


def _finite(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not np.all(np.isfinite(array)):
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{name} must be finite, got {array[where]} at {list(where)}")
    return array
