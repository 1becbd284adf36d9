"""One training in one folder: teacher, student, verification; every step leaves a file, and none is done twice.

In the folder: `recipe.yaml`, what is trained; `teacher/` and `student/`, the networks once they are done, and
`PHASE.state.safetensors` before, where a training goes on from; `curves.jsonl`, a row for each epoch of both;
`teacher_verdicts.parquet` and `verdicts.parquet`; `summary.json`, written last.
"""

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from ccdist import checkpoint
from ccdist.atomic_files import write_table, write_text
from ccdist.checkpoint import CorruptCheckpointError
from ccdist.config import VerificationOptions, VerifyConfig, fingerprint
from ccdist.data import Dataset, ImageSet, to_pixels
from ccdist.networks import Network
from ccdist.provenance import source_commit
from ccdist.recipe import RecipeFile, load_recipe_file
from ccdist.run_folders import RunFolderError, differing_keys, held
from ccdist.training import EpochReport, TrainingResult, train_student, train_teacher
from ccdist.verification import accuracies, quick_accuracies, verify

Phase = Literal["teacher", "student"]
Part = Literal["validation", "test"]

# Validation images behind the epoch curves: enough to see a trend, cheap next to an epoch.
PROBE_IMAGES = 512
# How a teacher is measured: by what an attack leaves; it has hardly anything that bounds could prove.
TEACHER_LADDER = VerificationOptions(rungs=("pgd",))


@runtime_checkable
class Listener(Protocol):
    """Who is told how far a run is."""

    def epoch(self, report: EpochReport, row: dict[str, Any]) -> None:
        """An epoch is done; the row is that of the curves."""

    def rung(self, network: str, rung: str, still_open: int, num_images: int) -> None:
        """A rung of a network's verification is done."""

    def note(self, text: str) -> None:
        """Something worth a line."""


@dataclass(frozen=True)
class Evaluation:
    """The images that networks are measured on."""

    part: Part
    images: ImageSet

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the images and labels: another test set in the same place is another one."""
        digest = hashlib.sha256(repr(tuple(self.images.images.shape)).encode())
        for array in (self.images.images.numpy(), self.images.labels.numpy()):
            digest.update(array.reshape(-1).data)
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Trained:
    """A network of the folder, as it is stored there."""

    network: Network
    weights_sha256: str
    metadata: dict[str, Any]

    @classmethod
    def read(cls, place: Path) -> "_Trained":
        try:
            network, metadata = checkpoint.load(place), checkpoint.load_description(place)["metadata"]
        except CorruptCheckpointError as error:
            raise RunFolderError(f"{error}; delete {place} to make it again") from error
        return cls(network, checkpoint.weights_sha256(network), metadata)


@contextmanager
def claimed(folder: Path, recipe: RecipeFile) -> Iterator[None]:
    """Hold the folder for this recipe, alone.

    What the recipe may change there (`_is_free`) is written down once all went well: only then is it known that the
    images are the same.

    Raises:
        RunFolderError: it cannot be written, or belongs to something else.
        LockedError: another process works there.
    """
    with held(folder, "recipe.yaml"):
        _check_owner(folder, recipe)
        for leftover in [*folder.glob(".teacher.*"), *folder.glob(".student.*")]:  # of a kill in mid-write
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield
        if (folder / "recipe.yaml").exists() and load_recipe_file(folder / "recipe.yaml") != recipe:
            _write_recipe(folder, recipe)


def _check_owner(folder: Path, recipe: RecipeFile) -> None:
    file = folder / "recipe.yaml"
    if not file.exists():
        return
    for key, there, asked in differing_keys(load_recipe_file(file).tree(), recipe.tree()):
        if not _is_free(key):
            raise RunFolderError(
                f"{folder} holds another training: there {key} is {there}, now it is {asked}; "
                "choose another folder with --out DIR, or delete that one"
            )


def _write_recipe(folder: Path, recipe: RecipeFile) -> None:
    write_text(folder / "recipe.yaml", yaml.safe_dump(recipe.tree(), sort_keys=False))


def _is_free(key: str) -> bool:
    """Whether a value may change without another training.

    Where the images lie is no part of what they are: their fingerprint is checked. A verification that ran out of
    memory after days of training is asked for again in smaller batches.
    """
    return key == "data.path" or key.partition(".")[0] == "verification"


def finished_summary(folder: Path, recipe: RecipeFile, part: Part | None) -> dict[str, Any] | None:
    """The summary of a finished run that was verified as asked for on this part of the data, or None.

    It is that of the student beside it, and of images in the place where they were.

    Raises:
        RunFolderError: the student is damaged.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (FileNotFoundError, ValueError):  # unreadable: it is made again from the files that it sums up
        return None
    asked = {"evaluated_on": part, "verification": recipe.tree()["verification"]}
    if not isinstance(summary, dict) or not summary.items() >= asked.items() or not (folder / "student").exists():
        return None
    if load_recipe_file(folder / "recipe.yaml").data.path != recipe.data.path:  # they may be others there
        return None
    same = summary.get("weights_sha256") == _Trained.read(folder / "student").weights_sha256
    return summary if same else None


class Curves:
    """The rows of all epochs, written whole each time: a kill leaves the old file or the new one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            self._rows: dict[tuple[str, int], dict[str, Any]] = {(row["phase"], row["epoch"]): row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"{path} is damaged ({error}); delete it to make it again") from error

    def put(self, row: dict[str, Any]) -> None:
        """Add an epoch's row, in the place of one that is there."""
        self._rows[row["phase"], row["epoch"]] = row
        self._write()

    def complete(self, phase: Phase, history: list[dict[str, float]]) -> None:
        """Add the epochs that a kill kept from being told: the training's own state remembers them."""
        for epoch, metrics in enumerate(history, 1):
            self._rows.setdefault((phase, epoch), {"phase": phase, "epoch": epoch, **metrics})
        self._write()

    def _write(self) -> None:
        rows = sorted(self._rows.values(), key=lambda row: (row["phase"] != "teacher", row["epoch"]))
        write_text(self.path, "".join(f"{json.dumps(row)}\n" for row in rows))


@dataclass
class Run:
    """One training, from whatever its folder already holds to its summary; the folder is `claimed`."""

    recipe: RecipeFile
    folder: Path
    dataset: Dataset
    evaluation: Evaluation | None
    device: torch.device
    listener: Listener
    state_interval: float = 0.0  # seconds between two training states at least

    def finish(self) -> dict[str, Any]:
        """Do what is not done yet.

        Raises:
            NonFiniteLossError: a training diverged.
            CorruptCheckpointError: a training state to go on from is damaged.
            RunFolderError: another file is damaged, or does not belong to the others.
            ValueError: the recipe asks for what does not go together.
        """
        if not (self.folder / "recipe.yaml").exists():
            _write_recipe(self.folder, self.recipe)
        self._commit = source_commit()
        self._curves = Curves(self.folder / "curves.jsonl")
        trained: dict[str, _Trained] = {}
        teacher_accuracies = None
        if self.recipe.needs_teacher:
            trained["teacher"] = self._teacher()
            teacher_accuracies = self._measured("teacher", trained["teacher"], TEACHER_LADDER)
        student = trained["student"] = self._student(trained.get("teacher"))
        student_accuracies = self._measured("student", student, self.recipe.verification)
        images = self.recipe.student.epochs * len(self.dataset.train)
        seconds = {"teacher": 0.0} | {phase: each.metadata["seconds"] for phase, each in trained.items()}
        summary = {
            "name": self.recipe.name,
            "evaluated_on": None if self.evaluation is None else self.evaluation.part,
            "verification": self.recipe.tree()["verification"],
            "student": student_accuracies,
            "teacher": teacher_accuracies,
            "seconds": seconds,
            "images_per_second": images / max(seconds["student"], 1e-9),
            "weights_sha256": student.weights_sha256,
            "data": self.dataset.fingerprint,
            "seed": self.recipe.seed,
            "precision": {phase: each.metadata.get("precision") for phase, each in trained.items()},
            "commit": {phase: each.metadata.get("commit") for phase, each in trained.items()},
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine(),
        }
        write_text(self.folder / "summary.json", json.dumps(summary, indent=1))
        return summary

    def _teacher(self) -> _Trained:
        config = self.recipe.teacher
        assert config is not None  # the recipe was checked

        def train(state: Path) -> TrainingResult:
            return train_teacher(
                self.dataset,
                self.recipe.threat,
                config,
                device=self.device,
                state_path=state,
                state_interval=self.state_interval,
                on_epoch=self._on_epoch,
            )

        return self._trained("teacher", train, {})

    def _student(self, teacher: _Trained | None) -> _Trained:
        def train(state: Path) -> TrainingResult:
            return train_student(
                self.dataset,
                self.recipe.threat,
                self.recipe.student,
                None if teacher is None else teacher.network,
                device=self.device,
                state_path=state,
                state_interval=self.state_interval,
                on_epoch=self._on_epoch,
            )

        trained = self._trained("student", train, {} if teacher is None else {"teacher": teacher.weights_sha256})
        if teacher is not None and trained.metadata.get("teacher", teacher.weights_sha256) != teacher.weights_sha256:
            place = self.folder / "student"
            raise RunFolderError(f"{place} was trained with another teacher than the one beside it; delete {place}")
        return trained

    def _trained(self, phase: Phase, train: Callable[[Path], TrainingResult], origin: dict[str, str]) -> _Trained:
        """The network of a phase; from disk if it is there."""
        place, state = self.folder / phase, self.folder / f"{phase}.state.safetensors"
        if not place.exists():
            if phase == "student":  # a summary that is there is not about the network that comes
                (self.folder / "summary.json").unlink(missing_ok=True)
            result = train(state)
            metadata = {
                "recipe": self.recipe.tree(),
                "data": self.dataset.fingerprint,
                "seconds": result.seconds,
                "precision": result.precision,
                "commit": self._commit,
                "history": result.history,
            }
            checkpoint.save(place, result.network, metadata | origin)
        state.unlink(missing_ok=True)
        trained = _Trained.read(place)
        if trained.metadata["data"] != self.dataset.fingerprint:
            raise RunFolderError(f"{place} was trained on other images than those of the recipe; delete {self.folder}")
        self._curves.complete(phase, trained.metadata["history"])
        trained.network.to(self.device)
        return trained

    def _on_epoch(self, report: EpochReport) -> None:
        row: dict[str, Any] = {"phase": report.phase, "epoch": report.epoch, **report.metrics}
        row |= {"seconds": report.seconds, "images_per_second": len(self.dataset.train) / max(report.seconds, 1e-9)}
        if report.phase == "student" and len(self.dataset.validation) > 0:
            images = to_pixels(self.dataset.validation.images[:PROBE_IMAGES]).to(self.device)
            labels = self.dataset.validation.labels[:PROBE_IMAGES].to(self.device)
            standard, certified = quick_accuracies(report.network, images, labels, self.recipe.threat)
            row |= {"validation_standard_accuracy": standard, "validation_ibp_certified_accuracy": certified}
        self._curves.put(row)
        self.listener.epoch(report, row)

    def _measured(self, phase: Phase, trained: _Trained, ladder: VerificationOptions | None) -> dict[str, Any] | None:
        """The accuracies of a network, or None when the recipe or its data ask for none."""
        if ladder is None or self.evaluation is None:
            return None
        table, made = self._verdicts(phase, trained, ladder, self.evaluation)
        measured = accuracies(table)
        numbers = {
            "standard_accuracy": measured.standard,
            "adversarial_accuracy": measured.adversarial,
            "num_images": measured.num_images,
            "verification_seconds": made["seconds"],
            "verification_commit": made["commit"],
        }
        if phase == "student":
            numbers |= {"certified_accuracy": measured.certified, "certified_upper": measured.certified_upper}
        return numbers

    def _verdicts(
        self, phase: Phase, trained: _Trained, ladder: VerificationOptions, evaluation: Evaluation
    ) -> tuple[pa.Table, dict[str, Any]]:
        """The verdicts about a network, and how they were made; from disk if they are about it and these images."""
        path = self.folder / ("verdicts.parquet" if phase == "student" else f"{phase}_verdicts.parquet")
        images = evaluation.images
        config = VerifyConfig(threat=self.recipe.threat, **dict(ladder))
        about = {
            "evaluated_on": evaluation.part,
            "verification": fingerprint(config),
            "images": evaluation.fingerprint,
            "weights_sha256": trained.weights_sha256,
        }
        if path.exists():
            table, made = _read_verdicts(path)
            if made.items() >= about.items():
                return table, made
        started = time.perf_counter()
        table = verify(
            trained.network,
            to_pixels(images.images),
            images.labels,
            config,
            on_rung=lambda rung, still_open: self.listener.rung(phase, rung, still_open, len(images)),
        )
        made = {**about, "seconds": time.perf_counter() - started, "commit": self._commit}
        table = table.replace_schema_metadata({"run": json.dumps(made)})
        write_table(path, table)
        return table, made


def _read_verdicts(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    try:
        table = pq.read_table(path)
        return table, dict(json.loads(table.schema.metadata[b"run"]))
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's own errors are among them
        raise RunFolderError(f"{path} is damaged ({error}); delete it to make it again") from error
