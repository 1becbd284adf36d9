"""What values at a rung say about results: `search.scheduling.forecast`."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from search.scheduling.forecast import PRIOR_SPREAD, PRIOR_TRIALS, forecast

Array = NDArray[np.float64]


def drawn(seed: int, num: int) -> Array:
    return np.random.default_rng(seed).random((num, 2))


@given(st.integers(0, 10**6), st.integers(1, 30))
def test_one_gain_for_all_is_found_whatever_their_number(seed: int, num: int) -> None:
    rung = drawn(seed, num)
    found = forecast(rung, rung + np.array([0.1, -0.2]))
    assert found.slope == pytest.approx(np.eye(2), abs=1e-9)
    assert found.of(np.array([0.3, 0.5])) == pytest.approx([0.4, 0.3], abs=1e-9)
    assert found.residual == pytest.approx([0, 0], abs=1e-9)


def test_equal_values_say_nothing_about_the_slope() -> None:
    found = forecast(np.full((6, 2), 0.5), drawn(0, 6))
    assert found.slope == pytest.approx(np.eye(2))


def test_with_many_trials_it_is_least_squares() -> None:
    rng = np.random.default_rng(1)
    rung = rng.random((5000, 2))
    slope = np.array([[0.4, 0.1], [-0.3, 1.2]])
    final = [0.2, 0.1] + rung @ slope + rng.normal(0, [0.01, 0.05], (5000, 2))
    found = forecast(rung, final)
    least = np.linalg.lstsq(np.column_stack([np.ones(5000), rung]), final, rcond=None)[0]
    assert found.slope == pytest.approx(least[1:], abs=2 * PRIOR_TRIALS / 5000)
    assert found.of(np.array([0.5, 0.5])) == pytest.approx([0.2, 0.1] + np.array([0.5, 0.5]) @ slope, abs=0.005)
    assert found.spread(rung.mean(axis=0)) == pytest.approx([0.01, 0.05], rel=0.05)


def test_few_trials_stay_near_the_prior() -> None:
    """Uncorrelated objectives: the slope of each is (slope * S + k v) / (S + k v)."""
    rung = np.array([[0.2, 0.1], [0.2, 0.3], [0.4, 0.1], [0.4, 0.3]])
    final = 0.5 * rung
    found = forecast(rung, final)
    scatter, variance = 4 * 0.01, 0.01  # of either objective; they are uncorrelated
    of_each = (0.5 * scatter + PRIOR_TRIALS * variance) / (scatter + PRIOR_TRIALS * variance)
    assert found.slope == pytest.approx(of_each * np.eye(2))


def test_the_unlucky_at_a_noisy_rung_are_forecast_better_than_by_one_gain_for_all() -> None:
    """A rung that is a result and as much noise: the lowest tenth there regains half of what it lacks."""
    rng = np.random.default_rng(2)
    final = rng.normal(0.5, 0.05, (400, 2))
    rung = final - 0.1 + rng.normal(0, 0.05, (400, 2))
    found = forecast(rung[:200], final[:200])
    new, then = rung[200:], final[200:]
    low = new[:, 0] <= np.quantile(new[:, 0], 0.1)
    one_gain = new + (final[:200] - rung[:200]).mean(axis=0)
    bias = (found.of(new) - then)[low, 0].mean(), (one_gain - then)[low, 0].mean()
    assert abs(bias[0]) < 0.015 < 0.03 < -bias[1]
    assert found.residual == pytest.approx([0.05 / np.sqrt(2)] * 2, rel=0.15)


def test_trials_that_lie_close_together_make_no_slope() -> None:
    """Two finished trials, a thousandth apart at the rung and a tenth in their results."""
    found = forecast(np.array([[0.80, 0.40], [0.801, 0.40]]), np.array([[0.85, 0.45], [0.86, 0.55]]))
    assert found.slope == pytest.approx(np.eye(2), abs=0.1)
    assert found.of(np.array([0.82, 0.38])) == pytest.approx([0.875, 0.48], abs=0.005)


def test_the_spread_is_that_of_a_new_result() -> None:
    """It is residual * sqrt(1 + 1/N + v' C v), and new results lie within two of it as often as they should."""
    rng = np.random.default_rng(4)
    within = 0
    for _ in range(400):
        rung = rng.normal(0.5, 0.05, (8, 2))
        final = 0.2 + 0.8 * rung + rng.normal(0, 0.02, (8, 2))
        found = forecast(rung, final)
        new = rng.normal(0.5, 0.05, 2)
        result = 0.2 + 0.8 * new + rng.normal(0, 0.02, 2)
        within += int(np.sum(np.abs(result - found.of(new)) < 2 * found.spread(new)))
    assert 0.9 < within / 800 < 0.97  # 0.95, less the tails of few degrees of freedom
    centre, far = found.rung, found.rung + np.array([0.1, 0.0])
    assert found.spread(centre) == pytest.approx(found.residual * np.sqrt(1 + 1 / 8))
    covariance = np.linalg.inv((rung - centre).T @ (rung - centre) + PRIOR_TRIALS * np.diag(rung.var(axis=0)))
    assert rung.std() > PRIOR_SPREAD
    assert found.spread(far) == pytest.approx(found.residual * np.sqrt(1 + 1 / 8 + 0.01 * covariance[0, 0]))
    assert found.spread(np.stack([centre, far])) == pytest.approx(np.stack([found.spread(centre), found.spread(far)]))
