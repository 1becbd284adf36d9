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
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ccdist.activations import ACTIVATION_LAYERS
from ccdist.bounding import Bounder
from ccdist.bounds import UnsupportedLayerError
from ccdist.branching import OpenImage, Stack, SubProblems, children_of, choose, push, unpack
from ccdist.config import BranchAndBoundConfig, ThreatModel
from ccdist.device_memory import is_out_of_memory
from ccdist.linear_bounds import has_kink
from ccdist.networks import Network
from ccdist.search_state import SearchState, identity_of

# Images whose root bounds are computed together.
ROOT_IMAGES = 32
# A round splits a quarter of an image's sub-problems, between round_size and so many times it.
LARGEST_ROUND = 8


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
    search = _Search(Bounder(network, images, labels, threat, config))
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


class _Search:
    """All images: those that wait, those that are open, those that are decided; and the rounds of the open ones."""

    def __init__(self, bounder: Bounder) -> None:
        self.bounder, self.config = bounder, bounder.config
        self.waiting = list(range(len(bounder.labels)))
        self.active: list[OpenImage] = []
        self.outcomes: dict[int, Outcome] = {}
        self.seconds = 0.0  # of all rounds
        self.stack: Stack | None = None  # of the active images; None: they have changed

    def run(self, on_round: OnRound | None, state: SearchState | None = None) -> list[Outcome]:
        while self.waiting or self.active:
            known = set(self.outcomes)
            self._admit()
            self._leave()
            if self.active:
                self._round()
                self._leave()
            if on_round is not None:
                on_round(self.counts(), [self.outcomes[p] for p in sorted(set(self.outcomes) - known)])
            if state is not None and state.is_due():
                self._save(state)
        return [self.outcomes[position] for position in range(len(self.bounder.labels))]

    def counts(self) -> Counts:
        proved = sum(outcome.certified for outcome in self.outcomes.values())
        falsified = sum(outcome.falsified for outcome in self.outcomes.values())
        return Counts(proved, falsified, len(self.bounder.labels) - proved - falsified)

    def _admit(self) -> None:
        """Root bounds of the next images, as many as there is room for."""
        room = self.bounder.budget.images() - len(self.active)
        entering = self.waiting[: min(ROOT_IMAGES, room)]
        if not entering:
            return
        self.waiting = self.waiting[len(entering) :]
        started = time.perf_counter()
        opened = self._roots(entering)
        spent = time.perf_counter() - started
        for image in opened:
            image.seconds += spent / len(entering)
        self.seconds += spent
        self.active += opened
        self.stack = None

    def _roots(self, positions: list[int]) -> list[OpenImage]:
        """Images with their root bounds; halved where they do not fit in memory, and given up one by one."""
        try:
            return self.bounder.roots(positions)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if len(positions) == 1:
            self.outcomes[positions[0]] = _nothing_known(positions[0])
            return []
        half = len(positions) // 2
        return self._roots(positions[:half]) + self._roots(positions[half:])

    def _round(self) -> None:
        started = time.perf_counter()
        if self.stack is None:
            self.stack = self.bounder.stacked(self.active)
        stack = self.stack
        stack.targets.copy_(torch.tensor([image.target for image in self.active]))
        taken = [(place, *image.frontier.pop(self._quota(image))) for place, image in enumerate(self.active)]
        parents = self.bounder.without_leaves(stack, unpack(stack, taken))

        def split(some: SubProblems) -> None:
            children = children_of(some, choose(stack, some, self.bounder.budget.sub_problems(stack.images)))
            push(stack, self.bounder.bounded(stack, children, self.config.steps).problems)

        # Two children of each parent are bounded at once.
        self.bounder.in_pieces(stack, parents, split, width=2)
        split_of = torch.bincount(parents.owner, minlength=len(self.active)).tolist()
        spent, all_taken = time.perf_counter() - started, sum(len(bounds) for _, bounds, _ in taken)
        self.seconds += spent
        for image, parts, (_, bounds, _) in zip(self.active, split_of, taken, strict=True):
            image.branches += 2 * parts
            image.seconds += spent * len(bounds) / all_taken
        self.bounder.budget.shed(self.active)

    def _quota(self, image: OpenImage) -> int:
        """How many sub-problems of an image a round splits: it depends on that image alone."""
        size = self.config.round_size
        count = min(max(size, len(image.frontier) // 4), LARGEST_ROUND * size)
        if self.config.max_branches is not None:
            count = min(count, (self.config.max_branches - image.branches + 1) // 2)
        return count

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
            self.outcomes |= {position: _nothing_known(position) for position in self.waiting}
            self.waiting = []

    def _outcome(self, image: OpenImage) -> Outcome | None:
        """None while the search of this image goes on."""
        falsified = image.counterexample is not None
        certified = not (falsified or image.stuck or len(image.frontier))
        if not (falsified or certified or image.stuck or self._limit_is_met(image)):
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

    def _limit_is_met(self, image: OpenImage) -> bool:
        config = self.config
        return (
            (config.timeout_s is not None and image.seconds >= config.timeout_s)
            or (config.max_branches is not None and image.branches >= config.max_branches)
            or self._total_is_spent()
        )

    def _total_is_spent(self) -> bool:
        return self.config.total_timeout_s is not None and self.seconds >= self.config.total_timeout_s

    def _save(self, state: SearchState) -> None:
        plain = [part.name for part in fields(Outcome) if part.name != "counterexample"]
        rows = [{name: getattr(outcome, name) for name in plain} for outcome in self.outcomes.values()]
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
            fresh = self.bounder.unbounded([each["position"] for each in described])
            restored = [state.restored(each, tensors, image) for each, image in zip(described, fresh, strict=True)]
            self.active += self.bounder.with_neuron_bounds(restored)


def _nothing_known(position: int) -> Outcome:
    return Outcome(position, False, False, -math.inf, 0.0, 0)
