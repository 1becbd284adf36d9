"""Linear bounds of single units over the region of one image, as functions of the pixels that they see.

A unit behind convolutions sees a window of the image. Its bound goes backward as a patch of weights that grows with
each convolution, so it costs what the window costs and not what the layers do: a few percent in the first layers.

Shapes: `n` units, `S` pixels that one of them sees, `P` pixels, `h w` a patch of a layer `C H W`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccdist.activations import Lines
from ccdist.batch_norm import BatchNorm, scale_and_shift
from ccdist.linear_rules import Back, Step, backward_from, num_leaves
from ccdist.networks import Normalize, Residual
from ccdist.proof_network import ProofNetwork
from ccdist.threats import L2Ball, Region


@dataclass(frozen=True)
class UnitBounds:
    """z >= weights[0] x + offset[0] and -z >= weights[1] x + offset[1], in float64, less their rounding already.

    support: the pixels that the weights belong to; P stands for none, and the weight is 0 there.
    """

    weights: Tensor  # [2, n, S]
    offset: Tensor  # [2, n]
    support: Tensor  # [n, S]

    def least(self, region: Region) -> Tensor:
        """[2, n] lower bounds of z and -z over the region of the image."""
        box = region.box if isinstance(region, L2Ball) else region
        center, radius = with_nothing(box.center.flatten()), with_nothing(box.radius.flatten())
        at_center = (self.weights * center[self.support]).sum(2)
        lower = at_center - (self.weights.abs() * radius[self.support]).sum(2)
        if isinstance(region, L2Ball):
            middle = (self.weights * with_nothing(region.center.flatten())[self.support]).sum(2)
            lower = torch.maximum(lower, middle - region.epsilon * torch.linalg.vector_norm(self.weights, dim=2))
        return lower + self.offset


def with_nothing(pixels: Tensor) -> Tensor:
    """[..., P] -> [..., P + 1] with a 0 for the pixel that is none."""
    return F.pad(pixels, (0, 1))


def unit_bounds(
    proof: ProofNetwork, steps: Sequence[Step], start: int, shape: torch.Size, units: Tensor, chunk: int
) -> UnitBounds:
    """Bounds of some units of the input of leaf number `start`, of this shape.

    Args:
        steps: of the leaves before it, for one image, in float64 with errors.
        units: [n] in the order of the flattened shape.
        chunk: linear functions of whole layers bounded at once.
    """
    windowed = len(shape) == 3 and start <= _chain(proof.exact.features) and all(map(_is_local, steps))
    parts = [
        _by_windows(steps, shape, some) if windowed else _by_layers(proof, steps, start, shape, some)
        for some in units.split(max(1, chunk // 2))
    ]
    weights, offset = torch.cat([part.weights for part in parts], 1), torch.cat([part.offset for part in parts], 1)
    return _without_unseen(UnitBounds(weights, offset, torch.cat([part.support for part in parts])))


def _without_unseen(bounds: UnitBounds) -> UnitBounds:
    """Supports as narrow as the unit that sees most allows."""
    seen = (bounds.weights != 0).any(0)
    width = int(seen.sum(1).max()) if len(seen) else 0
    order = torch.argsort((~seen).to(torch.int8), dim=1, stable=True)[:, :width]
    return UnitBounds(bounds.weights.gather(2, order.expand(2, -1, -1)), bounds.offset, bounds.support.gather(1, order))


def _chain(module: nn.Module) -> int:
    """Leaves before the first Residual."""
    if isinstance(module, Residual):
        return 0
    if not isinstance(module, nn.Sequential):
        return 1
    count = 0
    for layer in module:
        inside = _chain(layer)
        count += inside
        if inside < num_leaves(layer):
            break
    return count


def _is_local(step: Step) -> bool:
    """Whether its output at a place depends on its input around that place."""
    layer = step.layer
    if isinstance(layer, nn.Conv2d):
        return layer.dilation == (1, 1) and layer.groups == 1
    return step.relaxation is not None or isinstance(layer, Normalize | nn.BatchNorm2d | nn.Identity)


def _by_layers(proof: ProofNetwork, steps: Sequence[Step], start: int, shape: torch.Size, units: Tensor) -> UnitBounds:
    """For any network: the weights of whole layers."""
    count = len(units)
    weights = proof.exact.head.weight.new_zeros(1, 2, count, shape.numel())
    weights[0, :, torch.arange(count, device=units.device), units] = weights.new_tensor([[1.0], [-1.0]])
    nothing = weights.new_zeros(1, 2 * count)
    bound = Back(weights.view(1, 2 * count, *shape), nothing, nothing)
    bound = backward_from(proof.exact.features, start, bound, steps)
    of_pixels = bound.weights.flatten(2).unflatten(1, (2, count)).squeeze(0)
    support = torch.arange(of_pixels.shape[2], device=units.device).expand(count, -1)
    return UnitBounds(of_pixels, (bound.offset - bound.allowance).view(2, count), support)


@dataclass(frozen=True)
class _Patches:
    """Weights of m linear functions, each of a patch of a layer whose first row and column are top and left.

    Patches may reach beyond the layer, into the padding of a convolution: the weights are 0 there.
    """

    weights: Tensor  # [m, C, h, w]
    top: Tensor  # [m]
    left: Tensor
    offset: Tensor  # [m]
    allowance: Tensor

    def places(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """(rows [m, h, 1], columns [m, 1, w]) of the layer, moved inside; see `inside`."""
        rows, columns = self._rows(), self._columns()
        return rows.clamp(0, shape[1] - 1), columns.clamp(0, shape[2] - 1)

    def inside(self, shape: torch.Size) -> Tensor:
        """[m, h, w] which places are in the layer."""
        rows, columns = self._rows(), self._columns()
        return (rows >= 0) & (rows < shape[1]) & (columns >= 0) & (columns < shape[2])

    def cut(self, values: Tensor) -> Tensor:
        """The patches [m, C, h, w] of a layer's values [1, C, H, W]."""
        rows, columns = self.places(values.shape[1:])
        return values[0][:, rows, columns].transpose(0, 1)

    def _rows(self) -> Tensor:
        return (self.top.unsqueeze(1) + torch.arange(self.weights.shape[2], device=self.top.device)).unsqueeze(2)

    def _columns(self) -> Tensor:
        return (self.left.unsqueeze(1) + torch.arange(self.weights.shape[3], device=self.left.device)).unsqueeze(1)


def _by_windows(steps: Sequence[Step], shape: torch.Size, units: Tensor) -> UnitBounds:
    channels, height, width = shape
    count = len(units)
    place = units % (height * width)
    one_hot = F.one_hot(units // (height * width), channels).double().view(count, channels, 1, 1)
    top, left = (place // width).repeat(2), (place % width).repeat(2)
    nothing = one_hot.new_zeros(2 * count)
    patches = _Patches(torch.cat([one_hot, -one_hot]), top, left, nothing, nothing)
    for step in reversed(steps):
        if step.error is not None:
            lost = (patches.weights.abs() * patches.cut(step.error)).sum((1, 2, 3))
            patches = replace(patches, allowance=patches.allowance + lost)
        patches = _through(patches, step)
        shape = step.input_shape
    rows, columns = patches.places(shape)
    channel = torch.arange(shape[0], device=units.device).view(1, -1, 1, 1)
    index = (channel * shape[1] + rows.unsqueeze(1)) * shape[2] + columns.unsqueeze(1)
    index = torch.where(patches.inside(shape).unsqueeze(1), index, shape.numel())
    weights = patches.weights.flatten(1).unflatten(0, (2, count))
    return UnitBounds(weights, (patches.offset - patches.allowance).view(2, count), index[:count].flatten(1))


def _through(patches: _Patches, step: Step) -> _Patches:
    layer, weights, offset = step.layer, patches.weights, patches.offset
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)  # refused by the interval rule
        if layer.bias is not None:
            offset = offset + weights.sum((2, 3)) @ layer.bias
        grown = _Patches(
            F.conv_transpose2d(weights, layer.weight, None, layer.stride),
            patches.top * layer.stride[0] - layer.padding[0],
            patches.left * layer.stride[1] - layer.padding[1],
            offset,
            patches.allowance,
        )
        return replace(grown, weights=grown.weights * grown.inside(step.input_shape).unsqueeze(1))
    if isinstance(layer, Normalize):
        weights = weights / layer.std
        return replace(patches, weights=weights, offset=offset - (weights * layer.mean).sum((1, 2, 3)))
    if isinstance(layer, BatchNorm):
        scale, shift = (values.view(-1, 1, 1) for values in scale_and_shift(layer, None))
        return replace(patches, weights=weights * scale, offset=offset + (weights * shift).sum((1, 2, 3)))
    if step.relaxation is None:
        return patches
    lines = step.relaxation.lines()
    lines = Lines(*(patches.cut(values) for values in vars(lines).values()))
    positive, negative = weights.clamp(min=0), weights.clamp(max=0)
    added = positive * lines.lower_offset + negative * lines.upper_offset
    return replace(
        patches,
        weights=positive * lines.lower_slope + negative * lines.upper_slope,
        offset=offset + added.sum((1, 2, 3)),
    )
