"""Sub-problems: sound for any signs, slopes and multipliers; their gradients, splits and batches."""

import itertools
from dataclasses import dataclass, replace

import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Deployed, deployed
from torch import Tensor, nn

from ccdist.bounds import logit_differences
from ccdist.linear_bounds import has_kink
from ccdist.networks import Network
from ccdist.neurons import Images, float32_below
from ccdist.proved_bounds import crown, root_batch, tightened
from ccdist.rounding import GuardedBounds, guarded_bounds
from ccdist.subproblems import Batch

pytestmark = pytest.mark.timeout(20)

MANY = settings(max_examples=max(25, settings.default.max_examples // 2))
SOME = settings(max_examples=max(15, settings.default.max_examples // 3))
# The same float64 sums in another order.
ROUNDING = 1e-10
# Of float32 bounds of order one.
SEARCH_ROUNDING = 1e-4


@dataclass
class Drawn:
    """The sub-problems of all pairs of images and specifications, and how to look at their neurons."""

    case: Deployed
    guarded: GuardedBounds
    batch: Batch

    @property
    def images(self) -> Images:
        return self.batch.images

    def free(self) -> Tensor:
        """[D, U] which neurons may have either sign; the others fill up to the widest image."""
        rows = []
        for kink in self.images.kinks:
            counts = torch.tensor(kink.counts).unsqueeze(1)
            rows.append((torch.arange(kink.index.shape[1]) < counts)[self.batch.owner])
        return torch.cat(rows, dim=1)

    def neuron_inputs(self, network: Network, points: Tensor) -> Tensor:
        """[P, I, U] what enters the neurons of each image in a plain forward pass of points [P, I, ...]."""
        entered: list[Tensor] = []
        hooks = [
            module.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].double()))
            for module in network.modules()
            if has_kink(module)
        ]
        with torch.no_grad():
            network(points.flatten(0, 1))
        for hook in hooks:
            hook.remove()
        picked = []
        for kink, values in zip(self.images.kinks, entered, strict=True):
            # Units of a convolution are counted in the order H, W, C.
            ordered = values.permute(0, 2, 3, 1) if values.dim() == 4 else values
            units = ordered.reshape(*points.shape[:2], -1)
            picked.append(units.gather(2, kink.index.expand(len(points), -1, -1)))
        return torch.cat(picked, dim=2)

    def with_signs(self, signs: Tensor) -> Batch:
        return replace(self.batch, signs=signs.to(torch.int8), _cache={})

    def margins(self, network: Network, points: Tensor) -> Tensor:
        """[P, D] of points [P, I, ...]."""
        with torch.no_grad():
            logits = network(points.flatten(0, 1)).double()
        differences = logit_differences(logits, self.case.labels.repeat(len(points)))
        return differences.reshape(len(points), -1)


def drawn(seed: int, *, tighten: bool = True, **options: object) -> Drawn:
    """Of this seed, or the next one whose network has a kink."""
    case = deployed(seed, **options)  # type: ignore[arg-type]
    if not any(has_kink(module) for module in case.network.modules()):
        return drawn(seed + 1, tighten=tighten, **options)
    guarded = guarded_bounds(case.proof, case.region)
    if tighten:
        guarded = tightened(case.proof, case.region, guarded)
    owner, specs = torch.ones(len(case.labels), case.network.num_classes - 1).nonzero().unbind(1)
    images = Images.of(case.proof, case.region, guarded.steps)
    return Drawn(case, guarded, root_batch(images, case.labels, guarded, owner, specs))


def start(one: Drawn) -> tuple[Tensor, Tensor]:
    alpha = one.images.adaptive()[one.batch.owner]
    return alpha, torch.zeros_like(alpha)


def random_numbers(one: Drawn, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Slopes in [0, 1], some at the ends; multipliers up to large ones, some 0."""
    shape = one.batch.signs.shape
    alpha = (torch.rand(shape, generator=generator, dtype=torch.float64) * 1.6 - 0.3).clamp(0, 1)
    beta = 10 ** (torch.rand(shape, generator=generator, dtype=torch.float64) * 4 - 3)
    return alpha, beta * (torch.rand(shape, generator=generator) < 0.7)


# --- Soundness


@pytest.mark.parametrize("tighten", [True, False], ids=["crown", "ibp"])
@MANY
@given(seed=st.integers(0, 2**31 - 1))
def test_no_point_with_the_signs_is_below_the_bound(tighten: bool, seed: int) -> None:
    """Signs of a point in the region, some left out: any slopes in [0, 1] and any multipliers give a sound bound."""
    one = drawn(seed, tighten=tighten, activations=[*strategies.CONVEX_KINKS, nn.Tanh()])
    case, generator = one.case, torch.Generator().manual_seed(seed)
    points = torch.stack([*case.points(16, generator), *case.attacked(4)])
    inputs = one.neuron_inputs(case.network, points)[:, one.batch.owner]  # [P, D, U]
    margins = one.margins(case.network, points)
    satisfied = 0
    for share in (0.2, 0.6, 1.0):
        witness = torch.randint(len(points), (len(one.batch),), generator=generator)
        own = inputs[witness, torch.arange(len(one.batch))]
        given_signs = (torch.rand(own.shape, generator=generator) < share) & one.free()
        signs = torch.where(given_signs, torch.where(own >= 0, 1, -1), 0)
        alpha, beta = random_numbers(one, generator)
        bound = one.with_signs(signs).proved(alpha, beta)
        inside = ((signs * inputs >= 0) | (signs == 0)).all(2)
        assert inside[witness, torch.arange(len(one.batch))].all()
        assert (margins >= bound.margin)[inside].all()
        satisfied += int(inside.sum())
        # The same as a linear function of the pixels.
        at = (bound.weights.unsqueeze(0) * points[:, one.batch.owner]).flatten(2).sum(2) + bound.offset
        assert (margins >= at - bound.allowance - ROUNDING)[inside].all()
    assert satisfied >= 3 * len(one.batch)


@SOME
@given(seed=st.integers(0, 2**31 - 1))
def test_no_point_with_the_signs_is_below_an_optimized_bound(seed: int) -> None:
    one = drawn(seed, activations=strategies.CONVEX_KINKS)
    case, generator = one.case, torch.Generator().manual_seed(seed)
    witness = case.points(1, generator)
    own = one.neuron_inputs(case.network, witness)[0, one.batch.owner]
    signs = torch.where((torch.rand(own.shape, generator=generator) < 0.5) & one.free(), own.sign(), 0)
    batch = one.with_signs(signs)
    found = batch.optimize(*start(one), 12, torch.full((len(batch),), torch.inf))
    proved = batch.proved(found.alpha, found.beta)
    assert (one.margins(case.network, witness)[0] >= proved.margin).all()
    scale = 1 + proved.lower.abs()
    assert ((found.lower - proved.lower).abs() <= SEARCH_ROUNDING * scale * 10).all()


# --- The same function, written plainly


def plain_bound(
    network: Network,
    box: list[tuple[Tensor, ...]],
    ends: tuple[Tensor, Tensor],
    objective: Tensor,
    parts: list[Tensor],
) -> Tensor:
    """beta-CROWN of an MLP of Linear and ReLU, neuron by neuron; parts: alpha, beta and sign of each ReLU."""
    linears = [layer for layer in [*network.features, network.head] if isinstance(layer, nn.Linear)]
    weights, offset = objective @ linears[-1].weight, objective @ linears[-1].bias
    alphas, betas, signs = parts
    last = alphas.shape[0]
    for layer, (lower, upper) in zip(reversed(linears[:-1]), reversed(box), strict=True):
        before = []
        first = last - len(weights)
        for unit in range(len(weights)):
            w, low, up = weights[unit], float(lower[unit]), float(upper[unit])
            alpha, beta, sign = alphas[first + unit], betas[first + unit], int(signs[first + unit])
            if low >= 0 or sign > 0:
                new = w - (beta if sign > 0 else 0)
            elif up <= 0 or sign < 0:
                new = (beta if sign < 0 else 0) + 0 * w
            elif w > 0:
                new = alpha * w
            else:
                new, offset = w * up / (up - low), offset - w * up * low / (up - low)
            before.append(new)
        last = first
        weights = torch.stack(before)
        weights, offset = weights @ layer.weight, offset + weights @ layer.bias
    return torch.where(weights > 0, ends[0], ends[1]) @ weights + offset


def mlp(seed: int) -> Drawn:
    """Every neuron may have either sign, so that the numbers of neurons and of units are the same."""
    for attempt in itertools.count():
        generator = torch.Generator().manual_seed(seed + 1000 * attempt)
        layers = [nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU()]
        network = strategies.randomize(Network(nn.Sequential(*layers), nn.Linear(4, 3)), generator)
        images = torch.rand((1, 1, 2, 2), generator=generator, dtype=torch.float64)
        case = Deployed.of(network, images, torch.tensor([0]), strategies.ThreatModel(epsilon="49/100"))  # type: ignore[arg-type]
        guarded = guarded_bounds(case.proof, case.region)
        images_ = Images.of(case.proof, case.region, guarded.steps)
        if images_.widths == [5, 4]:
            batch = root_batch(images_, case.labels, guarded, torch.tensor([0, 0]), torch.tensor([0, 1]))
            return Drawn(case, guarded, batch)
    raise AssertionError


@pytest.mark.parametrize("seed", range(8))
def test_bounds_and_gradients_equal_a_plain_formula(seed: int) -> None:
    one, generator = mlp(seed), torch.Generator().manual_seed(seed)
    signs = torch.randint(-1, 2, one.batch.signs.shape, generator=generator)
    batch, network = one.with_signs(signs), one.case.proof.exact
    scales = torch.rand(batch.scales.shape, generator=generator) + 0.5
    batch = replace(batch, scales=scales, _cache={})
    alpha, beta = (values.requires_grad_() for values in random_numbers(one, generator))
    units = torch.repeat_interleave(scales.double(), torch.tensor(one.images.widths), dim=1)
    box = list(
        zip(*(ends[0].double().split(one.images.widths) for ends in (batch.box.lower, batch.box.upper)), strict=True)
    )
    ends = (one.case.region.lower.flatten(), one.case.region.upper.flatten())  # type: ignore[union-attr]
    found, _, _ = batch._evaluate(network, alpha, beta)
    by = torch.autograd.grad(found.sum(), (alpha, beta))
    expected = []
    for row, objective in enumerate(torch.tensor([[1.0, -1.0, 0.0], [1.0, 0.0, -1.0]]).double()):
        parts = [alpha[row], beta[row] * units[row], signs[row]]
        expected.append(plain_bound(network, box, ends, objective, parts))
    total = torch.stack(expected)
    torch.testing.assert_close(found, total, rtol=ROUNDING, atol=ROUNDING)
    plain_by = torch.autograd.grad(total.sum(), (alpha, beta), materialize_grads=True)
    for ours, plain in zip(by, plain_by, strict=True):
        torch.testing.assert_close(ours, plain, rtol=ROUNDING, atol=ROUNDING)


@SOME
@given(seed=st.integers(0, 2**31 - 1))
def test_gradients_equal_finite_differences(seed: int) -> None:
    """Of convolutions, residuals and leaky slopes too."""
    one = drawn(seed, activations=strategies.CONVEX_KINKS)
    if one.batch.signs.shape[1] == 0:
        return
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(-1, 2, one.batch.signs.shape, generator=generator) * one.free()
    batch, network = one.with_signs(signs), one.case.proof.exact
    alpha, beta = (values.requires_grad_() for values in random_numbers(one, generator))
    direction = [torch.randn(alpha.shape, generator=generator).double() for _ in range(2)]
    lower, _, _ = batch._evaluate(network, alpha, beta)
    by = torch.autograd.grad(lower.sum(), (alpha, beta))
    slope = sum(float((g * d).sum()) for g, d in zip(by, direction, strict=True))
    # Piecewise linear in every number alone: where two steps agree there is no kink between them.
    estimates = []
    for step in (1e-6, 0.5e-6, -1e-6, -0.5e-6):
        with torch.no_grad():
            moved, _, _ = batch._evaluate(network, alpha + step * direction[0], beta + step * direction[1])
        estimates.append(float((moved - lower.detach()).sum()) / step)
    smooth = max(estimates) - min(estimates) <= 1e-4 * (1 + abs(slope))
    assert not smooth or estimates[1] == pytest.approx(slope, rel=1e-3, abs=1e-3)


@MANY
@given(seed=st.integers(0, 2**31 - 1))
def test_without_signs_it_is_crown(seed: int) -> None:
    one = drawn(seed, activations=strategies.CONVEX_KINKS)
    proved = one.batch.proved(*start(one))
    lower, allowance = crown(one.case.proof, one.case.region, one.case.labels, one.guarded)
    # The neurons' bounds are rounded outward to float32.
    torch.testing.assert_close(proved.lower, lower.flatten(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(proved.allowance, allowance.flatten(), rtol=1e-5, atol=1e-12)
    estimate = one.batch.bounds(*start(one))
    torch.testing.assert_close(estimate.double(), proved.lower, rtol=SEARCH_ROUNDING, atol=SEARCH_ROUNDING)


# --- Splitting


@pytest.mark.parametrize("seed", range(12))
def test_no_child_is_below_its_parent_for_the_best_multiplier(seed: int) -> None:
    """The bound is concave in the new multiplier: golden sections find its best."""
    one = drawn(seed, activations=strategies.CONVEX_KINKS)
    free = one.free()
    if not free.any():
        return
    generator = torch.Generator().manual_seed(seed)
    alpha, _ = random_numbers(one, generator)
    rows = free.any(1).nonzero().squeeze(1)
    columns = torch.stack([free[row].nonzero().flatten()[-1] for row in rows])
    parent = one.batch.proved(alpha, torch.zeros_like(alpha)).lower[rows]
    gains = []
    for sign in (1, -1):
        signs = torch.zeros_like(one.batch.signs)
        signs[rows, columns] = sign
        batch = one.with_signs(signs)

        def bound_at(beta: Tensor, batch: Batch = batch) -> Tensor:
            full = torch.zeros_like(alpha)
            full[rows, columns] = beta
            return batch.proved(alpha, full).lower[rows]

        low, high = torch.zeros(len(rows)).double(), torch.full((len(rows),), 100.0).double()
        best = bound_at(low)
        for _ in range(60):
            one_third, two_thirds = (2 * low + high) / 3, (low + 2 * high) / 3
            left, right = bound_at(one_third), bound_at(two_thirds)
            best = torch.maximum(best, torch.maximum(left, right))
            low, high = torch.where(left < right, one_third, low), torch.where(left < right, high, two_thirds)
        assert (best >= parent - 1e-6 * (1 + parent.abs())).all()
        gains.append(best - parent)
    assert torch.stack(gains).isfinite().all()


@SOME
@given(seed=st.integers(0, 2**31 - 1))
def test_optimizing_never_loses(seed: int) -> None:
    one = drawn(seed, activations=strategies.CONVEX_KINKS)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(-1, 2, one.batch.signs.shape, generator=generator) * one.free()
    batch, (alpha, beta) = one.with_signs(signs), start(one)
    far = torch.full((len(batch),), torch.inf)
    before = batch.bounds(alpha, beta)
    for steps in (1, 4, 8):
        found = batch.optimize(alpha.clone(), beta.clone(), steps, far)
        assert (found.lower >= before).all()
        before = found.lower
        assert ((found.alpha >= 0) & (found.alpha <= 1)).all()
        assert (found.beta >= 0).all()
        assert not found.beta[signs == 0].any()
        torch.testing.assert_close(batch.bounds(found.alpha, found.beta), found.lower, rtol=1e-5, atol=1e-5)
    given_or_known = (signs != 0) | ~one.free()
    assert (found.slack[given_or_known] == -1).all()
    box = one.case.region if not hasattr(one.case.region, "box") else one.case.region.box
    assert (found.points >= box.lower[batch.owner].float() - 1e-6).all()
    assert (found.points <= box.upper[batch.owner].float() + 1e-6).all()


def test_the_numbers_to_start_from_are_not_changed() -> None:
    one = mlp(0)
    alpha, beta = start(one)
    before = alpha.clone(), beta.clone()
    one.batch.optimize(alpha, beta, 5, torch.full((len(one.batch),), torch.inf))
    assert torch.equal(alpha, before[0])
    assert torch.equal(beta, before[1])


@pytest.mark.parametrize("seeds", [range(12), pytest.param(range(12, 200), marks=pytest.mark.slow)], ids=["12", "more"])
def test_a_free_neuron_is_worth_splitting(seeds: range) -> None:
    """What a relaxation gives away is never negative beyond rounding, -1 being kept for known signs."""
    lowest = 0.0
    for seed in seeds:
        one = drawn(seed, activations=strategies.CONVEX_KINKS)
        free = one.free()
        if not free.any():
            continue
        for steps in (1, 10):
            found = one.batch.optimize(*start(one), steps, torch.full((len(one.batch),), torch.inf))
            lowest = min(lowest, float(found.slack[free].min()))
    assert lowest >= -1e-4


def test_a_decided_sub_problem_is_left_alone() -> None:
    one = drawn(5, activations=[nn.ReLU()], norm="linf")
    found = one.batch.optimize(*start(one), 10, torch.full((len(one.batch),), -torch.inf))
    assert torch.equal(found.alpha, start(one)[0])
    torch.testing.assert_close(found.lower, one.batch.bounds(*start(one)))


# --- Batches


@SOME
@given(seed=st.integers(0, 2**31 - 1))
def test_rows_and_company_change_nothing(seed: int) -> None:
    """Images with different numbers of neurons side by side; some rows; before and after the cache is filled."""
    one, generator = drawn(seed, activations=strategies.CONVEX_KINKS, batch=3), torch.Generator().manual_seed(seed)
    signs = torch.randint(-1, 2, one.batch.signs.shape, generator=generator) * one.free()
    alpha, beta = random_numbers(one, generator)
    batch = one.with_signs(signs)
    rows = torch.randperm(len(batch), generator=generator)[: len(batch) // 2 + 1]
    early = batch.select(rows).proved(alpha[rows], beta[rows])
    whole = batch.proved(alpha, beta)
    late = batch.select(rows).proved(alpha[rows], beta[rows])
    for part in (early, late, whole.select(rows)):
        torch.testing.assert_close(part.lower, whole.lower[rows], rtol=ROUNDING, atol=ROUNDING)
        torch.testing.assert_close(part.weights, whole.weights[rows], rtol=ROUNDING, atol=ROUNDING)
    for image in range(3):
        case = one.case
        own = Deployed.of(case.network, case.images[[image]], case.labels[[image]], case.threat)
        guarded = tightened(own.proof, own.region, guarded_bounds(own.proof, own.region))
        images = Images.of(own.proof, own.region, guarded.steps)
        here = (batch.owner == image).nonzero().squeeze(1)
        zeros = torch.zeros_like(here)
        alone = root_batch(images, own.labels, guarded, zeros, torch.arange(len(here)))
        columns, first = [], 0
        for kink, width in zip(one.images.kinks, one.images.widths, strict=True):
            columns.append(torch.arange(first, first + kink.counts[image]))
            first += width
        own_columns = torch.cat(columns)
        assert sum(images.widths) == len(own_columns)
        alone = replace(alone, signs=batch.signs[here][:, own_columns], _cache={})
        found = alone.proved(alpha[here][:, own_columns], beta[here][:, own_columns])
        torch.testing.assert_close(found.lower, whole.lower[here], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.allowance, whole.allowance[here], rtol=1e-9, atol=1e-12)


@given(values=st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=8))
def test_rounding_to_float32_goes_down(values: list[float]) -> None:
    exact = torch.tensor(values, dtype=torch.float64)
    below = float32_below(exact)
    assert below.dtype == torch.float32
    assert (below.double() <= exact).all()
    above = torch.nextafter(below, torch.full_like(below, torch.inf)).double()
    assert ((above > exact) | (below.double() == exact)).all()
