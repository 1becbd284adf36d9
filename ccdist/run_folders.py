"""Folders that one process at a time works in, and that belong to what was begun there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ccdist import locks

LOCK = "lock"


class RunFolderError(ValueError):
    """A folder cannot be used for what is asked for."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder where it is missing, and hold it alone.

    Raises:
        RunFolderError: it cannot be written.
        LockedError: another process works there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be written ({error.strerror}); choose another with --out DIR") from error
    with locks.exclusive(folder / LOCK, wait=False):
        yield


def check_described(folder: Path, description: str) -> None:
    """Refuse a folder that holds something, but not the file that says what.

    Raises:
        RunFolderError: it does.
    """
    others = [path.name for path in folder.iterdir() if path.name != LOCK and not path.name.startswith(".")]
    if others and description not in others:
        raise RunFolderError(f"{folder} holds {min(others)} but no {description}; choose another folder with --out DIR")
