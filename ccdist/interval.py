"""Interval tensors: a lower and an upper bound that travel as one object.

Shapes: `B` batch, `...` anything. Unit of an interval of images: pixels in [0, 1].
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Interval:
    """Element-wise bounds lower <= x <= upper of a tensor x.

    Equal shapes are checked here. The order lower <= upper is not: it would cost a synchronisation for
    each layer on a GPU, and is a property that the tests check.

    Raises:
        ValueError: lower and upper have different shapes.
    """

    lower: Tensor
    upper: Tensor

    def __post_init__(self) -> None:
        if self.lower.shape != self.upper.shape:
            raise ValueError(
                f"lower has shape {tuple(self.lower.shape)} and upper {tuple(self.upper.shape)}; "
                "an interval needs equal shapes"
            )

    @classmethod
    def from_center(cls, center: Tensor, radius: Tensor) -> "Interval":
        """[center - radius, center + radius]; radius >= 0."""
        return cls(center - radius, center + radius)

    @property
    def center(self) -> Tensor:
        """(lower + upper) / 2."""
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        """(upper - lower) / 2, the half width; >= 0."""
        return (self.upper - self.lower) / 2

    @property
    def shape(self) -> torch.Size:
        return self.lower.shape


def epsilon_box(images: Float[Tensor, "B *shape"], epsilon: float) -> Interval:
    """The l_inf ball of radius epsilon around images, inside the pixel range.

        lower = max(images - epsilon, 0),  upper = min(images + epsilon, 1)

    Args:
        images: pixels in [0, 1].
        epsilon: radius in the same unit (8/255, not 8), in [0, 1].

    Raises:
        ValueError: epsilon is outside [0, 1].
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon is {epsilon}; expected a radius in [0, 1] pixel units (8/255, not 8)")
    return Interval((images - epsilon).clamp(0, 1), (images + epsilon).clamp(0, 1))
