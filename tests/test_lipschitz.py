"""The 1-Lipschitz baseline: its layers, its constant, its certificates against attacks, its training."""

import math

import oracles
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ccdist.attacks import pgd, worst_points
from ccdist.bounds import UnsupportedLayerError
from ccdist.config import DataConfig, ThreatModel, VerifyConfig
from ccdist.data import Dataset, load_dataset, to_pixels
from ccdist.lipschitz import (
    LipschitzConfig,
    MaxMin,
    certified_radius,
    is_certified,
    lipschitz_constant,
    offset_loss,
    train_lipschitz,
)
from ccdist.networks import Network, Normalize
from ccdist.threats import L2Ball
from ccdist.training import NonFiniteLossError
from ccdist.verification import accuracies, verify

# The first optimiser of a process imports torch's compiler, which takes seconds.
pytestmark = pytest.mark.timeout(30)

THREAT = ThreatModel(norm="l2", epsilon="1/2")
CONFIG = LipschitzConfig(width=32, epochs=8, batch_size=64)
# float64 products of some ten factors
ROUNDING = 1e-9


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset(DataConfig(name="digits"))


@pytest.fixture(scope="module")
def trained(dataset: Dataset) -> Network:
    return train_lipschitz(dataset, THREAT, CONFIG).network


@pytest.fixture(scope="module")
def validation(dataset: Dataset) -> tuple[Tensor, Tensor]:
    return to_pixels(dataset.validation.images), dataset.validation.labels


def random_network(seed: int) -> Network:
    """Weights that are anything but orthogonal."""
    layers = [Normalize([0.3], [0.4]), nn.Flatten(), nn.Linear(9, 6), MaxMin(), nn.Linear(6, 4, bias=False), nn.ReLU()]
    return strategies.randomize(Network(nn.Sequential(*layers), nn.Linear(4, 3)), generator(seed))


def test_max_min_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 5.0, -1.0], [0.0, 0.0, -3.0, -2.0]])
    assert MaxMin()(x).tolist() == [[2.0, 1.0, 5.0, -1.0], [0.0, 0.0, -2.0, -3.0]]


@given(x=strategies.tensors(5, 8), other=strategies.tensors(5, 8))
def test_max_min_lengthens_no_difference_and_keeps_lengths(x: Tensor, other: Tensor) -> None:
    layer = MaxMin()
    assert ((layer(x) - layer(other)).norm(dim=1) <= (x - other).norm(dim=1) * (1 + ROUNDING)).all()
    torch.testing.assert_close(layer(x).norm(dim=1), x.norm(dim=1))


def test_the_constant_by_hand() -> None:
    # 1 / 0.5, then a diagonal matrix with largest entry 3, then a rotation: 2 * 3 * 1
    stretch, turn = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        stretch.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, -1.0]]))
        turn.weight.copy_(torch.tensor([[0.6, -0.8], [0.8, 0.6]]))
    features = nn.Sequential(Normalize([0.1], [0.5]), nn.Flatten(), stretch, MaxMin(), turn, nn.ReLU())
    assert lipschitz_constant(features) == pytest.approx(6, rel=1e-6)


def test_a_layer_used_twice_counts_twice() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(3 * torch.eye(2))
    assert lipschitz_constant(nn.Sequential(nn.Flatten(), layer, MaxMin(), layer)) == pytest.approx(9)


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-3, 0.1, 3.0]))
def test_no_sampled_pair_exceeds_the_constant(seed: int, scale: float) -> None:
    network = random_network(seed)
    x = torch.rand((64, 1, 3, 3), generator=generator(seed), dtype=torch.float64)
    other = x + scale * torch.randn(x.shape, generator=generator(seed + 1), dtype=torch.float64)
    moved = (network.features(x) - network.features(other)).norm(dim=1)
    assert (moved <= lipschitz_constant(network.features) * (x - other).flatten(1).norm(dim=1) * (1 + ROUNDING)).all()


def test_a_radius_by_hand() -> None:
    # z = (x0, x1): the nearest point with x0 = x1 is |x0 - x1| / sqrt(2) away, here 0.4 / sqrt(2).
    head = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(2))
    network = Network(nn.Sequential(nn.Flatten()), head)
    images, labels = torch.tensor([[[[0.7, 0.3]]], [[[0.7, 0.3]]]]), torch.tensor([0, 1])
    radii = certified_radius(network, images, labels)
    assert radii.tolist() == pytest.approx([0.4 / math.sqrt(2), -0.4 / math.sqrt(2)], rel=1e-6)
    assert is_certified(network, images, labels, 0.282).tolist() == [True, False]
    assert is_certified(network, images, labels, 0.4 / math.sqrt(2)).tolist() == [False, False]  # within rounding


@given(seed=st.integers(0, 10_000))
def test_no_point_within_the_radius_changes_the_label(seed: int) -> None:
    network = random_network(seed)
    images = torch.rand((16, 1, 3, 3), generator=generator(seed), dtype=torch.float64)
    labels = network(images).argmax(1)
    for index, radius in enumerate(certified_radius(network, images, labels).tolist()):
        image, label = images[index : index + 1], labels[index : index + 1]
        ball = L2Ball(image, radius * (1 - 1e-6))
        points = pgd(network, label, region=ball, steps=10, step_size=0.5, generator=generator(seed))
        assert int(network(points).argmax()) == int(label)


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.0])
def test_certificates_survive_the_attack(trained: Network, validation: tuple[Tensor, Tensor], epsilon: float) -> None:
    images, labels = validation
    certified = is_certified(trained, images, labels, epsilon)
    assert certified.any()
    _, margins = worst_points(
        trained,
        images,
        labels,
        region=L2Ball(images, epsilon),
        steps=20,
        step_size=0.2,
        restarts=2,
        generator=generator(),
    )
    assert (margins[certified] > 0).all()
    assert (~certified | (certified_radius(trained, images, labels) > epsilon)).all()


def test_the_ladder_attacks_the_baseline(trained: Network, validation: tuple[Tensor, Tensor]) -> None:
    attack = {"steps": 10, "step_size": 0.25}
    config = VerifyConfig.model_validate({"threat": THREAT.model_dump(), "rungs": ["pgd"], "attack": attack})
    table = verify(trained, *validation, config)
    certified = is_certified(trained, *validation, THREAT.radius)
    falsified = torch.tensor([verdict == "falsified" for verdict in table["verdict"].to_pylist()])
    assert not (certified & falsified).any()
    assert float(certified.float().mean()) <= accuracies(table).certified_upper


def test_large_biases_that_cancel_certify_nothing() -> None:
    """Features of order 1e6 whose difference is 1e-2: float32 rounds by more."""
    first, head = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.eye(2))
        first.bias.fill_(1e6)
        head.weight.copy_(torch.eye(2))
    network = Network(nn.Sequential(nn.Flatten(), first), head)
    images, labels = torch.tensor([[[[0.9, 0.1]]]]), torch.tensor([0])
    assert float(certified_radius(network, images, labels)) > 0.5
    assert is_certified(network, images, labels, 1e-3).tolist() == [False]


def test_weights_that_are_no_numbers_certify_nothing() -> None:
    network = Network(nn.Sequential(nn.Flatten(), nn.Linear(2, 2)), nn.Linear(2, 2))
    with torch.no_grad():
        network.features[1].weight.fill_(torch.nan)
    assert is_certified(network, torch.zeros(1, 1, 1, 2), torch.tensor([0]), 1e-3).tolist() == [False]


def test_a_trained_network_is_plain_orthogonal_and_good(trained: Network, validation: tuple[Tensor, Tensor]) -> None:
    assert lipschitz_constant(trained.features) == pytest.approx(1, abs=1e-4)
    assert [type(module) for module in trained.features] == [nn.Flatten, nn.Linear, MaxMin, nn.Linear, MaxMin]
    gram = trained.head.weight.double() @ trained.head.weight.double().T
    torch.testing.assert_close(gram, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in trained.parameters())
    assert not any(module.training for module in trained.modules())
    images, labels = validation
    assert (trained(images).argmax(1) == labels).float().mean() > 0.9
    assert is_certified(trained, images, labels, THREAT.radius).float().mean() > 0.5


def test_the_seed_decides_and_the_global_generator_does_not(dataset: Dataset) -> None:
    config = CONFIG.model_copy(update={"epochs": 1})
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = train_lipschitz(dataset, THREAT, config)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    same = train_lipschitz(dataset, THREAT, config)
    other = train_lipschitz(dataset, THREAT, config.model_copy(update={"seed": 1}))
    weights = [result.network.state_dict() for result in (one, same, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["head.weight"], weights[2]["head.weight"])
    assert one.history == same.history
    assert set(one.history[0]) == {"loss", "standard_accuracy", "learning_rate"}


@given(logits=strategies.tensors(4, 5), offset=st.floats(0, 3), temperature=st.floats(0.1, 2))
def test_the_loss_is_cross_entropy_of_lowered_logits(logits: Tensor, offset: float, temperature: float) -> None:
    labels = torch.tensor([0, 1, 4, 4])
    lowered = logits.clone()
    for row, label in enumerate(labels.tolist()):
        lowered[row, label] -= offset
    loss = offset_loss(logits, labels, offset=offset, temperature=temperature)
    assert float(loss) == pytest.approx(oracles.cross_entropy(lowered / temperature, labels))


def test_refusals(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="threat is linf 1/10; certificates from a Lipschitz constant are for norm l2"):
        train_lipschitz(dataset, ThreatModel(epsilon="1/10"), CONFIG)
    with pytest.raises(ValueError, match="width is 8 for 10 classes"):
        train_lipschitz(dataset, THREAT, LipschitzConfig(width=8))
    with pytest.raises(ValueError, match="multiple of 2"):
        LipschitzConfig(width=33)
    convolution = Network(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten()), nn.Linear(4, 2))

    class Doubled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = 2 * super().forward(x)
            return out

    with pytest.raises(UnsupportedLayerError, match="no Lipschitz constant for Doubled"):
        lipschitz_constant(Doubled(nn.Flatten()))
    with pytest.raises(UnsupportedLayerError, match=r"no Lipschitz constant for Conv2d at features\.0; known: Linear"):
        certified_radius(convolution, torch.zeros(1, 1, 2, 2), torch.tensor([0]))


def test_a_loss_that_is_not_finite_stops_the_training(dataset: Dataset) -> None:
    config = CONFIG.model_copy(update={"temperature": 1e-40, "epochs": 1})
    with pytest.raises(NonFiniteLossError, match="epoch 1"):
        train_lipschitz(dataset, THREAT, config)
