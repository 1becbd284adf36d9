"""The folded network against the plain one: points, intervals, statistics and every gradient."""

import copy
from collections.abc import Callable

import pytest
import strategies
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ccdist.batch_norm import Statistics, batch_norm_layers, forward, forward_collecting
from ccdist.bounds import Trace, UnsupportedLayerError, propagate
from ccdist.folded import FEWEST_CHANNELS, Dense, Fold, channels_last, folded_forward, folded_interval
from ccdist.interval import Interval, epsilon_box
from ccdist.networks import Network, Normalize, Residual, build_network

# float64, relative to the largest entry: folding multiplies weights by scales before the sums instead of after.
ROUNDING = 1e-12
# Statistics of few values may have a variance near 0, and 1 / sqrt(var + 1e-5) then multiplies an error by 300.
ROUNDING_OF_STATISTICS = 1e-9
# bfloat16 has 8 bits; what seven layers add up to.
ROUNDING_BFLOAT16 = 0.05


def assert_close(actual: Tensor, expected: Tensor, rounding: float = ROUNDING) -> None:
    assert actual.shape == expected.shape
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=rounding * (1 + largest))


def cotangent(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(x.numel()), dtype=torch.float64)


def gradients(network: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor]:
    """Of a random weighted sum of the outputs, by parameter; 0 where a parameter is not reached."""
    total = torch.stack([(cotangent(out) * out).sum() for out in outputs]).sum()
    names = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if not names:
        return {}
    found = torch.autograd.grad(total, list(names.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(names.items(), found, strict=True)
    }


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], rounding: float) -> None:
    """Relative to the network's largest entry: a bias before a batch norm has gradient 0 up to large terms."""
    largest = max((float(grad.abs().max()) for grad in expected.values()), default=0.0)
    for name, grad in expected.items():
        torch.testing.assert_close(
            actual[name], grad, rtol=0, atol=rounding * (1 + largest), msg=lambda text, name=name: f"{name}: {text}"
        )


def collected(network: Network, images: Tensor) -> Statistics:
    """Statistics without a graph; the running ones stay as they are."""
    twin, statistics = copy.deepcopy(network), {}
    forward_collecting(twin.features, images, statistics)
    pairs = zip(batch_norm_layers(network), batch_norm_layers(twin), strict=True)
    return {layer: tuple(values.detach() for values in statistics[other]) for layer, other in pairs}


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_state(module: nn.Module, expected: dict[str, Tensor]) -> None:
    assert [name for name, value in module.state_dict().items() if not torch.equal(value, expected[name])] == []


def network_case(name: str, *, width: int, shape: tuple[int, int, int] = (3, 8, 8)) -> tuple[Network, Tensor]:
    """A network of the package with weights of order one in float64, and six images."""
    channels = shape[0]
    network = build_network(
        name, width=width, input_shape=shape, num_classes=4, mean=[0.4] * channels, std=[0.25] * channels
    )
    generator = torch.Generator().manual_seed(1)
    strategies.randomize(network, generator)
    return network, torch.rand((6, *shape), generator=generator, dtype=torch.float64)


# cnn7 of width 4 has 8 channels before its linear layer, of width 2 only 4: both ways of flattening
BUILT = {"cnn7": 4, "cnn7-narrow": 2, "cnn5": 4, "resnet": 2, "mlp": 5}

# -- points


@given(case=strategies.cases(batch=5), batch_statistics=st.booleans())
def test_points_are_those_of_the_plain_network(case: strategies.Case, batch_statistics: bool) -> None:
    assert_same_points(case.network, case.images, batch_statistics)


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("name", BUILT)
def test_points_of_built_networks(name: str, batch_statistics: bool) -> None:
    assert_same_points(*network_case(name, width=BUILT[name]), batch_statistics)


def assert_same_points(network: Network, images: Tensor, batch_statistics: bool) -> None:
    statistics = collected(network, images.flip(0) ** 2) if batch_statistics else None
    before, given_images = state(network), images.clone()
    actual = folded_forward(Fold().fixed(network.features, statistics), images)
    expected = forward(network.features, images, statistics)
    assert_close(actual, expected)
    if expected.requires_grad:
        assert_same_gradients(gradients(network, [actual]), gradients(network, [expected]), ROUNDING)
    assert_state(network, before)
    assert torch.equal(images, given_images)


# -- intervals


@given(case=strategies.cases(batch=5), batch_statistics=st.booleans())
def test_intervals_are_those_of_the_plain_network(case: strategies.Case, batch_statistics: bool) -> None:
    assert_same_intervals(case.network, case.box, collected(case.network, case.images) if batch_statistics else None)


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.05])
@pytest.mark.parametrize("name", BUILT)
def test_intervals_of_built_networks(name: str, epsilon: float, batch_statistics: bool) -> None:
    network, images = network_case(name, width=BUILT[name])
    assert_same_intervals(
        network, epsilon_box(images, epsilon), collected(network, images) if batch_statistics else None
    )


def assert_same_intervals(network: Network, box: Interval, statistics: Statistics | None) -> None:
    before, lower, upper = state(network), box.lower.clone(), box.upper.clone()
    inputs: list[tuple[Tensor, Tensor]] = []
    plain_trace = Trace()
    center, radius = folded_interval(Fold().fixed(network.features, statistics), box, inputs)
    plain = propagate(network.features, box, statistics=statistics, trace=plain_trace)
    assert_close(center, plain.center)
    assert_close(radius, plain.radius)
    assert (radius >= 0).all()
    plain_inputs = [(entered.center, entered.radius) for entered in plain_trace.activation_inputs()]
    for actual, expected in zip(inputs, plain_inputs, strict=True):
        assert_close(actual[0], expected[0])
        assert_close(actual[1], expected[1])
    if plain.center.requires_grad:
        read = [center, radius, *(x for entered in inputs for x in entered)]
        plain_read = [plain.center, plain.radius, *(x for entered in plain_inputs for x in entered)]
        assert_same_gradients(gradients(network, read), gradients(network, plain_read), ROUNDING)
    assert_state(network, before)
    assert torch.equal(box.lower, lower)
    assert torch.equal(box.upper, upper)


def test_a_radius_far_below_the_centre_survives_in_float32() -> None:
    """Centre and radius apart: 1e-9 next to 0.5 is lost between two float32 bounds, not between centre and radius."""
    network = Network(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU()), nn.Linear(3, 2))
    with torch.no_grad():
        network.features[1].weight.fill_(1.0)
        network.features[1].bias.fill_(5.0)
    steps = Fold().fixed(network.features)
    center, radius = torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), 1e-9)
    for step in steps:
        center, radius = step.interval(center, radius, None)
    assert center.flatten().tolist() == [7.0] * 3
    assert radius.flatten().tolist() == pytest.approx([4e-9] * 3)


# -- statistics of the batch


@given(case=strategies.cases(batch=5), rounds=st.integers(1, 2))
def test_collecting_is_that_of_the_plain_network(case: strategies.Case, rounds: int) -> None:
    assert_same_collecting(case.network, case.images, case.box, rounds)


@pytest.mark.parametrize("name", BUILT)
def test_collecting_in_built_networks(name: str) -> None:
    network, images = network_case(name, width=BUILT[name])
    assert_same_collecting(network, images, epsilon_box(images, 0.02), 2)


def assert_same_collecting(network: Network, images: Tensor, box: Interval, rounds: int) -> None:
    """Statistics, running statistics, and gradients that reach them by a point and by an interval, as in training."""
    plain, before, given_images = copy.deepcopy(network), state(network), images.clone()
    for scale in range(1, rounds + 1):
        statistics: Statistics = {}
        plain_statistics: Statistics = {}
        fold = Fold()
        actual = folded_forward(fold.collecting(network.features, statistics), images / scale)
        expected = forward_collecting(plain.features, images / scale, plain_statistics)
    assert_close(actual, expected, ROUNDING_OF_STATISTICS)
    layers = list(zip(batch_norm_layers(network), batch_norm_layers(plain), strict=True))
    assert set(statistics) == {layer for layer, _ in layers}
    for layer, other in layers:
        for values, plain_values in zip(statistics[layer], plain_statistics[other], strict=True):
            assert_close(values, plain_values, ROUNDING_OF_STATISTICS)
        assert_close(layer.running_mean, other.running_mean, ROUNDING_OF_STATISTICS)
        assert_close(layer.running_var, other.running_var, ROUNDING_OF_STATISTICS)
        assert not torch.equal(layer.running_mean, before[_name(network, layer) + ".running_mean"])
    center, radius = folded_interval(fold.fixed(network.features, statistics), box)
    bounds = propagate(plain.features, box, statistics=plain_statistics)
    if expected.requires_grad:
        assert_same_gradients(
            gradients(network, [actual, center, radius]),
            gradients(plain, [expected, bounds.center, bounds.radius]),
            ROUNDING_OF_STATISTICS,
        )
    assert_state(network, before | {name: x for name, x in state(network).items() if "running" in name})
    assert torch.equal(images, given_images)


def _name(network: Network, layer: nn.Module) -> str:
    return next(name for name, module in network.named_modules() if module is layer)


def test_one_value_a_channel_is_refused() -> None:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
    with pytest.raises(ValueError, match="batch size that leaves at least two"):
        folded_forward(Fold().collecting(layers, {}), torch.zeros(1, 1, 2, 2))


def test_an_interval_has_no_batch_statistics() -> None:
    box = Interval(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(NotImplementedError, match="no batch statistics"):
        folded_interval(Fold().collecting(nn.Sequential(nn.BatchNorm1d(3)), {}), box)


# -- the linear layer of an image


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("channels", [1, FEWEST_CHANNELS - 1, FEWEST_CHANNELS, 12])
def test_dense_is_the_flat_product(channels: int, last: bool, bias: bool, trained: bool) -> None:
    """Of a weight that is trained and of a fixed one, for which many channels make it a convolution."""
    generator = torch.Generator().manual_seed(channels)
    layer = nn.Linear(channels * 6, 5, bias=bias).double()
    x = torch.randn(4, channels, 2, 3, generator=generator, dtype=torch.float64)
    layer.weight.requires_grad_(trained)
    x.requires_grad_()
    radius = x.detach().abs().flip(0).requires_grad_()
    given_x, given_radius = (channels_last(t) if last else t for t in (x, radius))
    dense = Dense(layer.weight, layer.bias, flattens=True)
    outputs = [dense.point(given_x), *dense.interval(given_x, given_radius, None)]
    flat = layer(x.flatten(1))
    expected = [flat, flat, F.linear(radius.flatten(1), layer.weight.abs())]
    for one, other in zip(outputs, expected, strict=True):
        assert_close(one, other)
    assert_same_gradients(gradients(layer, outputs), gradients(layer, expected), ROUNDING)
    for one, other in zip(*(_input_gradients(found, x, radius) for found in (outputs, expected)), strict=True):
        assert_close(one, other)


def _input_gradients(outputs: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    total = torch.stack([(cotangent(out) * out).sum() for out in outputs]).sum()
    return torch.autograd.grad(total, inputs, retain_graph=True)


def _refuse_images(flatten: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def flattening(x: Tensor, *args: int) -> Tensor:
        assert max(x.shape[2:]) == 1, "an image is flattened"
        return flatten(x, *args)

    return flattening


def test_many_channels_are_not_flattened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for the convolution: an image in channels-last order is not copied."""
    monkeypatch.setattr(torch.Tensor, "flatten", _refuse_images(torch.Tensor.flatten))
    x = channels_last(torch.randn(2, FEWEST_CHANNELS, 2, 2))
    assert Dense(torch.randn(3, FEWEST_CHANNELS * 4), None, flattens=True).point(x).shape == (2, 3)


# -- layers without a step of their own, and unusual orders

IMAGE = (2, 4, 4)
UNUSUAL: dict[str, Callable[[], list[nn.Module]]] = {
    "pooling": lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.AvgPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)],
    "pooling first": lambda: [nn.AvgPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.ReLU()],
    "ReLU first": lambda: [nn.ReLU(), nn.Flatten(), nn.Linear(32, 4), nn.ReLU()],
    "identity, then ReLU": lambda: [nn.Identity(), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.Flatten(), nn.ReLU()],
    "normalisation, then ReLU": lambda: [Normalize([0.5, 0.5], [0.3, 0.3]), nn.ReLU(), nn.Flatten()],
    "batch norm first": lambda: [nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(32), nn.Linear(32, 3)],
    "two ReLUs": lambda: [nn.Conv2d(2, 2, 1), nn.ReLU(), nn.ReLU(), nn.Flatten()],
    "two batch norms": lambda: [nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten()],
    "no weights in batch norm": lambda: [nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, affine=False), nn.ReLU(), nn.Flatten()],
    "groups and dilation": lambda: [nn.Conv2d(2, 4, 2, groups=2, dilation=2), nn.BatchNorm2d(4), nn.Flatten()],
    "many channels": lambda: [nn.Conv2d(2, 9, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4), nn.ReLU()],
    "nested": lambda: [nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sequential(nn.BatchNorm2d(2))), nn.ReLU(), nn.Flatten()],
    "ReLU first in a branch": lambda: [
        nn.Conv2d(2, 2, 1),
        Residual(nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 1))),
        nn.ReLU(),
        nn.Flatten(),
    ],
    "both branches": lambda: [
        Residual(
            nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 3, 2, 1)),
            nn.Sequential(nn.Conv2d(2, 3, 1, 2), nn.BatchNorm2d(3)),
        ),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
    ],
    "a branch in a branch": lambda: [
        Residual(Residual(nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()))),
        nn.Flatten(),
        nn.Linear(32, 3),
    ],
}


def repeated() -> list[nn.Module]:
    """The same convolution, batch norm, activation and linear layer in two places each."""
    conv, norm, relu, linear = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Linear(32, 32)
    return [conv, norm, relu, conv, norm, relu, nn.Flatten(), linear, relu, linear, relu]


def unusual(make: Callable[[], list[nn.Module]]) -> tuple[Network, Tensor]:
    generator = torch.Generator().manual_seed(3)
    layers = make()
    network = Network(nn.Sequential(*layers), nn.Linear(1, 2))
    network.double()
    with torch.no_grad():
        for values in (*network.parameters(), *(x for x in network.buffers() if x.is_floating_point())):
            values.copy_(torch.rand(values.shape, generator=generator, dtype=torch.float64) + 0.2)
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight.sub_(0.7)
    images = torch.rand((5, *IMAGE), generator=generator, dtype=torch.float64) - 0.3  # a first ReLU has work to do
    return network, images


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", [*UNUSUAL, "repeated"])
def test_unusual_networks(name: str, last: bool) -> None:
    """Points, intervals and statistics; what the caller gave stays as it was, also where a ReLU could overwrite it."""
    network, images = unusual(UNUSUAL.get(name, repeated))
    images = channels_last(images) if last else images
    box = Interval(images - 0.05, images + 0.05)
    assert_same_points(network, images, False)
    assert_same_intervals(network, box, None)
    if name == "repeated":
        # The statistics of a layer that stands in two places are those of its last pass: in either network.
        plain, statistics, plain_statistics = copy.deepcopy(network), {}, {}
        actual = folded_forward(Fold().collecting(network.features, statistics), images)
        assert_close(actual, forward_collecting(plain.features, images, plain_statistics), ROUNDING_OF_STATISTICS)
        for layer, other in zip(batch_norm_layers(network), batch_norm_layers(plain), strict=True):
            assert_close(statistics[layer][1], plain_statistics[other][1], ROUNDING_OF_STATISTICS)
            assert_close(layer.running_mean, other.running_mean, ROUNDING_OF_STATISTICS)
        return
    assert_same_points(network, images, True)
    assert_same_intervals(network, box, collected(network, images))
    assert_same_collecting(network, images, box, 1)


@pytest.mark.parametrize("options", [{"padding_mode": "reflect", "padding": 1}, {"padding": "same"}])
def test_a_convolution_without_rule_has_points_and_no_bounds(options: dict[str, object]) -> None:
    network, images = unusual(lambda: [nn.Conv2d(2, 2, 3, **options), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten()])
    assert_same_points(network, images, True)
    with pytest.raises(UnsupportedLayerError, match="no interval rule for Conv2d with padding"):
        folded_interval(Fold().fixed(network.features), Interval(images, images))


@pytest.mark.parametrize(
    ("layers", "place"),
    [
        ([nn.Conv2d(2, 2, 1), nn.MaxPool2d(2)], "1"),
        ([nn.Sequential(nn.ReLU(), nn.Sequential(nn.MaxPool2d(2)))], "0.1.0"),
        ([nn.ReLU(), Residual(nn.Sequential(nn.ReLU(), nn.MaxPool2d(1)))], "1.body.1"),
        ([Residual(nn.Identity(), nn.MaxPool2d(1))], "0.shortcut"),
    ],
)
def test_a_layer_without_rule_is_refused_by_its_place(layers: list[nn.Module], place: str) -> None:
    box = Interval(torch.zeros(1, *IMAGE), torch.ones(1, *IMAGE))
    features = nn.Sequential(*layers)
    for bounds in (lambda: propagate(features, box), lambda: folded_interval(Fold().fixed(features), box)):
        with pytest.raises(UnsupportedLayerError, match=f"no interval rule for MaxPool2d at {place};"):
            bounds()


# -- precision


def test_bfloat16_is_close_and_leaves_the_weights_alone() -> None:
    network, images = network_case("cnn7", width=4)
    network, images = network.float(), images.float()
    before, plain = state(network), copy.deepcopy(network)
    fold, statistics, plain_statistics = Fold(torch.bfloat16), {}, {}
    point = folded_forward(fold.collecting(network.features, statistics), images)
    expected = forward_collecting(plain.features, images, plain_statistics)
    center, radius = folded_interval(fold.fixed(network.features, statistics), epsilon_box(images, 1e-3))
    bounds = propagate(plain.features, epsilon_box(images, 1e-3), statistics=plain_statistics)
    for one, other in ((point, expected), (center, bounds.center), (radius, bounds.radius)):
        largest = float(other.detach().abs().max())
        error = float((one.detach().float() - other.detach()).abs().max())
        assert 0 < error < ROUNDING_BFLOAT16 * largest
    (point.float().sum() + center.float().sum() + radius.float().sum()).backward()
    for name, parameter in network.features.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name
    assert_state(network, before | {name: x for name, x in state(network).items() if "running" in name})
