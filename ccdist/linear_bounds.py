"""CROWN: linear lower bounds of logit differences, propagated backward through the network.

Each activation is enclosed by two lines over its pre-activation bounds, which come from interval arithmetic. For a
ReLU with l < 0 < u: above u (x - l) / (u - l), below a x with a slope a in [0, 1].

Shapes: `B` batch, `J` other classes (the specifications), `...` the shape of a layer.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ccdist.activations import curve_of, enclosing_lines
from ccdist.bounds import Trace, check_rules_describe, difference_weights, elided_lower_bounds, propagate
from ccdist.interval import Interval
from ccdist.linear_rules import (
    Back,
    EnclosingLines,
    KinkLines,
    Relaxation,
    Step,
    adaptive_kink,
    backward,
    sum_features,
)
from ccdist.networks import Network
from ccdist.threats import L2Ball, Region

# Learning rate of the slopes in alpha-CROWN: they live in [0, 1], and a few dozen steps must cross it.
SLOPE_LEARNING_RATE = 0.2


def least(weights: Float[Tensor, "B S *shape"], region: Region) -> Float[Tensor, "B S"]:
    """A lower bound of sum(weights * x) over the region.

    box:   weights c - |weights| r, the least value;   c, r centre and radius
    ball:  the larger of weights x0 - epsilon ||weights||_2 and the bound over the ball's box
    """
    box = region.box if isinstance(region, L2Ball) else region
    center, radius = box.center.unsqueeze(1), box.radius.unsqueeze(1)
    value = sum_features(weights * center) - sum_features(weights.abs() * radius)
    if isinstance(region, L2Ball):
        lengths = torch.linalg.vector_norm(weights.flatten(2), dim=2)
        value = torch.maximum(value, sum_features(weights * region.center.unsqueeze(1)) - region.epsilon * lengths)
    return value


def relaxation(layer: nn.Module, box: Interval, kink: Tensor | None = None) -> Relaxation | None:
    """What encloses the layer over the box; None for layers that are no activation. kink: see `KinkLines.over`."""
    if has_kink(layer):
        return KinkLines.over(layer, box, kink)
    curve = curve_of(layer)
    return None if curve is None else EnclosingLines(enclosing_lines(curve, box))


def has_kink(layer: nn.Module) -> bool:
    """Whether the layer is piecewise linear with its kink at 0."""
    return isinstance(layer, nn.ReLU | nn.LeakyReLU)


def _crown(network: Network, region: Region, labels: Tensor, steps: Sequence[Step]) -> Float[Tensor, "B J"]:
    weights, offset = difference_weights(network.head, labels)
    bound = backward(network.features, Back(weights, offset, torch.zeros_like(offset)), steps)
    return least(bound.weights, region) + bound.offset


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
        optimize_steps: >= 0; the slopes of an image are shared by its specifications.

    Returns:
        Bounds in logits, j != y in increasing j, without a graph. Rounding is not taken off: a certificate is made
        by `ccdist.proved_bounds`.

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
        steps = [Step(layer, entered.shape[1:], relaxation(layer, entered)) for layer, entered in trace.steps]
        best = torch.maximum(ibp, _crown(network, box, labels, steps))
    kinks = {
        index: adaptive_kink(entered).requires_grad_()
        for index, (layer, entered) in enumerate(trace.steps)
        if has_kink(layer)
    }
    if optimize_steps == 0 or not kinks:
        return best

    def bounds() -> Float[Tensor, "B J"]:
        moved = list(steps)
        for index, kink in kinks.items():
            layer, entered = trace.steps[index]
            moved[index] = Step(layer, entered.shape[1:], relaxation(layer, entered, kink))
        return _crown(network, box, labels, moved)

    optimizer = torch.optim.Adam(kinks.values(), lr=SLOPE_LEARNING_RATE)
    for _ in range(optimize_steps):
        with torch.enable_grad():  # whatever the caller's mode
            gradients = torch.autograd.grad(-bounds().sum(), list(kinks.values()))
        for kink, gradient in zip(kinks.values(), gradients, strict=True):
            kink.grad = gradient
        optimizer.step()
        with torch.no_grad():
            for kink in kinks.values():
                kink.clamp_(0, 1)
            best = torch.maximum(best, bounds())
    return best
