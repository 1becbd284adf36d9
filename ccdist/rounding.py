"""What rounding may do to a network: an allowance for each layer, and interval bounds that contain it.

A deployed forward pass in float32 computes a_l = layer_l(a_{l-1}) + e_l with |e_l| <= E_l. Interval bounds that are
widened by E_l after each layer contain every a_l, whatever the e_l are, for errors of earlier layers go through
interval arithmetic like any other perturbation. A linear bound with weights w_l at the output of layer l, whose
relaxations hold on these widened boxes, becomes

    z_y - z_j >= bound - sum over l of <|w_l|, E_l> - head error

for every deployed forward pass of a point of the region, and for the exact function.

**Size of E_l.** A computed z = A a + b misses by u h M: M = |A| |a| + |b| is the sum of the absolute terms, u = 2^-24,
and h <= n the longest chain of additions that one of the n terms goes through. Here h is replaced by

    g(n) = n up to n = 256,   then max(16 sqrt(n), n / c),   c = 8 for a linear layer, 2 for a convolution

- Up to 256 terms this is the bound of any order. Above, it is that of any order whose chains have n / c terms or fewer:
  eight lanes in products with one vector, and blocks of a few hundred terms in products of matrices, keep them shorter.
- A kernel that adds more terms one after another, as convolutions over channels-last images do, keeps to g(n) by
  chance only: with independent errors of mean zero, lambda sqrt(n) fails with probability 2 exp(-lambda^2 / 2) a sum
  (Higham and Mary 2019), 1e-55 for 16. Errors that do not cancel were looked for in sums of equal terms, which drift
  by n / 4 when added so: inside.

Measured on x86 processors (linear and convolution, both memory orders, 1 and 2 threads, 1 and 256 images, 27 to 32768
terms), as a share of u (g(n) + 12) M: at most 0.13 for random signs, 0.16 for positive terms and 0.5 for equal ones;
above 1000 terms 0.02, 0.04 and 0.5. Batch norm behind the layer adds some of the 12 operations and needs the terms
before folding, |scale| (M + |mean|) + |bias|, which may be far larger than those after it.

**float64.** The bounds are computed in float64, where any sum of n terms, of a layer or of a bound over it, misses by
n 2^-53 of M in the worst order: 2^-32 of M covers some 10^6 terms. Each layer that computes adds it to E_l, of whose
float32 part it is a thousandth. So the rounding of the bound itself is allowed for by the same formula; and a network
that is deployed in float64 has room to spare.

**Not covered:** reduced precision (TF32, bfloat16; see `ccdist.precision`), and convolutions by transforms (Winograd,
FFT), which a GPU's library may choose, and PyTorch on a processor with oneDNN switched off: their errors follow the
largest value of a neighbourhood, not the terms of one sum, and exceed E_l beside large values by any factor. A
certificate is about direct summation.

Shapes: `B` batch, `J` other classes, `D` features, `...` the shape of a layer.

Source: Higham and Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 2019.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ccdist.batch_norm import BatchNorm, per_channel, scale_and_shift
from ccdist.bounds import (
    UnsupportedLayerError,
    _computes_as,
    _Ellipsoid,
    _propagate,
    elided_lower_bounds,
    other_classes,
)
from ccdist.interval import Interval
from ccdist.networks import Normalize, Residual
from ccdist.proof_network import ProofNetwork
from ccdist.threats import L2Ball, Region

# lambda of the probabilistic bound; sums of up to its square have the worst order's bound.
CONFIDENCE = 16
# The longest chain of additions that is allowed for in full, as a share of all terms.
LINEAR_CHAIN = 1 / 8
CONVOLUTION_CHAIN = 1 / 2
# Operations beside the sum: bias, the steps of a batch norm, conversions of its constants; and second order terms.
EXTRA_OPERATIONS = 12
# In units of the deployed precision: tanh and sigmoid relative to their value (measured in float32: 1.0, 2.5), GELU to
# its input (6.4).
ACTIVATION_UNITS = 8
GELU_UNITS = 16
# Share of a layer's terms for the float64 evaluation of any bound over it.
PROOF_SHARE = 2.0**-32
# Below 2^-126 float32 loses digits or is flushed to zero; times 2^-24 this is still more than that.
SMALL = 2.0**-100
# A quarter of float32's largest number: partial sums above it may overflow, and then nothing is known.
LARGE = 2.0**126


@dataclass(frozen=True)
class GuardedStep:
    """A leaf layer of `ProofNetwork.exact`, in the order of the forward pass.

    Args:
        box: float64 interval entering it, widened by the rounding of all layers before.
        error: [B, ...output], >= 0: what one evaluation of this layer may miss by. Infinite where float32 may overflow.
            The addition that ends a `Residual` is counted in the last step of its shortcut.
    """

    layer: nn.Module
    box: Interval
    error: Tensor


@dataclass(frozen=True)
class GuardedBounds:
    """All steps of the features, and widened bounds of what they give."""

    steps: list[GuardedStep]
    features: Interval


def guarded_bounds(proof: ProofNetwork, region: Region) -> GuardedBounds:
    """Interval bounds in float64 that contain every deployed float32 forward pass over the region.

    Costs about three forward passes in float64. Bounds are infinite or NaN where float32 may overflow: such a margin
    exceeds no allowance.

    Args:
        region: in float64, see `exact_region`.

    Raises:
        UnsupportedLayerError: a layer has no interval rule, or an l_2 ball meets another layer first.
        ValueError: the region is not in float64.
    """
    box = region.box if isinstance(region, L2Ball) else region
    if box.lower.dtype != torch.float64:
        raise ValueError(f"the region is in {box.lower.dtype}; a proof needs float64 (see exact_region)")
    steps: list[GuardedStep] = []
    with torch.no_grad():
        entered = _Entered(_Ellipsoid.of_ball(region), None) if isinstance(region, L2Ball) else _Entered(region, None)
        out = _guarded(proof, proof.exact.features, entered, steps, "features")
    return GuardedBounds(steps, out.box)


def head_error(proof: ProofNetwork, features: Interval, labels: Int[Tensor, " B"]) -> Float[Tensor, "B J"]:
    """What the computed z_y - z_j may miss by, the two logits being computed apart.

    (u g(D) + ...) (|W_y| |a| + |b_y| + |W_j| |a| + |b_j|)
    """
    head = proof.exact.head
    with torch.no_grad():
        error = _affine_error(proof, head, features)
        others = other_classes(labels, head.out_features)
        return error.gather(1, labels.unsqueeze(1)) + error.gather(1, others)


def guarded_ibp(
    proof: ProofNetwork, region: Region, labels: Int[Tensor, " B"]
) -> tuple[Float[Tensor, "B J"], Float[Tensor, "B J"]]:
    """(lower, allowance) of z_y - z_j by elided interval bounds: certified where lower > allowance.

    Args:
        region: in float64, see `exact_region`.

    Returns:
        Both in logits. The rounding of the features is inside `lower`, that of the head is the allowance.
    """
    features = guarded_bounds(proof, region).features
    with torch.no_grad():
        lower = elided_lower_bounds(proof.exact.head, features, labels)
    return lower, head_error(proof, features, labels)


@dataclass(frozen=True)
class _Entered:
    """What enters a layer. slack: of an ellipsoid, what its points may miss by; it is in the box already."""

    values: Interval | _Ellipsoid
    slack: Tensor | None

    @property
    def box(self) -> Interval:
        return self.values if isinstance(self.values, Interval) else self.values.box


def _guarded(
    proof: ProofNetwork, module: nn.Module, entered: _Entered, steps: list[GuardedStep], name: str
) -> _Entered:
    if _computes_as(module, nn.Sequential):
        for key, layer in zip(module._modules, module, strict=True):
            entered = _guarded(proof, layer, entered, steps, f"{name}.{key}")
        return entered
    if isinstance(entered.values, Interval) and _computes_as(module, Residual):
        body = _guarded(proof, module.body, entered, steps, f"{name}.body").box
        short = _guarded(proof, module.shortcut, entered, steps, f"{name}.shortcut").box
        error = (2 * proof.unit + PROOF_SHARE) * (_largest(body) + _largest(short)) + SMALL
        if steps:
            steps[-1] = replace(steps[-1], error=steps[-1].error + error)
        return _Entered(_widened(Interval(body.lower + short.lower, body.upper + short.upper), error), None)
    return _guarded_leaf(proof, module, entered, steps, name)


def _guarded_leaf(
    proof: ProofNetwork, layer: nn.Module, entered: _Entered, steps: list[GuardedStep], name: str
) -> _Entered:
    out = _propagate(layer, entered.values, None, None, name)
    if layer in proof.folded and isinstance(layer, nn.Linear) and entered.box.lower.dim() != 2:
        raise UnsupportedLayerError(f"batch norm behind {layer} at {name} is not over its outputs: no folded form")
    error = _error(proof, layer, entered.box, out if isinstance(out, Interval) else out.box)
    steps.append(GuardedStep(layer, entered.box, error))
    if isinstance(entered.values, Interval):
        assert isinstance(out, Interval)
        return _Entered(_widened(out, error), None)
    # Before the first affine layer the points of a ball are center + scale * d + slack; that layer multiplies the
    # slack by |A|, which its ellipsoid knows nothing of.
    slack = torch.zeros_like(entered.box.lower) if entered.slack is None else entered.slack
    slack = _magnitude(layer, slack)
    if isinstance(out, Interval):
        return _Entered(_widened(out, slack + error), None)
    return _Entered(replace(out, box=_widened(out.box, error)), slack + error)


def _widened(box: Interval, error: Tensor) -> Interval:
    return Interval(box.lower - error, box.upper + error)


def _largest(box: Interval) -> Tensor:
    return torch.maximum(box.lower.abs(), box.upper.abs())


def _magnitude(layer: nn.Module, values: Tensor) -> Tensor:
    """|A| values, for a layer that is affine with matrix A."""
    if isinstance(layer, nn.Linear):
        return F.linear(values, layer.weight.abs())
    if isinstance(layer, nn.Conv2d):
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return F.conv2d(values, layer.weight.abs(), None, *geometry)  # type: ignore[arg-type]
    if isinstance(layer, Normalize):
        return values / layer.std
    out: Tensor = layer(values)
    return out


def _summation(unit: float, terms: int, chain: float = 1.0) -> float:
    """u g(n) with a few operations more, and the share of the proof."""
    growth = min(float(terms), max(CONFIDENCE * math.sqrt(terms), terms * chain))
    return (growth + EXTRA_OPERATIONS) * unit + PROOF_SHARE


def _unless_overflow(error: Tensor, peak: Tensor) -> Tensor:
    """The error, infinite where values on the way may reach LARGE (or are not known)."""
    return error.masked_fill(~(peak <= LARGE), math.inf)


def _affine_error(proof: ProofNetwork, layer: nn.Module, box: Interval) -> Tensor:
    """u g(n) times the summed terms of a Linear or Conv2d and of the batch norm folded into it.

    terms of the layer itself:     T = |W| |a| + |b|
    behind a batch norm, unfolded:     |scale| (T + |mean|) + |bias|

    Beside them, in units of SMALL, what is lost when a value is too small for float32.
    """
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    pair = proof.folded.get(layer)
    own = layer if pair is None else pair.layer
    axes = (-1,) if isinstance(layer, nn.Linear) else (-1, 1, 1)
    largest, num_terms = _largest(box) + SMALL, layer.weight[0].numel()
    loudest = largest.flatten(1).amax(1) if len(largest) else largest.flatten(1).sum(1)
    loudest = loudest.view(-1, *(1,) * (largest.dim() - 1))
    constants = own.weight.new_zeros(own.weight.shape[0]) if own.bias is None else own.bias.abs()
    scale = stretch = torch.ones_like(constants)
    peaks = own.weight.abs().flatten(1).sum(1).view(axes) * loudest + constants.view(axes)
    if pair is not None:
        scale, mean, bias, stretch = _norm_sizes(pair.norm)
        peaks, constants = peaks + mean.view(axes), scale * (constants + mean) + bias
    lost = SMALL * (num_terms * (1 + loudest) * (1 + scale.view(axes)) + peaks)
    size = _magnitude(layer, largest) + constants.view(axes) + lost
    summation = _summation(proof.unit, num_terms, LINEAR_CHAIN if isinstance(layer, nn.Linear) else CONVOLUTION_CHAIN)
    return _unless_overflow(summation * size, torch.maximum(peaks * stretch.view(axes), size))


def _norm_sizes(norm: BatchNorm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(|scale|, |mean|, |bias|, largest factor on the way) for each channel."""
    assert norm.running_mean is not None  # without running statistics there is no scale
    assert norm.running_var is not None
    scale = scale_and_shift(norm, None)[0].abs()
    bias = torch.zeros_like(scale) if norm.bias is None else norm.bias.abs()
    stretch = torch.rsqrt(norm.running_var + norm.eps).clamp(min=1)
    return scale, norm.running_mean.abs(), bias, torch.maximum(stretch, scale)


# (proof, layer, box entering, box leaving) -> E_l
ErrorRule = Callable[[ProofNetwork, nn.Module, Interval, Interval], Tensor]


def _affine(proof: ProofNetwork, layer: nn.Module, box: Interval, out: Interval) -> Tensor:
    return _affine_error(proof, layer, box)


def _batch_norm(proof: ProofNetwork, layer: nn.Module, box: Interval, out: Interval) -> Tensor:
    assert isinstance(layer, BatchNorm)
    scale, mean, bias, stretch = (per_channel(values, box.lower) for values in _norm_sizes(layer))
    arguments = _largest(box) + mean
    size = (scale + SMALL) * arguments + bias + SMALL * (1 + scale)
    return _unless_overflow(_summation(proof.unit, 1) * size, torch.maximum(arguments * stretch, size))


def _normalize(proof: ProofNetwork, layer: nn.Module, box: Interval, out: Interval) -> Tensor:
    assert isinstance(layer, Normalize)
    return (4 * proof.unit + PROOF_SHARE) * (_largest(box) + layer.mean.abs() + SMALL) / layer.std + SMALL


def _avg_pool2d(proof: ProofNetwork, layer: nn.Module, box: Interval, out: Interval) -> Tensor:
    assert isinstance(layer, nn.AvgPool2d)
    kernel = layer.kernel_size
    num_terms = kernel * kernel if isinstance(kernel, int) else math.prod(kernel)
    size = layer(_largest(box)) + num_terms * SMALL
    return _unless_overflow(_summation(proof.unit, num_terms) * size, num_terms * size)


def _relu(proof: ProofNetwork, layer: nn.Module, box: Interval, out: Interval) -> Tensor:
    """Comparing is exact; a leaky slope is converted and multiplied."""
    slope = abs(layer.negative_slope) if isinstance(layer, nn.LeakyReLU) else 0.0
    return (4 * proof.unit * slope + PROOF_SHARE * (1 + slope)) * _largest(box) + (SMALL if slope else 0.0)


def _s_shaped(proof: ProofNetwork, layer: nn.Module, box: Interval, out: Interval) -> Tensor:
    return (ACTIVATION_UNITS * proof.unit + PROOF_SHARE) * _largest(out) + SMALL


def _gelu(proof: ProofNetwork, layer: nn.Module, box: Interval, out: Interval) -> Tensor:
    """x times a computed probability that misses by some units of 1, however small it is: relative to x."""
    return (GELU_UNITS * proof.unit + PROOF_SHARE) * _largest(box) + SMALL


def _moved(proof: ProofNetwork, layer: nn.Module, box: Interval, out: Interval) -> Tensor:
    return torch.zeros_like(out.lower)


ERROR_RULES: dict[type[nn.Module], ErrorRule] = {
    nn.Linear: _affine,
    nn.Conv2d: _affine,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    Normalize: _normalize,
    nn.AvgPool2d: _avg_pool2d,
    nn.ReLU: _relu,
    nn.LeakyReLU: _relu,
    nn.Tanh: _s_shaped,
    nn.Sigmoid: _s_shaped,
    nn.GELU: _gelu,
    nn.Flatten: _moved,
    nn.Identity: _moved,
}


def _error(proof: ProofNetwork, layer: nn.Module, box: Interval, out: Interval) -> Tensor:
    rule = ERROR_RULES.get(type(layer))
    if rule is None:
        raise UnsupportedLayerError(f"no rounding rule for {type(layer).__name__}")
    return _unless_overflow(rule(proof, layer, box, out), _largest(out))
