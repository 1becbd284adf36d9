"""Ray Tune's TrialScheduler over the study: asks the rules of `search.scheduling.stopping` at every report.

It decides from the study alone, so one that is made anew after a restart goes on where the last one was.
"""

import json
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any, Protocol

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from search.attempts.deaths import Cause
from search.config import SearchConfig
from search.errors import one_line
from search.scheduling.standings import Standings
from search.scheduling.stopping import judge_rung, judge_verification
from search.studies.records import RungValues, TrialRecord, TrialResult

# Spreads above its forecast that a trial may still hope for (docs/RESULTS.md has the choice).
MARGIN = 2.0


class JudgedStudy(Protocol):
    """What the scheduler needs of `search.study.Study`."""

    @property
    def config(self) -> SearchConfig: ...
    def trials(self) -> Sequence[TrialRecord]: ...
    def note_rung(self, number: int, rung: str, values: RungValues) -> None: ...


class StudyScheduler(FIFOScheduler):  # type: ignore[misc]
    """Starts trials in the order in which they come, and stops those that the rules stop.

    Args:
        study: the truth; values at rungs are written to it before they are judged.
        margin: as for `search.scheduling.stopping.judge_rung`; None: no trial is spared for what it may hope for.
        cause: why the worker ended whose error Tune handles at the moment.
        leave: ends a trial's worker if its node is about to go.

    Attributes:
        causes: why a worker ended, by Tune's id of its trial; the searcher takes them out.
        stopped: why a trial was stopped at its last report, by its key; the searcher tells the study.
        is_halted: every trial is stopped at its next report, without being judged the worse for it.
        is_closed: no trial starts any more, those that wait in Ray's queue included.
        taken_back: Tune's ids of trials that are not to start as they were suggested.
        error: the last failure to judge or to write, in one line; the trial went on.
    """

    # A stop must come between a report and the work after it, so reports are not to be collected.
    _supports_buffered_results = False

    def __init__(
        self,
        study: JudgedStudy,
        *,
        margin: float | None = MARGIN,
        cause: Callable[[], Cause | None] = lambda: None,
        leave: Callable[[Any], None] = lambda trial: None,
    ) -> None:
        super().__init__()
        self._study, self._margin, self._cause, self._leave = study, margin, cause, leave
        self.causes: dict[str, Cause] = {}
        self._standings = Standings()
        self.stopped: dict[str, str] = {}
        self.is_halted = self.is_closed = False
        self.taken_back: set[str] = set()
        self._queue: deque[Any] = deque()  # what has not started, in order; what has is dropped when it is met
        self.error: str | None = None

    def halt(self) -> None:
        """The time is over: what runs ends at its next report and goes on when the search does."""
        self.is_halted = True

    def close(self) -> None:
        """The search is over: what has not started is taken out of Ray's queue, where it might wait for ever."""
        self.is_closed = True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._queue.append(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """The next trial, in their order. Tune asks at each of its steps, so that here trials can be taken back: one
        that waits for a place reports nothing, and Tune looks at requests to stop one nowhere else [ray 2.60]. And so
        that only what waits is gone through: Tune's own scheduler looks at all trials of the search each time."""
        if self.is_closed or self.taken_back:
            for trial in tuple(self._queue):
                if trial.status == Trial.PENDING and (self.is_closed or trial.trial_id in self.taken_back):
                    with redirect_stdout(None):  # where Tune would print a line, however quiet it is to be
                        tune_controller.stop_trial(trial)  # the searcher hears of an end without a report
            self.taken_back.clear()
        while self._queue and self._queue[0].status != Trial.PENDING:
            self._queue.popleft()
        return None if self.is_closed or not self._queue else self._queue[0]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Judge a report. Tune lets what is raised here end all trials, so nothing is."""
        key = result.get("key")
        # Tune repeats the last report with `done` when a worker has returned: there is nothing left to stop.
        if isinstance(key, str) and result.get("state") in ("RUNG", "VERIFYING") and not result.get("done"):
            try:
                reason = self._judge(key, result)
            except Exception as failure:
                self.error = f"trial {key} could not be judged ({one_line(failure)}); it goes on"
                reason = None
            if reason is not None:
                self.stopped[key] = reason
                return str(TrialScheduler.STOP)
            self.stopped.pop(key, None)  # of a trial that was stopped, then put back and started again
        if self.is_halted:
            return str(TrialScheduler.STOP)
        if result.get("state") in ("RUNNING", "RUNG", "VERIFYING") and not result.get("done"):
            self._let_leave(trial)
        return str(TrialScheduler.CONTINUE)

    def _let_leave(self, trial: Any) -> None:
        try:
            self._leave(trial)
        except Exception as failure:  # it then ends with its node
            self.error = f"nodes that are drained are not known ({one_line(failure)})"

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Keep why a worker ended: Tune tells the searcher next, without the reason."""
        if (cause := self._cause()) is not None:
            self.causes[trial.trial_id] = cause

    def _judge(self, key: str, result: dict[str, Any]) -> str | None:
        self._standings.update(self._study.trials())
        number = self._standings.number_of(key)
        if number is None or self._standings.record(number).state != "RUNNING":
            return None
        config = self._study.config
        if result["state"] == "VERIFYING":
            if not config.stopping.verification:
                return None
            known = TrialResult(**json.loads(result["result"]))
            return judge_verification(number, known, self._standings, seeds=config.search.seeds)
        rung, values = result["rung"], RungValues(**json.loads(result["values"]))
        self._study.note_rung(number, rung, values)
        if config.stopping.training == "off" or self._is_further_seed(number):
            return None
        self._standings.update(self._study.trials())
        return judge_rung(
            number, rung, self._standings, config.stopping, config.search.hypervolume_reference, margin=self._margin
        )

    def _is_further_seed(self, number: int) -> bool:
        """Whether the trial's configuration has a result: its mean would flatter it if the worse seeds had none."""
        configuration = self._standings.record(number).configuration
        runs = self._standings.runs(configuration) if configuration else []
        return any(run.state == "COMPLETE" for run in runs)

    def debug_string(self) -> str:
        return f"{len(self.stopped)} trials stopped"

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its scheduler with the experiment; database handles and credentials stay out of that."""
        return {}
