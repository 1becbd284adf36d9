"""Batch norm with its statistics in the open: which batch they come from is an argument, never a mode.

Two styles are in use: statistics of the adversarial batch (De Palma et al.) or of the
clean batch (CTBench). Both keep mean and variance in the graph, and share them between the point forward
pass and the interval bounds, so a bound always describes the function that the loss differentiates.

Shapes: `B` batch, `C` channels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ccdist.networks import Network, Residual

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d
# Mean and biased variance of each batch norm layer over one batch, with their graph.
Statistics = dict[nn.Module, tuple[Tensor, Tensor]]


def scale_and_shift(layer: BatchNorm, statistics: Statistics | None) -> tuple[Tensor, Tensor]:
    """The layer as y = scale * x + shift, for each channel.

        scale = weight / sqrt(var + eps),  shift = bias - scale * mean

    Statistics None means the running ones, as in eval mode.
    """
    if statistics is None:
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError("a batch norm layer without running statistics has no eval mode")
        mean, variance = layer.running_mean, layer.running_var
    else:
        mean, variance = statistics[layer]
    scale = torch.rsqrt(variance + layer.eps)
    if layer.affine:
        scale = layer.weight * scale
        return scale, layer.bias - scale * mean
    return scale, -scale * mean


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """[C] viewed so that it broadcasts over the channels of a [B, C, ...] tensor."""
    return values.view(1, -1, *(1,) * (like.dim() - 2))


def forward(module: nn.Module, x: Tensor, statistics: Statistics | None = None) -> Tensor:
    """module(x) with the given batch norm statistics; None: the running ones."""
    if isinstance(module, Network):
        return forward(module.head, forward(module.features, x, statistics), statistics)
    if isinstance(module, nn.Sequential):
        for layer in module:
            x = forward(layer, x, statistics)
        return x
    if isinstance(module, Residual):
        return forward(module.body, x, statistics) + forward(module.shortcut, x, statistics)
    if isinstance(module, BatchNorm) and statistics is not None:
        scale, shift = scale_and_shift(module, statistics)
        return x * per_channel(scale, x) + per_channel(shift, x)
    out: Tensor = module(x)
    return out


def forward_collecting(module: nn.Module, x: Tensor, statistics: Statistics) -> Tensor:
    """module(x) as in train mode: every batch norm uses this batch's statistics and adds them to `statistics`.

    Running statistics are updated once, with the layer's momentum and the unbiased variance, as PyTorch does.

    Raises:
        ValueError: a channel has one value only, so it has no variance.
    """
    if isinstance(module, Network):
        return forward_collecting(module.head, forward_collecting(module.features, x, statistics), statistics)
    if isinstance(module, nn.Sequential):
        for layer in module:
            x = forward_collecting(layer, x, statistics)
        return x
    if isinstance(module, Residual):
        body = forward_collecting(module.body, x, statistics)
        return body + forward_collecting(module.shortcut, x, statistics)
    if isinstance(module, BatchNorm):
        return _collect(module, x, statistics)
    out: Tensor = module(x)
    return out


def _collect(layer: BatchNorm, x: Tensor, statistics: Statistics) -> Tensor:
    count = x.numel() // x.shape[1]
    dims = [0, *range(2, x.dim())]
    variance, mean = torch.var_mean(x, dims, correction=0)
    statistics[layer] = (mean, variance)
    update_running_statistics(layer, mean, variance, count)
    scale, shift = scale_and_shift(layer, statistics)
    return x * per_channel(scale, x) + per_channel(shift, x)


@torch.no_grad()
def update_running_statistics(layer: BatchNorm, mean: Tensor, variance: Tensor, count: int) -> None:
    """Move the running statistics towards those of one batch of `count` values a channel, as PyTorch does.

    Raises:
        ValueError: a channel has one value only, so it has no variance.
    """
    if count < 2:
        raise ValueError(
            f"batch norm over {count} value a channel has no variance: the last batch has one image; "
            "choose a batch size that leaves at least two"
        )
    if layer.running_mean is not None and layer.running_var is not None:
        momentum = 0.1 if layer.momentum is None else layer.momentum
        layer.running_mean.lerp_(mean, momentum)
        layer.running_var.lerp_(variance * (count / (count - 1)), momentum)


def batch_norm_layers(module: nn.Module) -> Iterator[BatchNorm]:
    return (layer for layer in module.modules() if isinstance(layer, BatchNorm))
