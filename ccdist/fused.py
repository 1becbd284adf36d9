"""Steps of training that are worth one autograd operation each: fewer passes over large tensors, same arithmetic.

Each stands for a few lines of plain tensor code, which its docstring gives and its test differentiates too.

Shapes: `B` batch, `C` channels, `D` input and `O` output units.
"""

import functools
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
                grad_y = _where_positive(grad_y, y)
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
    """Masks are applied by threshold_backward(x, y, 0), x where y > 0: on a CPU `where` takes ten times as long.

    Which units are active or dead is read off the results, so nothing is kept for the backward pass that the next
    layer does not keep anyway: active is centre > radius, unstable is centre = radius > 0, dead is both 0.
    """

    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
        lower = center - radius
        half = torch.lerp(center, radius, 0.5).relu_()  # half the upper bound: centre and radius of an unstable unit
        half.sub_(_where_positive(half, lower))
        if shrink != 1:
            half.mul_(shrink)
        new_center, new_radius = _where_positive(center, lower).add_(half), _where_positive(radius, lower).add_(half)
        ctx.save_for_backward(new_center, new_radius)
        ctx.shrink = shrink
        return new_center, new_radius

    @staticmethod
    def backward(ctx: Any, grad_center: Tensor, grad_radius: Tensor) -> tuple[Tensor, Tensor, None]:
        center, radius = ctx.saved_tensors
        lower = center - radius
        both = _where_positive(torch.lerp(grad_center, grad_radius, 0.5), center)
        both.sub_(_where_positive(both, lower))
        if ctx.shrink != 1:
            both.mul_(ctx.shrink)
        return _where_positive(grad_center, lower).add_(both), _where_positive(grad_radius, lower).add_(both), None


def _where_positive(x: Tensor, y: Tensor) -> Tensor:
    """x where y > 0, else 0."""
    selected: Tensor = _aten.threshold_backward(x, y, 0)
    return selected


def interval_sums(center: Float[Tensor, "B *shape"], radius: Float[Tensor, "B *shape"]) -> Float[Tensor, " 5"]:
    """Sums over a layer's intervals with centres c and radii r, means over all its units and images:

        [ mean(r),  sum(c 1[c > r]),  -sum(c 1[c < -r]),  sum((c - mean c)^2 1[c > r]),  sum((c - mean c)^2 1[c < -r]) ]

    What the Shi regulariser reads of a layer.
    """
    if center.dtype == torch.bfloat16:  # a sum over millions of units has more than 8 bits
        center, radius = center.float(), radius.float()
    sums: Tensor = _IntervalSums.apply(center, radius)
    return sums


class _IntervalSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor) -> Tensor:
        ctx.save_for_backward(center, radius)
        lower, below = center - radius, (center + radius).neg_()
        mean = center.mean()
        squares = (center - mean).square_()
        masked = [(center, lower), (center, below), (squares, lower), (squares, below)]
        active, inactive, active_squares, inactive_squares = (_where_positive(x, y).sum() for x, y in masked)
        return torch.stack([radius.mean(), active, -inactive, active_squares, inactive_squares])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        center, radius = ctx.saved_tensors
        on_radius, on_active, on_inactive, on_active_squares, on_inactive_squares = grad
        lower, below = center - radius, (center + radius).neg_()
        deviation = center - center.mean()
        squares = _where_positive(deviation, lower).mul_(2 * on_active_squares)
        squares.add_(_where_positive(deviation, below).mul_(2 * on_inactive_squares))
        grad_center = squares.sub_(squares.mean())  # mean c moves with every unit
        ones = deviation.fill_(1)
        grad_center.add_(_where_positive(ones, lower).mul_(on_active))
        grad_center.sub_(_where_positive(ones, below).mul_(on_inactive))
        return grad_center, torch.full_like(radius, 1 / radius.numel()).mul_(on_radius)


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
        return product(center, weight), product(radius, weight.abs())

    @staticmethod
    def backward(ctx: Any, grad_center: Tensor, grad_radius: Tensor) -> tuple[Tensor | None, ...]:
        center, radius, weight = ctx.saved_tensors
        needs_center, needs_radius, needs_weight = ctx.needs_input_grad
        input_center = product(grad_center, weight.t()) if needs_center else None
        input_radius = product(grad_radius, weight.abs().t()) if needs_radius else None
        grad_weight = None
        if needs_weight:
            grad_weight = product(grad_radius.t(), radius.t()).mul_(weight.sign())
            grad_weight.add_(product(grad_center.t(), center.t()))
        return input_center, input_radius, grad_weight


def linear(
    x: Float[Tensor, "B D"], weight: Float[Tensor, "O D"], bias: Float[Tensor, " O"] | None
) -> Float[Tensor, "B O"]:
    """x W^T + b, by the faster of the matrix libraries (see `product`)."""
    out: Tensor = _Linear.apply(x, weight)
    return out if bias is None else out + bias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if needs_x else None,
            product(grad.t(), x.t()) if needs_weight else None,
        )


def product(a: Float[Tensor, "M K"], b: Float[Tensor, "N K"]) -> Float[Tensor, "M N"]:
    """a b^T without a graph.

    PyTorch gives float32 products to MKL, which on processors of another maker runs at half the rate of oneDNN. There
    they go to oneDNN by the operator that PyTorch's own compiler uses for it.
    """
    if a.dtype == torch.float32 and a.device.type == "cpu" and _prefers_onednn():
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return out
    return F.linear(a, b)


@functools.cache
def _prefers_onednn() -> bool:
    maker = str(torch.cpu.get_capabilities().get("cpu_name", ""))
    return "AMD" in maker and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]  # stride, padding, dilation, groups


def interval_convolution(
    center: Float[Tensor, "B C H W"],
    radius: Float[Tensor, "B C H W"],
    weight: Float[Tensor, "O I h w"],
    bias: Float[Tensor, " O"] | None,
    geometry: Geometry,
) -> tuple[Float[Tensor, "B O Y X"], Float[Tensor, "B O Y X"]]:
    """(center * W + b, radius * |W|): the convolution of an interval, as `interval_linear`."""
    new_center, new_radius = _IntervalConvolution.apply(center, radius, weight, bias, geometry)
    return new_center, new_radius


class _IntervalConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(center, radius, weight)
        ctx.geometry = geometry
        return F.conv2d(center, weight, bias, *geometry), F.conv2d(radius, weight.abs(), None, *geometry)

    @staticmethod
    def backward(ctx: Any, grad_center: Tensor, grad_radius: Tensor) -> tuple[Tensor | None, ...]:
        center, radius, weight = ctx.saved_tensors
        needs_center, needs_radius, needs_weight, needs_bias, _ = ctx.needs_input_grad
        input_center, grad_weight, grad_bias = _convolution_backward(
            grad_center, center, weight, ctx.geometry, [needs_center, needs_weight, needs_bias]
        )
        input_radius, grad_magnitude, _ = _convolution_backward(
            grad_radius, radius, weight.abs(), ctx.geometry, [needs_radius, needs_weight, False]
        )
        if grad_weight is not None and grad_magnitude is not None:
            grad_weight = grad_weight.addcmul_(grad_magnitude, weight.sign())
        return input_center, input_radius, grad_weight, grad_bias, None


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    stride, padding, dilation, groups = geometry
    grads: tuple[Tensor | None, Tensor | None, Tensor | None] = _aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, mask
    )
    return grads
