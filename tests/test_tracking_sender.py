"""The sender: nothing lost, nothing doubled, nothing raised, whatever the tracker does."""

import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from contracts import STUDY, TrackerContract, TrialView

from benchmarks.live_search import wait_for
from tracking.journal import STUDY_JOURNAL, Journal, save_study_info
from tracking.sender import Delivery, Sender, forget_sent
from tracking.tracker import MetricRow, ParamValue, RefusedError, Status, StudyInfo, Tracker


class RecordingTracker:
    """Keeps everything in memory, under the contract of a real one."""

    def __init__(self) -> None:
        self.study: StudyInfo | None = None
        self.study_status = ""
        self.study_values: dict[tuple[str, int], float] = {}
        self.study_files: dict[str, bytes] = {}
        self.calls: list[str] = []
        self._trials: dict[tuple[str, str], TrialView] = {}
        self._rows: dict[tuple[str, str], set[MetricRow]] = {}

    def trials(self) -> dict[str, TrialView]:
        views = {}
        for (study, key), view in self._trials.items():
            rows = sorted(self._rows.get((study, key), set()), key=lambda row: (row.step, row.time_ms))
            history: dict[str, list[tuple[int, float]]] = {}
            for row in rows:
                history.setdefault(row.name, []).append((row.step, row.value))
            if self.study and study == self.study.name:
                views[key] = replace(view, history=history)
        return views

    def open_study(self, study: StudyInfo, *, resume: bool = True) -> None:
        self.calls.append("open_study")
        self.study = study
        if resume or not self.study_status:
            self.study_status = "RUNNING"

    def start_trial(
        self, key: str, params: Mapping[str, ParamValue], tags: Mapping[str, str], *, time_ms: int | None = None
    ) -> None:
        self.calls.append(f"start {key}")
        texts = {name: str(value) for name, value in params.items()}
        self._update(key, status="RUNNING", params=texts)

    def log_metrics(self, key: str, rows: Sequence[MetricRow]) -> None:
        self.calls.append(f"metrics {key} {len(rows)}")
        self._update(key)
        self._rows.setdefault(self._name(key), set()).update(rows)

    def log_artifact(self, key: str, path: Path, folder: str) -> None:
        self.calls.append(f"artifact {key}")
        self._update(key)
        name = f"{folder}/{path.name}" if folder else path.name
        self._update(key, files=self._trials[self._name(key)].files | {name})

    def end_trial(self, key: str, status: Status, tags: Mapping[str, str], *, time_ms: int | None = None) -> None:
        self.calls.append(f"end {key}")
        self._update(key, status=status)

    def log_study(
        self,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        artifacts: Mapping[str, Path],
        *,
        step: int = 0,
        description: str = "",
        time_ms: int | None = None,
    ) -> None:
        self.calls.append("log_study")
        self.study_values |= {(name, step): value for name, value in metrics.items()}
        self.study_files |= {name: path.read_bytes() for name, path in artifacts.items() if path.is_file()}

    def close_study(self, status: Status, *, time_ms: int | None = None) -> None:
        self.calls.append("close_study")
        self.study_status = status

    def close_stale(self, live_keys: Collection[str]) -> list[str]:
        stale = [key for key, view in self.trials().items() if view.status == "RUNNING" and key not in live_keys]
        for key in stale:
            self._update(key, status="KILLED")
        return sorted(stale)

    def study_url(self) -> str | None:
        return None

    def _name(self, key: str) -> tuple[str, str]:
        return (self.study.name if self.study else "", key)

    def _update(self, key: str, **changes: object) -> None:
        view = self._trials.get(self._name(key), TrialView("RUNNING"))
        self._trials[self._name(key)] = replace(view, **changes)  # type: ignore[arg-type]


class TestRecordingTracker(TrackerContract):
    @pytest.fixture
    def tracker(self) -> Tracker:
        return RecordingTracker()

    def observe(self, tracker: Tracker) -> dict[str, TrialView] | None:
        assert isinstance(tracker, RecordingTracker)
        return tracker.trials()


class UnreliableTracker(RecordingTracker):
    """fails(number of call) is None, "before" (nothing arrived) or "after" (only the answer was lost)."""

    def __init__(self, fails: Callable[[int], str | None]) -> None:
        super().__init__()
        self.num_calls = 0
        self._fails = fails

    def __getattribute__(self, name: str) -> object:
        method = super().__getattribute__(name)
        if name not in {"open_study", "start_trial", "log_metrics", "log_artifact", "end_trial", "log_study"}:
            return method

        def unreliable(*args: object, **kwargs: object) -> None:
            self.num_calls += 1
            failure = self._fails(self.num_calls)
            if failure != "before":
                method(*args, **kwargs)
            if failure:
                raise ConnectionError(f"call {self.num_calls} failed {failure}")

        return unreliable


def write_trial(journals: Path, key: str, num_steps: int = 5) -> None:
    with Journal(journals / f"{key}.jsonl") as journal:
        journal.start(key, {"alpha": 0.5}, {})
        for step in range(num_steps):
            journal.metrics(step, {"loss": 1.0 / (step + 1), "accuracy": step / 10})
        journal.end("FINISHED", {"certified_accuracy": 0.25}, {})


def expected_trial(num_steps: int = 5) -> TrialView:
    history = {
        "loss": [(step, 1.0 / (step + 1)) for step in range(num_steps)],
        "accuracy": [(step, step / 10) for step in range(num_steps)],
        "certified_accuracy": [(0, 0.25)],
    }
    return TrialView("FINISHED", {"alpha": "0.5"}, history)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 4
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def journals(tmp_path: Path) -> Path:
    folder = tmp_path / "storage" / "artifacts" / STUDY.name / "journal"
    save_study_info(folder, STUDY)
    return folder


def test_rows_arrive_while_they_are_written(journals: Path) -> None:
    tracker = RecordingTracker()
    with Sender(journals, tracker, interval_s=0.01) as sender:
        write_trial(journals, "t1")
        wait_until(lambda: tracker.trials().get("t1") == expected_trial())
        write_trial(journals, "t2")
        assert sender.flush(2.0) == 0
        assert tracker.trials() == {"t1": expected_trial(), "t2": expected_trial()}
    assert tracker.study == STUDY


def test_metrics_that_follow_each_other_travel_together(journals: Path) -> None:
    tracker = RecordingTracker()
    write_trial(journals, "t1", num_steps=600)
    Delivery(journals, tracker).send()
    metrics = ["metrics t1 1000", "metrics t1 200", "metrics t1 1"]
    assert tracker.calls == ["open_study", "start t1", *metrics, "end t1"]


def test_the_study_speaks_after_its_trials(journals: Path) -> None:
    page = journals.parent / "front.html"
    page.write_text("front")
    with Journal(journals / STUDY_JOURNAL) as journal:
        journal.study({"hypervolume": 0.5}, {}, {"front.html": page}, step=3)
        journal.close_study("FINISHED")
    write_trial(journals, "zz")
    tracker = RecordingTracker()
    Delivery(journals, tracker).send()
    assert tracker.calls[-3:] == ["end zz", "log_study", "close_study"]
    assert tracker.study_values == {("hypervolume", 3): 0.5}
    assert tracker.study_files == {"front.html": b"front"}
    assert tracker.study_status == "FINISHED"


@pytest.mark.parametrize("failure", ["before", "after"])
def test_an_outage_loses_nothing_and_doubles_nothing(
    journals: Path, failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = UnreliableTracker(lambda call: failure if 4 <= call < 8 else None)
    with caplog.at_level(logging.INFO), Sender(journals, tracker, interval_s=0.01) as sender:
        for key in ("t1", "t2", "t3", "t4"):
            write_trial(journals, key)
        assert sender.flush(4.0) == 0
    assert tracker.trials() == dict.fromkeys(("t1", "t2", "t3", "t4"), expected_trial())
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    storage = journals.parents[2].resolve()
    assert f"they are kept in {journals}" in warnings[0]
    assert f"python -m tracking.replay {storage} --study {STUDY.name}" in warnings[0]


@pytest.mark.parametrize("seed", range(5))
def test_calls_fail_at_random(journals: Path, seed: int) -> None:
    failures = random.Random(seed)
    tracker = UnreliableTracker(lambda _: failures.choice([None, None, "before", "after"]))
    for key in ("t1", "t2", "t3"):
        write_trial(journals, key)
    delivery = Delivery(journals, tracker)
    for _ in range(200):
        try:
            delivery.send()
        except ConnectionError:
            continue
        break
    assert delivery.rows_left() == 0
    assert tracker.trials() == dict.fromkeys(("t1", "t2", "t3"), expected_trial())


def test_a_dead_tracker_never_stops_the_driver(journals: Path) -> None:
    tracker = UnreliableTracker(lambda _: "before")
    sender = Sender(journals, tracker, interval_s=0.01)
    sender.start()
    write_trial(journals, "t1")
    begin = time.monotonic()
    assert sender.flush(0.2) == 7
    assert sender.stop(0.2) == 7
    assert time.monotonic() - begin < 2
    wait_for(lambda: all(thread.name != "tracking-sender" for thread in threading.enumerate()), "no thread is left", 4)
    # Later, in another process:
    delivery = Delivery(journals, recorder := RecordingTracker())
    delivery.send()
    assert recorder.trials() == {"t1": expected_trial()}


def test_a_hanging_tracker_does_not_hold_up_the_end(journals: Path) -> None:
    released = threading.Event()

    class HangingTracker(RecordingTracker):
        def log_metrics(self, key: str, rows: Sequence[MetricRow]) -> None:
            released.wait(10)

    write_trial(journals, "t1")
    sender = Sender(journals, HangingTracker(), interval_s=0.01)
    sender.start()
    begin = time.monotonic()
    assert sender.stop(0.3) > 0
    assert time.monotonic() - begin < 2
    released.set()


def test_a_silent_server_is_asked_three_times_a_pass(journals: Path) -> None:
    tracker = UnreliableTracker(lambda call: "before" if call > 1 else None)
    for number in range(10):
        write_trial(journals, f"t{number}")
    with pytest.raises(ConnectionError):
        Delivery(journals, tracker).send()
    assert tracker.num_calls == 1 + 3


def test_one_failing_trial_does_not_hold_up_the_others(journals: Path) -> None:
    class PickyTracker(RecordingTracker):
        def start_trial(self, key: str, *args: object, **kwargs: object) -> None:
            if key == "t1":
                raise OSError("this one, always")

    for key in ("t1", "t2"):
        write_trial(journals, key)
    delivery = Delivery(journals, tracker := PickyTracker())
    with pytest.raises(OSError, match="always"):
        delivery.send()
    assert delivery.rows_left() == 7
    assert tracker.trials().keys() == {"t2"}


def test_trials_that_always_fail_hold_up_neither_others_nor_the_study(journals: Path) -> None:
    class PickyTracker(RecordingTracker):
        def end_trial(self, key: str, status: Status, tags: Mapping[str, str], *, time_ms: int | None = None) -> None:
            if key <= "t3":
                raise OSError("these, always")
            super().end_trial(key, status, tags, time_ms=time_ms)

    save_study_info(journals, STUDY)
    for number in range(6):
        write_trial(journals, f"t{number}")
    with Journal(journals / STUDY_JOURNAL) as journal:
        journal.close_study("FINISHED")
    delivery = Delivery(journals, tracker := PickyTracker())
    for _ in range(2):
        with pytest.raises(OSError, match="always"):
            delivery.send()
    assert delivery.rows_left() == 4
    assert {key for key, trial in tracker.trials().items() if trial.status == "FINISHED"} == {"t4", "t5"}


def test_what_the_tracker_refuses_is_said_and_passed(journals: Path, caplog: pytest.LogCaptureFixture) -> None:
    class RefusingTracker(RecordingTracker):
        def start_trial(self, key: str, *args: object, **kwargs: object) -> None:
            raise RefusedError("params changed")

    write_trial(journals, "t1")
    delivery = Delivery(journals, tracker := RefusingTracker())
    delivery.send()
    assert delivery.rows_left() == 0
    assert tracker.trials()["t1"].status == "FINISHED"
    assert "refused" in caplog.text
    assert "params changed" in caplog.text


def test_a_new_process_goes_on_where_the_old_one_was(journals: Path) -> None:
    with Journal(journals / "t1.jsonl") as journal:
        journal.start("t1", {}, {})
        journal.metrics(0, {"loss": 1.0})
        Delivery(journals, RecordingTracker()).send()
        journal.metrics(1, {"loss": 0.5})
    assert (journals / "t1.jsonl.sent").exists()
    Delivery(journals, tracker := RecordingTracker()).send()
    assert tracker.calls == ["open_study", "metrics t1 1"]


@pytest.mark.parametrize("content", ["", "not a number", "999999999"])
def test_a_spoilt_offset_sends_everything_again(journals: Path, content: str) -> None:
    write_trial(journals, "t1")
    Delivery(journals, tracker := RecordingTracker()).send()
    (journals / "t1.jsonl.sent").write_text(content)
    Delivery(journals, tracker).send()
    assert tracker.calls.count("start t1") == 2
    assert tracker.trials() == {"t1": expected_trial()}


def test_forgetting_sends_everything_again(journals: Path) -> None:
    write_trial(journals, "t1")
    Delivery(journals, RecordingTracker()).send()
    forget_sent(journals)
    Delivery(journals, tracker := RecordingTracker()).send()
    assert tracker.trials() == {"t1": expected_trial()}


def test_an_unfinished_last_line_waits(journals: Path) -> None:
    write_trial(journals, "t1")
    with (journals / "t1.jsonl").open("a") as file:
        file.write('{"t":1.0,"kind":"metrics","step":9,')
    delivery = Delivery(journals, tracker := RecordingTracker())
    delivery.send()
    assert delivery.rows_left() == 0
    with (journals / "t1.jsonl").open("a") as file:
        file.write('"values":{"loss":7.0}}\n')
    assert delivery.rows_left() == 1
    delivery.send()
    assert tracker.trials()["t1"].history["loss"][-1] == (9, 7.0)


def test_broken_lines_missing_files_and_nan_are_named_and_passed(
    journals: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = journals.parent
    (study / "there").write_text("x")
    with Journal(journals / "t1.jsonl") as journal:
        journal.start("t1", {}, {})
        journal.artifact(study / "gone")
        journal.artifact(study / "there", "folder")
        journal.metrics(0, {"loss": math.nan})
    with (journals / "t1.jsonl").open("a") as file:
        file.write("rubbish\n")
    with Journal(journals / "t1.jsonl") as journal:
        journal.metrics(1, {"loss": 1.0})
    with (journals / "t1.jsonl").open("a") as file:
        file.write("rubbish at the end\n")
    delivery = Delivery(journals, tracker := RecordingTracker())
    delivery.send()
    delivery.send()
    assert delivery.rows_left() == 0
    view = TrialView("RUNNING", {}, {"loss": [(1, 1.0)]}, frozenset({"folder/there"}))
    assert tracker.trials() == {"t1": view}
    assert len(caplog.records) == 4
    assert f"{study / 'gone'}, which is not there" in caplog.text
    assert "skipped loss at step 0, which is not a number" in caplog.text


def test_completing_the_record_of_an_ended_study_leaves_it_ended(journals: Path) -> None:
    with Journal(journals / STUDY_JOURNAL) as journal:
        journal.close_study("FINISHED")
    tracker = RecordingTracker()
    Delivery(journals, tracker).send()
    write_trial(journals, "t1")
    Delivery(journals, tracker, resume=False).send()
    assert tracker.study_status == "FINISHED"
    Delivery(journals, tracker).send()
    assert tracker.study_status == "RUNNING"


def test_a_quiet_journal_is_looked_at_seldom_and_is_not_forgotten(journals: Path) -> None:
    """Of a hundred thousand journals most have ended; a verification that goes on adds to one of them."""
    write_trial(journals, "t1", num_steps=1)
    tracker = RecordingTracker()
    delivery = Delivery(journals, tracker)
    delivery.send()
    path = journals / "t1.jsonl"
    for _ in range(2):  # long ago, and nothing since
        os.utime(path, (0, 0))
        delivery.send()
    with Journal(path) as journal:
        journal.metrics(9, {"loss": 7.0})
    delivery.send()
    assert tracker.trials()["t1"].history["loss"][-1] != (9, 7.0)
    assert delivery.rows_left() == 1  # whoever waits for the last rows is not kept waiting for the next look
    delivery.send()
    assert tracker.trials()["t1"].history["loss"][-1] == (9, 7.0)
