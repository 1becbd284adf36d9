"""When a search ends: counted from the study, so that a continued search goes on where the last one was."""

import time
from collections.abc import Callable, Iterable, Sequence

from search.attempts.deaths import lost_seconds
from search.config import BudgetConfig, ResourcesConfig
from search.studies.records import TrialRecord

SECONDS_PER_HOUR = 3600.0


def accelerator_hours(trials: Iterable[TrialRecord], resources: ResourcesConfig) -> float:
    """Hours of all trials, each times its share of GPUs; without GPUs, times its cores.

    What was lost with workers was paid, too. A trial that has not finished counts what it had spent when it last
    reached a rung; one that ran out of memory counts as if it had held its last share from its start on.
    """
    ordinary = resources.gpu or resources.cpu
    return sum(_seconds(trial) * (trial.accelerators or ordinary) for trial in trials) / SECONDS_PER_HOUR


def _seconds(trial: TrialRecord) -> float:
    own = trial.seconds
    if own is None:
        own = max((values.seconds for values in trial.rungs.values()), default=0.0)
    return own + lost_seconds(trial.deaths)


class Budget:
    """The limits of one search command.

    Args:
        trials: the study's trials as they are now; the same object until one changes.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        limits: BudgetConfig,
        resources: ResourcesConfig,
        trials: Callable[[], Sequence[TrialRecord]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.target = limits.trials
        self._limits, self._resources, self._trials, self._clock = limits, resources, trials, clock
        self._started = clock()
        self._counted: tuple[Sequence[TrialRecord], float] = ((), 0.0)  # trials, and their hours

    @property
    def is_open_ended(self) -> bool:
        """Whether something besides the number of trials limits the search, so that budget may be left after them."""
        return self._limits.hours is not None or self._limits.accelerator_hours is not None

    def spent(self) -> str | None:
        """Why nothing may start any more, or None."""
        limit = self._limits.accelerator_hours
        if limit is not None and self._hours() >= limit:
            return f"the budget of {limit:g} accelerator-hours is spent"
        return self.expired()

    def _hours(self) -> float:
        """Of all trials, counted anew only when one has changed: Tune asks after each report."""
        trials = self._trials()
        if trials is not self._counted[0]:
            self._counted = trials, accelerator_hours(trials, self._resources)
        return self._counted[1]

    def expired(self) -> str | None:
        """Why what runs is to be cut off now, or None."""
        limit = self._limits.hours
        if limit is not None and self._clock() - self._started >= limit * SECONDS_PER_HOUR:
            return f"the budget of {limit:g} hours is over"
        return None
