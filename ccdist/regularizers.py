"""Terms added to a loss: the Shi regulariser of interval widths and activations, and L1."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ccdist.fused import interval_sums
from ccdist.interval import Interval

# A denominator below this is a width of zero; the ratio is then large and its penalty zero or capped.
_TINY = 1e-12


def shi_regularizer(
    input_radius: Float[Tensor, "B ..."], activation_inputs: Sequence[Interval], *, tau: float = 0.5
) -> Float[Tensor, ""]:
    """Keeps interval widths from growing with depth, and ReLUs from all being on or off.

        tight = 1/m sum_i relu(tau - mean(r_0) / mean(r_i)) / tau
        relu  = 1/m sum_i [relu(tau - q(rho1_i)) + relu(tau - q(rho2_i))] / tau,  q(rho) = min(rho, 1 / rho)
        rho1 = mean(c 1[l > 0]) / -mean(c 1[u < 0]),
        rho2 = sum((c - mean c)^2 1[l > 0]) / sum((c - mean c)^2 1[u < 0])

    over the m ReLUs, with bounds l, u, centres c and radii r of their inputs, means over batch and units. A
    layer without active or without inactive units has no rho and adds nothing to the second sum.

    Args:
        input_radius: r_0, radius of the normalised input.
        activation_inputs: bounds of the inputs of the ReLUs, or other activations, after batch norm.
        tau: tolerance, in (0, 1].

    Returns:
        tight + relu, >= 0, without unit.

    Source: Shi et al., NeurIPS 2021.
    """
    return shi_regularizer_of_centers(input_radius, [(box.center, box.radius) for box in activation_inputs], tau=tau)


def shi_regularizer_of_centers(
    input_radius: Float[Tensor, "B ..."], activation_inputs: Sequence[tuple[Tensor, Tensor]], *, tau: float = 0.5
) -> Float[Tensor, ""]:
    """`shi_regularizer` of (centre, radius) pairs."""
    total = input_radius.new_zeros(())
    mean_input_radius = input_radius.mean()
    for center, radius in activation_inputs:
        mean_radius, *balances = interval_sums(center, radius)
        width_ratio = mean_input_radius / mean_radius.clamp(min=_TINY)
        total = total + F.relu(tau - width_ratio) + _activation_balance(*balances, tau=tau)
    return total / (tau * max(len(activation_inputs), 1))


def _activation_balance(
    active: Tensor, inactive: Tensor, active_squares: Tensor, inactive_squares: Tensor, *, tau: float
) -> Tensor:
    balance = torch.zeros_like(active)
    for above, below in ((active, inactive), (active_squares, inactive_squares)):
        # Guarded divisions keep the gradient finite where the layer is skipped; `where` alone would not.
        present = (above > 0) & (below > 0)
        safe_above, safe_below = torch.where(present, above, 1), torch.where(present, below, 1)
        q = torch.minimum(safe_above / safe_below, safe_below / safe_above)
        balance = balance + torch.where(present, F.relu(tau - q), 0)
    return balance


def l1_norm(module: nn.Module) -> Float[Tensor, ""]:
    """Sum of |w| over all convolution and linear weights, the head's too; no biases, no batch norm.

    A plain sum: its coefficient is tied to the size of the network.
    """
    weights = [layer.weight for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return torch.stack([torch.linalg.vector_norm(weight, 1) for weight in weights]).sum()  # |w| is never stored
