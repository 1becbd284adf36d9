"""A PostgreSQL server of the tests' own, one for a file of tests."""

import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest

PASSWORD = "p@ss/word"
START_S = 30.0


@dataclass
class PostgresServer:
    """A server whose only user is postgres, and which may be stopped and started again on the same port."""

    port: int
    command: list[str | Path] = field(default_factory=list)
    folder: Path = Path()
    user: str | None = None
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        """Start it, from the thread that lives as long as the server shall; it answers when this returns."""
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                self.command, user=self.user, cwd=self.folder, stdout=log, stderr=log, preexec_fn=_end_with_parent
            )
        _wait(self, self.process, self.folder / "log")

    def stop(self) -> None:
        """As a power loss: no session is told, what was committed is there after the next start."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(START_S)

    def url(self, database: str, *, password: str = "p%40ss%2Fword") -> str:
        """As a user writes it: without a driver; signs with a meaning in URLs are escaped."""
        return f"postgresql://postgres:{password}@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str) -> list[tuple[object, ...]]:
        place = f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres"
        with psycopg.connect(place, password=PASSWORD, autocommit=True) as connection:
            cursor = connection.execute(statement)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description else []


def programs() -> Path | None:
    """The folder of initdb and postgres; Debian keeps them out of the path, by version."""
    found = shutil.which("postgres")
    places = (
        [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    )
    return next((place for place in places if all((place / name).exists() for name in ("initdb", "postgres"))), None)


def _user() -> str | None:
    """Whom the server runs as, if not as this user: it refuses root."""
    names = {entry.pw_name for entry in pwd.getpwall()}
    return None if os.geteuid() else "postgres" if "postgres" in names else "nobody"


@pytest.fixture(scope="module")  # a longer life would end in the time limit of a test of another file
def postgres_server() -> Iterator[PostgresServer]:
    place = programs()
    if place is None:
        pytest.skip("no PostgreSQL server is installed (initdb and postgres): apt-get install postgresql")
    user = _user()
    with tempfile.TemporaryDirectory(prefix="ccdist-postgres-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        password = folder / "password"
        password.write_text(PASSWORD)
        for path in (folder, password) if user else ():
            shutil.chown(path, user)
        data = folder / "data"
        access = ["--username=postgres", "--auth=scram-sha-256", f"--pwfile={password}", "--no-sync", "--no-locale"]
        initdb = [place / "initdb", f"--pgdata={data}", "--encoding=UTF8", *access]
        subprocess.run(initdb, user=user, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = {"fsync": "off", "shared_buffers": "16MB", "unix_socket_directories": folder, "port": port}
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        server = PostgresServer(port, [place / "postgres", "-D", data, *options], folder, user)
        try:
            server.start()
            yield server
        finally:
            server.stop()  # its data is thrown away: no orderly end is needed


def _end_with_parent() -> None:
    """Let the system end this process when the tests are killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGQUIT)  # PR_SET_PDEATHSIG


def _wait(server: PostgresServer, process: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + START_S
    while True:
        try:
            server.execute("SELECT 1")
            return
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server did not start: {log.read_text()}") from None
            time.sleep(0.02)


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> str:
    """The database that is there from the start; tests that share a server share it, locks, tables and all."""
    return postgres_server.url("postgres")
