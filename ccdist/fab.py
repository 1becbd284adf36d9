"""The targeted fast adaptive boundary attack: the smallest perturbation that leaves the class.

Shapes: `B` batch, `C H W` image, `D` pixels, `K` classes.

Source: Croce and Hein, "Minimally Distorted Adversarial Examples with a Fast Adaptive Boundary Attack", ICML 2020;
towards target classes as in "Reliable Evaluation of Adversarial Robustness", ICML 2020.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccdist.attacks import LogitsOf
from ccdist.counterexamples import misclassified
from ccdist.threats import Norm

MOST_OF_IMAGE = 0.1  # alpha_max: the largest weight of the step from the image against that from the iterate
OVERSHOOT = 1.05  # eta: how far beyond the linearised boundary a step goes
BACKWARD = 0.9  # beta: where between the image and a misclassified point the search goes on
CLOSE = 1e-12  # share of the value that a projection may leave, for rounding


def to_hyperplane(
    points: Float[Tensor, "B D"], weight: Float[Tensor, "B D"], value: Float[Tensor, " B"], norm: Norm
) -> Float[Tensor, "B D"]:
    """The shortest move inside the pixel range that brings an affine function of each point to 0.

        argmin ||d||  subject to  value + weight . d = 0,  0 <= points + d <= 1

    Every pixel moves by min(t * speed, room) in the direction that helps: speed 1 for l_inf, |weight| for l_2, room
    what the pixel range leaves. The share of `value` that this undoes is concave and piecewise linear in t, so
    Newton's method from t = 0 never goes too far and ends after finitely many steps, each of which brings a pixel to
    its border. Where the pixel range is too small, every pixel goes to its border.

    Args:
        points: in [0, 1].
        value: of the affine function at the points.
    """
    slope = weight.double()
    scale = slope.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    slope, needed = slope / scale, value.double()[:, None] / scale
    slope = torch.where(slope.abs() < 1e-12, 0.0, slope)  # too little to help; its square could vanish
    direction = -(slope * needed.sign()).sign()
    room = torch.where(direction > 0, 1 - points.double(), points.double())
    effect, needed = slope.abs(), needed.abs()
    speed = effect if norm == "l2" else (effect > 0).double()
    rate_of_each = effect * speed
    t = torch.zeros_like(needed)
    for _ in range(points.shape[1] + 1):
        ahead = t * speed
        missing = needed - (effect * torch.minimum(ahead, room)).sum(1, keepdim=True)
        rate = (rate_of_each * (ahead < room)).sum(1, keepdim=True)
        goes_on = (missing > CLOSE * needed) & (rate > 0)
        if not bool(goes_on.any()):
            break
        further = (t + missing / rate).clamp(max=torch.finfo(torch.float64).max)
        t = torch.where(goes_on, further, t)
    move = direction * torch.minimum(t * speed, room)
    return move.to(points.dtype)


def length(offsets: Float[Tensor, "B *shape"], norm: Norm) -> Float[Tensor, " B"]:
    """The l_inf or l_2 norm of each offset, in pixels."""
    lengths: Tensor = torch.linalg.vector_norm(offsets.flatten(1), ord=torch.inf if norm == "linf" else 2, dim=1)
    return lengths


def fab(
    logits_of: LogitsOf,
    images: Float[Tensor, "B C H W"],
    labels: Int[Tensor, " B"],
    targets: Int[Tensor, " B"],
    *,
    norm: Norm,
    steps: int,
    start: Float[Tensor, "B C H W"] | None = None,
    enough: float = 0.0,
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, " B"]]:
    """Misclassified points of the pixel range near to each image.

        f(x) = z[y] - z[t],  linearised at the iterate x;  d and d_image: `to_hyperplane` from x and from the image
        x' = clamp((1 - a) (x + 1.05 d) + a (image + 1.05 d_image), 0, 1),  a = min(||d|| / (||d|| + ||d_image||), 0.1)

    A misclassified x' is a candidate, and the search goes on from image + 0.9 (x' - image).

    Args:
        logits_of: the attacked function; deterministic, each row by itself.
        targets: the class whose boundary is linearised; a point of any wrong class counts.
        start: the first iterate; None: the image, from where no random number is needed.
        enough: an image leaves the batch when a point at this distance or nearer is found; pixels.

    Returns:
        (nearest misclassified point met, its distance in pixels); the image and infinity where none was met.
    """
    points = images.clone()
    distances = torch.full(labels.shape, torch.inf, device=images.device, dtype=images.dtype)
    rows = torch.arange(len(labels), device=images.device)
    x = images if start is None else start
    for _ in range(steps):
        if len(rows) == 0:
            break
        image, label = images[rows], labels[rows]
        x = _step(logits_of, x, image, label, targets[rows], norm)
        with torch.no_grad():
            wrong = misclassified(logits_of(x), label)
        distance = length(x - image, norm)
        nearer = wrong & (distance < distances[rows])
        points[rows[nearer]], distances[rows[nearer]] = x[nearer], distance[nearer]
        x = torch.where(wrong.view(-1, 1, 1, 1), image + BACKWARD * (x - image), x)
        open_ = distances[rows] > enough
        rows, x = rows[open_], x[open_]
    return points, distances


def _step(logits_of: LogitsOf, x: Tensor, image: Tensor, label: Tensor, target: Tensor, norm: Norm) -> Tensor:
    value, gradient = _difference(logits_of, x, label, target)
    weight, flat, flat_image = gradient.flatten(1), x.flatten(1), image.flatten(1)
    at_image = value + (weight * (flat_image - flat)).sum(1)
    # Both projections as one batch; they share the hyperplane.
    moves = to_hyperplane(
        torch.cat([flat, flat_image]), torch.cat([weight, weight]), torch.cat([value, at_image]), norm
    )
    move, image_move = moves.view(2, *x.shape)
    size, image_size = length(move, norm), length(image_move, norm)
    share = (size / (size + image_size).clamp(min=torch.finfo(size.dtype).tiny)).clamp(max=MOST_OF_IMAGE)
    share = share.view(-1, 1, 1, 1)
    ahead = (1 - share) * (x + OVERSHOOT * move) + share * (image + OVERSHOOT * image_move)
    clamped: Tensor = ahead.clamp(0, 1)
    return clamped


def _difference(logits_of: LogitsOf, x: Tensor, label: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(z[y] - z[t], its gradient by x), both without a graph."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(x)
        value = (logits.gather(1, label[:, None]) - logits.gather(1, target[:, None])).squeeze(1)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient
