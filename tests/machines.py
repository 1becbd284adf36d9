"""Drivers of one study on machines of their own: each has a home, a working directory and a Ray that no other has."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from sqlalchemy import make_url

from benchmarks.live_search import FOREIGN_VARIABLES, PATIENCE_S, ROOT, kill_session
from search.studies.records import StudyRecord
from search.studies.study_record import load_record
from tracking.address import Address
from tracking.journal import MetricsRow, StartRow, read_rows

EPOCHS = 16
# Trials of about two seconds, whose results depend on their number only.
SETTINGS = (
    "resources.concurrency=2",
    "network.width=32",
    "data.train_images=600",
    "data.validation_images=80",
    "teacher.epochs=2",
    f"student.epochs={EPOCHS}",
    "search.sampler=random",
    "stopping=false",
)


@dataclass(frozen=True)
class SharedStudy:
    """What all machines see: a database, a folder, a tracking server."""

    name: str
    url: str
    artifacts: Path
    tracking: str | None = None

    @property
    def record(self) -> StudyRecord:
        return load_record(self.url, self.name)

    @property
    def password(self) -> str:
        return make_url(self.url).password or ""

    @property
    def address(self) -> str:
        """As a space file may hold it."""
        return Address.of(self.url).open

    def in_the_middle(self) -> list[str]:
        """Keys of trials whose student has some epochs behind it and some before it."""
        return [path.parent.name for path in self.artifacts.glob(f"{self.name}/trials/*/state.safetensors")]

    def rows(self, key: str) -> list[StartRow | MetricsRow]:
        """The starts of a trial, and the epochs of its student, in the order in which they were written."""
        lines = read_rows(self.artifacts / self.name / "journal" / f"{key}.jsonl")[0]
        rows = (line.row for line in lines)
        return [
            row
            for row in rows
            if isinstance(row, StartRow) or (isinstance(row, MetricsRow) and "student/epsilon" in row.values)
        ]


@dataclass
class Machine:
    folder: Path
    sessions: list[int] = field(default_factory=list)
    ray_folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="ray-")))  # a short path, for sockets

    def start(self, study: SharedStudy, trials: int, settings: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Start a driver here, with paths as they are seen from here."""
        home, here = self.folder / "home", self.folder / "work" / "search"
        for folder in (home, here):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "spaces" / "digits.yaml", here / "space.yaml")
        places = [f"storage.study={study.address}", f"storage.artifacts={os.path.relpath(study.artifacts, here)}"]
        tracking = f"tracking.uri={study.tracking}" if study.tracking else "tracking.enabled=false"
        changes = [f"name={study.name}", *places, tracking, *SETTINGS, *settings]
        own = {name: value for name, value in os.environ.items() if name not in FOREIGN_VARIABLES}
        driver = subprocess.Popen(
            [
                *(sys.executable, "-m", "search.run", "space.yaml", "--trials", str(trials)),
                *(flag for change in changes for flag in ("--set", change)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=here,
            env=own
            | {"HOME": str(home), "PYTHONPATH": str(ROOT), "PGPASSWORD": study.password, "COLUMNS": "200"}
            | {"RAY_TMPDIR": str(self.ray_folder)},
            start_new_session=True,
        )
        self.sessions.append(driver.pid)
        return driver

    def run(self, study: SharedStudy, trials: int) -> tuple[int, str, str]:
        """A driver from start to end -> exit code, stdout, stderr."""
        driver = self.start(study, trials)
        out, err = driver.communicate(timeout=PATIENCE_S)
        return driver.returncode, out, err

    def lose(self) -> None:
        """The machine is gone, with all its processes."""
        for session in self.sessions:
            kill_session(session)

    def clean_up(self) -> None:
        self.lose()
        shutil.rmtree(self.ray_folder, ignore_errors=True)


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
