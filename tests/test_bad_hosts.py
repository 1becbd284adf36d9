"""Hosts on which one attempt after the other dies."""

import json
from pathlib import Path
from typing import Any

import pytest
from ray.tune import PlacementGroupFactory
from search_bench import Bench, a_report, databases_in_memory

from search import execution
from search.attempts.bad_hosts import AVOID_S, BadHosts
from search.attempts.deaths import STORAGE_AWAY, WORKER_KILLED, Cause
from search.attempts.shares import Share
from search.clusters.nodes import ids_on
from search.config import ResourcesConfig
from search.searcher import StudySearcher
from search.worker import Suggestion

pytestmark = pytest.mark.timeout(30)  # the first test pays for importing Ray


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    databases_in_memory(monkeypatch)


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
    assert (again[1].key, again[1].avoid) == (waiting[1].key, ())
    bench.die(again[0], f"{STORAGE_AWAY}: /x", "bad")
    now[0] += 2 * AVOID_S - 1  # it was not, and has longer to get well
    assert bench.next()[1].avoid == ("id of bad",)


def test_all_that_end_by_one_event_are_one() -> None:
    """Eight workers of a host end at once: it is avoided for ten minutes, and after one more death for twenty."""
    now = [0.0]
    hosts = BadHosts(lambda: now[0])
    for _ in range(8):
        hosts.died(Cause(WORKER_KILLED, "bad"))
    now[0] = AVOID_S - 1
    assert hosts.avoided() == {"bad"}
    now[0] = AVOID_S
    assert hosts.avoided() == set()
    hosts.died(Cause(WORKER_KILLED, "bad"))
    now[0] += 2 * AVOID_S - 1
    assert hosts.avoided() == {"bad"}
    now[0] += 1
    assert hosts.avoided() == set()


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
