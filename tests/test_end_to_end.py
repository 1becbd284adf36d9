"""Real searches: the command line, Ray Tune with two workers, Optuna, MLflow, and what is left after a kill.

Each search is its own session of processes with its own Ray, found and ended by the session's number, so that
nothing of anybody else's is touched.
"""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from benchmarks.live_search import EPOCHS, PATIENCE_S, SMALL_TRIALS, LiveSearch, wait_for, workers_of
from ccdist import checkpoint
from ccdist.data import ImageSet, load_dataset
from ccdist.networks import Network
from ccdist.verification import accuracies
from search import front, run
from search.artifacts.places import TrialPlaces
from search.recipe import Recipe
from search.studies.records import RungValues, StudyRecord, TrialRecord, TrialResult
from search.studies.study_record import load_record
from search.trials.verifying import Spent, load_verdicts, verify_trial
from tracking.mlflow_tracker import MlflowTracker, local_store

pytestmark = pytest.mark.timeout(500)

SETTINGS = [
    "resources.concurrency=2",
    *SMALL_TRIALS,
    "stopping=false",  # what is stopped depends on who ends first; test_kills.py has the default
]
# The second trial diverges: its weight of the L1 norm is beyond float32. Two others are recipes that train.
POINT = "loss: cc_dist, beta: 5, warm_up: 0.02, ramp: 0.5, train_epsilon_factor: 1.0"
POINTS = ", ".join(
    f"{{{POINT}, alpha: {alpha}, l1: {l1}}}" for alpha, l1 in [(0.05, "1.0e-6"), (0.3, "1.0e+39"), (0.3, "1.0e-6")]
)
DIVERGING = [
    "student.l1={choices: [1.0e-7, 2.0e-7, 5.0e-7, 1.0e-6, 2.0e-6, 5.0e-6, 1.0e-5, 2.0e-5, 1.0e+39]}",
    f"search.points=[{POINTS}]",
]


def client_of(storage: Path) -> MlflowClient:
    return MlflowTracker(*local_store(storage))._client


@dataclass
class Search:
    """A storage folder, and the searches that are run in it."""

    storage: Path
    ray_folder: Path
    settings: list[str] = field(default_factory=lambda: SETTINGS)

    def arguments(self, trials: int) -> list[str]:
        flags = [flag for setting in self.settings for flag in ("--set", setting)]
        return ["digits", "--storage", str(self.storage), "--trials", str(trials), *flags]

    @contextmanager
    def started(self, trials: int) -> Iterator[subprocess.Popen[str]]:
        """A running driver; at the end no worker of its session is left, or the test fails."""
        search = LiveSearch("digits", self.storage, self.ray_folder, self.settings)
        driver = search.start(trials)
        try:
            yield driver
            wait_for(lambda: workers_of(driver.pid) == [], "the workers are gone")
        finally:
            search.clean_up()
            driver.communicate()

    def run(self, trials: int) -> tuple[int, str, str]:
        """A search from start to end -> exit code, stdout, stderr."""
        with self.started(trials) as driver:
            out, err = driver.communicate(timeout=PATIENCE_S)
        return driver.returncode, out, err

    @property
    def record(self) -> StudyRecord:
        return load_record(f"sqlite:///{self.storage / 'study.db'}", "digits")

    def by_state(self) -> dict[str, list[TrialRecord]]:
        states: dict[str, list[TrialRecord]] = {"COMPLETE": [], "FAILED": [], "RUNNING": [], "WAITING": []}
        for trial in self.record.trials:
            states[trial.state].append(trial)
        return states

    def count(self, state: str) -> int:
        """Trials of Optuna's state, read beside the running search; 0 while there is no study."""
        try:
            connection = sqlite3.connect(f"file:{self.storage / 'study.db'}?mode=ro", uri=True)
        except sqlite3.OperationalError:
            return 0
        try:
            found = connection.execute("SELECT count(*) FROM trials WHERE state = ?", (state,)).fetchone()
        except sqlite3.OperationalError:
            return 0
        finally:
            connection.close()
        return int(found[0])

    def in_the_middle(self) -> list[Path]:
        """The training states of students that have some epochs behind them and some before them."""
        return list(self.storage.glob("artifacts/digits/trials/*/state.safetensors"))

    def runs(self, kind: str) -> dict[str, Run]:
        """The runs of MLflow by their names."""
        client = client_of(self.storage)
        experiments = [each.experiment_id for each in client.search_experiments() if each.name != "Default"]
        found = list(client.search_runs(experiments, f"tags.`cert.kind` = '{kind}'"))
        names = [run.info.run_name for run in found]
        assert len(set(names)) == len(names), f"doubled runs: {sorted(names)}"
        return dict(zip(names, found, strict=True))


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    """A short path: Ray keeps sockets there, whose paths may have a hundred characters."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_folder: Path) -> Search:
    """A search of four trials that nothing disturbed; one more diverged."""
    search = Search(tmp_path_factory.mktemp("search") / "storage", ray_folder, [*SETTINGS, *DIVERGING])
    code, out, err = search.run(4)
    assert (code, err) == (0, ""), err
    assert "study digits: digits, threat linf 1/10, 0 of 4 trials done, 2 at once on this machine" in out
    assert "[4/4]" in out
    assert "digits-0001  FAILED  not finite: the student's loss" in out
    assert "report: " in out
    return search


@pytest.fixture
def fresh(tmp_path: Path, ray_folder: Path) -> Search:
    return Search(tmp_path / "storage", ray_folder)


def artifact_names(run: Run) -> set[str]:
    uri = run.info.artifact_uri
    assert uri is not None
    root = Path(uri.removeprefix("file://"))
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def check_mlflow(search: Search) -> None:
    """MLflow shows the study as it is: finished runs with everything in them, none doubled, none running."""
    record = search.record
    (parent,) = search.runs("study").values()
    assert parent.info.status == "FINISHED"
    assert artifact_names(parent) >= {"front.html", "front.png", "report.html"}
    assert parent.data.metrics["num_complete"] == len(record.complete)
    client, children = client_of(search.storage), search.runs("trial")
    statuses = {"COMPLETE": "FINISHED", "FAILED": "FAILED"}
    assert {name: run.info.status for name, run in children.items()} == {
        trial.key: statuses[trial.state] for trial in record.trials
    }
    for trial in record.complete:
        child = children[trial.key]
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.tags["cert.state"] == "COMPLETE"
        assert child.data.params == {name: str(value) for name, value in trial.params.items()}
        for name in ("standard_accuracy", "adversarial_accuracy", "certified_accuracy", "certified_upper", "seconds"):
            assert child.data.metrics[name] == pytest.approx(getattr(trial, name))
        for name in ("student/loss", "validation/standard_accuracy", "student/epsilon"):
            history = client.get_metric_history(child.info.run_id, name)
            assert sorted(point.step for point in history) == list(range(1, EPOCHS + 1)), name
        assert artifact_names(child) >= {
            "student/weights.safetensors",
            "student/network.json",
            "verification/verdicts.parquet",
        }


class Silent:
    """Nobody follows."""

    def advanced(self, phase: str, done: int, of: int) -> None: ...
    def rung(self, name: str, values: RungValues) -> None: ...
    def verifying(self, result: TrialResult, phase: str, done: int, of: int) -> None: ...


def verified(network: Network, validation: ImageSet, recipe: Recipe) -> pa.Table:
    """The verdicts of a network, found once more as a trial finds them."""
    with tempfile.TemporaryDirectory() as folder:
        places = TrialPlaces.of(Path(folder), "again", "again-0000")
        places.folder.mkdir(parents=True)
        verify_trial(network, validation, recipe.verification, places, spent=Spent({}, {}), reports=Silent())
        return load_verdicts(places)


def check_results(search: Search) -> None:
    """Every stored number follows from the stored verdicts, and those from the stored network."""
    for trial in search.record.complete:
        folder = search.storage / "artifacts" / "digits" / "trials" / trial.key
        table = pq.read_table(folder / "verdicts.parquet")
        metadata = checkpoint.load_description(folder / "student")["metadata"]
        recipe = Recipe.model_validate(metadata["recipe"])
        validation = load_dataset(recipe.data).validation
        network = checkpoint.load(folder / "student")
        again = verified(network, validation, recipe)
        stored = (
            trial.standard_accuracy,
            trial.adversarial_accuracy,
            trial.certified_accuracy,
            trial.certified_upper,
            trial.num_images,
        )
        for measured in (accuracies(table), accuracies(again)):
            assert stored == (
                measured.standard,
                measured.adversarial,
                measured.certified,
                measured.certified_upper,
                measured.num_images,
            )
        assert again["verdict"].equals(table["verdict"])
        assert metadata["key"] == trial.key
        assert recipe.student.seed == trial.seed
        assert not list(folder.glob("*.unfinished"))
        assert not (folder / "state.safetensors").exists()


def check_complete(search: Search, trials: int, failed: Sequence[str] = ()) -> None:
    states = search.by_state()
    assert len(states["COMPLETE"]) == trials
    assert states["RUNNING"] == states["WAITING"] == []
    assert [trial.key for trial in states["FAILED"]] == list(failed)
    assert [trial.key for trial in search.record.trials] == [f"digits-{i:04d}" for i in range(trials + len(failed))]


def test_a_search_has_exactly_its_trials(finished: Search) -> None:
    check_complete(finished, 4, failed=["digits-0001"])
    record = finished.record
    assert (record.dataset, record.threat, record.num_images) == ("digits", "linf 1/10", 80)
    for trial in record.complete:
        assert trial.certified_accuracy is not None
        assert trial.certified_upper is not None
        assert trial.adversarial_accuracy is not None
        assert trial.standard_accuracy is not None
        assert trial.certified_accuracy <= trial.certified_upper <= trial.adversarial_accuracy
        assert trial.adversarial_accuracy <= trial.standard_accuracy
    assert max(trial.standard_accuracy or 0 for trial in record.complete) > 0.5  # it learned something


def test_a_loss_that_is_not_finite_fails_its_trial_only(finished: Search) -> None:
    trial = finished.record.trials[1]
    assert trial.state == "FAILED"
    assert trial.reason is not None
    assert trial.reason.startswith("not finite: the student's loss or gradient is not finite at step 0")
    assert trial.objectives is None
    run = finished.runs("trial")["digits-0001"]
    assert run.info.status == "FAILED"
    assert run.data.tags["cert.reason"] == trial.reason
    assert "standard_accuracy" not in run.data.metrics


def test_the_teacher_is_trained_once(finished: Search) -> None:
    assert len(list(finished.storage.glob("artifacts/teachers/*/*/weights.safetensors"))) == 1
    payers = [trial for trial in finished.record.complete if trial.costs["teacher"] > 0]
    assert len(payers) <= 1  # none, when it was the trial that diverged
    assert len([trial for trial in finished.record.trials if trial.params["loss"] == "cc_dist"]) >= 3


def test_every_result_follows_from_what_is_stored(finished: Search) -> None:
    check_results(finished)


def test_mlflow_holds_the_whole_study(finished: Search) -> None:
    check_mlflow(finished)


def front_json(search: Search, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert front.main(["digits", "--storage", str(search.storage), "--json"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


def test_the_front_as_json(finished: Search, capsys: pytest.CaptureFixture[str]) -> None:
    shown = front_json(finished, capsys)
    assert set(shown) == {
        "study",
        "objectives",
        "hypervolume",
        "hypervolume_bounds",
        "reference",
        "trials",
        "configurations",
        "front",
    }
    assert shown["study"] == "digits"
    assert shown["objectives"] == ["standard_accuracy", "certified_accuracy"]
    assert shown["reference"] == [0.85, 0.4]
    assert set(shown["trials"][0]) == {
        "key",
        "state",
        "params",
        "standard_accuracy",
        "certified_accuracy",
        "certified_upper",
        "adversarial_accuracy",
        "seconds",
        "configuration",
        "seed",
        "verification_state",
        "reason",
        "deaths",
        "rungs",
    }
    assert [trial["key"] for trial in shown["trials"]] == [f"digits-000{number}" for number in range(5)]
    assert [trial["state"] for trial in shown["trials"]] == ["COMPLETE", "FAILED", *["COMPLETE"] * 3]
    points = {
        trial["key"]: (trial["standard_accuracy"], trial["certified_accuracy"])
        for trial in shown["trials"]
        if trial["state"] == "COMPLETE"
    }
    beaten = {
        key
        for key, (standard, certified) in points.items()
        for other in points.values()
        if other[0] >= standard and other[1] >= certified and other != (standard, certified)
    }
    assert shown["front"] == sorted(set(points) - beaten)


def test_the_same_command_again_shows_the_same_at_once(finished: Search, capsys: pytest.CaptureFixture[str]) -> None:
    before = front_json(finished, capsys)
    started = time.monotonic()
    assert run.main(finished.arguments(4)) == 0
    assert time.monotonic() - started < 10
    captured = capsys.readouterr()
    assert "study digits has its 4 trials already" in captured.out
    assert captured.err == ""
    assert front_json(finished, capsys) == before


def test_a_killed_driver_loses_and_doubles_nothing(finished: Search) -> None:
    """Four more trials for the finished study; the driver is killed in the middle of them and started again."""
    four = finished.record.complete[:4]
    with finished.started(8) as driver:
        wait_for(
            lambda: (
                finished.count("COMPLETE") >= 5 and finished.count("RUNNING") >= 1 and finished.in_the_middle() != []
            ),
            "one trial is complete and another is in the middle",
        )
        driver.kill()
        driver.wait()
    killed = finished.by_state()
    assert 5 <= len(killed["COMPLETE"]) < 8
    assert killed["RUNNING"]
    assert killed["COMPLETE"][:4] == list(four)
    code, out, err = finished.run(8)
    assert (code, err) == (0, ""), err
    assert f"{len(killed['COMPLETE'])} of 8 trials done" in out
    check_complete(finished, 8, failed=["digits-0001"])
    record = finished.record
    for trial in killed["COMPLETE"]:
        assert record.trials[trial.number] == trial
    for trial in killed["RUNNING"]:
        resumed = record.trials[trial.number]
        assert (resumed.key, resumed.state) == (trial.key, "COMPLETE")
        assert resumed.params | trial.params == resumed.params  # the kill may have cut off their drawing
    check_results(finished)
    check_mlflow(finished)


@pytest.mark.slow
def test_three_trials_that_are_not_finite_end_the_search(fresh: Search) -> None:
    fresh.settings = [*SETTINGS, "student.l1=1.0e+39"]  # beyond float32
    code, _, err = fresh.run(8)
    assert code == 3
    assert err.startswith("error: 3 trials in a row failed for the same reason: not finite: the student's loss")
    assert err.count("\n") == 1
    states = fresh.by_state()
    assert len(states["FAILED"]) in (3, 4)  # the fourth ran beside the third
    assert states["COMPLETE"] == states["RUNNING"] == []
    assert all("not finite" in (trial.reason or "") for trial in states["FAILED"])
    (parent,) = fresh.runs("study").values()
    assert parent.info.status == "FAILED"
    children = fresh.runs("trial")
    assert set(children) == {trial.key for trial in states["FAILED"]}
    assert {run.info.status for run in children.values()} == {"FAILED"}
    assert all("not finite" in run.data.tags["cert.reason"] for run in children.values())


@pytest.mark.slow
def test_more_gpus_than_there_are_start_nothing(fresh: Search) -> None:
    fresh.settings = [*SETTINGS, "resources.gpu=64"]
    code, out, err = fresh.run(4)
    assert (code, out) == (2, "")
    assert err.startswith("error: a trial asks for 1 CPUs and 64 GPUs, but no node has as many")
    assert err.count("\n") == 1
    assert not (fresh.storage / "study.db").exists()
    assert not (fresh.storage / "mlflow").exists()


@pytest.mark.slow
def test_a_killed_worker_costs_at_most_its_trial(fresh: Search) -> None:
    with fresh.started(4) as driver:
        wait_for(lambda: fresh.in_the_middle() != [], "a student is in the middle of its training")
        workers = workers_of(driver.pid)
        assert workers
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
        _, err = driver.communicate(timeout=PATIENCE_S)
        assert driver.returncode == 0, err
    deaths = fresh.by_state()["FAILED"]
    assert len(deaths) <= 2
    assert all((trial.reason or "").startswith("worker died") for trial in deaths)
    check_complete(fresh, 4, failed=[trial.key for trial in deaths])
    check_results(fresh)
    check_mlflow(fresh)


@pytest.mark.slow
def test_ctrl_c_stops_and_the_same_command_goes_on(fresh: Search) -> None:
    with fresh.started(5) as driver:
        wait_for(lambda: fresh.count("COMPLETE") >= 1 and fresh.in_the_middle() != [], "a trial is in the middle")
        os.killpg(driver.pid, signal.SIGINT)  # as a terminal does
        out, err = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 130, err
    assert "Traceback" not in err
    stopped = fresh.by_state()
    assert stopped["COMPLETE"]
    assert f"stopped after {len(stopped['COMPLETE'])} of 5 trials; go on with: python -m search.run digits" in out
    (parent,) = fresh.runs("study").values()
    assert parent.info.status == "KILLED"
    assert "RUNNING" not in {run.info.status for run in fresh.runs("trial").values()}
    code, _, err = fresh.run(5)
    assert (code, err) == (0, ""), err
    check_complete(fresh, 5)
    afterwards = fresh.by_state()["COMPLETE"]
    assert all(trial in afterwards for trial in stopped["COMPLETE"])
    check_results(fresh)
    check_mlflow(fresh)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["no trial yet", "teacher", "first trial complete"])
def test_a_driver_killed_early_is_continued(moment: str, fresh: Search) -> None:
    reached = {
        "no trial yet": lambda: fresh.count("RUNNING") + fresh.count("WAITING") >= 1,
        "teacher": lambda: list(fresh.storage.glob("artifacts/teachers/*/*.claim")) != [],
        "first trial complete": lambda: fresh.count("COMPLETE") >= 1,
    }[moment]
    with fresh.started(3) as driver:
        wait_for(reached, moment)
        driver.kill()
        driver.wait()
    code, _, err = fresh.run(3)
    assert (code, err) == (0, ""), err
    check_complete(fresh, 3)
    check_results(fresh)
    check_mlflow(fresh)
