"""Sub-problems: the margin of one image against one class, with the signs of some neurons given, bounded in batches.

The bound is CROWN's with three kinds of free numbers: for each unstable neuron the slope alpha of its lower line, and
for each given sign a multiplier beta >= 0 of its constraint (beta-CROWN). Any values give a sound bound, so they are
searched in float32 and the bound that counts is computed once, in float64, with its rounding allowance.

For a neuron z with weight w behind it and the sign s of z given (+1 or -1), the pre-activation weight becomes
w - s beta: the bound holds where s z >= 0, since there - s beta z only lowers it.

Shapes: `I` images, `D` sub-problems, `U` neurons, `J` other classes.

Source: Wang et al., NeurIPS 2021 (beta-CROWN); Xu et al., ICLR 2021 (alpha-CROWN).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ccdist.activations import Lines
from ccdist.interval import Interval
from ccdist.linear_bounds import least
from ccdist.linear_rules import Back, EnclosingLines, Relaxation, Step, backward, backward_from, leaves
from ccdist.networks import Network
from ccdist.neurons import Images, Neurons, Tap, ThroughNeurons, neurons_of
from ccdist.threats import L2Ball, Region

# Adam's learning rates: slopes live in [0, 1]; beta is in units of its layer's weights (see `Batch.scales`).
ALPHA_RATE, BETA_RATE = 0.2, 0.2
RATE_DECAY = 0.95
MOMENTS = (0.9, 0.999)
# Decided sub-problems leave a running batch when they are at least so many of it: leaving copies the rest.
WORTH_DROPPING = 0.7


@dataclass(frozen=True)
class Objective:
    """A linear function of each sub-problem: weights of some layer's input, or of the features.

    start: number of the leaf whose input the weights are for; None: the features.
    error: what the function itself may miss by in a deployed forward pass; it is part of the allowance.
    """

    weights: Tensor  # [D, ...], float64
    offset: Tensor  # [D]
    error: Tensor  # [D]
    start: int | None = None

    def select(self, rows: Tensor) -> "Objective":
        return Objective(self.weights[rows], self.offset[rows], self.error[rows], self.start)


@dataclass(frozen=True)
class ProvedBound:
    """Linear bounds in float64 of D sub-problems: objective >= weights x + offset - allowance where the signs hold.

    lower: [D] least of weights x + offset over the region.
    """

    lower: Tensor
    allowance: Tensor
    weights: Tensor  # [D, C, H, W]
    offset: Tensor  # [D]

    def select(self, rows: Tensor) -> "ProvedBound":
        return ProvedBound(self.lower[rows], self.allowance[rows], self.weights[rows], self.offset[rows])

    @property
    def margin(self) -> Tensor:
        """What rounding leaves of the bound."""
        return self.lower - self.allowance


@dataclass
class Bounded:
    """Bounds of D sub-problems and where they come from.

    slack: [D, U] what the relaxation of each neuron gives away at the point where the bound is attained, the sum of
        |w| |line - f(z)|, >= 0; -1 where the sign is known.
    points: [D, C, H, W] where the bound is attained.
    sizes: [D, L] mean |w| of the stored neurons of each kink layer.
    """

    lower: Tensor
    alpha: Tensor
    beta: Tensor
    slack: Tensor
    points: Tensor
    sizes: Tensor


@dataclass
class Batch:
    """D sub-problems of some images, ready to be bounded."""

    images: Images
    owner: Tensor  # [D] row of the image
    signs: Tensor  # [D, U] +1, -1, or 0 where not given
    box: Interval  # [D, U] float32 bounds of the neurons' inputs
    objective: Objective
    scales: Tensor  # [D, L] unit of beta in each kink layer
    _cache: dict[torch.dtype, tuple[list[Neurons], Region, Objective]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.owner)

    def select(self, rows: Tensor) -> "Batch":
        chosen = replace(
            self,
            owner=self.owner[rows],
            signs=self.signs[rows],
            box=Interval(self.box.lower[rows], self.box.upper[rows]),
            objective=self.objective.select(rows),
            scales=self.scales[rows],
            _cache={},
        )
        for dtype, (neurons, region, objective) in self._cache.items():
            chosen._cache[dtype] = (
                [layer.select(rows) for layer in neurons],
                _rows(region, rows),
                objective.select(rows),
            )
        return chosen

    def _prepared(self, dtype: torch.dtype) -> tuple[list[Neurons], Region, Objective]:
        if dtype not in self._cache:
            parts = [
                values.to(dtype).split(self.images.widths, dim=1)
                for values in (self.signs, self.box.lower, self.box.upper)
            ]
            scales = self.scales.to(dtype).unsqueeze(2).unbind(1)
            neurons = [
                neurons_of(kink, self.owner, *of_layer)
                for kink, *of_layer in zip(self.images.kinks, *parts, scales, strict=True)
            ]
            o = self.objective
            objective = Objective(o.weights.to(dtype), o.offset.to(dtype), o.error.to(dtype), o.start)
            self._cache[dtype] = (neurons, _rows(self.images.region, self.owner, dtype), objective)
        return self._cache[dtype]

    def _evaluate(
        self, network: Network, alpha: Tensor, beta: Tensor, *, errors: bool = False, taps: Sequence[Tap] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(bounds [D], allowance [D], weights of the pixels [D, C, H, W])."""
        dtype = network.head.weight.dtype
        neurons, region, objective = self._prepared(dtype)
        alphas, betas = alpha.split(self.images.widths, dim=1), beta.split(self.images.widths, dim=1)
        taps = taps or [Tap() for _ in neurons]
        relaxations: dict[int, Relaxation] = {
            kink.number: ThroughNeurons(*values)
            for kink, *values in zip(self.images.kinks, neurons, alphas, betas, taps, strict=True)
        }
        for number, lines in self.images.smooth.items():
            relaxations[number] = EnclosingLines(_gathered(lines, self.owner, dtype))
        steps = [
            Step(
                leaf,
                guarded.box.shape[1:],
                relaxations.get(number),
                guarded.error[self.owner] if errors else None,
            )
            for number, (leaf, guarded) in enumerate(zip(leaves(network.features), self.images.steps, strict=True))
        ]
        bound = Back(objective.weights.unsqueeze(1), objective.offset.unsqueeze(1), objective.error.unsqueeze(1))
        if objective.start is None:
            bound = backward(network.features, bound, steps)
        else:
            bound = backward_from(network.features, objective.start, bound, steps)
        lower = least(bound.weights, region) + bound.offset
        return lower.squeeze(1), bound.allowance.squeeze(1), bound.weights.squeeze(1)

    @torch.no_grad()
    def proved(self, alpha: Tensor, beta: Tensor) -> "ProvedBound":
        """The bound in float64: a sub-problem is proved where its margin is positive."""
        network = self.images.proof.exact
        lower, allowance, weights = self._evaluate(network, alpha.double(), beta.double(), errors=True)
        offset = lower - least(weights.unsqueeze(1), self._prepared(torch.float64)[1]).squeeze(1)
        return ProvedBound(lower, allowance, weights, offset)

    @torch.no_grad()
    def bounds(self, alpha: Tensor, beta: Tensor) -> Tensor:
        """float32 bounds [D]: estimates, without an allowance."""
        return self._evaluate(self.images.proof.search, alpha, beta)[0]

    def optimize(self, alpha: Tensor, beta: Tensor, steps: int, target: Tensor) -> Bounded:
        """Slopes and multipliers improved by Adam from where they are; the best bound of each sub-problem is kept.

        Args:
            alpha, beta: [D, U], float32.
            steps: gradient evaluations.
            target: [D]; a sub-problem whose bound is above it is worked on no more.
        """
        best = Bounded(
            torch.full_like(target, -torch.inf),
            alpha.clone(),
            beta.clone(),
            slack=-torch.ones_like(alpha),
            points=torch.zeros((len(self), *self.images.region.shape[1:]), dtype=alpha.dtype, device=alpha.device),
            sizes=torch.ones_like(self.scales),
        )
        alpha, beta = alpha.clone(), beta.clone()  # moved in place below
        rows, batch, rate = torch.arange(len(self), device=alpha.device), self, 1.0
        moments = [torch.zeros_like(alpha) for _ in range(4)]
        for step in range(1, steps + 1):
            taps = [Tap() for _ in self.images.kinks]
            alpha, beta = alpha.detach().requires_grad_(), beta.detach().requires_grad_()
            with torch.enable_grad():  # whatever the caller's mode
                lower, _, weights = batch._evaluate(self.images.proof.search, alpha, beta, taps=taps)
                # Without kinks nothing depends on them.
                by_alpha, by_beta = (
                    torch.autograd.grad(lower.sum(), (alpha, beta)) if self.images.kinks else (alpha, beta)
                )
            lower, weights, alpha, beta = lower.detach(), weights.detach(), alpha.detach(), beta.detach()
            better = lower > best.lower[rows]
            kept = rows[better]
            best.lower[kept], best.alpha[kept], best.beta[kept] = lower[better], alpha[better], beta[better]
            open_ = best.lower[rows] <= target[rows]
            last, few = step == steps or not open_.any(), open_.sum() < WORTH_DROPPING * len(open_)
            if last or few:  # also of those that leave: float64 may deny what float32 expects
                best.slack[rows], best.sizes[rows] = batch._slack(alpha, taps)
                best.points[rows] = attained(batch._prepared(lower.dtype)[1], weights)
            if last:
                break
            _adam(alpha, by_alpha, moments[0], moments[1], step, ALPHA_RATE * rate).clamp_(0, 1)
            _adam(beta, by_beta, moments[2], moments[3], step, BETA_RATE * rate).clamp_(min=0)
            rate *= RATE_DECAY
            if few:
                batch, rows = batch.select(open_), rows[open_]
                alpha, beta, moments = alpha[open_], beta[open_], [moment[open_] for moment in moments]
        return best

    def _slack(self, alpha: Tensor, taps: Sequence[Tap]) -> tuple[Tensor, Tensor]:
        """See `Bounded.slack` and `Bounded.sizes`."""
        neurons, _, _ = self._prepared(alpha.dtype)
        slacks, sizes = [], []
        for layer, a, tap in zip(neurons, alpha.split(self.images.widths, dim=1), taps, strict=True):
            if tap.weights is None or tap.points is None:  # behind the objective
                slacks.append(-torch.ones_like(a))
                sizes.append(a.new_ones(len(a), 1))
                continue
            z, weights = tap.points, tap.weights
            value = z.clamp(min=0) + layer.fixed * z.clamp(max=0)  # f(z) of a free neuron
            above_kink = value - torch.addcmul(layer.fixed, layer.free, a) * z
            below_chord = layer.chord_slope * z + layer.chord_offset - value
            slack = below_chord * (-weights).clamp(min=0) + above_kink * weights.clamp(min=0)
            slacks.append(torch.where(layer.free > 0, slack.clamp(min=0), -1))
            sizes.append(weights.abs().mean(1, keepdim=True) if weights.shape[1] else a.new_ones(len(a), 1))
        nothing = alpha.new_zeros(len(alpha), 0)
        return torch.cat([nothing, *slacks], dim=1), torch.cat([nothing, *sizes], dim=1)


def attained(region: Region, weights: Tensor) -> Tensor:
    """Where weights * x is least over the region; over a ball, without its pixel range."""
    if isinstance(region, L2Ball):
        lengths = torch.linalg.vector_norm(weights.flatten(1), dim=1).clamp(min=torch.finfo(weights.dtype).tiny)
        step = region.epsilon / lengths.view(-1, *(1,) * (weights.dim() - 1))
        inside: Tensor = (region.center - step * weights).clamp(0, 1)
        return inside
    above = (weights > 0).to(weights.dtype)
    return torch.lerp(region.upper, region.lower, above)


def _adam(values: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: int, rate: float) -> Tensor:
    """One ascending step in place; the moments too."""
    mean.mul_(MOMENTS[0]).add_(gradient, alpha=1 - MOMENTS[0])
    square.mul_(MOMENTS[1]).addcmul_(gradient, gradient, value=1 - MOMENTS[1])
    scaled = rate / (1 - MOMENTS[0] ** step)
    deviation = (square / (1 - MOMENTS[1] ** step)).sqrt_().add_(1e-12)
    return values.addcdiv_(mean, deviation, value=scaled)


def _rows(region: Region, rows: Any, dtype: torch.dtype | None = None) -> Region:
    if isinstance(region, L2Ball):
        return L2Ball(region.center[rows].to(dtype or region.center.dtype), region.epsilon)
    return Interval(
        region.lower[rows].to(dtype or region.lower.dtype), region.upper[rows].to(dtype or region.upper.dtype)
    )


def _gathered(lines: Lines, rows: Tensor, dtype: torch.dtype) -> Lines:
    return Lines(*(getattr(lines, part.name)[rows].to(dtype) for part in fields(lines)))
