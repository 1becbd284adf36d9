"""The driver at work: Ray Tune runs trials until the study has enough of them.

Apart from `search.run` because importing Ray takes seconds that a finished study need not pay.
"""

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray import tune
from rich.console import Console

from ccdist.data import Dataset
from search.asking import Asker
from search.bookkeeping import close_study, tracked, where_to_look
from search.budget import Budget
from search.cluster import Cluster, connected
from search.config import SearchConfig
from search.driver_lock import DriverLock
from search.front_log import FrontLog
from search.listeners import Listeners
from search.progress import Progress
from search.records import StudyRecord
from search.redrawing import Redrawing
from search.scheduler import StudyScheduler
from search.searcher import StudySearcher
from search.space import Space
from search.storage import Storage
from search.study import Assignment, Study
from search.study_files import draw
from search.teachers import TeacherStore, teacher_key
from search.trial_files import TrialFiles
from search.waiting import TeacherQueue
from search.worker import SharedDataset, trainable
from tracking.journal import STUDY_JOURNAL
from tracking.tracker import Status

# Nodes and workers die for reasons that are not the trial's; a trial that kills its worker does it again.
WORKER_DEATHS = 3


@dataclass(frozen=True)
class Outcome:
    """How a search ended: the study as it is now, why it gave up or ended early, and where to look at it."""

    record: StudyRecord
    stop_reason: str | None  # it cannot go on
    budget_reason: str | None  # a limit other than the number of trials was reached
    where: str | None


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
) -> Outcome:
    """Run trials until the study is complete, gives up, or Ctrl-C.

    Args:
        lock: this driver's; should it be lost, the search ends.
        study_type: decides which trials are asked for.
        close: writes what the study leaves behind, and its last word; None: as for a search.

    Raises:
        UserError: the cluster or the stored study does not fit; nothing was started.
    """
    shared = SharedDataset.of(dataset)
    with connected(config.resources, shared.num_bytes) as cluster:
        study = study_type.open(config, space, storage.study_url, dataset.fingerprint)
        storage.claim(config.study_name, study.identifier)
        before = study.record()
        console.print(
            f"study {before.name}: {config.data.name}, threat {config.threat}, {len(before.done)} of "
            f"{config.budget.trials} trials done, {cluster.slots} at once on {cluster.description}",
            highlight=False,
            soft_wrap=True,
        )
        with tracked(config, storage, live_keys={trial.key for trial in before.unfinished}) as tracker:
            try:
                searcher = _fit(study, storage, cluster, shared, console, before, dataset.fingerprint, lock)
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
    if lock.still_held():
        (close or close_study)(record, storage, status)


def _fit(
    study: Study,
    storage: Storage,
    cluster: Cluster,
    shared: SharedDataset,
    console: Console,
    before: StudyRecord,
    fingerprint: str,
    lock: DriverLock,
) -> StudySearcher:
    """Run Ray Tune until the searcher has nothing more to suggest, or Ctrl-C."""
    config = study.config
    results = {trial.key: trial.objectives for trial in before.complete if trial.objectives is not None}
    num_stopped = len(before.done) - len(before.complete)
    # Of a confirmation's trials none is on a front: their means are.
    progress = Progress(
        console,
        config.budget.trials,
        before.reference,
        results,
        num_stopped=num_stopped,
        shows_front=config.kind == "study",
    )
    journal = storage.journals(config.study_name) / STUDY_JOURNAL
    redrawing = Redrawing(lambda record: draw(record, storage.study_folder(record.name)))
    front_log = FrontLog(journal, study, redrawing, lock.still_held)
    scheduler = StudyScheduler(study)
    searcher = StudySearcher(
        study,
        Budget(config.budget, config.resources, study.trials),
        cluster.slots,
        TrialFiles(storage.artifacts, config.study_name),
        Listeners([progress, front_log]),
        scheduler,
        Asker.of(config.search.sampler.kind),
        TeacherQueue(partial(_teacher_of, study, fingerprint), TeacherStore.of(storage.teachers)),
        lock.still_held,
    )
    # With a searcher of one's own Tune starts one worker after the other unless told otherwise.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(cluster.slots)
    bound = tune.with_parameters(
        trainable,
        study=config.study_name,
        artifacts=str(storage.artifacts),
        shared=shared,
        resources=config.resources,
        stopping=config.stopping,
        exports=config.tracking.enabled and config.tracking.models,
    )
    with tempfile.TemporaryDirectory(prefix="ccdist-tune-") as scratch, progress, front_log, _quick_collections():
        # Tune's own files are scratch: the study is the truth, and nothing is ever restored from them.
        tuner = tune.Tuner(
            tune.with_resources(bound, {"cpu": config.resources.cpu, "gpu": config.resources.gpu}),
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
                # A worker that died is replaced and goes on from its trial's last epoch, before the trial fails.
                failure_config=tune.FailureConfig(max_failures=WORKER_DEATHS),
            ),
        )
        tuner.fit()
    if scheduler.error is not None:
        console.print(f"warning: {scheduler.error}", highlight=False, markup=False, soft_wrap=True)
    return searcher


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
