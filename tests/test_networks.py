"""The networks: exact sizes, seeds, IBP initialisation, stored form, refusals."""

import json
import math
from typing import get_args

import oracles
import pytest
import strategies
import torch
from contracts import BOUND_ROUNDING
from hypothesis import given
from torch import Tensor, nn

from ccdist.activations import ACTIVATION_LAYERS, Activation
from ccdist.batch_norm import forward_collecting
from ccdist.bounds import elided_lower_bounds, logit_difference_lower_bounds, logit_differences, propagate
from ccdist.interval import epsilon_box
from ccdist.linear_bounds import crown_lower_bounds
from ccdist.networks import ARCHITECTURES, Network, Normalize, Residual, build_network, describe, from_description

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@pytest.fixture(scope="module")
def cnn7() -> Network:
    return build_network("cnn7", input_shape=(3, 32, 32), num_classes=10, mean=MEAN, std=STD)


def test_cnn7_has_17_19_million_parameters(cnn7: Network) -> None:
    # weights + biases of the convolutions:      27*64+64, 576*64+64, 576*128+128, 2 * (1152*128+128)
    # the linear layers:                         32768*512+512, 512*10+10;  batch norm: 2 * (64+64+128+128+128+512)
    convolutions = 1792 + 36928 + 73856 + 2 * 147584
    linear = 16777728 + 5130
    expected = convolutions + linear + 2 * 1024
    assert expected == 17_192_650
    assert sum(p.numel() for p in cnn7.parameters()) == expected


def test_cnn7_layer_by_layer(cnn7: Network) -> None:
    table: list[tuple[object, ...]] = []
    for layer in cnn7.features:
        if isinstance(layer, nn.Conv2d):
            table.append(
                ("conv", layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
            )
        elif isinstance(layer, nn.Linear):
            table.append(("linear", layer.in_features, layer.out_features))
        else:
            table.append((type(layer).__name__,))

    def block(inputs: int, outputs: int, stride: int) -> list[tuple[object, ...]]:
        convolution = ("conv", inputs, outputs, (3, 3), (stride, stride), (1, 1))
        return [convolution, ("BatchNorm2d",), ("ReLU",)]

    expected = [("Normalize",), *block(3, 64, 1), *block(64, 64, 1), *block(64, 128, 2), *block(128, 128, 1)]
    expected += [*block(128, 128, 1), ("Flatten",), ("linear", 32768, 512), ("BatchNorm1d",), ("ReLU",)]
    assert table == expected
    assert (cnn7.head.in_features, cnn7.head.out_features, cnn7.num_features, cnn7.num_classes) == (512, 10, 512, 10)
    assert all(layer.bias is not None for layer in cnn7.modules() if isinstance(layer, nn.Conv2d | nn.Linear))
    norms = [layer for layer in cnn7.modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert {(layer.eps, layer.momentum) for layer in norms} == {(1e-5, 0.1)}


@pytest.mark.parametrize(
    ("shape", "flat_of_width_8"),
    # the published flat sizes are of width 64, eight times these
    [((3, 32, 32), 32768 // 8), ((1, 28, 28), 25088 // 8), ((3, 64, 64), 32768 // 8)],
)
def test_flat_size_of_cnn7(shape: tuple[int, int, int], flat_of_width_8: int) -> None:
    network = build_network("cnn7", input_shape=shape, num_classes=7, width=8)
    (first, head) = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    assert (first.in_features, first.out_features) == (flat_of_width_8, 64)
    assert (head.in_features, head.out_features) == (64, 7)
    assert network(torch.rand(2, *shape)).shape == (2, 7)


def some_images(*shape: int) -> Tensor:
    return torch.rand(4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


SHAPES = [(3, 32, 32), (1, 28, 28), (1, 8, 8), (3, 64, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_takes_a_training_step_at_every_size(name: str, shape: tuple[int, int, int]) -> None:
    network = build_network(name, input_shape=shape, num_classes=3, width=2).double()
    images, labels = some_images(*shape), torch.tensor([0, 1, 2, 0])
    statistics: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    logits = forward_collecting(network, images, statistics)
    features = propagate(network.features, epsilon_box(images, 2 / 255), statistics=statistics)
    bounds = elided_lower_bounds(network.head, features, labels)
    (nn.functional.cross_entropy(logits, labels) - bounds.mean()).backward()
    assert (bounds <= logit_differences(logits, labels) + BOUND_ROUNDING).all()
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert set(statistics) == set(norms)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("name", ["cnn5", "resnet"])
def test_every_activation_is_bounded_by_ibp_and_crown(name: str, activation: Activation) -> None:
    network = build_network(name, input_shape=(1, 8, 8), num_classes=3, width=2, activation=activation)
    network, images, labels = network.double(), some_images(1, 8, 8), torch.tensor([0, 1, 2, 0])
    box = epsilon_box(images, 2 / 255)
    ibp, crown = logit_difference_lower_bounds(network, box, labels), crown_lower_bounds(network, box, labels)
    assert (crown >= ibp).all()
    assert (crown <= logit_differences(network(images), labels) + BOUND_ROUNDING).all()


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_features_end_in_the_activation_and_each_reads_a_normalised_input(name: str, activation: Activation) -> None:
    network = build_network(name, input_shape=(1, 8, 8), num_classes=3, width=2, activation=activation)
    kind = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU}
    layers = [layer for layer in network.features.modules() if not any(layer.children())]
    places = [place for place, layer in enumerate(layers) if isinstance(layer, ACTIVATION_LAYERS)]
    # a flatten may follow: it moves values, nothing more
    assert [type(layer) for layer in layers[places[-1] + 1 :]] in ([], [nn.Flatten])
    assert {type(layers[place]) for place in places} == {kind[activation]}
    assert all(isinstance(layers[place - 1], nn.BatchNorm1d | nn.BatchNorm2d) for place in places)


def test_the_residual_network_block_by_block() -> None:
    network = build_network("resnet", input_shape=(3, 32, 32), num_classes=10)
    found = []
    for block in network.features:
        if isinstance(block, Residual):
            assert isinstance(block.body, nn.Sequential)
            first, last = block.body[0], block.body[-1]
            assert isinstance(first, nn.Conv2d)
            assert isinstance(last, nn.Conv2d)
            assert isinstance(block.shortcut, nn.Conv2d)
            shortcut = (block.shortcut.kernel_size, block.shortcut.stride)
            found.append((first.in_channels, first.out_channels, last.out_channels, first.stride, *shortcut))
    assert found == [(16, 32, 32, (2, 2), (1, 1), (2, 2)), (32, 32, 32, (2, 2), (1, 1), (2, 2))]
    (hidden,) = [layer for layer in network.features if isinstance(layer, nn.Linear)]
    assert (hidden.in_features, hidden.out_features) == (32 * 8 * 8, 128)


@pytest.mark.parametrize(
    ("shape", "size"), [((3, 64, 64), 64), ((1, 28, 28), 49), ((1, 8, 8), 4), ((1, 7, 5), 4), ((1, 1, 1), 1)], ids=str
)
def test_flat_size_of_the_residual_network(shape: tuple[int, int, int], size: int) -> None:
    network = build_network("resnet", input_shape=shape, num_classes=2, width=3)
    (hidden, _) = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    assert hidden.in_features == 2 * 3 * size
    assert network(torch.rand(2, *shape)).shape == (2, 2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_runs_narrow_and_ends_in_a_relu(name: str) -> None:
    network = build_network(name, input_shape=(1, 8, 8), num_classes=10, width=4)
    features = network.features(torch.rand(3, 1, 8, 8))
    assert features.shape == (3, network.num_features)
    assert (features >= 0).all()
    assert not any(module.training for module in network.modules())


def test_default_widths() -> None:
    def first_width(name: str) -> int:
        with torch.device("meta"):  # counts only
            layers, _ = ARCHITECTURES[name][0](ARCHITECTURES[name][1], (1, 8, 8), nn.ReLU)
        layer = next(layer for layer in layers if isinstance(layer, nn.Conv2d | nn.Linear))
        return layer.weight.shape[0]

    widths = {name: first_width(name) for name in ARCHITECTURES}
    plain = {"mlp": 256, "cnn3": 16, "cnn5": 32, "cnn7": 64, "cnn7-narrow": 32, "cnn7-wide": 128}
    assert widths == {**plain, "resnet": 16}


def equal(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone() -> None:
    def small(seed: int) -> Network:
        return build_network("cnn5", input_shape=(1, 8, 8), num_classes=10, width=4, seed=seed)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = small(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert equal(first, small(0))
    assert not equal(first, small(1))


# Standard error of a sample deviation is sigma / sqrt(2 n): 5 of them. The smallest layer tested has 10^4 weights.
DEVIATIONS = 5


def test_ibp_initialisation_has_its_deviation() -> None:
    network = build_network("cnn5", input_shape=(3, 16, 16), num_classes=10, width=32)
    layers = [layer for layer in network.features if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer in layers[1:]:
        count, fan_in = layer.weight.numel(), layer.weight[0].numel()
        weight = layer.weight.detach()
        expected = math.sqrt(2 * math.pi) / fan_in
        assert count > 10_000
        assert abs(float(weight.std()) / expected - 1) < DEVIATIONS / math.sqrt(2 * count)
        assert abs(float(weight.mean())) < DEVIATIONS * expected / math.sqrt(count)
        assert layer.bias is not None
        assert float(layer.bias.detach().abs().max()) <= 1 / math.sqrt(fan_in)


def test_head_biases_and_batch_norm_are_pytorch_s_own() -> None:
    network = build_network("cnn5", input_shape=(3, 16, 16), num_classes=10, width=32)
    bound = 1 / math.sqrt(network.num_features)
    assert float(network.head.weight.detach().abs().max()) <= bound
    # a uniform weight on [-b, b] has deviation b / sqrt(3); 2560 of them
    assert float(network.head.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            assert torch.equal(layer.weight, torch.ones_like(layer.weight))
            assert not layer.bias.any()
            assert not layer.running_mean.any()
            assert torch.equal(layer.running_var, torch.ones_like(layer.running_var))


def test_default_initialisation_is_uniform_by_fan_in() -> None:
    network = build_network("cnn5", input_shape=(3, 16, 16), num_classes=10, width=32, initialization="default")
    for layer in network.features:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            assert bound * 0.98 < float(layer.weight.detach().abs().max()) <= bound


def test_normalisation_comes_first() -> None:
    network = build_network("mlp", input_shape=(3, 2, 2), num_classes=2, width=4, mean=MEAN, std=STD)
    x = torch.rand(2, 3, 2, 2)
    for channel in range(3):
        expected = (x[:, channel] - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(network.features[0](x)[:, channel], expected)


def through_json(module: nn.Module) -> nn.Module:
    return from_description(json.loads(json.dumps(describe(module))))


@given(drawn=strategies.networks())
def test_a_stored_form_gives_the_same_function(drawn: tuple[Network, tuple[int, int, int], int]) -> None:
    network, shape, seed = drawn
    rebuilt = through_json(network).double()
    rebuilt.load_state_dict(network.state_dict(), strict=True)
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.equal(rebuilt(x), network(x))
    assert not any(module.training for module in rebuilt.modules())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect", bias=False),
        nn.Conv2d(2, 2, (1, 3), (2, 1), dilation=(1, 2), groups=2),
        nn.Conv2d(1, 1, 3, padding="same"),
        nn.AvgPool2d(2, divisor_override=3),
        nn.AvgPool2d((2, 1), 1, (1, 0), True, False),
        nn.BatchNorm2d(2, 1e-3, 0.3, affine=False),
        nn.BatchNorm1d(2, momentum=None),
        nn.Flatten(2, -1),
        nn.LeakyReLU(0.3),
        nn.GELU(approximate="tanh"),
    ],
)
def test_no_option_of_a_layer_is_lost(layer: nn.Module) -> None:
    assert repr(through_json(layer)).replace("[", "(").replace("]", ")") == repr(layer)
    rebuilt = through_json(layer)
    assert rebuilt.state_dict().keys() == layer.state_dict().keys()
    if isinstance(layer, nn.AvgPool2d):
        assert isinstance(rebuilt, nn.AvgPool2d)
        assert (rebuilt.divisor_override, rebuilt.count_include_pad) == (
            layer.divisor_override,
            layer.count_include_pad,
        )


def test_refusals() -> None:
    with pytest.raises(ValueError, match="unknown network 'vgg'; known: mlp, cnn3"):
        build_network("vgg", input_shape=(1, 8, 8), num_classes=2)
    unchecked = build_network.__wrapped__  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="unknown activation 'swish'; known: relu, leaky_relu"):
        unchecked("mlp", input_shape=(1, 8, 8), num_classes=2, activation="swish")
    with pytest.raises(ValueError, match="normalisation for 3 channels, but images have 1"):
        build_network("mlp", input_shape=(1, 8, 8), num_classes=2, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="one positive std a channel"):
        build_network("mlp", input_shape=(1, 8, 8), num_classes=2, mean=[0.5], std=[0.0])
    with pytest.raises(ValueError, match="too small"):
        build_network("cnn3", input_shape=(1, 1, 1), num_classes=2)
    with pytest.raises(TypeError, match=r"the head is a ReLU; expected .*nn\.Linear"):
        Network.__init__.__wrapped__(Network.__new__(Network), nn.Sequential(), nn.ReLU())  # type: ignore[attr-defined]


def test_refusals_of_stored_forms() -> None:
    with pytest.raises(TypeError, match="no stored form for MaxPool2d; known: conv2d"):
        describe(nn.Sequential(nn.MaxPool2d(2)))
    with pytest.raises(ValueError, match="unknown layer kind 'lstm'; known: conv2d"):
        from_description({"kind": "lstm"})
    with pytest.raises(ValueError, match="sequential features and a linear head"):
        from_description({"kind": "network", "features": {"kind": "relu"}, "head": {"kind": "relu"}})


def test_residual_adds_body_and_shortcut() -> None:
    body, shortcut = nn.Linear(3, 2), nn.Linear(3, 2)
    x = torch.rand(4, 3)
    assert torch.equal(Residual(body, shortcut)(x), body(x) + shortcut(x))
    square = nn.Linear(3, 3)
    assert torch.equal(Residual(square)(x), square(x) + x)


@given(case=strategies.cases(affine=True))
def test_networks_without_activations_are_their_dense_matrix(case: strategies.Case) -> None:
    matrix, offset = oracles.dense(case.network, tuple(case.images.shape[1:]))
    expected: Tensor = case.images.flatten(1) @ matrix.T + offset
    torch.testing.assert_close(case.network(case.images), expected, rtol=1e-10, atol=1e-10)  # float64, short sums


def test_normalize_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="one positive std a channel"):
        Normalize([0.1, 0.2], [1.0])
