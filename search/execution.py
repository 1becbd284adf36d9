"""The driver at work: Ray Tune runs trials until the study has enough of them.

Apart from `search.run` because importing Ray takes seconds that a finished study need not pay.
"""

import os
import tempfile
from dataclasses import dataclass
from typing import Any

from ray import tune
from rich.console import Console

from ccdist.data import Dataset
from search.bookkeeping import close_study, note_failure, tracked, where_to_look
from search.cluster import Cluster, connected
from search.config import SearchConfig
from search.progress import Progress
from search.records import StudyRecord, TrialResult
from search.searcher import StudySearcher
from search.space import Space
from search.storage import Storage
from search.study import Study
from search.trial import TrialPlaces, load_result
from search.worker import SharedDataset, trainable
from tracking.tracker import Status


@dataclass(frozen=True)
class Outcome:
    """How a search ended: the study as it is now, why it gave up if it did, and where to look at it."""

    record: StudyRecord
    stop_reason: str | None
    where: str


def execute(config: SearchConfig, space: Space, storage: Storage, dataset: Dataset, console: Console) -> Outcome:
    """Run trials until the study is complete, gives up, or Ctrl-C.

    Raises:
        UserError: the cluster or the stored study does not fit; nothing was started.
    """
    shared = SharedDataset.of(dataset)
    with connected(config.resources, shared.num_bytes) as cluster:
        study = Study.open(config, space, storage.study_url, dataset.fingerprint)
        storage.claim(config.study_name, study.identifier)
        before = study.record()
        console.print(
            f"study {before.name}: {config.data.name}, threat {config.threat}, {len(before.complete)} of "
            f"{config.budget.trials} trials done, {cluster.slots} at once on {cluster.description}",
            highlight=False,
            soft_wrap=True,
        )
        with tracked(config, storage, live_keys={trial.key for trial in before.unfinished}) as tracker:
            try:
                searcher = _fit(study, storage, cluster, shared, console, before)
            except BaseException:
                close_study(study.record(), storage, "KILLED")
                raise
            record = study.record()
            done = len(record.complete) >= config.budget.trials
            status: Status = "FINISHED" if done else "FAILED" if searcher.stop_reason else "KILLED"
            close_study(record, storage, status)
            return Outcome(record, searcher.stop_reason, where_to_look(tracker, storage))


def _fit(
    study: Study,
    storage: Storage,
    cluster: Cluster,
    shared: SharedDataset,
    console: Console,
    before: StudyRecord,
) -> StudySearcher:
    """Run Ray Tune until the searcher has nothing more to suggest, or Ctrl-C."""
    config = study.config

    def stored_result(key: str) -> TrialResult | None:
        return load_result(TrialPlaces.of(storage.artifacts, config.study_name, key))

    results = {trial.key: trial.objectives for trial in before.complete if trial.objectives is not None}
    progress = Progress(console, config.budget.trials, before.reference, results)
    searcher = StudySearcher(study, config.budget.trials, cluster.slots, stored_result, progress)
    # With a searcher of one's own Tune starts one worker after the other unless told otherwise.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(cluster.slots)
    bound = tune.with_parameters(
        trainable,
        study=config.study_name,
        artifacts=str(storage.artifacts),
        shared=shared,
        resources=config.resources,
    )
    with tempfile.TemporaryDirectory(prefix="ccdist-tune-") as scratch, progress:
        # Tune's own files are scratch: the study is the truth, and nothing is ever restored from them.
        tuner = tune.Tuner(
            tune.with_resources(bound, {"cpu": config.resources.cpu, "gpu": config.resources.gpu}),
            tune_config=tune.TuneConfig(
                search_alg=searcher, num_samples=-1, reuse_actors=True, trial_dirname_creator=_trial_dirname
            ),
            run_config=tune.RunConfig(
                name=config.study_name,
                storage_path=scratch,
                verbose=0,
                # A worker that died is tried once more, from its trial's last epoch, before the trial counts as failed.
                failure_config=tune.FailureConfig(max_failures=1),
            ),
        )
        tuner.fit()
    for key, reason in searcher.silent_failures.items():
        note_failure(storage.journals(config.study_name), key, reason)
    return searcher


def _trial_dirname(trial: Any) -> str:
    """Tune would spell the whole configuration into a folder's name."""
    return str(trial.trial_id)
