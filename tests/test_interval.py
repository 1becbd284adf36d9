"""Interval and epsilon_box."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import tensors
from torch import Tensor

from ccdist.interval import Interval, epsilon_box

# center - radius and center + radius each round once in float64; the values are below 100.
ROUNDING = 1e-13


def test_hand_numbers() -> None:
    # pixels 0.05, 0.5, 0.95 with radius 0.1: the ends are cut off at 0 and at 1
    box = epsilon_box(torch.tensor([[0.05, 0.5, 0.95]], dtype=torch.float64), 0.1)
    torch.testing.assert_close(box.lower, torch.tensor([[0.0, 0.4, 0.85]], dtype=torch.float64))
    torch.testing.assert_close(box.upper, torch.tensor([[0.15, 0.6, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(box.radius, torch.tensor([[0.075, 0.1, 0.075]], dtype=torch.float64))
    torch.testing.assert_close(box.center, torch.tensor([[0.075, 0.5, 0.925]], dtype=torch.float64))
    assert box.shape == (1, 3)


@given(seed=st.integers(0, 1000), epsilon=st.floats(0, 1))
def test_the_box_is_the_ball_inside_the_pixel_range(seed: int, epsilon: float) -> None:
    images = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = images.clone()
    box = epsilon_box(images, epsilon)
    assert torch.equal(images, kept)
    assert (box.lower >= 0).all()
    assert (box.upper <= 1).all()
    assert (box.lower <= images).all()
    assert (images <= box.upper).all()
    inside = (box.lower > 0) & (box.upper < 1)
    torch.testing.assert_close(box.radius[inside], torch.full_like(box.radius[inside], epsilon))
    wider = epsilon_box(images, min(1.0, 1.5 * epsilon))
    assert (wider.lower <= box.lower).all()
    assert (wider.upper >= box.upper).all()


def test_epsilon_0_is_the_image_to_the_bit() -> None:
    images = torch.rand(2, 1, 3, 3)
    box = epsilon_box(images, 0.0)
    assert torch.equal(box.lower, images)
    assert torch.equal(box.upper, images)


@pytest.mark.parametrize("epsilon", [-0.1, 1.1, 8.0, float("nan")])
def test_an_epsilon_that_is_no_radius_is_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match="8/255, not 8"):
        epsilon_box(torch.zeros(1, 1, 2, 2), epsilon)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        Interval(torch.zeros(2, 3), torch.zeros(3, 2))


@given(center=tensors(2, 5), radius=tensors(2, 5))
def test_center_and_radius_round_trip(center: Tensor, radius: Tensor) -> None:
    box = Interval.from_center(center, radius.abs())
    torch.testing.assert_close(box.center, center, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(box.radius, radius.abs(), rtol=0, atol=ROUNDING)


def test_an_interval_cannot_be_changed() -> None:
    box = Interval(torch.zeros(1), torch.ones(1))
    with pytest.raises(AttributeError):
        box.lower = torch.ones(1)  # type: ignore[misc]
