"""Interval bound propagation: one small rule for each layer kind, one table; anything else is refused by name.

Bounds describe the network in eval mode, or with batch norm statistics that are passed in.

Shapes: `B` batch, `K` classes, `J = K - 1` other classes, `D` features.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ccdist.activations import ACTIVATION_LAYERS, GELU_MINIMUM
from ccdist.batch_norm import BatchNorm, Statistics, per_channel, scale_and_shift
from ccdist.interval import Interval
from ccdist.networks import Network, Normalize, Residual
from ccdist.threats import L2Ball, Region


class UnsupportedLayerError(ValueError):
    """A layer has no rule for the bound asked for."""


@dataclass
class Trace:
    """Every leaf layer in the order of the forward pass, with the interval that entered it."""

    steps: list[tuple[nn.Module, Interval]] = field(default_factory=list)

    def activation_inputs(self) -> list[Interval]:
        """The pre-activation intervals, in order."""
        return [box for layer, box in self.steps if isinstance(layer, ACTIVATION_LAYERS)]


Rule = Callable[[nn.Module, Interval, Statistics | None], Interval]


def _affine(box: Interval, apply: Callable[[Tensor], Tensor], apply_abs: Callable[[Tensor], Tensor]) -> Interval:
    return Interval.from_center(apply(box.center), apply_abs(box.radius))


def _linear(layer: nn.Module, box: Interval, _: Statistics | None) -> Interval:
    assert isinstance(layer, nn.Linear)
    return _affine(box, lambda c: F.linear(c, layer.weight, layer.bias), lambda r: F.linear(r, layer.weight.abs()))


def _conv2d(layer: nn.Module, box: Interval, _: Statistics | None) -> Interval:
    assert isinstance(layer, nn.Conv2d)
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise UnsupportedLayerError(
            f"no interval rule for Conv2d with padding_mode={layer.padding_mode!r}, padding={layer.padding!r}; "
            "use zero padding given as numbers"
        )
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return _affine(
        box,
        lambda c: F.conv2d(c, layer.weight, layer.bias, *geometry),
        lambda r: F.conv2d(r, layer.weight.abs(), None, *geometry),
    )


def _batch_norm(layer: nn.Module, box: Interval, statistics: Statistics | None) -> Interval:
    assert isinstance(layer, BatchNorm)
    if statistics is None and layer.training:
        raise ValueError(
            "interval bounds of a batch norm layer in train mode depend on a batch; call .eval() on the network"
        )
    scale, shift = (per_channel(values, box.lower) for values in scale_and_shift(layer, statistics))
    return _affine(box, lambda c: c * scale + shift, lambda r: r * scale.abs())


def _monotone(layer: nn.Module, box: Interval, _: Statistics | None) -> Interval:
    """A layer that never decreases in any input maps end points to end points."""
    return Interval(layer(box.lower), layer(box.upper))


def _valley(layer: nn.Module, box: Interval, minimizer: float, minimum: float) -> Interval:
    """A layer that falls up to the minimizer and rises after it: the minimum if it is inside, else the lower end."""
    left, right = layer(box.lower), layer(box.upper)
    inside = (box.lower < minimizer) & (minimizer < box.upper)
    return Interval(torch.where(inside, minimum, torch.minimum(left, right)), torch.maximum(left, right))


def _relu(layer: nn.Module, box: Interval, _: Statistics | None) -> Interval:
    assert isinstance(layer, nn.ReLU | nn.LeakyReLU)
    if layer.inplace:  # it would overwrite the interval, and in a network what a shortcut still reads
        raise UnsupportedLayerError(f"no interval rule for {type(layer).__name__} in place; use inplace=False")
    if isinstance(layer, nn.LeakyReLU) and layer.negative_slope < 0:
        return _valley(layer, box, 0.0, 0.0)
    return _monotone(layer, box, None)


def _gelu(layer: nn.Module, box: Interval, _: Statistics | None) -> Interval:
    assert isinstance(layer, nn.GELU)
    minimizer, minimum = GELU_MINIMUM[layer.approximate]
    # The layer itself rounds, in float32 to as much as one epsilon below its true minimum.
    return _valley(layer, box, minimizer, minimum * (1 + 4 * torch.finfo(box.lower.dtype).eps))


INTERVAL_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    Normalize: _monotone,  # std > 0
    nn.ReLU: _relu,
    nn.LeakyReLU: _relu,
    nn.Tanh: _monotone,
    nn.Sigmoid: _monotone,
    nn.GELU: _gelu,
    nn.AvgPool2d: _monotone,
    nn.Flatten: _monotone,
    nn.Identity: _monotone,
}


ModuleKind = TypeVar("ModuleKind", bound=nn.Module)


def _computes_as(module: nn.Module, kind: type[ModuleKind]) -> TypeGuard[ModuleKind]:
    """A module of this kind that has not replaced its forward pass by one without a rule."""
    return isinstance(module, kind) and type(module).forward is kind.forward


@dataclass(frozen=True)
class _Ellipsoid:
    """An l_2 ball on its way to the first affine layer.

    The points center + scale * d with ||d||_2 <= epsilon that also lie in the box. scale is [1, ...], the same for
    every image: 1 / std after a normalisation.
    """

    center: Tensor
    scale: Tensor
    epsilon: float
    box: Interval

    @classmethod
    def of_ball(cls, ball: L2Ball) -> "_Ellipsoid":
        return cls(ball.center, torch.ones_like(ball.center[:1]), ball.epsilon, ball.box)

    def tightened(self, center: Tensor, squared_norms: Tensor, box: Interval) -> Interval:
        """center +- epsilon * sqrt(squared_norms), cut with the box of the same values."""
        # A square root of 0 has no gradient; the smallest number also covers squares too small to be stored.
        norms = squared_norms.clamp(min=torch.finfo(squared_norms.dtype).tiny).sqrt()
        ball = Interval.from_center(center, self.epsilon * norms)
        return Interval(torch.maximum(ball.lower, box.lower), torch.minimum(ball.upper, box.upper))


def _l2_normalize(layer: nn.Module, entered: _Ellipsoid, box: Interval) -> _Ellipsoid:
    assert isinstance(layer, Normalize)
    return _Ellipsoid(layer(entered.center), entered.scale / layer.std, entered.epsilon, box)


def _l2_reshape(layer: nn.Module, entered: _Ellipsoid, box: Interval) -> _Ellipsoid | None:
    # Flattening from dimension 0 would join the images of a batch, each of which moves by epsilon.
    if isinstance(layer, nn.Flatten) and layer.start_dim % entered.center.dim() == 0:
        return None
    return _Ellipsoid(layer(entered.center), layer(entered.scale), entered.epsilon, box)


def _l2_linear(layer: nn.Module, entered: _Ellipsoid, box: Interval) -> Interval:
    assert isinstance(layer, nn.Linear)
    return entered.tightened(layer(entered.center), F.linear(entered.scale**2, layer.weight**2), box)


def _l2_conv2d(layer: nn.Module, entered: _Ellipsoid, box: Interval) -> Interval | None:
    assert isinstance(layer, nn.Conv2d)
    assert not isinstance(layer.padding, str)  # refused by the interval rule
    if entered.center.dim() != 4:  # three dimensions would be one image, its channels a batch
        return None
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    # A convolution of the squares adds up the taps inside the image only: the zero padding does not move.
    squared_norms = F.conv2d(entered.scale**2, layer.weight**2, None, *geometry)
    return entered.tightened(layer(entered.center), squared_norms, box)


# (layer, what entered it, interval bounds of its output) -> its output; None: no rule for these options
L2Rule = Callable[[nn.Module, _Ellipsoid, Interval], _Ellipsoid | Interval | None]

# Up to the first affine layer, whose output is bounded for each unit by itself; from there on intervals go their way.
L2_RULES: dict[type[nn.Module], L2Rule] = {
    nn.Linear: _l2_linear,
    nn.Conv2d: _l2_conv2d,
    Normalize: _l2_normalize,
    nn.Flatten: _l2_reshape,
    nn.Identity: _l2_reshape,
}


def _apply_l2_rule(layer: nn.Module, entered: _Ellipsoid, name: str) -> _Ellipsoid | Interval:
    rule = L2_RULES.get(type(layer))
    out = None if rule is None else rule(layer, entered, INTERVAL_RULES[type(layer)](layer, entered.box, None))
    if out is None:
        raise UnsupportedLayerError(
            f"no l_2 rule for {layer if rule else type(layer).__name__} at {name or 'the top'}; the network must begin "
            "with a Linear or Conv2d layer, behind Normalize, Identity or Flatten only"
        )
    return out


def propagate(
    module: nn.Module,
    region: Region,
    *,
    statistics: Statistics | None = None,
    trace: Trace | None = None,
    name: str = "",
) -> Interval:
    """Bounds of module(x) over the region; each leaf layer's input is appended to `trace` where one is given.

    An l_2 ball of radius epsilon is kept up to the first Linear or Conv2d layer W x + b, behind normalisation by std:

        centre W x0 + b, radius epsilon * ||row of W / std||_2, cut with the interval bounds over the ball's box

    A row has the taps inside the image only. From there on, interval arithmetic. A module without such a layer gets
    the ball's box. The trace has boxes in either case.

    Args:
        region: bounds of the input, or a ball around the images.
        statistics: batch norm statistics of a batch; None: the running ones.
        name: where the module stands in its network, for error messages.

    Raises:
        UnsupportedLayerError: a layer has no interval rule, or an l_2 ball meets another layer first.
    """
    entering = _Ellipsoid.of_ball(region) if isinstance(region, L2Ball) else region
    out = _propagate(module, entering, statistics, trace, name)
    return out if isinstance(out, Interval) else out.box


def _propagate(
    module: nn.Module,
    entered: Interval | _Ellipsoid,
    statistics: Statistics | None,
    trace: Trace | None,
    name: str,
) -> Interval | _Ellipsoid:
    if _computes_as(module, Network):
        features = _propagate(module.features, entered, statistics, trace, f"{name}features")
        return _propagate(module.head, features, statistics, trace, f"{name}head")
    if _computes_as(module, nn.Sequential):
        # Not named_children(), which leaves out a layer that stands in two places.
        for key, layer in zip(module._modules, module, strict=True):
            entered = _propagate(layer, entered, statistics, trace, f"{name}.{key}".lstrip("."))
        return entered
    if isinstance(entered, Interval) and _computes_as(module, Residual):
        body = propagate(module.body, entered, statistics=statistics, trace=trace, name=f"{name}.body")
        short = propagate(module.shortcut, entered, statistics=statistics, trace=trace, name=f"{name}.shortcut")
        return Interval(body.lower + short.lower, body.upper + short.upper)
    if trace is not None and type(module) in INTERVAL_RULES:
        trace.steps.append((module, entered if isinstance(entered, Interval) else entered.box))
    if isinstance(entered, _Ellipsoid):
        return _apply_l2_rule(module, entered, name)
    rule = INTERVAL_RULES.get(type(module))
    if rule is None:
        known = ", ".join(layer.__name__ for layer in INTERVAL_RULES)
        raise UnsupportedLayerError(
            f"no interval rule for {type(module).__name__} at {name or 'the top'}; layers with a rule: {known}"
        )
    return rule(module, entered, statistics)


def interval_bounds(module: nn.Module, box: Region) -> Interval:
    """Bounds of module(x) for every x in the box, by interval arithmetic layer by layer (IBP).

    For y = W x + b with centre c and radius r of x: centre W c + b, radius |W| r; monotone layers map end
    points. Sound for the module in eval mode; about the cost of two forward passes.

    Args:
        module: a Network, a Sequential or one layer.
        box: bounds of the input, for a Network pixels in [0, 1]; or an l_2 ball (see `propagate`).

    Raises:
        UnsupportedLayerError: a layer has no rule.
        ValueError: a batch norm layer is in train mode.

    Source: Gowal et al., "On the Effectiveness of Interval Bound Propagation", 2018.
    """
    return propagate(module, box)


def other_classes(labels: Int[Tensor, " B"], num_classes: int) -> Int[Tensor, "B J"]:
    """The classes j != y in increasing order, for each label y."""
    classes = torch.arange(num_classes - 1, device=labels.device)
    return classes + (classes >= labels.unsqueeze(1))


def logit_differences(logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"]) -> Float[Tensor, "B J"]:
    """z[y] - z[j] for j != y in increasing j."""
    others = other_classes(labels, logits.shape[1])
    return logits.gather(1, labels.unsqueeze(1)) - logits.gather(1, others)


def difference_weights(
    head: nn.Linear, labels: Int[Tensor, " B"]
) -> tuple[Float[Tensor, "B J D"], Float[Tensor, "B J"]]:
    """Rows W[y] - W[j] and offsets b[y] - b[j] of the head, so that differences are rows @ features + offsets."""
    others = other_classes(labels, head.out_features)
    # Embedding look-ups, not indexing: the gradient of an index sums in no fixed order when there are threads, and
    # the same seed would give other weights each time.
    weight = F.embedding(labels, head.weight).unsqueeze(1) - F.embedding(others, head.weight)
    if head.bias is None:
        return weight, weight.new_zeros(others.shape)
    bias = head.bias.unsqueeze(1)
    return weight, F.embedding(labels, bias) - F.embedding(others, bias).squeeze(2)


def elided_lower_bounds(head: nn.Linear, feature_box: Interval, labels: Int[Tensor, " B"]) -> Float[Tensor, "B J"]:
    """Lower bounds of z[y] - z[j] from bounds of the features, with the head merged into the differences.

        W_C c + b_C - |W_C| r,   W_C = W[y] - W[j],   c, r centre and radius of the features

    Never below the difference of the head's own bounds, since y and j share the same features.
    """
    weight, offset = difference_weights(head, labels)
    center = torch.einsum("bjd,bd->bj", weight, feature_box.center)
    return center + offset - torch.einsum("bjd,bd->bj", weight.abs(), feature_box.radius)


def check_rules_describe(network: Network) -> None:
    """Refuse a network whose own forward pass, or whose head's, is not the one that bounds are computed for.

    Raises:
        UnsupportedLayerError: either class replaces `forward`.
    """
    for name, module, kind in (("the network", network, Network), ("its head", network.head, nn.Linear)):
        if not _computes_as(module, kind):
            raise UnsupportedLayerError(
                f"no rule for {type(module).__name__}: {name} replaces the forward pass of {kind.__name__}, which the "
                "bounds describe"
            )


def logit_difference_lower_bounds(network: Network, box: Region, labels: Int[Tensor, " B"]) -> Float[Tensor, "B J"]:
    """IBP lower bounds of z[y] - z[j], j != y in increasing j, with last-layer elision.

    An image is certified by IBP when all its differences are above 0 (beyond rounding).

    Args:
        box: the perturbed images, pixels in [0, 1]; or an l_2 ball around each.
        labels: class indices y.

    Returns:
        Bounds in logits.

    Raises:
        UnsupportedLayerError: a layer has no interval rule.
    """
    check_rules_describe(network)
    return elided_lower_bounds(network.head, propagate(network.features, box, name="features"), labels)
