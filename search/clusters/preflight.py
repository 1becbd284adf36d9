"""Whether a search would run well on a cluster: pure functions from what its nodes say to findings.

Every finding says what is there; a broken one also what to do.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from search.clusters.cluster import fits
from search.clusters.node_probes import HOW_TO_START_ONE, Clock, Node, NodeAnswer, NodeFacts, no_node_fits
from search.clusters.reach import Finding as Reach
from search.clusters.reach import public
from search.config import ResourcesConfig
from search.sharing.packing import GIB, HOST_SHARE, memory_setting, rate
from search.sharing.probe import TrialUsage
from search.studies.consistency import Finding

# Rows of journals carry the time of the node that wrote them; leases and locks do not compare clocks.
CLOCK_S = 1.0
# Ray's logs, and what does not fit into its object store.
SCRATCH_BYTES = 5e9


@dataclass(frozen=True)
class ClusterView:
    """What was asked of a cluster.

    artifacts: their folder, or their address in an object store.
    reach: what each node says of them.
    usages: of a trial on one node of each kind; a text: why it is not known.
    tokens: whether a shared one asks whoever connects for its token; None: not known.
    """

    description: str
    driver: NodeFacts
    answers: Sequence[NodeAnswer]
    artifacts: Path | str
    reach: Sequence[Reach]
    usages: Sequence[tuple[Node, TrialUsage | str]]
    tokens: bool | None
    is_shared: bool  # not this search's own

    def usage(self, node: Node) -> TrialUsage | None:
        """What a trial takes on that kind of node, if it was measured."""
        found = [usage for other, usage in self.usages if other.kind == node.kind]
        return found[0] if found and isinstance(found[0], TrialUsage) else None


def cluster_findings(view: ClusterView, resources: ResourcesConfig) -> Iterator[Finding]:
    """A line for each node, and one for each thing that is wrong with it."""
    yield _tokens(view)
    for answer in view.answers:
        if isinstance(answer.facts, str):
            text = f"{answer.facts}; see that Ray runs there and that the node has the packages of requirements.lock"
            yield Finding(answer.node.name, text)
            continue
        yield Finding(answer.node.name, _described(answer.node, answer.facts, answer.clock), fine=True)
        for text in _troubles(answer.facts, view.driver):
            yield Finding(answer.node.name, text)
        if answer.clock is not None and abs(answer.clock.ahead) - answer.clock.within > CLOCK_S:
            text = "warning: journals carry the time of their node, so curves in MLflow shift; start chrony or ntpd"
            yield Finding(answer.node.name, text, fine=True)
    yield from _reached(view)
    if not any(slots_of(answer, None, resources) for answer in view.answers):
        yield Finding("trials", f"{no_node_fits(resources)}, so that they would wait for one; {HOW_TO_START_ONE}")
    for node, usage in view.usages:
        yield from _measured(node, usage, resources)


def summary(view: ClusterView, resources: ResourcesConfig) -> str:
    """How many trials at once, and, where that was measured, how many an hour."""
    slots = [(answer.node, slots_of(answer, view.usage(answer.node), resources)) for answer in view.answers]
    at_once = sum(count for _, count in slots)
    if resources.concurrency != "auto":
        at_once = min(at_once, resources.concurrency)
    told = f"{at_once} trial{'' if at_once == 1 else 's'} at once on {view.description}"
    usages = [(view.usage(node), count) for node, count in slots if count]
    if not usages or any(usage is None for usage, _ in usages):
        return f"{told}; how many an hour was not measured"
    per_hour = sum(usage.per_hour * count for usage, count in usages if usage is not None)
    per_hour *= at_once / sum(count for _, count in usages)
    return f"{told}; about {rate(per_hour)} trials per hour, if they do not slow each other down"


def slots_of(answer: NodeAnswer, usage: TrialUsage | None, resources: ResourcesConfig) -> int:
    """Trials at once on a node: by its resources, and by its memory where a trial was measured."""
    if isinstance(answer.facts, str):
        return 0
    slots = fits(answer.node.resources, resources)
    if usage is None:
        return slots
    if resources.gpu and usage.device_bytes > _cap(answer.facts, resources):
        return 0
    return min(slots, math.floor(HOST_SHARE * answer.facts.memory_free / usage.host_bytes))


def _tokens(view: ClusterView) -> Finding:
    if not view.is_shared:
        return Finding("tokens", "the Ray of a search's own listens on this machine only", fine=True)
    if view.tokens is None:
        return Finding("tokens", "the head could not be asked whether it wants its token; look again")
    if view.tokens:
        return Finding("tokens", "Ray asks for its token (RAY_AUTH_MODE=token)", fine=True)
    text = (
        "Ray asks for none: whoever reaches the head's ports runs code on every node; put one ~/.ray/auth_token on "
        "all nodes and here, and export RAY_AUTH_MODE=token before ray start"
    )
    return Finding("tokens", text)


def _described(node: Node, facts: NodeFacts, clock: Clock | None) -> str:
    parts = [f"{node.cpus:g} CPUs"]
    if node.gpus:
        kind = facts.gpus[0].name if facts.gpus else node.gpu_type or "of unknown type"
        parts.append(f"{node.gpus:g} GPU{'' if node.gpus == 1 else 's'} ({kind})")
    parts.append(f"memory {facts.memory_free / GIB:.3g} of {facts.memory / GIB:.3g} GiB free")
    parts.append(f"object store {node.resources.get('object_store_memory', 0.0) / GIB:.2g} GiB")
    parts.append(f"{facts.scratch_free / GIB:.3g} GiB free in {facts.scratch}")
    parts.append(f"python {facts.versions['python']}, ray {facts.versions['ray']}, torch {facts.versions['torch']}")
    parts.append(f"commit {facts.commit}, code {facts.code}")
    if clock is not None:
        parts.append(f"clock {clock.ahead:+.3f} s ± {clock.within:.3f} of the driver's")
    return "; ".join(parts)


def _troubles(facts: NodeFacts, driver: NodeFacts) -> Iterator[str]:
    for name, version in driver.versions.items():
        theirs = facts.versions.get(name, "none")
        if public(theirs) != public(version):
            yield f"has {name} {theirs}, the driver {version}; install requirements.lock on both"
    if facts.code != driver.code:
        yield (
            f"runs other code ({facts.commit}, {facts.code}) than the driver ({driver.commit}, {driver.code}); "
            "submit the job again from this checkout, or update the installed package there"
        )
    if facts.scratch_free < SCRATCH_BYTES:
        yield (
            f"has {facts.scratch_free / GIB:.2g} GiB left in {facts.scratch}, where Ray keeps logs and spills objects; "
            "make room, or start Ray there with --temp-dir on a larger disk"
        )


def _reached(view: ClusterView) -> Iterator[Finding]:
    advice = "mount one folder there on every node, or set storage.artifacts to an object store (s3://BUCKET/FOLDER)"
    if isinstance(view.artifacts, str):
        advice = "give the node the rights to read and write there, or correct storage.artifacts"
    unseeing = [found for found in view.reach if found.problem is not None]
    for found in unseeing:
        yield Finding(found.node, f"does not reach the artefacts: {found.problem}; {advice}")
    if view.reach and not unseeing:
        yield Finding("artefacts", f"nodes that read and write there: {len(view.reach)}, all", fine=True)


def _measured(node: Node, usage: TrialUsage | str, resources: ResourcesConfig) -> Iterator[Finding]:
    if isinstance(usage, str):
        yield Finding(f"a trial on {node.name}", usage)
        return
    gpu = f"{usage.device_bytes / GIB:.3g} GiB of the GPU and " if resources.gpu else ""
    text = (
        f"{usage.sample}: takes {gpu}{usage.host_bytes / GIB:.3g} GiB of memory at most (in {usage.peak_phase}), and "
        f"about {_duration(usage.seconds)} alone; {fits(node.resources, resources)} at once by CPUs and GPUs"
    )
    yield Finding(f"a trial on {node.name}", text, fine=True)


def memory_findings(view: ClusterView, resources: ResourcesConfig) -> Iterator[Finding]:
    """Nodes whose memory holds fewer trials than their CPUs and GPUs."""
    for answer in view.answers:
        usage = view.usage(answer.node)
        if usage is None or isinstance(answer.facts, str):
            continue
        by_resources, slots = fits(answer.node.resources, resources), slots_of(answer, usage, resources)
        if slots == by_resources:
            continue
        if resources.gpu and usage.device_bytes > _cap(answer.facts, resources):
            cap = _cap(answer.facts, resources) / GIB
            yield Finding(
                answer.node.name,
                f"a trial takes {usage.device_bytes / GIB:.3g} GiB of the GPU, its share of {resources.gpu:g} is "
                f"{cap:.3g} GiB; set resources.gpu higher (python -m search.pack proposes it)",
            )
        else:
            yield Finding(
                answer.node.name,
                f"its free memory holds {slots} trials of {usage.host_bytes / GIB:.3g} GiB, but Ray would start "
                f"{by_resources}; {memory_setting(usage.host_bytes)} lets Ray count it",
            )


def _cap(facts: NodeFacts, resources: ResourcesConfig) -> float:
    """Bytes of a GPU that a trial may take; no limit where nvidia-smi does not tell."""
    return min(1.0, resources.gpu) * facts.gpus[0].memory if facts.gpus else math.inf


def _duration(seconds: float) -> str:
    from search.plan import duration

    return duration(seconds)
