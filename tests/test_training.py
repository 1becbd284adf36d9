"""Teacher and student training: recorded steps, resumption to the bit, what must not change, what is refused.

`python tests/test_training.py` writes tests/golden/train_steps.json anew; a change to it needs a reason.
"""

import copy
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ccdist import checkpoint, precision, training, training_loop, training_step
from ccdist.batch_norm import batch_norm_layers
from ccdist.checkpoint import CorruptCheckpointError
from ccdist.config import DataConfig, StudentConfig, TeacherConfig, ThreatModel
from ccdist.data import Dataset, load_dataset
from ccdist.networks import Network, build_network
from ccdist.training import EpochReport, NonFiniteLossError, TrainingResult, train_student, train_teacher

# The first optimiser of a process imports torch's compiler, which takes seconds.
pytestmark = pytest.mark.timeout(20)

GOLDEN = Path(__file__).parent / "golden" / "train_steps.json"
# float64 on another processor: sums in another order, five steps of which each multiplies an error by a few.
GOLDEN_ROUNDING = 1e-9

THREAT = ThreatModel(epsilon="1/10")
DATA = DataConfig(name="digits", train_images=40, validation_images=10, flip=True, crop_padding=1)
TINY = {
    "network": {"name": "cnn3", "width": 2},
    "epochs": 3,
    "batch_size": 16,
    "attack": {"steps": 2, "step_size": 0.5},
}
CC_DIST = {"kind": "cc_dist", "alpha": 0.5, "beta": 5.0}
SCHEDULE = {"warm_up": "1/6", "ramp": "1/2"}


def teacher_config(**changes: Any) -> TeacherConfig:
    return TeacherConfig.model_validate(TINY | changes)


def student_config(**changes: Any) -> StudentConfig:
    return StudentConfig.model_validate(TINY | {"loss": CC_DIST, "epsilon_schedule": SCHEDULE} | changes)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset(DATA)


@pytest.fixture(scope="module")
def teacher(dataset: Dataset) -> Network:
    return train_teacher(dataset, THREAT, teacher_config(epochs=2)).network


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def in_float64(patch: pytest.MonkeyPatch) -> None:
    build = training._build
    patch.setattr(training, "_build", lambda *args: build(*args).double())
    patch.setattr(training_loop, "to_pixels", lambda images: images.double() / 255)


def five_steps() -> dict[str, Any]:
    """One batch an epoch, so that the history holds each step."""
    dataset = load_dataset(DATA)
    step = {"epochs": 5, "batch_size": 40, "precision": {"attack": "float32", "teacher": "float32"}}
    teacher = train_teacher(dataset, THREAT, teacher_config(**step))
    student = train_student(dataset, THREAT, student_config(l1=1e-4, **step), teacher.network)
    return {
        phase: {
            "steps": result.history,
            "squares_of_weights": float(sum(p.square().sum() for p in result.network.parameters())),
        }
        for phase, result in (("teacher", teacher), ("student", student))
    }


def test_five_steps_are_the_recorded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    in_float64(monkeypatch)
    recorded, computed = json.loads(GOLDEN.read_text()), five_steps()
    assert computed.keys() == recorded.keys()
    for phase, expected in recorded.items():
        actual = computed[phase]
        assert actual["squares_of_weights"] == pytest.approx(expected["squares_of_weights"], rel=GOLDEN_ROUNDING)
        assert len(actual["steps"]) == len(expected["steps"]) == 5
        for number, (step, other) in enumerate(zip(actual["steps"], expected["steps"], strict=True)):
            assert step == pytest.approx(other, rel=GOLDEN_ROUNDING), f"{phase}, step {number}"


def test_the_student_leaves_the_teacher_as_it_was(dataset: Dataset, teacher: Network) -> None:
    before = state(teacher)
    train_student(dataset, THREAT, student_config(initialization="teacher"), teacher)
    after = state(teacher)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_student_may_start_as_the_teacher(dataset: Dataset, teacher: Network) -> None:
    frozen = {"learning_rate": {"kind": "multi_step", "initial": 1e-30}, "epochs": 1, "initialization": "teacher"}
    student = train_student(dataset, THREAT, student_config(**frozen), teacher).network
    for actual, expected in zip(student.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(actual, expected)
    assert student is not teacher


def test_training_reports_each_epoch_and_learns(dataset: Dataset, teacher: Network) -> None:
    reports: list[EpochReport] = []
    result = train_student(dataset, THREAT, student_config(epochs=4), teacher, on_epoch=reports.append)
    assert [(r.phase, r.epoch, r.epochs) for r in reports] == [("student", n, 4) for n in (1, 2, 3, 4)]
    assert [r.metrics for r in reports] == result.history
    names = {"loss", "adversarial_accuracy", "ibp_certified_accuracy", "learning_rate", "epsilon"}
    assert all(metrics.keys() == names for metrics in result.history)
    assert all(r.seconds > 0 and r.network is result.network for r in reports)
    assert result.seconds == pytest.approx(sum(r.seconds for r in reports))
    # epochs of 3 batches: the ramp is 6 of 12 steps from step 2; the last step of epoch 4 is beyond it
    assert result.history[-1]["epsilon"] == THREAT.radius
    assert result.history[0]["epsilon"] == 0.0
    assert not any(p.requires_grad for p in result.network.parameters())
    assert not any(module.training for module in result.network.modules())


def test_a_teacher_learns_the_digits() -> None:
    dataset = load_dataset(DataConfig(name="digits", train_images=300, validation_images=100))
    config = teacher_config(
        network={"name": "mlp", "width": 32}, epochs=12, learning_rate={"kind": "multi_step", "initial": 0.01}
    )
    network = train_teacher(dataset, ThreatModel(epsilon="1/50"), config).network
    images = dataset.validation.images.float() / 255
    accuracy = (network(images).argmax(1) == dataset.validation.labels).float().mean()
    assert float(accuracy) > 0.8  # chance is 0.1


def test_the_global_generator_is_not_used(dataset: Dataset, teacher: Network) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = train_student(dataset, THREAT, student_config(epochs=1), teacher)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert_same(one.network, train_student(dataset, THREAT, student_config(epochs=1), teacher).network)
    other = train_student(dataset, THREAT, student_config(epochs=1, seed=1), teacher)
    assert not torch.equal(one.network.head.weight, other.network.head.weight)


CYCLIC = {"kind": "cyclic", "peak": 0.05, "floor": 0.001}
COSINE = {"kind": "cosine", "initial": 0.01, "final": 0.001}
# Of 9 steps in 3 epochs: collected at 4, 6 and 8, so a run interrupted after epoch 2 is in the middle.
AVERAGING = {"start": "1/3", "every": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "adversarial statistics, adam": {},
    "clean statistics, adam": {"batch_norm": "clean", "population_statistics": True},
    "sgd": {"optimizer": {"kind": "sgd"}, "learning_rate": {"kind": "multi_step", "initial": 0.01, "drops": ["1/2"]}},
    "sgd without momentum": {"optimizer": {"kind": "sgd", "momentum": 0.0}},
    "cyclic sgd": {"optimizer": {"kind": "sgd"}, "learning_rate": CYCLIC, "batch_norm": "clean"},
    "several starts, larger box": {"attack": {"steps": 1, "step_size": 2.0, "kappa": 2.1, "restarts": 2}},
    "last iterate": {"attack": {"steps": 1, "step_size": 10.0, "keep": "last"}, "l1": 1e-4},
    "adamw, cosine": {"optimizer": {"kind": "adamw", "weight_decay": 0.1}, "learning_rate": COSINE},
    "radam": {"optimizer": {"kind": "radam", "weight_decay": 1e-3}, "learning_rate": COSINE},
    "weight averaging": {"weight_averaging": AVERAGING},
    "weight averaging, population statistics": {
        "weight_averaging": AVERAGING,
        "population_statistics": True,
        "batch_norm": "clean",
        "optimizer": {"kind": "radam"},
    },
    "bfloat16": {"precision": {"attack": "bfloat16", "teacher": "bfloat16", "training": "bfloat16"}},
    "rslad": {"loss": {"kind": "ad_cert", "alpha": 0.5, "student_input": "rslad", "soft_attack": True}},
    "sabr": {"loss": {"kind": "sabr", "subbox": 0.4, "relu_shrink": 0.8}},
    "natural term": {"natural_weight": 0.3},
}


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def stop_after(epoch: int) -> Any:
    def stop(report: EpochReport) -> None:
        if report.epoch == epoch:
            raise Interrupted

    return stop


@pytest.mark.parametrize("name", VARIANTS)
def test_an_interrupted_student_continues_to_the_bit(
    dataset: Dataset, teacher: Network, tmp_path: Path, name: str
) -> None:
    config, path = student_config(**VARIANTS[name]), tmp_path / "state.safetensors"
    whole = train_student(dataset, THREAT, config, teacher)
    for epoch in (1, 2):
        with pytest.raises(Interrupted):
            train_student(dataset, THREAT, config, teacher, state_path=path, on_epoch=stop_after(epoch))
    seen: list[int] = []
    resumed = train_student(
        dataset, THREAT, config, teacher, state_path=path, on_epoch=lambda report: seen.append(report.epoch)
    )
    assert seen == [3]
    assert_same(whole.network, resumed.network)
    assert resumed.history == whole.history
    again = train_student(dataset, THREAT, config, teacher, state_path=path)  # nothing left to do
    assert_same(whole.network, again.network)
    assert again.history == whole.history


TEACHERS: dict[str, dict[str, Any]] = {
    "pgd, cyclic sgd": {"optimizer": {"kind": "sgd"}, "learning_rate": CYCLIC},
    "n_fgsm": {"attack": {"kind": "n_fgsm"}, "optimizer": {"kind": "adamw"}},
    "no attack": {"attack": {"kind": "none"}, "learning_rate": COSINE},
    "weight averaging": {"weight_averaging": AVERAGING},
}


@pytest.mark.parametrize("name", TEACHERS)
def test_an_interrupted_teacher_continues_to_the_bit(dataset: Dataset, tmp_path: Path, name: str) -> None:
    config, path = teacher_config(**TEACHERS[name]), tmp_path / "state.safetensors"
    whole = train_teacher(dataset, THREAT, config)
    with pytest.raises(Interrupted):
        train_teacher(dataset, THREAT, config, state_path=path, on_epoch=stop_after(2))
    resumed = train_teacher(dataset, THREAT, config, state_path=path)
    assert_same(whole.network, resumed.network)
    assert resumed.history == whole.history


def kill_recipe() -> tuple[Dataset, StudentConfig, Network]:
    dataset = load_dataset(DataConfig(name="digits", train_images=200, validation_images=10))
    config = student_config(
        epochs=6, network={"name": "cnn3", "width": 4}, weight_averaging={"start": "1/6", "every": 3}
    )
    teacher = build_network("cnn3", width=4, input_shape=(1, 8, 8), num_classes=10, seed=9)
    return dataset, config, teacher


VICTIM = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[2]))
from test_training import THREAT, kill_recipe
from ccdist.training import train_student
dataset, config, teacher = kill_recipe()
train_student(dataset, THREAT, config, teacher, state_path=Path(sys.argv[1]),
              on_epoch=lambda report: print(report.epoch, flush=True))
"""


@pytest.mark.timeout(60)
def test_a_killed_process_is_continued_to_the_bit(tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch; a real process, so that nothing in memory can help."""
    path = tmp_path / "state.safetensors"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.getcwd()])}
    command = [sys.executable, "-c", VICTIM, str(path), str(torch.get_num_threads())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == "1\n"
        assert victim.stdout.readline() == "2\n"
        victim.send_signal(signal.SIGKILL)
    assert victim.returncode == -signal.SIGKILL
    dataset, config, teacher = kill_recipe()
    continued: list[int] = []
    resumed = train_student(
        dataset, THREAT, config, teacher, state_path=path, on_epoch=lambda report: continued.append(report.epoch)
    )
    assert 3 <= continued[0] <= 6
    assert continued[-1] == 6
    whole = train_student(dataset, THREAT, config, teacher)
    assert_same(whole.network, resumed.network)
    assert whole.history == resumed.history


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"epochs": 4},
        {"l1": 1e-6},
        {"loss": CC_DIST | {"beta": 4.0}},
        {"loss": {"kind": "cc_ibp", "alpha": 0.5}},
        {"optimizer": {"kind": "adamw", "weight_decay": 0.0}},
        {"weight_averaging": AVERAGING},
        {"precision": {"attack": "float32"}},
        {"natural_weight": 0.1},
    ],
)
def test_the_state_of_another_training_is_refused(
    dataset: Dataset, teacher: Network, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = tmp_path / "state.safetensors"
    train_student(dataset, THREAT, student_config(epochs=1), teacher, state_path=path)
    before = path.read_bytes()
    config = student_config(**({"epochs": 1} | change))
    with pytest.raises(ValueError, match="belongs to another training"):
        train_student(dataset, THREAT, config, teacher, state_path=path)
    assert path.read_bytes() == before


def test_other_data_another_threat_and_another_phase_are_other_trainings(
    dataset: Dataset, teacher: Network, tmp_path: Path
) -> None:
    path, config = tmp_path / "state.safetensors", student_config(epochs=1)
    train_student(dataset, THREAT, config, teacher, state_path=path)
    fewer = load_dataset(DATA.model_copy(update={"train_images": 39}))
    for arguments in ((fewer, THREAT, config), (dataset, ThreatModel(epsilon="1/9"), config)):
        with pytest.raises(ValueError, match="belongs to another training"):
            train_student(*arguments, teacher, state_path=path)
    with pytest.raises(ValueError, match="belongs to another training"):
        train_teacher(dataset, THREAT, teacher_config(epochs=1), state_path=path)


def test_another_teacher_is_another_training(dataset: Dataset, teacher: Network, tmp_path: Path) -> None:
    path, config = tmp_path / "state.safetensors", student_config(epochs=1)
    train_student(dataset, THREAT, config, teacher, state_path=path)
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        next(iter(other.parameters())).add_(1e-3)
    with pytest.raises(ValueError, match="belongs to another training"):
        train_student(dataset, THREAT, config, other, state_path=path)


def test_a_damaged_state_is_refused(dataset: Dataset, teacher: Network, tmp_path: Path) -> None:
    path, config = tmp_path / "state.safetensors", student_config(epochs=1)
    train_student(dataset, THREAT, config, teacher, state_path=path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptCheckpointError, match="delete it to start"):
        train_student(dataset, THREAT, config, teacher, state_path=path)


@pytest.mark.parametrize("batch_norm", ["adversarial", "clean"])
def test_without_beta_it_is_cc_ibp(dataset: Dataset, teacher: Network, batch_norm: str) -> None:
    loss = {"kind": "cc_dist", "alpha": 0.4, "beta": 0.0}
    distilled = train_student(dataset, THREAT, student_config(loss=loss, batch_norm=batch_norm), teacher)
    plain = student_config(loss={"kind": "cc_ibp", "alpha": 0.4}, batch_norm=batch_norm)
    alone = train_student(dataset, THREAT, plain, None)
    assert_same(distilled.network, alone.network)
    assert distilled.history == alone.history


LOSSES: list[dict[str, Any]] = [
    {"kind": "ibp"},
    {"kind": "cc_ibp", "alpha": 0.5},
    {"kind": "mtl_ibp", "alpha": 0.5},
    {"kind": "exp_ibp", "alpha": 0.5},
    {"kind": "sabr", "subbox": 0.4},
    {"kind": "ad_cert", "alpha": 1.0},
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: str(loss["kind"]))
def test_every_loss_trains_without_a_teacher(dataset: Dataset, loss: dict[str, Any]) -> None:
    result = train_student(dataset, THREAT, student_config(loss=loss), None)
    assert len(result.history) == 3


@pytest.mark.parametrize("attack", [{"kind": "n_fgsm", "noise": 1.0}, {"kind": "none"}])
def test_a_teacher_of_another_kind_teaches(dataset: Dataset, teacher: Network, attack: dict[str, Any]) -> None:
    other = train_teacher(dataset, THREAT, teacher_config(epochs=2, attack=attack)).network
    assert not torch.equal(other.head.weight, teacher.head.weight)
    result = train_student(dataset, THREAT, student_config(epochs=2), other)
    assert len(result.history) == 2


# -- optimisers, averages, precision


def recorded_steps(patch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The weights after every step, as the loop meets them."""
    seen: list[list[Tensor]] = []
    original = training_loop.Run._collect_average

    def recording(self: training_loop.Run, step: int, num_steps: int) -> None:
        assert step == len(seen)
        seen.append([parameter.detach().clone() for parameter in self.network.parameters()])
        original(self, step, num_steps)

    patch.setattr(training_loop.Run, "_collect_average", recording)
    return seen


def test_the_average_is_the_mean_of_the_weights_it_met(teacher: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_dataset(DATA.model_copy(update={"flip": False, "crop_padding": 0}))
    seen = recorded_steps(monkeypatch)
    network = train_student(dataset, THREAT, student_config(weight_averaging=AVERAGING), teacher).network
    assert len(seen) == 9
    for index, parameter in enumerate(network.parameters()):
        expected = torch.stack([seen[step][index].double() for step in (3, 5, 7)]).mean(0)
        # float32, a mean of three
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=1e-7)
        assert not torch.equal(parameter.detach(), seen[-1][index])
    # its statistics: of the training set in the averaged network, batch by batch in order
    first = next(iter(batch_norm_layers(network)))
    images = dataset.train.images.float() / 255
    batches = [network.features[:2](images[start : start + 16]) for start in (0, 16, 32)]
    mean = sum(batch.mean((0, 2, 3)) for batch in batches) / 3
    variance = sum(batch.transpose(0, 1).flatten(1).var(1) for batch in batches) / 3
    torch.testing.assert_close(first.running_mean, mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first.running_var, variance, rtol=1e-4, atol=1e-6)


def test_averaging_does_not_change_the_training_before_its_end(
    dataset: Dataset, teacher: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = recorded_steps(monkeypatch)
    train_student(dataset, THREAT, student_config(), teacher)
    plain = seen.copy()
    seen.clear()
    train_student(dataset, THREAT, student_config(weight_averaging=AVERAGING), teacher)
    assert len(plain) == len(seen) == 9
    assert all(
        torch.equal(a, b) for one, other in zip(plain, seen, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    ("optimizer", "plain"),
    [
        ({"kind": "adam", "weight_decay": 0.1}, lambda p, lr: torch.optim.Adam(p, lr, weight_decay=0.1)),
        ({"kind": "adamw", "weight_decay": 0.1}, lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.1)),
        ({"kind": "radam", "weight_decay": 0.1}, lambda p, lr: torch.optim.RAdam(p, lr, weight_decay=0.1)),
        (
            {"kind": "sgd", "momentum": 0.8, "weight_decay": 0.1},
            lambda p, lr: torch.optim.SGD(p, lr, momentum=0.8, weight_decay=0.1),
        ),
    ],
)
def test_each_optimizer_makes_the_steps_of_pytorch_s(
    dataset: Dataset, optimizer: dict[str, Any], plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients and learning rates of a run are given to the optimiser of that name with its documented options."""
    gradients: list[list[Tensor]] = []
    clip = nn.utils.clip_grad_norm_

    def recording(parameters: Any, largest: float) -> Tensor:
        parameters = list(parameters)
        norm = clip(parameters, largest)
        gradients.append([p.grad.clone() for p in parameters])
        return norm

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", recording)
    seen = recorded_steps(monkeypatch)
    config = student_config(
        loss={"kind": "cc_ibp", "alpha": 0.5}, optimizer=optimizer, learning_rate=COSINE, gradient_clip=0.5
    )
    train_student(dataset, THREAT, config, None)
    start = training._build(dataset, config, "ibp")
    twin = plain(list(start.parameters()), 0.01)
    for step, (grads, expected) in enumerate(zip(gradients, seen, strict=True)):
        assert float(torch.stack([g.square().sum() for g in grads]).sum().sqrt()) <= 0.5 * (1 + 1e-5)
        # from 0.01 to 0.001 over 9 steps
        twin.param_groups[0]["lr"] = 0.001 + 0.009 * (1 + math.cos(math.pi * step / 9)) / 2
        for parameter, grad in zip(start.parameters(), grads, strict=True):
            parameter.grad = grad
        twin.step()
        for parameter, after in zip(start.parameters(), expected, strict=True):
            # float32; the fused optimisers round in another order
            torch.testing.assert_close(parameter.detach(), after, rtol=1e-5, atol=1e-6)


def on_processor(patch: pytest.MonkeyPatch, fast: bool) -> None:
    patch.setattr(precision, "multiplies_bfloat16_fast", lambda device: fast)


@pytest.mark.parametrize("fast", [True, False])
def test_a_training_keeps_the_precision_it_began_with(
    dataset: Dataset, teacher: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    """`auto` resumed on a machine of the other kind: to the bit what the first machine would have computed."""
    config, path = student_config(precision={"attack": "auto", "teacher": "auto"}), tmp_path / "state.safetensors"
    on_processor(monkeypatch, not fast)
    elsewhere = train_student(dataset, THREAT, config, teacher)
    on_processor(monkeypatch, fast)
    whole = train_student(dataset, THREAT, config, teacher)
    assert not torch.equal(whole.network.head.weight, elsewhere.network.head.weight)
    with pytest.raises(Interrupted):
        train_student(dataset, THREAT, config, teacher, state_path=path, on_epoch=stop_after(1))
    on_processor(monkeypatch, not fast)
    with pytest.raises(Interrupted):  # and stored again by the other machine
        train_student(dataset, THREAT, config, teacher, state_path=path, on_epoch=stop_after(2))
    resumed = train_student(dataset, THREAT, config, teacher, state_path=path)
    assert_same(whole.network, resumed.network)
    assert resumed.history == whole.history


@pytest.mark.parametrize(("tf32", "expected"), [(True, "tf32"), (False, "ieee")])
def test_tf32_is_on_in_training_only_and_by_choice(
    dataset: Dataset, tf32: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch: Any = torch.backends.cuda.matmul
    before, inside = switch.fp32_precision, []
    original = training_step.cc_ibp_loss

    def watching(*args: Any, **kwargs: Any) -> Tensor:
        inside.append(switch.fp32_precision)
        return original(*args, **kwargs)

    monkeypatch.setattr(training_step, "cc_ibp_loss", watching)
    outside: list[str] = []
    config = student_config(loss={"kind": "cc_ibp", "alpha": 0.5}, epochs=1, precision={"tf32": tf32})
    train_student(dataset, THREAT, config, None, on_epoch=lambda report: outside.append(switch.fp32_precision))
    assert set(inside) == {expected}
    assert outside == [before]
    assert switch.fp32_precision == before


def test_an_l2_student_and_teacher_train(dataset: Dataset, teacher: Network) -> None:
    threat = ThreatModel(norm="l2", epsilon="1/2")
    assert len(train_teacher(dataset, threat, teacher_config()).history) == 3
    assert len(train_student(dataset, threat, student_config(), teacher).history) == 3
    with pytest.raises(ValueError, match="sabr has no form for norm l2"):
        train_student(dataset, threat, student_config(loss={"kind": "sabr", "subbox": 0.4}), None)


def test_alpha_dist_0_is_a_training_of_its_own(dataset: Dataset, teacher: Network) -> None:
    weights = [
        train_student(dataset, THREAT, student_config(loss=CC_DIST | extra), teacher).network.head.weight
        for extra in ({}, {"alpha_dist": 0.5}, {"alpha_dist": 0.0})
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_styles_of_batch_norm_differ(dataset: Dataset, teacher: Network) -> None:
    one, other = (
        train_student(dataset, THREAT, student_config(batch_norm=style), teacher) for style in ("adversarial", "clean")
    )
    assert not torch.equal(one.network.head.weight, other.network.head.weight)


def test_population_statistics_describe_the_training_set(teacher: Network) -> None:
    dataset = load_dataset(DATA.model_copy(update={"flip": False, "crop_padding": 0}))
    config = student_config(population_statistics=True, batch_norm="clean", epochs=1)
    network = train_student(dataset, THREAT, config, teacher).network
    first = next(iter(batch_norm_layers(network)))
    images = dataset.train.images.float() / 255
    batches = [network.features[:2](images[start : start + 16]) for start in (0, 16, 32)]
    mean = sum(batch.mean((0, 2, 3)) for batch in batches) / 3
    variance = sum(batch.transpose(0, 1).flatten(1).var(1) for batch in batches) / 3
    # float32 sums of some hundred values
    torch.testing.assert_close(first.running_mean, mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first.running_var, variance, rtol=1e-4, atol=1e-6)


def nan_at_call(number: int, patch: pytest.MonkeyPatch) -> None:
    original = training_step.cc_ibp_loss
    calls: Iterator[int] = iter(range(10**6))

    def sabotaged(*args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = original(*args, **kwargs)
        return loss * torch.nan if next(calls) == number else loss

    patch.setattr(training_step, "cc_ibp_loss", sabotaged)


def test_a_loss_that_is_not_finite_stops_the_training(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = student_config(loss={"kind": "cc_ibp", "alpha": 0.25}), tmp_path / "state.safetensors"
    nan_at_call(4, monkeypatch)  # 3 batches an epoch: the second batch of epoch 2
    reports: list[int] = []
    with pytest.raises(NonFiniteLossError, match=r"student's .* step 4 \(epoch 2\), epsilon 0\.0\d+.*'alpha': 0\.25"):
        train_student(
            dataset, THREAT, config, None, state_path=path, on_epoch=lambda report: reports.append(report.epoch)
        )
    assert reports == [1]
    monkeypatch.undo()
    # what was stored is the finite epoch before
    resumed = train_student(dataset, THREAT, config, None, state_path=path)
    assert_same(resumed.network, train_student(dataset, THREAT, config, None).network)


def test_a_gradient_that_is_not_finite_stops_the_training(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The square root of 0 is 0, its gradient is infinite."""
    original = training_step.cc_ibp_loss
    monkeypatch.setattr(
        training_step,
        "cc_ibp_loss",
        lambda adv, lower, *, alpha: original(adv, lower, alpha=alpha) + (adv - adv.detach()).abs().sum().sqrt(),
    )
    with pytest.raises(NonFiniteLossError, match="step 0 "):
        train_student(dataset, THREAT, student_config(loss={"kind": "cc_ibp", "alpha": 0.25}), None)


def test_an_epsilon_beyond_the_pixel_range_is_the_whole_range(dataset: Dataset) -> None:
    schedule = {"warm_up": 0, "ramp": "1/3", "train_epsilon_factor": 4.0}
    config = student_config(loss={"kind": "cc_ibp", "alpha": 0.5}, epsilon_schedule=schedule, epochs=2)
    result = train_student(dataset, ThreatModel(epsilon="1/2"), config, None)
    assert result.history[-1]["epsilon"] == 1.0


def test_drops_count_from_the_end_of_the_ramp(dataset: Dataset) -> None:
    rate = {"kind": "multi_step", "initial": 1.0, "decay": 0.5, "drops": ["0", "1/2"]}
    schedule = {"warm_up": "1/8", "ramp": "3/8"}  # of 8 epochs: drops at 4 and at 6
    config = student_config(
        loss={"kind": "cc_ibp", "alpha": 0.0}, learning_rate=rate, epsilon_schedule=schedule, epochs=8
    )
    rates = [metrics["learning_rate"] for metrics in train_student(dataset, THREAT, config, None).history]
    assert rates == [1.0] * 4 + [0.5] * 2 + [0.25] * 2


def test_refusals(dataset: Dataset, teacher: Network) -> None:
    with pytest.raises(ValueError, match=r"loss cc_dist .* needs a teacher"):
        train_student(dataset, THREAT, student_config(), None)
    config = student_config(loss={"kind": "cc_ibp", "alpha": 0.5}, initialization="teacher")
    with pytest.raises(ValueError, match="initialization teacher needs a teacher"):
        train_student(dataset, THREAT, config, None)
    with pytest.raises(ValueError, match="the teacher has 16 features and the student 24"):
        train_student(dataset, THREAT, student_config(network={"name": "cnn3", "width": 3}), teacher)
    running = build_network("cnn3", width=2, input_shape=(1, 8, 8), num_classes=10).train()
    with pytest.raises(ValueError, match="teacher is in train mode"):
        train_student(dataset, THREAT, student_config(), running)


def test_states_may_be_rare_and_a_listener_still_loses_nothing(
    dataset: Dataset, teacher: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config, saved = tmp_path / "state.safetensors", student_config(epochs=4), []
    save = checkpoint.save_state
    monkeypatch.setattr(
        checkpoint, "save_state", lambda where, tensors, data: (saved.append(data["epoch"]), save(where, tensors, data))
    )
    rare = {"state_path": path, "state_interval": 1e9}
    with pytest.raises(Interrupted):
        train_student(dataset, THREAT, config, teacher, **rare, on_epoch=stop_after(2))
    assert saved == [1, 2]  # the first, and the one that the listener would have lost
    resumed = train_student(dataset, THREAT, config, teacher, **rare)
    assert saved == [1, 2, 3, 4]
    assert_same(resumed.network, train_student(dataset, THREAT, config, teacher).network)


def test_a_state_of_another_kind_of_device_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    path, config = tmp_path / "state.safetensors", teacher_config(epochs=1)
    train_teacher(dataset, THREAT, config, state_path=path)
    tensors, metadata = checkpoint.load_state(path)
    checkpoint.save_state(path, tensors, metadata | {"device": "cuda"})
    with pytest.raises(ValueError, match="was begun on cuda and cannot go on on cpu"):
        train_teacher(dataset, THREAT, config, state_path=path)


def test_seconds_of_interrupted_runs_count(dataset: Dataset, teacher: Network, tmp_path: Path) -> None:
    path, config = tmp_path / "state.safetensors", student_config()
    first: list[float] = []

    def stop(report: EpochReport) -> None:
        first.append(report.seconds)
        raise Interrupted

    with pytest.raises(Interrupted):
        train_student(dataset, THREAT, config, teacher, state_path=path, on_epoch=stop)
    later: list[float] = []
    result: TrainingResult = train_student(
        dataset, THREAT, config, teacher, state_path=path, on_epoch=lambda report: later.append(report.seconds)
    )
    assert result.seconds == pytest.approx(sum(first) + sum(later))


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as context:
        in_float64(context)
        GOLDEN.write_text(json.dumps(five_steps(), indent=1) + "\n")
