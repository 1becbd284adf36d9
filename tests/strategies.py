"""Hypothesis strategies: small random networks of every supported layer, boxes of images, labels."""

import copy
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from ccdist.interval import Interval
from ccdist.networks import Network, Normalize, Residual

# Made here and copied in the strategies: the type check of a sequence draws from `random`, which hypothesis refuses.
NORMALIZE = {channels: Normalize([0.3] * channels, [0.4] * channels) for channels in (1, 2)}

# Every kind, and every case of its rules: leaky slopes that fall, that bend the other way.
ACTIVATIONS = [
    nn.ReLU(),
    nn.LeakyReLU(),
    nn.LeakyReLU(0.3),
    nn.LeakyReLU(-0.4),
    nn.LeakyReLU(1.5),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
]


@dataclass(frozen=True)
class Case:
    """A network in eval mode and float64, images of its size with labels, and a box around each image."""

    network: Network
    images: Tensor
    labels: Tensor
    box: Interval
    seed: int

    def __repr__(self) -> str:
        radius = float(self.box.radius.max())
        return f"Case(seed={self.seed}, images={tuple(self.images.shape)}, radius={radius:.4g}, {self.network})"


def randomize(network: Network, generator: torch.Generator) -> Network:
    """Weights of order one and batch norm statistics that are neither 0 nor 1, in float64 and eval mode."""
    network = network.double().eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.3, generator=generator)
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.weight.normal_(0, 1, generator=generator)  # negative scales too
                module.bias.normal_(0, 0.3, generator=generator)
                module.running_mean.normal_(0, 0.5, generator=generator)
                module.running_var.uniform_(0.3, 2, generator=generator)
    return network


def num_features(layers: list[nn.Module], shape: tuple[int, int, int]) -> int:
    with torch.no_grad():
        return int(nn.Sequential(*layers).eval()(torch.zeros(1, *shape)).shape[1])


@st.composite
def networks(draw: st.DrawFn, *, affine: bool = False) -> tuple[Network, tuple[int, int, int], int]:
    """(network, image shape, seed): convolutions with stride, padding, odd sizes; pooling; residuals; batch norm.

    affine: without activations, so that linear bounds are exact.
    """
    seed = draw(st.integers(0, 2**31 - 1))
    channels, height, width = draw(st.integers(1, 2)), draw(st.integers(4, 7)), draw(st.integers(4, 7))
    shape = (channels, height, width)

    def activation() -> nn.Module:
        return nn.Identity() if affine else copy.deepcopy(draw(st.sampled_from(ACTIVATIONS)))

    layers: list[nn.Module] = []
    if draw(st.booleans()):
        layers.append(copy.deepcopy(NORMALIZE[channels]))
    for _ in range(draw(st.integers(0, 2))):
        out = draw(st.integers(1, 3))
        stride, padding = draw(st.integers(1, 2)), draw(st.integers(0, 1))
        kernel = draw(st.integers(1, min(3, _side(layers, shape) + 2 * padding)))
        layers.append(nn.Conv2d(channels, out, kernel, stride, padding, bias=draw(st.booleans())))
        channels = out
        if draw(st.booleans()):
            layers.append(nn.BatchNorm2d(channels))
        layers.append(activation())
        if draw(st.booleans()):
            shortcut = draw(st.sampled_from([None, nn.Conv2d(channels, channels, 1)]))
            body = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1), activation())
            layers.append(Residual(body, shortcut))
    if draw(st.booleans()) and _side(layers, shape) >= 2:
        layers.append(nn.AvgPool2d(2, draw(st.integers(1, 2)), draw(st.integers(0, 1))))
    layers.append(nn.Flatten())
    size = num_features(layers, shape)
    if draw(st.booleans()):
        hidden = draw(st.integers(2, 5))
        layers.append(nn.Linear(size, hidden))
        if draw(st.booleans()):
            layers.append(nn.BatchNorm1d(hidden))
        layers.append(activation())
        size = hidden
    head = nn.Linear(size, draw(st.integers(2, 4)), bias=draw(st.booleans()))
    network = Network(nn.Sequential(*layers), head)
    return randomize(network, torch.Generator().manual_seed(seed)), shape, seed


def _side(layers: list[nn.Module], shape: tuple[int, int, int]) -> int:
    with torch.no_grad():
        return min(nn.Sequential(*layers).eval()(torch.zeros(1, *shape)).shape[2:])


@st.composite
def cases(draw: st.DrawFn, *, affine: bool = False, batch: int = 3) -> Case:
    network, shape, seed = draw(networks(affine=affine))
    generator = torch.Generator().manual_seed(seed + 1)
    images = torch.rand((batch, *shape), generator=generator, dtype=torch.float64)
    labels = torch.randint(network.num_classes, (batch,), generator=generator)
    epsilon = draw(st.sampled_from([0.0, 0.004, 0.03, 0.2, 1.0]))
    box = Interval((images - epsilon).clamp(0, 1), (images + epsilon).clamp(0, 1))
    return Case(network, images, labels, box, seed)


@st.composite
def tensors(draw: st.DrawFn, *shape: int, scale: float = 3.0) -> Tensor:
    """Normal float64 values from a drawn seed: cheaper to shrink than element by element."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale
