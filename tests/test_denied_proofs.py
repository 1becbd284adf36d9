"""What float32 expects, a leaf or the memory denies: nothing of it is certified, and nothing is lost without need."""

import math

import pytest
import torch
from test_branch_and_bound import hard, is_decided, outcomes
from torch import Tensor

from ccdist import bounding
from ccdist.branch_and_bound import Outcome
from ccdist.subproblems import Batch

# Of the hard images: some that are certified after branching, some that are falsified.
ROWS = [0, 3, 7, 11]


@pytest.fixture(scope="module")
def expected() -> list[Outcome]:
    return outcomes(hard(), ROWS, max_branches=None)


def test_sub_problems_denied_by_float64_are_split_further(
    expected: list[Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are no leaves: neurons are left."""
    evaluate = Batch._evaluate

    def optimistic(self: Batch, network: object, *args: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
        lower, allowance, weights = evaluate(self, network, *args, **options)  # type: ignore[arg-type]
        return lower + (1e-3 if network is self.images.proof.search else 0.0), allowance, weights

    monkeypatch.setattr(Batch, "_evaluate", optimistic)
    for one, other in zip(expected, outcomes(hard(), ROWS, max_branches=None), strict=True):
        assert is_decided(one)
        assert (one.certified, one.falsified) == (other.certified, other.falsified)


@pytest.mark.parametrize("margin", [-1.0, 0.0, math.nan])
def test_a_leaf_without_a_proof_certifies_nothing(margin: float, monkeypatch: pytest.MonkeyPatch) -> None:
    called = list[int]()

    def unsolved(batch: Batch, *_: Tensor) -> tuple[float, Tensor]:
        called.append(int(batch.owner))
        return margin, batch.images.region.center[batch.owner]

    def leaf_at_once(slack: Tensor, count: int) -> Tensor:
        return torch.full((len(slack), count), -1)

    monkeypatch.setattr(bounding, "solve_leaf", unsolved)
    monkeypatch.setattr(bounding, "candidates_of", leaf_at_once)
    found = outcomes(hard(), ROWS, max_branches=None)
    assert called
    for outcome in found:
        if outcome.position in called:
            assert not outcome.certified
            assert not outcome.lower_bound > 0


def test_what_never_fits_in_memory_is_not_certified(expected: list[Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    """Children that do not fit alone leave a part of the region out."""
    optimize = Batch.optimize

    def never(self: Batch, *args: object, **options: object) -> object:
        if (self.signs != 0).any():
            raise torch.OutOfMemoryError("out of memory")
        return optimize(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Batch, "optimize", never)
    branched = 0
    for known, outcome in zip(expected, outcomes(hard(), ROWS, max_branches=None), strict=True):
        if known.certified and known.branches:
            branched += 1
            assert not outcome.certified
            assert outcome.lower_bound <= known.lower_bound
    assert branched
