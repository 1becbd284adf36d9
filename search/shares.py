"""What a trial holds of its node: the resources of the space file, and more for trials that ran out of memory.

Trials whose memory depends on the same things are one class (`memory_class`). When one of a class runs out of memory,
the share of the whole class doubles: of the GPU, or of the host memory that Ray reserves, so that half as many of them
run at once. A trial that has a whole GPU, or all the memory of a node, and runs out nevertheless has failed. What was
learned is kept in the study, and the next driver begins with it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from search.config import ResourcesConfig
from search.recipe import Recipe


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

    def at_least(self, other: "Share") -> "Share":
        """What covers both; a trial without a GPU needs none, whatever was learned with one."""
        memory = max((each for each in (self.memory_gb, other.memory_gb) if each is not None), default=None)
        return Share(max(self.cpu, other.cpu), max(self.gpu, other.gpu) if self.gpu else 0.0, memory)

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
        stored: what `store` was last told, under whatever driver.
        node: the roomiest node as it is now; asked when a host runs out of memory.
        store: keeps what was learned.
    """

    def __init__(
        self,
        resources: ResourcesConfig,
        stored: Mapping[str, Mapping[str, Any]],
        node: Callable[[], Node],
        store: Callable[[dict[str, Any]], None],
    ) -> None:
        self.ordinary = Share.of(resources)
        self._learned = {name: Share(**share) for name, share in stored.items()}
        self._node, self._store = node, store

    @property
    def is_any_raised(self) -> bool:
        """Whether anything was learned."""
        return bool(self._learned)

    def of(self, recipe: Recipe) -> Share:
        """What a trial of this recipe is to hold."""
        learned = self._learned.get(memory_class(recipe)) if self._learned else None
        return self.ordinary if learned is None else self.ordinary.at_least(learned)

    def places(self, share: Share) -> float:
        """In the room of how many ordinary trials it runs."""
        ratios = [share.cpu / self.ordinary.cpu]
        if self.ordinary.gpu:
            ratios.append(share.gpu / self.ordinary.gpu)
        if share.memory_gb is not None:
            room = self.ordinary.memory_gb or self._ordinary_memory()
            ratios.append(share.memory_gb / room)
        return max(1.0, *ratios)

    def raise_for(self, recipe: Recipe, held: Share, *, on_gpu: bool) -> Share | None:
        """Double the share of a class, one of whose trials ran out with `held`; None: there is no more to give.

        Others of the class that began with less and run out later find it raised already.
        """
        larger = self._with_more_gpu(held) if on_gpu else self._with_more_memory(held)
        if larger is None:
            return None
        share = self.of(recipe).at_least(larger)
        self._learned[memory_class(recipe)] = share
        self._store({name: asdict(each) for name, each in self._learned.items()})
        return share

    @staticmethod
    def _with_more_gpu(held: Share) -> Share | None:
        return replace(held, gpu=min(1.0, 2 * held.gpu)) if 0 < held.gpu < 1 else None

    def _with_more_memory(self, held: Share) -> Share | None:
        # Where nothing was reserved a trial had its part of what the node's trials share.
        most, had = self._node().memory_gb, held.memory_gb or self._ordinary_memory()
        return None if had >= 0.99 * most else replace(held, memory_gb=min(most, 2 * had))

    def _ordinary_memory(self) -> float:
        node = self._node()
        return node.memory_gb / max(1, node.trials)
