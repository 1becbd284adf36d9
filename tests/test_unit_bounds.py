"""Bounds of single units by the window of pixels that they see: those of whole layers."""

import pytest
import torch
from strategies import deployed
from torch import nn

from ccdist.linear_bounds import has_kink
from ccdist.networks import Network, Normalize, Residual
from ccdist.proof_network import ProofNetwork, exact_region
from ccdist.proved_bounds import linear_steps, select_images
from ccdist.rounding import guarded_bounds
from ccdist.unit_bounds import _by_layers, _by_windows, unit_bounds

FLOAT64_ROUNDING = 1e-12  # of weights and offsets of about 1
EVERYTHING = 10**6


def strided() -> Network:
    """Strides that skip pixels, padding, a kernel that is not square, batch norm before and behind an activation."""
    layers = [
        Normalize([0.4, 0.5], [0.3, 0.2]),
        nn.Conv2d(2, 3, (3, 2), stride=(2, 3), padding=(1, 0)),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 4, 3, padding=2, bias=False),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4, 2, 1),
        nn.Tanh(),
        Residual(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU())),
        nn.ReLU(),
        nn.Flatten(),
    ]
    features = nn.Sequential(*layers)
    size = features(torch.zeros(2, 2, 7, 8)).shape[1]
    network = Network(features, nn.Linear(size, 3))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_(-0.6, 0.6, generator=generator)
    return network


def test_windows_are_whole_layers() -> None:
    network = strided()
    images = torch.rand((2, 2, 7, 8), generator=torch.Generator().manual_seed(1))
    case = deployed(0)
    proof, region = ProofNetwork.of(network), exact_region(images, case.threat)
    guarded = select_images(guarded_bounds(proof, region), torch.tensor([1]))
    steps, compared = linear_steps(guarded), 0
    for number, step in enumerate(guarded.steps[:9]):
        shape = step.box.lower.shape[1:]
        if not (has_kink(step.layer) or isinstance(step.layer, nn.Tanh)):
            continue
        units = torch.arange(shape.numel())
        some, whole = _by_windows(steps[:number], shape, units), _by_layers(proof, steps[:number], number, shape, units)
        pixels = whole.weights.shape[2]
        spread = torch.zeros(2, len(units), pixels + 1, dtype=torch.float64)
        spread.scatter_add_(2, some.support.expand(2, -1, -1), some.weights)
        assert torch.allclose(spread[..., :pixels], whole.weights, atol=FLOAT64_ROUNDING)
        assert (spread[..., pixels] == 0).all()
        assert torch.allclose(some.offset, whole.offset, atol=FLOAT64_ROUNDING)
        compared += len(units)
    assert compared > 100


@pytest.mark.parametrize("chunk", [2, EVERYTHING])
def test_units_behind_a_residual_have_bounds_too(chunk: int) -> None:
    network = strided()
    images = torch.rand((1, 2, 7, 8), generator=torch.Generator().manual_seed(2))
    proof, region = ProofNetwork.of(network), exact_region(images, deployed(0).threat)
    guarded = guarded_bounds(proof, region)
    steps = linear_steps(guarded)
    number = max(index for index, step in enumerate(guarded.steps) if has_kink(step.layer))
    shape = guarded.steps[number].box.lower.shape[1:]
    units = torch.arange(0, shape.numel(), 3)
    found = unit_bounds(proof, steps[:number], number, shape, units, chunk)
    whole = _by_layers(proof, steps[:number], number, shape, units)
    assert torch.allclose(found.least(region), whole.least(region), atol=FLOAT64_ROUNDING)


def test_no_units() -> None:
    case = deployed(3)
    proof = ProofNetwork.of(case.network)
    guarded = select_images(guarded_bounds(proof, exact_region(case.images, case.threat)), torch.tensor([0]))
    number = next(index for index, step in enumerate(guarded.steps) if has_kink(step.layer))
    shape = guarded.steps[number].box.lower.shape[1:]
    nothing = torch.zeros(0, dtype=torch.long)
    found = unit_bounds(proof, linear_steps(guarded)[:number], number, shape, nothing, 8)
    assert found.offset.shape == (2, 0)
