"""The database of a study: opened by URL, SQLite or PostgreSQL, and refused in one line."""

import re
import sqlite3
from pathlib import Path

import optuna
from sqlalchemy.exc import SQLAlchemyError

from search.errors import UserError


class StudyError(UserError):
    """The stored study cannot be used as asked; the text says what to do."""


def sqlite_file(url: str) -> Path | None:
    """The file behind an SQLite URL; None for other databases."""
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """The database behind a URL.

    Raises:
        StudyError: it cannot be opened, or is none.
    """
    try:
        return _connect(url)
    except (sqlite3.Error, SQLAlchemyError, ImportError, RuntimeError) as error:
        reason = without_password(" ".join(str(error).split()))
        raise StudyError(f"study database {without_password(url)} cannot be opened: {reason}") from error


def _connect(url: str) -> optuna.storages.RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    database = sqlite_file(url)
    if database is None:
        return optuna.storages.RDBStorage(url)
    # Write-ahead logging lets `search.front` read while a search writes; it is a property of the file.
    connection = sqlite3.connect(database)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()
    return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})


def without_password(text: str) -> str:
    """The text with the password of every URL in it hidden."""
    return re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)
