"""What a study holds, as plain values: the shape that front, report and tracking read.

Accuracies are fractions of the validation images, times are seconds, larger objectives are better.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

TrialState = Literal["COMPLETE", "FAILED", "RUNNING", "WAITING"]
OBJECTIVES = ("standard_accuracy", "certified_accuracy")


@dataclass(frozen=True)
class TrialResult:
    """What one finished trial reports; accuracies are fractions of the validation images, costs seconds."""

    standard_accuracy: float
    adversarial_accuracy: float
    certified_accuracy: float
    certified_upper: float
    verification_state: str
    num_images: int
    costs: dict[str, float]  # by part: teacher, student, verification
    seconds: float  # from start to end of the trial, interrupted runs included
    provenance: dict[str, str]  # versions, device, commit

    def __post_init__(self) -> None:
        for name in (*OBJECTIVES, "adversarial_accuracy", "certified_upper", "seconds"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; a result holds finite numbers only")


@dataclass(frozen=True)
class TrialRecord:
    """One trial of a study, in whatever state it is. Results are None until the trial is COMPLETE."""

    key: str
    number: int
    state: TrialState
    params: dict[str, Any]
    configuration: str  # hash of the searched parameters: equal for repeats with other seeds
    seed: int
    standard_accuracy: float | None = None
    adversarial_accuracy: float | None = None
    certified_accuracy: float | None = None  # lower end: proved / N
    certified_upper: float | None = None  # upper end: (N - falsified) / N
    verification_state: str | None = None
    seconds: float | None = None
    costs: dict[str, float] = field(default_factory=dict)  # seconds for teacher, student, verification
    num_images: int | None = None
    finished_at: float | None = None  # Unix time
    reason: str | None = None  # why a trial FAILED

    @property
    def objectives(self) -> tuple[float, float] | None:
        """(standard accuracy, lower end of certified accuracy), or None while unknown."""
        if self.state != "COMPLETE" or self.standard_accuracy is None or self.certified_accuracy is None:
            return None
        return self.standard_accuracy, self.certified_accuracy


@dataclass(frozen=True)
class StudyRecord:
    """A study as stored: its trials by number and what every figure of it must say."""

    name: str
    reference: tuple[float, float]
    trials: tuple[TrialRecord, ...]
    dataset: str
    threat: str  # for example "linf 2/255"
    num_images: int  # validation images
    verifier: str  # for example "pgd 40x0.035, ibp, crown"
    started_at: float  # Unix time

    @property
    def complete(self) -> tuple[TrialRecord, ...]:
        """The trials whose objectives are known."""
        return tuple(trial for trial in self.trials if trial.objectives is not None)

    @property
    def unfinished(self) -> tuple[TrialRecord, ...]:
        """The trials that were started and have neither a result nor a reason why not."""
        return tuple(trial for trial in self.trials if trial.state == "RUNNING")
