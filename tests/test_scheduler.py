"""The scheduler as Tune calls it, over a study held in memory. Ray does not run."""

import json
import math
import pickle
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.tune.schedulers import TrialScheduler
from studies import config_of

from search.config import SearchConfig
from search.scheduler import StudyScheduler
from search.studies.records import RungValues, TrialRecord, TrialResult


@pytest.fixture(autouse=True)
def without_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests have too few finished trials for anybody to know what a trial may hope for."""
    monkeypatch.setitem(StudyScheduler.__init__.__kwdefaults__, "margin", None)


pytestmark = pytest.mark.timeout(30)  # the first test pays for importing Ray

CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP
RUNGS = ("after-ramp 0", "after-ramp 1/3")


class MemoryStudy:
    """What the scheduler needs of a study; records of trials that did not change stay the same objects."""

    def __init__(self, config: SearchConfig) -> None:
        self.config = config
        self.records: list[TrialRecord] = []
        self.broken = False

    def trials(self) -> Sequence[TrialRecord]:
        return tuple(self.records)

    def note_rung(self, number: int, rung: str, values: RungValues) -> None:
        if self.broken:
            raise OSError("no space left\non device")
        if not math.isfinite(values.standard_accuracy):
            raise ValueError("a rung holds finite numbers only")
        known = self.records[number]
        self.records[number] = replace(known, rungs={**known.rungs, rung: values})

    def add(self, **changes: Any) -> TrialRecord:
        number = len(self.records)
        made = TrialRecord(f"tiny-{number:04d}", number, "RUNNING", {}, f"c{number}", 0)
        self.records.append(replace(made, **changes))
        return self.records[-1]

    def complete(self, number: int, standard: float, lower: float, upper: float) -> None:
        self.records[number] = replace(
            self.records[number],
            state="COMPLETE",
            standard_accuracy=standard,
            certified_accuracy=lower,
            certified_upper=upper,
        )


@pytest.fixture
def study(tmp_path: Path) -> MemoryStudy:
    return MemoryStudy(config_of(tmp_path, stopping={"peers": 2}))


def rung(number: int, standard: float, certified: float, name: str = RUNGS[0]) -> dict[str, Any]:
    values = json.dumps(asdict(RungValues(standard, certified, 1.0)))
    return {"key": f"tiny-{number:04d}", "state": "RUNG", "rung": name, "values": values}


def verifying(number: int, standard: float, lower: float, upper: float) -> dict[str, Any]:
    known = TrialResult(standard, upper, lower, upper, "stopped", 100, {}, 1.0, {})
    return {"key": f"tiny-{number:04d}", "state": "VERIFYING", "result": json.dumps(asdict(known))}


def decide(scheduler: StudyScheduler, report: dict[str, Any]) -> str:
    return scheduler.on_trial_result(None, None, report)


def test_a_rung_is_noted_before_it_is_judged_and_the_reason_of_a_stop_is_kept(study: MemoryStudy) -> None:
    scheduler = StudyScheduler(study)
    assert scheduler.set_search_properties(None, None)
    for _ in range(4):
        study.add()
    reports = [rung(0, 0.8, 0.5), rung(1, 0.7, 0.4), rung(2, 0.9, 0.4), rung(3, 0.5, 0.3)]
    assert [decide(scheduler, report) for report in reports] == [CONTINUE, CONTINUE, CONTINUE, STOP]
    assert scheduler.stopped == {
        "tiny-0003": "rung after-ramp 0: not among the best 2 of 4; tiny-0000 has (0.8000, 0.5000) "
        "(standard, certified), this trial (0.5000, 0.3000)"
    }
    assert study.records[3].rungs == {RUNGS[0]: RungValues(0.5, 0.3, 1.0)}
    assert scheduler.error is None


def test_a_further_seed_of_a_configuration_with_a_result_is_trained_to_its_end(study: MemoryStudy) -> None:
    """The mean of a configuration would flatter it if its worse seeds had no results."""
    scheduler = StudyScheduler(study)
    for _ in range(3):
        study.add()
    study.add(configuration="c0")
    for report in (rung(0, 0.8, 0.5), rung(1, 0.7, 0.4), rung(2, 0.9, 0.4)):
        decide(scheduler, report)
    study.complete(0, 0.9, 0.5, 0.5)
    assert decide(scheduler, rung(3, 0.5, 0.3)) == CONTINUE
    study.records[0] = replace(study.records[0], configuration="another")
    assert decide(StudyScheduler(study), rung(3, 0.5, 0.3)) == STOP


def test_verification_is_judged_against_finished_trials(study: MemoryStudy) -> None:
    scheduler = StudyScheduler(study)
    study.add()
    study.add()
    assert decide(scheduler, verifying(1, 0.5, 0.1, 0.3)) == CONTINUE
    study.complete(0, 0.6, 0.35, 0.4)
    assert decide(scheduler, verifying(1, 0.5, 0.1, 0.4)) == CONTINUE
    assert decide(scheduler, verifying(1, 0.5, 0.1, 0.3)) == STOP
    assert scheduler.stopped["tiny-0001"].startswith("cannot reach the front: tiny-0000 has at least (0.6000, 0.3500)")


@pytest.mark.parametrize(
    "stopping", [{"verification": False, "training": "off"}, {"training": "fractions", "peers": 2}]
)
def test_what_is_turned_off_stops_nobody_and_rungs_are_noted_all_the_same(
    stopping: dict[str, Any], tmp_path: Path
) -> None:
    study = MemoryStudy(config_of(tmp_path, stopping=stopping))
    scheduler = StudyScheduler(study)
    for _ in range(4):
        study.add()
    decisions = [decide(scheduler, rung(number, 0.9 - number / 10, 0.5, "1/9")) for number in range(4)]
    study.complete(0, 0.9, 0.9, 0.9)
    decisions.append(decide(scheduler, verifying(1, 0.5, 0.1, 0.2)))
    # Two of three go on at the rung, then two of four.
    expected = [CONTINUE] * 5 if "verification" in stopping else [CONTINUE, CONTINUE, STOP, STOP, STOP]
    assert decisions == expected
    assert all(trial.rungs for trial in study.records)


def test_reports_that_need_no_judgement_go_on_without_reading_the_study(study: MemoryStudy) -> None:
    study.trials = None  # type: ignore[assignment, method-assign]
    scheduler = StudyScheduler(study)
    key = "tiny-0000"
    for report in (
        {"key": key, "state": "RUNNING", "phase": "student", "step": 1, "steps": 2},
        {"key": key, "state": "WAITING", "teacher": "abc"},
        {"key": key, "state": "COMPLETE", "result": "{}"},
        {"key": key, "state": "FAILED", "reason": "no"},
        {"state": "VERIFYING"},
        {},
        {**verifying(0, 0.5, 0.1, 0.2), "done": True},  # Tune's echo of the last report of a worker that returned
    ):
        assert decide(scheduler, report) == CONTINUE
    assert (scheduler.error, scheduler.stopped) == (None, {})


def test_unknown_and_finished_trials_and_every_other_call_of_tune_are_harmless(study: MemoryStudy) -> None:
    scheduler = StudyScheduler(study)
    study.add()
    study.complete(0, 0.9, 0.9, 0.9)
    study.add(state="FAILED")
    for number in (0, 1, 7):
        assert decide(scheduler, verifying(number, 0.1, 0.1, 0.1)) == CONTINUE
        assert decide(scheduler, rung(number, 0.1, 0.1)) == CONTINUE
    for call in (scheduler.on_trial_add, scheduler.on_trial_error, scheduler.on_trial_add, scheduler.on_trial_remove):
        call(None, object())
    scheduler.on_trial_complete(None, object(), {})
    assert scheduler.error is None
    assert not scheduler.supports_buffered_results


def test_what_goes_wrong_is_kept_in_one_line_and_the_trial_goes_on(study: MemoryStudy) -> None:
    scheduler = StudyScheduler(study)
    study.add()
    study.broken = True
    assert decide(scheduler, rung(0, 0.5, 0.5)) == CONTINUE
    assert scheduler.error == ("trial tiny-0000 could not be judged (OSError: no space left on device); it goes on")
    study.broken = False
    for report in (
        rung(0, float("nan"), 0.5),
        {**rung(0, 0.5, 0.5), "values": "{"},
        verifying(0, 0.5, 0.5, 0.5) | {"result": "{}"},
        {"key": "tiny-0000", "state": "RUNG"},
    ):
        scheduler.error = None
        assert decide(scheduler, report) == CONTINUE
        assert scheduler.error is not None
    assert study.records[0].rungs == {}


def test_after_a_halt_every_report_ends_its_trial_and_only_judged_ones_count_as_stopped(study: MemoryStudy) -> None:
    scheduler = StudyScheduler(study)
    for _ in range(4):
        study.add()
    scheduler.halt()
    running = {"key": "tiny-0000", "state": "RUNNING", "phase": "student", "step": 1, "steps": 2}
    reports = [running, verifying(0, 0.5, 0.1, 0.2), rung(1, 0.8, 0.5), rung(2, 0.9, 0.4), rung(3, 0.5, 0.3)]
    assert [decide(scheduler, report) for report in reports] == [STOP] * 5
    assert list(scheduler.stopped) == ["tiny-0003"]
    assert study.records[1].rungs  # noted all the same


def test_a_trial_that_runs_again_after_it_was_stopped_is_not_taken_as_stopped(study: MemoryStudy) -> None:
    scheduler = StudyScheduler(study)
    study.add()
    study.complete(0, 0.9, 0.9, 0.9)
    study.add()
    assert decide(scheduler, verifying(1, 0.5, 0.1, 0.2)) == STOP
    assert decide(scheduler, verifying(1, 0.95, 0.1, 0.2)) == CONTINUE  # trained anew elsewhere, with other weights
    assert scheduler.stopped == {}


def test_one_made_from_the_study_decides_as_the_one_that_lived(study: MemoryStudy) -> None:
    lived, stops = StudyScheduler(study), 0
    for number in range(40):
        study.add()
        quality = (number * 37 % 40) / 40
        for step, name in enumerate(RUNGS):
            made = StudyScheduler(study)
            report = rung(number, 0.3 + quality / 3 + step / 10, quality / 2, name)
            decisions = [decide(scheduler, report) for scheduler in (lived, made)]
            assert decisions[0] == decisions[1]
            if decisions[0] == STOP:
                break
        if decisions[0] == STOP:
            stops += 1
            study.records[number] = replace(study.records[number], state="STOPPED")
        elif number % 9 == 8:
            study.records[number] = replace(study.records[number], state="FAILED")
        else:
            study.complete(number, 0.6 + quality / 3, quality / 2, quality / 2 + 0.02)
        if number % 10 == 9:  # verification resumed: a finished record is replaced
            done = next(trial for trial in study.records if trial.state == "COMPLETE")
            study.records[done.number] = replace(done, certified_upper=done.certified_accuracy)
    assert 5 < stops < 35


def test_tune_pickles_none_of_it(study: MemoryStudy) -> None:
    assert pickle.loads(pickle.dumps(StudyScheduler(study))).__dict__ == {}


def test_ten_thousand_trials_do_not_slow_it_down(study: MemoryStudy) -> None:
    size = 10_000
    for number in range(size - 1):
        standard, certified = (number * 7919 % 9973) / 9973, (number * 104729 % 9967) / 9967
        study.add(
            state="COMPLETE",
            standard_accuracy=standard,
            certified_accuracy=0.9 * certified,
            certified_upper=certified,
            rungs={RUNGS[0]: RungValues(standard, certified, 1.0)},
        )
    study.add()
    scheduler = StudyScheduler(study)
    decide(scheduler, verifying(size - 1, 0.5, 0.1, 0.9))  # reads all of it, once
    for report in (rung(size - 1, 0.5, 0.5), verifying(size - 1, 0.5, 0.1, 0.4)):
        seconds = []
        for _ in range(5):
            begin = time.perf_counter()
            decide(scheduler, report)
            seconds.append(time.perf_counter() - begin)
        assert min(seconds) < 0.03  # 1 to 8 ms on an idle core; a busy one must not fail the test
    assert scheduler.error is None


def test_only_trials_that_have_not_started_are_taken_back(capsys: pytest.CaptureFixture[str]) -> None:
    stopped: list[str] = []

    def stop(trial: Any) -> None:
        print("completed")
        trial.status = "TERMINATED"
        stopped.append(trial.trial_id)

    states = {"a": "RUNNING", "b": "PENDING", "c": "TERMINATED", "d": "PENDING", "e": "PENDING"}
    trials = [SimpleNamespace(trial_id=name, status=status) for name, status in states.items()]
    controller = SimpleNamespace(stop_trial=stop)  # not get_trials: a search of 100,000 has as many, at each step
    scheduler = StudyScheduler(cast(Any, None))
    for trial in trials:
        scheduler.on_trial_add(controller, trial)
    assert scheduler.choose_trial_to_run(controller) is trials[1]
    assert stopped == []
    scheduler.taken_back |= {"b", "a"}
    assert scheduler.choose_trial_to_run(controller) is trials[3]
    assert (stopped, scheduler.taken_back) == (["b"], set())
    scheduler.close()
    assert scheduler.choose_trial_to_run(controller) is None
    assert stopped == ["b", "d", "e"]
    assert capsys.readouterr().out == ""
    assert not scheduler._queue
