"""One step of teacher and student: its loss and gradients against plain code, and what it leaves out.

The reference is `ccdist.reference` where that has the configuration, else a plain step below; both use the unfolded
network. Attacked points are recorded as the step finds them wherever another computation starts from them.
"""

import copy
from collections import Counter
from typing import Any

import oracles
import pytest
import strategies
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccdist import training_step
from ccdist.attacks import pgd
from ccdist.batch_norm import Statistics, batch_norm_layers, forward, forward_collecting
from ccdist.bounds import Trace, elided_lower_bounds, logit_differences, propagate
from ccdist.config import DataConfig, StudentConfig, TeacherConfig, ThreatModel
from ccdist.data import load_dataset
from ccdist.interval import Interval, epsilon_box
from ccdist.losses import cc_dist_loss, cc_ibp_loss, cross_entropy_of_differences
from ccdist.networks import Network, Normalize, build_network
from ccdist.reference import reference_loss
from ccdist.regularizers import shi_regularizer
from ccdist.threats import L2Ball, contains, perturbation_set
from ccdist.training import train_student
from ccdist.training_step import Batch, EpsilonSchedule, FoldedNetwork, StepPrecision, StudentStep, TeacherStep

# The first optimiser of a process imports torch's compiler, which takes seconds.
pytestmark = pytest.mark.timeout(20)

# float64: folding batch norm rounds in another order, and a network multiplies the difference layer by layer.
ROUNDING = 1e-10
# Share by which a loss may move when attack or training compute in bfloat16, 8 bits, on a trained network.
BFLOAT16_LOSS = 0.05

THREAT = ThreatModel(epsilon="1/10")
# 80 steps: epsilon is 0 at step 0, a ten-thousandth of the whole at 2, 38 % at 20, the whole from 40 on. Step 1 is
# below the step's smallest box, which the reference does not have.
NUM_STEPS = 80
SCHEDULE = {"warm_up": 0, "ramp": "1/2"}
TINY_EPSILON, MID_EPSILON, FULL_EPSILON = 2, 20, 40
SHAPE = (2, 8, 8)
WIDTHS = {"cnn3": 2, "cnn7": 4, "resnet": 2, "mlp": 6}


def make_config(**changes: Any) -> StudentConfig:
    values = {
        "epochs": 1,
        "loss": {"kind": "cc_dist", "alpha": 0.3, "beta": 5.0},
        "attack": {"steps": 2, "step_size": 0.5},
        "epsilon_schedule": SCHEDULE,
    }
    return StudentConfig.model_validate(values | changes)


def make_network(name: str = "cnn3", seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Network:
    """Weights of order one, batch norms with scales of either sign; float64."""
    statistics = {"mean": [0.4] * shape[0], "std": [0.3] * shape[0]}
    network = build_network(name, width=WIDTHS[name], input_shape=shape, num_classes=4, **statistics)
    return strategies.randomize(network, torch.Generator().manual_seed(seed))


def make_batch(index: int, count: int = 6, shape: tuple[int, int, int] = SHAPE) -> Batch:
    generator = torch.Generator().manual_seed(11)
    images = torch.rand((count, *shape), generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (count,), generator=generator)
    return Batch(index, images, labels, torch.Generator().manual_seed(12))


def make_step(
    network: Network,
    teacher: Network | None,
    config: StudentConfig,
    threat: ThreatModel = THREAT,
    precision: StepPrecision | None = None,
) -> StudentStep:
    schedule = EpsilonSchedule(config.epsilon_schedule, threat, NUM_STEPS)
    return StudentStep(network, teacher, config, threat, schedule, precision or StepPrecision())


def run(
    config: StudentConfig, index: int = MID_EPSILON, *, name: str = "cnn3", teacher: bool = True, **options: Any
) -> tuple[Tensor, Network]:
    """The step's loss, and the network that it has left its gradients in."""
    network = make_network(name)
    loss, _ = make_step(network, make_network(name, 1) if teacher else None, config, **options)(make_batch(index))
    loss.backward()
    return loss.detach(), network


def assert_same_gradients(actual: Network, expected: Network, rounding: float = ROUNDING) -> None:
    """Relative to the largest entry of the network."""
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in expected.named_parameters()}
    largest = max(float(grad.abs().max()) for grad in grads.values())
    assert largest > 0
    for name, parameter in actual.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        error = float((found - grads[name]).abs().max())
        assert error <= rounding * largest, f"{name}: {error:.3g} of {largest:.3g}"


def running(network: Network) -> list[Tensor]:
    return [x.clone() for layer in batch_norm_layers(network) for x in (layer.running_mean, layer.running_var)]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture
def attacked(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every batch of attacked points that a step finds."""
    found: list[Tensor] = []

    def recording(*args: Any, **kwargs: Any) -> Tensor:
        found.append(pgd(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(training_step, "pgd", recording)
    return found


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


def compare_with_reference(config: StudentConfig, index: int, name: str) -> None:
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
    compare_with_reference(make_config(**REFERENCE_SETTINGS[setting]), index, "cnn3")


@pytest.mark.parametrize("name", ["cnn7", "resnet", "mlp"])
def test_it_is_the_reference_for_other_networks(name: str) -> None:
    settings = {"l1": 1e-3, "attack": {"steps": 3, "step_size": 0.25, "kappa": 2.1}}
    compare_with_reference(make_config(**settings), MID_EPSILON, name)


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


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a step attacks, bounds, reads statistics or folds a network."""
    count: Counter[str] = Counter()

    def counted(name: str, owner: Any) -> None:
        original = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    counted("shi_regularizer_of_centers", training_step)
    for name in ("pgd", "folded_interval", "propagate", "elided_lower_bounds", "folded_forward"):
        counted(name, training_step)
    counted("collecting", training_step.Fold)
    return count


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
