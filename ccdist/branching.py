"""What a round of branch and bound is made of: the open images, the choice of neurons, the children, the points.

Shapes: `I` open images, `D` sub-problems, `U` neurons, `K` candidates, `J` other classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ccdist.attacks import unit_length
from ccdist.bounds import difference_weights, logit_differences
from ccdist.clipping import HalfSpace, NeuronBounds, clipped
from ccdist.frontier import Frontier, Row
from ccdist.interval import Interval
from ccdist.neurons import Images
from ccdist.proof_network import ProofNetwork
from ccdist.rounding import GuardedBounds, GuardedStep, head_error
from ccdist.subproblems import Batch, Objective, ProvedBound
from ccdist.threats import L2Ball, Region


@dataclass
class OpenImage:
    """One image while it is searched.

    neurons: how many units of each kink layer may have either sign; they are what its rows index.
    scales: [L] unit of beta in each kink layer.
    target: float32 bounds above it go to their proof, in logits.
    assumed: the t of `ccdist.clipping`: what is proved after the first clip is that the margin is above t, not by how
        much.
    root: bound proved of the whole region; worst_root: that of its worst specification, while they are bounded.
    proved: the worst bound of the sub-problems that have left. All bounds are less their allowance.
    """

    position: int
    guarded: GuardedBounds  # of this image alone
    region: Region
    label: Tensor  # [1]
    neurons: list[int]
    scales: Tensor
    bounds: NeuronBounds | None = None  # linear ones; None: not needed yet
    target: float = 0.0
    assumed: float = 0.0
    root: float = -math.inf
    worst_root: float = math.inf
    proved: float = math.inf
    frontier: Frontier = field(default_factory=Frontier)
    branches: int = 0
    seconds: float = 0.0
    counterexample: Tensor | None = None  # [C, H, W]
    stuck: bool = False  # what is left can be neither proved nor refuted, or does not fit in memory

    def give_up(self) -> None:
        """A part of the region is left out: only the root's bound holds for all of it."""
        self.stuck, self.proved = True, -math.inf

    @property
    def num_bytes(self) -> int:
        """Of its bounds, beside the frontier."""
        boxes = [step.box for step in self.guarded.steps]
        kept = [tensor for box in boxes for tensor in (box.lower, box.upper)]
        kept += [step.error for step in self.guarded.steps]
        for layer in () if self.bounds is None else self.bounds.layers:
            kept += [layer.weights, layer.support]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    @property
    def lower_bound(self) -> float:
        """The best proved lower bound of the margin: that of the root, or of the worst sub-problem if higher."""
        return max(self.root, min(self.assumed, self.proved, self.frontier.lowest))


@dataclass(frozen=True)
class Stack:
    """Open images as one batch; columns[i] are the places of image i's neurons among the batch's."""

    opened: list[OpenImage]
    images: Images
    labels: Tensor
    weights: Tensor  # [I, J, D] of the specifications, float64
    offset: Tensor  # [I, J]
    error: Tensor
    scales: Tensor  # [I, L]
    targets: Tensor  # [I] float32
    columns: list[np.ndarray]

    @classmethod
    def of(cls, proof: ProofNetwork, opened: Sequence[OpenImage]) -> "Stack":
        guarded = _stacked([image.guarded for image in opened])
        region = _stacked_regions([image.region for image in opened])
        labels = torch.cat([image.label for image in opened])
        images = Images.of(proof, region, guarded.steps)
        weights, offset = difference_weights(proof.exact.head, labels)
        error = head_error(proof, guarded.features, labels)
        starts = np.cumsum([0, *images.widths])
        columns = [
            np.concatenate([start + np.arange(count) for start, count in zip(starts, image.neurons, strict=False)])
            if image.neurons
            else np.zeros(0, dtype=np.int64)
            for image in opened
        ]
        return cls(
            list(opened),
            images,
            labels,
            weights,
            offset,
            error,
            torch.stack([image.scales for image in opened]),
            torch.tensor([image.target for image in opened], device=labels.device),
            columns,
        )

    def batch(self, problems: "SubProblems") -> Batch:
        owner, place = problems.owner, (problems.owner, problems.specs)
        objective = Objective(self.weights[place], self.offset[place], self.error[place])
        return Batch(self.images, owner, problems.signs, problems.box, objective, self.scales[owner])


def _stacked(parts: Sequence[GuardedBounds]) -> GuardedBounds:
    steps = [
        GuardedStep(
            same[0].layer,
            _stacked_boxes([step.box for step in same]),
            torch.cat([step.error for step in same]),
        )
        for same in zip(*(part.steps for part in parts), strict=True)
    ]
    return GuardedBounds(steps, _stacked_boxes([part.features for part in parts]))


def _stacked_boxes(boxes: Sequence[Interval]) -> Interval:
    return Interval(torch.cat([box.lower for box in boxes]), torch.cat([box.upper for box in boxes]))


def _stacked_regions(regions: Sequence[Region]) -> Region:
    balls = [region for region in regions if isinstance(region, L2Ball)]
    if balls:
        return L2Ball(torch.cat([ball.center for ball in balls]), balls[0].epsilon)
    return _stacked_boxes([region for region in regions if isinstance(region, Interval)])


@dataclass
class SubProblems:
    """D sub-problems of stacked images, ready to be split or bounded."""

    owner: Tensor  # [D]
    specs: Tensor  # [D]
    signs: Tensor  # [D, U] int8
    box: Interval  # [D, U] float32 bounds of the neurons' inputs, where the margin may be too small
    alpha: Tensor  # [D, U]
    beta: Tensor
    lower: Tensor  # [D] float32, proved: bound of the parent less its allowance
    candidates: Tensor  # [D, K] columns; -1: none

    def __len__(self) -> int:
        return len(self.owner)

    def select(self, rows: Tensor) -> "SubProblems":
        return SubProblems(
            self.owner[rows],
            self.specs[rows],
            self.signs[rows],
            Interval(self.box.lower[rows], self.box.upper[rows]),
            self.alpha[rows],
            self.beta[rows],
            self.lower[rows],
            self.candidates[rows],
        )


def unpack(stack: Stack, taken: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> SubProblems:
    """Rows (image, bounds, packed rows) of several images as one batch."""
    device = stack.labels.device
    places = [np.full(len(bounds), place) for place, bounds, _ in taken]
    owner = torch.from_numpy(np.concatenate(places)).to(device)
    # An image's rows say nothing of the units that fill up its neurons to the widest image's: their own bounds do.
    box = stack.images.neuron_box()
    signs = np.zeros((len(owner), sum(stack.images.widths)), dtype=np.int8)
    alpha, beta = np.zeros(signs.shape, dtype=np.float32), np.zeros(signs.shape, dtype=np.float32)
    lower, upper = box.lower[owner].cpu().numpy(), box.upper[owner].cpu().numpy()
    batch: tuple[np.ndarray, ...] = (signs, lower, upper, alpha, beta)
    specs, candidates, start = [], [], 0
    for place, bounds, packed in taken:
        columns = stack.columns[place]
        row, here = Row.unpacked(packed, len(columns)), slice(start, start + len(bounds))
        own = (row.signs, row.lower, row.upper, row.alpha, row.beta)
        for stacked, values in zip(batch, own, strict=True):
            stacked[here, columns] = values
        specs.append(row.specs.astype(np.int64))
        candidates.append(np.where(row.candidates >= 0, columns[row.candidates] if len(columns) else -1, -1))
        start += len(bounds)
    known = np.concatenate([bounds for _, bounds, _ in taken]).astype(np.float32)

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return SubProblems(
        owner,
        on_device(np.concatenate(specs)),
        on_device(signs),
        Interval(on_device(lower), on_device(upper)),
        on_device(alpha),
        on_device(beta),
        on_device(known),
        on_device(np.concatenate(candidates)),
    )


def push(stack: Stack, rest: SubProblems) -> None:
    """Sub-problems back to the frontiers of their images."""
    tensors = (
        rest.owner,
        rest.specs,
        rest.signs,
        rest.box.lower,
        rest.box.upper,
        rest.alpha,
        rest.beta,
        rest.candidates,
    )
    arrays = [tensor.cpu().numpy() for tensor in tensors]
    owner, lower = arrays[0], rest.lower.cpu().numpy()
    for place in np.unique(owner):
        columns, here = stack.columns[place], owner == place
        _, specs, *inner, candidates = (array[here] for array in arrays)
        own = np.full(sum(stack.images.widths) + 1, -1)  # the last one stands for "none"
        own[columns] = np.arange(len(columns))
        signs, low, high, alpha, beta = (values[:, columns] for values in inner)
        row = Row(specs, signs, low, high, alpha, beta, own[candidates])
        stack.opened[place].frontier.push(lower[here].astype(np.float64), row.packed())


def candidates_of(slack: Tensor, count: int) -> Tensor:
    """[D, K] the neurons whose relaxations give away most, best first; -1 where fewer may have either sign."""
    found = slack.topk(min(count, slack.shape[1]), dim=1)
    columns = found.indices.masked_fill(found.values < 0, -1)
    return torch.nn.functional.pad(columns, (0, count - columns.shape[1]), value=-1)


def choose(stack: Stack, parents: SubProblems, chunk: int) -> Tensor:
    """[D] the column to split: of all candidates the one whose two children gain most together.

        (min(lower+, target) - lower) * (min(lower-, target) - lower)

    with the children bounded once, by the parent's slopes and multipliers (filtered strong branching).
    """
    count = parents.candidates.shape[1]
    chosen = parents.candidates[:, 0].clone()
    if count == 1:
        return chosen
    for rows in torch.arange(len(parents), device=chosen.device).split(max(1, chunk // (2 * count))):
        some = parents.select(rows)
        valid = some.candidates >= 0
        tried = some.select(torch.arange(len(rows), device=rows.device).repeat_interleave(2 * count))
        columns = some.candidates.clamp(min=0).repeat_interleave(2, dim=1).flatten()
        sides = torch.tensor([1, -1], dtype=torch.int8, device=rows.device).repeat(len(rows) * count)
        tried.signs[torch.arange(len(tried), device=rows.device), columns] = sides
        lower = stack.batch(tried).bounds(tried.alpha, tried.beta)
        target = stack.targets[some.owner].view(-1, 1, 1)
        room = (target - some.lower.view(-1, 1, 1)).clamp(min=1e-12)
        gain = (torch.minimum(lower.view(-1, count, 2), target) - some.lower.view(-1, 1, 1)) / room
        score = gain.nan_to_num().clamp(min=1e-3).prod(2).masked_fill(~valid, -1)
        chosen[rows] = some.candidates.gather(1, score.argmax(1, keepdim=True)).squeeze(1)
    return chosen


def children_of(parents: SubProblems, columns: Tensor) -> SubProblems:
    """Both signs of each parent's column, side by side; the sign is in the neuron's bounds too."""
    both = parents.select(torch.arange(len(parents), device=columns.device).repeat_interleave(2))
    above = torch.arange(0, len(both), 2, device=columns.device)
    both.signs[above, columns], both.signs[above + 1, columns] = 1, -1
    lower, upper = both.box.lower, both.box.upper
    lower[above, columns] = lower[above, columns].clamp(min=0)
    upper[above + 1, columns] = upper[above + 1, columns].clamp(max=0)
    return both


def lowest_points(points: Tensor, owner: Tensor, margins: Tensor, count: int) -> Tensor:
    """Rows of the `count` points with the lowest margins of each owner."""
    order = torch.argsort(margins, stable=True)
    order = order[torch.argsort(owner[order], stable=True)]
    owners = owner[order]
    start = torch.searchsorted(owners, owners)  # where each owner's run begins
    rank = torch.arange(len(owners), device=owners.device) - start
    return order[rank < count]


def descend(
    logits_of: Callable[[Tensor], Tensor], points: Tensor, labels: Tensor, region: Region, steps: int
) -> tuple[Tensor, Tensor]:
    """(points, margins) after some steps down the margin inside the region; the best point of each is kept."""
    box = region.box if isinstance(region, L2Ball) else region
    axes = (-1, *(1,) * (points.dim() - 1))
    points = _inside(region, points)
    best, least = points, torch.full((len(points),), torch.inf, device=points.device, dtype=points.dtype)
    for step in range(steps + 1):
        with torch.enable_grad():
            x = points.detach().requires_grad_()
            margins = logit_differences(logits_of(x), labels).amin(1)
            (gradient,) = torch.autograd.grad(margins.sum(), x)
        x, margins = x.detach(), margins.detach()
        lower = margins < least
        least = torch.where(lower, margins, least)
        best = torch.where(lower.view(axes), x, best)
        size = 0.5 * (1 - step / (steps + 1))
        if isinstance(region, L2Ball):
            move = region.epsilon * unit_length(gradient)
        else:
            move = box.radius * gradient.sign()
        points = _inside(region, x - size * move)
    return best, least


def _inside(region: Region, points: Tensor) -> Tensor:
    if isinstance(region, L2Ball):
        return region.project(points)
    return torch.minimum(torch.maximum(points, region.lower), region.upper)


def clip(stack: Stack, problems: SubProblems, bound: ProvedBound, columns: Tensor) -> Interval:
    """The neurons' bounds over the points that matter; crossed where a sub-problem has no such point.

    Args:
        bound: of these sub-problems, in float64.
        columns: [D, K] the neurons to look at, -1 for none.
    """
    lower, upper = problems.box.lower.clone(), problems.box.upper.clone()
    for place in problems.owner.unique().tolist():
        image, own = stack.opened[place], torch.from_numpy(stack.columns[place]).to(columns.device)
        if image.bounds is None or len(own) == 0:
            continue
        rows = (problems.owner == place).nonzero().squeeze(1)
        number = torch.zeros(lower.shape[1] + 1, dtype=torch.long, device=columns.device)  # the last: of "none"
        number[own] = torch.arange(len(own), device=columns.device)
        excess = bound.offset[rows] - bound.allowance[rows] - image.assumed
        box = Interval(lower[rows][:, own], upper[rows][:, own])
        half = HalfSpace(bound.weights[rows].flatten(1), excess)
        box = clipped(image.bounds, image.region, half, box, number[columns[rows]])
        lower[rows.unsqueeze(1), own], upper[rows.unsqueeze(1), own] = box.lower, box.upper
    return Interval(lower, upper)
