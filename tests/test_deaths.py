"""Attempts that end without a result: why, how often a trial may die, what was lost, and what it needs more of.

No Ray runs: its exceptions are its own, and what its head would say of an actor or a node is scripted. Real workers
and nodes die in test_kills.py and test_multinode.py.
"""

import json
import logging
import os
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optuna.storages import InMemoryStorage
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.core.generated.common_pb2 import ActorDeathCause, ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.tune import PlacementGroupFactory
from studies import config_of, open_study, result
from test_searcher import FakeFiles, FakeScheduler, FakeTeachers, Log, drive, no_teacher, succeed

from ccdist.training import NonFiniteLossError
from search import execution
from search.artifacts.trial_files import TrialFiles
from search.attempts import ray_deaths
from search.attempts.bad_hosts import AVOID_S
from search.attempts.deaths import (
    KILLED_FOR_MEMORY,
    NODE_LOST,
    NODE_PREEMPTED,
    OTHER_DEATHS,
    OUT_OF_MEMORY,
    STORAGE_AWAY,
    WORKER_DEATHS,
    WORKER_KILLED,
    Cause,
    account,
    exhausted,
)
from search.attempts.ray_deaths import WorkerLostError, cause_of, watched
from search.attempts.shares import Node, Share, Shares, memory_class
from search.clusters import cluster, nodes
from search.clusters.nodes import LOOK_S, Leaving, Roomiest, ids_on
from search.config import BudgetConfig, ResourcesConfig
from search.results.report import front_json, front_table
from search.scheduler import StudyScheduler
from search.scheduling.budget import Budget, accelerator_hours
from search.scheduling.waiting import RETRY_S, TeacherQueue
from search.searcher import IDENTICAL_FAILURES, StudySearcher
from search.studies.records import Death, RungValues
from search.study import Study
from search.suggestions.asking import Asker, Inline
from search.trials.endings import is_of_gpu, is_out_of_memory
from search.worker import Suggestion

pytestmark = pytest.mark.timeout(30)  # the first test pays for importing Ray


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database of each URL in memory, for the time of a test: opened again, it is the same one."""
    stores: dict[str, InMemoryStorage] = {}
    monkeypatch.setattr("search.study.open_storage", lambda url: stores.setdefault(url, InMemoryStorage()))


# ---- A search whose trials die -------------------------------------------------------------------------------------


NODE = Node(8.0, 4)


@dataclass
class Bench:
    """A study with its searcher, whose trials end as the test says. Nodes have 8 GiB for four trials each."""

    folder: Path
    resources: dict[str, Any] = field(default_factory=dict)
    target: int = 4
    slots: int = 2
    limits: dict[str, float] = field(default_factory=dict)
    log: Log = field(default_factory=Log)
    files: FakeFiles = field(default_factory=FakeFiles)
    scheduler: FakeScheduler = field(default_factory=FakeScheduler)
    teachers: FakeTeachers = field(default_factory=FakeTeachers)
    teacher: str | None = None
    now: float = 1_000_000.0
    number: int = 0
    node: Node | None = NODE

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Another driver takes over."""
        config = config_of(self.folder, resources=self.resources, budget__trials=self.target)
        self.study: Study = open_study(config, self.folder / "study.db")
        self.searcher = StudySearcher(
            self.study,
            Budget(BudgetConfig(trials=self.target, **self.limits), config.resources, self.study.trials),
            lambda: self.slots,
            self.files,
            self.log,
            self.scheduler,
            Asker(Inline(), ahead=False),
            TeacherQueue(lambda _: self.teacher, self.teachers)
            if self.teacher
            else TeacherQueue(no_teacher, self.teachers),
            node=lambda **_: self.node,
        )
        self.searcher._retries._clock = lambda: self.now

    def next(self, *, starts: bool = True) -> tuple[str, Suggestion]:
        """The next trial, which has to come at once; starts: it need not wait in Ray's queue."""
        self.number += 1
        config = self.searcher.suggest(f"tune{self.number}")
        assert isinstance(config, dict), config
        if starts:
            self.searcher.on_trial_start(f"tune{self.number}")
        return f"tune{self.number}", Suggestion.from_config(config)

    def fill(self) -> dict[str, Suggestion]:
        """As many trials as may run now beside those that do, by Tune's id."""
        started: dict[str, Suggestion] = {}
        while isinstance(config := self.searcher.suggest(f"tune{self.number + 1}"), dict):
            self.number += 1
            self.searcher.on_trial_start(f"tune{self.number}")
            started[f"tune{self.number}"] = Suggestion.from_config(config)
        return started

    def nothing_now(self) -> bool:
        return self.searcher.suggest("nobody") is None

    def die(self, trial_id: str, reason: str, node: str = "host-a") -> None:
        """As the scheduler and Tune tell it: first why, then that."""
        self.scheduler.causes[trial_id] = Cause(reason, node)
        self.searcher.on_trial_complete(trial_id, None, error=True)

    def lack(self, trial_id: str, *, on_gpu: bool) -> None:
        text = "out of memory: Tried to allocate 2 GiB"
        report = {"state": "OUT_OF_MEMORY", "reason": text, "on_gpu": on_gpu, "hostname": "host-b"}
        self.searcher.on_trial_complete(trial_id, report)

    def complete(self, trial_id: str, suggestion: Suggestion) -> None:
        self.searcher.on_trial_complete(trial_id, succeed(suggestion))

    def deaths(self, number: int = 0) -> list[str]:
        return [death.reason for death in self.study.trials()[number].deaths]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_trial_whose_worker_died_goes_on_under_its_key_as_another_attempt(bench: Bench) -> None:
    trial_id, first = bench.next()
    bench.die(trial_id, WORKER_KILLED)
    assert bench.study.trials()[0].state == "RUNNING"
    trial_id, again = bench.next()
    assert (again.key, again.params, again.recipe) == (first.key, first.params, first.recipe)
    assert (first.attempt, again.attempt) == (1, 2)
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
        assert (suggestion.key, suggestion.attempt) == ("tiny-0000", count + 1)
        bench.die(trial_id, reason)
    trial = bench.study.trials()[0]
    assert trial.state == "FAILED"
    kind = reason.partition(":")[0]
    assert trial.reason == f"worker died {allowed + 1} times: {allowed + 1} {kind}; the last one: {reason}"
    assert bench.files.ends == [("silent", "tiny-0000", trial.reason)]
    assert len(trial.deaths) == allowed + 1
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
    assert (suggestion.key, suggestion.attempt) == ("tiny-0000", WORKER_DEATHS + 2)  # nobody knows whether that one ran
    bench.die(trial_id, WORKER_KILLED)
    assert bench.study.trials()[0].state == "FAILED"


def test_no_two_runs_of_a_trial_have_the_same_attempt(bench: Bench) -> None:
    """Also across drivers: the worker of a dead driver may still live when its successor starts another."""
    seen = []
    for _ in range(3):
        trial_id, suggestion = bench.next()
        seen.append(suggestion.attempt)
        bench.die(trial_id, NODE_LOST)
        seen.append(bench.next()[1].attempt)
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
    assert account(bench.study.record()) == "8 workers were lost (8 node lost); 0 s of work was done again"


def test_failures_by_nodes_are_no_row_of_identical_ones_and_those_by_workers_are(tmp_path: Path) -> None:
    for reason, ends in ((NODE_LOST, False), (WORKER_KILLED, True)):
        bench = Bench(tmp_path / reason, target=40, slots=1) if (tmp_path / reason).mkdir() is None else None
        assert bench is not None
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
    assert (again.key, again.attempt) == ("tiny-0000", 1)
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
    assert bench.next()[1].attempt == 2


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
    assert account(record) == "4 workers were lost (4 node lost); 190 s of work was done again"
    assert "4 workers were lost (4 node lost); 190 s of work was done again." in front_table(record).caption
    assert front_json(record)["trials"][0]["deaths"][0] == asdict(first)


def test_time_in_ray_s_queue_is_not_lost(tmp_path: Path) -> None:
    bench = Bench(tmp_path, resources={"gpu": 1})
    trial_id, suggestion = bench.next(starts=False)
    bench.now += 36_000
    bench.searcher.on_trial_start(trial_id)
    bench.now += 5
    bench.die(trial_id, NODE_LOST)
    trial_id, again = bench.next(starts=False)
    assert (again.key, again.attempt) == (suggestion.key, 2)
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


# ---- Bad hosts -----------------------------------------------------------------------------------------------------


def test_a_host_where_one_attempt_after_the_other_dies_is_avoided_for_a_while(tmp_path: Path) -> None:
    bench, now = Bench(tmp_path, slots=4, target=8), [0.0]
    bench.searcher._hosts._clock = lambda: now[0]
    bench.searcher._node_ids = lambda hosts, share: tuple(f"id of {host}" for host in sorted(hosts))
    running = [bench.next() for _ in range(4)]
    for trial_id, _ in running[:2]:
        bench.die(trial_id, f"{STORAGE_AWAY}: /x", "bad")
    again = bench.next()
    bench.searcher.on_trial_result(again[0], a_report(again[1].key) | {"hostname": "bad"})  # one comes further there
    for trial_id, _ in (running[2], running[3]):
        bench.die(trial_id, f"{STORAGE_AWAY}: /x", "bad")
    assert bench.next()[1].avoid == ()
    bench.die(again[0], "worker failed: ImportError: x", "bad")
    waiting, started = bench.next(starts=False), bench.next()
    assert waiting[1].avoid == started[1].avoid == ("id of bad",)
    assert Suggestion.from_config(waiting[1].to_config()) == waiting[1]
    bench.next()
    assert bench.nothing_now()
    assert bench.scheduler.taken_back == set()
    now[0] = AVOID_S
    assert bench.nothing_now()
    assert bench.scheduler.taken_back == {waiting[0]}  # the host may be well again
    bench.searcher.on_trial_complete(waiting[0])
    again = bench.next()
    assert (again[1].key, again[1].attempt, again[1].avoid) == (waiting[1].key, waiting[1].attempt, ())
    bench.die(again[0], f"{STORAGE_AWAY}: /x", "bad")
    now[0] += 2 * AVOID_S - 1  # it was not, and has longer to get well
    assert bench.next()[1].avoid == ("id of bad",)


def test_one_bad_node_ends_no_search(tmp_path: Path) -> None:
    """Four places where trials take 180 minutes, and four of a node where each dies after one."""
    bench, now = Bench(tmp_path, slots=8, target=40), 0.0
    bench.searcher._hosts._clock = lambda: 60 * now
    bench.searcher._node_ids = lambda hosts, share: tuple(hosts)
    free, queue, events = {"good": 4, "bad": 4}, [], []

    def place() -> None:
        for trial_id, suggestion in list(queue):
            where = next((node for node in ("bad", "good") if free[node] and node not in suggestion.avoid), None)
            if where is not None:
                queue.remove((trial_id, suggestion))
                free[where] -= 1
                bench.searcher.on_trial_start(trial_id)
                events.append((now + (180 if where == "good" else 1), trial_id, where, suggestion))

    while (config := bench.searcher.suggest(f"tune{bench.number}")) != StudySearcher.FINISHED:
        if isinstance(config, dict):
            queue.append((f"tune{bench.number}", Suggestion.from_config(config)))
            bench.number += 1
            place()
            continue
        for trial_id, suggestion in [each for each in queue if each[0] in bench.scheduler.taken_back]:
            queue.remove((trial_id, suggestion))
            bench.searcher.on_trial_complete(trial_id)
        if bench.scheduler.taken_back:
            bench.scheduler.taken_back.clear()
            continue
        events.sort(key=lambda event: event[:2])
        now, trial_id, where, suggestion = events.pop(0)
        free[where] += 1
        if where == "good":
            bench.complete(trial_id, suggestion)
        else:
            away = {"state": "INTERRUPTED", "reason": "storage away: /x", "hostname": "bad"}
            bench.searcher.on_trial_complete(trial_id, away)
        place()
    assert (bench.searcher.stop_reason, bench.study.num_done(), bench.study.num_failed()) == (None, 40, 0)
    assert now == pytest.approx(40 / 4 * 180, abs=30)
    assert sum(len(trial.deaths) for trial in bench.study.trials()) < 40


def test_no_host_is_avoided_that_nothing_can_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(name: str, cpus: float, *, alive: bool = True) -> dict[str, Any]:
        return {"Alive": alive, "NodeID": f"id-{name}", "NodeManagerHostname": name, "Resources": {"CPU": cpus}}

    found = [node("a", 4), node("b", 2), node("c", 8, alive=False)]
    monkeypatch.setattr("search.clusters.nodes.ray.nodes", lambda: found)
    resources = ResourcesConfig(cpu=2)
    assert ids_on(resources, {"a"}, Share(2, 0)) == ("id-a",)
    assert ids_on(resources, {"a"}, Share(4, 0)) == ()
    assert ids_on(resources, {"a", "b"}, Share(2, 0)) == ()
    held = execution._held(resources, {"trial": json.dumps({"share": None, "avoid": ["id-a", "id-b"]})})
    selector = {"ray.io/node-id": "!in(id-a,id-b)"}
    assert held == PlacementGroupFactory([{"CPU": 2, "GPU": 0}], bundle_label_selector=[selector])


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
        attempts.append(resumed.attempt)
        bench.die(trial_id, WORKER_KILLED)
    assert attempts == [3 - 1 + count for count in range(WORKER_DEATHS + 1)]
    assert bench.searcher.suggest("x") == StudySearcher.FINISHED  # it keeps its interval
    assert len(bench.log.keys("lost")) == WORKER_DEATHS + 1
    (kept,) = [event for event in bench.log.events if event[0] == "kept"]
    assert kept[2].startswith("worker died 5 times: 4 worker killed, 1 node lost")
    assert (bench.study.trials()[0].state, bench.study.trials()[0].certified_upper) == ("COMPLETE", 0.7)
    known = open_study(bench.study.config, tmp_path / "study.db").trials()[0].deaths
    assert [death.reason for death in known] == [NODE_LOST] + [WORKER_KILLED] * (WORKER_DEATHS + 1)


# ---- Memory --------------------------------------------------------------------------------------------------------


def test_a_gpu_that_is_too_small_doubles_the_share_up_to_a_whole_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path, resources={"gpu": 0.25}, slots=4)
    held = []
    for _ in range(3):
        trial_id, suggestion = bench.next()
        assert (suggestion.key, suggestion.share is not None) == ("tiny-0000", True)
        held.append(suggestion.share)
        bench.lack(trial_id, on_gpu=True)
    assert [share.gpu for share in held if share] == [0.25, 0.5, 1.0]
    trial = bench.study.trials()[0]
    assert trial.state == "FAILED"
    assert trial.reason == "out of memory: Tried to allocate 2 GiB; it had a whole GPU"
    assert trial.accelerators == 1.0
    assert bench.deaths() == ["out of memory: Tried to allocate 2 GiB"] * 3
    assert trial.deaths[0].node == "host-b"


def test_a_share_is_raised_once_for_all_that_ran_with_the_old_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path, resources={"gpu": 0.25}, slots=4, target=8)
    running = {}
    for _ in range(4):
        trial_id, suggestion = bench.next()
        running.setdefault(memory_class(suggestion.recipe), []).append(trial_id)
    pair = next(ids for ids in running.values() if len(ids) > 1)
    for trial_id in pair[:2]:
        bench.lack(trial_id, on_gpu=True)
    assert list(bench.study.shares.values()) == [{"gpu": 0.5}]


def test_what_was_learned_outlives_the_driver_and_is_of_one_class_only(tmp_path: Path) -> None:
    bench = Bench(tmp_path, resources={"gpu": 0.25}, slots=8, target=8)
    trial_id, lacking = bench.next()
    bench.lack(trial_id, on_gpu=True)
    bench.start()
    shares: dict[str, set[float]] = {}
    for _ in range(4):
        _, suggestion = bench.next()
        assert suggestion.share is not None
        shares.setdefault(memory_class(suggestion.recipe), set()).add(suggestion.share.gpu)
    mine = memory_class(lacking.recipe)
    assert shares.pop(mine) == {0.5}
    assert list(shares.values()) == [{0.25}]  # the other one: with a teacher, or without


def test_a_larger_trial_waits_for_its_room_and_nobody_takes_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path, resources={"gpu": 0.25}, slots=4, target=12)
    running = [bench.next() for _ in range(4)]
    small = [each for each in running if memory_class(each[1].recipe) != memory_class(running[0][1].recipe)]
    assert small
    bench.lack(running[0][0], on_gpu=True)
    assert bench.nothing_now()  # one place is free, it needs two
    bench.complete(*running[1])
    _, again = bench.next()
    assert (again.key, again.share and again.share.gpu) == (running[0][1].key, 0.5)
    assert bench.nothing_now()


def test_a_host_without_memory_reserves_some(tmp_path: Path) -> None:
    """A quarter of the node was each trial's; half of it is, then nearly all, then there is no more."""
    bench = Bench(tmp_path, slots=4)
    held = []
    for reason in (KILLED_FOR_MEMORY, KILLED_FOR_MEMORY):
        trial_id, suggestion = bench.next()
        held.append(suggestion.share and suggestion.share.memory_gb)
        bench.die(trial_id, reason)
    trial_id, suggestion = bench.next()
    held.append(suggestion.share and suggestion.share.memory_gb)
    bench.lack(trial_id, on_gpu=False)
    assert held == [None, 4.0, 7.2]
    had = "it had nearly all the memory of a node"
    assert bench.study.trials()[0].reason == f"out of memory: Tried to allocate 2 GiB; {had}"


def memory_held(bench: Bench) -> float | None:
    """What the next trial reserves."""
    share = bench.next()[1].share
    assert share is not None
    return share.memory_gb


def test_what_was_learned_asks_for_no_more_than_a_node_has_now(tmp_path: Path) -> None:
    """Ray counts a node's memory anew at each start, and the largest node may be gone: Ray would wait for ever."""
    bench = Bench(tmp_path, slots=4)
    for _ in range(2):
        bench.die(bench.next()[0], KILLED_FOR_MEMORY)
    for node, memory in ((Node(8.0, 4), 7.2), (Node(7.5, 4), 6.75), (Node(2.0, 1), 1.8), (None, None)):
        bench.node = node
        bench.start()
        assert memory_held(bench) == pytest.approx(memory)
    assert [share["memory_gb"] for share in bench.study.shares.values()] == [7.2]  # for when such a node is back
    bench.resources, bench.node = {"memory_gb": 3}, Node(2.0, 0)
    bench.start()
    assert memory_held(bench) == 3  # as the space file has it, on a cluster that may start larger nodes


def test_the_largest_node_is_looked_for_anew_before_a_larger_share_is_used(tmp_path: Path) -> None:
    bench = Bench(tmp_path, slots=4)
    bench.die(bench.next()[0], KILLED_FOR_MEMORY)
    bench.searcher._retries._shares._node = lambda *, anew=False: Node(2.0, 4) if anew else Node(8.0, 4)
    assert memory_held(bench) == pytest.approx(1.8)


def test_what_waits_for_a_node_that_is_gone_is_suggested_anew(tmp_path: Path) -> None:
    bench = Bench(tmp_path, slots=40)
    bench.die(bench.next()[0], KILLED_FOR_MEMORY)
    trial_id, waiting = bench.next(starts=False)
    assert waiting.share == Share(1, 0, 4.0)
    for node in (Node(4.0, 4), None):  # it still fits; it may fit the next one
        bench.node = node
        bench.fill()
        assert bench.scheduler.taken_back == set()
    bench.node = Node(2.0, 4)
    bench.fill()
    assert bench.scheduler.taken_back == {trial_id}
    bench.searcher.on_trial_complete(trial_id, None)
    _, again = bench.next()
    assert (again.key, again.attempt, again.share) == (waiting.key, waiting.attempt, Share(1, 0, 1.8))
    bench.scheduler.taken_back.clear()
    bench.node = Node(1.0, 4)
    bench.fill()
    assert bench.scheduler.taken_back == set()  # it runs


@pytest.mark.parametrize(
    ("before", "after", "on_gpu", "expected"),
    [
        ({"cpu": 8, "gpu": 0.5, "memory_gb": 2}, {"cpu": 1, "gpu": 0.25, "memory_gb": 1}, False, Share(1, 0.25, 4.0)),
        ({"cpu": 8, "gpu": 0.25, "memory_gb": 2}, {"cpu": 1, "gpu": 0.2, "memory_gb": 1}, True, Share(1, 0.5, 1.0)),
        ({"gpu": 0.25}, {"gpu": 1}, True, Share(1, 1.0)),
        ({"gpu": 0.25}, {"gpu": 0}, True, Share(1, 0.0)),  # learned with GPUs, used without
        ({"memory_gb": 1}, {"memory_gb": 5}, False, Share(1, 0.0, 5.0)),
    ],
)
def test_only_what_ran_out_was_learned_and_the_rest_is_as_the_command_says(
    before: dict[str, Any], after: dict[str, Any], on_gpu: bool, expected: Share, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, resources=before, slots=4)
    bench.lack(bench.next()[0], on_gpu=on_gpu)
    bench.resources = after
    bench.start()
    assert bench.next()[1].share == expected


def test_without_a_node_that_is_known_a_lack_of_memory_is_a_death_like_others(tmp_path: Path) -> None:
    bench = Bench(tmp_path, slots=4, node=None)
    for attempt in range(WORKER_DEATHS + 1):
        assert bench.study.num_failed() == 0
        trial_id, suggestion = bench.next()
        assert (suggestion.key, suggestion.attempt, suggestion.share) == ("tiny-0000", attempt + 1, Share(1, 0))
        bench.die(trial_id, KILLED_FOR_MEMORY)
    count = WORKER_DEATHS + 1
    assert bench.study.trials()[0].reason == (
        f"worker died {count} times: {count} worker out of memory; the last one: worker out of memory"
    )
    bench.node = Node(8.0, 4)
    bench.die(bench.next()[0], KILLED_FOR_MEMORY)
    assert memory_held(bench) == 4.0


def test_the_largest_node_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(name: str, memory: int, cpus: float = 2.0, *, alive: bool = True) -> dict[str, Any]:
        return {"NodeID": name, "Alive": alive, "Resources": {"memory": memory * 2.0**30, "CPU": cpus}}

    there = [node("a", 4), node("b", 16), node("c", 32, alive=False), node("d", 64, cpus=0.0), node("e", 8)]
    gone: set[str] = set()
    monkeypatch.setattr(nodes.ray, "nodes", lambda: list(there))
    monkeypatch.setattr(nodes, "is_gone", lambda each: each["NodeID"] in gone)
    roomiest = Roomiest(ResourcesConfig())
    assert roomiest() == Node(16.0, 2)
    gone.add("b")  # Ray takes half a minute to say so
    assert roomiest() == Node(16.0, 2)  # looked at a moment ago
    assert roomiest(anew=True) == Node(8.0, 2)
    monkeypatch.setattr(nodes.ray, "nodes", lambda: 1 / 0)
    assert roomiest(anew=True) == Node(8.0, 2)  # the head is away for a moment
    monkeypatch.setattr(nodes.ray, "nodes", list)
    assert roomiest(anew=True) is None


@pytest.mark.parametrize(
    ("resources", "node", "share", "places"),
    [
        ({"gpu": 0.4}, Node(8.0, 4), Share(1, 0.4), 1),
        ({"gpu": 0.4}, Node(8.0, 4), Share(1, 0.8), 2),
        ({"gpu": 0.4}, Node(8.0, 4), Share(1, 1.0), 2),
        ({"gpu": 0.3}, None, Share(1, 0.6), 3),
        ({"gpu": 0.1}, Node(8.0, 4), Share(1, 1.0), 4),  # its cores let four run there
        ({}, Node(8.0, 4), Share(1, 0.0, 4.0), 2),
        ({}, Node(8.0, 4), Share(1, 0.0, 7.2), 4),
        ({}, Node(8.0, 3), Share(1, 0.0, 16 / 3), 3),  # one at a time
        ({"memory_gb": 1}, Node(8.0, 4), Share(1, 0.0, 2.0), 1),  # its cores let four run, and so does this
        ({"memory_gb": 1}, None, Share(1, 0.0, 2.0), 1),
    ],
)
def test_room_is_counted_as_trials_pack(
    resources: dict[str, Any], node: Node | None, share: Share, places: float
) -> None:
    shares = Shares(ResourcesConfig(**resources), {}, lambda **_: node, lambda _: None)
    assert shares.places(share) == places


def test_as_many_large_trials_run_as_there_are_gpus(tmp_path: Path) -> None:
    bench = Bench(tmp_path, resources={"gpu": 0.4}, slots=4, target=12)
    while len(bench.study.shares) < 2 or min(share["gpu"] for share in bench.study.shares.values()) < 1:
        trial_id, suggestion = bench.next()
        if suggestion.share is not None and suggestion.share.gpu < 1:
            bench.lack(trial_id, on_gpu=True)
        else:
            bench.complete(trial_id, suggestion)
    assert [suggestion.share for suggestion in bench.fill().values()] == [Share(1, 1.0)] * 2


def test_no_room_is_kept_for_a_large_trial_whose_teacher_is_trained_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the teacher is there: then nothing smaller starts before it."""
    monkeypatch.setattr("search.attempts.shares.memory_class", repr)  # each trial is its own
    bench = Bench(tmp_path, resources={"gpu": 0.25}, target=40, slots=4)
    now = [0.0]
    queue = TeacherQueue(lambda each: None if each.number else "T", bench.teachers, lambda: now[0])
    bench.searcher._teachers = queue
    for _ in range(2):
        bench.lack(bench.next()[0], on_gpu=True)
    trial_id, large = bench.next()
    assert (large.key, large.share) == ("tiny-0000", Share(1, 1.0))
    bench.teachers.holders["T"] = "another search"
    bench.searcher.on_trial_complete(trial_id, {"state": "WAITING", "teacher": "T"})
    running: dict[str, Suggestion] = {}
    for _ in range(4):
        running.update(bench.fill())
        assert len(running) == 4
        now[0] += 2 * RETRY_S  # the other search is asked again
        first = next(iter(running))
        bench.complete(first, running.pop(first))
    bench.teachers.holders.clear()
    now[0] += 2 * RETRY_S
    while running:
        assert bench.fill() == {}
        first = next(iter(running))
        bench.complete(first, running.pop(first))
    assert [each.key for each in bench.fill().values()] == [large.key]


def test_a_verification_that_goes_on_with_more_counts_with_more(tmp_path: Path) -> None:
    bench = Bench(tmp_path, resources={"gpu": 0.25}, target=1, slots=4, limits={"hours": 1.0})
    trial_id, _ = bench.next()
    open_ended = asdict(result(0.9, 0.5, certified_upper=0.7))
    bench.searcher.on_trial_complete(trial_id, {"state": "COMPLETE", "result": json.dumps(open_ended)})
    trial_id, resumed = bench.next()
    assert (resumed.resume, resumed.share) == (True, Share(1, 0.25))
    bench.lack(trial_id, on_gpu=True)
    assert bench.next()[1].share == Share(1, 0.5)
    for study in (bench.study, open_study(bench.study.config, tmp_path / "study.db")):
        trial = study.trials()[0]
        assert (trial.state, trial.accelerators) == ("COMPLETE", 0.5)


def test_memory_that_is_asked_for_is_doubled_from_there() -> None:
    shares = Shares(ResourcesConfig(memory_gb=3, gpu=0.5), {}, lambda **_: Node(8.0, 2), lambda _: None)
    recipe: Any = SimpleNamespace(
        needs_teacher=False,
        verification=SimpleNamespace(batch_size=4),
        student=SimpleNamespace(
            batch_size=8,
            network=SimpleNamespace(name="mlp", width=3),
            precision=SimpleNamespace(model_dump=lambda mode: {"tf32": False}),
        ),
    )
    steps = [shares.of(recipe)]
    while (larger := shares.raise_for(recipe, steps[-1], on_gpu=False)) is not None:
        steps.append(larger)
    assert steps == [Share(1, 0.5, 3.0), Share(1, 0.5, 6.0), Share(1, 0.5, 7.2)]
    assert [shares.places(share) for share in steps] == [1, 2, 2]
    assert steps[1].bundle({"vram_gb": 4}) == {"CPU": 1, "GPU": 0.5, "vram_gb": 4, "memory": 6 * 2**30}


@pytest.mark.parametrize(
    ("node", "fits"),
    [
        ({"CPU": 8, "memory": 2**34, "vram_gb": 80}, 4),
        ({"CPU": 8, "memory": 2**33, "vram_gb": 80}, 2),
        ({"CPU": 8, "memory": 2**34, "vram_gb": 40}, 3),
        ({"CPU": 1, "memory": 2**34, "vram_gb": 80}, 1),
        ({"CPU": 8, "vram_gb": 80}, 0),
        ({"CPU": 8, "memory": 2**34}, 0),
    ],
)
def test_memory_and_custom_resources_limit_how_many_fit(node: dict[str, float], fits: int) -> None:
    assert cluster.fits(node, ResourcesConfig(memory_gb=4, custom={"vram_gb": 12.5})) == fits


def test_a_refusal_names_memory_and_custom_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"Alive": True, "Resources": {"CPU": 4.0, "memory": 2.0**33}}
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [node])
    resources = ResourcesConfig(memory_gb=12, custom={"vram_gb": 10})
    with pytest.raises(cluster.ResourcesError) as refused:
        cluster._slots(resources)
    assert str(refused.value).startswith(
        "a trial asks for 1 CPUs, 0 GPUs, 12 GiB of memory and 10 vram_gb, but no node has as many: the largest has "
        "4 CPUs, 0 GPUs, 8 GiB of memory and 0 vram_gb; lower resources.cpu or resources.gpu or resources.memory_gb or "
        "resources.custom (--set resources.gpu=0)"
    )


@pytest.mark.parametrize(
    ("error", "lacks", "of_gpu"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True, True),
        (MemoryError(), True, False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True, False),
        (NonFiniteLossError("out of memory of what is finite"), False, False),
        (ValueError("no"), False, False),
        (KeyboardInterrupt("out of memory"), False, False),
    ],
)
def test_which_errors_more_memory_would_help(error: BaseException, lacks: bool, of_gpu: bool) -> None:
    assert is_out_of_memory(error) == lacks
    assert (is_out_of_memory(error) and is_of_gpu(error)) == of_gpu


# ---- What Ray says -------------------------------------------------------------------------------------------------

ACTOR = "e33e94081bebad2dc4325daa01000000"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the head says of the actor and of its node."""
    known = SimpleNamespace(cause=None, node={"NodeManagerHostname": "host-a"}, gone=False, asked=[])
    monkeypatch.setattr(ray_deaths, "node_of", lambda actor: known.asked.append(actor) or known.node)
    monkeypatch.setattr(ray_deaths, "is_gone", lambda node: known.gone)
    table = SimpleNamespace(actor_table=lambda actor: {"DeathCause": known.cause})
    monkeypatch.setattr(ray_deaths, "cluster_state", table)
    return known


def context(**fields: Any) -> ActorDiedErrorContext:
    return ActorDiedErrorContext(actor_id=bytes.fromhex(ACTOR), **fields)


def died(**fields: Any) -> ActorDiedError:
    return ActorDiedError(context(**fields))


def task_error(cause: BaseException) -> RayTaskError:
    return RayTaskError("train", f"Traceback (most recent call last):\n{type(cause).__name__}: {cause}", cause)


PREEMPTED = NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)


@pytest.mark.parametrize(
    ("error", "why", "gone", "reason"),
    [
        (died(error_message="its worker process has died"), "WORKER_DIED", False, WORKER_KILLED),
        (died(error_message="The actor died because its node has died."), None, False, NODE_LOST),
        (died(error_message="x"), "NODE_DIED", False, NODE_LOST),
        (died(error_message="x", node_death_info=PREEMPTED), "NODE_DIED", False, NODE_PREEMPTED),
        (died(error_message="it was killed by `ray.kill`."), "RAY_KILL", False, NODE_PREEMPTED),
        (died(error_message="x"), "RAY_KILL", True, NODE_PREEMPTED),  # its node went right after it
        (ActorUnavailableError("RpcError: Socket closed", None), None, True, NODE_LOST),
        (ActorUnavailableError("RpcError: Socket closed", None), None, False, WORKER_KILLED),
        (NodeDiedError("gone"), None, False, NODE_LOST),
        (WorkerCrashedError(), None, False, WORKER_KILLED),
        (OutOfMemoryError("1 worker(s) were killed"), None, False, KILLED_FOR_MEMORY),
        (task_error(NodeDiedError("gone")), None, False, NODE_LOST),
        (task_error(KeyError("a\nb")), None, False, "worker failed: KeyError: 'a\\nb'"),
        (
            ActorDiedError(task_error(ImportError("no torch here"))),
            None,
            False,
            "worker failed: ImportError: no torch here",
        ),
    ],
)
def test_why_a_worker_ended(error: Exception, why: str | None, gone: bool, reason: str, told: SimpleNamespace) -> None:
    told.gone = gone
    if why is not None:
        inner = context(reason=ActorDiedErrorContext.Reason.Value(why))
        told.cause = ActorDeathCause(actor_died_error_context=inner)
    assert cause_of(error, ACTOR) == Cause(reason, "host-a")


def test_a_head_that_does_not_answer_leaves_what_the_error_says(
    told: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(actor: str) -> None:
        raise ConnectionError("no head")

    monkeypatch.setattr(ray_deaths, "node_of", away)
    assert cause_of(died(error_message="its node has died"), ACTOR) == Cause(NODE_LOST)


def test_every_error_of_a_worker_reaches_the_scheduler_and_none_ends_tune(
    told: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, bench: Bench
) -> None:
    """Tune itself raises at those that it does not know, and would end the whole search."""
    heard: list[Exception] = []
    trial = SimpleNamespace(trial_id="tune7")
    manager = object.__new__(RayActorManager)
    tracked = SimpleNamespace(actor_id=1, _on_error=None)
    actor = SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: ACTOR))
    manager._live_actors_to_ray_actors_resources = _ByIdentity(tracked, (actor, None))
    manager._failed_actor_ids = set()
    monkeypatch.setattr(manager, "_cleanup_actor", lambda tracked_actor: None, raising=False)
    before = RayActorManager._actor_task_failed
    with watched() as errors:
        scheduler = StudyScheduler(bench.study, cause=errors.cause)

        def on_error(actor: Any, error: Exception) -> None:
            heard.append(error)
            scheduler.on_trial_error(None, trial)

        task = SimpleNamespace(_tracked_actor=tracked, _on_error=on_error)
        manager._actor_task_failed(tracked_actor_task=task, exception=OutOfMemoryError("full"))
        assert scheduler.causes == {"tune7": Cause(KILLED_FOR_MEMORY, "host-a")}
        assert told.asked == [ACTOR]
        assert isinstance(heard[0], WorkerLostError)
        scheduler.causes.clear()
        scheduler.on_trial_error(None, trial)  # no worker's error: Tune's own
        assert scheduler.causes == {}
    assert RayActorManager._actor_task_failed is before
    with pytest.raises(RuntimeError, match="unexpected exception"):  # else the wrapping can go
        manager._actor_task_failed(tracked_actor_task=task, exception=OutOfMemoryError("full"))


@dataclass
class _ByIdentity:
    """A mapping of one key that cannot be hashed."""

    key: Any
    value: Any

    def get(self, key: Any) -> Any:
        return self.value if key is self.key else None


def test_what_tune_says_of_dead_trials_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("ray.tune.tune")
    with watched():
        logger.error("Trials did not complete: %s", ["tune7"])
        logger.error("Something else")
    assert [record.getMessage() for record in caplog.records if record.name == logger.name] in (["Something else"], [])
    assert not any("did not complete" in record.getMessage() for record in caplog.records)


# ---- Nodes that have notice ----------------------------------------------------------------------------------------


def a_report(key: str, state: str = "RUNNING") -> dict[str, Any]:
    values = {"rung": "1/9", "values": json.dumps(asdict(RungValues(0.5, 0.1, 1.0)))} if state == "RUNG" else {}
    return {"key": key, "state": state, "phase": "student", "step": 1, "steps": 2} | values


def test_workers_leave_nodes_that_have_notice_at_their_next_report(bench: Bench) -> None:
    now, draining, ended = [0.0], ["node-b"], []
    where = {"a": "node-a", "b": "node-b"}

    def tune_trial(name: str) -> Any:
        actor = SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: name))
        return SimpleNamespace(trial_id=name, temporary_state=SimpleNamespace(ray_actor=actor))

    leaving = Leaving(
        lambda: list(draining),
        lambda actor: {"NodeID": where[actor]},
        lambda actor: ended.append(actor._actor_id.hex()),
        lambda: now[0],
    )
    scheduler = StudyScheduler(bench.study, leave=leaving)
    key = bench.next()[1].key
    for name in ("a", "b"):
        assert scheduler.on_trial_result(None, tune_trial(name), a_report(key)) == "CONTINUE"
    assert ended == ["b"]
    for state in ("COMPLETE", "WAITING", "FAILED"):  # those end by themselves
        scheduler.on_trial_result(None, tune_trial("b"), {"key": key, "state": state})
    scheduler.on_trial_result(None, tune_trial("b"), a_report(key) | {"done": True})
    assert ended == ["b"]
    draining[:] = []
    scheduler.on_trial_result(None, tune_trial("b"), a_report(key, "RUNG"))
    assert ended == ["b", "b"]  # known since a moment ago
    now[0] = LOOK_S
    scheduler.on_trial_result(None, tune_trial("b"), a_report(key))
    assert ended == ["b", "b"]
    scheduler._leave = lambda trial: 1 / 0
    assert scheduler.on_trial_result(None, tune_trial("b"), a_report(key)) == "CONTINUE"
    assert scheduler.error == "nodes that are drained are not known (ZeroDivisionError: division by zero)"


def test_deaths_are_counted_by_their_kind() -> None:
    def of(*reasons: str) -> list[Death]:
        return [Death(reason, "", "", number + 1, 1.0) for number, reason in enumerate(reasons)]

    assert exhausted(of(*[WORKER_KILLED] * 3)) is None
    assert exhausted(of(*[WORKER_KILLED] * 2, "worker failed: a", "worker failed: b")) is not None
    assert exhausted(of(*[OUT_OF_MEMORY] * 5, *[KILLED_FOR_MEMORY] * 5, *[WORKER_KILLED] * 3)) is None
    assert exhausted(of(*[NODE_LOST] * 10, *[STORAGE_AWAY] * 10)) is None
    assert exhausted(of(*[NODE_LOST] * 10, *[STORAGE_AWAY] * 11)) is not None
