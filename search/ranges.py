"""Places and distances in a parameter's range, on its own scale."""

import math
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution


def value_at(distribution: BaseDistribution, share: float) -> Any:
    """The value at a share of the range in [0, 1): uniform shares give what the random sampler gives."""
    match distribution:
        case CategoricalDistribution(choices=choices):
            return choices[int(share * len(choices))]
        case IntDistribution(low=low, high=high, log=log):
            # An integer stands for the interval from itself to the next.
            return max(low, min(high, math.floor(_between(low, high + 1, share, log=log))))
        case FloatDistribution(low=low, high=high, log=log):
            return max(low, min(high, _between(low, high, share, log=log)))
    raise ValueError(f"no range in {distribution!r}; expected a number's range or choices")


def distance(first: Any, second: Any, distribution: BaseDistribution) -> float:
    """As a share of the range, 0 to 1; between different choices it is infinite."""
    if not isinstance(distribution, FloatDistribution | IntDistribution):
        return 0.0 if first == second else math.inf
    low, high = distribution.low, distribution.high
    if low == high:
        return 0.0
    if distribution.log:
        return abs(math.log(first) - math.log(second)) / (math.log(high) - math.log(low))
    return float(abs(first - second) / (high - low))


def _between(low: float, high: float, share: float, *, log: bool) -> float:
    if log:
        return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return low + share * (high - low)
