"""One study and two machines: what the first one's driver leaves behind, the second one's takes over and completes.

The study is in a real PostgreSQL server, the artefacts in a folder that both see, the runs in a real MLflow server.
"""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from machines import Machine, SharedStudy, faults_of_epochs, interrupt, new_machines, wait_for_the_middle

from benchmarks.kills import front_faults, study_faults, tracking_faults
from benchmarks.live_search import EPOCHS, PATIENCE_S, Server, wait_for
from benchmarks.postgres_server import PostgresServer
from search.studies.records import StudyRecord
from tracking.journal import MetricsRow, StartRow

pytest_plugins = ("postgres_server",)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TRIALS = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tracking")
    server = Server(folder, folder / "server.log")
    server.start()
    wait_for(server.answers, "the tracking server answers")
    yield server
    server.kill()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Callable[[str], Machine]]:
    with new_machines(tmp_path) as new:
        yield new


@pytest.fixture(scope="module")
def undisturbed(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> StudyRecord:
    """The same search on one machine that stays."""
    folder = tmp_path_factory.mktemp("undisturbed")
    study = SharedStudy("undisturbed", postgres_server.new_database("undisturbed"), folder / "shared")
    with new_machines(folder) as new:
        code, out, err = new("machine").run(study, TRIALS)
    assert code == 0, out + err
    return study.record


def runs_of(url: str, study: str) -> dict[str, list[Any]]:
    from tracking.mlflow_tracker import MlflowTracker

    client = MlflowTracker(url, None)._client
    experiments = [each.experiment_id for each in client.search_experiments() if each.name != "Default"]
    found: dict[str, list[Any]] = {}
    for run in client.search_runs(experiments, max_results=5000):
        if (run.info.run_name or "").startswith(study):
            found.setdefault(run.data.tags["cert.kind"], []).append(run)
    return found


@pytest.mark.parametrize("end", ["machine", "driver", "interrupt"])
def test_another_machine_goes_on(
    end: str,
    postgres_server: PostgresServer,
    server: Server,
    undisturbed: StudyRecord,
    machines: Callable[[str], Machine],
    tmp_path: Path,
) -> None:
    name = f"elsewhere-{end}"
    study = SharedStudy(name, postgres_server.new_database(name), tmp_path / "shared", server.url)
    here, there = machines("a"), machines("a-longer-name/with/another/depth")
    first = here.start(study, TRIALS)
    wait_for_the_middle(study)

    code, out, err = there.run(study, TRIALS)
    assert (code, out) == (2, "")
    assert f"error: study {name} in postgresql://" in err
    assert f"is held by search pid {first.pid} on " in err
    assert err.count("\n") == 1

    wait_for(lambda: bool(study.in_the_middle()), "a trial is in the middle")
    middle = study.in_the_middle()
    if end == "machine":
        here.lose()
    elif end == "driver":
        first.send_signal(signal.SIGKILL)
    else:
        interrupt(first)
    out, err = first.communicate(timeout=PATIENCE_S)
    assert first.returncode == (130 if end == "interrupt" else -signal.SIGKILL), out + err
    before = study.record
    assert len(before.done) < TRIALS
    unfinished = {trial.key for trial in before.unfinished}
    assert unfinished & set(middle)

    code, out, err = there.run(study, TRIALS)
    assert code == 0, out + err
    record = study.record
    assert f"{len(before.done)} of {TRIALS} trials done" in out
    assert study_faults(record, TRIALS) + front_faults(record, undisturbed) == []
    assert [trial.state for trial in record.trials] == ["COMPLETE"] * TRIALS
    assert [fault for trial in record.trials for fault in faults_of_epochs(study, trial.key)] == []
    for key in unfinished & set(middle):
        rows = study.rows(key)
        starts = [place for place, row in enumerate(rows) if isinstance(row, StartRow)]
        assert len(starts) >= 2
        resumed = [row.step for row in rows[starts[1] :] if isinstance(row, MetricsRow)]
        assert resumed == [] or resumed[0] > 1, f"{key} began again with epoch 1 of {EPOCHS}"
    assert tracking_faults(record, server.url) == []
    runs = runs_of(server.url, name)
    assert {kind: len(found) for kind, found in runs.items()} == {"study": 1, "trial": TRIALS}
    assert {run.info.status for found in runs.values() for run in found} == {"FINISHED"}
    (parent,) = runs["study"]
    assert {run.data.tags["mlflow.parentRunId"] for run in runs["trial"]} == {parent.info.run_id}
    # The first machine is back: there is nothing left to do for it.
    code, out, err = here.run(study, TRIALS)
    assert code == 0, out + err
    assert study.record == record
