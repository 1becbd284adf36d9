"""The front and the hypervolume as they are told while a search runs, against what the whole record says."""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from studies import result

from search.results.configurations import study_front
from search.results.report import front_trials
from search.studies.records import StudyRecord, TrialRecord, TrialResult
from search.tracked import redrawing
from search.tracked.front_log import FrontLog
from search.tracked.listeners import Listeners
from search.tracked.moving_front import MovingFront
from search.tracked.redrawing import Redrawing
from tracking.journal import STUDY_JOURNAL, FrontRow, Journal, StudyRow, read_rows
from tracking.sender import sent_path

EMPTY = StudyRecord("tiny", (0.2, 0.1), (), "digits", "linf 1/10", 100, "pgd", 0.0)


def trial(number: int, standard: float, lower: float, upper: float | None = None, **changes: Any) -> TrialRecord:
    upper = lower if upper is None else upper
    fields: dict[str, Any] = {
        "standard_accuracy": standard,
        "certified_accuracy": lower,
        "certified_upper": upper,
        "adversarial_accuracy": max(standard, upper),
        "seconds": 1.0,
        "finished_at": 100.0 + number,
        "configuration": f"c{number}",
        "seed": number,
    }
    return TrialRecord(f"tiny-{number:04d}", number, "COMPLETE", {}, **fields | changes)


# ---- The front, trial by trial -------------------------------------------------------------------------------------

tenths = st.integers(0, 10).map(lambda number: number / 10)  # few values: equal points and equal coordinates are common


@st.composite
def histories(draw: st.DrawFn) -> list[TrialRecord]:
    """Trials as they finish: seeds of few configurations, and narrower intervals of trials that finished before."""
    told: list[TrialRecord] = []
    for number in range(draw(st.integers(1, 12))):
        lower, upper = sorted((draw(tenths), draw(tenths)))
        configuration = f"c{draw(st.integers(0, 5))}" if draw(st.booleans()) else f"own {number}"
        told.append(
            trial(number, draw(tenths), lower, upper, configuration=configuration, seed=draw(st.integers(0, 3)))
        )
        if draw(st.booleans()):
            before = draw(st.sampled_from(told))
            assert before.certified_accuracy is not None
            assert before.certified_upper is not None
            ends = st.integers(round(before.certified_accuracy * 10), round(before.certified_upper * 10))
            low, high = sorted((draw(ends) / 10, draw(ends) / 10))
            told.append(replace(before, certified_accuracy=low, certified_upper=high))
    return told


@pytest.mark.timeout(60)  # many small examples
@settings(max_examples=30)
@given(histories())
def test_the_front_after_each_trial_is_that_of_all_trials_so_far(told: list[TrialRecord]) -> None:
    moving, known = MovingFront(EMPTY), {}
    for each in told:
        moving.add(each)
        known[each.key] = each
        record = replace(EMPTY, trials=tuple(sorted(known.values(), key=lambda trial: trial.number)))
        assert moving.keys == {member.key for member in front_trials(record)}
        assert moving.hypervolume_bounds == pytest.approx(study_front(record).hypervolume_bounds, abs=1e-12)


def test_rounding_pushes_nobody_off_the_moving_front() -> None:
    moving = MovingFront(EMPTY)
    for number, lower in enumerate((0.4, 0.2)):  # whose mean is 0.30000000000000004
        moving.add(trial(number, 0.5, lower, configuration="mean", seed=number))
    moving.add(trial(2, 0.5, 0.3))
    assert moving.keys == {"tiny-0000", "tiny-0001", "tiny-0002"}


# ---- The journal ---------------------------------------------------------------------------------------------------


class FakeStudy:
    """A study that is told of trials by hand."""

    def __init__(self, *trials: TrialRecord) -> None:
        self.told = list(trials)

    def trials(self) -> Sequence[TrialRecord]:
        return tuple(self.told)

    def record(self) -> StudyRecord:
        return replace(EMPTY, trials=tuple(self.told))


def drawn(record: StudyRecord) -> dict[str, Path]:
    return {}


def log_of(folder: Path, study: FakeStudy, **changes: Any) -> FrontLog:
    parts: dict[str, Any] = {"redrawing": Redrawing(drawn), "may_write": lambda: True} | changes
    return FrontLog(folder / STUDY_JOURNAL, study, parts["redrawing"], parts["may_write"])


def rows_of(folder: Path) -> list[Any]:
    return [line.row for line in read_rows(folder / STUDY_JOURNAL)[0]]


def course(folder: Path) -> list[tuple[int, float | None, float | None]]:
    rows = [row for row in rows_of(folder) if isinstance(row, StudyRow) and row.values]
    return [(row.step, row.values["hypervolume"], row.values["hypervolume_upper"]) for row in rows]


def fronts(folder: Path) -> list[list[str]]:
    return [row.keys for row in rows_of(folder) if isinstance(row, FrontRow)]


def finish(log: FrontLog, study: FakeStudy, *trials: TrialRecord) -> None:
    for each in trials:
        study.told.append(each)
        {"COMPLETE": lambda key: log.finished(key, result()), "STOPPED": lambda key: log.stopped(key, "dominated")}.get(
            each.state, lambda key: log.failed(key, "diverged")
        )(each.key)


def test_hypervolume_after_each_trial_and_the_front_when_it_moves(tmp_path: Path) -> None:
    study = FakeStudy()
    with log_of(tmp_path, study) as log:
        finish(log, study, trial(0, 0.7, 0.3, 0.6), trial(1, 0.6, 0.2), trial(2, 0.9, 0.2))
        finish(log, study, replace(trial(3, 0, 0), state="STOPPED", standard_accuracy=None, certified_accuracy=None))
        finish(log, study, replace(trial(4, 0, 0), state="FAILED", standard_accuracy=None, certified_accuracy=None))
        finish(log, study, trial(5, 0.9, 0.5))
    # From the reference (0.2, 0.1): 0.5 x 0.2; the second is dominated; the third adds 0.2 x 0.1; the last 0.7 x 0.4.
    # Upper ends: 0.5 x 0.5, then 0.2 x 0.1 more, then 0.5 x 0.5 + 0.2 x 0.4.
    expected = [(1, 0.1, 0.25), (2, 0.1, 0.25), (3, 0.12, 0.27), (4, 0.12, 0.27), (4, 0.12, 0.27), (5, 0.28, 0.33)]
    assert [pytest.approx(row) for row in expected] == course(tmp_path)
    zero, two, five = "tiny-0000", "tiny-0002", "tiny-0005"
    assert fronts(tmp_path) == [[zero], [zero, two], [five]]
    last = rows_of(tmp_path)[-2]
    assert {name: value for name, value in last.values.items() if name.startswith("num_")} == {
        "num_complete": 4.0,
        "num_stopped": 1.0,
        "num_failed": 1.0,
    }


def test_a_further_seed_moves_its_configuration(tmp_path: Path) -> None:
    """The mean of two seeds is what others are compared with, and both trials bear the tag."""
    study = FakeStudy()
    with log_of(tmp_path, study) as log:
        finish(log, study, trial(0, 0.8, 0.4, configuration="a"), trial(1, 0.7, 0.3, configuration="b"))
        finish(log, study, trial(2, 0.4, 0.1, configuration="a"))  # the mean is (0.6, 0.25), which b dominates
        finish(log, study, trial(3, 0.8, 0.5, configuration="b"))
    assert fronts(tmp_path) == [["tiny-0000"], ["tiny-0001"], ["tiny-0001", "tiny-0003"]]


def test_a_verification_that_went_on_is_not_counted_again(tmp_path: Path) -> None:
    study = FakeStudy()
    with log_of(tmp_path, study) as log:
        finish(log, study, trial(0, 0.7, 0.3, 0.6))
        study.told[0] = trial(0, 0.7, 0.5, 0.6)
        log.finished("tiny-0000", result())
    assert course(tmp_path) == [pytest.approx((1, 0.1, 0.25)), pytest.approx((1, 0.2, 0.25))]


def test_the_next_driver_adds_what_a_killed_one_left_out(tmp_path: Path) -> None:
    trials = [trial(0, 0.7, 0.3), trial(1, 0.6, 0.2), trial(2, 0.9, 0.2), trial(3, 0.9, 0.5)]
    study = FakeStudy()
    with log_of(tmp_path, study) as log:
        finish(log, study, trials[0])
        study.told.append(trials[1])  # told to the study, and killed before the journal
        finish(log, study, trials[2])
    whole = FakeStudy(*trials)
    for _ in range(2):  # and nothing is doubled
        with log_of(tmp_path, whole):
            pass
    assert [row[0] for row in course(tmp_path)] == [1, 2, 3, 4]
    uninterrupted = tmp_path / "other"
    study = FakeStudy()
    with log_of(uninterrupted, study) as log:
        finish(log, study, *trials)
    assert fronts(tmp_path)[-1] == fronts(uninterrupted)[-1] == ["tiny-0003"]
    assert sorted(course(tmp_path))[-2:] == course(uninterrupted)[-2:]


def test_a_journal_that_cannot_be_written_does_not_end_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    study = FakeStudy()

    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    with log_of(tmp_path, study) as log:
        monkeypatch.setattr(Journal, "write", full)
        finish(log, study, trial(0, 0.7, 0.3), trial(1, 0.8, 0.2))
        monkeypatch.undo()
        finish(log, study, trial(2, 0.9, 0.5))
    assert len(caplog.messages) == 1  # said once
    assert "No space left on device" in caplog.messages[0]
    assert [row[0] for row in course(tmp_path)] == [3]
    assert fronts(tmp_path) == [["tiny-0002"]]


# ---- Figures -------------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(redrawing, "time", clock)
    return clock


def polled(drawing: Redrawing, record: StudyRecord = EMPTY) -> Any:
    """The next drawing that is done."""
    drawing.poll(lambda: record)
    assert drawing._thread is not None
    drawing._thread.join(5)
    return drawing.poll(lambda: record)


def test_figures_are_drawn_when_wanted_and_seldom(clock: Clock, tmp_path: Path) -> None:
    seen: list[int] = []

    def draw(record: StudyRecord) -> dict[str, Path]:
        seen.append(len(record.trials))
        clock.now += 2.0  # it took two seconds
        return {"front.html": tmp_path}

    drawing = Redrawing(draw)
    assert drawing.poll(lambda: EMPTY) is None  # nobody wants one
    drawing.want()
    assert polled(drawing) == {"front.html": tmp_path}
    drawing.want()
    clock.now = 2.0 + redrawing.RESTS * 2.0 - 0.1
    assert drawing.poll(lambda: EMPTY) is None
    assert seen == [0]
    clock.now += 0.1
    assert polled(drawing, replace(EMPTY, trials=(trial(0, 0.5, 0.5),))) == {"front.html": tmp_path}
    assert seen == [0, 1]
    assert drawing.poll(lambda: EMPTY) is None  # each is told once


def test_a_drawing_is_not_waited_for_and_is_told_by_the_next_call(tmp_path: Path) -> None:
    may_go_on, figure = threading.Event(), tmp_path / "front.html"

    def draw(record: StudyRecord) -> dict[str, Path]:
        assert may_go_on.wait(5)
        figure.write_text("drawn")
        return {"front.html": figure}

    study, allowed = FakeStudy(), [True]
    with log_of(tmp_path, study, redrawing=Redrawing(draw), may_write=lambda: allowed[0]) as log:
        finish(log, study, trial(0, 0.7, 0.3))
        log.advanced("tiny-0001", "student", 1, 2)
        assert artifacts(tmp_path) == []
        may_go_on.set()
        thread = log._redrawing._thread
        assert thread is not None
        thread.join(5)
        log.advanced("tiny-0001", "student", 2, 2)
        assert artifacts(tmp_path) == [{"front.html": os.path.relpath(figure, tmp_path)}]


def test_files_are_told_again_once_tracking_has_the_former_ones(tmp_path: Path, clock: Clock) -> None:
    """While a server is away, one row waits for it: sent later, it sends the files as they then are."""
    figure, sent = tmp_path / "front.html", sent_path(tmp_path / STUDY_JOURNAL)
    study, drawing = FakeStudy(), Redrawing(lambda record: {"front.html": figure})
    with log_of(tmp_path, study, redrawing=drawing) as log:
        for number in range(3):
            clock.now += 1000
            finish(log, study, trial(number, 0.7, 0.3))
            assert drawing._thread is not None
            drawing._thread.join(5)
            log.started("next")
        assert len(artifacts(tmp_path)) == 1
        (end,) = [line.end for line in read_rows(tmp_path / STUDY_JOURNAL)[0] if getattr(line.row, "artifacts", None)]
        sent.write_text(str(end - 1))
        log.advanced("next", "student", 1, 2)
        assert len(artifacts(tmp_path)) == 1
        sent.write_text(str(end))
        for _ in range(2):
            log.advanced("next", "student", 2, 2)
        assert len(artifacts(tmp_path)) == 2


def test_figures_of_a_study_that_another_driver_may_have_are_not_told(tmp_path: Path) -> None:
    study = FakeStudy()
    drawing = Redrawing(lambda record: {"front.html": tmp_path})
    with log_of(tmp_path, study, redrawing=drawing, may_write=lambda: False) as log:
        finish(log, study, trial(0, 0.7, 0.3))
        assert drawing._thread is not None
        drawing._thread.join(5)
        log.advanced("tiny-0001", "student", 1, 2)
        assert drawing._thread is None  # it was looked at
    assert artifacts(tmp_path) == []


def test_a_figure_that_cannot_be_drawn_is_said_once(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def draw(record: StudyRecord) -> dict[str, Path]:
        raise OSError("the disk is full")

    drawing = Redrawing(draw)
    for _ in range(2):
        drawing.want()
        clock.now += 1000
        assert polled(drawing) is None
    assert caplog.messages == ["report and figures are not up to date (OSError: the disk is full)"]


def artifacts(folder: Path) -> list[dict[str, str]]:
    return [row.artifacts for row in rows_of(folder) if isinstance(row, StudyRow) and row.artifacts]


def test_all_listeners_are_told_everything() -> None:
    heard: list[tuple[Any, ...]] = []

    class Ear:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *arguments: heard.append((name, *arguments))

    told = result()
    calls: list[tuple[str, tuple[str | int | TrialResult, ...]]] = [
        ("started", ("k",)),
        ("advanced", ("k", "student", 1, 2)),
        ("finished", ("k", told)),
        ("stopped", ("k", "why")),
        ("failed", ("k", "why")),
    ]
    listeners = Listeners([Ear(), Ear()])
    for name, arguments in calls:
        getattr(listeners, name)(*arguments)
    assert heard == [(name, *arguments) for name, arguments in calls for _ in range(2)]
