"""Carries what the journals hold to the tracker, in the background of the driver.

A server that is away delays the carrying and nothing else: rows wait in their journals, and an offset beside
each journal says how far the tracker has accepted it. Sending a row again changes nothing, so a crash between
the two is harmless.
"""

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from tracking.address import without_secrets
from tracking.journal import (
    STUDY_FILE,
    STUDY_JOURNAL,
    ArtifactRow,
    CloseRow,
    EndRow,
    FrontRow,
    Line,
    MetricsRow,
    ModelRow,
    RegisterRow,
    StartRow,
    StudyRow,
    load_study_info,
    read_rows,
    replace_text,
)
from tracking.tracker import NEEDS_A_PERSON, MetricRow, ModelInfo, RefusedError, Tracker

log = logging.getLogger(__name__)

_MAX_DELAY_S = 30.0
# A pass goes on past one journal that fails, but not through all of them when nobody answers.
_MAX_FAILURES_IN_A_ROW = 3
_MAX_VALUES_PER_CALL = 1000
_WHY_LENGTH = 300
# What was said of a trouble: a login that is refused is worth a line of its own after a server that was away.
_OUTAGE, _LOGIN = 1, 2
# A journal to which nothing was added for so long is looked at more seldom: of 100,000 trials most have ended.
_QUIET_S, _LOOK_AGAIN_S = 120.0, 30.0
_LEAVE_S = 0.2  # enough for a thread that is not in the middle of a call


class Delivery:
    """One destination's progress through a folder of journals; no thread of its own.

    Args:
        journals: the folder.
        tracker: the destination.
        resume: whether the study is running again, or only its record is completed.
    """

    def __init__(self, journals: Path, tracker: Tracker, *, resume: bool = True) -> None:
        self.journals = journals
        self._tracker = tracker
        self._resume = resume
        self._is_open = False
        self._offsets: dict[str, int] = {}
        self._failed: set[str] = set()  # journals, when they were last tried; the others come first
        self._quiet: dict[str, float] = {}  # journal -> when it is looked at again

    def send(self) -> None:
        """Send everything there is, in order for each journal.

        Raises:
            Exception: the first that the tracker raised; its row and those after it wait for the next call.
        """
        is_answered = False
        if not self._is_open:
            if (self.journals / STUDY_FILE).exists():
                self._tracker.open_study(load_study_info(self.journals), resume=self._resume)
                is_answered = True
            self._is_open = True
        first_error: Exception | None = None
        failures_in_a_row = 0
        now = time.monotonic()
        for path in self._paths(lambda name: self._quiet.get(name, now) <= now):
            # Trials that fail again and again do not keep a study waiting whose tracker answers otherwise.
            if failures_in_a_row >= _MAX_FAILURES_IN_A_ROW and not (is_answered and path.name == STUDY_JOURNAL):
                continue
            before = self._offset(path)
            try:
                self._send_journal(path)
                failures_in_a_row = 0
                self._failed.discard(path.name)
            except Exception as error:
                first_error = first_error or error
                failures_in_a_row += 1
                self._failed.add(path.name)
            is_answered = is_answered or self._offset(path) > before
        if first_error:
            raise first_error

    def rows_left(self) -> int:
        """The number of complete lines that the tracker has not accepted."""
        left = 0
        for path in self._paths():
            offset = self._offset(path)
            if path.stat().st_size > offset:
                self._quiet.pop(path.name, None)
                with path.open("rb") as file:
                    file.seek(offset)
                    left += file.read().count(b"\n")
        return left

    def _paths(self, wanted: Callable[[str], bool] = lambda name: True) -> list[Path]:
        names = os.listdir(self.journals) if self.journals.exists() else []
        found = [name for name in names if name.endswith(".jsonl") and wanted(name)]
        # The study last: what it says about its trials comes after what they said.
        found.sort(key=lambda name: (name == STUDY_JOURNAL, name in self._failed, name))
        return [self.journals / name for name in found]

    def _offset(self, path: Path) -> int:
        if path.name not in self._offsets:
            self._offsets[path.name] = _read_offset(sent_path(path))
        if self._offsets[path.name] > path.stat().st_size:
            self._offsets[path.name] = 0  # another journal has taken this name: it starts anew
        return self._offsets[path.name]

    def _accepted(self, path: Path, offset: int) -> None:
        replace_text(sent_path(path), str(offset))
        self._offsets[path.name] = offset

    def _send_journal(self, path: Path) -> None:
        offset, status = self._offset(path), path.stat()
        if status.st_size <= offset:
            if time.time() - status.st_mtime > _QUIET_S:
                # Not all at the same moment.
                self._quiet[path.name] = time.monotonic() + _LOOK_AGAIN_S * random.uniform(1, 2)
            return
        lines, end = read_rows(path, offset)
        for group in _groups(lines):
            try:
                self._send_group(path, group)
            except RefusedError as error:
                log.warning("%s: the tracker refused the rows before byte %d: %s", path, group[-1].end, error)
            self._accepted(path, group[-1].end)
        if end > self._offsets[path.name]:
            self._accepted(path, end)

    def _send_group(self, path: Path, group: list[Line]) -> None:
        key, tracker, row = path.stem, self._tracker, group[0].row
        match row:
            case StartRow():
                tracker.start_trial(key, row.params, row.tags, time_ms=row.time_ms)
            case MetricsRow():
                rows = [line.row for line in group if isinstance(line.row, MetricsRow)]
                self._send_metrics(path, [value for each in rows for value in _metric_rows(path, each)])
            case ArtifactRow():
                if file := self._existing(path, row.path):
                    tracker.log_artifact(key, file, row.folder)
            case EndRow():
                self._send_metrics(path, _metric_rows(path, row))
                tracker.end_trial(key, row.status, row.tags, time_ms=row.time_ms)
            case StudyRow():
                files = {name: self._existing(path, target) for name, target in row.artifacts.items()}
                tracker.log_study(
                    {each.name: each.value for each in _metric_rows(path, row)},
                    row.tags,
                    {name: file for name, file in files.items() if file},
                    step=row.step,
                    description=row.description,
                    time_ms=row.time_ms,
                )
            case ModelRow():
                if model := self._model(path, row):
                    tracker.log_model(key, model, time_ms=row.time_ms)
            case FrontRow():
                tracker.mark_front(row.keys)
            case RegisterRow():
                tracker.register(row.name, row.versions, row.aliases, row.description)
            case CloseRow():
                tracker.close_study(row.status, time_ms=row.time_ms)

    def _send_metrics(self, path: Path, rows: list[MetricRow]) -> None:
        if rows:
            self._tracker.log_metrics(path.stem, rows)

    def _model(self, path: Path, row: ModelRow) -> ModelInfo | None:
        """The model of a row; None where its files are gone."""
        program = self._existing(path, row.program)
        files = [self._existing(path, file) for file in row.files]
        if program is None or None in files:
            return None
        return ModelInfo(
            row.name,
            program,
            row.torch_version,
            tuple(file for file in files if file),
            tuple(row.input_shape),
            row.num_outputs,
            row.dataset,
            row.dataset_digest,
            {each.name: each.value for each in _metric_rows(path, row)},
            row.metadata,
        )

    def _existing(self, path: Path, target: str) -> Path | None:
        """What a row names; None where it is gone, or lies elsewhere than the study's other files.

        Whoever can write a journal could have any file of this machine sent otherwise, by its path or through a link.
        """
        study, file = self.journals.resolve().parent, (self.journals / target).resolve()
        if not all(each.resolve().is_relative_to(study) for each in (file, *file.rglob("*"))):
            log.warning("%s: skipped the artifact %s, which leads out of the study's folder %s", path, target, study)
        elif file.exists():
            return file
        else:
            log.warning("%s: skipped the artifact %s, which is not there any more", path, file)
        return None


class Sender:
    """A delivery on its own thread, which never raises into the driver.

    Use it as a context, or call start and stop. On an error of the tracker it says so once, and tries again
    at growing intervals up to 30 seconds.
    """

    def __init__(self, journals: Path, tracker: Tracker, interval_s: float = 1.0) -> None:
        self._delivery = Delivery(journals, tracker)
        self._interval_s = interval_s
        self._delay_s = interval_s
        self._error: Exception | None = None  # of the last pass
        self._told = 0
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._pass_done = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="tracking-sender", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def flush(self, timeout_s: float) -> int:
        """Try to send everything now; returns the number of rows left when that is done or time is up."""
        deadline = time.monotonic() + timeout_s
        while (left := self._rows_left()) and (remaining := deadline - time.monotonic()) > 0:
            with self._pass_done:
                self._wake.set()
                is_done = self._pass_done.wait(min(remaining, self._interval_s))
            if is_done and isinstance(self._error, NEEDS_A_PERSON):
                return left  # waiting does not mend it, and some servers lock a user out who tries too often
        return left

    def stop(self, timeout_s: float) -> int:
        """Flush and end the thread, in about timeout_s at most; returns the number of rows left."""
        deadline = time.monotonic() + timeout_s
        if left := self.flush(timeout_s):
            log.warning("the tracker lacks %d rows; %s", left, self._advice())
        self._stopping.set()
        self._wake.set()
        self._thread.join(max(_LEAVE_S, deadline - time.monotonic()))
        return left

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop(timeout_s=10.0)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._delivery.send()
            except Exception as error:
                # Whatever it was, tracking must not end a search: the rows are kept and tried again.
                self._note_outage(error)
            else:
                self._note_success()
            with self._pass_done:
                self._pass_done.notify_all()
            self._wake.wait(self._delay_s)
            self._wake.clear()

    def _note_outage(self, error: Exception) -> None:
        self._delay_s = min(2 * self._delay_s, _MAX_DELAY_S)
        self._error = error
        if self._stopping.is_set():
            return  # stop() has said already what is missing
        level = _LOGIN if isinstance(error, NEEDS_A_PERSON) else _OUTAGE
        if self._told < level:
            self._told = level
            log.warning(
                "tracking server %s, %d rows waiting; they are kept in %s and sent when it answers; %s%s",
                error if isinstance(error, NEEDS_A_PERSON) else "unreachable",
                self._rows_left(),
                self._delivery.journals,
                self._advice(),
                "" if isinstance(error, NEEDS_A_PERSON) else f" ({why(error)})",
            )

    def _note_success(self) -> None:
        self._delay_s = self._interval_s
        if self._told:
            self._error, self._told = None, 0
            log.info("tracking server answers again; nothing is lost")

    def _rows_left(self) -> int:
        try:
            return self._delivery.rows_left()
        except OSError:
            log.warning("cannot read the journals in %s", self._delivery.journals, exc_info=True)
            return 0

    def _advice(self) -> str:
        study = self._delivery.journals.resolve().parent
        return f"python -m tracking.replay {study.parents[1]} --study {study.name} sends them later"


def forget_sent(journals: Path, name: str = "*") -> None:
    """Forget what was sent, so that it is sent again, for example to another server; `name`: of one journal only."""
    for path in journals.glob(f"{name}.jsonl.sent"):
        path.unlink()


def why(error: Exception) -> str:
    """What went wrong, in one line of bearable length: a server that is none answers with whole pages."""
    text = without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))
    return text if len(text) <= _WHY_LENGTH else f"{text[:_WHY_LENGTH]}..."


def sent_path(path: Path) -> Path:
    """The file that says up to which byte a journal was sent."""
    return path.with_name(path.name + ".sent")


def _read_offset(path: Path) -> int:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0  # never sent, or emptied by a power cut: sending again is harmless


def _groups(lines: list[Line]) -> Iterator[list[Line]]:
    """Metrics that follow each other travel together, every other row alone."""
    group: list[Line] = []
    num_values = 0
    for line in lines:
        if not isinstance(line.row, MetricsRow) or num_values + len(line.row.values) > _MAX_VALUES_PER_CALL:
            if group:
                yield group
            group, num_values = [], 0
        if isinstance(line.row, MetricsRow):
            group.append(line)
            num_values += len(line.row.values)
        else:
            yield [line]
    if group:
        yield group


def _metric_rows(path: Path, row: MetricsRow | ModelRow | EndRow | StudyRow) -> list[MetricRow]:
    rows = []
    step = 0 if isinstance(row, ModelRow) else row.step
    for name, value in row.values.items():
        if value is None:
            log.warning("%s: skipped %s at step %d, which is not a number", path, name, step)
        else:
            rows.append(MetricRow(name, value, row.time_ms, step))
    return rows
