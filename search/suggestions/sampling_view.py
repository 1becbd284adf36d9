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
from search.ranges import value_at
from search.scheduling.forecast import Forecast, forecast
from search.space import Space
from search.studies.records import OBJECTIVES, TrialRecord

# values: COMPLETE with the values that are expected of it; constraint: the same, violating a constraint; pruned:
# Optuna's PRUNED, without values, which TPE counts among the bad ones; nothing: left out.
TellStopped = Literal["values", "constraint", "pruned", "nothing"]
TELL_STOPPED: TellStopped = "values"


def is_by_values(tell_stopped: TellStopped) -> bool:
    """Whether a sampler is told what is expected; else it sees what Optuna's own study would hold, and nothing more."""
    return tell_stopped in ("values", "constraint")


STOPPED = "stopped"  # the constraint's name
# Ended trials in a view: the time of a suggestion grows with them, and a Gaussian process takes a second with 200.
VIEW_SIZES = {"tpe": 200, "gp": 200}
EXPECTED_FROM = 200  # finished trials, the most recent
EARLY_FROM = 5  # finished trials at a rung before a running one is told by it

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


class Expectations:
    """What finished trials let one expect of those that were stopped, or still run.

    A trial without a result is expected where its last rung leads: at the `search.scheduling.forecast` of the finished
    trials that have reached that rung, within [0, 1], and at its values there if none has. A trial whose verification
    was stopped has its standard accuracy, and its certified accuracy is expected where its rungs say, within its
    interval; without rungs at

        upper end * sum of certified accuracies of finished trials / sum of their adversarial accuracies

    for what attacks leave open is mostly proved in the end. `TrialResult.expected_certified` knows
    one trial only: stopped right after an attack it is 0, since no image was proved yet.

    Args:
        trials: by number; the latest of those that are verified to the end count.
    """

    def __init__(self, trials: Sequence[TrialRecord]) -> None:
        verified = (trial for trial in reversed(trials) if trial.objectives and trial.verification_state != "stopped")
        self._finished = list(itertools.islice(verified, EXPECTED_FROM))
        self._forecasts: dict[str, Forecast | None] = {}

    def of(self, trial: TrialRecord) -> Point:
        """The objectives of a COMPLETE trial, or of another one with a rung, as the sampler is told them."""
        if trial.objectives is None:
            standard, certified = self._from_rung(trial) or _last_values(trial)
            return standard, certified
        standard, lower = trial.objectives
        upper = trial.certified_upper
        if trial.verification_state != "stopped" or upper is None:
            return standard, lower
        rung = self._from_rung(trial) if trial.rungs else None
        if rung is not None:
            expected = rung[1]
        elif self._finished:
            expected = upper * self._proved_share()
        else:
            expected = lower if trial.expected_certified is None else trial.expected_certified
        return standard, min(upper, max(lower, expected))

    def _from_rung(self, trial: TrialRecord) -> Point | None:
        """Where the trial's last rung leads; None: no finished trial has reached it."""
        rung = next(reversed(trial.rungs))
        if rung not in self._forecasts:
            self._forecasts[rung] = self._forecast(rung)
        found = self._forecasts[rung]
        if found is None:
            return None
        standard, certified = np.clip(found.of(np.array(_values(trial, rung))), 0.0, 1.0).tolist()
        return standard, min(standard, certified)  # what is proved is classified correctly

    def is_founded(self, trial: TrialRecord) -> bool:
        """Whether enough finished trials have reached the trial's last rung to tell a sampler of it while it runs."""
        return bool(trial.rungs) and len(self._witnesses(next(reversed(trial.rungs)))) >= EARLY_FROM

    def _witnesses(self, rung: str) -> list[TrialRecord]:
        return [trial for trial in self._finished if rung in trial.rungs]

    def _forecast(self, rung: str) -> Forecast | None:
        witnesses = self._witnesses(rung)
        if not witnesses:
            return None
        values = np.array([_values(trial, rung) for trial in witnesses])
        return forecast(values, np.array([trial.objectives for trial in witnesses]))

    def _proved_share(self) -> float:
        attacked = sum(trial.adversarial_accuracy or 0.0 for trial in self._finished)
        proved = sum(trial.certified_accuracy or 0.0 for trial in self._finished)
        return min(1.0, proved / attacked) if attacked else 0.0


def _last_values(trial: TrialRecord) -> Point:
    return _values(trial, next(reversed(trial.rungs)))


def _values(trial: TrialRecord, rung: str) -> Point:
    return trial.rungs[rung].standard_accuracy, trial.rungs[rung].certified_accuracy


def frozen_trials(
    shown: Sequence[TrialRecord],
    history: History,
    space: Space,
    floors: Mapping[str, float],
    tell_stopped: TellStopped,
    *,
    early: bool = False,
    filled: bool = False,
) -> Iterator[FrozenTrial]:
    """The shown trials as Optuna's, by number.

    A Gaussian process wants equally many constraints in every COMPLETE trial, so `stopped` is in all of them or none.

    Args:
        early: a trial that runs is told as COMPLETE with what is expected of it, if that `is_founded`. A sampler that
            waits for results knows nothing of its last suggestions, as many as there are slots.
        filled: a parameter that a trial does not have, since a switch is off, gets some value of its range. Optuna's
            Gaussian process models only parameters that all trials have, and draws others at random for ever. The
            values differ: were they one, all others would look unexplored, and the sampler would ask for them there,
            where they mean nothing.
    """
    expected = Expectations(history.trials)
    by_values = is_by_values(tell_stopped)
    stopped = any(trial.state == "STOPPED" and trial.rungs for trial in shown) and tell_stopped == "constraint"
    for trial in shown:
        params = _filled(trial, space) if filled else trial.params
        own = {key: value for key, value in history.attributes.get(trial.number, {}).items() if key != NOTES}
        runs = trial.state in ("RUNNING", "WAITING")
        if runs and not (early and expected.is_founded(trial)):
            yield _PastTrial(trial.number, params, space, TrialState.RUNNING, own)
        elif trial.objectives is not None:
            constraints = floor_constraints(floors, trial.objectives) | ({STOPPED: 0.0} if stopped else {})
            yield _PastTrial(trial.number, params, space, TrialState.COMPLETE, own, expected.of(trial), constraints)
        elif trial.rungs and by_values:
            point = expected.of(trial)
            constraints = floor_constraints(floors, point) | ({STOPPED: float(not runs)} if stopped else {})
            yield _PastTrial(trial.number, params, space, TrialState.COMPLETE, own, point, constraints)
        elif tell_stopped == "pruned":
            yield _PastTrial(trial.number, params, space, TrialState.PRUNED, own)


def _filled(trial: TrialRecord, space: Space) -> dict[str, Any]:
    """The trial's parameters, and those that it does not have at places that follow from its number."""
    if len(trial.params) == len(space.parameters):
        return trial.params
    shares = np.random.default_rng(trial.number).random(len(space.parameters)).tolist()
    everywhere = {
        name: value_at(parameter.distribution, share)
        for (name, parameter), share in zip(space.parameters.items(), shares, strict=True)
    }
    return everywhere | trial.params


class _PastTrial(FrozenTrial):
    """A trial of the view. Optuna's own reads its constraints from a longer dictionary at every question."""

    def __init__(
        self,
        number: int,
        params: dict[str, Any],
        space: Space,
        state: TrialState,
        attributes: Attributes,
        values: Point | None = None,
        constraints: dict[str, float] | None = None,
    ) -> None:
        super().__init__(
            number=number + 1,
            trial_id=number + 1,
            state=state,
            value=None,
            values=values,
            datetime_start=_SOME_TIME,
            datetime_complete=_SOME_TIME if state.is_finished() else None,
            params=params,
            distributions=distributions(space, params),
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
    told: list[TrialRecord] = []
    others: list[TrialRecord] = []
    for trial in drawn:
        (told if trial.state in _TOLD else others).append(trial)
    if len(told) <= size:
        return drawn
    kept = thinned(told, floors, size)
    shown = [trial for trial in told if trial.number in kept]
    return sorted((*shown, *others), key=lambda trial: trial.number)


def thinned(told: Sequence[TrialRecord], floors: Mapping[str, float], size: int) -> set[int]:
    """Numbers of the told trials that a sampler needs most: the front layers fill half, the most recent the rest.

    Layers count feasible trials only, from the front inwards, and of the last that fits in part the most recent. TPE
    asks for the few best, takes all others as one density, and weighs the older of those less.
    """
    complete = [trial for trial in told if trial.state == "COMPLETE"]
    # Straight into arrays: thousands of pairs kept at once set off Python's garbage collector.
    columns = [
        np.fromiter((getattr(trial, name) for trial in complete), np.float64, len(complete)) for name in OBJECTIVES
    ]
    values = np.stack(columns, axis=1)
    feasible = np.flatnonzero((values >= [floors.get(name, 0.0) for name in OBJECTIVES]).all(axis=1))
    ranked = np.lexsort((-feasible, pareto.layers(values[feasible])))  # by layer, then the most recent first
    kept = {complete[index].number for index in feasible[ranked[: size // 2]].tolist()}
    rest = (trial.number for trial in reversed(told) if trial.number not in kept)
    return kept | set(itertools.islice(rest, size - len(kept)))


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
