"""When a point counts as a counter-example, and the regions in which attacks look for one.

A counter-example is confirmed when the point lies in the exact region, decided without rounding, and two plain
forward passes fail to classify it: the deployed network's and that of its float64 copy.

Shapes: `B` batch, `C H W` image. Unit: pixels in [0, 1].
"""

import copy
import math
from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ccdist.bounds import logit_differences
from ccdist.interval import Interval
from ccdist.networks import Network
from ccdist.precision import exact_float32
from ccdist.threats import LENGTH_ROUNDING, L2Ball, Norm, Region


def confirmed(
    network: Network,
    points: Float[Tensor, "B C H W"],
    labels: Int[Tensor, " B"],
    *,
    images: Float[Tensor, "B C H W"],
    norm: Norm,
    epsilon: Fraction | float,
    copy_in_float64: Network | None = None,
) -> Bool[Tensor, " B"]:
    """Which points show that their image is not robust: in the exact region, and misclassified twice.

        in_region(point) and not margin(network, point) > 0 and not margin(network in float64, point) > 0

    A tie is no classification, and neither is a NaN among the logits: the margin has to be positive, as for clean
    images. The float64 copy decides too, so that no verdict hangs on how a float32 sum happened to be rounded.

    Args:
        network: as deployed, in eval mode.
        images: what the points are perturbed from.
        epsilon: radius in pixel units; a fraction is taken exactly, a float as the number that it is.
        copy_in_float64: `float64_copy(network)` where many calls share one; None: made here.
    """
    reference = float64_copy(network) if copy_in_float64 is None else copy_in_float64
    with exact_float32(), torch.no_grad():
        confirmed_points: Tensor = in_region(points, images=images, norm=norm, epsilon=epsilon)
        for judge, inputs in ((network, points), (reference, points.double())):
            confirmed_points = confirmed_points & misclassified(judge(inputs), labels)
    return confirmed_points


def misclassified(logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """not min over j != y of z[y] - z[j] > 0: a tie and NaN are no classification."""
    return ~(logit_differences(logits, labels).amin(1) > 0)


def float64_copy(network: Network) -> Network:
    """The same weights in float64; the network itself stays."""
    return copy.deepcopy(network).double()


def in_region(
    points: Float[Tensor, "B C H W"], *, images: Float[Tensor, "B C H W"], norm: Norm, epsilon: Fraction | float
) -> Bool[Tensor, " B"]:
    """Which points are perturbed images in exact arithmetic: within epsilon of their image, and in [0, 1].

    For l_inf the distance is compared exactly. For l_2 the float64 length is enlarged by all that its rounding may
    have hidden, so that no point outside passes; one within 1e-12 * epsilon of the surface may be refused.
    """
    radius = rounded_down(epsilon)
    if norm == "linf":
        near = _within(points, images, radius).flatten(1).all(1)
    else:
        near = _length_at_most(points, images) <= radius
    in_pixel_range: Tensor = ((points >= 0) & (points <= 1)).flatten(1).all(1)
    return in_pixel_range & near


def rounded_down(epsilon: Fraction | float) -> float:
    """The largest float64 that is not above epsilon."""
    nearest = float(epsilon)
    return nearest if Fraction(nearest) <= epsilon else math.nextafter(nearest, -math.inf)


def _within(points: Tensor, images: Tensor, radius: float) -> Tensor:
    """|points - images| <= radius element by element, exactly: the difference is rounded, its rounding error known.

    The error of a float64 difference is itself a float64 number (Knuth, TAOCP 2, 4.2.2).
    """
    a, b = points.double(), images.double()
    difference = a - b
    of_b = a - difference
    error = (a - (difference + of_b)) + (of_b - b)
    distance, excess = difference.abs(), error * difference.sign()
    return (distance < radius) | ((distance == radius) & (excess <= 0))


def _length_at_most(points: Tensor, images: Tensor) -> Tensor:
    """No less than the exact length of points - images: of a float64 sum of n squares all roundings together."""
    offset = (points.double() - images.double()).flatten(1)
    roundings = (offset.shape[1] + 8) * torch.finfo(torch.float64).eps
    length: Tensor = torch.linalg.vector_norm(offset, dim=1) * (1 + roundings)
    return length


def inner_region(images: Float[Tensor, "B C H W"], norm: Norm, epsilon: Fraction | float) -> Region:
    """Where attacks move so that every point they find lies in the exact region: `inner_box` or `inner_ball`."""
    return inner_box(images, epsilon) if norm == "linf" else inner_ball(images, epsilon)


def inner_box(images: Float[Tensor, "B *shape"], epsilon: Fraction | float) -> Interval:
    """The largest box in the images' dtype inside the exact one, max(x - epsilon, 0) to min(x + epsilon, 1).

    The nearest numbers to x - epsilon and x + epsilon may lie outside by up to half their spacing; then the next
    number towards x takes their place. The image itself always stays inside.

    Args:
        images: pixels in [0, 1].
        epsilon: radius in [0, 1]; a fraction is taken exactly.

    Raises:
        ValueError: epsilon is outside [0, 1].
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon is {epsilon}; expected a radius in [0, 1] pixel units (8/255, not 8)")
    radius = rounded_down(epsilon)
    ends = []
    for offset in (-radius, radius):
        end = (images.double() + offset).to(images.dtype)
        outside = ~_within(end, images, radius)
        end = torch.where(outside, torch.nextafter(end, images), end).clamp(0, 1)
        ends.append(torch.where(_within(end, images, radius), end, images))
    return Interval(*ends)


def inner_ball(images: Float[Tensor, "B C H W"], epsilon: Fraction | float) -> L2Ball:
    """The ball smaller by what projecting to it and storing the point may round: 3e-6 for float32 of 28 x 28."""
    stored = torch.finfo(images.dtype).eps * math.sqrt(math.prod(images.shape[1:]))
    return L2Ball(images, max(rounded_down(epsilon) * (1 - LENGTH_ROUNDING) - stored, 0.0))


def pulled_inside(points: Float[Tensor, "B C H W"], region: Region) -> Float[Tensor, "B C H W"]:
    """Points moved into the region where they lie outside: clamped to a box, projected to a ball."""
    if isinstance(region, L2Ball):
        return region.project(points)
    return torch.clamp(points, region.lower, region.upper)
