"""The MLflow tracker on a real database: the contract, and what the pages and queries rely on."""

import contextlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from contracts import STUDY, TrackerContract, TrialView
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from tracking.journal import STUDY_JOURNAL, Journal, save_study_info
from tracking.mlflow_tracker import MlflowTracker, local_store, prepare_environment
from tracking.replay import main as replay_main
from tracking.sender import Delivery, forget_sent
from tracking.tracker import TAG_TRIAL, MetricRow, OtherStudyError, RefusedError, StudyInfo, Tracker
from tracking.ui import main as ui_main

# The first test that touches MLflow pays for its import and the creation of a database.
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creating the tables takes a second, copying them nothing."""
    storage = tmp_path_factory.mktemp("empty")
    MlflowTracker(*local_store(storage))
    return storage / "mlflow" / "mlflow.db"


@pytest.fixture
def storage(tmp_path: Path, empty_database: Path) -> Path:
    (tmp_path / "storage" / "mlflow").mkdir(parents=True)
    shutil.copy(empty_database, tmp_path / "storage" / "mlflow" / "mlflow.db")
    return tmp_path / "storage"


@pytest.fixture
def tracker(storage: Path) -> MlflowTracker:
    return MlflowTracker(*local_store(storage))


@pytest.fixture
def client(storage: Path) -> MlflowClient:
    return MlflowClient(local_store(storage)[0])


def runs(client: MlflowClient, query: str = "") -> list[Run]:
    experiments = [each.experiment_id for each in client.search_experiments() if each.name != "Default"]
    return list(client.search_runs(experiments, query)) if experiments else []


def studies(client: MlflowClient, name: str = STUDY.name) -> list[Run]:
    return runs(client, f"tags.`cert.kind` = 'study' and tags.`cert.study` = '{name}'")


def trials(client: MlflowClient, name: str = STUDY.name) -> list[Run]:
    return runs(client, f"tags.`cert.kind` = 'trial' and tags.`cert.study` = '{name}'")


def files(client: MlflowClient, run_id: str, folder: str = "") -> set[str]:
    found: set[str] = set()
    for entry in client.list_artifacts(run_id, folder or None):
        found |= files(client, run_id, entry.path) if entry.is_dir else {entry.path}
    return found


def view(client: MlflowClient, run: Run) -> TrialView:
    history = {
        name: [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    found = frozenset(files(client, run.info.run_id))
    return TrialView(run.info.status, run.data.params, history, found)


class TestMlflowTracker(TrackerContract):
    @pytest.fixture(autouse=True)
    def use_client(self, client: MlflowClient) -> None:
        self.client = client

    def observe(self, tracker: Tracker) -> dict[str, TrialView] | None:
        found: dict[str, TrialView] = {}
        for run in trials(self.client):
            key = run.data.tags[TAG_TRIAL]
            found[f"{key} again" if key in found else key] = view(self.client, run)
        return found


def test_a_study_is_a_parent_run_with_trials_below(tracker: MlflowTracker, client: MlflowClient) -> None:
    tracker.open_study(STUDY)
    tracker.start_trial("t1", {"alpha": 0.5}, {"host": "here"}, time_ms=5000)
    tracker.end_trial("t1", "FINISHED", {"end": "complete"}, time_ms=9000)
    (parent,), (child,) = studies(client), trials(client)
    assert parent.info.run_name == STUDY.name
    assert parent.info.status == "RUNNING"
    assert parent.data.params == {"width": "4"}
    assert parent.data.tags["owner"] == "me"
    assert parent.data.tags["mlflow.note.content"].endswith("\n\nA search.")
    assert child.info.run_name == "t1"
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (child.data.tags["host"], child.data.tags["end"]) == ("here", "complete")
    assert (child.info.start_time, child.info.end_time) == (5000, 9000)
    assert tracker.study_url() is None


def test_a_new_process_finds_the_same_runs(storage: Path, client: MlflowClient) -> None:
    for _ in range(2):
        tracker = MlflowTracker(*local_store(storage))
        tracker.open_study(STUDY)
        tracker.start_trial("t1", {"alpha": 0.5}, {})
        tracker.end_trial("t1", "FAILED", {})
        tracker.close_study("FINISHED")
        assert sorted(run.info.status for run in runs(client)) == ["FAILED", "FINISHED"]
    tracker.open_study(STUDY, resume=False)
    assert studies(client)[0].info.status == "FINISHED"
    tracker.open_study(STUDY)
    assert studies(client)[0].info.status == "RUNNING"
    assert len(runs(client)) == 2


def test_files_and_description_of_a_study(
    tracker: MlflowTracker, client: MlflowClient, tmp_path: Path, storage: Path
) -> None:
    (tmp_path / "figures").mkdir()
    picture = tmp_path / "figures" / "front.png"
    picture.write_bytes(b"1")
    tracker.open_study(STUDY)
    artifacts = {"front.png": picture, "tables/other.png": picture, "all": picture.parent}
    tracker.log_study({"hypervolume": 0.5}, {"best": "t1"}, artifacts, step=3, description="![f](artifact:front.png)")
    picture.write_bytes(b"22")
    tracker.log_study({}, {}, {"front.png": picture})
    (parent,) = studies(client)
    run_id = parent.info.run_id
    assert files(client, run_id) == {"front.png", "tables/other.png", "all/front.png"}
    kept = storage / "mlflow" / "artifacts" / run_id / "artifacts" / "front.png"
    assert kept.read_bytes() == b"22"
    assert [(each.step, each.value) for each in client.get_metric_history(run_id, "hypervolume")] == [(3, 0.5)]
    note = parent.data.tags["mlflow.note.content"]
    assert note.endswith(f"\n\n![f](get-artifact?path=front.png&run_uuid={run_id})")


def test_long_texts_end_in_an_ellipsis(tracker: MlflowTracker, client: MlflowClient) -> None:
    tracker.open_study(STUDY)
    for _ in range(2):
        tracker.start_trial("t1", {"layers": "x" * 7000}, {"reason": "y" * 9000})
    (trial,) = trials(client)
    assert trial.data.params["layers"] == "x" * 5999 + "…"
    assert trial.data.tags["reason"] == "y" * 7999 + "…"


def test_a_changed_param_is_refused_and_its_tags_are_not(tracker: MlflowTracker, client: MlflowClient) -> None:
    tracker.open_study(STUDY)
    tracker.start_trial("t1", {"alpha": 0.5}, {})
    with pytest.raises(RefusedError, match="alpha"):
        tracker.start_trial("t1", {"alpha": 0.6}, {"attempt": "2"})
    (trial,) = trials(client)
    assert trial.data.tags["attempt"] == "2"
    assert trial.data.params == {"alpha": "0.5"}


def test_what_a_user_deletes_is_made_anew(tracker: MlflowTracker, client: MlflowClient) -> None:
    tracker.open_study(STUDY)
    tracker.start_trial("t1", {}, {})
    client.delete_run(trials(client)[0].info.run_id)
    with pytest.raises(MlflowException):
        tracker.log_metrics("t1", [MetricRow("loss", 1.0, 1000, 0)])
    tracker.log_metrics("t1", [MetricRow("loss", 1.0, 2000, 1)])
    assert len(trials(client)) == 1
    client.delete_experiment(studies(client)[0].info.experiment_id)
    tracker.open_study(STUDY)
    assert len(studies(client)) == 1


def test_a_deleted_study_gets_its_trials_back(tracker: MlflowTracker, client: MlflowClient) -> None:
    tracker.open_study(STUDY)
    tracker.start_trial("t1", {}, {})
    client.delete_run(studies(client)[0].info.run_id)
    for _ in range(2):  # the first call finds it gone
        with contextlib.suppress(MlflowException):
            tracker.open_study(STUDY)
    tracker.start_trial("t1", {}, {})  # as a replay from the start says it
    (study,), (trial,) = studies(client), trials(client)
    assert trial.data.tags["mlflow.parentRunId"] == study.info.run_id


def test_another_study_of_the_same_name_is_tracked(storage: Path, client: MlflowClient) -> None:
    """`a` with seed 1 and `a-seed1` with seed 0 bear one name. A param cannot be changed; rows must not wait for it."""
    for seed in (0, 1):
        tracker = MlflowTracker(*local_store(storage))
        tracker.open_study(StudyInfo("a-seed1", STUDY.experiment, params={"seed": seed}))
        tracker.start_trial(f"t{seed}", {}, {})
    assert studies(client, "a-seed1")[0].data.params == {"seed": "0"}
    assert len(trials(client, "a-seed1")) == 2


def test_runs_doubled_by_a_repeated_request_become_one(tracker: MlflowTracker, client: MlflowClient) -> None:
    tracker.open_study(STUDY)
    create_run = tracker._client.create_run

    def create_twice(*args: object, **kwargs: object) -> object:
        create_run(*args, **kwargs)
        return create_run(*args, **kwargs)

    tracker._client.create_run = create_twice
    tracker.start_trial("t1", {}, {})
    tracker.log_metrics("t1", [MetricRow("loss", 1.0, 1000, 0)])
    (trial,) = trials(client)
    assert trial.data.metrics == {"loss": 1.0}


def test_a_file_that_a_server_will_never_take_is_refused(
    tracker: MlflowTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy before a server limits what it passes; the rows behind the file are to arrive all the same."""
    answer = requests.Response()
    answer.status_code = 413

    def refuse(*arguments: object) -> None:
        raise requests.HTTPError("413 Client Error: Request Entity Too Large", response=answer)

    tracker.open_study(STUDY)
    monkeypatch.setattr(tracker._client, "log_artifact", refuse)
    with pytest.raises(RefusedError, match="too large for sqlite"):
        tracker.log_artifact("t1", tmp_path / "weights", "")


def test_nothing_works_before_a_study_is_open(tracker: MlflowTracker) -> None:
    with pytest.raises(ValueError, match="call open_study"):
        tracker.start_trial("t1", {}, {})


def test_stale_trials_of_more_than_a_page(tracker: MlflowTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracking.mlflow_tracker._PAGE", 2)
    tracker.open_study(STUDY)
    keys = [f"t{number}" for number in range(5)]
    for key in keys:
        tracker.start_trial(key, {}, {})
    assert tracker.close_stale({"t3"}) == [key for key in keys if key != "t3"]
    assert tracker.close_stale({"t3"}) == []


def test_the_users_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "9")
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    prepare_environment()
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "9"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_journal_needs_no_mlflow() -> None:
    command = "import sys, tracking, tracking.mlflow_tracker; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


# --- replay ---


def write_study(storage: Path, study: StudyInfo = STUDY, num_steps: int = 20) -> Path:
    journals = storage / "artifacts" / study.name / "journal"
    save_study_info(journals, study)
    for key in ("t1", "t2"):
        with Journal(journals / f"{key}.jsonl") as journal:
            journal.start(key, {"alpha": 0.5}, {})
            for step in range(num_steps):
                journal.metrics(step, {"loss": 1.0 / (step + 1)})
            journal.end("FINISHED", {"certified_accuracy": 0.25}, {})
    with Journal(journals / STUDY_JOURNAL) as journal:
        journal.study({"hypervolume": 0.1}, {}, {}, step=2)
        journal.close_study("FINISHED")
    return journals


def everything(client: MlflowClient, study: str = STUDY.name) -> dict[str, TrialView]:
    return {run.info.run_name: view(client, run) for run in [*studies(client, study), *trials(client, study)]}


def test_replay_from_zero_any_number_of_times(storage: Path, client: MlflowClient) -> None:
    journals = write_study(storage)
    seen = []
    for _ in range(3):
        assert replay_main([str(storage)]) == 0
        seen.append(everything(client))
        forget_sent(journals)
    assert seen[0] == seen[1] == seen[2]
    assert len(runs(client)) == 3
    history = {"loss": [(step, 1.0 / (step + 1)) for step in range(20)], "certified_accuracy": [(0, 0.25)]}
    assert seen[0]["t2"] == TrialView("FINISHED", {"alpha": "0.5"}, history)
    assert seen[0][STUDY.name].status == "FINISHED"
    assert seen[0][STUDY.name].history == {"hypervolume": [(2, 0.1)]}


def test_replay_completes_what_a_killed_search_sent(storage: Path, client: MlflowClient) -> None:
    journals = write_study(storage)
    Delivery(journals, MlflowTracker(*local_store(storage))).send()
    complete = everything(client)
    (journals / "t1.jsonl.sent").write_text("0")
    (journals / "t2.jsonl.sent").unlink()
    assert replay_main([str(storage), "--study", STUDY.name]) == 0
    assert everything(client) == complete


def test_replay_of_a_trial_that_was_retried(storage: Path, client: MlflowClient) -> None:
    journals = write_study(storage, num_steps=2)
    with Journal(journals / "t1.jsonl") as journal:
        journal.start("t1", {"alpha": 0.5}, {})
        journal.metrics(2, {"loss": 0.1})
        journal.end("FAILED", {}, {"reason": "out of memory"})
    assert replay_main([str(storage)]) == 0
    assert len(trials(client)) == 2
    view = everything(client)["t1"]
    assert view.status == "FAILED"
    assert view.history["loss"] == [(0, 1.0), (1, 0.5), (2, 0.1)]


def test_replay_to_another_store_from_the_start(storage: Path, tmp_path: Path) -> None:
    write_study(storage)
    uri, _ = local_store(tmp_path / "second")
    assert replay_main([str(storage)]) == 0
    assert replay_main([str(storage), "--from-start", "--tracking-uri", uri]) == 0
    assert len(trials(MlflowClient(uri))) == 2


def test_replay_command_line(storage: Path, client: MlflowClient) -> None:
    write_study(storage)
    command = [sys.executable, "-m", "tracking.replay", str(storage)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # For each trial: start, 20 steps, end. For the study: one value, the close.
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{STUDY.name}: 46 rows sent, 0 left\n", "")
    assert len(trials(client)) == 2


def test_replay_counts_what_an_absent_server_leaves(
    storage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    write_study(storage, StudyInfo("s", "digits", tracking_uri="http://127.0.0.1:9"))
    assert replay_main([str(storage)]) == 1
    assert capsys.readouterr().out.startswith("s: 0 rows sent, 46 left (MlflowException: API request")


def test_replay_says_what_it_expected(storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay_main([str(tmp_path / "nowhere")]) == 2
    assert "expected the folder of a search" in capsys.readouterr().err
    write_study(storage)
    assert replay_main([str(storage), "--study", "other"]) == 2
    assert f"give --study one of {STUDY.name}" in capsys.readouterr().err
    (storage / "artifacts" / STUDY.name / "journal" / "study.json").write_text("{}")
    assert replay_main([str(storage)]) == 2
    error = capsys.readouterr().err
    assert "study.json does not describe a study" in error
    assert error.count("\n") == 1


# --- ui ---


def test_the_ui_says_what_it_expected(storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ui_main(["--storage", str(tmp_path)]) == 2
    assert "mlflow.db is not there" in capsys.readouterr().err
    assert ui_main(["--storage", str(storage), "--port", "99999"]) == 2
    assert "give another --port" in capsys.readouterr().err


def test_a_study_of_another_storage_folder_is_not_written_over(storage: Path, tmp_path: Path) -> None:
    """Both keep their rows; the second says what to do, and is sent once it has a name of its own."""
    mine, other = (replace(STUDY, identifier=text) for text in ("mine", "other"))
    tracker = MlflowTracker(*local_store(storage))
    for _ in range(2):  # the same one goes on
        tracker.open_study(mine)
    tracker.start_trial("t1", {"alpha": 1}, {})
    journals = tmp_path / "other"
    save_study_info(journals, other)
    with Journal(journals / "t1.jsonl") as journal:
        journal.start("t1", {"alpha": 2}, {})
        journal.end("FINISHED", {"certified_accuracy": 0.5}, {})
    delivery = Delivery(journals, MlflowTracker(*local_store(storage)))
    with pytest.raises(OtherStudyError, match=r"another study 'study-a' .*: give one of them a name of its own"):
        delivery.send()
    assert delivery.rows_left() == 2
    (run,) = tracker._client.search_runs(["1"], "tags.`cert.trial` = 't1'")
    assert (run.data.params, run.data.metrics, run.info.status) == ({"alpha": "1"}, {}, "RUNNING")
    save_study_info(journals, replace(other, name="study-b"))
    delivery = Delivery(journals, MlflowTracker(*local_store(storage)))
    delivery.send()
    assert delivery.rows_left() == 0
