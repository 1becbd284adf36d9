"""A network as a training step computes it: batch norm folded into convolutions, channels last, any precision.

Points and intervals go through the same few steps. Intervals travel as centre and radius, which keeps a small
radius exact where lower and upper bounds would round it away. Folding changes rounding only: the function is
that of `batch_norm.forward`, the bounds are those of `bounds.propagate`, and tests compare them.

Shapes: `B` batch, `C H W` image, `D` features.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ccdist.activations import ACTIVATION_LAYERS
from ccdist.batch_norm import (
    BatchNorm,
    Statistics,
    batch_norm_layers,
    per_channel,
    scale_and_shift,
    update_running_statistics,
)
from ccdist.bounds import propagate
from ccdist.fused import (
    Geometry,
    batch_norm_with_statistics,
    interval_convolution,
    interval_linear,
    interval_relu,
    linear,
)
from ccdist.interval import Interval
from ccdist.networks import Network, Normalize, Residual

# Centre and radius of what enters each activation, in order, where somebody wants them.
Recorded = list[tuple[Tensor, Tensor]] | None


@runtime_checkable
class Step(Protocol):
    """What every step of a folded network can do."""

    def point(self, x: Tensor) -> Tensor: ...

    def interval(self, center: Tensor, radius: Tensor, recorded: Recorded) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Convolution:
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry

    def point(self, x: Tensor) -> Tensor:
        return F.conv2d(x.to(self.weight.dtype), self.weight, self.bias, *self.geometry)

    def interval(self, center: Tensor, radius: Tensor, recorded: Recorded) -> tuple[Tensor, Tensor]:
        dtype = self.weight.dtype
        return interval_convolution(center.to(dtype), radius.to(dtype), self.weight, self.bias, self.geometry)


# With fewer channels than this a convolution over the whole image is slower than the product of flat vectors.
FEWEST_CHANNELS = 8


@dataclass
class Dense:
    """A linear layer, together with the flattening before it where there is one.

    An image in channels-last order has to be copied to be flattened. Where the weight is fixed, as in the many passes
    of an attack, a convolution whose kernel is as large as the image computes the same without that copy, and on
    processors whose matrix library is not tuned for them in half the time; the gradient of such a kernel costs more
    than it saves. Scaling this weight, most of a CNN7, costs more than scaling the outputs: batch norm is not folded
    into it.
    """

    weight: Tensor
    bias: Tensor | None
    flattens: bool
    _kernel: Tensor | None = field(default=None, init=False)

    def point(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if self._is_convolution(x):
            return F.conv2d(x, self._kernel_for(x), self.bias).flatten(1)
        x = x.flatten(1) if self.flattens else x
        return linear(x, self.weight, self.bias) if x.dim() == 2 else F.linear(x, self.weight, self.bias)

    def interval(self, center: Tensor, radius: Tensor, recorded: Recorded) -> tuple[Tensor, Tensor]:
        center, radius = center.to(self.weight.dtype), radius.to(self.weight.dtype)
        if self.flattens:
            center, radius = center.flatten(1), radius.flatten(1)
        if center.dim() != 2:
            return F.linear(center, self.weight, self.bias), F.linear(radius, self.weight.abs())
        center, radius = interval_linear(center, radius, self.weight)
        return center if self.bias is None else center + self.bias, radius

    def _is_convolution(self, x: Tensor) -> bool:
        large = self.flattens and x.dim() == 4 and x.shape[1] >= FEWEST_CHANNELS
        return large and not self.weight.requires_grad

    def _kernel_for(self, x: Tensor) -> Tensor:
        if self._kernel is None:
            kernel = self.weight.view(-1, *x.shape[1:])
            self._kernel = kernel.contiguous(memory_format=torch.channels_last)
        return self._kernel


@dataclass(frozen=True)
class Scale:
    """scale * x + shift for each channel: a batch norm with its statistics fixed."""

    scale: Tensor
    shift: Tensor

    def point(self, x: Tensor) -> Tensor:
        return x * per_channel(self.scale, x) + per_channel(self.shift, x)

    def interval(self, center: Tensor, radius: Tensor, recorded: Recorded) -> tuple[Tensor, Tensor]:
        return self.point(center), radius * per_channel(self.scale, radius).abs()


@dataclass(frozen=True)
class BatchStatistics:
    """A batch norm, and the ReLU after it, that use and record the statistics of the batch; points only."""

    layer: BatchNorm
    statistics: Statistics
    relu: bool

    def point(self, x: Tensor) -> Tensor:
        layer = self.layer
        y, mean, variance = batch_norm_with_statistics(x, layer.weight, layer.bias, eps=layer.eps, relu=self.relu)
        self.statistics[layer] = (mean, variance)
        update_running_statistics(layer, mean, variance, count=x.numel() // x.shape[1])
        return y

    def interval(self, center: Tensor, radius: Tensor, recorded: Recorded) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("an interval has no batch statistics")


@dataclass(frozen=True)
class ReLU:
    shrink: float

    def point(self, x: Tensor) -> Tensor:
        return x.relu_()  # its input is the fresh output of the step before it

    def interval(self, center: Tensor, radius: Tensor, recorded: Recorded) -> tuple[Tensor, Tensor]:
        if recorded is not None:
            recorded.append((center, radius))
        return interval_relu(center, radius, shrink=self.shrink)


@dataclass(frozen=True)
class Other:
    """Any other layer, by its own forward pass and its interval rule."""

    layer: nn.Module
    name: str

    def point(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self._in_its_precision(x))
        return out

    def _in_its_precision(self, x: Tensor) -> Tensor:
        weight = next(self.layer.parameters(), None)
        return x if weight is None else x.to(weight.dtype)

    def interval(self, center: Tensor, radius: Tensor, recorded: Recorded) -> tuple[Tensor, Tensor]:
        center, radius = self._in_its_precision(center), self._in_its_precision(radius)
        if isinstance(self.layer, Normalize):
            return self.layer(center), radius / self.layer.std
        if recorded is not None and isinstance(self.layer, ACTIVATION_LAYERS):
            recorded.append((center, radius))
        box = propagate(self.layer, Interval.from_center(center, radius), name=self.name)
        return box.center, box.radius


@dataclass(frozen=True)
class Sum:
    """body(x) + shortcut(x)."""

    body: list[Step]
    shortcut: list[Step]

    def point(self, x: Tensor) -> Tensor:
        return folded_forward(self.body, x) + folded_forward(self.shortcut, x)

    def interval(self, center: Tensor, radius: Tensor, recorded: Recorded) -> tuple[Tensor, Tensor]:
        body = _interval(self.body, center, radius, recorded)
        shortcut = _interval(self.shortcut, center, radius, recorded)
        return body[0] + shortcut[0], body[1] + shortcut[1]


@dataclass
class Fold:
    """How layers become steps; the passes of one training step share what is made of its large weights.

    Args:
        dtype: precision of weights and of what flows between steps; None: that of the weights.
        shrink: see `fused.interval_relu`.
    """

    dtype: torch.dtype | None = None
    shrink: float = 1.0
    _dense: dict[tuple[nn.Module, bool], Dense] = field(default_factory=dict)

    def fixed(self, module: nn.Module, statistics: Statistics | None = None, *, name: str = "") -> list[Step]:
        """The steps of a Sequential of supported layers with its batch norms fixed.

        Args:
            statistics: of a batch, in whose graph the folded weights stay; None: the running ones.
            name: where the module stands in its network, for error messages.
        """
        layers = _leaves(module, name)
        steps: list[Step] = []
        while layers:
            name, layer = layers.pop(0)
            norm = layers[0][1] if layers else None
            if _folds(layer) and isinstance(norm, nn.BatchNorm2d):
                layers.pop(0)
                steps.append(self._convolution(layer, scale_and_shift(norm, statistics)))
            elif isinstance(layer, BatchNorm):
                steps.append(Scale(*scale_and_shift(layer, statistics)))
            elif type(layer) is Residual:
                body = self.fixed(layer.body, statistics, name=f"{name}.body")
                steps.append(Sum(body, self.fixed(layer.shortcut, statistics, name=f"{name}.shortcut")))
            else:
                steps.append(self._other(name, layer, layers, steps))
        return steps

    def collecting(self, module: nn.Module, statistics: Statistics) -> list[Step]:
        """Steps for points whose batch norms use the batch's statistics and add them to `statistics`.

        As `batch_norm.forward_collecting`: the running statistics are updated too.
        """
        layers = _leaves(module)
        steps: list[Step] = []
        while layers:
            name, layer = layers.pop(0)
            if isinstance(layer, BatchNorm):
                relu = bool(layers) and type(layers[0][1]) is nn.ReLU
                steps.append(BatchStatistics(layer, statistics, relu))
                if relu:
                    layers.pop(0)
            elif type(layer) is Residual:
                body, shortcut = (self.collecting(part, statistics) for part in (layer.body, layer.shortcut))
                steps.append(Sum(body, shortcut))
            else:
                steps.append(self._other(name, layer, layers, steps))
        return steps

    def _other(self, name: str, layer: nn.Module, following: list[tuple[str, nn.Module]], before: list[Step]) -> Step:
        """The step of a layer that no batch norm is folded into; a flattening takes the linear layer after it."""
        if _folds(layer):
            return self._convolution(layer, None)
        flattens = type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)
        if flattens and following and type(following[0][1]) is nn.Linear:
            layer = following.pop(0)[1]
        if type(layer) is nn.Linear:
            if (layer, flattens) not in self._dense:
                self._dense[layer, flattens] = Dense(self._cast(layer.weight), self._cast(layer.bias), flattens)
            return self._dense[layer, flattens]
        if type(layer) is nn.ReLU and before and isinstance(before[-1], Convolution | Dense | Scale):
            return ReLU(self.shrink)
        return Other(layer, name)

    def _convolution(self, layer: Any, scale_shift: tuple[Tensor, Tensor] | None) -> Convolution:
        weight, bias = layer.weight, layer.bias
        if scale_shift is not None:
            scale, shift = scale_shift
            weight = weight * scale.view(-1, 1, 1, 1)
            bias = shift if bias is None else bias * scale + shift
        weight = self._cast(weight).contiguous(memory_format=torch.channels_last)
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return Convolution(weight, self._cast(bias), geometry)

    def _cast(self, tensor: Any) -> Any:
        """The tensor in the steps' precision; without its gradient where none is wanted, which a parameter keeps."""
        if tensor is None:
            return None
        tensor = tensor if torch.is_grad_enabled() else tensor.detach()
        return tensor if self.dtype is None else tensor.to(self.dtype)


def _folds(layer: nn.Module) -> bool:
    return type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _leaves(module: nn.Module, name: str = "") -> list[tuple[str, nn.Module]]:
    if not (isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward):
        return [(name, module)]
    # Not named_children(), which leaves out a layer that stands in two places.
    keyed = zip(module._modules, module, strict=True)
    return [leaf for key, layer in keyed for leaf in _leaves(layer, f"{name}.{key}".lstrip("."))]


def channels_last(images: Tensor) -> Tensor:
    """Images in the memory order that convolutions are fastest in; anything else as it is."""
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


def folded_forward(steps: list[Step], x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
    """The network's output for each x, in the precision that its steps have."""
    x = channels_last(x)
    for step in steps:
        x = step.point(x)
    return x


def folded_interval(steps: list[Step], box: Interval, recorded: Recorded = None) -> tuple[Tensor, Tensor]:
    """Centre and radius of the outputs over the box; those of activations' inputs are appended to `recorded`."""
    return _interval(steps, channels_last(box.center), channels_last(box.radius), recorded)


def _interval(steps: list[Step], center: Tensor, radius: Tensor, recorded: Recorded) -> tuple[Tensor, Tensor]:
    for step in steps:
        center, radius = step.interval(center, radius, recorded)
    return center, radius


@torch.no_grad()
def recompute_running_statistics(network: Network, batches: Iterable[Tensor]) -> None:
    """Set running statistics to the plain average of batch statistics over all batches ("population").

    Source: CTBench's option of the same purpose.
    """
    layers = list(batch_norm_layers(network))
    momenta = [layer.momentum for layer in layers]
    try:
        for index, images in enumerate(batches):
            for layer in layers:
                layer.momentum = 1 / (index + 1)  # a cumulative average: the first batch replaces what was there
            folded_forward(Fold().collecting(network.features, {}), images)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
