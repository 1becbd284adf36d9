"""A 1-Lipschitz baseline for the l_2 threat: orthogonal layers and MaxMin, certified by the margin alone.

The layers' weights are kept orthogonal by a parametrisation while the network trains, and are plain weights
afterwards. A certificate never relies on that: it measures the spectral norm of every weight matrix.

Shapes: `B` batch, `C H W` image, `K` classes, `J = K - 1` other classes, `D` features.
"""

import copy
import itertools
import math
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize, skip_init
from torch.nn.utils.parametrizations import orthogonal

from ccdist.bounds import (
    UnsupportedLayerError,
    check_rules_describe,
    difference_weights,
    logit_differences,
    other_classes,
)
from ccdist.config import Config, ThreatModel
from ccdist.data import Dataset, augment, batch_indices, num_batches, to_pixels
from ccdist.networks import Network, Normalize
from ccdist.schedules import cyclic_learning_rate
from ccdist.training import NonFiniteLossError, TrainingResult

# A float32 margin is trusted when it exceeds this share of the sum of the absolute terms that make it up.
# float32 rounds each operation by 6e-8 of its size; sums of some 10^4 terms stay well inside a hundred times that.
ROUNDING_ALLOWANCE = 1e-5


class MaxMin(nn.Module):
    """Each pair of features (2i, 2i + 1) sorted: (max, min). 1-Lipschitz, and keeps the length of a gradient.

    Source: Anil et al., "Sorting out Lipschitz function approximation", ICML 2019 (GroupSort with groups of 2).
    """

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        first, second = x[:, ::2], x[:, 1::2]
        return torch.stack((torch.maximum(first, second), torch.minimum(first, second)), 2).flatten(1)


class LipschitzConfig(Config):
    """The network, a multilayer perceptron, and its training with Adam."""

    width: int = Field(256, ge=2, multiple_of=2, description="units of a hidden layer, in pairs for MaxMin")
    depth: int = Field(2, ge=1, description="hidden layers")
    epochs: int = Field(20, ge=1)
    batch_size: int = Field(256, ge=2)
    learning_rate: float = Field(1e-2, gt=0, le=10, description="peak of a triangle over the whole training")
    offset: float = Field(
        1.25, ge=0, description="by how much the true logit is lowered in the loss, in units of sqrt(2) * epsilon"
    )
    temperature: float = Field(
        0.25, gt=0, description="logits are divided by it in the loss; small ones ask for margins"
    )
    seed: int = Field(0, ge=0, description="feeds separate generators for weights, order, augmentation")


def train_lipschitz(
    dataset: Dataset, threat: ThreatModel, config: LipschitzConfig, *, device: torch.device | str = "cpu"
) -> TrainingResult:
    """A network of orthogonal layers trained for margins that outlast the threat.

        loss = mean over B of cross-entropy((z - sqrt(2) * epsilon * offset * onehot(y)) / temperature, y)

    Two orthogonal unit rows of the head differ by a vector of length sqrt(2), so sqrt(2) * epsilon is the most that a
    difference of logits moves in the ball. Pixels enter as they are, since a division by std would be a
    Lipschitz factor.

    Args:
        threat: an l2 one.
        device: where to train; the network stays there.

    Returns:
        The network in eval mode with plain weights, without gradients; per epoch `loss` (nats), `standard_accuracy`
        of the training images on their way, `learning_rate`.

    Raises:
        NonFiniteLossError: the loss diverged.
        ValueError: the threat is not l2, or a layer is too narrow for the classes.

    Source: Li et al., "Preventing Gradient Attenuation in Lipschitz Constrained Convolutional Networks", NeurIPS 2019
    (orthogonal layers, MaxMin, margins); the offset in the loss as in Tsuzuku et al., NeurIPS 2018.
    """
    if threat.norm != "l2":
        raise ValueError(f"the threat is {threat}; certificates from a Lipschitz constant are for norm l2")
    started = time.perf_counter()
    weights, order, augmentation = _generators(config.seed, torch.device(device))
    network = _orthogonal_network(dataset, config, weights).to(device)
    data = dataset.train.to(torch.device(device))
    optimizer = torch.optim.Adam(list(network.parameters()))
    num_steps = config.epochs * num_batches(len(data), config.batch_size)
    offset = math.sqrt(2) * threat.radius * config.offset
    history: list[dict[str, float]] = []
    step = 0
    for _ in range(config.epochs):
        loss_sum, correct = torch.zeros((), device=device), torch.zeros((), device=device)
        for indices in batch_indices(len(data), config.batch_size, order):
            indices = indices.to(device)
            images = augment(
                data.images[indices], flip=dataset.flip, crop_padding=dataset.crop_padding, generator=augmentation
            )
            learning_rate = cyclic_learning_rate(step, num_steps=num_steps, peak=config.learning_rate, floor=0.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            logits, labels = network(to_pixels(images)), data.labels[indices]
            loss = offset_loss(logits, labels, offset=offset, temperature=config.temperature)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach() * len(indices)
            correct += (logits.detach().argmax(1) == labels).sum()
            step += 1
        if not math.isfinite(float(loss_sum)):
            raise NonFiniteLossError(f"the loss is not finite in epoch {len(history) + 1}; lower the learning rate")
        averages = {"loss": float(loss_sum) / len(data), "standard_accuracy": float(correct) / len(data)}
        history.append(averages | {"learning_rate": learning_rate})
    _fold(network)
    return TrainingResult(network, history, time.perf_counter() - started)


def offset_loss(
    logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"], *, offset: float, temperature: float
) -> Float[Tensor, ""]:
    """Cross-entropy with the true logit lowered by offset, at a temperature; nats, mean over the batch."""
    lowered = logits - offset * F.one_hot(labels, logits.shape[1])
    return F.cross_entropy(lowered / temperature, labels)


def _generators(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """For weights, order and augmentation."""
    places = (torch.device("cpu"), torch.device("cpu"), device)
    for index, place in enumerate(places):
        yield torch.Generator(place).manual_seed((seed * len(places) + index) % (2**63))


def _orthogonal_network(dataset: Dataset, config: LipschitzConfig, generator: torch.Generator) -> Network:
    sizes = [math.prod(dataset.input_shape), *[config.width] * config.depth]
    if config.width < dataset.num_classes:
        raise ValueError(
            f"width is {config.width} for {dataset.num_classes} classes; orthogonal rows need as many units"
        )
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [_orthogonal_linear(inputs, outputs, generator), MaxMin()]
    return Network(nn.Sequential(*layers), _orthogonal_linear(config.width, dataset.num_classes, generator))


def _orthogonal_linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A Linear whose weight the Cayley map keeps orthogonal: random from the generator, bias 0."""
    layer = skip_init(nn.Linear, inputs, outputs)
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.bias.zero_()
        nn.init.eye_(layer.weight)
    # To fill a rectangular matrix up to a square one, the library draws from the global generator; what it drew is
    # replaced, and that generator put back.
    with torch.random.fork_rng(devices=[]):
        orthogonal(layer, "weight", "cayley")
    with torch.no_grad():
        base: Tensor = layer.get_buffer("parametrizations.weight.0.base")
        nn.init.orthogonal_(base, generator=generator)
    return layer


def _fold(network: Network) -> None:
    """Replace every parametrised weight by its value."""
    for module in network.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    network.requires_grad_(False).eval()


def _layers(features: nn.Sequential) -> Iterator[tuple[str, nn.Module]]:
    if type(features).forward is not nn.Sequential.forward:
        raise UnsupportedLayerError(f"no Lipschitz constant for {type(features).__name__}; expected a plain Sequential")
    # Not named_children(), which leaves out a layer that stands in two places.
    return ((f"features.{key}", layer) for key, layer in zip(features._modules, features, strict=True))


def _gain(layer: nn.Module, name: str) -> float:
    """By how much a layer lengthens a difference of two inputs at most; of a weight matrix measured in float64."""
    if type(layer) is nn.Linear:
        weight = layer.weight.double()
        return float(torch.linalg.matrix_norm(weight, ord=2)) if weight.isfinite().all() else math.inf
    if type(layer) is Normalize:
        return float(1 / layer.std.double().min())
    if type(layer) in (MaxMin, nn.ReLU, nn.Flatten, nn.Identity):
        return 1.0
    raise UnsupportedLayerError(
        f"no Lipschitz constant for {type(layer).__name__} at {name}; known: Linear, Normalize, MaxMin, ReLU, Flatten, "
        "Identity"
    )


@torch.no_grad()
def lipschitz_constant(features: nn.Sequential) -> float:
    """L with ||f(x) - f(x')||_2 <= L ||x - x'||_2: the product of the layers' constants.

    The spectral norm of a weight matrix is computed in float64; 1 / min(std) for a normalisation; 1 for the rest.

    Raises:
        UnsupportedLayerError: a layer has no constant.
    """
    return math.prod(_gain(layer, name) for name, layer in _layers(features))


@torch.no_grad()
def certified_radius(
    network: Network, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """The l_2 radius within which exact arithmetic keeps the label.

        min over j != y of (z[y] - z[j]) / (L ||W[y] - W[j]||_2),   L the Lipschitz constant of the features

    Everything in float64; `is_certified` allows for the rounding of the network as deployed.

    Returns:
        Radii in pixel units (Euclidean), float64; 0 or below where the image is not classified as labelled.

    Raises:
        UnsupportedLayerError: a layer has no Lipschitz constant.

    Source: Tsuzuku et al., "Lipschitz-Margin Training", NeurIPS 2018.
    """
    margins, slopes = _margins_and_slopes(network, images, labels)
    radii: Tensor = margins / slopes
    return radii.amin(1)


@torch.no_grad()
def is_certified(
    network: Network, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B"], epsilon: float
) -> Bool[Tensor, " B"]:
    """Whether every point of the l_2 ball keeps its label, in the float32 arithmetic of the network too.

        z[y] - z[j] - epsilon L ||W[y] - W[j]||_2 > ROUNDING_ALLOWANCE * size for every j != y
        size = (||W[y]||_2 + ||W[j]||_2) m + |b[y]| + |b[j]|,   m >= ||f(x)||_2 + what the layers before it cancel

    m follows the lengths through the layers, m' = gain * m + ||bias||_2 from ||x||_2 + epsilon on, so that rounding
    errors of every layer are relative to it.

    Args:
        epsilon: Euclidean radius, pixel units, >= 0.

    Raises:
        ValueError: epsilon is negative or not finite.
        UnsupportedLayerError: a layer has no Lipschitz constant.
    """
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon is {epsilon}; expected a finite Euclidean radius of 0 or more")
    margins, slopes = _margins_and_slopes(network, images, labels)
    lengths = network.head.weight.double().norm(dim=1)
    bias = torch.zeros_like(lengths) if network.head.bias is None else network.head.bias.double().abs()
    others = other_classes(labels, network.num_classes)
    sizes = (lengths[labels][:, None] + lengths[others]) * _feature_length(network.features, images, epsilon)[:, None]
    sizes = sizes + bias[labels][:, None] + bias[others]
    kept: Tensor = margins - epsilon * slopes > ROUNDING_ALLOWANCE * sizes
    return kept.all(1)


def _margins_and_slopes(network: Network, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of logits [B, J], and how much each changes at most for each unit of length, in float64."""
    check_rules_describe(network)
    exact = copy.deepcopy(network).double()
    weights, _ = difference_weights(exact.head, labels)
    slopes = lipschitz_constant(exact.features) * weights.norm(dim=2)
    return logit_differences(exact(images.double()), labels), slopes


def _feature_length(features: nn.Sequential, images: Tensor, epsilon: float) -> Tensor:
    """Upper bounds [B] of the features' length, with the length of each bias added and nothing cancelled."""
    length: Tensor = torch.linalg.vector_norm(images.double().flatten(1), dim=1) + epsilon
    zero = torch.zeros_like(images[:1])
    for name, layer in _layers(features):
        out = layer(zero)
        length = _gain(layer, name) * length + float(out.double().norm())
        zero = torch.zeros_like(out)
    return length
