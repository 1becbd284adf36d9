"""What Ray says of its nodes: which one holds most, which is gone, and which is about to go."""

import math
import socket
import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any

import ray
from ray._private.state import state as cluster_state

from search.attempts.shares import Node, Share
from search.clusters.cluster import fits
from search.config import ResourcesConfig

# A connection to a node that is there takes milliseconds.
CONNECT_S = 1.0
# How often the nodes are looked at.
LOOK_S = 5.0


class Roomiest:
    """Of the living nodes that can hold a trial the one with the most memory to give, looked for now and then."""

    def __init__(self, resources: ResourcesConfig) -> None:
        self._resources, self._looked = resources, -math.inf
        self._node: Node | None = None

    def __call__(self, *, anew: bool = False) -> Node | None:
        if anew or time.monotonic() - self._looked >= LOOK_S:
            try:
                self._node = self._look()
            except Exception:  # a head that is away for a moment; what was seen last stays
                return self._node
            finally:
                self._looked = time.monotonic()
        return self._node

    def _look(self) -> Node | None:
        alive = (node for node in ray.nodes() if node["Alive"])
        for node in sorted(alive, key=lambda node: -float(node["Resources"].get("memory", 0.0))):
            has = node["Resources"]
            trials = fits(has, self._resources)
            if trials > 0 and not is_gone(node):  # a head often holds none
                return Node(has.get("memory", 0.0) / 2**30, trials)
        return None


def node_of(actor_id: str) -> dict[str, Any]:
    """The node of an actor, dead or alive, as `ray.nodes` has it; empty: not known."""
    address = cluster_state.actor_table(actor_id).get("Address", {})
    return next((node for node in ray.nodes() if node["NodeID"] == address.get("NodeID")), {})


def is_gone(node: dict[str, Any]) -> bool:
    """Whether nobody answers on the node any more. Ray itself takes up to half a minute to be sure."""
    if not node.get("Alive", True):
        return True
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=CONNECT_S):
            return False
    except OSError:
        return True


def ids_on(resources: ResourcesConfig, hosts: Collection[str], share: Share) -> tuple[str, ...]:
    """The ids of the living nodes on these hosts; none, if no other one can hold such a share."""
    try:
        alive = [node for node in ray.nodes() if node["Alive"]]
    except Exception:  # a head that is away for a moment
        return ()
    asked = resources.model_copy(update=asdict(share))
    there = [node["NodeManagerHostname"] in hosts for node in alive]
    if not any(fits(node["Resources"], asked) for node, bad in zip(alive, there, strict=True) if not bad):
        return ()
    return tuple(sorted(node["NodeID"] for node, bad in zip(alive, there, strict=True) if bad))


class Leaving:
    """Ends the workers of nodes that have been given notice, at a report of theirs: what they did is stored by then.

    Args:
        draining: the ids of those nodes.
        node_of: the node of an actor, by its id.
        end: ends an actor.
    """

    def __init__(
        self,
        draining: Callable[[], Collection[str]] = cluster_state.get_draining_nodes,
        node_of: Callable[[str], dict[str, Any]] = node_of,
        end: Callable[[Any], None] = ray.kill,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._draining, self._node_of, self._end, self._clock = draining, node_of, end, clock
        self._nodes: Collection[str] = ()
        self._looked = -LOOK_S

    def __call__(self, trial: Any) -> None:
        """End the worker of a Tune trial if it has to leave; Tune then sees it dead."""
        if self._clock() - self._looked >= LOOK_S:
            self._nodes, self._looked = tuple(self._draining()), self._clock()
        actor = trial.temporary_state.ray_actor if self._nodes else None
        if actor is not None and self._node_of(actor._actor_id.hex()).get("NodeID") in self._nodes:
            self._end(actor)
