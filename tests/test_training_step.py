"""One step of teacher and student: its loss and gradients against plain code, and what it leaves out.

The reference is `ccdist.reference` where that has the configuration, else a plain step below; both use the unfolded
network. Attacked points are recorded as the step finds them wherever another computation starts from them.
"""

import copy
from collections import Counter
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from step_cases import (
    BFLOAT16_LOSS,
    FULL_EPSILON,
    MID_EPSILON,
    NUM_STEPS,
    ROUNDING,
    THREAT,
    TINY_EPSILON,
    assert_same_gradients,
    make_batch,
    make_config,
    make_network,
    make_step,
    run,
    running,
    state,
)
from torch import Tensor, nn

from ccdist import training_step
from ccdist.attacks import pgd
from ccdist.batch_norm import Statistics, forward, forward_collecting
from ccdist.bounds import Trace, elided_lower_bounds, logit_differences, propagate
from ccdist.config import DataConfig, StudentConfig, TeacherConfig, ThreatModel
from ccdist.data import load_dataset
from ccdist.interval import epsilon_box
from ccdist.losses import cc_dist_loss
from ccdist.networks import Network, Normalize
from ccdist.reference import reference_loss
from ccdist.regularizers import shi_regularizer
from ccdist.threats import contains
from ccdist.training import train_student
from ccdist.training_step import Batch, EpsilonSchedule, FoldedNetwork, StepPrecision, TeacherStep

# The first optimiser of a process imports torch's compiler, which takes seconds.
pytestmark = pytest.mark.timeout(20)

# -- the same as the reference

REFERENCE_SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "no regulariser": {"shi_weight": 0.0},
    "l1": {"l1": 1e-3, "shi_weight": 2.0},
    "larger box, several steps": {"attack": {"steps": 5, "step_size": 0.25, "kappa": 2.1}},
    "last iterate": {"attack": {"steps": 1, "step_size": 10.0, "keep": "last"}},
    "restarts": {"attack": {"steps": 2, "step_size": 0.5, "restarts": 3}},
    "alpha_dist 0": {"loss": {"kind": "cc_dist", "alpha": 0.5, "beta": 5.0, "alpha_dist": 0.0}},
    "alpha_dist 1": {"loss": {"kind": "cc_dist", "alpha": 0.01, "beta": 0.5, "alpha_dist": 1.0}},
    "alpha 0": {"loss": {"kind": "cc_dist", "alpha": 0.0, "beta": 5.0}},
    "alpha 1, distilled at the attacked point": {
        "loss": {"kind": "cc_dist", "alpha": 1.0, "beta": 5.0, "alpha_dist": 0.5}
    },
}


def assert_it_is_the_reference(config: StudentConfig, index: int, name: str) -> None:
    actual, network = run(config, index, name=name)
    expected_network, batch = make_network(name), make_batch(index)
    schedule = EpsilonSchedule(config.epsilon_schedule, THREAT, NUM_STEPS)
    expected = reference_loss(
        expected_network,
        make_network(name, 1),
        batch.images,
        batch.labels,
        config,
        THREAT,
        epsilon=schedule(index),
        epsilon_max=schedule.epsilon_max,
        attack_generator=batch.attack_generator,
        clean_pass=False,
    )
    expected.backward()
    assert float(actual) == pytest.approx(float(expected.detach()), rel=ROUNDING)
    assert_same_gradients(network, expected_network)
    torch.testing.assert_close(running(network), running(expected_network), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("index", [TINY_EPSILON, MID_EPSILON, FULL_EPSILON])
@pytest.mark.parametrize("setting", REFERENCE_SETTINGS)
def test_it_is_the_reference(setting: str, index: int) -> None:
    assert_it_is_the_reference(make_config(**REFERENCE_SETTINGS[setting]), index, "cnn3")


@pytest.mark.parametrize("name", ["cnn7", "resnet", "mlp"])
def test_it_is_the_reference_for_other_networks(name: str) -> None:
    settings = {"l1": 1e-3, "attack": {"steps": 3, "step_size": 0.25, "kappa": 2.1}}
    assert_it_is_the_reference(make_config(**settings), MID_EPSILON, name)


def test_the_reference_s_clean_pass_moves_the_running_statistics_only() -> None:
    """What the step leaves out. The attack reads them, so points are fixed here by an attack without room."""
    config, batch = make_config(attack={"steps": 1, "step_size": 1e-9, "kappa": 1e-9}), make_batch(FULL_EPSILON)
    found: list[tuple[Tensor, Network]] = []
    for clean_pass in (False, True):
        network = make_network()
        loss = reference_loss(
            network,
            make_network(seed=1),
            batch.images,
            batch.labels,
            config,
            THREAT,
            epsilon=0.1,
            epsilon_max=0.1,
            attack_generator=torch.Generator().manual_seed(0),
            clean_pass=clean_pass,
        )
        loss.backward()
        found.append((loss.detach(), network))
    (without, one), (with_it, other) = found
    # points differ by 1e-10 of a pixel at most
    assert float(with_it) == pytest.approx(float(without), rel=1e-7)
    assert_same_gradients(one, other, 1e-7)
    assert not torch.allclose(running(one)[0], running(other)[0], rtol=1e-3)


def test_the_reference_refuses_what_it_is_not() -> None:
    batch = make_batch(1)
    for config, threat in (
        (make_config(loss={"kind": "cc_ibp", "alpha": 0.5}), THREAT),
        (make_config(), ThreatModel(norm="l2", epsilon="1/10")),
        (make_config(batch_norm="clean"), THREAT),
    ):
        with pytest.raises(ValueError, match="the reference step is"):
            reference_loss(
                make_network(),
                make_network(),
                batch.images,
                batch.labels,
                config,
                threat,
                epsilon=0.1,
                epsilon_max=0.1,
                attack_generator=torch.Generator(),
            )


# -- statistics of the clean batch


def plain_clean_step(network: Network, teacher: Network, config: StudentConfig, batch: Batch, epsilon: float) -> Tensor:
    """CTBench's order: the clean batch's statistics in attack, attacked pass and bounds, with graph."""
    statistics: Statistics = {}
    forward_collecting(network.features, batch.images, statistics)
    fixed = {layer: (mean.detach(), variance.detach()) for layer, (mean, variance) in statistics.items()}
    points = pgd(
        lambda x: forward(network, x, fixed),
        batch.labels,
        region=epsilon_box(batch.images, config.attack.kappa * epsilon),
        steps=config.attack.steps,
        step_size=config.attack.step_size,
        generator=batch.attack_generator,
    )
    features = forward(network.features, points, statistics)
    trace = Trace()
    box = propagate(network.features, epsilon_box(batch.images, epsilon), statistics=statistics, trace=trace)
    loss = cc_dist_loss(
        logit_differences(network.head(features), batch.labels),
        elided_lower_bounds(network.head, box, batch.labels),
        features,
        box,
        teacher.features(batch.images).detach(),
        alpha=config.loss.alpha,
        beta=config.loss.beta,
    )
    radius = next(entered for layer, entered in trace.steps if not isinstance(layer, Normalize)).radius
    weight = config.shi_weight * (1 - epsilon / THREAT.radius)
    return loss + weight * shi_regularizer(radius, trace.activation_inputs())


@pytest.mark.parametrize("name", ["cnn3", "cnn7", "resnet"])
@pytest.mark.parametrize("index", [TINY_EPSILON, MID_EPSILON, FULL_EPSILON])
def test_clean_statistics_are_those_of_a_plain_step(name: str, index: int) -> None:
    config = make_config(batch_norm="clean", attack={"steps": 3, "step_size": 0.25, "kappa": 1.5})
    actual, network = run(config, index, name=name)
    expected_network = make_network(name)
    epsilon = EpsilonSchedule(config.epsilon_schedule, THREAT, NUM_STEPS)(index)
    expected = plain_clean_step(expected_network, make_network(name, 1), config, make_batch(index), epsilon)
    expected.backward()
    assert float(actual) == pytest.approx(float(expected.detach()), rel=ROUNDING)
    assert_same_gradients(network, expected_network)
    torch.testing.assert_close(running(network), running(expected_network), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("style", ["clean", "adversarial"])
def test_running_statistics_are_those_of_the_style_s_batch(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the attack finds, clean statistics do not move; those of the attacked batch follow it."""
    elsewhere = make_batch(0).images.flip(0) ** 3
    monkeypatch.setattr(training_step, "pgd", lambda *args, **kwargs: elsewhere)
    _, network = run(make_config(batch_norm=style))
    expected = make_network()
    forward_collecting(expected.features, elsewhere if style == "adversarial" else make_batch(0).images, {})
    torch.testing.assert_close(running(network), running(expected), rtol=ROUNDING, atol=ROUNDING)


# -- passes that nothing reads

PGD_PASSES = 3  # two steps and the end point
# loss -> attacks, bounds, forward passes of the student and teacher outside the attack
PASSES: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "ibp: the clean batch, for its statistics": ({"kind": "ibp"}, 0, 1, 1),
    "cc_ibp": ({"kind": "cc_ibp", "alpha": 0.5}, 1, 1, 1),
    "cc_ibp, alpha 0: no bounds": ({"kind": "cc_ibp", "alpha": 0.0}, 1, 0, 1),
    "mtl_ibp, alpha 0": ({"kind": "mtl_ibp", "alpha": 0.0}, 1, 0, 1),
    "exp_ibp, alpha 0": ({"kind": "exp_ibp", "alpha": 0.0}, 1, 0, 1),
    "cc_ibp, alpha 1: no attack": ({"kind": "cc_ibp", "alpha": 1.0}, 0, 1, 1),
    "mtl_ibp, alpha 1": ({"kind": "mtl_ibp", "alpha": 1.0}, 0, 1, 1),
    "exp_ibp, alpha 1": ({"kind": "exp_ibp", "alpha": 1.0}, 0, 1, 1),
    "sabr": ({"kind": "sabr", "subbox": 0.4}, 1, 1, 1),
    "cc_dist: the teacher too": ({"kind": "cc_dist", "alpha": 0.5, "beta": 1.0}, 1, 1, 2),
    "cc_dist without beta: no teacher": ({"kind": "cc_dist", "alpha": 0.5, "beta": 0.0}, 1, 1, 1),
    "cc_dist, alpha 0": ({"kind": "cc_dist", "alpha": 0.0, "beta": 1.0}, 1, 0, 2),
    "cc_dist, alpha 1": ({"kind": "cc_dist", "alpha": 1.0, "beta": 1.0}, 0, 1, 2),
    "cc_dist, alpha_dist alone reads bounds": (
        {"kind": "cc_dist", "alpha": 0.0, "beta": 1.0, "alpha_dist": 1.0}, 1, 1, 2,
    ),
    "cc_dist, alpha_dist alone reads the attack": (
        {"kind": "cc_dist", "alpha": 1.0, "beta": 1.0, "alpha_dist": 0.0}, 1, 1, 2,
    ),
    "ad_cert": ({"kind": "ad_cert", "alpha": 0.5}, 1, 1, 2),
    "ad_cert, alpha 0": ({"kind": "ad_cert", "alpha": 0.0}, 1, 0, 2),
    "ad_cert, alpha 1": ({"kind": "ad_cert", "alpha": 1.0}, 0, 1, 1),
    "ad_cert at the image": ({"kind": "ad_cert", "alpha": 0.5, "student_input": "clean"}, 0, 1, 2),
    "ad_cert, rslad": ({"kind": "ad_cert", "alpha": 0.5, "student_input": "rslad"}, 1, 1, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSES)
def test_only_the_passes_that_the_loss_reads(name: str, passes: Counter[str]) -> None:
    loss, attacks, bounds, forwards = PASSES[name]
    config = make_config(loss=loss, shi_weight=0.0)
    run(config, teacher=config.loss.reads_teacher)
    assert passes["pgd"] == attacks
    assert passes["folded_interval"] == passes["elided_lower_bounds"] == bounds
    assert passes["propagate"] == passes["shi_regularizer_of_centers"] == 0
    assert passes["folded_forward"] - PGD_PASSES * attacks == forwards
    assert passes["collecting"] == 1


@pytest.mark.parametrize(("index", "bounds"), [(MID_EPSILON, 1), (FULL_EPSILON, 0)])
def test_the_regulariser_needs_bounds_during_the_ramp_only(index: int, bounds: int, passes: Counter[str]) -> None:
    run(make_config(loss={"kind": "cc_ibp", "alpha": 0.0}, shi_weight=0.5), index, teacher=False)
    assert passes["folded_interval"] == passes["shi_regularizer_of_centers"] == bounds


def test_one_pass_of_bounds_serves_loss_distillation_and_regulariser(passes: Counter[str]) -> None:
    run(make_config())
    assert passes["folded_interval"] == passes["shi_regularizer_of_centers"] == 1


def test_the_teacher_is_not_read_without_need() -> None:
    """A teacher whose every number is NaN changes nothing where its weight is 0."""
    for loss in ({"kind": "cc_dist", "alpha": 0.5, "beta": 0.0}, {"kind": "ad_cert", "alpha": 1.0}, {"kind": "ibp"}):
        broken = make_network(seed=1)
        with torch.no_grad():
            for parameter in broken.parameters():
                parameter.fill_(torch.nan)
        loss_with, _ = make_step(make_network(), broken, make_config(loss=loss))(make_batch(MID_EPSILON))
        loss_without, _ = make_step(make_network(), None, make_config(loss=loss))(make_batch(MID_EPSILON))
        assert torch.equal(loss_with, loss_without)
        assert torch.isfinite(loss_with)


# -- other terms


@pytest.mark.parametrize("style", ["clean", "adversarial"])
def test_natural_weight_mixes_in_the_clean_cross_entropy(style: str, attacked: list[Tensor]) -> None:
    settings = {"batch_norm": style, "shi_weight": 0.0, "loss": {"kind": "cc_ibp", "alpha": 0.3}}
    alone, _ = run(make_config(**settings), teacher=False)
    mixed, _ = run(make_config(natural_weight=0.25, **settings), teacher=False)
    plain, statistics, batch = make_network(), {}, make_batch(MID_EPSILON)
    forward_collecting(plain.features, attacked[0] if style == "adversarial" else batch.images, statistics)
    natural = oracles.cross_entropy(forward(plain, batch.images, statistics), batch.labels)
    assert float(mixed) == pytest.approx(0.25 * natural + 0.75 * float(alone), rel=ROUNDING)


def test_epsilon_0_is_no_attack_and_a_box_of_almost_no_width(passes: Counter[str]) -> None:
    """While epsilon is 0 the loss is that of a degenerate box, so CC-IBP is the clean cross-entropy."""
    loss, _ = run(make_config(loss={"kind": "cc_ibp", "alpha": 0.5}, shi_weight=0.0), 0, teacher=False)
    assert passes["pgd"] == 0
    batch = make_batch(0)
    expected = oracles.cross_entropy(forward_collecting(make_network(), batch.images, {}), batch.labels)
    # a box of radius 1e-6 in a network whose weights are of order one
    assert float(loss) == pytest.approx(expected, rel=1e-3)


def test_the_teacher_stays_as_it_was() -> None:
    for loss in (
        {"kind": "cc_dist", "alpha": 0.3, "beta": 5.0},
        {"kind": "ad_cert", "alpha": 0.3, "soft_attack": True},
    ):
        for precision in ("float32", "bfloat16"):
            teacher, network = make_network(seed=1), make_network()
            before = state(teacher)
            step = make_step(network, teacher, make_config(loss=loss), precision=StepPrecision(teacher=precision))
            step(make_batch(MID_EPSILON))[0].backward()
            assert [name for name, value in state(teacher).items() if not torch.equal(value, before[name])] == []
            assert all(parameter.grad is None for parameter in teacher.parameters())
            assert not any(module.training for module in teacher.modules())


def test_images_and_weights_stay_as_they_were() -> None:
    network, batch = make_network(), make_batch(FULL_EPSILON)
    before, images = state(network), batch.images.clone()
    make_step(network, make_network(seed=1), make_config(l1=1e-3))(batch)[0].backward()
    assert torch.equal(batch.images, images)
    changed = [name for name, value in state(network).items() if not torch.equal(value, before[name])]
    assert changed
    assert all("running" in name for name in changed)


# -- precision


@pytest.fixture(scope="module")
def trained() -> tuple[Network, Batch]:
    """A student of a few epochs on digits, in float32, and a batch of its images."""
    dataset = load_dataset(DataConfig(name="digits", train_images=200, validation_images=10))
    config = make_config(
        loss={"kind": "cc_ibp", "alpha": 0.3},
        epochs=6,
        batch_size=50,
        network={"name": "cnn3", "width": 4},
        precision={"attack": "float32"},
        learning_rate={"kind": "multi_step", "initial": 0.01},
    )
    network = train_student(dataset, THREAT, config, None).network.requires_grad_(True)
    images, labels = dataset.train.images[:100].float() / 255, dataset.train.labels[:100]
    return network, Batch(FULL_EPSILON, images, labels, torch.Generator())


def step_on(trained: tuple[Network, Batch], precision: StepPrecision, **changes: Any) -> tuple[float, Network]:
    network, batch = copy.deepcopy(trained[0]), trained[1]
    batch.attack_generator.manual_seed(0)
    loss, _ = make_step(network, copy.deepcopy(trained[0]), make_config(**changes), precision=precision)(batch)
    loss.backward()
    return float(loss.detach()), network


@pytest.mark.parametrize("style", ["clean", "adversarial"])
@pytest.mark.parametrize("kappa", [1.0, 2.1])
def test_an_attack_in_bfloat16_finds_points_as_bad(
    trained: tuple[Network, Batch], style: str, kappa: float, attacked: list[Tensor]
) -> None:
    settings = {"batch_norm": style, "attack": {"steps": 4, "step_size": 0.5, "kappa": kappa}}
    exact, _ = step_on(trained, StepPrecision(), **settings)
    lower, network = step_on(trained, StepPrecision(attack="bfloat16"), **settings)
    assert attacked[1].dtype == torch.float32
    assert contains(epsilon_box(trained[1].images, kappa * 0.1), attacked[1]).all()
    assert not torch.equal(attacked[0], attacked[1])  # it did compute otherwise
    assert lower == pytest.approx(exact, rel=BFLOAT16_LOSS)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())


@pytest.mark.parametrize(
    "loss",
    [
        {"kind": "cc_dist", "alpha": 0.3, "beta": 5.0},
        {"kind": "ibp"},
        {"kind": "sabr", "subbox": 0.3, "relu_shrink": 0.8},
        {"kind": "ad_cert", "alpha": 0.3, "student_input": "rslad"},
    ],
)
@pytest.mark.parametrize("style", ["clean", "adversarial"])
def test_training_in_bfloat16_is_close(trained: tuple[Network, Batch], loss: dict[str, Any], style: str) -> None:
    settings = {"batch_norm": style, "loss": loss}
    exact, expected = step_on(trained, StepPrecision(), **settings)
    lower, network = step_on(trained, StepPrecision(teacher="bfloat16", training="bfloat16"), **settings)
    assert lower != exact
    assert lower == pytest.approx(exact, rel=BFLOAT16_LOSS)
    one, other = (torch.cat([p.grad.flatten() for p in n.parameters()]) for n in (network, expected))
    assert one.dtype == torch.float32
    assert torch.isfinite(one).all()
    # the same direction: 8 bits are worth an angle of a few degrees
    assert float(F.cosine_similarity(one, other, dim=0)) > 0.98


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_frozen_network_is_the_network(precision: str) -> None:
    network, images = make_network("cnn7"), make_batch(0).images
    frozen = FoldedNetwork.of(network, precision)
    expected = network(images)
    largest = float(expected.detach().abs().max())
    error = float((frozen.logits(images) - expected).detach().abs().max())
    assert error <= (ROUNDING if precision == "float32" else BFLOAT16_LOSS) * largest


def test_a_frozen_network_has_no_gradient_to_give() -> None:
    frozen = FoldedNetwork.of(make_network("cnn7"), "float32")
    tensors = [frozen.head_weight, frozen.head_bias]
    tensors += [x for step in frozen.steps for x in vars(step).values() if isinstance(x, Tensor)]
    assert not any(x is not None and x.requires_grad for x in tensors)


# -- the teacher


def teacher_config(**changes: Any) -> TeacherConfig:
    return TeacherConfig.model_validate({"epochs": 1, "attack": {"steps": 2, "step_size": 0.5}} | changes)


def test_a_teacher_learns_at_attacked_points(attacked: list[Tensor]) -> None:
    network, batch = make_network("resnet"), make_batch(0)
    config = teacher_config(l1=1e-3, epsilon_factor=2.0)
    loss, metrics = TeacherStep(network, config, THREAT, StepPrecision())(batch)
    (points,) = attacked
    assert contains(epsilon_box(batch.images, 0.2), points).all()
    assert not contains(epsilon_box(batch.images, 0.1), points).any()
    plain = make_network("resnet")
    logits = forward_collecting(plain, points, {})
    weights = [m.weight for m in plain.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    expected = F.cross_entropy(logits, batch.labels) + 1e-3 * sum(w.abs().sum() for w in weights)
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=ROUNDING)
    assert float(metrics["loss"]) == pytest.approx(oracles.cross_entropy(logits, batch.labels), rel=ROUNDING)
    assert_same_gradients(network, plain)
    torch.testing.assert_close(running(network), running(plain), rtol=ROUNDING, atol=ROUNDING)


def test_a_teacher_by_n_fgsm_and_one_without_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def recording(logits_of: Any, images: Tensor, labels: Tensor, **options: Any) -> Tensor:
        asked.update(options)
        return images.flip(0)

    monkeypatch.setattr(training_step, "noisy_fgsm", recording)
    batch = make_batch(0)
    for attack, points in (
        ({"kind": "n_fgsm", "noise": 1.5, "step_size": 0.7}, batch.images.flip(0)),
        ({"kind": "none"}, batch.images),
    ):
        config = teacher_config(attack=attack, epsilon_factor=2.0)
        loss, _ = TeacherStep(make_network(), config, THREAT, StepPrecision())(batch)
        expected = oracles.cross_entropy(forward_collecting(make_network(), points, {}), batch.labels)
        assert float(loss.detach()) == pytest.approx(expected, rel=ROUNDING)
    assert asked == {"epsilon": 0.2, "noise": 1.5, "step_size": 0.7, "generator": batch.attack_generator}


def test_n_fgsm_is_refused_under_l2() -> None:
    with pytest.raises(ValueError, match="n_fgsm has no form for norm l2"):
        TeacherStep(
            make_network(),
            teacher_config(attack={"kind": "n_fgsm"}),
            ThreatModel(norm="l2", epsilon="3/2"),
            StepPrecision(),
        )
