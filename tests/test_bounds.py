"""Interval bounds against box corners and dense matrices; elision; refusals."""

import subprocess
import sys
from typing import Any

import oracles
import pytest
import strategies
import torch
from contracts import BOUND_ROUNDING, BoundContract
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ccdist.batch_norm import forward, forward_collecting
from ccdist.bounds import (
    Trace,
    UnsupportedLayerError,
    interval_bounds,
    logit_difference_lower_bounds,
    logit_differences,
    other_classes,
    propagate,
)
from ccdist.interval import Interval, epsilon_box
from ccdist.linear_bounds import crown_lower_bounds
from ccdist.networks import Network, Normalize, Residual


class TestElidedIBP(BoundContract):
    def lower_bounds(self, network: Network, box: Interval, labels: Tensor) -> Tensor:
        return logit_difference_lower_bounds(network, box, labels)


def random_box(*shape: int, seed: int = 0) -> Interval:
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randn(2, 2, *shape, generator=generator, dtype=torch.float64)
    return Interval(ends.amin(0), ends.amax(0))


AFFINE_LAYERS = {
    "linear": nn.Linear(4, 3),
    "linear without bias": nn.Linear(4, 3, bias=False),
    "batch norm": nn.BatchNorm1d(4),
    "identity": nn.Identity(),
}
IMAGE_LAYERS = {
    "convolution": nn.Conv2d(2, 3, 2),
    "strided and padded": nn.Conv2d(2, 3, 2, 2, 1),
    "groups and dilation": nn.Conv2d(2, 2, 2, padding=1, dilation=2, groups=2),
    "average pooling": nn.AvgPool2d(2, 1),
    "padded average pooling": nn.AvgPool2d(2, 2, 1, count_include_pad=False),
    "batch norm": nn.BatchNorm2d(2),
    "normalisation": Normalize([0.2, 0.4], [0.5, 2.0]),
    "flatten": nn.Flatten(),
    "residual": Residual(nn.Conv2d(2, 2, 3, 1, 1)),
    "relu": nn.ReLU(),
}


def prepared(layer: nn.Module) -> nn.Module:
    """Random weights and batch norm statistics, of the layer itself."""
    strategies.randomize(Network(nn.Sequential(layer), nn.Linear(1, 2)), torch.Generator().manual_seed(1))
    return layer


@pytest.mark.parametrize("name", AFFINE_LAYERS)
def test_an_affine_layer_is_exact(name: str) -> None:
    layer, box = prepared(AFFINE_LAYERS[name]), random_box(4)
    exact = oracles.corner_bounds(layer, box)
    bounds = interval_bounds(layer, box)
    torch.testing.assert_close(bounds.lower, exact.lower)
    torch.testing.assert_close(bounds.upper, exact.upper)


@pytest.mark.parametrize("name", IMAGE_LAYERS)
def test_a_layer_of_images_is_exact(name: str) -> None:
    # 2 x 2 x 2 pixels have 256 corners; the residual is the one layer that reads an input twice.
    layer, box = prepared(IMAGE_LAYERS[name]), random_box(2, 2, 2)
    exact = oracles.corner_bounds(layer, box)
    bounds = interval_bounds(layer, box)
    if name == "residual":
        assert (bounds.lower <= exact.lower + BOUND_ROUNDING).all()
        assert (bounds.upper >= exact.upper - BOUND_ROUNDING).all()
        return
    torch.testing.assert_close(bounds.lower, exact.lower)
    torch.testing.assert_close(bounds.upper, exact.upper)


def test_a_convolution_is_the_loop() -> None:
    layer, box = prepared(nn.Conv2d(2, 3, 3, 2, 1)), random_box(2, 5, 4)
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is not None
    bounds = interval_bounds(layer, box)
    for low, up, center, radius in zip(bounds.lower, bounds.upper, box.center, box.radius, strict=True):
        middle = oracles.convolution(center, layer.weight, layer.bias, 2, 1)
        width = oracles.convolution(radius, layer.weight.abs(), torch.zeros(3), 2, 1)
        torch.testing.assert_close(low, middle - width)
        torch.testing.assert_close(up, middle + width)


@pytest.mark.parametrize("layer", strategies.ACTIVATIONS, ids=str)
@given(ends=strategies.tensors(2, 20), width=st.sampled_from([1e-6, 1e-2, 1.0, 10.0]))
def test_an_activation_is_exact(layer: nn.Module, ends: Tensor, width: float) -> None:
    """Against a dense grid: the bounds hold, and are attained up to the grid's step."""
    box = Interval(ends[0], ends[0] + width * ends[1].abs())
    bounds = interval_bounds(layer, box)
    points = torch.linspace(0, 1, 2001, dtype=torch.float64).unsqueeze(1)
    values = layer(box.lower + points * (box.upper - box.lower))
    step = (box.upper - box.lower) / 2000
    slack = BOUND_ROUNDING * (1 + values.abs().amax(0))
    assert (bounds.lower - slack <= values.amin(0)).all()
    assert (values.amax(0) <= bounds.upper + slack).all()
    # no slope is above 2, and a grid misses an extremum by half a step at most
    assert (values.amin(0) <= bounds.lower + step + slack).all()
    assert (bounds.upper <= values.amax(0) + step + slack).all()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_minimum_of_gelu_holds_for_every_float32_around_it(approximate: str) -> None:
    bits = torch.tensor([-0.74, -0.765]).view(torch.int32).tolist()
    x = torch.arange(*bits, dtype=torch.int32).view(torch.float32)
    layer = nn.GELU(approximate)
    lowest = interval_bounds(layer, Interval(x.amin().view(1), x.amax().view(1))).lower
    assert lowest <= layer(x).min()
    assert lowest.double() <= layer(x.double()).min()
    assert float(lowest) == pytest.approx(float(layer(x.double()).min()), rel=1e-6)


@pytest.mark.parametrize("layer", strategies.ACTIVATIONS, ids=str)
@given(ends=strategies.tensors(2, 6))
def test_bounds_of_an_activation_have_their_gradient(layer: nn.Module, ends: Tensor) -> None:
    lower, upper = ends.amin(0).requires_grad_(), ends.amax(0).requires_grad_()

    def both(low: Tensor, up: Tensor) -> Tensor:
        bounds = interval_bounds(layer, Interval(low, up))
        return torch.stack([bounds.lower, bounds.upper])

    assert torch.autograd.gradcheck(both, (lower, upper))


@pytest.mark.parametrize("layer", strategies.ACTIVATIONS, ids=str)
def test_a_point_box_has_the_activation_s_gradient(layer: nn.Module) -> None:
    x = torch.tensor([-30.0, -2.0, -0.5, 0.5, 2.0, 30.0], requires_grad=True)
    bounds = interval_bounds(layer, Interval(x, x))
    for bound in (bounds.lower, bounds.upper):
        (expected,), (gradient,) = (torch.autograd.grad(out.sum(), x, retain_graph=True) for out in (layer(x), bound))
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("layer", [nn.ReLU(inplace=True), nn.LeakyReLU(0.1, inplace=True)], ids=str)
def test_an_activation_in_place_is_refused_and_leaves_its_input(layer: nn.Module) -> None:
    box = random_box(2, 2)
    before = box.lower.clone()
    with pytest.raises(UnsupportedLayerError, match=r"ReLU in place; use inplace=False"):
        interval_bounds(nn.Sequential(nn.Identity(), layer), box)
    assert torch.equal(box.lower, before)


def test_a_trace_gives_the_inputs_of_every_activation_in_order() -> None:
    body = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    trace = Trace()
    network = nn.Sequential(nn.Tanh(), Residual(body, nn.Sigmoid()), nn.LeakyReLU()).double()
    propagate(network, random_box(2), trace=trace)
    entered = [box for layer, box in trace.steps if not isinstance(layer, nn.Linear)]
    assert [type(layer) for layer, _ in trace.steps] == [nn.Tanh, nn.Linear, nn.GELU, nn.Sigmoid, nn.LeakyReLU]
    assert [id(box) for box in trace.activation_inputs()] == [id(box) for box in entered]


@given(case=strategies.cases())
def test_every_layer_stays_inside_its_bounds(case: strategies.Case) -> None:
    trace = Trace()
    propagate(case.network, case.box, trace=trace)
    entered: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0])) for layer, _ in trace.steps]
    for point in oracles.sample_box(case.box, 16, torch.Generator().manual_seed(case.seed)):
        entered.clear()
        case.network(point)
        for (_, box), value in zip(trace.steps, entered, strict=True):
            slack = BOUND_ROUNDING * (1 + value.abs())
            assert (box.lower - slack <= value).all()
            assert (value <= box.upper + slack).all()
    for hook in hooks:
        hook.remove()


@given(case=strategies.cases(), factor=st.floats(1.01, 3))
def test_a_larger_box_never_has_a_tighter_bound(case: strategies.Case, factor: float) -> None:
    wider = Interval.from_center(case.box.center, factor * case.box.radius)
    tight = logit_difference_lower_bounds(case.network, case.box, case.labels)
    loose = logit_difference_lower_bounds(case.network, wider, case.labels)
    assert (loose <= tight + BOUND_ROUNDING * (1 + tight.abs())).all()


@given(case=strategies.cases())
def test_elision_never_loses(case: strategies.Case) -> None:
    logits = interval_bounds(case.network, case.box)
    others = other_classes(case.labels, case.network.num_classes)
    plain = logits.lower.gather(1, case.labels[:, None]) - logits.upper.gather(1, others)
    elided = logit_difference_lower_bounds(case.network, case.box, case.labels)
    assert (elided >= plain - BOUND_ROUNDING * (1 + plain.abs())).all()


def test_elision_by_hand() -> None:
    # One feature h in [1, 3]; z0 = 2h, z1 = h: z0 - z1 = h >= 1. Without elision 2 * 1 - 3 = -1.
    head = nn.Linear(1, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[2.0], [1.0]]))
        head.bias.zero_()
    network = Network(nn.Sequential(nn.Flatten()), head)
    box = Interval(torch.full((1, 1, 1, 1), 1.0), torch.full((1, 1, 1, 1), 3.0))
    assert logit_difference_lower_bounds(network, box, torch.tensor([0])).tolist() == [[1.0]]
    assert logit_difference_lower_bounds(network, box, torch.tensor([1])).tolist() == [[-3.0]]


@given(logits=strategies.tensors(4, 5), seed=st.integers(0, 100))
def test_differences_come_in_increasing_classes(logits: Tensor, seed: int) -> None:
    labels = torch.randint(5, (4,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(logit_differences(logits, labels), oracles.logit_differences(logits, labels))
    rows = other_classes(labels, 5).tolist()
    assert rows == [[j for j in range(5) if j != y] for y in labels.tolist()]


@given(case=strategies.cases(batch=4))
def test_bounds_with_batch_statistics_hold_for_the_function_with_those_statistics(case: strategies.Case) -> None:
    statistics: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        forward_collecting(case.network, case.images, statistics)
        bounds = propagate(case.network, case.box, statistics=statistics)
        for point in oracles.sample_box(case.box, 8, torch.Generator().manual_seed(case.seed)):
            logits = forward(case.network, point, statistics)
            slack = BOUND_ROUNDING * (1 + logits.abs() + bounds.upper.abs())
            assert (bounds.lower - slack <= logits).all()
            assert (logits <= bounds.upper + slack).all()


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), nn.Conv2d(1, 1, 3, padding="same")]
)
def test_padding_that_is_not_zeros_given_as_numbers_is_refused(layer: nn.Conv2d) -> None:
    with pytest.raises(UnsupportedLayerError, match="padding"):
        interval_bounds(layer, random_box(1, 4, 4))


class Doubled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 2 * super().forward(x)
        return out


def test_a_container_that_computes_something_else_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"Doubled at features\.1"):
        interval_bounds(Network(nn.Sequential(nn.Flatten(), Doubled(nn.ReLU())), nn.Linear(4, 2)), random_box(1, 2, 2))


def test_the_place_of_a_nested_layer_is_named() -> None:
    body = nn.Sequential(nn.ReLU(), nn.Softplus())
    network = Network(nn.Sequential(Residual(body), nn.Flatten()), nn.Linear(4, 2))
    with pytest.raises(UnsupportedLayerError, match=r"Softplus at features\.0\.body\.1"):
        interval_bounds(network, random_box(1, 2, 2))


def test_gradients_flow_through_the_bounds() -> None:
    network = Network(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU()), nn.Linear(3, 2))
    box = Interval(torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2))
    logit_difference_lower_bounds(network, box, torch.tensor([0, 1])).sum().backward()
    assert all(p.grad is not None for p in network.features.parameters())


THREADS = """
import torch
from torch import nn
from ccdist.bounds import difference_weights
torch.set_num_threads(2)
head = nn.Linear(512, 10)
labels = torch.arange(256) % 10
factors = torch.rand(256, 9, 512, generator=torch.Generator().manual_seed(0))
gradients = set()
for _ in range(60):
    weight, offset = difference_weights(head, labels)
    loss = (weight * factors).sum() + (offset * factors[..., 0]).sum()
    gradient, bias = torch.autograd.grad(loss, [head.weight, head.bias])
    gradients.add((gradient.numpy().tobytes(), bias.numpy().tobytes()))
print(len(gradients))
"""


@pytest.mark.timeout(30)
def test_the_gradient_of_the_head_is_the_same_each_time_with_two_threads() -> None:
    """In a process of its own: the tests themselves run with one thread."""
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


class BentHead(nn.Linear):
    """Not what its weights say."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.stack([0.55 - input[:, 0], 0 * input[:, 0]], 1)


class BentNetwork(Network):
    def forward(self, images: Tensor) -> Tensor:
        return -super().forward(images)


@pytest.mark.parametrize("bound", [logit_difference_lower_bounds, crown_lower_bounds])
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Network(nn.Sequential(nn.Flatten()), BentHead(1, 2)), "no rule for BentHead: its head replaces"),
        (BentNetwork(nn.Sequential(nn.Flatten()), nn.Linear(1, 2)), "no rule for BentNetwork: the network replaces"),
    ],
)
def test_a_replaced_forward_pass_is_refused(bound: Any, network: Network, message: str) -> None:
    box = epsilon_box(torch.full((1, 1, 1, 1), 0.5), 0.1)
    with pytest.raises(UnsupportedLayerError, match=message):
        bound(network, box, torch.tensor([0]))
