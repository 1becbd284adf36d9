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

from ccdist.batch_norm import BatchNorm, Statistics, per_channel, scale_and_shift
from ccdist.interval import Interval
from ccdist.networks import Network, Normalize, Residual


class UnsupportedLayerError(ValueError):
    """A layer has no rule for the bound asked for."""


@dataclass
class Trace:
    """Every leaf layer in the order of the forward pass, with the interval that entered it."""

    steps: list[tuple[nn.Module, Interval]] = field(default_factory=list)

    def relu_inputs(self) -> list[Interval]:
        """The pre-activation intervals, in order."""
        return [box for layer, box in self.steps if isinstance(layer, nn.ReLU)]


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


INTERVAL_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    Normalize: _monotone,  # std > 0
    nn.ReLU: _monotone,
    nn.AvgPool2d: _monotone,
    nn.Flatten: _monotone,
    nn.Identity: _monotone,
}


ModuleKind = TypeVar("ModuleKind", bound=nn.Module)


def _computes_as(module: nn.Module, kind: type[ModuleKind]) -> TypeGuard[ModuleKind]:
    """A module of this kind that has not replaced its forward pass by one without a rule."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def propagate(
    module: nn.Module,
    box: Interval,
    *,
    statistics: Statistics | None = None,
    trace: Trace | None = None,
    name: str = "",
) -> Interval:
    """Bounds of module(x) over the box; each leaf layer's input is appended to `trace` where one is given.

    Args:
        statistics: batch norm statistics of a batch; None: the running ones.
        name: where the module stands in its network, for error messages.

    Raises:
        UnsupportedLayerError: a layer has no interval rule.
    """
    if _computes_as(module, Network):
        box = propagate(module.features, box, statistics=statistics, trace=trace, name=f"{name}features")
        return propagate(module.head, box, statistics=statistics, trace=trace, name=f"{name}head")
    if _computes_as(module, nn.Sequential):
        # Not named_children(), which leaves out a layer that stands in two places.
        for key, layer in zip(module._modules, module, strict=True):
            box = propagate(layer, box, statistics=statistics, trace=trace, name=f"{name}.{key}".lstrip("."))
        return box
    if _computes_as(module, Residual):
        body = propagate(module.body, box, statistics=statistics, trace=trace, name=f"{name}.body")
        short = propagate(module.shortcut, box, statistics=statistics, trace=trace, name=f"{name}.shortcut")
        return Interval(body.lower + short.lower, body.upper + short.upper)
    rule = INTERVAL_RULES.get(type(module))
    if rule is None:
        known = ", ".join(layer.__name__ for layer in INTERVAL_RULES)
        raise UnsupportedLayerError(
            f"no interval rule for {type(module).__name__} at {name or 'the top'}; layers with a rule: {known}"
        )
    if trace is not None:
        trace.steps.append((module, box))
    return rule(module, box, statistics)


def interval_bounds(module: nn.Module, box: Interval) -> Interval:
    """Bounds of module(x) for every x in the box, by interval arithmetic layer by layer (IBP).

    For y = W x + b with centre c and radius r of x: centre W c + b, radius |W| r; monotone layers map end
    points. Sound for the module in eval mode; about the cost of two forward passes.

    Args:
        module: a Network, a Sequential or one layer.
        box: bounds of the input; for a Network pixels in [0, 1].

    Raises:
        UnsupportedLayerError: a layer has no interval rule.
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


def logit_difference_lower_bounds(network: Network, box: Interval, labels: Int[Tensor, " B"]) -> Float[Tensor, "B J"]:
    """IBP lower bounds of z[y] - z[j], j != y in increasing j, with last-layer elision.

    An image is certified by IBP when all its differences are above 0 (beyond rounding).

    Args:
        box: input box, pixels in [0, 1].
        labels: class indices y.

    Returns:
        Bounds in logits.

    Raises:
        UnsupportedLayerError: a layer has no interval rule.
    """
    return elided_lower_bounds(network.head, propagate(network.features, box, name="features"), labels)
