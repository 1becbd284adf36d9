"""The database of a study: opened by URL, SQLite or PostgreSQL, and refused in one line."""

import re
import sqlite3
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from sqlalchemy import event
from sqlalchemy.engine import ExceptionContext, make_url
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

from search.errors import UserError
from tracking.address import shown

# A peer that is gone without a word is noticed within half a minute, on an idle connection and in a query alike.
POSTGRES_CONNECTION: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}
# What SQLite says while another program holds the file: SQLITE_BUSY, SQLITE_LOCKED.
_SQLITE_HELD = (5, 6)
_READ_ONLY = "25006"  # what a PostgreSQL server says that has just become a standby
_EXPECTED = "expected sqlite:///FILE or postgresql://USER@HOST:PORT/DATABASE"


class StudyError(UserError):
    """The stored study cannot be used as asked; the text says what to do."""


class DatabaseAwayError(StudyError):
    """The database does not answer, or the connection broke: what was asked of it may have been done or not."""


class DatabaseGoneError(DatabaseAwayError):
    """It stayed away for so long that this driver has given up the study, for ever."""


def sqlite_file(url: str) -> Path | None:
    """The file behind an SQLite URL; None for other databases."""
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def missing_file(url: str) -> Path | None:
    """The file behind an SQLite URL, if it is not there.

    Raises:
        StudyError: it lies in a folder that is closed to this user.
    """
    file = sqlite_file(url)
    try:
        return None if file is None or file.is_file() else file
    except OSError as error:
        raise StudyError(f"study database {file} cannot be read ({error.strerror})") from error


def is_postgres(url: str) -> bool:
    return re.match(r"postgres(ql)?(\+\w+)?://", url) is not None


def check_kind(url: str) -> None:
    """Whether it is the address of a database that studies can be in; asks no server.

    Raises:
        StudyError: it is not.
    """
    if sqlite_file(url) is None and not is_postgres(url):
        raise StudyError(f"study database {shown(url)}: {_EXPECTED}")
    if is_postgres(url):
        postgres_url(url)


def postgres_url(url: str) -> str:
    """The URL with the driver that the postgres extra installs, where it names none: SQLAlchemy's own is older.

    Raises:
        StudyError: no server can be read from it.
    """
    if url.partition("?")[0].count("@") > 1:  # what stands behind the first would be taken for the host, and shown
        raise StudyError(f"study database {shown(url)} has an @ in its user or password; write %40 for it")
    try:
        make_url(url)
    except (ValueError, ArgumentError):  # the first of a port that is no number
        raise StudyError(f"study database {shown(url)}: {_EXPECTED}") from None
    return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """The database behind a URL, whose outages from then on are of the class DatabaseAwayError.

    Raises:
        StudyError: it cannot be opened, or is none.
    """
    check_kind(url)
    with one_line_errors(url):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if is_postgres(url):
            # The ping replaces connections that a restart of the server has broken.
            options = {"pool_pre_ping": True, "connect_args": POSTGRES_CONNECTION}
            return _opened(optuna.storages.RDBStorage(postgres_url(url), engine_kwargs=options), url)
        # Write-ahead logging lets `search.front` read while a search writes; it is a property of the file.
        connection = sqlite3.connect(url.removeprefix("sqlite:///"))
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        finally:
            connection.close()
        options = {"connect_args": {"timeout": 60, "factory": _Durable}}
        return _opened(optuna.storages.RDBStorage(url, engine_kwargs=options), url)


def _opened(storage: optuna.storages.RDBStorage, url: str) -> optuna.storages.RDBStorage:
    """The storage, whose idle connections are closed when nobody uses it any more: Optuna leaves them open."""
    weakref.finalize(storage, storage.engine.dispose)

    def tell_outage(context: ExceptionContext) -> None:
        # A class that is not SQLAlchemy's: of those Optuna makes a new trial again, also where one was made.
        if not context.is_pre_ping and _is_outage(context):
            reason = without_password(" ".join(str(context.original_exception).split()))
            raise DatabaseAwayError(f"study database {without_password(url)} is away ({reason})")

    event.listen(storage.engine, "handle_error", tell_outage)
    return storage


def _is_outage(context: ExceptionContext) -> bool:
    """Whether an error passes with time."""
    original = context.original_exception
    if isinstance(original, sqlite3.Error):
        return getattr(original, "sqlite_errorcode", 0) & 0xFF in _SQLITE_HELD
    is_operational = isinstance(context.sqlalchemy_exception, OperationalError)
    return context.is_disconnect or is_operational or getattr(original, "sqlstate", None) == _READ_ONLY


class _Durable(sqlite3.Connection):
    """A connection whose commits are on the disk when they return.

    With synchronous=NORMAL a commit would survive SIGKILL, for the system holds what was written, but the last ones
    would be undone by a power loss. The artefacts of a trial that the study has forgotten would then be taken for
    those of the next trial of that number. FULL costs one fsync for each commit, of which a trial has a dozen.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA synchronous=FULL")


@contextmanager
def one_line_errors(url: str) -> Iterator[None]:
    """Turn what a database and its driver raise into one line that says what to do, without the password.

    Raises:
        StudyError: instead of theirs.
    """
    try:
        yield
    except (sqlite3.Error, SQLAlchemyError, ImportError, RuntimeError) as error:
        reason = without_password(" ".join(str(getattr(error, "orig", None) or error).split()))
        told = _postgres_advice(url, error, reason) if is_postgres(url) else None
        told = told or f"cannot be opened: {reason}"
        raise StudyError(f"study database {without_password(url)} {told}") from error


def _postgres_advice(url: str, error: Exception, reason: str) -> str | None:
    """What is wrong with a PostgreSQL server and what helps; None where only the server's own words are known."""
    if isinstance(error, ImportError):
        return "needs a driver that is not installed; install the postgres extra: pip install 'ccdist-search[postgres]'"
    # The driver gives no codes for what happens while it connects.
    if re.search(r"database .* does not exist", reason):
        return "does not exist on that server; make it with createdb, or correct the URL"
    if re.search(r"authentication failed|no password supplied|role .* does not exist|no pg_hba.conf entry", reason):
        return "refuses the user or the password; correct the URL, PGPASSWORD or ~/.pgpass"
    if re.search(r"refused|timeout|timed out|resolve|No such file|unreachable|starting up|shutting down", reason):
        why = re.sub(r".* failed: ", "", reason)
        why = re.split(r" Is the server running| Multiple connection attempts", why)[0]
        return f"cannot be reached ({why}); start the server, or correct host and port in the URL"
    return None


def without_password(text: str) -> str:
    """The text with the password of every URL in it hidden."""
    text = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)
    return re.sub(r"([?&]\w*password=)[^&\s]*", r"\1***", text)
