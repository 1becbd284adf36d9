"""python -m search.run SPACE: run a search, or go on with it.

Exit codes: 0 the study has all its trials; 2 something asked for is wrong, nothing was started; 3 trials keep
failing; 130 stopped by Ctrl-C.
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console

from ccdist.checkpoint import CorruptCheckpointError
from ccdist.data import Dataset, load_dataset
from search.bookkeeping import close_study, note_failure, tracked, unsent_rows
from search.cluster import Cluster, ResourcesError, connected
from search.config import SearchConfig, SpaceFileError, find_space_file, load_search_config
from search.locks import LockedError, exclusive
from search.progress import Progress
from search.records import StudyRecord, TrialResult
from search.report import front_table
from search.searcher import StudySearcher
from search.space import Space
from search.storage import DEFAULT_STORAGE, Storage, StorageError
from search.study import Study, StudyError, stored_record
from search.trial import TrialPlaces, load_result
from search.worker import SharedDataset, trainable
from tracking.tracker import Status

OK, BAD_INPUT, FAILING, INTERRUPTED = 0, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    console = Console()
    try:
        config = load_search_config(find_space_file(args.space), args.set)
        if args.trials is not None:
            config = load_search_config(find_space_file(args.space), [*args.set, f"budget.trials={args.trials}"])
        return run(config, Space(config), Storage.of(config, args.storage), console, _command(args))
    except (
        SpaceFileError,
        StorageError,
        StudyError,
        ResourcesError,
        LockedError,
        CorruptCheckpointError,
        _DataError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def run(config: SearchConfig, space: Space, storage: Storage, console: Console, command: str) -> int:
    """Bring the study to its number of trials.

    Raises:
        StorageError, StudyError, ResourcesError, LockedError, CorruptCheckpointError: nothing was started.
    """
    storage.prepare()
    with _only_driver(config, storage):
        record = stored_record(config, storage.study_url)
        if _is_done(record, config) and record is not None and unsent_rows(config, storage) == 0:
            console.print(f"study {record.name} has its {len(record.complete)} trials already")
            _show(record, storage, console)
            return OK
        if record is not None:
            storage.check_unfinished(record.name, _unfinished(record))
        dataset = _load(config)
        shared = SharedDataset.of(dataset)
        with connected(config.resources, shared.num_bytes) as cluster:
            study = Study.open(config, space, storage.study_url, dataset.fingerprint)
            return _search(study, storage, cluster, shared, console, command)


def _search(
    study: Study, storage: Storage, cluster: Cluster, shared: SharedDataset, console: Console, command: str
) -> int:
    config, before = study.config, study.record()
    console.print(
        f"study {before.name}: {config.data.name}, threat {config.threat}, {len(before.complete)} of "
        f"{config.budget.trials} trials done, {cluster.slots} at once on {cluster.description}",
        highlight=False,
        soft_wrap=True,
    )
    with tracked(config, storage, set(_unfinished(before))) as tracker:
        searcher = _fit(study, storage, cluster, shared, console, before)
        record = study.record()
        done = len(record.complete) >= config.budget.trials
        status: Status = "FINISHED" if done else "FAILED" if searcher.stop_reason else "KILLED"
        close_study(record, storage, status, set())
        url = tracker.study_url()
    _show(record, storage, console)
    if url:
        console.print(f"MLflow: {url}", soft_wrap=True)
    if searcher.stop_reason is not None:
        print(f"error: {searcher.stop_reason}", file=sys.stderr)
        return FAILING
    if not done:
        console.print(
            f"stopped after {len(record.complete)} of {config.budget.trials} trials; go on with: {command}",
            soft_wrap=True,
            highlight=False,
        )
        return INTERRUPTED
    return OK


def _fit(
    study: Study,
    storage: Storage,
    cluster: Cluster,
    shared: SharedDataset,
    console: Console,
    before: StudyRecord,
) -> StudySearcher:
    """Run Ray Tune until the searcher has nothing more to suggest, or Ctrl-C."""
    from ray import tune

    config, journals = study.config, storage.journals(study.config.study_name)

    def stored_result(key: str) -> TrialResult | None:
        return load_result(TrialPlaces.of(storage.artifacts, config.study_name, key))

    results = {trial.key: trial.objectives for trial in before.complete if trial.objectives is not None}
    progress = Progress(console, config.budget.trials, before.reference, results)
    searcher = StudySearcher(study, config.budget.trials, cluster.slots, stored_result, progress)
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
                failure_config=tune.FailureConfig(max_failures=1),
            ),
        )
        tuner.fit()
    for key, reason in searcher.worker_deaths.items():
        note_failure(journals, key, reason)
    return searcher


def _trial_dirname(trial: Any) -> str:
    return str(trial.trial_id)


class _DataError(ValueError):
    """The data set cannot be used as asked."""


def _load(config: SearchConfig) -> Dataset:
    try:
        return load_dataset(config.data)
    except ValueError as error:
        raise _DataError(str(error)) from error


def _only_driver(config: SearchConfig, storage: Storage) -> AbstractContextManager[None]:
    """One driver for a study: its lock dies with its process."""
    return exclusive(storage.folder / "locks" / f"{config.study_name}.lock", wait=False)


def _is_done(record: StudyRecord | None, config: SearchConfig) -> bool:
    return record is not None and len(record.complete) >= config.budget.trials and not _unfinished(record)


def _unfinished(record: StudyRecord) -> list[str]:
    return [trial.key for trial in record.trials if trial.state == "RUNNING"]


def _show(record: StudyRecord, storage: Storage, console: Console) -> None:
    console.print(front_table(record))
    console.print(f"report: {storage.study_folder(record.name) / 'report.html'}", soft_wrap=True, highlight=False)


def _command(args: argparse.Namespace) -> str:
    words = ["python -m search.run", args.space]
    words += ["--storage", args.storage] if args.storage else []
    words += ["--trials", str(args.trials)] if args.trials is not None else []
    return " ".join([*words, *(f"--set {setting}" for setting in args.set)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m search.run",
        description="Search for networks that trade standard against certified accuracy. "
        "The same command again goes on with the study.",
    )
    parser.add_argument("space", metavar="SPACE", help="a space file, or the name of a shipped one: digits, cifar, ...")
    parser.add_argument(
        "--storage", metavar="DIR", help=f"where study, artefacts and MLflow store go (default: {DEFAULT_STORAGE})"
    )
    parser.add_argument("--trials", metavar="N", type=int, help="finished trials to reach, instead of the file's")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change a value of the space file, for example --set student.epochs=10",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
