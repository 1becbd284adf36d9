"""FAB: projections against a linear program and bisection, distances against linear networks."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from test_apgd import distances, generator, linear_network, middle_images, small_network
from torch import Tensor

from ccdist.bounds import logit_differences
from ccdist.fab import fab, length, to_hyperplane
from ccdist.threats import Norm


def hyperplanes(count: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    """(points, weights, values) that a move inside [0, 1] can bring to 0, borders and zero weights among them."""
    points = torch.rand(count, 6, generator=generator(0), dtype=torch.float64)
    points[:, 0] = (points[:, 0] > 0.5).double()
    weight = torch.randn(count, 6, generator=generator(1), dtype=torch.float64)
    weight[::3, 1] = 0
    goal = torch.rand(count, 6, generator=generator(2), dtype=torch.float64)
    return points, weight, (weight * (points - goal)).sum(1)  # weight . goal is on the plane


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projections_reach_the_hyperplane_inside_the_pixel_range(norm: Norm) -> None:
    points, weight, value = hyperplanes()
    move = to_hyperplane(points, weight, value, norm)
    torch.testing.assert_close(value + (weight * move).sum(1), torch.zeros(30).double(), atol=1e-9, rtol=0)
    assert float((points + move).min()) >= -1e-12
    assert float((points + move).max()) <= 1 + 1e-12


def test_linf_projections_are_shortest_by_linear_programming() -> None:
    points, weight, value = hyperplanes()
    for point, w, v, move in zip(points, weight, value, to_hyperplane(points, weight, value, "linf"), strict=True):
        # minimise s over (d, s) with |d| <= s, w . d = -v, 0 <= point + d <= 1
        eye, ones = np.eye(6), np.ones((6, 1))
        solved = linprog(
            [0.0] * 6 + [1.0],
            A_ub=np.block([[eye, -ones], [-eye, -ones]]),
            b_ub=np.zeros(12),
            A_eq=np.append(w.numpy(), 0.0)[None],
            b_eq=[-float(v)],
            bounds=[*((-float(x), 1 - float(x)) for x in point), (0, None)],
        )
        assert float(move.abs().max()) == pytest.approx(solved.fun, abs=1e-7)


def test_l2_projections_are_shortest_by_bisection() -> None:
    # The optimum is clamp(point - u * w) - point with the multiplier u that meets the plane; monotone in u.
    points, weight, value = hyperplanes()
    for point, w, v, move in zip(points, weight, value, to_hyperplane(points, weight, value, "l2"), strict=True):
        low, high = -1e4, 1e4
        for _ in range(100):
            u = (low + high) / 2
            at = float(v + (w * ((point - u * w).clamp(0, 1) - point)).sum())
            low, high = (u, high) if at > 0 else (low, u)
        torch.testing.assert_close(move, (point - u * w).clamp(0, 1) - point, atol=1e-7, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_out_of_reach_every_pixel_goes_to_its_border(norm: Norm) -> None:
    points = torch.tensor([[0.25, 0.75, 0.5]])
    move = to_hyperplane(points, torch.tensor([[1.0, -2.0, 0.0]]), torch.tensor([10.0]), norm)
    torch.testing.assert_close(move, torch.tensor([[-0.25, 0.25, 0.0]]))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_a_vanishing_or_huge_gradient_gives_numbers(norm: Norm, scale: float) -> None:
    weight = scale * torch.tensor([[1.0, -0.5]])
    move = to_hyperplane(torch.tensor([[0.5, 0.5]]), weight, torch.tensor([scale * 0.3 + (scale == 0)]), norm)
    assert move.isfinite().all()
    if scale:
        assert float((weight / scale * move).sum()) == pytest.approx(-0.3)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_distance_to_a_linear_boundary_is_found(norm: Norm, classes: int) -> None:
    network = linear_network(classes)
    images, labels = middle_images(network)
    exact = distances(network, images, labels, norm)
    order = network(images).detach().scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)
    found = torch.full_like(exact, torch.inf)
    for target in order[:, : classes - 1].T:
        points, distance = fab(network, images, labels, target, norm=norm, steps=30)
        reached = distance.isfinite()
        assert (logit_differences(network(points[reached]), labels[reached]).amin(1) <= 0).all()
        torch.testing.assert_close(length(points - images, norm)[reached], distance[reached])
        assert float(points.min()) >= 0
        assert float(points.max()) <= 1
        found = torch.minimum(found, distance)
    assert (found >= exact * (1 - 1e-9)).all()
    assert (found <= exact * 1.02).all()


def test_images_leave_once_a_point_is_near_enough() -> None:
    network = linear_network(3)
    images, labels = middle_images(network)
    targets = network(images).detach().argsort(1)[:, -2]
    sizes = []

    def logits_of(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return network(x)

    _, all_steps = fab(logits_of, images, labels, targets, norm="l2", steps=10)
    assert sizes == [6] * 20  # one pass with a gradient and one without for each step
    sizes.clear()
    enough = float(all_steps.median()) * 1.02
    _, stopped = fab(logits_of, images, labels, targets, norm="l2", steps=10, enough=enough)
    assert sizes[0] == 6
    assert 0 < sizes[-1] < 6
    assert torch.equal(stopped <= enough, all_steps <= enough)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_nearest_misclassified_candidate_is_kept(norm: Norm) -> None:
    network, candidates = small_network(), []

    def logits_of(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            candidates.append(x.clone())
        return network(x)

    images = torch.rand(8, 1, 4, 4, generator=generator(0), dtype=torch.float64)
    order = network(images).detach().argsort(1)
    labels = order[:, -1]
    points, found = fab(logits_of, images, labels, order[:, -2], norm=norm, steps=15)
    expected = torch.full_like(found, torch.inf)
    for candidate in candidates:
        wrong = logit_differences(network(candidate), labels).amin(1) <= 0
        expected = torch.where(wrong, torch.minimum(expected, length(candidate - images, norm)), expected)
    assert expected.isfinite().any()
    assert torch.equal(found, expected)
    reached = found.isfinite()
    torch.testing.assert_close(length(points - images, norm)[reached], found[reached])


def test_without_a_misclassified_point_the_image_comes_back() -> None:
    def logits_of(x: Tensor) -> Tensor:
        return torch.stack([2 + 0 * x.flatten(1).mean(1), x.flatten(1).mean(1)], 1)

    images = torch.rand(2, 1, 3, 3, generator=generator(0))
    points, found = fab(logits_of, images, torch.zeros(2).long(), torch.ones(2).long(), norm="linf", steps=5)
    assert torch.equal(points, images)
    assert found.isinf().all()


def test_a_search_may_start_elsewhere() -> None:
    network = linear_network(2)
    images, labels = middle_images(network)
    start = (images + 0.3 * torch.randn(images.shape, generator=generator(4), dtype=torch.float64)).clamp(0, 1)
    _, found = fab(network, images, labels, 1 - labels, norm="l2", steps=40, start=start)
    assert (found <= distances(network, images, labels, "l2") * 1.05).all()
