"""Runs of trials that ended without a result: why, how often a trial may die, and what was lost.

A worker can vanish at any moment, with its node or alone. Its trial is put back among the unfinished ones and goes on
from its last stored state, as its next attempt; each such end is kept in the study as a `Death`.

`Death.lost_seconds` runs from the trial's last stored state, or from the start of the attempt if it stored none, to
the moment at which the driver heard of the end: work that the next attempt does again, if there is one, and what it
took to notice. An attempt starts when its worker does: time in Ray's queue costs nothing. Attempts that ended because
their driver did are no deaths: nobody was there to see when.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from search.studies.records import Death, StudyRecord

# With its node: nobody's fault.
NODE_LOST = "node lost"
NODE_PREEMPTED = "node preempted"
# Alone: by a signal, a crash, or the kernel for want of memory.
WORKER_KILLED = "worker killed"
# An error outside of the trial; ": " and its text follow.
WORKER_FAILED = "worker failed"
# Ray ended it, as its node ran out of memory.
KILLED_FOR_MEMORY = "worker out of memory"
# Its own allocation failed, and the worker lived on.
OUT_OF_MEMORY = "out of memory"
# The trial's folder did not answer for a while; ": " and what was said follow. The worker lived on.
STORAGE_AWAY = "storage away"

# A trial that kills its worker does it again. Nodes die for reasons that are not the trial's, but not for ever: of such
# deaths those count that came since an attempt last stored a state.
WORKER_DEATHS, OTHER_DEATHS = 3, 20
_OF_SURROUNDINGS = (NODE_LOST, NODE_PREEMPTED, STORAGE_AWAY)
_OF_MEMORY = (KILLED_FOR_MEMORY, OUT_OF_MEMORY)


@dataclass(frozen=True)
class Cause:
    """Why a run ended, and on which host; empty: not known."""

    reason: str
    node: str = ""


def kind(reason: str) -> str:
    """A reason without its details."""
    return reason.partition(":")[0]


def is_of_surroundings(reason: str) -> bool:
    """Whether it says nothing of the trial: several at once may end by the same event."""
    return kind(reason) in _OF_SURROUNDINGS


def is_of_memory(reason: str) -> bool:
    """Whether more memory would have helped; `search.attempts.shares` bounds these where it can raise the share."""
    return kind(reason) in _OF_MEMORY


def exhausted(deaths: Sequence[Death], *, even_of_memory: bool = False) -> str | None:
    """Why a trial with these deaths is not tried again; None: it is.

    even_of_memory: those for want of memory count, too, as nothing bounds them.
    """
    of_surroundings = sum(is_of_surroundings(death.reason) for death in _in_vain(deaths))
    others = [death.reason for death in deaths if not is_of_surroundings(death.reason)]
    of_workers = sum(even_of_memory or not is_of_memory(reason) for reason in others)
    if of_workers <= WORKER_DEATHS and of_surroundings <= OTHER_DEATHS:
        return None
    return f"worker died {len(deaths)} times: {reasons_text(deaths)}; the last one: {deaths[-1].reason}"


def _in_vain(deaths: Sequence[Death]) -> Sequence[Death]:
    """Those of the attempts since the last one that brought the trial further."""
    last = max((index for index, death in enumerate(deaths) if death.advanced), default=-1)
    return deaths[last + 1 :]


def reasons_text(deaths: Iterable[Death]) -> str:
    """What happened how often, most frequent first: `2 node lost, 1 worker killed`."""
    counts = Counter(kind(death.reason) for death in deaths)
    return ", ".join(f"{number} {reason}" for reason, number in counts.most_common())


def deaths_text(deaths: Sequence[Death]) -> str:
    """The deaths of one trial in a line, with what they cost; empty without any."""
    return f"{reasons_text(deaths)}; {lost_seconds(deaths):.0f} s lost" if deaths else ""


def lost_seconds(deaths: Iterable[Death]) -> float:
    """Of attempts: since their last stored state, until the driver heard of their end."""
    return sum(death.lost_seconds for death in deaths)


def account(study: StudyRecord) -> str:
    """What a study lost in all, in one line; empty if it was nothing."""
    deaths = [death for trial in study.trials for death in trial.deaths]
    if not deaths:
        return ""
    workers = "1 worker was lost" if len(deaths) == 1 else f"{len(deaths)} workers were lost"
    return f"{workers} ({reasons_text(deaths)}), and {lost_seconds(deaths):,.0f} s with them{_failed_of_them(study)}"


def _failed_of_them(study: StudyRecord) -> str:
    """Trials that ended with a death: nobody went on from what they had stored."""
    dead = sum(
        trial.state == "FAILED" and bool(trial.deaths) and trial.deaths[-1].reason in (trial.reason or "")
        for trial in study.trials
    )
    trials = "1 trial failed of it, and what it" if dead == 1 else f"{dead} trials failed of it, and what they"
    return f"; {trials} had stored is lost, too" if dead else ""
