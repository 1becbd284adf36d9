"""The training loop: epochs, optimiser, schedules, averaging, reports, and a state that continues to the bit.

A run resumed from its state file goes on as if it had never stopped (on the CPU, with the same number of threads):
weights, optimiser, averages, epoch and the state of each random generator are in the file.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ccdist import checkpoint
from ccdist.config import ThreatModel, TrainConfig, fingerprint
from ccdist.data import Dataset, augment, batch_indices, to_pixels
from ccdist.folded import recompute_running_statistics
from ccdist.networks import Network
from ccdist.optimizer_config import (
    AdamConfig,
    AdamWConfig,
    CosineConfig,
    CyclicConfig,
    MultiStepConfig,
    RAdamConfig,
    SGDConfig,
)
from ccdist.precision import float32_products
from ccdist.schedules import cosine_learning_rate, cyclic_learning_rate, multi_step_learning_rate
from ccdist.training_step import Batch, StepPrecision, StepResult

Phase = Literal["teacher", "student"]


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient stopped being a finite number."""


class OtherTrainingError(ValueError):
    """A training state is whole, but of another training than the one that is to go on."""


@dataclass(frozen=True)
class EpochReport:
    """What a listener learns after each epoch. `network` is the live one: read it, do not change it."""

    phase: Phase
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
    precision: dict[str, str] = field(default_factory=dict)  # of its passes, `auto` decided; empty: all float32


@runtime_checkable
class LossOfStep(Protocol):
    """Teacher's or student's step."""

    def __call__(self, batch: Batch) -> StepResult: ...

    def describe(self, step: int) -> str: ...

    def epsilon(self, step: int) -> float | None: ...


@dataclass
class Run:
    """One training: the loop, its state, and how the state is kept."""

    phase: Phase
    network: Network
    dataset: Dataset
    config: TrainConfig
    threat: ThreatModel
    make_step: Callable[[StepPrecision], LossOfStep]
    precision: StepPrecision
    ramp_end: int  # in epochs
    teacher: Network | None = None  # a part of what the student computes from
    state_interval: float = 0.0  # seconds
    epoch: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    average: list[Tensor] = field(default_factory=list)
    averaged: int = 0  # how many weights the average is made of

    def fit(self, device: torch.device, state_path: Path | None, on_epoch: OnEpoch | None) -> TrainingResult:
        self.device = device
        self.data = self.dataset.train.to(device)
        self.optimizer = _optimizer(self.network, self.config)
        self.generators = _generators(self.config.seed, device)
        if state_path is not None and state_path.exists():
            self._restore(state_path)
        self.step = self.make_step(self.precision)
        saved_at = -math.inf
        while self.epoch < self.config.epochs:
            started = time.perf_counter()
            with float32_products("tf32" if self.config.precision.tf32 else "ieee"):
                metrics = self._train_epoch()
                self.epoch += 1
                if self.epoch == self.config.epochs:
                    self._use_average()
            self.history.append(metrics)
            elapsed = time.perf_counter() - started
            self.seconds += elapsed
            is_due = self.epoch == self.config.epochs or time.monotonic() - saved_at >= self.state_interval
            if state_path is not None and is_due:
                self._save(state_path)
                saved_at = time.monotonic()
            if on_epoch is not None:
                try:
                    on_epoch(EpochReport(self.phase, self.epoch, self.config.epochs, metrics, elapsed, self.network))
                except BaseException:
                    if state_path is not None and not is_due:  # a listener that stops a training loses nothing of it
                        self._save(state_path)
                    raise
        self.optimizer.zero_grad(set_to_none=True)  # the last step's gradients are as large as the network
        network = self.network.requires_grad_(False)
        return TrainingResult(network, self.history, self.seconds, asdict(self.precision))

    def _train_epoch(self) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        batches = batch_indices(len(self.data), self.config.batch_size, self.generators["order"], self.device)
        first_bad = torch.full((), -1, device=self.device)
        learning_rate = 0.0
        for number, indices in enumerate(batches):
            batch = self._batch(self.epoch * len(batches) + number, indices)
            learning_rate = self._learning_rate(batch.index, self.config.epochs * len(batches))
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.zero_grad(set_to_none=True)  # before the step: its activations need the room
            loss, metrics = self.step(batch)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.gradient_clip)
            self.optimizer.step()
            # Kept on the device and read once an epoch: a check each step would make the GPU wait for the host.
            bad = (first_bad < 0) & ~torch.isfinite(loss.detach() + norm)
            first_bad = torch.where(bad, batch.index, first_bad)
            for name, value in metrics.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value * len(indices)
            self._collect_average(batch.index, self.config.epochs * len(batches))
        self._refuse_non_finite(int(first_bad))
        if getattr(self.config, "population_statistics", False):
            recompute_running_statistics(self.network, self._population())
        averages = {name: float(value) / len(self.data) for name, value in sums.items()}
        epsilon = self.step.epsilon((self.epoch + 1) * len(batches) - 1)
        return averages | {"learning_rate": learning_rate} | ({} if epsilon is None else {"epsilon": epsilon})

    def _batch(self, index: int, indices: Tensor) -> Batch:
        pixels = self._augmented(self.data.images[indices], self.generators["augmentation"])
        return Batch(index, pixels, self.data.labels[indices], self.generators["attack"])

    def _augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        flip, crop_padding = self.dataset.flip, self.dataset.crop_padding
        return to_pixels(augment(images, flip=flip, crop_padding=crop_padding, generator=generator))

    def _population(self) -> Iterator[Tensor]:
        """The whole training set, augmented, in batches of at least two images."""
        # Seeded for each epoch: how often statistics were recomputed must not move any other random number.
        generator = torch.Generator(self.device).manual_seed((self.config.seed * 2**20 + self.epoch) % 2**63)
        for images in self.data.images.split(self.config.batch_size):
            if len(images) > 1:  # one image has no batch statistics
                yield self._augmented(images, generator)

    def _learning_rate(self, step: int, num_steps: int) -> float:
        match self.config.learning_rate:
            case CyclicConfig(peak=peak, floor=floor):
                return cyclic_learning_rate(step, num_steps=num_steps, peak=peak, floor=floor)
            case CosineConfig(initial=initial, final=final):
                return cosine_learning_rate(step, num_steps=num_steps, initial=initial, final=final)
            case MultiStepConfig(initial=initial, decay=decay, drops=shares):
                remaining = self.config.epochs - self.ramp_end
                drops = [self.ramp_end + round(share * remaining) for share in shares]
                return multi_step_learning_rate(self.epoch, initial=initial, decay=decay, drops=drops)

    @torch.no_grad()
    def _collect_average(self, step: int, num_steps: int) -> None:
        config = self.config.weight_averaging
        if config is None:
            return
        first = math.ceil(config.start * num_steps)
        if step < first or (step - first) % config.every:
            return
        self.averaged += 1
        if not self.average:
            self.average = [torch.zeros_like(parameter) for parameter in self.network.parameters()]
        for mean, parameter in zip(self.average, self.network.parameters(), strict=True):
            mean.lerp_(parameter, 1 / self.averaged)

    @torch.no_grad()
    def _use_average(self) -> None:
        """The averaged weights in place of the last ones, with running statistics that belong to them."""
        if not self.averaged:
            return
        for mean, parameter in zip(self.average, self.network.parameters(), strict=True):
            parameter.copy_(mean)
        recompute_running_statistics(self.network, self._population())

    def _refuse_non_finite(self, step: int) -> None:
        if step < 0:
            return
        raise NonFiniteLossError(
            f"the {self.phase}'s loss or gradient is not finite at step {step} (epoch {self.epoch + 1})"
            f"{self.step.describe(step)}; a smaller learning rate is the usual remedy"
        )

    @functools.cached_property
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
        tensors |= {f"average.{index}": value for index, value in enumerate(self.average)}
        scalars: dict[str, Any] = {}
        for index, state in self.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    scalars[f"{index}.{name}"] = value
        metadata = {
            "identity": self._identity,
            "device": self.device.type,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "precision": asdict(self.precision),
            "averaged": self.averaged,
            "history": self.history,
            "optimizer": scalars,
        }
        checkpoint.save_state(path, tensors, metadata)

    def _restore(self, path: Path) -> None:
        tensors, metadata = checkpoint.load_state(path)
        if metadata["identity"] != self._identity:
            raise OtherTrainingError(
                f"training state {path} belongs to another training (data, threat, teacher or configuration differ); "
                "delete it or choose another place"
            )

        if metadata["device"] != self.device.type:  # whose random generators have another state
            raise ValueError(
                f"training state {path} was begun on {metadata['device']} and cannot go on on {self.device.type} with "
                f"the same random numbers; use {metadata['device']}, or delete it to start again"
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
        average = part("average.")
        self.average = [average[str(index)].to(self.device) for index in range(len(average))]
        # A training keeps the precision it began with, also where `auto` would now mean another.
        self.precision = StepPrecision(**metadata["precision"])
        self.epoch, self.seconds, self.averaged = metadata["epoch"], metadata["seconds"], metadata["averaged"]
        self.history = metadata["history"]


def _optimizer(network: Network, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = list(network.parameters())  # a list: the stored state is keyed by position
    # Fused: one pass over parameters, gradients and moments where the plain loop makes ten.
    match config.optimizer:
        case AdamConfig(weight_decay=decay):
            return torch.optim.Adam(parameters, weight_decay=decay, fused=True)
        case AdamWConfig(weight_decay=decay):
            return torch.optim.AdamW(parameters, weight_decay=decay, fused=True)
        case RAdamConfig(weight_decay=decay):
            return torch.optim.RAdam(parameters, weight_decay=decay)
        case SGDConfig(momentum=momentum, weight_decay=decay):
            return torch.optim.SGD(parameters, lr=0.0, momentum=momentum, weight_decay=decay, fused=True)


def _generators(seed: int, device: torch.device) -> dict[str, torch.Generator]:
    """Separate streams, so that a longer attack does not change the order of the images."""
    streams = {"order": torch.device("cpu"), "augmentation": device, "attack": device}
    return {
        name: torch.Generator(place).manual_seed((seed * len(streams) + index) % (2**63))
        for index, (name, place) in enumerate(streams.items())
    }
