"""Searches whose artefacts are in an object store, a real S3 server: no folder is shared between driver and workers."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from s3_server import ENVIRONMENT, S3Server, s3_server
from studies import config_of, open_study

from benchmarks.live_search import FOREIGN_VARIABLES, ROOT, kill_session, wait_for, workers_of
from search.artifacts.artifact_place import ArtifactPlace, probe
from search.artifacts.manifests import StoredFiles, StoredStudy
from search.artifacts.places import TrialPlaces
from search.artifacts.trial_copies import is_state
from search.studies.database import StudyError
from search.studies.records import StudyRecord
from search.studies.study_record import load_record
from tracking.mlflow_tracker import MlflowTracker, local_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NAME, TRIALS = "digits", 4
PATIENCE_S = 600.0
SETTINGS = [
    "resources.concurrency=1",  # suggestions then depend on nothing but the seed
    "search.sampler=random",
    "network.width=32",
    "data.train_images=600",
    "data.validation_images=80",
    "teacher.epochs=2",
    "student.epochs=30",
    "stopping=false",
]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with s3_server() as running:
        yield running


@dataclass
class Machines:
    """Machines that have the database and the object store in common, and nothing else."""

    folder: Path
    uri: str | None
    commands: list["Command"] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"sqlite:///{self.folder}/study.db"

    def record(self) -> StudyRecord:
        return load_record(self.url, NAME)

    def done(self) -> int:
        try:
            return len(self.record().done)
        except StudyError:  # not made yet
            return 0

    def artifacts(self, machine: str) -> Path:
        return self.folder / machine / "runs" / "artifacts"

    def command(self, machine: str, *words: str) -> "Command":
        """A command in a machine's own folder."""
        home = self.folder / machine
        home.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if name not in FOREIGN_VARIABLES}
        # A short path: Ray keeps sockets there, whose paths may have a hundred characters.
        sockets = Path(tempfile.mkdtemp(prefix="s3"))
        own = {"RAY_TMPDIR": str(sockets), "CCDIST_SCRATCH_DIR": str(home / "scratch")}
        own |= {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
        log = home / f"{words[0]} {len(self.commands)}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=home,
                env=kept | own,
                start_new_session=True,
            )
        self.commands.append(Command(process, log, sockets))
        return self.commands[-1]

    def search(self, machine: str, trials: int = TRIALS) -> "Command":
        places = [f"storage.study={self.url}"] + ([f"storage.artifacts={self.uri}"] if self.uri else [])
        flags = [flag for setting in SETTINGS + places for flag in ("--set", setting)]
        return self.command(machine, "search.run", NAME, "--address", "local", "--trials", str(trials), *flags)

    def weights(self, machine: str) -> dict[str, str]:
        """Hash of each finished student, as the machine has it."""
        found = {}
        for trial in self.record().complete:
            file = TrialPlaces.of(self.artifacts(machine), NAME, trial.key).student / "weights.safetensors"
            found[trial.key] = hashlib.sha256(file.read_bytes()).hexdigest()
        return found


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machines]]:
    made: list[Machines] = []
    yield made
    for each in made:
        for command in each.commands:
            command.kill()


@dataclass
class Command:
    process: subprocess.Popen[bytes]
    log: Path
    sockets: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        """With all that it has started."""
        kill_session(self.pid)
        self.process.wait()
        shutil.rmtree(self.sockets, ignore_errors=True)

    def end(self, *, code: int = 0) -> str:
        """Wait for its end; returns what it has printed."""
        returned = self.process.wait(timeout=PATIENCE_S)
        output = self.log.read_text()
        assert returned == code, output[-3000:]
        return output


def test_a_search_survives_its_worker_and_its_driver(
    server: S3Server, machines: list[Machines], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker is killed, then the driver with all its workers; the next driver's machine has nothing but the store."""
    machines += [Machines(tmp_path / "s3", server.uri("runs")), Machines(tmp_path / "folder", None)]
    own, plain = machines
    first = own.search("first")
    wait_for(lambda: own.done() >= 1, "a trial is done", PATIENCE_S)
    wait_for(lambda: bool(workers_of(first.pid)), "a worker works", PATIENCE_S)
    time.sleep(1.0)
    for worker in workers_of(first.pid):
        os.kill(worker.pid, signal.SIGKILL)
    wait_for(lambda: own.done() >= 2, "the search has gone on", PATIENCE_S)
    time.sleep(1.0)
    first.kill()
    assert own.done() < TRIALS
    own.search("second").end()

    record = own.record()
    assert len(record.trials) == len(record.complete) == TRIALS  # none lost, none failed, none twice
    plain.search("one").end()
    assert own.weights("second") == plain.weights("one")
    assert [trial.objectives for trial in record.complete] == [trial.objectives for trial in plain.record().complete]

    client = MlflowTracker(*local_store(own.folder / "second" / "runs"))._client
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert len(runs) == TRIALS + 1
    assert {run.info.status for run in runs} == {"FINISHED"}
    models = client.search_logged_models([each.experiment_id for each in client.search_experiments()])
    assert len(models) == TRIALS

    # The store has all of it, and nothing else.
    filesystem, root = ArtifactPlace.of(server.uri("runs")).open()
    named = set()
    for key, version in StoredStudy(filesystem, f"{root}/{NAME}").newest().items():
        manifest = StoredFiles(filesystem, f"{root}/{NAME}", key).newest()
        assert manifest is not None
        assert not any(map(is_state, manifest.files)), key
        named |= {f"manifests/{key}/{version}.json"}
        named |= {
            f"trials/{key}/{each.version}/{path.removeprefix(f'trials/{key}/')}"
            for path, each in manifest.files.items()
        }
    there = set(server.objects(f"runs/{NAME}"))
    assert {path for path in there if path.startswith(("trials/", "manifests/"))} == named

    # A third machine reads it.
    front = own.command("third", "search.front", NAME, "--study-url", own.url, "--from-verdicts").end()
    assert f"those of {TRIALS} trials" in front
    doctor = own.command("third", "search.doctor", NAME, "--study-url", own.url, "--no-mlflow").end()
    assert "all is well" in doctor
    assert own.weights("third") == own.weights("second")
    again = own.search("third").end()
    assert f"has its {TRIALS} trials already" in again
    for scratch in own.folder.glob("*/scratch/*/*"):
        assert scratch.name == "lock" or scratch.name.startswith("graphs-") or not workers_of(first.pid)


def test_what_cannot_be_used_is_told_in_one_line(
    server: S3Server, machines: list[Machines], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert probe(server.uri("runs")) is None
    assert server.objects("runs") == {}
    missing = Machines(tmp_path, server.uri("runs", bucket="nobody"))
    machines.append(missing)
    (line,) = missing.search("one").end(code=2).splitlines()
    assert line.startswith("error: storage s3://nobody/runs")
    assert "NO_SUCH_BUCKET" in line
    assert "testing" not in line
    store = ("--storage", str(tmp_path / "one" / "runs"), "--artifacts", server.uri("runs", bucket="nobody"))
    open_study(config_of(tmp_path), tmp_path / "study.db")
    for words in (("search.doctor", "--no-mlflow"), ("search.front", "--from-verdicts")):
        *_, line = missing.command("one", *words, "tiny", "--study-url", missing.url, *store).end(code=2).splitlines()
        assert "there is no bucket or container nobody" in line
    server.process.kill()
    server.process.wait()
    told = probe(server.uri("runs"))
    assert told is not None
    assert "NETWORK_CONNECTION" in told
    assert "\n" not in told
