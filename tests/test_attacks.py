"""PGD against the same attack by hand; what training and evaluation rely on."""

import oracles
import pytest
import strategies
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ccdist.attacks import ascend, cross_entropy_of, noisy_fgsm, pgd, uniform_start, worst_points
from ccdist.bounds import logit_differences
from ccdist.interval import Interval
from ccdist.networks import Network


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def losses(network: nn.Module, points: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(network(points), labels, reduction="none")


@given(case=strategies.cases(), steps=st.integers(0, 4), step_size=st.sampled_from([0.1, 0.5, 2.0]))
def test_last_is_the_end_of_the_iterates_by_hand(case: strategies.Case, steps: int, step_size: float) -> None:
    start = uniform_start(case.box, generator())
    expected = oracles.pgd(case.network, start, case.labels, case.box, steps=steps, step_size=step_size)[-1]
    actual = pgd(
        case.network, case.labels, region=case.box, steps=steps, step_size=step_size, generator=generator(), keep="last"
    )
    assert torch.equal(actual, expected)


@given(case=strategies.cases(), steps=st.integers(0, 4))
def test_best_is_the_worst_iterate_of_each_image(case: strategies.Case, steps: int) -> None:
    start = uniform_start(case.box, generator())
    iterates = oracles.pgd(case.network, start, case.labels, case.box, steps=steps, step_size=0.5)
    worst = torch.stack([losses(case.network, point, case.labels) for point in iterates]).amax(0)
    points = pgd(case.network, case.labels, region=case.box, steps=steps, step_size=0.5, generator=generator())
    assert torch.equal(losses(case.network, points, case.labels), worst)


@given(case=strategies.cases(), restarts=st.integers(1, 3))
def test_points_stay_in_the_box_and_inputs_stay_as_they_are(case: strategies.Case, restarts: int) -> None:
    lower, upper = case.box.lower.clone(), case.box.upper.clone()
    points = pgd(
        case.network, case.labels, region=case.box, steps=3, step_size=0.7, restarts=restarts, generator=generator()
    )
    assert (points >= lower).all()
    assert (points <= upper).all()
    assert torch.equal(case.box.lower, lower)
    assert torch.equal(case.box.upper, upper)
    assert not points.requires_grad
    assert all(p.grad is None for p in case.network.parameters())


@given(case=strategies.cases())
def test_more_restarts_never_lower_the_loss(case: strategies.Case) -> None:
    found = [
        losses(
            case.network,
            pgd(case.network, case.labels, region=case.box, steps=2, step_size=0.5, restarts=n, generator=generator()),
            case.labels,
        )
        for n in (1, 2, 4)
    ]
    assert (found[0] <= found[1]).all()
    assert (found[1] <= found[2]).all()


def test_a_step_of_2_radii_lands_on_the_worst_corner_of_a_linear_network() -> None:
    # z0 - z1 = x0 - x1: the cross-entropy of class 0 grows as x0 falls and x1 rises.
    head = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    network = Network(nn.Sequential(nn.Flatten()), head)
    box = Interval(torch.tensor([[[[0.2, 0.1]]]]), torch.tensor([[[[0.6, 0.3]]]]))
    points = pgd(network, torch.tensor([0]), region=box, steps=1, step_size=2.0, generator=generator())
    assert points.flatten().tolist() == [pytest.approx(0.2), pytest.approx(0.3)]


def test_one_step_by_hand() -> None:
    # radius 0.2 and 0.1; half a radius: x0 0.4 -> 0.3, x1 0.25 -> 0.30, which is the border 0.3
    head = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    box = Interval(*torch.tensor([[[0.2, 0.1]], [[0.6, 0.3]]], dtype=torch.float64))
    x = torch.tensor([[0.4, 0.25]], dtype=torch.float64)
    moved, logits = ascend(head, x, cross_entropy_of(torch.tensor([0])), region=box, step_size=0.5)
    torch.testing.assert_close(moved, torch.tensor([[0.3, 0.3]], dtype=torch.float64))
    assert torch.equal(logits, x)


def test_starts_are_uniform_in_the_box() -> None:
    box = Interval(torch.full((20_000, 1), -1.0), torch.full((20_000, 1), 3.0))
    start = uniform_start(box, generator())
    # uniform on [-1, 3]: mean 1, variance 16 / 12; five standard errors of the mean of 20,000
    assert abs(float(start.mean()) - 1) < 5 * (16 / 12 / 20_000) ** 0.5
    assert float(start.min()) < -0.99
    assert float(start.max()) > 2.99


def test_the_generator_decides() -> None:
    box = Interval(torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2))
    network = Network(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU()), nn.Linear(3, 2))
    labels = torch.tensor([0, 1, 0, 1])
    before = torch.get_rng_state()
    one, same, other = (
        pgd(network, labels, region=box, steps=1, step_size=0.1, generator=generator(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_network_that_gives_nan_still_gets_points_of_the_box() -> None:
    box = Interval(torch.full((2, 3), 0.25), torch.full((2, 3), 0.75))
    points = pgd(
        lambda x: x * torch.nan, torch.tensor([0, 1]), region=box, steps=2, step_size=0.5, generator=generator()
    )
    assert (points >= 0.25).all()
    assert (points <= 0.75).all()


def test_last_of_several_restarts_is_refused() -> None:
    box = Interval(torch.zeros(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="keep='last' has no meaning with 2 restarts"):
        pgd(
            nn.Linear(2, 2),
            torch.tensor([0]),
            region=box,
            steps=1,
            step_size=1.0,
            generator=generator(),
            restarts=2,
            keep="last",
        )


@given(case=strategies.cases(), steps=st.integers(0, 3), restarts=st.integers(1, 2))
def test_worst_points_by_hand(case: strategies.Case, steps: int, restarts: int) -> None:
    """The smallest margin over the clean image and every iterate of every restart."""
    stream = generator()
    candidates = [case.images]
    for _ in range(restarts):
        start = uniform_start(case.box, stream)
        candidates += oracles.pgd(case.network, start, case.labels, case.box, steps=steps, step_size=0.5)
    smallest = torch.stack([logit_differences(case.network(x), case.labels).amin(1) for x in candidates]).amin(0)
    points, margins = worst_points(
        case.network,
        case.images,
        case.labels,
        region=case.box,
        steps=steps,
        step_size=0.5,
        restarts=restarts,
        generator=generator(),
    )
    assert torch.equal(margins, smallest)
    assert torch.equal(logit_differences(case.network(points), case.labels).amin(1), smallest)
    assert not points.requires_grad


@given(case=strategies.cases())
def test_no_attack_beats_the_clean_image_by_giving_up(case: strategies.Case) -> None:
    margins = [
        worst_points(
            case.network,
            case.images,
            case.labels,
            region=case.box,
            steps=2,
            step_size=0.5,
            restarts=restarts,
            generator=generator(),
        )[1]
        for restarts in (1, 2, 4)
    ]
    clean = logit_differences(case.network(case.images), case.labels).amin(1)
    assert (margins[0] <= clean).all()
    assert (margins[1] <= margins[0]).all()
    assert (margins[2] <= margins[1]).all()


# -- what the attack raises


def distance_to(target: Tensor) -> object:
    return lambda logits: (logits - target).square().sum(1)


@given(case=strategies.cases(), steps=st.integers(0, 4), restarts=st.integers(1, 2))
def test_the_given_loss_makes_the_steps_and_chooses_the_iterate(
    case: strategies.Case, steps: int, restarts: int
) -> None:
    """By hand: ascent of a loss that knows no labels, and the iterate of each image where that loss is largest."""
    loss_of = distance_to(torch.ones(case.network.num_classes, dtype=torch.float64))
    stream = generator()
    iterates: list[Tensor] = []
    for _ in range(restarts):
        x = uniform_start(case.box, stream)
        iterates.append(x)
        for _ in range(steps):
            x = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(loss_of(case.network(x)).sum(), x)
            moved = x.detach() + 0.5 * (case.box.upper - case.box.lower) / 2 * torch.sign(gradient)
            x = torch.minimum(torch.maximum(moved, case.box.lower), case.box.upper)
            iterates.append(x)
    with torch.no_grad():
        reached = torch.stack([loss_of(case.network(x)) for x in iterates])
    attack = {"region": case.box, "steps": steps, "step_size": 0.5, "loss_of": loss_of}
    best = pgd(case.network, case.labels, generator=generator(), restarts=restarts, **attack)
    assert torch.equal(loss_of(case.network(best)).detach(), reached.amax(0))
    if restarts == 1:
        last = pgd(case.network, case.labels, generator=generator(), keep="last", **attack)
        assert torch.equal(last, iterates[-1])


def test_the_iterate_is_chosen_by_the_given_loss_not_by_the_cross_entropy() -> None:
    # Logits x, label 0: the cross-entropy grows as x0 - x1 falls, the given loss -x1^2 is largest at x1 = 0.
    head = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(2))
    box = Interval(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    points = pgd(
        head,
        torch.tensor([0]),
        region=box,
        steps=1,
        step_size=2.0,
        generator=generator(),
        loss_of=lambda logits: -(logits[:, 1] ** 2),
    )
    assert points[0, 1] == 0


# -- N-FGSM


@given(
    case=strategies.cases(),
    epsilon=st.sampled_from([0.0, 0.01, 0.1, 0.5]),
    noise=st.sampled_from([0.0, 1.0, 2.0]),
    step_size=st.sampled_from([0.5, 1.0, 1.25]),
    seed=st.integers(0, 100),
)
def test_noisy_fgsm_by_hand(case: strategies.Case, epsilon: float, noise: float, step_size: float, seed: int) -> None:
    uniform = torch.rand(case.images.shape, generator=generator(seed), dtype=torch.float64) * 2 - 1
    start = torch.minimum(torch.maximum(case.images + noise * epsilon * uniform, torch.zeros(())), torch.ones(()))
    leaf = start.clone().requires_grad_()
    F.cross_entropy(case.network(leaf), case.labels).backward()
    assert leaf.grad is not None
    moved = start + step_size * epsilon * torch.sign(leaf.grad)
    expected = torch.minimum(torch.maximum(moved, torch.zeros(())), torch.ones(()))
    for parameter in case.network.parameters():
        parameter.grad = None
    images = case.images.clone()
    actual = noisy_fgsm(
        case.network,
        case.images,
        case.labels,
        epsilon=epsilon,
        noise=noise,
        step_size=step_size,
        generator=generator(seed),
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)  # the same sums of two terms, rounded otherwise
    assert not actual.requires_grad
    assert torch.equal(case.images, images)
    assert all(p.grad is None for p in case.network.parameters())


def test_noisy_fgsm_leaves_the_epsilon_box_and_not_the_pixels() -> None:
    # z0 - z1 = x0 - x1 and label 0: x0 falls by 0.1, x1 rises by 0.1, from noise of up to 0.2
    head = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(2))
    images, labels = torch.full((2000, 2), 0.5), torch.zeros(2000, dtype=torch.long)
    options = {"epsilon": 0.1, "noise": 2.0, "step_size": 1.0}
    moved = noisy_fgsm(head, images, labels, generator=generator(), **options) - images
    for column, middle in ((moved[:, 0], -0.1), (moved[:, 1], 0.1)):
        assert float((column - middle).abs().max()) <= 0.2 + 1e-6
        assert float((column - middle).min()) < -0.19  # 2,000 uniform numbers come near both ends
        assert float((column - middle).max()) > 0.19
    dark = noisy_fgsm(head, torch.zeros_like(images), labels, generator=generator(), **options)
    assert dark.min() == 0
    assert dark.max() <= 0.3 + 1e-6
