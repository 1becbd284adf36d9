"""What a worker would report, and when: the only thing that a simulated trial needs to know of a real one.

Seconds are those of an accelerator (without one: a core) that the trial has for itself.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from search.studies.records import RungValues, TrialResult

TrainingMode = Literal["rungs", "fractions", "off"]


@dataclass(frozen=True)
class Report:
    """One report of a worker, without the trial's key."""

    seconds: float  # of work since the trial's start, the teacher's training apart
    content: dict[str, Any]


@dataclass(frozen=True)
class Teacher:
    """The teacher that a trial needs; whoever comes first trains it."""

    key: str
    seconds: float


@dataclass(frozen=True)
class Timeline:
    """Everything that a trial reports if nobody stops it; the last report is its end."""

    reports: tuple[Report, ...]
    teacher: Teacher | None = None
    checkpoint_s: float = 0.0  # seconds of work between two states to go on from after a kill; 0: it loses nothing

    def __post_init__(self) -> None:
        times = [report.seconds for report in self.reports]
        if not times or times != sorted(times) or times[0] < 0:
            raise ValueError(f"reports need times that ascend from 0, got {times}")

    @property
    def seconds(self) -> float:
        """Work from start to end, the teacher's training apart."""
        return self.reports[-1].seconds


class Workload(Protocol):
    """Trials that can be simulated."""

    def teacher(self, params: Mapping[str, Any]) -> Teacher | None:
        """The teacher that a trial of these parameters reads."""

    def timeline(self, params: Mapping[str, Any], seed: int, mode: TrainingMode) -> Timeline:
        """What a trial of these parameters and this seed reports; equal arguments give equal timelines."""


def running(seconds: float, phase: str) -> Report:
    """A trial has entered a phase."""
    return Report(seconds, {"state": "RUNNING", "phase": phase, "step": 0, "steps": 1})


def rung(seconds: float, name: str, standard: float, certified: float) -> Report:
    """Training has reached a rung with these cheap values."""
    values = RungValues(standard, certified, seconds)
    return Report(seconds, {"state": "RUNG", "rung": name, "values": json.dumps(asdict(values))})


@dataclass(frozen=True)
class VerificationState:
    """A verification at one moment, in images."""

    seconds: float  # since it began
    rung: str
    proved: int
    falsified: int


def verification(
    training_s: float, states: Sequence[VerificationState], *, standard: float, num_images: int
) -> tuple[Report, ...]:
    """The reports of a verification, its last state being the trial's end.

    Args:
        training_s: seconds of work before it began.
        states: by time; proved and falsified never shrink.
        standard: standard accuracy, a fraction of the images.
        num_images: images that are verified.
    """

    shares = _proved_shares(states)

    def at(state: VerificationState, share: float | None) -> str:
        lower, upper = state.proved / num_images, (num_images - state.falsified) / num_images
        result = TrialResult(
            standard_accuracy=standard,
            adversarial_accuracy=min(standard, upper),
            certified_accuracy=lower,
            certified_upper=upper,
            verification_state="finished" if share is None else "stopped",
            num_images=num_images,
            costs={"teacher": 0.0, "student": training_s, "verification": state.seconds},
            seconds=training_s + state.seconds,
            provenance={},
            expected_certified=None if share is None else lower + (upper - lower) * share,
        )
        return json.dumps(asdict(result))

    reports = [
        Report(
            training_s + state.seconds,
            {"state": "VERIFYING", "phase": state.rung, "step": state.proved + state.falsified, "steps": num_images}
            | {"result": at(state, share)},
        )
        for state, share in zip(states[:-1], shares, strict=False)
    ]
    last = states[-1]
    return *reports, Report(training_s + last.seconds, {"state": "COMPLETE", "result": at(last, None)})


def _proved_shares(states: Sequence[VerificationState]) -> list[float]:
    """At each state the proved share of what the last rung that decided anything has decided, as workers tell it."""
    shares: list[float] = []
    share, before = 0.0, (0, 0)
    for index, state in enumerate(states):
        if index and states[index - 1].rung != state.rung:
            before = states[index - 1].proved, states[index - 1].falsified
        proved, falsified = state.proved - before[0], state.falsified - before[1]
        share = proved / (proved + falsified) if proved + falsified > 0 else share
        shares.append(share)
    return shares
