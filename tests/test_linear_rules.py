"""Backward rules: equal to autograd where a layer is affine, below the function where it is enclosed by lines."""

import itertools

import oracles
import pytest
import strategies
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ccdist import linear_rules
from ccdist.bounds import Trace, UnsupportedLayerError, propagate
from ccdist.interval import Interval
from ccdist.linear_bounds import least, relaxation
from ccdist.linear_rules import LINEAR_RULES, Back, Step, backward, backward_from, leaves, num_leaves
from ccdist.networks import Network, Residual
from ccdist.threats import L2Ball

pytestmark = pytest.mark.timeout(20)

# Two routes of float64 sums of some hundred terms of order one.
ROUNDING = 1e-10
# Of tests whose default of examples is too few to meet every case.
MANY = settings(max_examples=max(25, settings.default.max_examples // 2))


def zeros(weights: Tensor) -> Tensor:
    return weights.new_zeros(weights.shape[:2])


def as_back(weights: Tensor) -> Back:
    return Back(weights, zeros(weights), zeros(weights))


def autograd_of(function: nn.Module, shape: torch.Size, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(weights [S, ...] and offset [S] at the input) of weights [S, ...] times an affine function, by its gradient."""
    rows = []
    for row in weights:
        x = torch.zeros((1, *shape), dtype=torch.float64, requires_grad=True)
        rows.append(torch.autograd.grad((function(x)[0] * row).sum(), x)[0][0])
    with torch.no_grad():
        at_zero = function(torch.zeros((1, *shape), dtype=torch.float64))[0]
    return torch.stack(rows), (weights * at_zero).flatten(1).sum(1)


# --- One layer


@pytest.mark.parametrize("few_outputs", [0, 10**6], ids=["transposed", "phases"])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_a_convolution_equals_autograd(stride: int, few_outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stride, padding and kernel, sizes that the stride steps over too; both ways of computing it."""
    monkeypatch.setattr(linear_rules, "FEW_OUTPUTS", few_outputs)
    tried = 0
    for kernel, padding, height, width in itertools.product((1, 2, 3, 5), (0, 1, 3), (3, 6, 7), (4, 6)):
        if min(height, width) + 2 * padding < kernel:
            continue
        torch.manual_seed(tried)
        layer = nn.Conv2d(2, 3, kernel, stride, padding).double()
        shape = torch.Size((2, height, width))
        weights = torch.randn((2, 2, *layer(torch.zeros(1, *shape).double()).shape[1:])).double()
        found, offset = LINEAR_RULES[nn.Conv2d](layer, weights, Step(layer, shape))
        for row in range(2):
            expected, constant = autograd_of(layer, shape, weights[row])
            torch.testing.assert_close(found[row], expected, rtol=ROUNDING, atol=ROUNDING)
            torch.testing.assert_close(offset[row], constant, rtol=ROUNDING, atol=ROUNDING)
        tried += 1
    assert tried > 50


@given(
    seed=st.integers(0, 10**6),
    groups=st.sampled_from([1, 2]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    bias=st.booleans(),
)
def test_no_two_axes_of_a_convolution_need_be_alike(
    seed: int,
    groups: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    bias: bool,
) -> None:
    torch.manual_seed(seed)
    layer = nn.Conv2d(2, 4, kernel, stride, padding, dilation, groups, bias=bias).double()
    shape = torch.Size((2, 6, 7))
    weights = torch.randn((1, 3, *layer(torch.zeros(1, *shape).double()).shape[1:])).double()
    found, offset = LINEAR_RULES[nn.Conv2d](layer, weights, Step(layer, shape))
    expected, constant = autograd_of(layer, shape, weights[0])
    torch.testing.assert_close(found[0], expected, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(offset[0], constant, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("kernel", [2, 3, (2, 3)])
@pytest.mark.parametrize("stride", [None, 1, 2, (3, 2)])
@pytest.mark.parametrize("padding", [0, 1, (1, 0)])
def test_average_pooling_equals_autograd(kernel: int, stride: int | None, padding: int) -> None:
    layer, shape = nn.AvgPool2d(kernel, stride, padding), torch.Size((2, 6, 7))
    weights = torch.randn((1, 2, *layer(torch.zeros(1, *shape)).shape[1:])).double()
    found, _ = LINEAR_RULES[nn.AvgPool2d](layer, weights, Step(layer, shape))
    torch.testing.assert_close(found[0], autograd_of(layer, shape, weights[0])[0], rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("activation", strategies.ACTIVATIONS, ids=str)
@MANY
@given(seed=st.integers(0, 10**6))
def test_lines_enclose_the_activation(activation: nn.Module, seed: int) -> None:
    """Boxes on one side of 0, that end at 0, of no width; weights of any sign; any kink slope."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randn((2, 3, 8), generator=generator, dtype=torch.float64) * 2
    ends[0, :, 0] = 0
    ends[1, :, 1] = ends[0, :, 1]
    ends[:, :, 2] *= 1e-9
    box = Interval(ends.amin(0), ends.amax(0))
    kink = torch.rand((3, 8), generator=generator, dtype=torch.float64)
    weights = torch.randn((3, 5, 8), generator=generator, dtype=torch.float64)
    points = oracles.sample_box(box, 30, generator)
    values = (weights * activation(points).unsqueeze(2)).sum(-1)
    for choice in (None, kink, kink.round()):
        lines = relaxation(activation, box, choice)
        assert lines is not None
        back, offset = lines.through(weights)
        assert ((back * points.unsqueeze(2)).sum(-1) + offset <= values + ROUNDING).all()
        rows = torch.tensor([2, 0])
        for part, whole in zip(lines.select(rows).through(weights[rows]), (back, offset), strict=True):
            assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("activation", [a for a in strategies.ACTIVATIONS if isinstance(a, nn.ReLU | nn.LeakyReLU)])
def test_a_unit_of_known_sign_is_exact_whatever_the_slope(activation: nn.Module) -> None:
    box = Interval(torch.tensor([[0.5, -2.0, 0.0, -1.0]]).double(), torch.tensor([[2.0, -0.1, 1.0, 0.0]]).double())
    weights = torch.tensor([[[1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -1.0]]]).double()
    slopes = torch.where(box.lower >= 0, 1.0, float(activation(torch.tensor(-1.0))) * -1.0)
    for kink in (None, torch.full((1, 4), 0.3).double()):
        lines = relaxation(activation, box, kink)
        assert lines is not None
        back, offset = lines.through(weights)
        torch.testing.assert_close(back, weights * slopes.double(), rtol=1e-7, atol=0)
        assert (offset.abs() <= ROUNDING).all()


# --- Whole networks


@MANY
@given(seed=st.integers(0, 2**31 - 1))
def test_an_affine_network_equals_autograd(seed: int) -> None:
    case = strategies.deployed(seed, activations=[nn.Identity()], double=True, norm="linf")
    module, shape = case.proof.deployed.features, case.images.shape[1:]
    steps = traced(module, case.region)
    weights = torch.randn((2, 3, module(case.images).shape[1]), dtype=torch.float64)
    bound = backward(module, as_back(weights), steps)
    for row in range(2):
        expected, offset = autograd_of(module, shape, weights[row])
        torch.testing.assert_close(bound.weights[row], expected, rtol=ROUNDING, atol=ROUNDING)
        torch.testing.assert_close(bound.offset[row], offset, rtol=ROUNDING, atol=ROUNDING)
    assert not bound.allowance.any()


def traced(module: nn.Module, region: Interval | L2Ball) -> list[Step]:
    trace = Trace()
    with torch.no_grad():
        propagate(module, region, trace=trace, name="features")
    return [Step(layer, box.shape[1:], relaxation(layer, box)) for layer, box in trace.steps]


@MANY
@given(seed=st.integers(0, 2**31 - 1))
def test_backward_from_every_leaf_is_the_gradient(seed: int) -> None:
    """Over a single point each ReLU is its own line, so the bound is the value and its gradient; in residuals too."""
    case = strategies.deployed(seed, double=True, norm="linf")
    module, images = case.network.features, case.images
    steps = traced(module, Interval(images, images))
    x = images.clone().requires_grad_()
    entered = inputs_of_leaves(module, x)
    assert len(entered) == num_leaves(module) == len(steps)
    for start, values in enumerate(entered):
        weights = torch.randn((len(images), 2, *values.shape[1:]), dtype=torch.float64)
        bound = backward_from(module, start, as_back(weights), steps[:start])  # later steps are not needed
        for spec in range(2):
            total = (values * weights[:, spec]).flatten(1).sum(1)
            found = (bound.weights[:, spec] * images).flatten(1).sum(1) + bound.offset[:, spec]
            torch.testing.assert_close(found, total.detach(), rtol=ROUNDING, atol=ROUNDING)
            (gradient,) = torch.autograd.grad(total.sum(), x, retain_graph=True)
            torch.testing.assert_close(bound.weights[:, spec], gradient, rtol=ROUNDING, atol=ROUNDING)


def inputs_of_leaves(module: nn.Module, x: Tensor) -> list[Tensor]:
    """In the order of the forward pass."""
    entered: list[Tensor] = []
    hooks = [
        leaf.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        for leaf in dict.fromkeys(leaves(module))
    ]
    module(x)
    for hook in hooks:
        hook.remove()
    return entered


def test_nested_containers_and_empty_ones() -> None:
    torch.manual_seed(0)
    inner = Residual(nn.Sequential(nn.Linear(3, 3), Residual(nn.Sequential(nn.Linear(3, 3), nn.ReLU())), nn.ReLU()))
    module = nn.Sequential(nn.Sequential(), nn.Flatten(), nn.Sequential(nn.Linear(4, 3), nn.Sequential(inner))).double()
    x = torch.rand((2, 1, 2, 2), dtype=torch.float64)
    steps = traced(module, Interval(x, x))
    assert num_leaves(module) == len(steps) == len(leaves(module)) == 8
    entered = inputs_of_leaves(module, x)
    for start, values in enumerate(entered):
        weights = torch.randn((2, 1, *values.shape[1:]), dtype=torch.float64)
        bound = backward_from(module, start, as_back(weights), steps)
        found = (bound.weights[:, 0] * x).flatten(1).sum(1) + bound.offset[:, 0]
        torch.testing.assert_close(found, (values * weights[:, 0]).flatten(1).sum(1), rtol=ROUNDING, atol=ROUNDING)


def test_the_allowance_counts_each_layer_once() -> None:
    # f(x) = 3 relu(2 x): errors 0.5 of the first layer, 0.25 of the ReLU, 0.125 of the second one; w = -2 behind all:
    #   2 * 0.125 + |-2 * 3| * 0.25 + |-6 * 1| * 0.5 = 0.25 + 1.5 + 3
    first, relu, second = nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        first.weight.fill_(2.0)
        second.weight.fill_(3.0)
    box = Interval(torch.tensor([[1.0]]), torch.tensor([[2.0]]))
    steps = [
        Step(layer, torch.Size((1,)), relaxation(layer, box), torch.tensor([[error]]))
        for layer, error in ((first, 0.5), (relu, 0.25), (second, 0.125))
    ]
    bound = backward(nn.Sequential(first, relu, second), as_back(torch.tensor([[[-2.0]]])), steps)
    assert bound.allowance.item() == 4.75
    assert bound.weights.item() == -12.0
    # A residual adds what both branches miss by: body 3 relu(2 x), shortcut x without an error of its own.
    shortcut = nn.Identity()
    steps.append(Step(shortcut, torch.Size((1,)), None, torch.tensor([[1.0]])))
    bound = backward(Residual(nn.Sequential(first, relu, second), shortcut), as_back(torch.tensor([[[-2.0]]])), steps)
    assert bound.allowance.item() == 4.75 + 2.0
    assert bound.weights.item() == -14.0


def test_a_layer_without_a_rule_is_refused() -> None:
    layer = nn.Softplus()
    with pytest.raises(UnsupportedLayerError, match="no linear rule for Softplus"):
        backward(layer, as_back(torch.ones(1, 1, 2)), [Step(layer, torch.Size((2,)))])


@MANY
@given(seed=st.integers(0, 2**31 - 1), norm=st.sampled_from(["linf", "l2"]))
def test_the_least_value_over_a_region(seed: int, norm: str) -> None:
    """Never above a point of the region; over a box a corner attains it."""
    case = strategies.deployed(seed, norm=norm, double=True)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn((len(case.images), 3, *case.images.shape[1:]), generator=generator, dtype=torch.float64)
    low = least(weights, case.region)
    points = case.points(40, generator)
    values = (weights * points.unsqueeze(2)).flatten(3).sum(3)
    assert (low <= values + ROUNDING).all()
    box = case.region.box if isinstance(case.region, L2Ball) else case.region
    corner = torch.where(weights > 0, box.lower.unsqueeze(1), box.upper.unsqueeze(1))
    in_box = (weights * corner).flatten(2).sum(2)
    if isinstance(case.region, L2Ball):
        lengths = weights.flatten(2).norm(dim=2)
        in_ball = (weights * case.region.center.unsqueeze(1)).flatten(2).sum(2) - case.region.epsilon * lengths
        torch.testing.assert_close(low, torch.maximum(in_box, in_ball), rtol=ROUNDING, atol=ROUNDING)
    else:
        torch.testing.assert_close(low, in_box, rtol=ROUNDING, atol=ROUNDING)


def test_a_network_may_hold_a_linear_layer_of_several_rows() -> None:
    torch.manual_seed(0)
    network = Network(nn.Sequential(nn.Linear(2, 3), nn.Flatten()), nn.Linear(9, 2)).double()
    x = torch.rand((2, 3, 2), dtype=torch.float64)
    weights = torch.randn((2, 4, 9), dtype=torch.float64)
    bound = backward(network.features, as_back(weights), traced(network.features, Interval(x, x)))
    found = torch.einsum("bsij,bij->bs", bound.weights, x) + bound.offset
    expected = torch.einsum("bsd,bd->bs", weights, F.linear(x, *network.features[0].parameters()).flatten(1))
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)
