"""What the nodes of a Ray cluster say of themselves, all asked at once, each within a time limit.

Facts and clocks need no free resources, so a busy cluster answers too. A trial is measured on one node of each kind,
with the resources that a trial holds; it waits for them until its limit.
"""

import hashlib
import importlib.metadata
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import ccdist
import search
import tracking
from ccdist.data import Dataset
from ccdist.device_memory import is_out_of_memory
from ccdist.device_usage import Gpu, gpus, host_memory
from ccdist.provenance import source_commit
from search.clusters.cluster import asked_words, connected, fits
from search.clusters.reach import python_minor
from search.config import ResourcesConfig, SearchConfig
from search.errors import UserError
from search.sharing.packing import Packing, PackingError
from search.sharing.probe import TrialSample, TrialUsage, measure_trial, trial_samples
from search.sharing.side_by_side import measure_packing, this_machine
from search.space import Space
from search.worker import prepare_process

# For all nodes together: the first process of a node unpacks the code and imports Ray and PyTorch.
FACTS_S = 60.0
# Calls of which the quickest tells the clock best.
_CLOCK_CALLS = 5
_CLOCK_S = 5.0
_COMPARED = ("ray", "torch", "numpy", "optuna", "pyarrow")
_ACCELERATOR = "accelerator_type:"
_GIB = 2**30
# Trials that wait make them come; a look and a measurement do not.
HOW_TO_START_ONE = (
    "start one first, on a cluster whose nodes come on demand by a job that asks for a GPU (docs/CLUSTER.md, command 6)"
)


@dataclass(frozen=True)
class Node:
    """A node as the head of the cluster knows it."""

    id: str
    host: str
    address: str
    resources: dict[str, float]

    @classmethod
    def of(cls, entry: dict[str, Any]) -> "Node":
        return cls(entry["NodeID"], entry["NodeManagerHostname"], entry["NodeManagerAddress"], entry["Resources"])

    @property
    def name(self) -> str:
        return f"{self.host} ({self.address})"

    @property
    def cpus(self) -> float:
        return self.resources.get("CPU", 0.0)

    @property
    def gpus(self) -> float:
        return self.resources.get("GPU", 0.0)

    @property
    def gpu_type(self) -> str:
        return next((name.removeprefix(_ACCELERATOR) for name in self.resources if name.startswith(_ACCELERATOR)), "")

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for nodes on which a trial takes the same; memory as machines of one type differ in it."""
        return self.gpu_type, self.gpus, self.cpus, round(self.resources.get("memory", 0.0) / (4 * _GIB))


@dataclass(frozen=True)
class NodeFacts:
    """What a process on the node finds there; bytes."""

    versions: dict[str, str]
    commit: str
    code: str  # hash of the packages that a trial runs
    memory: int
    memory_free: int
    scratch: str
    scratch_free: int
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True)
class Clock:
    """How far a node's clock is ahead of the driver's, and by how much that may be wrong; seconds."""

    ahead: float
    within: float


@dataclass(frozen=True)
class NodeAnswer:
    """A node; its facts, or why there are none; its clock, if it was measured."""

    node: Node
    facts: NodeFacts | str
    clock: Clock | None = None


def facts_here() -> NodeFacts:
    """Of the machine that this process runs on."""
    memory, scratch = host_memory(), tempfile.gettempdir()
    versions = {name: importlib.metadata.version(name) for name in _COMPARED}
    return NodeFacts(
        {"python": python_minor()} | versions,
        source_commit(),
        code_hash(),
        memory.total,
        memory.free,
        scratch,
        shutil.disk_usage(scratch).free,
        tuple(gpus()),
    )


def code_hash() -> str:
    """Of everything that a trial may run, wherever it was copied to."""
    digest = hashlib.sha256()
    for package in (ccdist, search, tracking):
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{folder.name}/{path.relative_to(folder)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class _Witness:
    """On a node."""

    def facts(self) -> NodeFacts:
        return facts_here()

    def now(self) -> float:
        return time.time()


def living_nodes() -> list[Node]:
    """The nodes that are there, by address."""
    return sorted((Node.of(entry) for entry in ray.nodes() if entry["Alive"]), key=lambda node: (node.address, node.id))


def ask_nodes(nodes: Sequence[Node], limit_s: float = FACTS_S) -> list[NodeAnswer]:
    """Facts and clocks; a node that does not answer says why instead."""
    until = time.monotonic() + limit_s
    witness = ray.remote(num_cpus=0, max_restarts=0)(_Witness)
    actors = [witness.options(scheduling_strategy=_on(node)).remote() for node in nodes]
    asked = [actor.facts.remote() for actor in actors]
    answers = [NodeAnswer(node, _got(reference, until, limit_s)) for node, reference in zip(nodes, asked, strict=True)]
    found = [
        NodeAnswer(answer.node, answer.facts, None if isinstance(answer.facts, str) else _clock(actor.now.remote))
        for answer, actor in zip(answers, actors, strict=True)
    ]
    for actor in actors:
        ray.kill(actor)
    return found


def _clock(ask: Callable[[], Any]) -> Clock | None:
    """Of several calls the quickest: the node read its clock somewhere between question and answer."""
    best: Clock | None = None
    for _ in range(_CLOCK_CALLS):
        before = time.time()
        try:
            theirs = ray.get(ask(), timeout=_CLOCK_S)
        except Exception:  # it left in between
            return best
        after = time.time()
        clock = Clock(theirs - (before + after) / 2, (after - before) / 2)
        best = clock if best is None or clock.within < best.within else best
    return best


def one_of_each_kind(nodes: Sequence[Node], resources: ResourcesConfig) -> list[Node]:
    """The nodes to measure a trial on."""
    kinds: dict[tuple[object, ...], Node] = {}
    for node in nodes:
        if fits(node.resources, resources):
            kinds.setdefault(node.kind, node)
    return list(kinds.values())


def no_node_fits(resources: ResourcesConfig) -> str:
    """For a cluster on which nobody can be asked what a trial takes."""
    return f"a trial asks for {asked_words(resources)}, and no node that is there has as many"


def measure_on(
    nodes: Sequence[Node], sample: TrialSample, resources: ResourcesConfig, limit_s: float
) -> list[TrialUsage | str]:
    """What a trial takes on each of the nodes, or why that is not known."""
    until = time.monotonic() + limit_s
    # One call a process: its peak and its cap are its own.
    remote = ray.remote(max_calls=1, max_retries=0)(_measured)
    shared = ray.put(sample)
    asked = [
        remote.options(**_asked(resources), scheduling_strategy=_on(node)).remote(shared, resources) for node in nodes
    ]
    return [_got(reference, until, limit_s, waits=True) for reference in asked]


def _asked(resources: ResourcesConfig) -> dict[str, Any]:
    """As a task's options name what a trial holds."""
    options = {"num_cpus": resources.cpu, "num_gpus": resources.gpu, "resources": resources.custom}
    return options if resources.memory_gb is None else options | {"memory": math.floor(resources.memory_gb * _GIB)}


def _measured(sample: TrialSample, resources: ResourcesConfig) -> TrialUsage | str:
    try:
        return measure_trial(sample, prepare_process(resources))
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        if not is_out_of_memory(error):
            return f"{type(error).__name__}: {told}"
        field = "resources.gpu" if resources.gpu else "resources.memory_gb"
        return f"it runs out of memory ({told}); set {field} higher, or a batch size lower"


def pack_nodes(
    config: SearchConfig, space: Space, dataset: Dataset, seconds: float, address: str
) -> Iterator[tuple[str, Packing]]:
    """`search.pack` on one node of each kind: a whole GPU of it, and that GPU's share of its cores.

    Raises:
        UserError: the cluster cannot be used, has no node for it, or nothing could be measured on a node.
    """
    typical, largest = trial_samples(space, dataset)
    with connected(config.resources, 2 * typical.data_bytes, address):
        remote = ray.remote(max_calls=1, max_retries=0)(_packed)
        nodes = one_of_each_kind(living_nodes(), config.resources)
        if not nodes:
            raise PackingError(f"{no_node_fits(config.resources)}; {HOW_TO_START_ONE}")
        for node in nodes:
            gpus = int(node.gpus) if config.resources.gpu > 0 else 0
            cores = max(1, int(node.cpus) // max(1, gpus))
            reference = remote.options(num_cpus=cores, num_gpus=min(1, gpus), scheduling_strategy=_on(node)).remote(
                typical, largest, config.resources, cores, max(1, gpus), seconds
            )
            limit = seconds + FACTS_S
            packing: Packing | str = _got(reference, time.monotonic() + limit, limit, waits=True)
            if isinstance(packing, str):
                raise PackingError(f"{node.name}: {packing}")
            yield node.name, packing


def _packed(
    typical: TrialSample, largest: TrialSample | None, resources: ResourcesConfig, cores: int, gpus: int, seconds: float
) -> Packing | str:
    try:
        machine = this_machine(resources, typical.data_bytes, cores, gpus)
        return measure_packing(typical, largest, machine, seconds=seconds)
    except UserError as error:
        return str(error)


def _on(node: Node) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node.id, soft=False)


def _got(reference: Any, until: float, limit_s: float, *, waits: bool = False) -> Any:
    """The answer, or a text: why there is none."""
    try:
        return ray.get(reference, timeout=max(0.0, until - time.monotonic()))
    except ray.exceptions.GetTimeoutError:
        if not waits:
            return f"no answer within {limit_s:g} s"
        ray.cancel(reference, force=True)
        return (
            f"no answer within {limit_s:g} s: other work holds its resources, or it takes longer; wait until it is "
            "idle, or give --seconds more"
        )
    except Exception as error:  # the node left, or cannot run the code: of many kinds
        return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
