"""What the driver tells MLflow: the study itself, through a journal and one sender, like the trials do.

A server that is away costs nothing but lateness: rows stay in the journals, `python -m tracking.replay` sends them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from search.config import SearchConfig
from search.records import StudyRecord
from search.report import PLOTLY_CONFIG, front_figure, save_front_png, study_hypervolume, write_report
from search.storage import Storage
from tracking.journal import STUDY_JOURNAL, Journal, end_dead_trials, save_study_info
from tracking.sender import Delivery, Sender
from tracking.tracker import NullTracker, Status, StudyInfo, Tracker

# How long the end of a search waits for the last rows to reach the tracking server.
LAST_ROWS_S = 60.0


def study_info(config: SearchConfig, storage: Storage) -> StudyInfo:
    """The study as MLflow shows it; an experiment holds what may be compared: same data, same threat."""
    threat = f"{config.threat.norm}-{str(config.threat.epsilon).replace('/', '_')}"
    return StudyInfo(
        name=config.study_name,
        experiment=f"{config.data.name}-{threat}",
        tags={
            "cert.reference": ", ".join(f"{value:g}" for value in config.search.hypervolume_reference),
            "cert.space": config.model_dump_json(exclude={"storage", "tracking"}),
        },
        params={"seed": config.search.seed, "sampler": config.search.sampler.kind, "trials": config.budget.trials},
        description=(
            f"Search `{config.study_name}`: standard against certified accuracy on {config.data.name}, "
            f"threat {config.threat}.\n\n![front](artifact:front.png)"
        ),
        tracking_uri=storage.tracking_uri or "",
    )


def open_tracker(config: SearchConfig, storage: Storage) -> Tracker:
    """The tracking store, opened here in the driver before any worker exists (its first opening makes tables)."""
    if not config.tracking.enabled:
        return NullTracker()
    # Imported here: it takes seconds, and a finished search or one without tracking need not pay them.
    from tracking.mlflow_tracker import MlflowTracker, local_store

    if storage.tracking_uri is not None:
        return MlflowTracker(storage.tracking_uri, None)
    return MlflowTracker(*local_store(storage.folder))


@contextmanager
def tracked(config: SearchConfig, storage: Storage, live_keys: set[str]) -> Iterator[Tracker]:
    """One sender for the time of the search; runs of an earlier driver that nobody resumes are ended."""
    journals = storage.journals(config.study_name)
    save_study_info(journals, study_info(config, storage))
    end_dead_trials(journals, live_keys)
    tracker = open_tracker(config, storage)
    sender = Sender(journals, tracker)
    sender.start()
    try:
        yield tracker
    finally:
        sender.stop(LAST_ROWS_S)


def unsent_rows(config: SearchConfig, storage: Storage) -> int:
    """Rows that tracking has not received; 0 when tracking is off."""
    if not config.tracking.enabled:
        return 0
    return Delivery(storage.journals(config.study_name), NullTracker()).rows_left()


def close_study(record: StudyRecord, storage: Storage, status: Status, live_keys: set[str]) -> Path:
    """Write the report, and the study's last word into its journal.

    Args:
        live_keys: trials that will be resumed later; all others without an end are ended.

    Returns:
        The report's path.
    """
    folder, journals = storage.study_folder(record.name), storage.journals(record.name)
    report, png, figure = folder / "report.html", folder / "front.png", folder / "front.html"
    write_report(record, report)
    save_front_png(record, png)
    front_figure(record).write_html(figure, include_plotlyjs=True, config=PLOTLY_CONFIG)
    end_dead_trials(journals, live_keys)
    with Journal(journals / STUDY_JOURNAL) as journal:
        metrics = {"hypervolume": study_hypervolume(record), "num_complete": float(len(record.complete))}
        artifacts = {"front.html": figure, "front.png": png, "report.html": report}
        journal.study(metrics, {"cert.state": status}, artifacts, step=len(record.complete))
        journal.close_study(status)
    return report


def note_failure(journals: Path, key: str, reason: str) -> None:
    """End the MLflow run of a trial whose worker cannot do it any more."""
    path = journals / f"{key}.jsonl"
    if path.exists():
        with Journal(path) as journal:
            journal.end("FAILED", {}, {"cert.state": "FAILED", "cert.reason": reason})
