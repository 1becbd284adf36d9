"""Where one trial keeps its files, and what stays of them when it is over.

While it runs: the last training state, `rungs.json`, what it spent on its teacher, a folder for the state of the
verification. Afterwards: the student's weights, its program for MLflow, the verdicts and the result.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from ccdist import atomic_files
from search.studies.records import TrialResult


@dataclass(frozen=True)
class TrialPlaces:
    """Where one trial keeps its files."""

    folder: Path
    journal: Path
    teachers: Path | str  # a folder, or its address in an object store

    @classmethod
    def of(cls, artifacts: Path, study: str, key: str, teachers: Path | str | None = None) -> "TrialPlaces":
        root = artifacts / study
        return cls(root / "trials" / key, root / "journal" / f"{key}.jsonl", teachers or artifacts / "teachers")

    @property
    def lock(self) -> Path:
        return self.folder / "lock"

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    @property
    def student(self) -> Path:
        return self.folder / "student"

    @property
    def model(self) -> Path:
        """The student as MLflow is to keep it."""
        return self.folder / "model"

    @property
    def graphs(self) -> Path:
        """What the programs of a study's students have in common."""
        return self.journal.parents[1] / "graphs"

    @property
    def state(self) -> Path:
        """The training state of the student, of the whole recipe."""
        return self.folder / "state.safetensors"

    @property
    def stages(self) -> Path:
        """Training states of shortened recipes."""
        return self.folder / "stages"

    @property
    def rungs(self) -> Path:
        """The rungs that were reached."""
        return self.folder / "rungs.json"

    @property
    def teacher_seconds(self) -> Path:
        """What this trial spent on its teacher: the teacher itself does not say who trained it."""
        return self.folder / "teacher_seconds"

    @property
    def verification(self) -> Path:
        """The state of a verification."""
        return self.folder / "verification"

    @property
    def verdicts(self) -> Path:
        return self.folder / "verdicts.parquet"

    @property
    def verdicts_shown(self) -> Path:
        """The first rows of the verdicts, for a page."""
        return self.folder / "verdicts_head.json"


def load_result(places: TrialPlaces) -> TrialResult | None:
    """The result that a trial left behind, or None if it did not finish."""
    try:
        return TrialResult(**json.loads(places.result.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        places.result.unlink()  # unreadable: the trial is verified again from its student
        return None


def save_result(places: TrialPlaces, result: TrialResult) -> None:
    """Write the result in one step: the last of a trial's files."""
    atomic_files.write_text(places.result, json.dumps(asdict(result), indent=1))


def discard(places: TrialPlaces) -> None:
    """Delete what only a trial that goes on needs, and what kills have left unfinished."""
    for folder in (places.stages, places.verification):
        shutil.rmtree(folder, ignore_errors=True)
    unfinished = places.folder.glob(".*")
    for path in (places.state, places.rungs, places.teacher_seconds, *unfinished):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
