"""The ladder: a network whose margins are known by hand, the order of the accuracies, shown counter-examples."""

import contextlib
import itertools
import math
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import oracles
import pyarrow as pa
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ccdist import rungs as rungs_module
from ccdist import verification
from ccdist.bounds import UnsupportedLayerError
from ccdist.branch_and_bound import Counts, Outcome
from ccdist.config import AttackConfig, ThreatModel, VerifyConfig
from ccdist.interval import epsilon_box
from ccdist.networks import Network
from ccdist.precision import exact_float32
from ccdist.rungs import Chunk
from ccdist.verdicts import Finding
from ccdist.verification import SCHEMA, Accuracies, Progress, Verdict, accuracies, quick_accuracies, verify

# Bounds of values of order 1 in float32, less the allowance for rounding.
ROUNDING = 1e-5


def config(**changes: Any) -> VerifyConfig:
    return VerifyConfig.model_validate(
        {"threat": {"epsilon": "1/10"}, "attack": {"steps": 4, "step_size": 1}} | changes
    )


def hand_network() -> Network:
    """z0 - z1 = 2 x0 - 1 on the pixel range, written so that intervals lose and lines do not.

    p = x0 + x1, q = x0 - x1 + 1, both >= 0 and so unchanged by the ReLU; z0 = p + q, z1 = 2.
    """
    first, head = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        first.bias.copy_(torch.tensor([0.0, 1.0]))
        head.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        head.bias.copy_(torch.tensor([0.0, 2.0]))
    return Network(nn.Sequential(nn.Flatten(), first, nn.ReLU()), head)


# x1 = 0.5, epsilon = 0.1. The true least margin is that of the image minus 0.2; IBP sees p and q each with radius
# 0.2 and subtracts 0.4; CROWN is exact.
#   x0    label  margin  least  IBP   so
#   0.30  0      -0.4     -      -     clean
#   0.55  0       0.1    -0.1    -     pgd
#   0.65  0       0.3     0.1   -0.1   crown, lower bound 0.1
#   0.80  0       0.6     0.4    0.2   ibp, lower bound 0.2
#   0.35  1       0.3     0.1   -0.1   crown, lower bound 0.1
# standard 4/5, adversarial 3/5, certified 3/5 of at most 3/5
HAND_IMAGES = torch.tensor([0.30, 0.55, 0.65, 0.80, 0.35]).view(-1, 1, 1, 1).repeat(1, 1, 1, 2)
HAND_IMAGES[..., 1] = 0.5
HAND_LABELS = torch.tensor([0, 0, 0, 0, 1])


@pytest.mark.parametrize("batch_size", [1, 2, 256])
def test_hand_numbers(batch_size: int) -> None:
    table = verify(hand_network(), HAND_IMAGES, HAND_LABELS, config(batch_size=batch_size))
    assert table["index"].to_pylist() == [0, 1, 2, 3, 4]
    assert table["label"].to_pylist() == [0, 0, 0, 0, 1]
    assert table["prediction"].to_pylist() == [1, 0, 0, 0, 1]
    assert table["method"].to_pylist() == ["clean", "pgd", "crown", "ibp", "crown"]
    assert table["verdict"].to_pylist() == ["falsified"] * 2 + ["certified"] * 3
    bounds = table["lower_bound"].to_pylist()
    assert bounds[:2] == [None, None]
    assert bounds[2:] == pytest.approx([0.1, 0.2, 0.1], abs=ROUNDING)
    assert accuracies(table) == Accuracies(4 / 5, 3 / 5, 3 / 5, 3 / 5, 5)


def test_hand_numbers_with_fewer_rungs() -> None:
    """The attack cannot succeed and the bound cannot certify: undecided, with the bound that was reached."""
    table = verify(hand_network(), HAND_IMAGES, HAND_LABELS, config(rungs=("pgd", "ibp")))
    assert table["verdict"].to_pylist() == ["falsified", "falsified", "undecided", "certified", "undecided"]
    assert table["method"].to_pylist() == ["clean", "pgd", "", "ibp", ""]
    assert table["lower_bound"].to_pylist()[2:] == pytest.approx([-0.1, 0.2, -0.1], abs=ROUNDING)
    assert accuracies(table) == Accuracies(4 / 5, 3 / 5, 1 / 5, 3 / 5, 5)
    bare = verify(hand_network(), HAND_IMAGES, HAND_LABELS, config(rungs=()))
    assert accuracies(bare) == Accuracies(4 / 5, 4 / 5, 0.0, 4 / 5, 5)


def test_a_margin_of_rounding_certifies_nothing_and_a_tie_is_wrong() -> None:
    # least margin 2 x0 - 1.2 = 0 at x0 = 0.6, up to rounding; a tie at x0 = 0.5
    images = torch.tensor([[[[0.6, 0.5]]], [[[0.5, 0.5]]]])
    table = verify(hand_network(), images, torch.tensor([0, 0]), config(rungs=("ibp", "crown")))
    assert table["verdict"].to_pylist() == ["undecided", "falsified"]
    assert table["method"].to_pylist() == ["", "clean"]


def test_a_margin_that_cancels_out_of_large_features_certifies_nothing() -> None:
    """Features of order 1e5 that cancel in the head: their float32 rounding is far above a margin of 1e-4."""
    generator = torch.Generator().manual_seed(0)
    first, head = nn.Linear(2, 64), nn.Linear(64, 2)
    with torch.no_grad():
        first.weight.copy_(1e5 * torch.rand((64, 2), generator=generator))
        head.weight.zero_()
        head.weight[0, ::2], head.weight[0, 1::2] = 1.0, -1.0
        first.weight[1::2] = first.weight[::2]
        first.bias.zero_()
        head.bias.copy_(torch.tensor([1e-4, 0.0]))
    network = Network(nn.Sequential(nn.Flatten(), first, nn.ReLU()), head)
    images = torch.rand((50, 1, 1, 2), generator=generator)
    table = verify(network, images, torch.zeros(50, dtype=torch.long), config(rungs=["crown"]))
    assert "certified" not in table["verdict"].to_pylist()


def test_schema() -> None:
    table = verify(hand_network(), HAND_IMAGES, HAND_LABELS, config())
    assert table.schema.equals(SCHEMA)
    names = ["index", "label", "prediction", "verdict", "method", "lower_bound", "seconds", "branches"]
    assert table.schema.names == names
    assert set(table["verdict"].to_pylist()) <= {"certified", "falsified", "undecided"}
    assert all(seconds >= 0 for seconds in table["seconds"].to_pylist())
    assert set(table["branches"].to_pylist()) == {0}
    assert [str(verdict) for verdict in Verdict] == ["certified", "falsified", "undecided"]


def random_case(seed: int, count: int = 24) -> tuple[Network, Tensor, Tensor]:
    """A float32 network of 2 inputs and images that it mostly classifies as labelled."""
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()]
    network = strategies.randomize(Network(nn.Sequential(*layers), nn.Linear(8, 3)), generator).float()
    images = torch.rand((count, 1, 1, 2), generator=generator)
    with torch.no_grad():
        labels = network(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 3
    return network, images, labels


def least_margin(network: Network, image: Tensor, label: int, epsilon: float) -> float:
    """On a grid of 41 x 41 points of the box."""
    box = epsilon_box(image[None], epsilon)
    points = oracles.grid(box.lower.flatten(), box.upper.flatten(), 41).view(-1, 1, 1, 2)
    differences = oracles.logit_differences(network(points), torch.full((len(points),), label))
    return float(differences.min())


@pytest.mark.timeout(30)
@given(seed=st.integers(0, 10_000), epsilon=st.sampled_from(["1/100", "1/20", "1/5"]))
def test_certified_images_survive_a_dense_grid_and_the_bounds_hold(seed: int, epsilon: str) -> None:
    network, images, labels = random_case(seed, count=8)
    table = verify(network, images, labels, config(threat={"epsilon": epsilon}))
    for row in table.to_pylist():
        least = least_margin(network, images[row["index"]], row["label"], ThreatModel(epsilon=epsilon).radius)
        if row["verdict"] == "certified":
            assert least > 0
        if row["lower_bound"] is not None:
            assert row["lower_bound"] <= least + ROUNDING * (1 + abs(least))


@given(seed=st.integers(0, 10_000), rungs=st.sampled_from([("pgd",), ("ensemble",), ("ibp", "ensemble", "pgd")]))
def test_falsified_images_have_a_counter_example(seed: int, rungs: tuple[str, ...]) -> None:
    """A plain forward pass errs at it, inside the region; clean images are their own."""
    network, images, labels = random_case(seed)
    points: dict[int, tuple[str, Tensor]] = {}
    attack = {"steps": 3, "step_size": 0.7, "restarts": 2}
    settings = config(attack=attack, ensemble={"steps": 5, "targets": 2, "square_queries": 5}, rungs=rungs)
    table = verify(
        network,
        images,
        labels,
        settings,
        on_counterexample=lambda index, method, point: points.setdefault(index, (method, point)) and None,
    )
    rows, predicted = table.to_pylist(), network(images).argmax(1).tolist()
    assert [row["prediction"] for row in rows] == predicted
    wrong = [row["index"] for row in rows if row["method"] == "clean"]
    assert wrong == [index for index in range(len(images)) if predicted[index] != labels[index]]
    shown = {row["index"]: row["method"] for row in rows if row["verdict"] == "falsified" and row["method"] != "clean"}
    assert {index: method for index, (method, _) in points.items()} == shown
    assert set(shown.values()) <= {"pgd", "apgd_ce", "apgd_dlr", "fab", "square"}
    for index, (_, point) in points.items():
        assert int(network(point[None]).argmax()) != labels[index]
        distance = (point.double() - images[index].double()).abs().max()
        assert Fraction(float(distance)) <= settings.threat.epsilon
        assert 0 <= float(point.min()) <= float(point.max()) <= 1


@given(seed=st.integers(0, 10_000), epsilon=st.sampled_from(["1/100", "1/20", "1/5"]))
def test_the_order_of_the_accuracies(seed: int, epsilon: str) -> None:
    network, images, labels = random_case(seed)
    table = verify(network, images, labels, config(threat={"epsilon": epsilon}))
    result = accuracies(table)
    assert 0 <= result.certified <= result.certified_upper <= result.adversarial <= result.standard <= 1
    assert result.num_images == len(labels)
    for row in table.to_pylist():  # and for each image by itself
        standard = row["method"] != "clean"
        adversarial = standard and row["method"] != "pgd"
        assert (row["verdict"] == "certified") <= (row["verdict"] != "falsified") <= adversarial <= standard


@given(seed=st.integers(0, 10_000), batch_size=st.sampled_from([5, 256]))
def test_more_restarts_never_raise_the_adversarial_accuracy(seed: int, batch_size: int) -> None:
    """For each image, in several batches too: the first restarts are the same."""
    network, images, labels = random_case(seed)
    broken = []
    for restarts in (1, 2, 4):
        attack = {"steps": 1, "step_size": 0.3, "restarts": restarts}
        table = verify(network, images, labels, config(attack=attack, rungs=("pgd",), batch_size=batch_size))
        broken.append({row["index"] for row in table.to_pylist() if row["verdict"] == "falsified"})
    for fewer, more in itertools.pairwise(broken):
        assert fewer <= more


@given(seed=st.integers(0, 1000))
def test_a_further_rung_only_decides_what_was_open(seed: int) -> None:
    network, images, labels = random_case(seed)
    tables = [
        verify(network, images, labels, config(rungs=rungs)).to_pylist()
        for rungs in (("pgd",), ("pgd", "ibp"), ("pgd", "ibp", "crown"))
    ]
    for before, after in itertools.pairwise(tables):
        for old, new in zip(before, after, strict=True):
            if old["verdict"] != "undecided":
                assert (new["verdict"], new["method"]) == (old["verdict"], old["method"])


def test_the_rungs_are_told_with_what_is_open() -> None:
    told: list[tuple[str, int]] = []
    verify(hand_network(), HAND_IMAGES, HAND_LABELS, config(), on_rung=lambda rung, left: told.append((rung, left)))
    assert told == [("clean", 4), ("pgd", 3), ("ibp", 2), ("crown", 0)]


def test_the_same_seed_gives_the_same_table_and_inputs_stay() -> None:
    network, images, labels = random_case(3)
    kept, weights = images.clone(), [p.clone() for p in network.parameters()]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, other = (verify(network, images, labels, config()).drop_columns("seconds") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.equals(other)
    assert torch.equal(images, kept)
    assert all(torch.equal(a, b) for a, b in zip(weights, network.parameters(), strict=True))
    assert all(p.grad is None for p in network.parameters())


def test_nothing_left_after_a_rung_is_no_error() -> None:
    table = verify(hand_network(), HAND_IMAGES[:1], HAND_LABELS[:1], config())  # misclassified: no rung has work
    assert table["method"].to_pylist() == ["clean"]


def test_no_images() -> None:
    table = verify(hand_network(), torch.zeros(0, 1, 1, 2), torch.zeros(0, dtype=torch.long), config())
    assert table.num_rows == 0
    assert table.schema.equals(SCHEMA)
    with pytest.raises(ValueError, match="no images were verified"):
        accuracies(table)


def test_a_network_that_gives_nan_classifies_and_certifies_nothing() -> None:
    network = hand_network()
    with torch.no_grad():
        network.head.weight.fill_(torch.nan)
    result = accuracies(verify(network, HAND_IMAGES, HAND_LABELS, config()))
    assert (result.standard, result.adversarial, result.certified) == (0, 0, 0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="5 images and 4 labels"):
        # without the type check, which would refuse the shapes before
        verify.__wrapped__(hand_network(), HAND_IMAGES, HAND_LABELS[:4], config())  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="train mode"):
        verify(hand_network().train(), HAND_IMAGES, HAND_LABELS, config())
    partly = hand_network()
    partly.features[1].train()
    with pytest.raises(ValueError, match="train mode"):
        verify(partly, HAND_IMAGES, HAND_LABELS, config())


def nan_pixel() -> Tensor:
    images = HAND_IMAGES.clone()
    images[3, 0, 0, 1] = torch.nan
    return images


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ((HAND_IMAGES * 255).to(torch.uint8), HAND_LABELS, r"images are uint8; ccdist\.data\.to_pixels\(images\)"),
        (HAND_IMAGES.half(), HAND_LABELS, r"images are torch\.float16; expected torch\.float32"),
        (HAND_IMAGES.double(), HAND_LABELS, r"images are torch\.float64, the network is torch\.float32"),
        (HAND_IMAGES.numpy(), HAND_LABELS, "images are a ndarray; expected a tensor"),
        (HAND_IMAGES[0], HAND_LABELS[:1], r"images have the shape \[1, 1, 2\]; expected \[N, C, H, W\]"),
        (nan_pixel(), HAND_LABELS, "images have pixels that are not finite"),
        (HAND_IMAGES / 0, HAND_LABELS, "images have pixels that are not finite"),
        (HAND_IMAGES * 2, HAND_LABELS, r"images have pixels from 0\.6 to 1\.6; expected all in \[0, 1\]"),
        (HAND_IMAGES - 0.4, HAND_LABELS, "images have pixels from -0.1 to"),
        (HAND_IMAGES, HAND_LABELS.float(), r"labels are torch\.float32; expected torch\.int64"),
        (HAND_IMAGES, HAND_LABELS.tolist(), r"labels are a list; expected a tensor \[N\]"),
        (HAND_IMAGES, HAND_LABELS.view(-1, 1), r"labels have the shape \[5, 1\]; expected \[N\]"),
        (HAND_IMAGES, HAND_LABELS + 1, "labels go from 1 to 2, but the network has 2 classes, counted from 0"),
        (HAND_IMAGES, HAND_LABELS - 1, "labels go from -1 to 0, but"),
    ],
)
def test_images_and_labels_that_are_none_are_refused(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        verify.__wrapped__(hand_network(), images, labels, config())  # type: ignore[attr-defined]
    assert "\n" not in str(caught.value)


def test_labels_of_other_integers_are_the_same_labels() -> None:
    tables = [
        verify(hand_network(), HAND_IMAGES, HAND_LABELS.to(dtype), config()).drop_columns("seconds")
        for dtype in (torch.int64, torch.int32, torch.int8)
    ]
    assert all(table.equals(tables[0]) for table in tables)


def test_accuracies_of_a_written_table() -> None:
    rows = [
        ("certified", "ibp"),
        ("certified", "crown"),
        ("undecided", ""),
        ("falsified", "pgd"),
        ("falsified", "clean"),
    ]
    rows += [("falsified", "branch_and_bound"), ("undecided", ""), ("undecided", "")]
    rows += [("falsified", member) for member in ("apgd_ce", "apgd_dlr", "fab", "square")]
    table = pa.table({"verdict": [verdict for verdict, _ in rows], "method": [method for _, method in rows]})
    # a counter-example of branch and bound counts against the certified upper end only
    assert accuracies(table) == Accuracies(11 / 12, 6 / 12, 2 / 12, 5 / 12, 12)


@pytest.mark.parametrize("certified", range(25))
def test_the_order_survives_the_division(certified: int) -> None:
    """All others falsified: both ends are the same fraction, to the bit."""
    verdicts = ["certified"] * certified + ["falsified"] * (24 - certified)
    methods = ["ibp"] * certified + ["clean"] * (24 - certified)
    result = accuracies(pa.table({"verdict": verdicts, "method": methods}))
    assert result.certified == result.certified_upper == result.adversarial == result.standard


# ---- the ladder itself, on rungs that decide as told ----------------------------------------------------------------


def certifying(name: str, which: Callable[[int], bool], bound: float = 1.0) -> Callable[[Chunk], list[Finding]]:
    """A rung that certifies the images whose first pixel, in hundredths, is as wanted."""

    def rung(chunk: Chunk) -> list[Finding]:
        numbers = (chunk.images[:, 0, 0, 0] * 100).round().int().tolist()
        proved = Finding(Verdict.CERTIFIED, name, lower_bound=bound)
        return [proved if which(number) else Finding(lower_bound=-bound) for number in numbers]

    return rung


def numbered_images(count: int) -> tuple[Tensor, Tensor]:
    """Image n has n hundredths as its first pixel; `hand_network` says 1 from 50 downwards."""
    images = torch.full((count, 1, 1, 2), 0.5)
    images[:, 0, 0, 0] = torch.arange(count) / 100
    return images, torch.ones(count, dtype=torch.long)


@pytest.fixture
def rungs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[Chunk], list[Finding]]]:
    """The table of rungs, to put fakes into."""
    table = dict(verification.RUNGS)
    monkeypatch.setattr(verification, "RUNGS", table)
    return table


def test_each_rung_takes_what_is_open_and_the_counts_are_exact(rungs: dict[str, Any]) -> None:
    rungs["ibp"] = certifying("ibp", lambda n: n % 3 == 0, bound=2.0)
    rungs["crown"] = certifying("crown", lambda n: n % 3 < 2)
    images, labels = numbered_images(20)
    told: list[Progress] = []
    settings = config(rungs=("ibp", "crown"), batch_size=6)
    table = verify(hand_network(), images, labels, settings, on_progress=told.append)
    methods = ["ibp" if n % 3 == 0 else "crown" if n % 3 == 1 else "" for n in range(20)]
    assert table["method"].to_pylist() == methods
    assert table["lower_bound"].to_pylist() == [{"ibp": 2.0, "crown": 1.0, "": -1.0}[method] for method in methods]
    assert all(each.proved + each.falsified + each.open == 20 for each in told)
    counts = [(each.rung, each.entered, each.handled, each.proved, each.open) for each in told]
    # 7 of 20 images are multiples of 3, 7 leave 1: a rung begins, its batches, it ends
    clean = [("clean", 20, handled, 0, 20) for handled in (0, 6, 12, 18, 20, 20)]
    ibp = [("ibp", 20, handled, proved, 20 - proved) for handled, proved in ((0, 0), (6, 2), (12, 4), (18, 6))]
    ibp += [("ibp", 20, 20, 7, 13)] * 2
    crown = [("crown", 13, handled, proved, 20 - proved) for handled, proved in ((0, 7), (6, 10), (12, 13))]
    crown += [("crown", 13, 13, 14, 6)] * 2
    assert counts == clean + ibp + crown


def test_a_bound_is_never_forgotten(rungs: dict[str, Any]) -> None:
    rungs["ibp"] = certifying("ibp", lambda n: False, bound=0.5)
    rungs["crown"] = certifying("crown", lambda n: False, bound=2.0)
    images, labels = numbered_images(3)
    table = verify(hand_network(), images, labels, config(rungs=("ibp", "crown")))
    assert table["lower_bound"].to_pylist() == [-0.5] * 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bound_that_is_not_finite_certifies_nothing(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even beside good ones."""

    def bounds(rung: str, proof: Any, region: Any, labels: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
        lower = torch.ones(len(labels), 2)
        lower[:, 1] = value
        return lower, torch.zeros_like(lower)

    monkeypatch.setattr(rungs_module, "proved_bounds", bounds)
    table = verify(hand_network(), HAND_IMAGES, HAND_LABELS, config(rungs=("ibp", "alpha_crown")))
    assert set(table["verdict"].to_pylist()[1:]) == {"undecided"}
    assert all(bound is None or math.isfinite(bound) for bound in table["lower_bound"].to_pylist())


def test_a_point_that_shows_nothing_falsifies_nothing(rungs: dict[str, Any]) -> None:
    """Outside of the region, or classified as it should be."""

    def rung(chunk: Chunk) -> list[Finding]:
        far, same = 1 - chunk.images, chunk.images.clone()
        points = [far[0], same[1], chunk.images[2] + torch.tensor([0.1001, 0.0])]
        return [Finding(Verdict.FALSIFIED, "pgd", point=point) for point in points]

    rungs["pgd"] = rung
    told: list[int] = []
    images, labels = torch.tensor([0.1, 0.2, 0.45]).view(-1, 1, 1, 1).repeat(1, 1, 1, 2), torch.ones(3).long()
    settings = config(rungs=("pgd",))
    verify(hand_network(), images, labels, settings, on_counterexample=lambda index, *_: told.append(index))
    assert told == []


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: no"), MemoryError()]
)
def test_a_batch_that_does_not_fit_is_halved_and_one_image_is_given_up(error: Exception, rungs: dict[str, Any]) -> None:
    sizes: list[int] = []

    def hungry(chunk: Chunk) -> list[Finding]:
        sizes.append(len(chunk.images))
        found = certifying("ibp", lambda n: True)(chunk)
        if len(found) > 2 or 7 in (chunk.images[:, 0, 0, 0] * 100).round():
            raise error
        return found

    rungs["ibp"] = hungry
    images, labels = numbered_images(12)
    table = verify(hand_network(), images, labels, config(rungs=("ibp",), batch_size=8))
    assert [n for n, method in enumerate(table["method"].to_pylist()) if method != "ibp"] == [7]
    assert sizes == [8, 4, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1]  # once halved, the batches of a rung stay small


def test_the_ensemble_is_told_and_saved_in_smaller_chunks(rungs: dict[str, Any]) -> None:
    rungs["ensemble"] = certifying("ensemble", lambda n: n < 40)
    told: list[Progress] = []
    settings = config(rungs=("ensemble",), batch_size=256)
    verify(hand_network(), *numbered_images(50), settings, on_progress=told.append)
    assert [each.handled for each in told if each.rung == "ensemble"] == [0, 32, 50, 50]
    told.clear()
    verify(
        hand_network(), *numbered_images(50), settings.model_copy(update={"batch_size": 20}), on_progress=told.append
    )
    assert [each.handled for each in told if each.rung == "ensemble"] == [0, 20, 40, 50, 50]


def test_another_error_is_no_lack_of_memory(rungs: dict[str, Any]) -> None:
    def broken(chunk: Chunk) -> list[Finding]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    rungs["ibp"] = broken
    with pytest.raises(RuntimeError, match="shapes"):
        verify(hand_network(), *numbered_images(2), config(rungs=("ibp",)))


def test_rows_are_told_once_each(rungs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "SAVE_INTERVAL_S", 0)
    rungs["ibp"] = certifying("ibp", lambda n: n % 2 == 0)
    told: list[pa.Table] = []
    settings = config(rungs=("ibp",), batch_size=4)
    table = verify(hand_network(), *numbered_images(10), settings, on_rows=told.append)
    assert [each["index"].to_pylist() for each in told] == [[0, 2], [4, 6], [8]]
    assert pa.concat_tables(told).drop_columns("seconds").equals(table.take([0, 2, 4, 6, 8]).drop_columns("seconds"))


# ---- branch and bound as a rung -------------------------------------------------------------------------------------


def test_branch_and_bound_decides_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certified, falsified by a point, falsified by no point at all, given up."""
    images, labels = numbered_images(49)
    images, labels = images[[5, 10, 45, 46, 20]], labels[:5]
    points = [images[2] + torch.tensor([0.06, 0.0]), images[3] + torch.tensor([0.2, 0.0])]
    outcomes = [
        Outcome(0, True, False, 0.25, 1.0, 3),
        Outcome(1, False, False, -0.5, 2.0, 7),
        Outcome(2, False, True, -1.0, 3.0, 1, points[0]),
        Outcome(3, False, True, -1.0, 1.0, 1, points[1]),  # 0.66: outside of the region
    ]
    told: list[Any] = []

    def fake(network: Network, images: Tensor, labels: Tensor, **options: Any) -> list[Outcome]:
        if len(images) == 0:
            return []
        assert options["state"] is None
        options["on_round"](Counts(1, 0, 3), [outcomes[0]])
        options["on_round"](Counts(1, 2, 1), outcomes[1:])
        return outcomes

    monkeypatch.setattr(verification, "branch_and_bound", fake)
    monkeypatch.setitem(verification.RUNGS, "ibp", certifying("ibp", lambda n: n == 20))
    table = verify(
        hand_network(),
        images,
        labels,
        config(rungs=("ibp", "branch_and_bound")),
        on_progress=lambda each: told.append((each.rung, each.handled, each.proved, each.falsified)),
        on_counterexample=lambda *found: told.append(found[:2]),
    )
    assert table["verdict"].to_pylist() == ["certified", "undecided", "falsified", "undecided", "certified"]
    assert table["method"].to_pylist() == ["branch_and_bound", "", "branch_and_bound", "", "ibp"]
    assert table["branches"].to_pylist() == [3, 7, 1, 1, 0]
    assert table["lower_bound"].to_pylist() == [0.25, -0.5, -1.0, -1.0, 1.0]
    seconds = [1.0, 2.0, 3.0, 1.0, 0.0]  # more by the rungs before
    assert all(0 <= row - own < 0.5 for row, own in zip(table["seconds"].to_pylist(), seconds, strict=True))
    name = "branch_and_bound"
    assert told[-5:] == [(name, 0, 1, 0), (name, 1, 2, 0), (2, name), (name, 4, 2, 1), (name, 4, 2, 1)]
    assert accuracies(table) == Accuracies(1.0, 1.0, 2 / 5, 4 / 5, 5)


def test_branch_and_bound_that_runs_out_of_memory_keeps_what_it_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(network: Network, images: Tensor, labels: Tensor, **options: Any) -> list[Outcome]:
        if len(images) == 0:
            return []
        options["on_round"](Counts(1, 0, 1), [Outcome(1, True, False, 0.5, 0.1, 2)])
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(verification, "branch_and_bound", fake)
    table = verify(hand_network(), *numbered_images(2), config(rungs=("branch_and_bound",)))
    assert table["verdict"].to_pylist() == ["undecided", "certified"]


def test_what_branch_and_bound_has_no_rule_for_is_refused_before_other_rungs() -> None:
    network = Network(nn.Sequential(nn.Flatten(), nn.Linear(2, 4), nn.Tanh()), nn.Linear(4, 2)).eval()
    told: list[str] = []
    with pytest.raises(UnsupportedLayerError, match="Tanh"):
        verify(
            network,
            *numbered_images(3),
            config(rungs=("ibp", "branch_and_bound")),
            on_rung=lambda rung, _: told.append(rung),
        )
    assert told == []


@pytest.mark.parametrize("rung", ["ibp", "crown", "alpha_crown", "branch_and_bound"])
def test_what_a_rung_has_no_rule_for_is_known_beforehand(rung: str) -> None:
    images, labels = torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.long)
    odd = Network(nn.Sequential(nn.MaxPool2d(1), nn.Flatten()), nn.Linear(4, 2)).eval()
    verification.check_rungs(odd, images, labels, config(rungs=("pgd",)))
    with pytest.raises(UnsupportedLayerError, match="MaxPool2d"):
        verification.check_rungs(odd, images, labels, config(rungs=("pgd", rung)))


def test_the_whole_ladder_and_order_of_its_bounds() -> None:
    """Every rung for real: what one proves the next has no need to, and further rungs only decide more."""
    network, images, labels = random_case(5)
    rungs = ("pgd", "ensemble", "ibp", "crown", "alpha_crown", "branch_and_bound")
    ensemble = {"steps": 10, "targets": 2, "square_queries": 20}
    tables = [
        verify(network, images, labels, config(rungs=rungs[:count], ensemble=ensemble)).to_pylist()
        for count in range(len(rungs) + 1)
    ]
    for before, after in itertools.pairwise(tables):
        for old, new in zip(before, after, strict=True):
            if old["verdict"] != "undecided":
                assert (new["verdict"], new["method"]) == (old["verdict"], old["method"])
            if old["lower_bound"] is not None:
                assert new["lower_bound"] >= old["lower_bound"]


# ---- stopped and gone on with ---------------------------------------------------------------------------------------


def comparable(table: pa.Table) -> pa.Table:
    return table.drop_columns("seconds")


@pytest.mark.parametrize("seed", range(4))
def test_interrupted_again_and_again_it_ends_alike(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "SAVE_INTERVAL_S", 0)
    network, images, labels = random_case(seed)
    settings = config(rungs=("pgd", "ibp", "crown", "alpha_crown"), batch_size=5, attack={"steps": 2, "step_size": 0.5})
    points: dict[int, tuple[str, Tensor]] = {}
    whole = verify(
        network, images, labels, settings, on_counterexample=lambda i, m, p: points.setdefault(i, (m, p)) and None
    )
    state, choice = tmp_path / "state", random.Random(seed)
    for _ in range(200):
        left = choice.randint(1, 8)
        found: dict[int, tuple[str, Tensor]] = {}
        rows: list[pa.Table] = []

        def stop(_: Progress) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt

        def note(index: int, method: str, point: Tensor, found: dict[int, tuple[str, Tensor]] = found) -> None:
            found[index] = (method, point)

        with contextlib.suppress(KeyboardInterrupt):
            table = verify(
                network,
                images,
                labels,
                settings,
                on_progress=stop,
                on_counterexample=note,
                on_rows=rows.append,
                state=state,
            )
            break
    assert comparable(table).equals(comparable(whole))
    assert found.keys() == points.keys()
    for index, (method, point) in found.items():
        assert method == points[index][0]
        assert torch.equal(point, points[index][1])
    decided = [row["index"] for row in whole.to_pylist() if row["verdict"] != "undecided"]
    assert sorted(pa.concat_tables(rows)["index"].to_pylist()) == decided


def test_a_finished_state_answers_at_once(tmp_path: Path, rungs: dict[str, Any]) -> None:
    network, images, labels = random_case(1)
    told: list[Any] = []
    one = verify(network, images, labels, config(), state=tmp_path, on_rung=lambda *each: told.append(each))
    rungs.clear()
    again: list[Any] = []
    other = verify(network, images, labels, config(), state=tmp_path, on_rung=lambda *each: again.append(each))
    assert one.equals(other)
    assert again == told
    assert [rung for rung, _ in told] == ["clean", "pgd", "ibp", "crown"]


def test_a_state_of_another_verification_is_refused(tmp_path: Path) -> None:
    network, images, labels = random_case(1)
    verify(network, images, labels, config(), state=tmp_path)
    with pytest.raises(
        ValueError, match=r"belongs to another verification: there config\.seed is 0, now it is 1; choose"
    ):
        verify(network, images, labels, config(seed=1), state=tmp_path)
    with pytest.raises(ValueError, match="there images is "):
        verify(network, images * 0.999, labels, config(), state=tmp_path)
    with pytest.raises(ValueError, match="there images is "):
        verify(network, images, (labels + 1) % 3, config(), state=tmp_path)
    with pytest.raises(ValueError, match="there weights is "):
        verify(random_case(2)[0], images, labels, config(), state=tmp_path)
    leaky = Network(nn.Sequential(*list(network.features)[:-1], nn.LeakyReLU()), network.head).eval()
    with pytest.raises(ValueError, match="there layers is "):
        verify(leaky, images, labels, config(), state=tmp_path)


def test_the_state_of_branch_and_bound_lies_in_the_ladders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It meets the same images after a kill, is told where its file is, and that file goes when the rung is done."""
    entered: list[tuple[int, bool]] = []

    def fake(network: Network, images: Tensor, labels: Tensor, **options: Any) -> list[Outcome]:
        if len(images) == 0:
            return []
        entered.append((len(images), options["state"].exists()))
        outcomes = [Outcome(n, True, False, 0.5, 1.0, 2) for n in range(3)]
        if len(entered) == 1:
            options["state"].write_text("half")
            options["on_round"](Counts(1, 0, 2), outcomes[:1])
            raise KeyboardInterrupt
        return outcomes

    monkeypatch.setattr(verification, "SAVE_INTERVAL_S", 0)
    monkeypatch.setattr(verification, "branch_and_bound", fake)
    settings = config(rungs=("branch_and_bound",))
    with pytest.raises(KeyboardInterrupt):
        verify(hand_network(), *numbered_images(3), settings, state=tmp_path)
    table = verify(hand_network(), *numbered_images(3), settings, state=tmp_path)
    assert entered == [(3, False), (3, True)]
    assert table["verdict"].to_pylist() == ["certified"] * 3
    assert all(1 <= seconds < 1.5 for seconds in table["seconds"].to_pylist())  # no round counts twice
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_quick_accuracies_by_hand() -> None:
    # standard as above; IBP certifies only x0 = 0.8 at 0.1, and all four correct ones at 0.01 (0.04 off the margins)
    network = hand_network()
    assert quick_accuracies(network, HAND_IMAGES, HAND_LABELS, ThreatModel(epsilon="1/10")) == pytest.approx((0.8, 0.2))
    assert quick_accuracies(network, HAND_IMAGES, HAND_LABELS, ThreatModel(epsilon="1/100")) == pytest.approx(
        (0.8, 0.8)
    )


@pytest.fixture
def precision() -> Any:
    """Every switch of the precision of products as it was."""
    matmul = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    backends: Any = torch.backends
    switches = (
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    )
    before = [switch.fp32_precision for switch in switches]
    yield switches
    torch.set_float32_matmul_precision(matmul[0])
    torch.backends.cudnn.allow_tf32 = matmul[1]
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value


@pytest.mark.parametrize("level", ["highest", "high", "medium"])
def test_reduced_precision_is_off_inside_and_back_outside(precision: Any, level: str) -> None:
    """TF32 on a GPU, bfloat16 on some processors; switched on by the older names."""
    torch.set_float32_matmul_precision(level)
    torch.backends.cudnn.allow_tf32 = level != "highest"
    before = [switch.fp32_precision for switch in precision]
    inside: list[Any] = []

    def look(rung: str, left: int) -> None:
        inside.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        inside.append((torch.backends.cuda.matmul.allow_tf32, {switch.fp32_precision for switch in precision}))

    verify(hand_network(), HAND_IMAGES, HAND_LABELS, config(rungs=("ibp",)), on_rung=look)
    assert inside == [("highest", False), (False, {"ieee"})] * 2
    assert torch.get_float32_matmul_precision() == level
    assert torch.backends.cudnn.allow_tf32 == (level != "highest")
    assert [switch.fp32_precision for switch in precision] == before


def test_reduced_precision_switched_on_by_the_newer_names(precision: Any) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    before = [switch.fp32_precision for switch in precision]
    inside: set[str] = set()

    def fail() -> None:
        with exact_float32():
            inside.update(switch.fp32_precision for switch in precision)
            raise ArithmeticError  # an error inside restores too

    with pytest.raises(ArithmeticError):
        fail()
    assert inside == {"ieee"}
    assert [switch.fp32_precision for switch in precision] == before


def test_epsilon_is_that_of_the_threat() -> None:
    """Certified up to the image's margin, not beyond: 2 x0 - 1 - 2 epsilon > 0."""
    image, label = torch.tensor([[[[0.75, 0.5]]]]), torch.tensor([0])
    for epsilon, expected in (("24/100", "certified"), ("26/100", "falsified")):
        settings = config(threat={"epsilon": epsilon}, attack=AttackConfig(steps=2, step_size=2.0))
        assert verify(hand_network(), image, label, settings)["verdict"].to_pylist() == [expected]
    assert math.isclose(config().threat.radius, 0.1)
