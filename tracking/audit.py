"""What a tracker's copy of a study says, and what is wrong with a journal: for those who compare and repair.

Nothing here imports MLflow before it is asked for runs.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tracking.journal import read_line
from tracking.mlflow_tracker import open_client
from tracking.sender import sent_path
from tracking.tracker import KIND_TRIAL, TAG_KIND, TAG_STUDY, TAG_TRIAL, StudyInfo

_PAGE = 1000


@dataclass(frozen=True)
class RunSummary:
    """A run of a study: its own (key is None) or a trial's. metrics: the last value of each."""

    run_id: str
    key: str | None
    status: str
    started_ms: int
    metrics: dict[str, float] = field(default_factory=dict)


def study_runs(uri: str, study: StudyInfo) -> list[RunSummary]:
    """All runs of a study in MLflow that are not deleted; none where its experiment does not exist.

    Raises:
        Exception: whatever MLflow raises when the server or database cannot be read.
    """
    client = open_client(uri)
    experiment = client.get_experiment_by_name(study.experiment)
    if experiment is None or experiment.lifecycle_stage == "deleted":
        return []
    runs: list[RunSummary] = []
    token: str | None = None
    query = f"tags.`{TAG_STUDY}` = '{study.name}'"
    while True:
        page = client.search_runs([experiment.experiment_id], query, max_results=_PAGE, page_token=token)
        for run in page:
            tags, info = run.data.tags, run.info
            key = tags.get(TAG_TRIAL, "") if tags.get(TAG_KIND) == KIND_TRIAL else None
            runs.append(RunSummary(info.run_id, key, info.status, info.start_time, dict(run.data.metrics)))
        token = page.token
        if not token:
            return runs


def delete_runs(uri: str, run_ids: Iterable[str]) -> None:
    """Mark runs as deleted; MLflow can restore them."""
    client = open_client(uri)
    for run_id in run_ids:
        client.delete_run(run_id)


@dataclass(frozen=True)
class JournalDamage:
    """Offsets of complete lines that are no rows, and the bytes after the last line break."""

    lines: tuple[int, ...]
    torn: int


def journal_damage(path: Path) -> JournalDamage:
    """What of a journal cannot be sent."""
    _, bad, torn = _parts(path)
    return JournalDamage(tuple(offset for offset, _ in bad), len(torn))


def mend_journal(path: Path) -> None:
    """Take what is no row out of a journal that nobody writes; it is kept in `NAME.jsonl.damaged`.

    The offset of what was sent is forgotten: sending the rest again changes nothing.
    """
    good, bad, torn = _parts(path)
    if not bad and not torn:
        return
    with path.with_name(f"{path.name}.damaged").open("ab") as kept:
        kept.write(b"".join(line for _, line in bad) + (torn + b"\n" if torn else b""))
        os.fsync(kept.fileno())
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(b"".join(good))
    sent_path(path).unlink(missing_ok=True)
    os.replace(unfinished, path)


def _parts(path: Path) -> tuple[list[bytes], list[tuple[int, bytes]], bytes]:
    """Good lines, bad lines with their offsets, and the unfinished last line."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    good: list[bytes] = []
    bad: list[tuple[int, bytes]] = []
    offset = 0
    for line in data[:end].splitlines(keepends=True):
        if read_line(line) is None:
            bad.append((offset, line))
        else:
            good.append(line)
        offset += len(line)
    return good, bad, data[end:]
