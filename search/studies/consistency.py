"""Whether the views of a study agree with the study: pure functions from what was read to findings.

The study's database is right by definition. Files, journals and MLflow runs are views of it: what differs there is
wrong there, and is written anew from the study where the study holds enough.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ccdist.verdicts import Accuracies
from search.studies.records import OBJECTIVES, StudyRecord, TrialRecord, TrialResult

ACCURACIES = (*OBJECTIVES, "adversarial_accuracy", "certified_upper")
_STORED = (*ACCURACIES, "verification_state", "num_images", "seconds", "costs")


class Repair(Enum):
    """What can be done about a finding; the value is said of the subject before it is done."""

    REWRITE_RESULT = "--repair writes it anew from the study"
    SET_ASIDE = "--repair moves it aside"
    SET_ASIDE_TEACHER = "--repair moves it aside, and a trial that needs it trains it again"
    DELETE_LEASE = "--repair deletes it"
    MEND_JOURNAL = "--repair takes the rest of the journal, and keeps the line beside it"
    SEND = "--repair sends them"
    RESEND = "--repair sends it anew"
    END_RUN = "--repair sends the study's values"
    DELETE_RUN = "--repair deletes the run with fewer metrics"


@dataclass(frozen=True)
class Finding:
    """One thing that is worth a line.

    Args:
        subject: the trial, teacher or place that it is about.
        text: what is the matter.
        repair: what helps; None: nothing that follows from the study.
        target: what the repair works on, where that is not the subject.
        fine: nothing is wrong, it only looks so.
    """

    subject: str
    text: str
    repair: Repair | None = None
    target: str = ""
    fine: bool = False

    @property
    def repaired_object(self) -> str:
        """What a repair works on."""
        return self.target or self.subject

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal in two looks at the same trouble; texts may tell how old it is."""
        return (self.subject, self.repair, self.target) if self.repair else (self.subject, self.text)


@dataclass(frozen=True)
class TrialView:
    """What lies in a trial's folder; a text instead of a content says what is wrong with it."""

    student: str | None  # None: whole
    verdicts: Accuracies | str
    result: TrialResult | str


@dataclass(frozen=True)
class JournalView:
    """What is wrong with a journal: offsets of lines that are no rows, bytes of an unfinished last line."""

    damaged: tuple[int, ...] = ()
    torn: int = 0


@dataclass(frozen=True)
class RunView:
    """A trial's run in MLflow."""

    run_id: str
    key: str
    status: str
    started_ms: int
    metrics: Mapping[str, float] = field(default_factory=dict)


MISSING = "is missing"
_AHEAD = "is ahead of the study: a verification went on, and the study was not told yet"


def check_unfinished(record: StudyRecord, *, live: bool) -> list[Finding]:
    """Trials that somebody started: with no driver at work the next one goes on with them."""
    now = "a driver is at work on it" if live else "no driver is at work; the next search.run goes on with it"
    return [Finding(trial.key, f"is unfinished, {now}", fine=True) for trial in record.unfinished]


def check_files(trial: TrialRecord, view: TrialView) -> list[Finding]:
    """The artefacts of a COMPLETE trial.

    Files may prove or refute more than the study holds: a verification that went on, of which it was not told yet.
    """
    findings = []
    if view.student is not None:
        findings.append(Finding(trial.key, f"student {view.student}; only a rerun of the trial makes it anew"))
    if isinstance(view.verdicts, Accuracies):
        findings += _check_verdicts(trial, view.verdicts)
    else:
        text = f"verdicts.parquet {view.verdicts}; only a verification of the student makes it anew"
        findings.append(Finding(trial.key, text))
    if isinstance(view.result, TrialResult):
        findings += _check_result(trial, view.result)
    else:
        findings.append(Finding(trial.key, f"result.json {view.result}", Repair.REWRITE_RESULT))
    return findings


def _check_verdicts(trial: TrialRecord, measured: Accuracies) -> list[Finding]:
    counted = measured.standard, measured.certified, measured.adversarial, measured.certified_upper
    held = tuple(getattr(trial, name) for name in ACCURACIES)
    if trial.num_images == measured.num_images and counted == held:
        return []
    if _is_within(trial, measured.num_images, measured.standard, measured.certified, measured.certified_upper):
        return [Finding(trial.key, f"verdicts.parquet {_AHEAD}", fine=True)]
    return [
        Finding(
            trial.key,
            f"verdicts.parquet gives {_told(counted)} of {measured.num_images} images, the study holds {_told(held)} "
            f"of {trial.num_images} ({', '.join(ACCURACIES)}); only a verification of the student makes it anew",
        )
    ]


def _check_result(trial: TrialRecord, result: TrialResult) -> list[Finding]:
    differing = [name for name in _STORED if getattr(result, name) != getattr(trial, name)]
    if not differing:
        return []
    ends = result.certified_accuracy, result.certified_upper
    if _is_within(trial, result.num_images, result.standard_accuracy, *ends) and ends != _ends(trial):
        return [Finding(trial.key, f"result.json {_AHEAD}", fine=True)]
    return [Finding(trial.key, f"result.json differs from the study in {', '.join(differing)}", Repair.REWRITE_RESULT)]


def _is_within(trial: TrialRecord, num_images: int, standard: float, lower: float, upper: float) -> bool:
    """Whether an interval of certified accuracy is a narrower one of the same network and images."""
    low, high = _ends(trial)
    same = (num_images, standard) == (trial.num_images, trial.standard_accuracy)
    return same and low is not None and high is not None and low <= lower <= upper <= high


def _ends(trial: TrialRecord) -> tuple[float | None, float | None]:
    return trial.certified_accuracy, trial.certified_upper


def _told(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def stored_result(trial: TrialRecord, provenance: Mapping[str, str]) -> TrialResult:
    """The result that the study holds of a COMPLETE trial; it does not hold what made it."""
    fields: dict[str, Any] = {name: getattr(trial, name) for name in (*_STORED, "expected_certified", "reason")}
    return TrialResult(**fields, provenance=dict(provenance))


def check_names(record: StudyRecord, folders: Iterable[str], journals: Iterable[str]) -> list[Finding]:
    """Folders and journals of trials that the study does not know; their key may be given to another trial."""
    known = {trial.key for trial in record.trials}
    found = [(f"trials/{name}", name) for name in folders] + [(f"journal/{name}.jsonl", name) for name in journals]
    text = "belongs to no trial of the study"
    return [Finding(path, text, Repair.SET_ASIDE) for path, name in sorted(found) if name not in known]


def check_teachers(problems: Mapping[str, str]) -> list[Finding]:
    """Teachers, or their training states, that cannot be read; by key."""
    repair = Repair.SET_ASIDE_TEACHER
    return [Finding(f"teacher {key}", text, repair, target=key) for key, text in sorted(problems.items())]


def check_leases(ages_s: Mapping[str, float], expiry_s: float) -> list[Finding]:
    """Leases by path, with the seconds since their last heartbeat."""
    findings = []
    for path, age in sorted(ages_s.items()):
        if age > expiry_s:
            text = f"was left by a process that died: no heartbeat for {age:.0f} s"
            findings.append(Finding(path, text, Repair.DELETE_LEASE))
        else:
            text = (
                f"had its last heartbeat {age:.0f} s ago: a teacher is trained, or the lease ends after {expiry_s:g} s"
            )
            findings.append(Finding(path, text, fine=True))
    return findings


def check_journal(name: str, view: JournalView) -> list[Finding]:
    """Lines of a journal that nobody can send."""
    path = f"journal/{name}.jsonl"
    findings = []
    if view.damaged:
        places = ", ".join(str(offset) for offset in view.damaged[:3])
        text = f"has lines that are no rows: {len(view.damaged)}, at byte {places}"
        findings.append(Finding(path, text, Repair.MEND_JOURNAL, target=name))
    if view.torn:
        text = f"ends in {view.torn} bytes of an unfinished line"
        findings.append(Finding(path, text, Repair.MEND_JOURNAL, target=name))
    return findings


def check_runs(record: StudyRecord, runs: Sequence[RunView], journals: Iterable[str]) -> list[Finding]:
    """The trials' runs in MLflow: one for each trial that ended, with its state and its values.

    Args:
        journals: keys of the trials that wrote one; a trial that failed before that has no run.
    """
    written, known = set(journals), {trial.key for trial in record.trials}
    findings = [
        Finding(run.key, f"has a run {run.run_id} in MLflow, but is no trial of the study; delete it there")
        for run in runs
        if run.key not in known
    ]
    for trial in record.trials:
        own = sorted((run for run in runs if run.key == trial.key), key=_worth)
        findings += [
            Finding(
                trial.key,
                f"has two runs in MLflow, {own[0].run_id} and {double.run_id}",
                Repair.DELETE_RUN,
                target=double.run_id,
            )
            for double in own[1:]
        ]
        if trial.state in ("RUNNING", "WAITING"):
            continue
        if not own:
            if trial.state == "COMPLETE" or trial.key in written:
                findings.append(Finding(trial.key, "has no run in MLflow", Repair.END_RUN))
        elif own[0].status not in _statuses(trial):
            text = f"is {trial.state}, but its run in MLflow is {own[0].status}"
            findings.append(Finding(trial.key, text, Repair.END_RUN))
        elif differing := _differing(trial, own[0].metrics):
            text = f"differs from its run in MLflow in {', '.join(differing)}"
            findings.append(Finding(trial.key, text, Repair.END_RUN))
    return findings


def _worth(run: RunView) -> tuple[int, int, str]:
    """Of two runs of a trial the one with more metrics is kept, then the older one."""
    return -len(run.metrics), run.started_ms, run.run_id


def _statuses(trial: TrialRecord) -> tuple[str, ...]:
    return {"COMPLETE": ("FINISHED",), "FAILED": ("FAILED", "KILLED")}.get(trial.state, ("FINISHED", "KILLED"))


def _differing(trial: TrialRecord, metrics: Mapping[str, float]) -> list[str]:
    """Accuracies that a COMPLETE trial's run shows otherwise; both hold the same 64 bits, so equal means equal."""
    if trial.state != "COMPLETE":
        return []
    return [name for name in ACCURACIES if metrics.get(name) != getattr(trial, name)]
