"""Pre-activation bounds of the points that matter: those at which the margin may still be too small.

A sub-problem is proved when none of its points has a margin of at most t. So whatever bounds it may assume margin <= t,
and its own linear bound turns that into a half-space of the pixels:

    c x + d <= margin <= t

A neuron's input z, for which the image has a linear bound z >= G x + h, is over the region and that half-space at least

    max over gamma >= 0 of   min over the region of (G + gamma c) x + h + gamma (d - t)

Every gamma is sound: a few are tried in float32, and the best one is evaluated in float64. The smaller the gap that is
left, the thinner the half-space, and the more neurons have one sign: what is almost proved proves itself.

Shapes: `D` sub-problems of one image, `K` neurons of each, `U` neurons of the image, `P` pixels.

Source: the constraint margin <= t on intermediate bounds is that of Kotha et al., NeurIPS 2023 (INVPROP); the closed
form with one multiplier is in the spirit of Zhou et al., 2025 (Clip-and-Verify).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ccdist.interval import Interval
from ccdist.linear_bounds import has_kink
from ccdist.neurons import float32_below
from ccdist.proof_network import ProofNetwork
from ccdist.proved_bounds import linear_steps
from ccdist.rounding import GuardedBounds
from ccdist.threats import L2Ball, Region
from ccdist.unit_bounds import UnitBounds, unit_bounds, with_nothing

# gamma in units of |G r| / |c r|. A large one cuts at the very corner where the bound is attained.
MULTIPLIERS = (1.0, 4.0, 16.0, 64.0, 256.0)
# Share of all terms that the float64 evaluation of one row may miss by: sums of up to 10^6 terms.
EVALUATION_SHARE = 2.0**-32
# Share of a square that the rounding of sums of up to 10^4 squares may hide, with room.
HIDDEN_SHARE = 2.0**-38
# Numbers of one chunk of rows: what fits the caches of a processor.
CHUNK_NUMBERS = 2**20


@dataclass(frozen=True)
class NeuronBounds:
    """Linear bounds of all neurons of one image, layer by layer."""

    layers: list[UnitBounds]

    @classmethod
    def of(cls, proof: ProofNetwork, guarded: GuardedBounds, chunk: int) -> "NeuronBounds":
        """By CROWN over the pre-activation bounds of one image, for its units of either sign in their order.

        chunk: linear functions bounded at once.
        """
        layers, steps = [], linear_steps(guarded)
        for number, step in enumerate(guarded.steps):
            if not has_kink(step.layer):
                continue
            shape = step.box.lower.shape[1:]
            places = torch.arange(shape.numel(), device=step.box.lower.device).view(shape)
            order = places.permute(1, 2, 0).flatten() if len(shape) == 3 else places.flatten()
            unstable = ((step.box.lower[0] < 0) & (step.box.upper[0] > 0)).flatten()
            units = order[unstable[order]]
            layers.append(unit_bounds(proof, steps[:number], number, shape, units, chunk))
        return cls(layers)


@dataclass(frozen=True)
class HalfSpace:
    """c x + d <= t for each of D sub-problems, in float64; d is less the allowance of the bound that it is."""

    weights: Tensor  # [D, P]
    excess: Tensor  # [D] d - t


def clipped(bounds: NeuronBounds, region: Region, half: HalfSpace, box: Interval, columns: Tensor) -> Interval:
    """Bounds of some neurons of each sub-problem, met with those over its half-space.

    Args:
        region: of the one image, float64.
        box: [D, U] what is known of its neurons, float32.
        columns: [D, K] which neurons to look at; -1 for none.

    Returns:
        box, tightened at the columns, rounded outward to float32; crossed where no point is left.
    """
    lower, upper = box.lower.clone(), box.upper.clone()
    ground = _Ground.of(region, half)
    start = 0
    for layer in bounds.layers:
        own = torch.where((columns >= start) & (columns < start + layer.offset.shape[1]), columns - start, -1)
        most = int((own >= 0).sum(1).max()) if len(own) else 0
        own = own.sort(dim=1, descending=True).values[:, :most]
        each = max(1, CHUNK_NUMBERS // max(1, 2 * most * layer.support.shape[1]))
        for rows in torch.arange(len(own), device=own.device).split(each):
            if most == 0:
                break
            picked = own[rows].clamp(min=0)  # a neuron looked at for nothing is no harm
            below, above = _least_over(layer, picked, ground.select(rows)).unbind(0)
            index = (rows.unsqueeze(1), picked + start)
            # Of two equal places the last one written stays, but both are the same.
            lower[index] = torch.maximum(lower[index], float32_below(below))
            upper[index] = torch.minimum(upper[index], -float32_below(above))
        start += layer.offset.shape[1]
    return Interval(lower, upper)


@dataclass(frozen=True)
class _Ground:
    """A region and half-spaces about its centre; center and radius are [P + 1], the last for no pixel."""

    center: Tensor
    radius: Tensor
    euclidean: bool
    weights: Tensor  # [D, P + 1] c r
    size: Tensor  # [D] the norm of c r, dual to that of the region
    slope: Tensor
    terms: Tensor  # [D] sum of the absolute terms of slope

    @classmethod
    def of(cls, region: Region, half: HalfSpace) -> "_Ground":
        center = region.center.flatten()
        euclidean = isinstance(region, L2Ball)
        radius = torch.full_like(center, region.epsilon) if isinstance(region, L2Ball) else region.radius.flatten()
        weights = with_nothing(half.weights * radius)
        slope, terms = half.weights @ center + half.excess, half.weights.abs() @ center.abs() + half.excess.abs()
        size = _size(weights, euclidean)
        return cls(with_nothing(center), with_nothing(radius), euclidean, weights, size, slope, terms)

    def select(self, rows: Tensor) -> "_Ground":
        chosen = (values[rows] for values in (self.weights, self.size, self.slope, self.terms))
        return _Ground(self.center, self.radius, self.euclidean, *chosen)


def _least_over(layer: UnitBounds, picked: Tensor, ground: _Ground) -> Tensor:
    """[2, D, K] lower bounds of some neurons' z and -z over the region and each sub-problem's half-space.

    gamma * slope + G center + h - ||(G + gamma c) r||;   outside a neuron's support only gamma c r is left.
    """
    support = layer.support[picked]  # [D, K, S]
    count = support.shape[:2]
    rows = torch.arange(len(picked), device=picked.device).view(-1, 1, 1)
    c = ground.weights[rows, support]
    outside = _beside(ground.size.unsqueeze(1), _size(c, ground.euclidean), ground.euclidean)
    weights = layer.weights[:, picked]  # [2, D, K, S]
    at_center = (weights * ground.center[support]).sum(3) + layer.offset[:, picked]
    weights = weights * ground.radius[support]
    unit = _size(weights, ground.euclidean) / ground.size.view(1, -1, 1).clamp(min=1e-30)
    narrow, narrow_c, narrow_outside = weights.float(), c.float(), outside.float()
    slope = ground.slope.view(1, -1, 1)
    best = torch.full((2, *count), -torch.inf, device=picked.device)
    gammas = torch.zeros_like(best)
    for multiplier in MULTIPLIERS:
        gamma = (multiplier * unit).float()
        inside = _size(torch.addcmul(narrow, gamma.unsqueeze(3), narrow_c), ground.euclidean)
        value = gamma * slope.float() - _together(inside, gamma * narrow_outside, ground.euclidean)
        better = value > best
        best, gammas = torch.where(better, value, best), torch.where(better, gamma, gammas)
    gammas = gammas.double()
    combined = torch.addcmul(weights, gammas.unsqueeze(3), c)
    norm = _together(_size(combined, ground.euclidean), gammas * outside, ground.euclidean)
    found = at_center + gammas * slope - norm
    terms = layer.weights[:, picked].abs().sum(3) + layer.offset[:, picked].abs()
    terms = terms + gammas * (ground.terms + ground.size).view(1, -1, 1)
    found = found - EVALUATION_SHARE * (terms + norm)
    return found.nan_to_num(nan=-torch.inf)


def _size(values: Tensor, euclidean: bool) -> Tensor:
    return torch.linalg.vector_norm(values, dim=-1) if euclidean else values.abs().sum(-1)


def _beside(whole: Tensor, part: Tensor, euclidean: bool) -> Tensor:
    """The size of what is left of a vector without a part; never below the exact one by more than rounding.

    A difference of squares hides what is left below a root of the rounding of the whole: that much is added.
    """
    if not euclidean:
        return (whole - part).clamp(min=0)
    return ((whole**2 - part**2).clamp(min=0) + HIDDEN_SHARE * whole**2).sqrt()


def _together(one: Tensor, other: Tensor, euclidean: bool) -> Tensor:
    return torch.hypot(one, other) if euclidean else one + other
