"""Drivers of one study on machines of their own: each has a home, a working directory and a Ray that no other has."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from optuna.exceptions import StorageInternalError
from sqlalchemy import make_url

from benchmarks.live_search import EPOCHS, FOREIGN_VARIABLES, PATIENCE_S, ROOT, SMALL_TRIALS, kill_session, wait_for
from search.studies.database import StudyError
from search.studies.records import StudyRecord
from search.studies.study_record import load_record
from tracking.address import Address
from tracking.journal import MetricsRow, StartRow, read_rows

# The results of trials depend on their number only.
SETTINGS = ("resources.concurrency=2", *SMALL_TRIALS, "search.sampler=random", "stopping=false")


@dataclass(frozen=True)
class SharedStudy:
    """What all machines see: a database, a folder or an object store, a tracking server."""

    name: str
    url: str
    artifacts: Path | str
    tracking: str | None = None

    @property
    def record(self) -> StudyRecord:
        return load_record(self.url, self.name)

    def done(self) -> int:
        """The number of trials that are done."""
        try:
            return len(self.record.done)
        except (StudyError, StorageInternalError):
            return 0  # not made yet

    @property
    def password(self) -> str:
        return make_url(self.url).password or ""

    @property
    def address(self) -> str:
        """As a space file may hold it."""
        return Address.of(self.url).open

    def in_the_middle(self) -> list[str]:
        """Keys of trials whose student has some epochs behind it and some before it."""
        return [path.parent.name for path in Path(self.artifacts).glob(f"{self.name}/trials/*/state.safetensors")]

    def rows(self, key: str) -> list[StartRow | MetricsRow]:
        """The starts of a trial, and the epochs of its student, in the order in which they were written."""
        lines = read_rows(Path(self.artifacts) / self.name / "journal" / f"{key}.jsonl")[0]
        rows = (line.row for line in lines)
        return [
            row
            for row in rows
            if isinstance(row, StartRow) or (isinstance(row, MetricsRow) and "student/epsilon" in row.values)
        ]


@dataclass
class Machine:
    folder: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)
    ray_folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="ray-")))  # a short path, for sockets

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def here(self) -> Path:
        """The working directory."""
        return self.folder / "work" / "search"

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    def command(self, *words: str, password: str = "") -> subprocess.Popen[str]:
        """Start one here, in a session of its own."""
        for folder in (self.home, self.here):
            folder.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if name not in FOREIGN_VARIABLES}
        own = {"HOME": self.home, "RAY_TMPDIR": self.ray_folder, "CCDIST_SCRATCH_DIR": self.scratch}
        own |= {"PYTHONPATH": ROOT, "PGPASSWORD": password, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.here,
            env=kept | {name: str(value) for name, value in own.items()},
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def start(self, study: SharedStudy, trials: int, settings: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Start a driver here, with paths as they are seen from here."""
        self.here.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "spaces" / "digits.yaml", self.here / "space.yaml")
        is_path = isinstance(study.artifacts, Path)
        artifacts = os.path.relpath(study.artifacts, self.here) if is_path else study.artifacts
        places = [f"storage.study={study.address}", f"storage.artifacts={artifacts}"]
        tracking = f"tracking.uri={study.tracking}" if study.tracking else "tracking.enabled=false"
        changes = [f"name={study.name}", *places, tracking, *SETTINGS, *settings]
        flags = (flag for change in changes for flag in ("--set", change))
        return self.command("search.run", "space.yaml", "--trials", str(trials), *flags, password=study.password)

    def run(self, study: SharedStudy, trials: int, settings: Sequence[str] = ()) -> tuple[int, str, str]:
        """A driver from start to end -> exit code, stdout, stderr."""
        return ended(self.start(study, trials, settings))

    def lose(self) -> None:
        """The machine is gone, with all its processes."""
        for process in self.started:
            kill_session(process.pid)

    def close(self) -> None:
        self.lose()
        for process in self.started:
            with process:  # closes what it has printed
                process.wait()
        shutil.rmtree(self.ray_folder, ignore_errors=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the end of a command -> exit code, stdout, stderr."""
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


@contextmanager
def new_machines(folder: Path) -> Iterator[Callable[[str], Machine]]:
    """Called with a name, for a machine that lives as long as the context."""
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(closing(Machine(folder / name)))


def wait_for_the_middle(study: SharedStudy) -> None:
    """One trial is done, and another has come half the way."""
    wait_for(lambda: study.done() >= 1 and bool(study.in_the_middle()), "a trial is done and another is not")


def interrupt(driver: subprocess.Popen[str]) -> None:
    """Ctrl-C."""
    driver.send_signal(signal.SIGINT)


def faults_of_epochs(study: SharedStudy, key: str) -> list[str]:
    """A trial goes on where it was: only the epoch that was cut off may be done twice, once for each further start."""
    rows = study.rows(key)
    starts = sum(isinstance(row, StartRow) for row in rows)
    epochs = [row.step for row in rows if isinstance(row, MetricsRow)]
    faults = []
    if sorted(set(epochs)) != list(range(1, EPOCHS + 1)):
        faults.append(f"{key} has the epochs {epochs}")
    if len(epochs) > EPOCHS + starts - 1 or any(after < before for before, after in pairwise(epochs)):
        faults.append(f"{key} was started {starts} times and did the epochs {epochs}")
    return faults
