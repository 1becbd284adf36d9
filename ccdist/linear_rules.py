"""How a linear lower bound goes backward through a network: one small rule for each layer kind, one table.

A bound weights * z + offset at a layer's output becomes one at its input. Affine layers do so exactly; activations
are replaced by lines that enclose them (a `Relaxation`).

Shapes: `B` batch, `S` specifications (linear functions bounded at once), `...` the shape of a layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccdist.activations import ACTIVATION_LAYERS, Lines
from ccdist.batch_norm import BatchNorm, per_channel, scale_and_shift
from ccdist.bounds import UnsupportedLayerError
from ccdist.interval import Interval
from ccdist.networks import Normalize, Residual


@runtime_checkable
class Relaxation(Protocol):
    """What encloses an activation over a box of its inputs."""

    def through(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [B, S, ...] of its outputs -> (weights of its inputs, offset [B, S]) of a lower bound."""
        ...

    def select(self, rows: Tensor) -> "Relaxation":
        """Of some images."""
        ...

    def lines(self) -> Lines:
        """The line below and the line above."""
        ...


@dataclass(frozen=True)
class EnclosingLines:
    """Two lines for each unit: weights above 0 take the lower one, weights below 0 the upper one; [B, ...]."""

    enclosing: Lines

    def through(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        positive, negative = weights.clamp(min=0), weights.clamp(max=0)
        lines = self.enclosing
        back = positive * lines.lower_slope.unsqueeze(1) + negative * lines.upper_slope.unsqueeze(1)
        offset = positive * lines.lower_offset.unsqueeze(1) + negative * lines.upper_offset.unsqueeze(1)
        return back, sum_features(offset)

    def select(self, rows: Tensor) -> "EnclosingLines":
        return EnclosingLines(Lines(*(getattr(self.enclosing, part.name)[rows] for part in fields(Lines))))

    def lines(self) -> Lines:
        return self.enclosing


@dataclass(frozen=True)
class KinkLines:
    """Of f(x) = x above 0, s x below: one line is the chord over the box, the other goes through the kink at 0.

    Weights on whose side the chord bounds f (below 0 for s <= 1, where f is convex) take the chord.
    """

    chord_slope: Tensor  # [B, ...]
    chord_offset: Tensor
    kink_slope: Tensor  # between s and 1
    convex: bool

    @classmethod
    def over(cls, layer: nn.Module, box: Interval, kink: Tensor | None = None) -> "KinkLines":
        """The lines over a box of inputs; kink in [0, 1] places the second line's slope between s and 1.

        kink None: CROWN's choice, 1 where u > -l, else 0, which cuts off the smaller triangle. A unit whose box is on
        one side of 0 gets f itself from both lines.
        """
        s = layer.negative_slope if isinstance(layer, nn.LeakyReLU) else 0.0
        lower, upper = box.lower.clamp(max=0), box.upper.clamp(min=0)
        chord = (upper - s * lower) / (upper - lower).clamp(min=torch.finfo(lower.dtype).tiny)
        adaptive = adaptive_kink(box)
        if kink is None:
            kink = adaptive
        else:
            unstable = ((lower < 0) & (upper > 0)).to(kink.dtype)
            kink = adaptive + unstable * (kink - adaptive)
        return cls(chord, lower * (s - chord), s + (1 - s) * kink, convex=s <= 1)

    def through(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        positive, negative = weights.clamp(min=0), weights.clamp(max=0)
        on_kink, on_chord = (positive, negative) if self.convex else (negative, positive)
        back = on_kink * self.kink_slope.unsqueeze(1) + on_chord * self.chord_slope.unsqueeze(1)
        return back, sum_features(on_chord * self.chord_offset.unsqueeze(1))

    def select(self, rows: Tensor) -> "KinkLines":
        return KinkLines(self.chord_slope[rows], self.chord_offset[rows], self.kink_slope[rows], self.convex)

    def lines(self) -> Lines:
        through_kink = (self.kink_slope, torch.zeros_like(self.kink_slope))
        chord = (self.chord_slope, self.chord_offset)
        return Lines(*through_kink, *chord) if self.convex else Lines(*chord, *through_kink)


def adaptive_kink(box: Interval) -> Tensor:
    """1 where u > -l, else 0."""
    return (box.upper > -box.lower).to(box.lower.dtype)


@dataclass(frozen=True)
class Step:
    """A leaf layer met on the way back.

    input_shape: of one image, without the batch.
    relaxation: of an activation; None for affine layers.
    error: [B, ...] what one evaluation of the layer may miss by (see `ccdist.rounding`); None: not counted.
    """

    layer: nn.Module
    input_shape: torch.Size
    relaxation: Relaxation | None = None
    error: Tensor | None = None


class Back(NamedTuple):
    """weights * x + offset at some layer's input; the allowance is what rounding may take from the bound."""

    weights: Tensor  # [B, S, ...]
    offset: Tensor  # [B, S]
    allowance: Tensor  # [B, S]


BackwardRule = Callable[[nn.Module, Tensor, Step], tuple[Tensor, Tensor]]

# stride, padding, dilation of each image axis, and groups
_Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]

# Up to so many outputs (channels times the phases of a stride) a transposed convolution is computed as a plain one:
# with one or three channels of pixels the library's own takes four times as long.
FEW_OUTPUTS = 16


def sum_features(values: Tensor) -> Tensor:
    """[B, S, ...] -> [B, S]."""
    return values.flatten(2).sum(2)


def _linear(layer: nn.Module, weights: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, nn.Linear)
    if layer.bias is None:
        return weights @ layer.weight, weights.new_zeros(weights.shape[:2])
    rows = weights.flatten(2, -2).sum(2) if weights.dim() > 3 else weights  # a layer of several rows
    return weights @ layer.weight, rows @ layer.bias


def _transposed_conv(weights: Tensor, kernel: Tensor, step: Step, geometry: _Geometry) -> Tensor:
    """Gradient of a convolution with respect to its input, of exactly the input's size."""
    stride, padding, dilation, groups = geometry
    merged = weights.flatten(0, 1)
    same = stride[0] == stride[1] and dilation == (1, 1) and groups == 1 and kernel.shape[2] == kernel.shape[3]
    if same and kernel.shape[1] * stride[0] ** 2 <= FEW_OUTPUTS:
        back = _by_phases(merged, kernel, stride[0], padding, step.input_shape[1:])
    else:
        sizes = zip(step.input_shape[1:], merged.shape[2:], kernel.shape[2:], stride, padding, dilation, strict=True)
        output_padding = [size - ((out - 1) * s - 2 * p + d * (k - 1) + 1) for size, out, k, s, p, d in sizes]
        back = F.conv_transpose2d(merged, kernel, None, stride, padding, output_padding, groups, dilation)
    apart: Tensor = back.unflatten(0, weights.shape[:2])
    return apart


def _by_phases(weights: Tensor, kernel: Tensor, stride: int, padding: tuple[int, ...], size: Sequence[int]) -> Tensor:
    """A transposed convolution as a plain one whose channels are the phases of the stride.

    Pixel o gets sum_i weights[i] kernel[o + padding - stride i]. With o + padding = stride q + r the taps are
    r + stride m, m = 0, 1, ..., and i = q - m: for each phase r a convolution with the flipped taps.
    """
    inputs, outputs, taps = kernel.shape[0], kernel.shape[1], kernel.shape[2]
    each = -(-taps // stride)
    padded = F.pad(kernel, (0, each * stride - taps) * 2)
    phases = padded.view(inputs, outputs, each, stride, each, stride).flip(2, 4).permute(1, 3, 5, 0, 2, 4)
    phases = phases.reshape(outputs * stride**2, inputs, each, each)
    full = F.pixel_shuffle(F.conv2d(weights, phases, padding=each - 1), stride)
    short = [max(0, p + length - have) for p, length, have in zip(padding, size, full.shape[2:], strict=True)]
    if any(short):  # a stride that steps over the last pixels
        full = F.pad(full, (0, short[1], 0, short[0]))
    cut: Tensor = full[:, :, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]
    return cut


def _conv2d(layer: nn.Module, weights: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, nn.Conv2d)
    assert not isinstance(layer.padding, str)  # refused by the interval rule
    back = _transposed_conv(weights, layer.weight, step, (layer.stride, layer.padding, layer.dilation, layer.groups))
    if layer.bias is None:
        return back, weights.new_zeros(weights.shape[:2])
    return back, weights.sum((3, 4)) @ layer.bias


def _avg_pool2d(layer: nn.Module, weights: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, nn.AvgPool2d)
    kernel, stride, padding = (
        (value, value) if isinstance(value, int) else (value[0], value[1])
        for value in (layer.kernel_size, layer.stride, layer.padding)
    )
    if layer.ceil_mode or layer.divisor_override is not None or (padding != (0, 0) and not layer.count_include_pad):
        raise UnsupportedLayerError(
            "no linear rule for AvgPool2d with ceil_mode, divisor_override or count_include_pad=False"
        )
    channels = step.input_shape[0]
    mean = weights.new_full((channels, 1, *kernel), 1 / (kernel[0] * kernel[1]))
    back = _transposed_conv(weights, mean, step, (stride, padding, (1, 1), channels))
    return back, weights.new_zeros(weights.shape[:2])


def _batch_norm(layer: nn.Module, weights: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, BatchNorm)
    one_image = weights[0, :1]
    scale, shift = (per_channel(values, one_image) for values in scale_and_shift(layer, None))
    return weights * scale, sum_features(weights * shift)


def _normalize(layer: nn.Module, weights: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, Normalize)
    scaled = weights / layer.std
    return scaled, -sum_features(scaled * layer.mean)


def _flatten(layer: nn.Module, weights: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    return weights.reshape(*weights.shape[:2], *step.input_shape), weights.new_zeros(weights.shape[:2])


def _identity(layer: nn.Module, weights: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    return weights, weights.new_zeros(weights.shape[:2])


def _activation(layer: nn.Module, weights: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    assert step.relaxation is not None
    return step.relaxation.through(weights)


LINEAR_RULES: dict[type[nn.Module], BackwardRule] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.AvgPool2d: _avg_pool2d,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    Normalize: _normalize,
    nn.Flatten: _flatten,
    nn.Identity: _identity,
    **dict.fromkeys(ACTIVATION_LAYERS, _activation),
}


def backward(module: nn.Module, bound: Back, steps: Sequence[Step]) -> Back:
    """A bound at the module's output -> at its input; `steps` are the module's own, in the order of `propagate`."""
    if isinstance(module, nn.Sequential):
        end = len(steps)
        for layer in reversed(list(module)):
            begin = end - num_leaves(layer)
            bound = backward(layer, bound, steps[begin:end])
            end = begin
        return bound
    if isinstance(module, Residual):
        nothing = torch.zeros_like(bound.offset)
        split = num_leaves(module.body)
        body = backward(module.body, bound, steps[:split])
        short = backward(module.shortcut, Back(bound.weights, nothing, nothing), steps[split:])
        return Back(body.weights + short.weights, body.offset + short.offset, body.allowance + short.allowance)
    (step,) = steps
    assert step.layer is module
    rule = LINEAR_RULES.get(type(module))
    if rule is None:
        raise UnsupportedLayerError(f"no linear rule for {type(module).__name__}")
    weights, offset = rule(module, bound.weights, step)
    allowance = bound.allowance
    if step.error is not None:
        allowance = allowance + sum_features(bound.weights.abs() * step.error.unsqueeze(1))
    return Back(weights, bound.offset + offset, allowance)


def backward_from(module: nn.Module, start: int, bound: Back, steps: Sequence[Step]) -> Back:
    """A bound at the input of the leaf layer number `start` -> at the module's input."""
    if isinstance(module, nn.Sequential):
        begin = 0
        for index, layer in enumerate(module):
            end = begin + num_leaves(layer)
            if start < end:
                bound = backward_from(layer, start - begin, bound, steps[begin:end])
                return backward(module[:index], bound, steps[:begin])
            begin = end
    if isinstance(module, Residual):
        split = num_leaves(module.body)
        if start < split:
            return backward_from(module.body, start, bound, steps[:split])
        return backward_from(module.shortcut, start - split, bound, steps[split:])
    assert start == 0
    return bound


def num_leaves(module: nn.Module) -> int:
    """How many steps a forward pass through the module has."""
    if isinstance(module, nn.Sequential):
        return sum(num_leaves(layer) for layer in module)
    if isinstance(module, Residual):
        return num_leaves(module.body) + num_leaves(module.shortcut)
    return 1


def leaves(module: nn.Module) -> list[nn.Module]:
    """Leaf layers in the order of the forward pass."""
    if isinstance(module, nn.Sequential):
        return [leaf for layer in module for leaf in leaves(layer)]
    if isinstance(module, Residual):
        return leaves(module.body) + leaves(module.shortcut)
    return [module]
