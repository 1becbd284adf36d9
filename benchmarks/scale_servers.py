"""Servers of the load tests' own, on this machine: PostgreSQL, MLflow in front of any store."""

import ctypes
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.live_search import Server, wait_for
from search.studies.database import postgres_url


class StoreServer(Server):
    """The server of the UI with another store; None: its own."""

    def __init__(self, folder: Path, log: Path, store: str | None) -> None:
        super().__init__(folder, log)
        if store is not None:
            self._command[self._command.index("--backend-store-uri") + 1] = store


@contextmanager
def running_mlflow(folder: Path, store: str | None) -> Iterator[Server]:
    server = StoreServer(folder / "server", folder / "log", None if store is None else postgres_url(store))
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    server.start()
    try:
        wait_for(server.answers, "the tracking server answers")
        yield server
    finally:
        server.kill()


def postgres_programs() -> Path | None:
    """The folder of initdb and postgres; Debian keeps them out of the path, by version."""
    found = shutil.which("postgres")
    places = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((place for place in reversed(places) if (place / "initdb").exists()), None)


@contextmanager
def running_postgres() -> Iterator[str]:
    """A server of this measurement's own; the URL of its database.

    Raises:
        FileNotFoundError: none is installed.
    """
    place = postgres_programs()
    if place is None:
        raise FileNotFoundError("no PostgreSQL server is installed (initdb and postgres): apt-get install postgresql")
    names = {entry.pw_name for entry in pwd.getpwall()}
    user: Any = None if os.geteuid() else "postgres" if "postgres" in names else "nobody"
    with tempfile.TemporaryDirectory(prefix="scale-postgres-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        password = folder / "password"
        password.write_text(word := f"{random.SystemRandom().getrandbits(64):x}")
        for path in (folder, password) if user else ():
            shutil.chown(path, user)
        data = folder / "data"
        options = ["--username=postgres", "--auth=scram-sha-256", f"--pwfile={password}", "--no-sync", "--no-locale"]
        initdb = [place / "initdb", f"--pgdata={data}", "--encoding=UTF8", *options]
        subprocess.run(initdb, user=user, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = {"fsync": "off", "unix_socket_directories": folder, "port": port, "listen_addresses": "127.0.0.1"}
        flags = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        with (folder / "log").open("w") as log:
            command = [place / "postgres", "-D", data, *flags]
            server = subprocess.Popen(
                command, user=user, cwd=folder, stdout=log, stderr=log, preexec_fn=_end_with_parent
            )
        try:
            url = f"postgresql://postgres:{word}@127.0.0.1:{port}/postgres"
            _wait(url, server)
            yield url
        finally:
            server.terminate()
            server.wait(60)


def _end_with_parent() -> None:
    """Let the system end this process when the measurement is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGQUIT)  # PR_SET_PDEATHSIG


def _wait(url: str, server: "subprocess.Popen[bytes]") -> None:
    import psycopg

    until = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > until:
                raise
            time.sleep(0.1)
