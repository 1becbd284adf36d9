"""Training of teacher and student: one loop, two losses, a checkpoint and a report after each epoch.

A run resumed from its state file continues bit for bit as if it had never stopped (on the CPU, with the same
number of threads): weights, optimiser, epoch and the state of each random generator are in the file.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccdist import checkpoint
from ccdist.attacks import pgd
from ccdist.batch_norm import Statistics, forward, forward_collecting, recompute_running_statistics
from ccdist.bounds import Trace, elided_lower_bounds, logit_differences, propagate
from ccdist.config import (
    AdamConfig,
    CCDistConfig,
    CCIBPConfig,
    CyclicConfig,
    EpsilonScheduleConfig,
    ExpIBPConfig,
    LossConfig,
    MTLIBPConfig,
    SGDConfig,
    StudentConfig,
    TeacherConfig,
    ThreatModel,
    TrainConfig,
    TrainingAttackConfig,
    fingerprint,
)
from ccdist.data import Dataset, augment, batch_indices, num_batches, to_pixels
from ccdist.interval import Interval, epsilon_box
from ccdist.losses import cc_dist_loss, cc_ibp_loss, exp_ibp_loss, mtl_ibp_loss
from ccdist.networks import Network, Normalize, build_network
from ccdist.regularizers import l1_norm, shi_regularizer
from ccdist.schedules import cyclic_learning_rate, multi_step_learning_rate, smoothed_epsilon

# The Shi regulariser compares widths, which a box of width 0 does not have.
SMALLEST_BOX = 1e-6


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient stopped being a finite number."""


@dataclass(frozen=True)
class EpochReport:
    """What a listener learns after each epoch. `network` is the live one: read it, do not change it."""

    phase: Literal["teacher", "student"]
    epoch: int  # 1-based
    epochs: int
    metrics: dict[str, float]
    seconds: float  # of this epoch
    network: Network


OnEpoch = Callable[[EpochReport], None]


@dataclass(frozen=True)
class TrainingResult:
    """The trained network, the metrics of every epoch, and the seconds spent, interrupted runs included."""

    network: Network
    history: list[dict[str, float]]
    seconds: float


@dataclass(frozen=True)
class _Step:
    """One optimiser step's inputs."""

    index: int  # over the whole training, 0-based
    images: Tensor
    labels: Tensor
    attack_generator: torch.Generator


# -> (loss, metrics to average over the epoch)
_LossOf = Callable[[_Step], tuple[Tensor, dict[str, Tensor]]]


def train_teacher(
    dataset: Dataset,
    threat: ThreatModel,
    config: TeacherConfig,
    *,
    device: torch.device | str = "cpu",
    state_path: Path | None = None,
    on_epoch: OnEpoch | None = None,
) -> TrainingResult:
    """An empirically robust network: cross-entropy at PGD points, epsilon constant.

    The attack reads running statistics; the forward pass that is differentiated uses, and adds to them, those of
    the adversarial batch.

    Args:
        state_path: where to keep the state after each epoch, and to go on from; None: nowhere.
        on_epoch: called after each epoch.

    Raises:
        NonFiniteLossError: the loss diverged.
        CorruptCheckpointError: the state file is damaged.
        ValueError: the state file belongs to another training.
    """
    network = _build(dataset, config, config.initialization).to(device)
    epsilon = config.epsilon_factor * threat.radius

    def loss_of(step: _Step) -> tuple[Tensor, dict[str, Tensor]]:
        attacked = _attack(network, step, epsilon, config.attack, statistics=None)
        logits = forward_collecting(network, attacked, {})
        loss = F.cross_entropy(logits, step.labels)
        return _with_l1(loss, network, config), _adversarial_metrics(loss, logits, step)

    run = _Run("teacher", network, dataset, config, threat, loss_of, ramp_end=0)
    return run.fit(torch.device(device), state_path, on_epoch)


def train_student(
    dataset: Dataset,
    threat: ThreatModel,
    config: StudentConfig,
    teacher: Network | None,
    *,
    device: torch.device | str = "cpu",
    state_path: Path | None = None,
    on_epoch: OnEpoch | None = None,
) -> TrainingResult:
    """A certifiably robust network: the configured loss at attacked points and interval bounds (METHOD A.7).

    Args:
        teacher: frozen; needed by cc_dist and by initialization "teacher", else it may be None.
        The rest, and the errors, as in `train_teacher`.

    Raises:
        ValueError: the teacher is missing, in train mode, or has another number of features than the student.
    """
    network = _build(dataset, config, "ibp" if config.initialization == "teacher" else config.initialization)
    _check_teacher(network, teacher, config)
    if config.initialization == "teacher" and teacher is not None:
        network.load_state_dict(teacher.state_dict())
    network = network.to(device)
    if teacher is not None:
        teacher = teacher.to(device).requires_grad_(False)
    steps_per_epoch = num_batches(len(dataset.train), config.batch_size)
    schedule = _EpsilonSchedule(config.epsilon_schedule, threat, config.epochs * steps_per_epoch)
    step_loss = _StudentLoss(network, teacher, config, schedule)
    warm_up_and_ramp = config.epsilon_schedule.warm_up + config.epsilon_schedule.ramp
    run = _Run(
        "student",
        network,
        dataset,
        config,
        threat,
        step_loss,
        ramp_end=round(warm_up_and_ramp * config.epochs),
        teacher=teacher,
    )
    return run.fit(torch.device(device), state_path, on_epoch)


def _build(dataset: Dataset, config: TrainConfig, initialization: Literal["ibp", "default"]) -> Network:
    return build_network(
        config.network.name,
        width=config.network.width,
        input_shape=dataset.input_shape,
        num_classes=dataset.num_classes,
        mean=dataset.mean,
        std=dataset.std,
        seed=config.seed,
        initialization=initialization,
    )


def _check_teacher(network: Network, teacher: Network | None, config: StudentConfig) -> None:
    needs_teacher = isinstance(config.loss, CCDistConfig) or config.initialization == "teacher"
    if teacher is None and needs_teacher:
        raise ValueError(f"loss {config.loss.kind} with initialization {config.initialization} needs a teacher")
    if teacher is not None and any(module.training for module in teacher.modules()):
        raise ValueError("the teacher is in train mode; call .eval() on it, its statistics must not change")
    if teacher is not None and teacher.num_features != network.num_features:
        raise ValueError(
            f"the teacher has {teacher.num_features} features and the student {network.num_features}; "
            "distillation compares them one by one, so both need the same network"
        )


def _with_l1(loss: Tensor, network: Network, config: TrainConfig) -> Tensor:
    return loss + config.l1 * l1_norm(network) if config.l1 else loss


def _adversarial_metrics(loss: Tensor, logits: Tensor, step: _Step) -> dict[str, Tensor]:
    correct = (logits.detach().argmax(1) == step.labels).float().mean()
    return {"loss": loss.detach(), "adversarial_accuracy": correct}


def _attack(
    network: Network, step: _Step, epsilon: float, config: TrainingAttackConfig, statistics: Statistics | None
) -> Tensor:
    """PGD points in the box of kappa * epsilon, the network seen with the given batch norm statistics."""
    if epsilon == 0:
        return step.images
    if statistics is not None:  # the attack needs their values only
        statistics = {layer: (mean.detach(), var.detach()) for layer, (mean, var) in statistics.items()}
    return pgd(
        lambda x: forward(network, x, statistics),
        step.labels,
        box=epsilon_box(step.images, min(1.0, config.kappa * epsilon)),
        steps=config.steps,
        step_size=config.step_size,
        restarts=config.restarts,
        keep=config.keep,
        generator=step.attack_generator,
    )


class _EpsilonSchedule:
    """The smoothed ramp of a student's epsilon, from shares of the epochs to steps, once."""

    def __init__(self, config: EpsilonScheduleConfig, threat: ThreatModel, num_steps: int) -> None:
        self.start = round(config.warm_up * num_steps)
        self.length = round(config.ramp * num_steps)
        self.epsilon_max = min(1.0, threat.radius * config.train_epsilon_factor)  # 1 is already the whole range

    def __call__(self, step: int) -> float:
        return smoothed_epsilon(step, start=self.start, length=self.length, epsilon_max=self.epsilon_max)


class _StudentLoss:
    """The student's loss for one step; one interval pass serves the loss, the distillation and the regulariser."""

    def __init__(
        self, network: Network, teacher: Network | None, config: StudentConfig, schedule: _EpsilonSchedule
    ) -> None:
        self.network, self.teacher, self.config, self.schedule = network, teacher, config, schedule

    def __call__(self, step: _Step) -> tuple[Tensor, dict[str, Tensor]]:
        network, config = self.network, self.config
        epsilon = self.schedule(step.index)
        statistics: Statistics = {}
        if config.batch_norm == "clean":
            forward_collecting(network.features, step.images, statistics)
            attacked = _attack(network, step, epsilon, config.attack, statistics)
            adv_features = forward(network.features, attacked, statistics)
        else:
            # De Palma's code also runs a clean train-mode pass for its log, which mixes clean batches into the
            # running statistics; it costs a forward pass and is left out here.
            attacked = _attack(network, step, epsilon, config.attack, None)
            adv_features = forward_collecting(network.features, attacked, statistics)
        logits = network.head(adv_features)
        adv_diffs = logit_differences(logits, step.labels)
        trace = Trace()
        box = epsilon_box(step.images, max(epsilon, SMALLEST_BOX))
        feature_box = propagate(network.features, box, statistics=statistics, trace=trace)
        lower_diffs = elided_lower_bounds(network.head, feature_box, step.labels)
        teacher_features = self._teacher_features(step.images)
        loss = student_loss(config.loss, adv_diffs, lower_diffs, adv_features, feature_box, teacher_features)
        metrics = _adversarial_metrics(loss, logits, step)
        metrics["ibp_certified_accuracy"] = (lower_diffs.detach().amin(1) > 0).float().mean()
        shi_weight = config.shi_weight * (1 - epsilon / self.schedule.epsilon_max)
        if shi_weight > 0:
            loss = loss + shi_weight * shi_regularizer(_input_radius(trace), trace.relu_inputs())
        return _with_l1(loss, network, config), metrics

    def _teacher_features(self, images: Tensor) -> Tensor | None:
        if self.teacher is None or not isinstance(self.config.loss, CCDistConfig):
            return None
        with torch.no_grad():
            features: Tensor = self.teacher.features(images)
        return features


def _input_radius(trace: Trace) -> Tensor:
    """Radius of the normalised input: what enters the first layer that is not the normalisation."""
    return next(box for layer, box in trace.steps if not isinstance(layer, Normalize)).radius


def student_loss(
    config: LossConfig,
    adv_diffs: Tensor,
    lower_diffs: Tensor,
    adv_features: Tensor,
    feature_box: Interval,
    teacher_features: Tensor | None,
) -> Tensor:
    """The configured loss; the one place where a `loss: {kind: ...}` becomes a function of `ccdist.losses`."""
    match config:
        case CCDistConfig():
            if teacher_features is None:
                raise ValueError("cc_dist needs a teacher's features")
            return cc_dist_loss(
                adv_diffs,
                lower_diffs,
                adv_features,
                feature_box,
                teacher_features,
                alpha=config.alpha,
                beta=config.beta,
                alpha_dist=None if config.alpha_dist == "alpha" else config.alpha_dist,
            )
        case CCIBPConfig():
            return cc_ibp_loss(adv_diffs, lower_diffs, alpha=config.alpha)
        case MTLIBPConfig():
            return mtl_ibp_loss(adv_diffs, lower_diffs, alpha=config.alpha)
        case ExpIBPConfig():
            return exp_ibp_loss(adv_diffs, lower_diffs, alpha=config.alpha)


@dataclass
class _Run:
    """One training: the loop, its state, and how the state is kept."""

    phase: Literal["teacher", "student"]
    network: Network
    dataset: Dataset
    config: TrainConfig
    threat: ThreatModel
    loss_of: _LossOf
    ramp_end: int  # in epochs
    teacher: Network | None = None  # a part of what the student computes from
    epoch: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def fit(self, device: torch.device, state_path: Path | None, on_epoch: OnEpoch | None) -> TrainingResult:
        self.data = self.dataset.train.to(device)
        self.optimizer = _optimizer(self.network, self.config)
        self.generators = _generators(self.config.seed, device)
        if state_path is not None and state_path.exists():
            self._restore(state_path)
        while self.epoch < self.config.epochs:
            started = time.perf_counter()
            metrics = self._train_epoch()
            self.epoch += 1
            self.history.append(metrics)
            elapsed = time.perf_counter() - started
            self.seconds += elapsed
            if state_path is not None:
                self._save(state_path)
            if on_epoch is not None:
                on_epoch(EpochReport(self.phase, self.epoch, self.config.epochs, metrics, elapsed, self.network))
        self.optimizer.zero_grad(set_to_none=True)  # the last step's gradients are as large as the network
        return TrainingResult(self.network.requires_grad_(False), self.history, self.seconds)

    def _train_epoch(self) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        batches = batch_indices(len(self.data), self.config.batch_size, self.generators["order"])
        first_bad = torch.full((), -1, device=self.data.labels.device)
        learning_rate = 0.0
        for number, indices in enumerate(batches):
            step = self._step(self.epoch * len(batches) + number, indices)
            learning_rate = self._learning_rate(step.index, self.config.epochs * len(batches))
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            loss, metrics = self.loss_of(step)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.gradient_clip)
            self.optimizer.step()
            # Kept on the device and read once an epoch: a check each step would make the GPU wait for the host.
            bad = (first_bad < 0) & ~torch.isfinite(loss.detach() + norm)
            first_bad = torch.where(bad, step.index, first_bad)
            for name, value in metrics.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value * len(indices)
        self._refuse_non_finite(int(first_bad))
        if getattr(self.config, "population_statistics", False):
            recompute_running_statistics(self.network, self._clean_batches())
        averages = {name: float(value) / len(self.data) for name, value in sums.items()}
        extra = {"learning_rate": learning_rate}
        if isinstance(self.loss_of, _StudentLoss):
            extra["epsilon"] = self.loss_of.schedule((self.epoch + 1) * len(batches) - 1)
        return averages | extra

    def _step(self, index: int, indices: Tensor) -> _Step:
        indices = indices.to(self.data.labels.device)
        images = augment(
            self.data.images[indices],
            flip=self.dataset.flip,
            crop_padding=self.dataset.crop_padding,
            generator=self.generators["augmentation"],
        )
        return _Step(index, to_pixels(images), self.data.labels[indices], self.generators["attack"])

    def _clean_batches(self) -> Iterator[Tensor]:
        for images in self.data.images.split(self.config.batch_size):
            if len(images) > 1:  # one image has no batch statistics
                yield to_pixels(images)

    def _learning_rate(self, step: int, num_steps: int) -> float:
        config = self.config.learning_rate
        if isinstance(config, CyclicConfig):
            return cyclic_learning_rate(step, num_steps=num_steps, peak=config.peak, floor=config.floor)
        remaining = self.config.epochs - self.ramp_end
        drops = [self.ramp_end + round(share * remaining) for share in config.drops]
        return multi_step_learning_rate(self.epoch, initial=config.initial, decay=config.decay, drops=drops)

    def _refuse_non_finite(self, step: int) -> None:
        if step < 0:
            return
        loss = getattr(self.config, "loss", None)
        weights = "" if loss is None else f", {loss.model_dump(mode='json')}"
        epsilon = f", epsilon {self.loss_of.schedule(step):.6g}" if isinstance(self.loss_of, _StudentLoss) else ""
        raise NonFiniteLossError(
            f"the {self.phase}'s loss or gradient is not finite at step {step} (epoch {self.epoch + 1})"
            f"{epsilon}{weights}; a smaller learning rate is the usual remedy"
        )

    @property
    def _identity(self) -> str:
        """What must be equal for a state file to be continued."""
        return fingerprint(
            {
                "phase": self.phase,
                "data": self.dataset.fingerprint,
                "threat": self.threat.model_dump(mode="json"),
                "config": self.config.model_dump(mode="json"),
                "teacher": None if self.teacher is None else checkpoint.weights_sha256(self.teacher),
            }
        )

    def _save(self, path: Path) -> None:
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"generator.{name}": value.get_state() for name, value in self.generators.items()}
        scalars: dict[str, Any] = {}
        for index, state in self.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    scalars[f"{index}.{name}"] = value
        metadata = {"identity": self._identity, "epoch": self.epoch, "seconds": self.seconds}
        checkpoint.save_state(path, tensors, metadata | {"history": self.history, "optimizer": scalars})

    def _restore(self, path: Path) -> None:
        tensors, metadata = checkpoint.load_state(path)
        if metadata["identity"] != self._identity:
            raise ValueError(
                f"training state {path} belongs to another training (data, threat, teacher or configuration differ); "
                "delete it or choose another place"
            )

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}

        self.network.load_state_dict(part("network."))
        for name, state in part("generator.").items():
            self.generators[name].set_state(state)
        optimizer_state: dict[int, dict[str, Any]] = {}
        for name, value in (part("optimizer.") | metadata["optimizer"]).items():
            index, _, key = name.partition(".")
            optimizer_state.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
        self.epoch, self.seconds = metadata["epoch"], metadata["seconds"]
        self.history = metadata["history"]


def _optimizer(network: Network, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = list(network.parameters())  # a list: the stored state is keyed by position
    match config.optimizer:
        case AdamConfig(weight_decay=decay):
            return torch.optim.Adam(parameters, weight_decay=decay)
        case SGDConfig(momentum=momentum, weight_decay=decay):
            return torch.optim.SGD(parameters, lr=0.0, momentum=momentum, weight_decay=decay)


def _generators(seed: int, device: torch.device) -> dict[str, torch.Generator]:
    """Separate streams, so that a longer attack does not change the order of the images."""
    streams = {"order": torch.device("cpu"), "augmentation": device, "attack": device}
    return {
        name: torch.Generator(place).manual_seed((seed * len(streams) + index) % (2**63))
        for index, (name, place) in enumerate(streams.items())
    }
