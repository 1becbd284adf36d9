"""The right to drive a study: beside an SQLite database a locked file, in PostgreSQL an advisory lock.

Both end with their process, however it dies.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from optuna.storages import BaseStorage, RDBStorage

from search.artifacts.locks import exclusive
from search.studies.advisory_lock import AdvisoryLock
from search.studies.database import is_postgres, one_line_errors, sqlite_file
from search.studies.patience import PATIENCE, Patience, interruptible


class Held(Protocol):
    """A lock that this process took."""

    def still_held(self) -> bool:
        """Whether nobody else can have had it since; once False, for ever False."""


@dataclass(frozen=True)
class DriverLock:
    """All locks of a driver together; of none: a study that has one writer anyway, such as one in memory."""

    parts: Sequence[Held] = ()

    def still_held(self) -> bool:
        """Whether this is still the study's only driver: to be asked before what it learned is written.

        Costs a look at a file's inode and, with PostgreSQL, one query. While neither can be looked at, this waits.
        False for ever once another driver may have had a part.

        Raises:
            DatabaseGoneError: the database stayed away, now or before, and the lock with it.
        """
        return all(part.still_held() for part in self.parts)

    def regained(self) -> bool:
        """As `still_held`, for a driver whose connection broke: what it asked for then is done, or will never be.

        Raises:
            DatabaseAwayError: as there, or that cannot be told yet.
        """
        advisory = (part.regained() for part in self.parts if isinstance(part, AdvisoryLock))
        return self.still_held() and all(advisory)

    @property
    def mark(self) -> str | None:
        """What tells this driver from others in a study's attribute DRIVER; None: it need not be told."""
        return next((part.mark for part in self.parts if isinstance(part, AdvisoryLock)), None)

    def guard(self, storage: BaseStorage) -> None:
        """Let nothing be committed to the study's storage without the lock in its database."""
        for part in self.parts:
            if isinstance(part, AdvisoryLock) and isinstance(storage, RDBStorage):
                part.guard(storage.engine)


@contextmanager
def study_lock(url: str, study: str) -> Iterator[Held]:
    """The lock of a study in its database.

    Raises:
        LockedError: another driver has it.
        StudyError: the database cannot be reached.
    """
    database = sqlite_file(url)
    if is_postgres(url):
        with one_line_errors(url):
            advisory = AdvisoryLock(url, study)
        try:
            yield advisory
        finally:
            advisory.release()
    elif database is not None:
        place = database.resolve()  # one file may have several names
        with file_lock(place.with_name(f"{place.name}.{study}.lock")) as locked:
            yield locked
    else:
        yield DriverLock()  # no database: to open it says so


@contextmanager
def file_lock(path: Path) -> Iterator[Held]:
    """A locked file.

    Raises:
        LockedError: another process has it.
    """
    with exclusive(path, wait=False):
        yield _FileLock(path, _inode(path))


@dataclass(frozen=True)
class _FileLock:
    path: Path
    inode: tuple[int, int] | None
    patience: Patience = PATIENCE

    def still_held(self) -> bool:
        """A deleted file stays locked, but another driver would make and lock a new one."""
        try:
            return _inode(self.path) == self.inode
        except OSError:  # a network file system that does not answer keeps its locks
            return self._found_again()

    def _found_again(self) -> bool:
        with interruptible():
            for _ in self.patience.attempts():
                try:
                    return _inode(self.path) == self.inode
                except OSError:
                    continue
        return False


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
