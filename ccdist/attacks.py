"""Projected gradient descent, for training (METHOD section C) and for evaluation.

Shapes: `B` batch, `K` classes.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ccdist.bounds import logit_differences
from ccdist.interval import Interval

LogitsOf = Callable[[Tensor], Tensor]
Keep = Literal["best", "last"]


def uniform_start(box: Interval, generator: torch.Generator) -> Tensor:
    """A uniform random point of the box."""
    noise = torch.rand(box.shape, generator=generator, device=box.lower.device, dtype=box.lower.dtype)
    return box.lower + noise * (box.upper - box.lower)


def ascend(logits_of: LogitsOf, x: Tensor, labels: Tensor, *, box: Interval, step_size: float) -> tuple[Tensor, Tensor]:
    """One signed gradient step of the cross-entropy, projected to the box.

        x' = clamp(x + step_size * radius * sign(grad), lower, upper),  radius of the box, element-wise

    Returns:
        (x', logits at x), both without a graph.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(x)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), x)
    moved = x.detach() + step_size * box.radius * gradient.sign()
    return torch.clamp(moved, box.lower, box.upper), logits.detach()


def pgd(
    logits_of: LogitsOf,
    labels: Int[Tensor, " B"],
    *,
    box: Interval,
    steps: int,
    step_size: float,
    generator: torch.Generator,
    restarts: int = 1,
    keep: Keep = "best",
) -> Float[Tensor, "B ..."]:
    """Points of the box with high cross-entropy: the training attack.

    Starts uniformly in the box and takes signed gradient steps of step_size times the half width of the
    (clamped, possibly enlarged) box.

    Args:
        logits_of: the attacked function; deterministic, without side effects.
        box: where to search, pixels in [0, 1].
        step_size: relative to the box's half width; 2 or more always reaches a corner.
        restarts: independent starts, the best loss over all is kept.
        keep: "best": the iterate with the highest loss for each image, start included; "last": the end point
            (only with one restart).

    Returns:
        One point for each image, without a graph.

    Raises:
        ValueError: keep is "last" with several restarts.

    Source: Madry et al., ICLR 2018; step and choice of iterate as in METHOD section C.
    """
    if keep == "last" and restarts != 1:
        raise ValueError(f"keep='last' has no meaning with {restarts} restarts; use keep='best'")
    best = box.center  # kept only where every loss is NaN
    best_loss = torch.full(labels.shape, -torch.inf, device=labels.device, dtype=box.lower.dtype)

    def consider(x: Tensor, logits: Tensor) -> None:
        nonlocal best, best_loss
        loss = F.cross_entropy(logits, labels, reduction="none")
        better = loss >= best_loss
        best = torch.where(better.view(-1, *(1,) * (x.dim() - 1)), x, best)
        best_loss = torch.where(better, loss, best_loss)

    for _ in range(restarts):
        x = uniform_start(box, generator)
        for _ in range(steps):
            moved, logits = ascend(logits_of, x, labels, box=box, step_size=step_size)
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
    box: Interval,
    steps: int,
    step_size: float,
    restarts: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "B ..."], Float[Tensor, " B"]]:
    """The evaluation attack: points of the box with the smallest margin met by PGD, clean images included.

        margin(x) = min over j != y of z[y] - z[j];  an image is falsified when its margin is not positive

    Random starts are drawn restart by restart, so more restarts from the same generator state never raise the
    adversarial accuracy.

    Returns:
        (points, margins in logits), without a graph.
    """
    with torch.no_grad():
        best, best_margin = images, logit_differences(logits_of(images), labels).amin(1)
    for _ in range(restarts):
        x = uniform_start(box, generator)
        for step in range(steps + 1):
            if step < steps:
                moved, logits = ascend(logits_of, x, labels, box=box, step_size=step_size)
            else:
                with torch.no_grad():
                    moved, logits = x, logits_of(x)
            margin = logit_differences(logits, labels).amin(1)
            better = margin < best_margin
            best = torch.where(better.view(-1, *(1,) * (x.dim() - 1)), x, best)
            best_margin = torch.where(better, margin, best_margin)
            x = moved
    return best, best_margin
