"""The searcher with fake results: how many trials run, which come first, and when the search ends. No Ray runs."""

import errno
import json
import pickle
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState, create_trial
from ray.tune.search import Searcher
from studies import closed_form, config_of, open_study, result

from search import execution
from search.attempts.deaths import Cause
from search.config import BudgetConfig, ResourcesConfig
from search.pareto import hypervolume
from search.scheduling.budget import Budget
from search.scheduling.waiting import RETRY_S, TeacherQueue
from search.searcher import StudySearcher, allowed_failures
from search.studies.database import DatabaseAwayError
from search.studies.driver_lock import DriverLock
from search.studies.records import RungValues, TrialResult
from search.study import Assignment, Study
from search.suggestions.asking import Asker, Inline
from search.worker import Suggestion

pytestmark = pytest.mark.timeout(30)  # the first test pays for importing Ray


class Log:
    """A listener that writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, ...]] = []

    def started(self, key: str) -> None:
        self.events.append(("started", key))

    def lost(self, key: str, reason: str, *, goes_on: bool = True) -> None:
        self.events.append(("lost" if goes_on else "kept", key, reason))

    def advanced(self, key: str, phase: str, done: int, of: int) -> None:
        self.events.append(("advanced", key, phase, str(done), str(of)))

    def finished(self, key: str, result: TrialResult) -> None:
        self.events.append(("finished", key))

    def stopped(self, key: str, reason: str) -> None:
        self.events.append(("stopped", key, reason))

    def failed(self, key: str, reason: str) -> None:
        self.events.append(("failed", key, reason))

    def keys(self, kind: str) -> list[str]:
        return [event[1] for event in self.events if event[0] == kind]


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database of each URL in memory, for the time of a test: opened again, it is the same one."""
    stores: dict[str, InMemoryStorage] = {}
    monkeypatch.setattr("search.study.open_storage", lambda url: stores.setdefault(url, InMemoryStorage()))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return open_study(config_of(tmp_path), tmp_path / "study.db")


@pytest.fixture
def log() -> Log:
    return Log()


@dataclass
class FakeFiles:
    """Results that trials left behind, and the ends that the driver has written."""

    results: dict[str, TrialResult] = field(default_factory=dict)
    ends: list[tuple[str, ...]] = field(default_factory=list)
    stored: dict[str, float] = field(default_factory=dict)

    def result(self, key: str) -> TrialResult | None:
        return self.results.get(key)

    def stored_at(self, key: str, teacher: str | None) -> float | None:
        return self.stored.get(key)

    def end_stopped_verification(self, key: str, result: TrialResult) -> None:
        self.ends.append(("verification", key, result.reason or ""))

    def end_stopped_training(self, key: str, reason: str) -> None:
        self.ends.append(("training", key, reason))

    def end_failed(self, key: str, reason: str, *, silent: bool) -> None:
        self.ends.append(("silent" if silent else "failed", key, reason))


@dataclass
class FakeScheduler:
    stopped: dict[str, str] = field(default_factory=dict)
    causes: dict[str, Cause] = field(default_factory=dict)
    is_halted: bool = False
    is_closed: bool = False
    taken_back: set[str] = field(default_factory=set)

    def halt(self) -> None:
        self.is_halted = True

    def close(self) -> None:
        self.is_closed = True


@dataclass
class FakeTeachers:
    present: set[str] = field(default_factory=set)
    holders: dict[str, str] = field(default_factory=dict)
    forgotten: list[tuple[str, str]] = field(default_factory=list)

    def has(self, key: str) -> bool:
        return key in self.present

    def holder(self, key: str) -> str | None:
        return self.holders.get(key)

    def forget(self, key: str, holder: str) -> None:
        self.forgotten.append((key, holder))


def no_teacher(assignment: Assignment) -> None:
    return None


def searcher_of(
    study: Study,
    log: Log,
    *,
    target: int = 8,
    slots: int = 2,
    files: FakeFiles | None = None,
    scheduler: FakeScheduler | None = None,
    asker: Asker | None = None,
    teachers: TeacherQueue | None = None,
    is_only_driver: Callable[[], bool] = lambda: True,
    **limits: float,
) -> StudySearcher:
    return StudySearcher(
        study,
        Budget(BudgetConfig(trials=target, **limits), ResourcesConfig(), study.trials),
        lambda: slots,
        files or FakeFiles(),
        log,
        scheduler or FakeScheduler(),
        asker or Asker(Inline(), ahead=False),
        teachers or TeacherQueue(no_teacher, FakeTeachers()),
        is_only_driver,
    )


def complete(told: TrialResult) -> dict[str, Any]:
    return {"state": "COMPLETE", "result": json.dumps(asdict(told))}


def failed(reason: str) -> dict[str, Any]:
    return {"state": "FAILED", "reason": reason}


def succeed(suggestion: Suggestion) -> dict[str, Any]:
    return complete(closed_form(suggestion.params))


def drive(searcher: StudySearcher, outcome: Callable[[Suggestion], dict[str, Any]], slots: int = 2) -> int:
    """Do what Tune does until the searcher says FINISHED: the oldest trial ends first. -> most trials at once"""
    running: list[tuple[str, Suggestion]] = []
    most = number = 0
    for _ in range(1000):
        suggested = searcher.suggest(f"tune{number}")
        if isinstance(suggested, dict):
            running.append((f"tune{number}", Suggestion.from_config(suggested)))
            number += 1
            most = max(most, len(running))
        elif suggested == Searcher.FINISHED:
            assert running == []
            return most
        else:
            assert suggested is None
            assert running, "the searcher says not now, and nothing runs"
            trial_id, suggestion = running.pop(0)
            searcher.on_trial_complete(trial_id, outcome(suggestion))
    raise AssertionError("the search does not end")


def states(study: Study) -> list[str]:
    return [trial.state for trial in study.record().trials]


@pytest.mark.parametrize("target", [1, 2, 5, 8])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_exactly_so_many_trials_are_run(target: int, slots: int, study: Study, log: Log) -> None:
    most = drive(searcher_of(study, log, target=target, slots=slots), succeed, slots)
    assert most == min(target, slots)
    assert study.num_done() == target
    assert states(study).count("RUNNING") == 0
    assert log.keys("started") == log.keys("finished") == [f"tiny-{number:04d}" for number in range(target)]


@pytest.mark.timeout(60)
def test_fifty_trials_find_the_front_of_a_formula(tmp_path: Path, log: Log) -> None:
    config = config_of(tmp_path, search__sampler={"kind": "nsga2", "population": 10}, budget__trials=50)
    study = open_study(config, tmp_path / "study.db")
    drive(searcher_of(study, log, target=50, slots=4), succeed, 4)
    found = [trial.objectives for trial in study.record().complete if trial.objectives is not None]
    assert len(found) == 50
    shares = [step / 1000 for step in range(1001)]
    best = hypervolume([(1 - 0.5 * share**2, 0.8 * share**0.5) for share in shares], (0, 0))
    assert 0.8 * best < hypervolume(found, (0, 0)) <= best


def test_failed_trials_are_replaced(study: Study, log: Log) -> None:
    def outcome(suggestion: Suggestion) -> dict[str, Any]:
        bad = suggestion.key in ("tiny-0001", "tiny-0004")
        return failed(f"{suggestion.key} went wrong") if bad else succeed(suggestion)

    searcher = searcher_of(study, log, target=6)
    drive(searcher, outcome)
    assert searcher.stop_reason is None
    assert states(study) == ["COMPLETE", "FAILED", "COMPLETE", "COMPLETE", "FAILED", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert study.record().trials[4].reason == "tiny-0004 went wrong"
    assert log.keys("failed") == ["tiny-0001", "tiny-0004"]


def test_three_identical_failures_in_a_row_end_the_search(study: Study, log: Log) -> None:
    steps = iter(range(10, 1000, 7))

    def outcome(suggestion: Suggestion) -> dict[str, Any]:
        loss = suggestion.recipe.student.loss.model_dump(mode="json")
        return failed(f"not finite: at step {next(steps)}, epsilon 1.5e-0{next(steps)}, {loss}; try less")

    searcher = searcher_of(study, log, target=20, slots=1)
    drive(searcher, outcome, 1)
    assert states(study) == ["FAILED", "FAILED", "FAILED"]
    assert searcher.stop_reason is not None
    assert searcher.stop_reason.startswith("3 trials in a row failed for the same reason: not finite: at step")


def test_what_runs_when_the_search_gives_up_is_still_told(study: Study, log: Log) -> None:
    searcher = searcher_of(study, log, target=20, slots=4)
    ids = ["a", "b", "c", "d"]
    suggestions = {trial_id: Suggestion.from_config(searcher.suggest(trial_id)) for trial_id in ids}
    for trial_id in ids[:3]:
        searcher.on_trial_complete(trial_id, failed("the same"))
    assert searcher.stop_reason is not None
    assert searcher.suggest("e") is None  # one still runs
    searcher.on_trial_complete("d", succeed(suggestions["d"]))
    assert searcher.suggest("e") == Searcher.FINISHED
    assert states(study) == ["FAILED", "FAILED", "FAILED", "COMPLETE"]


def test_a_success_between_two_failures_breaks_the_row(study: Study, log: Log) -> None:
    plan = iter(["bad", "bad", "good", "bad", "good", "good"])

    def outcome(suggestion: Suggestion) -> dict[str, Any]:
        return failed("the same") if next(plan) == "bad" else succeed(suggestion)

    searcher = searcher_of(study, log, target=3, slots=1)
    drive(searcher, outcome, 1)
    assert searcher.stop_reason is None
    assert study.num_done() == 3


def test_a_different_reason_breaks_the_row(study: Study, log: Log) -> None:
    reasons = iter(["one", "one", "two", "one", "one"])
    plan = iter([True, True, True, False, True, True, *[False] * 50])

    def outcome(suggestion: Suggestion) -> dict[str, Any]:
        return failed(next(reasons)) if next(plan) else succeed(suggestion)

    searcher = searcher_of(study, log, target=20, slots=1)
    drive(searcher, outcome, 1)
    assert searcher.stop_reason is None
    assert (study.num_done(), study.num_failed()) == (20, 5)


@pytest.mark.parametrize(("target", "allowed"), [(1, 3), (8, 3), (15, 3), (16, 4), (20, 5), (100, 25)])
def test_how_many_failures_are_allowed(target: int, allowed: int) -> None:
    assert allowed_failures(target) == allowed


@pytest.mark.parametrize("target", [4, 20])
def test_more_failures_than_allowed_end_the_search(target: int, study: Study, log: Log) -> None:
    counter = iter(range(1000))
    allowed = allowed_failures(target)

    def outcome(suggestion: Suggestion) -> dict[str, Any]:
        return failed(f"reason {'abcdefghijkl'[next(counter)]}")

    searcher = searcher_of(study, log, target=target, slots=1)
    drive(searcher, outcome, 1)
    assert study.num_failed() == allowed + 1
    assert searcher.stop_reason is not None
    assert searcher.stop_reason.startswith(f"{allowed + 1} trials failed, more than the {allowed} that a search of")
    assert searcher.stop_reason.endswith("the last reason: reason " + "abcdefghijkl"[allowed])


def test_failures_of_an_earlier_driver_count(study: Study, log: Log) -> None:
    for reason in "abc":
        study.tell_failed(study.ask().number, reason)
    searcher = searcher_of(study, log, target=8, slots=1)
    drive(searcher, lambda suggestion: failed("d"), 1)
    assert searcher.stop_reason is not None
    assert study.num_failed() == 4


NOT_FINITE = result(expected_certified=float("nan"))


@pytest.mark.parametrize(
    ("given_up", "ends"), [(True, failed("d")), (False, failed("d")), (False, complete(NOT_FINITE))]
)
def test_a_failure_is_told_once_it_is_in_the_files(
    study: Study, log: Log, tmp_path: Path, given_up: bool, ends: dict[str, Any]
) -> None:
    """A driver that dies in between leaves a trial that goes on, not one that nobody looks at again."""
    told: list[str] = []

    class Watching(FakeFiles):
        def end_failed(self, key: str, reason: str, *, silent: bool) -> None:
            told.append(states(opened)[-1])

    opened = study
    if given_up:
        study.tell(study.ask().number, result())
        study.ask()
        opened = open_study(config_of(tmp_path), tmp_path / "study.db")
    searcher = searcher_of(opened, log, target=1, slots=1, files=Watching())
    drive(searcher, lambda suggestion: ends, 1)
    assert "RUNNING" in told
    assert "FAILED" not in told
    assert "FAILED" in states(opened)


@pytest.mark.parametrize(
    ("last", "error"),
    [
        (None, True),
        ({"state": "RUNNING", "phase": "student", "step": 1, "steps": 2}, True),
        ({"state": "RUNNING", "phase": "student", "step": 1, "steps": 2}, False),
        ({}, False),
        ({"done": True}, False),
    ],
)
def test_a_dead_worker_is_a_failure_with_a_reason(
    last: dict[str, Any] | None, error: bool, study: Study, log: Log
) -> None:
    files = FakeFiles()
    searcher = searcher_of(study, log, files=files)
    searcher.suggest("tune0")
    searcher.on_trial_complete("tune0", last, error=error)
    (trial,) = [trial for trial in study.record().trials if trial.number == 0]
    assert trial.state == "FAILED"
    assert trial.reason is not None
    assert trial.reason.startswith("worker died")
    assert files.ends == [("silent", "tiny-0000", trial.reason)]


class AwayFiles(FakeFiles):
    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def end_failed(self, key: str, reason: str, *, silent: bool) -> None:
        raise self.error


def test_files_that_are_away_end_a_search_in_one_line(study: Study, log: Log, tmp_path: Path) -> None:
    """At its last question, too, of which Tune would make a traceback."""
    study.tell(study.ask().number, result())
    study.ask()
    opened = open_study(config_of(tmp_path), tmp_path / "study.db")
    searcher = searcher_of(opened, log, target=1, slots=1, files=AwayFiles(OSError(errno.EIO, "no answer")))
    assert searcher.suggest("tune0") == Searcher.FINISHED
    assert searcher.stop_reason is not None
    assert "cannot be given up (OSError: [Errno 5] no answer); nothing is lost" in searcher.stop_reason


@pytest.mark.parametrize(
    ("number", "told"),
    [(errno.ENOSPC, "the search pauses, nothing is lost: make room"), (errno.EIO, "or its files could not be written")],
)
def test_an_end_that_cannot_be_stored_is_told(study: Study, log: Log, number: int, told: str) -> None:
    searcher = searcher_of(study, log, slots=1, files=AwayFiles(OSError(number, "away")))
    drive(searcher, lambda _: failed("d"), 1)
    assert searcher.stop_reason is not None
    assert told in searcher.stop_reason


def test_a_result_that_is_not_finite_is_a_failure_to_everyone(study: Study, log: Log) -> None:
    files = FakeFiles()
    searcher = searcher_of(study, log, slots=1, files=files)
    drive(searcher, lambda _: complete(NOT_FINITE), 1)
    assert states(study) == ["FAILED"] * 3
    assert log.keys("failed") == ["tiny-0000", "tiny-0001", "tiny-0002"]
    assert log.keys("finished") == []
    assert files.ends[0] == ("silent", "tiny-0000", "not finite: expected_certified is nan")
    assert searcher.stop_reason is not None


def test_a_worker_that_died_after_its_result_has_finished(study: Study, log: Log) -> None:
    files = FakeFiles()
    searcher = searcher_of(study, log, files=files)
    searcher.suggest("tune0")
    files.results["tiny-0000"] = result(0.7, 0.3)
    searcher.on_trial_complete("tune0", None, error=True)
    assert study.record().trials[0].objectives == (0.7, 0.3)
    assert files.ends == []
    assert log.keys("finished") == ["tiny-0000"]


def test_unfinished_trials_come_first_with_their_keys(tmp_path: Path, study: Study, log: Log) -> None:
    started = [study.ask() for _ in range(3)]
    again = open_study(config_of(tmp_path), tmp_path / "study.db")
    searcher = searcher_of(again, log, target=4)
    adopted = [Suggestion.from_config(searcher.suggest(f"tune{index}")) for index in range(2)]
    assert [suggestion.key for suggestion in adopted] == [assignment.key for assignment in started[:2]]
    assert [suggestion.params for suggestion in adopted] == [assignment.params for assignment in started[:2]]
    assert searcher.suggest("tune2") is None  # both slots are taken
    for index, suggestion in enumerate(adopted):
        searcher.on_trial_complete(f"tune{index}", succeed(suggestion))
    drive(searcher, succeed)
    assert log.keys("started") == ["tiny-0000", "tiny-0001", "tiny-0002", "tiny-0003"]
    assert states(again) == ["COMPLETE"] * 4


def test_a_stored_result_is_told_without_a_run(tmp_path: Path, study: Study, log: Log) -> None:
    for _ in range(3):
        study.ask()
    files = FakeFiles({"tiny-0000": result(0.7, 0.1), "tiny-0002": result(0.8, 0.2)})
    again = open_study(config_of(tmp_path), tmp_path / "study.db")
    drive(searcher_of(again, log, target=4, files=files), succeed)
    record = again.record()
    assert states(again) == ["COMPLETE"] * 4
    assert record.trials[0].objectives == (0.7, 0.1)
    assert record.trials[2].objectives == (0.8, 0.2)
    assert log.keys("started") == ["tiny-0001", "tiny-0003"]
    assert sorted(log.keys("finished")) == [f"tiny-000{number}" for number in range(4)]


def test_stored_results_alone_can_finish_a_search(tmp_path: Path, study: Study, log: Log) -> None:
    study.ask()
    again = open_study(config_of(tmp_path), tmp_path / "study.db")
    searcher = searcher_of(again, log, target=1, files=FakeFiles({"tiny-0000": result()}))
    assert searcher.suggest("tune0") == Searcher.FINISHED
    assert states(again) == ["COMPLETE", "WAITING"]
    assert log.keys("started") == []


def test_no_trial_stays_running_when_less_is_asked_for_than_was_started(tmp_path: Path, study: Study, log: Log) -> None:
    study.tell(study.ask().number, result())
    for _ in range(2):
        study.ask()
    again = open_study(config_of(tmp_path), tmp_path / "study.db")
    drive(searcher_of(again, log, target=2), succeed)
    assert states(again) == ["COMPLETE", "COMPLETE", "FAILED"]
    assert again.record().trials[2].reason == "given up: it was cut off, and 2 trials were reached without it"
    assert again.num_failed() == 0  # nobody's fault: it does not use up what a search may lose


def test_a_given_up_trial_that_had_finished_keeps_its_result(study: Study, log: Log, tmp_path: Path) -> None:
    study.tell(study.ask().number, result())
    cut_off = study.ask().key
    again = open_study(config_of(tmp_path), tmp_path / "study.db")
    searcher = searcher_of(again, log, target=1, slots=1, files=FakeFiles({cut_off: result()}))
    assert searcher.suggest("tune0") == StudySearcher.FINISHED
    assert states(again) == ["COMPLETE", "COMPLETE"]


def test_a_study_that_cannot_be_written_ends_the_search_and_loses_nothing(
    tmp_path: Path, study: Study, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune swallows what on_trial_complete raises; the trial must neither count nor be forgotten."""
    searcher = searcher_of(study, log, target=2, slots=1)
    suggestion = Suggestion.from_config(searcher.suggest("tune0"))
    with monkeypatch.context() as patch:
        patch.setattr(study, "tell", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        searcher.on_trial_complete("tune0", succeed(suggestion))
    assert searcher.stop_reason is not None
    assert "disk full" in searcher.stop_reason
    assert searcher.suggest("tune1") == StudySearcher.FINISHED
    again = open_study(config_of(tmp_path), tmp_path / "study.db")
    assert again.unfinished() == [0]
    searcher = searcher_of(again, log, target=1, slots=1, files=FakeFiles({suggestion.key: result()}))
    assert searcher.suggest("tune2") == StudySearcher.FINISHED
    assert states(again) == ["COMPLETE", "WAITING"]


def test_progress_reaches_the_listener(study: Study, log: Log) -> None:
    searcher = searcher_of(study, log)
    searcher.suggest("tune0")
    searcher.on_trial_result("tune0", {"state": "RUNNING", "phase": "student", "step": 3, "steps": 9})
    searcher.on_trial_result("tune0", complete(result()))
    searcher.on_trial_result("other", {"state": "RUNNING", "phase": "student", "step": 3, "steps": 9})
    assert log.events[1:] == [("advanced", "tiny-0000", "student", "3", "9")]


def test_an_end_that_is_told_twice_counts_once(study: Study, log: Log) -> None:
    searcher = searcher_of(study, log)
    suggestion = Suggestion.from_config(searcher.suggest("tune0"))
    for _ in range(2):
        searcher.on_trial_complete("tune0", succeed(suggestion))
    searcher.on_trial_complete("never started", succeed(suggestion))
    assert study.num_done() == 1


def test_a_suggestion_is_plain_values_and_comes_back_whole(study: Study, log: Log) -> None:
    config = searcher_of(study, log).suggest("tune0")
    assert list(config) == ["trial"]
    suggestion = Suggestion.from_config(json.loads(json.dumps(config)))
    assert suggestion.recipe == study.space.recipe(suggestion.params, 0)
    assert suggestion.to_config() == config


def test_pickling_carries_nothing(study: Study, log: Log, tmp_path: Path) -> None:
    searcher = searcher_of(study, log)
    searcher.suggest("tune0")
    pickled = pickle.dumps(searcher)
    assert vars(pickle.loads(pickled)) == {}
    assert str(tmp_path).encode() not in pickled
    searcher.save(str(tmp_path / "searcher.pkl"))
    assert (tmp_path / "searcher.pkl").read_text() == "the study is the only state\n"
    with pytest.raises(NotImplementedError, match=r"run search\.run again"):
        searcher.restore(str(tmp_path / "searcher.pkl"))


# ---- Stopped, cut off, waiting ---------------------------------------------------------------------------------


def rung(**values: float) -> dict[str, Any]:
    return {"state": "RUNG", "rung": "1/9", "values": json.dumps(asdict(RungValues(**values)))}


def test_a_stopped_training_is_done_and_its_journal_is_ended(study: Study, log: Log) -> None:
    files, scheduler = FakeFiles(), FakeScheduler()
    searcher = searcher_of(study, log, target=2, slots=1, files=files, scheduler=scheduler)
    searcher.suggest("tune0")
    scheduler.stopped["tiny-0000"] = "dominated"
    searcher.on_trial_complete("tune0", rung(standard_accuracy=0.5, certified_accuracy=0.1, seconds=7.0))
    trial = study.trials()[0]
    assert (trial.state, trial.reason, trial.seconds) == ("STOPPED", "dominated", 7.0)
    assert (study.num_done(), study.num_failed()) == (1, 0)
    assert files.ends == [("training", "tiny-0000", "dominated")]
    assert log.events[-1] == ("stopped", "tiny-0000", "dominated")
    drive(searcher, succeed, 1)
    assert states(study) == ["STOPPED", "COMPLETE"]


def test_a_training_stopped_at_a_rung_that_it_tells_again_has_spent_what_it_spent(study: Study, log: Log) -> None:
    """After a kill it tells its rungs from the first one on, and may be stopped there."""
    scheduler = FakeScheduler()
    searcher = searcher_of(study, log, scheduler=scheduler)
    searcher.suggest("tune0")
    study.note_rung(0, "1/9", RungValues(0.5, 0.1, 7.0))
    study.note_rung(0, "1/3", RungValues(0.6, 0.2, 20.0))
    scheduler.stopped["tiny-0000"] = "dominated"
    searcher.on_trial_complete("tune0", rung(standard_accuracy=0.5, certified_accuracy=0.1, seconds=7.0))
    assert study.trials()[0].seconds == 20.0


def test_a_stopped_verification_keeps_its_interval(study: Study, log: Log) -> None:
    files, scheduler = FakeFiles(), FakeScheduler()
    searcher = searcher_of(study, log, files=files, scheduler=scheduler)
    searcher.suggest("tune0")
    so_far = result(0.8, 0.2, certified_upper=0.5, verification_state="stopped", expected_certified=0.35)
    scheduler.stopped["tiny-0000"] = "dominated by tiny-0007"
    searcher.on_trial_complete("tune0", {"state": "VERIFYING", "result": json.dumps(asdict(so_far))})
    trial = study.trials()[0]
    assert (trial.state, trial.verification_state) == ("COMPLETE", "stopped")
    assert (trial.certified_accuracy, trial.certified_upper, trial.expected_certified) == (0.2, 0.5, 0.35)
    assert trial.reason == "dominated by tiny-0007"
    assert files.ends == [("verification", "tiny-0000", "dominated by tiny-0007")]


def test_a_trial_that_was_cut_off_goes_on_later(tmp_path: Path, study: Study, log: Log) -> None:
    now = [0.0]
    scheduler = FakeScheduler()
    searcher = searcher_of(study, log, scheduler=scheduler, hours=1)
    searcher._budget._clock = lambda: now[0]
    searcher._budget._started = 0.0
    assert isinstance(searcher.suggest("tune0"), dict)
    now[0] = 3600.0
    assert searcher.suggest("tune1") is None  # no new trial; the running one is cut off at its next report
    assert scheduler.is_halted
    searcher.on_trial_complete("tune0", {"state": "RUNNING", "phase": "student", "step": 1, "steps": 2})
    assert searcher.suggest("tune1") == StudySearcher.FINISHED
    assert searcher.budget_reason == "the budget of 1 hours is over"
    assert searcher.stop_reason is None
    assert states(study)[0] == "RUNNING"
    assert open_study(config_of(tmp_path), tmp_path / "study.db").unfinished() == [0]


def test_spent_accelerator_hours_start_nothing_more(study: Study, log: Log) -> None:
    searcher = searcher_of(study, log, slots=1, accelerator_hours=5 / 3600)
    drive(searcher, succeed, 1)  # three seconds each
    assert study.num_done() == 2
    assert searcher.budget_reason == "the budget of 0.00138889 accelerator-hours is spent"


def test_between_two_changes_nothing_is_counted_again(study: Study, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune asks after each report, which in a large search is thousands of times a second."""
    searcher = searcher_of(study, log, accelerator_hours=3.5 / 3600)
    for trial_id in ("tune0", "tune1", "tune2"):
        searcher.suggest(trial_id)
    with monkeypatch.context() as patched:
        patched.setattr("search.scheduling.budget.accelerator_hours", lambda *_: 1 / 0)
        patched.setattr(searcher._retries, "_running", None)
        assert [searcher.suggest("tune2") for _ in range(3)] == [None] * 3
    assert searcher.stop_reason is None
    for trial_id in ("tune0", "tune1"):
        searcher.on_trial_complete(trial_id, complete(result(0.6, 0.4)))  # 3 s
    assert searcher.suggest("tune2") == StudySearcher.FINISHED
    assert searcher.budget_reason is not None


def test_a_full_disk_pauses_the_search_with_one_line(tmp_path: Path, study: Study, log: Log) -> None:
    searcher = searcher_of(study, log, slots=1)
    searcher.suggest("tune0")
    searcher.on_trial_complete("tune0", {"state": "PAUSED", "reason": "no room is left in /x (0 bytes free)"})
    assert searcher.suggest("tune1") == StudySearcher.FINISHED
    assert searcher.stop_reason is not None
    assert searcher.stop_reason.startswith("no room is left in /x (0 bytes free); the search pauses, nothing is lost")
    assert open_study(config_of(tmp_path), tmp_path / "study.db").unfinished() == [0]


def test_one_trial_trains_a_teacher_and_the_others_wait_for_it_outside_of_tune(study: Study, log: Log) -> None:
    searcher = searcher_of(study, log, slots=3, teachers=TeacherQueue(lambda _: "one", FakeTeachers()))
    assert isinstance(searcher.suggest("tune0"), dict)
    assert searcher.suggest("tune1") is None
    searcher.on_trial_result("tune0", {"state": "RUNNING", "phase": "teacher", "step": 1, "steps": 2})
    assert searcher.suggest("tune1") is None
    searcher.on_trial_result("tune0", {"state": "RUNNING", "phase": "student", "step": 1, "steps": 2})
    suggestions = [Suggestion.from_config(searcher.suggest(f"tune{n}")) for n in (1, 2)]
    assert [each.key for each in suggestions] == ["tiny-0001", "tiny-0002"]


def test_if_the_trainer_of_a_teacher_fails_the_next_trial_trains_it(study: Study, log: Log) -> None:
    store = FakeTeachers()
    searcher = searcher_of(study, log, slots=3, teachers=TeacherQueue(lambda _: "one", store))
    searcher.suggest("tune0")
    assert searcher.suggest("tune1") is None
    searcher.on_trial_complete("tune0", failed("diverged"))
    assert store.forgotten == [("one", "tiny-0000")]  # a process that was killed has left its lease
    assert Suggestion.from_config(searcher.suggest("tune1")).key == "tiny-0001"
    assert searcher.suggest("tune2") is None


def test_a_teacher_of_another_search_is_asked_for_again_later(study: Study, log: Log) -> None:
    now, store = [0.0], FakeTeachers(holders={"one": "other-0003"})
    teachers = TeacherQueue(lambda _: "one", store, lambda: now[0])
    searcher = searcher_of(study, log, target=1, teachers=teachers)
    searcher.suggest("tune0")
    searcher.on_trial_complete("tune0", {"state": "WAITING", "teacher": "one"})
    assert states(study)[0] == "RUNNING"
    assert searcher.suggest("tune1") is None
    now[0] = RETRY_S
    assert searcher.suggest("tune1") is None  # it still does
    now[0] = 2 * RETRY_S
    store.holders.clear()  # finished, or dead
    assert Suggestion.from_config(searcher.suggest("tune1")).key == "tiny-0000"


def test_a_trial_that_is_told_without_a_run_trains_no_teacher(tmp_path: Path, study: Study, log: Log) -> None:
    """It had finished under an earlier driver, and its teacher was deleted since: the others must not wait for it."""
    study.ask()
    again = open_study(config_of(tmp_path), tmp_path / "study.db")
    teachers = TeacherQueue(lambda _: "one", FakeTeachers())
    searcher = searcher_of(again, log, target=2, files=FakeFiles({"tiny-0000": result()}), teachers=teachers)
    drive(searcher, succeed)
    assert states(again) == ["COMPLETE", "COMPLETE"]


def test_a_teacher_that_is_trained_elsewhere_is_not_there(study: Study, log: Log) -> None:
    """A student from before a kill is verified without its teacher, which may have been deleted since."""
    now, store = [0.0], FakeTeachers(holders={"one": "tiny-0001"})
    searcher = searcher_of(study, log, slots=3, teachers=TeacherQueue(lambda _: "one", store, lambda: now[0]))
    searcher.suggest("tune0")
    searcher.on_trial_result("tune0", {"state": "VERIFYING", "phase": "clean", "step": 1, "steps": 2})
    assert isinstance(searcher.suggest("tune1"), dict)  # it trains the teacher
    assert isinstance(searcher.suggest("tune2"), dict)
    searcher.on_trial_complete("tune2", {"state": "WAITING", "teacher": "one"})
    assert searcher.suggest("tune3") is None
    now[0] = RETRY_S
    store.present.add("one")
    assert Suggestion.from_config(searcher.suggest("tune3")).key == "tiny-0002"


def test_a_waiting_point_of_an_older_version_has_no_parameters_yet(tmp_path: Path, study: Study, log: Log) -> None:
    database = tmp_path / "older.db"
    (stored,) = (trial for trial in study._storage.trials() if trial.number == 1)
    older = open_study(config_of(tmp_path, search__points=[]), database)
    assert older.space.points() == []
    older._storage.create(
        0,
        create_trial(state=TrialState.WAITING, system_attrs={"fixed_params": stored.params}, user_attrs={"point": 0}),
    )
    older = open_study(config_of(tmp_path, search__points=[]), database)
    teachers = TeacherQueue(lambda assignment: assignment.params["loss"], FakeTeachers())
    suggestion = Suggestion.from_config(searcher_of(older, log, teachers=teachers).suggest("tune0"))
    assert (suggestion.key, suggestion.params) == ("tiny-0000", stored.params)


class SlowPool:
    """Computes when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[Future[Any], Callable[..., Any]]] = []

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.asked.append((future, lambda: function(*args)))
        return future

    def compute(self) -> None:
        future, function = self.asked.pop(0)
        future.set_result(function())

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        pass


def test_a_slow_sampler_holds_up_nothing_and_is_asked_ahead(tmp_path: Path, log: Log) -> None:
    study = open_study(config_of(tmp_path, search__points=[]), tmp_path / "study.db")
    pool = SlowPool()
    searcher = searcher_of(study, log, target=3, slots=2, asker=Asker(pool, ahead=True))
    assert searcher.suggest("tune0") is None  # being computed
    assert len(pool.asked) == 1
    pool.compute()
    assert Suggestion.from_config(searcher.suggest("tune0")).key == "tiny-0000"
    assert len(pool.asked) == 1  # the next one, while a slot is still free
    assert searcher.suggest("tune1") is None
    pool.compute()
    assert isinstance(searcher.suggest("tune1"), dict)
    pool.compute()
    assert searcher.suggest("tune2") is None  # no slot is free
    searcher.on_trial_complete("tune0", complete(result()))
    assert Suggestion.from_config(searcher.suggest("tune2")).key == "tiny-0002"
    assert pool.asked == []  # three trials are all that is wanted


def test_a_sampler_that_raises_ends_the_search_and_not_tune(study: Study, log: Log) -> None:
    class Broken(SlowPool):
        def submit(self, function: Callable[..., Any], /, *args: Any) -> Future[Any]:
            raise RuntimeError("no such matrix")

    searcher = searcher_of(study, log, slots=4, asker=Asker(Broken(), ahead=False))
    ids = ["tune0", "tune1"]  # the two points of the space need no sampler
    suggestions = [Suggestion.from_config(searcher.suggest(each)) for each in ids]
    assert searcher.suggest("tune2") is None
    for trial_id, suggestion in zip(ids, suggestions, strict=True):
        searcher.on_trial_complete(trial_id, succeed(suggestion))
    assert searcher.suggest("tune3") == StudySearcher.FINISHED
    assert searcher.stop_reason == "no trial can be started (RuntimeError: no such matrix); nothing is lost"


def test_verifications_go_on_with_what_is_left_of_the_budget(study: Study, log: Log) -> None:
    searcher = searcher_of(study, log, target=1, slots=1, hours=1)
    searcher.suggest("tune0")
    searcher.on_trial_complete("tune0", complete(result(0.9, 0.5, certified_upper=0.7)))
    resumed = Suggestion.from_config(searcher.suggest("tune1"))
    assert (resumed.key, resumed.resume) == ("tiny-0000", True)
    searcher.on_trial_complete("tune1", complete(result(0.9, 0.65, certified_upper=0.66)))
    (trial, _) = study.trials()
    assert (trial.certified_accuracy, trial.certified_upper) == (0.65, 0.66)
    assert searcher.suggest("tune2") == StudySearcher.FINISHED  # each is resumed once
    assert study.num_done() == 1


def test_a_narrower_interval_that_nobody_told_is_found_in_the_files(study: Study, log: Log) -> None:
    """Its driver died between the two, or its worker did after it had stored the result."""
    files = FakeFiles({"tiny-0000": result(0.9, 0.6, certified_upper=0.65, seconds=4.0)})
    study.tell(study.ask().number, result(0.9, 0.5, certified_upper=0.7))
    searcher = searcher_of(study, log, target=1, slots=1, files=files, hours=1)
    assert Suggestion.from_config(searcher.suggest("tune0")).resume
    assert (study.trials()[0].certified_accuracy, study.trials()[0].certified_upper) == (0.6, 0.65)
    files.results["tiny-0000"] = result(0.9, 0.62, certified_upper=0.64, seconds=5.0)
    searcher.on_trial_complete("tune0", None, error=True)
    assert (study.trials()[0].certified_accuracy, study.trials()[0].certified_upper) == (0.62, 0.64)
    files.results["tiny-0000"] = result(0.9, 0.1, certified_upper=0.9, seconds=6.0)  # of something else
    assert Suggestion.from_config(searcher_of(study, log, target=1, files=files, hours=1).suggest("tune1")).resume
    assert study.trials()[0].certified_accuracy == 0.62


def test_a_full_disk_pauses_a_resumed_verification_too(study: Study, log: Log) -> None:
    for _ in range(2):
        study.tell(study.ask().number, result(0.9, 0.5, certified_upper=0.7))
    searcher = searcher_of(study, log, target=2, slots=1, hours=1)
    assert Suggestion.from_config(searcher.suggest("tune0")).resume
    searcher.on_trial_complete("tune0", {"state": "PAUSED", "reason": "no room is left"})
    assert searcher.suggest("tune1") == StudySearcher.FINISHED
    assert searcher.stop_reason is not None
    assert searcher.stop_reason.startswith("no room is left; the search pauses")


def test_without_other_limits_the_search_ends_with_its_last_trial(study: Study, log: Log) -> None:
    searcher = searcher_of(study, log, target=1, slots=1)
    searcher.suggest("tune0")
    searcher.on_trial_complete("tune0", complete(result(0.9, 0.5, certified_upper=0.7)))
    assert searcher.suggest("tune1") == StudySearcher.FINISHED


def test_journals_of_a_study_whose_lock_was_lost_are_left_to_its_other_driver(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage: Any = SimpleNamespace(pull_trials=lambda study: None)

    class Lost:
        def still_held(self) -> bool:
            return False

    closed: list[Any] = []
    monkeypatch.setattr(execution, "close_study", lambda *arguments: closed.append(arguments))
    for parts in ([Lost()], []):
        execution._close(study.record(), storage, "KILLED", DriverLock(parts))  # type: ignore[arg-type]
    assert [status for *_, status in closed] == ["KILLED"]


@pytest.mark.parametrize("is_away", [False, True])
def test_a_driver_that_lost_its_lock_writes_nothing_more(tmp_path: Path, study: Study, log: Log, is_away: bool) -> None:
    """To another driver, or with a database that stays away."""
    held, scheduler = [True], FakeScheduler()

    def is_held() -> bool:
        if is_away and not held[0] and not scheduler.is_halted:
            raise DatabaseAwayError("study database x did not come back within 300 s")
        return held[0]

    searcher = searcher_of(study, log, scheduler=scheduler, is_only_driver=is_held)
    suggestion = Suggestion.from_config(searcher.suggest("tune0"))
    held[0] = False
    assert searcher.suggest("tune1") is None
    assert scheduler.is_halted
    searcher.on_trial_complete("tune0", succeed(suggestion))
    assert searcher.suggest("tune1") == StudySearcher.FINISHED
    away, lost = "study database x did not come back within 300 s; nothing is lost", "the lock on study tiny was lost, "
    assert searcher.stop_reason == (away if is_away else f"{lost}and another driver may have it")
    assert open_study(config_of(tmp_path), tmp_path / "study.db").unfinished() == [0]


# ---- What waits in Ray's queue ---------------------------------------------------------------------------------------


def test_trials_that_wait_in_ray_s_queue_keep_no_search_from_its_end(study: Study, log: Log) -> None:
    """They report nothing, so that no report could cut them off; each is put back as it was."""
    scheduler = FakeScheduler()
    searcher = searcher_of(study, log, slots=3, scheduler=scheduler, hours=1.0)
    keys = [Suggestion.from_config(searcher.suggest(trial_id)).key for trial_id in ("a", "b", "c")]
    searcher.on_trial_start("a")
    searcher.suggest("x")
    assert not scheduler.is_closed
    searcher._budget._started -= 3601
    assert searcher.suggest("x") is None
    assert (scheduler.is_halted, scheduler.is_closed) == (True, True)
    searcher.on_trial_complete("c")  # as Tune tells it of what it stops before it starts
    searcher.on_trial_complete("b")
    assert searcher.suggest("x") is None
    searcher.on_trial_complete("a", {"state": "RUNNING", "phase": "student", "step": 1, "steps": 2})
    assert searcher.suggest("x") == Searcher.FINISHED
    assert (searcher.stop_reason, searcher.budget_reason) == (None, "the budget of 1 hours is over")
    assert [trial.key for trial in study.record().unfinished] == keys
    assert [(trial.state, trial.attempt, trial.deaths) for trial in study.trials()] == [("RUNNING", 1, ())] * 3


@pytest.mark.parametrize("why", ["disk", "lock"])
def test_a_full_disk_and_a_lost_lock_end_a_search_whose_trials_wait(
    why: str, study: Study, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.searcher.LOCK_S", 0.0)
    held, scheduler = [True], FakeScheduler()
    searcher = searcher_of(study, log, slots=2, scheduler=scheduler, is_only_driver=lambda: held[0])
    for trial_id in ("a", "b"):
        searcher.suggest(trial_id)
    assert searcher.suggest("x") is None
    assert not scheduler.is_closed
    if why == "disk":
        searcher.on_trial_complete("a", {"state": "PAUSED", "reason": "the disk of /x is full"})
    held[0] = why == "disk"
    assert searcher.suggest("x") is None
    assert (scheduler.is_closed, scheduler.is_halted) == (True, why == "lock")
    for trial_id in ("a", "b"):
        searcher.on_trial_complete(trial_id)
    assert searcher.suggest("x") == Searcher.FINISHED
    assert study.unfinished() == [0, 1]
