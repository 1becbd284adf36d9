"""The exact least margin of a small ReLU network over a box, in two independent ways, in float64.

A margin is z[y] - z[j]. One way is a mixed-integer program for each j, with one binary for each unstable ReLU; the
other goes through every activation pattern, with one linear program for each. Neither reads a bound of the package.

Networks are made of Normalize, Linear, Conv2d, BatchNorm1d/2d, AvgPool2d, Flatten, Identity, ReLU, Sequential,
Residual and Network. Images and boxes here are single: [C, H, W].

Shapes: `V` variables of a program (pixels, then outputs of unstable ReLUs), `U` unstable ReLUs, `K` classes.
"""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import oracles
import torch
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from torch import Tensor, nn

from ccdist.networks import Network, Normalize, Residual

AFFINE_LAYERS = (
    Normalize,
    nn.Linear,
    nn.Conv2d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.AvgPool2d,
    nn.Flatten,
    nn.Identity,
)

# HiGHS ends at an absolute gap of 1e-6, which scipy cannot change: a larger objective makes that gap smaller.
OBJECTIVE_SCALE = 1e3
# Between the proved bound and the margin of the point found, relative: HiGHS takes 1e-6 for an integer and 1e-7 for
# feasible. Over 660 programs the largest gap was 3e-7.
SOLVER_GAP = 1e-5
MOST_PATTERNS = 2**6


@dataclass(frozen=True)
class Minimum:
    """lower <= least margin <= margin, both to the solver's tolerance; logits."""

    lower: float  # proved by the solver
    margin: float  # of a plain float64 forward pass at `point`
    point: Tensor  # [C, H, W] float64, inside the box
    other: int  # the class j of the margin


def in_float64(network: Network) -> Network:
    return copy.deepcopy(network).double().eval().requires_grad_(False)


def exact_box(image: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """[max(x - epsilon, 0), min(x + epsilon, 1)] in float64, from the stored pixels."""
    return (image.double() - epsilon).clamp(0, 1), (image.double() + epsilon).clamp(0, 1)


# --- A mixed-integer program


@dataclass(frozen=True)
class _Affine:
    """A layer's values as an affine function of the variables: offset + sum over V of v * columns[v]."""

    columns: Tensor  # [V, ...shape]; variables made later have no effect
    offset: Tensor  # [...shape]

    def widened(self, count: int) -> Tensor:
        missing = self.columns.new_zeros(count - len(self.columns), *self.offset.shape)
        return torch.cat([self.columns, missing])


@dataclass
class Program:
    """The network over one box: pixels and outputs of unstable ReLUs are variables, all else is affine in them.

    An unstable ReLU y = max(p, 0) with l <= p <= u, l < 0 < u, is, with its binary a:

        y >= p,   y >= 0,   y <= p - l (1 - a),   y <= u a
    """

    network: Network  # float64
    shape: torch.Size  # of the image
    lower: Tensor  # [V]
    upper: Tensor  # [V]
    # for each unstable ReLU: its own variable, p as (weights over the variables so far, offset), l, u
    unstable: list[tuple[int, Tensor, float, float, float]] = field(default_factory=list)
    logits: _Affine = field(init=False)

    @classmethod
    def of(cls, network: Network, lower: Tensor, upper: Tensor) -> "Program":
        """Of a float64 network and the ends [C, H, W] of a box."""
        program = cls(network, lower.shape, lower.flatten(), upper.flatten())
        pixels = _Affine(torch.eye(lower.numel(), dtype=lower.dtype).view(-1, *lower.shape), torch.zeros_like(lower))
        program.logits = program._through(network, pixels)
        return program

    def _through(self, module: nn.Module, values: _Affine) -> _Affine:
        if isinstance(module, Network):
            return self._through(module.head, self._through(module.features, values))
        if isinstance(module, nn.Sequential):
            for layer in module:
                values = self._through(layer, values)
            return values
        if isinstance(module, Residual):
            body, short = self._through(module.body, values), self._through(module.shortcut, values)
            count = len(self.lower)
            return _Affine(body.widened(count) + short.widened(count), body.offset + short.offset)
        if isinstance(module, nn.ReLU):
            return self._relu(values)
        if not isinstance(module, AFFINE_LAYERS):
            raise TypeError(f"no exact program for {type(module).__name__}")
        zero_offset_columns = torch.cat([torch.zeros_like(values.offset)[None], values.offset[None], values.columns])
        out = module(zero_offset_columns)
        return _Affine(out[2:] - out[0], out[1])

    def _relu(self, values: _Affine) -> _Affine:
        weights, offset = values.columns.flatten(1).T, values.offset.flatten()
        least, most = self._range(weights, offset)
        before, columns, offsets = len(self.lower), weights.clone(), offset.clone()
        columns[most <= 0], offsets[most <= 0] = 0, 0
        straddling = ((least < 0) & (most > 0)).nonzero().flatten().tolist()
        columns = torch.cat([columns, columns.new_zeros(len(offset), before - columns.shape[1] + len(straddling))], 1)
        for variable, neuron in enumerate(straddling, before):
            l, u = float(least[neuron]), float(most[neuron])  # noqa: E741
            self.unstable.append((variable, weights[neuron], float(offset[neuron]), l, u))
            columns[neuron], offsets[neuron] = 0, 0
            columns[neuron, variable] = 1
        self.lower = torch.cat([self.lower, torch.zeros_like(most[straddling])])
        self.upper = torch.cat([self.upper, most[straddling]])
        return _Affine(columns.T.reshape(-1, *values.offset.shape), offsets.view(values.offset.shape))

    def _range(self, weights: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Exact ends of offset + weights v over the box of the variables."""
        low, up = self.lower[: weights.shape[-1]], self.upper[: weights.shape[-1]]
        positive, negative = weights.clamp(min=0), weights.clamp(max=0)
        return positive @ low + negative @ up + offset, positive @ up + negative @ low + offset

    def _difference(self, label: int, other: int) -> tuple[Tensor, Tensor]:
        columns = self.logits.widened(len(self.lower))
        return columns[:, label] - columns[:, other], self.logits.offset[label] - self.logits.offset[other]

    def interval_bound(self, label: int, other: int) -> float:
        """Least of z[label] - z[other] by interval arithmetic over the variables."""
        return float(self._range(*self._difference(label, other))[0])

    def minimum(self, label: int, other: int) -> Minimum:
        """The least z[label] - z[other], by HiGHS without a relative gap.

        Raises:
            ArithmeticError: no optimum, or the point found does not attain it.
        """
        weights, offset = self._difference(label, other)
        if not self.unstable:
            found = torch.where(weights > 0, self.lower, self.upper)
            return self._attained(float(weights @ found + offset), found, label, other)
        size, count = len(self.lower), len(self.unstable)
        rows, limits = np.zeros((3 * count, size + count)), np.zeros(3 * count)
        for index, (variable, pre_weights, pre_offset, l, u) in enumerate(self.unstable):  # noqa: E741
            above, below, on = 3 * index, 3 * index + 1, 3 * index + 2
            rows[above, : len(pre_weights)] = pre_weights
            rows[above, variable] -= 1
            limits[above] = -pre_offset
            rows[below, : len(pre_weights)] = -pre_weights
            rows[below, variable] += 1
            rows[below, size + index] = -l
            limits[below] = pre_offset - l
            rows[on, variable], rows[on, size + index] = 1, -u
        solution = milp(
            np.concatenate([OBJECTIVE_SCALE * weights.numpy(), np.zeros(count)]),
            integrality=np.repeat([0, 1], [size, count]),
            bounds=Bounds(
                np.concatenate([self.lower.numpy(), np.zeros(count)]),
                np.concatenate([self.upper.numpy(), np.ones(count)]),
            ),
            constraints=LinearConstraint(rows, ub=limits),
            options={"mip_rel_gap": 0},
        )
        if solution.status != 0:
            raise ArithmeticError(f"the program of class {label} against {other} has no optimum: {solution.message}")
        bound = solution.mip_dual_bound / OBJECTIVE_SCALE + float(offset)
        return self._attained(bound, torch.from_numpy(solution.x), label, other)

    def _attained(self, bound: float, found: Tensor, label: int, other: int) -> Minimum:
        pixels = self.shape.numel()
        point = found[:pixels].clamp(self.lower[:pixels], self.upper[:pixels]).view(self.shape)
        logits = self.network(point[None])[0]
        margin = float(logits[label] - logits[other])
        if not abs(margin - bound) <= SOLVER_GAP * (1 + abs(margin)):
            raise ArithmeticError(f"the solver proves {bound}, but its point has margin {margin}")
        return Minimum(min(bound, margin), margin, point, other)


def other_classes(network: Network, label: int) -> list[int]:
    return [other for other in range(network.num_classes) if other != label]


def minima(network: Network, lower: Tensor, upper: Tensor, label: int) -> list[Minimum]:
    """Of every z[label] - z[j], in increasing j."""
    network = in_float64(network)
    program = Program.of(network, lower, upper)
    return [program.minimum(label, other) for other in other_classes(network, label)]


def least_margin(network: Network, lower: Tensor, upper: Tensor, label: int) -> Minimum:
    """The least of `minima`: a class whose interval bound is above a margin already found cannot have it.

    Args:
        network: in float64; see `in_float64`.
    """
    program = Program.of(network, lower, upper)
    bounds = sorted((program.interval_bound(label, other), other) for other in other_classes(network, label))
    best = program.minimum(label, bounds[0][1])
    lowest = best.lower
    for bound, other in bounds[1:]:
        if bound <= best.margin:
            found = program.minimum(label, other)
            lowest = min(lowest, found.lower)
            best = min(best, found, key=lambda minimum: minimum.margin)
    return Minimum(lowest, best.margin, best.point, best.other)


# --- Every activation pattern


@dataclass(frozen=True)
class _Leaf:
    """An affine layer as its matrix and offset, or a ReLU with its pre-activation interval; flattened."""

    affine: tuple[Tensor, Tensor] | None
    lower: Tensor
    upper: Tensor


def _leaves(module: nn.Module, lower: Tensor, upper: Tensor, leaves: list[_Leaf]) -> tuple[Tensor, Tensor]:
    """Layer by layer interval arithmetic over one box, with every leaf in the order of the forward pass."""
    if isinstance(module, Network):
        return _leaves(module.head, *_leaves(module.features, lower, upper, leaves), leaves)
    if isinstance(module, nn.Sequential):
        for layer in module:
            lower, upper = _leaves(layer, lower, upper, leaves)
        return lower, upper
    if isinstance(module, Residual):
        body, short = (_leaves(branch, lower, upper, leaves) for branch in (module.body, module.shortcut))
        return body[0] + short[0], body[1] + short[1]
    if isinstance(module, nn.ReLU):
        leaves.append(_Leaf(None, lower.flatten(), upper.flatten()))
        return lower.clamp(min=0), upper.clamp(min=0)
    if not isinstance(module, AFFINE_LAYERS):
        raise TypeError(f"no exact program for {type(module).__name__}")
    matrix, offset = oracles.dense(module, tuple(lower.shape))
    leaves.append(_Leaf((matrix, offset), lower.flatten(), upper.flatten()))
    center, radius = matrix @ ((lower + upper) / 2).flatten() + offset, matrix.abs() @ ((upper - lower) / 2).flatten()
    shape = module(lower[None]).shape[1:]
    return (center - radius).view(shape), (center + radius).view(shape)


@dataclass
class _Cell:
    """The part of the box with given signs of the unstable ReLUs, where the network is affine in the pixels."""

    signs: Iterator[bool]
    rows: list[Tensor] = field(default_factory=list)  # rows x <= limits in the cell
    limits: list[Tensor] = field(default_factory=list)

    def through(self, module: nn.Module, matrix: Tensor, offset: Tensor, leaves: Iterator[_Leaf]) -> tuple[Tensor, ...]:
        if isinstance(module, Network):
            return self.through(module.head, *self.through(module.features, matrix, offset, leaves), leaves)
        if isinstance(module, nn.Sequential):
            for layer in module:
                matrix, offset = self.through(layer, matrix, offset, leaves)
            return matrix, offset
        if isinstance(module, Residual):
            body = self.through(module.body, matrix, offset, leaves)
            short = self.through(module.shortcut, matrix, offset, leaves)
            return body[0] + short[0], body[1] + short[1]
        leaf = next(leaves)
        if leaf.affine is not None:
            return leaf.affine[0] @ matrix, leaf.affine[0] @ offset + leaf.affine[1]
        active = (leaf.lower >= 0).to(matrix.dtype)
        for neuron in _straddling(leaf):
            sign = 1.0 if next(self.signs) else -1.0
            active[neuron] = max(sign, 0.0)
            self.rows.append(-sign * matrix[neuron])
            self.limits.append(sign * offset[neuron])
        return active[:, None] * matrix, active * offset


def _straddling(leaf: _Leaf) -> list[int]:
    return ((leaf.lower < 0) & (leaf.upper > 0)).nonzero().flatten().tolist() if leaf.affine is None else []


def num_straddling(network: Network, lower: Tensor, upper: Tensor) -> int:
    """ReLUs that plain interval arithmetic cannot fix the sign of; no fewer than the unstable ones of a program."""
    leaves: list[_Leaf] = []
    _leaves(in_float64(network), lower, upper, leaves)
    return sum(len(_straddling(leaf)) for leaf in leaves)


def enumerated_margins(network: Network, lower: Tensor, upper: Tensor, label: int) -> list[float]:
    """The least of every z[label] - z[j], in increasing j: over every pattern, a linear program in its cell.

    Raises:
        ValueError: more than 6 ReLUs straddle 0.
    """
    network = in_float64(network)
    leaves: list[_Leaf] = []
    _leaves(network, lower, upper, leaves)
    count = sum(len(_straddling(leaf)) for leaf in leaves)
    if 2**count > MOST_PATTERNS:
        raise ValueError(f"{count} ReLUs straddle 0: too many patterns to go through")
    pixels = lower.numel()
    best = [np.inf] * network.num_classes
    for signs in itertools.product((False, True), repeat=count):
        cell = _Cell(iter(signs))
        matrix, offset = cell.through(
            network, torch.eye(pixels, dtype=lower.dtype), torch.zeros(pixels, dtype=lower.dtype), iter(leaves)
        )
        constraints = (
            {"A_ub": torch.stack(cell.rows).numpy(), "b_ub": torch.stack(cell.limits).numpy()} if count else {}
        )
        for other in other_classes(network, label):
            weights = (matrix[label] - matrix[other]).numpy()
            ends = np.stack([lower.flatten().numpy(), upper.flatten().numpy()], 1)
            solution = linprog(weights, bounds=ends, method="highs", **constraints)
            if solution.status == 2:  # an empty cell, for every class
                break
            if solution.status != 0:
                raise ArithmeticError(f"a cell's program has no optimum: {solution.message}")
            best[other] = min(best[other], solution.fun + float(offset[label] - offset[other]))
    return [best[other] for other in other_classes(network, label)]
