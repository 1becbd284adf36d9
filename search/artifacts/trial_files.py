"""The trials' folders and journals as the driver sees them: results found, and ends that no worker can write.

With an object store the driver changes its local copy, and what it has changed is stored before the study is told.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from search.artifacts import remote_files
from search.artifacts.disk_space import when_it_answers
from search.artifacts.mirror import Mirror
from search.artifacts.trial_copies import Chosen, is_record, is_visible
from search.studies.records import TrialResult
from search.tracked.run_names import end_tags
from search.trial import TrialPlaces, conclude_stopped, conclude_training_stopped, discard, load_result
from tracking.journal import Journal

# What tells how far a teacher is, in its folder.
TEACHER_FILES = ("state.safetensors", "teacher.json")


@dataclass(frozen=True)
class TrialFiles:
    """The files of one study's trials."""

    artifacts: Path
    study: str
    mirror: Mirror | None = None

    def places(self, key: str) -> TrialPlaces:
        return TrialPlaces.of(self.artifacts, self.study, key)

    def result(self, key: str) -> TrialResult | None:
        """The result that a trial left behind, if it finished."""
        if self.mirror is not None:
            self.mirror.pull_trial(key)
        return when_it_answers(lambda: load_result(self.places(key)))

    def stored_at(self, key: str, teacher: str | None) -> float | None:
        """Unix time of the last state that the trial stored, that of the teacher that it trains included.

        None: it stored none, or the storage does not answer.
        """
        of_teacher = [] if teacher is None else [f"{teacher}/{name}" for name in TEACHER_FILES]
        if self.mirror is not None:
            try:
                with remote_files.impatient():
                    return self.mirror.stored_at(key, of_teacher)
            except Exception:  # that account can do without; what the store says of it is told elsewhere
                return None
        places = self.places(key)
        own = (places.state, places.rungs, places.stages, places.student, places.verification)
        paths = (*own, *(Path(places.teachers) / file for file in of_teacher))
        return max((time for path in paths for time in _changes(path)), default=None)

    def end_stopped_verification(self, key: str, result: TrialResult) -> None:
        with self._ending(key, lambda path: is_visible(path) or "/verification/" in path):
            when_it_answers(lambda: conclude_stopped(self.places(key), result))

    def end_stopped_training(self, key: str, reason: str) -> None:
        with self._ending(key, is_record):
            when_it_answers(lambda: conclude_training_stopped(self.places(key), reason))

    def end_failed(self, key: str, reason: str, *, silent: bool) -> None:
        """A trial has failed for good; `silent`: its worker could not write its own end."""
        with self._ending(key, is_record):
            when_it_answers(lambda: _end_failed(self.places(key), reason, silent=silent))

    def _ending(self, key: str, wanted: Chosen) -> AbstractContextManager[None]:
        return nullcontext() if self.mirror is None else self.mirror.changing(key, wanted, ends=True)


def _end_failed(places: TrialPlaces, reason: str, *, silent: bool) -> None:
    if silent and places.journal.exists():
        with Journal(places.journal) as journal:
            journal.end("FAILED", {}, end_tags("FAILED", reason))
    discard(places)


def _changes(path: Path) -> list[float]:
    """When a file, or those in a folder, were written."""
    try:
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        return [file.stat().st_mtime for file in files]
    except OSError:
        return []
