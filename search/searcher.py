"""Ray Tune's Searcher over the study: what to run next, and what came of it.

Tune's own state is a view: this object is rebuilt from the study at every start, and nothing reads what Tune
pickles of it. A Tune trial id means nothing outside one run; our trial key joins everything.
"""

import json
import re
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from ray.tune.search import Searcher

from search.records import TrialResult
from search.study import Assignment, Study
from search.worker import Suggestion

# So many failures one after the other with the same reason are no accident.
IDENTICAL_FAILURES = 3


def allowed_failures(trials: int) -> int:
    """How many FAILED trials a search of so many trials may collect."""
    return max(3, trials // 4)


class Listener(Protocol):
    """Who wants to know how trials fare."""

    def started(self, key: str) -> None: ...
    def advanced(self, key: str, phase: str, done: int, of: int) -> None: ...
    def finished(self, key: str, result: TrialResult) -> None: ...
    def failed(self, key: str, reason: str) -> None: ...


class StudySearcher(Searcher):  # type: ignore[misc]
    """Suggests unfinished trials first, then new ones, until `target` trials are COMPLETE.

    Args:
        study: the truth; this object is the only one that asks and tells.
        target: COMPLETE trials to reach.
        slots: trials at once.
        stored_result: the result that a trial of an earlier driver left behind, if it finished.
        listener: told of every start, step and end.
    """

    def __init__(
        self,
        study: Study,
        target: int,
        slots: int,
        stored_result: Callable[[str], TrialResult | None],
        listener: Listener,
    ) -> None:
        super().__init__(metric=None, mode=None)
        self._study, self._target, self._slots = study, target, slots
        self._stored_result, self._listener = stored_result, listener
        self._live: dict[str, Assignment] = {}
        self._unfinished = deque(study.unfinished())
        self._complete, self._failed = study.num_complete(), study.num_failed()
        self._reasons: list[str] = []
        self.stop_reason: str | None = None
        self.silent_failures: dict[str, str] = {}  # key -> reason, of trials that could not write their own end

    def suggest(self, trial_id: str) -> Any:
        """The next trial to run, as a Tune configuration; None: not now; FINISHED: never again."""
        while self.stop_reason is None and len(self._live) < self._slots:
            if self._complete + len(self._live) >= self._target:
                break
            assignment = self._study.adopt(self._unfinished.popleft()) if self._unfinished else self._study.ask()
            stored = self._stored_result(assignment.key)
            if stored is not None:  # finished under an earlier driver, which did not live to tell
                self._tell(assignment, stored)
                continue
            self._live[trial_id] = assignment
            self._listener.started(assignment.key)
            recipe = self._study.space.recipe(assignment.params, assignment.number)
            return Suggestion(assignment.key, assignment.params, recipe).to_config()
        if self._live:
            return None
        if self.stop_reason is None:
            self._give_up_unfinished()
        return Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if result.get("state") == "RUNNING" and trial_id in self._live:
            self._listener.advanced(self._live[trial_id].key, result["phase"], result["step"], result["steps"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study. Tune swallows what is raised here, so a study that cannot be written ends the search."""
        assignment = self._live.pop(trial_id, None)
        if assignment is None:
            return
        try:
            self._conclude(assignment, result)
        except Exception as failure:
            self._unfinished.append(assignment.number)
            reason = " ".join(str(failure).split())
            self.stop_reason = f"the study could not be written ({type(failure).__name__}: {reason}); nothing is lost"

    def _conclude(self, assignment: Assignment, result: dict[str, Any] | None) -> None:
        state = (result or {}).get("state")
        if state == "COMPLETE" and result is not None:
            self._tell(assignment, TrialResult(**json.loads(result["result"])))
        elif state == "FAILED" and result is not None:
            self._fail(assignment, result["reason"])
        else:
            stored = self._stored_result(assignment.key)
            if stored is not None:
                self._tell(assignment, stored)
            else:
                reason = "worker died: its process ended without a report (killed, or out of memory)"
                self.silent_failures[assignment.key] = reason
                self._fail(assignment, reason)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study has it. Tune wants a file."""
        with open(checkpoint_path, "w") as file:
            file.write("the study is the only state\n")

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search goes on from its study: run search.run again")

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher with the experiment; database handles and credentials stay out of that."""
        return {}

    def _give_up_unfinished(self) -> None:
        """Trials cut off under an earlier driver that asked for more: none may stay RUNNING in a complete study."""
        reason = f"given up: it was cut off, and {self._target} trials were reached without it"
        while self._unfinished:
            assignment = self._study.adopt(self._unfinished.popleft())
            stored = self._stored_result(assignment.key)
            if stored is not None:  # it had finished: a result is never thrown away
                self._tell(assignment, stored)
            else:
                self.silent_failures[assignment.key] = reason
                self._study.tell_failed(assignment.number, reason, given_up=True)

    def _tell(self, assignment: Assignment, result: TrialResult) -> None:
        self._study.tell(assignment.number, result)
        self._complete += 1
        self._reasons.clear()
        self._listener.finished(assignment.key, result)

    def _fail(self, assignment: Assignment, reason: str) -> None:
        self._study.tell_failed(assignment.number, reason)
        self._failed += 1
        # Steps, sizes and the weights of a loss differ, the reason does not.
        self._reasons.append(re.sub(r"\d[\d.e+-]*", "#", re.sub(r"\{[^{}]*\}", "{}", reason)))
        self._listener.failed(assignment.key, reason)
        last = self._reasons[-IDENTICAL_FAILURES:]
        if len(last) == IDENTICAL_FAILURES and len(set(last)) == 1:
            self.stop_reason = f"{IDENTICAL_FAILURES} trials in a row failed for the same reason: {reason}"
        elif self._failed > allowed_failures(self._target):
            self.stop_reason = (
                f"{self._failed} trials failed, more than the {allowed_failures(self._target)} that a search of "
                f"{self._target} trials may lose; the last reason: {reason}"
            )
