"""Bounds that certify: no deployed forward pass is below one, no activation outside, without tolerance."""

import copy
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import CONVEX_KINKS, SMOOTH, Deployed, deployed
from torch import Tensor, nn

from ccdist import proved_bounds
from ccdist.activations import ACTIVATION_LAYERS
from ccdist.bounds import logit_differences
from ccdist.config import ThreatModel
from ccdist.networks import Network
from ccdist.proved_bounds import BoundRung, Proved, better, crown, tightened
from ccdist.rounding import GuardedBounds, guarded_bounds

pytestmark = pytest.mark.timeout(20)

MANY = settings(max_examples=max(25, settings.default.max_examples // 2))
SOME = settings(max_examples=max(12, settings.default.max_examples // 4))
RUNGS: tuple[BoundRung, ...] = ("ibp", "crown", "alpha_crown")
# The same float64 sums in another order.
ROUNDING = 1e-11
# Slopes are searched in float32, and another batch rounds otherwise on the way to them.
SEARCH_ROUNDING = 1e-3
CONCAVE = nn.LeakyReLU(1.5)


def proved(case: Deployed, rung: BoundRung, steps: int = 3) -> Proved:
    return proved_bounds.proved_bounds(rung, case.proof, case.region, case.labels, steps=steps)


def points_of(case: Deployed, seed: int) -> Tensor:
    """[P, B, ...] perturbed images."""
    return torch.stack([*case.points(24, torch.Generator().manual_seed(seed)), *case.attacked(6)])


def assert_sound(case: Deployed, seed: int, rungs: Sequence[BoundRung]) -> None:
    """Of the deployed network and of the exact one: the allowance is there so that no tolerance is needed."""
    points, double = points_of(case, seed), copy.deepcopy(case.network).double()
    with torch.no_grad():
        passes = [
            case.network(case.images).double()[None],
            case.network(points.flatten(0, 1)).double().unflatten(0, points.shape[:2]),
            double(points.flatten(0, 1).double()).unflatten(0, points.shape[:2]),
        ]
    margins = torch.cat([torch.stack([logit_differences(one, case.labels) for one in logits]) for logits in passes])
    for rung in rungs:
        lower, allowance = proved(case, rung)
        assert (allowance >= 0).all(), rung
        assert (margins >= lower - allowance).all(), rung


@pytest.mark.parametrize("activations", [CONVEX_KINKS, [*SMOOTH, nn.ReLU()]], ids=["kinks", "smooth"])
@MANY
@given(seed=st.integers(0, 2**31 - 1))
def test_no_point_is_below_a_bound(activations: list[nn.Module], seed: int) -> None:
    assert_sound(deployed(seed, activations=activations), seed, RUNGS)


@MANY
@given(seed=st.integers(0, 2**31 - 1))
def test_no_point_is_below_a_bound_of_a_concave_activation(seed: int) -> None:
    """A leaky slope above 1: the lines through the kink are above the function, the chord below it."""
    assert_sound(deployed(seed, activations=[CONCAVE, nn.ReLU()]), seed, RUNGS)


@pytest.mark.parametrize("activations", [[nn.Identity()], [nn.Tanh()], [nn.GELU()]], ids=str)
def test_networks_without_kinks_have_every_rung(activations: list[nn.Module]) -> None:
    for seed in range(5):
        assert_sound(deployed(seed, activations=activations), seed, ["alpha_crown"])


@MANY
@given(seed=st.integers(0, 2**31 - 1))
def test_each_rung_is_as_good_as_the_one_before(seed: int) -> None:
    case = deployed(seed)
    left = [lower - allowance for lower, allowance in (proved(case, rung) for rung in RUNGS)]
    assert (left[0] <= left[1]).all()
    assert (left[1] <= left[2]).all()


def test_each_rung_is_better_somewhere() -> None:
    gains = torch.zeros(2)
    for seed in range(20):
        case = deployed(seed)
        left = [(lower - allowance).amin() for lower, allowance in (proved(case, rung) for rung in RUNGS)]
        gains += torch.stack([left[1] - left[0], left[2] - left[1]]) > 1e-3
    assert (gains >= 5).all(), gains


# --- Pre-activation bounds


def activation_inputs(network: Network, points: Tensor) -> list[Tensor]:
    """What enters each activation of a plain forward pass, in its order."""
    entered: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].double()))
        for module in network.modules()
        if isinstance(module, ACTIVATION_LAYERS)
    ]
    with torch.no_grad():
        network(points)
    for hook in hooks:
        hook.remove()
    return entered


def of_activations(guarded: GuardedBounds) -> list[tuple[Tensor, Tensor]]:
    return [(step.box.lower, step.box.upper) for step in guarded.steps if isinstance(step.layer, ACTIVATION_LAYERS)]


@MANY
@given(seed=st.integers(0, 2**31 - 1))
def test_every_activation_is_inside_the_tightened_bounds(seed: int) -> None:
    """Of the deployed network, without tolerance, and never wider than interval arithmetic."""
    case = deployed(seed, activations=[*CONVEX_KINKS, CONCAVE, nn.Tanh()])
    before = guarded_bounds(case.proof, case.region)
    after = tightened(case.proof, case.region, before)
    for old, new in zip(before.steps, after.steps, strict=True):
        assert (new.box.lower >= old.box.lower).all()
        assert (new.box.upper <= old.box.upper).all()
        known = ~((old.box.lower < 0) & (old.box.upper > 0))
        assert torch.equal(new.box.lower[known], old.box.lower[known])
    boxes = of_activations(after)
    points = points_of(case, seed)
    entered = activation_inputs(case.network, points.flatten(0, 1))
    assert len(entered) == len(boxes)
    for values, (lower, upper) in zip(entered, boxes, strict=True):
        values = values.unflatten(0, points.shape[:2])
        assert (lower <= values).all()
        assert (values <= upper).all()


def test_tightening_helps_behind_the_first_activation_only() -> None:
    fixed, narrowed = 0, 0
    for seed in range(30):
        case = deployed(seed, activations=[nn.ReLU()])
        before = guarded_bounds(case.proof, case.region)
        after = tightened(case.proof, case.region, before)
        pairs = list(zip(of_activations(before), of_activations(after), strict=True))
        assert torch.equal(pairs[0][0][0], pairs[0][1][0])
        for (old_lower, old_upper), (lower, upper) in pairs[1:]:
            narrowed += int((upper - lower < 0.99 * (old_upper - old_lower)).sum())
            fixed += int((((lower >= 0) | (upper <= 0)) & (old_lower < 0) & (old_upper > 0)).sum())
    assert narrowed > 50
    assert fixed > 5


# --- How the work is cut


@SOME
@given(seed=st.integers(0, 2**31 - 1), chunk_bytes=st.sampled_from([1, 300, 2000]))
def test_chunks_change_nothing(seed: int, chunk_bytes: int) -> None:
    case = deployed(seed, batch=3)
    guarded = guarded_bounds(case.proof, case.region)

    def results() -> tuple[list[Tensor], list[Tensor]]:
        tight = tightened(case.proof, case.region, guarded)
        ends = [end for box in of_activations(tight) for end in box]
        exact = [*ends, *crown(case.proof, case.region, case.labels, tight), *proved(case, "crown")]
        lower, allowance = proved(case, "alpha_crown")
        return exact, [(lower - allowance).clamp(max=0)]  # how far a proof goes beyond 0 depends on its company

    whole = results()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proved_bounds, "CHUNK_BYTES", chunk_bytes)
        parts = results()
    for tolerance, one, other in zip((ROUNDING, SEARCH_ROUNDING), whole, parts, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@SOME
@given(seed=st.integers(0, 2**31 - 1))
def test_images_do_not_mix(seed: int) -> None:
    case = deployed(seed, batch=3)
    for rung, tolerance in (("ibp", ROUNDING), ("crown", ROUNDING), ("alpha_crown", SEARCH_ROUNDING)):
        lower, allowance = proved(case, rung)  # type: ignore[arg-type]
        for row in range(3):
            alone = Deployed.of(case.network, case.images[[row]], case.labels[[row]], case.threat)
            own = proved(alone, rung)  # type: ignore[arg-type]
            together, apart = (lower - allowance)[[row]], own[0] - own[1]
            if rung == "alpha_crown":  # how far a proof goes beyond 0 depends on its company
                together, apart = together.clamp(max=0), apart.clamp(max=0)
            torch.testing.assert_close(together, apart, rtol=tolerance, atol=tolerance)


# --- Edges


def test_a_bound_that_is_no_number_does_not_win() -> None:
    one = (torch.tensor([[1.0, 1.0, 1.0, 2.0]]), torch.tensor([[0.5, 0.5, 0.5, 0.1]]))
    other = (torch.tensor([[torch.nan, 2.0, 2.0, 9.0]]), torch.tensor([[0.1, torch.nan, 1.4, 8.0]]))
    lower, allowance = better(one, other)
    assert lower.tolist() == [[1.0, 1.0, 2.0, 2.0]]
    assert allowance[0].tolist() == pytest.approx([0.5, 0.5, 1.4, 0.1])


def overflowing(*layers: nn.Module) -> Deployed:
    """Logits 1 and 0 at an image of 1/2, whatever the layers give there; they may overflow elsewhere."""
    network = Network(nn.Sequential(nn.Flatten(), *layers), nn.Linear(1, 2))
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(torch.tensor([1.0, 0.0]))
    threat = ThreatModel(epsilon=Fraction(3, 10))
    return Deployed.of(network, torch.full((1, 1, 1, 2), 0.5), torch.tensor([0]), threat)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("last", [nn.ReLU(), nn.Tanh(), nn.LeakyReLU()], ids=str)
def test_nothing_is_proved_where_float32_may_overflow(last: nn.Module, rung: BoundRung) -> None:
    """Two sums, of 3e38 and of -3e38, overflow at a brighter image, and their sum is no number."""
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[3e38, 3e38], [-3e38, -3e38]]))
        second.weight.fill_(1.0)
    case = overflowing(first, second, last, nn.Linear(1, 1), nn.ReLU())
    assert case.network(case.images).argmax() == 0
    assert case.network(case.images + 0.2).isnan().all()
    lower, allowance = proved(case, rung)
    assert not (lower > allowance).any()


@pytest.mark.parametrize("rung", RUNGS)
@SOME
@given(seed=st.integers(0, 2**31 - 1))
def test_a_tiny_region_gives_the_forward_pass(rung: BoundRung, seed: int) -> None:
    case = deployed(seed, norm="linf")
    case = Deployed.of(case.network, case.images, case.labels, ThreatModel(epsilon=Fraction(1, 10**12)))
    lower, allowance = proved(case, rung)
    margins = logit_differences(copy.deepcopy(case.network).double()(case.images.double()), case.labels)
    # What is missing is rounding: no more than some allowances, which are themselves small.
    scale = 1 + margins.abs().amax()
    assert (margins - lower <= 1e-2 * scale).all()
    assert (allowance <= 1e-2 * scale).all()
    certain = margins > 0.02 * scale
    assert (lower > allowance)[certain].all()
