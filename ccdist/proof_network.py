"""The network and the region that a certificate is computed for, in float64: float32 proposes, float64 proves.

A certificate speaks about the exact function of the deployed parameters. The float64 copy here has batch norm folded,
which changes that function by rounding only; what rounding may do is counted in `ccdist.rounding`.

Shapes: `B` batch, `C H W` image.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ccdist.batch_norm import BatchNorm, scale_and_shift
from ccdist.bounds import check_rules_describe
from ccdist.config import ThreatModel
from ccdist.interval import Interval
from ccdist.networks import Network, Residual
from ccdist.threats import L2Ball, Region

# Largest difference of logits between the deployed parameters in float64 and the folded copy, relative to the largest
# logit. Both are float64: 1e-13 is usual, a fold of the wrong channel is wrong by parts of one.
FOLDING_TOLERANCE = 1e-9
# Inputs of that comparison.
COMPARED_INPUTS = 4

ModuleKind = TypeVar("ModuleKind", bound=nn.Module)


@dataclass(frozen=True)
class Folded:
    """What the deployed network computes in two layers where `exact` has one; float64 copies of both."""

    layer: nn.Linear | nn.Conv2d
    norm: BatchNorm


@dataclass(frozen=True)
class ProofNetwork:
    """A deployed network and its copies for proofs.

    Args:
        deployed: as given, in eval mode; never changed.
        exact: float64; batch norm folded into the Linear or Conv2d right before it, every other layer as it was.
        search: exact in float32, for choices that need not be right, such as good slopes.
        folded: layer of `exact` -> the two layers that it stands for.
    """

    deployed: Network
    exact: Network
    search: Network
    folded: dict[nn.Module, Folded]

    @property
    def unit(self) -> float:
        """Unit roundoff of the deployed precision: one operation errs by at most this share of its result."""
        return torch.finfo(self.deployed.head.weight.dtype).eps / 2

    @classmethod
    def of(cls, network: Network, input_shape: tuple[int, ...] | None = None) -> "ProofNetwork":
        """The copies of a deployed network, after comparing them with it.

        A float64 network may be deployed too; the allowance is that of its own precision.

        Args:
            network: float32 or float64, in eval mode.
            input_shape: (C, H, W); the folded network is compared on inputs of this shape. None: only each folded
                layer is compared, on inputs of its own.

        Raises:
            UnsupportedLayerError: the network or its head replaces the forward pass that bounds describe.
            ValueError: the network is in train mode, has other precisions or values that are not finite, or folding
                does not give the same function.
        """
        check_rules_describe(network)
        _refuse_unfit(network)
        folded: dict[nn.Module, Folded] = {}
        features = _exact(network.features, folded)
        head = _exact(network.head, folded)
        assert isinstance(features, nn.Sequential)
        assert isinstance(head, nn.Linear)
        exact = Network(features, head)
        _compare_folded_layers(folded)
        if input_shape is not None:
            compare(network, exact, input_shape)
        return cls(network, exact, copy.deepcopy(exact).float().to(memory_format=torch.channels_last), folded)


def _refuse_unfit(network: Network) -> None:
    if any(module.training for module in network.modules()):
        raise ValueError("the network is in train mode; call .eval() on it, a proof is about the deployed network")
    kinds = set()
    for name, values in (*network.named_parameters(), *network.named_buffers()):
        if not values.is_floating_point():  # the batch counter of a batch norm
            continue
        kinds.add(values.dtype)
        if not torch.isfinite(values).all():
            raise ValueError(f"{name} has values that are not finite; no bound of such a network exists")
    if kinds not in ({torch.float32}, {torch.float64}):
        found = ", ".join(sorted(str(kind) for kind in kinds))
        raise ValueError(f"the network's values are {found}; the rounding allowance is known for float32 only")


def _exact(module: nn.Module, folded: dict[nn.Module, Folded]) -> nn.Module:
    """A float64 copy with batch norm folded; a layer that stands in two places becomes two."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        # Keys stay those of the deployed layers, for error messages.
        return nn.Sequential(OrderedDict(_exact_layers(module, folded))).eval()
    if isinstance(module, Residual) and type(module).forward is Residual.forward:
        return Residual(_exact(module.body, folded), _exact(module.shortcut, folded)).eval()
    return _float64(module)


def _float64(module: ModuleKind) -> ModuleKind:
    return copy.deepcopy(module).double().requires_grad_(False)


def _exact_layers(module: nn.Sequential, folded: dict[nn.Module, Folded]) -> Iterator[tuple[str, nn.Module]]:
    # Not named_children(), which leaves out a layer that stands in two places.
    keyed = list(zip(module._modules, module, strict=True))
    while keyed:
        key, layer = keyed.pop(0)
        if keyed and _folds_into(layer, keyed[0][1]):
            norm = keyed.pop(0)[1]
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            assert isinstance(norm, BatchNorm)
            pair = Folded(_float64(layer), _float64(norm))
            merged = _merged(pair)
            folded[merged] = pair
            yield key, merged
        else:
            yield key, _exact(layer, folded)


def _folds_into(layer: nn.Module, norm: nn.Module) -> bool:
    if type(norm) is nn.BatchNorm2d:
        return type(layer) is nn.Conv2d and layer.out_channels == norm.num_features
    return type(norm) is nn.BatchNorm1d and type(layer) is nn.Linear and layer.out_features == norm.num_features


def _merged(pair: Folded) -> nn.Module:
    """One layer scale * (W x + b) + shift, in float64."""
    scale, shift = scale_and_shift(pair.norm, None)
    merged = copy.deepcopy(pair.layer)
    rows = scale.view(-1, *(1,) * (merged.weight.dim() - 1))
    merged.weight = nn.Parameter(merged.weight * rows, requires_grad=False)
    bias = shift if merged.bias is None else merged.bias * scale + shift
    merged.bias = nn.Parameter(bias, requires_grad=False)
    return merged


def _inputs(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand((COMPARED_INPUTS, *shape), generator=generator, dtype=torch.float64)


def _compare_folded_layers(folded: dict[nn.Module, Folded]) -> None:
    with torch.no_grad():
        for merged, pair in folded.items():
            device = pair.layer.weight.device
            shape: tuple[int, ...] = (pair.layer.weight.shape[1],)
            if isinstance(pair.layer, nn.Conv2d):
                extents = zip(pair.layer.kernel_size, pair.layer.dilation, strict=True)
                shape = (pair.layer.in_channels, *((size - 1) * dilation + 1 for size, dilation in extents))
            x = _inputs(shape).to(device)
            _check_equal(merged(x), pair.norm(pair.layer(x)), f"folding batch norm into {pair.layer}")


@torch.no_grad()
def compare(network: Network, exact: Network, input_shape: tuple[int, ...]) -> None:
    """Refuse an exact network whose logits are not those of the deployed parameters in float64.

    Raises:
        ValueError: they differ by more than FOLDING_TOLERANCE of the largest logit.
    """
    x = _inputs(input_shape).to(exact.head.weight.device)
    _check_equal(exact(x), copy.deepcopy(network).double()(x), "the float64 copy of the network")


def _check_equal(found: Tensor, expected: Tensor, what: str) -> None:
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(found.dtype).tiny))
    if not difference <= FOLDING_TOLERANCE:  # NaN is refused too
        raise ValueError(
            f"{what} differs by {difference:.3g} of the largest value; expected at most {FOLDING_TOLERANCE:g}"
        )


def rounded_up(value: Fraction) -> float:
    """The least float64 that is not below the value."""
    nearest = float(value)
    return nearest if Fraction(nearest) >= value else math.nextafter(nearest, math.inf)


def exact_region(images: Float[Tensor, "B *shape"], threat: ThreatModel) -> Region:
    """A float64 region with every perturbed image that the exact epsilon allows.

        linf: [max(x - epsilon, 0), min(x + epsilon, 1)], both ends rounded outward
        l2:   a ball whose radius exceeds epsilon by what rounding the ends of its box may take away

    Args:
        images: float32 or float64 pixels in [0, 1]; float32 is taken over exactly.

    Raises:
        ValueError: a pixel is outside [0, 1], or another precision.
    """
    if images.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images are {images.dtype}; expected float32 or float64, which float64 holds exactly")
    if not ((images >= 0) & (images <= 1)).all():
        raise ValueError("images have pixels outside [0, 1]; the threat is a set of images inside the pixel range")
    center, epsilon = images.double(), rounded_up(threat.epsilon)
    if threat.norm == "l2":
        # The ends center +- epsilon are at most max(1, epsilon) + 1, and round by 2^-53 of their size.
        return L2Ball(center, epsilon + 2.0**-50 * max(1.0, epsilon))
    infinity = torch.full_like(center, math.inf)
    lower = torch.nextafter(center - epsilon, -infinity)
    upper = torch.nextafter(center + epsilon, infinity)
    return Interval(lower.clamp(0, 1), upper.clamp(0, 1))
