"""CROWN: linear lower bounds of logit differences, propagated backward through the network.

Each activation is enclosed by two lines over its pre-activation bounds, which come from interval arithmetic. For a
ReLU with l < 0 < u: above u (x - l) / (u - l), below a x with a slope a in [0, 1].

Shapes: `B` batch, `J` other classes (the specifications), `...` the shape of a layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ccdist.activations import Lines, curve_of, enclosing_lines
from ccdist.batch_norm import BatchNorm, per_channel, scale_and_shift
from ccdist.bounds import (
    Trace,
    UnsupportedLayerError,
    check_rules_describe,
    difference_weights,
    elided_lower_bounds,
    propagate,
)
from ccdist.interval import Interval
from ccdist.networks import Network, Normalize, Residual
from ccdist.threats import L2Ball, Region

# Learning rate of the slopes in alpha-CROWN: they live in [0, 1], and a few dozen steps must cross it.
SLOPE_LEARNING_RATE = 0.2


@dataclass(frozen=True)
class _Step:
    """A leaf layer met on the way back: the interval that entered it, and what encloses it if it is an activation.

    lines: of a smooth activation.
    slope: of a ReLU, in [0, 1]; None: the adaptive one. A leaky one has it between its own slope (0) and 1.
    """

    layer: nn.Module
    box: Interval
    lines: Lines | None
    slope: Tensor | None = None


# (layer, weights [B, J, ...output], step) -> weights [B, J, ...input], offset [B, J]
BackwardRule = Callable[[nn.Module, Tensor, _Step], tuple[Tensor, Tensor]]


# stride, padding, dilation of each image axis, and groups
_Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


def _sum_features(values: Tensor) -> Tensor:
    """[B, J, ...] -> [B, J]."""
    return values.flatten(2).sum(2)


def _linear(layer: nn.Module, weights: Tensor, step: _Step) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, nn.Linear)
    offset = weights.new_zeros(weights.shape[:2]) if layer.bias is None else _sum_features(weights * layer.bias)
    return weights @ layer.weight, offset


def _transposed_conv(weights: Tensor, kernel: Tensor, step: _Step, geometry: _Geometry) -> Tensor:
    """Gradient of a convolution with respect to its input, of exactly the input's size."""
    stride, padding, dilation, groups = geometry
    merged = weights.flatten(0, 1)
    sizes = zip(step.box.shape[2:], merged.shape[2:], kernel.shape[2:], stride, padding, dilation, strict=True)
    output_padding = [size - ((out - 1) * s - 2 * p + d * (k - 1) + 1) for size, out, k, s, p, d in sizes]
    back = F.conv_transpose2d(merged, kernel, None, stride, padding, output_padding, groups, dilation)
    return back.view(*weights.shape[:2], *back.shape[1:])


def _conv2d(layer: nn.Module, weights: Tensor, step: _Step) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, nn.Conv2d)
    assert not isinstance(layer.padding, str)  # refused by the interval rule
    back = _transposed_conv(weights, layer.weight, step, (layer.stride, layer.padding, layer.dilation, layer.groups))
    if layer.bias is None:
        return back, weights.new_zeros(weights.shape[:2])
    return back, weights.sum((3, 4)) @ layer.bias


def _avg_pool2d(layer: nn.Module, weights: Tensor, step: _Step) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, nn.AvgPool2d)
    kernel, stride, padding = (
        (value, value) if isinstance(value, int) else (value[0], value[1])
        for value in (layer.kernel_size, layer.stride, layer.padding)
    )
    if layer.ceil_mode or layer.divisor_override is not None or (padding != (0, 0) and not layer.count_include_pad):
        raise UnsupportedLayerError(
            "no linear rule for AvgPool2d with ceil_mode, divisor_override or count_include_pad=False"
        )
    channels = step.box.shape[1]
    mean = weights.new_full((channels, 1, *kernel), 1 / (kernel[0] * kernel[1]))
    back = _transposed_conv(weights, mean, step, (stride, padding, (1, 1), channels))
    return back, weights.new_zeros(weights.shape[:2])


def _batch_norm(layer: nn.Module, weights: Tensor, step: _Step) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, BatchNorm)
    scale, shift = (per_channel(values, step.box.lower) for values in scale_and_shift(layer, None))
    return weights * scale, _sum_features(weights * shift)


def _normalize(layer: nn.Module, weights: Tensor, step: _Step) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, Normalize)
    scaled = weights / layer.std
    return scaled, -_sum_features(scaled * layer.mean)


def _flatten(layer: nn.Module, weights: Tensor, step: _Step) -> tuple[Tensor, Tensor]:
    return weights.reshape(*weights.shape[:2], *step.box.shape[1:]), weights.new_zeros(weights.shape[:2])


def _identity(layer: nn.Module, weights: Tensor, step: _Step) -> tuple[Tensor, Tensor]:
    return weights, weights.new_zeros(weights.shape[:2])


def adaptive_slope(box: Interval) -> Tensor:
    """CROWN's lower slope: 1 where u > -l, else 0, the line that cuts off the smaller triangle."""
    return (box.upper > -box.lower).to(box.lower.dtype)


def _relu(layer: nn.Module, weights: Tensor, step: _Step) -> tuple[Tensor, Tensor]:
    """f(x) = x above 0, s x below (ReLU: s = 0): one line is the chord, the other goes through the kink at 0."""
    s = layer.negative_slope if isinstance(layer, nn.LeakyReLU) else 0.0
    lower, upper = step.box.lower.clamp(max=0), step.box.upper.clamp(min=0)
    tiny = torch.finfo(lower.dtype).tiny
    chord = (upper - s * lower) / (upper - lower).clamp(min=tiny)  # 1 where stably active, s where stably inactive
    kink = adaptive_slope(step.box)
    if step.slope is not None:
        kink = torch.where((lower < 0) & (upper > 0), step.slope, kink)
    kink = s + (1 - s) * kink
    positive, negative = weights.clamp(min=0), weights.clamp(max=0)
    on_kink, on_chord = (positive, negative) if s <= 1 else (negative, positive)  # concave: the chord is below
    back = on_kink * kink.unsqueeze(1) + on_chord * chord.unsqueeze(1)
    return back, _sum_features(on_chord * (lower * (s - chord)).unsqueeze(1))


def _smooth(layer: nn.Module, weights: Tensor, step: _Step) -> tuple[Tensor, Tensor]:
    assert step.lines is not None
    lines, positive, negative = step.lines, weights.clamp(min=0), weights.clamp(max=0)
    back = positive * lines.lower_slope.unsqueeze(1) + negative * lines.upper_slope.unsqueeze(1)
    offset = positive * lines.lower_offset.unsqueeze(1) + negative * lines.upper_offset.unsqueeze(1)
    return back, _sum_features(offset)


LINEAR_RULES: dict[type[nn.Module], BackwardRule] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.AvgPool2d: _avg_pool2d,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    Normalize: _normalize,
    nn.Flatten: _flatten,
    nn.Identity: _identity,
    nn.ReLU: _relu,
    nn.LeakyReLU: _relu,
    nn.Tanh: _smooth,
    nn.Sigmoid: _smooth,
    nn.GELU: _smooth,
}


def _backward(module: nn.Module, weights: Tensor, steps: list[_Step]) -> tuple[Tensor, Tensor]:
    """Linear bound at the module's output -> at its input; takes the module's steps off the end of `steps`."""
    if isinstance(module, nn.Sequential):
        offset = weights.new_zeros(weights.shape[:2])
        for layer in reversed(list(module)):
            weights, extra = _backward(layer, weights, steps)
            offset = offset + extra
        return weights, offset
    if isinstance(module, Residual):
        # The forward pass visits body then shortcut, so the way back meets the shortcut's steps first.
        short, short_offset = _backward(module.shortcut, weights, steps)
        body, body_offset = _backward(module.body, weights, steps)
        return body + short, body_offset + short_offset
    step = steps.pop()
    assert step.layer is module
    rule = LINEAR_RULES.get(type(module))
    if rule is None:
        raise UnsupportedLayerError(f"no linear rule for {type(module).__name__}")
    return rule(module, weights, step)


def _least(weights: Tensor, region: Region) -> Float[Tensor, "B J"]:
    """A lower bound of sum(weights * x) over the region.

    box:   weights c - |weights| r, the least value;   c, r centre and radius
    ball:  the larger of weights x0 - epsilon ||weights||_2 and the bound over the ball's box
    """
    box = region.box if isinstance(region, L2Ball) else region
    center, radius = box.center.unsqueeze(1), box.radius.unsqueeze(1)
    least = _sum_features(weights * center) - _sum_features(weights.abs() * radius)
    if isinstance(region, L2Ball):
        lengths = torch.linalg.vector_norm(weights.flatten(2), dim=2)
        least = torch.maximum(least, _sum_features(weights * region.center.unsqueeze(1)) - region.epsilon * lengths)
    return least


def _crown(
    network: Network, region: Region, labels: Tensor, steps: list[_Step], slopes: list[Tensor] | None
) -> Float[Tensor, "B J"]:
    """The CROWN bound for the pre-activation bounds in `steps`; slopes None: the adaptive ones."""
    remaining = iter(slopes or ())
    steps = [replace(step, slope=next(remaining, None)) if _has_slope(step) else step for step in steps]
    weights, offset = difference_weights(network.head, labels)
    weights, extra = _backward(network.features, weights, steps)
    return _least(weights, region) + offset + extra


def _has_slope(step: _Step) -> bool:
    return isinstance(step.layer, nn.ReLU | nn.LeakyReLU)


def _steps(trace: Trace) -> list[_Step]:
    """The layers of the forward pass, each smooth activation with its lines: computed once, for no slope moves them."""
    curves = [(layer, box, curve_of(layer)) for layer, box in trace.steps]
    return [_Step(layer, box, None if curve is None else enclosing_lines(curve, box)) for layer, box, curve in curves]


def crown_lower_bounds(
    network: Network, box: Region, labels: Int[Tensor, " B"], *, optimize_steps: int = 0
) -> Float[Tensor, "B J"]:
    """Lower bounds of z[y] - z[j]: the element-wise maximum of CROWN and elided IBP.

    With optimize_steps > 0 the slopes of ReLUs are improved by that many steps of projected Adam (alpha-CROWN)
    and the best bound seen is kept, so the result is never below that of optimize_steps = 0. Over an l_2 ball the
    pre-activation bounds are those of `propagate`, and the last step takes the dual norm.

    Args:
        network: in eval mode; its parameters are not changed.
        box: the perturbed images, pixels in [0, 1]; or an l_2 ball around each.
        optimize_steps: >= 0.

    Returns:
        Bounds in logits, j != y in increasing j, without a graph.

    Raises:
        UnsupportedLayerError: a layer has no linear rule, or an l_2 ball meets a layer without a rule for it.
        ValueError: optimize_steps is negative.

    Source: Zhang et al., NeurIPS 2018 (CROWN); Xu et al., ICLR 2021 (optimised slopes).
    """
    if optimize_steps < 0:
        raise ValueError(f"optimize_steps is {optimize_steps}; expected 0 or more")
    check_rules_describe(network)
    with torch.no_grad():
        trace = Trace()
        feature_box = propagate(network.features, box, trace=trace, name="features")
        ibp = elided_lower_bounds(network.head, feature_box, labels)
        steps = _steps(trace)
        best = torch.maximum(ibp, _crown(network, box, labels, steps, None))
    if optimize_steps == 0:
        return best
    slopes = [adaptive_slope(step.box).requires_grad_() for step in steps if _has_slope(step)]
    if not slopes:
        return best
    optimizer = torch.optim.Adam(slopes, lr=SLOPE_LEARNING_RATE)
    for _ in range(optimize_steps):
        with torch.enable_grad():  # whatever the caller's mode
            bounds = _crown(network, box, labels, steps, slopes)
            gradients = torch.autograd.grad(-bounds.sum(), slopes)
        for slope, gradient in zip(slopes, gradients, strict=True):
            slope.grad = gradient
        optimizer.step()
        with torch.no_grad():
            for slope in slopes:
                slope.clamp_(0, 1)
            best = torch.maximum(best, _crown(network, box, labels, steps, slopes))
    return best
