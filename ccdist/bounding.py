"""What branch and bound asks of a set of images: root bounds, bounds of sub-problems, proofs, counter-examples.

Shapes: `D` sub-problems, `J` specifications, `L` kink layers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ccdist.bounds import logit_differences
from ccdist.branching import OpenImage, Stack, SubProblems, candidates_of, clip, descend, lowest_points, push
from ccdist.clipping import NeuronBounds
from ccdist.config import BranchAndBoundConfig, ThreatModel
from ccdist.counterexamples import confirmed, float64_copy, inner_region
from ccdist.device_memory import Budget, is_out_of_memory
from ccdist.interval import Interval
from ccdist.leaf_program import solve_leaf
from ccdist.linear_bounds import has_kink
from ccdist.networks import Network
from ccdist.neurons import float32_below
from ccdist.proof_network import ProofNetwork, exact_region
from ccdist.proved_bounds import (
    better,
    chunk_rows,
    crown,
    elided,
    select_images,
    select_region,
    tightened,
)
from ccdist.rounding import GuardedBounds, guarded_bounds
from ccdist.subproblems import ProvedBound
from ccdist.threats import Region

# Bounding a root again with the neurons' bounds that it has tightened: at most so often, while that closes such a share
# of the gap.
ROOT_CYCLES, WORTH_A_CYCLE = 8, 0.1
# Neurons of a sub-problem whose bounds are tightened: those whose relaxations give away most.
CLIPPED_NEURONS = 128
# float32 bounds go to their proof above so many times the allowance seen so far.
TARGET_ALLOWANCES = 1.5
# Points of an image's worst sub-problems from which a counter-example is searched each round, and the steps of it.
SEARCHED_POINTS, SEARCH_STEPS = 4, 8


@dataclass(frozen=True)
class Left:
    """What bounding D sub-problems leaves: those open, and about these the share of the gap that was closed.

    margins: [D] float64, of all of them. sizes: see `Bounded`.
    """

    problems: SubProblems
    margins: Tensor
    progress: Tensor
    sizes: Tensor


class Bounder:
    """The images given, the network in its copies, and what is computed with them."""

    def __init__(
        self, network: Network, images: Tensor, labels: Tensor, threat: ThreatModel, config: BranchAndBoundConfig
    ) -> None:
        self.network, self.images, self.labels = network, images, labels
        self.threat, self.config = threat, config
        self.proof = ProofNetwork.of(network, tuple(images.shape[1:]))
        self.float64_copy = float64_copy(network)
        self.budget = Budget.of(images.device)

    def stacked(self, opened: Sequence[OpenImage]) -> Stack:
        return Stack.of(self.proof, opened)

    def roots(self, positions: Sequence[int]) -> list[OpenImage]:
        """Images with what pre-activation bounds and slopes alone prove, and the sub-problems that they leave."""
        places = torch.tensor(positions, device=self.images.device)
        labels, region = self.labels[places], exact_region(self.images[places], self.threat)
        with torch.no_grad():
            guarded = guarded_bounds(self.proof, region)
            proved = better(elided(self.proof, guarded, labels), crown(self.proof, region, labels, guarded))
            guarded = tightened(self.proof, region, guarded)
            lower, allowance = better(proved, crown(self.proof, region, labels, guarded))
        opened = self.with_neuron_bounds(self._opened(positions, region, guarded))
        margins = lower - allowance
        for row, image in enumerate(opened):
            if not torch.isfinite(allowance[row]).all():  # float32 may overflow: nothing can be known
                image.give_up()
                continue
            image.target = image.assumed = TARGET_ALLOWANCES * float(allowance[row].max())
            image.root = float(margins[row].min())
            done = margins[row][margins[row] > 0]
            image.proved = float(done.min()) if len(done) else math.inf
        known = torch.tensor([not image.stuck for image in opened], device=lower.device)
        self._search_roots(self.stacked(opened), float32_below(margins), ~(margins > 0) & known.unsqueeze(1))
        return opened

    def unbounded(self, positions: Sequence[int]) -> list[OpenImage]:
        """Images with interval bounds, of which nothing else is known."""
        region = exact_region(self.images[torch.tensor(positions, device=self.images.device)], self.threat)
        return self._opened(positions, region, guarded_bounds(self.proof, region))

    def with_neuron_bounds(self, opened: Sequence[OpenImage]) -> list[OpenImage]:
        found = [NeuronBounds.of(self.proof, image.guarded, chunk_rows(image.guarded)) for image in opened]
        together = [replace(image, bounds=bounds) for image, bounds in zip(opened, found, strict=True)]
        self.budget.see(together)
        return together

    def _opened(self, positions: Sequence[int], region: Region, guarded: GuardedBounds) -> list[OpenImage]:
        opened = []
        for row, position in enumerate(positions):
            here = torch.tensor([row], device=self.images.device)
            own = select_images(guarded, here)
            kinks = [step.box for step in own.steps if has_kink(step.layer)]
            neurons = [int(((box.lower < 0) & (box.upper > 0)).sum()) for box in kinks]
            scales = torch.ones(len(kinks), device=self.images.device)
            label = self.labels[position : position + 1]
            opened.append(OpenImage(position, own, select_region(region, here), label, neurons, scales))
        return opened

    def _search_roots(self, stack: Stack, lower: Tensor, open_: Tensor) -> None:
        """The root sub-problem of every specification that is open, with its slopes improved.

        What a bound leaves open tightens the neurons' bounds, and these the bound, as long as that closes the gap.
        """
        owner, specs = open_.nonzero().unbind(1)
        alpha, box = stack.images.adaptive()[owner], stack.images.neuron_box()
        roots = SubProblems(
            owner,
            specs,
            torch.zeros(alpha.shape, dtype=torch.int8, device=alpha.device),
            Interval(box.lower[owner], box.upper[owner]),
            alpha,
            torch.zeros_like(alpha),
            lower[owner, specs],
            torch.full((len(owner), self.config.candidates), -1, device=alpha.device),
        )

        sizes = torch.zeros(len(stack.opened), len(stack.images.kinks), device=alpha.device)

        def note(problems: SubProblems, left: Left) -> None:
            """What assumes nothing of the margin: the worst root bound of each image, the size of its weights."""
            for place, margin in zip(problems.owner.tolist(), left.margins.tolist(), strict=True):
                stack.opened[place].worst_root = min(stack.opened[place].worst_root, margin)
            for place in left.problems.owner.unique().tolist():
                sizes[place] = torch.maximum(sizes[place], left.sizes[left.problems.owner == place].amax(0))

        def search(problems: SubProblems) -> None:
            for cycle in range(ROOT_CYCLES):
                left = self.bounded(stack, problems, self.config.root_steps, clip_all=True)
                if cycle == 0:
                    note(problems, left)
                again = (left.progress > WORTH_A_CYCLE) | (cycle == 0)
                push(stack, left.problems.select(~again))
                problems = left.problems.select(again)
                if len(problems) == 0:
                    return
            push(stack, problems)

        self.in_pieces(stack, roots, search)
        for image, size in zip(stack.opened, sizes, strict=True):
            image.scales = size.masked_fill(size == 0, 1.0)
        for image in (image for image in stack.opened if not image.stuck):
            image.root = max(image.root, min(image.proved, image.worst_root))

    def in_pieces(
        self, stack: Stack, problems: SubProblems, work: Callable[[SubProblems], None], *, width: int = 1
    ) -> None:
        """Do the work in pieces that fit in memory, `width` sub-problems for each one given; smaller ones if need be.

        Images with a sub-problem that does not fit alone are stuck.
        """
        if len(problems) == 0:
            return
        each = max(1, self.budget.sub_problems(stack.images) // width)
        for rows in torch.arange(len(problems), device=problems.owner.device).split(each):
            piece = problems.select(rows)
            try:
                work(piece)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                continue
            # Outside of the except clause, which would keep the tensors of the failed attempt alive.
            if len(piece) == 1:
                stack.opened[int(piece.owner)].give_up()
                continue
            self.budget.halve()
            self.in_pieces(stack, piece, work, width=width)

    def bounded(self, stack: Stack, problems: SubProblems, steps: int, *, clip_all: bool = False) -> Left:
        """Bound sub-problems, prove what can be proved, look for counter-examples, tighten what is left."""
        batch, target = stack.batch(problems), stack.targets[problems.owner]
        found = batch.optimize(problems.alpha, problems.beta, steps, target)
        bound = batch.proved(found.alpha, found.beta)
        self._note(stack, problems.owner, found.lower, bound)
        rest = (~(bound.margin > 0)).nonzero().squeeze(1)  # NaN proves nothing
        left = problems.select(rest)
        lower = torch.maximum(left.lower, float32_below(bound.margin[rest]).nan_to_num(nan=-torch.inf))
        progress = (lower - left.lower) / (target[rest] - left.lower).clamp(min=1e-30)
        left.alpha, left.beta, left.lower = found.alpha[rest], found.beta[rest], lower
        self._look_for_counterexamples(stack, left.owner, found.points[rest])
        slack = found.slack[rest]
        columns = candidates_of(slack, slack.shape[1] if clip_all else CLIPPED_NEURONS)
        left.box = clip(stack, left, bound.select(rest), columns)
        some = ~(left.box.lower > left.box.upper).any(1)  # NaN is no contradiction
        splittable = (left.box.lower < 0) & (left.box.upper > 0)
        left.candidates = candidates_of(slack.masked_fill(~splittable, -1), self.config.candidates)
        return Left(left.select(some), bound.margin, progress[some], found.sizes[rest][some])

    def _note(self, stack: Stack, owner: Tensor, expected: Tensor, bound: ProvedBound) -> None:
        """Each image's worst proved margin; and a higher target where float32 expected a proof that float64 denies."""
        surprise = (expected > stack.targets[owner]) & ~(bound.margin > 0)
        rows = ((bound.margin > 0) | surprise).nonzero().squeeze(1)
        needed = TARGET_ALLOWANCES * bound.allowance + (expected - bound.lower).clamp(min=0)
        noted = (owner[rows].tolist(), bound.margin[rows].tolist(), needed[rows].tolist())
        for place, margin, target in zip(*noted, strict=True):
            image = stack.opened[place]
            if margin > 0:
                image.proved = min(image.proved, margin)
            else:
                image.target = max(image.target, target)

    def without_leaves(self, stack: Stack, problems: SubProblems) -> SubProblems:
        """Sub-problems with no neuron left are linear programs, solved one by one; the others are returned."""
        leaf = problems.candidates[:, 0] < 0
        for row in leaf.nonzero().squeeze(1).tolist():
            one = problems.select(torch.tensor([row], device=leaf.device))
            image = stack.opened[int(one.owner)]
            margin, point = solve_leaf(stack.batch(one), one.alpha, one.beta)
            image.proved = min(image.proved, -math.inf if math.isnan(margin) else margin)
            if not margin > 0:
                self._look_for_counterexamples(stack, one.owner, point.to(one.alpha))
                image.stuck = image.counterexample is None
        return problems.select((~leaf).nonzero().squeeze(1))

    def _look_for_counterexamples(self, stack: Stack, owner: Tensor, points: Tensor) -> None:
        """From the points where bounds are attained, the worst few of each image, down its margin."""
        if len(points) == 0:
            return
        positions = torch.tensor([image.position for image in stack.opened], device=owner.device)[owner]
        points = points.to(self.images.dtype)
        with torch.no_grad():
            margins = logit_differences(self.network(points), self.labels[positions]).amin(1)
        rows = lowest_points(points, owner, margins, SEARCHED_POINTS)
        owner, positions = owner[rows], positions[rows]
        region = inner_region(self.images[positions], self.threat.norm, self.threat.epsilon)
        labels = self.labels[positions]
        moved, margins = descend(self.network, points[rows], labels, region, SEARCH_STEPS)
        hits = (margins <= 0).nonzero().squeeze(1)
        if len(hits) == 0:
            return
        shown = confirmed(
            self.network,
            moved[hits],
            labels[hits],
            images=self.images[positions[hits]],
            norm=self.threat.norm,
            epsilon=self.threat.epsilon,
            copy_in_float64=self.float64_copy,
        )
        for row in hits[shown].tolist():
            image = stack.opened[int(owner[row])]
            if image.counterexample is None:
                image.counterexample = moved[row].detach().cpu()
