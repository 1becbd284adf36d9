"""Why a worker ended, by what Ray says of it, and workers that leave their node.

No Ray runs: its exceptions are its own, and what its head would say of an actor or a node is scripted.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
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
from search_bench import Bench, a_report, databases_in_memory

from search.attempts import ray_deaths
from search.attempts.deaths import KILLED_FOR_MEMORY, NODE_LOST, NODE_PREEMPTED, WORKER_KILLED, Cause
from search.attempts.ray_deaths import WorkerLostError, cause_of, watched
from search.clusters.nodes import LOOK_S, Leaving
from search.scheduler import StudyScheduler

pytestmark = pytest.mark.timeout(30)  # the first test pays for importing Ray


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    databases_in_memory(monkeypatch)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


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


def test_a_head_that_does_not_answer_leaves_what_the_error_says(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_what_tune_says_of_dead_trials_is_left_out() -> None:
    logger, heard = logging.getLogger("ray.tune.tune"), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]

    def said() -> list[str]:
        heard.clear()
        logger.error("Trials did not complete: %s", ["tune7"])
        logger.error("Something else")
        return list(heard)

    logger.addHandler(handler)  # its own: once Ray is imported, nothing reaches the handlers of all loggers
    try:
        everything = said()
        assert len(everything) == 2
        with watched():
            assert said() == everything[1:] == ["Something else"]
        assert said() == everything
    finally:
        logger.removeHandler(handler)


# ---- Nodes that have notice ----------------------------------------------------------------------------------------


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

    def leave(trial: Any) -> None:
        raise RuntimeError("no head\n  at 10.0.0.1")

    scheduler._leave = leave
    assert scheduler.on_trial_result(None, tune_trial("b"), a_report(key)) == "CONTINUE"
    assert scheduler.error == "nodes that are drained are not known (RuntimeError: no head at 10.0.0.1)"
