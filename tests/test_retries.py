"""Attempts that end without a result: how often a trial may die, on what it goes on, and what was lost.

No Ray runs. Real workers and nodes die in test_kills.py and test_multinode.py.
"""

import json
import os
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import pytest
from search_bench import Bench, databases_in_memory
from studies import open_study, result
from test_searcher import drive, succeed

from search.artifacts.trial_files import TrialFiles
from search.attempts.deaths import (
    KILLED_FOR_MEMORY,
    NODE_LOST,
    NODE_PREEMPTED,
    OTHER_DEATHS,
    OUT_OF_MEMORY,
    STORAGE_AWAY,
    WORKER_DEATHS,
    WORKER_KILLED,
    account,
    exhausted,
)
from search.config import ResourcesConfig
from search.results.report import front_json, front_table
from search.scheduling.budget import accelerator_hours
from search.searcher import IDENTICAL_FAILURES, StudySearcher
from search.studies.records import Death

pytestmark = pytest.mark.timeout(30)  # the first test pays for importing Ray


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    databases_in_memory(monkeypatch)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


# ---- A search whose trials die -------------------------------------------------------------------------------------


def test_a_trial_whose_worker_died_goes_on_under_its_key_as_another_attempt(bench: Bench) -> None:
    trial_id, first = bench.next()
    assert bench.attempt() == 1
    bench.die(trial_id, WORKER_KILLED)
    assert bench.study.trials()[0].state == "RUNNING"
    trial_id, again = bench.next()
    assert (again.key, again.params, again.recipe) == (first.key, first.params, first.recipe)
    assert bench.attempt() == 2
    assert (first.deaths, again.deaths) == ("", "1 worker killed; 0 s lost")
    bench.complete(trial_id, again)
    assert bench.study.trials()[0].state == "COMPLETE"
    assert bench.log.keys("lost") == [first.key]
    assert bench.files.ends == []
    drive(bench.searcher, succeed)
    assert bench.study.num_done() == bench.target
    assert bench.study.num_failed() == 0


@pytest.mark.parametrize(
    ("reason", "allowed"),
    [
        (WORKER_KILLED, WORKER_DEATHS),
        ("worker failed: KeyError: 'a'", WORKER_DEATHS),
        (NODE_LOST, OTHER_DEATHS),
        (NODE_PREEMPTED, OTHER_DEATHS),
        (f"{STORAGE_AWAY}: /x", OTHER_DEATHS),
    ],
)
def test_how_often_a_trial_may_die(reason: str, allowed: int, bench: Bench) -> None:
    for count in range(allowed + 1):
        trial_id, suggestion = bench.next()
        assert (suggestion.key, bench.attempt()) == ("tiny-0000", count + 1)
        bench.die(trial_id, reason)
    trial = bench.study.trials()[0]
    assert trial.state == "FAILED"
    kind = reason.partition(":")[0]
    assert trial.reason == f"worker died {allowed + 1} times: {allowed + 1} {kind}; the last one: {reason}"
    assert bench.files.ends == [("silent", "tiny-0000", trial.reason)]
    assert len(trial.deaths) == allowed + 1
    lost = f"{allowed + 1} workers were lost ({allowed + 1} {kind}), and 0 s with them"
    assert account(bench.study.record()) == f"{lost}; 1 trial failed of it, and what it had stored is lost, too"
    assert bench.next()[1].key == "tiny-0001"


def test_preemptions_do_not_use_up_what_a_worker_may_die_of_itself(bench: Bench) -> None:
    for reason in [WORKER_KILLED, NODE_PREEMPTED, NODE_LOST] * WORKER_DEATHS:
        bench.die(bench.next()[0], reason)
    assert bench.study.trials()[0].state == "RUNNING"
    bench.die(bench.next()[0], WORKER_KILLED)
    assert bench.study.trials()[0].reason == (
        "worker died 10 times: 4 worker killed, 3 node preempted, 3 node lost; the last one: worker killed"
    )


def test_deaths_of_an_earlier_driver_count(bench: Bench) -> None:
    for _ in range(WORKER_DEATHS):
        bench.die(bench.next()[0], WORKER_KILLED)
    bench.start()
    trial_id, suggestion = bench.next()
    assert (suggestion.key, bench.attempt()) == ("tiny-0000", WORKER_DEATHS + 2)  # nobody knows whether that one ran
    bench.die(trial_id, WORKER_KILLED)
    assert bench.study.trials()[0].state == "FAILED"


def test_no_two_runs_of_a_trial_have_the_same_attempt(bench: Bench) -> None:
    """Also across drivers: the worker of a dead driver may still live when its successor starts another."""
    seen = []
    for _ in range(3):
        trial_id, _ = bench.next()
        seen.append(bench.attempt())
        bench.die(trial_id, NODE_LOST)
        bench.next()
        seen.append(bench.attempt())
        bench.start()
    assert seen == [1, 2, 3, 4, 5, 6]


def test_a_node_that_takes_eight_trials_with_it_ends_no_search(tmp_path: Path) -> None:
    bench = Bench(tmp_path, target=8, slots=8)
    running = [bench.next() for _ in range(8)]
    for trial_id, _ in running:
        bench.die(trial_id, NODE_LOST)
    assert (bench.searcher.stop_reason, bench.study.num_failed()) == (None, 0)
    drive(bench.searcher, succeed, 8)
    assert bench.study.num_done() == len(bench.study.trials()) == 8
    assert account(bench.study.record()) == "8 workers were lost (8 node lost), and 0 s with them"


def test_failures_by_nodes_are_no_row_of_identical_ones_and_those_by_workers_are(tmp_path: Path) -> None:
    for reason, ends in ((NODE_LOST, False), (WORKER_KILLED, True)):
        (tmp_path / reason).mkdir()
        bench = Bench(tmp_path / reason, target=40, slots=1)
        while bench.study.num_failed() < IDENTICAL_FAILURES:
            bench.die(bench.next()[0], reason)
        assert (bench.searcher.stop_reason is not None) == ends
        assert not ends or "failed for the same reason: worker died 4 times" in str(bench.searcher.stop_reason)


def test_a_dead_trainer_of_a_teacher_gives_back_its_lease(tmp_path: Path) -> None:
    bench = Bench(tmp_path, slots=3, teacher="one")
    trial_id, trainer = bench.next()
    assert bench.nothing_now()
    bench.die(trial_id, NODE_LOST)
    assert bench.teachers.forgotten == [("one", trainer.key)]
    assert bench.next()[1].key == trainer.key  # it goes on with its teacher
    assert bench.nothing_now()


def test_a_trial_that_stored_its_result_before_it_died_has_finished(bench: Bench) -> None:
    trial_id, suggestion = bench.next()
    bench.files.results[suggestion.key] = result(0.7, 0.3)
    bench.die(trial_id, NODE_LOST)
    assert bench.study.trials()[0].objectives == (0.7, 0.3)
    assert bench.deaths() == []


def test_waiting_paused_and_halted_trials_have_not_died(bench: Bench) -> None:
    bench.searcher.on_trial_complete(bench.next()[0], {"state": "WAITING", "teacher": "one"})
    trial_id, again = bench.next()
    assert (again.key, bench.attempt()) == ("tiny-0000", 1)
    bench.scheduler.is_halted = True
    bench.searcher.on_trial_complete(trial_id, {"state": "RUNNING", "phase": "student", "step": 1, "steps": 2})
    assert (bench.deaths(), bench.study.unfinished()) == ([], [0])


def test_who_dies_in_a_halted_search_is_in_the_account_and_stays_unfinished(bench: Bench) -> None:
    trial_id, _ = bench.next()
    bench.scheduler.is_halted = True
    bench.die(trial_id, NODE_LOST)
    assert (bench.deaths(), bench.study.unfinished()) == ([NODE_LOST], [0])


def test_a_trial_that_was_to_be_stopped_and_died_first_is_judged_again(bench: Bench) -> None:
    trial_id, suggestion = bench.next()
    bench.scheduler.stopped[suggestion.key] = "dominated"
    bench.die(trial_id, WORKER_KILLED)
    assert bench.study.trials()[0].state == "RUNNING"
    assert bench.scheduler.stopped == {}
    assert bench.next()[1].key == suggestion.key


def test_an_end_without_a_report_and_without_an_error_is_not_tried_again(bench: Bench) -> None:
    bench.searcher.on_trial_complete(bench.next()[0], {"done": True})
    assert bench.study.trials()[0].reason == "worker died: it ended without a report, and without an error"


def test_a_storage_that_was_away_is_as_a_death(bench: Bench) -> None:
    report = {"state": "INTERRUPTED", "reason": "storage away: /x: Stale file handle", "hostname": "host-c"}
    bench.searcher.on_trial_complete(bench.next()[0], report)
    (death,) = bench.study.trials()[0].deaths
    assert (death.reason, death.node) == ("storage away: /x: Stale file handle", "host-c")
    assert bench.next()[1].key == "tiny-0000"
    assert bench.attempt() == 2


# ---- The account ---------------------------------------------------------------------------------------------------


def test_what_was_lost_began_with_the_last_stored_state(bench: Bench) -> None:
    """Or with the attempt, where nothing was stored since; a state of the future is another machine's clock."""
    lost = []
    for stored in (None, 50.0, -20.0, 500.0):
        trial_id, suggestion = bench.next()
        if stored is not None:
            bench.files.stored[suggestion.key] = bench.now + stored
        bench.now += 80
        bench.die(trial_id, NODE_LOST)
        lost.append(bench.study.trials()[0].deaths[-1].lost_seconds)
    assert lost == [80, 30, 80, 0]
    trial_id, suggestion = bench.next()
    bench.complete(trial_id, suggestion)  # 3 s
    again = open_study(bench.study.config, bench.folder / "study.db")
    assert again.trials()[0].deaths == bench.study.trials()[0].deaths
    first = again.trials()[0].deaths[0]
    assert (first.reason, first.node, first.attempt) == (NODE_LOST, "host-a", 1)
    assert datetime.fromisoformat(first.at).timestamp() == 1_000_080
    assert accelerator_hours(again.trials(), ResourcesConfig(cpu=2)) == pytest.approx(2 * (190 + 3) / 3600)
    record = again.record()
    assert account(record) == "4 workers were lost (4 node lost), and 190 s with them"
    assert "4 workers were lost (4 node lost), and 190 s with them." in front_table(record).caption
    assert front_json(record)["trials"][0]["deaths"][0] == asdict(first)


def test_time_in_ray_s_queue_is_not_lost(tmp_path: Path) -> None:
    bench = Bench(tmp_path, resources={"gpu": 1})
    trial_id, suggestion = bench.next(starts=False)
    bench.now += 36_000
    bench.searcher.on_trial_start(trial_id)
    bench.now += 5
    bench.die(trial_id, NODE_LOST)
    trial_id, again = bench.next(starts=False)
    assert (again.key, bench.attempt()) == (suggestion.key, 2)
    bench.now += 36_000
    bench.die(trial_id, "worker failed: ImportError: no torch")  # it never began
    assert [death.lost_seconds for death in bench.study.trials()[0].deaths] == [5, 0]
    assert accelerator_hours(bench.study.trials(), ResourcesConfig(gpu=1)) == 5 / 3600


def test_nodes_that_are_lost_on_the_way_do_not_add_up(bench: Bench) -> None:
    """Spot nodes may go any number of times, as long as the trial comes further in between."""

    def preempted(*, stores: bool) -> None:
        trial_id, suggestion = bench.next()
        bench.now += 3600
        if stores:
            bench.files.stored[suggestion.key] = bench.now - 10
        bench.die(trial_id, NODE_PREEMPTED)

    for count in range(3 * OTHER_DEATHS):
        preempted(stores=count % OTHER_DEATHS == 5)
    bench.start()  # the next driver knows
    for _ in range(OTHER_DEATHS - 14):
        preempted(stores=False)
    assert bench.study.trials()[0].state == "RUNNING"
    preempted(stores=False)
    assert bench.study.trials()[0].state == "FAILED"
    assert sum(death.advanced for death in bench.study.trials()[0].deaths) == 3


def test_nothing_lost_is_not_worth_a_line(bench: Bench) -> None:
    drive(bench.searcher, succeed)
    assert account(bench.study.record()) == ""
    assert "lost" not in front_table(bench.study.record()).caption


def test_a_state_is_as_old_as_its_newest_file(tmp_path: Path) -> None:
    files = TrialFiles(tmp_path, "tiny")
    places = files.places("tiny-0000")
    assert files.stored_at("tiny-0000", "teacher") is None
    for path, at in ((places.state, 100), (places.verification / "rows.parquet", 300), (places.folder / "lock", 900)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (at, at))
    assert files.stored_at("tiny-0000", None) == 300
    state = Path(places.teachers) / "teacher" / "state.safetensors"
    state.parent.mkdir(parents=True)
    state.touch()
    os.utime(state, (400, 400))
    assert files.stored_at("tiny-0000", "teacher") == 400
    assert files.stored_at("tiny-0000", None) == 300


def test_a_resumed_verification_that_dies_is_tried_again_and_in_the_account(tmp_path: Path) -> None:
    bench = Bench(tmp_path, target=1, slots=1, limits={"hours": 1.0})
    trial_id, _ = bench.next()
    bench.die(trial_id, NODE_LOST)
    trial_id, _ = bench.next()
    bench.searcher.on_trial_complete(
        trial_id, {"state": "COMPLETE", "result": json.dumps(asdict(result(0.9, 0.5, certified_upper=0.7)))}
    )
    attempts = []
    for _ in range(WORKER_DEATHS + 1):
        trial_id, resumed = bench.next()
        assert (resumed.key, resumed.resume) == ("tiny-0000", True)
        attempts.append(bench.attempt())
        bench.die(trial_id, WORKER_KILLED)
    assert attempts == [3 - 1 + count for count in range(WORKER_DEATHS + 1)]
    assert bench.searcher.suggest("x") == StudySearcher.FINISHED  # it keeps its interval
    assert len(bench.log.keys("lost")) == WORKER_DEATHS + 1
    (kept,) = [event for event in bench.log.events if event[0] == "kept"]
    assert kept[2].startswith("worker died 5 times: 4 worker killed, 1 node lost")
    assert (bench.study.trials()[0].state, bench.study.trials()[0].certified_upper) == ("COMPLETE", 0.7)
    known = open_study(bench.study.config, tmp_path / "study.db").trials()[0].deaths
    assert [death.reason for death in known] == [NODE_LOST] + [WORKER_KILLED] * (WORKER_DEATHS + 1)


def test_deaths_are_counted_by_their_kind() -> None:
    def of(*reasons: str) -> list[Death]:
        return [Death(reason, "", "", number + 1, 1.0) for number, reason in enumerate(reasons)]

    assert exhausted(of(*[WORKER_KILLED] * 3)) is None
    assert exhausted(of(*[WORKER_KILLED] * 2, "worker failed: a", "worker failed: b")) is not None
    assert exhausted(of(*[OUT_OF_MEMORY] * 5, *[KILLED_FOR_MEMORY] * 5, *[WORKER_KILLED] * 3)) is None
    assert exhausted(of(*[NODE_LOST] * 10, *[STORAGE_AWAY] * 10)) is None
    assert exhausted(of(*[NODE_LOST] * 10, *[STORAGE_AWAY] * 11)) is not None
