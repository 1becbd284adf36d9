"""What the driver tells of a study: its files, its journal from start to end, and how that looks in MLflow."""

import errno
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from studies import closed_form, config_of, open_study

from search.artifacts.places import TrialPlaces
from search.config import SearchConfig, load_search_config
from search.results.configurations import study_front
from search.results.report import front_trials
from search.space import Space
from search.storage import Storage
from search.studies.records import StudyRecord
from search.study import Study
from search.tracked import bookkeeping
from search.tracked.bookkeeping import close_study, is_settled, study_info, tracked
from search.tracked.front_log import FrontLog
from search.tracked.redrawing import Redrawing
from search.tracked.run_names import end_tags, result_metrics
from search.tracked.study_files import DRAWN, PACKAGES, describe_environment, space_text, trials_table
from tracking.journal import STUDY_JOURNAL, CloseRow, FrontRow, Journal, StudyRow, read_rows
from tracking.mlflow_tracker import local_store
from tracking.tables import table_json, tables_tag
from tracking.tracker import TAG_FRONT, TAG_TRIAL

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(60)  # the first import of MLflow and of the figures


# ---- A study ---------------------------------------------------------------------------------------------------------


class Search:
    """A search without Ray or training: results are a formula, everything else is as the driver does it."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.config = config_of(folder, **changes)
        self.storage = Storage.of(self.config, str(folder / "storage"))
        self.storage.prepare()
        self.study = self.opened()

    def opened(self) -> Study:
        return open_study(self.config, self.storage.folder / "study.db")

    @property
    def journal(self) -> Path:
        return self.storage.journals("tiny") / STUDY_JOURNAL

    def rows(self) -> list[Any]:
        return [line.row for line in read_rows(self.journal)[0]]

    def run(self, trials: int, *, is_killed: bool = False) -> StudyRecord:
        """So many further trials; is_killed: nothing is said at the end."""
        with tracked(self.config, self.storage, live_keys=set()):
            with FrontLog(self.journal, self.study, Redrawing(lambda record: {}), lambda: True) as log:
                for _ in range(trials):
                    self._trial(log)
            if not is_killed:
                close_study(self.study.record(), self.storage, "FINISHED")
        return self.study.record()

    def _trial(self, log: FrontLog) -> None:
        assignment = self.study.ask()
        result = closed_form(assignment.params)
        log.started(assignment.key)
        with Journal(TrialPlaces.of(self.storage.artifacts, "tiny", assignment.key).journal) as journal:
            journal.start(assignment.key, assignment.params, {})
            journal.end("FINISHED", result_metrics(result, {}), end_tags("COMPLETE"))
        self.study.tell(assignment.number, result)
        log.finished(assignment.key, result)


@pytest.fixture
def search(tmp_path: Path) -> Search:
    return Search(tmp_path, tracking={"enabled": False})


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_the_space_file_is_one_again_and_the_same_study(tmp_path: Path) -> None:
    config = config_of(tmp_path, ["student.l1=2.0e-7", "tracking.enabled=false"])
    path = tmp_path / "space-again.yaml"
    path.write_text(space_text(config))
    again = load_search_config(path)
    assert again.identity_hash == config.identity_hash
    assert Space(again).parameters.keys() == Space(config).parameters.keys()
    assert "tracking" not in path.read_text()


def test_every_shipped_space_file_is_kept_whole(tmp_path: Path) -> None:
    for file in sorted((ROOT / "spaces").glob("*.yaml")):
        config = load_search_config(file)
        path = tmp_path / file.name
        path.write_text(space_text(config))
        assert load_search_config(path).identity_hash == config.identity_hash, file.name


def test_the_environment_names_what_made_a_study() -> None:
    found = json.loads(json.dumps(describe_environment()))
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(found["packages"]) == set(PACKAGES)
    assert all(found["packages"].values())
    assert found["cores"] >= 1
    assert found["memory_mb"] > 100
    assert found["processor"]
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode == 0:
        assert head.stdout.startswith(found["commit"])
        assert isinstance(found["dirty"], bool)


def test_the_table_of_trials_holds_every_trial(search: Search) -> None:
    record = search.run(4)
    failed = search.study.ask()
    search.study.tell_failed(failed.number, "it diverged")
    record = search.study.record()
    table = trials_table(record)
    rows = {row["trial"]: row for row in table.to_pylist()}
    assert list(rows) == [trial.key for trial in record.trials]
    for trial in record.trials:
        row = rows[trial.key]
        assert (row["state"], row["reason"], row["seed"]) == (trial.state, trial.reason, trial.seed)
        assert (row["standard_accuracy"], row["certified_upper"]) == (trial.standard_accuracy, trial.certified_upper)
        assert {name: row[f"params.{name}"] for name in trial.params} == trial.params
        assert row["cost.student"] == trial.costs.get("student")
    assert {key for key, row in rows.items() if row["on_front"]} == {trial.key for trial in front_trials(record)}
    assert rows[failed.key]["certified_accuracy"] is None


def test_columns_keep_their_types_whatever_is_known(search: Search) -> None:
    """A table of a study that has just begun has the columns of results that it has at its end, with their types."""
    record = search.run(3)
    begun = trials_table(replace(record, trials=()))
    whole = trials_table(record)
    for name in begun.column_names:
        if name not in ("trial", "state", "on_front"):
            assert begun.schema.field(name).type == whole.schema.field(name).type, name
    odd = [replace(trial, params={"x": value}) for trial, value in zip(record.trials, (1, "a", None), strict=True)]
    assert trials_table(replace(record, trials=tuple(odd)))["params.x"].to_pylist() == ["1", "a", None]


def test_a_table_of_a_page_has_no_number_that_json_lacks() -> None:
    text = table_json(("a", "b"), [(1.5, "x"), (float("nan"), None), (float("-inf"), True)])
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) == {
        "columns": ["a", "b"],
        "data": [[1.5, "x"], [None, None], [None, True]],
    }


def test_everything_is_drawn_and_pages_need_no_network(search: Search) -> None:
    record = search.run(4)
    folder = search.storage.study_folder("tiny")
    assert {path.name for path in folder.iterdir() if path.is_file()} >= {*DRAWN, "space.yaml", "environment.json"}
    for name in ("front.html", "hypervolume.html", "report.html"):
        page = (folder / name).read_text()
        assert "tiny" in page
        assert "verifier: PGD" in page
        assert not re.search(r'<(script|link|img)[^>]+(src|href)="?https?:', page)
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG")
    shown = json.loads((folder / "trials.json").read_text())
    stored = pq.read_table(folder / "trials.parquet")
    assert shown["columns"] == stored.column_names
    assert shown["data"] == [list(row.values()) for row in stored.to_pylist()]
    assert stored.num_rows == len(record.trials)


# ---- The journal -----------------------------------------------------------------------------------------------------


def test_a_study_is_told_from_start_to_end(search: Search) -> None:
    record = search.run(5)
    rows = search.rows()
    assert rows[0].tags["cert.state"] == "RUNNING"
    assert rows[0].artifacts.keys() == {"space.yaml", "environment.json"}
    steps = [row.step for row in rows if isinstance(row, StudyRow) and "hypervolume" in row.values]
    assert steps == [1, 2, 3, 4, 5, 5]
    *_, end, front, close = rows
    low, high = study_front(record).hypervolume_bounds
    assert (end.values["hypervolume"], end.values["hypervolume_upper"]) == (low, high)
    assert end.artifacts.keys() == set(DRAWN)
    assert (isinstance(front, FrontRow), front.keys) == (True, [trial.key for trial in front_trials(record)])
    assert isinstance(close, CloseRow)


def test_what_a_killed_driver_left_is_told_by_the_next_command(search: Search) -> None:
    record = search.run(2, is_killed=True)
    with Journal(search.journal.parent / "tiny-0002.jsonl") as journal:
        journal.start("tiny-0002", {}, {})  # it ran when the driver died
    search.journal.write_bytes(search.journal.read_bytes() + b'{"t": 1.0, "kind": "stu')  # and so was a line
    search.study = search.opened()
    record = search.run(1)
    rows = search.rows()
    assert isinstance(rows[-1], CloseRow)
    assert rows[-2].keys == [trial.key for trial in front_trials(record)]
    assert {row.step for row in rows if isinstance(row, StudyRow) and row.values} == {1, 2, 3}


def test_a_study_is_settled_when_tracking_has_all_its_files(search: Search) -> None:
    config = search.config.model_copy(update={"tracking": search.config.tracking.model_copy(update={"enabled": True})})
    assert not is_settled(config, search.storage)
    search.run(2)
    assert is_settled(config, search.storage)
    # As a version that drew less has left it: the next command draws the rest.
    lines = [line for line in search.journal.read_text().splitlines() if "hypervolume.html" not in line]
    search.journal.write_text("\n".join(lines) + "\n")
    assert not is_settled(config, search.storage)


def test_figures_that_cannot_be_drawn_do_not_keep_a_search_from_its_end(
    search: Search, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = search.config.model_copy(update={"tracking": search.config.tracking.model_copy(update={"enabled": True})})
    search.run(2)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("no such font")

    with monkeypatch.context() as patch:
        patch.setattr(bookkeeping, "draw", fail)
        search.run(1)
    assert "no such font" in caplog.messages[-1]
    assert isinstance(search.rows()[-1], CloseRow)
    assert not is_settled(config, search.storage)  # the next command draws them
    search.run(0)
    assert is_settled(config, search.storage)


def test_a_full_disk_at_the_end_of_a_search_is_one_line(
    search: Search, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bookkeeping, "draw", lambda *anything: {})  # figures take seconds
    record = search.run(2, is_killed=True)

    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", full)
        close_study(record, search.storage, "FAILED")
    assert "the same command completes it" in caplog.messages[-1]
    close_study(record, search.storage, "FAILED")
    assert isinstance(search.rows()[-1], CloseRow)


def test_params_of_a_study_never_change(tmp_path: Path) -> None:
    """MLflow refuses a changed param, and with it everything that comes after."""
    storage = Storage.of(config_of(tmp_path), str(tmp_path))
    first, later = (
        study_info(config_of(tmp_path, settings), storage)
        for settings in ([], ["search.sampler=tpe", "search.seeds=3", "budget.trials=99"])
    )
    assert first.params == later.params == {"seed": 0}
    assert (first.tags["cert.sampler"], later.tags["cert.sampler"]) == ("random", "tpe")


def test_a_study_says_what_it_is(tmp_path: Path) -> None:
    config: SearchConfig = config_of(tmp_path)
    info = study_info(config, Storage.of(config, str(tmp_path)))
    assert (info.kind, info.split, info.experiment) == ("study", "validation", "digits-linf-1_10")
    assert set(info.parameters) == {"loss", "alpha", "beta", "warm_up", "steps"}


# ---- MLflow ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked_search(tmp_path_factory: pytest.TempPathFactory) -> tuple[Search, MlflowClient]:
    """A search whose driver was killed, went on with another sampler, and was asked for more trials."""
    folder = tmp_path_factory.mktemp("tracked")
    search = Search(folder)
    search.run(2, is_killed=True)
    search.config = config_of(folder, ["search.sampler=tpe"])
    search.study = search.opened()
    search.run(2)
    search.run(1)
    return search, MlflowClient(local_store(search.storage.folder)[0])


def runs_of(client: MlflowClient, query: str) -> list[Run]:
    (experiment,) = [each for each in client.search_experiments() if each.name != "Default"]
    return list(client.search_runs([experiment.experiment_id], query))


def test_nothing_is_doubled_and_all_is_there(tracked_search: tuple[Search, MlflowClient]) -> None:
    search, client = tracked_search
    record = search.study.record()
    (parent,) = runs_of(client, "tags.`cert.kind` = 'study'")
    assert (parent.info.status, parent.data.tags["cert.state"]) == ("FINISHED", "FINISHED")
    assert parent.data.tags["cert.sampler"] == "tpe"
    assert parent.data.params == {"seed": "0"}
    assert json.loads(parent.data.tags["mlflow.loggedArtifacts"]) == [{"path": "trials.json", "type": "table"}]
    listed = {entry.path for entry in client.list_artifacts(parent.info.run_id)}
    assert listed == {*DRAWN, "space.yaml", "environment.json"}
    history = client.get_metric_history(parent.info.run_id, "hypervolume")
    assert {each.step for each in history} == {1, 2, 3, 4, 5}
    values = [each.value for each in sorted(history, key=lambda each: each.step)]
    assert values == sorted(values)  # one seed each: it never falls
    assert parent.data.metrics["hypervolume"] == study_front(record).hypervolume_bounds[0]
    children = runs_of(client, "tags.`cert.kind` = 'trial'")
    assert sorted(run.data.tags[TAG_TRIAL] for run in children) == [trial.key for trial in record.trials]
    on_front = {run.data.tags[TAG_TRIAL] for run in children if run.data.tags.get(TAG_FRONT) == "true"}
    assert on_front == {trial.key for trial in front_trials(record)}


def test_the_documented_queries_are_understood(tracked_search: tuple[Search, MlflowClient]) -> None:
    _, client = tracked_search
    section = (ROOT / "docs" / "TRACKING.md").read_text().partition("## Searching\n")[2]
    queries = section.partition("```\n")[2].partition("```")[0].splitlines()
    assert len(queries) >= 5
    found = {query: len(runs_of(client, query)) for query in queries}
    children = runs_of(client, "tags.`cert.kind` = 'trial'")
    certified = sum(run.data.metrics["certified_accuracy"] > 0.5 for run in children)
    assert found["tags.`cert.kind` = 'trial' and metrics.certified_accuracy > 0.5"] == certified
    assert found["tags.`cert.state` = 'STOPPED'"] == 0


@pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes")  # MLflow's use of pandas
def test_the_tag_of_tables_is_the_one_that_mlflow_writes(
    tracked_search: tuple[Search, MlflowClient],
) -> None:
    """Pages show a table where MLflow's own `log_table` would have put one: same tag, same form of the file."""
    _, client = tracked_search
    (parent,) = runs_of(client, "tags.`cert.kind` = 'study'")
    run = client.create_run(parent.info.experiment_id)
    client.log_table(run.info.run_id, {"a": [1, 2], "b": ["x", "y"]}, "trials.json")
    theirs = client.get_run(run.info.run_id).data.tags
    written = Path(client.download_artifacts(run.info.run_id, "trials.json")).read_text()
    client.delete_run(run.info.run_id)
    assert tables_tag("trials.json").items() <= theirs.items()
    assert json.loads(table_json(("a", "b"), [(1, "x"), (2, "y")])) == json.loads(written)
