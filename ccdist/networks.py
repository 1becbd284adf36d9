"""The networks: features that end in an activation, then one linear head; normalisation is the first layer.

Networks take images in [0, 1], so bounds, attacks and verifiers share one unit. They stay in eval mode for
good: training passes its batch statistics explicitly (see `ccdist.batch_norm`), so no hidden mode decides
what a forward pass or a bound means.

Shapes: `B` batch, `C H W` image, `K` classes, `D` features.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

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


def _conv_block(in_channels: int, out_channels: int, kernel: int, stride: int, padding: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    ]


def _linear_block(in_features: int, out_features: int) -> list[nn.Module]:
    return [nn.Linear(in_features, out_features), nn.BatchNorm1d(out_features), nn.ReLU()]


def _conv_net(
    convs: Sequence[tuple[int, int, int, int]], hidden: int | None, input_shape: tuple[int, int, int]
) -> tuple[list[nn.Module], int]:
    """Blocks of (channels, kernel, stride, padding), flattened, then a hidden linear block if asked for."""
    channels, height, width = input_shape
    layers: list[nn.Module] = []
    for out_channels, kernel, stride, padding in convs:
        layers += _conv_block(channels, out_channels, kernel, stride, padding)
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
    return layers + _linear_block(size, hidden), hidden


def _mlp(width: int, input_shape: tuple[int, int, int]) -> tuple[list[nn.Module], int]:
    size = math.prod(input_shape)
    return [nn.Flatten(), *_linear_block(size, width), *_linear_block(width, width)], width


def _cnn3(width: int, input_shape: tuple[int, int, int]) -> tuple[list[nn.Module], int]:
    return _conv_net([(width, 5, 2, 2), (2 * width, 4, 2, 1)], None, input_shape)


def _cnn5(width: int, input_shape: tuple[int, int, int]) -> tuple[list[nn.Module], int]:
    return _conv_net([(width, 3, 1, 1), (2 * width, 4, 2, 1), (2 * width, 4, 2, 1)], 8 * width, input_shape)


def _cnn7(width: int, input_shape: tuple[int, int, int]) -> tuple[list[nn.Module], int]:
    # On 64 x 64 images the fifth convolution has stride 2, so that the flat size stays that of CIFAR-10.
    last_stride = 2 if input_shape[1] >= 64 else 1
    convs = [
        (width, 3, 1, 1),
        (width, 3, 1, 1),
        (2 * width, 3, 2, 1),
        (2 * width, 3, 1, 1),
        (2 * width, 3, last_stride, 1),
    ]
    return _conv_net(convs, 8 * width, input_shape)


# name -> (builder, default width)
ARCHITECTURES = {
    "mlp": (_mlp, 256),
    "cnn3": (_cnn3, 16),
    "cnn5": (_cnn5, 32),
    "cnn7": (_cnn7, 64),
    "cnn7-wide": (_cnn7, 128),
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
) -> Network:
    """A network by name, in eval mode, with batch norm and ReLU after every layer but the head.

    CNN7 (width 64): conv3 64, conv3 64, conv3 128 stride 2, conv3 128, conv3 128, linear 512, head.
    CNN5: conv3 w, conv4 2w stride 2, conv4 2w stride 2, linear 8w, head. CNN3: conv5 w stride 2, conv4 2w
    stride 2, head. MLP: linear w, linear w, head. The same seed gives the same weights on every device.

    Args:
        name: mlp, cnn3, cnn5, cnn7 or cnn7-wide.
        input_shape: (C, H, W).
        width: channels of the first layer (units for the mlp); None: 256, 16, 32, 64, 128 in that order.
        mean, std: normalisation for each channel, in pixel units; None: 0 and 1.
        initialization: "ibp" (Shi et al. 2021) or "default" (PyTorch's).

    Raises:
        ValueError: the name is unknown, or the images are too small for it.

    Source: METHOD section F; layer counts as in the public CC-IBP and CTBench codes.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(ARCHITECTURES)}")
    builder, default_width = ARCHITECTURES[name]
    mean = (0.0,) * input_shape[0] if mean is None else mean
    std = (1.0,) * input_shape[0] if std is None else std
    if len(mean) != input_shape[0]:
        raise ValueError(f"normalisation for {len(mean)} channels, but images have {input_shape[0]}")
    # Built without memory, then filled from the seed: constructing layers would draw from the global generator.
    with torch.device("meta"):
        layers, num_features = builder(default_width if width is None else width, input_shape)
        head = nn.Linear(num_features, num_classes)
    network = Network(nn.Sequential(*layers), head).to_empty(device="cpu")
    initialize(network, torch.Generator().manual_seed(seed), initialization)
    network.features.insert(0, Normalize(mean, std))
    return network.eval()  # the inserted layer too


@torch.no_grad()
def initialize(network: Network, generator: torch.Generator, initialization: Initialization) -> None:
    """Fill every parameter and statistic, in module order, from the generator.

    ibp: each weight but the head's ~ N(0, (sqrt(2 pi) / fan_in)^2), so that interval widths neither explode
    nor vanish with depth; biases, batch norm and head as PyTorch has them by default.

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
