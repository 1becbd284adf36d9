"""A PostgreSQL server of one's own, on this machine and for a while."""

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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psycopg

START_S = 60.0


@dataclass
class PostgresServer:
    """A server whose only user is postgres, and which may be stopped and started again on the same port."""

    port: int
    password: str
    command: list[str | Path]
    folder: Path
    user: str | None
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it, from the thread that lives as long as the server shall; it answers when this returns."""
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                self.command, user=self.user, cwd=self.folder, stdout=log, stderr=log, preexec_fn=_end_with_parent
            )
        until = time.monotonic() + START_S
        while True:
            try:
                self.execute("SELECT 1")
                return
            except psycopg.OperationalError:
                if not self.runs or time.monotonic() > until:
                    raise RuntimeError(f"the server did not start: {(self.folder / 'log').read_text()}") from None
                time.sleep(0.02)

    def stop(self) -> None:
        """As a power loss: no session is told, what was committed is there after the next start."""
        if self.process is not None and self.runs:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(START_S)

    def url(self, database: str = "postgres", *, password: str | None = None) -> str:
        """As a user writes it: without a driver; signs with a meaning in URLs are escaped."""
        word = quote(self.password if password is None else password, safe="")
        return f"postgresql://postgres:{word}@127.0.0.1:{self.port}/{database}"

    def new_database(self, name: str) -> str:
        """Make one; its URL."""
        self.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def execute(self, statement: str) -> list[tuple[object, ...]]:
        with psycopg.connect(self.url(), autocommit=True) as connection:
            cursor = connection.execute(statement)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description else []


def programs() -> Path | None:
    """The folder of initdb and postgres; Debian keeps them out of the path, by version."""
    found = shutil.which("postgres")
    places = (
        [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    )
    return next((place for place in places if all((place / name).exists() for name in ("initdb", "postgres"))), None)


@contextmanager
def running_postgres(password: str, **settings: str) -> Iterator[PostgresServer]:
    """A server until the end of the context; its data is then thrown away.

    Args:
        settings: more of them, as in postgresql.conf.

    Raises:
        FileNotFoundError: none is installed.
    """
    place = programs()
    if place is None:
        raise FileNotFoundError("no PostgreSQL server is installed (initdb and postgres): apt-get install postgresql")
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = None if os.geteuid() else "postgres" if "postgres" in names else "nobody"  # it refuses to run as root
    with tempfile.TemporaryDirectory(prefix="ccdist-postgres-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        password_file = folder / "password"
        password_file.write_text(password)
        for path in (folder, password_file) if user else ():
            shutil.chown(path, user)
        data = folder / "data"
        access = ["--username=postgres", "--auth=scram-sha-256", f"--pwfile={password_file}", "--no-sync"]
        initdb = [place / "initdb", f"--pgdata={data}", "--encoding=UTF8", "--no-locale", *access]
        subprocess.run(initdb, user=user, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        fixed = {"fsync": "off", "listen_addresses": "127.0.0.1", "unix_socket_directories": folder, "port": port}
        options = [part for key, value in (fixed | settings).items() for part in ("-c", f"{key}={value}")]
        server = PostgresServer(port, password, [place / "postgres", "-D", data, *options], folder, user)
        try:
            server.start()
            yield server
        finally:
            server.stop()


def _end_with_parent() -> None:
    """Let the system end this process when the one that started it is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGQUIT)  # PR_SET_PDEATHSIG
