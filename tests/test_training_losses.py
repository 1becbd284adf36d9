"""Each loss of a student's step against plain code: the ends of alpha, SABR, AD-CERT, and the l_2 ball."""

from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from step_cases import (
    FULL_EPSILON,
    MID_EPSILON,
    NUM_STEPS,
    ROUNDING,
    assert_same_gradients,
    make_batch,
    make_config,
    make_network,
    make_step,
    run,
)
from torch import Tensor, nn

from ccdist.batch_norm import Statistics, forward, forward_collecting
from ccdist.bounds import elided_lower_bounds, logit_differences, propagate
from ccdist.config import ThreatModel
from ccdist.interval import Interval, epsilon_box
from ccdist.losses import cc_ibp_loss, cross_entropy_of_differences
from ccdist.threats import L2Ball, contains, perturbation_set

# The first optimiser of a process imports torch's compiler, which takes seconds.
pytestmark = pytest.mark.timeout(20)

# -- the ends of the losses


def test_without_beta_cc_dist_is_cc_ibp() -> None:
    one, network = run(make_config(loss={"kind": "cc_dist", "alpha": 0.3, "beta": 0.0}), teacher=False)
    other, twin = run(make_config(loss={"kind": "cc_ibp", "alpha": 0.3}), teacher=False)
    assert torch.equal(one, other)
    assert_same_gradients(network, twin, 0.0)


@pytest.mark.parametrize("shi_weight", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["cc_ibp", "mtl_ibp", "exp_ibp"])
def test_alpha_0_is_the_adversarial_cross_entropy(kind: str, shi_weight: float, attacked: list[Tensor]) -> None:
    config = make_config(loss={"kind": kind, "alpha": 0.0}, shi_weight=shi_weight)
    network, batch = make_network(), make_batch(MID_EPSILON)
    loss, metrics = make_step(network, None, config)(batch)
    (points,) = attacked
    assert not torch.equal(points, batch.images)
    plain = make_network()
    logits = forward_collecting(plain, points, {})
    expected = oracles.cross_entropy(logits, batch.labels)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=ROUNDING)
    assert float(metrics["adversarial_accuracy"]) == pytest.approx(
        float((logits.argmax(1) == batch.labels).double().mean())
    )
    if shi_weight == 0:
        loss.backward()
        F.cross_entropy(logits, batch.labels).backward()
        assert_same_gradients(network, plain)


@pytest.mark.parametrize("kind", ["cc_ibp", "mtl_ibp", "exp_ibp", "ad_cert"])
def test_alpha_1_is_ibp(kind: str) -> None:
    one, network = run(make_config(loss={"kind": kind, "alpha": 1.0}), teacher=False)
    other, twin = run(make_config(loss={"kind": "ibp"}), teacher=False)
    assert float(one) == pytest.approx(float(other), rel=ROUNDING)
    assert_same_gradients(network, twin)


@pytest.mark.parametrize(
    # a box of no width has no Shi regulariser: below 1e-6, which steps 0 and 1 are, bounds are those of 1e-6
    ("index", "radius"),
    [(0, 1e-6), (1, 1e-6), (10, 0.1 / 13), (FULL_EPSILON, 0.1), (NUM_STEPS, 0.1)],
)
def test_ibp_is_the_cross_entropy_of_plain_bounds(index: int, radius: float) -> None:
    network, batch = make_network(), make_batch(index)
    loss, metrics = make_step(network, None, make_config(loss={"kind": "ibp"}, shi_weight=0.0))(batch)
    statistics: Statistics = {}
    plain = make_network()
    forward_collecting(plain.features, batch.images, statistics)
    box = propagate(plain.features, epsilon_box(batch.images, radius), statistics=statistics)
    lower = elided_lower_bounds(plain.head, box, batch.labels)
    assert float(loss.detach()) == pytest.approx(float(cross_entropy_of_differences(lower).detach()), rel=ROUNDING)
    assert metrics.keys() == {"loss", "ibp_certified_accuracy"}
    assert float(metrics["ibp_certified_accuracy"]) == pytest.approx(float((lower.amin(1) > 0).double().mean()))


# -- SABR


def test_sabr_with_the_whole_box_is_ibp(attacked: list[Tensor]) -> None:
    """Clean statistics, so that nothing but the box reads the attacked points."""
    settings = {"batch_norm": "clean", "shi_weight": 0.5}
    one, network = run(make_config(loss={"kind": "sabr", "subbox": 1.0}, **settings), teacher=False)
    other, twin = run(make_config(loss={"kind": "ibp"}, **settings), teacher=False)
    assert len(attacked) == 1
    assert float(one) == pytest.approx(float(other), rel=ROUNDING)
    assert_same_gradients(network, twin)


@pytest.mark.parametrize("relu_shrink", [1.0, 0.8])
@pytest.mark.parametrize("style", ["clean", "adversarial"])
def test_sabr_by_hand(style: str, relu_shrink: float, attacked: list[Tensor]) -> None:
    network, batch = make_network(), make_batch(FULL_EPSILON)
    config = make_config(
        loss={"kind": "sabr", "subbox": 0.3, "relu_shrink": relu_shrink},
        batch_norm=style,
        attack={"steps": 2, "step_size": 0.5, "kappa": 2.0},
    )
    loss, _ = make_step(network, None, config)(batch)
    (points,) = attacked
    low, up = (batch.images - 0.2).clamp(0, 1), (batch.images + 0.2).clamp(0, 1)
    tau = 0.3 * (up - low) / 2
    center = torch.minimum(torch.maximum(points, low + tau), up - tau)
    box = Interval(center - tau, center + tau)
    plain, statistics = make_network(), {}
    forward_collecting(plain.features, points if style == "adversarial" else batch.images, statistics)
    for layer in plain.features:
        stable = (box.lower > 0) | (box.upper < 0)
        box = propagate(layer, box, statistics=statistics)
        if isinstance(layer, nn.ReLU):
            box = Interval(box.lower, torch.where(stable, box.upper, relu_shrink * box.upper))
    expected = cross_entropy_of_differences(elided_lower_bounds(plain.head, box, batch.labels))
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=ROUNDING)
    assert_same_gradients(network, plain)


# -- AD-CERT

VARIANTS = [
    ({"student_input": "adversarial"}, "adversarial"),
    ({"student_input": "adversarial"}, "clean"),
    ({"student_input": "clean"}, "adversarial"),
    ({"student_input": "rslad"}, "adversarial"),
    ({"student_input": "rslad", "soft_attack": True}, "clean"),
    ({"student_input": "adversarial", "teacher_input": "adversarial"}, "adversarial"),
    ({"student_input": "clean", "teacher_input": "adversarial"}, "clean"),
    ({"student_input": "clean", "teacher_input": "adversarial"}, "adversarial"),
]


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize(("variant", "style"), VARIANTS)
def test_ad_cert_by_hand(variant: dict[str, Any], style: str, alpha: float, attacked: list[Tensor]) -> None:
    config = make_config(loss={"kind": "ad_cert", "alpha": alpha} | variant, batch_norm=style, shi_weight=0.0)
    network, teacher, batch = make_network(), make_network(seed=1), make_batch(FULL_EPSILON)
    loss, _ = make_step(network, teacher, config)(batch)
    reads_attack = variant["student_input"] != "clean" or variant.get("teacher_input") == "adversarial"
    assert len(attacked) == reads_attack
    points = attacked[0] if reads_attack else batch.images
    plain, statistics = make_network(), {}
    forward_collecting(plain.features, points if style == "adversarial" else batch.images, statistics)
    teacher_logits = teacher(points if variant.get("teacher_input") == "adversarial" else batch.images)

    def divergence(images: Tensor) -> Tensor:
        student = F.log_softmax(forward(plain, images, statistics), 1)
        return F.kl_div(student, F.log_softmax(teacher_logits, 1).detach(), log_target=True, reduction="batchmean")

    match variant["student_input"]:
        case "adversarial":
            distilled = divergence(points)
        case "clean":
            distilled = divergence(batch.images)
        case "rslad":
            distilled = divergence(batch.images) / 6 + 5 * divergence(points) / 6
    box = propagate(plain.features, epsilon_box(batch.images, 0.1), statistics=statistics)
    lower = elided_lower_bounds(plain.head, box, batch.labels)
    expected = alpha * cross_entropy_of_differences(lower) + (1 - alpha) * distilled
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=ROUNDING)
    assert_same_gradients(network, plain)


def test_a_soft_attack_raises_the_divergence(attacked: list[Tensor]) -> None:
    """Of every image above that of its start, and of the batch above what attacking the cross-entropy finds."""
    teacher, batch = make_network("mlp", 1), make_batch(FULL_EPSILON)
    loss = {"kind": "ad_cert", "alpha": 0.0}
    for steps, soft in ((1, True), (20, True), (20, False)):
        attack = {"steps": steps, "step_size": 1e-9 if steps == 1 else 0.2}
        config = make_config(loss=loss | {"soft_attack": soft}, attack=attack)
        make_step(make_network("mlp"), teacher, config)(make_batch(FULL_EPSILON))
    plain = make_network("mlp")  # the attack reads running statistics, here as they were
    soft_labels = F.log_softmax(teacher(batch.images), 1).detach()

    def divergences(points: Tensor) -> Tensor:
        student = F.log_softmax(plain(points), 1).detach()
        return F.kl_div(student, soft_labels, log_target=True, reduction="none").sum(1)

    start, soft_points, hard_points = (divergences(points) for points in attacked)
    assert (soft_points >= start).all()
    assert float(soft_points.mean()) > 1.2 * float(start.mean())
    assert float(soft_points.mean()) > float(hard_points.mean())


# -- the l_2 ball


@pytest.mark.parametrize("style", ["clean", "adversarial"])
def test_l2_by_hand(style: str, attacked: list[Tensor]) -> None:
    threat = ThreatModel(norm="l2", epsilon="3/2")  # beyond 1, the end of the linf range
    config = make_config(
        loss={"kind": "cc_ibp", "alpha": 0.3},
        batch_norm=style,
        attack={"steps": 3, "step_size": 0.5, "kappa": 1.5},
    )
    network, batch = make_network(), make_batch(FULL_EPSILON)
    loss, _ = make_step(network, None, config, threat)(batch)
    (points,) = attacked
    assert contains(L2Ball(batch.images, 1.5 * 1.5), points).all()
    plain, statistics = make_network(), {}
    forward_collecting(plain.features, points if style == "adversarial" else batch.images, statistics)
    box = propagate(plain.features, perturbation_set(batch.images, "l2", 1.5), statistics=statistics)
    expected = cc_ibp_loss(
        logit_differences(forward(plain, points, statistics), batch.labels),
        elided_lower_bounds(plain.head, box, batch.labels),
        alpha=0.3,
    )
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=ROUNDING)
    assert_same_gradients(network, plain)


def test_every_other_loss_has_a_finite_step_under_l2() -> None:
    threat = ThreatModel(norm="l2", epsilon="1/2")
    losses = [{"kind": kind, "alpha": 0.5} for kind in ("mtl_ibp", "exp_ibp", "ad_cert")]
    for loss in (*losses, {"kind": "ibp"}, {"kind": "cc_dist", "alpha": 0.5, "beta": 5.0}):
        for index in (0, MID_EPSILON):
            value, network = run(make_config(loss=loss), index, threat=threat)
            assert torch.isfinite(value)
            assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_sabr_is_refused_under_l2() -> None:
    with pytest.raises(ValueError, match="sabr has no form for norm l2"):
        make_step(
            make_network(),
            None,
            make_config(loss={"kind": "sabr", "subbox": 0.4}),
            ThreatModel(norm="l2", epsilon="1/2"),
        )
