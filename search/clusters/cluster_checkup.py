"""What `search.doctor --cluster` asks: the nodes of a cluster, and from this machine the database and MLflow."""

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import ray
import sqlalchemy

from search.artifacts.mounts import current_mounts
from search.clusters.addresses import ClusterError, asks_for_token
from search.clusters.cluster import Cluster, connected
from search.clusters.node_probes import (
    FACTS_S,
    NodeFacts,
    ask_nodes,
    facts_here,
    living_nodes,
    measure_on,
    one_of_each_kind,
)
from search.clusters.preflight import ClusterView, cluster_findings, memory_findings, summary
from search.clusters.reach import Finding as Reach
from search.clusters.reach import survey
from search.config import SearchConfig
from search.errors import UserError
from search.sharing.probe import TrialSample, searched_data, trial_samples
from search.space import Space
from search.storage import Storage, check_local
from search.studies.consistency import Finding
from search.studies.database import (
    POSTGRES_CONNECTION,
    StudyError,
    check_kind,
    one_line_errors,
    postgres_url,
    sqlite_file,
)
from tracking.address import HOW_TO_LOG_IN, is_server

SERVER_S = 10.0
_NEEDS_LOGIN = (401, 403)


@dataclass(frozen=True)
class Examined:
    """Everything that is worth a line, and the last one."""

    findings: list[Finding]
    summary: str


def examine_cluster(
    config: SearchConfig, space: Space, storage: Storage, *, address: str | None, seconds: float
) -> Examined:
    """Look at the cluster that `search.run` would use; starts no trial, and writes to no study.

    Args:
        seconds: limit of the measurement of a trial on one node of each kind.

    Raises:
        UserError: the data are not there, or no cluster can be used.
    """
    typical, largest = trial_samples(space, searched_data(config))
    driver = facts_here()  # before the code is sent to the nodes
    with connected(config.resources, typical.data_bytes, address) as cluster:
        findings = [check_database(storage.study_url), check_tracking(storage.tracking_uri, config.tracking.enabled)]
        view, problems = _view(cluster, driver, config, storage, largest or typical, seconds)
        findings += [*problems, *cluster_findings(view, config.resources), *memory_findings(view, config.resources)]
        return Examined(findings, summary(view, config.resources))


def _view(
    cluster: Cluster, driver: NodeFacts, config: SearchConfig, storage: Storage, sample: TrialSample, seconds: float
) -> tuple[ClusterView, list[Finding]]:
    nodes, problems = living_nodes(), list[Finding]()
    answers = ask_nodes(nodes)
    answering = [answer.node for answer in answers if not isinstance(answer.facts, str)]
    reach: list[Reach] = []
    try:
        with _nothing_left(storage):
            reach = survey(storage.workers_artifacts, FACTS_S) if answering else []
    except ClusterError as error:
        problems.append(Finding("artefacts", f"{error}; choose another --storage"))
    measured = one_of_each_kind(answering, config.resources)
    usages = list(zip(measured, measure_on(measured, sample, config.resources, seconds), strict=True))
    tokens = asks_for_token(ray.get_runtime_context().gcs_address) if cluster.is_shared else None
    artifacts = storage.workers_artifacts
    view = ClusterView(cluster.description, driver, answers, artifacts, reach, usages, tokens, cluster.is_shared)
    return view, problems


@contextmanager
def _nothing_left(storage: Storage) -> Iterator[None]:
    """Folders that a look at the artefacts makes go again: a search that was never started has none."""
    made = [folder for folder in (storage.artifacts, storage.folder) if not os.path.exists(folder)]
    try:
        yield
    finally:
        for folder in made:
            with suppress(OSError):  # it is not there, or somebody else uses it by now
                folder.rmdir()


def check_database(url: str) -> Finding:
    """Whether this machine reaches the study's database; its tables are not made."""
    file = sqlite_file(url)
    try:
        if file is not None:
            check_local(file, current_mounts())
            _check_usable(file)
            text = f"SQLite, {file}: only a driver on this host can go on with the study (postgresql://... for others)"
            return Finding("study database", text, fine=True)
        check_kind(url)
        with one_line_errors(url):
            engine = sqlalchemy.create_engine(postgres_url(url), connect_args=POSTGRES_CONNECTION)
            with engine.connect():
                pass
            engine.dispose()
    except UserError as error:
        return Finding("study database", str(error))
    return Finding("study database", "PostgreSQL, reached: a driver on any host can go on with the study", fine=True)


def _check_usable(file: Path) -> None:
    """Whether a driver here can open that SQLite database, or make it.

    Raises:
        StudyError: it cannot.
    """
    if file == Path(":memory:"):
        raise StudyError("study database sqlite:///:memory: ends with its driver; give it a file")
    # Not Path.exists: in a folder that is closed to this user that raises.
    place = file if os.path.exists(file) else next(filter(os.path.exists, file.resolve().parents))
    if not os.access(place, os.R_OK | os.W_OK):
        raise StudyError(f"study database {file} cannot be written ({place} may not); choose another --storage")
    if place != file and not place.is_dir():
        raise StudyError(f"study database {file} cannot be made ({place} is no folder); choose another --storage")
    if place == file and not (file.is_file() and _is_sqlite(file)):
        raise StudyError(f"study database {file} is no SQLite file; move it away, or choose another --storage")


def _is_sqlite(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(16) in (b"", b"SQLite format 3\0")


def check_tracking(uri: str | None, enabled: bool) -> Finding:
    """Whether this machine reaches MLflow; nodes need not."""
    subject = "tracking"
    if not enabled:
        return Finding(subject, "is off (tracking.enabled)", fine=True)
    nodes = "nodes write journals and need not reach it"
    if uri is None:
        return Finding(subject, f"a local MLflow store, written by the driver; {nodes}", fine=True)
    if not is_server(uri):
        return Finding(subject, f"the database {uri}, written by the driver; {nodes}", fine=True)
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=SERVER_S):
            return Finding(subject, f"{uri} answers here; {nodes}", fine=True)
    except urllib.error.HTTPError as error:
        if error.code in _NEEDS_LOGIN:
            return Finding(subject, f"{uri} answers here and wants a login ({HOW_TO_LOG_IN}); {nodes}", fine=True)
        reason = f"answers with status {error.code} and not as MLflow does"
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = f"does not answer here ({getattr(error, 'reason', None) or error})"
    return Finding(subject, f"{uri} {reason}; start the server or correct tracking.uri: rows would wait in journals")
