"""A full disk is no failure of a trial: it pauses, and goes on from its last state once there is room."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ERRORS = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(Exception):
    """There is no room left; the text is one line that names the folder and what is free there."""


@contextmanager
def pausing_on_full_disk(folder: Path) -> Iterator[None]:
    """Whatever fails inside because the disk is full becomes a DiskFullError about the folder."""
    try:
        yield
    except Exception as error:
        if not is_full_disk(error):
            raise
        place = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(place).free / 2**20
        why = "over its quota" if _number(error) == errno.EDQUOT else "full"
        raise DiskFullError(f"the disk of {folder} is {why} ({free:.1f} MiB free)") from error


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, or what it came from, is one of a disk or quota without room."""
    return _number(error) is not None


def _number(error: BaseException | None) -> int | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _ERRORS:
            return error.errno
        for number in _ERRORS:  # safetensors has an error class of its own that holds no number
            if f"(os error {number})" in str(error):
                return number
        error = error.__cause__ or error.__context__
    return None
