"""Leaves against linear programs written independently: the pattern's own affine pieces, by the exact network."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import strategies
import torch
from scipy.optimize import linprog
from test_subproblems import Drawn, drawn, start
from torch import Tensor, nn

from ccdist.leaf_program import solve_leaf
from ccdist.networks import Residual
from ccdist.subproblems import Batch

pytestmark = pytest.mark.timeout(20)

# The solver's tolerance for constraints, times multipliers of some hundred.
SOLVER_ROUNDING = 1e-5


class Pattern:
    """The network with every kink layer replaced by given slopes: affine, with the neurons' inputs on the way."""

    def __init__(self, one: Drawn, row: int, signs: Tensor) -> None:
        self.one, self.image = one, int(one.batch.owner[row])
        slopes, start_ = [], 0
        for kink in one.images.kinks:
            width = kink.index.shape[1]
            slope = torch.where(kink.lower[self.image] >= 0, 1.0, kink.slope).double()
            here = signs[start_ : start_ + width]
            free = torch.arange(width) < kink.counts[self.image]
            units = kink.index[self.image][free]
            slope[units] = torch.where(here[free] > 0, 1.0, kink.slope).double()
            slopes.append((slope, units, here[free]))
            start_ += width
        self.slopes = slopes

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [K], inputs of the free neurons [n]) at one image."""
        self.inputs: list[Tensor] = []
        self.left = list(self.slopes)
        logits = self.one.case.proof.exact.head(self._through(self.one.case.proof.exact.features, x[None]))
        return logits[0], torch.cat(self.inputs)

    def _through(self, module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, nn.Sequential):
            for layer in module:
                x = self._through(layer, x)
            return x
        if isinstance(module, Residual):
            return self._through(module.body, x) + self._through(module.shortcut, x)
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            slope, units, _ = self.left.pop(0)
            if x.dim() == 4:
                last = x.permute(0, 2, 3, 1)
                self.inputs.append(last.flatten()[units])
                return (last.flatten() * slope).view(last.shape).permute(0, 3, 1, 2)
            self.inputs.append(x.flatten()[units])
            return x * slope
        out: Tensor = module(x)
        return out

    @property
    def signs(self) -> Tensor:
        return torch.cat([signs for _, _, signs in self.slopes]).double()


def optimum(one: Drawn, row: int, signs: Tensor) -> float:
    """Least margin over the cell, by a program of its own; infinity where it is empty."""
    pattern, region = Pattern(one, row, signs), one.case.region
    image = pattern.image
    label = int(one.case.labels[image])
    others = [j for j in range(one.case.network.num_classes) if j != label]
    other = others[row % len(others)]
    zero = torch.zeros(one.case.images.shape[1:], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: torch.cat(pattern(x)), zero)
    logits, inputs = (values.detach() for values in pattern(zero))
    weights = (jacobian[label] - jacobian[other]).flatten().numpy()
    rows = jacobian[len(logits) :].flatten(1).numpy()
    sign = pattern.signs.numpy()
    ends = np.stack([region.lower[image].flatten().numpy(), region.upper[image].flatten().numpy()], 1)  # type: ignore[union-attr]
    found = linprog(weights, A_ub=-sign[:, None] * rows, b_ub=sign * inputs.numpy(), bounds=ends, method="highs")
    if found.status == 2:
        return np.inf
    assert found.status == 0
    return float(found.fun + logits[label] - logits[other])


def one_row(batch: Batch, row: int, signs: Tensor) -> Batch:
    return replace(batch.select(torch.tensor([row])), signs=signs[None].to(torch.int8), _cache={})


def leaves(seeds: range) -> list[tuple[Drawn, int, Tensor]]:
    """Sub-problems with every sign given: those of some point of the region, and arbitrary ones."""
    found = []
    for seed in seeds:
        one = drawn(seed, activations=strategies.CONVEX_KINKS, norm="linf")
        free = one.free()
        if not free.any() or one.case.network.num_classes < 2:
            continue
        generator = torch.Generator().manual_seed(seed)
        own = one.neuron_inputs(one.case.network, one.case.points(1, generator))[0, one.batch.owner]
        for row in range(min(2, len(one.batch))):
            of_point = torch.where(own[row] >= 0, 1, -1)
            some = torch.where(torch.rand(of_point.shape, generator=generator) < 0.2, -of_point, of_point)
            found += [(one, row, torch.where(free[row], signs, 0)) for signs in (of_point, some)]
    return found


def test_a_leaf_is_the_optimum_of_its_program() -> None:
    kinds = {"proved": 0, "refuted": 0, "empty": 0}
    for one, row, signs in leaves(range(24)):
        least = optimum(one, row, signs)
        alpha, beta = (values[[row]] for values in start(one))
        lower, point = solve_leaf(one_row(one.batch, row, signs), alpha, beta)
        if np.isinf(least):  # the bound grows with the price of a violation
            kinds["empty"] += 1
        else:
            scale = SOLVER_ROUNDING * (1 + abs(least))
            assert lower <= least + 1e-9
            assert lower >= least - scale - 1e-3
            kinds["proved" if lower > 0 else "refuted"] += 1
            box = one.case.region
            image = int(one.batch.owner[row])
            assert (point[0] >= box.lower[image] - SOLVER_ROUNDING).all()  # type: ignore[union-attr]
            assert (point[0] <= box.upper[image] + SOLVER_ROUNDING).all()  # type: ignore[union-attr]
            margin = float(one.margins(one.case.proof.exact, point.repeat(1, len(one.case.images), 1, 1, 1))[0, row])
            assert margin == pytest.approx(least, abs=10 * scale + 1e-4)
    assert min(kinds.values()) >= 3, kinds


def test_a_proof_is_one_whatever_the_solver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multipliers of any size, or none: the bound is computed from them anew."""

    generator = torch.Generator().manual_seed(0)
    cases = [(one, row, signs, optimum(one, row, signs)) for one, row, signs in leaves(range(8))]

    class Lies:
        def __init__(self, count: int, pixels: int, status: int) -> None:
            self.status = status
            self.x = np.full(pixels + 1, 0.5)
            self.ineqlin = self
            self.marginals = torch.randn(count, generator=generator).double().numpy() * 30  # of either sign

    for status in (0, 4):
        monkeypatch.setattr(
            scipy.optimize, "linprog", lambda c, A_ub, status=status, **_: Lies(len(A_ub), len(c) - 1, status)
        )
        for one, row, signs, least in cases:
            alpha, beta = (values[[row]] for values in start(one))
            lower, _ = solve_leaf(one_row(one.batch, row, signs), alpha, beta)
            assert lower <= least + 1e-9
            assert status == 0 or lower == -np.inf


def test_over_a_ball_a_leaf_is_sound() -> None:
    for seed in range(6):
        one = drawn(seed, activations=[nn.ReLU()], norm="l2")
        if not one.free().any():
            continue
        generator = torch.Generator().manual_seed(seed)
        points = torch.stack([*one.case.points(8, generator), *one.case.attacked(3)])
        inputs = one.neuron_inputs(one.case.network, points)[:, one.batch.owner]
        margins = one.margins(one.case.network, points)
        signs = torch.where(one.free()[0], torch.where(inputs[0, 0] >= 0, 1, -1), 0)
        alpha, beta = (values[[0]] for values in start(one))
        lower, point = solve_leaf(one_row(one.batch, 0, signs), alpha, beta)
        inside = ((inputs[:, 0] * signs >= 0) | (signs == 0)).all(1)
        assert inside[0]
        assert (margins[inside, 0] >= lower).all()
        assert ((point >= 0) & (point <= 1)).all()
