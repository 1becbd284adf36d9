"""The float64 copy is the deployed network, which stays as it was; the float64 region holds the exact one."""

import copy
import math
from fractions import Fraction

import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ccdist import proof_network
from ccdist.bounds import UnsupportedLayerError
from ccdist.config import ThreatModel
from ccdist.interval import Interval
from ccdist.networks import Network, Residual, build_network
from ccdist.proof_network import ProofNetwork, exact_region, rounded_up
from ccdist.threats import L2Ball

# Two ways through a network of a few layers in float64; values reach a few hundred.
FLOAT64_ROUNDING = 1e-10


def small_network() -> Network:
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3), nn.BatchNorm1d(3)]
    network = Network(nn.Sequential(*layers), nn.Linear(3, 2))
    return strategies.randomize(network, torch.Generator().manual_seed(0)).float()


@given(drawn=strategies.networks(), is_float64=st.booleans())
def test_the_exact_network_is_the_deployed_one_which_stays_as_it_was(
    drawn: tuple[Network, tuple[int, int, int], int], is_float64: bool
) -> None:
    network, shape, seed = drawn
    network = network if is_float64 else network.float()
    before = copy.deepcopy(network.state_dict())
    proof = ProofNetwork.of(network, shape)
    images = torch.rand((5, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = copy.deepcopy(network).double()(images)
    torch.testing.assert_close(proof.exact(images), expected, rtol=FLOAT64_ROUNDING, atol=FLOAT64_ROUNDING)
    torch.testing.assert_close(proof.search(images.float()).double(), expected, rtol=1e-3, atol=1e-3)
    assert proof.deployed is network
    after = network.state_dict()
    assert all(torch.equal(values, after[name]) for name, values in before.items())
    own = {values.data_ptr() for values in network.state_dict().values() if values.numel()}
    assert own.isdisjoint(values.data_ptr() for values in proof.exact.state_dict().values() if values.numel())
    assert not any(values.requires_grad for values in proof.exact.parameters())
    assert not any(module.training for copied in (proof.exact, proof.search) for module in copied.modules())


def test_only_the_batch_norm_right_behind_a_layer_is_folded() -> None:
    network = build_network("resnet", input_shape=(1, 8, 8), num_classes=3, width=2)
    proof = ProofNetwork.of(network, (1, 8, 8))
    kept = [layer for layer in proof.exact.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(kept) == 2  # those over the sums of the two blocks
    assert len(proof.folded) == 4
    assert all(layer in set(proof.exact.modules()) for layer in proof.folded)
    # Names of layers stay those of the deployed network.
    assert set(proof.exact.features._modules) < set(network.features._modules)


def test_a_layer_that_stands_in_two_places_is_folded_where_a_batch_norm_follows() -> None:
    shared = nn.Linear(3, 3)
    layers = nn.Sequential(nn.Flatten(), shared, nn.BatchNorm1d(3), nn.ReLU(), shared, nn.ReLU())
    network = strategies.randomize(Network(layers, nn.Linear(3, 2)), torch.Generator().manual_seed(1))
    proof = ProofNetwork.of(network, (1, 1, 3))
    assert len(proof.folded) == 1
    images = torch.rand((4, 1, 1, 3), dtype=torch.float64)
    torch.testing.assert_close(proof.exact(images), network(images), rtol=FLOAT64_ROUNDING, atol=FLOAT64_ROUNDING)


@pytest.mark.parametrize("shape", [None, (1, 4, 4)])
def test_a_wrong_fold_is_refused(shape: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(layer: nn.Module, statistics: None) -> tuple[Tensor, Tensor]:
        scale, shift = original(layer, statistics)
        return scale.float().double(), shift

    original = proof_network.scale_and_shift
    ProofNetwork.of(small_network(), shape)
    monkeypatch.setattr(proof_network, "scale_and_shift", rounded)
    with pytest.raises(ValueError, match=r"folding batch norm into .* differs by .*e-08"):
        ProofNetwork.of(small_network(), shape)


def test_batch_norm_over_rows_is_refused_where_the_shape_is_known() -> None:
    layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Flatten())
    network = strategies.randomize(Network(layers, nn.Linear(9, 2)), torch.Generator().manual_seed(2))
    with pytest.raises(ValueError, match="copy of the network differs"):
        ProofNetwork.of(network, (3, 2))


def test_train_mode_other_precisions_and_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="train mode"):
        ProofNetwork.of(small_network().train())
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=str(dtype)):
            ProofNetwork.of(small_network().to(dtype))
    mixed = small_network()
    mixed.head.double()
    with pytest.raises(ValueError, match=r"torch\.float32, torch\.float64"):
        ProofNetwork.of(mixed)
    for value in (math.nan, math.inf):
        for name in ("features.1.running_var", "head.bias"):
            network = small_network()
            network.state_dict()[name][0] = value
            with pytest.raises(ValueError, match=rf"{name} .* not finite"):
                ProofNetwork.of(network)


def test_a_network_with_a_forward_pass_of_its_own_is_refused() -> None:
    class Doubled(Network):
        def forward(self, images: Tensor) -> Tensor:
            return 2 * super().forward(images)

    with pytest.raises(UnsupportedLayerError, match="Doubled"):
        ProofNetwork.of(Doubled(nn.Sequential(nn.Flatten()), nn.Linear(1, 2)))


def test_a_residual_keeps_its_branches() -> None:
    body = nn.Sequential(nn.Conv2d(1, 1, 3, 1, 1), nn.BatchNorm2d(1))
    network = Network(nn.Sequential(Residual(body, nn.Conv2d(1, 1, 1)), nn.Flatten()), nn.Linear(9, 2))
    network = strategies.randomize(network, torch.Generator().manual_seed(3)).float()
    assert len(ProofNetwork.of(network, (1, 3, 3)).folded) == 1


@given(numerator=st.integers(0, 2**70), denominator=st.integers(1, 2**70))
def test_rounded_up_is_the_least_float_not_below(numerator: int, denominator: int) -> None:
    value = Fraction(numerator, denominator)
    rounded = rounded_up(value)
    assert Fraction(rounded) >= value
    assert rounded == 0 or Fraction(math.nextafter(rounded, -math.inf)) < value


epsilons = st.fractions(min_value="1/1000000000", max_value="999/1000") | st.sampled_from(
    [Fraction(1, 255), Fraction(8, 255), Fraction(1, 10), Fraction(2, 3)]
)
pixels = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8)


@given(epsilon=epsilons, values=pixels)
def test_the_region_holds_the_exact_box_and_little_more(epsilon: Fraction, values: list[float]) -> None:
    images = torch.tensor(values, dtype=torch.float32).view(1, 1, 1, -1)
    region = exact_region(images, ThreatModel(epsilon=epsilon))
    assert isinstance(region, Interval)
    for value, low, high in zip(values, region.lower.flatten().tolist(), region.upper.flatten().tolist(), strict=True):
        lower, upper = max(Fraction(value) - epsilon, Fraction(0)), min(Fraction(value) + epsilon, Fraction(1))
        assert Fraction(low) <= lower <= upper <= Fraction(high)
        assert 0 <= low <= high <= 1
        assert lower - Fraction(low) <= Fraction(1, 2**51)
        assert Fraction(high) - upper <= Fraction(1, 2**51)


@given(epsilon=epsilons | st.integers(1, 50), values=pixels)
def test_the_ball_and_its_box_hold_the_exact_ones_and_little_more(epsilon: Fraction | int, values: list[float]) -> None:
    images = torch.tensor(values, dtype=torch.float32).view(1, 1, 1, -1)
    ball = exact_region(images, ThreatModel(norm="l2", epsilon=str(epsilon)))
    assert isinstance(ball, L2Ball)
    assert ball.center.tolist() == images.double().tolist()
    assert epsilon <= Fraction(ball.epsilon) <= epsilon + Fraction(max(1, epsilon), 2**49)
    lower, upper = (end.flatten().tolist() for end in (ball.box.lower, ball.box.upper))
    for value, low, high in zip(values, lower, upper, strict=True):
        assert Fraction(low) <= max(Fraction(value) - epsilon, Fraction(0))
        assert Fraction(high) >= min(Fraction(value) + epsilon, Fraction(1))


def test_pixels_outside_the_range_and_other_precisions_are_refused() -> None:
    threat = ThreatModel(epsilon="1/10")
    for value in (-1e-6, 1.0001, math.nan):
        with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
            exact_region(torch.full((1, 1, 1, 1), value), threat)
    with pytest.raises(ValueError, match="bfloat16"):
        exact_region(torch.zeros((1, 1, 1, 1), dtype=torch.bfloat16), threat)
