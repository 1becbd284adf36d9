"""The Shi regulariser and L1."""

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import tensors
from torch import Tensor, nn

from ccdist.interval import Interval
from ccdist.networks import build_network
from ccdist.regularizers import l1_norm, shi_regularizer

# float64 sums of a few dozen terms along two routes.
ROUNDING = 1e-10


@given(radius=tensors(3, 4, scale=0.1), ends=tensors(3, 2, 3, 5, scale=1.0), tau=st.floats(0.1, 1))
def test_it_is_the_formula(radius: Tensor, ends: Tensor, tau: float) -> None:
    boxes = [Interval(layer.amin(0), layer.amax(0)) for layer in ends]
    actual = float(shi_regularizer(radius.abs(), boxes, tau=tau))
    assert actual == pytest.approx(oracles.shi(radius.abs(), boxes, tau), rel=ROUNDING)


def test_hand_numbers() -> None:
    # r_0 = 0.1. One layer of four units, [1, 3], [-3, -1], [1, 3], [-1, 1]: centres 2, -2, 2, 0, radius 1.
    #   tight: relu(0.5 - 0.1 / 1) / 0.5 = 0.8
    #   rho1 = (2 + 2) / 2 = 2, q = 1/2: relu(0.5 - 0.5) = 0
    #   mean centre 0.5: active deviations 2 * 1.5^2 = 4.5, inactive 2.5^2 = 6.25: q = 0.72 > 0.5: 0
    box = Interval(torch.tensor([[1.0, -3.0, 1.0, -1.0]]), torch.tensor([[3.0, -1.0, 3.0, 1.0]]))
    assert float(shi_regularizer(torch.full((1, 2), 0.1), [box])) == pytest.approx(0.8)
    # tau = 1: tight 0.9, rho1 1 - 0.5 = 0.5, rho2 1 - 0.72 = 0.28
    assert float(shi_regularizer(torch.full((1, 2), 0.1), [box], tau=1.0)) == pytest.approx(0.9 + 0.5 + 0.28)


def test_narrow_and_balanced_is_free() -> None:
    box = Interval(torch.tensor([[0.9, -1.1]]), torch.tensor([[1.1, -0.9]]))
    assert float(shi_regularizer(torch.full((1, 2), 0.1), [box, box])) == 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_layer_all_on_or_all_off_adds_no_balance_and_no_nan(sign: float) -> None:
    center = torch.tensor([[2.0, 3.0]]) * sign
    lower, upper = (center - 0.1).requires_grad_(), (center + 0.1).requires_grad_()
    loss = shi_regularizer(torch.full((1, 2), 0.1), [Interval(lower, upper)])
    assert float(loss.detach()) == pytest.approx(0)
    loss.backward()
    assert lower.grad is not None
    assert torch.isfinite(lower.grad).all()


def test_a_box_without_width_is_finite() -> None:
    x = torch.tensor([[1.0, -2.0]], requires_grad=True)
    loss = shi_regularizer(torch.zeros(1, 2), [Interval(x, x)])
    loss.backward()
    assert torch.isfinite(loss)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_no_relu_no_term() -> None:
    assert float(shi_regularizer(torch.ones(1, 2), [])) == 0


def test_gradients_reach_the_bounds() -> None:
    lower = torch.tensor([[0.5, -7.0]], dtype=torch.float64, requires_grad=True)
    upper = torch.tensor([[2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    radius = torch.full((1, 2), 0.1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda low, up: shi_regularizer(radius, [Interval(low, up)]), (lower, upper))


def test_l1_counts_weights_of_convolutions_and_linear_layers_only() -> None:
    network = build_network("cnn3", input_shape=(1, 8, 8), num_classes=3, width=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(-0.5)
    # conv 2*1*5*5 = 50, conv 4*2*4*4 = 128, head 3*16 = 48: 226 weights of size 1/2
    weights = [layer.weight.numel() for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert weights == [50, 128, 48]
    assert float(l1_norm(network).detach()) == 113.0
