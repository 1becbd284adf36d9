"""Branch and bound as its caller sees it: limits, counts, company, counter-examples, edges.

That its verdicts are exact is shown in test_complete_verification.
"""

import copy
import functools
import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import strategies
import torch
from strategies import Deployed, deployed
from torch import Tensor, nn

from ccdist import branch_and_bound as search
from ccdist.bounds import UnsupportedLayerError, logit_differences
from ccdist.branch_and_bound import Counts, Outcome, branch_and_bound
from ccdist.config import BranchAndBoundConfig, ThreatModel
from ccdist.counterexamples import confirmed
from ccdist.device_memory import Budget
from ccdist.networks import Network
from ccdist.subproblems import Batch

# Reported bounds may be float32 estimates.
BOUND_ROUNDING = 1e-5

pytestmark = pytest.mark.timeout(30)
ACTIVATIONS = [nn.ReLU(), nn.LeakyReLU(0.3), nn.LeakyReLU(-0.4)]


def options(**values: object) -> BranchAndBoundConfig:
    """Small rounds, so that there are many; no limit in time unless given."""
    defaults = {"timeout_s": None, "max_branches": 32, "round_size": 2, "root_steps": 3, "steps": 3, "candidates": 3}
    return BranchAndBoundConfig(**(defaults | values))  # type: ignore[arg-type]


def mlp(seed: int, activation: nn.Module = ACTIVATIONS[0], *, width: int = 14, inputs: int = 12) -> Network:
    layers: list[nn.Module] = [nn.Flatten()]
    for number in range(3):
        layers += [nn.Linear(width if number else inputs, width), copy.deepcopy(activation)]
    network = Network(nn.Sequential(*layers), nn.Linear(width, 3))
    return strategies.randomize(network, torch.Generator().manual_seed(seed)).float()


@functools.cache
def hard() -> Deployed:
    """Images that take a search of some rounds, of every outcome."""
    network = mlp(1)
    images = torch.rand((12, 1, 2, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = network(images).argmax(1)
    return Deployed.of(network, images, labels, ThreatModel(epsilon=Fraction(1, 5)))


def outcomes(case: Deployed, rows: list[int] | None = None, **values: object) -> list[Outcome]:
    rows = list(range(len(case.labels))) if rows is None else rows
    return branch_and_bound(
        case.network, case.images[rows], case.labels[rows], threat=case.threat, config=options(**values)
    )


def is_decided(outcome: Outcome) -> bool:
    return outcome.certified or outcome.falsified


def assert_same(one: Outcome, other: Outcome) -> None:
    """But for the position and the time."""
    assert (one.certified, one.falsified, one.branches) == (other.certified, other.falsified, other.branches)
    assert one.lower_bound == pytest.approx(other.lower_bound, abs=BOUND_ROUNDING, rel=BOUND_ROUNDING)
    assert (one.counterexample is None) == (other.counterexample is None)


def test_the_cases_are_hard() -> None:
    found = outcomes(hard())
    assert sum(outcome.branches >= 16 for outcome in found) >= 3, found
    assert sum(outcome.certified and outcome.branches > 0 for outcome in found) >= 1, found
    assert sum(outcome.falsified for outcome in found) >= 2, found


# --- Soundness


@pytest.mark.parametrize("seeds", [range(15), pytest.param(range(15, 75), marks=pytest.mark.slow)], ids=["15", "more"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_point_contradicts_an_outcome(norm: str, seeds: range) -> None:
    certified = falsified = branched = 0
    for seed in seeds:
        case = deployed(seed, activations=ACTIVATIONS, norm=norm, batch=3)  # type: ignore[arg-type]
        if not any(isinstance(module, nn.ReLU | nn.LeakyReLU) for module in case.network.modules()):
            continue
        found = outcomes(case, root_steps=1, steps=2, candidates=1)
        assert [outcome.position for outcome in found] == [0, 1, 2]
        double = copy.deepcopy(case.network).double()
        points = torch.cat([*case.points(24, torch.Generator().manual_seed(seed)), *case.attacked(8)])
        labels, least = case.labels.repeat(len(points) // 3), torch.full((3,), torch.inf).double()
        for network in (case.network, double):
            with torch.no_grad():
                logits = network(points.to(network.head.weight.dtype)).double()
            least = torch.minimum(least, logit_differences(logits, labels).amin(1).view(-1, 3).amin(0))
        for outcome, margin in zip(found, least.tolist(), strict=True):
            assert not (outcome.certified and outcome.falsified)
            assert not (outcome.certified and margin <= 0), (seed, outcome)
            assert outcome.lower_bound <= margin + BOUND_ROUNDING * (1 + abs(margin)), (seed, outcome)
            assert not (outcome.certified and outcome.lower_bound <= 0)
            certified, falsified = certified + outcome.certified, falsified + outcome.falsified
            branched += outcome.branches > 0
        assert_confirmed(case, found)
    assert min(certified, falsified) >= 0.6 * len(seeds), (certified, falsified)
    assert branched >= len(seeds) / 15, branched  # clipping leaves little to branch on networks this small


def assert_confirmed(case: Deployed, found: list[Outcome]) -> None:
    for outcome in found:
        assert (outcome.counterexample is not None) == outcome.falsified
        if outcome.counterexample is None:
            continue
        here = [outcome.position]
        assert outcome.counterexample.shape == case.images.shape[1:]
        assert confirmed(
            case.network,
            outcome.counterexample[None],
            case.labels[here],
            images=case.images[here],
            norm=case.threat.norm,
            epsilon=case.threat.epsilon,
        ).all()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_without_limits_nothing_stays_open(activation: nn.Module) -> None:
    """Also where a leaf's program must decide: single steps leave gaps that only it closes."""
    images = torch.rand((6, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    for seed in (0, 1, 46):
        network = mlp(seed, activation, width=10 if seed == 46 else 7, inputs=4)
        with torch.no_grad():
            labels = network(images).argmax(1)
        case = Deployed.of(network, images, labels, ThreatModel(epsilon=Fraction(3, 10)))
        for outcome in outcomes(case, max_branches=None, root_steps=20, steps=10, candidates=6, round_size=64):
            assert is_decided(outcome), (seed, outcome)


# --- Limits


def test_more_branches_lose_no_decision() -> None:
    case = hard()
    before: dict[int, Outcome] = {}
    for limit in (1, 2, 5, 12, 32):
        for outcome in outcomes(case, max_branches=limit):
            assert outcome.branches <= limit + limit % 2  # a split makes two
            known = before.get(outcome.position)
            if known is not None:
                assert (outcome.certified, outcome.falsified) == (known.certified, known.falsified), limit
                assert outcome.branches == known.branches
            elif is_decided(outcome):
                before[outcome.position] = outcome
            else:
                assert outcome.branches >= limit
    assert len(before) >= 8


class Clock:
    """Every look at it takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


def test_the_time_of_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "time", SimpleNamespace(perf_counter=Clock().perf_counter))
    (alone,) = outcomes(hard(), [longest()], timeout_s=4.0)
    assert not is_decided(alone)
    assert 4 <= alone.seconds <= 6
    monkeypatch.setattr(search, "time", SimpleNamespace(perf_counter=Clock().perf_counter))
    for outcome in outcomes(hard(), timeout_s=0.5):
        assert is_decided(outcome) or outcome.seconds >= 0.5
        assert outcome.seconds <= 2.5


@functools.cache
def longest() -> int:
    return max(outcomes(hard()), key=lambda outcome: outcome.branches).position


def test_the_time_of_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of those that were never begun."""
    monkeypatch.setattr(search, "time", SimpleNamespace(perf_counter=Clock().perf_counter))
    monkeypatch.setattr(search, "ROOT_IMAGES", 3)
    case, reported = hard(), list[Outcome]()
    found = branch_and_bound(
        case.network,
        case.images,
        case.labels,
        threat=case.threat,
        config=options(total_timeout_s=3.0),
        on_round=lambda counts, new: reported.extend(new),
    )
    assert [outcome.position for outcome in found] == list(range(12))
    assert sorted(outcome.position for outcome in reported) == list(range(12))
    assert sum(outcome.seconds for outcome in found) <= 6
    untouched = [outcome for outcome in found if outcome.seconds == 0]
    assert untouched
    assert all(outcome.lower_bound == -math.inf and not is_decided(outcome) for outcome in untouched)


def test_the_seconds_of_images_are_those_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(search, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    found = outcomes(hard())
    assert sum(outcome.seconds for outcome in found) == pytest.approx(clock.now / 2)


# --- Company


@pytest.mark.parametrize("chunk", [None, 5], ids=["whole", "pieces"])
def test_an_outcome_does_not_depend_on_the_company(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on how many sub-problems are bounded at once."""
    case = hard()
    together = outcomes(case, max_branches=12)
    if chunk is not None:
        monkeypatch.setattr(Budget, "sub_problems", lambda *_: chunk)
    for row in (0, 4, 8, longest()):
        (alone,) = outcomes(case, [row], max_branches=12)
        assert_same(together[row], alone)
    order = [7, 3, 11, 0]
    for row, outcome in zip(order, outcomes(case, order, max_branches=12), strict=True):
        assert_same(together[row], outcome)


@pytest.mark.parametrize(("admitted", "active"), [(2, 256), (32, 3), (1, 1)])
def test_nor_on_when_it_enters(admitted: int, active: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = hard()
    together = outcomes(case, max_branches=12)
    monkeypatch.setattr(search, "ROOT_IMAGES", admitted)
    monkeypatch.setattr(Budget, "images", lambda *_: active)
    for one, other in zip(together, outcomes(case, max_branches=12), strict=True):
        assert_same(one, other)


# --- What a caller hears


@pytest.mark.parametrize("active", [256, 2])
def test_counts_are_exact_after_each_round(active: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "images", lambda *_: active)
    case, rounds = hard(), list[tuple[Counts, list[Outcome]]]()
    found = branch_and_bound(
        case.network,
        case.images,
        case.labels,
        threat=case.threat,
        config=options(max_branches=20),
        on_round=lambda counts, new: rounds.append((counts, new)),
    )
    assert len(rounds) >= 4
    seen: dict[int, Outcome] = {}
    for counts, new in rounds:
        for outcome in new:
            assert outcome.position not in seen
            seen[outcome.position] = outcome
        proved = sum(outcome.certified for outcome in seen.values())
        falsified = sum(outcome.falsified for outcome in seen.values())
        assert counts == Counts(proved, falsified, len(case.labels) - proved - falsified)
    assert [seen[position] for position in range(len(case.labels))] == found


def test_a_listener_may_stop_it() -> None:
    class Stop(Exception):
        pass

    def stop(counts: Counts, new: list[Outcome]) -> None:
        raise Stop

    case = hard()
    with pytest.raises(Stop):
        branch_and_bound(case.network, case.images, case.labels, threat=case.threat, config=options(), on_round=stop)


# --- Edges


def test_no_images(tmp_path: Path) -> None:
    case = hard()
    for state in (None, tmp_path / "state"):
        found = branch_and_bound(
            case.network, case.images[:0], case.labels[:0], threat=case.threat, config=options(), state=state
        )
        assert found == []


def test_a_misclassified_image_is_falsified() -> None:
    case = hard()
    wrong = (case.labels + 1) % 3
    for epsilon in (Fraction(1, 10**9), Fraction(1, 100), Fraction(1, 4)):
        labelled = Deployed.of(case.network, case.images, wrong, ThreatModel(epsilon=epsilon))
        found = outcomes(labelled)
        assert all(outcome.falsified for outcome in found)
        assert_confirmed(labelled, found)


def test_a_tiny_region_is_decided_at_its_root() -> None:
    case = hard()
    tiny = Deployed.of(case.network, case.images, case.labels, ThreatModel(epsilon=Fraction(1, 10**9)))
    with torch.no_grad():
        margins = logit_differences(case.network(case.images), case.labels).amin(1)
    for outcome, margin in zip(outcomes(tiny), margins.tolist(), strict=True):
        assert outcome.certified
        assert outcome.branches == 0
        assert outcome.lower_bound == pytest.approx(margin, abs=1e-3)


def test_a_tie_is_no_proof() -> None:
    """Two equal logits everywhere: nothing to prove, and any image is a counter-example."""
    network = mlp(0)
    with torch.no_grad():
        network.head.weight[1] = network.head.weight[0]
        network.head.bias[1] = network.head.bias[0]
        network.head.weight[2] = 0
        network.head.bias[2] = -100
    case = Deployed.of(network, hard().images[:3], torch.zeros(3, dtype=torch.long), ThreatModel(epsilon="1/10"))  # type: ignore[arg-type]
    found = outcomes(case, max_branches=50)
    assert not any(outcome.certified for outcome in found)
    assert all(outcome.falsified for outcome in found)


def test_two_classes_and_a_network_of_one_neuron() -> None:
    # z0 - z1 = relu(x - 1/2) - 1/8 over [x - 1/4, x + 1/4]: at x = 0.9 at least 0.025, at x = 0.8 least -0.075.
    first, head = nn.Linear(1, 1), nn.Linear(1, 2)
    with torch.no_grad():
        first.weight.fill_(1.0)
        first.bias.fill_(-0.5)
        head.weight.copy_(torch.tensor([[1.0], [0.0]]))
        head.bias.copy_(torch.tensor([-0.125, 0.0]))
    network = Network(nn.Sequential(nn.Flatten(), first, nn.ReLU()), head)
    images = torch.tensor([0.9, 0.8]).view(2, 1, 1, 1)
    case = Deployed.of(network, images, torch.tensor([0, 0]), ThreatModel(epsilon=Fraction(1, 4)))
    robust, weak = outcomes(case)
    assert (robust.certified, weak.falsified) == (True, True)
    assert robust.lower_bound == pytest.approx(0.025, abs=1e-5)
    assert weak.lower_bound <= -0.075 + 1e-6


def test_a_network_without_kinks() -> None:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    network = strategies.randomize(Network(layers, nn.Linear(3, 3)), torch.Generator().manual_seed(0)).float()
    images = hard().images
    labels = network(images).argmax(1)
    case = Deployed.of(network, images, labels, ThreatModel(epsilon=Fraction(1, 10)))
    found = outcomes(case)
    assert all(is_decided(outcome) for outcome in found)
    assert_confirmed(case, found)


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.LeakyReLU(1.5)], ids=str)
def test_what_cannot_be_split_is_refused_in_one_line(activation: nn.Module) -> None:
    network, case = mlp(0, activation), hard()
    with pytest.raises(UnsupportedLayerError, match=rf"{type(activation).__name__}.* at features\.2") as error:
        branch_and_bound(network, case.images, case.labels, threat=case.threat, config=options())
    assert "\n" not in str(error.value)


def test_a_layer_without_a_rule_is_refused() -> None:
    network = Network(nn.Sequential(nn.Conv2d(1, 1, 1), nn.MaxPool2d(2), nn.Flatten(), nn.ReLU()), nn.Linear(3, 2))
    case = hard()
    with pytest.raises(UnsupportedLayerError, match="MaxPool2d"):
        branch_and_bound(network, case.images, case.labels % 2, threat=case.threat, config=options())


@pytest.mark.parametrize("factor", [1e38, 1e20])
def test_nothing_is_certified_where_float32_may_overflow(factor: float) -> None:
    """It ends, with bounds that are numbers or -infinity."""
    case, network = hard(), copy.deepcopy(hard().network)
    with torch.no_grad():
        network.features[1].weight.mul_(factor)
        network.features[3].weight.mul_(factor)
    labels = network(case.images).nan_to_num().argmax(1)
    found = branch_and_bound(network, case.images, labels, threat=case.threat, config=options(max_branches=20))
    assert not any(outcome.certified for outcome in found)
    assert not any(math.isnan(outcome.lower_bound) for outcome in found)


def test_inputs_are_not_changed() -> None:
    case = hard()
    tensors: list[Tensor] = [case.images, case.labels, *case.network.state_dict().values()]
    before = [values.clone() for values in tensors]
    outcomes(case)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert all(parameter.grad is None for parameter in case.network.parameters())


def test_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No image is given up for it, and outcomes are the same."""
    case, original, largest = hard(), Batch.optimize, list[int]()
    expected = outcomes(case, max_branches=12)

    def tight(self: Batch, *args: object, **kwargs: object) -> object:
        largest.append(len(self))
        if len(self) > 6:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Batch, "optimize", tight)
    for one, other in zip(expected, outcomes(case, max_branches=12), strict=True):
        assert_same(one, other)
    assert max(largest) > 6


@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_may_be_switched_off(enabled: bool) -> None:
    case = hard()
    with torch.set_grad_enabled(enabled):
        found = outcomes(case, max_branches=4)
    for one, other in zip(found, outcomes(case, max_branches=4), strict=True):
        assert_same(one, other)
