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
from search.formats import UNMARKED
from search.mounts import current_mounts, network_file_system
from search.teachers import TeacherStore
from tracking.address import HOW_TO_LOG_IN, URI, Address, AddressError, is_server, shown

DEFAULT_STORAGE = "runs"
STUDY_MARK = "study.id"
_TRACKING_SCHEMES = ("http://", "https://", "sqlite:///", "postgresql", "mysql")


class StorageError(UserError):
    """A storage place cannot be used."""


@dataclass(frozen=True)
class Storage:
    """The places of one search, absolute, since workers may have another working directory."""

    folder: Path  # the local tracking store
    study_url: str
    artifacts: Path
    # The space file's, else that of MLflow's own variable, without a login; None: the local store in `folder`.
    tracking_uri: str | None

    @classmethod
    def of(cls, config: SearchConfig, directory: str | None) -> "Storage":
        """From `--storage DIR`, which sets everything, else from the space file, else the default folder."""
        folder = Path(directory or DEFAULT_STORAGE).resolve()
        study_url = None if directory else config.storage.study
        artifacts = None if directory else config.storage.artifacts
        if artifacts is not None and "://" in artifacts:
            raise StorageError(f"storage.artifacts is {shown(artifacts)}; expected a folder that all workers can reach")
        return cls(
            folder,
            study_url or default_study_url(folder),
            Path(artifacts).resolve() if artifacts else folder / "artifacts",
            _tracking_address(config),
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

        The first studies marked none; one of those takes the folder of its name.

        Raises:
            StorageError: the folder holds another study of that name, such as one whose database was deleted.
        """
        mark = self.study_folder(study) / STUDY_MARK
        mark.parent.mkdir(parents=True, exist_ok=True)
        if not mark.exists() and (identifier.startswith(UNMARKED) or not (mark.parent / "trials").exists()):
            mark.write_text(identifier)
        if not mark.exists() or mark.read_text() != identifier:
            raise StorageError(
                f"{mark.parent} holds the trials of another study of that name; move it away, or choose another name "
                "(--set name=...) or another --storage"
            )

    def identifier(self, study: str) -> str:
        """The identifier of the study that the folder belongs to; empty: it has not been claimed."""
        mark = self.study_folder(study) / STUDY_MARK
        return mark.read_text() if mark.exists() else ""

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


def _tracking_address(config: SearchConfig) -> str | None:
    """Where the study is tracked, as it may be stored: a login stays in the environment, where it is found again.

    Raises:
        StorageError: it is no address, or the space file holds a login; the text does not.
    """
    in_file = config.tracking.uri
    uri = in_file or os.environ.get(URI)
    if not uri or (not in_file and not config.tracking.enabled):
        return None
    if config.tracking.enabled and not uri.startswith(_TRACKING_SCHEMES):
        raise StorageError(
            f"tracking.uri (or {URI}) is {shown(uri)}; expected a server such as "
            "http://host:5000, or a database URL; --set tracking.enabled=false does without"
        )
    try:
        address = Address.of(uri)
    except AddressError as error:
        raise StorageError(f"tracking.uri (or {URI}) {error}") from None
    if in_file and address.has_secret:
        advice = HOW_TO_LOG_IN if is_server(uri) else f"set {URI} to the whole address, or use PGPASSWORD or ~/.pgpass"
        raise StorageError(
            f"tracking.uri {shown(uri)} holds a login, and space files are stored and shared; "
            f"write {address.open} and {advice}"
        )
    return address.open


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
    except checkpoint.NewerFormatError:
        raise
    except checkpoint.CorruptCheckpointError as error:
        raise checkpoint.CorruptCheckpointError(
            f"{error}; restore it from a copy, or delete {folder} and it is trained again"
        ) from error
