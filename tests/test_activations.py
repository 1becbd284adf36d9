"""Minima, bends and enclosing lines of the smooth activations, against their definitions."""

import math
from collections.abc import Callable

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import tensors
from torch import Tensor, nn

from ccdist.activations import GELU_INFLECTION, GELU_MINIMUM, Curve, curve_of, enclosing_lines
from ccdist.interval import Interval

SMOOTH = [nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.GELU(approximate="tanh")]
# float64 values and slopes of order one along two routes; offsets are of the order of the box's ends.
ROUNDING = 1e-12


def curve(layer: nn.Module) -> Curve:
    found = curve_of(layer)
    assert found is not None
    return found


def gelu_by_definition(approximate: str) -> Callable[[float], tuple[float, float]]:
    """x -> (gelu(x), its derivative), in Python floats."""

    def exact(x: float) -> tuple[float, float]:
        cumulative = math.erfc(-x / math.sqrt(2)) / 2
        return x * cumulative, cumulative + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def with_tanh(x: float) -> tuple[float, float]:
        t = math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
        return x * (1 + t) / 2, (1 + t) / 2 + x * (1 - t * t) * inner / 2

    return exact if approximate == "none" else with_tanh


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_minimum_of_gelu_is_where_its_derivative_is_zero(approximate: str) -> None:
    gelu = gelu_by_definition(approximate)
    low, up = -1.0, -0.5
    for _ in range(60):
        middle = (low + up) / 2
        low, up = (middle, up) if gelu(middle)[1] < 0 else (low, middle)
    minimizer, minimum = GELU_MINIMUM[approximate]
    assert minimizer == pytest.approx(up, rel=1e-15)
    assert minimum == pytest.approx(gelu(up)[0], rel=1e-15)
    values = nn.functional.gelu(torch.linspace(-40, 5, 90_001).double(), approximate=approximate)
    assert float(values.min()) == pytest.approx(minimum, rel=1e-6)  # the grid's step is 0.0005
    assert values.min() >= minimum


def second_derivative(layer: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    return second


@pytest.mark.parametrize("layer", SMOOTH, ids=str)
def test_a_curve_bends_as_its_pieces_say_and_they_cover_the_line(layer: nn.Module) -> None:
    pieces = curve(layer)
    for sign, ranges in ((1, pieces.convex), (-1, pieces.concave)):
        for start, end in ranges:
            inside = torch.linspace(max(start, -30.0), min(end, 30.0), 4001, dtype=torch.float64)
            assert (sign * second_derivative(layer, inside) >= -ROUNDING).all()
    ends = sorted(end for piece in (*pieces.convex, *pieces.concave) for end in piece)
    assert ends[0] == -math.inf
    assert ends[-1] == math.inf
    assert ends[1:-1:2] == ends[2:-1:2]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_changes_its_bend_at_the_inflection(approximate: str) -> None:
    around = GELU_INFLECTION[approximate] + torch.tensor([-1e-9, 1e-9], dtype=torch.float64)
    before, after = second_derivative(nn.GELU(approximate), around).tolist()
    assert before > 0 > after


@pytest.mark.parametrize("layer", SMOOTH, ids=str)
def test_values_and_derivatives_are_those_of_the_layer(layer: nn.Module) -> None:
    x = torch.linspace(-30, 30, 2001, dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(curve(layer).value(x), layer(x))
    torch.testing.assert_close(curve(layer).derivative(x.detach()), derivative, rtol=ROUNDING, atol=ROUNDING)


def test_only_smooth_activations_are_curves() -> None:
    assert all(curve_of(layer) is None for layer in (nn.ReLU(), nn.LeakyReLU(), nn.Linear(1, 1), nn.Softplus()))


@pytest.mark.parametrize("layer", SMOOTH, ids=str)
@given(ends=tensors(2, 12), width=st.sampled_from([0.0, 1e-6, 1e-2, 1.0, 10.0, 1e4]))
def test_the_lines_enclose_the_curve(layer: nn.Module, ends: Tensor, width: float) -> None:
    box = Interval(ends[0] - width * ends[1].abs() / 2, ends[0] + width * ends[1].abs() / 2)
    lines = enclosing_lines(curve(layer), box)
    share = torch.cat([torch.linspace(0, 1, 2001), 0.5 + torch.linspace(-1e-3, 1e-3, 201)]).double().unsqueeze(1)
    points = (box.lower + share * (box.upper - box.lower)).minimum(box.upper)
    values = layer(points)
    slack = ROUNDING * (1 + points.abs())
    assert (lines.lower_slope * points + lines.lower_offset <= values + slack).all()
    assert (lines.upper_slope * points + lines.upper_offset >= values - slack).all()


@pytest.mark.parametrize("layer", SMOOTH, ids=str)
@given(ends=tensors(2, 6))
def test_the_lines_enclose_the_curve_in_float32(layer: nn.Module, ends: Tensor) -> None:
    box = Interval(ends.amin(0).float(), ends.amax(0).float())
    lines = enclosing_lines(curve(layer), box)
    points = (box.lower + torch.linspace(0, 1, 1001).unsqueeze(1) * (box.upper - box.lower)).minimum(box.upper).double()
    values, slack = layer(points), 16 * torch.finfo(torch.float32).eps * (1 + points.abs())
    assert (lines.lower_slope * points + lines.lower_offset <= values + slack).all()
    assert (lines.upper_slope * points + lines.upper_offset >= values - slack).all()


@pytest.mark.parametrize("layer", SMOOTH, ids=str)
@given(ends=tensors(2, 4))
def test_the_lines_are_close_to_the_best_at_the_middle(layer: nn.Module, ends: Tensor) -> None:
    """The best line above is the upper convex hull of the curve's points, as the oracle walks it."""
    ends = ends.clamp(-6, 6)
    box = Interval(ends.amin(0), ends.amax(0))
    lines = enclosing_lines(curve(layer), box)
    above = lines.upper_slope * box.center + lines.upper_offset
    below = lines.lower_slope * box.center + lines.lower_offset
    for unit in range(4):
        x = torch.linspace(float(box.lower[unit]), float(box.upper[unit]), 1001, dtype=torch.float64)
        middle, tolerance = float(box.center[unit]), 0.005 * float(x[-1] - x[0])
        assert float(above[unit]) <= oracles.upper_hull(x, layer(x), middle) + tolerance + ROUNDING
        assert float(below[unit]) >= -oracles.upper_hull(x, -layer(x), middle) - tolerance - ROUNDING
