"""Real searches as processes of their own, to be disturbed: a driver with its Ray, and an MLflow server.

Each driver is its own session of processes, found and ended by the session's number, so that nothing of anybody
else's is touched.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parent.parent
PATIENCE_S = 240.0
# Trials of about two seconds: long enough to be killed in the middle, short enough to be many.
EPOCHS = 16
SMALL_TRIALS = (
    "network.width=32",
    "data.train_images=600",
    "data.validation_images=80",
    "teacher.epochs=2",
    f"student.epochs={EPOCHS}",
)
# A search of this shape must not follow what the caller's shell says about other searches.
FOREIGN_VARIABLES = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "CCDIST_DATA_DIR")


@dataclass(frozen=True)
class Process:
    pid: int
    title: str


def wait_for(
    condition: Callable[[], bool],
    what: str,
    patience_s: float = PATIENCE_S,
    said: Callable[[], str] | None = None,
) -> None:
    """Wait until something is so.

    Args:
        said: what whoever is waited for has printed.

    Raises:
        TimeoutError: it is not so after `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            told = "" if said is None else f"; it said: {said()}"
            raise TimeoutError(f"waited {patience_s:g} s in vain until {what}{told}")
        time.sleep(0.02)


def processes_of(session: int) -> list[Process]:
    """All living processes of a session: a driver, its Ray and the workers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            found.append(Process(int(folder.name), title))
    return found


def workers_of(session: int) -> list[Process]:
    """Those that run trials; Ray's own agents notice the end of their cluster after a minute only."""
    return [process for process in processes_of(session) if process.title.startswith("ray::ImplicitFunc")]


def kill_session(session: int) -> None:
    """End whatever is left of a session."""
    for process in processes_of(session):
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@dataclass
class LiveSearch:
    """A space and a storage folder, and the drivers that were started on them."""

    space: str
    storage: Path
    ray_folder: Path  # a short path: Ray keeps sockets there, whose paths may have a hundred characters
    settings: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    sessions: list[int] = field(default_factory=list)

    def start(self, trials: int, output: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
        """Start a driver that is to bring the study to so many trials."""
        flags = ["--storage", str(self.storage)]
        flags += [flag for setting in self.settings for flag in ("--set", setting)]
        own = {name: value for name, value in os.environ.items() if name not in FOREIGN_VARIABLES}
        driver = subprocess.Popen(
            [sys.executable, "-m", "search.run", self.space, "--trials", str(trials), *flags],
            stdout=output,
            stderr=subprocess.STDOUT if output is not subprocess.PIPE else subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=own | {"RAY_TMPDIR": str(self.ray_folder), "COLUMNS": "200"} | self.environment,
            start_new_session=True,
        )
        self.sessions.append(driver.pid)
        return driver

    def workers(self) -> list[Process]:
        """The living workers of all drivers, orphans included."""
        return [worker for session in self.sessions for worker in workers_of(session)]

    def clean_up(self) -> None:
        for session in self.sessions:
            kill_session(session)


class Server:
    """An MLflow server over a folder, which may be killed and started again on the same port."""

    def __init__(self, folder: Path, log: Path) -> None:
        from tracking.mlflow_tracker import prepare_environment
        from tracking.ui import server_command

        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = int(listener.getsockname()[1])
        prepare_environment()
        self._command, self._log = server_command(folder, "127.0.0.1", self.port), log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it; it answers some seconds later."""
        with self._log.open("ab") as log:
            environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def kill(self) -> None:
        """SIGKILL to the server and its children."""
        if self._process is not None:
            kill_session(self._process.pid)
            self._process.wait()

    def stop(self) -> None:
        """SIGSTOP: it accepts connections and never answers."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            for process in processes_of(self._process.pid):
                os.kill(process.pid, number)

    def answers(self) -> bool:
        # Not urlopen: that goes through whatever proxy its first call in this process has seen.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False
