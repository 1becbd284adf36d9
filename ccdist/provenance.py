"""Which source a number was computed with."""

import os
import subprocess
from pathlib import Path

# Says so where the package is a copy without its repository: whoever copies it to another machine sets this.
COMMIT = "CCDIST_COMMIT"
UNKNOWN = "unknown"


def source_commit() -> str:
    """The commit that this package was read from, with -dirty behind it where files differ from it; else "unknown".

    A package that was installed is no part of the repository that its folder may happen to lie in.
    """
    if not _git("ls-files", Path(__file__).name):
        return os.environ.get(COMMIT) or UNKNOWN
    return _git("describe", "--always", "--dirty", "--abbrev=12") or UNKNOWN


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git here
        return ""
