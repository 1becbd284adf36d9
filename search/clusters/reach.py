"""Whether every node of a cluster reaches the artefacts: the same folder, not one of its own by that name.

The driver leaves a word there, each node reads it and leaves its answer, and the driver reads that. All names are new:
a network file system remembers for a while that a name was not there. Of an object store each node tries the address.
"""

import platform
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from search.clusters.addresses import ClusterError

# For all nodes together: the first process of a node unpacks the code and imports Ray, a busy one slowly.
LIMIT_S = 60.0
_WORD = "word"
_ANOTHER = "it has another folder by that name"


@dataclass(frozen=True)
class Answer:
    """What a node says: why it cannot use the folder, or None; and what it computes with."""

    problem: str | None
    versions: dict[str, str]


@dataclass(frozen=True)
class Finding:
    """One node: its name, why it does not reach the artefacts, or None; what it computes with, empty if unknown."""

    node: str
    problem: str | None
    versions: dict[str, str]


def check_nodes(artifacts: Path | str, limit_s: float = LIMIT_S) -> None:
    """Ask every node that is alive, all at once.

    Args:
        artifacts: a folder, or the address of one in an object store.

    Raises:
        ClusterError: some do not reach it, or compute with another torch.
    """
    findings = survey(artifacts, limit_s)
    unseeing = [f"{finding.node}: {finding.problem}" for finding in findings if finding.problem is not None]
    if unseeing and isinstance(artifacts, str):
        raise ClusterError(f"{_counted(unseeing)} cannot use storage.artifacts; see that every node reaches it")
    if unseeing:
        raise ClusterError(
            f"artefacts folder {artifacts} is not seen by {_counted(unseeing)}; mount one folder there on every node, "
            "or set storage.artifacts to an object store (s3://BUCKET/FOLDER)"
        )
    others = [f"{finding.node}: {_listed(finding.versions)}" for finding in findings if finding.versions != versions()]
    if others:
        raise ClusterError(f"this driver has {_listed(versions())}, other than {_counted(others)}; install the same")


def survey(artifacts: Path | str, limit_s: float = LIMIT_S) -> list[Finding]:
    """What each living node says.

    Raises:
        ClusterError: this machine itself cannot write there.
    """
    if isinstance(artifacts, str):
        return [_finding(node, answer) for node, answer in _asked((artifacts, ""), limit_s)]
    with _left_there(artifacts) as (folder, word):
        findings = []
        for node, answer in _asked((str(folder), word), limit_s):
            found = _finding(node, answer)
            if found.problem is None and _read(folder / node["NodeID"]) != word:
                found = replace(found, problem=_ANOTHER)
            findings.append(found)
        return findings


def _finding(node: dict[str, Any], answer: Answer | str) -> Finding:
    name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
    return Finding(name, answer, {}) if isinstance(answer, str) else Finding(name, answer.problem, answer.versions)


def versions() -> dict[str, str]:
    """What has to be the same everywhere."""
    return {"python": python_minor(), "torch": public(version("torch"))}


def python_minor() -> str:
    """Patches of Python change nothing that is sent from one to another."""
    return ".".join(platform.python_version_tuple()[:2])


def public(version: str) -> str:
    """Builds for different devices (2.9.0+cu130) are one version."""
    return version.partition("+")[0]


def answer(place: str, word: str, node: str) -> Answer:
    """On a node: read the driver's word, and leave it again under the node's name; without a word, try the address."""
    if not word:
        from search.artifacts.artifact_place import probe  # takes its time to import

        return Answer(probe(place), versions())
    folder, problem = Path(place), None
    try:
        if (folder / _WORD).read_text() == word:
            (folder / node).write_text(word)
        else:
            problem = _ANOTHER
    except FileNotFoundError:
        problem = _ANOTHER if folder.parent.exists() else "it has none"
    except OSError as error:
        problem = f"it cannot be used there ({error.strerror})"
    return Answer(problem, versions())


@contextmanager
def _left_there(artifacts: Path) -> Iterator[tuple[Path, str]]:
    word = secrets.token_hex(16)
    folder = artifacts / f".reach-{word[:8]}"
    try:
        try:
            folder.mkdir(parents=True)
            (folder / _WORD).write_text(word)
        except OSError as error:
            raise ClusterError(f"artefacts folder {artifacts} cannot be written ({error.strerror})") from error
        yield folder, word
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _asked(question: tuple[str, str], limit_s: float) -> Iterator[tuple[dict[str, Any], Answer | str]]:
    """Each living node, and its answer or why there is none; nodes that leave meanwhile are left out."""
    until = time.monotonic() + limit_s
    nodes = [node for node in ray.nodes() if node["Alive"]]
    remote = ray.remote(num_cpus=0, max_retries=0)(answer)
    pending = []
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        pending.append(remote.options(scheduling_strategy=there).remote(*question, node["NodeID"]))
    answers: list[Answer | str] = []
    for reference in pending:
        try:
            answers.append(ray.get(reference, timeout=max(0.0, until - time.monotonic())))
        except ray.exceptions.GetTimeoutError:
            ray.cancel(reference, force=True)
            answers.append(f"no answer within {limit_s:g} s")
        except Exception as error:
            cause = getattr(error, "cause", None) or error  # without the lines of Ray's own trace
            answers.append(f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}")
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    yield from ((node, answer) for node, answer in zip(nodes, answers, strict=True) if node["NodeID"] in alive)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _listed(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items())


def _counted(texts: Sequence[str], most: int = 5) -> str:
    more = f", and {len(texts) - most} more" if len(texts) > most else ""
    return f"{len(texts)} node{'' if len(texts) == 1 else 's'} ({'; '.join(texts[:most])}{more})"
