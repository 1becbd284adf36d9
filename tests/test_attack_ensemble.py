"""The ensemble on small trained networks: stronger than PGD, every point real, the same for every batch."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ccdist.attack_ensemble import MEMBERS, EnsembleResult, attack_ensemble
from ccdist.attacks import pgd, worst_points
from ccdist.config import EnsembleConfig
from ccdist.counterexamples import confirmed, inner_region
from ccdist.networks import Network, build_network
from ccdist.threats import Norm

EPSILON: dict[Norm, float] = {"linf": 0.15, "l2": 0.6}
SHORT = EnsembleConfig(steps=20, targets=3, square_queries=100)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.tensor(found.images / 16).float()[:, None], torch.tensor(found.target)


@cache
def trained(norm: Norm) -> Network:
    """A small network after a few passes of adversarial training, with images that hold and images that do not."""
    images, labels = digits()
    network = build_network("mlp", input_shape=(1, 8, 8), num_classes=10, width=24)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for epoch in range(8):
        for batch in torch.randperm(1400, generator=generator(epoch)).split(100):
            region = inner_region(images[batch], norm, EPSILON[norm] / 2)
            attacked = pgd(network, labels[batch], region=region, steps=1, step_size=1.0, generator=generator(epoch))
            optimizer.zero_grad()
            F.cross_entropy(network(attacked), labels[batch]).backward()
            optimizer.step()
    return network.requires_grad_(False)


def ensemble(
    network: Network, rows: slice, norm: Norm, config: EnsembleConfig = SHORT, seed: int = 0
) -> EnsembleResult:
    images, labels = digits()
    return attack_ensemble(
        network, images[rows], labels[rows], norm=norm, epsilon=EPSILON[norm], config=config, seed=seed
    )


def broken(result: EnsembleResult) -> Tensor:
    return torch.tensor([name != "" for name in result.broken_by], dtype=torch.bool)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_breaks_at_least_as_many_as_pgd_with_restarts(norm: Norm) -> None:
    network, (images, labels), rows = trained(norm), digits(), slice(1400, 1450)
    result = ensemble(network, rows, norm, EnsembleConfig(square_queries=500))
    points, _ = worst_points(
        network,
        images[rows],
        labels[rows],
        region=inner_region(images[rows], norm, EPSILON[norm]),
        steps=100,
        step_size=0.1,
        restarts=10,
        generator=generator(1),
    )
    by_pgd = confirmed(network, points, labels[rows], images=images[rows], norm=norm, epsilon=EPSILON[norm])
    clean = result.broken_by.count("clean")
    assert clean < int(by_pgd.sum()) < 50  # neither all nor none: the comparison can fail
    assert int(broken(result).sum()) >= int(by_pgd.sum())
    assert result.broken_by.count("apgd_ce") > 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_broken_means_confirmed_and_survivors_keep_their_image(norm: Norm) -> None:
    network, (images, labels), rows = trained(norm), digits(), slice(1400, 1440)
    result = ensemble(network, rows, norm)
    assert torch.equal(
        broken(result),
        confirmed(network, result.points, labels[rows], images=images[rows], norm=norm, epsilon=EPSILON[norm]),
    )
    assert torch.equal(result.points[~broken(result)], images[rows][~broken(result)])
    assert set(result.broken_by) <= {"", "clean", *MEMBERS}
    correct = network(images[rows]).argmax(1) == labels[rows]
    assert [name == "clean" for name in result.broken_by] == (~correct).tolist()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_neither_the_batch_nor_the_global_generator_decides(norm: Norm) -> None:
    network = trained(norm)
    state = torch.get_rng_state()
    together = ensemble(network, slice(1400, 1424), norm)
    assert torch.equal(torch.get_rng_state(), state)
    assert together.broken_by == ensemble(network, slice(1400, 1424), norm).broken_by
    parts = [ensemble(network, slice(first, first + 8), norm).broken_by for first in (1400, 1408, 1416)]
    assert together.broken_by == sum(parts, ())
    other = ensemble(network, slice(1400, 1424), norm, seed=1)
    assert not torch.equal(together.points, other.points)


@pytest.mark.parametrize("member", MEMBERS)
def test_every_member_alone_breaks_images(member: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ccdist.attack_ensemble.MEMBERS", (member,))
    result = ensemble(trained("linf"), slice(1400, 1440), "linf", EnsembleConfig(steps=20, square_queries=300))
    assert result.broken_by.count(member) > 5


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_have_fewer_targets(norm: Norm, classes: int) -> None:
    head = nn.Linear(16, classes)
    with torch.no_grad():
        head.weight.normal_(0, 1, generator=generator(classes))
    network = Network(nn.Sequential(nn.Flatten()), head)
    images = torch.rand(6, 1, 4, 4, generator=generator(1))
    labels = network(images).argmax(1)
    everything = attack_ensemble(
        network, images, labels, norm=norm, epsilon=0.9 if norm == "linf" else 4.0, config=SHORT, seed=0
    )
    nothing = attack_ensemble(network, images, labels, norm=norm, epsilon=1e-5, config=SHORT, seed=0)
    assert broken(everything).all()
    assert not broken(nothing).any()


def test_restarts_reach_every_attack() -> None:
    config = EnsembleConfig(steps=5, restarts=2, targets=2, square_queries=20)
    once = ensemble(trained("linf"), slice(1400, 1420), "linf", config.model_copy(update={"restarts": 1}))
    twice = ensemble(trained("linf"), slice(1400, 1420), "linf", config)
    assert twice.broken_by.count("apgd_ce") >= once.broken_by.count("apgd_ce")
    assert int(broken(twice).sum()) >= 1


def test_no_images_is_no_result() -> None:
    result = ensemble(trained("linf"), slice(0, 0), "linf")
    assert result.broken_by == ()
    assert result.points.shape == (0, 1, 8, 8)


def test_a_network_that_gives_nan_is_broken_as_it_is() -> None:
    network = build_network("mlp", input_shape=(1, 8, 8), num_classes=10, width=4)
    with torch.no_grad():
        network.head.bias[3] = torch.nan
    assert ensemble(network, slice(0, 3), "linf").broken_by == ("clean",) * 3
