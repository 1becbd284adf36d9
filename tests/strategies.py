"""Hypothesis strategies: small random networks of every supported layer, boxes of images, labels."""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from ccdist.config import ThreatModel
from ccdist.counterexamples import inner_region, pulled_inside
from ccdist.interval import Interval
from ccdist.networks import Network, Normalize, Residual
from ccdist.proof_network import ProofNetwork, exact_region
from ccdist.threats import Norm, Region

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


@dataclass(frozen=True)
class Deployed:
    """A network as deployed, float32 images with labels, and what they are perturbed by."""

    network: Network
    images: Tensor
    labels: Tensor
    threat: ThreatModel
    proof: ProofNetwork
    region: Region  # float64

    @classmethod
    def of(cls, network: Network, images: Tensor, labels: Tensor, threat: ThreatModel) -> "Deployed":
        proof = ProofNetwork.of(network, tuple(images.shape[1:]))
        return cls(network, images, labels, threat, proof, exact_region(images, threat))

    def points(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, B, ...] perturbed images: uniform and corners, or inside and on the surface of a ball."""
        region = inner_region(self.images, self.threat.norm, self.threat.epsilon)
        noise = 2 * torch.rand((count, *self.images.shape), generator=generator, dtype=self.images.dtype) - 1
        noise[count // 2 :] = noise[count // 2 :].sign()
        if isinstance(region, Interval):
            return torch.clamp(self.images + float(self.threat.epsilon) * noise, region.lower, region.upper)
        noise[: count // 2] = noise[: count // 2] ** 5  # few pixels
        lengths = torch.linalg.vector_norm(noise.flatten(2), dim=2).view(count, -1, 1, 1, 1)
        return torch.stack([region.project(self.images + 2 * region.epsilon * n) for n in noise / lengths])

    def attacked(self, steps: int) -> list[Tensor]:
        """Iterates down the least margin, each in the region."""
        region = inner_region(self.images, self.threat.norm, self.threat.epsilon)
        size, points = 0.5 * float(self.threat.epsilon), [self.images]
        for _ in range(steps):
            x = points[-1].detach().requires_grad_()
            logits = self.network(x)
            own = logits.gather(1, self.labels[:, None]).squeeze(1)
            margins = own - logits.scatter(1, self.labels[:, None], -torch.inf).amax(1)
            (gradient,) = torch.autograd.grad(margins.sum(), x)
            points.append(pulled_inside(x.detach() - size * gradient.sign(), region).detach())
        return points


CONVEX_KINKS = [nn.ReLU(), nn.ReLU(), nn.LeakyReLU(0.3), nn.LeakyReLU(-0.4)]
SMOOTH = [nn.Tanh(), nn.Sigmoid(), nn.GELU()]


def deployed(
    seed: int,
    *,
    activations: Sequence[nn.Module] = CONVEX_KINKS,
    norm: Norm | None = None,
    batch: int = 2,
    double: bool | None = None,
) -> Deployed:
    """Drawn by the seed alone: an MLP or convolutions of any geometry, with images, labels that are mostly predicted.

    Activations are drawn layer by layer; None draws a norm, or a precision.
    """
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def activation() -> nn.Module:
        return copy.deepcopy(draw.choice(activations))

    convolutional = draw.random() < 0.6
    channels, height, width = (
        (draw.randint(1, 2), draw.randint(4, 7), draw.randint(4, 7)) if convolutional else (1, 1, 4)
    )
    shape = (channels, height, width)
    layers: list[nn.Module] = [copy.deepcopy(NORMALIZE[channels])] if draw.random() < 0.5 else []
    if convolutional:
        layers += _drawn_convolutions(draw, channels, activation)
        if draw.random() < 0.3 and _side(layers, shape) >= 2:
            layers.append(nn.AvgPool2d(2, draw.randint(1, 2), draw.randint(0, 1)))
    layers.append(nn.Flatten())
    size = num_features(layers, shape)
    for _ in range(draw.randint(0, 1) if convolutional else draw.randint(1, 3)):
        hidden = draw.randint(3, 7)
        layers += [nn.Linear(size, hidden), *([nn.BatchNorm1d(hidden)] if draw.random() < 0.3 else []), activation()]
        if draw.random() < 0.3:
            shortcut = draw.choice(
                [None, nn.Linear(hidden, hidden), nn.Sequential(nn.Linear(hidden, hidden), activation())]
            )
            layers.append(Residual(nn.Sequential(nn.Linear(hidden, hidden), activation()), shortcut))
        size = hidden
    network = randomize(Network(nn.Sequential(*layers), nn.Linear(size, draw.randint(2, 4))), generator)
    if not (draw.random() < 0.3 if double is None else double):
        network = network.float()
    images = torch.rand((batch, *shape), generator=generator).to(network.head.weight.dtype)
    with torch.no_grad():
        labels = network(images).argmax(1)
    labels[0] = draw.randrange(network.num_classes)
    norm = norm or draw.choice(["linf", "linf", "l2"])
    epsilon = Fraction(draw.choice([1, 10, 50, 150, 400]), 1000) * (2 if norm == "l2" else 1)
    return Deployed.of(network, images, labels, ThreatModel(norm=norm, epsilon=epsilon))


def _drawn_convolutions(draw: random.Random, channels: int, activation: Callable[[], nn.Module]) -> list[nn.Module]:
    """One or two, of any stride, padding, dilation and groups that a 4 x 4 image allows; then perhaps a residual."""
    layers: list[nn.Module] = []
    for number in range(draw.randint(1, 2)):
        out = channels * draw.randint(1, 2)
        kernel, dilation = (
            ((draw.randint(1, 3), draw.randint(1, 3)), draw.randint(1, 2)) if number == 0 else ((1, 2), 1)
        )
        padding = (draw.randint(0, 2), draw.randint(1, 2)) if number else (draw.randint(1, 2), draw.randint(1, 2))
        stride = (draw.randint(1, 2), draw.randint(1, 3)) if draw.random() < 0.5 else draw.randint(1, 2)
        groups = draw.choice([1, channels])
        layers.append(nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias=draw.random() < 0.7))
        layers += [nn.BatchNorm2d(out)] if draw.random() < 0.4 else []
        layers.append(activation())
        channels = out
    if draw.random() < 0.4:
        body = nn.Sequential(nn.Conv2d(channels, 2, 3, 2, 1), nn.BatchNorm2d(2), activation(), nn.Conv2d(2, 2, 3, 1, 1))
        layers += [Residual(body, nn.Conv2d(channels, 2, 1, 2)), activation()]
    return layers
