"""Neurons' bounds over the points that matter: no such point has a neuron outside of them."""

import pytest
import torch
from strategies import CONVEX_KINKS, Deployed, deployed
from torch import Tensor

from ccdist.bounding import Bounder
from ccdist.bounds import logit_differences
from ccdist.branching import Stack, SubProblems, clip
from ccdist.clipping import HalfSpace, NeuronBounds, clipped
from ccdist.config import BranchAndBoundConfig
from ccdist.interval import Interval
from ccdist.linear_bounds import has_kink
from ccdist.linear_rules import leaves
from ccdist.networks import Network
from ccdist.neurons import flat
from ccdist.threats import L2Ball
from ccdist.unit_bounds import UnitBounds

pytestmark = pytest.mark.timeout(30)
SEEDS = range(12)
# z = x0 - 1/2: a neuron that sees one pixel.
FIRST_PIXEL = NeuronBounds(
    [
        UnitBounds(
            torch.tensor([[[1.0]], [[-1.0]]], dtype=torch.float64),
            torch.tensor([[-0.5], [0.5]], dtype=torch.float64),
            torch.tensor([[0]]),
        )
    ]
)


def inputs_of_kinks(network: Network, points: Tensor) -> list[Tensor]:
    """[B, units] of each layer of ReLUs, in the order H, W, C."""
    kept: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: kept.append(flat(inputs[0]).double()))
        for layer in leaves(network.features)
        if has_kink(layer)
    ]
    with torch.no_grad():
        network(points.to(network.head.weight.dtype))
    for hook in hooks:
        hook.remove()
    return kept


def neurons_at(stack: Stack, network: Network, points: Tensor) -> Tensor:
    """[I, U] the stored neurons' inputs at one point for each image."""
    found = inputs_of_kinks(network, points)
    stored = [z.gather(1, kink.index) for z, kink in zip(found, stack.images.kinks, strict=True)]
    return torch.cat([points.new_zeros(len(points), 0).double(), *stored], dim=1)


def random_problems(stack: Stack, case: Deployed, each: int, generator: torch.Generator) -> SubProblems:
    """Sub-problems with some signs given, each taken from one of the points."""
    points = case.points(each, generator)
    owner = torch.arange(len(case.labels)).repeat(each)
    z = torch.cat([neurons_at(stack, case.network, some) for some in points])
    given = torch.rand(z.shape, generator=generator) < 0.15
    signs = torch.where(given, torch.where(z >= 0, 1, -1), 0).to(torch.int8)
    box = stack.images.neuron_box()
    alpha = torch.rand(z.shape, generator=generator)
    beta = torch.rand(z.shape, generator=generator) ** 4
    specs = torch.randint(case.network.num_classes - 1, (len(owner),), generator=generator)
    known = Interval(box.lower[owner], box.upper[owner])
    return SubProblems(owner, specs, signs, known, alpha, beta, torch.zeros(len(owner)), torch.zeros(len(owner), 1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_point_that_matters_is_outside(norm: str) -> None:
    """Where the signs hold and the margin is at most t; for several images with different neurons at once."""
    looked_at = tightened = 0
    for seed in SEEDS:
        case = deployed(seed, activations=CONVEX_KINKS, norm=norm, batch=3)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(seed)
        bounder = Bounder(case.network, case.images, case.labels, case.threat, BranchAndBoundConfig())
        opened = bounder.with_neuron_bounds(bounder.unbounded([0, 1, 2]))
        points = [*case.points(40, generator), *case.attacked(10)]
        with torch.no_grad():
            margins = torch.stack([logit_differences(case.network(x), case.labels) for x in points]).double()
        for row, image in enumerate(opened):  # a third of the points matter
            image.assumed = float(margins[:, row].quantile(0.3))
        stack = bounder.stacked(opened)
        problems = random_problems(stack, case, 6, generator)
        columns = torch.arange(problems.signs.shape[1]).expand(len(problems), -1)
        bound = stack.batch(problems).proved(problems.alpha, problems.beta)
        box = clip(stack, problems, bound, columns)
        tightened += int((box.lower > problems.box.lower).sum())
        assumed = torch.tensor([image.assumed for image in opened]).double()[problems.owner]
        for x, margin in zip(points, margins, strict=True):
            matters = margin[problems.owner, problems.specs] <= assumed
            for network in (case.network, bounder.float64_copy):
                z = neurons_at(stack, network, x)[problems.owner]
                if network is bounder.float64_copy:
                    with torch.no_grad():
                        exact = logit_differences(network(x.double()), case.labels)
                    matters = exact[problems.owner, problems.specs] <= assumed
                holds = matters & (problems.signs * z >= 0).all(1)
                inside = ((box.lower <= z) & (z <= box.upper)).all(1)
                assert inside[holds].all(), seed
                looked_at += int(holds.sum())
    assert looked_at > 20 * len(SEEDS), looked_at
    assert tightened > 20 * len(SEEDS), tightened


@pytest.mark.parametrize("pixels", [2, 17])
def test_what_a_neuron_does_not_see_counts_in_a_ball(pixels: int) -> None:
    """z = x0 - 1/2 over x0 - 1/2 >= s + tiny * sum of the others: the others move it by tiny sqrt(n) epsilon.

    Their squares vanish beside 1 in float64.
    """
    epsilon, s, tiny = 0.5, 1e-4, 5e-9
    c = torch.full((1, pixels), tiny, dtype=torch.float64)
    c[0, 0] = -1
    half = HalfSpace(c, torch.tensor([0.5 - 0.5 * (pixels - 1) * tiny + s], dtype=torch.float64))
    ball = L2Ball(torch.full((1, 1, 1, pixels), 0.5, dtype=torch.float64), epsilon)
    box = Interval(torch.full((1, 1), -1.0), torch.full((1, 1), 1.0))
    found = clipped(FIRST_PIXEL, ball, half, box, torch.tensor([[0]])).lower.item()
    least = s - tiny * (pixels - 1) ** 0.5 * (epsilon**2 - s**2) ** 0.5  # attained inside the ball
    assert s - 1e-5 < found <= least


@pytest.mark.parametrize("excess", [1e-3, -1e-3])
def test_a_bound_that_sees_no_pixel(excess: float) -> None:
    """c = 0: nothing is left where it is above t, and nothing changes below."""
    region = Interval(torch.zeros(1, 1, 1, 2, dtype=torch.float64), torch.ones(1, 1, 1, 2, dtype=torch.float64))
    half = HalfSpace(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([excess], dtype=torch.float64))
    box = Interval(torch.full((1, 1), -0.5), torch.full((1, 1), 0.5))
    found = clipped(FIRST_PIXEL, region, half, box, torch.tensor([[0]]))
    assert bool(found.lower > found.upper) == (excess > 0)


def test_nothing_that_is_no_number_tightens() -> None:
    region = Interval(torch.zeros(1, 1, 1, 2, dtype=torch.float64), torch.ones(1, 1, 1, 2, dtype=torch.float64))
    box = Interval(torch.full((3, 1), -0.25), torch.full((3, 1), 0.25))
    for value in (torch.nan, torch.inf):
        half = HalfSpace(
            torch.tensor([[value, 1.0], [1.0, 1.0], [value, value]], dtype=torch.float64),
            torch.tensor([0.0, torch.nan, -torch.inf], dtype=torch.float64),
        )
        found = clipped(FIRST_PIXEL, region, half, box, torch.zeros(3, 1, dtype=torch.long))
        assert torch.equal(found.lower, box.lower)
        assert torch.equal(found.upper, box.upper)
