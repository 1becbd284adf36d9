"""The rounding allowance: deployed forward passes and exact values stay inside; no margin of rounding is proved."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import oracles
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ccdist import rounding
from ccdist.activations import Activation
from ccdist.bounds import UnsupportedLayerError, logit_difference_lower_bounds
from ccdist.config import ThreatModel
from ccdist.interval import Interval
from ccdist.networks import Network, Residual, build_network
from ccdist.proof_network import ProofNetwork, exact_region
from ccdist.rounding import guarded_bounds, guarded_ibp, head_error
from ccdist.threats import L2Ball, Region

# A single evaluation was measured to miss by at most 0.4 of what is allowed for in the networks drawn here.
MEASURED_SHARE = 0.5
# Sums of equal terms, whose errors all have one sign: half was measured.
EQUAL_TERMS_SHARE = 0.75


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


Evaluation = tuple[Tensor, Tensor]


def deployed_pass(deployed: nn.Module, exact: nn.Module, x: Tensor, seen: list[Evaluation]) -> Tensor:
    """The deployed forward pass; (input, output) for each leaf of `exact`, batch norm being part of the layer before.

    In a folded Sequential the keys of the batch norms are missing.
    """
    if isinstance(exact, nn.Sequential):
        layers = list(deployed.named_children())
        for key, layer in exact.named_children():
            assert layers[0][0] == key
            own = layers.pop(0)[1]
            entered, x = x, deployed_pass(own, layer, x, seen)
            while layers and layers[0][0] not in exact._modules:
                x = layers.pop(0)[1](x)
                seen[-1] = (entered, x)
        assert not layers
        return x
    if isinstance(exact, Residual):
        assert isinstance(deployed, Residual)
        body = deployed_pass(deployed.body, exact.body, x, seen)
        return body + deployed_pass(deployed.shortcut, exact.shortcut, x, seen)
    seen.append((x, deployed(x)))
    return seen[-1][1]


@torch.no_grad()
def worst_share(proof: ProofNetwork, region: Region, points: Tensor) -> float:
    """Deployed evaluations stay in the boxes; returns the largest error of one layer relative to its allowance."""
    bounds = guarded_bounds(proof, region)
    seen: list[Evaluation] = []
    features = deployed_pass(proof.deployed.features, proof.exact.features, points, seen)
    worst = 0.0
    for step, (entered, left) in zip(bounds.steps, seen, strict=True):
        assert ((step.box.lower <= entered) & (entered <= step.box.upper)).all()
        assert (step.error >= 0).all()
        missed = (left - step.layer(entered.double())).abs()
        assert (missed <= step.error).all()
        worst = max(worst, float((missed / step.error.clamp(min=1e-300)).max()))
    assert ((bounds.features.lower <= features) & (features <= bounds.features.upper)).all()
    return worst


def inside(box: Interval, points: Tensor) -> Tensor:
    """float32 points next to these that lie in the float64 box."""
    points = torch.minimum(torch.maximum(points.double(), box.lower), box.upper).float()
    points = torch.where(points < box.lower, points.nextafter(torch.tensor(math.inf)), points)
    points = torch.where(points > box.upper, points.nextafter(torch.tensor(-math.inf)), points)
    assert ((box.lower <= points) & (points <= box.upper)).all()
    return points


@torch.no_grad()
def rescaled(network: Network, seed: int) -> Network:
    """A float32 copy whose weights, biases and statistics are scaled by 1e-3 to 1e3, channel by channel."""
    network = copy.deepcopy(network).float()
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        for values in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if values.is_floating_point() and not isinstance(module, rounding.Normalize):
                rows = (len(values), *(1,) * (values.dim() - 1))
                values *= 10 ** (6 * torch.rand(rows, generator=generator) - 3)
    return network


EPSILONS = ["1/1000000000000", "1/255", "1/5"]


@pytest.mark.timeout(30)
@given(drawn=strategies.networks(), scaled=st.booleans(), epsilon=st.sampled_from(EPSILONS), many=st.booleans())
def test_deployed_passes_stay_inside_and_errors_are_dominated(
    drawn: tuple[Network, tuple[int, int, int], int], scaled: bool, epsilon: str, many: bool
) -> None:
    network, shape, seed = drawn
    network = rescaled(network, seed) if scaled else network.float()
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand((33 if many else 1, *shape), generator=generator)
    proof = ProofNetwork.of(network, shape)
    region = exact_region(images, ThreatModel(epsilon=epsilon))
    assert isinstance(region, Interval)
    for points in (region.lower, region.upper, *oracles.sample_box(region, 2, generator)):
        assert worst_share(proof, region, inside(region, points)) <= MEASURED_SHARE


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["cnn3", "cnn7", "resnet"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(("count", "number"), [(1, 1), (9, 2)])
def test_architectures_in_one_and_two_threads(name: str, activation: Activation, count: int, number: int) -> None:
    normalization = {"mean": [0.5] * 3, "std": [0.2] * 3}
    network = build_network(
        name, input_shape=(3, 12, 12), num_classes=4, width=8, activation=activation, **normalization
    )
    for layer in (layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)):
        layer.running_var.mul_(0.05)
    images = torch.rand((count, 3, 12, 12), generator=torch.Generator().manual_seed(count))
    region = exact_region(images, ThreatModel(epsilon="1/1000"))
    with threads(number):
        assert worst_share(ProofNetwork.of(network), region, images) <= MEASURED_SHARE


@given(
    terms=st.sampled_from([64, 257, 1024, 4608, 32768]),
    count=st.sampled_from([1, 40]),
    kind=st.sampled_from(["signs", "positive", "equal"]),
    seed=st.integers(0, 2**31 - 1),
)
def test_long_sums(terms: int, count: int, kind: str, seed: int) -> None:
    """Equal terms are the worst known: their errors all have one sign."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(terms, 8, bias=False)
    if kind == "equal":
        images = torch.rand((count, 1, 1, 1), generator=generator).repeat(1, 1, 1, terms)
        layer.weight.data = torch.rand((8, 1), generator=generator).repeat(1, terms)
    else:
        images = torch.rand((count, 1, 1, terms), generator=generator)
        layer.weight.data = torch.rand((8, terms), generator=generator) - (0.5 if kind == "signs" else 0)
    proof = ProofNetwork.of(Network(nn.Sequential(nn.Flatten(), layer), nn.Linear(8, 2)))
    share = worst_share(proof, Interval(images.double(), images.double()), images)
    assert share <= (EQUAL_TERMS_SHARE if kind == "equal" else 0.25)


@pytest.mark.parametrize("channels", [28, 64, 256, 512])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_long_sums_of_convolutions(channels: int, order: torch.memory_format) -> None:
    """Over channels-last images some kernels add all the terms one after another."""
    layer = nn.Conv2d(channels, 8, 3, 1, 1, bias=False)
    values = torch.linspace(0.1, 1, 8)
    layer.weight.data = values.view(-1, 1, 1, 1).repeat(1, channels, 3, 3)
    network = Network(nn.Sequential(layer, nn.Flatten()), nn.Linear(8 * 16, 2))
    images = values.view(-1, 1, 1, 1).repeat(1, channels, 4, 4).contiguous(memory_format=order)
    share = worst_share(ProofNetwork.of(network), Interval(images.double(), images.double()), images)
    assert share <= EQUAL_TERMS_SHARE


SMOOTH = [nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.GELU(approximate="tanh"), nn.LeakyReLU(0.01), nn.LeakyReLU(-3.7)]


@pytest.mark.parametrize("activation", SMOOTH, ids=str)
def test_computed_activations(activation: nn.Module) -> None:
    sizes = torch.logspace(-30, 4, 20_001)
    points = torch.cat([-sizes, sizes, torch.linspace(-20, 20, 40_001)]).view(-1, 1, 1, 1)
    proof = ProofNetwork.of(Network(nn.Sequential(activation, nn.Flatten()), nn.Linear(1, 2)))
    assert worst_share(proof, Interval(points.double(), points.double()), points) <= MEASURED_SHARE


@given(drawn=strategies.networks(), epsilon=st.sampled_from(["1/100", "1/2", "3"]))
def test_deployed_passes_of_a_ball_stay_inside(drawn: tuple[Network, tuple[int, int, int], int], epsilon: str) -> None:
    network, shape, seed = drawn
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand((3, *shape), generator=generator)
    proof = ProofNetwork.of(network.float(), shape)
    region = exact_region(images, ThreatModel(norm="l2", epsilon=epsilon))
    assert isinstance(region, L2Ball)
    directions = torch.randn((3, *shape), generator=generator)
    length = 0.999 * region.epsilon / directions.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    try:
        worst_share(proof, region, (images + length * directions).clamp(0, 1))
    except UnsupportedLayerError as error:  # a network that begins with pooling or an activation
        assert "no l_2 rule" in str(error)  # noqa: PT017


# --- exact arithmetic -------------------------------------------------------------------------------------------


def rational(layers: list[nn.Module], values: list[Fraction]) -> list[list[Fraction]]:
    """The outputs of Linear and ReLU layers, exactly."""
    seen = []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            rows = [[Fraction(weight) for weight in row] for row in layer.weight.tolist()]
            biases = [Fraction(bias) for bias in layer.bias.tolist()]
            values = [
                sum((a * b for a, b in zip(row, values, strict=True)), bias)
                for row, bias in zip(rows, biases, strict=True)
            ]
        elif isinstance(layer, nn.ReLU):
            values = [max(value, Fraction(0)) for value in values]
        seen.append(values)
    return seen


@given(seed=st.integers(0, 2**31 - 1), scale=st.sampled_from([1e-3, 1.0, 1e6]), width=st.sampled_from([0.0, 1e-9, 0.1]))
def test_exact_values_lie_in_the_float64_boxes_without_float32_allowance(seed: int, scale: float, width: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()]
    network = strategies.randomize(Network(nn.Sequential(*layers), nn.Linear(4, 2)), generator).float()
    layers[1].weight.data.mul_(scale)
    center = torch.rand((1, 1, 1, 3), generator=generator, dtype=torch.float64)
    region = Interval(center - width, center + width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProofNetwork, "unit", 0.0)
        bounds = guarded_bounds(ProofNetwork.of(network), region)
    boxes = [step.box for step in bounds.steps[1:]] + [bounds.features]
    ends = torch.stack([region.lower.flatten(), region.upper.flatten()])
    for corner in range(8):
        values = [Fraction(float(ends[corner >> axis & 1, axis])) for axis in range(3)]
        for box, exact in zip(boxes, rational(layers, values), strict=True):
            for low, value, high in zip(box.lower.flatten(), exact, box.upper.flatten(), strict=True):
                assert Fraction(float(low)) <= value <= Fraction(float(high))


@given(
    seed=st.integers(0, 2**31 - 1),
    hidden=st.sampled_from([1, 3, 64]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    ulps=st.sampled_from([-100, -2, -1, 0, 1, 2]),
    epsilon=st.sampled_from(["1/1000000000000", "1/255", "8/255", "1/10"]),
)
def test_margins_near_zero_are_never_certified_and_clear_ones_are(
    seed: int, hidden: int, scale: float, ulps: int, epsilon: str
) -> None:
    """z0 = sum of relu(w x + b) with w >= 0 is least at the lower corner; z1 is a number some ulps beside that."""
    generator = torch.Generator().manual_seed(seed)
    first, head = nn.Linear(2, hidden), nn.Linear(hidden, 2)
    images = 0.2 + 0.8 * torch.rand((1, 1, 1, 2), generator=generator)
    threat = ThreatModel(epsilon=epsilon)
    corner = [max(Fraction(value) - threat.epsilon, Fraction(0)) for value in images.flatten().tolist()]
    with torch.no_grad():
        first.weight.copy_(scale * torch.rand((hidden, 2), generator=generator))
        first.bias.copy_(scale * torch.rand(hidden, generator=generator))
        head.weight.zero_()
        head.weight[0] = torch.rand(hidden, generator=generator)
        head.bias.zero_()
        least = rational([first, nn.ReLU(), head], corner)[-1][0]
        threshold = torch.tensor(float(least))
        for _ in range(abs(ulps)):
            threshold = threshold.nextafter(torch.tensor(math.copysign(math.inf, ulps)))
        head.bias[1] = threshold
    network = Network(nn.Sequential(nn.Flatten(), first, nn.ReLU()), head)
    margin = least - Fraction(float(threshold))
    if abs(ulps) <= 2 or margin <= 0:
        assert not certified(network, images, threat)
    with torch.no_grad():
        head.bias[1] = float(least) * (1 - 1e-3)
    assert certified(network, images, threat)


# --- networks that a bound in float32 certified, and a float32 forward pass contradicts -----------------------------


def certified(network: Network, images: Tensor, threat: ThreatModel, label: int = 0) -> bool:
    lower, allowance = guarded_ibp(
        ProofNetwork.of(network), exact_region(images, threat), torch.full((len(images),), label)
    )
    assert (allowance >= 0).all()
    return bool((lower > allowance).all())


POINT = ThreatModel(epsilon="1/1000000000000")  # next to nothing


def test_hidden_biases_that_cancel() -> None:
    """x + 2^23 - 2^23: exact 0.4, in float32 a whole number; the threshold 0.2 is below one and above the other."""
    layers = [nn.Linear(1, 1), nn.Linear(1, 1)]
    head = nn.Linear(1, 2)
    with torch.no_grad():
        for layer, bias in zip(layers, (2.0**23, -(2.0**23)), strict=True):
            layer.weight.fill_(1)
            layer.bias.fill_(bias)
        head.weight.copy_(torch.tensor([[1.0], [0.0]]))
        head.bias.copy_(torch.tensor([0.0, 0.2]))
    network = Network(nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU()), head)
    image = torch.full((1, 1, 1, 1), 0.4)
    region = exact_region(image, POINT)
    exact = logit_difference_lower_bounds(ProofNetwork.of(network).exact, region, torch.tensor([0]))
    assert exact.item() == pytest.approx(0.2, abs=1e-7)
    assert network(image).argmax().item() == 1
    assert not certified(network, image, POINT)


def test_a_batch_norm_that_magnifies_a_bias() -> None:
    """Batch norm takes 10 off and divides by 0.003: what rounding did to 10 + 0.01 x is magnified with the rest."""
    conv, norm, head = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=1e-12), nn.Linear(1, 2)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    pixel = 0.3
    with torch.no_grad():
        conv.weight.fill_(0.01)
        conv.bias.fill_(10)  # type: ignore[union-attr]
        norm.running_mean.fill_(10)
        norm.running_var.fill_(9e-6)
        head.weight.copy_(torch.tensor([[1.0], [0.0]]))
        head.bias.zero_()
    network = Network(nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten()), head)
    image = torch.full((1, 1, 1, 1), pixel)
    proof = ProofNetwork.of(network)
    with torch.no_grad():
        exact, computed = float(proof.exact(image.double())[0, 0]), float(network(image)[0, 0])
        assert abs(exact - computed) > 1e-5 * exact  # far more than the folded terms of order 1 would explain
        head.bias[1] = (exact + computed) / 2
    assert not certified(network, image, POINT, label=0 if exact > computed else 1)
    with torch.no_grad():
        head.bias[1] = exact - 0.01
    assert certified(network, image, POINT)


def test_the_deep_tail_of_gelu() -> None:
    """gelu(-5.5) = -1e-7 is computed in float32 with an error of its own size; times 1e6 that is a logit."""
    first, head = nn.Linear(1, 1), nn.Linear(1, 2)
    with torch.no_grad():
        first.weight.fill_(1)
        first.bias.fill_(-6)
        head.weight.copy_(torch.tensor([[1e6], [0.0]]))
        head.bias.zero_()
    network = Network(nn.Sequential(nn.Flatten(), first, nn.GELU()), head)
    image = torch.linspace(0.3, 0.7, 64).view(-1, 1, 1, 1)
    with torch.no_grad():
        exact = ProofNetwork.of(network).exact(image.double())[:, 0]
        missed = (network(image)[:, 0] - exact).abs()
        worst = int(missed.argmax())
        assert missed[worst] > 0.3 * exact[worst].abs()
        head.bias[1] = float(network(image)[worst, 0] + exact[worst]) / 2
    label = 0 if exact[worst] > head.bias[1] else 1
    assert not certified(network, image[worst : worst + 1], POINT, label)


def test_values_that_may_overflow_float32_certify_nothing() -> None:
    first, second, head = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 2)
    with torch.no_grad():
        for layer, weight in ((first, 1e30), (second, 1e30)):
            layer.weight.fill_(weight)
            layer.bias.zero_()
        head.weight.copy_(torch.tensor([[1.0], [0.0]]))
        head.bias.zero_()
    network = Network(nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU()), head)
    assert not certified(network, torch.ones(1, 1, 1, 1), POINT)


# --- the interface ------------------------------------------------------------------------------------------------


def test_steps_and_head_error_by_hand() -> None:
    """x = 1: hidden 2 x + 1 = 3 from terms of size 3; logits 4 h = 12 and -h = -3, terms of 12 and 3."""
    first, head = nn.Linear(1, 1), nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        first.weight.fill_(2)
        first.bias.fill_(1)
        head.weight.copy_(torch.tensor([[4.0], [-1.0]]))
    proof = ProofNetwork.of(Network(nn.Sequential(nn.Flatten(), first, nn.ReLU()), head))
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    bounds = guarded_bounds(proof, Interval(one, one))
    assert [type(step.layer) for step in bounds.steps] == [nn.Flatten, nn.Linear, nn.ReLU]
    flat, linear, relu = (step.error.item() for step in bounds.steps)
    unit = 13 * 2.0**-24 + 2.0**-32
    assert flat == 0
    assert linear == pytest.approx(3 * unit)
    assert relu == pytest.approx(3 * 2.0**-32, rel=1e-5)
    assert bounds.features.lower.item() == pytest.approx(3 - linear - relu, abs=1e-15)
    error = head_error(proof, bounds.features, torch.tensor([0]))
    assert error.item() == pytest.approx(15 * unit, rel=1e-5)


def test_a_region_in_float32_is_refused() -> None:
    proof = ProofNetwork.of(Network(nn.Sequential(nn.Flatten()), nn.Linear(1, 2)))
    image = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="float64"):
        guarded_bounds(proof, Interval(image, image))


def test_a_layer_without_a_rule_is_refused_by_name_and_place() -> None:
    network = Network(nn.Sequential(nn.Conv2d(1, 1, 3), nn.MaxPool2d(2), nn.Flatten()), nn.Linear(1, 2))
    images = torch.zeros(1, 1, 4, 4)
    with pytest.raises(UnsupportedLayerError, match=r"MaxPool2d at .*features.1"):
        guarded_bounds(ProofNetwork.of(network), exact_region(images, POINT))


def test_batch_norm_over_rows_is_refused_not_misread() -> None:
    """BatchNorm1d over dimension 1 of [B, rows, outputs] looks like one over the outputs when both are as many."""
    layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Flatten())
    images = torch.rand((1, 3, 2), dtype=torch.float64)
    with pytest.raises(UnsupportedLayerError, match=r"features\.0"):
        guarded_bounds(ProofNetwork.of(Network(layers, nn.Linear(9, 2))), Interval(images, images))
