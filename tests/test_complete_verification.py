"""Complete verification against exact oracles: verdicts, counter-examples, and the order of all bounds.

The oracles prove themselves first: a mixed-integer program against every activation pattern.
"""

import functools
import itertools
import random
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import exact
import oracles
import pytest
import strategies
import torch
from torch import Tensor, nn

from ccdist.bounds import logit_difference_lower_bounds
from ccdist.branch_and_bound import Outcome, branch_and_bound
from ccdist.config import BranchAndBoundConfig, ThreatModel, VerifyConfig
from ccdist.interval import Interval, epsilon_box
from ccdist.linear_bounds import crown_lower_bounds
from ccdist.networks import Network, Normalize, Residual
from ccdist.proof_network import ProofNetwork, exact_region
from ccdist.rounding import guarded_ibp
from ccdist.verification import verify

# Of each block of verdicts.
NETWORKS, IMAGES = 5, 20
# A verdict of a margin so near 0 is one of the solver's rounding; such an image is replaced by another.
UNCOUNTED_MARGIN = 1e-6
# So is a margin below what the network's own forward passes may round by: no proof of it would be one. Relative to the
# allowance of interval bounds; that of linear bounds may be larger, more than twice on two of 800 images. In float64 it
# is far below the solver's rounding.
UNCOUNTED_ALLOWANCES = 10
# A network whose logits vary less over random images is hardly one: its ReLUs are nearly all dead.
LEAST_DEVIATION = 0.1
# float32 bounds and the solver's tolerance, relative to the margin.
BOUND_ROUNDING = 1e-5
# Two solvers' tolerances for integers and constraints, relative to the margin.
ORACLE_ROUNDING = 1e-6
# A margin of order one, summed up in another order.
FLOAT64_ROUNDING = 1e-12
LADDER = ("ibp", "crown", "alpha_crown", "branch_and_bound")
# No limit in time: every image is decided.
COMPLETE = BranchAndBoundConfig(timeout_s=None)


# --- Networks and images


def random_network(seed: int) -> tuple[Network, tuple[int, int, int]]:
    """A network of float32 and its image shape; drawn again while its logits hardly depend on the image."""
    attempt = random.Random(seed)
    while True:
        draw = random.Random(attempt.random())
        network, shape = _untried_network(draw, convolutional=seed % 2 == 1)
        generator = torch.Generator().manual_seed(seed)
        strategies.randomize(network, generator).float()
        with torch.no_grad():
            logits = network(torch.rand((128, *shape), generator=generator))
            network.head.bias -= logits.mean(0)  # else most networks predict one class only
        if logits.std(0).amin() > LEAST_DEVIATION:
            return network, shape


def _untried_network(draw: random.Random, *, convolutional: bool) -> tuple[Network, tuple[int, int, int]]:
    """An MLP, or convolutions; mostly of fewer than 60 ReLUs."""
    channels, height, width = 1, 1, draw.randint(2, 6)
    layers: list[nn.Module] = []
    if convolutional:
        channels, height, width = draw.randint(1, 2), draw.randint(4, 5), draw.randint(4, 5)
    shape = (channels, height, width)
    if draw.random() < 0.5:
        layers.append(Normalize([0.3] * channels, [0.4] * channels))
    if convolutional:
        layers += _convolutions(draw, channels)
        if draw.random() < 0.3:
            layers.append(nn.AvgPool2d(2, draw.randint(1, 2), 1))
        if draw.random() < 0.5:
            layers += [nn.Flatten(), *_hidden(draw, strategies.num_features([*layers, nn.Flatten()], shape))]
        else:
            layers.append(nn.Flatten())
    else:
        layers += [nn.Flatten(), *_hidden(draw, width)]
        for _ in range(draw.choice([1, 2, 2])):
            size = strategies.num_features(layers, shape)
            if draw.random() < 0.3:
                shortcut = None if draw.random() < 0.5 else nn.Linear(size, size)
                layers.append(Residual(nn.Sequential(*_hidden(draw, size, size)), shortcut))
            else:
                layers += _hidden(draw, size)
    head = nn.Linear(strategies.num_features(layers, shape), draw.randint(2, 4))
    return Network(nn.Sequential(*layers), head), shape


def _hidden(draw: random.Random, inputs: int, outputs: int | None = None) -> list[nn.Module]:
    outputs = draw.randint(4, 8) if outputs is None else outputs
    norm = [nn.BatchNorm1d(outputs)] if draw.random() < 0.5 else []
    return [nn.Linear(inputs, outputs, bias=not norm), *norm, nn.ReLU()]


def _convolutions(draw: random.Random, channels: int) -> list[nn.Module]:
    out, stride, kernel = draw.choice([1, 2, 2]), draw.randint(1, 2), draw.randint(2, 3)
    norm = [nn.BatchNorm2d(out)] if draw.random() < 0.5 else []
    layers = [nn.Conv2d(channels, out, kernel, stride, draw.randint(0, 1), bias=not norm), *norm, nn.ReLU()]
    kind = draw.choice(["one", "two", "residual", "downsampling"])
    if kind == "two":
        layers += [nn.Conv2d(out, out, 2, 1, 1), nn.ReLU()]
    if kind == "residual":
        body = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1), nn.BatchNorm2d(out))
        layers += [Residual(body), nn.ReLU()]
    if kind == "downsampling":
        body = nn.Sequential(nn.Conv2d(out, 1, 3, 2, 1), nn.ReLU(), nn.Conv2d(1, 1, 3, 1, 1))
        layers += [Residual(body, nn.Conv2d(out, 1, 1, 2)), nn.BatchNorm2d(1), nn.ReLU()]
    return layers


def attacked_margins(network: Network, images: Tensor, labels: Tensor, epsilon: float, starts: int = 1) -> Tensor:
    """Least margin by signed steps from the image and corners, no less than the exact one: cases are chosen by it."""
    generator = torch.Generator().manual_seed(0)
    lower, upper = (images - epsilon).clamp(0, 1), (images + epsilon).clamp(0, 1)
    corners = torch.rand((starts, *images.shape), generator=generator) < 0.5
    points = torch.where(corners, lower, upper)
    points[0] = images
    points = points.flatten(0, 1)
    lower, upper, labels = lower.repeat(starts, 1, 1, 1), upper.repeat(starts, 1, 1, 1), labels.repeat(starts)[:, None]
    least = torch.full((len(points),), torch.inf, dtype=images.dtype)
    for step in range(12):
        points = points.detach().requires_grad_()
        logits = network(points)
        margins = (logits.gather(1, labels) - logits.scatter(1, labels, -torch.inf)).amin(1)
        least = torch.minimum(least, margins.detach())
        (gradient,) = torch.autograd.grad(margins.sum(), points)
        points = (points - epsilon * (0.8 if step < 6 else 0.2) * gradient.sign()).clamp(lower, upper)
    return least.view(starts, -1).amin(0)


def near_zero_images(network: Network, images: Tensor, epsilon: float, targets: Tensor) -> Tensor:
    """Images between a robust and a weak one at which the attacked margin is the target, found by bisection."""
    labels = network(images).argmax(1)
    order = attacked_margins(network, images, labels, epsilon).argsort()
    strong = order.flip(0)[: len(order) // 2 : len(order) // 2 // len(targets)][: len(targets)]
    robust, weak, label = images[strong], images[order[: len(targets)]], labels[strong]
    low, up = torch.zeros_like(targets), torch.ones_like(targets)
    for _ in range(12):
        middle = (low + up) / 2
        between = torch.lerp(robust, weak, middle.view(-1, 1, 1, 1))
        above = attacked_margins(network, between, label, epsilon, starts=4) > targets
        low, up = torch.where(above, middle, low), torch.where(above, up, middle)
    return torch.lerp(robust, weak, low.view(-1, 1, 1, 1))


def allowance(network: Network, images: Tensor, labels: Tensor, epsilon: Fraction) -> float:
    """The largest rounding allowance of any image's bounds."""
    images = images.to(network.head.weight.dtype)
    region = exact_region(images, ThreatModel(epsilon=epsilon))
    _, allowances = guarded_ibp(ProofNetwork.of(network, tuple(images.shape[1:])), region, labels)
    return float(allowances.max())


@dataclass(frozen=True)
class Case:
    """Images of one network, with its own predictions as labels, and the exact least margin of each."""

    network: Network
    images: Tensor
    labels: Tensor
    epsilon: Fraction
    minima: list[exact.Minimum]

    @property
    def radius(self) -> float:
        return float(self.epsilon)

    @property
    def box(self) -> Interval:
        return epsilon_box(self.images, self.radius)

    def first(self, count: int) -> "Case":
        return replace(self, images=self.images[:count], labels=self.labels[:count], minima=self.minima[:count])


@functools.cache
def make_case(seed: int, dtype: torch.dtype | None = None) -> Case:
    """About half of the images with a margin near 0, the others as they fall.

    dtype: of the deployed network; None: float64 for every other pair of seeds.
    """
    network, shape = random_network(seed)
    generator = torch.Generator().manual_seed(seed)
    doubled, pool = exact.in_float64(network), torch.rand((64, *shape), generator=generator).double()
    labels = doubled(pool).argmax(1)
    # The radius at which an attack succeeds on nearest to half of random images.
    epsilons = [Fraction(k, 1000) for k in (2, 5, 10, 20, 35, 60, 100, 150)]
    falsified = [float((attacked_margins(doubled, pool, labels, float(e)) <= 0).double().mean()) for e in epsilons]
    epsilon = min(zip(falsified, epsilons, strict=True), key=lambda pair: abs(pair[0] - 0.5))[1]
    targets = torch.rand(IMAGES, generator=generator).double() * 2e-3 - 1e-3
    near = near_zero_images(doubled, pool, float(epsilon), targets)
    # Alternately, so that what replaces an image is of either kind too; in float32, as a network reads them.
    images = torch.stack([near, pool[:IMAGES]], 1).flatten(0, 1).float()
    labels = network(images).argmax(1)
    if dtype is None:
        dtype = torch.float64 if seed % 4 >= 2 else torch.float32
    uncounted = UNCOUNTED_MARGIN
    if dtype == torch.float32:
        uncounted = max(uncounted, UNCOUNTED_ALLOWANCES * allowance(network.to(dtype), images, labels, epsilon))
    chosen: dict[int, exact.Minimum] = {}
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        minimum = exact.least_margin(doubled, *exact.exact_box(image, float(epsilon)), label)
        if minimum.lower > uncounted or minimum.margin < -UNCOUNTED_MARGIN:
            chosen[index] = minimum
        if len(chosen) == IMAGES:
            break
    assert len(chosen) == IMAGES, f"only {len(chosen)} of network {seed}'s images have a margin off 0"
    kept = list(chosen)
    return Case(network.to(dtype), images[kept].to(dtype), labels[kept], epsilon, list(chosen.values()))


# --- The oracles


def test_hand_numbers() -> None:
    # x in [0, 1]; a = relu(2x - 1) straddles 0, b = relu(x) = x; z0 = a + b, z1 = 0, z2 = a - b.
    #   label 0: z0 - z1 = a + x >= 0 at x = 0;  z0 - z2 = 2x >= 0.
    #   label 2: z2 - z0 = -2x >= -2 at x = 1;   z2 - z1 = a - x >= -1/2 at x = 1/2, the kink.
    first, head = nn.Linear(1, 2), nn.Linear(2, 3)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[2.0], [1.0]]))
        first.bias.copy_(torch.tensor([-1.0, 0.0]))
        head.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, -1.0]]))
        head.bias.zero_()
    network = Network(nn.Sequential(nn.Flatten(), first, nn.ReLU()), head)
    lower, upper = torch.zeros(1, 1, 1).double(), torch.ones(1, 1, 1).double()
    for label, expected in ((0, [0.0, 0.0]), (2, [-2.0, -0.5])):
        minima = exact.minima(network, lower, upper, label)
        assert [minimum.margin for minimum in minima] == pytest.approx(expected, abs=1e-7)
        assert exact.enumerated_margins(network, lower, upper, label) == pytest.approx(expected, abs=1e-7)
        assert exact.least_margin(exact.in_float64(network), lower, upper, label).margin == pytest.approx(min(expected))
    assert float(exact.minima(network, lower, upper, 2)[1].point) == pytest.approx(0.5, abs=1e-7)
    assert exact.num_straddling(network, lower, upper) == 1


def test_a_layer_without_a_program_is_refused_by_name() -> None:
    network = Network(nn.Sequential(nn.Flatten(), nn.Tanh()), nn.Linear(2, 2))
    ends = torch.zeros(1, 1, 2).double(), torch.ones(1, 1, 2).double()
    with pytest.raises(TypeError, match="Tanh"):
        exact.minima(network, *ends, 0)
    with pytest.raises(TypeError, match="Tanh"):
        exact.enumerated_margins(network, *ends, 0)


def few_patterns(seed: int) -> tuple[Network, Tensor, Tensor, int] | None:
    """A network, the largest of some boxes with 2 to 6 straddling ReLUs, and a label that need not be predicted."""
    network, shape = random_network(seed)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    for epsilon in (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01):
        lower, upper = exact.exact_box(image, epsilon)
        if 2 <= exact.num_straddling(network, lower, upper) <= 6:
            return network, lower, upper, seed % network.num_classes
    return None


@pytest.mark.timeout(60)
def test_the_program_equals_every_activation_pattern() -> None:
    cases = 0
    for seed in range(1000, 1100):
        case = few_patterns(seed)
        if case is None:
            continue
        minima, enumerated = exact.minima(*case), exact.enumerated_margins(*case)
        for minimum, margin in zip(minima, enumerated, strict=True):
            assert minimum.margin == pytest.approx(margin, rel=ORACLE_ROUNDING, abs=ORACLE_ROUNDING), seed
            assert minimum.lower == pytest.approx(margin, rel=ORACLE_ROUNDING, abs=ORACLE_ROUNDING), seed
        least = exact.least_margin(exact.in_float64(case[0]), *case[1:])
        assert least.margin == pytest.approx(min(enumerated), rel=ORACLE_ROUNDING, abs=ORACLE_ROUNDING), seed
        cases += 1
        if cases == 30:
            return
    pytest.fail(f"only {cases} of 100 networks have 2 to 6 straddling ReLUs")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("seed", range(4))
def test_no_point_of_the_box_has_a_smaller_margin(seed: int) -> None:
    case = make_case(seed)
    network = exact.in_float64(case.network)
    generator = torch.Generator().manual_seed(seed)
    for image, label, minimum in zip(case.images, case.labels, case.minima, strict=True):
        lower, upper = exact.exact_box(image, case.radius)
        points = oracles.sample_box(Interval(lower[None], upper[None]), 500, generator)[:, 0]
        margins = oracles.logit_differences(network(points), label.expand(len(points))).amin(1)
        assert float(margins.min()) >= minimum.lower - FLOAT64_ROUNDING
        assert ((lower <= minimum.point) & (minimum.point <= upper)).all()


# --- The verifier


def complete_verdicts(case: Case) -> list[dict[str, Any]]:
    """The rows of the whole ladder but its attacks: branch and bound has to find counter-examples by itself."""
    config = VerifyConfig(threat=ThreatModel(epsilon=case.epsilon), rungs=LADDER, branch_and_bound=COMPLETE)
    rows: list[dict[str, Any]] = verify(case.network, case.images, case.labels, config).to_pylist()
    return rows


def complete_outcomes(case: Case, *, max_branches: int | None = None) -> list[Outcome]:
    threat = ThreatModel(epsilon=case.epsilon)
    config = COMPLETE.model_copy(update={"max_branches": max_branches})
    return branch_and_bound(case.network, case.images, case.labels, threat=threat, config=config)


def in_exact_box(point: Tensor, image: Tensor, epsilon: Fraction) -> bool:
    """|point - image| <= epsilon and 0 <= point <= 1, without rounding."""
    values = [
        (Fraction(p), Fraction(x)) for p, x in zip(point.flatten().tolist(), image.flatten().tolist(), strict=True)
    ]
    return all(abs(p - x) <= epsilon and 0 <= p <= 1 for p, x in values)


def rounded_up(margin: float) -> float:
    """The largest value of a sound lower bound of this margin in float32."""
    return margin + BOUND_ROUNDING * (1 + abs(margin))


BLOCKS = [
    pytest.param(block, dtype, marks=pytest.mark.slow if block >= 5 else ())
    for dtype, blocks in ((torch.float64, range(40)), (torch.float32, range(0, 40, 5)))
    for block in blocks
]


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("block", "dtype"), BLOCKS)
def test_verdicts_are_exact(block: int, dtype: torch.dtype) -> None:
    """Five hundred images of networks deployed in float64, whatever their margin, in the default blocks.

    One block of networks in float32, for which a margin within the rounding of a forward pass is no proof.
    """
    wrong, verdicts, methods, near = [], Counter[str](), Counter[str](), 0
    for seed in range(block * NETWORKS, (block + 1) * NETWORKS):
        case = make_case(seed, dtype)
        for row, minimum in zip(complete_verdicts(case), case.minima, strict=True):
            expected = "certified" if minimum.lower > 0 else "falsified"
            if row["verdict"] != expected:
                wrong.append(f"network {seed} image {row['index']}: {row['verdict']}, margin {minimum.margin:.3g}")
            if row["lower_bound"] is not None and not row["lower_bound"] <= rounded_up(minimum.margin):
                wrong.append(f"network {seed} image {row['index']}: bound {row['lower_bound']} > {minimum.margin}")
            verdicts[expected] += 1
            methods[row["method"]] += 1
            near += abs(minimum.margin) < 1e-3
    assert wrong == []
    # The cases are no easy ones: of either kind, many near 0, and branch and bound has work to do.
    count = NETWORKS * IMAGES
    assert sum(verdicts.values()) == count
    assert min(verdicts.values()) >= 0.2 * count, verdicts
    assert near >= 0.1 * count, near
    assert methods["branch_and_bound"] >= 0.2 * count, methods


@pytest.mark.timeout(20)
@pytest.mark.parametrize("seed", range(4))
def test_outcomes_are_exact_and_carry_counter_examples(seed: int) -> None:
    case = make_case(seed)
    network = exact.in_float64(case.network)
    outcomes = complete_outcomes(case)
    assert [outcome.position for outcome in outcomes] == list(range(len(case.labels)))
    for outcome, label, minimum in zip(outcomes, case.labels.tolist(), case.minima, strict=True):
        assert outcome.certified != outcome.falsified
        assert outcome.certified == (minimum.lower > 0)
        assert outcome.lower_bound <= rounded_up(minimum.margin)
        assert (outcome.counterexample is not None) == outcome.falsified
        if outcome.counterexample is not None:
            point = outcome.counterexample
            assert in_exact_box(point, case.images[outcome.position], case.epsilon)
            logits = network(point[None].double())
            margin = float(oracles.logit_differences(logits, torch.tensor([label])).min())
            assert minimum.lower - UNCOUNTED_MARGIN <= margin <= 0


@pytest.mark.timeout(30)
def test_the_order_of_all_bounds() -> None:
    strict = Counter[str]()
    for seed in range(4):
        case = make_case(seed).first(6)
        ends = [exact.exact_box(image, case.radius) for image in case.images]
        minima = [
            exact.minima(case.network, *end, label) for end, label in zip(ends, case.labels.tolist(), strict=True)
        ]
        for dtype in (torch.float32, torch.float64):
            network, box = exact.in_float64(case.network).to(dtype), epsilon_box(case.images.to(dtype), case.radius)
            levels = {
                "ibp": logit_difference_lower_bounds(network, box, case.labels).detach(),
                "crown": crown_lower_bounds(network, box, case.labels),
                "alpha_crown": crown_lower_bounds(network, box, case.labels, optimize_steps=20),
                "exact": torch.tensor([[minimum.margin for minimum in row] for row in minima]),
            }
            for looser, tighter in itertools.pairwise(levels):
                low, up = levels[looser].double(), levels[tighter].double()
                assert (low <= up + BOUND_ROUNDING * (1 + up.abs())).all(), (seed, dtype, looser, tighter)
                strict[tighter] += int((low < up - 1e-3).sum())
    assert strict.keys() == {"crown", "alpha_crown", "exact"}
    assert min(strict.values()) > 0, strict


@pytest.mark.timeout(30)
def test_branch_and_bound_is_between_alpha_crown_and_the_minimum() -> None:
    """Whatever the limit; and more branches lose neither a proof nor a part of a bound."""
    for seed in range(4):
        case = make_case(seed).first(8)
        alpha = crown_lower_bounds(case.network, case.box, case.labels, optimize_steps=COMPLETE.root_steps).amin(1)
        before = alpha.tolist()
        decided: set[int] = set()
        for limit in (1, 8, None):
            outcomes = complete_outcomes(case, max_branches=limit)
            for index, (outcome, minimum) in enumerate(zip(outcomes, case.minima, strict=True)):
                # A proof ends as soon as it is one, a falsified image at once: only below 0 is there an order.
                if not outcome.falsified:
                    assert min(before[index], 0) <= rounded_up(outcome.lower_bound), (seed, index, limit)
                    before[index] = outcome.lower_bound
                assert outcome.lower_bound <= rounded_up(minimum.margin), (seed, index, limit)
                assert outcome.certified <= (minimum.lower > 0)
                assert outcome.falsified <= (minimum.margin < 0)
            now = {outcome.position for outcome in outcomes if outcome.certified or outcome.falsified}
            assert decided <= now
            decided = now
        assert len(decided) == len(case.labels)
