"""Square: its schedule and patterns by hand; no gradient, no point outside."""

import math

import pytest
import torch
from torch import Tensor

from ccdist.counterexamples import in_region, inner_region
from ccdist.interval import Interval
from ccdist.square_attack import bump_of, changed_share, square, two_bumps
from ccdist.threats import Norm

QUERIES = 200


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stairs(x: Tensor) -> Tensor:
    """Two logits of the mean pixel in steps of 1 / 1000, which no gradient can climb."""
    assert not torch.is_grad_enabled()
    assert not x.requires_grad
    steps = (x.flatten(1).mean(1) * 1000).round() / 1000
    return torch.stack([torch.full_like(steps, 0.6), steps], 1)


def test_the_changed_share_halves_after_fixed_numbers_of_queries() -> None:
    halvings = {0: 0, 10: 0, 11: 1, 50: 1, 51: 2, 201: 3, 501: 4, 1001: 5, 2001: 6, 4001: 7, 6001: 8, 8000: 8, 8001: 9}
    for query, times in halvings.items():
        assert changed_share(query) == 0.8 / 2**times
    assert changed_share(4999, p_init=0.4) == 0.4 / 2**7  # the last one of AutoAttack's 5,000


def test_a_bump_by_hand() -> None:
    # n = 1: ring 0 has 1 + 1/4, ring 1 has 1/4
    torch.testing.assert_close(
        bump_of(3, 3), torch.tensor([[0.25, 0.25, 0.25], [0.25, 1.25, 0.25], [0.25, 0.25, 0.25]])
    )
    both = two_bumps(4, 5)
    assert float(torch.linalg.vector_norm(both)) == pytest.approx(1)
    assert (both[:2] > 0).all()
    assert (both[2:] < 0).all()
    assert two_bumps(1, 1).tolist() == [[-1.0]]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_function_without_gradient_is_broken(norm: Norm) -> None:
    images = torch.full((3, 1, 8, 8), 0.5)
    # The mean must reach 0.5995: by 0.0995 a pixel, or by 0.0995 * 8 in length.
    shares = {3.0: True, 0.98: False}
    for share, expected in shares.items():
        epsilon = share * (0.0995 if norm == "linf" else 0.0995 * 8)
        region = inner_region(images, norm, epsilon)
        points = square(stairs, torch.zeros(3).long(), region=region, queries=500, generator=generator())
        assert in_region(points, images=images, norm=norm, epsilon=epsilon).all()
        with torch.no_grad():
            assert (stairs(points).argmax(1) == 1).tolist() == [expected] * 3


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (2, 2, 3), (1, 1, 6), (1, 1, 1)])
def test_every_image_size_stays_in_the_region(norm: Norm, shape: tuple[int, int, int]) -> None:
    images = torch.rand(4, *shape, generator=generator(1))
    weight = torch.randn(math.prod(shape), 3, generator=generator(2))
    labels = (images.flatten(1) @ weight).argmax(1)
    before = images.clone()

    def margin(x: Tensor) -> Tensor:
        logits = x.flatten(1) @ weight
        return logits.gather(1, labels[:, None])[:, 0] - logits.scatter(1, labels[:, None], -torch.inf).amax(1)

    points = square(
        lambda x: x.flatten(1) @ weight,
        labels,
        region=inner_region(images, norm, 0.1),
        queries=QUERIES,
        generator=generator(),
    )
    assert in_region(points, images=images, norm=norm, epsilon=0.1).all()
    assert torch.equal(images, before)
    assert points.isfinite().all()
    assert (margin(points) < margin(images) + 0.5).all()


def test_the_budget_is_kept_and_broken_images_leave() -> None:
    sizes = []

    def logits_of(x: Tensor) -> Tensor:
        sizes.append(len(x))
        mean = x.flatten(1).mean(1)
        return torch.stack([torch.full_like(mean, 0.6), mean], 1)

    images = torch.tensor([0.1, 0.3, 0.55, 0.65, 0.2]).view(5, 1, 1, 1).expand(5, 1, 4, 4).contiguous()
    region = Interval((images - 0.1).clamp(0, 1), (images + 0.1).clamp(0, 1))
    points = square(logits_of, torch.zeros(5).long(), region=region, queries=QUERIES, generator=generator())
    assert len(sizes) == QUERIES
    assert sizes[0] == 5
    assert sizes[-1] == 3
    assert (points.flatten(1).mean(1) >= 0.6).tolist() == [False, False, True, True, False]
    # Where nothing breaks, the search still climbed to the corner.
    torch.testing.assert_close(points[0], region.upper[0])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_seed_decides_and_the_batch_does_not(norm: Norm) -> None:
    images = torch.rand(4, 1, 6, 6, generator=generator(1))
    weight = torch.randn(36, 3, generator=generator(2)) * torch.rand(36, 1, generator=generator(3))
    labels = (images.flatten(1) @ weight).argmax(1)

    def attack(rows: slice, seed: int) -> Tensor:
        region = inner_region(images[rows], norm, 0.05)
        return square(
            lambda x: x.flatten(1) @ weight, labels[rows], region=region, queries=QUERIES, generator=generator(seed)
        )

    everything = attack(slice(0, 4), 0)
    assert torch.equal(everything, attack(slice(0, 4), 0))
    assert not torch.equal(everything, attack(slice(0, 4), 1))
    torch.testing.assert_close(everything[2:3], attack(slice(2, 3), 0), rtol=0, atol=1e-6)
