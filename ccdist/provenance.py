"""Which source a number was computed with."""

import subprocess
from pathlib import Path


def source_commit() -> str:
    """The commit that this package was read from, with -dirty behind it where files differ from it; else "unknown".

    A package that was installed is no part of the repository that its folder may happen to lie in.
    """
    if not _git("ls-files", Path(__file__).name):
        return "unknown"
    return _git("describe", "--always", "--dirty", "--abbrev=12") or "unknown"


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git here
        return ""
