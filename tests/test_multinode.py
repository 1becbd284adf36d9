"""Searches over several nodes of one machine: what trials hold is never over-subscribed, and nodes may vanish.

The nodes are real: each has its own raylet, and is killed or drained as a cloud would. Trials count themselves, in
files that the tests read.
"""

import functools
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import pytest
import ray
import studies
import torch
from ray import cloudpickle
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from rich.console import Console
from studies import FINGERPRINT, config_of, result

from ccdist.data import Dataset, ImageSet, load_dataset
from ccdist.training import EpochReport, TrainingResult, train_student
from search import execution, trial, worker
from search.artifacts.places import TrialPlaces
from search.attempts.deaths import KILLED_FOR_MEMORY, NODE_LOST, NODE_PREEMPTED, OUT_OF_MEMORY
from search.clusters import cluster
from search.config import SearchConfig
from search.execution import Outcome, execute
from search.space import Space
from search.storage import Storage
from search.studies.records import TrialResult
from search.trial import TrialTask
from search.trials.reports import Reports
from tracking.journal import MetricsRow, read_rows

pytestmark = [
    pytest.mark.timeout(600),
    # Ray looks for a free port with a socket that it does not close.
    pytest.mark.filterwarnings("ignore:Exception ignored in.*socket:pytest.PytestUnraisableExceptionWarning"),
]

LONGEST_WAIT_S = 400.0
EPOCHS = 12
MEMORY = 3 * 2**30
STORE = 80 * 2**20


# ---- nodes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head that holds no trials. Its folder has a short name: Ray keeps sockets there."""
    folder = tempfile.mkdtemp(prefix="ray-")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster._ENVIRONMENT.items():  # taken back at the end, as `connected` sets them for good
            patch.setenv(name, value)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        for name in ("RAY_ADDRESS", "TUNE_MAX_PENDING_TRIALS_PG"):
            patch.delenv(name, raising=False)
        made = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": STORE,
                "include_dashboard": False,
                "temp_dir": folder,
            },
        )
        try:
            yield made
        finally:
            ray.shutdown()
            made.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def with_nodes(cluster_of_test: Cluster, *each: dict[str, Any]) -> Iterator[list[Any]]:
    """More nodes for the time of the context."""
    added = [cluster_of_test.add_node(object_store_memory=STORE, **options) for options in each]
    try:
        yield added
    finally:
        for node in added:
            if node in cluster_of_test.worker_nodes:
                cluster_of_test.remove_node(node, allow_graceful=False)


def run(
    nodes: Cluster, config: SearchConfig, storage: Storage, dataset: Dataset, script: Callable[..., Any]
) -> Outcome:
    """A search over those nodes, whose trials are this script."""

    def trainable(tune_config: dict[str, Any], **given: Any) -> None:
        worker.run_trial = script
        worker.trainable(tune_config, **given)

    storage.prepare()
    ours = (sys.modules[__name__], studies)
    for module in ours:
        cloudpickle.register_pickle_by_value(module)  # workers need not find the tests
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "trainable", trainable)
        patch.setattr(execution, "close_study", lambda *anything: None)  # figures take seconds
        try:
            with storage.only_driver(config.study_name) as lock:
                console = Console(file=sys.stdout, width=300)
                return execute(config, Space(config), storage, dataset, console, lock, address=nodes.address)
        finally:
            for module in ours:
                cloudpickle.unregister_pickle_by_value(module)


def append(file: Path, row: dict[str, Any]) -> None:
    """Add a line whole, whoever else does."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(descriptor, json.dumps(row).encode() + b"\n")
    finally:
        os.close(descriptor)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# ---- (a) what is held ----------------------------------------------------------------------------------------------


def counting(task: TrialTask, dataset: Dataset, *, device: torch.device, reports: Reports) -> TrialResult:
    """In the place of a trial: writes down where it runs and when; the first one with a teacher lacks memory."""
    log, here = task.places.folder.parents[1] / "uses.jsonl", ray.get_runtime_context()
    use = {"node": here.get_node_id(), "memory": here.get_assigned_resources().get("memory", 0), "key": task.key}
    append(log, use | {"change": 1})
    reports.advanced("student", 1, 2)
    deadline = time.monotonic() + 60
    while most_at_once(rows_of(log), lambda row: "all")["all"] < 3 and time.monotonic() < deadline:
        time.sleep(0.2)  # workers start one after the other: the first ones wait for company
    time.sleep(0.5)
    append(log, use | {"change": -1})
    if task.recipe.needs_teacher:
        with suppress(FileExistsError):  # another one was the first
            (task.places.folder.parents[1] / "lacking").touch(exist_ok=False)
            raise MemoryError("this trial is too large for its share")
    return result(0.5, 0.5)


def most_at_once(rows: list[dict[str, Any]], of: Callable[[dict[str, Any]], Any]) -> Counter[Any]:
    """The oracle: how many of each kind ran at the same time at most."""
    now, most = Counter[Any](), Counter[Any]()
    for row in rows:
        now[of(row)] += row["change"]
        most[of(row)] = max(most[of(row)], now[of(row)])
    return most


def test_the_oracle_counts_what_overlaps() -> None:
    rows = [{"node": "a", "change": 1}, {"node": "a", "change": 1}, {"node": "b", "change": 1}]
    rows += [{"node": "a", "change": -1}, {"node": "a", "change": -1}, {"node": "a", "change": 1}]
    assert most_at_once(rows, lambda row: row["node"]) == {"a": 2, "b": 1}


@pytest.mark.slow
def test_nodes_are_never_over_subscribed_and_a_lack_of_memory_halves_a_class(nodes: Cluster, tmp_path: Path) -> None:
    """Fractions of CPUs and of a resource of the user's own, on nodes of two sizes.

    The large node holds three trials at once and the small one two. Trials with a teacher reserve memory once one of
    them lacked it: twice what a third of the large node is, so that no two of them run at once.
    """
    config = config_of(
        tmp_path,
        budget__trials=10,
        search__points=[],
        resources={"cpu": 0.5, "custom": {"slice": 0.3}},
        tracking__enabled=False,
    )
    images = ImageSet(torch.zeros((2, 1, 8, 8), dtype=torch.uint8), torch.tensor([0, 1]))
    dataset = Dataset("noise", images, images, 2, (0.0,), (1.0,), False, 0, FINGERPRINT)
    storage = Storage.of(config, str(tmp_path / "storage"))
    large = {"num_cpus": 4, "memory": MEMORY, "resources": {"slice": 1}}
    small = {"num_cpus": 1, "memory": MEMORY // 8, "resources": {"slice": 1}}
    with with_nodes(nodes, large, small) as (of_three, of_two):
        outcome = run(nodes, config, storage, dataset, counting)
    assert outcome.stop_reason is None
    assert Counter(trial.state for trial in outcome.record.trials) == {"COMPLETE": 10}
    rows = rows_of(storage.study_folder("tiny") / "uses.jsonl")
    assert len(rows) == 2 * 11
    most = most_at_once(rows, lambda row: row["node"])
    assert most[of_three.node_id] <= 3
    assert most[of_two.node_id] <= 2
    assert set(most) <= {of_three.node_id, of_two.node_id}
    assert most_at_once(rows, lambda row: "all")["all"] > 2  # else nothing was tried
    (lacking,) = (trial for trial in outcome.record.trials if trial.deaths)
    assert [death.reason for death in lacking.deaths] == [
        f"{OUT_OF_MEMORY}: this trial is too large for its share",
    ]
    (raised,) = stored_shares(storage).values()
    assert raised["memory_gb"] == pytest.approx(2 * MEMORY / 3 / 2**30)
    # Of those that reserve as much, which were suggested after that, only one ran at a time.
    later = [row for row in rows if row["memory"]]
    assert [row["memory"] for row in later] == pytest.approx([2 * MEMORY / 3] * len(later), rel=0.01)
    assert lacking.key in {row["key"] for row in later}
    assert most_at_once(later, lambda row: "large")["large"] == 1
    assert {row["node"] for row in later} == {of_three.node_id}  # the small one has not as much


def stored_shares(storage: Storage) -> dict[str, Any]:
    return dict(optuna.load_study(study_name="tiny", storage=storage.study_url).user_attrs["shares"])


def enduring(task: TrialTask, dataset: Dataset, *, device: torch.device, reports: Reports) -> TrialResult:
    """In the place of a trial: one that is never over."""
    for epoch in range(1000):
        reports.advanced("student", epoch + 1, 1000)
        time.sleep(0.1)
    return result(0.5, 0.5)


@pytest.mark.slow
def test_workers_that_ray_ends_for_want_of_memory_end_their_trials_and_not_tune(
    nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a node that counts as full from 1 % of its memory on. The first trial gets nearly all; more there is not."""
    config = config_of(
        tmp_path, search__points=[], tracking__enabled=False, student__loss={"kind": "cc_ibp", "alpha": 0.5}
    )
    images = ImageSet(torch.zeros((2, 1, 8, 8), dtype=torch.uint8), torch.tensor([0, 1]))
    dataset = Dataset("noise", images, images, 2, (0.0,), (1.0,), False, 0, FINGERPRINT)
    storage = Storage.of(config, str(tmp_path / "storage"))
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    monkeypatch.setattr(execution, "check_nodes", lambda *anything: None)  # it would be ended, too
    with with_nodes(nodes, {"num_cpus": 2, "memory": MEMORY}):
        outcome = run(nodes, config, storage, dataset, enduring)
    why = f"{KILLED_FOR_MEMORY}; it had nearly all the memory of a node"
    assert outcome.stop_reason == f"3 trials in a row failed for the same reason: {why}"
    failed = [trial for trial in outcome.record.trials if trial.state == "FAILED"]
    assert {trial.reason for trial in failed} == {why}
    assert {death.reason for trial in failed for death in trial.deaths} == {KILLED_FOR_MEMORY}
    assert [share["memory_gb"] for share in stored_shares(storage).values()] == [pytest.approx(0.9 * MEMORY / 2**30)]


# ---- (b) a node that goes ------------------------------------------------------------------------------------------


def slow_student(*arguments: Any, on_epoch: Callable[[EpochReport], Any], **options: Any) -> TrainingResult:
    """A training that leaves time to take its node away; each epoch costs at least a third of a second."""

    def after(report: EpochReport) -> None:
        on_epoch(report)
        time.sleep(0.35)

    return train_student(*arguments, on_epoch=after, **options)


def slow(task: TrialTask, dataset: Dataset, *, device: torch.device, reports: Reports) -> TrialResult:
    """The real trial, which tells where it runs."""
    task.places.folder.mkdir(parents=True, exist_ok=True)
    append(task.places.folder / "nodes.jsonl", {"node": ray.get_runtime_context().get_node_id()})
    return trial.run_trial(task, dataset, device=device, reports=reports, train_student_fn=slow_student)


def epochs(places: TrialPlaces) -> list[int]:
    """The epochs of the student as they were computed, those that were computed twice included."""
    if not places.journal.exists():
        return []
    rows = (line.row for line in read_rows(places.journal)[0])
    return [row.step for row in rows if isinstance(row, MetricsRow) and "student/loss" in row.values]


class Fate(threading.Thread):
    """Waits until a trial is in the middle of its training, then does something to its node."""

    def __init__(self, nodes: list[Any], artifacts: Path, act: Callable[[Any], None]) -> None:
        super().__init__(daemon=True)
        self._nodes, self._artifacts, self._act = {node.node_id: node for node in nodes}, artifacts, act
        self.key, self.epoch, self.failure = "", 0, ""

    def run(self) -> None:
        deadline = time.monotonic() + LONGEST_WAIT_S
        while time.monotonic() < deadline:
            for folder in (self._artifacts / "tiny" / "trials").glob("tiny-*"):
                done = epochs(TrialPlaces.of(self._artifacts, "tiny", folder.name))
                if len(done) >= 3 and len(done) < EPOCHS - 4:
                    self.key, self.epoch = folder.name, done[-1]
                    self._act(self._nodes[rows_of(folder / "nodes.jsonl")[-1]["node"]])
                    return
            time.sleep(0.05)
        self.failure = "no trial was in the middle"


def search_with_a_fate(nodes: Cluster, folder: Path, act: Callable[[Any], None]) -> tuple[Outcome, Fate, Storage]:
    """Three real trials on two nodes of one CPU each, one of which goes."""
    config = config_of(
        folder,
        budget__trials=3,
        search__points=[],
        student__epochs=EPOCHS,
        student__loss={"kind": "cc_ibp", "alpha": {"low": 0.1, "high": 0.9}},
        data__train_images=128,
        data__validation_images=16,
        stopping=False,
        tracking__enabled=False,
    )
    storage = Storage.of(config, str(folder / "storage"))
    with with_nodes(nodes, {"num_cpus": 1}, {"num_cpus": 1}) as added:
        fate = Fate(added, storage.artifacts, act)
        fate.start()
        outcome = run(nodes, config, storage, load_dataset(config.data), slow)
        fate.join(1)
    assert fate.failure == ""
    return outcome, fate, storage


def check_account(outcome: Outcome, fate: Fate, storage: Storage, reason: str, most_lost_s: float) -> None:
    """One attempt was lost, of the right trial; its work went on where it was; nothing else happened."""
    assert outcome.stop_reason is None
    assert Counter(trial.state for trial in outcome.record.trials) == {"COMPLETE": 3}
    deaths = {trial.key: trial.deaths for trial in outcome.record.trials if trial.deaths}
    assert list(deaths) == [fate.key]
    (death,) = deaths[fate.key]
    assert (death.reason, death.attempt) == (reason, 1)
    assert 0 <= death.lost_seconds < most_lost_s
    ran = defaultdict(list)
    for each in outcome.record.trials:
        places = TrialPlaces.of(storage.artifacts, "tiny", each.key)
        ran[each.key] = epochs(places)
        # At most the row of the epoch at which it was cut off is missing, and none is there twice.
        assert ran[each.key] == sorted(set(ran[each.key]))
        assert len(ran[each.key]) >= EPOCHS - (1 if each.key == fate.key else 0)
        assert len({row["node"] for row in rows_of(places.folder / "nodes.jsonl")}) == (
            2 if each.key == fate.key else 1
        )
    assert ran[fate.key].index(fate.epoch) >= 2


@pytest.mark.slow
def test_a_trial_whose_node_is_lost_goes_on_from_its_last_state_on_another(nodes: Cluster, tmp_path: Path) -> None:
    lose = functools.partial(nodes.remove_node, allow_graceful=False)
    outcome, fate, storage = search_with_a_fate(nodes, tmp_path, lose)
    check_account(outcome, fate, storage, NODE_LOST, most_lost_s=30)


@pytest.mark.slow
def test_a_trial_leaves_a_node_that_has_notice_before_it_goes(
    nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a cloud that takes a spot node back in two minutes: the trial does not wait for that."""
    monkeypatch.setattr("search.clusters.nodes.LOOK_S", 0.2)  # these trials are over in the time between two looks

    def give_notice(node: Any) -> None:
        client = ray._raylet.GcsClient(address=nodes.address)
        preemption = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, _ = client.drain_node(node.node_id, preemption, "spot", int(1000 * (time.time() + 120)))
        assert accepted

    outcome, fate, storage = search_with_a_fate(nodes, tmp_path, give_notice)
    check_account(outcome, fate, storage, NODE_PREEMPTED, most_lost_s=5)
