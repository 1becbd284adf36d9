"""Regions and counter-examples against exact rational arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from ccdist.attacks import uniform_start
from ccdist.counterexamples import (
    confirmed,
    float64_copy,
    in_region,
    inner_ball,
    inner_box,
    inner_region,
    misclassified,
    pulled_inside,
    rounded_down,
)
from ccdist.interval import epsilon_box
from ccdist.networks import Network
from ccdist.threats import L2Ball, contains

EPSILONS = [Fraction(1, 10), Fraction(8, 255), Fraction(2, 255), Fraction(1, 4), Fraction(1, 3), Fraction(1, 10**9)]
ULP = 2.0**-23  # of float32 between 1 and 2


def pixels(count: int = 400) -> Tensor:
    """Ordinary pixels, the borders, and numbers so small that their difference from others fills no float64."""
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.rand(count, generator=generator)
    eighths = torch.randint(0, 256, (count,), generator=generator).float() / 255
    return torch.cat([ordinary, eighths, torch.tensor([0.0, 1.0, 1e-40, 1e-30, 0.5, 1e-8, 1 - ULP / 2])])


def fractions(values: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in values.double().flatten().tolist()]


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_rounded_down_is_the_largest_float_not_above(epsilon: Fraction) -> None:
    radius = rounded_down(epsilon)
    assert Fraction(radius) <= epsilon < Fraction(math.nextafter(radius, 1))


def test_a_float_is_the_number_that_it_is() -> None:
    assert rounded_down(0.1) == 0.1
    assert rounded_down(Fraction(1, 10)) < 0.1


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_linf_region_is_decided_exactly(epsilon: Fraction) -> None:
    images = pixels()
    near = (images.double() + float(epsilon)).float()
    for points in (near, torch.nextafter(near, torch.ones(())), torch.nextafter(near, torch.zeros(())), images):
        inside = in_region(
            points.view(-1, 1, 1, 1), images=images.view(-1, 1, 1, 1), norm="linf", epsilon=epsilon
        ).tolist()
        radius = Fraction(rounded_down(epsilon))
        expected = [
            abs(point - image) <= radius and 0 <= point <= 1
            for point, image in zip(fractions(points), fractions(images), strict=True)
        ]
        assert inside == expected


def test_a_difference_that_float64_rounds_to_epsilon_is_outside() -> None:
    # The number after 0.25 is 0.25 + 2^-54. Less 1.5 * 2^-55 it is 0.25 + 2^-56, which float64 rounds to 0.25.
    images = torch.tensor([1.5 * 2.0**-55, 2.0**-54], dtype=torch.float64).view(2, 1, 1, 1)
    points = torch.full((2, 1, 1, 1), math.nextafter(0.25, 1), dtype=torch.float64)
    assert (points - images).flatten().tolist() == [0.25, 0.25]
    assert in_region(points, images=images, norm="linf", epsilon=0.25).tolist() == [False, True]


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_inner_box_is_the_largest_one_inside(epsilon: Fraction) -> None:
    images = pixels()
    box = inner_box(images, epsilon)
    radius = Fraction(rounded_down(epsilon))
    upper_next = torch.nextafter(box.upper, torch.full_like(box.upper, 2.0))
    lower_next = torch.nextafter(box.lower, torch.full_like(box.lower, -2.0))
    columns = (images, box.lower, box.upper, lower_next, upper_next)
    for x, low, up, below, above in zip(*(fractions(column) for column in columns), strict=True):
        assert 0 <= low <= x <= up <= 1
        assert x - low <= radius
        assert up - x <= radius
        assert above > 1 or above - x > radius
        assert below < 0 or x - below > radius


def test_the_rounded_box_is_too_large_and_the_inner_one_is_not() -> None:
    images, epsilon = pixels(4000).view(-1, 1, 1, 1), Fraction(8, 255)
    corners = epsilon_box(images, float(epsilon)).upper
    assert not in_region(corners, images=images, norm="linf", epsilon=epsilon).all()
    inner = pulled_inside(corners, inner_box(images, epsilon))
    assert in_region(inner, images=images, norm="linf", epsilon=epsilon).all()
    assert float((inner - corners).abs().max()) <= ULP


def test_epsilon_outside_the_pixel_range_is_refused() -> None:
    with pytest.raises(ValueError, match="8/255, not 8"):
        inner_box(torch.zeros(1, 1, 1, 1), 8)


@pytest.mark.parametrize("epsilon", [Fraction(1, 2), Fraction(3, 1), Fraction(1, 100)])
def test_points_projected_to_the_inner_ball_are_in_the_exact_ball(epsilon: Fraction) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(50, 1, 28, 28, generator=generator)
    far = images + torch.randn(images.shape, generator=generator)
    for points in (
        pulled_inside(far, inner_ball(images, epsilon)),
        uniform_start(inner_ball(images, epsilon), generator),
    ):
        assert in_region(points, images=images, norm="l2", epsilon=epsilon).all()
        for image, point in list(zip(images, points, strict=True))[:5]:
            squares = sum((a - b) ** 2 for a, b in zip(fractions(image), fractions(point), strict=True))
            assert squares <= epsilon**2


def test_the_inner_ball_loses_little() -> None:
    images = torch.full((1, 1, 28, 28), 0.5)
    assert inner_ball(images, 0.5).epsilon > 0.5 * (1 - 1e-5)
    assert inner_ball(images, 0.0).epsilon == 0


def test_a_length_within_tolerance_only_is_not_in_the_region() -> None:
    images = torch.full((1, 1, 2, 2), 0.25, dtype=torch.float64)
    points = images.clone()
    points[0, 0, 0, 0] += 0.5 * (1 + 5e-7)
    assert contains(L2Ball(images, 0.5), points).item()
    assert not in_region(points, images=images, norm="l2", epsilon=0.5).item()
    points[0, 0, 0, 0] = 0.25 + 0.5 * (1 - 1e-9)
    assert in_region(points, images=images, norm="l2", epsilon=0.5).item()


def affine_pair(weight: Tensor, bias: Tensor, head: Tensor, head_bias: Tensor) -> Network:
    """One pixel -> two features -> two logits, in float32."""
    first, last = nn.Linear(1, 2), nn.Linear(2, 2)
    with torch.no_grad():
        first.weight.copy_(weight.view(2, 1))
        first.bias.copy_(bias)
        last.weight.copy_(head)
        last.bias.copy_(head_bias)
    return Network(nn.Sequential(nn.Flatten(), first), last)


def confirm(network: Network, image: float, point: float, epsilon: Fraction | float = 1.0) -> bool:
    image_, point_ = (torch.full((1, 1, 1, 1), value) for value in (image, point))
    result = confirmed(network, point_, torch.tensor([0]), images=image_, norm="linf", epsilon=epsilon)
    shared = confirmed(
        network,
        point_,
        torch.tensor([0]),
        images=image_,
        norm="linf",
        epsilon=epsilon,
        copy_in_float64=float64_copy(network),
    )
    assert torch.equal(result, shared)
    return bool(result)


ONES, EYE, NONE = torch.ones(2), torch.eye(2), torch.zeros(2)


def test_a_plain_counter_example_and_its_region() -> None:
    # z0 - z1 = x - 0.5 is not positive from 0.5 down.
    network = affine_pair(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.5]), EYE, NONE)
    assert confirm(network, 0.75, 0.5, 0.25)  # a tie, at exactly epsilon
    assert confirm(network, 0.75, 0.25)
    assert not confirm(network, 0.75, 0.625)
    assert not confirm(network, 0.75, 0.5, 0.2499999)
    assert not confirm(network, 0.5, -0.25)  # not an image


def test_float32_alone_is_not_enough() -> None:
    # At x = 1 the first feature is 1 + ulp / 8: a tie in float32, a positive margin in float64.
    network = affine_pair(ONES, torch.tensor([ULP / 8, 0.0]), EYE, NONE)
    point = torch.ones(1, 1, 1, 1)
    assert misclassified(network(point), torch.tensor([0])).item()
    assert not confirm(network, 1.0, 1.0)


def test_float64_alone_is_not_enough() -> None:
    # At x = 1: z0 = (x + 0.6 ulp) - x is ulp in float32 and 0.6 ulp in float64; z1 = 0.8 ulp.
    head = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    network = affine_pair(ONES, torch.tensor([0.6 * ULP, 0.0]), head, torch.tensor([0.0, 0.8 * ULP]))
    point = torch.ones(1, 1, 1, 1)
    assert misclassified(float64_copy(network)(point.double()), torch.tensor([0])).item()
    assert not confirm(network, 1.0, 1.0)


def test_nan_is_no_classification() -> None:
    network = affine_pair(ONES, NONE, EYE, torch.tensor([0.0, torch.nan]))
    assert confirm(network, 0.5, 0.5)


def test_the_deployed_network_stays_float32() -> None:
    network = affine_pair(ONES, NONE, EYE, NONE)
    copied = float64_copy(network)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert {p.dtype for p in copied.parameters()} == {torch.float64}


def test_inner_region_by_norm() -> None:
    images = torch.full((1, 1, 1, 1), 0.5)
    assert isinstance(inner_region(images, "l2", 0.25), L2Ball)
    assert torch.equal(inner_region(images, "linf", 0.25).upper, torch.full((1, 1, 1, 1), 0.75))
