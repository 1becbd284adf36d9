"""A tracking server that is slow, hangs, is restarted or gone: nothing waits for it, and nothing is lost.

The searches are those of `benchmarks.tracking_outage`, with a real server as a process of its own.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from contracts import STUDY
from test_tracking_sender import RecordingTracker

from benchmarks.live_search import ROOT, LiveSearch, Server
from benchmarks.tracking_outage import GOAL_MS, SLOW_S, STOPPED_S, Seen, contents, run_case, running_server
from benchmarks.tracking_proxy import Proxy
from search.tracked.bookkeeping import LAST_ROWS_S
from tracking.journal import STUDY_JOURNAL, Journal, save_study_info
from tracking.mlflow_tracker import MlflowTracker, local_store, open_client
from tracking.sender import Delivery, Sender
from tracking.tracker import MetricRow

# The first test that touches MLflow pays for its import.
pytestmark = pytest.mark.timeout(60)

WORST_S = GOAL_MS / 1000
# The end of a search writes its figures and ends Ray, here on a machine that may be busy with other things.
CLOSING_S = 30.0


@pytest.fixture
def journals(tmp_path: Path) -> Path:
    folder = tmp_path / "storage" / "artifacts" / STUDY.name / "journal"
    save_study_info(folder, STUDY)
    return folder


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creating the tables takes a second, copying them nothing."""
    storage = tmp_path_factory.mktemp("empty")
    MlflowTracker(*local_store(storage))
    return storage / "mlflow"


@pytest.fixture
def store(tmp_path: Path, empty_store: Path) -> tuple[str, str]:
    shutil.copytree(empty_store, tmp_path / "mlflow")
    return local_store(tmp_path)


def timed_rows(journals: Path, key: str, count: int) -> list[float]:
    """Write a trial as a training would; the seconds of each call."""
    seconds = []
    with Journal(journals / f"{key}.jsonl") as journal:
        journal.start(key, {"alpha": 0.5}, {})
        for step in range(count):
            start = time.perf_counter()
            journal.metrics(step, {"loss": 1.0 / (step + 1), "student/accuracy": 0.5})
            seconds.append(time.perf_counter() - start)
        journal.end("FINISHED", {"certified_accuracy": 0.25}, {})
    return seconds


# ---- Without a server of MLflow's ------------------------------------------------------------------------------


def test_a_server_that_never_answers_holds_up_nobody(journals: Path) -> None:
    """It accepts connections. MLflow would wait 30 s for each answer, three times, with the tracker's lock held."""
    with Proxy("") as proxy:
        tracker = MlflowTracker(proxy.url, None)
        sender = Sender(journals, tracker, interval_s=0.01)
        sender.start()
        deadline = time.monotonic() + 10
        while not proxy.passed:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert sorted(timed_rows(journals, "t1", 200))[-2] < WORST_S  # one may fall into a pause of the machine
        start = time.monotonic()
        assert tracker.study_url() == tracker.front_url() == proxy.url
        assert sender.stop(0.3) == 202
        assert time.monotonic() - start < 2
        assert len(proxy.passed) == 1  # still the first


def test_slow_answers_delay_rows_only(journals: Path) -> None:
    class SlowTracker(RecordingTracker):
        def log_metrics(self, key: str, rows: Sequence[MetricRow]) -> None:
            time.sleep(0.1)
            super().log_metrics(key, rows)

    tracker = SlowTracker()
    with Sender(journals, tracker, interval_s=0.01) as sender:
        seconds = [value for key in ("t1", "t2") for value in timed_rows(journals, key, 100)]
        assert sender.flush(5) == 0
    assert sorted(seconds)[-2] < WORST_S
    assert {key: len(view.history["loss"]) for key, view in tracker.trials().items()} == {"t1": 100, "t2": 100}


def test_a_server_that_answers_with_a_page_is_told_in_one_line(
    journals: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong port, or a login page before the server."""
    timed_rows(journals, "t1", 3)
    page = "<html>\n" + "please log in\n" * 1000
    with Proxy("", accepted=(), refusal=(200, page)) as proxy:
        sender = Sender(journals, MlflowTracker(proxy.url, None), interval_s=0.01)
        sender.start()
        deadline = time.monotonic() + 10
        while not caplog.records:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert sender.stop(0.1) == 5
    first = caplog.records[0].getMessage()
    assert "tracking server unreachable, 5 rows waiting" in first
    assert "\n" not in first
    assert len(first) < 1000


# ---- What a stopped server answers late --------------------------------------------------------------------------


def late_doubles(client: Any, run: Any) -> None:
    """Requests of the past that made their runs now: older and without content. The order of equals is by chance."""
    kept = ("cert.", "mlflow.parentRunId")
    tags = {name: text for name, text in run.data.tags.items() if name.startswith(kept) and name != "cert.split"}
    for before_ms in (0, 0, 0, 1000):
        client.create_run(
            run.info.experiment_id,
            start_time=run.info.start_time - before_ms,
            tags=tags,
            run_name=run.data.tags["mlflow.runName"],
        )


def test_a_run_that_is_made_late_does_not_take_the_place_of_the_one_with_the_rows(
    journals: Path, store: tuple[str, str]
) -> None:
    timed_rows(journals, "t1", 5)
    Delivery(journals, MlflowTracker(*store)).send()
    client = open_client(store[0])
    before = contents(store[0])
    for run in client.search_runs(["1"]):
        late_doubles(client, run)
    with Journal(journals / "t1.jsonl") as journal:
        journal.end("FINISHED", {"certified_accuracy": 0.5}, {})
    with Journal(journals / STUDY_JOURNAL) as journal:
        journal.close_study("FINISHED")
    Delivery(journals, MlflowTracker(*store)).send()
    after = contents(store[0])
    assert after["runs"].keys() == before["runs"].keys()
    (trial,) = (run for run in after["runs"].values() if run["name"] == "t1")
    assert [value for _, _, value in trial["history"]["loss"]] == [1.0 / (step + 1) for step in range(5)]
    assert trial["params"] == {"alpha": "0.5"}


def test_rows_after_a_run_was_deleted_are_not_refused(journals: Path, store: tuple[str, str]) -> None:
    """By a user, or by another process that found it twice. What comes afterwards goes to a new run."""
    delivery = Delivery(journals, MlflowTracker(*store))
    with Journal(journals / "t1.jsonl") as journal:
        journal.start("t1", {}, {})
        journal.metrics(0, {"loss": 1.0})
        delivery.send()
        client = open_client(store[0])
        (run,) = client.search_runs(["1"], "tags.`cert.trial` = 't1'")
        client.delete_run(run.info.run_id)
        journal.metrics(1, {"loss": 0.5})
        with pytest.raises(Exception, match="active"):
            delivery.send()
        assert delivery.rows_left() == 1
        delivery.send()
    (run,) = client.search_runs(["1"], "tags.`cert.trial` = 't1'")
    assert run.data.metrics == {"loss": 0.5}
    assert delivery.rows_left() == 0


def test_an_experiment_that_another_process_makes_at_the_same_moment_is_used(
    journals: Path, store: tuple[str, str]
) -> None:
    tracker = MlflowTracker(*store)
    create = tracker._client.create_experiment

    def create_twice(*args: Any, **kwargs: Any) -> Any:
        create(*args, **kwargs)
        return create(*args, **kwargs)

    tracker._client.create_experiment = create_twice
    timed_rows(journals, "t1", 2)
    Delivery(journals, tracker).send()
    assert {run["name"] for run in contents(store[0])["runs"].values()} == {STUDY.name, "t1"}


# ---- Real searches and a real server -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("searches")


@pytest.fixture(scope="module")
def fine(server: Server, folder: Path) -> Seen:
    """The same search without trouble."""
    seen = run_case(folder, server, "fine", "fine")
    assert (seen.code, seen.faults, seen.left) == (0, [], 0), seen.output
    return seen


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", ["stopped", "gone", "slow"])
def test_a_search_does_not_notice(server: Server, folder: Path, fine: Seen, case: str) -> None:
    seen = run_case(folder, server, case, case)
    for each in (fine, seen):
        worst = {name: f"{1e3 * max(getattr(each, name)):.1f} ms" for name in ("journal", "step", "loop")}
        print(f"{each.case}: worst {worst}, end {each.end_s:.1f} s, {each.seconds:.0f} s in all, {each.left} rows left")
    assert (seen.code, seen.faults) == (0, []), seen.output
    assert len(seen.journal) >= 40
    assert max(seen.journal) < WORST_S
    # A step waits for the driver's answer once a second, so that a driver that hangs is seen there, too. Whoever
    # waited for one answer of the server would take at least SLOW_S longer.
    assert max(seen.step) < max(fine.step) + SLOW_S
    assert max(seen.loop) < max(fine.loop) + SLOW_S
    assert seen.end_s < LAST_ROWS_S + CLOSING_S
    if case == "gone":
        assert seen.left > 0
        assert seen.output.count("tracking server unreachable") == 1
        assert "python -m tracking.replay" in seen.output
    # Everything was sent once more already; now again, and from the start.
    kept = contents(server.url)
    for option in ([], ["--from-start"]):
        storage = [str(folder / case), "--tracking-uri", server.url]
        command = [sys.executable, "-m", "tracking.replay", *storage, *option]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert contents(server.url) == kept


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_server_gets_its_rows_when_it_goes_on(server: Server, tmp_path: Path) -> None:
    """Without a replay: the sender has only been waiting for its answers."""
    journals = tmp_path / "storage" / "artifacts" / "stopped-rows" / "journal"
    save_study_info(journals, type(STUDY)("stopped-rows", STUDY.experiment))
    tracker = MlflowTracker(server.url, None)
    with Sender(journals, tracker, interval_s=0.1) as sender:
        timed_rows(journals, "t1", 10)
        assert sender.flush(60) == 0
        server.stop()
        resumed = threading.Timer(STOPPED_S, server.go_on)
        resumed.start()
        assert max(timed_rows(journals, "t2", 1000)) < WORST_S
        start = time.monotonic()
        assert sender.flush(1) > 0
        assert time.monotonic() - start < 2
        assert sender.flush(120) == 0
        resumed.join()
    client = open_client(server.url)
    found = client.search_runs([client.get_experiment_by_name(STUDY.experiment).experiment_id])
    assert sorted(run.info.run_name for run in found) == ["stopped-rows", "t1", "t2"]


# ---- Eight at once ---------------------------------------------------------------------------------------------

_WORKER = """
import sys, time
from pathlib import Path
from tracking.journal import Journal, save_study_info
from tracking.mlflow_tracker import MlflowTracker, local_store
from tracking.sender import Delivery
from tracking.tracker import StudyInfo

folder, number, begin = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
journals = folder / "artifacts" / f"study-{number}" / "journal"
save_study_info(journals, StudyInfo(f"study-{number}", "digits-linf"))
with Journal(journals / "t1.jsonl") as journal:
    journal.start("t1", {"number": number}, {})
    for step in range(100):
        journal.metrics(step, {"loss": step + number})
    file = journals.parent / "file.txt"
    file.write_text("content")
    journal.artifact(file, "files")
    journal.end("FINISHED", {}, {})
import mlflow
time.sleep(max(0.0, begin - time.time()))
delivery = Delivery(journals, MlflowTracker(*local_store(folder)))
delivery.send()
sys.exit(delivery.rows_left())
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_eight_processes_open_a_fresh_store_at_once(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    begin = str(time.time() + 40)
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), str(number), begin],
            cwd=ROOT,
            env={**_environment(), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(8)
    ]
    told = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 8, told
    assert told == [""] * 8
    kept = contents(local_store(tmp_path)[0])
    assert len(kept["experiments"]) == 1
    trials = [run for run in kept["runs"].values() if run["name"] == "t1"]
    assert len(kept["runs"]) == 16
    assert sorted(int(run["params"]["number"]) for run in trials) == list(range(8))
    for run in trials:
        number = int(run["params"]["number"])
        assert [(step, value) for _, step, value in sorted(run["history"]["loss"], key=lambda row: row[1])] == [
            (step, step + number) for step in range(100)
        ]
        assert run["files"] == [("files/file.txt", 7)]
        assert run["status"] == "FINISHED"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_eight_trials_at_once_on_a_fresh_storage_folder(tmp_path: Path, folder: Path) -> None:
    settings = [
        "student.epochs=4",
        "teacher.epochs=2",
        "data.train_images=300",
        "data.validation_images=60",
        "resources.cpu=0.25",
        "resources.concurrency=8",
        "search.sampler=random",
        "search.points=[]",
    ]
    search = LiveSearch("digits", tmp_path / "fresh", Path("/tmp") / f"ray-{folder.name}-8", settings)
    log = tmp_path / "log"
    try:
        with log.open("w") as output:
            assert search.start(8, output).wait() == 0, log.read_text()
    finally:
        search.clean_up()
    output_text = log.read_text()
    assert "8 at once" in output_text
    assert "warning" not in output_text.lower()
    assert "lacks" not in output_text
    kept = contents(local_store(tmp_path / "fresh")[0])
    trials = {name: run for run in kept["runs"].values() if (name := run["name"]) != "digits"}
    assert sorted(trials) == [f"digits-{number:04d}" for number in range(8)]
    assert {run["status"] for run in kept["runs"].values()} == {"FINISHED"}
    assert len(kept["runs"]) == 9


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_TRACKING")}
