"""Sweeps over points of two objectives, both better when larger, that `search.pareto` is made of: O(N log N), no loops.

A corner is the reference from which area counts; points that are not above it in both objectives are left out. Stairs
are the points that bound the area: the front, of equal points one, by falling first and rising second objective.
Arguments are finite and have shape [N, 2].
"""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray


def dominated(
    points: NDArray[np.float64], by: NDArray[np.float64], own: NDArray[np.float64] | None = None
) -> NDArray[np.bool_]:
    """Whether a row of `by` dominates the row of `points`, shape [N].

    With `own`, which is then `by` and nowhere below `points`, the row of the same index does not count.
    """
    order = np.argsort(by[:, 0])
    firsts, seconds = by[order, 0], by[order, 1]
    best = _best_from(seconds)
    second_best = _best_from(np.minimum(seconds, best[1:]))

    def best_of_others(side: Literal["left", "right"]) -> NDArray[np.float64]:
        place = np.searchsorted(firsts, points[:, 0], side)
        if own is None:
            return best[place]
        counts_itself = own[:, 0] >= points[:, 0] if side == "left" else own[:, 0] > points[:, 0]
        return np.where(counts_itself & (own[:, 1] == best[place]), second_best[place], best[place])

    return (best_of_others("left") > points[:, 1]) | (best_of_others("right") >= points[:, 1])


def _sweep(values: NDArray[np.float64], corner: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Rows above the corner by falling first objective, and which are stairs: the front, of equal points one."""
    rows = np.flatnonzero(np.all(values > corner, axis=1))
    rows = rows[np.lexsort((-values[rows, 1], -values[rows, 0]))]
    seconds = values[rows, 1]
    return rows, seconds > _best_before(seconds)


def _best_before(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Largest value before each, -inf before the first."""
    return np.concatenate([[-np.inf], np.maximum.accumulate(seconds)])[: len(seconds)]


def _best_from(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Largest value from each to the end, shape [N + 1]; -inf after the end."""
    return np.append(np.maximum.accumulate(seconds[::-1])[::-1], -np.inf)


def area(values: NDArray[np.float64], corner: NDArray[np.float64]) -> float:
    """Area between the corner and points of [N, 2]: slabs, from the corner upwards in objective 2.

    The sum is correctly rounded and only stairs have slabs, so dominated and repeated points change no bit.
    """
    rows, is_stair = _sweep(values, corner)
    stairs = values[rows[is_stair]]
    return math.fsum((stairs[:, 0] - corner[0]) * np.diff(stairs[:, 1], prepend=corner[1]))


def exclusive_areas(values: NDArray[np.float64], corner: NDArray[np.float64]) -> NDArray[np.float64]:
    """What of the area is lost when one point of [N, 2] goes and all others stay, shape [N]."""
    rows, is_stair = _sweep(values, corner)
    stairs, rest = values[rows[is_stair]], values[rows[~is_stair]]
    # Only the rectangle up to a stair from its neighbours' levels is its own, and these rectangles are disjoint.
    left = np.append(stairs[1:, 0], corner[0])
    floor = np.concatenate([corner[1:], stairs[:-1, 1]])
    # Behind every stair its dominated points make a staircase of their own. In the order of the sweep their levels
    # rise from stair to stair, so one running maximum serves all; those below the floor make slabs of height 0.
    behind = (np.cumsum(is_stair) - 1)[~is_stair]
    level = np.maximum(_best_before(rest[:, 1]), floor[behind])
    slabs = (stairs[behind, 0] - rest[:, 0]) * np.maximum(rest[:, 1] - level, 0)
    top = floor.copy()
    np.maximum.at(top, behind, rest[:, 1])
    lost = np.zeros(len(values))
    lost[rows[is_stair]] = np.bincount(behind, slabs, len(stairs)) + (stairs[:, 0] - left) * (stairs[:, 1] - top)
    return lost


def gains(
    values: NDArray[np.float64], candidates: NDArray[np.float64], corner: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What each candidate alone would add to the area of the values, shape [candidates]."""
    rows, is_stair = _sweep(values, corner)
    stairs = values[rows[is_stair]] - corner
    levels = np.concatenate([[0.0], stairs[:, 1]])
    widths = np.append(stairs[:, 0], 0.0)  # of the slab above each level
    area_up_to = np.concatenate([[0.0], np.cumsum(stairs[:, 0] * np.diff(levels))])
    first, second = (candidates - corner).T
    # Slabs at least as wide as the candidate lie below `begin`; `end` is the slab in which its own level is.
    begin = np.searchsorted(-stairs[:, 0], -first, "right")
    end = np.searchsorted(stairs[:, 1], second, "left")
    whole = first * (levels[end] - levels[begin]) - (area_up_to[end] - area_up_to[begin])
    gained = np.maximum(whole, 0) + (first - widths[end]) * (second - levels[end])
    return np.where((first > 0) & (second > levels[begin]), gained, 0)
