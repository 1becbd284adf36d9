"""Ray Tune's Searcher over the study: what to run next, and what came of it.

Tune's own state is a view: this object is rebuilt from the study at every start, and nothing reads what Tune
pickles of it. A Tune trial id means nothing outside one run; our trial key joins everything.
"""

import json
import re
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Any, Protocol

from ray.tune.search import Searcher

from search.artifacts.disk_space import is_full_disk
from search.attempts.bad_hosts import BadHosts
from search.attempts.deaths import Cause, is_of_surroundings
from search.attempts.retries import Retries
from search.attempts.shares import Nodes, Share, unknown
from search.errors import one_line
from search.scheduling.budget import Budget
from search.scheduling.resumption import resumption
from search.scheduling.waiting import TeacherQueue
from search.studies.database import DatabaseAwayError
from search.studies.records import TrialResult
from search.studies.study_record import not_finite
from search.study import Assignment, Study
from search.suggestions.asking import Asker
from search.worker import Suggestion

# So many failures one after the other with the same reason are no accident.
IDENTICAL_FAILURES = 3
# How often the lock is looked at while trials only run.
LOCK_S = 5.0


def allowed_failures(trials: int) -> int:
    """How many FAILED trials a search of so many trials may collect."""
    return max(3, trials // 4)


class Listener(Protocol):
    """Who wants to know how trials fare."""

    def started(self, key: str) -> None: ...
    def lost(self, key: str, reason: str, *, goes_on: bool = True) -> None: ...
    def advanced(self, key: str, phase: str, done: int, of: int) -> None: ...
    def finished(self, key: str, result: TrialResult) -> None: ...
    def stopped(self, key: str, reason: str) -> None: ...
    def failed(self, key: str, reason: str) -> None: ...


class Files(Protocol):
    """What trials leave behind, and the ends that a worker could not write itself."""

    def result(self, key: str) -> TrialResult | None: ...
    def stored_at(self, key: str, teacher: str | None) -> float | None: ...
    def end_stopped_verification(self, key: str, result: TrialResult) -> None: ...
    def end_stopped_training(self, key: str, reason: str) -> None: ...
    def end_failed(self, key: str, reason: str, *, silent: bool) -> None: ...


class Stopper(Protocol):
    """The scheduler as the searcher sees it."""

    stopped: dict[str, str]  # key -> why it was told to stop
    causes: dict[str, Cause]  # Tune's id -> why its worker ended
    is_halted: bool
    taken_back: set[str]  # Tune's ids; those that have not started are suggested anew

    def halt(self) -> None:
        """Cut off whatever runs, at its next report; the study keeps it unfinished."""

    def close(self) -> None:
        """Take back whatever was suggested and has not started."""


class StudySearcher(Searcher):  # type: ignore[misc]
    """Suggests unfinished trials first, then new ones, until the budget is reached; then resumes verifications.

    Args:
        study: the truth; this object and the scheduler are the only ones that write it.
        budget: when to end.
        slots: trials at once, asked anew each time: a cluster's nodes come and go.
        files: the trials' folders and journals.
        listener: told of every start, step and end.
        scheduler: who stops trials; why each was stopped is read here when it ends.
        asker: who computes suggestions, in a thread where that is slow.
        teachers: who may start now, and who waits for another's teacher.
        is_only_driver: whether nobody else can be driving the study; asked before anything is written.
        node: the roomiest node of the cluster.
        node_ids: Ray's ids of the nodes on these hosts; none, if a share of that size would find no other node.
        clock: Unix time.
    """

    def __init__(
        self,
        study: Study,
        budget: Budget,
        slots: Callable[[], int],
        files: Files,
        listener: Listener,
        scheduler: Stopper,
        asker: Asker,
        teachers: TeacherQueue,
        is_only_driver: Callable[[], bool] = lambda: True,
        node: Nodes = unknown,
        node_ids: Callable[[Collection[str], Share], tuple[str, ...]] = lambda hosts, share: (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(metric=None, mode=None)
        self._study, self._budget, self._slots, self._files = study, budget, slots, files
        self._listener, self._scheduler, self._asker, self._teachers = listener, scheduler, asker, teachers
        self._is_only_driver = is_only_driver
        self._retries = Retries(study, files, teachers.teacher_of, node, clock)
        self._live: dict[str, Assignment] = {}
        self._resumed: dict[str, Assignment] = {}  # verifications that go on, by Tune trial id
        self._tried: set[int] = set()  # trials whose verification this command has resumed
        self._unfinished = deque(study.unfinished())
        self._reasons: list[str] = []
        self._hosts, self._node_ids = BadHosts(), node_ids
        self._avoiding: dict[str, frozenset[str]] = {}  # hosts where what waits in Ray's queue must not start
        self._lock_seen = time.monotonic()
        self.stop_reason: str | None = None  # the search cannot go on
        self.budget_reason: str | None = None  # the search is over before it has all trials

    # ---- What to run ----------------------------------------------------------------------------------------------

    def suggest(self, trial_id: str) -> Any:
        """The next trial to run, as a Tune configuration; None: not now; FINISHED: never again.

        Tune ends the whole search on what is raised here, so that nothing is.
        """
        try:
            self._look_at_the_budget()
            self._look_at_the_lock()
            self._look_at_the_queue()
            if not self._has_ended and self._retries.load() < self._slots():
                started = self._start(trial_id)
                if started is not None:
                    return started
        except Exception as failure:
            self._stop(f"no trial can be started ({one_line(failure)}); nothing is lost")
        if self._live or self._resumed or self._work_is_left():
            return None
        try:
            if not self._has_ended and self._may_write():
                self._give_up_unfinished()
        except Exception as failure:
            self._stop(f"what was cut off cannot be given up ({one_line(failure)}); nothing is lost")
        self._asker.close()
        return Searcher.FINISHED

    @property
    def _has_ended(self) -> bool:
        return self.stop_reason is not None or self.budget_reason is not None

    def _work_is_left(self) -> bool:
        """Whether trials are to come that cannot start at this moment."""
        return not self._has_ended and self._study.num_done() < self._budget.target

    def _start(self, trial_id: str) -> dict[str, Any] | None:
        """Start a trial, or a verification that goes on once all trials are there."""
        if not self._may_write():
            return None
        assignment = self._next()
        if assignment is not None:
            config = self._config(trial_id, assignment)
            self._live[trial_id] = assignment
            self._listener.started(assignment.key)
            if self._wanted() > 0:
                self._asker.look_ahead(self._study)
            return config
        if self._study.num_done() >= self._budget.target and (resumed := self._next_resumption()) is not None:
            config = self._config(trial_id, resumed, resume=True)
            self._resumed[trial_id] = resumed
            self._listener.started(resumed.key)
            return config
        return None

    def _wanted(self) -> int:
        """How many trials are missing beside those that are done, run, or wait to run."""
        known = self._study.num_done() + len(self._live) + len(self._unfinished) + len(self._study.waiting())
        return self._budget.target - known

    def _look_at_the_budget(self) -> None:
        if self.budget_reason is None:
            self.budget_reason = self._budget.spent()
        if self._budget.expired() is not None:
            self._scheduler.halt()

    def _look_at_the_lock(self) -> None:
        """Also while nothing starts or ends: what runs under a lost lock is cut off."""
        if time.monotonic() - self._lock_seen >= LOCK_S:
            self._may_write()
            self._lock_seen = time.monotonic()

    def _look_at_the_queue(self) -> None:
        """What waits there waits as long as it takes, so that what no longer holds for it is taken back."""
        if self._has_ended:
            self._scheduler.close()
            return
        if too_large := self._retries.too_large():
            waiting = {**self._live, **self._resumed}
            self._scheduler.taken_back.update(name for name, each in waiting.items() if each.number in too_large)
        if self._avoiding:
            avoided = self._hosts.avoided()
            self._scheduler.taken_back.update(
                trial_id for trial_id, hosts in self._avoiding.items() if not hosts <= avoided
            )

    def _next(self) -> Assignment | None:
        """The next trial that can start now: cut off under an earlier driver, waiting, or new."""
        while self._study.num_done() + len(self._live) < self._budget.target and not self._keeps_room():
            assignment = self._adopted() or self._waiting() or self._new()
            if assignment is None:
                return None
            stored = self._files.result(assignment.key)
            if stored is None:
                return assignment
            self._teachers.ended(assignment)
            self._tell(assignment, stored)  # finished under an earlier driver, which did not live to tell
        return None

    def _keeps_room(self) -> bool:
        """Whether what is free is for a trial that needs more: small ones would take each place before it.

        None is kept for one that waits for a teacher: others may as well use it.
        """
        if not self._retries.has_raised:
            return False
        lacking = (number for number in (*self._unfinished, *self._study.waiting()) if not self._has_room(number))
        return any(not self._teachers.is_kept(self._study.assignment(number)) for number in lacking)

    def _has_room(self, number: int) -> bool:
        load = self._retries.load()
        return load == 0 or load + self._retries.places(number) <= self._slots() + 1e-9

    def _adopted(self) -> Assignment | None:
        for _ in range(len(self._unfinished)):
            assignment = self._study.adopt(self._unfinished.popleft())
            if self._has_room(assignment.number) and self._teachers.may_start(assignment):
                return assignment
            self._unfinished.append(assignment.number)
        return None

    def _waiting(self) -> Assignment | None:
        for number in self._study.waiting():
            if self._has_room(number) and self._teachers.may_start(self._study.adopt(number)):
                return self._study.start(number)
        return None

    def _new(self) -> Assignment | None:
        """A new suggestion, once it is computed and its teacher is there; one that must wait is stored as waiting."""
        if self._wanted() <= 0 or len(self._study.waiting()) + len(self._unfinished) >= self._slots():
            return None  # enough trials wait for teachers: more of them would start nothing
        number = self._asker.take(self._study)
        return self._waiting() if number is not None else None

    def _config(self, trial_id: str, assignment: Assignment, *, resume: bool = False) -> dict[str, Any]:
        recipe = self._study.space.recipe(assignment.params, assignment.number)
        attempt, hosts = self._retries.begin(assignment), self._hosts.avoided()
        avoid = self._node_ids(hosts, attempt.share) if hosts else ()
        if avoid:
            self._avoiding[trial_id] = hosts
        suggestion = Suggestion(
            assignment.key,
            assignment.params,
            recipe,
            resume=resume,
            configuration=assignment.configuration,
            share=attempt.share,
            deaths=attempt.deaths,
            avoid=avoid,
        )
        return suggestion.to_config()

    def _next_resumption(self) -> Assignment | None:
        """All trials are there and budget is left: the verification whose rest narrows the front most per second."""
        if not self._budget.is_open_ended:
            return None
        busy = self._tried | {assignment.number for assignment in self._resumed.values()}
        reference = self._study.config.search.hypervolume_reference
        while (number := resumption(self._study.trials(), reference, without=busy)) is not None:
            assignment = self._study.assignment(number)
            if not self._refined_from_files(assignment):
                if not self._has_room(number):
                    return None
                self._tried.add(number)
                return assignment
        return None

    # ---- What came of it ------------------------------------------------------------------------------------------

    def on_trial_start(self, trial_id: str) -> None:
        """Its worker begins. Tune itself tells callbacks only: see `search.attempts.starts`."""
        self._avoiding.pop(trial_id, None)
        assignment = self._live.get(trial_id) or self._resumed.get(trial_id)
        if assignment is not None:
            self._retries.started(assignment)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        assignment = self._live.get(trial_id) or self._resumed.get(trial_id)
        if assignment is None or "phase" not in result:
            return
        self._teachers.advanced(assignment, result["phase"])
        self._hosts.advanced(result.get("hostname", ""))
        self._listener.advanced(assignment.key, result["phase"], result["step"], result["steps"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study. Tune swallows what is raised here, so a study that cannot be written ends the search."""
        assignment, resumed = self._live.pop(trial_id, None), self._resumed.pop(trial_id, None)
        cause = self._scheduler.causes.pop(trial_id, None)
        self._avoiding.pop(trial_id, None)
        try:
            if not self._may_write():  # what the trial left in its folder is told by the next driver
                return
            if assignment is not None:
                self._teachers.ended(assignment)
                if result is None and not error:
                    self._unfinished.appendleft(assignment.number)  # taken out of Ray's queue: it has not started
                else:
                    self._conclude(assignment, result or {}, cause)
            elif resumed is not None and result is None and not error:
                self._tried.discard(resumed.number)
            elif resumed is not None:
                self._conclude_resumption(resumed, result or {}, cause)
        except Exception as failure:
            if assignment is not None:
                self._unfinished.append(assignment.number)
            if is_full_disk(failure):
                self._pause(one_line(failure))
            else:
                self._stop(f"the study or its files could not be written ({one_line(failure)}); nothing is lost")
        finally:
            if (ended := assignment or resumed) is not None:
                self._retries.ended(ended)

    def _conclude(self, assignment: Assignment, last: dict[str, Any], cause: Cause | None) -> None:
        state, key = last.get("state"), assignment.key
        stopped = self._scheduler.stopped.pop(key, None)
        if state == "COMPLETE":
            self._tell(assignment, TrialResult(**json.loads(last["result"])))
        elif state == "FAILED":
            self._fail(assignment, last["reason"], silent=False)
        elif state == "WAITING":
            self._teachers.held_elsewhere(assignment)
            self._unfinished.append(assignment.number)
        elif state == "PAUSED":
            self._unfinished.append(assignment.number)
            self._pause(last["reason"])
        elif (stored := self._files.result(key)) is not None:
            self._tell(assignment, stored)
        elif (cause := cause or _told_cause(last)) is not None:
            self._died(assignment, cause, on_gpu=last.get("on_gpu", False))
        elif stopped is not None and state == "VERIFYING":
            result = TrialResult(**json.loads(last["result"]) | {"reason": stopped})
            self._files.end_stopped_verification(key, result)
            self._tell(assignment, result)
        elif stopped is not None and state == "RUNG":
            self._stop_training(assignment, last, stopped)
        elif self._scheduler.is_halted:
            self._unfinished.append(assignment.number)  # cut off: it goes on when the search does
        else:
            self._fail(assignment, "worker died: it ended without a report, and without an error", silent=True)

    def _died(self, assignment: Assignment, cause: Cause, *, on_gpu: bool) -> None:
        """Put the trial back, to go on from its last state; or it has failed, if that happened too often."""
        self._hosts.died(cause)
        reason = self._retries.died(assignment, cause, on_gpu=on_gpu)
        if reason is None:
            self._unfinished.append(assignment.number)
            self._listener.lost(assignment.key, cause.reason)
        else:
            self._fail(assignment, reason, silent=True, repeats=not is_of_surroundings(cause.reason))

    def _stop_training(self, assignment: Assignment, last: dict[str, Any], reason: str) -> None:
        # Files first: should this driver die in between, the trial is still RUNNING and is judged again.
        self._files.end_stopped_training(assignment.key, reason)
        # A trial that goes on tells its rungs from the first one on: it may have come further than this one.
        noted = [values.seconds for values in self._study.trials()[assignment.number].rungs.values()]
        seconds = max([json.loads(last["values"])["seconds"], *noted])
        self._study.tell_stopped(assignment.number, reason, seconds)
        self._reasons.clear()
        self._listener.stopped(assignment.key, reason)

    def _conclude_resumption(self, assignment: Assignment, last: dict[str, Any], cause: Cause | None) -> None:
        """A resumed verification that did not end well leaves the interval that was there, and may be tried again."""
        if last.get("state") == "COMPLETE":
            self._refine(assignment, TrialResult(**json.loads(last["result"])))
        elif last.get("state") == "PAUSED":
            self._pause(last["reason"])
        elif not self._refined_from_files(assignment) and (cause := cause or _told_cause(last)) is not None:
            self._hosts.died(cause)
            reason = self._retries.died(assignment, cause, on_gpu=last.get("on_gpu", False))
            if reason is None:
                self._tried.discard(assignment.number)
            self._listener.lost(assignment.key, reason or cause.reason, goes_on=reason is None)

    def _refined_from_files(self, assignment: Assignment) -> bool:
        """Tell the study of a resumed verification that ended before a driver or a worker died that did not tell it."""
        stored, known = self._files.result(assignment.key), self._study.trials()[assignment.number]
        if stored is None or known.seconds is None or stored.seconds <= known.seconds:
            return False
        return self._refine(assignment, stored)

    def _refine(self, assignment: Assignment, result: TrialResult) -> bool:
        known = self._study.trials()[assignment.number]
        self._study.refine(assignment.number, result)
        if self._study.trials()[assignment.number] is known:
            return False  # a wider interval
        self._listener.finished(assignment.key, result)
        return True

    def _tell(self, assignment: Assignment, result: TrialResult) -> None:
        if wrong := not_finite(result):
            self._fail(assignment, f"not finite: {wrong}", silent=True)
            return
        self._study.tell(assignment.number, result)
        self._reasons.clear()
        self._listener.finished(assignment.key, result)

    def _fail(self, assignment: Assignment, reason: str, *, silent: bool, repeats: bool = True) -> None:
        """Tell that a trial failed; repeats: others may fail of the same, so that a row of them is no accident."""
        # Files first: a failed trial that the study knows is not looked at again.
        self._files.end_failed(assignment.key, reason, silent=silent)
        self._study.tell_failed(assignment.number, reason)
        # Steps, sizes and the weights of a loss differ, the reason does not.
        if repeats:
            self._reasons.append(re.sub(r"\d[\d.e+-]*", "#", re.sub(r"\{[^{}]*\}", "{}", reason)))
        self._listener.failed(assignment.key, reason)
        last, failed = self._reasons[-IDENTICAL_FAILURES:], self._study.num_failed()
        if len(last) == IDENTICAL_FAILURES and len(set(last)) == 1:
            self._stop(f"{IDENTICAL_FAILURES} trials in a row failed for the same reason: {reason}")
        elif failed > allowed_failures(self._budget.target):
            self._stop(
                f"{failed} trials failed, more than the {allowed_failures(self._budget.target)} that a search of "
                f"{self._budget.target} trials may lose; the last reason: {reason}"
            )

    def _may_write(self) -> bool:
        """Whether the study is still this driver's; if not, the search ends here and cuts off what runs."""
        try:
            if self._is_only_driver():
                return True
            self._stop(f"the lock on study {self._study.config.study_name} was lost, and another driver may have it")
        except DatabaseAwayError as away:
            self._stop(f"{away}; nothing is lost")
        self._scheduler.halt()
        return False

    def _pause(self, reason: str) -> None:
        self._stop(f"{reason}; the search pauses, nothing is lost: make room and run the same command")

    def _stop(self, reason: str) -> None:
        self.stop_reason = self.stop_reason or reason

    def _give_up_unfinished(self) -> None:
        """Trials cut off under an earlier driver that asked for more: none may stay RUNNING in a complete study."""
        reason = f"given up: it was cut off, and {self._budget.target} trials were reached without it"
        while self._unfinished:
            assignment = self._study.adopt(self._unfinished.popleft())
            stored = self._files.result(assignment.key)
            if stored is not None:  # it had finished: a result is never thrown away
                self._tell(assignment, stored)
            else:
                self._files.end_failed(assignment.key, reason, silent=True)
                self._study.tell_failed(assignment.number, reason, given_up=True)

    # ---- What Tune asks of a searcher -----------------------------------------------------------------------------

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study has it. Tune wants a file."""
        with open(checkpoint_path, "w") as file:
            file.write("the study is the only state\n")

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search goes on from its study: run search.run again")

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher with the experiment; database handles and credentials stay out of that."""
        return {}


def _told_cause(last: dict[str, Any]) -> Cause | None:
    """Why a run ended that could still tell it itself, by its last report."""
    told = last.get("state") in ("OUT_OF_MEMORY", "INTERRUPTED")
    return Cause(last["reason"], last.get("hostname", "")) if told else None
