"""A confirmation: configurations of a study, run again with several seeds, as a study of its own.

Its trials are pairs of a configuration and a seed index, so everything that makes a search safe to interrupt (the
database, the one driver, checkpoints, journals) makes a confirmation safe, too. Seed index k gives teacher and student
seeds of its own, equal for all configurations, so runs of one index share their teachers and are compared fairly.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import IntDistribution

from search.config import SearchConfig
from search.confirming.confirmation_config import ConfirmationConfig, ConfirmError
from search.recipe import Recipe, derive_seed
from search.results.configurations import Configuration, configurations, study_front
from search.space import Parameter, Space
from search.studies.database import StudyError
from search.studies.records import StudyRecord, TrialRecord
from search.study import Study
from search.suggestions.proposal import Proposal
from search.suggestions.sampling import Suggested
from search.suggestions.sampling_view import History, distributions

# The parameter of a trial that says which seeds it has: 0, 1, ... of its confirmation.
SEED = "confirm_seed"
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Member:
    """A configuration of the study that is confirmed."""

    key: str  # of its first trial there
    number: int
    params: dict[str, Any]
    configuration: str  # hash of the parameters
    searched: Configuration | None  # its result there; None: it has none


@dataclass(frozen=True)
class Pair:
    """One run of a confirmation: a configuration with a seed index."""

    configuration: str
    seed: int
    params: dict[str, Any]  # the seed index is one of them


# ---- Which ---------------------------------------------------------------------------------------------------------


def chosen_members(searched: StudyRecord, names: Sequence[str]) -> tuple[Member, ...]:
    """The configurations of these trials, or those on the front.

    Args:
        names: numbers or keys of trials; none: the front.

    Raises:
        ConfirmError: there is no such trial, it has no parameters, or nothing is finished.
    """
    if not names:
        if not searched.complete:
            raise ConfirmError(
                f"study {searched.name} has no finished trial, so it has no front; run its search first, or name "
                "trials with --members"
            )
        trials: Iterable[TrialRecord] = [member.trials[0] for member in study_front(searched).members]
    else:
        trials = [_named(searched, name) for name in names]
    return members_of(searched, [trial.configuration for trial in trials])


def members_of(searched: StudyRecord, hashes: Iterable[str]) -> tuple[Member, ...]:
    """The configurations of these hashes, each once, in their order; what the study does not know is left out."""
    results = {each.trials[0].configuration: each for each in configurations(searched)}
    first: dict[str, TrialRecord] = {}
    for trial in searched.trials:
        first.setdefault(trial.configuration, trial)
    known = [first[name] for name in dict.fromkeys(hashes) if name in first]
    return tuple(
        Member(trial.key, trial.number, dict(trial.params), trial.configuration, results.get(trial.configuration))
        for trial in known
    )


def _named(searched: StudyRecord, name: str) -> TrialRecord:
    found = next((trial for trial in searched.trials if name in (trial.key, str(trial.number))), None)
    if found is None:
        numbers = f"0 to {len(searched.trials) - 1}" if searched.trials else "none"
        raise ConfirmError(f"study {searched.name} has no trial {name!r}; its trials are {numbers}")
    if not (found.params and found.configuration):
        raise ConfirmError(f"trial {found.key} is {found.state} and has no parameters that are known; name another one")
    return found


def planned(members: Sequence[Member], seeds: int, stored: StudyRecord | None) -> tuple[Pair, ...]:
    """The runs of a confirmation: those that are asked for, then those that it has already beside them.

    The first configuration comes with all its seeds first, so that their teachers are trained side by side; then seed
    by seed, so that a confirmation that is interrupted knows about as much of each.
    """
    order = [(member, seed) for seed in range(seeds) for member in members[:1]]
    order += [(member, seed) for seed in range(seeds) for member in members[1:]]
    asked = [Pair(member.configuration, seed, member.params | {SEED: seed}) for member, seed in order]
    present = [
        Pair(trial.configuration, trial.params[SEED], dict(trial.params))
        for trial in (stored.trials if stored else ())
        if trial.state != "FAILED"
    ]
    return tuple({(pair.configuration, pair.seed): pair for pair in [*asked, *present]}.values())


def runs_left(plan: Sequence[Pair], stored: StudyRecord | None) -> list[Pair]:
    """The runs without a result."""
    done = {_place(trial) for trial in stored.done} if stored else set()
    return [pair for pair in plan if (pair.configuration, pair.seed) not in done]


def _place(trial: TrialRecord) -> tuple[str, int]:
    return trial.configuration, trial.params[SEED]


# ---- As a study ----------------------------------------------------------------------------------------------------


def num_seeds(stored: StudyRecord | None) -> int:
    """How many seeds a stored confirmation has for a member, at most; 0: there is none."""
    return max((trial.params[SEED] + 1 for trial in stored.trials if SEED in trial.params), default=0) if stored else 0


def derived_seeds(study_seed: int, index: int) -> dict[str, int]:
    """The seeds of teacher and student for a seed index: other ones than those of any trial of the search."""
    return {part: derive_seed(study_seed, "confirm", index, part) for part in ("teacher", "student")}


class ConfirmationSpace(Space):
    """The space of the confirmed study, with the seed index as one more parameter that no sampler chooses."""

    def __init__(self, config: ConfirmationConfig, plan: Sequence[Pair] = ()) -> None:
        super().__init__(config)
        self.plan = tuple(plan)
        self.parameters[SEED] = Parameter(SEED, (SEED,), IntDistribution(0, MOST_SEEDS - 1), ())

    def recipe(self, params: Mapping[str, Any], number: int) -> Recipe:
        """The configurations of a run; its seeds follow from the study's seed and the seed index."""
        seeds = derived_seeds(self.config.search.seed, params[SEED])
        return self._build(lambda name, _: params[name], seeds)

    def configuration(self, params: Mapping[str, Any]) -> str:
        """Hash of the parameters without the seed index: that of the configuration in the confirmed study."""
        return super().configuration({name: value for name, value in params.items() if name != SEED})


class ConfirmationStudy(Study):
    """Asks for what its plan is missing; a run that failed is tried again when all others are there."""

    def prepare(self) -> Proposal:
        """The next run that has neither a result nor somebody who works on it."""
        assert isinstance(self.space, ConfirmationSpace)
        trials = self.trials()
        taken = {_place(trial) for trial in trials if trial.state != "FAILED"}
        failed = Counter(_place(trial) for trial in trials if trial.state == "FAILED")
        missing = [pair for pair in self.space.plan if (pair.configuration, pair.seed) not in taken]
        if not missing:
            raise StudyError(f"confirmation {self.config.study_name} has all its runs")
        pair = min(missing, key=lambda pair: failed[pair.configuration, pair.seed])  # of equals the first
        history = History(tuple(trials))
        return _Given(len(trials), self.config.search, history, self.space, self.tell_stopped_as, pair.params)


@dataclass(frozen=True)
class _Given(Proposal):
    """A run that is known, where a search would ask a sampler."""

    params: Mapping[str, Any] = field(default_factory=dict)

    def suggest(self) -> Suggested:
        return Suggested(dict(self.params), distributions(self.space, self.params))


def with_target(config: ConfirmationConfig, plan: Sequence[Pair]) -> ConfirmationConfig:
    """The configuration with the plan's runs as its budget."""
    return config.model_copy(update={"budget": config.budget.model_copy(update={"trials": max(1, len(plan))})})


def check_is_search(config: SearchConfig) -> None:
    """Refuse to confirm a confirmation.

    Raises:
        ConfirmError: it is one.
    """
    if isinstance(config, ConfirmationConfig):
        raise ConfirmError(
            f"{config.study_name} is a confirmation itself, of {config.confirmation.study}; name that study to go on"
        )
