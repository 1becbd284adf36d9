"""When a trial ends early: pure rules over what the study knows. A trial that nobody dominates is never stopped.

Every rule answers with None, go on, or with the reason to stop in one line. Both objectives are better when larger.
Legend: N trials, ascending by number.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from search.config import StoppingConfig
from search.pareto import beaten_by, contributions, layers
from search.scheduling.forecast import forecast
from search.scheduling.standings import Standings, Witnesses
from search.studies.records import TrialResult

# From fewer finished trials neither a rank agreement nor a spread is worth reading.
MIN_WITNESSES = 5


# ---- verification --------------------------------------------------------------------------------------------------


def judge_verification(number: int, result: TrialResult, standings: Standings, *, seeds: int = 1) -> str | None:
    """Whether verifying a trial on is in vain: wherever its open images end, another COMPLETE trial is better.

    It is when another's worst corner dominates its best corner, or equals it and the other has the smaller number
    (`search.pareto.beaten_by`, which says why no order of events can then change the front, of equal points the
    smallest number). Trials that are still verified themselves do not count as others: what they have proved stands,
    but they may yet fail, and a failed trial is on no front.

    While its configuration has fewer than `seeds` runs, a trial is stopped only if all its runs are beaten; a run
    whose training was stopped is, one that has no result yet is not.

    Args:
        number: the trial.
        result: what is known of it now.
        standings: the study; its entry of this trial, if any, is not read.
        seeds: runs that a configuration near the front gets, at least 1.

    Returns:
        None, or the beating trial and both corners in one line.

    Raises:
        ValueError: the result's certified accuracy is above its own upper end.
    """
    known = standings.complete()
    others = known.numbers != number
    numbers = known.numbers[others]
    place = int(np.searchsorted(numbers, number))
    numbers = np.insert(numbers, place, number)
    worst = np.insert(known.worst[others], place, result.worst, axis=0)
    best = np.insert(known.best[others], place, result.best, axis=0)

    def is_beaten(run: int) -> bool:
        return beaten_by(worst, best, int(np.searchsorted(numbers, run))) is not None

    winner = beaten_by(worst, best, place)
    if winner is None:
        return None
    if seeds > 1:
        runs = standings.runs(standings.record(number).configuration)
        rest = [run for run in runs if run.number != number]
        if len(rest) + 1 < seeds and not all(
            run.state == "STOPPED" or (run.state == "COMPLETE" and is_beaten(run.number)) for run in rest
        ):
            return None
    return (
        f"cannot reach the front: {standings.record(int(numbers[winner])).key} has at least {_text(worst[winner])} "
        f"(standard, certified), this trial at most {_text(best[place])}"
    )


# ---- training ------------------------------------------------------------------------------------------------------


def judge_rung(
    number: int,
    rung: str,
    standings: Standings,
    config: StoppingConfig,
    reference: tuple[float, float],
    *,
    margin: float | None = None,
) -> str | None:
    """Whether a trial that has reached a rung should train no further.

    It goes on when any of these holds, and else is stopped:
    1. fewer than `config.peers` other trials have reached the rung (FAILED ones do not count, STOPPED ones do);
    2. none of them dominates it there;
    3. it is among the best ceil(keep * N) of all N there, itself included, by `place`;
    4. the rung's `agreement` with the results of finished trials is measurable and below `config.agreement`;
    5. with a `margin`: no finished trial dominates its `hoped` result, or too few have finished to tell.

    Args:
        number: the trial; its values at the rung are in the standings.
        rung: the rung's name.
        standings: the study.
        config: `keep`, `peers` and `agreement`.
        reference: hypervolume reference (standard, certified), fractions.
        margin: spreads of the forecast that guard 5 adds to it; None: without this guard.

    Returns:
        None, or who dominates it there and both points, in one line.

    Raises:
        ValueError: the trial has no values at that rung.
    """
    numbers, values = standings.at_rung(rung)
    own = int(np.searchsorted(numbers, number))
    if own == len(numbers) or numbers[own] != number:
        raise ValueError(f"trial {number} has no values at rung {rung!r}; note them before it is judged")
    dominating = np.flatnonzero(_dominate(values, values[own]))
    if len(numbers) - 1 < config.peers or len(dominating) == 0:
        return None
    witnesses = standings.witnesses(rung)
    agreed = agreement(witnesses)
    if agreed is not None and agreed < config.agreement:
        return None
    if margin is not None:
        best = hoped(values[own], witnesses, margin)
        if best is None or not np.any(_dominate(standings.complete().worst, best)):
            return None
    kept = math.ceil(config.keep * len(numbers) - 1e-9)  # 0.1 * 30 is above 3 in floating point
    # Its place is behind all that dominate it and before all that it dominates: often that is enough to know.
    behind = np.count_nonzero(_dominate(values[own], values))
    if len(numbers) - behind <= kept or (len(dominating) < kept and place(values, own, reference) < kept):
        return None
    winner = int(dominating[0])
    return (
        f"rung {rung}: not among the best {kept} of {len(numbers)}; "
        f"{standings.record(int(numbers[winner])).key} has {_text(values[winner])} (standard, certified), "
        f"this trial {_text(values[own])}"
    )


def place(values: NDArray[np.float64], index: int, reference: Sequence[float]) -> int:
    """Place of one trial among those of a rung, from 0.

    They are ordered by layer, within a layer by falling hypervolume contribution to that layer, then by number. Equal
    points share the contribution that one of them would have. Points that are not above the reference contribute
    nothing, and so come last in their layer.

    Args:
        values: shape [N, 2], ascending by number.
        index: row of the trial.
        reference: shape [2], the hypervolume reference.
    """
    # Whom the trial dominates comes after it, and is in no chain of dominance above a point that is left.
    rows = np.flatnonzero(~_dominate(values[index], values))
    own = int(np.searchsorted(rows, index))
    layer = layers(values[rows])
    level = np.flatnonzero(layer == layer[own])
    points, same = np.unique(values[rows[level]], axis=0, return_inverse=True)
    share = contributions(points, reference)[same.ravel()]
    mine = share[np.searchsorted(level, own)]
    before = (share > mine) | ((share == mine) & (level < own))
    return int(np.count_nonzero(layer < layer[own]) + np.count_nonzero(before))


def agreement(witnesses: Witnesses) -> float | None:
    """How well a rung orders trials as their results do: Kendall's tau over the pairs that it orders, in [-1, 1].

        tau = (concordant - discordant) / (concordant + discordant + neither)

    over the pairs in which one trial dominates the other at the rung. A pair is concordant if the results keep this
    order, discordant if they reverse it, neither if they are equal or each is better in one objective; a pair that
    the intervals of its results leave undecided is left out. So a rung that knows nothing has 0 in the mean, whatever
    share of the results can be ordered, and so has one that orders trials which all end on the front. Counting
    "neither" as agreement would give both a high value.

    Results exist only for trials that the rung let go on. Those lie closer together at the rung than all, and more
    of them end as "neither", so what is measured is too low rather than too high. A rung that is switched off because
    of it lets every trial go on, and those then measure it without this selection.

    Returns:
        None with fewer than `MIN_WITNESSES` trials, or without a pair that counts.
    """
    if len(witnesses.rung) < MIN_WITNESSES:
        return None
    worst, best = witnesses.worst, witnesses.best
    ordered = _dominate(witnesses.rung[:, None], witnesses.rung)  # [i, j]: i dominates j
    kept = _dominate(worst[:, None], best)
    may_be_kept = _dominate(best[:, None], worst)
    concordant = np.count_nonzero(ordered & kept)
    discordant = np.count_nonzero(ordered & kept.T)
    neither = np.count_nonzero(ordered & ~may_be_kept & ~may_be_kept.T)
    total = concordant + discordant + neither
    return (concordant - discordant) / total if total else None


def hoped(values: NDArray[np.float64], witnesses: Witnesses, margin: float) -> NDArray[np.float64] | None:
    """The result that a trial may hope for, shape [2]: where `search.scheduling.forecast` sees it, and more.

        forecast + margin * spread of the forecast

    Returns:
        None with fewer than `MIN_WITNESSES` trials that were verified to the end.
    """
    verified = ~np.isnan(witnesses.final[:, 1])
    if np.count_nonzero(verified) < MIN_WITNESSES:
        return None
    found = forecast(witnesses.rung[verified], witnesses.final[verified])
    result: NDArray[np.float64] = found.of(values) + margin * found.spread(values)
    return result


def _dominate(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether points of a dominate those of b, both [..., 2] and broadcast against each other; arguments are finite."""
    first, second = a[..., 0], a[..., 1]
    reaches = (first >= b[..., 0]) & (second >= b[..., 1])
    result: NDArray[np.bool_] = reaches & ((first > b[..., 0]) | (second > b[..., 1]))
    return result


def _text(point: NDArray[np.float64]) -> str:
    return f"({point[0]:.4f}, {point[1]:.4f})"
