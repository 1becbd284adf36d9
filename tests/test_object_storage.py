"""Searches whose artefacts are in an object store, a real S3 server: no folder is shared between driver and workers."""

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from machines import Machine, SharedStudy, ended, new_machines
from studies import config_of, open_study

from benchmarks.live_search import wait_for, workers_of
from benchmarks.s3_server import ENVIRONMENT, S3Server, s3_server
from search.artifacts.artifact_place import ArtifactPlace, probe
from search.artifacts.manifests import StoredFiles, StoredStudy
from search.artifacts.places import TrialPlaces
from search.artifacts.trial_copies import is_state
from tracking.mlflow_tracker import MlflowTracker, local_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NAME, TRIALS = "digits", 4
SETTINGS = (
    "resources.concurrency=1",  # suggestions then depend on nothing but the seed
    "student.epochs=30",
    "tracking.enabled=true",  # on the machine itself
)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with s3_server() as running:
        yield running


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Callable[[str], Machine]]:
    """They have the database and the object store in common, and nothing else."""
    with new_machines(tmp_path) as new:
        yield new


def succeeded(machine: Machine, *words: str) -> str:
    """What a command has printed."""
    code, out, err = ended(machine.command(*words))
    assert code == 0, out + err
    return out


def weights(study: SharedStudy, artifacts: Path) -> dict[str, str]:
    """Hash of each finished student, as it is in a folder."""
    found = {}
    for trial in study.record.complete:
        file = TrialPlaces.of(artifacts, NAME, trial.key).student / "weights.safetensors"
        found[trial.key] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def test_a_search_survives_its_worker_and_its_driver(
    server: S3Server, machines: Callable[[str], Machine], tmp_path: Path
) -> None:
    """A worker is killed, then the driver with all its workers; the next driver's machine has nothing but the store."""
    own = SharedStudy(NAME, f"sqlite:///{tmp_path}/own.db", server.uri("runs"))
    plain = SharedStudy(NAME, f"sqlite:///{tmp_path}/plain.db", tmp_path / "plain")
    first, second, third = machines("first"), machines("second"), machines("third")
    driver = first.start(own, TRIALS, SETTINGS)

    def in_the_middle(done: int) -> bool:
        return own.done() >= done and any(first.scratch.rglob("state.safetensors"))

    wait_for(lambda: in_the_middle(1), "a trial is done and another is trained")
    for worker in workers_of(driver.pid):
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)
    wait_for(lambda: any(trial.deaths for trial in own.record.trials), "the driver has missed a worker")
    wait_for(lambda: in_the_middle(2), "the search has gone on")
    first.lose()
    assert own.done() < TRIALS
    code, out, err = second.run(own, TRIALS, SETTINGS)
    assert code == 0, out + err

    record = own.record
    assert len(record.trials) == len(record.complete) == TRIALS  # none lost, none failed, none twice
    code, out, err = machines("one").run(plain, TRIALS, SETTINGS)
    assert code == 0, out + err
    copy = second.here / "runs" / "artifacts"
    assert weights(own, copy) == weights(plain, tmp_path / "plain")
    assert [trial.objectives for trial in record.complete] == [trial.objectives for trial in plain.record.complete]

    client = MlflowTracker(*local_store(second.here / "runs"))._client
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
    front = succeeded(third, "search.front", NAME, "--study-url", own.url, "--from-verdicts")
    assert f"those of {TRIALS} trials" in front
    assert "all is well" in succeeded(third, "search.doctor", NAME, "--study-url", own.url, "--no-mlflow")
    assert weights(own, third.here / "runs" / "artifacts") == weights(own, copy)
    code, out, err = third.run(own, TRIALS, SETTINGS)
    assert code == 0, out + err
    assert f"has its {TRIALS} trials already" in out
    # Who ended by himself left no trial's scratch folder; programs' graphs stay for the next search.
    assert list(second.scratch.rglob(f"graphs-{NAME}")) != []
    assert list(second.scratch.rglob(f"{NAME}-*")) == []


def test_what_cannot_be_used_is_told_in_one_line(
    server: S3Server, machines: Callable[[str], Machine], tmp_path: Path
) -> None:
    assert probe(server.uri("runs")) is None
    assert server.objects("runs") == {}
    uri, machine = server.uri("runs", bucket="nobody"), machines("one")
    code, out, err = machine.run(SharedStudy(NAME, f"sqlite:///{tmp_path}/none.db", uri), TRIALS, SETTINGS)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: storage s3://nobody/runs")
    assert "NO_SUCH_BUCKET" in line
    assert "testing" not in line
    store = ("--storage", str(tmp_path / "runs"), "--artifacts", uri)
    open_study(config_of(tmp_path), tmp_path / "study.db")
    for words in (("search.doctor", "--no-mlflow"), ("search.front", "--from-verdicts")):
        url = f"sqlite:///{tmp_path}/study.db"
        code, out, err = ended(machine.command(*words, "tiny", "--study-url", url, *store))
        assert code == 2, out + err
        assert "there is no bucket or container nobody" in (err or out).splitlines()[-1]
    server.process.kill()
    server.process.wait()
    told = probe(server.uri("runs"))
    assert told is not None
    assert "NETWORK_CONNECTION" in told
    assert "\n" not in told
