"""Folders that one process at a time works in, and that belong to what was begun there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ccdist import locks

LOCK = "lock"


class RunFolderError(ValueError):
    """A folder cannot be used for what is asked for."""


@contextmanager
def held(folder: Path, description: str) -> Iterator[None]:
    """Make the folder where it is missing, and hold it alone.

    Args:
        description: the file that says what the folder holds; without it nothing else may be there.

    Raises:
        RunFolderError: it cannot be written, or holds something else, to which nothing is added.
        LockedError: another process works there.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise RunFolderError(f"{folder} cannot be written: it is a file; choose a folder with --out DIR")
        folder.mkdir(parents=True, exist_ok=True)
        _check_described(folder, description)
        if (folder / LOCK).is_dir():
            raise RunFolderError(f"{folder / LOCK} is a folder; choose another folder with --out DIR")
        (folder / LOCK).touch()
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be written ({error.strerror}); choose another with --out DIR") from error
    with locks.exclusive(folder / LOCK, wait=False):
        _check_described(folder, description)  # again: another process may have worked there meanwhile
        yield


def _check_described(folder: Path, description: str) -> None:
    others = [path.name for path in folder.iterdir() if path.name != LOCK and not path.name.startswith(".")]
    if others and description not in others:
        raise RunFolderError(f"{folder} holds {min(others)} but no {description}; choose another folder with --out DIR")


def leaves(node: Any, path: str = "") -> dict[str, Any]:
    """Nested keys joined by dots, with their values."""
    if not isinstance(node, dict):
        return {path: node}
    inner = [leaves(value, f"{path}.{key}" if path else str(key)) for key, value in node.items()]
    return {key: value for each in inner for key, value in each.items()}


def differing_keys(there: dict[str, Any], asked: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value there, value asked) of every leaf that is not the same in two trees."""
    flat_there, flat_asked = leaves(there), leaves(asked)
    keys = dict.fromkeys([*flat_there, *flat_asked])
    pairs = [(key, flat_there.get(key), flat_asked.get(key)) for key in keys]
    return [(key, one, other) for key, one, other in pairs if one != other]
