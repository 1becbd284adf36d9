"""Branch and bound over the signs of ReLUs (beta-CROWN), on the sub-problems of many images at once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float, Int
from torch import Tensor

from ccdist.config import BranchAndBoundConfig, ThreatModel
from ccdist.networks import Network


@dataclass(frozen=True)
class Outcome:
    """What branch and bound found for one image; open when neither certified nor falsified."""

    position: int  # of the image among those given
    certified: bool
    falsified: bool
    lower_bound: float  # best proved lower bound of the margin, in logits
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
    """Outcomes of the images, in order; `state` is a file from which a killed call goes on."""
    raise NotImplementedError
