"""Places and distances in ranges: `search.ranges`."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from search.ranges import distance, value_at

RANGES: list[BaseDistribution] = [
    FloatDistribution(0.01, 1.0, log=True),
    FloatDistribution(-2.0, 3.0),
    FloatDistribution(2.0, 2.0),
    FloatDistribution(1e-200, 1e-170, log=True),
    IntDistribution(1, 4),
    IntDistribution(-3, 3),
    IntDistribution(2, 32, log=True),
    CategoricalDistribution(["b", "a", "c"]),
]


@given(st.sampled_from(RANGES), st.floats(0, 1, exclude_max=True))
def test_every_share_has_a_value_in_the_range(distribution: BaseDistribution, share: float) -> None:
    value = value_at(distribution, share)
    assert distribution._contains(distribution.to_internal_repr(value))
    if isinstance(distribution, FloatDistribution) and distribution.low < distribution.high:
        low = distribution.low
        assert distance(low, value, distribution) == pytest.approx(share, abs=1e-9)
        assert distance(value, low, distribution) == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize(
    ("distribution", "values"),
    [
        (IntDistribution(1, 4), [1, 2, 3, 4]),
        (CategoricalDistribution(["b", "a", "c", "d"]), ["b", "a", "c", "d"]),
    ],
)
def test_equal_shares_of_a_range_have_a_value_each(distribution: BaseDistribution, values: list[Any]) -> None:
    assert [value_at(distribution, share) for share in (0.1, 0.3, 0.6, 0.9)] == values


def test_distances() -> None:
    assert distance(0.01, 0.1, RANGES[0]) == pytest.approx(0.5)
    assert distance(1, 4, IntDistribution(1, 4)) == 1
    assert distance(2.0, 2.0, FloatDistribution(2.0, 2.0)) == 0
    assert distance("a", "a", RANGES[-1]) == 0
    assert distance("a", "b", RANGES[-1]) == math.inf
