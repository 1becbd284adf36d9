"""What a perturbed image may be: a box of pixels (l_inf) or a Euclidean ball inside the pixel range (l_2).

Shapes: `B` batch, `C H W` image. Unit: pixels in [0, 1]; an l_2 radius is the Euclidean length in that unit, so it
may exceed 1.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ccdist.interval import Interval, epsilon_box

Norm = Literal["linf", "l2"]


@dataclass(frozen=True, slots=True)
class L2Ball:
    """The images x in [0, 1] with ||x - center||_2 <= epsilon, one ball for each image of a batch.

    Raises:
        ValueError: center is no batch of images [B, C, H, W], or epsilon is negative or not finite.
    """

    center: Tensor
    epsilon: float

    def __post_init__(self) -> None:
        if self.center.dim() != 4:
            raise ValueError(f"center has shape {tuple(self.center.shape)}; an l_2 ball needs images [B, C, H, W]")
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon is {self.epsilon}; expected a finite Euclidean radius of 0 or more")

    @property
    def box(self) -> Interval:
        """The smallest box around the ball inside the pixel range: [max(x - epsilon, 0), min(x + epsilon, 1)]."""
        return Interval((self.center - self.epsilon).clamp(0, 1), (self.center + self.epsilon).clamp(0, 1))

    @property
    def shape(self) -> torch.Size:
        return self.center.shape

    def project(self, points: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Points pulled back to the ball along the radius, then clamped to [0, 1].

        The order matters: the center lies in the pixel range, so clamping brings every pixel nearer to it and keeps
        the point in the ball; the other order could leave the pixel range again. Not always the nearest point.
        """
        offset = points - self.center
        length = torch.linalg.vector_norm(offset, dim=(1, 2, 3), keepdim=True)
        shrink = (self.epsilon / length.clamp(min=torch.finfo(length.dtype).tiny)).clamp(max=1)
        projected: Tensor = (self.center + shrink * offset).clamp(0, 1)
        return projected


Region = Interval | L2Ball


def perturbation_set(images: Float[Tensor, "B C H W"], norm: Norm, epsilon: float) -> Region:
    """The perturbed images that count: the epsilon box for linf, the ball for l2, both inside the pixel range.

    Args:
        images: pixels in [0, 1].
        epsilon: radius in pixel units: in [0, 1] for linf, 0 or more for l2.

    Raises:
        ValueError: epsilon is out of its range.
    """
    return epsilon_box(images, epsilon) if norm == "linf" else L2Ball(images, epsilon)


# Share of epsilon by which the length of a projected offset may miss it: a float32 sum of some thousand squares.
LENGTH_ROUNDING = 1e-6


def contains(region: Region, points: Float[Tensor, "B *shape"]) -> Bool[Tensor, " B"]:
    """Which points lie in their image's region.

    A box is checked exactly. For a ball the distance is computed in float64 and may exceed epsilon by what storing
    the point rounds away: LENGTH_ROUNDING * epsilon + u * sqrt(C H W), u the spacing of the points' numbers at 1
    (1.2e-7 in float32; 3e-6 in all for an image of 28 x 28). The pixel range is checked exactly.
    """
    if isinstance(region, Interval):
        return ((points >= region.lower) & (points <= region.upper)).flatten(1).all(1)
    distance = torch.linalg.vector_norm((points.double() - region.center.double()).flatten(1), dim=1)
    stored = torch.finfo(points.dtype).eps * math.sqrt(points[0].numel()) if len(points) else 0.0
    inside: Tensor = distance <= region.epsilon * (1 + LENGTH_ROUNDING) + stored
    return inside & ((points >= 0) & (points <= 1)).flatten(1).all(1)
