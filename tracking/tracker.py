"""What a search tells a tracking service, and the service that forgets everything.

A study is one search, a trial is one training inside it; both are named by the search's own keys, so that
saying something again never doubles it. Times are milliseconds since 1970, as tracking services store them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

ParamValue = str | int | float | bool
Status = Literal["FINISHED", "FAILED", "KILLED"]

# Tags by which a run is found again; a saved view or a query of the user may rely on them.
TAG_KIND = "cert.kind"
TAG_STUDY = "cert.study"
TAG_TRIAL = "cert.trial"
KIND_STUDY = "study"
KIND_TRIAL = "trial"


class RefusedError(Exception):
    """The service answered, and it will never accept this: sending it again does not help."""


@dataclass(frozen=True)
class StudyInfo:
    """A study as the tracking service shows it.

    Args:
        name: the study's name, unique in its experiment; also the name of its folder.
        experiment: what studies share that may be compared: data set and threat.
        tags: free labels of the study.
        params: what was fixed for the whole study and is worth a column.
        description: Markdown; a link `(artifact:front.png)` means that artifact of the study.
        tracking_uri: where the study is logged; empty for the local store beside it.
    """

    name: str
    experiment: str
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, ParamValue] = field(default_factory=dict)
    description: str = ""
    tracking_uri: str = ""

    def __post_init__(self) -> None:
        for name in (self.name, self.experiment):
            if not name or any(sign in name for sign in "/'\"`\n") or name.startswith("."):
                raise ValueError(
                    f"{name!r} cannot name a study or an experiment: expected a name without slashes, quotes"
                    " and line breaks that does not start with a dot; rename it"
                )


class MetricRow(NamedTuple):
    """One measured value; the same row sent twice is stored once, because its time is the recorded one."""

    name: str
    value: float
    time_ms: int
    step: int


class Tracker(Protocol):
    """Every method may be repeated with the same arguments and leaves the same state.

    A method raises RefusedError for what the service will never accept, and any other exception when it is
    worth trying again. A key that was never started is started by the first thing said about it. A time of
    None means now.
    """

    def open_study(self, study: StudyInfo, *, resume: bool = True) -> None:
        """Create or find the study; everything after this belongs to it. resume: it is running (again)."""

    def start_trial(
        self,
        key: str,
        params: Mapping[str, ParamValue],
        tags: Mapping[str, str],
        *,
        time_ms: int | None = None,
    ) -> None:
        """Create the trial, or set it running again."""

    def log_metrics(self, key: str, rows: Sequence[MetricRow]) -> None:
        """Add finite values to a trial."""

    def log_artifact(self, key: str, path: Path, folder: str) -> None:
        """Copy a file, or what a directory holds, into a folder of the trial; "" is its root."""

    def end_trial(self, key: str, status: Status, tags: Mapping[str, str], *, time_ms: int | None = None) -> None:
        """Set a trial's final state."""

    def log_study(
        self,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        artifacts: Mapping[str, Path],
        *,
        step: int = 0,
        description: str = "",
        time_ms: int | None = None,
    ) -> None:
        """Add to the study itself.

        Args:
            metrics: finite values at `step`.
            tags: labels, replacing those of the same name.
            artifacts: name in the study -> file, or folder in the study -> directory; replaced if there.
            step: for example the number of finished trials.
            description: replaces the study's; empty: as it was.
            time_ms: when the metrics were measured.
        """

    def close_study(self, status: Status, *, time_ms: int | None = None) -> None:
        """Set the study's final state."""

    def close_stale(self, live_keys: Collection[str]) -> list[str]:
        """Set running trials of the study that nobody works on to KILLED; returns their keys."""

    def study_url(self) -> str | None:
        """A link to the study for people; None where the service has no pages."""


class NullTracker:
    """Accepts everything and keeps nothing."""

    def open_study(self, study: StudyInfo, *, resume: bool = True) -> None:
        pass

    def start_trial(
        self,
        key: str,
        params: Mapping[str, ParamValue],
        tags: Mapping[str, str],
        *,
        time_ms: int | None = None,
    ) -> None:
        pass

    def log_metrics(self, key: str, rows: Sequence[MetricRow]) -> None:
        pass

    def log_artifact(self, key: str, path: Path, folder: str) -> None:
        pass

    def end_trial(self, key: str, status: Status, tags: Mapping[str, str], *, time_ms: int | None = None) -> None:
        pass

    def log_study(
        self,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        artifacts: Mapping[str, Path],
        *,
        step: int = 0,
        description: str = "",
        time_ms: int | None = None,
    ) -> None:
        pass

    def close_study(self, status: Status, *, time_ms: int | None = None) -> None:
        pass

    def close_stale(self, live_keys: Collection[str]) -> list[str]:
        return []

    def study_url(self) -> str | None:
        return None
