"""Whether a suggestion lies where enough has been tried: pure functions of parameters.

A Gaussian process that takes noise for promise suggests one place again and again. In simulated searches with seven
parameters up to a third of all trials lay within a tenth of every range; they cost what new places would have cost.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution

from search.ranges import distance
from search.studies.records import TrialRecord

NEAR = 0.1  # of a parameter's range, on its own scale
CROWD = 3  # configurations
LATEST = 256  # trials that are looked at: those of a crowd follow each other

Distributions = Mapping[str, BaseDistribution]


def is_crowded(params: Mapping[str, Any], distributions: Distributions, trials: Sequence[TrialRecord]) -> bool:
    """Whether `CROWD` configurations of the latest trials are near these parameters.

    Args:
        params: of a suggestion.
        distributions: of all parameters of the space.
        trials: all trials by number; FAILED ones do not count, for they tell nothing about their place.
    """
    near: set[str] = set()
    for trial in reversed(trials[-LATEST:]):
        if trial.state != "FAILED" and is_near(params, trial.params, distributions):
            near.add(trial.configuration)
            if len(near) == CROWD:
                return True
    return False


def is_near(first: Mapping[str, Any], second: Mapping[str, Any], distributions: Distributions) -> bool:
    """Whether two trials have the same parameters, equal choices, and no number further apart than `NEAR`."""
    return first.keys() == second.keys() and all(
        distance(first[name], second[name], distributions[name]) <= NEAR for name in first
    )
