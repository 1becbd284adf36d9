"""A driver's lock in PostgreSQL: an advisory lock of a session of its own, and what stands when that session ends.

The lock ends with its session, so a restart of the server frees it, and another driver may take it. A driver whose
session is gone waits for the server, ends what is left there of its own sessions, takes the lock again, and looks at
the mark that each driver leaves in the study: only if nobody else has left one is the study as it was. Meanwhile the
server itself refuses the driver's commits, as each looks for the lock first.

Should the driver's host be lost with no word, the server's keepalives end the session within half a minute. The
session has to reach the server itself: a proxy that shares sessions among clients would share the lock, so it is
looked for in the server's own table.
"""

import hashlib
import json
import logging
import os
import socket
import time
import uuid
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from search.artifacts.locks import LockedError
from search.studies.database import (
    POSTGRES_CONNECTION,
    DatabaseAwayError,
    DatabaseGoneError,
    postgres_url,
    without_password,
)
from search.studies.patience import PATIENCE, Patience, interruptible

log = logging.getLogger(__name__)

DRIVER = "driver"  # the study's attribute with the mark of its last driver

# A holder that just died may be in the server's table of locks and no more in its table of sessions, or the reverse.
_ATTEMPTS, _PAUSE_S = 5, 0.05
_END_ATTEMPTS = 100  # until a session that was told to end has done so
_NAME_BYTES = 63  # of an application_name; the server cuts off what is longer

_OURS = """
    l.locktype = 'advisory' AND l.granted AND l.classid = :high AND l.objid = :low AND l.objsubid = 1
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
_IS_MINE = f"SELECT count(*) FROM pg_locks l WHERE {_OURS} AND l.pid = pg_backend_pid()"
# Of a session by its process and its start: a restarted server may use a number again.
_IS_HELD = f"""
    SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
    WHERE {_OURS} AND a.pid = :pid AND a.backend_start = :since
"""
_HOLDER = f"""
    SELECT a.application_name, host(a.client_addr), to_char(a.backend_start AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')
    FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE {_OURS}
"""
_SESSION = "SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()"
_END_OTHERS = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE (application_name = :name OR (pid = :pid AND backend_start = :since)) AND pid <> pg_backend_pid()
"""
_HAS_TABLES = "SELECT to_regclass('study_user_attributes') IS NOT NULL"
_LAST_MARK = """
    SELECT a.value_json FROM study_user_attributes a JOIN studies s USING (study_id)
    WHERE s.study_name = :study AND a.key = :key
"""
# The server watches this connection as closely as the client does, and never ends it for being idle. Settings that
# an older server lacks are left out.
_SETTINGS = """
    SELECT set_config(name, value, false) FROM pg_settings JOIN (VALUES ('tcp_keepalives_idle', '10'),
        ('tcp_keepalives_interval', '5'), ('tcp_keepalives_count', '3'), ('idle_session_timeout', '0')
    ) AS wanted (name, value) USING (name)
"""


def lock_number(study: str) -> int:
    """The signed 64-bit number under which PostgreSQL knows the lock of a study."""
    digest = hashlib.sha256(f"ccdist-search driver {study}".encode()).digest()
    return int.from_bytes(digest[:8], signed=True)


class AdvisoryLock:
    """The lock of a study, taken.

    Attributes:
        mark: what the study's attribute DRIVER is to be, from the first thing that this driver writes.

    Raises:
        LockedError: another driver has it.
        SQLAlchemyError: the database cannot be reached.
    """

    def __init__(self, url: str, study: str, patience: Patience = PATIENCE) -> None:
        self.mark = uuid.uuid4().hex
        self._url, self._study, self._patience = url, study, patience
        self._number = lock_number(study)
        self._halves = {"high": (self._number >> 32) & 0xFFFFFFFF, "low": self._number & 0xFFFFFFFF}
        self._connection: Connection | None = None
        self._session: dict[str, Any] = {"pid": 0, "since": None}  # that has the lock, or had it
        self._is_lost = False
        self._gone = ""  # why it was given up without knowing of another driver
        name = f"search pid {os.getpid()} on {socket.gethostname()}".encode()[:_NAME_BYTES].decode(errors="ignore")
        self._engine = create_engine(
            postgres_url(url),
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",  # a session in a transaction would hold back the server's clean-up
            connect_args={**POSTGRES_CONNECTION, "application_name": name},
        )
        try:
            self._take()
            self._mark_before = self._last_mark()
        except BaseException:
            self.release()
            raise

    def still_held(self) -> bool:
        """Whether nobody else can have written the study since this lock was taken first.

        Waits while the server is away; Ctrl-C then raises KeyboardInterrupt, and the lock is given up.

        Raises:
            DatabaseGoneError: the server stayed away, now or at an earlier call.
        """
        if self._gone:
            raise DatabaseGoneError(self._gone)
        if not self._is_lost and not self._is_mine():
            self._is_lost = True  # whatever ends the wait
            self._is_lost = not self._taken_again()
        return not self._is_lost

    def regained(self) -> bool:
        """As `still_held`; and nothing that this driver has asked for before is still under way in the server.

        Raises:
            DatabaseGoneError: as there.
            DatabaseAwayError: something is still under way; it may be asked again.
        """
        while self.still_held():
            assert self._connection is not None
            try:
                self._end_other_sessions(self._connection)
                return True
            except SQLAlchemyError:
                continue  # the session has ended meanwhile
        return False

    def guard(self, engine: Engine) -> None:
        """Let the server refuse what this driver commits through an engine while it has no lock.

        A driver that was asleep, with its host, would otherwise go on with the write it was at.
        """
        event.listen(engine, "connect", self._name_session)
        event.listen(engine, "commit", self._check)
        engine.dispose()  # the connections without a name

    def release(self) -> None:
        self._disconnect()
        self._engine.dispose()

    # ---- One session -----------------------------------------------------------------------------------------------

    def _take(self) -> None:
        """Open a session that has the lock."""
        self._connection = connection = self._engine.connect()
        connection.execute(text(_SETTINGS))
        self._end_other_sessions(connection)
        _lock(connection, self._number, self._halves, f"study {self._study} in {without_password(self._url)}")
        pid, since = connection.execute(text(_SESSION)).one()
        self._session = {"pid": pid, "since": since}

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.invalidate()  # ends the session, and the lock with it, whatever state it is in
            self._connection.close()
            self._connection = None

    def _is_mine(self) -> bool:
        if self._connection is None:
            return False
        try:
            return bool(self._connection.execute(text(_IS_MINE), self._halves).scalar_one())
        except SQLAlchemyError:
            return False  # the session is gone, and the lock with it

    def _last_mark(self) -> str | None:
        """The mark of the last driver that wrote the study."""
        assert self._connection is not None
        if not self._connection.execute(text(_HAS_TABLES)).scalar_one():
            return None
        stored = self._connection.execute(text(_LAST_MARK), {"study": self._study, "key": DRIVER}).scalar()
        return None if stored is None else str(json.loads(stored))

    # ---- The next session ----------------------------------------------------------------------------------------

    def _taken_again(self) -> bool:
        what = f"study database {without_password(self._url)}"
        began, told = time.monotonic(), False
        with interruptible():
            for _ in self._patience.attempts():
                self._disconnect()
                try:
                    self._take()
                    is_ours = self._last_mark() in (self.mark, self._mark_before)
                except LockedError:
                    is_ours = False
                except (SQLAlchemyError, DatabaseAwayError) as error:
                    if not told:
                        limit = f"{self._patience.limit_s / 60:.0f} minutes"
                        reason = without_password(" ".join(str(getattr(error, "orig", None) or error).split()))
                        log.warning("%s is away (%s); the search waits for it, for up to %s", what, reason, limit)
                        told = True
                    continue
                if not is_ours:
                    self._disconnect()  # the other driver, or the next one, shall not be refused
                    return False
                seconds = time.monotonic() - began
                log.warning(
                    "%s answers again after %.0f s, and no other driver came; the search goes on", what, seconds
                )
                return True
        self._disconnect()
        self._gone = f"{what} did not come back within {self._patience.limit_s:.0f} s"
        raise DatabaseGoneError(self._gone)

    def _end_other_sessions(self, connection: Connection) -> None:
        """Let nothing of this driver's go on in the server: a commit that is under way there, or the old lock.

        Raises:
            DatabaseAwayError: a session that was told to end has not done so, as one that waits for a slow disk.
        """
        ours = {"name": self._sessions_name, **self._session}
        for _ in range(_END_ATTEMPTS):
            if not connection.execute(text(_END_OTHERS), ours).all():
                return
            time.sleep(_PAUSE_S)
        raise DatabaseAwayError(f"a session of this driver in {without_password(self._url)} does not end")

    # ---- The driver's other sessions -----------------------------------------------------------------------------

    @property
    def _sessions_name(self) -> str:
        return f"search {self.mark}"

    def _name_session(self, connection: Any, _: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET application_name = '{self._sessions_name}'")
        connection.commit()

    def _check(self, connection: Connection) -> None:
        if not connection.execute(text(_IS_HELD), {**self._halves, **self._session}).scalar_one():
            raise DatabaseAwayError(f"the session with the lock on study {self._study} has ended")


def _lock(connection: Connection, number: int, halves: dict[str, int], what: str) -> None:
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
