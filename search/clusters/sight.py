"""Whether a worker sees the study's folder that its driver marked.

A node without the mount would otherwise make a folder of that name on its own disk, and nobody would ever read it.
"""

import socket
import time
from pathlib import Path

from search.artifacts.disk_space import StorageAwayError

STUDY_MARK = "study.id"
# A node that has just come may start Ray before it mounts its folders.
MOUNT_S = 60.0
_LOOK_S = 2.0


def check_sight(folder: Path, identifier: str) -> None:
    """Look for the mark, again and again for a while; nothing is written.

    Args:
        folder: of the study.
        identifier: what its driver wrote there; empty: it wrote nothing.

    Raises:
        StorageAwayError: it is not there, or another study's.
    """
    until = time.monotonic() + MOUNT_S
    while identifier and _mark(folder) != identifier:
        if time.monotonic() >= until:
            raise StorageAwayError(
                f"node {socket.gethostname()} does not see the study's folder {folder}; mount it there as on the head"
            )
        time.sleep(_LOOK_S)


def _mark(folder: Path) -> str | None:
    try:
        return (folder / STUDY_MARK).read_text()
    except OSError:
        return None
