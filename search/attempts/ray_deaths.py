"""Why Ray says that a worker ended: read from its exceptions while Tune handles them.

Tune tells neither its scheduler nor its searcher which exception ended a trial, keeps some kinds of it as text only,
and gives up the whole run at those that it does not know, such as Ray's for a worker that was ended for its node's
want of memory [ray 2.60]. So its two handlers of failed actors are wrapped for the time of a search.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from ray._private.state import state as cluster_state
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.core.generated.common_pb2 import ActorDiedErrorContext as Context
from ray.exceptions import (
    ActorDiedError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
)

from search.attempts.deaths import (
    KILLED_FOR_MEMORY,
    NODE_LOST,
    NODE_PREEMPTED,
    WORKER_FAILED,
    WORKER_KILLED,
    Cause,
)
from search.clusters.nodes import is_gone, node_of

_HANDLERS = ("_actor_task_failed", "_actor_start_failed")
_OF_NODES = (NodeDiedError, LocalRayletDiedError, ObjectLostError, RaySystemError)
# What Tune tells of trials that died: the search has its own words for each.
_REPEATED = ("Trial task failed for trial", "Trials did not complete")


class WorkerLostError(RayActorError):  # type: ignore[misc]
    """An end of a worker that Tune does not know, as one that it does."""


class Errors:
    """The error that Tune handles at the moment."""

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._actor_id: str | None = None

    def cause(self) -> Cause | None:
        """What it says of the worker; None: Tune handles none."""
        return None if self._error is None else cause_of(self._error, self._actor_id)

    @contextmanager
    def handling(self, error: BaseException, actor_id: str | None) -> Iterator[None]:
        self._error, self._actor_id = error, actor_id
        try:
            yield
        finally:
            self._error = None


@contextmanager
def watched() -> Iterator[Errors]:
    """Every death of a worker reaches the scheduler in this context, where `Errors.cause` says why."""
    errors = Errors()
    with ExitStack() as stack:
        for name in _HANDLERS:
            stack.enter_context(patch.object(RayActorManager, name, _watched(getattr(RayActorManager, name), errors)))
        for name in ("ray.tune.execution.tune_controller", "ray.tune.tune"):
            logger = logging.getLogger(name)
            logger.addFilter(_is_news)
            stack.callback(logger.removeFilter, _is_news)
        yield errors


def _watched(handler: Callable[..., None], errors: Errors) -> Callable[..., None]:
    signature = inspect.signature(handler)

    def handle(*arguments: Any, **named: Any) -> None:
        manager, ended, exception = signature.bind(*arguments, **named).args
        tracked = getattr(ended, "_tracked_actor", ended)
        with errors.handling(exception, _actor_id(manager, tracked)):
            handler(manager, ended, _known_to_tune(exception))

    return handle


def _actor_id(manager: Any, tracked: Any) -> str | None:
    live = manager._live_actors_to_ray_actors_resources.get(tracked)
    return None if live is None else str(live[0]._actor_id.hex())


def _known_to_tune(exception: Exception) -> Exception:
    if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
        return WorkerLostError(error_msg=str(exception))
    return exception


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_REPEATED)


def cause_of(error: BaseException, actor_id: str | None) -> Cause:
    """Why the worker of that actor ended, and on which host."""
    try:
        node = node_of(actor_id) if actor_id else {}
        return Cause(_reason(error, actor_id, node), str(node.get("NodeManagerHostname", "")))
    except (RayError, RuntimeError, OSError):  # the head does not answer: what the error itself says has to do
        return Cause(_reason(error, None, {}))


def _reason(error: BaseException, actor_id: str | None, node: dict[str, Any]) -> str:
    if isinstance(error, OutOfMemoryError):
        return KILLED_FOR_MEMORY
    if isinstance(error, RayTaskError):  # raised in the worker, outside of what the trial catches
        cause = error.cause
        return _reason(cause, actor_id, node) if isinstance(cause, RayError) else _failed(cause)
    if isinstance(error, _OF_NODES):
        return NODE_LOST
    if not isinstance(error, RayActorError):
        return WORKER_KILLED if isinstance(error, RayError) else _failed(error)
    if error.preempted:
        return NODE_PREEMPTED
    if error.actor_init_failed:  # its process lived, but could not load what it was to run
        return f"{WORKER_FAILED}: {str(error).strip().splitlines()[-1][:300]}"
    why = _why_dead(error, actor_id)
    # The search itself ends workers of nodes that have notice (`search.clusters.nodes.Leaving`), and Tune none that
    # runs. Such a node often goes the moment that it has no worker left.
    if why == Context.RAY_KILL:
        return NODE_PREEMPTED
    return NODE_LOST if why == Context.NODE_DIED or (node and is_gone(node)) else WORKER_KILLED


def _why_dead(error: RayActorError, actor_id: str | None) -> int:
    """What the head says of an actor's death, else what the text of the error does."""
    if isinstance(error, ActorDiedError) and actor_id is not None:
        told = cluster_state.actor_table(actor_id).get("DeathCause")
        if told is not None and told.HasField("actor_died_error_context"):
            return int(told.actor_died_error_context.reason)
    text = str(error)
    if "node has died" in text or "its node was" in text:
        return int(Context.NODE_DIED)
    return int(Context.RAY_KILL if "`ray.kill`" in text else Context.UNSPECIFIED)


def _failed(error: BaseException) -> str:
    return f"{WORKER_FAILED}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
