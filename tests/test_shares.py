"""Trials that run out of memory: what they get more of, and who waits for whom."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from search_bench import Bench, databases_in_memory, memory_held
from studies import open_study, result

from ccdist.training import NonFiniteLossError
from search.attempts.deaths import KILLED_FOR_MEMORY, WORKER_DEATHS, account
from search.attempts.shares import Node, Share, Shares, memory_class
from search.clusters import cluster, nodes
from search.clusters.nodes import Roomiest
from search.config import ResourcesConfig
from search.scheduling.waiting import RETRY_S, TeacherQueue
from search.trials.endings import is_of_gpu, is_out_of_memory
from search.worker import Suggestion

pytestmark = pytest.mark.timeout(30)  # the first test pays for importing Ray


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    databases_in_memory(monkeypatch)


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
    assert account(bench.study.record()).endswith("; 1 trial failed of it, and what it had stored is lost, too")
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
    assert (again.key, bench.attempt(), again.share) == (waiting.key, 2, Share(1, 0, 1.8))
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
        assert (suggestion.key, bench.attempt(), suggestion.share) == ("tiny-0000", attempt + 1, Share(1, 0))
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
