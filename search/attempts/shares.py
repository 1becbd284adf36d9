"""What a trial holds of its node: the resources of the space file, and more for trials that ran out of memory.

Trials whose memory depends on the same things are one class (`memory_class`). When one of a class runs out of memory,
the share of the whole class doubles: of the GPU, or of the host memory that Ray reserves, so that half as many of them
run at once. A trial that has a whole GPU, or nearly all the memory of a node, and runs out nevertheless has failed.
What was learned is kept in the study, and the next driver begins with it: of what ran out only, so that the rest is as
the space file says, and of memory never more than a node has that is there. Ray would wait for more for ever.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from search.config import ResourcesConfig
from search.recipe import Recipe

# Of a node's memory a trial gets at most so much: Ray counts what is free when a node starts, which differs each time.
MOST_OF_A_NODE = 0.9


@dataclass(frozen=True)
class Share:
    """What one run of a trial holds.

    gpu: a fraction of one, or whole ones. memory_gb: of the host, GiB; None: none is reserved.
    """

    cpu: float
    gpu: float
    memory_gb: float | None = None

    @classmethod
    def of(cls, resources: ResourcesConfig) -> "Share":
        """As the space file has it."""
        return cls(resources.cpu, resources.gpu, resources.memory_gb)

    def bundle(self, custom: Mapping[str, float]) -> dict[str, float]:
        """As Ray's resources of one trial."""
        bundle = {**custom, "CPU": self.cpu, "GPU": self.gpu}
        return bundle if self.memory_gb is None else bundle | {"memory": math.floor(self.memory_gb * 2**30)}


@dataclass(frozen=True)
class Node:
    """Of the nodes that can hold a trial the one with the most memory.

    memory_gb: that Ray gives away, GiB. trials: ordinary ones that run there at once.
    """

    memory_gb: float
    trials: int

    @property
    def ordinary_memory_gb(self) -> float:
        """Of a trial for which none is reserved: its part of what the node's trials share."""
        return self.memory_gb / max(1, self.trials)


class Nodes(Protocol):
    """The roomiest node as it is now; None: none is there that can hold a trial, or not known."""

    def __call__(self, *, anew: bool = False) -> Node | None:
        """anew: what was seen a moment ago will not do."""


def unknown(*, anew: bool = False) -> None:
    """Nodes of which nothing is known."""


def memory_class(recipe: Recipe) -> str:
    """What the memory of a trial depends on, as a name: trials of the same name need about as much."""
    student, network = recipe.student, recipe.student.network
    sizes = [student.batch_size, recipe.verification.batch_size]
    if recipe.needs_teacher:
        sizes.insert(0, recipe.teacher.batch_size)
    precision = " ".join(f"{name}={value}" for name, value in student.precision.model_dump(mode="json").items())
    teacher = "teacher" if recipe.needs_teacher else "no teacher"
    return f"{network.name} {network.width}, {teacher}, batches {'/'.join(map(str, sizes))}, {precision}"


class Shares:
    """The shares of all classes, as they were learned.

    Args:
        resources: of an ordinary trial.
        stored: what `store` was last told, under whatever driver: class -> resource that ran out -> how much it needs.
        node: bounds the memory that is asked for.
        store: keeps what was learned.
    """

    def __init__(
        self,
        resources: ResourcesConfig,
        stored: Mapping[str, Mapping[str, float]],
        node: Nodes,
        store: Callable[[dict[str, dict[str, float]]], None],
    ) -> None:
        self.ordinary = Share.of(resources)
        self._learned = {name: dict(needs) for name, needs in stored.items()}
        self._node, self._store = node, store

    @property
    def is_any_raised(self) -> bool:
        """Whether anything was learned."""
        return bool(self._learned)

    @property
    def knows_a_node(self) -> bool:
        """Whether it is known how much memory there is to give."""
        return self._node() is not None

    def of(self, recipe: Recipe, *, anew: bool = False) -> Share:
        """What a trial of this recipe is to hold; anew: it starts now, and its node must not have gone meanwhile."""
        needs = self._learned.get(memory_class(recipe)) if self._learned else None
        share = self.ordinary
        if needs is not None and share.gpu:  # without GPUs none is needed, whatever was learned with one
            share = replace(share, gpu=max(share.gpu, needs.get("gpu", 0.0)))
        if needs is not None and "memory_gb" in needs and (node := self._node(anew=anew)) is not None:
            memory = min(needs["memory_gb"], MOST_OF_A_NODE * node.memory_gb)
            share = replace(share, memory_gb=max(memory, share.memory_gb or 0.0))
        return share

    def is_too_large(self, share: Share) -> bool:
        """Whether no node can hold it any more that could when it was asked for."""
        node = self._node() if share != self.ordinary else None
        return node is not None and (share.memory_gb or 0.0) > max(node.memory_gb, self.ordinary.memory_gb or 0.0)

    def places(self, share: Share) -> float:
        """In the room of how many ordinary trials it runs: as many as one node runs at most."""
        if share == self.ordinary:
            return 1.0
        node, places = self._node(), 1.0
        if self.ordinary.gpu:
            places = _packed(1.0, self.ordinary.gpu) / _packed(1.0, share.gpu)
        if node is None:
            return places
        if share.memory_gb is not None and share.memory_gb > (self.ordinary.memory_gb or 0.0):
            places = max(places, node.trials / _packed(node.memory_gb, share.memory_gb))
        return max(1.0, min(places, node.trials))

    def raise_for(self, recipe: Recipe, held: Share, *, on_gpu: bool) -> Share | None:
        """Double the share of a class, one of whose trials ran out with `held`; None: there is no more to give.

        Others of the class that began with less and run out later find it raised already.
        """
        resource, larger = ("gpu", _more_gpu(held)) if on_gpu else ("memory_gb", self._more_memory(held))
        if larger is None:
            return None
        needs = self._learned.setdefault(memory_class(recipe), {})
        needs[resource] = max(larger, needs.get(resource, 0.0))
        self._store({name: dict(each) for name, each in self._learned.items()})
        return self.of(recipe)

    def _more_memory(self, held: Share) -> float | None:
        node = self._node()
        if node is None:
            return None
        most, had = MOST_OF_A_NODE * node.memory_gb, held.memory_gb or node.ordinary_memory_gb
        return None if had >= 0.99 * most else min(most, 2 * had)


def _more_gpu(held: Share) -> float | None:
    return min(1.0, 2 * held.gpu) if 0 < held.gpu < 1 else None


def _packed(room: float, each: float) -> float:
    """How many fit; a part, where not even one does."""
    return math.floor(room / each + 1e-9) if each <= room else room / each
