"""Which Ray cluster --address and RAY_ADDRESS mean, and whether it lets this process in.

    auto                the cluster that `ray start` left running on this machine
    HOST:PORT           the cluster of that head
    local               a new one on this machine
    http://HOST:8265    the dashboard of a cluster's head: it takes jobs, and nothing else

Ray itself tries for a minute, and fails with pages of its own log; here a look decides.
"""

import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled

# Not address="auto": that joins any Ray on this machine, such as another search's, and dies with it.
from ray._private.utils import read_ray_address
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from search.errors import UserError
from tracking.address import shown

VARIABLE = "RAY_ADDRESS"
# How long a cluster may take to answer at all.
CONNECT_S = 5.0
# How long a process may take that imports Ray and connects.
_STRANGER_S = 60.0

# The first words of HTTP/2, on which gRPC runs, and an empty SETTINGS frame. Whoever speaks it answers with its own.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + struct.pack(">IBI", 0, 4, 0)
_FRAME_HEAD, _SETTINGS = 9, 4

# Somebody without a token; a process reads its own mode once, and this one's is the user's.
_STRANGER = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1])
except AuthenticationError:
    sys.exit(3)
"""
_REFUSED = 3


class ClusterError(UserError):
    """The cluster that was asked for cannot be used."""


@dataclass(frozen=True)
class Address:
    """What was asked for, and in which words, without a secret; nothing was asked for if `value` is empty."""

    value: str
    words: str

    @classmethod
    def of(cls, option: str | None) -> "Address":
        """The option wins over the environment.

        Raises:
            ClusterError: there is a login in it, which job commands and messages would repeat.
        """
        value = option or os.environ.get(VARIABLE, "")
        words = f"--address {shown(value)}" if option else f"{VARIABLE}={shown(value)}" if value else ""
        if shown(value) != value:
            raise ClusterError(
                f"{words} holds a login or an option, which no head asks for: leave it out; a cluster's token is taken "
                "from RAY_AUTH_TOKEN or ~/.ray/auth_token"
            )
        return cls(value, words)

    @property
    def is_dashboard(self) -> bool:
        return self.value.startswith(("http://", "https://"))


def cluster_address(asked: Address) -> str | None:
    """HOST:PORT of the cluster to join, after a look at whether it lets this process in; None: start a new one.

    Raises:
        ClusterError: there is none, it does not answer, or it asks for another token.
    """
    if asked.value.startswith("ray://"):
        raise ClusterError(
            f"{asked.words}: Ray Client cannot run a search; run it on the head, or hand it over with "
            "--detach --address http://HEAD:8265"
        )
    if asked.is_dashboard:
        raise ClusterError(
            f"{asked.words} is a dashboard, which takes jobs only; add --detach, or give HOST:PORT of the head"
        )
    if asked.value == "local":
        return None
    if asked.value in ("", "auto"):
        started: str | None = read_ray_address()
        if started and _answers(started):  # else that cluster is gone and left its address behind
            _check_token(started, "the Ray cluster on this machine")
            return started
        if asked.value:
            raise ClusterError(
                f"{asked.words}, but no Ray cluster runs on this machine; start one with ray start --head, give "
                "HOST:PORT of another, or leave the address out"
            )
        return None
    host, _, port = asked.value.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise ClusterError(f"{asked.words}: expected auto, local, HOST:PORT of a head, or http://HOST:PORT")
    if not _answers(asked.value):
        raise ClusterError(
            f"no Ray cluster answers at {asked.words}; start it, check the port (6379 is a head's, 8265 its "
            "dashboard's), or leave the address out to run on this machine"
        )
    _check_token(asked.value, asked.words)
    return asked.value


def _answers(address: str) -> bool:
    """Whether somebody there speaks HTTP/2, as a head does; with TLS, whether anybody listens."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S) as connection:
            if os.environ.get("RAY_USE_TLS") == "1":
                return True
            connection.sendall(_GREETING)
            head = connection.recv(_FRAME_HEAD, socket.MSG_WAITALL)
            return len(head) == _FRAME_HEAD and head[3] == _SETTINGS
    except (OSError, ValueError):  # the second of a name that can be none, such as a..b
        return False


def _check_token(address: str, words: str) -> None:
    try:
        check_own_token()
        with _silent():  # Ray logs what it then raises
            GcsClient(address=address)
    except AuthenticationError as error:
        raise ClusterError(token_text(words)) from error
    except Exception as error:
        raise ClusterError(f"{words} does not answer as a Ray cluster ({' '.join(str(error).split())})") from error


def asks_for_token(address: str) -> bool | None:
    """Whether the cluster of that head, HOST:PORT, refuses whoever has no token; None: it did not answer."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    stranger = [sys.executable, "-c", _STRANGER, address]
    try:
        done = subprocess.run(
            stranger,
            env=environment | {"RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            timeout=_STRANGER_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return {0: False, _REFUSED: True}.get(done.returncode)


def check_own_token() -> None:
    """Ray's own code ends the process when a token is wanted and none is there.

    Raises:
        AuthenticationError: so it is.
    """
    ensure_token_if_auth_enabled(create_token_if_missing=False)


def token_text(words: str) -> str:
    """What to do where a token is missing or wrong."""
    mode = os.environ.get("RAY_AUTH_MODE")
    lacking = "RAY_AUTH_MODE is not set to token here" if mode != "token" else "this one is missing or another"
    return (
        f"{words} asks for its token, and {lacking}; copy ~/.ray/auth_token of the head to this machine (or set "
        "RAY_AUTH_TOKEN) and export RAY_AUTH_MODE=token"
    )


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing reaches standard error, also of what is not Python."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
