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
TAG_STUDY_ID = "cert.study_id"  # random: tells studies of one name apart
TAG_SPLIT = "cert.split"  # whose images the accuracies are about
TAG_FRONT = "cert.on_front"  # "true" for the members of the front as it is now, "false" for former ones
KIND_TRIAL = "trial"
# What a parent run is about: a search, the retraining of its front, or several studies side by side.
StudyKind = Literal["study", "confirmation", "comparison"]


class RefusedError(Exception):
    """The service answered, and it will never accept this: sending it again does not help."""


class LoginError(Exception):
    """The service does not accept the login, or got none; the text says what to set."""


class OtherStudyError(Exception):
    """The service has a study of that name that is another one; the text says what to do."""


# Waiting does not mend these: a person has to do something.
NEEDS_A_PERSON = (LoginError, OtherStudyError)


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
        kind: what the parent run is about.
        split: whose images its accuracies are about, "validation" or "test".
        identifier: random and the study's own; empty: it has none, so that any study of its name is taken for it.
        parameters: names of the searched parameters, for the axes of saved views.
        conditional: those of them that only some trials have.
    """

    name: str
    experiment: str
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, ParamValue] = field(default_factory=dict)
    description: str = ""
    tracking_uri: str = ""
    kind: StudyKind = "study"
    split: str = "validation"
    identifier: str = ""
    parameters: tuple[str, ...] = ()
    conditional: tuple[str, ...] = ()

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


@dataclass(frozen=True)
class ModelInfo:
    """A trained network as files, and what was measured on it.

    Args:
        name: the model's name, unique in its study.
        program: the network as an exported program (`torch.export.save`), on the CPU, in eval mode.
        torch_version: of the PyTorch that wrote the program.
        files: what else belongs to it: weights and architecture, from which the project rebuilds it exactly.
        input_shape: of one image, [C, H, W].
        num_outputs: logits of one image.
        dataset: name of the images on which it was measured, with their split, e.g. "digits-validation".
        dataset_digest: fingerprint of these images; at most 36 characters count.
        metrics: finite values measured on them.
        metadata: what else a loader may want to know: threat, data set, trial.
    """

    name: str
    program: Path
    torch_version: str
    files: tuple[Path, ...]
    input_shape: tuple[int, ...]
    num_outputs: int
    dataset: str
    dataset_digest: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


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

    def log_model(self, key: str, model: ModelInfo, *, time_ms: int | None = None) -> None:
        """The trained network of a trial; with the same name it is the same model, whose metrics are added to."""

    def mark_front(self, keys: Collection[str]) -> None:
        """These trials of the study, and no others of it, are on its front now."""

    def register(
        self, name: str, versions: Mapping[str, Mapping[str, str]], aliases: Mapping[str, str], description: str
    ) -> None:
        """Put models of trials into the registry.

        Args:
            name: of the registered model; made if there is none.
            versions: key of a trial whose model was logged -> tags of its version.
            aliases: alias -> key of one of these trials, to which the alias moves; "": nobody has it any more.
            description: Markdown, of the registered model.
        """

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

    def front_url(self) -> str | None:
        """A link to the page that shows the study's trials as standard against certified accuracy."""


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

    def log_model(self, key: str, model: ModelInfo, *, time_ms: int | None = None) -> None:
        pass

    def mark_front(self, keys: Collection[str]) -> None:
        pass

    def register(
        self, name: str, versions: Mapping[str, Mapping[str, str]], aliases: Mapping[str, str], description: str
    ) -> None:
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

    def front_url(self) -> str | None:
        return None
