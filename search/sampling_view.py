"""The study as a sampler sees it: which trials, and what is told of them, as Optuna's trials in memory.

The view numbers trials from 1; its number 0 is the trial that is asked for.
"""

import datetime
import itertools
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from search import pareto
from search.config import NSGA2Config, NSGA3Config, RandomConfig, SamplerConfig
from search.records import OBJECTIVES, RungValues, TrialRecord
from search.space import Space

# constraint: COMPLETE with extrapolated values that violate a constraint; pruned: Optuna's PRUNED, without values,
# which TPE counts among the bad ones; nothing: left out.
TellStopped = Literal["constraint", "pruned", "nothing"]
TELL_STOPPED: TellStopped = "constraint"

STOPPED = "stopped"  # the constraint's name
# Told trials in a view: the time of a suggestion grows with them, and a Gaussian process takes a second with 200.
VIEW_SIZES = {"tpe": 250, "gp": 200}
EXTRAPOLATED_FROM = 200  # finished trials, the most recent

GENERATION = ":generation"  # how Optuna's genetic samplers end the name under which a trial keeps its generation
NOTES = "sampler_notes"  # what a sampler noted on the study while it suggested this trial
_SOME_TIME = datetime.datetime(2000, 1, 1)  # Optuna wants times; no sampler reads them

_TOLD = ("COMPLETE", "STOPPED")

Attributes = Mapping[str, Any]
Point = tuple[float, float]


@dataclass(frozen=True)
class History:
    """The study as a sampler may know it: all trials by number, and what earlier suggestions left for later ones."""

    trials: tuple[TrialRecord, ...] = ()
    attributes: Mapping[int, Attributes] = field(default_factory=dict)  # Suggested.system_attrs by trial number


def distributions(space: Space, params: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """The distribution of each parameter."""
    return {name: space.parameters[name].distribution for name in params}


def kept_attributes(system_attrs: Attributes) -> dict[str, Any]:
    """Of a stored trial's system attributes those that its suggestion left for later ones."""
    return {key: value for key, value in system_attrs.items() if key == NOTES or key.endswith(GENERATION)}


def constraint_attributes(constraints: Mapping[str, float]) -> dict[str, float]:
    """How Optuna keeps a trial's constraints among its system attributes; satisfied at or below 0."""
    return dict(create_trial(state=TrialState.RUNNING, constraints=dict(constraints)).system_attrs)


def floor_constraints(floors: Mapping[str, float], worst: Point) -> dict[str, float]:
    """floor - value for every floor; of an interval the worst end counts."""
    return {name: floor - worst[OBJECTIVES.index(name)] for name, floor in floors.items()}


# ---- what is told of a trial ---------------------------------------------------------------------------------------


def told_values(trial: TrialRecord) -> Point:
    """The objectives of a COMPLETE trial as the sampler is told them."""
    assert trial.standard_accuracy is not None
    assert trial.certified_accuracy is not None
    expected = trial.expected_certified
    return trial.standard_accuracy, trial.certified_accuracy if expected is None else expected


def extrapolated(stopped: Sequence[TrialRecord], finished: Sequence[TrialRecord]) -> list[Point]:
    """What stopped trials would have reached, within [0, 1].

        values at its last rung + mean over the finished trials that reached that rung of (told - values there)

    With no finished trial that reached it the mean is 0.
    """
    shifts: dict[str, Point] = {}
    for rung in {_last_rung(trial)[0] for trial in stopped}:
        changes = np.array([_change(trial, rung) for trial in finished if rung in trial.rungs]).reshape(-1, 2)
        shift = changes.mean(axis=0) if len(changes) else np.zeros(2)
        shifts[rung] = float(shift[0]), float(shift[1])
    reached = [_last_rung(trial) for trial in stopped]
    return [
        (
            min(1.0, max(0.0, values.standard_accuracy + shifts[rung][0])),
            min(1.0, max(0.0, values.certified_accuracy + shifts[rung][1])),
        )
        for rung, values in reached
    ]


def _last_rung(trial: TrialRecord) -> tuple[str, RungValues]:
    return next(reversed(trial.rungs.items()))


def _change(trial: TrialRecord, rung: str) -> Point:
    told, values = told_values(trial), trial.rungs[rung]
    return told[0] - values.standard_accuracy, told[1] - values.certified_accuracy


def frozen_trials(
    shown: Sequence[TrialRecord],
    history: History,
    space: Space,
    floors: Mapping[str, float],
    tell_stopped: TellStopped,
) -> Iterator[FrozenTrial]:
    """The shown trials as Optuna's, by number.

    A Gaussian process wants equally many constraints in every COMPLETE trial, so `stopped` is in all of them or none.
    """
    stopped = [trial for trial in shown if trial.state == "STOPPED" and trial.rungs]
    told: dict[int, Point] = {}
    if stopped and tell_stopped == "constraint":
        finished = (trial for trial in reversed(history.trials) if trial.rungs and trial.objectives is not None)
        points = extrapolated(stopped, list(itertools.islice(finished, EXTRAPOLATED_FROM)))
        told = {trial.number: point for trial, point in zip(stopped, points, strict=True)}
    for trial in shown:
        own = {key: value for key, value in history.attributes.get(trial.number, {}).items() if key != NOTES}
        if trial.state in ("RUNNING", "WAITING"):
            yield _PastTrial(trial, space, TrialState.RUNNING, own)
        elif trial.objectives is not None:
            constraints = floor_constraints(floors, trial.objectives) | ({STOPPED: 0.0} if told else {})
            yield _PastTrial(trial, space, TrialState.COMPLETE, own, told_values(trial), constraints)
        elif trial.number in told:
            constraints = floor_constraints(floors, told[trial.number]) | {STOPPED: 1.0}
            yield _PastTrial(trial, space, TrialState.COMPLETE, own, told[trial.number], constraints)
        elif tell_stopped == "pruned":
            yield _PastTrial(trial, space, TrialState.PRUNED, own)


class _PastTrial(FrozenTrial):
    """A trial of the view. Optuna's own reads its constraints from a longer dictionary at every question."""

    def __init__(
        self,
        trial: TrialRecord,
        space: Space,
        state: TrialState,
        attributes: Attributes,
        values: Point | None = None,
        constraints: dict[str, float] | None = None,
    ) -> None:
        super().__init__(
            number=trial.number + 1,
            trial_id=trial.number + 1,
            state=state,
            value=None,
            values=values,
            datetime_start=_SOME_TIME,
            datetime_complete=_SOME_TIME if state.is_finished() else None,
            params=trial.params,
            distributions=distributions(space, trial.params),
            user_attrs={},
            system_attrs=dict(attributes),
            intermediate_values={},
        )
        self._told_constraints = constraints or {}

    @property
    def constraints(self) -> dict[str, float]:
        return self._told_constraints


# ---- which trials are shown ----------------------------------------------------------------------------------------


def shown_trials(sampler: SamplerConfig, history: History, floors: Mapping[str, float]) -> list[TrialRecord]:
    """The trials of the view, by number: all that run, and of the told ones as many as the sampler can use in time."""
    if isinstance(sampler, RandomConfig):
        return []
    drawn = [trial for trial in history.trials if trial.configuration and trial.state != "FAILED"]
    if isinstance(sampler, NSGA2Config | NSGA3Config):
        members = _recent_generations(history)
        return drawn if members is None else [trial for trial in drawn if trial.number in members]
    size = VIEW_SIZES[sampler.kind]
    told = [trial for trial in drawn if trial.state in _TOLD]
    if len(told) <= size:
        return drawn
    kept = thinned(told, floors, size)
    return [trial for trial in drawn if trial.number in kept or trial.state not in _TOLD]


def thinned(told: Sequence[TrialRecord], floors: Mapping[str, float], size: int) -> set[int]:
    """Numbers of the told trials that a sampler needs most: the front layers fill half, the most recent the rest.

    Layers count feasible trials only, from the front inwards, and of the last that fits in part the most recent. TPE
    asks for the few best, takes all others as one density, and weighs the older of those less.
    """
    complete = [trial for trial in told if trial.state == "COMPLETE"]
    feasible = [trial for trial in complete if _is_feasible(trial, floors)] if floors else complete
    # Straight into an array: thousands of pairs kept at once set off Python's garbage collector.
    values = np.fromiter(itertools.chain.from_iterable(map(told_values, feasible)), np.float64, 2 * len(feasible))
    layers = pareto.layers(values.reshape(-1, 2))
    ranked = np.lexsort((-np.arange(len(feasible)), layers))  # by layer, then the most recent first
    kept = {feasible[index].number for index in ranked[: size // 2].tolist()}
    rest = (trial.number for trial in reversed(told) if trial.number not in kept)
    return kept | set(itertools.islice(rest, size - len(kept)))


def _is_feasible(trial: TrialRecord, floors: Mapping[str, float]) -> bool:
    assert trial.objectives is not None
    return all(value <= 0 for value in floor_constraints(floors, trial.objectives).values())


def _recent_generations(history: History) -> AbstractSet[int] | None:
    """Numbers of the trials from which a genetic sampler makes the next one; None: all of them.

    The next trial belongs to the last generation g that has told trials, or to g + 1. Its parents are chosen from the
    trials of generation g and the parents of g, and those were noted when the first trial of g was suggested.
    """
    generations = _generations(history)
    told = [g for number, g in generations.items() if history.trials[number].state in _TOLD]
    latest = max(told, default=0)
    noted = _noted(history, latest)
    if latest > 0 and not any(key.endswith(f":{latest}") for key in noted):
        return None
    parents = {trial_id - 1 for ids in noted.values() for trial_id in ids}
    return parents | {number for number, generation in generations.items() if generation >= latest - 1}


def notes(sampler: SamplerConfig, history: History) -> dict[str, list[int]]:
    """The parents that a genetic sampler chose for the generations that the next trial may belong to."""
    if not isinstance(sampler, NSGA2Config | NSGA3Config):
        return {}
    told = [g for number, g in _generations(history).items() if history.trials[number].state in _TOLD]
    return _noted(history, max(told, default=0))


def _noted(history: History, generation: int) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, own in _generations(history).items():
        if own >= generation:
            found |= history.attributes[number].get(NOTES, {})
    return found


def _generations(history: History) -> dict[int, int]:
    """Generation by trial number, of the trials that have one."""
    return {
        number: value
        for number, attributes in history.attributes.items()
        for key, value in attributes.items()
        if key.endswith(GENERATION)
    }


# ---- the view ------------------------------------------------------------------------------------------------------


class View(InMemoryStorage):
    """Past trials that are only read, and the one that is asked for.

    Optuna's own way to bring trials into memory copies each of them deeply, which takes longer than a suggestion.
    """

    def __init__(self, past: Sequence[FrozenTrial]) -> None:
        super().__init__()
        self._past = past

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        past = [trial for trial in self._past if states is None or trial.state in states]
        return past + super().get_all_trials(study_id, deepcopy, states)
