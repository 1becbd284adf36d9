"""The ways to compute one CC-Dist step that `benchmarks.training_step` compares, and the network they start from."""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ccdist import checkpoint
from ccdist.config import DataConfig, StudentConfig, TeacherConfig, ThreatModel
from ccdist.data import Dataset, ImageSet, load_dataset, to_pixels
from ccdist.reference import reference_loss
from ccdist.training import train_student, train_teacher
from ccdist.training_step import Batch, EpsilonSchedule, StepPrecision, StudentStep

BATCH = 128
THREAT = ThreatModel(epsilon="2/255")
PRECISIONS = {
    "float32": StepPrecision(),
    "default": StepPrecision(attack="bfloat16", teacher="bfloat16"),
    "bfloat16": StepPrecision("bfloat16", "bfloat16", "bfloat16"),
}
PATHS = ("reference", "reference, allocator", *PRECISIONS)
EQUALITY_STEPS = 20


def student_config(steps: int) -> StudentConfig:
    """The published CC-IBP recipe of CIFAR-10 at 2/255 with distillation; with one step the attack of that at 8/255."""
    attack = (
        {"steps": 8, "step_size": 0.25, "kappa": 2.1}
        if steps == 8
        else {"steps": steps, "step_size": 10, "keep": "last"}
    )
    return StudentConfig.model_validate(
        {"epochs": 1, "loss": {"kind": "cc_dist", "alpha": 0.01, "beta": 5.0}, "attack": attack, "l1": 3e-6}
        | {"epsilon_schedule": {"warm_up": 0, "ramp": 0}, "shi_weight": 0.0}
    )


# ---- the network that is timed -------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> Path:
    """A teacher and a student trained two epochs past its ramp, stored for every path and every later call."""
    dataset = _dataset(args)
    folder = Path(args.out) / f"cnn7-{args.width}-{dataset.fingerprint}-{args.train_images}"
    if (folder / "student").exists():
        return folder
    network = {"name": "cnn7", "width": args.width}
    attack = {"steps": 1, "step_size": 10, "keep": "last"}
    teacher = train_teacher(
        dataset,
        THREAT,
        TeacherConfig.model_validate({"network": network, "epochs": 2, "attack": attack}),
        device=args.device,
    ).network
    schedule = {"warm_up": "1/6", "ramp": "1/2"}
    loss = {"kind": "cc_dist", "alpha": 0.01, "beta": 5.0}
    student = train_student(
        dataset,
        THREAT,
        StudentConfig.model_validate(
            {"network": network, "epochs": 6, "attack": attack, "loss": loss, "epsilon_schedule": schedule}
        ),
        teacher,
        device=args.device,
        on_epoch=lambda report: print(f"  preparing: epoch {report.epoch} of 6, {report.seconds:.0f} s", flush=True),
    ).network
    images = to_pixels(dataset.train.images[: EQUALITY_STEPS * BATCH])
    checkpoint.save_state(folder / "batches", {"images": images, "labels": dataset.train.labels[: len(images)]}, {})
    for name, trained in (("teacher", teacher), ("student", student)):  # the student last: it says that all is there
        checkpoint.save(folder / name, trained.cpu())
    return folder


def _dataset(args: argparse.Namespace) -> Dataset:
    if args.data:
        config = DataConfig(name="cifar10", path=args.data, train_images=args.train_images, flip=True, crop_padding=2)
        return load_dataset(config)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (args.train_images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    part = ImageSet(images, torch.randint(10, (len(images),), generator=generator))
    stats = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "flip": True, "crop_padding": 2}
    return Dataset("random", part, part, 10, **stats, fingerprint="random")


# ---- one path ------------------------------------------------------------------------------------------------------


class StepPath:
    """One way to compute a step, with its network, optimiser and clock."""

    def __init__(self, name: str, folder: Path, device: str) -> None:
        self.name, self.device = name, torch.device(device)
        self.network = checkpoint.load(folder / "student").to(self.device)
        self.teacher = checkpoint.load(folder / "teacher").to(self.device).requires_grad_(False)
        self.weights = {key: value.clone() for key, value in self.network.state_dict().items()}
        tensors, _ = checkpoint.load_state(folder / "batches")
        self.images, self.labels = tensors["images"].to(self.device), tensors["labels"].to(self.device)
        plain = name.startswith("reference")
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=5e-4, **({} if plain else {"fused": True}))
        self.clock = Clock(self.device)

    def reset(self) -> None:
        self.network.load_state_dict(self.weights)
        self.optimizer.state.clear()

    def loss(self, index: int, steps: int, *, clean_pass: bool = True) -> Tensor:
        part = slice(index * BATCH % len(self.images), None)
        images, labels = self.images[part][:BATCH], self.labels[part][:BATCH]
        generator = torch.Generator(self.device).manual_seed(index)
        config = student_config(steps)
        if self.name.startswith("reference"):
            return reference_loss(
                self.network,
                self.teacher,
                images,
                labels,
                config,
                THREAT,
                epsilon=THREAT.radius,
                epsilon_max=THREAT.radius,
                attack_generator=generator,
                clean_pass=clean_pass,
                on_phase=self.clock.phase,
            )
        step = self._step(config)
        loss, _ = step(Batch(1 + index, images, labels, generator))
        return loss

    def _step(self, config: StudentConfig) -> StudentStep:
        if not hasattr(self, "_made"):
            self._made: dict[int, StudentStep] = {}
        if config.attack.steps not in self._made:
            schedule = EpsilonSchedule(config.epsilon_schedule, THREAT, 10**6)
            step = StudentStep(self.network, self.teacher, config, THREAT, schedule, PRECISIONS[self.name])
            self._made[config.attack.steps] = self.clock.attached(step)
        return self._made[config.attack.steps]

    def timed_step(self, steps: int) -> dict[str, Any]:
        self.reset()
        self.clock.start()
        loss = self.loss(0, steps)
        with self.clock.phase("backward"):
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        with self.clock.phase("optimiser"):
            nn.utils.clip_grad_norm_(self.network.parameters(), 10.0)
            self.optimizer.step()
        return {"seconds": self.clock.total(), "phases": dict(self.clock.phases), "loss": float(loss.detach())}


@dataclass
class Clock:
    """Seconds by phase; on a GPU each phase waits for the device."""

    device: torch.device
    phases: dict[str, float] = field(default_factory=dict)
    started: float = 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        self.phases.clear()
        self.started = self.now()

    def total(self) -> float:
        return self.now() - self.started

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begun = self.now()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + self.now() - begun

    def attached(self, step: StudentStep) -> StudentStep:
        """The step with its passes timed."""
        passes = {
            "_attacked": "attack",
            "_features": "forward",
            "_feature_box": "bounds",
            "_teacher_features": "teacher",
        }
        for method, name in passes.items():
            setattr(step, method, self._timed(getattr(step, method), name))
        return step

    def _timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            with self.phase(name):
                return function(*args)

        return timed
