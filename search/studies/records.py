"""What a study holds, as plain values: the shape that front, report and tracking read.

Accuracies are fractions of the validation images, in a confirmation of the test images; times are seconds; larger
objectives are better.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ccdist.data import Split

# STOPPED: its training was ended early because it could not reach the front; it counts as done.
TrialState = Literal["COMPLETE", "STOPPED", "FAILED", "RUNNING", "WAITING"]
VerificationState = Literal["finished", "stopped"]
OBJECTIVES = ("standard_accuracy", "certified_accuracy")


@dataclass(frozen=True)
class RungValues:
    """What a trial has shown when its training reached a rung: cheap stand-ins for the objectives."""

    standard_accuracy: float
    certified_accuracy: float  # proved by interval or linear bounds on a fixed subset of the validation images
    seconds: float  # spent on the trial up to here


@dataclass(frozen=True)
class TrialResult:
    """What one trial reports; accuracies are fractions of the validation images, costs seconds.

    The certified accuracy lies in [certified_accuracy, certified_upper] whatever the undecided images turn out to be.
    """

    standard_accuracy: float
    adversarial_accuracy: float
    certified_accuracy: float
    certified_upper: float
    verification_state: VerificationState
    num_images: int
    costs: dict[str, float]  # by part: teacher, student, verification
    seconds: float  # from start to end of the trial, interrupted runs included
    provenance: dict[str, str]  # versions, device, commit
    # Told to the sampler for a verification that was stopped: lower end + open share x proved share of the images that
    # its last rung decided. None: the lower end is told.
    expected_certified: float | None = None
    reason: str | None = None  # why a verification was stopped

    @property
    def told(self) -> tuple[float, float]:
        """The objectives as the sampler is told them; reports use the lower end."""
        expected = self.expected_certified
        return self.standard_accuracy, self.certified_accuracy if expected is None else expected

    @property
    def worst(self) -> tuple[float, float]:
        """(standard, certified) if every undecided image can be attacked."""
        return self.standard_accuracy, self.certified_accuracy

    @property
    def best(self) -> tuple[float, float]:
        """(standard, certified) if every undecided image can be proved."""
        return self.standard_accuracy, self.certified_upper

    def __post_init__(self) -> None:
        for name in (*OBJECTIVES, "adversarial_accuracy", "certified_upper", "seconds"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; a result holds finite numbers only")


@dataclass(frozen=True)
class Death:
    """An attempt of a trial that ended without a result, and what it had done since it last stored its state."""

    reason: str  # one of `search.attempts.deaths`
    node: str  # host name; empty: not known
    at: str  # ISO 8601, UTC: when the driver heard of it
    attempt: int  # the first one is 1
    lost_seconds: float
    advanced: bool = False  # whether it had stored a state, from which the next one went on


@dataclass(frozen=True)
class TrialRecord:
    """One trial of a study, in whatever state it is. Results are None unless the trial is COMPLETE."""

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
    expected_certified: float | None = None
    verification_state: VerificationState | None = None
    seconds: float | None = None
    costs: dict[str, float] = field(default_factory=dict)  # seconds for teacher, student, verification
    num_images: int | None = None
    finished_at: float | None = None  # Unix time
    reason: str | None = None  # why a trial FAILED or was STOPPED, or why its verification was
    rungs: dict[str, RungValues] = field(default_factory=dict)  # by the rung's name, in the order they were reached
    deaths: tuple[Death, ...] = ()  # in their order
    attempt: int = 1  # number of the run that is on, or comes next: another one after each death and each lost driver
    # Its GPUs (without GPUs: its cores), where it holds more than the space file says; see `search.attempts.shares`.
    accelerators: float | None = None

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
    num_images: int  # of its split
    verifier: str  # its ladder with steps, restarts and limits
    started_at: float  # Unix time
    split: Split = "validation"  # of the images

    @property
    def complete(self) -> tuple[TrialRecord, ...]:
        """The trials whose objectives are known, certified accuracy at least as an interval."""
        return tuple(trial for trial in self.trials if trial.objectives is not None)

    @property
    def done(self) -> tuple[TrialRecord, ...]:
        """The trials that count towards the budget: COMPLETE and STOPPED."""
        return tuple(trial for trial in self.trials if trial.state in ("COMPLETE", "STOPPED"))

    @property
    def unfinished(self) -> tuple[TrialRecord, ...]:
        """The trials that were started and have neither a result nor a reason why not."""
        return tuple(trial for trial in self.trials if trial.state == "RUNNING")
