"""The searcher with fake results: how many trials run, which come first, and when the search ends. No Ray runs."""

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import InMemoryStorage
from ray.tune.search import Searcher
from studies import closed_form, config_of, open_study, result

from search.pareto import hypervolume
from search.records import TrialResult
from search.searcher import StudySearcher, allowed_failures
from search.study import Study
from search.worker import Suggestion

pytestmark = pytest.mark.timeout(30)  # the first test pays for importing Ray


class Log:
    """A listener that writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, ...]] = []

    def started(self, key: str) -> None:
        self.events.append(("started", key))

    def advanced(self, key: str, phase: str, done: int, of: int) -> None:
        self.events.append(("advanced", key, phase, str(done), str(of)))

    def finished(self, key: str, result: TrialResult) -> None:
        self.events.append(("finished", key))

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


def nothing_stored(key: str) -> None:
    return None


def searcher_of(
    study: Study,
    log: Log,
    *,
    target: int = 8,
    slots: int = 2,
    stored: Callable[[str], TrialResult | None] = nothing_stored,
) -> StudySearcher:
    return StudySearcher(study, target, slots, stored, log)


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
    assert study.num_complete() == target
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
    assert study.num_complete() == 3


def test_a_different_reason_breaks_the_row(study: Study, log: Log) -> None:
    reasons = iter(["one", "one", "two", "one", "one"])
    plan = iter([True, True, True, False, True, True, *[False] * 50])

    def outcome(suggestion: Suggestion) -> dict[str, Any]:
        return failed(next(reasons)) if next(plan) else succeed(suggestion)

    searcher = searcher_of(study, log, target=20, slots=1)
    drive(searcher, outcome, 1)
    assert searcher.stop_reason is None
    assert (study.num_complete(), study.num_failed()) == (20, 5)


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


@pytest.mark.parametrize(
    ("last", "error"),
    [
        (None, True),
        ({"state": "RUNNING", "phase": "student", "step": 1, "steps": 2}, True),
        ({"state": "RUNNING", "phase": "student", "step": 1, "steps": 2}, False),
        (None, False),
        ({}, False),
        ({"done": True}, False),
    ],
)
def test_a_dead_worker_is_a_failure_with_a_reason(
    last: dict[str, Any] | None, error: bool, study: Study, log: Log
) -> None:
    searcher = searcher_of(study, log)
    searcher.suggest("tune0")
    searcher.on_trial_complete("tune0", last, error=error)
    (trial,) = [trial for trial in study.record().trials if trial.number == 0]
    assert trial.state == "FAILED"
    assert trial.reason is not None
    assert trial.reason.startswith("worker died")
    assert searcher.silent_failures == {"tiny-0000": trial.reason}


def test_a_worker_that_died_after_its_result_has_finished(study: Study, log: Log) -> None:
    results = {"tiny-0000": result(0.7, 0.3)}
    stored: dict[str, TrialResult] = {}
    searcher = searcher_of(study, log, stored=stored.get)
    searcher.suggest("tune0")
    stored |= results
    searcher.on_trial_complete("tune0", None, error=True)
    assert study.record().trials[0].objectives == (0.7, 0.3)
    assert searcher.silent_failures == {}
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
    stored = {"tiny-0000": result(0.7, 0.1), "tiny-0002": result(0.8, 0.2)}
    again = open_study(config_of(tmp_path), tmp_path / "study.db")
    drive(searcher_of(again, log, target=4, stored=stored.get), succeed)
    record = again.record()
    assert states(again) == ["COMPLETE"] * 4
    assert record.trials[0].objectives == (0.7, 0.1)
    assert record.trials[2].objectives == (0.8, 0.2)
    assert log.keys("started") == ["tiny-0001", "tiny-0003"]
    assert sorted(log.keys("finished")) == [f"tiny-000{number}" for number in range(4)]


def test_stored_results_alone_can_finish_a_search(tmp_path: Path, study: Study, log: Log) -> None:
    study.ask()
    again = open_study(config_of(tmp_path), tmp_path / "study.db")
    searcher = searcher_of(again, log, target=1, stored=lambda key: result())
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
    searcher = StudySearcher(again, 1, 1, lambda key: result() if key == cut_off else None, log)
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
    stored = {suggestion.key: result()}
    searcher = StudySearcher(again, 1, 1, stored.get, log)
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
    assert study.num_complete() == 1


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
