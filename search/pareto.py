"""Dominance, front and hypervolume of points whose every coordinate is better when larger.

Legend: N points, M objectives.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


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
    on_front = _front_of_pairs(values) if values.shape[1] == 2 else _front_by_comparison(values)
    return np.flatnonzero(on_front)


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Area of the union over the points of the boxes between the reference and each point.

    Points that are not above the reference in both objectives add nothing, and no points have area 0.

    Args:
        points: shape [N, 2], larger is better; an empty sequence is no points.
        reference: shape [2], the corner from which area counts.

    Raises:
        ValueError: points or reference have another shape or hold a value that is not finite.
    """
    values, corner = _pairs_and_reference(points, reference)
    return _staircase_area(values[np.all(values > corner, axis=1)], corner)


def hypervolume_trace(points: ArrayLike, reference: ArrayLike) -> NDArray[np.float64]:
    """Hypervolume of the first n points for n = 1 to N, shape [N]; arguments as for `hypervolume`."""
    values, corner = _pairs_and_reference(points, reference)
    areas = np.zeros(len(values))
    kept, area = np.empty((0, 2)), 0.0
    for index, point in enumerate(values):
        # A point that another equals or dominates changes no area: only the steps of the trace are computed.
        if np.all(point > corner) and not np.any(np.all(kept >= point, axis=1)):
            kept = np.vstack([kept[~np.all(kept <= point, axis=1)], point])
            area = _staircase_area(kept, corner)
        areas[index] = area
    return areas


def _front_of_pairs(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows of [N, 2] are on the front, by one sweep from the largest first objective down."""
    order = np.lexsort((-values[:, 1], -values[:, 0]))
    first, second = values[order, 0], values[order, 1]
    starts = np.flatnonzero(np.concatenate([[True], first[1:] != first[:-1]]))
    group = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(values))))
    # The rows of a group share the first objective, so its first row has the group's best second objective.
    group_best = second[starts]
    best_before = np.concatenate([[-np.inf], np.maximum.accumulate(group_best)[:-1]])
    on_front = np.empty(len(values), dtype=np.bool_)
    on_front[order] = (second == group_best[group]) & (group_best > best_before)[group]
    return on_front


def _front_by_comparison(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows of [N, M] are on the front, each row compared with all."""
    dominated = [bool(np.any(np.all(values >= point, axis=1) & np.any(values > point, axis=1))) for point in values]
    return ~np.array(dominated, dtype=np.bool_)


def _staircase_area(values: NDArray[np.float64], corner: NDArray[np.float64]) -> float:
    """Area between the corner and points of [N, 2] above it: slabs, from the corner upwards in objective 2.

    The sum is correctly rounded, so dominated and repeated points, whose slabs are empty, change no bit.
    """
    if len(values) == 0:
        return 0.0
    stairs = values[_front_of_pairs(values)]
    stairs = stairs[np.argsort(stairs[:, 1])]
    widths = stairs[:, 0] - corner[0]
    heights = np.diff(stairs[:, 1], prepend=corner[1])
    return math.fsum(widths * heights)


def _pairs_and_reference(points: ArrayLike, reference: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values, corner = _points(points), _finite(reference, "reference")
    if values.shape[1] != 2:
        raise ValueError(f"the hypervolume is of points with shape [N, 2], got {values.shape}")
    if corner.shape != (2,):
        raise ValueError(f"the reference must have shape [2], got {corner.shape}")
    return values, corner


def _points(points: ArrayLike) -> NDArray[np.float64]:
    """The points as [N, M] in float64; an empty sequence, which has no M of its own, as [0, 2]."""
    values = _finite(points, "points")
    if values.shape == (0,):
        return values.reshape(0, 2)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"points must have shape [N, M] with M >= 1, got {values.shape}")
    return values


def _finite(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not np.all(np.isfinite(array)):
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{name} must be finite, got {array[where]} at {list(where)}")
    return array
