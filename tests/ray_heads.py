"""A Ray head for a test, in namespaces of its own: no process, port or file of another Ray is seen there or sees it.

Needs root and Linux. Commands run beside the head, as on a cluster's head node, with a home folder and a /tmp/ray that
are the test's.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from netlab import kept

from benchmarks.live_search import wait_for

HOST, PORT, DASHBOARD_PORT = "10.9.0.1", 6379, 8265
URL = f"http://127.0.0.1:{DASHBOARD_PORT}"
START_S = 60.0
BIN = Path(sys.executable).parent
ROOT = Path(__file__).parent.parent

needs_namespaces = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0, reason="namespaces need Linux and root"
)


@dataclass(frozen=True)
class Head:
    """A running head.

    init: the first process of its namespaces.
    environment: of commands beside it.
    """

    init: int
    home: Path
    environment: dict[str, str]

    def command(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        """Start a command beside the head."""
        return subprocess.Popen(
            ["nsenter", "-t", str(self.init), "-m", "-n", "-p", *words],
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, timeout_s: float = 300.0, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command beside the head."""
        process = self.command(*words, **variables)
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.kill(only_child(process.pid), signal.SIGKILL)  # nsenter waits for it
            process.communicate()
            raise
        return subprocess.CompletedProcess(words, process.returncode, output, errors)

    def python(self, module: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", module, *words, **variables)

    def end(self) -> None:
        """All processes of the namespaces, at once."""
        with suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)


@contextmanager
def ray_head(folder: Path, *, cpus: int = 2, token: str | None = None, dashboard: bool = True) -> Iterator[Head]:
    """`ray start --head`, until the end of the context.

    Args:
        folder: holds its home and its temporary folder.
        token: None: without authentication.
    """
    home, temporary = folder / "home", folder / "ray"
    (home / ".ray").mkdir(parents=True)
    temporary.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(home),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token" if token else "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    if token:
        (home / ".ray" / "auth_token").write_text(token)
    # A way out that ends nowhere: Ray looks along it for its own address, and complains without one.
    network = (
        "ip link set lo up && ip link add out type veth peer name nowhere && ip link set nowhere up && "
        f"ip addr add {HOST}/24 dev out && ip link set out up && ip route add default dev out"
    )
    start = (
        f"ray start --head --port={PORT} --node-ip-address={HOST} --num-cpus={cpus} --block "
        f"--object-store-memory=100000000 --include-dashboard={str(dashboard).lower()} --dashboard-host=127.0.0.1 "
        f"--dashboard-port={DASHBOARD_PORT}"
    )
    script = f"{network} && mount --bind {temporary} /tmp/ray && exec {start}"
    Path("/tmp/ray").mkdir(exist_ok=True)
    unshare = ["unshare", "-n", "-m", "-p", "-f", "--kill-child", "--mount-proc", "sh", "-c", script]
    with (folder / "log").open("wb") as log, kept(unshare, log.fileno(), environment) as outer:
        head = Head(only_child(outer.pid), home, environment)
        # Jobs go to the agent of a node, which comes up after all else.
        port = 52365 if dashboard else PORT
        probe = f"import socket; socket.create_connection(('{HOST}', {port}), timeout=1)"
        wait_for(
            lambda: outer.poll() is not None or head.run(sys.executable, "-c", probe).returncode == 0,
            "the head is up or has ended",
            START_S,
            (folder / "log").read_text,
        )
        assert outer.poll() is None, (folder / "log").read_text()
        try:
            yield head
        finally:
            head.end()
            outer.wait()  # it returns when the kernel has ended all of them


def only_child(parent: int) -> int:
    """The process that unshare, or nsenter, has started in place of itself."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    wait_for(lambda: children.read_text() != "", "a process is started in namespaces", 10)
    return int(children.read_text().split()[0])
