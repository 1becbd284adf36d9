"""Where a search keeps things: the study's database, the artefacts, the tracking store. Separate settings."""

import functools
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from ccdist import checkpoint
from search.artifacts import remote_files
from search.artifacts.artifact_place import ArtifactPlace
from search.artifacts.disk_space import StorageAwayError
from search.artifacts.mirror import Mirror
from search.artifacts.mounts import current_mounts, network_file_system
from search.artifacts.remote_files import UnreachableError, one_line
from search.artifacts.store_lock import store_lock
from search.artifacts.trial_copies import Choice
from search.artifacts.workplace import Workplace
from search.clusters.sight import STUDY_MARK
from search.config import SearchConfig, load_search_config
from search.errors import UserError
from search.studies.database import missing_file, sqlite_file
from search.studies.driver_lock import DriverLock, file_lock, study_lock
from search.studies.formats import UNMARKED
from search.studies.study_record import stored_artifacts, stored_identifier
from search.teachers import TeacherStore
from tracking.address import HOW_TO_LOG_IN, URI, Address, AddressError, is_server, shown

DEFAULT_STORAGE = "runs"
_TRACKING_SCHEMES = ("http://", "https://", "sqlite:///", "postgresql", "mysql")

log = logging.getLogger(__name__)


class StorageError(UserError):
    """A storage place cannot be used."""


@dataclass(frozen=True)
class Storage:
    """The places of one search, absolute, since workers may have another working directory."""

    folder: Path  # the local tracking store
    study_url: str
    artifacts: Path  # with an object store: the driver's copy of what is there
    # The space file's, else that of MLflow's own variable, without a login; None: the local store in `folder`.
    tracking_uri: str | None
    artifacts_uri: str | None = None  # the object store's folder that workers write; None: they write `artifacts`

    @classmethod
    def of(cls, config: SearchConfig, directory: str | None) -> "Storage":
        """From `--storage DIR`, which sets everything, else from the space file, else the default folder."""
        folder = Path(directory or DEFAULT_STORAGE).resolve()
        study_url = None if directory else config.storage.study
        artifacts, uri = artifacts_of(None if directory else config.storage.artifacts, folder)
        return cls(folder, study_url or default_study_url(folder), artifacts, _tracking_address(config), uri)

    @classmethod
    def asked_for(cls, config: SearchConfig, directory: str | None, settings: Sequence[str]) -> "Storage":
        """As `of`, for a command line that may also set places of the space file.

        Raises:
            StorageError: it names a place twice.
        """
        places = [setting.partition("=")[0] for setting in settings if re.match(r"storage(\.\w+)?=", setting)]
        if directory and places:
            raise StorageError(f"--storage sets what --set {places[0]} does; leave one of them out")
        return cls.of(config, directory)

    @property
    def workers_artifacts(self) -> Path | str:
        """Where workers write: a folder that all of them reach, or the address of an object store's."""
        return self.artifacts_uri or self.artifacts

    def study_folder(self, study: str) -> Path:
        return self.artifacts / study

    def journals(self, study: str) -> Path:
        return self.study_folder(study) / "journal"

    @property
    def teachers(self) -> Path | str:
        return self.artifacts / "teachers" if self._place is None else self._place.below("teachers")

    @property
    def _place(self) -> ArtifactPlace | None:
        return None if self.artifacts_uri is None else ArtifactPlace(self.artifacts_uri)

    def workplace(self, study: str) -> Workplace:
        """What every worker of a study is told; to be asked for by its only driver.

        Raises:
            StorageError: the object store does not answer.
        """
        mirror = self.mirror(study)
        if mirror is not None:
            with self._one_line():
                return Workplace(str(self.workers_artifacts), study, mirror.epoch)
        return Workplace(str(self.artifacts), study, identifier=self.identifier(study))

    def mirror(self, study: str) -> Mirror | None:
        """The study in the object store, one object for each process; None: its artefacts are in a folder.

        Raises:
            StorageError: the store does not answer.
        """
        if self.artifacts_uri is None:
            return None
        # A driver, or a report: who started it can start it again.
        with self._one_line(), remote_files.impatient():
            return _mirror(self.artifacts_uri, study, self.artifacts, self.tracking_uri)

    def prepare(self) -> None:
        """Make the folders, and try to write in each.

        Raises:
            StorageError: one cannot be written, or the study's database would lie on another machine's disk.
        """
        if self._place is not None:
            self._place.check()
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
            StorageError: the folder holds another study of that name, such as one whose database was deleted, or trials
                that the object store lacks, or that does not answer.
        """
        mirror, mark = self.mirror(study), self.study_folder(study) / STUDY_MARK
        if mirror is not None:
            with self._one_line():
                self._check_origin(mirror)
                self._claim_store(mirror, identifier)
        mark.parent.mkdir(parents=True, exist_ok=True)
        is_known = mirror is not None or identifier.startswith(UNMARKED)  # trials may be here: those of the store
        if not mark.exists() and (is_known or not (mark.parent / "trials").exists()):
            mark.write_text(identifier)
        if not mark.exists() or mark.read_text() != identifier:
            raise StorageError(
                f"{mark.parent} holds the trials of another study of that name; move it away, or choose another name "
                "(--set name=...) or another --storage"
            )

    def _claim_store(self, mirror: Mirror, identifier: str) -> None:
        owner = mirror.owner()
        if owner is None and mirror.is_empty():
            mirror.set_owner(identifier)
        elif owner != identifier:
            raise self._foreign(mirror.study)

    def _foreign(self, study: str) -> StorageError:
        return StorageError(
            f"{self._place} holds the trials of another study named {study}; choose another name "
            "(--set name=...), or another storage.artifacts"
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
            StorageError, CorruptCheckpointError: so it is with the object store.
        """
        self._check_there()
        with ExitStack() as stack:
            locks = [
                stack.enter_context(study_lock(self.study_url, study)),
                stack.enter_context(file_lock(self.artifacts / "locks" / f"{study}.lock")),
            ]
            if self._place is not None:
                with self._one_line():
                    locks.append(stack.enter_context(store_lock(self._place, study, self.study_url)))
            # Nobody else changes what is there from here on.
            self.pull(study)
            try:
                yield DriverLock(locks)
            finally:
                self.push_study(study)

    def check_unfinished(self, study: str, keys: list[str]) -> None:
        """Read every checkpoint that unfinished trials will go on from, before anything starts.

        Raises:
            CorruptCheckpointError: one is damaged; nothing was changed.
            StorageError: the object store does not answer.
        """
        mirror = self.mirror(study)
        if mirror is not None:
            # To fetch them all would take as long as to begin: each is compared with its hash when a worker has it.
            with self._one_line():
                missing = mirror.check(keys)
            if missing:
                raise checkpoint.CorruptCheckpointError(
                    f"{self._place} lacks {missing[0]}{f' and {len(missing) - 1} more files' if missing[1:] else ''}; "
                    "restore it from a copy"
                )
            return
        TeacherStore.of(self.teachers).check()
        trials = self.study_folder(study) / "trials"
        for state in (trials / key / "state.safetensors" for key in keys):
            if state.exists():
                checkpoint.load_state(state)
        for student in (trials / key / "student" for key in keys):
            if student.exists():
                _read_network(student)

    # ---- With an object store; each does nothing with a folder ---------------------------------------------------

    def pull(self, study: str, choice: Choice | None = None) -> None:
        """Bring what the store has of a study into this machine's folder.

        Args:
            choice: as for `Mirror.pull`; else only a driver may bring it, whose own files these are.

        Raises:
            StorageError: the store does not answer, or has another study of that name than this folder, or lacks
                trials that are here.
            CorruptCheckpointError: it has something else than what was written there.
        """
        mirror = self.mirror(study)
        if mirror is None:
            return
        self._check_there()
        with self._one_line():
            owner, own = mirror.owner(), self.identifier(study)
            if owner is not None and own not in ("", owner):
                raise StorageError(
                    f"{self.study_folder(study)} is a copy of another study than the one in {self._place}; move it away"
                )
            if choice is None:
                if owner is not None and not own and owner != stored_identifier(self.study_url, study):
                    raise self._foreign(study)  # before its files are here
                self._check_origin(mirror)
                mirror.pull_study()
            mirror.pull(choice)

    def _check_origin(self, mirror: Mirror) -> None:
        """Refuse a study whose trials were kept elsewhere: to the workers they would be lost, and soon to all."""
        if lacking := mirror.lacking():
            raise StorageError(
                f"{mirror.root} holds trials that {self._place} lacks ({len(lacking)}, such as {lacking[0]}): a "
                "study's artefacts are not moved there; go on where they are (storage.artifacts as before), or start "
                "another study (--set name=...)"
            )

    def _check_there(self) -> None:
        """A listing tells a bucket that is not there from an empty one no more than a folder.

        Raises:
            StorageError: the object store is not there, or does not answer.
        """
        if self._place is not None:
            with self._one_line():
                self._place.check_there()

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """What an object store raises, as the user's to mend.

        Raises:
            StorageError: instead of the store's.
        """
        try:
            yield
        except (UnreachableError, OSError) as error:
            raise StorageError(f"storage {self._place} cannot be used ({one_line(error)})") from error

    @contextmanager
    def following(self, study: str) -> Iterator[None]:
        """Bring what workers store, in the background."""
        mirror = self.mirror(study)
        with nullcontext() if mirror is None else mirror.following():
            yield

    def pull_trials(self, study: str) -> None:
        """Bring all that workers have stored."""
        self._told(study, lambda mirror: mirror.pull())

    def push_ends(self, study: str, keys: Iterable[str]) -> None:
        """Store the ends that the driver has written into the journals of trials."""
        self._told(study, lambda mirror: mirror.push_ends(keys))

    def push_study(self, study: str) -> None:
        """Store the study's own files."""
        self._told(study, lambda mirror: mirror.push_study())

    def _told(self, study: str, action: Callable[[Mirror], None]) -> None:
        """Do it; a store that stays away is told of, since the next command does what is left."""
        try:
            mirror = self.mirror(study)
            if mirror is not None:
                with self._one_line():
                    action(mirror)
        except (StorageError, StorageAwayError, checkpoint.CorruptCheckpointError) as error:
            log.warning("%s is not complete (%s); the same command completes it", self._place, error)


@functools.cache
def _mirror(uri: str, study: str, artifacts: Path, destination: str | None) -> Mirror:
    return Mirror(ArtifactPlace(uri), study, artifacts, destination)


def artifacts_of(text: str | None, folder: Path) -> tuple[Path, str | None]:
    """The local folder of the artefacts, and the address where they are if that is an object store's.

    Args:
        text: a folder or an address; None: the one in the storage folder.
    """
    if text is not None and "://" in text:
        return folder / "artifacts", ArtifactPlace.of(text).uri
    return (Path(text).resolve() if text else folder / "artifacts"), None


def place_of(study: str, directory: str | None, study_url: str | None, artifacts: str | None) -> tuple[Storage, str]:
    """The places of a study that is there, and its name, as a command line that looks at it has them.

    Args:
        study: its name, or its space file.
        directory: the search's storage folder; None: as the space file says, else the default folder.
        study_url: its database, where it is not there.
        artifacts: folder or address of its artefacts, if not there; None: also the address that the study remembers.
    """
    path = Path(study)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        config = load_search_config(path)
        storage, name = Storage.of(config, directory), config.study_name
    else:
        folder, name = Path(directory or DEFAULT_STORAGE).resolve(), study
        storage = Storage(folder, default_study_url(folder), folder / "artifacts", None)
    storage = replace(storage, study_url=study_url or storage.study_url)
    if artifacts:
        local, uri = artifacts_of(artifacts, storage.folder)
        return replace(storage, artifacts=local, artifacts_uri=uri), name
    if storage.artifacts_uri is None and not directory:
        storage = replace(storage, artifacts_uri=stored_address(storage.study_url, name))
    return storage, name


def stored_address(study_url: str, study: str) -> str | None:
    """Where the study's artefacts were kept when a search last opened it, if that is an object store.

    Raises:
        StudyError: the database cannot be read.
    """
    if missing_file(study_url) is not None:
        return None  # who reads the study says so
    artifacts = stored_artifacts(study_url, study)
    return artifacts if artifacts is not None and "://" in artifacts else None


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
