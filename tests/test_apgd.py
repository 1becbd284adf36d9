"""Auto-PGD: its step-size rule by hand, and linear networks, whose distance to the boundary is known."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccdist.apgd import apgd, checkpoints, halves_step, region_rows, shared_start, targeted_dlr
from ccdist.bounds import logit_differences
from ccdist.counterexamples import in_region, inner_region
from ccdist.interval import Interval
from ccdist.networks import Network
from ccdist.threats import L2Ball, Norm, contains


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_network(classes: int, seed: int = 0) -> Network:
    head = nn.Linear(12, classes).double()
    with torch.no_grad():
        head.weight.normal_(0, 1, generator=generator(seed))
        head.bias.normal_(0, 0.3, generator=generator(seed + 1))
    return Network(nn.Sequential(nn.Flatten()), head)


def middle_images(network: Network, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Images far from the pixel range's borders, labelled as the network sees them."""
    images = 0.5 + 0.05 * (torch.rand(6, 1, 3, 4, generator=generator(seed), dtype=torch.float64) - 0.5)
    return images, network(images).argmax(1).detach()


def distances(network: Network, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
    """Exact: min over j of margin_j / ||w_y - w_j||, in the dual norm of the threat's."""
    found = []
    for image, label in zip(images, labels.tolist(), strict=True):
        logits = network(image[None])[0].detach()
        ratios = []
        for j in range(network.num_classes):
            if j != label:
                normal = (network.head.weight[label] - network.head.weight[j]).detach()
                size = normal.abs().sum() if norm == "linf" else normal.square().sum().sqrt()
                ratios.append(float((logits[label] - logits[j]) / size))
        found.append(min(ratios))
    return torch.tensor(found, dtype=torch.float64)


def test_checkpoints_of_100_steps() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("steps", [1, 7, 10, 50, 64, 100, 1000])
def test_checkpoints_follow_the_formula(steps: int) -> None:
    p = [Fraction(0), Fraction(22, 100)]
    while p[-1] <= 1:
        p.append(p[-1] + max(p[-1] - p[-2] - Fraction(3, 100), Fraction(6, 100)))
    expected = [math.ceil(share * steps) for share in p[1:-1]]
    assert checkpoints(steps) == sorted(set(expected))
    assert all(1 <= w <= steps for w in checkpoints(steps))


def decision(losses: list[float], best_before: float, best_then: float, halved_then: bool) -> bool:
    """`halves_step` for one trace: losses[0] at the last checkpoint, then one a step."""
    rose = sum(after > before for before, after in pairwise(losses))
    best = max([best_before, *losses])
    rises, now, then, halved = (torch.tensor([value]) for value in (rose, best, best_then, halved_then))
    return bool(halves_step(rises, len(losses) - 1, now, then, halved))


def test_halving_by_too_few_increases() -> None:
    # 4 steps: 3 increases are exactly 0.75 of them and enough, 2 are not.
    assert not decision([0.0, 1.0, 2.0, 1.5, 3.0], 0.0, 0.0, False)
    assert decision([0.0, 1.0, 0.5, 0.4, 3.0], 0.0, 0.0, False)
    assert decision([0.0, 1.0, 1.0, 1.0, 2.0], 0.0, 0.0, False)  # staying equal is no increase


def test_halving_by_no_progress_needs_an_unchanged_step() -> None:
    # All steps raise the loss, but it stays below the best one, 9, which the last checkpoint knew already.
    rising = [0.0, 1.0, 2.0, 3.0, 4.0]
    assert decision(rising, 9.0, 9.0, False)
    assert not decision(rising, 9.0, 9.0, True)  # the step was halved then: it gets another period
    assert not decision(rising, 9.0, 8.0, False)  # the best loss is newer than the last checkpoint


def test_halving_is_image_by_image() -> None:
    zero = torch.zeros(3)
    better = torch.tensor([0.0, 1.0, 1.0])
    rises = torch.tensor([8, 8, 7])  # of 10: 7.5 are needed
    assert halves_step(rises, 10, better, zero, torch.zeros(3, dtype=torch.bool)).tolist() == [True, False, True]


def test_dlr_by_hand() -> None:
    # y = 0, t = 2, sorted 4 2 1 -7: (1 - 4) / (4 - (1 - 7) / 2) = -3 / 7
    logits = torch.tensor([[4.0, 2.0, 1.0, -7.0]], dtype=torch.float64)
    label, target = torch.tensor([0]), torch.tensor([2])
    assert float(targeted_dlr(logits, label, target)) == pytest.approx(-3 / 7)
    assert float(targeted_dlr(logits * 50 + 3, label, target)) == pytest.approx(-3 / 7)


def test_three_classes_raise_the_difference_itself() -> None:
    logits = torch.tensor([[4.0, 2.0, 1.0]])
    assert float(targeted_dlr(logits, torch.tensor([0]), torch.tensor([2]))) == -3.0


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_a_linear_network_is_broken_exactly_beyond_its_distance(norm: Norm, classes: int) -> None:
    network = linear_network(classes)
    images, labels = middle_images(network)
    exact = distances(network, images, labels, norm)
    order = network(images).detach().scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)
    for share, expected in ((1.01, True), (0.99, False)):
        for row in range(3):
            epsilon = share * float(exact[row])
            region = inner_region(images[row : row + 1], norm, epsilon)
            broken = False
            for target in order[row, : classes - 1]:
                point = apgd(
                    network,
                    labels[row : row + 1],
                    region=region,
                    epsilon=epsilon,
                    steps=30,
                    generator=generator(),
                    targets=target[None],
                )
                broken |= bool(logit_differences(network(point), labels[row : row + 1]).amin() <= 0)
            assert broken == expected


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_cross_entropy_breaks_two_linear_classes_exactly_beyond_the_distance(norm: Norm) -> None:
    network = linear_network(2)
    images, labels = middle_images(network)
    for row, exact in enumerate(distances(network, images, labels, norm).tolist()):
        for epsilon in (1.01 * exact, 0.99 * exact):
            region = inner_region(images[row : row + 1], norm, epsilon)
            point = apgd(
                network, labels[row : row + 1], region=region, epsilon=epsilon, steps=30, generator=generator()
            )
            broken = bool(logit_differences(network(point), labels[row : row + 1]).amin() <= 0)
            assert broken == (epsilon > exact)


def small_network() -> Network:
    layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 12), nn.ReLU())
    network = Network(layers, nn.Linear(12, 5))
    with torch.no_grad():
        for seed, parameter in enumerate(network.parameters()):
            parameter.normal_(0, 0.4, generator=generator(seed))
    return network.double()


def algorithm_1(
    network: Network, start: Tensor, label: Tensor, image: Tensor, norm: Norm, epsilon: float, steps: int
) -> list[Tensor]:
    """The evaluated points of one image, with every loss kept, as the paper's algorithm lists its steps."""

    def project(x: Tensor) -> Tensor:
        if norm == "linf":
            return torch.clamp(x, (image - epsilon).clamp(0, 1), (image + epsilon).clamp(0, 1))
        return (image + (x - image) * min(1.0, epsilon / float((x - image).norm()))).clamp(0, 1)

    def loss_and_direction(x: Tensor) -> tuple[float, Tensor]:
        x = x.clone().requires_grad_()
        loss = F.cross_entropy(network(x), label)
        (gradient,) = torch.autograd.grad(loss, x)
        return float(loss.detach()), gradient.sign() if norm == "linf" else gradient / gradient.norm()

    x, previous, eta = start, start, 2 * epsilon
    evaluated, history = [start], [loss_and_direction(start)[0]]
    best, best_loss = start, history[0]
    best_at_check, halved_at_check, last_check, rises = best_loss, False, 0, 0
    for k in range(1, steps + 1):
        z = project(x + eta * loss_and_direction(x)[1])
        share = 1.0 if k == 1 else 0.75
        x, previous = project(x + share * (z - x) + (1 - share) * (x - previous)), x
        loss = loss_and_direction(x)[0]
        rises += loss > history[-1]
        evaluated.append(x)
        history.append(loss)
        if loss > best_loss:
            best, best_loss = x, loss
        if k in checkpoints(steps):
            halved = rises < 0.75 * (k - last_check) or (not halved_at_check and best_at_check == best_loss)
            if halved:
                eta, x = eta / 2, best
                history.append(best_loss)
            best_at_check, halved_at_check, last_check, rises = best_loss, halved, k, 0
    return evaluated


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_iterates_are_those_of_the_published_algorithm(norm: Norm) -> None:
    network, epsilon, compared = small_network(), 0.02 if norm == "linf" else 0.1, 0
    for seed in range(6):
        image = torch.rand(1, 1, 4, 4, generator=generator(seed), dtype=torch.float64)
        label = network(image).argmax(1)
        region = Interval((image - epsilon).clamp(0, 1), (image + epsilon).clamp(0, 1))
        points: list[Tensor] = []

        def logits_of(x: Tensor, points: list[Tensor] = points) -> Tensor:
            points.append(x.detach().clone())
            return network(x)

        apgd(
            logits_of,
            label,
            region=region if norm == "linf" else L2Ball(image, epsilon),
            epsilon=epsilon,
            steps=50,
            generator=generator(seed),
        )
        expected = algorithm_1(network, points[0], label, image, norm, epsilon, steps=50)
        for actual, wanted in zip(points, expected, strict=False):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-7)
        compared += len(points)
    assert compared > 4 * 51  # most images were never misclassified, and all their iterates were compared


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targeted", [False, True])
def test_points_lie_in_the_region_and_do_not_depend_on_the_batch(norm: Norm, targeted: bool) -> None:
    network = small_network()
    images = torch.rand(8, 1, 4, 4, generator=generator(3), dtype=torch.float64)
    logits = network(images).detach()
    labels, targets = logits.argmax(1), logits.argsort(1)[:, -2] if targeted else None
    epsilon = 0.05 if norm == "linf" else 0.2
    region = inner_region(images, norm, epsilon)

    def attack(rows: slice) -> Tensor:
        return apgd(
            network,
            labels[rows],
            region=region_rows(region, torch.arange(8)[rows]),
            epsilon=epsilon,
            steps=20,
            generator=generator(7),
            targets=None if targets is None else targets[rows],
        )

    together = attack(slice(0, 8))
    assert in_region(together, images=images, norm=norm, epsilon=epsilon).all()
    assert not together.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(together, attack(slice(0, 8)))
    alone = torch.cat([attack(slice(row, row + 1)) for row in range(8)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


def test_broken_images_leave_the_batch() -> None:
    sizes = []

    def logits_of(x: Tensor) -> Tensor:
        sizes.append(len(x))
        pixel = x.flatten(1).mean(1)
        return torch.stack([0.1 - pixel * 0, pixel - 0.55], 1)

    images = torch.tensor([0.5, 0.1, 0.9]).view(3, 1, 1, 1)
    region = Interval((images - 0.2).clamp(0, 1), (images + 0.2).clamp(0, 1))
    points = apgd(logits_of, torch.zeros(3).long(), region=region, epsilon=0.2, steps=10, generator=generator())
    assert sizes[0] == 3
    assert sizes[-1] == 1
    assert (points.flatten() >= 0.65).tolist() == [True, False, True]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steps_start_at_two_epsilon_and_shrink_to_a_maximum_inside(norm: Norm) -> None:
    iterates = []

    def logits_of(x: Tensor) -> Tensor:
        iterates.append(float(x.detach()))
        value = -(x.flatten(1).squeeze(1) - 0.5).abs() - 1  # highest at 0.5, never a misclassification
        return torch.stack([torch.zeros_like(value), value], 1)

    image = torch.full((1, 1, 1, 1), 0.437, dtype=torch.float64)
    region = Interval(image * 0, image * 0 + 1) if norm == "linf" else L2Ball(image, 1.0)
    epsilon = 0.1
    point = apgd(
        logits_of,
        torch.tensor([0]),
        region=region,
        epsilon=epsilon,
        steps=100,
        generator=generator(),
        targets=torch.tensor([1]),
    )
    first = abs(iterates[1] - iterates[0])
    assert first == pytest.approx(2 * epsilon)
    assert len(iterates) == 101
    # Eight checkpoints; the oscillation of each period halves the step or nearly so.
    assert abs(float(point) - 0.5) < 2 * epsilon / 2**5
    assert abs(iterates[-1] - iterates[-2]) <= 2 * epsilon / 2**6


def test_step_sizes_of_a_scripted_loss() -> None:
    # Rises to 22 at the first checkpoint; then falls to 0 and rises by 0.1 a step, so the best loss stays 22.
    script = [float(k) if k <= 22 else 0.1 * (k - 23) for k in range(101)]
    iterates: list[float] = []

    def logits_of(x: Tensor) -> Tensor:
        pixel = x.flatten(1).squeeze(1)
        value = script[len(iterates)] - 100 + pixel - pixel.detach()  # the loss of the script, always uphill in x
        iterates.append(float(x.detach()))
        return torch.stack([torch.zeros_like(value), value], 1)

    region = Interval(torch.zeros(1, 1, 1, 1).double(), torch.ones(1, 1, 1, 1).double())
    seed = next(s for s in range(100) if float(shared_start(region, generator(s))) < 0.5)
    apgd(
        logits_of,
        torch.tensor([0]),
        region=region,
        epsilon=0.001,
        steps=100,
        generator=generator(seed),
        targets=torch.tensor([1]),
    )
    steps = {k: iterates[k] - iterates[k - 1] for k in (1, 22, 41, 56, 70, 79)}
    # 41: 18 of 19 rises, but no better than at 22: halved. 57: just as little progress, but halved at 41: kept.
    # 70: kept at 57 and still no progress: halved.
    expected = {1: 0.002, 22: 0.002, 41: 0.002, 56: 0.001, 70: 0.001, 79: 0.0005}
    assert steps == {k: pytest.approx(step, rel=1e-3) for k, step in expected.items()}


@pytest.mark.parametrize("region_kind", ["box", "ball"])
def test_starts_share_one_draw(region_kind: str) -> None:
    images = torch.rand(5, 1, 3, 3, generator=generator(1))
    region = inner_region(images, "linf" if region_kind == "box" else "l2", 0.2)
    start = shared_start(region, generator(5))
    assert contains(region, start).all()
    one = shared_start(region_rows(region, torch.tensor([3])), generator(5))
    assert torch.equal(start[3:4], one)
    assert not torch.equal(start, shared_start(region, generator(6)))
