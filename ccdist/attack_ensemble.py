"""The AutoAttack ensemble: APGD-CE, targeted APGD-DLR, targeted FAB, Square, each on what the others left.

Each member draws from its own stream, and every image meets the same draws. So which other images are in the batch
changes nothing but the rounding of batched products.

Known deviations from the published ensemble: one draw of starts and of squares serves all images of a batch, where
AutoAttack draws for each; starts are uniform in the region, where AutoAttack scales a draw to the radius; a point
counts only when it also passes `counterexamples.confirmed`.

Shapes: `B` batch, `C H W` image, `K` classes. Unit: pixels in [0, 1].

Source: Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
Attacks", ICML 2020; its standard version is the default of `EnsembleConfig`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccdist.apgd import apgd, region_rows, shared_start
from ccdist.config import EnsembleConfig
from ccdist.counterexamples import (
    confirmed,
    float64_copy,
    inner_region,
    misclassified,
    pulled_inside,
)
from ccdist.fab import fab
from ccdist.networks import Network
from ccdist.precision import exact_float32
from ccdist.square_attack import square
from ccdist.threats import L2Ball, Norm, Region

Member = Literal["apgd_ce", "apgd_dlr", "fab", "square"]
MEMBERS: tuple[Member, ...] = get_args(Member)
CLEAN = "clean"  # in the place of a member: the image itself is misclassified

# FAB stops at this share of the radius, so that pulling its point into the region changes it by rounding only.
ENOUGH = 1 - 1e-6


@dataclass(frozen=True)
class EnsembleResult:
    """What the ensemble did to each image.

    `broken_by` names the member that broke it, "clean" for an image misclassified as it is, "" for a survivor.
    `points` are confirmed counter-examples where broken, the image itself elsewhere.
    """

    broken_by: tuple[str, ...]
    points: Float[Tensor, "B C H W"]


def attack_ensemble(
    network: Network,
    images: Float[Tensor, "B C H W"],
    labels: Int[Tensor, " B"],
    *,
    norm: Norm,
    epsilon: Fraction | float,
    config: EnsembleConfig,
    seed: int,
) -> EnsembleResult:
    """Run the four attacks in order on the images that are still correctly classified.

    An image is broken when a point passes `counterexamples.confirmed`; a point that does not leaves it to the next
    attack. Targets are the classes of the highest clean logits, the highest first.

    Args:
        network: as deployed, in eval mode; all tensors on its device.
        images: pixels in [0, 1].
        epsilon: radius in pixel units, taken exactly.
        seed: of all draws.

    Raises:
        ValueError: epsilon is out of its range.
    """
    with exact_float32():
        run = _Run(network, images, labels, norm, epsilon, config, seed)
        for member in MEMBERS:
            run.attack_with(member)
    return EnsembleResult(tuple(run.broken_by), run.points)


_Attack = Callable[[Tensor, Region, torch.Generator, int | None, int], Tensor]


class _Run:
    """The survivors while the members take their turns."""

    def __init__(
        self,
        network: Network,
        images: Tensor,
        labels: Tensor,
        norm: Norm,
        epsilon: Fraction | float,
        config: EnsembleConfig,
        seed: int,
    ) -> None:
        self.network, self.exact_network = network, float64_copy(network)
        self.images, self.labels = images, labels
        self.norm, self.epsilon, self.config, self.seed = norm, epsilon, config, seed
        self.region = inner_region(images, norm, epsilon)
        self.points = images.clone()
        self.broken_by = [""] * len(labels)
        self.rows = torch.arange(len(labels), device=images.device)
        if len(labels) == 0:
            return
        with torch.no_grad():
            logits = network(images)
        self.targets = self._highest_others(logits)
        self._settle(images, misclassified(logits, labels), CLEAN)

    def _highest_others(self, logits: Tensor) -> Tensor:
        """[B, T]: the T other classes with the highest logits, the highest first."""
        others = logits.nan_to_num().scatter(1, self.labels[:, None], -torch.inf)
        return others.argsort(1, descending=True)[:, : min(self.config.targets, logits.shape[1] - 1)]

    def attack_with(self, member: Member) -> None:
        """Each restart, and each target of a targeted member, on the images that the ones before left."""
        config = self.config
        attack: _Attack
        match member:
            case "apgd_ce":
                attack, targets, restarts = self._apgd, 0, config.restarts
            case "apgd_dlr":
                attack, targets, restarts = self._apgd, config.targets, config.restarts
            case "fab":
                attack, targets, restarts = self._fab, config.targets, config.restarts
            case "square":
                attack, targets, restarts = self._square, 0, 1
        generator = torch.Generator(self.images.device)
        generator.manual_seed((self.seed * len(MEMBERS) + MEMBERS.index(member)) % 2**63)
        for restart in range(restarts):
            for target in range(targets) if targets else (None,):
                if len(self.rows) == 0 or (target is not None and target >= self.targets.shape[1]):
                    continue
                found = attack(self.rows, region_rows(self.region, self.rows), generator, target, restart)
                self._confirm(found, member)

    def _apgd(
        self, rows: Tensor, region: Region, generator: torch.Generator, target: int | None, restart: int
    ) -> Tensor:
        return apgd(
            self.network,
            self.labels[rows],
            region=region,
            epsilon=float(self.epsilon),
            steps=self.config.steps,
            generator=generator,
            targets=None if target is None else self.targets[rows, target],
        )

    def _fab(
        self, rows: Tensor, region: Region, generator: torch.Generator, target: int | None, restart: int
    ) -> Tensor:
        assert target is not None
        images = self.images[rows]
        # The first search starts from the image, later ones half way to a random point of the region.
        start = None if restart == 0 else (images + shared_start(region, generator)) / 2
        radius = region.epsilon if isinstance(region, L2Ball) else float(self.epsilon)
        found, _ = fab(
            self.network,
            images,
            self.labels[rows],
            self.targets[rows, target],
            norm=self.norm,
            steps=self.config.steps,
            start=start,
            enough=radius * ENOUGH,
        )
        return pulled_inside(found, region)

    def _square(
        self, rows: Tensor, region: Region, generator: torch.Generator, target: int | None, restart: int
    ) -> Tensor:
        return square(
            self.network, self.labels[rows], region=region, queries=self.config.square_queries, generator=generator
        )

    def _confirm(self, found: Tensor, member: Member) -> None:
        broken = confirmed(
            self.network,
            found,
            self.labels[self.rows],
            images=self.images[self.rows],
            norm=self.norm,
            epsilon=self.epsilon,
            copy_in_float64=self.exact_network,
        )
        self._settle(found, broken, member)

    def _settle(self, found: Tensor, broken: Tensor, name: str) -> None:
        self.points[self.rows[broken]] = found[broken]
        for row in self.rows[broken].tolist():
            self.broken_by[row] = name
        self.rows = self.rows[~broken]
