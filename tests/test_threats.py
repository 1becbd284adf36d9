"""The l_2 threat: the ball itself, bounds of the first layer and beyond, the attack, the ladder, what is refused."""

import math
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import strategies
import torch
import torch.nn.functional as F
from contracts import BOUND_ROUNDING
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from ccdist.attacks import ascend, cross_entropy_of, pgd, uniform_start, unit_length, worst_points
from ccdist.batch_norm import Statistics, forward, forward_collecting
from ccdist.bounds import (
    Trace,
    UnsupportedLayerError,
    interval_bounds,
    logit_difference_lower_bounds,
    logit_differences,
    propagate,
)
from ccdist.config import ThreatModel, VerifyConfig
from ccdist.interval import Interval, epsilon_box
from ccdist.linear_bounds import crown_lower_bounds
from ccdist.networks import Network, Normalize, Residual
from ccdist.threats import L2Ball, contains, perturbation_set
from ccdist.verification import quick_accuracies, verify

# The first optimiser of a process imports torch's compiler, which takes seconds.
pytestmark = pytest.mark.timeout(20)

EPSILONS = st.sampled_from([0.0, 1e-3, 0.1, 0.5, 2.0])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def begins_with_an_affine_layer(network: Network) -> bool:
    carried = (Normalize, nn.Identity, nn.Flatten)
    first = next((layer for layer in network.features if not isinstance(layer, carried)), network.head)
    return isinstance(first, nn.Linear | nn.Conv2d)


@st.composite
def balls(draw: st.DrawFn, **options: Any) -> tuple[strategies.Case, L2Ball]:
    """A case whose network has an l_2 rule, and a ball around its images."""
    case = draw(strategies.cases(**options))
    assume(begins_with_an_affine_layer(case.network))
    return case, L2Ball(case.images, draw(EPSILONS))


def sample_ball(ball: L2Ball, count: int, seed: int) -> list[Tensor]:
    """Points of the ball: the first half anywhere, the second half on the sphere before they are clamped."""
    stream, points = generator(seed), []
    for index in range(count):
        direction = torch.randn(ball.shape, generator=stream, dtype=ball.center.dtype)
        length = direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        share = 1.0 if index >= count // 2 else float(torch.rand((), generator=stream))
        points.append((ball.center + share * ball.epsilon * direction / length).clamp(0, 1))
    return points


def descend(function: Callable[[Tensor], Tensor], ball: L2Ball, steps: int = 10) -> Tensor:
    """The least value of a scalar for each image that plain projected gradient descent meets in the ball."""
    x, least = ball.center.clone(), function(ball.center).detach()
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x).sum(), x)
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-300).view(-1, 1, 1, 1)
        offset = x.detach() - 0.5 * ball.epsilon * gradient / length - ball.center
        outside = (offset.flatten(1).norm(dim=1) / max(ball.epsilon, 1e-300)).clamp(min=1).view(-1, 1, 1, 1)
        x = (ball.center + offset / outside).clamp(0, 1)
        least = torch.minimum(least, function(x).detach())
    return least


# --- the ball


def test_the_box_of_a_ball_by_hand() -> None:
    ball = L2Ball(torch.tensor([[[[0.05, 0.5, 0.95]]]], dtype=torch.float64), 0.1)
    torch.testing.assert_close(ball.box.lower.flatten(), torch.tensor([0.0, 0.4, 0.85], dtype=torch.float64))
    torch.testing.assert_close(ball.box.upper.flatten(), torch.tensor([0.15, 0.6, 1.0], dtype=torch.float64))
    whole = L2Ball(ball.center, 1.58).box  # a radius above 1 is one of many pixels
    assert (whole.lower == 0).all()
    assert (whole.upper == 1).all()


def test_perturbation_sets() -> None:
    images = torch.rand((2, 1, 3, 3), generator=generator())
    box, ball = perturbation_set(images, "linf", 0.1), perturbation_set(images, "l2", 1.58)
    assert isinstance(box, Interval)
    assert torch.equal(box.lower, epsilon_box(images, 0.1).lower)
    assert isinstance(ball, L2Ball)
    assert torch.equal(ball.center, images)
    assert ball.epsilon == 1.58
    assert ball.shape == images.shape


@pytest.mark.parametrize("epsilon", [-0.1, math.inf, math.nan])
def test_a_radius_that_is_none_is_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match="expected a finite Euclidean radius"):
        L2Ball(torch.zeros(1, 1, 2, 2), epsilon)


def test_a_ball_of_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 2\); an l_2 ball needs images \[B, C, H, W\]"):
        L2Ball(torch.zeros(4, 2), 0.1)


@given(case=strategies.cases(), epsilon=EPSILONS, scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_projected_points_lie_in_the_ball_and_the_pixel_range(
    case: strategies.Case, epsilon: float, scale: float
) -> None:
    ball = L2Ball(case.images, epsilon)
    wild = case.images + scale * torch.randn(case.images.shape, generator=generator(case.seed), dtype=torch.float64)
    points = ball.project(wild)
    assert ((points - ball.center).flatten(1).norm(dim=1) <= epsilon * (1 + BOUND_ROUNDING)).all()
    assert (points >= 0).all()
    assert (points <= 1).all()
    # what is inside already stays
    torch.testing.assert_close(ball.project(points), points, rtol=0, atol=BOUND_ROUNDING)


def test_contained_points_by_hand() -> None:
    center = torch.full((5, 1, 1, 2), 0.5)
    offsets = torch.tensor([[0.3, 0.4], [0.3, 0.401], [0.0, 0.5], [0.0, -0.5001], [0.36, 0.36]]).view(5, 1, 1, 2)
    ball = L2Ball(center, 0.5)
    assert contains(ball, center + offsets).tolist() == [True, False, True, False, False]
    high = L2Ball(torch.full((2, 1, 1, 2), 0.9), 0.5)
    outside = torch.tensor([[1.0, 0.6], [1.0001, 0.9]]).view(2, 1, 1, 2)
    assert contains(high, outside).tolist() == [True, False]
    assert contains(L2Ball(center[:0], 0.5), center[:0]).tolist() == []
    box = epsilon_box(center, 0.3)
    assert contains(box, center + offsets).tolist() == [False, False, False, False, False]
    assert contains(box, box.upper).tolist() == [True] * 5


def test_nan_is_contained_nowhere() -> None:
    points = torch.full((1, 1, 1, 2), torch.nan)
    for region in (L2Ball(torch.zeros(1, 1, 1, 2), 1.0), epsilon_box(torch.zeros(1, 1, 1, 2), 1.0)):
        assert contains(region, points).tolist() == [False]


# --- bounds


@given(drawn=balls())
def test_every_layer_stays_inside_its_bounds(drawn: tuple[strategies.Case, L2Ball]) -> None:
    case, ball = drawn
    trace = Trace()
    out = propagate(case.network, ball, trace=trace)
    entered: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0])) for layer, _ in trace.steps]
    for point in sample_ball(ball, 16, case.seed):
        entered.clear()
        logits = case.network(point)
        boxes = [box for _, box in trace.steps] + [out]
        for box, value in zip(boxes, [*entered, logits], strict=True):
            slack = BOUND_ROUNDING * (1 + value.abs())
            assert (box.lower - slack <= value).all()
            assert (value <= box.upper + slack).all()
    for hook in hooks:
        hook.remove()
    first = trace.steps[0][1]
    assert torch.equal(first.lower, ball.box.lower)
    assert torch.equal(first.upper, ball.box.upper)


@given(drawn=balls())
def test_no_point_of_the_ball_is_below_the_lower_bounds(drawn: tuple[strategies.Case, L2Ball]) -> None:
    case, ball = drawn
    bounds = [
        logit_difference_lower_bounds(case.network, ball, case.labels),
        crown_lower_bounds(case.network, ball, case.labels),
        crown_lower_bounds(case.network, ball, case.labels, optimize_steps=3),
    ]
    found = [oracles.logit_differences(case.network(x), case.labels) for x in sample_ball(ball, 32, case.seed)]
    sampled = torch.stack(found).amin(0)
    attacked = [
        descend(lambda x, j=j: logit_differences(case.network(x), case.labels)[:, j], ball)
        for j in range(case.network.num_classes - 1)
    ]
    least = torch.minimum(sampled, torch.stack(attacked, 1))
    for bound in bounds:
        assert (bound <= least + BOUND_ROUNDING * (1 + bound.abs())).all()


@given(drawn=balls())
def test_the_ball_is_never_looser_than_its_box(drawn: tuple[strategies.Case, L2Ball]) -> None:
    case, ball = drawn
    over_ball, over_box = (propagate(case.network, region) for region in (ball, ball.box))
    assert (over_ball.lower >= over_box.lower - BOUND_ROUNDING * (1 + over_box.lower.abs())).all()
    assert (over_ball.upper <= over_box.upper + BOUND_ROUNDING * (1 + over_box.upper.abs())).all()
    ibp = logit_difference_lower_bounds(case.network, ball, case.labels)
    crown = crown_lower_bounds(case.network, ball, case.labels)
    assert (ibp >= logit_difference_lower_bounds(case.network, ball.box, case.labels) - BOUND_ROUNDING).all()
    assert (crown >= ibp).all()


@given(drawn=balls())
def test_epsilon_0_gives_the_forward_pass(drawn: tuple[strategies.Case, L2Ball]) -> None:
    case, _ = drawn
    ball = L2Ball(case.images, 0.0)
    expected = oracles.logit_differences(case.network(case.images), case.labels)
    for bound in (
        logit_difference_lower_bounds(case.network, ball, case.labels),
        crown_lower_bounds(case.network, ball, case.labels),
    ):
        torch.testing.assert_close(bound, expected, rtol=BOUND_ROUNDING, atol=BOUND_ROUNDING)


FIRST_LAYERS = {
    "linear": ([nn.Flatten()], nn.Linear(32, 5)),
    "linear over rows of pixels": ([], nn.Linear(4, 3, bias=False)),
    "normalised": ([Normalize([0.2, 0.4], [0.5, 0.1]), nn.Identity(), nn.Flatten()], nn.Linear(32, 5)),
    "convolution": ([], nn.Conv2d(2, 3, 3)),
    "padded and strided": ([Normalize([0.2, 0.4], [0.5, 0.1])], nn.Conv2d(2, 3, 3, 2, 1)),
    "groups and dilation": ([nn.Sequential(Normalize([0.0, 0.4], [0.5, 2.0]))], nn.Conv2d(2, 4, 2, 1, 2, 2, groups=2)),
}


@pytest.mark.parametrize("name", FIRST_LAYERS)
def test_the_first_layer_is_the_explicit_dense_matrix(name: str) -> None:
    """Centre A x + b, radius epsilon times the length of each row of A, and the maximiser is a point of the ball."""
    before, layer = FIRST_LAYERS[name]
    module = nn.Sequential(*before, layer)
    strategies.randomize(Network(module, nn.Linear(1, 2)), generator(1))
    images = 0.3 + 0.4 * torch.rand((3, 2, 4, 4), generator=generator(2), dtype=torch.float64)
    matrix, offset = oracles.dense(module, (2, 4, 4))
    lengths = (matrix**2).sum(1).sqrt()
    bounds = propagate(module, L2Ball(images, 0.2))  # well inside the pixel range: the ball alone decides
    for image, lower, upper in zip(images, bounds.lower.flatten(1), bounds.upper.flatten(1), strict=True):
        center = matrix @ image.flatten() + offset
        torch.testing.assert_close(lower, center - 0.2 * lengths)
        torch.testing.assert_close(upper, center + 0.2 * lengths)
    for unit in range(len(matrix)):
        worst = images[:1] + (0.2 * matrix[unit] / lengths[unit]).view(1, 2, 4, 4)
        assert contains(L2Ball(images[:1], 0.2), worst).all()
        torch.testing.assert_close(module(worst).flatten()[unit], bounds.upper[0].flatten()[unit])


def test_taps_in_the_padding_do_not_count() -> None:
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    with torch.no_grad():
        layer.weight.fill_(1.0)
    bounds = propagate(layer, L2Ball(torch.full((1, 1, 3, 3), 0.5, dtype=torch.float64), 0.1))
    radius = bounds.radius.flatten().tolist()
    corner, edge, middle = 0.1 * 4**0.5, 0.1 * 6**0.5, 0.1 * 9**0.5
    assert radius == pytest.approx([corner, edge, corner, edge, middle, edge, corner, edge, corner])


def test_each_bound_is_the_better_of_ball_and_box() -> None:
    # weights (1, 0): the box and the ball agree; (1, 1) at (1, 1): up the pixel range ends, down the ball does.
    layer = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    bounds = propagate(nn.Sequential(nn.Flatten(), layer), L2Ball(torch.ones(1, 1, 1, 2, dtype=torch.float64), 0.5))
    assert bounds.lower.flatten().tolist() == pytest.approx([0.5, 2 - 0.5 * 2**0.5])
    assert bounds.upper.flatten().tolist() == pytest.approx([1.0, 2.0])


def test_a_linear_network_has_exact_linear_bounds() -> None:
    head = nn.Linear(4, 3).double()
    network = Network(nn.Sequential(Normalize([0.3], [0.4]), nn.Flatten()), head)
    images = torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2])
    bound = crown_lower_bounds(network, L2Ball(images, 0.2), labels)
    clean = oracles.logit_differences(network(images), labels)
    for row, label in enumerate(labels.tolist()):
        others = [j for j in range(3) if j != label]
        lengths = ((head.weight[label] - head.weight[others]) / 0.4).norm(dim=1)
        torch.testing.assert_close(bound[row], (clean[row] - 0.2 * lengths).detach())


def test_a_module_without_an_affine_layer_has_the_box_of_the_ball() -> None:
    module = nn.Sequential(Normalize([0.5], [0.5]), nn.Flatten())
    ball = L2Ball(torch.full((1, 1, 1, 2), 0.5), 0.1)
    out, expected = propagate(module, ball), interval_bounds(module, ball.box)
    assert torch.equal(out.lower, expected.lower)
    assert torch.equal(out.upper, expected.upper)


@given(case=strategies.cases(batch=4), epsilon=EPSILONS)
def test_batch_statistics_pass_through(case: strategies.Case, epsilon: float) -> None:
    assume(begins_with_an_affine_layer(case.network))
    statistics: Statistics = {}
    ball = L2Ball(case.images, epsilon)
    with torch.no_grad():
        forward_collecting(case.network, case.images, statistics)
        bounds = propagate(case.network, ball, statistics=statistics)
        for point in sample_ball(ball, 8, case.seed):
            logits = forward(case.network, point, statistics)
            slack = BOUND_ROUNDING * (1 + logits.abs() + bounds.upper.abs())
            assert (bounds.lower - slack <= logits).all()
            assert (logits <= bounds.upper + slack).all()


def test_gradients_of_a_layer_with_a_dead_unit_are_finite() -> None:
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    bounds = propagate(nn.Sequential(nn.Flatten(), layer), L2Ball(torch.full((2, 1, 2, 2), 0.5), 0.1))
    (bounds.upper - bounds.lower).sum().backward()
    assert layer.weight.grad is not None
    assert torch.isfinite(layer.weight.grad).all()
    assert (layer.weight.grad[0] != 0).all()


@pytest.mark.parametrize(
    ("first", "refusal"),
    [
        (nn.AvgPool2d(1), r"no l_2 rule for AvgPool2d at features\.0; "),
        (nn.BatchNorm2d(1), r"no l_2 rule for BatchNorm2d at features\.0; "),
        (nn.ReLU(), r"no l_2 rule for ReLU at features\.0; "),
        (nn.MaxPool2d(1), r"no l_2 rule for MaxPool2d at features\.0; "),
        (Residual(nn.Conv2d(1, 1, 1)), r"no l_2 rule for Residual at features\.0; "),
        (nn.Sequential(nn.Identity(), nn.ReLU()), r"no l_2 rule for ReLU at features\.0\.1; "),
        (nn.Conv2d(1, 1, 3, padding="same"), "no interval rule for Conv2d .*padding='same'"),
    ],
)
def test_another_first_layer_is_refused_by_name(first: nn.Module, refusal: str) -> None:
    network = Network(nn.Sequential(first, nn.Flatten()), nn.Linear(4, 2))
    ball, labels = L2Ball(torch.zeros(1, 1, 2, 2), 0.1), torch.tensor([0])
    for bound in (logit_difference_lower_bounds, crown_lower_bounds):
        with pytest.raises(UnsupportedLayerError, match=refusal):
            bound(network, ball, labels)


@pytest.mark.parametrize(
    "layers", [[nn.Flatten(0), nn.Linear(8, 2)], [nn.Flatten(-4), nn.Linear(8, 2)], [nn.Flatten(2), nn.Conv2d(2, 1, 1)]]
)
def test_what_would_join_the_images_of_a_batch_is_refused(layers: list[nn.Module]) -> None:
    with pytest.raises(UnsupportedLayerError, match=r"no l_2 rule for (Flatten|Conv2d)\("):
        propagate(nn.Sequential(*layers), L2Ball(torch.zeros(2, 1, 2, 2), 0.1))


# --- the attack


def test_starts_are_uniform_in_the_ball() -> None:
    ball = L2Ball(torch.full((20_000, 1, 1, 3), 0.5), 0.4)
    offset = (uniform_start(ball, generator()) - 0.5).flatten(1)
    share = (offset.norm(dim=1) / 0.4) ** 3  # uniform on [0, 1]: mean 1/2, variance 1/12
    assert abs(float(share.mean()) - 0.5) < 5 * (1 / 12 / 20_000) ** 0.5
    assert float(share.max()) <= 1 + 1e-5
    # a coordinate of a uniform point of the ball has mean 0 and variance epsilon^2 / 5
    assert (offset.mean(0).abs() < 5 * (0.4**2 / 5 / 20_000) ** 0.5).all()
    assert offset.var(0).tolist() == pytest.approx([0.4**2 / 5] * 3, rel=0.05)


def test_unit_lengths_of_gradients_of_every_size() -> None:
    vectors = torch.tensor([[3.0, 4.0], [3e-30, 4e-30], [0.0, 0.0], [3e30, 4e30]])
    expected = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0], [0.6, 0.8]])
    torch.testing.assert_close(unit_length(vectors), expected)


def test_one_step_by_hand() -> None:
    # z0 - z1 = 3 x0 + 4 x1: class 0 loses along -(0.6, 0.8); half of epsilon 0.2 from the center, then the whole.
    head = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    network = Network(nn.Sequential(nn.Flatten()), head)
    ball = L2Ball(torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64), 0.2)
    step, _ = ascend(network, ball.center, cross_entropy_of(torch.tensor([0])), region=ball, step_size=0.5)
    assert step.flatten().tolist() == pytest.approx([0.44, 0.42])
    step, _ = ascend(network, ball.center, cross_entropy_of(torch.tensor([0])), region=ball, step_size=5.0)
    assert step.flatten().tolist() == pytest.approx([0.38, 0.34])
    low = L2Ball(torch.tensor([[[[0.1, 0.5]]]], dtype=torch.float64), 0.2)  # the pixel range ends at 0
    step, _ = ascend(network, low.center, cross_entropy_of(torch.tensor([0])), region=low, step_size=1.0)
    assert step.flatten().tolist() == pytest.approx([0.0, 0.34])


@given(case=strategies.cases(), epsilon=EPSILONS, restarts=st.integers(1, 2))
def test_attacked_points_lie_in_the_ball_and_inputs_stay(case: strategies.Case, epsilon: float, restarts: int) -> None:
    network, images = case.network.float(), case.images.float()
    ball, kept = L2Ball(images, epsilon), images.clone()
    shared = {"region": ball, "steps": 3, "step_size": 0.7, "restarts": restarts}
    points = pgd(network, case.labels, generator=generator(), **shared)
    worst, margins = worst_points(network, images, case.labels, generator=generator(), **shared)
    for found in (points, worst):
        assert contains(ball, found).all()
        assert not found.requires_grad
    assert torch.equal(ball.center, kept)
    assert (margins <= logit_differences(network(images), case.labels).amin(1)).all()
    assert torch.equal(points, pgd(network, case.labels, generator=generator(), **shared))


@pytest.mark.parametrize("seed", range(3))
def test_the_attack_finds_more_than_noise_of_the_same_length(seed: int) -> None:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
    network = strategies.randomize(Network(layers, nn.Linear(32, 5)), generator(seed))
    images = torch.rand((16, 1, 8, 8), generator=generator(seed), dtype=torch.float64)
    labels = network(images).argmax(1)
    ball = L2Ball(images, 0.3)
    points = pgd(network, labels, region=ball, steps=10, step_size=0.25, generator=generator())

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(network(x), labels, reduction="none")

    noise = torch.stack([loss(point) for point in sample_ball(ball, 20, seed)]).amax(0)
    assert (loss(points) > loss(images)).all()
    assert (loss(points) > noise).float().mean() > 0.9


def test_nan_still_gives_points_of_the_ball() -> None:
    ball = L2Ball(torch.full((2, 1, 1, 3), 0.5), 0.25)
    points = pgd(
        lambda x: x.flatten(1) * torch.nan,
        torch.tensor([0, 1]),
        region=ball,
        steps=2,
        step_size=0.5,
        generator=generator(),
    )
    assert torch.equal(points, ball.center)


# --- the threat and the ladder


@pytest.mark.parametrize(("written", "text"), [("1.58", "79/50"), ("1/2", "1/2"), (3, "3"), (0.25, "1/4")])
def test_an_l2_epsilon_is_exact_and_may_exceed_1(written: Any, text: str) -> None:
    threat = ThreatModel(norm="l2", epsilon=written)
    assert str(threat) == f"l2 {text}"
    assert threat.model_dump(mode="json") == {"norm": "l2", "epsilon": text}
    assert ThreatModel.model_validate_json(threat.model_dump_json()) == threat


@pytest.mark.parametrize("epsilon", [0, -1, 1001, "1e399", "1e-390", True, None, "two", float("nan"), float("inf")])
def test_other_l2_epsilons_are_refused(epsilon: Any) -> None:
    with pytest.raises(ValueError, match="epsilon"):
        ThreatModel(norm="l2", epsilon=epsilon)


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="'linf' or 'l2'"):
        ThreatModel.model_validate({"norm": "l1", "epsilon": 0.1})


def l2_config(**changes: Any) -> VerifyConfig:
    return VerifyConfig.model_validate(
        {"threat": {"norm": "l2", "epsilon": "1/10"}, "attack": {"steps": 4, "step_size": 1}} | changes
    )


def hand_network() -> Network:
    """z0 - z1 = p + q - 2 with p = relu(0.6 x0 + 0.8 x1), q = relu(0.8 x0 - 0.6 x1 + 0.5); both are active below.

    p and q are turned pixels, so the ball moves each by epsilon, and their sum 1.4 x0 + 0.2 x1 - 1.5 by
    sqrt(2) epsilon.
    """
    first, head = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[0.6, 0.8], [0.8, -0.6]]))
        first.bias.copy_(torch.tensor([0.0, 0.5]))
        head.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        head.bias.copy_(torch.tensor([0.0, 2.0]))
    return Network(nn.Sequential(nn.Flatten(), first, nn.ReLU()), head)


# x1 = 0.5, epsilon = 0.1: z0 - z1 = 1.4 x0 - 1.4; the least margin is 0.1414 below the image's, IBP's 0.2 (over the box
# of the ball IBP would lose 2 * 0.14 and CROWN 0.16). x0 beyond 1 is no pixel, so label 1 has the positive margins.
#   x0    label  margin  least   IBP    so
#   0.80  0      -0.28     -      -     clean
#   0.95  1       0.07   below 0  -     pgd
#   0.89  1       0.154  0.0126 -0.046  crown (over the box of the ball -0.006)
#   0.80  1       0.28   0.1386  0.08   ibp
L2_IMAGES = torch.tensor([0.80, 0.95, 0.89, 0.80]).view(-1, 1, 1, 1).repeat(1, 1, 1, 2)
L2_IMAGES[..., 1] = 0.5
L2_LABELS = torch.tensor([0, 1, 1, 1])


def test_hand_numbers_of_the_ladder() -> None:
    table = verify(hand_network(), L2_IMAGES, L2_LABELS, l2_config())
    assert table["method"].to_pylist() == ["clean", "pgd", "crown", "ibp"]
    assert table["verdict"].to_pylist() == ["falsified", "falsified", "certified", "certified"]
    lower = table["lower_bound"].to_pylist()
    assert lower[2:] == pytest.approx([0.154 - 0.1 * 2**0.5, 0.08], abs=1e-5)  # less the allowance for rounding
    over_box = crown_lower_bounds(hand_network(), L2Ball(L2_IMAGES, 0.1).box, L2_LABELS)
    assert float(over_box[2]) == pytest.approx(-0.006, abs=1e-6)


def test_quick_accuracies_take_the_threat() -> None:
    threat = ThreatModel(norm="l2", epsilon="1/10")
    assert quick_accuracies(hand_network(), L2_IMAGES, L2_LABELS, threat) == pytest.approx((0.75, 0.25))
    wide = ThreatModel(norm="l2", epsilon=2)
    assert quick_accuracies(hand_network(), L2_IMAGES, L2_LABELS, wide) == pytest.approx((0.75, 0.0))


def test_a_point_outside_the_ball_falsifies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from ccdist import rungs

    def cheat(_: Any, images: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        moved = images.clone()
        moved[:] = 1.0  # class 0 by 0.1, but 0.5 or more away
        return moved, torch.zeros(len(images))

    monkeypatch.setattr(rungs, "worst_points", cheat)
    table = verify(hand_network(), L2_IMAGES, L2_LABELS, l2_config(rungs=["pgd"]))
    assert table["method"].to_pylist() == ["clean", "", "", ""]


@pytest.mark.parametrize("rung", ["ibp", "crown"])
def test_l2_margins_that_cancel_out_of_large_features_certify_nothing(rung: str) -> None:
    first, head = nn.Linear(2, 64), nn.Linear(64, 2)
    with torch.no_grad():
        first.weight.copy_(1e5 * torch.rand((64, 2), generator=generator()))
        head.weight.zero_()
        head.weight[0, ::2], head.weight[0, 1::2] = 1.0, -1.0
        first.weight[1::2] = first.weight[::2]
        first.bias.zero_()
        head.bias.copy_(torch.tensor([1e-4, 0.0]))
    network = Network(nn.Sequential(nn.Flatten(), first, nn.ReLU()), head)
    images = torch.rand((50, 1, 1, 2), generator=generator())
    table = verify(network, images, torch.zeros(50, dtype=torch.long), l2_config(rungs=[rung]))
    assert "certified" not in table["verdict"].to_pylist()


@given(seed=st.integers(0, 10_000), epsilon=st.sampled_from(["1/100", "1/20", "1/5", "2"]))
def test_certified_images_survive_a_dense_grid(seed: int, epsilon: str) -> None:
    layers = [nn.Flatten(), nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()]
    network = strategies.randomize(Network(nn.Sequential(*layers), nn.Linear(8, 3)), generator(seed)).float()
    images = torch.rand((8, 1, 1, 2), generator=generator(seed))
    labels = network(images).argmax(1)
    config = l2_config(threat={"norm": "l2", "epsilon": epsilon})
    rows = verify(network, images, labels, config).to_pylist()
    for row in rows:
        image = images[row["index"]]
        ball = L2Ball(image[None], config.threat.radius)
        points = oracles.grid(ball.box.lower.flatten(), ball.box.upper.flatten(), 41).view(-1, 1, 1, 2)
        points = points[(points - image).flatten(1).norm(dim=1) <= ball.epsilon]
        least = float(oracles.logit_differences(network(points), torch.full((len(points),), row["label"])).min())
        if row["verdict"] == "certified":
            assert least > 0
        if row["lower_bound"] is not None:
            assert row["lower_bound"] <= least + 1e-5 * (1 + abs(least))
