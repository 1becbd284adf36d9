"""What to run next: a further seed of a good configuration, or what the sampler suggests and nobody has tried."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from search import pareto
from search.config import GPConfig, NSGA2Config, NSGA3Config, RandomConfig, SamplerConfig, SearchOptions, TPEConfig
from search.recipe import derive_seed
from search.space import Space
from search.studies.records import TrialRecord, TrialState
from search.suggestions.crowding import is_crowded
from search.suggestions.sampling import Suggested, suggest
from search.suggestions.sampling_view import TELL_STOPPED, History, TellStopped, distributions, is_by_values

DRAWS = 8  # further draws for a suggestion that was tried already
RANDOM_STARTUP = 10  # COMPLETE trials before the random sampler, which has no start-up, repeats any


@dataclass(frozen=True)
class Proposal:
    """All that the next suggestion needs: a snapshot, so that a thread may use it while the study goes on."""

    number: int
    options: SearchOptions
    history: History
    space: Space
    tell_stopped: TellStopped = TELL_STOPPED

    def suggest(self) -> Suggested:
        """The trial to run as `number`; randomness comes from (study seed, number, attempt) only."""
        repeated = repetition(self.history.trials, seeds=self.options.seeds, startup=startup(self.options.sampler))
        if repeated is not None:
            params = dict(self.history.trials[repeated].params)
            return Suggested(params, distributions(self.space, params))
        drawn: list[Suggested] = []
        for attempt in range(1 + DRAWS):
            drawn.append(self.draw(self.options.sampler, attempt))
            if not self._states(drawn[-1]):
                return self._elsewhere(drawn[-1])
        return self._further_seed(drawn)

    def draw(self, sampler: SamplerConfig, attempt: int, fixed: Mapping[str, object] | None = None) -> Suggested:
        """One suggestion, whether tried or not; `fixed` values are not the sampler's choice."""
        parts = (self.options.seed, "sampler", self.number)
        return suggest(
            sampler,
            derive_seed(*parts, attempt) if attempt else derive_seed(*parts),
            self.history,
            self.space,
            floors=self.options.floors,
            tell_stopped=self.tell_stopped,
            fixed=fixed,
        )

    def _elsewhere(self, suggested: Suggested) -> Suggested:
        """What a Gaussian process suggests, unless that place is crowded: then what TPE does, or chance.

        Where everything is crowded, it is right. Other samplers spread by themselves.
        """
        ours = isinstance(self.options.sampler, GPConfig) and is_by_values(self.tell_stopped)
        if not ours or not self._is_crowded(suggested):
            return suggested
        samplers: tuple[SamplerConfig, ...] = (TPEConfig(), RandomConfig())
        others = (self.draw(sampler, 1 + 2 * DRAWS + place) for place, sampler in enumerate(samplers))
        return next((each for each in others if not self._is_crowded(each) and not self._states(each)), suggested)

    def _is_crowded(self, suggested: Suggested) -> bool:
        known = {name: parameter.distribution for name, parameter in self.space.parameters.items()}
        return is_crowded(suggested.params, known, self.history.trials)

    def _further_seed(self, drawn: Sequence[Suggested]) -> Suggested:
        """The last of what the sampler insists on, unless that would be stopped again: then a random trial.

        Where no random trial is new, any that was not stopped; where there is none, the same again.
        """
        last = drawn[-1]
        if "STOPPED" not in self._states(last):
            return last
        chance = [self.draw(RandomConfig(), 1 + DRAWS + attempt) for attempt in range(DRAWS)]
        new = [suggested for suggested in chance if not self._states(suggested)]
        going = [suggested for suggested in (*chance, *drawn) if "STOPPED" not in self._states(suggested)]
        return next(iter([*new, *going, last]))

    def _states(self, suggested: Suggested) -> set[TrialState]:
        """The states of the trials of this configuration, failed ones aside: those are no answer."""
        configuration = self.space.configuration(suggested.params)
        same = (trial for trial in self.history.trials if trial.configuration == configuration)
        return {trial.state for trial in same if trial.state != "FAILED"}


def repetition(trials: Sequence[TrialRecord], *, seeds: int, startup: int) -> int | None:
    """Number of the trial whose configuration gets a further seed next, or None.

    A configuration stands where the mean of its COMPLETE trials stands (worst ends of intervals). Those on the front of
    these means, equal ones included, are repeated until they have `seeds` runs, fewest runs first, ties by their first
    trial's number. Every run counts, also one that waits, runs, failed or was stopped. At most every second trial is
    a repetition, and none comes before `startup` trials are COMPLETE.

    Args:
        trials: all trials by number.
        seeds: runs that a configuration of the front shall have; 1: none is repeated.
        startup: COMPLETE trials.
    """
    if seeds == 1 or sum(trial.state == "COMPLETE" for trial in trials) < startup:
        return None
    last = trials[-1].configuration
    if last and any(trial.configuration == last for trial in trials[:-1]):
        return None
    runs: dict[str, list[TrialRecord]] = defaultdict(list)
    for trial in trials:
        if trial.configuration:
            runs[trial.configuration].append(trial)
    standing = {name: mean for name, of in runs.items() if (mean := _mean(of)) is not None}
    names = list(standing)
    on_front = [names[index] for index in pareto.front(list(standing.values())).tolist()]
    open_ones = [(len(runs[name]), runs[name][0].number) for name in on_front if len(runs[name]) < seeds]
    return min(open_ones)[1] if open_ones else None


def startup(sampler: SamplerConfig) -> int:
    """COMPLETE trials before a sampler's suggestions mean more than chance."""
    match sampler:
        case TPEConfig(startup_trials=count) | GPConfig(startup_trials=count):
            return count
        case NSGA2Config(population=count) | NSGA3Config(population=count):
            return count
        case RandomConfig():
            return RANDOM_STARTUP


def _mean(runs: Sequence[TrialRecord]) -> tuple[float, float] | None:
    points = [trial.objectives for trial in runs if trial.objectives is not None]
    if len(points) < 2:
        return points[0] if points else None
    return fmean(point[0] for point in points), fmean(point[1] for point in points)
