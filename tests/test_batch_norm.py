"""Explicit batch norm statistics against PyTorch's own train and eval modes."""

import copy

import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ccdist.batch_norm import (
    Statistics,
    batch_norm_layers,
    forward,
    forward_collecting,
    scale_and_shift,
)
from ccdist.folded import recompute_running_statistics
from ccdist.networks import Network, Residual

# x * scale + shift rounds differently from (x - mean) / sqrt(var + eps): float64, values below a few hundred.
ROUNDING = 1e-10


def running(network: nn.Module) -> list[Tensor]:
    return [
        values.clone()
        for layer in batch_norm_layers(network)
        for values in (layer.running_mean, layer.running_var)
        if values is not None
    ]


@given(case=strategies.cases(batch=5), rounds=st.integers(1, 3))
def test_collecting_is_train_mode(case: strategies.Case, rounds: int) -> None:
    reference = copy.deepcopy(case.network).train()
    for scale in range(1, rounds + 1):
        images = case.images / scale
        expected = reference(images)
        actual = forward_collecting(case.network, images, {})
        torch.testing.assert_close(actual, expected, rtol=ROUNDING, atol=ROUNDING)
    for actual, expected in zip(running(case.network), running(reference), strict=True):
        torch.testing.assert_close(actual, expected, rtol=ROUNDING, atol=ROUNDING)


@given(case=strategies.cases(batch=5))
def test_gradients_are_those_of_train_mode(case: strategies.Case) -> None:
    reference = copy.deepcopy(case.network).train()
    reference(case.images).square().sum().backward()
    forward_collecting(case.network, case.images, {}).square().sum().backward()
    for actual, expected in zip(case.network.parameters(), reference.parameters(), strict=True):
        assert actual.grad is not None
        # a bias before batch norm has gradient 0, up to the rounding of its large terms
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-7, atol=1e-7)


@given(case=strategies.cases(batch=5))
def test_collected_statistics_give_the_same_forward_pass(case: strategies.Case) -> None:
    statistics: Statistics = {}
    collected = forward_collecting(case.network, case.images, statistics)
    assert set(statistics) == set(batch_norm_layers(case.network))
    before = running(case.network)
    torch.testing.assert_close(forward(case.network, case.images, statistics), collected, rtol=ROUNDING, atol=ROUNDING)
    assert all(torch.equal(a, b) for a, b in zip(before, running(case.network), strict=True))


@given(case=strategies.cases())
def test_without_statistics_it_is_eval_mode(case: strategies.Case) -> None:
    assert torch.equal(forward(case.network, case.images), case.network(case.images))


def test_hand_numbers() -> None:
    # batch 1, 3: mean 2, biased variance 1, unbiased 2. weight 2, bias 5, eps 0: 2 * (x - 2) + 5 = 3, 7.
    # running mean 0 -> 0.1 * 2 = 0.2; running variance 1 -> 0.9 * 1 + 0.1 * 2 = 1.1
    layer = nn.BatchNorm1d(1, eps=0.0)
    nn.init.constant_(layer.weight, 2.0)
    nn.init.constant_(layer.bias, 5.0)
    statistics: Statistics = {}
    out = forward_collecting(layer, torch.tensor([[1.0], [3.0]]), statistics)
    assert out.flatten().tolist() == [3.0, 7.0]
    mean, variance = statistics[layer]
    assert (mean.item(), variance.item()) == (2.0, 1.0)
    assert running(layer)[0].item() == pytest.approx(0.2)
    assert running(layer)[1].item() == pytest.approx(1.1)
    scale, shift = scale_and_shift(layer, statistics)
    assert (scale.item(), shift.item()) == (2.0, 1.0)


def test_a_layer_without_weights() -> None:
    layer = nn.BatchNorm1d(2, affine=False).double()
    reference = copy.deepcopy(layer).train()
    x = torch.randn(4, 2, dtype=torch.float64)
    torch.testing.assert_close(forward_collecting(layer, x, {}), reference(x), rtol=ROUNDING, atol=ROUNDING)


def test_population_statistics_are_the_average_over_batches() -> None:
    """Exact: one layer, so that the average can be written down; the last batch is smaller and counts as one."""
    layer = nn.BatchNorm1d(2, momentum=0.3)
    network = Network(nn.Sequential(layer, nn.ReLU()), nn.Linear(2, 2)).double()
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batches = [x[:4], x[4:8], x[8:]]
    for _ in range(2):  # what was there before does not matter
        recompute_running_statistics(network, batches)
        mean = sum(batch.mean(0) for batch in batches) / 3
        variance = sum(batch.var(0) for batch in batches) / 3  # unbiased
        torch.testing.assert_close(running(network), [mean, variance], rtol=ROUNDING, atol=ROUNDING)
    assert layer.momentum == 0.3


def test_population_statistics_are_those_of_pytorch_s_cumulative_average() -> None:
    layers = [
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        Residual(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))),
    ]
    network = Network(nn.Sequential(*layers, nn.Flatten()), nn.Linear(18, 2))
    strategies.randomize(network, torch.Generator().manual_seed(0))
    reference = copy.deepcopy(network)
    for layer in batch_norm_layers(reference):
        layer.reset_running_stats()
        layer.momentum = None
    reference.train()
    batches = [torch.rand(4, 1, 5, 5, dtype=torch.float64) for _ in range(3)]
    for batch in batches:
        reference(batch)
    recompute_running_statistics(network, batches)
    torch.testing.assert_close(running(network), running(reference), rtol=ROUNDING, atol=ROUNDING)


def test_momentum_survives_an_error() -> None:
    layer = nn.BatchNorm1d(1, momentum=0.3)
    network = Network(nn.Sequential(layer), nn.Linear(1, 2))
    with pytest.raises(ValueError, match="no variance"):
        recompute_running_statistics(network, [torch.zeros(1, 1)])
    assert layer.momentum == 0.3


def test_one_value_a_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="batch size that leaves at least two"):
        forward_collecting(nn.BatchNorm1d(3), torch.zeros(1, 3), {})


def test_no_running_statistics_no_eval_mode() -> None:
    with pytest.raises(ValueError, match="without running statistics"):
        scale_and_shift(nn.BatchNorm1d(1, track_running_stats=False), None)
