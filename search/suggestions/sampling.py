"""What a sampler suggests, as a pure function of what the study holds.

For every suggestion a view of the study is made in memory and Optuna's sampler is asked there, so the database holds
nothing but the truth: what is told of a trial can be chosen here, and an earlier choice can be taken back.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler

from search.config import GPConfig, NSGA2Config, NSGA3Config, RandomConfig, SamplerConfig, TPEConfig
from search.space import Space, Suggester
from search.suggestions.sampling_view import (
    GENERATION,
    NOTES,
    TELL_STOPPED,
    History,
    TellStopped,
    View,
    distributions,
    frozen_trials,
    is_by_values,
    notes,
    shown_trials,
)

DIRECTIONS: list[Literal["maximize", "minimize"]] = ["maximize", "maximize"]


@dataclass(frozen=True)
class Suggested:
    """A trial that can be stored whole."""

    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]
    system_attrs: dict[str, Any] = field(default_factory=dict)


def suggest(
    sampler: SamplerConfig,
    seed: int,
    history: History,
    space: Space,
    *,
    floors: Mapping[str, float],
    tell_stopped: TellStopped = TELL_STOPPED,
    fixed: Mapping[str, Any] | None = None,
) -> Suggested:
    """The sampler's next trial; equal arguments give equal answers.

    Args:
        sampler: which one, with its options.
        seed: all its randomness.
        history: what it may know.
        space: what is searched.
        floors: least useful value by objective, in [0, 1); a trial below one is infeasible.
        tell_stopped: what it is told of trials whose training was stopped; what is expected of trials that run, and
            parameters that a trial does not have, are told with it.
        fixed: values of parameters that are not its choice.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    shown = shown_trials(sampler, history, floors)
    by_values = is_by_values(tell_stopped)
    # Genetic samplers breed a generation once it is complete, from what its trials became.
    genetic = isinstance(sampler, NSGA2Config | NSGA3Config)
    filled = by_values and isinstance(sampler, GPConfig)
    early = by_values and not genetic
    past = list(frozen_trials(shown, history, space, floors, tell_stopped, early=early, filled=filled))
    storage = View(past)
    study = optuna.create_study(storage=storage, directions=DIRECTIONS, sampler=make_sampler(sampler, seed))
    for key, value in notes(sampler, history).items():
        storage.set_study_system_attr(study._study_id, key, value)
    before = set(storage.get_study_system_attrs(study._study_id))
    trial = study.ask()
    if genetic:
        _ = trial.relative_params  # a trial whose parameters are all fixed belongs to the generation, too
    params = space.suggest(_WithFixed(trial, fixed or {}))
    attributes: dict[str, Any] = {}
    if genetic:
        own = storage.get_trial_system_attrs(trial._trial_id)
        noted = storage.get_study_system_attrs(study._study_id)
        attributes = {key: value for key, value in own.items() if key.endswith(GENERATION)}
        if found := {key: value for key, value in noted.items() if key not in before}:
            attributes[NOTES] = found
    return Suggested(params, distributions(space, params), attributes)


def make_sampler(config: SamplerConfig, seed: int) -> BaseSampler:
    """The sampler by its configuration."""
    match config:
        case TPEConfig(startup_trials=startup):
            return optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed)
        case NSGA2Config(population=population):
            return optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
        case NSGA3Config(population=population):
            # Chosen knowingly. No `catch_warnings`: suggestions are made in a thread, and it is not safe in threads.
            warnings.filterwarnings("ignore", "NSGAIIISampler is experimental", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.NSGAIIISampler(population_size=population, seed=seed)
        case GPConfig(startup_trials=startup):
            return optuna.samplers.GPSampler(n_startup_trials=startup, seed=seed, warn_independent_sampling=False)
        case RandomConfig():
            return optuna.samplers.RandomSampler(seed=seed)


class _WithFixed:
    """An Optuna trial of which some values are given."""

    def __init__(self, trial: Suggester, fixed: Mapping[str, Any]) -> None:
        self._trial, self._fixed = trial, fixed

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self._fixed[name]) if name in self._fixed else self._trial.suggest_float(name, low, high, log=log)

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return int(self._fixed[name]) if name in self._fixed else self._trial.suggest_int(name, low, high, log=log)

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        return self._fixed[name] if name in self._fixed else self._trial.suggest_categorical(name, choices)
