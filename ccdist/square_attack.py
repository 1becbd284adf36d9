"""Square: random search by squares of changed pixels, from the logits alone.

Every image of the batch meets the same draws, so what becomes of one does not depend on the others.

Shapes: `B` batch, `b` images still attacked, `C H W` image.

Source: Andriushchenko et al., "Square Attack: A Query-Efficient Black-Box Adversarial Attack via Random Search",
ECCV 2020, algorithms 1 to 3.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccdist.apgd import region_rows
from ccdist.attacks import LogitsOf, unit_length
from ccdist.bounds import logit_differences
from ccdist.counterexamples import misclassified
from ccdist.interval import Interval
from ccdist.threats import L2Ball, Region

P_INIT = 0.8  # share of the pixels in the first square
SCHEDULE = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which the share is halved
SMALLEST_L2_WINDOW = 3


def changed_share(query: int, *, p_init: float = P_INIT) -> float:
    """The share of an image's pixels that a query changes: p_init halved after fixed numbers of queries.

    The schedule is that of 10,000 queries, and stays as it is for any other budget, as in AutoAttack's Square.

    Args:
        query: 0 is the first one after the start.
    """
    return math.ldexp(p_init, -sum(query > after for after in SCHEDULE))


_Propose = Callable[[Tensor, Region], Tensor]  # (points, the images' region) -> the changed points of one query


def square(
    logits_of: LogitsOf,
    labels: Int[Tensor, " B"],
    *,
    region: Region,
    queries: int,
    generator: torch.Generator,
    p_init: float = P_INIT,
) -> Float[Tensor, "B C H W"]:
    """Points of the region that random squares reach; a change stays where the margin falls.

        margin(x) = min over j != y of z[y] - z[j]

    No gradient is read. An image leaves the batch as soon as it is misclassified.

    Args:
        logits_of: the attacked function; each row by itself. It need not be differentiable.
        queries: forward passes of one image, the start included.

    Returns:
        The point of smallest margin met, without a graph.
    """
    shape = tuple(region.shape[1:])
    proposals = _box_proposals if isinstance(region, Interval) else _ball_proposals
    points = region.center.clone()
    rows = torch.arange(len(labels), device=points.device)
    x, margin = points, torch.full(labels.shape, torch.inf, device=points.device, dtype=points.dtype)
    for propose in proposals(shape, queries, p_init, generator):
        if len(rows) == 0:
            break
        candidate = propose(x, region)
        with torch.no_grad():
            logits = logits_of(candidate)
        reached = logit_differences(logits, labels).amin(1)
        wrong = misclassified(logits, labels)
        better = (reached < margin) | wrong
        x = torch.where(better.view(-1, 1, 1, 1), candidate, x)
        margin = torch.where(better, reached, margin)
        if bool(wrong.any()):
            points[rows] = x
            rows, x, margin, labels = rows[~wrong], x[~wrong], margin[~wrong], labels[~wrong]
            region = region_rows(region, ~wrong)
    points[rows] = x
    return points


def _box_proposals(
    shape: tuple[int, ...], queries: int, p_init: float, generator: torch.Generator
) -> Iterator[_Propose]:
    """Vertical stripes of corners first, then squares of one corner for each channel."""
    channels, height, width = shape
    yield _corners(slice(0, height), slice(0, width), _signs((1, channels, 1, width), generator))
    places = _uniform(queries - 1, 2, generator)
    signs = _signs((queries - 1, 1, channels, 1, 1), generator)
    for query, (place, sign) in enumerate(zip(places, signs, strict=True)):
        side = max(round(math.sqrt(changed_share(query, p_init=p_init) * height * width)), 1)
        yield _corners(*_window(side, height, width, place), sign)


def _corners(rows: slice, columns: slice, signs: Tensor) -> _Propose:
    """x with a window set to the upper end of the box where the sign is positive, to the lower end elsewhere."""

    def propose(x: Tensor, region: Region) -> Tensor:
        assert isinstance(region, Interval)
        changed = x.clone()
        lower, upper = region.lower[:, :, rows, columns], region.upper[:, :, rows, columns]
        changed[:, :, rows, columns] = torch.where(signs > 0, upper, lower)
        return changed

    return propose


def _ball_proposals(
    shape: tuple[int, ...], queries: int, p_init: float, generator: torch.Generator
) -> Iterator[_Propose]:
    """A grid of bumps first, then moves of the perturbation's length from one window into another."""
    channels, height, width = shape
    yield _grid_of_bumps(shape, generator)
    draws = _uniform(queries - 1, 5, generator)
    signs = _signs((queries - 1, 1, channels, 1, 1), generator)
    for query, (draw, sign) in enumerate(zip(draws, signs, strict=True)):
        side = max(round(math.sqrt(changed_share(query, p_init=p_init) * height * width)), SMALLEST_L2_WINDOW)
        side += 1 - side % 2
        filled, emptied = _window(side, height, width, draw[:2]), _window(side, height, width, draw[2:4])
        tall, wide = min(side, height), min(side, width)
        bump = two_bumps(tall, wide) if draw[4] < 0.5 else two_bumps(wide, tall).T
        yield _moved_length(filled, emptied, bump.to(sign.device) * sign)


def _grid_of_bumps(shape: tuple[int, ...], generator: torch.Generator) -> _Propose:
    """Windows of a fifth of the height beside each other, each with bumps of a random sign for each channel."""
    channels, height, width = shape
    side = max(height // 5, 1)
    perturbation = torch.zeros(1, channels, height, width, device=generator.device)
    for top in range((height % side) // 2, height - side + 1, side):
        for left in range((width % side) // 2, width - side + 1, side):
            bump = two_bumps(side, side).to(generator.device) * _signs((1, channels, 1, 1), generator)
            perturbation[:, :, top : top + side, left : left + side] = bump

    def propose(x: Tensor, region: Region) -> Tensor:
        assert isinstance(region, L2Ball)
        return region.project(region.center + region.epsilon * unit_length(perturbation).to(x.dtype))

    return propose


def _moved_length(filled: tuple[slice, slice], emptied: tuple[slice, slice], bump: Tensor) -> _Propose:
    """The perturbation without one window's part, whose length goes into bumps in the other window.

    new = (bump + old / ||old||) scaled to the length sqrt(||old and emptied part||^2 + unused / C),
    unused = epsilon^2 - ||perturbation||^2;   ||.|| of the part is that of each channel
    """

    def propose(x: Tensor, region: Region) -> Tensor:
        assert isinstance(region, L2Ball)
        offset = x - region.center
        touched = torch.zeros_like(offset[:1, :1])
        touched[:, :, filled[0], filled[1]] = 1
        touched[:, :, emptied[0], emptied[1]] = 1
        available = (offset * touched).square().sum((2, 3), keepdim=True)
        unused = (region.epsilon**2 - offset.square().sum((1, 2, 3), keepdim=True)).clamp(min=0)
        reached = (available + unused / offset.shape[1]).sqrt()
        new = bump.to(x.dtype) + _unit_channels(offset[:, :, filled[0], filled[1]])
        offset[:, :, emptied[0], emptied[1]] = 0
        offset[:, :, filled[0], filled[1]] = _unit_channels(new) * reached
        return region.project(region.center + region.epsilon * unit_length(offset))

    return propose


def _unit_channels(windows: Tensor) -> Tensor:
    unit: Tensor = windows / (torch.linalg.vector_norm(windows, dim=(2, 3), keepdim=True) + 1e-12)
    return unit


@cache  # read only
def two_bumps(height: int, width: int) -> Float[Tensor, "height width"]:
    """A bump in the upper half and its negative in the lower half, of length 1 together.

    A window of one row has no upper half: it is one negative bump.
    """
    upper = height // 2
    pattern = torch.cat([bump_of(upper, width), -bump_of(height - upper, width)])
    normalized: Tensor = pattern / torch.linalg.vector_norm(pattern)
    return normalized


def bump_of(height: int, width: int) -> Float[Tensor, "height width"]:
    """Nested rectangles, highest in the middle.

    sum over m = r + 1 .. n + 1 of 1 / m^2,  r = max(|row - height // 2|, |column - width // 2|),
    n = max(height // 2, width // 2)
    """
    largest = max(height // 2, width // 2)
    from_ring = torch.tensor([sum(1 / m**2 for m in range(ring + 1, largest + 2)) for ring in range(largest + 1)])
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    return from_ring[torch.maximum(rows[:, None], columns[None, :])]


def _window(side: int, height: int, width: int, place: Sequence[float]) -> tuple[slice, slice]:
    """The rows and columns of a square at a place in [0, 1)^2, cut to the image where it is larger."""
    tall, wide = min(side, height), min(side, width)
    top, left = int(place[0] * (height - tall + 1)), int(place[1] * (width - wide + 1))
    return slice(top, top + tall), slice(left, left + wide)


def _uniform(count: int, numbers: int, generator: torch.Generator) -> list[list[float]]:
    """count lists of numbers in [0, 1), drawn at once: reading one by one would wait for a GPU each time."""
    draws = torch.rand((count, numbers), generator=generator, device=generator.device, dtype=torch.float64)
    listed: list[list[float]] = draws.tolist()
    return listed


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """-1 or 1, each with one half."""
    signs: Tensor = torch.randint(0, 2, shape, generator=generator, device=generator.device) * 2 - 1
    return signs
