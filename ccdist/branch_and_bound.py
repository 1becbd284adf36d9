"""Branch and bound over the signs of ReLUs (beta-CROWN), on the sub-problems of many images at once.

Every round takes the worst sub-problems of each open image, chooses a neuron of each (strong branching on the best
candidates), bounds both children, and drops those that are proved. The children of all images are one batch, which
keeps the device full. What one image's search does depends on that image alone, never on its company: the order of its
sub-problems, the number a round takes and its limits. So a run that goes on after a kill gives the same verdicts.

Shapes: `B` images, `D` sub-problems, `U` neurons, `K` candidates.

Source: Bunel et al., JMLR 2020; De Palma et al., 2021 (filtered strong branching); Wang et al., NeurIPS 2021.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ccdist.activations import ACTIVATION_LAYERS
from ccdist.bounds import UnsupportedLayerError, logit_differences
from ccdist.branching import (
    SEARCH_STEPS,
    SEARCHED_POINTS,
    TARGET_ALLOWANCES,
    OpenImage,
    Stack,
    SubProblems,
    candidates_of,
    children_of,
    choose,
    clip,
    descend,
    lowest_points,
    push,
    unpack,
)
from ccdist.clipping import NeuronBounds
from ccdist.config import BranchAndBoundConfig, ThreatModel
from ccdist.counterexamples import confirmed, float64_copy, inner_region
from ccdist.device_memory import Budget
from ccdist.interval import Interval
from ccdist.leaf_program import solve_leaf
from ccdist.linear_bounds import has_kink
from ccdist.networks import Network
from ccdist.proof_network import ProofNetwork, exact_region
from ccdist.proved_bounds import (
    better,
    chunk_rows,
    crown,
    elided,
    linear_steps,
    select_images,
    select_region,
    tightened,
)
from ccdist.rounding import GuardedBounds, guarded_bounds
from ccdist.search_state import SearchState, identity_of
from ccdist.subproblems import ProvedBound
from ccdist.threats import Region


@dataclass(frozen=True)
class Outcome:
    """What branch and bound found for one image; open when neither certified nor falsified."""

    position: int  # of the image among those given
    certified: bool
    falsified: bool
    lower_bound: float  # best proved lower bound of the margin, in logits, less its rounding allowance
    seconds: float  # this image's share of the rounds it took part in
    branches: int
    counterexample: Tensor | None = None  # [C, H, W] where falsified


@dataclass(frozen=True)
class Counts:
    """Exact at any time: proved + falsified + open = images given."""

    proved: int
    falsified: int
    open: int


# Images whose root bounds are computed together.
ROOT_IMAGES = 32
# Bounding a root again with the neurons' bounds it has tightened: at most so often, while it closes such a share of the gap.
ROOT_CYCLES, WORTH_A_CYCLE = 8, 0.1
# Neurons of a sub-problem whose bounds are tightened: those whose relaxations give away most.
CLIPPED_NEURONS = 128

# after each round: the counts, and the images decided (or given up) in this round
OnRound = Callable[[Counts, list[Outcome]], None]


def branch_and_bound(
    network: Network,
    images: Float[Tensor, "B C H W"],
    labels: Int[Tensor, " B"],
    *,
    threat: ThreatModel,
    config: BranchAndBoundConfig,
    state: Path | None = None,
    on_round: OnRound | None = None,
) -> list[Outcome]:
    """Decide for each image whether the margin is positive over its region, by splitting on the signs of ReLUs.

    An image is certified when every sub-problem of every specification has a float64 bound above its rounding
    allowance, falsified when a confirmed counter-example was met, and open when a limit of `config` came first.

    Args:
        network: as deployed, in eval mode; its activations are ReLUs or leaky ones.
        images: pixels in [0, 1], on the network's device, as the labels are.
        state: a folder from which a killed call with the same arguments goes on; removed at the end.
        on_round: called after each round.

    Returns:
        One outcome for each image, in order.

    Raises:
        UnsupportedLayerError: a layer has no rule, or an activation has no kink to split at.
    """
    _refuse_smooth(network)
    search = _Search(network, images, labels, threat, config)
    if state is None:
        return search.run(on_round)
    saved = SearchState(state, identity_of(network, images, labels, threat, config))
    search.restore(saved)
    outcomes = search.run(on_round, saved)
    saved.remove()
    return outcomes


def _refuse_smooth(network: Network) -> None:
    for name, module in network.named_modules():
        if isinstance(module, ACTIVATION_LAYERS) and not has_kink(module):
            raise UnsupportedLayerError(
                f"branch and bound splits ReLUs at 0; {type(module).__name__} at {name} has no such point: "
                "leave branch_and_bound out of the rungs"
            )
        if isinstance(module, nn.LeakyReLU) and module.negative_slope > 1:
            raise UnsupportedLayerError(f"branch and bound needs a convex activation, not {module} at {name}")


@dataclass(frozen=True)
class Left:
    """What bounding D sub-problems leaves: those open, and about these the share of the gap that was closed.

    margins: [D] float64, of all of them. sizes: see `Bounded`.
    """

    problems: SubProblems
    margins: Tensor
    progress: Tensor
    sizes: Tensor


class _Search:
    """All that is known of every image, and the round that the open ones share."""

    def __init__(
        self, network: Network, images: Tensor, labels: Tensor, threat: ThreatModel, config: BranchAndBoundConfig
    ) -> None:
        self.network, self.images, self.labels = network, images, labels
        self.threat, self.config = threat, config
        self.proof = ProofNetwork.of(network, tuple(images.shape[1:]))
        self.float64_copy = float64_copy(network)
        self.waiting = list(range(len(labels)))
        self.active: list[OpenImage] = []
        self.outcomes: dict[int, Outcome] = {}
        self.seconds = 0.0  # of all rounds
        self.budget = Budget.of(images.device)
        self.stack: Stack | None = None  # of the active images; None: they have changed

    def run(self, on_round: OnRound | None, state: SearchState | None = None) -> list[Outcome]:
        while self.waiting or self.active:
            known = set(self.outcomes)
            if self.waiting and len(self.active) < self._most_active():
                self._admit()
                self._leave()
            if self.active:
                self._round()
                self._leave()
            if on_round is not None:
                on_round(self.counts(), [self.outcomes[p] for p in sorted(set(self.outcomes) - known)])
            if state is not None and state.is_due():
                self._save(state)
        return [self.outcomes[position] for position in range(len(self.labels))]

    def _save(self, state: SearchState) -> None:
        rows = [
            {name: value for name, value in vars(outcome).items() if name != "counterexample"}
            for outcome in self.outcomes.values()
        ]
        points = {
            outcome.position: outcome.counterexample
            for outcome in self.outcomes.values()
            if outcome.counterexample is not None
        }
        state.save(self.active, self.waiting, rows, points, self.seconds)

    def restore(self, state: SearchState) -> None:
        """Go on where the state ends; nothing happens where there is none."""
        found = state.load()
        if found is None:
            return
        content, tensors = found
        self.waiting, self.seconds = content["waiting"], content["seconds"]
        for row in content["outcomes"]:
            outcome = Outcome(**row, counterexample=tensors.get(f"point.{row['position']}"))
            self.outcomes[outcome.position] = outcome
        for first in range(0, len(content["images"]), ROOT_IMAGES):
            described = content["images"][first : first + ROOT_IMAGES]
            positions = [each["position"] for each in described]
            places = torch.tensor(positions, device=self.images.device)
            region = exact_region(self.images[places], self.threat)
            fresh = self._opened(positions, region, guarded_bounds(self.proof, region))
            self.active += [state.restored(each, tensors, image) for each, image in zip(described, fresh, strict=True)]

    def counts(self) -> Counts:
        proved = sum(outcome.certified for outcome in self.outcomes.values())
        falsified = sum(outcome.falsified for outcome in self.outcomes.values())
        return Counts(proved, falsified, len(self.labels) - proved - falsified)

    def _most_active(self) -> int:
        return self.budget.images(self.proof.exact, self.images)

    def _admit(self) -> None:
        """Root bounds of the next images: what pre-activation bounds and slopes alone prove, and what is left."""
        entering = self.waiting[: min(ROOT_IMAGES, self._most_active() - len(self.active))]
        self.waiting = self.waiting[len(entering) :]
        started = time.perf_counter()
        opened = self._roots(entering)
        share = (time.perf_counter() - started) / len(entering)
        for image in opened:
            image.seconds += share
        self.seconds += share * len(entering)
        self.active += opened
        self.stack = None

    def _roots(self, positions: list[int]) -> list[OpenImage]:
        places = torch.tensor(positions, device=self.images.device)
        labels, region = self.labels[places], exact_region(self.images[places], self.threat)
        with torch.no_grad():
            guarded = guarded_bounds(self.proof, region)
            proved = better(elided(self.proof, guarded, labels), crown(self.proof, region, labels, guarded))
            guarded = tightened(self.proof, region, guarded)
            proved = better(proved, crown(self.proof, region, labels, guarded))
        opened = self._opened(positions, region, guarded)
        self._open_specifications(opened, *proved)
        return opened

    def _opened(self, positions: list[int], region: Region, guarded: GuardedBounds) -> list[OpenImage]:
        """Images about which nothing is proved yet."""
        device = self.images.device
        opened = []
        for row, position in enumerate(positions):
            here = torch.tensor([row], device=device)
            own = select_images(guarded, here)
            kinks = [step.box for step in own.steps if has_kink(step.layer)]
            opened.append(
                OpenImage(
                    position,
                    own,
                    select_region(region, here),
                    self.labels[position : position + 1],
                    neurons=[int(((box.lower < 0) & (box.upper > 0)).sum()) for box in kinks],
                    scales=torch.ones(len(kinks), device=device),
                    bounds=NeuronBounds.of(self.proof, own, linear_steps(own), chunk_rows(own)),
                )
            )
        return opened

    def _open_specifications(self, opened: list[OpenImage], lower: Tensor, allowance: Tensor) -> None:
        """The root sub-problem of every specification that CROWN leaves open, with its slopes improved.

        What a bound leaves open tightens the neurons' bounds, and these the bound, as long as that closes the gap.
        """
        margins = lower - allowance
        for row, image in enumerate(opened):
            image.target = image.assumed = TARGET_ALLOWANCES * float(allowance[row].max())
            image.root = float(margins[row].min())
            done = margins[row][margins[row] > 0]
            image.proved = float(done.min()) if len(done) else math.inf
        stack = Stack.of(self.proof, opened)
        owner, specs = (~(margins > 0)).nonzero().unbind(1)
        alpha, box = stack.images.adaptive()[owner], stack.images.neuron_box()
        going = SubProblems(
            owner,
            specs,
            torch.zeros(alpha.shape, dtype=torch.int8, device=alpha.device),
            Interval(box.lower[owner], box.upper[owner]),
            alpha,
            torch.zeros_like(alpha),
            lower[owner, specs].float(),
            torch.full((len(owner), self.config.candidates), -1, device=alpha.device),
        )
        sizes = torch.zeros(len(opened), len(stack.images.kinks), device=alpha.device)
        worst = torch.full((len(opened),), math.inf, dtype=torch.float64, device=alpha.device)
        for rows in self._chunks(len(owner), stack):
            problems = going.select(rows)
            for cycle in range(ROOT_CYCLES):
                left = self._bounded(stack, opened, problems, self.config.root_steps, clip_all=True)
                if cycle == 0:  # nothing is assumed of the margin yet
                    worst.index_reduce_(0, problems.owner, left.margins, "amin")
                    sizes.index_reduce_(0, left.problems.owner, left.sizes, "amax")
                again = (left.progress > WORTH_A_CYCLE) | (cycle == 0)
                push(stack, opened, left.problems.select(~again))
                problems = left.problems.select(again)
                if len(problems) == 0:
                    break
            push(stack, opened, problems)
        for image, bound, size in zip(opened, worst.tolist(), sizes, strict=True):
            image.scales = size.masked_fill(size == 0, 1.0)
            image.root = max(image.root, min(bound, image.proved))

    def _chunks(self, count: int, stack: Stack) -> Iterator[Tensor]:
        """Row numbers in pieces that fit."""
        if count:
            yield from torch.arange(count, device=self.images.device).split(self.budget.sub_problems(stack.images))

    def _bounded(
        self, stack: Stack, opened: list[OpenImage], problems: SubProblems, steps: int, *, clip_all: bool = False
    ) -> Left:
        """Bound sub-problems, prove what can be proved, look for counter-examples, tighten what is left."""
        batch, target = stack.batch(problems), stack.targets[problems.owner]
        found = batch.optimize(problems.alpha, problems.beta, steps, target)
        bound = batch.proved(found.alpha, found.beta)
        margins = bound.margin
        proved = margins > 0
        self._note(opened, problems.owner, found.lower > target, bound)
        rest = (~proved).nonzero().squeeze(1)
        left = problems.select(rest)
        left.alpha, left.beta = found.alpha[rest], found.beta[rest]
        gap = (target[rest] - left.lower).clamp(min=1e-30)
        progress = (found.lower[rest] - left.lower) / gap
        left.lower = torch.maximum(left.lower, found.lower[rest])
        self._look_for_counterexamples(opened, left.owner, found.points[rest])
        slack = found.slack[rest]
        columns = candidates_of(slack, slack.shape[1] if clip_all else CLIPPED_NEURONS)
        left.box = clip(opened, stack, left, bound.select(rest), columns)
        some = (left.box.lower <= left.box.upper).all(1)
        splittable = (left.box.lower < 0) & (left.box.upper > 0)
        left.candidates = candidates_of(slack.masked_fill(~splittable, -1), self.config.candidates)
        return Left(left.select(some), margins, progress[some], found.sizes[rest][some])

    def _note(self, opened: list[OpenImage], owner: Tensor, expected: Tensor, bound: ProvedBound) -> None:
        """Each image's worst proved margin; and a higher target where float32 expected a proof that rounding denies."""
        margins = bound.margin
        for row in ((margins > 0) | expected).nonzero().squeeze(1).tolist():
            image, margin = opened[int(owner[row])], float(margins[row])
            if margin > 0:
                image.proved = min(image.proved, margin)
            else:
                image.target = max(image.target, TARGET_ALLOWANCES * float(bound.allowance[row]))

    def _look_for_counterexamples(self, opened: list[OpenImage], owner: Tensor, points: Tensor) -> None:
        """From the points where bounds are attained, the worst few of each image, down its margin."""
        if len(points) == 0:
            return
        positions = torch.tensor([image.position for image in opened], device=owner.device)[owner]
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
            image = opened[int(owner[row])]
            if image.counterexample is None:
                image.counterexample = moved[row].detach().cpu()

    def _round(self) -> None:
        started = time.perf_counter()
        if self.stack is None:
            self.stack = Stack.of(self.proof, self.active)
        stack = self.stack
        stack.targets.copy_(torch.tensor([image.target for image in self.active]))
        taken = [(place, *image.frontier.pop(self._quota(image))) for place, image in enumerate(self.active)]
        shares = [len(bounds) for _, bounds, _ in taken]
        parents = unpack(stack, [one for one in taken if len(one[1])])
        parents = self._finish_leaves(stack, parents)
        for rows in self._chunks(len(parents), stack):
            some = parents.select(rows)
            children = children_of(some, choose(stack, some, self.budget.sub_problems(stack.images)))
            for part in self._chunks(len(children), stack):
                left = self._bounded(stack, self.active, children.select(part), self.config.steps)
                push(stack, self.active, left.problems)
        counted = torch.bincount(parents.owner, minlength=len(self.active)).tolist()
        spent = time.perf_counter() - started
        self.seconds += spent
        for image, share, split in zip(self.active, shares, counted, strict=True):
            image.branches += 2 * split
            image.seconds += spent * share / sum(shares)

    def _quota(self, image: OpenImage) -> int:
        """How many sub-problems of an image a round splits: it depends on that image alone."""
        size = self.config.round_size
        count = min(max(size, len(image.frontier) // 4), 8 * size)
        if self.config.max_branches is not None:
            count = min(count, (self.config.max_branches - image.branches + 1) // 2)
        return count

    def _finish_leaves(self, stack: Stack, parents: SubProblems) -> SubProblems:
        """Sub-problems with no neuron left are linear programs, solved one by one; the others are returned."""
        leaf = parents.candidates[:, 0] < 0
        for row in leaf.nonzero().squeeze(1).tolist():
            one = parents.select(torch.tensor([row], device=leaf.device))
            image = self.active[int(one.owner)]
            proved, lower, point = solve_leaf(stack.batch(one), one.alpha, one.beta)
            image.proved = min(image.proved, lower)
            if proved:
                continue
            self._look_for_counterexamples(self.active, one.owner, point.to(one.alpha))
            image.stuck = image.counterexample is None
        return parents.select((~leaf).nonzero().squeeze(1))

    def _leave(self) -> None:
        """Images that are decided, or have met a limit, make room."""
        staying = []
        for image in self.active:
            outcome = self._outcome(image)
            if outcome is None:
                staying.append(image)
            else:
                self.outcomes[image.position] = outcome
        if len(staying) < len(self.active):
            self.active, self.stack = staying, None
        if self._total_is_spent():
            for position in self.waiting:
                self.outcomes[position] = Outcome(position, False, False, -math.inf, 0.0, 0)
            self.waiting = []

    def _outcome(self, image: OpenImage) -> Outcome | None:
        """None while the search of this image goes on."""
        falsified = image.counterexample is not None
        certified = not falsified and not image.stuck and len(image.frontier) == 0
        config = self.config
        spent = (
            image.stuck
            or (config.timeout_s is not None and image.seconds >= config.timeout_s)
            or (config.max_branches is not None and image.branches >= config.max_branches)
            or self._total_is_spent()
        )
        if not (falsified or certified or spent):
            return None
        return Outcome(
            image.position,
            certified,
            falsified,
            image.lower_bound,
            image.seconds,
            image.branches,
            image.counterexample,
        )

    def _total_is_spent(self) -> bool:
        return self.config.total_timeout_s is not None and self.seconds >= self.config.total_timeout_s
