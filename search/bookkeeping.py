"""What the driver tells MLflow: the study itself, through a journal and one sender, like the trials do.

A server that is away costs nothing but lateness: rows stay in the journals, `python -m tracking.replay` sends them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from search.config import SearchConfig
from search.figures import PLOTLY_CONFIG, front_figure, save_front_png
from search.page import write_report
from search.records import StudyRecord
from search.report import study_hypervolume
from search.storage import Storage
from tracking.journal import STUDY_JOURNAL, CloseRow, Journal, end_dead_trials, read_rows, save_study_info
from tracking.sender import Delivery, Sender
from tracking.tracker import NullTracker, Status, StudyInfo, Tracker

# How long the end of a search waits for the last rows to reach the tracking server.
LAST_ROWS_S = 30.0


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
        # Never the budget: a study may be continued with another one, and a param cannot be changed.
        params={"seed": config.search.seed, "sampler": config.search.sampler.kind},
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
    with Journal(journals / STUDY_JOURNAL) as journal:
        journal.study({}, {"cert.state": "RUNNING"}, {})
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
    return ended and Delivery(journals, NullTracker()).rows_left() == 0


def where_to_look(tracker: Tracker, storage: Storage) -> str | None:
    """How to see the study in MLflow; None: it is not there."""
    if isinstance(tracker, NullTracker):
        return None
    try:
        url = tracker.study_url()
    except Exception:  # the link is a courtesy, and any server may be away in any way
        url = None
    if url is not None:
        return f"MLflow: {url}"
    return f"MLflow: python -m tracking.ui --storage {storage.folder}"


def close_study(record: StudyRecord, storage: Storage, status: Status) -> None:
    """Write the report, end the runs of trials that were cut off, and write the study's last word."""
    folder, journals = storage.study_folder(record.name), storage.journals(record.name)
    report, png, figure = folder / "report.html", folder / "front.png", folder / "front.html"
    write_report(record, report)
    save_front_png(record, png)
    front_figure(record).write_html(figure, include_plotlyjs=True, config=PLOTLY_CONFIG)
    end_dead_trials(journals, set())
    with Journal(journals / STUDY_JOURNAL) as journal:
        metrics = {"hypervolume": study_hypervolume(record), "num_complete": float(len(record.complete))}
        artifacts = {"front.html": figure, "front.png": png, "report.html": report}
        journal.study(metrics, {"cert.state": status}, artifacts, step=len(record.complete))
        journal.close_study(status)


def note_failure(journals: Path, key: str, reason: str) -> None:
    """End the MLflow run of a trial whose worker cannot do it any more."""
    path = journals / f"{key}.jsonl"
    if path.exists():
        with Journal(path) as journal:
            journal.end("FAILED", {}, {"cert.state": "FAILED", "cert.reason": reason})
