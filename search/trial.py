"""One trial: teacher, student, verification, result. Knows files and journals, but neither Ray nor Optuna.

Everything of a trial lies in its folder, keyed by the trial, so a trial that was cut off goes on where it
stopped: `state.safetensors` while the student trains, `student/` when it is done, `verdicts.parquet` and
`result.json` at the end.
"""

import importlib.metadata
import json
import os
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from ccdist import checkpoint
from ccdist.data import Dataset, to_pixels
from ccdist.networks import Network
from ccdist.provenance import source_commit
from ccdist.training import EpochReport, NonFiniteLossError, TrainingResult, train_student, train_teacher
from ccdist.verification import accuracies, quick_accuracies, verify
from search.locks import exclusive
from search.recipe import Recipe
from search.records import TrialResult
from search.teachers import Teacher, get_or_train, teacher_key
from tracking.journal import Journal

# Validation images behind the epoch curves: enough to see a trend, cheap next to an epoch.
PROBE_IMAGES = 512


@dataclass(frozen=True)
class TrialPlaces:
    """Where one trial keeps its files."""

    folder: Path
    journal: Path
    teachers: Path

    @classmethod
    def of(cls, artifacts: Path, study: str, key: str) -> "TrialPlaces":
        root = artifacts / study
        return cls(root / "trials" / key, root / "journal" / f"{key}.jsonl", artifacts / "teachers")

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    @property
    def student(self) -> Path:
        return self.folder / "student"

    @property
    def state(self) -> Path:
        return self.folder / "state.safetensors"

    @property
    def verdicts(self) -> Path:
        return self.folder / "verdicts.parquet"


@dataclass(frozen=True)
class TrialTask:
    """What a worker is told: which trial, what to compute, where to keep it."""

    key: str
    recipe: Recipe
    params: dict[str, Any]
    places: TrialPlaces


# Told after each epoch and rung: phase, done, of how many.
OnProgress = Callable[[str, int, int], None]


def run_trial(
    task: TrialTask,
    dataset: Dataset,
    *,
    device: torch.device,
    on_progress: OnProgress,
    train_teacher_fn: Callable[..., TrainingResult] = train_teacher,
    train_student_fn: Callable[..., TrainingResult] = train_student,
) -> TrialResult:
    """Run a trial to its end, or return the result that an earlier run of it left.

    Raises:
        NonFiniteLossError: training diverged.
        Exception: whatever else went wrong; the trial can be run again.
    """
    with exclusive(task.places.folder / "lock", wait=True):  # a worker that outlived its driver may still hold it
        done = load_result(task.places)
        if done is not None:
            return done
        with Journal(task.places.journal) as journal:
            journal.start(task.key, task.params, {"cert.recipe": _recipe_tag(task.recipe)})
            try:
                trial = _Trial(task, dataset, device, journal, on_progress)
                result = trial.run(train_teacher_fn, train_student_fn)
            except Exception as error:
                journal.end("FAILED", {}, {"cert.state": "FAILED", "cert.reason": failure_reason(error)})
                raise
            task.places.state.unlink(missing_ok=True)
            return result


def load_result(places: TrialPlaces) -> TrialResult | None:
    """The result that a trial left behind, or None if it did not finish."""
    try:
        return TrialResult(**json.loads(places.result.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        places.result.unlink()  # unreadable: the trial is verified again from its student
        return None


def failure_reason(error: BaseException) -> str:
    """One line for the study: what kind of failure, and its text."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        kind = "out of memory"
    elif isinstance(error, NonFiniteLossError):
        kind = "not finite"
    else:
        kind = type(error).__name__
    text = " ".join(str(error).split())
    return f"{kind}: {text[:500]}" if text else kind


@dataclass
class _Trial:
    task: TrialTask
    dataset: Dataset
    device: torch.device
    journal: Journal
    on_progress: OnProgress

    def run(
        self,
        train_teacher_fn: Callable[..., TrainingResult],
        train_student_fn: Callable[..., TrainingResult],
    ) -> TrialResult:
        started = time.perf_counter()
        task, recipe = self.task, self.task.recipe
        self._probe = self._probe_images()
        teacher = self._teacher(train_teacher_fn) if recipe.needs_teacher else None
        waited = time.perf_counter() - started - (teacher.seconds if teacher else 0.0)
        network, student_seconds = self._student(teacher, train_student_fn)
        validation = self.dataset.validation
        verification_started = time.perf_counter()
        table = verify(
            network,
            to_pixels(validation.images),
            validation.labels,
            recipe.verification,
            on_rung=lambda rung, still_open: self.on_progress(rung, len(validation) - still_open, len(validation)),
        )
        costs = {
            "teacher": teacher.seconds if teacher else 0.0,
            "student": student_seconds,
            "verification": time.perf_counter() - verification_started,
        }
        unfinished = task.places.verdicts.with_suffix(".unfinished")
        pq.write_table(table, unfinished, compression="zstd")
        os.replace(unfinished, task.places.verdicts)
        measured = accuracies(table)
        result = TrialResult(
            standard_accuracy=measured.standard,
            adversarial_accuracy=measured.adversarial,
            certified_accuracy=measured.certified,
            certified_upper=measured.certified_upper,
            verification_state="finished",
            num_images=measured.num_images,
            costs=costs,
            seconds=sum(costs.values()),
            provenance=provenance(self.device),
        )
        self._finish(result, {"waiting": max(0.0, waited), **costs})
        return result

    def _teacher(self, train: Callable[..., TrainingResult]) -> Teacher:
        recipe = self.task.recipe
        key = teacher_key(self.dataset.fingerprint, recipe.threat, recipe.teacher)

        def train_from(state: Path) -> TrainingResult:
            return train(
                self.dataset,
                recipe.threat,
                recipe.teacher,
                device=self.device,
                state_path=state,
                on_epoch=self._on_epoch,
            )

        return get_or_train(self.task.places.teachers, key, train_from)

    def _student(self, teacher: Teacher | None, train: Callable[..., TrainingResult]) -> tuple[Network, float]:
        """The trained student and its seconds, from disk if an earlier run of this trial finished it."""
        places, recipe = self.task.places, self.task.recipe
        if places.student.exists():
            seconds = checkpoint.load_description(places.student)["metadata"]["seconds"]
            return checkpoint.load(places.student).to(self.device), seconds
        trained = train(
            self.dataset,
            recipe.threat,
            recipe.student,
            teacher.network if teacher else None,
            device=self.device,
            state_path=places.state,
            on_epoch=self._on_epoch,
        )
        metadata = {
            "key": self.task.key,
            "seconds": trained.seconds,
            "teacher": teacher.key if teacher else None,
            "recipe": recipe.model_dump(mode="json"),
            "history": trained.history,
        }
        checkpoint.save(places.student, trained.network, metadata)
        return trained.network, trained.seconds

    def _probe_images(self) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = self.dataset.validation.images[:PROBE_IMAGES], self.dataset.validation.labels[:PROBE_IMAGES]
        return to_pixels(images).to(self.device), labels.to(self.device)

    def _on_epoch(self, report: EpochReport) -> None:
        values = {f"{report.phase}/{name}": value for name, value in report.metrics.items()}
        if report.phase == "student":
            standard, certified = quick_accuracies(report.network, *self._probe, self.task.recipe.threat)
            values |= {
                "validation/standard_accuracy": standard,
                "validation/ibp_certified_accuracy": certified,
            }
        values[f"{report.phase}/epoch_seconds"] = report.seconds
        self.journal.metrics(report.epoch, values)
        self.on_progress(report.phase, report.epoch, report.epochs)

    def _finish(self, result: TrialResult, costs: dict[str, float]) -> None:
        """Artefacts first, then the result: whoever finds the result finds everything."""
        places = self.task.places
        self.journal.artifact(places.student, "student")
        self.journal.artifact(places.verdicts, "verification")
        metrics = {
            "standard_accuracy": result.standard_accuracy,
            "adversarial_accuracy": result.adversarial_accuracy,
            "certified_accuracy": result.certified_accuracy,
            "certified_upper": result.certified_upper,
            "seconds": result.seconds,
            **{f"cost/{name}_seconds": value for name, value in costs.items()},
        }
        tags = {"cert.state": "COMPLETE", "cert.verification": result.verification_state}
        self.journal.end("FINISHED", metrics, tags | {f"cert.{k}": v for k, v in result.provenance.items()})
        unfinished = places.result.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(asdict(result), indent=1))
        os.replace(unfinished, places.result)


def _recipe_tag(recipe: Recipe) -> str:
    return recipe.model_dump_json(exclude={"data": {"path"}})


def provenance(device: torch.device) -> dict[str, str]:
    """What made a result: versions, device, memory, commit."""
    packages = ("torch", "ray", "optuna")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "peak_memory_mb": str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024),
        "commit": source_commit(),
    }
