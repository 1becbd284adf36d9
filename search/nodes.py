"""What Ray says of its nodes: which one holds most, which is gone, and which is about to go."""

import math
import socket
import time
from collections.abc import Callable, Collection
from typing import Any

import ray
from ray._private.state import state as cluster_state

from search.cluster import fits
from search.config import ResourcesConfig
from search.shares import Node

# A connection to a node that is there takes milliseconds.
CONNECT_S = 1.0
# How often the nodes are looked at.
LOOK_S = 5.0


class Roomiest:
    """Of the living nodes that can hold a trial the one with the most memory to give, looked for now and then."""

    def __init__(self, resources: ResourcesConfig) -> None:
        self._resources, self._node, self._looked = resources, Node(0.0, 1), -math.inf

    def __call__(self) -> Node:
        if time.monotonic() - self._looked >= LOOK_S:
            alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
            each = [Node(node.get("memory", 0.0) / 2**30, fits(node, self._resources)) for node in alive]
            holding = [node for node in each if node.trials > 0]  # a head often holds none
            self._node = max(holding, key=lambda node: node.memory_gb, default=self._node)
            self._looked = time.monotonic()
        return self._node


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
