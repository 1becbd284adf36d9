"""One trial: teacher, student, verification, result. Knows files and journals, but neither Ray nor Optuna.

Everything of a trial lies in its folder, keyed by the trial, so a trial that was cut off goes on where it
stopped: `state.safetensors` while the student trains, `student/` when it is done, `verification/` while it is
verified, `verdicts.parquet` and `result.json` at the end.
"""

import functools
import importlib.metadata
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ccdist import atomic_files, checkpoint
from ccdist.data import Dataset
from ccdist.provenance import source_commit
from ccdist.training import TrainingResult, train_student, train_teacher
from search.artifacts.disk_space import StorageAwayError, is_of_disk, pausing_on_full_disk
from search.artifacts.leases import Held
from search.artifacts.locks import exclusive
from search.artifacts.places import TrialPlaces as TrialPlaces
from search.artifacts.places import discard as discard
from search.artifacts.places import load_result as load_result
from search.config import StoppingConfig
from search.recipe import Recipe
from search.studies.records import TrialResult
from search.teachers import Teacher, TeacherStore, teacher_key
from search.tracked.run_names import end_tags, start_tags
from search.trials.endings import conclude, failure_reason, is_out_of_memory
from search.trials.endings import conclude_stopped as conclude_stopped
from search.trials.endings import conclude_training_stopped as conclude_training_stopped
from search.trials.reports import Reports, WaitingForTeacher
from search.trials.student_model import export_student
from search.trials.student_training import EpochLog, StudentTraining
from search.trials.verifying import Spent, load_verdicts, verify_trial, with_larger_limits
from tracking.journal import Journal


@dataclass(frozen=True)
class TrialTask:
    """What a worker is told: which trial, what to compute, where to keep it, where it is compared with others."""

    key: str
    recipe: Recipe
    params: dict[str, Any]
    places: TrialPlaces
    stopping: StoppingConfig
    configuration: str = ""  # hash of the parameters; empty: it belongs to no study
    exports: bool = False  # whether its student is to become a model in MLflow
    deaths: str = ""  # what became of its attempts before, in a line


def run_trial(
    task: TrialTask,
    dataset: Dataset,
    *,
    device: torch.device,
    reports: Reports,
    train_teacher_fn: Callable[..., TrainingResult] = train_teacher,
    train_student_fn: Callable[..., TrainingResult] = train_student,
) -> TrialResult:
    """Run a trial to its end, or return the result that an earlier run of it left.

    Whatever comes out of a report (SystemExit, where the trial is stopped) leaves the trial so that another run goes
    on from there, or the driver ends it.

    Raises:
        WaitingForTeacher: another process trains its teacher; run the trial again later.
        DiskFullError: there is no room left; run the trial again when there is.
        StorageAwayError: its folder did not answer; run the trial again.
        OutOfMemoryError, MemoryError: a GPU or the host has too little; run the trial again with more.
        NonFiniteLossError: training diverged.
        Exception: whatever else went wrong; the trial can be run again.
    """
    places = task.places
    # A worker that outlived its driver may still hold the lock.
    with pausing_on_full_disk(places.folder), exclusive(places.lock, wait=True):
        done = load_result(places)
        if done is not None:
            discard(places)
            return done
        with Journal(places.journal) as journal:
            journal.start(task.key, task.params, start_tags(task.recipe, task.configuration, task.deaths))
            try:
                return _Trial(task, dataset, device, journal, reports).run(train_teacher_fn, train_student_fn)
            except (WaitingForTeacher, StorageAwayError):
                raise
            except Exception as error:
                if not is_of_disk(error) and not is_out_of_memory(error):  # else the driver decides what follows
                    journal.end("FAILED", {}, end_tags("FAILED", failure_reason(error)))
                raise


def resume_verification(
    task: TrialTask, dataset: Dataset, *, device: torch.device, timeout_factor: float, reports: Reports
) -> TrialResult:
    """Decide images that a COMPLETE trial left open: the rest of its ladder, or branch and bound with larger limits.

    What is decided stays. A run that is cut off leaves the result as it was, and the next one with the same factor
    goes on from its state.

    Args:
        timeout_factor: limits of branch and bound relative to those of the trial's recipe.

    Raises:
        DiskFullError, StorageAwayError: as for `run_trial`; the result is as it was.
        ValueError: the trial has no result.
    """
    places, recipe = task.places, task.recipe
    with pausing_on_full_disk(places.folder), exclusive(places.lock, wait=True):
        result = load_result(places)
        if result is None:
            raise ValueError(f"trial {task.key} has no result, so no verification can be resumed; run the trial")
        if task.exports:
            export_student(places, task.key, recipe, dataset)
        config = with_larger_limits(
            recipe.verification,
            timeout_factor,
            recipe.student.network.activation,
            rungs_are_done=result.verification_state == "finished",
        )
        refined = verify_trial(
            checkpoint.load(places.student).to(device),
            dataset.validation,
            config,
            places,
            spent=Spent(result.costs, provenance(device) | {"timeout_factor": f"{timeout_factor:g}"}),
            reports=reports,
            known=load_verdicts(places),
        )
        refined = _with_peak_memory(refined, device)
        with Journal(places.journal) as journal:
            conclude(places, journal, refined, {})
        return refined


@dataclass
class _Trial:
    task: TrialTask
    dataset: Dataset
    device: torch.device
    journal: Journal
    reports: Reports

    def run(
        self,
        train_teacher_fn: Callable[..., TrainingResult],
        train_student_fn: Callable[..., TrainingResult],
    ) -> TrialResult:
        started = time.perf_counter()
        task, recipe = self.task, self.task.recipe
        self._log = EpochLog(self.dataset, recipe.threat, self.device, self.journal, self.reports)
        is_trained = task.places.student.exists()
        teacher = self._teacher(train_teacher_fn) if recipe.needs_teacher and not is_trained else None
        waited = time.perf_counter() - started - (teacher.seconds if teacher else 0.0)
        teacher_seconds = self._teacher_seconds(teacher)
        teacher = teacher and replace(teacher, seconds=teacher_seconds)
        network, student_seconds = StudentTraining(
            task.key,
            recipe,
            task.stopping,
            task.places,
            self.dataset,
            self.device,
            teacher,
            self._log,
            self.reports,
            train_student_fn,
        ).run()
        task.places.state.unlink(missing_ok=True)  # the optimiser's state is larger than the weights
        before_export = time.perf_counter()
        if task.exports:
            export_student(task.places, task.key, recipe, self.dataset)
        export_seconds = time.perf_counter() - before_export
        result = verify_trial(
            network,
            self.dataset.validation,
            recipe.verification,
            task.places,
            spent=Spent({"teacher": teacher_seconds, "student": student_seconds}, provenance(self.device)),
            reports=self.reports,
        )
        result = _with_peak_memory(result, self.device)
        conclude(task.places, self.journal, result, {"waiting": max(0.0, waited), "export": export_seconds})
        return result

    def _teacher_seconds(self, teacher: Teacher | None) -> float:
        """What this trial spent on its teacher, whichever of its runs did."""
        stored = self.task.places.teacher_seconds
        if teacher is not None and teacher.seconds > 0:
            atomic_files.write_text(stored, repr(teacher.seconds))
        return float(stored.read_text()) if stored.exists() else 0.0

    def _teacher(self, train: Callable[..., TrainingResult]) -> Teacher:
        """The teacher, trained now if nobody has.

        Raises:
            WaitingForTeacher: another process does.
        """
        recipe, store = self.task.recipe, teacher_store(self.task.places.teachers)
        key = teacher_key(self.dataset.fingerprint, recipe.threat, recipe.teacher)
        # Another process of that name was this trial, and is dead: its lock is held here.
        found = store.acquire(key, self.task.key)
        if isinstance(found, Held):
            raise WaitingForTeacher(key, found.holder)
        if isinstance(found, Teacher):
            return found

        def train_from(state: Path) -> TrainingResult:
            result = train(
                self.dataset,
                recipe.threat,
                recipe.teacher,
                device=self.device,
                state_path=state,
                on_epoch=self._log,
            )
            self._log.complete("teacher", result.history)
            return result

        return store.train(found, train_from)


@functools.cache
def teacher_store(place: Path | str) -> TeacherStore:
    """The store of a place, one for each process: it has to watch a lease for a while to know that its holder died."""
    return TeacherStore.of(place)


def provenance(device: torch.device) -> dict[str, str]:
    """What made a result: versions, machine, device, memory, commit."""
    packages = ("torch", "ray", "optuna")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "host": platform.node(),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        **_peaks(device),
        "commit": source_commit(),
    }


def _peaks(device: torch.device) -> dict[str, str]:
    """Most memory of the process, MiB: of the host as long as it lives, of the GPU for this trial."""
    peaks = {"peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    if device.type == "cuda":
        peaks["peak_gpu_memory_mb"] = torch.cuda.max_memory_reserved(device) // 2**20
    return {name: str(value) for name, value in peaks.items()}


def _with_peak_memory(result: TrialResult, device: torch.device) -> TrialResult:
    """The result at its end: verification may have taken more memory than what came before."""
    return replace(result, provenance=result.provenance | _peaks(device))
