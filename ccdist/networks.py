"""The networks: features that end in an activation, then one linear head; normalisation is the first layer.

Networks take images in [0, 1], so bounds, attacks and verifiers share one unit. They stay in eval mode for
good: training passes its batch statistics explicitly (see `ccdist.batch_norm`), so no hidden mode decides
what a forward pass or a bound means.

Shapes: `B` batch, `C H W` image, `K` classes, `D` features.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ccdist.activations import ACTIVATIONS, Activation

Initialization = Literal["ibp", "default"]


class Normalize(nn.Module):
    """(x - mean) / std for each channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ValueError(
                f"normalisation has mean {list(mean)} and std {list(std)}; expected one positive std a channel"
            )
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Residual(nn.Module):
    """body(x) + shortcut(x); the shortcut is the identity unless given."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x) + self.shortcut(x)
        return out


class Network(nn.Module):
    """head(features(images)): any Sequential of supported layers, and its last Linear.

    Put into eval mode on construction (see the module's docstring).

    Raises:
        TypeError: the head is not a Linear layer.
    """

    def __init__(self, features: nn.Sequential, head: nn.Linear) -> None:
        super().__init__()
        if not isinstance(head, nn.Linear):
            raise TypeError(f"the head is a {type(head).__name__}; expected the network's last nn.Linear")
        self.features = features
        self.head = head
        self.eval()

    def forward(self, images: Float[Tensor, "B ..."]) -> Float[Tensor, "B K"]:
        logits: Tensor = self.head(self.features(images))
        return logits

    @property
    def num_classes(self) -> int:
        return self.head.out_features

    @property
    def num_features(self) -> int:
        """D, the size of the feature vector that the head reads."""
        return self.head.in_features


_Shape = tuple[int, int, int]
_MakeActivation = Callable[[], nn.Module]


def _normalized(layer: nn.Conv2d | nn.Linear, activation: _MakeActivation) -> list[nn.Module]:
    """The layer, batch norm over its outputs, activation."""
    if isinstance(layer, nn.Conv2d):
        return [layer, nn.BatchNorm2d(layer.out_channels), activation()]
    return [layer, nn.BatchNorm1d(layer.out_features), activation()]


def _conv_net(
    convs: Sequence[tuple[int, int, int, int]], hidden: int | None, input_shape: _Shape, activation: _MakeActivation
) -> tuple[list[nn.Module], int]:
    """Blocks of (channels, kernel, stride, padding), flattened, then a hidden linear block if asked for."""
    channels, height, width = input_shape
    layers: list[nn.Module] = []
    for out_channels, kernel, stride, padding in convs:
        layers += _normalized(nn.Conv2d(channels, out_channels, kernel, stride, padding), activation)
        channels = out_channels
        height, width = (
            (height + 2 * padding - kernel) // stride + 1,
            (width + 2 * padding - kernel) // stride + 1,
        )
        if min(height, width) < 1:
            raise ValueError(f"images of shape {input_shape} are too small for this network")
    layers.append(nn.Flatten())
    size = channels * height * width
    if hidden is None:
        return layers, size
    return layers + _normalized(nn.Linear(size, hidden), activation), hidden


def _mlp(width: int, input_shape: _Shape, activation: _MakeActivation) -> tuple[list[nn.Module], int]:
    first, second = nn.Linear(math.prod(input_shape), width), nn.Linear(width, width)
    return [nn.Flatten(), *_normalized(first, activation), *_normalized(second, activation)], width


def _cnn3(width: int, input_shape: _Shape, activation: _MakeActivation) -> tuple[list[nn.Module], int]:
    return _conv_net([(width, 5, 2, 2), (2 * width, 4, 2, 1)], None, input_shape, activation)


def _cnn5(width: int, input_shape: _Shape, activation: _MakeActivation) -> tuple[list[nn.Module], int]:
    convs = [(width, 3, 1, 1), (2 * width, 4, 2, 1), (2 * width, 4, 2, 1)]
    return _conv_net(convs, 8 * width, input_shape, activation)


def _cnn7(width: int, input_shape: _Shape, activation: _MakeActivation) -> tuple[list[nn.Module], int]:
    # On 64 x 64 images the fifth convolution has stride 2, so that the flat size stays that of CIFAR-10.
    last_stride = 2 if input_shape[1] >= 64 else 1
    convs = [
        (width, 3, 1, 1),
        (width, 3, 1, 1),
        (2 * width, 3, 2, 1),
        (2 * width, 3, 1, 1),
        (2 * width, 3, last_stride, 1),
    ]
    return _conv_net(convs, 8 * width, input_shape, activation)


def _residual_block(in_channels: int, out_channels: int, activation: _MakeActivation) -> list[nn.Module]:
    """(conv3 stride 2, batch norm, activation, conv3) + conv1 stride 2, then batch norm and activation of the sum.

    Batch norm comes after the sum and not at the end of its branches: every activation reads a normalised input, as
    in the plain networks, and the interval widths that the branches add up are divided by the deviation of that same
    sum. With batch norm in the branches IBP training of the same blocks ended lower, or diverged.
    """
    first = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
    body = nn.Sequential(*_normalized(first, activation), nn.Conv2d(out_channels, out_channels, 3, 1, 1))
    shortcut = nn.Conv2d(in_channels, out_channels, 1, 2)
    return [Residual(body, shortcut), nn.BatchNorm2d(out_channels), activation()]


def _resnet(width: int, input_shape: _Shape, activation: _MakeActivation) -> tuple[list[nn.Module], int]:
    """Two blocks, and a hidden linear layer where others average: interval bounds loosen with every layer."""
    channels, height, columns = input_shape
    # As in CNN7: one more stride on 64 x 64 images, so that the flat size stays that of CIFAR-10.
    stem_stride = 2 if height >= 64 else 1
    layers = [
        *_normalized(nn.Conv2d(channels, width, 3, stem_stride, 1), activation),
        *_residual_block(width, 2 * width, activation),
        *_residual_block(2 * width, 2 * width, activation),
        nn.Flatten(),
    ]
    reduction = 4 * stem_stride
    size = 2 * width * math.ceil(height / reduction) * math.ceil(columns / reduction)  # padded strides round up
    return layers + _normalized(nn.Linear(size, 8 * width), activation), 8 * width


# (width, image shape, maker of activations) -> (layers, their number of features)
_Builder = Callable[[int, _Shape, _MakeActivation], tuple[list[nn.Module], int]]

# name -> (builder, default width)
ARCHITECTURES: dict[str, tuple[_Builder, int]] = {
    "mlp": (_mlp, 256),
    "cnn3": (_cnn3, 16),
    "cnn5": (_cnn5, 32),
    "cnn7": (_cnn7, 64),
    "cnn7-narrow": (_cnn7, 32),
    "cnn7-wide": (_cnn7, 128),
    "resnet": (_resnet, 16),
}


def build_network(
    name: str,
    *,
    input_shape: tuple[int, int, int],
    num_classes: int,
    width: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    initialization: Initialization = "ibp",
    activation: Activation = "relu",
) -> Network:
    """A network by name, in eval mode, with batch norm and an activation after every layer but the head.

    CNN7 (width 64): conv3 64, conv3 64, conv3 128 stride 2, conv3 128, conv3 128, linear 512, head.
    CNN5: conv3 w, conv4 2w stride 2, conv4 2w stride 2, linear 8w, head. CNN3: conv5 w stride 2, conv4 2w
    stride 2, head. MLP: linear w, linear w, head. ResNet: conv3 w, two residual blocks 2w stride 2, linear 8w,
    head. The same seed gives the same weights on every device.

    Args:
        name: mlp, cnn3, cnn5, cnn7, cnn7-narrow, cnn7-wide or resnet.
        input_shape: (C, H, W).
        width: channels of the first layer (units for the mlp); None: 256, 16, 32, 64, 32, 128, 16 in that order.
        mean, std: normalisation for each channel, in pixel units; None: 0 and 1.
        initialization: "ibp" (Shi et al. 2021) or "default" (PyTorch's).
        activation: relu, leaky_relu (slope 0.01), tanh, sigmoid or gelu (exact).

    Raises:
        ValueError: the name or activation is unknown, or the images are too small for the network.

    Source: layer counts as in the public CC-IBP and CTBench codes.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(ARCHITECTURES)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    builder, default_width = ARCHITECTURES[name]
    mean = (0.0,) * input_shape[0] if mean is None else mean
    std = (1.0,) * input_shape[0] if std is None else std
    if len(mean) != input_shape[0]:
        raise ValueError(f"normalisation for {len(mean)} channels, but images have {input_shape[0]}")
    # Built without memory, then filled from the seed: constructing layers would draw from the global generator.
    with torch.device("meta"):
        layers, num_features = builder(default_width if width is None else width, input_shape, ACTIVATIONS[activation])
        head = nn.Linear(num_features, num_classes)
    network = Network(nn.Sequential(*layers), head).to_empty(device="cpu")
    initialize(network, torch.Generator().manual_seed(seed), initialization)
    network.features.insert(0, Normalize(mean, std))
    return network.eval()  # the inserted layer too


@torch.no_grad()
def initialize(network: Network, generator: torch.Generator, initialization: Initialization) -> None:
    """Fill every parameter and statistic, in module order, from the generator.

    ibp: each weight but the head's ~ N(0, (sqrt(2 pi) / fan_in)^2), so that interval widths neither explode
    nor vanish with depth; biases, batch norm and head as PyTorch has them by default. Derived for ReLU, used with
    every activation: batch norm takes the difference.

    Source: Shi et al., "Fast Certified Robust Training with Short Warmup", NeurIPS 2021.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            bound = 1 / math.sqrt(fan_in)
            if initialization == "ibp" and module is not network.head:
                module.weight.normal_(0, math.sqrt(2 * math.pi) / fan_in, generator=generator)
            else:
                module.weight.uniform_(-bound, bound, generator=generator)
            if module.bias is not None:
                module.bias.uniform_(-bound, bound, generator=generator)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_parameters()


# What a stored network may be made of: rebuilt by name from this table, never by an import path.
_LAYER_FIELDS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "conv2d": (
        nn.Conv2d,
        ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    ),
    "linear": (nn.Linear, ("in_features", "out_features")),
    "batch_norm1d": (nn.BatchNorm1d, ("num_features", "eps", "momentum", "affine", "track_running_stats")),
    "batch_norm2d": (nn.BatchNorm2d, ("num_features", "eps", "momentum", "affine", "track_running_stats")),
    "relu": (nn.ReLU, ()),
    "leaky_relu": (nn.LeakyReLU, ("negative_slope",)),
    "tanh": (nn.Tanh, ()),
    "sigmoid": (nn.Sigmoid, ()),
    "gelu": (nn.GELU, ("approximate",)),
    "flatten": (nn.Flatten, ("start_dim", "end_dim")),
    "avg_pool2d": (
        nn.AvgPool2d,
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    "identity": (nn.Identity, ()),
}


def describe(module: nn.Module) -> dict[str, Any]:
    """A network or layer as JSON values, from which `from_description` builds the same layers.

    Raises:
        TypeError: a layer has no stored form.
    """
    if isinstance(module, Network):
        return {"kind": "network", "features": describe(module.features), "head": describe(module.head)}
    if isinstance(module, nn.Sequential):
        return {"kind": "sequential", "layers": [describe(layer) for layer in module]}
    if isinstance(module, Residual):
        return {"kind": "residual", "body": describe(module.body), "shortcut": describe(module.shortcut)}
    if isinstance(module, Normalize):
        return {"kind": "normalize", "channels": module.mean.numel()}
    for kind, (layer_type, fields) in _LAYER_FIELDS.items():
        if type(module) is layer_type:
            description = {"kind": kind, **{name: getattr(module, name) for name in fields}}
            if isinstance(module, nn.Linear | nn.Conv2d):
                description["bias"] = module.bias is not None
            return description
    raise TypeError(f"no stored form for {type(module).__name__}; known: {', '.join(_LAYER_FIELDS)}")


def from_description(description: dict[str, Any]) -> nn.Module:
    """Layers as described by `describe`, with weights still to be loaded.

    Raises:
        ValueError: a kind is unknown.
    """
    options = dict(description)
    kind = options.pop("kind")
    if kind == "network":
        features, head = from_description(options["features"]), from_description(options["head"])
        if not isinstance(features, nn.Sequential) or not isinstance(head, nn.Linear):
            raise ValueError("a stored network needs sequential features and a linear head")
        return Network(features, head)
    if kind == "sequential":
        return nn.Sequential(*(from_description(layer) for layer in options["layers"]))
    if kind == "residual":
        return Residual(from_description(options["body"]), from_description(options["shortcut"]))
    if kind == "normalize":
        return Normalize([0.0] * options["channels"], [1.0] * options["channels"])
    if kind not in _LAYER_FIELDS:
        raise ValueError(f"unknown layer kind {kind!r}; known: {', '.join(_LAYER_FIELDS)}")
    return _LAYER_FIELDS[kind][0](**options)
