"""What bounds need to know of each activation function: where it turns, where it bends, which lines enclose it.

The curved ones (tanh, sigmoid, GELU) are enclosed by two lines whose slopes are searched for and whose offsets
are then computed so that the lines hold whatever the slope: a poor search costs tightness, never soundness.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccdist.interval import Interval

Activation = Literal["relu", "leaky_relu", "tanh", "sigmoid", "gelu"]

# name -> layer; without arguments: slope 0.01 for leaky ReLU, the exact GELU
ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
}
ACTIVATION_LAYERS = tuple(ACTIVATIONS.values())

# approximate -> (x*, gelu(x*)): GELU falls up to x* and rises after it. x* is the root of the derivative, Newton's
# method in 40 digits: of Phi(x) + x phi(x) for "none", where gelu(x) = x Phi(x) with the normal distribution's Phi
# and phi; of (1 + t) / 2 + x (1 - t^2) t'(x) / 2 for "tanh", where gelu(x) = x (1 + t(x)) / 2,
# t(x) = tanh(sqrt(2 / pi) (x + 0.044715 x^3)).
GELU_MINIMUM: dict[str, tuple[float, float]] = {
    "none": (-0.75179152469356446, -0.16997120747990366),
    "tanh": (-0.75246142207101626, -0.17004075057125405),
}
# approximate -> c: GELU is convex on [-c, c] and concave on either side. gelu''(x) = phi(x) (2 - x^2) for "none", so
# c is sqrt(2); for "tanh" c is the root of the second derivative, found as above. gelu(x) - x / 2 is even, hence -c.
GELU_INFLECTION = {"none": math.sqrt(2), "tanh": 1.4185040087908284}

# Lines tried for each side of a box, and halvings of the search for where a line touches: on boxes up to 12 wide the
# line is within 0.5 % of the box's width of the best one at its middle; more cost time in proportion.
LINE_TRIALS = 3
BISECTIONS = 14
# Below this width the secant is mostly rounding, and the tangent in the middle as good.
NARROW = 1e-3


@dataclass(frozen=True)
class Curve:
    """A smooth function, its derivative, and the pieces of the real line on which it is concave and convex."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    concave: tuple[tuple[float, float], ...]
    convex: tuple[tuple[float, float], ...]

    def negated(self) -> "Curve":
        """The curve of -f."""
        return Curve(lambda x: -self.value(x), lambda x: -self.derivative(x), self.convex, self.concave)


@dataclass(frozen=True)
class Lines:
    """lower_slope x + lower_offset <= f(x) <= upper_slope x + upper_offset for every x of a box, unit by unit."""

    lower_slope: Tensor
    lower_offset: Tensor
    upper_slope: Tensor
    upper_offset: Tensor


def _tanh_slope(x: Tensor) -> Tensor:
    return 1 - torch.tanh(x).square()


def _sigmoid_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


def _gelu_slope(x: Tensor) -> Tensor:
    cumulative: Tensor = torch.special.erfc(-x / math.sqrt(2)) / 2
    return cumulative + x * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(scale * (x + cubic * x**3))
    return (1 + t) / 2 + x * (1 - t.square()) * scale * (1 + 3 * cubic * x.square()) / 2


def _gelu_curve(approximate: str) -> Curve:
    bend = GELU_INFLECTION[approximate]
    return Curve(
        lambda x: F.gelu(x, approximate=approximate),
        _gelu_slope if approximate == "none" else _gelu_tanh_slope,
        concave=((-math.inf, -bend), (bend, math.inf)),
        convex=((-bend, bend),),
    )


def _s_curve(value: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor]) -> Curve:
    return Curve(value, derivative, concave=((0.0, math.inf),), convex=((-math.inf, 0.0),))


def curve_of(layer: nn.Module) -> Curve | None:
    """The layer's curve; None where it has none because it is not smooth, or no activation."""
    if type(layer) is nn.Tanh:
        return _s_curve(torch.tanh, _tanh_slope)
    if type(layer) is nn.Sigmoid:
        return _s_curve(torch.sigmoid, _sigmoid_slope)
    if type(layer) is nn.GELU:
        return _gelu_curve(layer.approximate)
    return None


def enclosing_lines(curve: Curve, box: Interval) -> Lines:
    """A line below and a line above the curve over each unit's box, both close to the best at its middle.

    Source: the choice of lines is that of CROWN (Zhang et al., NeurIPS 2018) where a box has one bend at most;
    the search is ours, so that GELU with its two bends needs no cases.
    """
    upper_slope, upper_offset = _line_above(curve, box)
    slope, offset = _line_above(curve.negated(), box)
    return Lines(-slope, -offset, upper_slope, upper_offset)


def _line_above(curve: Curve, box: Interval) -> tuple[Tensor, Tensor]:
    """(slope, offset) of the line that is lowest at the middle of the box, among the secants tried.

    The best line touches the curve left and right of the middle. The first secant joins the ends of the box; where
    its parallel touches the curve is one end of the next secant, on that side of the middle.
    """
    middle, left, right = box.center, box.lower, box.upper
    slope = _secant(curve, left, right)
    peak, offset = _touch(curve, box, slope)
    best_slope, best_offset = slope, offset
    for _ in range(LINE_TRIALS - 1):
        left, right = torch.where(peak > middle, left, peak), torch.where(peak > middle, peak, right)
        slope = _secant(curve, left, right)
        peak, offset = _touch(curve, box, slope)
        better = offset + slope * middle < best_offset + best_slope * middle
        best_slope, best_offset = torch.where(better, slope, best_slope), torch.where(better, offset, best_offset)
    return best_slope, best_offset


def _secant(curve: Curve, left: Tensor, right: Tensor) -> Tensor:
    """The slope between two points of the curve, or in their middle where they are too close."""
    width = right - left
    narrow = width < NARROW
    secant = (curve.value(right) - curve.value(left)) / torch.where(narrow, 1, width)
    return torch.where(narrow, curve.derivative((left + right) / 2), secant)


def _touch(curve: Curve, box: Interval, slope: Tensor) -> tuple[Tensor, Tensor]:
    """(where, offset): slope * x + offset is above the curve over the box, and touches it about there.

    The offset is the maximum of g(x) = f(x) - slope x. It lies at an end of the box or inside a concave piece, where
    bisection on the sign of g' leaves a bracket [a, b] around it; g is below its tangent at a, so
    g(a) + max(g'(a), 0) (b - a) is never below the maximum, however wide the bracket still is.
    """
    points = [box.lower, box.upper]
    heights = [curve.value(x) - slope * x for x in points]
    for start, end in curve.concave:
        a, b = box.lower.clamp(min=start).minimum(box.upper), box.upper.clamp(max=end).maximum(box.lower)
        for _ in range(BISECTIONS):
            middle = (a + b) / 2
            rising = curve.derivative(middle) > slope
            a, b = torch.where(rising, middle, a), torch.where(rising, b, middle)
        excess = (curve.derivative(a) - slope).clamp(min=0) * (b - a)
        points.append(a)
        heights.append(curve.value(a) - slope * a + excess)
    offset, index = torch.stack(heights).max(0)
    return torch.stack(points).gather(0, index.unsqueeze(0)).squeeze(0), offset
