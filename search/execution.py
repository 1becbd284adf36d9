"""The driver at work: Ray Tune runs trials until the study has enough of them.

Apart from `search.run` because importing Ray takes seconds that a finished study need not pay.
"""

import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray import tune
from rich.console import Console

from ccdist.data import Dataset
from search.artifacts.trial_files import TrialFiles
from search.attempts.ray_deaths import watched
from search.attempts.shares import Share
from search.attempts.starts import Starts
from search.clusters.cluster import Cluster, connected
from search.clusters.local_ray import keys_stay_here
from search.clusters.nodes import Leaving, Roomiest, ids_on
from search.clusters.reach import check_nodes
from search.config import ResourcesConfig, SearchConfig
from search.results.progress import Progress
from search.scheduler import StudyScheduler
from search.scheduling.budget import Budget
from search.scheduling.waiting import TeacherQueue
from search.searcher import StudySearcher
from search.space import Space
from search.storage import Storage
from search.studies.database import DatabaseGoneError
from search.studies.driver_lock import DriverLock
from search.studies.records import StudyRecord
from search.study import Assignment, Study
from search.suggestions.asking import Asker
from search.teachers import TeacherStore, teacher_key
from search.tracked.bookkeeping import close_study, tracked, where_to_look
from search.tracked.front_log import FrontLog
from search.tracked.listeners import Listeners
from search.tracked.redrawing import Redrawing
from search.tracked.study_files import draw
from search.worker import SharedDataset, avoid_of, share_of, trainable
from tracking.journal import STUDY_JOURNAL
from tracking.tracker import Status


@dataclass(frozen=True)
class Outcome:
    """How a search ended: the study as it is now, why it gave up or ended early, and where to look at it."""

    record: StudyRecord
    stop_reason: str | None  # it cannot go on
    budget_reason: str | None  # a limit other than the number of trials was reached
    where: str | None


@dataclass(frozen=True)
class _Driver:
    """What one driver works with.

    lock: its own; should another driver have had it, the search ends.
    before: the study as it was found.
    """

    study: Study
    storage: Storage
    dataset: Dataset
    shared: SharedDataset  # of `dataset`
    cluster: Cluster
    console: Console
    lock: DriverLock
    before: StudyRecord


def execute(
    config: SearchConfig,
    space: Space,
    storage: Storage,
    dataset: Dataset,
    console: Console,
    lock: DriverLock,
    *,
    study_type: type[Study] = Study,
    close: Callable[[StudyRecord, Storage, Status], None] | None = None,
    address: str | None = None,
) -> Outcome:
    """Run trials until the study is complete, gives up, or Ctrl-C.

    Args:
        lock: this driver's; should another driver have had it, the search ends.
        study_type: decides which trials are asked for.
        close: writes what the study leaves behind, and its last word; None: as for a search.
        address: of the cluster, as in search.clusters.addresses; None: RAY_ADDRESS, or this machine.

    Raises:
        UserError: the cluster or the stored study does not fit; nothing was started.
    """
    shared = SharedDataset.of(dataset)
    tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    with connected(config.resources, shared.num_bytes, address, tell) as cluster:
        if cluster.is_shared:
            check_nodes(storage.workers_artifacts)
        study = study_type.open(config, space, storage.study_url, dataset.fingerprint, lock)
        storage.claim(config.study_name, study.identifier)
        study.note_artifacts(str(storage.workers_artifacts))
        before = study.record()
        console.print(
            f"study {before.name}: {config.data.name}, threat {config.threat}, {len(before.done)} of "
            f"{config.budget.trials} trials done, {cluster.slots()} at once on {cluster.description}",
            highlight=False,
            soft_wrap=True,
        )
        with (
            tracked(config, storage, live_keys={trial.key for trial in before.unfinished}) as tracker,
            storage.following(config.study_name),
        ):
            try:
                searcher = _fit(_Driver(study, storage, dataset, shared, cluster, console, lock, before))
            except BaseException:
                _close(study.record(), storage, "KILLED", lock, close)
                raise
            record = study.record()
            ended = len(record.done) >= config.budget.trials or searcher.budget_reason is not None
            status: Status = "FAILED" if searcher.stop_reason else "FINISHED" if ended else "KILLED"
            _close(record, storage, status, lock, close)
            return Outcome(record, searcher.stop_reason, searcher.budget_reason, where_to_look(tracker, storage))


def _close(
    record: StudyRecord,
    storage: Storage,
    status: Status,
    lock: DriverLock,
    close: Callable[[StudyRecord, Storage, Status], None] | None = None,
) -> None:
    """Nothing is said of a study whose lock was lost: its unfinished trials may run under another driver now."""
    try:
        is_ours = lock.still_held()
    except DatabaseGoneError:  # the search has told it
        is_ours = False
    if is_ours:
        storage.pull_trials(record.name)
        (close or close_study)(record, storage, status)


def _fit(driver: _Driver) -> StudySearcher:
    """Run Ray Tune until the searcher has nothing more to suggest, or Ctrl-C."""
    study, storage = driver.study, driver.storage
    with watched() as errors, tempfile.TemporaryDirectory(prefix="ccdist-tune-") as scratch:
        progress, front_log = _shown(driver), _front_log(driver)
        scheduler = StudyScheduler(study, cause=errors.cause, leave=Leaving())
        searcher = StudySearcher(
            study,
            Budget(study.config.budget, study.config.resources, study.trials),
            driver.cluster.slots,
            TrialFiles(storage.artifacts, study.config.study_name, storage.mirror(study.config.study_name)),
            Listeners([progress, front_log]),
            scheduler,
            Asker.of(study.config.search.sampler.kind),
            TeacherQueue(partial(_teacher_of, study, driver.dataset.fingerprint), TeacherStore.of(storage.teachers)),
            driver.lock.still_held,
            Roomiest(study.config.resources),
            partial(ids_on, study.config.resources),
        )
        tuner = _tuner(driver, searcher, scheduler, scratch)
        with progress, front_log, _quick_collections():
            tuner.fit()
    if scheduler.error is not None:
        driver.console.print(f"warning: {scheduler.error}", highlight=False, markup=False, soft_wrap=True)
    return searcher


def _shown(driver: _Driver) -> Progress:
    """The live table."""
    config, before = driver.study.config, driver.before
    results = {trial.key: trial.objectives for trial in before.complete if trial.objectives is not None}
    return Progress(
        driver.console,
        config.budget.trials,
        before.reference,
        results,
        num_stopped=len(before.done) - len(before.complete),
        # Of a confirmation's trials none is on a front: their means are.
        shows_front=config.kind == "study",
    )


def _front_log(driver: _Driver) -> FrontLog:
    """What MLflow is told while the search goes on."""
    study, storage = driver.study, driver.storage
    journal = storage.journals(study.config.study_name) / STUDY_JOURNAL
    redrawing = Redrawing(lambda record: draw(record, storage.study_folder(record.name)))
    return FrontLog(journal, study, redrawing, driver.lock.still_held)


def _tuner(driver: _Driver, searcher: StudySearcher, scheduler: StudyScheduler, scratch: str) -> tune.Tuner:
    """Ray Tune around the searcher. Its own files are scratch: the study is the truth, and nothing is restored."""
    # With a searcher of one's own Tune starts one worker after the other unless told otherwise. How many there are at
    # once is the searcher's to say, since it changes while Tune runs.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(sys.maxsize)
    keys_stay_here()
    config = driver.study.config
    bound = tune.with_parameters(
        trainable,
        workplace=driver.storage.workplace(config.study_name),
        shared=driver.shared,
        resources=config.resources,
        stopping=config.stopping,
        exports=config.tracking.enabled and config.tracking.models,
    )
    return tune.Tuner(
        tune.with_resources(bound, partial(_held, config.resources)),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,
            reuse_actors=True,
            trial_dirname_creator=_trial_dirname,
        ),
        run_config=tune.RunConfig(
            name=config.study_name,
            storage_path=scratch,
            verbose=0,
            # The searcher tries again, and keeps the account.
            failure_config=tune.FailureConfig(max_failures=0),
            callbacks=[Starts(searcher)],
        ),
    )


def _held(resources: ResourcesConfig, config: dict[str, Any]) -> tune.PlacementGroupFactory:
    """What Ray keeps for the trial of a Tune configuration."""
    share, avoid = (share_of(config), avoid_of(config)) if "trial" in config else (None, ())  # Tune asks without, too
    bundle = (share or Share.of(resources)).bundle(resources.custom)
    if not avoid:
        return tune.PlacementGroupFactory([bundle])
    elsewhere = {"ray.io/node-id": f"!in({','.join(avoid)})"}
    return tune.PlacementGroupFactory([bundle], bundle_label_selector=[elsewhere])


@contextmanager
def _quick_collections() -> Iterator[None]:
    """Garbage collection leaves out what is there already: libraries alone keep it busy for a quarter of a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _teacher_of(study: Study, data_fingerprint: str, assignment: Assignment) -> str | None:
    """The key of the teacher that a trial needs."""
    recipe = study.space.recipe(assignment.params, assignment.number)
    return teacher_key(data_fingerprint, recipe.threat, recipe.teacher) if recipe.needs_teacher else None


def _trial_dirname(trial: Any) -> str:
    """Tune would spell the whole configuration into a folder's name."""
    return str(trial.trial_id)
