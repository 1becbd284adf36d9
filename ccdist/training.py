"""Training of teacher and student: what a caller needs; the step and the loop have modules of their own."""

from pathlib import Path
from typing import Literal

import torch

from ccdist.config import StudentConfig, TeacherConfig, ThreatModel, TrainConfig
from ccdist.data import Dataset, num_batches
from ccdist.networks import Network, build_network
from ccdist.precision import resolve
from ccdist.training_loop import EpochReport as EpochReport
from ccdist.training_loop import NonFiniteLossError as NonFiniteLossError
from ccdist.training_loop import OnEpoch as OnEpoch
from ccdist.training_loop import OtherTrainingError as OtherTrainingError
from ccdist.training_loop import Run
from ccdist.training_loop import TrainingResult as TrainingResult
from ccdist.training_step import EpsilonSchedule, StepPrecision, StudentStep, TeacherStep


def train_teacher(
    dataset: Dataset,
    threat: ThreatModel,
    config: TeacherConfig,
    *,
    device: torch.device | str = "cpu",
    state_path: Path | None = None,
    state_interval: float = 0.0,
    on_epoch: OnEpoch | None = None,
) -> TrainingResult:
    """An empirically robust network: cross-entropy at attacked points, epsilon constant.

    Args:
        state_path: where to keep the state, and to go on from; None: nowhere.
        state_interval: seconds between two states at least; 0: one after each epoch. A kill loses what came after the
            last one; an exception of `on_epoch` loses nothing.
        on_epoch: called after each epoch.

    Raises:
        NonFiniteLossError: the loss diverged.
        CorruptCheckpointError: the state file is damaged.
        ValueError: the state file belongs to another training.
    """
    place = torch.device(device)
    network = _build(dataset, config, config.initialization).to(place)
    run = Run(
        "teacher",
        network,
        dataset,
        config,
        threat,
        lambda precision: TeacherStep(network, config, threat, precision),
        _precision(config, place),
        ramp_end=0,
        state_interval=state_interval,
    )
    return run.fit(place, state_path, on_epoch)


def train_student(
    dataset: Dataset,
    threat: ThreatModel,
    config: StudentConfig,
    teacher: Network | None,
    *,
    device: torch.device | str = "cpu",
    state_path: Path | None = None,
    state_interval: float = 0.0,
    on_epoch: OnEpoch | None = None,
) -> TrainingResult:
    """A certifiably robust network: the configured loss at attacked points and interval bounds.

    Args:
        teacher: frozen; needed by losses that read it and by initialization "teacher", else it may be None.
        The rest, and the errors, as in `train_teacher`.

    Raises:
        ValueError: the teacher is missing, in train mode, or has another number of features than the student.
    """
    place = torch.device(device)
    network = _build(dataset, config, "ibp" if config.initialization == "teacher" else config.initialization)
    _check_teacher(network, teacher, config)
    if config.initialization == "teacher" and teacher is not None:
        network.load_state_dict(teacher.state_dict())
    network = network.to(place)
    if teacher is not None:
        teacher = teacher.to(place).requires_grad_(False)
    steps_per_epoch = num_batches(len(dataset.train), config.batch_size)
    schedule = EpsilonSchedule(config.epsilon_schedule, threat, config.epochs * steps_per_epoch)
    warm_up_and_ramp = config.epsilon_schedule.warm_up + config.epsilon_schedule.ramp
    run = Run(
        "student",
        network,
        dataset,
        config,
        threat,
        lambda precision: StudentStep(network, teacher, config, threat, schedule, precision),
        _precision(config, place),
        ramp_end=round(warm_up_and_ramp * config.epochs),
        teacher=teacher,
        state_interval=state_interval,
    )
    return run.fit(place, state_path, on_epoch)


def _precision(config: TrainConfig, device: torch.device) -> StepPrecision:
    precision = config.precision
    return StepPrecision(
        attack=resolve(precision.attack, device),
        teacher=resolve(precision.teacher, device),
        training=precision.training,
    )


def _build(dataset: Dataset, config: TrainConfig, initialization: Literal["ibp", "default"]) -> Network:
    return build_network(
        config.network.name,
        width=config.network.width,
        activation=config.network.activation,
        input_shape=dataset.input_shape,
        num_classes=dataset.num_classes,
        mean=dataset.mean,
        std=dataset.std,
        seed=config.seed,
        initialization=initialization,
    )


def _check_teacher(network: Network, teacher: Network | None, config: StudentConfig) -> None:
    if teacher is None and (config.loss.reads_teacher or config.initialization == "teacher"):
        raise ValueError(f"loss {config.loss.kind} with initialization {config.initialization} needs a teacher")
    if teacher is not None and any(module.training for module in teacher.modules()):
        raise ValueError("the teacher is in train mode; call .eval() on it, its statistics must not change")
    if teacher is not None and teacher.num_features != network.num_features:
        raise ValueError(
            f"the teacher has {teacher.num_features} features and the student {network.num_features}; "
            "distillation compares them one by one, so both need the same network"
        )
