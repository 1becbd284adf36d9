"""The end of a search: a sub-problem in which every sign is given is a linear program.

Over the part of the region where the signs hold, the margin is an affine function c x + d, and each neuron's input
z_k = G_k x + h_k. The least margin there is the optimum of

    min c x + d   subject to   s_k z_k >= 0,   x in the box

The solver's dual values are multipliers beta like any others: the bound that counts is computed from them in float64,
with its rounding allowance, so nothing depends on the solver's tolerances.

Shapes: `U` neurons, `P` pixels.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ccdist.interval import Interval
from ccdist.neurons import unflat
from ccdist.subproblems import Batch, Objective
from ccdist.threats import L2Ball

# A violated constraint costs so many times the largest weight: a program without a solution stays solvable, with a
# bound that grows with the price. The dearer program is tried where the cheaper one proves nothing.
PRICES = (1e2, 1e5)
# Over a ball the program is not linear: the multipliers are searched by gradient steps.
BALL_STEPS = 300


def solve_leaf(batch: Batch, alpha: Tensor, beta: Tensor) -> tuple[float, Tensor]:
    """The end of one sub-problem.

    Args:
        batch: of one sub-problem, each of its neurons with a sign.

    Returns:
        Its bound less the allowance, proved where positive, and the point [1, C, H, W] where the margin is least.
    """
    region = batch.images.region
    if isinstance(region, L2Ball):
        slopes = batch.optimize(alpha, beta, BALL_STEPS, torch.full_like(batch.scales[:, 0], torch.inf))
        margin = float(batch.proved(slopes.alpha, slopes.beta).margin)
        return margin, slopes.points
    batch = replace(batch, signs=_all_signs(batch), _cache={})
    # Here, not above: verification reaches no leaf as a rule, and does without scipy then.
    from scipy.optimize import linprog

    objective, _ = _affine(batch, batch.objective)
    rows, heights, signs, columns = _constraints(batch)
    owner = int(batch.owner[0])
    box = torch.stack([region.lower[owner].flatten(), region.upper[owner].flatten()], dim=1).cpu().numpy()
    best = -math.inf
    point = torch.from_numpy(box.mean(1)).view(1, *region.shape[1:])
    for price in PRICES:
        scale = price * max(float(np.abs(objective).max()), 1e-12)
        # Variables: the pixels, and one common violation of all constraints.
        matrix = np.concatenate([-signs[:, None] * rows, -np.ones((len(rows), 1))], axis=1)
        found = linprog(
            np.append(objective[0], scale),
            A_ub=matrix,
            b_ub=signs * heights,
            bounds=[*map(tuple, box), (0, None)],
            method="highs",
        )
        if found.status != 0:
            continue
        multipliers = torch.zeros_like(beta, dtype=torch.float64)
        multipliers[0, columns] = torch.from_numpy(-found.ineqlin.marginals).clamp(min=0).to(beta.device)
        units = torch.repeat_interleave(
            batch.scales.double(), torch.tensor(batch.images.widths, device=beta.device), dim=1
        )
        margin = float(batch.proved(alpha, multipliers / units).margin)
        best = max(best, margin)
        point = torch.from_numpy(found.x[:-1]).view(1, *region.shape[1:])
        if margin > 0:
            break
    return best, point


def _affine(batch: Batch, objective: Objective) -> tuple[np.ndarray, np.ndarray]:
    """(weights [n, P], offsets [n]) of linear functions of the sub-problem, as functions of the pixels."""
    count = len(objective.offset)
    many = Batch(
        batch.images,
        batch.owner.expand(count),
        batch.signs.expand(count, -1),
        Interval(batch.box.lower.expand(count, -1), batch.box.upper.expand(count, -1)),
        objective,
        batch.scales.expand(count, -1),
    )
    nothing = torch.zeros(many.signs.shape, dtype=torch.float64, device=batch.signs.device)
    bound = many.proved(nothing, nothing)
    return bound.weights.flatten(1).cpu().numpy(), bound.offset.cpu().numpy()


def _all_signs(batch: Batch) -> Tensor:
    """Those given and those that the neurons' bounds leave no choice for: the points that matter have them all."""
    known = (batch.box.lower >= 0).to(torch.int8) - ((batch.box.upper <= 0) & (batch.box.lower < 0)).to(torch.int8)
    return torch.where(batch.signs != 0, batch.signs, known)


def _constraints(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tensor]:
    """(G [n, P], h [n], signs [n], columns [n]) of the neurons whose sign the sub-problem gives."""
    rows, heights, signs, columns, start = [], [], [], [], 0
    owner = int(batch.owner[0])
    for kink in batch.images.kinks:
        width = kink.index.shape[1]
        here = batch.signs[0, start : start + width]
        given = here.nonzero().squeeze(1)
        if len(given):
            units = kink.index[owner, given]
            one_hot = torch.zeros(len(given), kink.lower.shape[1], dtype=torch.float64, device=here.device)
            one_hot[torch.arange(len(given)), units] = 1
            shape = batch.images.steps[kink.number].box.shape[1:]
            nothing = one_hot.new_zeros(len(given))
            weights, offset = _affine(batch, Objective(unflat(one_hot, shape), nothing, nothing, kink.number))
            rows.append(weights)
            heights.append(offset)
            signs.append(here[given].double().cpu().numpy())
            columns.append(given + start)
        start += width
    if not rows:
        pixels = batch.images.region.shape[1:].numel()
        return np.zeros((0, pixels)), np.zeros(0), np.zeros(0), torch.zeros(0, dtype=torch.long)
    return np.concatenate(rows), np.concatenate(heights), np.concatenate(signs), torch.cat(columns)
