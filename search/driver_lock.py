"""The right to drive a study: beside an SQLite database a locked file, in PostgreSQL an advisory lock.

Both end with their process, however it dies. The advisory lock belongs to a session of its own, idle but for the
checks of `still_held`. Should the driver's host be lost with no word, the server's keepalives end that session within
half a minute. The session has to reach the server itself: a proxy that shares sessions among clients would share the
lock, so `still_held` looks for it in the server's own table.
"""

import hashlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from search.database import (
    POSTGRES_CONNECTION,
    is_postgres,
    one_line_errors,
    postgres_url,
    sqlite_file,
    without_password,
)
from search.locks import LockedError, exclusive

# A holder that just died may be in the server's table of locks and no more in its table of sessions, or the reverse.
_ATTEMPTS, _PAUSE_S = 5, 0.05
_NAME_BYTES = 63  # of an application_name; the server cuts off what is longer

_IS_MINE = """
    SELECT count(*) FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND pid = pg_backend_pid() AND classid = :high AND objid = :low
"""
_HOLDER = """
    SELECT a.application_name, host(a.client_addr), to_char(a.backend_start AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')
    FROM pg_locks l JOIN pg_stat_activity a USING (pid)
    WHERE l.locktype = 'advisory' AND l.granted AND l.classid = :high AND l.objid = :low AND l.objsubid = 1
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
# The server watches this connection as closely as the client does, and never ends it for being idle. Settings that
# an older server lacks are left out.
_SETTINGS = """
    SELECT set_config(name, value, false) FROM pg_settings JOIN (VALUES ('tcp_keepalives_idle', '10'),
        ('tcp_keepalives_interval', '5'), ('tcp_keepalives_count', '3'), ('idle_session_timeout', '0')
    ) AS wanted (name, value) USING (name)
"""


class Held(Protocol):
    """A lock that this process took."""

    def still_held(self) -> bool:
        """Whether nobody else can have it; once False, for ever False."""


@dataclass(frozen=True)
class DriverLock:
    """All locks of a driver together."""

    parts: Sequence[Held]

    def still_held(self) -> bool:
        """Whether this is still the study's only driver: to be asked before what it learned is written.

        Costs a look at a file's inode and, with PostgreSQL, one query. False for ever once a part was lost: a server
        that was restarted has freed the lock, and another driver may have it.
        """
        return all(part.still_held() for part in self.parts)


@contextmanager
def study_lock(url: str, study: str) -> Iterator[Held]:
    """The lock of a study in its database.

    Raises:
        LockedError: another driver has it.
        StudyError: the database cannot be reached.
    """
    database = sqlite_file(url)
    if is_postgres(url):
        with _advisory(url, study) as advisory:
            yield advisory
    elif database is not None:
        place = database.resolve()  # one file may have several names
        with file_lock(place.with_name(f"{place.name}.{study}.lock")) as locked:
            yield locked
    else:
        yield DriverLock(())  # no database: to open it says so


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

    def still_held(self) -> bool:
        """A deleted file stays locked, but another driver would make and lock a new one."""
        return _inode(self.path) == self.inode


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _AdvisoryLock:
    def __init__(self, connection: Connection, halves: dict[str, int]) -> None:
        self._connection = connection
        self._halves = halves
        self._lost = False

    def still_held(self) -> bool:
        if not self._lost:
            try:
                self._lost = self._connection.execute(text(_IS_MINE), self._halves).scalar_one() == 0
            except SQLAlchemyError:
                self._lost = True  # the session is gone, and the lock with it
        return not self._lost


@contextmanager
def _advisory(url: str, study: str) -> Iterator[Held]:
    number = lock_number(study)
    halves = {"high": (number >> 32) & 0xFFFFFFFF, "low": number & 0xFFFFFFFF}
    name = f"search pid {os.getpid()} on {socket.gethostname()}".encode()[:_NAME_BYTES].decode(errors="ignore")
    with one_line_errors(url):
        engine = create_engine(
            postgres_url(url),
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",  # a session in a transaction would hold back the server's clean-up
            connect_args={**POSTGRES_CONNECTION, "application_name": name},
        )
        connection = engine.connect()
    try:
        with one_line_errors(url):
            connection.execute(text(_SETTINGS))
            _take(connection, number, halves, f"study {study} in {without_password(url)}")
        yield _AdvisoryLock(connection, halves)
    finally:
        connection.invalidate()  # ends the session, and the lock with it, whatever state it is in
        connection.close()
        engine.dispose()


def lock_number(study: str) -> int:
    """The signed 64-bit number under which PostgreSQL knows the lock of a study."""
    digest = hashlib.sha256(f"ccdist-search driver {study}".encode()).digest()
    return int.from_bytes(digest[:8], signed=True)


def _take(connection: Connection, number: int, halves: dict[str, int], what: str) -> None:
    for _ in range(_ATTEMPTS):
        if connection.execute(text("SELECT pg_try_advisory_lock(:number)"), {"number": number}).scalar_one():
            return
        holder = connection.execute(text(_HOLDER), halves).first()
        if holder is not None:
            name, address, since = holder
            raise LockedError(
                f"{what} is held by {name or 'another session'}{f' ({address})' if address else ''}"
                f"{f' since {since} UTC' if since else ''}: that search still runs; wait for it, or stop it first"
            )
        time.sleep(_PAUSE_S)
    raise LockedError(f"{what} is held by another session: that search still runs; wait for it, or stop it first")
