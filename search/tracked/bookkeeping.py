"""What the driver tells MLflow: the study itself, through a journal and one sender, like the trials do.

A server that is away costs nothing but lateness: rows stay in the journals, `python -m tracking.replay` sends them.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from optuna.distributions import CategoricalDistribution

from search.artifacts.disk_space import is_of_disk
from search.config import SearchConfig
from search.results.configurations import study_front
from search.results.report import front_trials
from search.space import Space
from search.storage import Storage, StorageError
from search.studies.records import StudyRecord
from search.tracked.redrawing import Artifacts
from search.tracked.run_names import FRONT_PICTURE, REFERENCE, SAMPLER, SPACE, STATE, TRIALS_SHOWN, study_metrics
from search.tracked.study_files import DRAWN, draw, environment_tags, write_settings
from tracking.journal import STUDY_JOURNAL, CloseRow, Journal, StudyRow, end_dead_trials, read_rows, save_study_info
from tracking.sender import Delivery, Sender, why
from tracking.tables import tables_tag
from tracking.tracker import NullTracker, Status, StudyInfo, Tracker

log = logging.getLogger(__name__)

# How long the end of a search waits for the last rows to reach the tracking server.
LAST_ROWS_S = 30.0


def study_info(config: SearchConfig, storage: Storage) -> StudyInfo:
    """The study as MLflow shows it; an experiment holds what may be compared: same data, same threat."""
    threat = f"{config.threat.norm}-{str(config.threat.epsilon).replace('/', '_')}"
    parameters, conditional = _axes(Space(config))
    what = "Search" if config.kind == "study" else "Confirmation"
    return StudyInfo(
        name=config.study_name,
        experiment=f"{config.data.name}-{threat}",
        # How a search goes on may change from command to command, and a param cannot be changed: never among those.
        tags={
            REFERENCE: ", ".join(f"{value:g}" for value in config.search.hypervolume_reference),
            SAMPLER: config.search.sampler.kind,
            SPACE: config.model_dump_json(exclude={"storage", "tracking"}),
        },
        params={"seed": config.search.seed},
        description=(
            f"{what} `{config.study_name}`: standard against certified accuracy on {config.data.name}, "
            f"threat {config.threat}.\n\n![front](artifact:{FRONT_PICTURE})"
        ),
        tracking_uri=storage.tracking_uri or "",
        kind=config.kind,
        split=config.split,
        identifier=storage.identifier(config.study_name),
        parameters=parameters,
        conditional=conditional,
    )


def _axes(space: Space) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the parameters, numbers before choices, and those of them that only some trials have."""
    kinds = {name: each.distribution for name, each in space.parameters.items()}
    choices = [name for name, kind in kinds.items() if isinstance(kind, CategoricalDistribution)]
    names = (*(name for name in space.parameters if name not in choices), *choices)
    in_all_trials = set(space.parameters).intersection(*space.corners())
    return names, tuple(name for name in names if name not in in_all_trials)


def open_tracker(config: SearchConfig, storage: Storage) -> Tracker:
    """The tracking store, opened here in the driver before any worker exists (its first opening makes tables)."""
    if not config.tracking.enabled:
        return NullTracker()
    # Imported here: it takes seconds, and a finished search or one without tracking need not pay them.
    from tracking.mlflow_tracker import MlflowTracker, local_store

    place = (storage.tracking_uri, None) if storage.tracking_uri is not None else local_store(storage.folder)
    try:
        return MlflowTracker(*place)
    except Exception as error:  # a server is not asked yet, so it is a database that cannot be opened
        raise StorageError(
            f"tracking database {place[0]} cannot be opened ({why(error)}); --set tracking.enabled=false does without"
        ) from error


@contextmanager
def tracked(config: SearchConfig, storage: Storage, live_keys: set[str]) -> Iterator[Tracker]:
    """One sender for the time of the search; runs of an earlier driver that nobody resumes are ended."""
    journals = storage.journals(config.study_name)
    save_study_info(journals, study_info(config, storage))
    storage.push_ends(config.study_name, end_dead_trials(journals, live_keys))
    settings = write_settings(config, storage.study_folder(config.study_name))
    with Journal(journals / STUDY_JOURNAL) as journal:
        tags = environment_tags() | tables_tag(TRIALS_SHOWN)
        journal.study({}, {STATE: "RUNNING"} | tags, settings)
    tracker = open_tracker(config, storage)
    sender = Sender(journals, tracker)
    sender.start()
    try:
        yield tracker
    finally:
        sender.stop(LAST_ROWS_S)


def is_settled(config: SearchConfig, storage: Storage) -> bool:
    """Whether tracking has all rows of a study, its end included; nothing to settle when tracking is off."""
    if not config.tracking.enabled:
        return True
    journals = storage.journals(config.study_name)
    own = journals / STUDY_JOURNAL
    rows = read_rows(own)[0] if own.exists() else []
    ended = bool(rows) and isinstance(rows[-1].row, CloseRow)
    last = [line.row.artifacts for line in rows if isinstance(line.row, StudyRow) and STATE in line.row.tags][-1:]
    # Else an earlier version of this program ended it, or they could not be drawn.
    has_all_files = any(files.keys() >= set(DRAWN) for files in last)
    return ended and has_all_files and Delivery(journals, NullTracker()).rows_left() == 0


def where_to_look(tracker: Tracker, storage: Storage) -> str | None:
    """How to see the study in MLflow; None: it is not there."""
    if isinstance(tracker, NullTracker):
        return None
    try:
        url = tracker.front_url()
    except Exception:  # the link is a courtesy, and any server may be away in any way
        url = None
    if storage.tracking_uri is not None and url is not None:
        return f"MLflow: {url}"
    command = f"python -m tracking.ui --storage {storage.folder}"
    return f"MLflow: {command}" if url is None else f"MLflow: {command}\n  shows {url}"


def close_study(record: StudyRecord, storage: Storage, status: Status) -> None:
    """Draw everything once more, end the runs of trials that were cut off, and write the study's last word.

    What a full or absent disk keeps from being written, the next command writes, as `is_settled` sees.
    """
    try:
        _close(record, storage, status)
    except OSError as error:
        if not is_of_disk(error):
            raise
        log.warning("the record of study %s is not complete (%s); the same command completes it", record.name, error)


def _close(record: StudyRecord, storage: Storage, status: Status) -> None:
    journals = storage.journals(record.name)
    artifacts: Artifacts = {}
    try:
        artifacts = draw(record, storage.study_folder(record.name))
    except Exception as error:  # figures must not end a search, whose results are stored
        log.warning("report and figures are not up to date (%s: %s)", type(error).__name__, error)
    storage.push_ends(record.name, end_dead_trials(journals, set()))
    metrics = study_metrics(study_front(record).hypervolume_bounds, Counter(trial.state for trial in record.trials))
    with Journal(journals / STUDY_JOURNAL) as journal:
        journal.study(metrics, {STATE: status}, artifacts, step=len(record.done))
        journal.front([trial.key for trial in front_trials(record)])
        journal.close_study(status)
