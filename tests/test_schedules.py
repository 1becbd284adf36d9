"""Epsilon and learning rate as functions of the step."""

import itertools
import math

import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccdist.schedules import (
    cosine_learning_rate,
    cyclic_learning_rate,
    multi_step_learning_rate,
    smoothed_epsilon,
)

# A few float64 operations in another order.
ROUNDING = 1e-12

ramps = {"start": st.integers(0, 50), "length": st.integers(0, 300), "epsilon_max": st.floats(1e-4, 1)}


@given(**ramps, step=st.integers(0, 400))
def test_it_is_the_formula(start: int, length: int, epsilon_max: float, step: int) -> None:
    actual = smoothed_epsilon(step, start=start, length=length, epsilon_max=epsilon_max)
    assert actual == pytest.approx(oracles.smoothed_epsilon(step, start, length, epsilon_max), rel=ROUNDING)


@given(**ramps)
def test_it_starts_at_0_ends_at_the_maximum_and_never_falls(start: int, length: int, epsilon_max: float) -> None:
    values = [
        smoothed_epsilon(step, start=start, length=length, epsilon_max=epsilon_max)
        for step in range(start + length + 3)
    ]
    assert all(value == 0 for value in values[: start + 1])
    assert values[start + length + 1 :] == [epsilon_max] * 2
    assert all(a <= b for a, b in itertools.pairwise(values))
    if length >= 1:
        assert values[start + length] == epsilon_max


@pytest.mark.parametrize("length", [4, 8, 80, 31_280])
def test_a_thirteenth_after_a_quarter_of_the_ramp(length: int) -> None:
    assert smoothed_epsilon(7 + length // 4, start=7, length=length, epsilon_max=0.13) == pytest.approx(0.01)


def test_the_slope_is_continuous_at_a_quarter() -> None:
    """Quartic below, linear above: one step before and one after differ by a share of one step only."""
    length = 40_000
    middle = length // 4
    before, at, after = (smoothed_epsilon(middle + d, start=0, length=length, epsilon_max=1.0) for d in (-1, 0, 1))
    # the quartic's slope one step earlier is smaller by 3 / middle, its secant by half of that
    assert (after - at) / (at - before) == pytest.approx(1, abs=3 / middle)


def test_points_of_the_published_curve() -> None:
    """The published ramp: start=2, length=80 epochs, at the start of epoch 10/15/22/41/61/82 of 1-based epochs."""
    steps = 391
    shares = [
        smoothed_epsilon((epoch - 1) * steps, start=steps, length=80 * steps, epsilon_max=1.0)
        for epoch in (1, 10, 15, 22, 41, 61, 82)
    ]
    assert shares == pytest.approx([0, 0.002, 0.014, 0.077, 0.369, 0.677, 1], abs=5e-4)  # printed with 3 digits


@pytest.mark.parametrize(
    ("length", "expected"),
    # steps 3, 4, 5, ... of a ramp that starts at 3
    [
        (0, [0, 1, 1, 1]),
        (1, [0, 1, 1, 1]),
        (2, [0, 1 / 2, 1, 1]),
        (3, [0, 1 / 3, 2 / 3, 1, 1]),
        # M = S + 1: a = 1 / (3 * 4 + 1) = 1/13, reached at the first step, then three steps of 4/13
        (4, [0, 1 / 13, 5 / 13, 9 / 13, 1, 1]),
        # M = S + 1: a = 1 / (4 * 4 + 1) = 1/17, then four steps of 4/17
        (5, [0, 1 / 17, 5 / 17, 9 / 17, 13 / 17, 1, 1]),
    ],
)
def test_short_ramps(length: int, expected: list[float]) -> None:
    values = [smoothed_epsilon(3 + k, start=3, length=length, epsilon_max=1.0) for k in range(len(expected))]
    assert values == pytest.approx(expected, rel=ROUNDING)
    assert smoothed_epsilon(2, start=3, length=length, epsilon_max=1.0) == 0


@pytest.mark.parametrize(("start", "length"), [(-1, 4), (0, -1)])
def test_negative_steps_are_refused(start: int, length: int) -> None:
    with pytest.raises(ValueError, match=f"start {start} and length {length}"):
        smoothed_epsilon(0, start=start, length=length, epsilon_max=0.1)


def test_multi_step_drops_at_its_epochs() -> None:
    rates = [multi_step_learning_rate(epoch, initial=1.0, decay=0.5, drops=(2, 4)) for epoch in range(6)]
    assert rates == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert multi_step_learning_rate(0, initial=1.0, decay=0.5, drops=(0, 0)) == 0.25
    assert multi_step_learning_rate(9, initial=3.0, decay=0.5, drops=()) == 3.0


def test_cyclic_is_a_triangle() -> None:
    rates = [cyclic_learning_rate(step, num_steps=8, peak=1.0, floor=0.2) for step in range(9)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert cyclic_learning_rate(20, num_steps=8, peak=1.0, floor=0.2) == pytest.approx(0.2)


def test_cosine_by_hand() -> None:
    # from 1 to 0.2 in 6 steps: a half is at the middle, cos 60 deg = 1/2 a third of the way
    rates = [cosine_learning_rate(step, num_steps=6, initial=1.0, final=0.2) for step in range(7)]
    assert rates[0] == 1.0
    assert rates[2] == pytest.approx(0.2 + 0.8 * 0.75)
    assert rates[3] == pytest.approx(0.6)
    assert rates[4] == pytest.approx(0.2 + 0.8 * 0.25)
    assert rates[6] == pytest.approx(0.2)
    assert cosine_learning_rate(6, num_steps=6, initial=1.0) == pytest.approx(0.0)


@given(num_steps=st.integers(1, 500), initial=st.floats(1e-3, 10), share=st.floats(0, 1))
def test_cosine_falls_and_is_symmetric(num_steps: int, initial: float, share: float) -> None:
    final = share * initial
    rates = [cosine_learning_rate(k, num_steps=num_steps, initial=initial, final=final) for k in range(num_steps + 1)]
    assert all(b <= a + ROUNDING * initial for a, b in itertools.pairwise(rates))
    for rate, opposite in zip(rates, reversed(rates), strict=True):
        assert rate + opposite == pytest.approx(initial + final, rel=ROUNDING)
    assert math.isclose(rates[0], initial)
