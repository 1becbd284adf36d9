"""A full disk, or one that does not answer, is no failure of a trial: it goes on later from its last state."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from search.studies.patience import PATIENCE, Patience, interruptible

_FULL = (errno.ENOSPC, errno.EDQUOT)
# What a network file system says while its server, or the way to it, is away.
_AWAY = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.EREMOTEIO,
)
_T = TypeVar("_T")


class DiskFullError(Exception):
    """There is no room left; the text is one line that names the folder and what is free there."""


class StorageAwayError(Exception):
    """The file system of a folder did not answer for a while; the text is one line that names both."""


@contextmanager
def pausing_on_full_disk(folder: Path, patience: Patience = PATIENCE) -> Iterator[None]:
    """What fails inside because of the disk becomes an error about the folder.

    Raises:
        DiskFullError: there is no room.
        StorageAwayError: it did not answer; raised when it does again, or when patience is over.
    """
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number is None:
            raise
        if number in _AWAY:
            _wait_for(folder, patience)
            raise StorageAwayError(f"{folder}: {os.strerror(number)}") from error
        place = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(place).free / 2**20
        why = "over its quota" if number == errno.EDQUOT else "full"
        raise DiskFullError(f"the disk of {folder} is {why} ({free:.1f} MiB free)") from error


def when_it_answers(act: Callable[[], _T], patience: Patience = PATIENCE) -> _T:
    """Do what may be done twice, again and again while the file system does not answer.

    Raises:
        OSError: it stayed away; other errors at once.
    """
    try:
        return act()
    except OSError as error:
        if error.errno not in _AWAY:
            raise
        away = error
    with interruptible():
        for _ in patience.attempts():
            try:
                return act()
            except OSError as error:
                if error.errno not in _AWAY:
                    raise
                away = error
    raise away


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, or what it came from, is one of a disk or quota without room."""
    return _number(error) in _FULL


def is_of_disk(error: BaseException) -> bool:
    """Whether an error, or what it came from, is one of a disk that is full or does not answer."""
    return _number(error) is not None


def _wait_for(folder: Path, patience: Patience) -> None:
    """Until a file can be written there."""
    for _ in patience.attempts():
        try:
            place = next(path for path in (folder, *folder.parents) if path.exists())
            with tempfile.NamedTemporaryFile(dir=place):
                return
        except OSError as error:
            if _number(error) not in _AWAY:
                return


def _number(error: BaseException | None) -> int | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (*_FULL, *_AWAY):
            return error.errno
        for number in (*_FULL, *_AWAY):  # safetensors has an error class of its own that holds no number
            if f"(os error {number})" in str(error):
                return number
        error = error.__cause__ or error.__context__
    return None
