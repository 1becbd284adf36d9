"""Steps of training that are worth one autograd operation each: fewer passes over large tensors, same arithmetic.

Each stands for a few lines of plain tensor code, which its docstring gives and its test differentiates too.

Shapes: `B` batch, `C` channels, `D` input and `O` output units.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_aten: Any = torch.ops.aten  # its stubs are empty


def batch_norm_with_statistics(
    x: Float[Tensor, "B C *shape"],
    weight: Float[Tensor, " C"] | None,
    bias: Float[Tensor, " C"] | None,
    *,
    eps: float,
    relu: bool,
) -> tuple[Float[Tensor, "B C *shape"], Float[Tensor, " C"], Float[Tensor, " C"]]:
    """(y, mean, var): batch norm with the batch's own statistics, which are differentiable outputs too.

        mean, var = mean and biased variance of x over batch and pixels
        y = weight * (x - mean) / sqrt(var + eps) + bias,  then max(y, 0) if relu

    Bounds that use the same statistics send gradients back through mean and var.
    """
    y, mean, variance = _BatchNorm.apply(x, weight, bias, eps, relu)
    return y, mean, variance


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, inverse_std = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        if relu:
            y.relu_()
        ctx.save_for_backward(x, weight, mean, inverse_std, y if relu else None)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return y, mean, (inverse_std.pow(-2) - eps).clamp_(min=0)

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_mean: Tensor | None, grad_variance: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, y = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if grad_y is not None:
            if y is not None:
                grad_y = _aten.threshold_backward(grad_y, y, 0)
            grad_x, grad_weight, grad_bias = _aten.native_batch_norm_backward(
                grad_y, x, weight, None, None, mean, inverse_std, True, ctx.eps, [True, weight is not None, True]
            )
        if grad_mean is not None or grad_variance is not None:
            # d mean / d x = 1 / n and d var / d x = 2 (x - mean) / n: an affine function of x for each channel.
            count = x.numel() // x.shape[1]
            constant = torch.zeros_like(mean) if grad_mean is None else grad_mean / count
            view = (1, -1, *(1,) * (x.dim() - 2))
            grad_x = torch.zeros_like(x) if grad_x is None else grad_x
            if grad_variance is not None:
                slope = grad_variance * (2 / count)
                constant = constant - slope * mean
                grad_x.addcmul_(x, slope.view(view))
            grad_x.add_(constant.view(view))
        return grad_x, grad_weight, grad_bias if ctx.needs_input_grad[2] else None, None, None


def interval_relu(
    center: Float[Tensor, "B *shape"], radius: Float[Tensor, "B *shape"], *, shrink: float = 1.0
) -> tuple[Float[Tensor, "B *shape"], Float[Tensor, "B *shape"]]:
    """Centre and radius of max(x, 0) over [center - radius, center + radius].

        lower = max(center - radius, 0),  upper = max(center + radius, 0)
        -> (upper + lower) / 2, (upper - lower) / 2

    A unit whose lower bound is above 0 keeps its centre and radius to the bit: in bfloat16 the difference of its
    ends would be no radius any more.

    Args:
        shrink: factor on the upper bound of units whose interval contains 0; below 1 it is no bound any more
            (SABR trains with 0.8 on CIFAR-10 at 2/255).
    """
    new_center, new_radius = _IntervalReLU.apply(center, radius, shrink)
    return new_center, new_radius


class _IntervalReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
        half = (center + radius).relu_().mul_(0.5 * shrink)  # centre and radius of an unstable unit, 0 of a dead one
        active = center > radius
        ctx.save_for_backward(active, (half > 0).logical_and_(~active))
        ctx.shrink = shrink
        return torch.where(active, center, half), torch.where(active, radius, half)

    @staticmethod
    def backward(ctx: Any, grad_center: Tensor, grad_radius: Tensor) -> tuple[Tensor, Tensor, None]:
        active, unstable = ctx.saved_tensors
        both = (grad_center + grad_radius).mul_(unstable).mul_(0.5 * ctx.shrink)
        return torch.where(active, grad_center, both), torch.where(active, grad_radius, both), None


def interval_linear(
    center: Float[Tensor, "B D"], radius: Float[Tensor, "B D"], weight: Float[Tensor, "O D"]
) -> tuple[Float[Tensor, "B O"], Float[Tensor, "B O"]]:
    """(center W^T, radius |W|^T), without holding |W| or two gradients of W, which may be most of the memory."""
    new_center, new_radius = _IntervalLinear.apply(center, radius, weight)
    return new_center, new_radius


class _IntervalLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(center, radius, weight)
        return F.linear(center, weight), F.linear(radius, weight.abs())

    @staticmethod
    def backward(ctx: Any, grad_center: Tensor, grad_radius: Tensor) -> tuple[Tensor | None, ...]:
        center, radius, weight = ctx.saved_tensors
        needs_center, needs_radius, needs_weight = ctx.needs_input_grad
        input_center = grad_center @ weight if needs_center else None
        input_radius = grad_radius @ weight.abs() if needs_radius else None
        grad_weight = None
        if needs_weight:
            grad_weight = (grad_radius.t() @ radius).mul_(weight.sign())
            grad_weight.addmm_(grad_center.t(), center)
        return input_center, input_radius, grad_weight


Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]  # stride, padding, dilation, groups


def interval_convolution(
    center: Float[Tensor, "B C H W"],
    radius: Float[Tensor, "B C H W"],
    weight: Float[Tensor, "O I h w"],
    geometry: Geometry,
) -> tuple[Float[Tensor, "B O Y X"], Float[Tensor, "B O Y X"]]:
    """(center * W, radius * |W|): the convolution of an interval, its bias left to the caller; as `interval_linear`."""
    new_center, new_radius = _IntervalConvolution.apply(center, radius, weight, geometry)
    return new_center, new_radius


class _IntervalConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(center, radius, weight)
        ctx.geometry = geometry
        return F.conv2d(center, weight, None, *geometry), F.conv2d(radius, weight.abs(), None, *geometry)

    @staticmethod
    def backward(ctx: Any, grad_center: Tensor, grad_radius: Tensor) -> tuple[Tensor | None, ...]:
        center, radius, weight = ctx.saved_tensors
        needs_center, needs_radius, needs_weight, _ = ctx.needs_input_grad
        input_center, grad_weight = _convolution_backward(
            grad_center, center, weight, ctx.geometry, needs_center, needs_weight
        )
        input_radius, grad_magnitude = _convolution_backward(
            grad_radius, radius, weight.abs(), ctx.geometry, needs_radius, needs_weight
        )
        if grad_weight is not None and grad_magnitude is not None:
            grad_weight = grad_weight.addcmul_(grad_magnitude, weight.sign())
        return input_center, input_radius, grad_weight, None


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs_input: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    stride, padding, dilation, groups = geometry
    mask = [needs_input, needs_weight, False]
    grad_x, grad_weight, _ = _aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
    )
    return grad_x, grad_weight
