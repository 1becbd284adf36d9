"""The neurons of sub-problems: which are stored, what encloses them, and how a bound goes through a layer of them.

Only units that may have either sign are stored: an image has U of them over all layers, in the order of `Images.kinks`.
Units of a convolution are counted in the order H, W, C.

Shapes: `I` images, `D` sub-problems, `U` neurons.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ccdist.activations import Lines, curve_of, enclosing_lines
from ccdist.interval import Interval
from ccdist.linear_bounds import has_kink
from ccdist.linear_rules import Relaxation
from ccdist.proof_network import ProofNetwork
from ccdist.rounding import GuardedStep
from ccdist.threats import Region


def flat(values: Tensor) -> Tensor:
    """[D, C, H, W] -> [D, H W C] without a copy where channels come last in memory; [D, F] stays."""
    return values.permute(0, 2, 3, 1).reshape(len(values), -1) if values.dim() == 4 else values.reshape(len(values), -1)


def unflat(values: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `flat`; shape of one image's layer."""
    if len(shape) == 3:
        channels, height, width = shape
        return values.view(len(values), height, width, channels).permute(0, 3, 1, 2)
    return values.view(len(values), *shape)


def float32_below(values: Tensor) -> Tensor:
    """The nearest float32 numbers that are not above float64 ones."""
    rounded = values.float()
    down = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where(rounded.double() > values, down, rounded)


@dataclass(frozen=True)
class KinkLayer:
    """The neurons of one layer of ReLUs, for each of I images.

    index: [I, U] the units that may have either sign come first, ascending; the rest fill up to the widest image.
    """

    number: int  # of the leaf in the order of the forward pass
    lower: Tensor  # [I, units], float64
    upper: Tensor
    index: Tensor
    counts: list[int]  # how many of an image's index are such units
    slope: float  # below 0

    @classmethod
    def of(cls, number: int, step: GuardedStep) -> "KinkLayer":
        lower, upper = flat(step.box.lower), flat(step.box.upper)
        unstable = (lower < 0) & (upper > 0)
        counts = unstable.sum(1)
        width = int(counts.max()) if len(counts) else 0
        index = torch.argsort((~unstable).to(torch.int8), dim=1, stable=True)[:, :width]
        slope = step.layer.negative_slope if isinstance(step.layer, nn.LeakyReLU) else 0.0
        return cls(number, lower, upper, index, counts.tolist(), slope)


@dataclass(frozen=True)
class Images:
    """Everything about I images that their sub-problems share.

    region: float64. steps: float64 pre-activation bounds of each leaf layer, with its rounding error.
    """

    proof: ProofNetwork
    region: Region
    steps: list[GuardedStep]
    kinks: list[KinkLayer]
    smooth: dict[int, Lines]  # of leaves that are smooth activations

    @classmethod
    def of(cls, proof: ProofNetwork, region: Region, steps: list[GuardedStep]) -> "Images":
        kinks = [KinkLayer.of(number, step) for number, step in enumerate(steps) if has_kink(step.layer)]
        curves = {number: (curve_of(step.layer), step.box) for number, step in enumerate(steps)}
        smooth = {number: enclosing_lines(curve, box) for number, (curve, box) in curves.items() if curve is not None}
        return cls(proof, region, steps, kinks, smooth)

    @property
    def widths(self) -> list[int]:
        """U of each kink layer."""
        return [kink.index.shape[1] for kink in self.kinks]

    def neuron_box(self) -> Interval:
        """[I, U] bounds of the neurons' inputs, rounded outward to float32."""
        lower, upper = self._stored([kink.lower for kink in self.kinks]), self._stored([k.upper for k in self.kinks])
        return Interval(float32_below(lower), -float32_below(-upper))

    def adaptive(self) -> Tensor:
        """[I, U] CROWN's slopes, in float32."""
        lower, upper = self._stored([kink.lower for kink in self.kinks]), self._stored([k.upper for k in self.kinks])
        return (upper > -lower).float()

    def _stored(self, layers: Sequence[Tensor]) -> Tensor:
        """[I, U] of values [I, units] for each kink layer."""
        nothing = self.region.center.new_zeros(len(self.region.center), 0)
        chosen = [values.gather(1, kink.index) for values, kink in zip(layers, self.kinks, strict=True)]
        return torch.cat([nothing, *chosen], dim=1)


@dataclass(frozen=True)
class Neurons:
    """One kink layer of D sub-problems in one precision.

    A stored neuron has slope `fixed + free alpha` where its weight is above 0, and the chord below.
    """

    passing: Tensor  # [D, units] slope of the units that are not stored
    index: Tensor  # [D, U]
    fixed: Tensor
    free: Tensor
    chord_slope: Tensor
    chord_offset: Tensor
    sign: Tensor
    scale: Tensor  # [D, 1] unit of beta

    def select(self, rows: Tensor) -> "Neurons":
        return Neurons(*(getattr(self, part.name)[rows] for part in fields(self)))


@dataclass
class Tap:
    """What the gradient of a bound shows of one kink layer: the weights behind it, and the point z that attains it."""

    weights: Tensor | None = None  # [D, U]
    points: Tensor | None = None


class _Through(torch.autograd.Function):
    """Weights behind a layer of ReLUs -> weights before it, and the offset."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, alpha: Tensor, beta: Tensor, neurons: Neurons, tap: Tap
    ) -> tuple[Tensor, Tensor]:
        stored = weights.gather(1, neurons.index)
        negative = stored.clamp(max=0)
        positive = stored - negative
        slope = torch.addcmul(neurons.fixed, neurons.free, alpha)
        before = negative * neurons.chord_slope + positive * slope - neurons.sign * beta * neurons.scale
        out = (weights * neurons.passing).scatter_(1, neurons.index, before)
        ctx.save_for_backward(stored, slope)
        ctx.neurons, ctx.tap = neurons, tap
        return out, (negative * neurons.chord_offset).sum(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (stored, slope), neurons = ctx.saved_tensors, ctx.neurons
        points, ones = gradients  # the gradient of a bound is the point where it is attained
        z = points.gather(1, neurons.index)
        above = (stored > 0).to(z.dtype)
        ctx.tap.weights, ctx.tap.points = stored, z
        inner = z * torch.lerp(neurons.chord_slope, slope, above)
        inner = inner + ones.unsqueeze(1) * neurons.chord_offset * (1 - above)
        back = (points * neurons.passing).scatter_(1, neurons.index, inner)
        return back, z * stored.clamp(min=0) * neurons.free, -neurons.sign * neurons.scale * z, None, None


@dataclass(frozen=True)
class ThroughNeurons:
    """The relaxation of one kink layer in D sub-problems."""

    neurons: Neurons
    alpha: Tensor
    beta: Tensor
    tap: "Tap"

    def select(self, rows: Tensor) -> "Relaxation":
        raise NotImplementedError("a batch of sub-problems is selected as a whole")

    def lines(self) -> Lines:
        raise NotImplementedError("sub-problems keep the lines of their neurons only")

    def through(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        shape = weights.shape[2:]
        out, offset = _Through.apply(flat(weights.squeeze(1)), self.alpha, self.beta, self.neurons, self.tap)
        return unflat(out, shape).unsqueeze(1), offset.unsqueeze(1)


def neurons_of(kink: KinkLayer, owner: Tensor, sign: Tensor, lower: Tensor, upper: Tensor, scale: Tensor) -> Neurons:
    low, high = lower.clamp(max=0), upper.clamp(min=0)
    chord = (high - kink.slope * low) / (high - low).clamp(min=torch.finfo(low.dtype).tiny)
    # A stored unit whose sign is known by its bounds passes as one whose sign is given.
    known = (low == 0).to(sign.dtype) - ((high == 0) & (low != 0)).to(sign.dtype)
    given = sign + (sign == 0) * known
    free = (given == 0).to(sign.dtype)
    # Slope where the sign is known. Masks become numbers first: a mask times a Python number would be float32.
    through = (given > 0).to(sign.dtype) + (given < 0).to(sign.dtype) * kink.slope
    passing = (kink.lower >= 0).to(sign.dtype) + (kink.lower < 0).to(sign.dtype) * kink.slope
    return Neurons(
        passing=passing[owner],
        index=kink.index[owner],
        fixed=through + free * kink.slope,
        free=free * (1 - kink.slope),
        chord_slope=through + free * chord,
        chord_offset=free * low * (kink.slope - chord),
        sign=sign,
        scale=scale,
    )
