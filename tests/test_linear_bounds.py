"""CROWN and alpha-CROWN: sound, never below IBP, exact where everything is linear, tight on 2-input networks."""

import oracles
import pytest
import strategies
import torch
from contracts import BOUND_ROUNDING, BoundContract
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ccdist.bounds import UnsupportedLayerError, logit_difference_lower_bounds
from ccdist.interval import Interval
from ccdist.linear_bounds import crown_lower_bounds
from ccdist.networks import Network, Residual

RELU = nn.ReLU()

# Of tests that run once for each activation.
SOME = settings(max_examples=max(10, settings.default.max_examples // 4))

# The first optimiser of a process imports torch's compiler, which takes seconds.
pytestmark = pytest.mark.timeout(20)


class TestCrown(BoundContract):
    def lower_bounds(self, network: Network, box: Interval, labels: Tensor) -> Tensor:
        return crown_lower_bounds(network, box, labels)


class TestAlphaCrown(BoundContract):
    def lower_bounds(self, network: Network, box: Interval, labels: Tensor) -> Tensor:
        return crown_lower_bounds(network, box, labels, optimize_steps=3)


@given(case=strategies.cases(), steps=st.integers(1, 4))
def test_the_order_of_the_bounds(case: strategies.Case, steps: int) -> None:
    ibp = logit_difference_lower_bounds(case.network, case.box, case.labels)
    crown = crown_lower_bounds(case.network, case.box, case.labels)
    optimized = crown_lower_bounds(case.network, case.box, case.labels, optimize_steps=steps)
    more = crown_lower_bounds(case.network, case.box, case.labels, optimize_steps=steps + 2)
    assert (crown >= ibp).all()
    assert (optimized >= crown).all()
    assert (more >= optimized).all()


@given(case=strategies.cases(affine=True))
def test_a_linear_network_is_exact(case: strategies.Case) -> None:
    matrix, offset = oracles.dense(case.network, tuple(case.images.shape[1:]))
    center, radius = case.box.center.flatten(1), case.box.radius.flatten(1)
    bound = crown_lower_bounds(case.network, case.box, case.labels)
    for row, label in enumerate(case.labels.tolist()):
        others = [j for j in range(case.network.num_classes) if j != label]
        weight = matrix[label] - matrix[others]
        exact = weight @ center[row] + offset[label] - offset[others] - weight.abs() @ radius[row]
        torch.testing.assert_close(bound[row], exact, rtol=BOUND_ROUNDING, atol=BOUND_ROUNDING)


def two_inputs(seed: int, hidden: int = 6, activation: nn.Module = RELU) -> Network:
    layers = [nn.Flatten(), nn.Linear(2, hidden), activation, nn.Linear(hidden, hidden), activation]
    return strategies.randomize(
        Network(nn.Sequential(*layers), nn.Linear(hidden, 3)), torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("activation", strategies.ACTIVATIONS, ids=str)
@SOME
@given(seed=st.integers(0, 10_000), epsilon=st.sampled_from([0.01, 0.1, 0.5]))
def test_no_grid_point_of_a_2_input_network_is_below_the_bound(
    activation: nn.Module, seed: int, epsilon: float
) -> None:
    network = two_inputs(seed, activation=activation)
    center = torch.rand(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    lower, upper = (center - epsilon).clamp(0, 1), (center + epsilon).clamp(0, 1)
    points = oracles.grid(lower, upper, 41).view(-1, 1, 1, 2)
    label = torch.tensor([seed % 3])
    box = Interval(lower.view(1, 1, 1, 2), upper.view(1, 1, 1, 2))
    exact = oracles.logit_differences(network(points), label.expand(len(points))).amin(0)
    for steps in (0, 5):
        bound = crown_lower_bounds(network, box, label, optimize_steps=steps)[0]
        assert (bound <= exact + BOUND_ROUNDING * (1 + exact.abs())).all()


def test_hand_numbers() -> None:
    # x in [0, 1]; pre-activations a = 2x - 1 in [-1, 1], b = x in [0, 1]; z0 = relu(a) + relu(b), z1 = 0.
    #   IBP: relu(a) >= 0, relu(b) >= 0 -> 0.   CROWN, slope 0 for a (u > -l is false): 0 + x >= 0.
    # label 1: z1 - z0 = -relu(a) - relu(b); the line above relu(a) is (a + 1) / 2 = x, and b is active:
    #   CROWN: -2x >= -2, which x = 1 attains.   IBP: -1 - 1 = -2.
    # label 2 of z2 = relu(a) - relu(b): z2 - z1 = relu(a) - x. IBP: 0 - 1 = -1. Slope 0: -x >= -1.
    #   The best slope is 1: 2x - 1 - x = x - 1 >= -1; the true minimum is -0.5 at x = 0.5;
    #   slope 1/2: x - 1/2 - x = -1/2 everywhere, so alpha-CROWN can reach -1/2.
    first, head = nn.Linear(1, 2), nn.Linear(2, 3)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[2.0], [1.0]]))
        first.bias.copy_(torch.tensor([-1.0, 0.0]))
        head.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, -1.0]]))
        head.bias.zero_()
    network = Network(nn.Sequential(nn.Flatten(), first, nn.ReLU()), head).double()
    box = Interval(torch.zeros(3, 1, 1, 1, dtype=torch.float64), torch.ones(3, 1, 1, 1, dtype=torch.float64))
    labels = torch.tensor([0, 1, 2])
    ibp = logit_difference_lower_bounds(network, box, labels)
    crown = crown_lower_bounds(network, box, labels)
    # columns: the other classes in increasing order; label 0: z0 - z2 = 2 relu(b); label 2: z2 - z0 = -2 relu(b)
    expected = torch.tensor([[0.0, 0.0], [-2.0, -1.0], [-2.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(ibp, expected)
    # label 1: z1 - z2 = x - relu(a) >= x - x = 0, where IBP says -1
    torch.testing.assert_close(crown, torch.tensor([[0.0, 0.0], [-2.0, 0.0], [-2.0, -1.0]], dtype=torch.float64))
    optimized = crown_lower_bounds(network, box, labels, optimize_steps=60)
    assert -0.6 < optimized[2, 1] <= -0.5 + BOUND_ROUNDING


def test_hand_numbers_of_a_leaky_relu() -> None:
    # x in [-1, 3], z0 = f(x), z1 = 0, f with slope 1/2: the chord from (-1, -1/2) to (3, 3) is 7/8 x + 3/8.
    #   label 0: u > -l, slope 1 below: x >= -1; IBP -1/2 is better.   label 1: -f(x) >= -7/8 x - 3/8 >= -3 at x = 3.
    # Slope 2 bends the other way: the chord from (-1, -2) to (3, 3) is 5/4 x - 3/4, below f.
    #   label 0: 5/4 x - 3/4 >= -2.   label 1, slope 1 above: -x >= -3.
    head = nn.Linear(1, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [0.0]]))
        head.bias.zero_()
    box = Interval(torch.full((2, 1), -1.0), torch.full((2, 1), 3.0))
    for slope, expected in ((0.5, [[-0.5], [-3.0]]), (2.0, [[-2.0], [-3.0]])):
        network = Network(nn.Sequential(nn.LeakyReLU(slope)), head)
        bound = crown_lower_bounds(network, box, torch.tensor([0, 1]))
        torch.testing.assert_close(bound, torch.tensor(expected))


@pytest.mark.parametrize(
    ("activation", "low", "up", "slope"),
    [
        (nn.LeakyReLU(0.5), -1.0, 1.0, 0.5),  # the minimum 0 is on the line of slope 1/2 through the kink
        (nn.LeakyReLU(2.0), -1.0, 1.0, 1.5),  # -1/2 at both ends: the chord of a concave one
        (nn.Tanh(), 0.0, 2.0, 0.4),
        (nn.Sigmoid(), -4.0, 0.0, 0.1),
        (nn.GELU(), -1.0, 1.0, 0.5),  # 0, on the tangent at 0
    ],
    ids=str,
)
def test_lines_beat_intervals(activation: nn.Module, low: float, up: float, slope: float) -> None:
    """f(x) - slope * x as a residual network of one input: intervals forget that both read the same x."""
    shortcut, head = nn.Linear(1, 1, bias=False), nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        shortcut.weight.fill_(-slope)
        head.weight.copy_(torch.tensor([[1.0], [0.0]]))
    network = Network(nn.Sequential(Residual(activation, shortcut)), head).double()
    box, label = Interval(torch.tensor([[low]]).double(), torch.tensor([[up]]).double()), torch.tensor([0])
    x = torch.linspace(low, up, 4001, dtype=torch.float64)
    exact = float((activation(x) - slope * x).min())
    bound = float(crown_lower_bounds(network, box, label, optimize_steps=20))
    ibp = float(logit_difference_lower_bounds(network, box, label).detach())
    assert bound <= exact + BOUND_ROUNDING
    assert exact - bound < 0.3 * (exact - ibp)


def test_optimisation_helps_somewhere() -> None:
    gains = []
    for seed in range(5):
        network = two_inputs(seed)
        box = Interval(
            torch.full((1, 1, 1, 2), 0.3, dtype=torch.float64), torch.full((1, 1, 1, 2), 0.7, dtype=torch.float64)
        )
        label = torch.tensor([0])
        gain = crown_lower_bounds(network, box, label, optimize_steps=10) - crown_lower_bounds(network, box, label)
        gains.append(float(gain.max()))
    assert max(gains) > 0.01


@settings(max_examples=5)
@given(case=strategies.cases())
def test_the_result_has_no_graph_and_leaves_no_gradient(case: strategies.Case) -> None:
    bound = crown_lower_bounds(case.network, case.box, case.labels, optimize_steps=2)
    assert not bound.requires_grad
    assert all(p.grad is None for p in case.network.parameters())


def test_optimisation_works_without_gradients_enabled() -> None:
    network, box = two_inputs(0), Interval(torch.zeros(1, 1, 1, 2).double(), torch.ones(1, 1, 1, 2).double())
    with torch.no_grad():
        inside = crown_lower_bounds(network, box, torch.tensor([0]), optimize_steps=3)
    assert torch.equal(inside, crown_lower_bounds(network, box, torch.tensor([0]), optimize_steps=3))


def test_negative_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="optimize_steps is -1"):
        crown_lower_bounds(
            two_inputs(0), Interval(*torch.zeros(2, 1, 1, 1, 2).double()), torch.tensor([0]), optimize_steps=-1
        )


@pytest.mark.parametrize(
    "options", [{"ceil_mode": True}, {"padding": 1, "count_include_pad": False}, {"divisor_override": 2}]
)
def test_pooling_that_is_no_plain_mean_is_refused(options: dict[str, int]) -> None:
    network = Network(nn.Sequential(nn.AvgPool2d(2, **options), nn.Flatten()), nn.Linear(9, 2))
    size = 5 if "ceil_mode" in options else (4 if "padding" in options else 6)
    box = Interval(torch.zeros(1, 1, size, size), torch.ones(1, 1, size, size))
    with pytest.raises(UnsupportedLayerError, match="AvgPool2d"):
        crown_lower_bounds(network, box, torch.tensor([0]))
