"""What Ray is told so that it keeps to this machine and keeps its secrets.

Ray's processes take orders from whoever has their token, and run whatever they are sent. Left alone, a Ray that a
search starts for itself listens on all addresses of the machine, and writes the token so that every user can read it.
Tune passes the driver's keys to Amazon's storage on to its workers, on their command lines, where every user can read
them, too.
"""

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ray._private import ray_constants

# What Ray does on Windows and macOS unless it is told otherwise: its only node is 127.0.0.1.
_CLUSTERS = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
_PRIVATE = 0o600
_KEYS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}


@contextmanager
def kept_private() -> Iterator[None]:
    """For the time in which Ray starts: its processes have the address of this machine for itself.

    A connection to a cluster afterwards is as it would have been. A mode or a token that the user has set stays.
    """
    if not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} and _has_tokens():
        private_token(Path.home() / ".ray" / "auth_token")
    before, was_enabled = os.environ.get(_CLUSTERS), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[_CLUSTERS], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = was_enabled
        if before is None:
            del os.environ[_CLUSTERS]
        else:
            os.environ[_CLUSTERS] = before


def private_token(path: Path) -> None:
    """Make the token before Ray does, or close the one that is there to other users.

    Where that cannot be done, as in a home that is not this user's, it is left to Ray, which says what is wrong.
    """
    with suppress(OSError):
        if path.exists():
            path.chmod(path.stat().st_mode & _PRIVATE)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as whole:  # nobody but this user may open those
            whole.write(secrets.token_hex(32))  # as long as Ray's own
            whole.flush()
            os.link(whole.name, path)


def keys_stay_here() -> None:
    """Before Tune starts workers: those on this machine inherit the driver's keys, those of a cluster have theirs."""
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(_KEYS)


def _has_tokens() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"
