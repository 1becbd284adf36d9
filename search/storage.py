"""Where a search keeps things: the study's database, the artefacts, the tracking store. Separate settings."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ccdist import checkpoint
from search.config import SearchConfig
from search.database import sqlite_file
from search.driver_lock import DriverLock, file_lock, study_lock
from search.errors import UserError
from search.mounts import current_mounts, network_file_system
from search.teachers import TeacherStore

DEFAULT_STORAGE = "runs"
_TRACKING_SCHEMES = ("http://", "https://", "sqlite:///", "postgresql", "mysql")


class StorageError(UserError):
    """A storage place cannot be used."""


@dataclass(frozen=True)
class Storage:
    """The places of one search, absolute, since workers may have another working directory."""

    folder: Path  # the local tracking store
    study_url: str
    artifacts: Path
    tracking_uri: str | None  # the space file's, else MLflow's own variable; None: the local store in `folder`

    @classmethod
    def of(cls, config: SearchConfig, directory: str | None) -> "Storage":
        """From `--storage DIR`, which sets everything, else from the space file, else the default folder."""
        folder = Path(directory or DEFAULT_STORAGE).resolve()
        study_url = None if directory else config.storage.study
        artifacts = None if directory else config.storage.artifacts
        if artifacts is not None and "://" in artifacts:
            raise StorageError(f"storage.artifacts is {artifacts}; expected a folder that all workers can reach")
        tracking_uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if config.tracking.enabled and tracking_uri and not tracking_uri.startswith(_TRACKING_SCHEMES):
            raise StorageError(
                f"tracking.uri (or MLFLOW_TRACKING_URI) is {tracking_uri}; expected a server such as "
                "http://host:5000, or a database URL; --set tracking.enabled=false does without"
            )
        return cls(
            folder,
            study_url or default_study_url(folder),
            Path(artifacts).resolve() if artifacts else folder / "artifacts",
            tracking_uri,
        )

    def study_folder(self, study: str) -> Path:
        return self.artifacts / study

    def journals(self, study: str) -> Path:
        return self.study_folder(study) / "journal"

    @property
    def teachers(self) -> Path:
        return self.artifacts / "teachers"

    def prepare(self) -> None:
        """Make the folders, and try to write in each.

        Raises:
            StorageError: one cannot be written, or the study's database would lie on another machine's disk.
        """
        database = sqlite_file(self.study_url)
        for folder in dict.fromkeys([self.folder, self.artifacts, *([database.parent] if database else [])]):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=folder):
                    pass
            except OSError as error:
                raise StorageError(
                    f"storage {folder} cannot be written ({error.strerror}); choose another with --storage DIR"
                ) from error
        if database is not None:
            check_local(database, current_mounts())

    def claim(self, study: str, identifier: str) -> None:
        """Mark the study's folder as its own, or check that it is: trials there are trusted by their keys.

        Raises:
            StorageError: the folder holds another study of that name, such as one whose database was deleted.
        """
        mark = self.study_folder(study) / "study.id"
        mark.parent.mkdir(parents=True, exist_ok=True)
        if not mark.exists() and not (mark.parent / "trials").exists():
            mark.write_text(identifier)
        if not mark.exists() or mark.read_text() != identifier:
            raise StorageError(
                f"{mark.parent} holds the trials of another study of that name; move it away, or choose another name "
                "(--set name=...) or another --storage"
            )

    @contextmanager
    def only_driver(self, study: str) -> Iterator[DriverLock]:
        """One driver for a study, whatever folder it was started from: locks with its database and its artefacts.

        Raises:
            LockedError: another driver lives.
            StudyError: the database cannot be reached.
        """
        with ExitStack() as stack:
            locks = [
                stack.enter_context(study_lock(self.study_url, study)),
                stack.enter_context(file_lock(self.artifacts / "locks" / f"{study}.lock")),
            ]
            yield DriverLock(locks)

    def check_unfinished(self, study: str, keys: list[str]) -> None:
        """Read every checkpoint that unfinished trials will go on from, before anything starts.

        Raises:
            CorruptCheckpointError: one is damaged; nothing was changed.
        """
        TeacherStore.of(self.teachers).check()
        trials = self.study_folder(study) / "trials"
        for state in (trials / key / "state.safetensors" for key in keys):
            if state.exists():
                checkpoint.load_state(state)
        for student in (trials / key / "student" for key in keys):
            if student.exists():
                _read_network(student)


def check_local(database: Path, mounts: str) -> None:
    """Refuse an SQLite database on a network file system: its locks and its shared memory work on one machine only.

    Raises:
        StorageError: it lies on one, by the table of mounts.
    """
    found = network_file_system(database.resolve(), mounts)
    if found is not None:
        point, kind = found
        raise StorageError(
            f"study database {database} lies on {point}, a network file system ({kind}), where SQLite loses data; set "
            "storage.study to sqlite:///FILE on a local disk or to postgresql://..., and storage.artifacts to this "
            "folder"
        )


def default_study_url(folder: Path) -> str:
    """The SQLite database in a storage folder."""
    return f"sqlite:///{folder / 'study.db'}"


def _read_network(folder: Path) -> None:
    try:
        checkpoint.load(folder)
    except checkpoint.CorruptCheckpointError as error:
        raise checkpoint.CorruptCheckpointError(
            f"{error}; restore it from a copy, or delete {folder} and it is trained again"
        ) from error
