"""Slow and obvious implementations that the package is compared with.

Written from the definitions, in float64 where it matters, with loops where loops are clearer.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ccdist.interval import Interval


def box_corners(lower: Tensor, upper: Tensor) -> Tensor:
    """All 2^n corners [2^n, *shape] of one box (no batch dimension)."""
    flat = [(float(a), float(b)) for a, b in zip(lower.flatten(), upper.flatten(), strict=True)]
    corners = torch.tensor(list(itertools.product(*flat)), dtype=lower.dtype)
    return corners.view(-1, *lower.shape)


def corner_bounds(function: Callable[[Tensor], Tensor], box: Interval) -> Interval:
    """Exact bounds of an affine function (or of any function monotone in each input) over each box of a batch."""
    outputs = [function(box_corners(low, up)) for low, up in zip(box.lower, box.upper, strict=True)]
    return Interval(torch.stack([o.amin(0) for o in outputs]), torch.stack([o.amax(0) for o in outputs]))


def grid(lower: Tensor, upper: Tensor, points: int) -> Tensor:
    """points^n points that cover one box, ends included."""
    axes = [torch.linspace(float(a), float(b), points, dtype=lower.dtype) for a, b in zip(lower, upper, strict=True)]
    return torch.cartesian_prod(*axes)


def sample_box(box: Interval, count: int, generator: torch.Generator) -> Tensor:
    """[count, B, ...]: uniform points and, in the second half, random corners."""
    noise = torch.rand((count, *box.shape), generator=generator, dtype=box.lower.dtype)
    noise[count // 2 :] = noise[count // 2 :].round()
    return box.lower + noise * (box.upper - box.lower)


def convolution(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """One image [C, H, W] by four loops."""
    channels, height, width = x.shape
    padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=x.dtype)
    padded[:, padding : padding + height, padding : padding + width] = x
    out_channels, _, kernel, _ = weight.shape
    rows = (height + 2 * padding - kernel) // stride + 1
    columns = (width + 2 * padding - kernel) // stride + 1
    out = torch.zeros(out_channels, rows, columns, dtype=x.dtype)
    for channel, row, column in itertools.product(range(out_channels), range(rows), range(columns)):
        top, left = row * stride, column * stride
        window = padded[:, top : top + kernel, left : left + kernel]
        out[channel, row, column] = (window * weight[channel]).sum() + bias[channel]
    return out


def dense(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(matrix, offset) of an affine function of one input of this shape, column by column, in float64."""
    size = math.prod(shape)
    offset = function(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
    units = torch.eye(size, dtype=torch.float64).view(size, *shape)
    columns = [function(unit[None]).flatten() - offset for unit in units]
    return torch.stack(columns, 1), offset


def logit_differences(logits: Tensor, labels: Tensor) -> Tensor:
    rows = [
        [row[y] - row[j] for j in range(len(row)) if j != y]
        for row, y in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    return torch.tensor(rows, dtype=logits.dtype)


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """mean of -log(exp(z_y) / sum_k exp(z_k)), in Python floats."""
    losses = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        top = max(row)
        losses.append(math.log(sum(math.exp(z - top) for z in row)) + top - row[label])
    return sum(losses) / len(losses)


def distillation(adv: Tensor, lower: Tensor, upper: Tensor, teacher: Tensor, alpha: float) -> float:
    """D_alpha by its first definition: the worse of the two ends of each interpolated interval."""
    total = 0.0
    for a, l, u, t in zip(*(x.flatten().tolist() for x in (adv, lower, upper, teacher)), strict=True):  # noqa: E741
        low, up = (1 - alpha) * a + alpha * l, (1 - alpha) * a + alpha * u
        total += max((low - t) ** 2, (up - t) ** 2)
    return total / len(adv)


def smoothed_epsilon(step: int, start: int, length: int, epsilon_max: float) -> float:
    """The formula of auto_LiRPA's smoothed schedule, with its own names (mid = 0.25, power 4)."""
    end = start + length
    middle = start + int(0.25 * length)
    if step <= start:
        return 0.0
    if step >= end:
        return epsilon_max
    rise = float(middle - start)
    factor = 0.0 if rise == 0 else epsilon_max / ((end - middle) * 4 * rise**3 + rise**4)
    if step < middle:
        return factor * (step - start) ** 4
    reached = factor * rise**4
    return reached + (epsilon_max - reached) * (step - middle) / (end - middle)


def shi(input_radius: Tensor, boxes: list[Interval], tau: float) -> float:
    """R_tight + R_relu, layer by layer, unit by unit."""
    tight = balance = 0.0
    r0 = float(input_radius.mean())
    for box in boxes:
        lows, ups = box.lower.flatten().tolist(), box.upper.flatten().tolist()
        centers = [(a + b) / 2 for a, b in zip(lows, ups, strict=True)]
        radius = sum((b - a) / 2 for a, b in zip(lows, ups, strict=True)) / len(lows)
        tight += max(0.0, tau - r0 / radius) / tau
        mean = sum(centers) / len(centers)
        on = [c for c, a in zip(centers, lows, strict=True) if a > 0]
        off = [c for c, b in zip(centers, ups, strict=True) if b < 0]
        if not on or not off:
            continue
        for above, below in (
            (sum(on), -sum(off)),
            (sum((c - mean) ** 2 for c in on), sum((c - mean) ** 2 for c in off)),
        ):
            balance += max(0.0, tau - min(above / below, below / above)) / tau
    return (tight + balance) / len(boxes)


def pgd(
    network: nn.Module, start: Tensor, labels: Tensor, box: Interval, *, steps: int, step_size: float
) -> list[Tensor]:
    """Every iterate of signed gradient ascent on the cross-entropy, start included."""
    iterates = [start.clone()]
    for _ in range(steps):
        x = iterates[-1].clone().requires_grad_()
        loss = nn.functional.cross_entropy(network(x), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        moved = x.detach() + step_size * (box.upper - box.lower) / 2 * torch.sign(gradient)
        iterates.append(torch.minimum(torch.maximum(moved, box.lower), box.upper))
    return iterates


def shifted_crop(image: Tensor, down: int, right: int, padding: int) -> Tensor:
    """[C, H, W] padded by its edge pixels, then cropped to its size at an offset from the middle."""
    padded = nn.functional.pad(image[None].double(), (padding,) * 4, mode="replicate")[0].to(image.dtype)
    _, height, width = image.shape
    top, left = padding + down, padding + right
    return padded[:, top : top + height, left : left + width]


def upper_hull(x: Tensor, y: Tensor, at: float) -> float:
    """Height at `at` of the upper convex hull of points with increasing x: the monotone chain, point by point."""
    hull: list[tuple[float, float]] = []
    for point in zip(x.tolist(), y.tolist(), strict=True):
        while len(hull) >= 2 and _turns_left(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    for (left, low), (right, high) in itertools.pairwise(hull):
        if left <= at <= right:
            return low if left == right else low + (high - low) * (at - left) / (right - left)
    raise ValueError(f"{at} is outside of the points")


def _turns_left(first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]) -> bool:
    one, other = (middle[0] - first[0], middle[1] - first[1]), (last[0] - first[0], last[1] - first[1])
    return one[0] * other[1] - one[1] * other[0] >= 0
