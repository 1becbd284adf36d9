"""Projected gradient descent, for training and for evaluation.

Shapes: `B` batch, `K` classes.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ccdist.bounds import logit_differences
from ccdist.threats import L2Ball, Region

LogitsOf = Callable[[Tensor], Tensor]
LossOf = Callable[[Tensor], Tensor]  # logits [B, K] -> loss of each image [B], which the attack raises
Keep = Literal["best", "last"]


def uniform_start(region: Region, generator: torch.Generator) -> Tensor:
    """A uniform random point of the region; of a ball before it is clamped to the pixel range.

    In a ball of d pixels: a normal direction of length epsilon * u^(1/d), u uniform in [0, 1].
    """
    if isinstance(region, L2Ball):
        return _ball_start(region, generator)
    noise = torch.rand(region.shape, generator=generator, device=region.lower.device, dtype=region.lower.dtype)
    return region.lower + noise * (region.upper - region.lower)


def _ball_start(ball: L2Ball, generator: torch.Generator) -> Tensor:
    device, dtype = ball.center.device, ball.center.dtype
    direction = unit_length(torch.randn(ball.shape, generator=generator, device=device, dtype=dtype))
    share = torch.rand((len(direction), 1, 1, 1), generator=generator, device=device, dtype=dtype)
    share = share ** (1 / math.prod(ball.shape[1:]))
    return ball.project(ball.center + ball.epsilon * share * direction)


def unit_length(vectors: Tensor) -> Tensor:
    """Each vector [B, ...] divided by its Euclidean length; a vector of zeros stays.

    Divided by the largest entry first: the squares of a confident network's gradients would vanish.
    """
    flat = vectors.flatten(1)
    tiny = torch.finfo(flat.dtype).tiny
    flat = flat / flat.abs().amax(1, keepdim=True).clamp(min=tiny)
    return F.normalize(flat, dim=1, eps=tiny).view_as(vectors)


def cross_entropy_of(labels: Int[Tensor, " B"]) -> LossOf:
    """The cross-entropy with these labels, for each image."""
    return lambda logits: F.cross_entropy(logits, labels, reduction="none")


def ascend(
    logits_of: LogitsOf, x: Tensor, loss_of: LossOf, *, region: Region, step_size: float
) -> tuple[Tensor, Tensor]:
    """One gradient step of the loss, projected to the region.

        box:   x' = clamp(x + step_size * radius * sign(grad), lower, upper),  radius of the box, element-wise
        ball:  x' = project(x + step_size * epsilon * grad / ||grad||_2), to the ball, then to the pixel range

    Returns:
        (x', logits at x), both without a graph.
    """
    gradient, logits = _gradient(logits_of, x, loss_of)
    if isinstance(region, L2Ball):
        return region.project(x + step_size * region.epsilon * unit_length(gradient)), logits
    moved = x + step_size * region.radius * gradient.sign()
    return torch.clamp(moved, region.lower, region.upper), logits


def _gradient(logits_of: LogitsOf, x: Tensor, loss_of: LossOf) -> tuple[Tensor, Tensor]:
    """(gradient of the summed loss at x, logits at x), both without a graph."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(x)
        (gradient,) = torch.autograd.grad(loss_of(logits).sum(), x)
    return gradient, logits.detach()


def noisy_fgsm(
    logits_of: LogitsOf,
    images: Float[Tensor, "B ..."],
    labels: Int[Tensor, " B"],
    *,
    epsilon: float,
    noise: float,
    step_size: float,
    generator: torch.Generator,
) -> Float[Tensor, "B ..."]:
    """N-FGSM: one signed gradient step from a noisy image, not projected back to the epsilon box.

        start = clamp(x + U(-noise * epsilon, noise * epsilon), 0, 1)
        clamp(start + step_size * epsilon * sign(grad at start), 0, 1)

    Source: de Jorge et al., "Make Some Noise: Reliable and Efficient Single-Step Adversarial Training", 2022.
    """
    uniform = torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    start = (images + noise * epsilon * (2 * uniform - 1)).clamp(0, 1)
    gradient, _ = _gradient(logits_of, start, cross_entropy_of(labels))
    return (start + step_size * epsilon * gradient.sign()).clamp(0, 1)


def pgd(
    logits_of: LogitsOf,
    labels: Int[Tensor, " B"],
    *,
    region: Region,
    steps: int,
    step_size: float,
    generator: torch.Generator,
    restarts: int = 1,
    keep: Keep = "best",
    loss_of: LossOf | None = None,
) -> Float[Tensor, "B ..."]:
    """Points of the region with high cross-entropy: the training attack.

    Starts uniformly in the region and takes the steps of `ascend`: of a (clamped, possibly enlarged) box step_size
    times its half width, by sign; of an l_2 ball step_size times epsilon, along the gradient.

    Args:
        logits_of: the attacked function; deterministic, without side effects.
        region: where to search, pixels in [0, 1].
        step_size: relative to the box's half width, where 2 or more always reaches a corner, or to the ball's radius.
        restarts: independent starts, the best loss over all is kept.
        keep: "best": the iterate with the highest loss for each image, start included; "last": the end point
            (only with one restart).
        loss_of: what the attack raises; None: the cross-entropy with the labels.

    Returns:
        One point for each image, without a graph.

    Raises:
        ValueError: keep is "last" with several restarts.

    Source: Madry et al., ICLR 2018; step and choice of iterate as in the codes of CC-IBP and CTBench.
    """
    if keep == "last" and restarts != 1:
        raise ValueError(f"keep='last' has no meaning with {restarts} restarts; use keep='best'")
    loss_of = cross_entropy_of(labels) if loss_of is None else loss_of
    best = region.center  # kept only where every loss is NaN
    best_loss = torch.full(labels.shape, -torch.inf, device=labels.device, dtype=best.dtype)

    def consider(x: Tensor, logits: Tensor) -> None:
        nonlocal best, best_loss
        loss = loss_of(logits)
        better = loss >= best_loss
        best = torch.where(better.view(-1, *(1,) * (x.dim() - 1)), x, best)
        best_loss = torch.where(better, loss, best_loss)

    for _ in range(restarts):
        x = uniform_start(region, generator)
        for _ in range(steps):
            moved, logits = ascend(logits_of, x, loss_of, region=region, step_size=step_size)
            if keep == "best":
                consider(x, logits)
            x = moved
        if keep == "last":
            return x
        with torch.no_grad():
            consider(x, logits_of(x))
    return best


def worst_points(
    logits_of: LogitsOf,
    images: Float[Tensor, "B ..."],
    labels: Int[Tensor, " B"],
    *,
    region: Region,
    steps: int,
    step_size: float,
    restarts: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "B ..."], Float[Tensor, " B"]]:
    """The evaluation attack: points of the region with the smallest margin met by PGD, clean images included.

        margin(x) = min over j != y of z[y] - z[j];  an image is falsified when its margin is not positive

    Random starts are drawn restart by restart, so more restarts from the same generator state never raise the
    adversarial accuracy.

    Returns:
        (points, margins in logits), without a graph.
    """
    with torch.no_grad():
        best, best_margin = images, logit_differences(logits_of(images), labels).amin(1)
    for _ in range(restarts):
        x = uniform_start(region, generator)
        for step in range(steps + 1):
            if step < steps:
                moved, logits = ascend(logits_of, x, cross_entropy_of(labels), region=region, step_size=step_size)
            else:
                with torch.no_grad():
                    moved, logits = x, logits_of(x)
            margin = logit_differences(logits, labels).amin(1)
            better = margin < best_margin
            best = torch.where(better.view(-1, *(1,) * (x.dim() - 1)), x, best)
            best_margin = torch.where(better, margin, best_margin)
            x = moved
    return best, best_margin
