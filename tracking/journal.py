"""What a study records for its tracker, as files that survive any crash and any absent server.

A study's journal folder holds `study.json`, one `<trial key>.jsonl` for each trial, written by the trial, and
`_study.jsonl`, written by the driver about the study itself. A line is one JSON object with its wall time
`t` (seconds since 1970) and its `kind`. Paths in it are relative to the folder, so that the whole storage can
move.
"""

import errno
import json
import logging
import math
import os
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tracking.tracker import ModelInfo, ParamValue, Status, StudyInfo

log = logging.getLogger(__name__)

STUDY_JOURNAL = "_study.jsonl"
STUDY_FILE = "study.json"
# Of `study.json` and the rows beside it. 1 named no version, and had no rows about models, front and registry.
FORMAT_VERSION = 2

# MLflow's rule for names of metrics; a name it refuses would be lost long after the trial that wrote it.
_METRIC_NAME = re.compile(r"[\w.\- :]+(/[\w.\- :]+)*", re.ASCII)
_METRIC_NAME_LENGTH = 250
_BLOCK = 1 << 16


def _relative_path(path: str) -> str:
    """A path as `Journal` writes them."""
    if "\0" in path or path.startswith("/"):
        raise ValueError(f"{path!r} is no path from the journal's folder")
    return path


def _place(name: str) -> str:
    """A place among a run's artifacts."""
    if not name.isprintable() or name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{name!r} is no place among the artifacts of a run")
    return name


_Path = Annotated[str, AfterValidator(_relative_path)]
_Place = Annotated[str, AfterValidator(_place)]


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True)

    t: float

    @property
    def time_ms(self) -> int:
        return round(self.t * 1000)


class StartRow(_Row):
    kind: Literal["start"]
    params: dict[str, str]
    tags: dict[str, str]


class MetricsRow(_Row):
    kind: Literal["metrics"]
    step: int
    values: dict[str, float | None]  # None is NaN, for which JSON has no number


class ArtifactRow(_Row):
    kind: Literal["artifact"]
    path: _Path
    folder: _Place


class ModelRow(_Row):
    kind: Literal["model"]
    name: str
    program: _Path
    torch_version: str
    files: list[_Path]
    input_shape: list[int]
    num_outputs: int
    dataset: str
    dataset_digest: str
    values: dict[str, float | None]
    metadata: dict[str, str]


class EndRow(_Row):
    kind: Literal["end"]
    status: Status
    step: int
    values: dict[str, float | None]
    tags: dict[str, str]


class StudyRow(_Row):
    kind: Literal["study"]
    step: int
    values: dict[str, float | None]
    tags: dict[str, str]
    artifacts: dict[_Place, _Path]
    description: str


class FrontRow(_Row):
    kind: Literal["front"]
    keys: list[str]


class RegisterRow(_Row):
    kind: Literal["register"]
    name: str
    versions: dict[str, dict[str, str]]
    aliases: dict[str, str]
    description: str


class CloseRow(_Row):
    kind: Literal["close"]
    status: Status


Row = Annotated[
    StartRow | MetricsRow | ArtifactRow | ModelRow | EndRow | StudyRow | FrontRow | RegisterRow | CloseRow,
    Field(discriminator="kind"),
]
_ROW: TypeAdapter[Row] = TypeAdapter(Row)


class NewerJournalError(ValueError):
    """A newer program wrote the journals of a study: rows of kinds that are not known here may be among theirs."""


class _Version(BaseModel):
    format_version: int = 1


_VERSION: TypeAdapter[_Version] = TypeAdapter(_Version)


@dataclass(frozen=True)
class Line:
    """One row and the offset in bytes just after it."""

    row: Row
    end: int


class Journal:
    """The record of one trial, or of the study: lines are only ever added.

    A line goes out in one write to a descriptor opened for appending, so a process killed at any moment
    leaves at most one torn last line; the next writer cuts it off. One process writes a journal at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = path.parent.resolve()
        # Not through a link: in a shared folder it may have been laid by somebody else, to a file of this user's.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags, 0o644)
        _cut_torn_tail(self._descriptor)

    @property
    def key(self) -> str:
        return self.path.stem

    def write(self, kind: str, **fields: Any) -> None:
        """Append one row, at the present time.

        Raises:
            ValueError: no such kind of row, or not its fields.
            OSError: the disk is full; the journal is as it was.
        """
        row = _ROW.validate_python({"t": time.time(), "kind": kind, **fields})
        data = (row.model_dump_json() + "\n").encode()
        written = os.write(self._descriptor, data)
        if written != len(data):
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def start(self, key: str, params: Mapping[str, ParamValue], tags: Mapping[str, str]) -> None:
        """The trial begins, or goes on in a new process. params: the searched ones only."""
        if key != self.key:
            raise ValueError(f"{self.path} is the journal of trial {self.key!r}, not of {key!r}: one file each")
        self.write("start", params={name: str(value) for name, value in params.items()}, tags=tags)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Values measured at one step. An infinite one (a bound that is not known yet) is left out."""
        if finite := _storable(values):
            self.write("metrics", step=step, values=finite)

    def steps(self, name: str) -> set[int]:
        """The steps at which a value was measured, by this process or one before it."""
        rows = (line.row for line in read_rows(self.path)[0])
        return {row.step for row in rows if isinstance(row, MetricsRow) and name in row.values}

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file or directory that is complete and will stay where it is."""
        self.write("artifact", path=self._relative(path), folder=folder)

    def model(self, model: ModelInfo) -> None:
        """The trial's trained network; its files are complete and will stay where they are."""
        self.write(
            "model",
            name=model.name,
            program=self._relative(model.program),
            torch_version=model.torch_version,
            files=[self._relative(file) for file in model.files],
            input_shape=list(model.input_shape),
            num_outputs=model.num_outputs,
            dataset=model.dataset,
            dataset_digest=model.dataset_digest,
            values=_storable(model.metrics),
            metadata=dict(model.metadata),
        )

    def end(self, status: Status, metrics: Mapping[str, float], tags: Mapping[str, str], *, step: int = 0) -> None:
        """The trial's last word; the metrics are its results."""
        self.write("end", status=status, step=step, values=_storable(metrics), tags=tags)

    def study(
        self,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        artifacts: Mapping[str, Path],
        *,
        step: int = 0,
        description: str = "",
    ) -> None:
        """Something about the study itself; the arguments are those of Tracker.log_study."""
        paths = {name: self._relative(path) for name, path in artifacts.items()}
        self.write("study", step=step, values=_storable(metrics), tags=tags, artifacts=paths, description=description)

    def front(self, keys: Collection[str]) -> None:
        """The front has moved: these trials are on it, and no others."""
        self.write("front", keys=sorted(keys))

    def register(
        self, name: str, versions: Mapping[str, Mapping[str, str]], aliases: Mapping[str, str], description: str = ""
    ) -> None:
        """Models for the registry; the arguments are those of Tracker.register.

        Raises:
            ValueError: an alias belongs to a trial that is not registered.
        """
        if strangers := {key for key in aliases.values() if key} - versions.keys():
            raise ValueError(f"aliases of trials that are not registered: {', '.join(sorted(strangers))}")
        self.write("register", name=name, versions=versions, aliases=aliases, description=description)

    def close_study(self, status: Status) -> None:
        """The study has ended."""
        self.write("close", status=status)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _relative(self, path: Path) -> str:
        # Both sides resolved: `..` through a symbolic link would otherwise lead elsewhere.
        return os.path.relpath(path.resolve(), self._folder)


def read_rows(path: Path, offset: int = 0) -> tuple[list[Line], int]:
    """Read the complete lines from a byte offset on.

    A last line without its line break is not there yet. A line that cannot be understood is left out with a
    warning that names the file and the offset.

    Returns:
        The rows, and the offset to go on from.
    """
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    lines = []
    for text in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
        try:
            lines.append(Line(_ROW.validate_json(text), offset + len(text)))
        except ValidationError as error:
            log.warning("%s: skipped the line at byte %d, which is not a journal row: %s", path, offset, error)
        offset += len(text)
    return lines, offset


def read_line(text: bytes) -> Row | None:
    """The row on a line, or None if there is none on it."""
    try:
        return _ROW.validate_json(text)
    except ValidationError:
        return None


def end_dead_trials(journals: Path, live_keys: set[str] | frozenset[str]) -> list[str]:
    """Write the missing last word of trials that nobody works on: KILLED.

    For the driver after a crash, before it starts trials. Needs no server, and keeps the order of events.

    Returns:
        The keys of those trials.
    """
    dead = []
    for path in sorted(journals.glob("*.jsonl")):
        if path.stem in live_keys or path.name == STUDY_JOURNAL:
            continue
        marks = [line.row for line in read_rows(path)[0] if isinstance(line.row, StartRow | EndRow)]
        if marks and isinstance(marks[-1], StartRow):
            with Journal(path) as journal:
                journal.end("KILLED", {}, {})
            dead.append(path.stem)
    return dead


def save_study_info(journals: Path, study: StudyInfo) -> None:
    """Write `study.json`, replacing an older one in one step."""
    journals.mkdir(parents=True, exist_ok=True)
    content = {"format_version": FORMAT_VERSION} | asdict(study)
    replace_text(journals / STUDY_FILE, json.dumps(content, indent=2) + "\n")


def load_study_info(journals: Path) -> StudyInfo:
    """Read `study.json`; keys that are not known are left out.

    Raises:
        FileNotFoundError: the folder holds none.
        NewerJournalError: a newer program wrote it; rows that are not known here would be left out as if damaged.
        ValueError: it is not one.
    """
    path = journals / STUDY_FILE
    try:
        content = path.read_bytes()
        version = _VERSION.validate_json(content).format_version
        if version > FORMAT_VERSION:
            raise NewerJournalError(
                f"{path} has format version {version}; this program reads 1 to {FORMAT_VERSION}:"
                " use the version that wrote it, or a newer one"
            )
        return TypeAdapter(StudyInfo).validate_json(content)
    except ValidationError as error:
        raise ValueError(f"{path} does not describe a study: {error}") from error


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new, never a part."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def _storable(values: Mapping[str, float]) -> dict[str, float | None]:
    for name in values:
        if not _METRIC_NAME.fullmatch(name) or len(name) > _METRIC_NAME_LENGTH or {".", ".."} & {*name.split("/")}:
            raise ValueError(
                f"{name!r} cannot name a metric: expected up to {_METRIC_NAME_LENGTH} letters, digits, spaces"
                " and _ - . : with single slashes between parts, for example certified_accuracy/lower"
            )
    numbers = {name: float(value) for name, value in values.items()}
    return {name: None if math.isnan(x) else x for name, x in numbers.items() if not math.isinf(x)}


def _cut_torn_tail(descriptor: int) -> None:
    size = position = os.fstat(descriptor).st_size
    while position > 0:
        start = max(0, position - _BLOCK)
        line_break = os.pread(descriptor, position - start, start).rfind(b"\n")
        if line_break >= 0:
            position = start + line_break + 1
            break
        position = start
    if position < size:
        os.ftruncate(descriptor, position)
