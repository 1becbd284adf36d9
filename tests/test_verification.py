"""The ladder: a network whose margins are known by hand, the order of the accuracies, shown counter-examples."""

import itertools
import math
from typing import Any

import oracles
import pyarrow as pa
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ccdist import verification
from ccdist.attacks import worst_points
from ccdist.config import AttackConfig, ThreatModel, VerifyConfig
from ccdist.interval import epsilon_box
from ccdist.networks import Network
from ccdist.verification import SCHEMA, Accuracies, Verdict, accuracies, exact_float32, quick_accuracies, verify

# float32 bounds of values of order 1.
ROUNDING = 1e-6


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


@given(seed=st.integers(0, 10_000), restarts=st.integers(1, 2))
def test_falsified_images_have_a_counter_example(seed: int, restarts: int) -> None:
    """The attack's points are caught on their way: a plain forward pass errs at them, inside the box."""
    network, images, labels = random_case(seed)
    caught: list[Tensor] = []

    def spy(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found = worst_points(*args, **kwargs)
        caught.append(found[0])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "worst_points", spy)
        attack = {"steps": 3, "step_size": 0.7, "restarts": restarts}
        rows = verify(network, images, labels, config(attack=attack)).to_pylist()
    predicted = network(images).argmax(1).tolist()
    assert [row["prediction"] for row in rows] == predicted
    wrong = [row["index"] for row in rows if row["method"] == "clean"]
    assert wrong == [index for index in range(len(images)) if predicted[index] != labels[index]]
    attacked = [index for index in range(len(images)) if index not in wrong]
    for index, point in zip(attacked, caught[0], strict=True):
        fooled = int(network(point[None]).argmax()) != labels[index]
        assert (rows[index]["method"] == "pgd") == fooled
        assert float((point - images[index]).abs().max()) <= 0.1 + ROUNDING
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


def test_accuracies_of_a_written_table() -> None:
    rows = [
        ("certified", "ibp"),
        ("certified", "crown"),
        ("undecided", ""),
        ("falsified", "pgd"),
        ("falsified", "clean"),
    ]
    rows += [("falsified", "bab"), ("undecided", ""), ("undecided", "")]
    table = pa.table({"verdict": [verdict for verdict, _ in rows], "method": [method for _, method in rows]})
    # a counter-example of branch and bound counts against the certified upper end only
    assert accuracies(table) == Accuracies(7 / 8, 6 / 8, 2 / 8, 5 / 8, 8)


@pytest.mark.parametrize("certified", range(25))
def test_the_order_survives_the_division(certified: int) -> None:
    """All others falsified: both ends are the same fraction, to the bit."""
    verdicts = ["certified"] * certified + ["falsified"] * (24 - certified)
    methods = ["ibp"] * certified + ["clean"] * (24 - certified)
    result = accuracies(pa.table({"verdict": verdicts, "method": methods}))
    assert result.certified == result.certified_upper == result.adversarial == result.standard


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
