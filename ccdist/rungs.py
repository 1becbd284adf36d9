"""The rungs of the ladder that take images chunk by chunk: the clean prediction, the attacks, the bounds.

A rung is a function from a chunk to one finding for each of its images. Shapes: `B` chunk, `J` other classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccdist.attack_ensemble import MEMBERS, attack_ensemble
from ccdist.attacks import worst_points
from ccdist.config import VerifyConfig
from ccdist.counterexamples import confirmed, float64_copy, inner_region, misclassified
from ccdist.networks import Network
from ccdist.proof_network import ProofNetwork, exact_region
from ccdist.proved_bounds import BoundRung, proved_bounds
from ccdist.verdicts import Finding, Verdict


class Verified:
    """The network as deployed, and the copies of it that rungs ask for, each made once."""

    def __init__(self, network: Network, input_shape: tuple[int, ...]) -> None:
        self.network, self.input_shape = network, input_shape

    @cached_property
    def in_float64(self) -> Network:
        return float64_copy(self.network)

    @cached_property
    def proof(self) -> ProofNetwork:
        return ProofNetwork.of(self.network, self.input_shape)


@dataclass(frozen=True)
class Chunk:
    """Images that a rung takes at once, on the network's device.

    first: index of the first one, from which the chunk has random starts of its own: with one stream for all, the
        restarts of a chunk would move the next one's starts. So which starts an attack has depends on the chunks.
    """

    verified: Verified
    images: Float[Tensor, "B C H W"]
    labels: Int[Tensor, " B"]
    config: VerifyConfig
    first: int

    @property
    def network(self) -> Network:
        return self.verified.network

    @property
    def seed(self) -> int:
        return (self.config.seed * 2**31 + self.first) % 2**63

    def confirmed(self, points: Float[Tensor, "B C H W"]) -> list[bool]:
        """Which points are counter-examples for their images: see `counterexamples.confirmed`."""
        threat = self.config.threat
        found = confirmed(
            self.network,
            points,
            self.labels,
            images=self.images,
            norm=threat.norm,
            epsilon=threat.epsilon,
            copy_in_float64=self.verified.in_float64,
        )
        return [bool(each) for each in found]


# The most images of a chunk, where a rung works on a chunk for so long that progress and state would come too seldom.
LARGEST_CHUNK = {"ensemble": 32}

ChunkRung = Callable[[Chunk], list[Finding]]


def _clean(chunk: Chunk) -> list[Finding]:
    logits = chunk.network(chunk.images)
    found = zip(logits.argmax(1).tolist(), misclassified(logits, chunk.labels).tolist(), strict=True)
    return [
        Finding(Verdict.FALSIFIED, "clean", prediction) if wrong else Finding(prediction=prediction)
        for prediction, wrong in found
    ]


def _pgd(chunk: Chunk) -> list[Finding]:
    attack, threat = chunk.config.attack, chunk.config.threat
    points, margins = worst_points(
        chunk.network,
        chunk.images,
        chunk.labels,
        region=inner_region(chunk.images, threat.norm, threat.epsilon),
        steps=attack.steps,
        step_size=attack.step_size,
        restarts=attack.restarts,
        generator=torch.Generator(chunk.images.device).manual_seed(chunk.seed),
    )
    return [
        Finding() if margin > 0 else Finding(Verdict.FALSIFIED, "pgd", point=point)
        for point, margin in zip(points, margins.tolist(), strict=True)
    ]


def _ensemble(chunk: Chunk) -> list[Finding]:
    threat = chunk.config.threat
    result = attack_ensemble(
        chunk.network,
        chunk.images,
        chunk.labels,
        norm=threat.norm,
        epsilon=threat.epsilon,
        config=chunk.config.ensemble,
        seed=chunk.seed,
    )
    return [
        Finding(Verdict.FALSIFIED, member, point=point) if member in MEMBERS else Finding()
        for member, point in zip(result.broken_by, result.points, strict=True)
    ]


def _bound(rung: BoundRung) -> ChunkRung:
    def climb(chunk: Chunk) -> list[Finding]:
        region, steps = exact_region(chunk.images, chunk.config.threat), chunk.config.alpha_crown.steps
        lower, allowance = proved_bounds(rung, chunk.verified.proof, region, chunk.labels, steps=steps)
        # What is left of a bound after its rounding; NaN and infinity prove nothing.
        margins = (lower - allowance).amin(1)
        certified = torch.isfinite(lower).all(1) & (margins > 0)
        return [
            Finding(Verdict.CERTIFIED, rung, lower_bound=margin) if proved else Finding(lower_bound=margin)
            for margin, proved in zip(margins.tolist(), certified.tolist(), strict=True)
        ]

    return climb


RUNGS: dict[str, ChunkRung] = {
    "clean": _clean,
    "pgd": _pgd,
    "ensemble": _ensemble,
    "ibp": _bound("ibp"),
    "crown": _bound("crown"),
    "alpha_crown": _bound("alpha_crown"),
}
