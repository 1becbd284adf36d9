"""Tables of `benchmarks.search`: means, spreads and paired ratios with bootstrap intervals.

Legend: S seeds, G moments of the budget.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STEPS = 400
GRID = tuple(step / STEPS for step in range(STEPS + 1))  # shares of the budget
SHARES = (0.25, 0.5, 1.0)  # that are shown
RESAMPLES = 10_000
LEVEL = 0.95
RANDOM = "random"
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """What one search gave."""

    hypervolumes: Sequence[float]  # at each share of GRID
    states: Mapping[str, int]  # trials by how they ended
    virtual_hours: float
    seconds: float  # of processor time that simulating it took

    @property
    def brief(self) -> str:
        ends = ", ".join(f"{count} {state}" for state, count in sorted(self.states.items()))
        return f"hypervolume {self.hypervolumes[-1]:.4f}, {ends}, {self.seconds:.1f} s"


@dataclass(frozen=True)
class Ratio:
    """A statistic of paired seeds, with its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{_number(self.value)} [{_number(self.low)}, {_number(self.high)}]"


def _number(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "never" if np.isinf(value) else "none"


def bootstrap(statistic: Callable[[Array, Array], Array], first: Array, second: Array, *, seed: int = 0) -> Ratio:
    """A statistic of two paired samples and the percentiles of its resamples, seeds drawn with replacement.

    Args:
        statistic: of means over seeds, shapes [R, G] of R resamples each, to shape [R].
        first: shape [S, G].
        second: shape [S, G], the same seeds.
    """
    drawn = np.random.default_rng(seed).integers(0, len(first), (RESAMPLES, len(first)))
    weights = np.stack([np.bincount(row, minlength=len(first)) for row in drawn]) / len(first)  # [R, S]
    value = float(statistic(first.mean(axis=0, keepdims=True), second.mean(axis=0, keepdims=True))[0])
    resampled = statistic(weights @ first, weights @ second)
    tail = (1 - LEVEL) / 2
    # Of two neighbours the nearer one: halfway to infinity is no number.
    low, high = np.quantile(resampled, [tail, 1 - tail], method="nearest").tolist()
    return Ratio(value, low, high)


def ratio_of_means(first: Array, second: Array) -> Array:
    """Of the only column, shapes [R, 1]; nothing over nothing is no number, something over nothing infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(first[:, 0] / second[:, 0])


def share_to_reach(first: Array, second: Array) -> Array:
    """Share of the budget at which the first's mean curve is at least the second's last value; infinite: never."""
    reached = first >= second[:, -1:]
    place = reached.argmax(axis=1)
    return np.where(reached.any(axis=1), np.array(GRID)[place], np.inf)


def table(found: Mapping[str, Sequence[Found]], baseline: str) -> list[str]:
    """Markdown rows: each rival's hypervolumes, and the baseline's over them."""
    curves = {name: np.array([each.hypervolumes for each in results]) for name, results in found.items()}
    percents = [f"{share:.0%}" for share in SHARES]
    head = ["", *percents, *(f"{baseline} / it, {percent}" for percent in percents), "trials"]
    lines = [_row(head), _row(["---"] * len(head))]
    for name, values in curves.items():
        columns = [round(share * STEPS) for share in SHARES]
        shown = [f"{values[:, c].mean():.4f} ± {values[:, c].std(ddof=min(1, len(values) - 1)):.4f}" for c in columns]
        ours = curves[baseline][: len(values)]
        ratios = [
            "" if name == baseline else str(bootstrap(ratio_of_means, ours[:, [c]], values[:, [c]])) for c in columns
        ]
        label = name if len(values) == len(curves[baseline]) else f"{name} ({len(values)} seeds)"
        lines.append(_row([label, *shown, *ratios, _trials(found[name])]))
    lines += ["", f"Mean ± standard deviation over {len(found[baseline])} seeds; ratios of means [95 % interval]."]
    asha = [name for name in curves if name.startswith("asha")]
    if asha:
        best = max(asha, key=lambda name: float(curves[name][:, -1].mean()))
        lines.append(f"Best ASHA at the end: {best}.")
    if RANDOM in curves:
        share = bootstrap(share_to_reach, curves[baseline], curves[RANDOM])
        lines.append(f"{baseline} reaches random's final hypervolume after a share {share} of its accelerator-hours.")
    seconds = [each.seconds for results in found.values() for each in results]
    lines.append(f"Simulating one took {np.median(seconds):.1f} s of a core (median), {max(seconds):.1f} s at most.")
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _trials(results: Sequence[Found]) -> str:
    """Mean number of trials by how they ended."""
    states = sorted({state for each in results for state in each.states})
    return ", ".join(f"{np.mean([each.states.get(s, 0) for each in results]):.0f} {s.lower()}" for s in states)
