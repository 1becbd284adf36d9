"""Each fused operation against the plain lines that its docstring gives: values, and gradients through every output.

The plain code is differentiated by autograd, so a wrong hand-written derivative shows; gradcheck compares with
difference quotients too.
"""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from ccdist import fused
from ccdist.fused import (
    Geometry,
    batch_norm_with_statistics,
    interval_convolution,
    interval_linear,
    interval_relu,
    interval_sums,
    linear,
    product,
)

# float64 sums of some hundred terms of order one in two orders.
ROUNDING = 1e-12
# float32: an epsilon of 1.2e-7 and sums of some ten terms.
ROUNDING_FLOAT32 = 1e-5
seeds = st.integers(0, 2**31 - 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def ordered(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], used: Sequence[bool]) -> list[Tensor | None]:
    """Of a random weighted sum of the used outputs; the weights do not depend on the code under test."""
    read = [(number, out) for number, out in enumerate(outputs) if used[number]]
    total = torch.stack([(normal(*out.shape, seed=number) * out).sum() for number, out in read]).sum()
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(total, wanted, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in inputs]


def assert_same_function(
    function: Callable[..., tuple[Tensor, ...]],
    plain: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    used: Sequence[bool],
) -> None:
    before = [x.detach().clone() for x in inputs]
    actual, expected = function(*inputs), plain(*inputs)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=ROUNDING, atol=ROUNDING * (1 + float(other.detach().abs().max())))
    zipped = zip(gradients(actual, inputs, used), gradients(expected, inputs, used), strict=True)
    for x, (grad, plain_grad) in zip(inputs, zipped, strict=True):
        reached = torch.zeros_like(x) if plain_grad is None else plain_grad
        given = torch.zeros_like(x) if grad is None else grad
        scale = float(reached.abs().max()) if reached.numel() else 0.0
        torch.testing.assert_close(given, reached, rtol=0, atol=ROUNDING * (1 + scale))
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, inputs, strict=True))


# -- batch norm

EPS = 1e-5
outputs_of_batch_norm = st.tuples(*[st.booleans()] * 3).filter(any)


def plain_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dims, view = [0, *range(2, x.dim())], (1, -1, *(1,) * (x.dim() - 2))
    mean = x.mean(dims)
    variance = (x - mean.view(view)).square().mean(dims)
    y = (x - mean.view(view)) / (variance + eps).sqrt().view(view)
    if weight is not None:
        y = y * weight.view(view)
    if bias is not None:
        y = y + bias.view(view)
    return (y.clamp(min=0) if relu else y), mean, variance


@given(
    seed=seeds,
    shape=st.sampled_from([(4, 3), (2, 1), (4, 3, 2, 5), (2, 4, 3, 3), (3, 2, 1, 1)]),
    affine=st.booleans(),
    relu=st.booleans(),
    channels_last=st.booleans(),
    used=outputs_of_batch_norm,
    needs=st.tuples(*[st.booleans()] * 3),
)
def test_batch_norm_is_its_plain_lines(
    seed: int,
    shape: tuple[int, ...],
    affine: bool,
    relu: bool,
    channels_last: bool,
    used: tuple[bool, bool, bool],
    needs: tuple[bool, bool, bool],
) -> None:
    """Also where only a statistic is differentiated, the weights are frozen, or the input is the first one."""
    x = ordered(2 * normal(*shape, seed=seed) + 1, channels_last)
    weights = [normal(shape[1], seed=seed + 1), normal(shape[1], seed=seed + 2)] if affine else []
    inputs = [t.requires_grad_(need) for t, need in zip([x, *weights], needs, strict=False)]
    # something must be differentiable, and reachable: the statistics do not depend on the weights
    assume(inputs[0].requires_grad or (used[0] and any(t.requires_grad for t in inputs)))

    def function(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        return batch_norm_with_statistics(x, weight, bias, eps=EPS, relu=relu)

    def plain(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        return plain_batch_norm(x, weight, bias, EPS, relu)

    assert_same_function(function, plain, inputs, used)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", [(5, 2), (2, 2, 2, 3)])
def test_batch_norm_by_difference_quotients(shape: tuple[int, ...], relu: bool) -> None:
    inputs = [normal(*shape, seed=5), normal(2, seed=6), normal(2, seed=7)]
    kinks = plain_batch_norm(*inputs, eps=EPS, relu=False)[0].abs().min()
    assert float(kinks) > 1e-3, "an output next to the kink has no numeric gradient: choose another seed"
    assert torch.autograd.gradcheck(
        lambda *args: batch_norm_with_statistics(*args, eps=EPS, relu=relu), [x.requires_grad_() for x in inputs]
    )


def test_gradients_come_back_through_mean_and_variance_by_hand() -> None:
    # one channel, batch 1, 3: mean 2, variance 1; d mean / dx = 1/2, 1/2; d var / dx = 2 (x - mean) / 2 = -1, 1
    x = torch.tensor([[1.0], [3.0]], dtype=torch.float64, requires_grad=True)
    _, mean, variance = batch_norm_with_statistics(x, None, None, eps=0.0, relu=False)
    (through_mean,) = torch.autograd.grad(mean.sum(), x, retain_graph=True)
    (through_variance,) = torch.autograd.grad(variance.sum(), x)
    assert through_mean.flatten().tolist() == pytest.approx([0.5, 0.5])
    assert through_variance.flatten().tolist() == pytest.approx([-1.0, 1.0])


def test_a_constant_channel_has_variance_0_and_no_nan() -> None:
    x = torch.full((4, 1, 2, 2), 0.3, requires_grad=True)
    y, mean, variance = batch_norm_with_statistics(x, None, None, eps=EPS, relu=False)
    assert mean.item() == pytest.approx(0.3)
    assert 0 <= variance.item() <= EPS * ROUNDING_FLOAT32
    (grad,) = torch.autograd.grad((y * torch.randn(y.shape, generator=generator())).sum() + variance.sum(), x)
    assert torch.isfinite(grad).all()


def test_batch_norm_of_bfloat16_keeps_its_statistics_in_float32() -> None:
    exact = (normal(8, 3, 4, 4) * 2 + 5).to(torch.bfloat16).double()
    weight, bias = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.1, 0.2, -0.3])
    x = exact.to(torch.bfloat16).contiguous(memory_format=torch.channels_last).requires_grad_()
    y, mean, variance = batch_norm_with_statistics(x, weight, bias, eps=EPS, relu=True)
    expected = plain_batch_norm(exact, weight.double(), bias.double(), EPS, True)
    assert y.dtype == torch.bfloat16
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mean.double(), expected[1], rtol=ROUNDING_FLOAT32, atol=0)
    torch.testing.assert_close(variance.double(), expected[2], rtol=ROUNDING_FLOAT32, atol=0)
    # one rounding to 8 bits of mantissa, at 0 to 8
    torch.testing.assert_close(y.double(), expected[0], rtol=2**-8, atol=2**-8)
    (grad,) = torch.autograd.grad((y * y).sum() + mean.sum() + variance.sum(), x)
    assert grad.dtype == torch.bfloat16
    assert torch.isfinite(grad).all()


# -- interval ReLU


def plain_interval_relu(center: Tensor, radius: Tensor, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    lower, upper = (center - radius).clamp(min=0), (center + radius).clamp(min=0)
    if shrink != 1:
        unstable = (center - radius <= 0) & (center + radius >= 0)
        upper = torch.where(unstable, shrink * upper, upper)
    return (upper + lower) / 2, (upper - lower) / 2


both_outputs = st.tuples(st.booleans(), st.booleans()).filter(any)


@given(seed=seeds, shrink=st.sampled_from([1.0, 0.8, 0.3]), used=both_outputs, flat=st.booleans(), last=st.booleans())
def test_interval_relu_is_its_plain_lines(
    seed: int, shrink: float, used: tuple[bool, bool], flat: bool, last: bool
) -> None:
    shape = (3, 40) if flat else (3, 2, 4, 5)
    center = ordered(normal(*shape, seed=seed), last).requires_grad_()
    radius = ordered(normal(*shape, seed=seed + 1).abs() * 0.7, last).requires_grad_()
    assert_same_function(
        lambda c, r: interval_relu(c, r, shrink=shrink),
        lambda c, r: plain_interval_relu(c, r, shrink),
        [center, radius],
        used,
    )


@given(seed=seeds, needs=st.tuples(st.booleans(), st.booleans()).filter(any))
def test_interval_relu_of_inputs_that_need_no_gradient(seed: int, needs: tuple[bool, bool]) -> None:
    inputs = [normal(3, 20, seed=seed), normal(3, 20, seed=seed + 1).abs()]
    for x, need in zip(inputs, needs, strict=True):
        x.requires_grad_(need)
    assert_same_function(interval_relu, plain_interval_relu, inputs, (True, True))


@pytest.mark.parametrize("shrink", [1.0, 0.8])
def test_interval_relu_by_difference_quotients(shrink: float) -> None:
    # active, dead and unstable units, none of them at a kink
    center = torch.tensor([[2.0, -2.0, 0.3, -0.3]], dtype=torch.float64, requires_grad=True)
    radius = torch.tensor([[0.5, 0.5, 0.5, 0.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c, r: interval_relu(c, r, shrink=shrink), (center, radius))


def test_interval_relu_by_hand() -> None:
    # [1, 3] stays; [-3, -1] -> 0; [-1, 2] -> [0, 2], with shrink 0.8 [0, 1.6]; a point 1 stays; [0, 2] contains 0
    center = torch.tensor([[2.0, -2.0, 0.5, 1.0, 1.0]], dtype=torch.float64)
    radius = torch.tensor([[1.0, 1.0, 1.5, 0.0, 1.0]], dtype=torch.float64)
    plain = interval_relu(center, radius)
    assert [x.flatten().tolist() for x in plain] == [[2, 0, 1, 1, 1], [1, 0, 1, 0, 1]]
    new_center, new_radius = interval_relu(center, radius, shrink=0.8)
    assert new_center.flatten().tolist() == pytest.approx([2, 0, 0.8, 1, 0.8])
    assert new_radius.flatten().tolist() == pytest.approx([1, 0, 0.8, 0, 0.8])


@pytest.mark.parametrize("shrink", [1.0, 0.8])
def test_active_units_keep_a_tiny_radius_in_bfloat16(shrink: float) -> None:
    """5 - 1e-4 is 5 in bfloat16: the difference of the ends would be 0."""
    center = torch.full((1, 3), 5.0, dtype=torch.bfloat16)
    radius = torch.tensor([[1e-4, 1e-30, 0.0]], dtype=torch.bfloat16)
    assert torch.equal((center + radius) - (center - radius), torch.zeros_like(radius))
    new_center, new_radius = interval_relu(center, radius, shrink=shrink)
    assert torch.equal(new_center, center)
    assert torch.equal(new_radius, radius)


# -- what the Shi regulariser reads


def plain_interval_sums(center: Tensor, radius: Tensor) -> tuple[Tensor]:
    active, inactive = (center > radius).double(), (center < -radius).double()
    squares = (center - center.mean()) ** 2
    sums = ((center * active).sum(), -(center * inactive).sum(), (squares * active).sum(), (squares * inactive).sum())
    return (torch.stack([radius.mean(), *sums]),)


@given(
    seed=seeds,
    shape=st.sampled_from([(3, 7), (1, 1), (2, 3, 4, 2)]),
    shift=st.sampled_from([-9.0, 0.0, 9.0]),
    needs=st.tuples(st.booleans(), st.booleans()).filter(any),
    last=st.booleans(),
)
def test_interval_sums_are_their_plain_lines(
    seed: int, shape: tuple[int, ...], shift: float, needs: tuple[bool, bool], last: bool
) -> None:
    """Also with all units active, and with all of them dead."""
    inputs = [ordered(normal(*shape, seed=seed) + shift, last), ordered(normal(*shape, seed=seed + 1).abs() / 2, last)]
    inputs = [x.requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    assert_same_function(lambda c, r: (interval_sums(c, r),), plain_interval_sums, inputs, (True,))


def test_interval_sums_by_hand_and_by_difference_quotients() -> None:
    # [1, 3] and [3, 5] active, [-3, -1] dead, [-1, 1] unstable: mean centre 1; squares 1 + 9 and 9
    center = torch.tensor([[2.0, 4.0, -2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    radius = torch.ones_like(center, requires_grad=True)
    assert interval_sums(center, radius).tolist() == pytest.approx([1, 6, 2, 10, 9])
    assert torch.autograd.gradcheck(interval_sums, (center, radius))


# -- interval of affine layers


@given(
    seed=seeds,
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 4)),
    needs=st.tuples(*[st.booleans()] * 3).filter(any),
    used=both_outputs,
)
def test_interval_linear_is_its_plain_lines(
    seed: int, sizes: tuple[int, int, int], needs: tuple[bool, bool, bool], used: tuple[bool, bool]
) -> None:
    batch, wide, out = sizes
    inputs = _interval_inputs((batch, wide), (out, wide), seed, needs)
    assume(_something_to_differentiate(needs, used))
    assert_same_function(interval_linear, lambda c, r, w: (F.linear(c, w), F.linear(r, w.abs())), inputs, used)


def _interval_inputs(
    shape: tuple[int, ...], weight_shape: tuple[int, ...], seed: int, needs: Sequence[bool], bias: bool = False
) -> list[Tensor]:
    """Centre, radius, weight, and a bias where it is asked for."""
    weight = normal(*weight_shape, seed=seed + 2)
    weight[0].view(-1)[0] = 0.0  # |w| has no slope at 0: autograd's choice is 0
    inputs = [normal(*shape, seed=seed), normal(*shape, seed=seed + 1).abs(), weight]
    inputs += [normal(weight_shape[0], seed=seed + 3)] if bias else []
    return [x.requires_grad_(need) for x, need in zip(inputs, needs, strict=False)]


def _something_to_differentiate(needs: Sequence[bool], used: Sequence[bool]) -> bool:
    return needs[2] or (needs[0] and used[0]) or (needs[1] and used[1]) or (len(needs) > 3 and needs[3] and used[0])


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    pair = st.tuples(st.integers(1, 2), st.integers(1, 2))
    return draw(pair), draw(st.tuples(st.integers(0, 2), st.integers(0, 2))), draw(pair), draw(st.integers(1, 2))


@given(
    seed=seeds,
    geometry=geometries(),
    channels=st.integers(1, 2),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    bias=st.booleans(),
    needs=st.tuples(*[st.booleans()] * 4),
    used=both_outputs,
    channels_last=st.booleans(),
)
def test_interval_convolution_is_its_plain_lines(
    seed: int,
    geometry: Geometry,
    channels: int,
    kernel: tuple[int, int],
    bias: bool,
    needs: tuple[bool, bool, bool, bool],
    used: tuple[bool, bool],
    channels_last: bool,
) -> None:
    """Strides, padding, dilation, groups; a first layer, whose inputs need no gradient; frozen weights."""
    groups = geometry[3]
    shape, weight_shape = (2, channels * groups, 5, 6), (2 * groups, channels, *kernel)
    leaves = _interval_inputs(shape, weight_shape, seed, (False,) * 4, bias)
    inputs = [ordered(x, channels_last).requires_grad_(need) for x, need in zip(leaves, needs, strict=False)]
    assume(_something_to_differentiate(needs[: len(inputs)], used))
    assert_same_function(
        lambda c, r, w, b=None: interval_convolution(c, r, w, b, geometry),
        lambda c, r, w, b=None: (F.conv2d(c, w, b, *geometry), F.conv2d(r, w.abs(), None, *geometry)),
        inputs,
        used,
    )


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4))[:-1])
def test_only_what_needs_a_gradient_gets_one(needs: tuple[bool, ...]) -> None:
    geometry: Geometry = ((1, 1), (1, 1), (1, 1), 1)
    inputs = _interval_inputs((2, 3, 4, 4), (2, 3, 3, 3), 0, needs, bias=True)
    center, radius = interval_convolution(*inputs, geometry)
    (center.sum() + radius.sum()).backward()
    assert tuple(x.grad is not None for x in inputs) == needs
    if any(needs[:3]):
        inputs = _interval_inputs((2, 6), (3, 6), 0, needs[:3])
        center, radius = interval_linear(*inputs)
        (center.sum() + radius.sum()).backward()
        assert tuple(x.grad is not None for x in inputs) == needs[:3]


def test_intervals_of_affine_layers_by_difference_quotients() -> None:
    inputs = [x.detach() for x in _interval_inputs((2, 4), (3, 4), 1, (True,) * 3)]
    inputs[2][0, 0] = 0.5  # away from the kink of |w|
    assert torch.autograd.gradcheck(interval_linear, [x.requires_grad_() for x in inputs])
    images = [x.detach() for x in _interval_inputs((2, 2, 3, 3), (2, 1, 2, 2), 1, (True,) * 4, bias=True)]
    images[2][0, 0, 0, 0] = 0.5
    geometry: Geometry = ((2, 1), (1, 0), (1, 1), 2)
    assert torch.autograd.gradcheck(
        lambda *args: interval_convolution(*args, geometry), [x.requires_grad_() for x in images]
    )


# -- products by either matrix library


@given(
    seed=seeds,
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 4)),
    bias=st.booleans(),
    needs=st.tuples(*[st.booleans()] * 3).filter(lambda needs: any(needs[:2])),
)
def test_linear_is_its_plain_line(
    seed: int, sizes: tuple[int, int, int], bias: bool, needs: tuple[bool, bool, bool]
) -> None:
    batch, wide, out = sizes
    inputs = [normal(batch, wide, seed=seed), normal(out, wide, seed=seed + 1), *([normal(out, seed=seed + 2)] * bias)]
    inputs = [x.requires_grad_(need) for x, need in zip(inputs, needs, strict=False)]
    assert_same_function(
        lambda x, w, b=None: (linear(x, w, b),), lambda x, w, b=None: (F.linear(x, w, b),), inputs, (True,)
    )


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 7, 3), (5, 33, 17), (64, 130, 40)])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_float32_products_by_either_library(
    sizes: tuple[int, int, int], transposed: tuple[bool, bool], onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a matrix or of the transposed view of one, as backward passes need them."""
    if onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(fused, "_prefers_onednn", lambda: onednn)
    rows, inner, columns = sizes
    a, b = normal(rows, inner).float(), normal(columns, inner, seed=1).float()
    given_a, given_b = (x.t().contiguous().t() if flip else x for x, flip in zip((a, b), transposed, strict=True))
    expected = a.double() @ b.double().t()
    actual = product(given_a, given_b)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=ROUNDING_FLOAT32, atol=ROUNDING_FLOAT32 * inner**0.5)


@pytest.mark.parametrize("onednn", [True, False])
def test_float32_gradients_by_either_library(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(fused, "_prefers_onednn", lambda: onednn)
    exact = _interval_inputs((6, 20), (7, 20), 3, (True,) * 3)
    inputs = [x.detach().float().requires_grad_() for x in exact]
    for function, plain in (
        (interval_linear, lambda c, r, w: (F.linear(c, w), F.linear(r, w.abs()))),
        (lambda c, r, w: (linear(c, w, None), linear(r, w, None)), lambda c, r, w: (F.linear(c, w), F.linear(r, w))),
    ):
        found = gradients(function(*inputs), inputs, (True, True))
        expected = gradients(plain(*exact), exact, (True, True))
        for grad, other in zip(found, expected, strict=True):
            torch.testing.assert_close(grad.double(), other, rtol=0, atol=ROUNDING_FLOAT32 * float(other.abs().max()))
