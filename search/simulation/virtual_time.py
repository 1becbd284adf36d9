"""A heap of events in the place of Tune's controller and its workers: calls a searcher and a scheduler in its order.

What is imitated: a slot is filled as soon as it is free; each report goes to the scheduler first, and to the searcher
unless the scheduler says STOP; a trial whose node is lost has ended with an error, and goes on from its last state when
the searcher suggests it again.
"""

import heapq
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from search.pareto import hypervolume_trace
from search.recipe import derive_seed
from search.simulation.hardware import Hardware
from search.simulation.timelines import Report, TrainingMode, Workload, running
from search.studies.records import TrialResult


@dataclass(frozen=True)
class Outcome:
    """The end of a trial."""

    seconds: float  # virtual, since the search began
    accelerator_s: float  # spent by all trials until then
    key: str
    state: str  # COMPLETE, STOPPED (training) or FAILED
    objectives: tuple[float, float] | None  # standard accuracy and lower end of certified accuracy, if COMPLETE
    work_s: float  # accelerator seconds that the trial took, its lost starts included
    verification_s: float | None = None  # the part of verification, if COMPLETE


@dataclass(frozen=True)
class History:
    """What a simulated search did."""

    outcomes: tuple[Outcome, ...]
    seconds: float  # virtual
    accelerator_s: float  # by all trials, those that were cut off included

    def hypervolumes(self, reference: tuple[float, float], at: NDArray[np.float64]) -> NDArray[np.float64]:
        """Hypervolume of what had ended when so many accelerator seconds were spent, shape as `at`."""
        found = [(each.accelerator_s, each.objectives) for each in self.outcomes if each.objectives is not None]
        trace = np.concatenate([[0.0], hypervolume_trace([objectives for _, objectives in found], reference)])
        ends = np.array([accelerator_s for accelerator_s, _ in found])
        return np.asarray(trace[np.searchsorted(ends, at, side="right")])


@dataclass(frozen=True)
class TrialStub:
    """The part of a Tune trial that a scheduler reads."""

    trial_id: str
    config: dict[str, Any]


@dataclass
class VirtualTeachers:
    """Which teachers there are; nobody else trains any."""

    keys: set[str] = field(default_factory=set)

    def has(self, key: str) -> bool:
        return key in self.keys

    def holder(self, key: str) -> str | None:
        return None

    def forget(self, key: str, holder: str) -> None:
        pass


@dataclass
class VirtualFiles:
    """When trials stored their last state, and which of them the searcher has failed: all that they leave behind."""

    stored: dict[str, float] = field(default_factory=dict)  # virtual seconds, by the trial's key
    failed: set[str] = field(default_factory=set)

    def result(self, key: str) -> TrialResult | None:
        return None

    def stored_at(self, key: str, teacher: str | None) -> float | None:
        return self.stored.get(key)

    def end_stopped_verification(self, key: str, result: TrialResult) -> None:
        pass

    def end_stopped_training(self, key: str, reason: str) -> None:
        pass

    def end_failed(self, key: str, reason: str, *, silent: bool) -> None:
        self.failed.add(key)


@dataclass
class _Job:
    """A trial on its slot, or off it since its node was lost."""

    trial: TrialStub
    key: str
    reports: tuple[Report, ...]
    checkpoint_s: float
    teacher: str | None  # that it trains first, until it is there
    next: int = 0  # report that is due
    work: float = 0.0  # seconds done
    begun: float = 0.0  # of them before this start
    held: float = 0.0  # accelerator seconds spent on it
    starts: int = 0
    gpu: int = -1
    slowness: float = 1.0  # of this start
    version: int = 0  # of its place in the heap: what was scheduled under another is void
    rate: float = field(default=0.0)  # seconds of work a second
    since: float = 0.0  # when the rate became what it is


@dataclass
class Clock:
    """Virtual seconds since the search began."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class Simulation:
    """One search; `run` it once.

    Args:
        searcher: suggests and is told, as by Tune.
        scheduler: decides at every report.
        workload: what trials report.
        mode: which rungs they report.
        teachers: where trained teachers are noted; the searcher's queue must read the same.
        clock: is set to the virtual time; the searcher's parts must read the same.
        seed: of stragglers, node losses and the trials' noise.
        files: what trials have stored; the searcher's must be the same.
        started: hears Tune's id of a trial that begins.
        lost: hears Tune's id of a trial that ends with its node, before the searcher does.
    """

    def __init__(
        self,
        searcher: Searcher,
        scheduler: TrialScheduler,
        workload: Workload,
        hardware: Hardware,
        *,
        mode: TrainingMode,
        teachers: VirtualTeachers,
        clock: Clock,
        seed: int,
        files: VirtualFiles | None = None,
        started: Callable[[str], None] = lambda trial_id: None,
        lost: Callable[[str], None] = lambda trial_id: None,
    ) -> None:
        self._searcher, self._scheduler, self._workload, self._hardware = searcher, scheduler, workload, hardware
        self._mode, self._teachers, self._seed = mode, teachers, seed
        self._clock, self._spent = clock, 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._ids = itertools.count()
        self._on_gpu: list[list[_Job]] = [[] for _ in range(hardware.gpus)]
        self._lost = [False] * hardware.num_nodes
        self._files, self._hears_of_start, self._hears_of_loss = files or VirtualFiles(), started, lost
        self._left: dict[str, _Job] = {}  # by their keys
        self._is_exhausted = False
        self._outcomes: list[Outcome] = []

    def run(self, budget_s: float = math.inf) -> History:
        """Search until the searcher has finished, or so many accelerator seconds are spent."""
        for node in range(self._hardware.num_nodes):
            self._plan_loss(node, 0)
        self._fill()
        while not (self._is_exhausted and self._is_idle()):
            if not self._heap:
                raise RuntimeError("the searcher suggests nothing, and nothing runs that could change that")
            at, _, action = heapq.heappop(self._heap)
            left, rate = budget_s - self._spent, self._num_running() * self._hardware.share
            if rate * (at - self._clock.now) > left:
                self._advance(self._clock.now + left / rate)
                break
            self._advance(at)
            action()
            self._fill()
        return History(tuple(self._outcomes), self._clock.now, self._spent)

    # ---- time and slots -------------------------------------------------------------------------------------------

    def _at(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (seconds, next(self._order), action))  # the order of pushing breaks ties

    def _advance(self, seconds: float) -> None:
        passed = (seconds - self._clock.now) * self._hardware.share
        for jobs in self._on_gpu:
            for job in jobs:
                job.held += passed
                self._spent += passed
        self._clock.now = seconds

    def _num_running(self) -> int:
        return sum(map(len, self._on_gpu))

    def _is_idle(self) -> bool:
        return self._num_running() == 0

    def _free_gpu(self) -> int | None:
        """The least crowded accelerator with a free place."""
        free = [
            (len(jobs), gpu)
            for gpu, jobs in enumerate(self._on_gpu)
            if len(jobs) < self._hardware.per_gpu and not self._lost[self._hardware.node(gpu)]
        ]
        return min(free)[1] if free else None

    def _fill(self) -> None:
        """Start whatever can start now."""
        while (gpu := self._free_gpu()) is not None:
            job = self._suggested()
            if job is None:
                return
            self._start(job, gpu)

    def _suggested(self) -> _Job | None:
        if self._is_exhausted:
            return None
        trial_id = f"{next(self._ids):08d}"
        config = self._searcher.suggest(trial_id)
        if config == Searcher.FINISHED:
            self._is_exhausted = True
        if config is None or self._is_exhausted:
            return None
        content = json.loads(config["trial"])
        trial = TrialStub(trial_id, config)
        left = self._left.pop(content["key"], None)
        if left is not None and (left.teacher is None or not self._teachers.has(left.teacher)):
            left.trial = trial
            return left
        seed = derive_seed(self._seed, "noise", content["key"])
        timeline = self._workload.timeline(content["params"], seed, self._mode)
        teacher, reports = timeline.teacher, timeline.reports
        if teacher is not None and not self._teachers.has(teacher.key):
            later = (Report(teacher.seconds + report.seconds, report.content) for report in reports)
            reports = (running(teacher.seconds, "student"), *later)
        else:
            teacher = None
        trains = None if teacher is None else teacher.key
        job = _Job(trial, content["key"], reports, timeline.checkpoint_s, trains)
        if left is not None:  # another has trained its teacher meanwhile
            job.held, job.starts = left.held, left.starts
        return job

    def _start(self, job: _Job, gpu: int) -> None:
        draw = np.random.default_rng(derive_seed(self._seed, "straggler", job.key, job.starts))
        is_slow = draw.random() < self._hardware.stragglers
        job.slowness = self._hardware.straggler_slowdown if is_slow else 1.0
        job.starts += 1
        job.gpu, job.since, job.begun = gpu, self._clock.now, job.work
        self._on_gpu[gpu].append(job)
        self._hears_of_start(job.trial.trial_id)
        self._schedule(gpu)

    def _leave(self, job: _Job) -> None:
        self._on_gpu[job.gpu].remove(job)
        job.version += 1
        self._schedule(job.gpu)

    def _schedule(self, gpu: int) -> None:
        """Bring the trials of an accelerator up to now, and plan their next reports at the pace from now on."""
        jobs = self._on_gpu[gpu]
        for job in jobs:
            job.work += (self._clock.now - job.since) * job.rate
            job.since = self._clock.now
            job.rate = 1 / (self._hardware.slowdown(len(jobs)) * job.slowness)
            job.version += 1
            due = max(0.0, job.reports[job.next].seconds - job.work)
            self._at(self._clock.now + due / job.rate, lambda job=job, version=job.version: self._report(job, version))  # type: ignore[misc]

    # ---- what happens ---------------------------------------------------------------------------------------------

    def _report(self, job: _Job, version: int) -> None:
        if version != job.version:
            return  # planned at another pace, or before the node was lost
        report = job.reports[job.next]
        job.work, job.since = report.seconds, self._clock.now
        job.next += 1
        if job.teacher is not None:
            self._teachers.keys.add(job.teacher)
            job.teacher = None
        result = {"key": job.key, "trial_id": job.trial.trial_id, "training_iteration": job.next} | report.content
        is_last = job.next == len(job.reports)
        stops = self._scheduler.on_trial_result(None, job.trial, result) == TrialScheduler.STOP
        if not stops:
            self._searcher.on_trial_result(job.trial.trial_id, result)
        if stops or is_last:
            self._end(job, result, is_stopped=stops and not is_last)
        else:
            self._schedule_next(job)

    def _schedule_next(self, job: _Job) -> None:
        job.version += 1
        version = job.version
        seconds = (job.reports[job.next].seconds - job.work) / job.rate
        self._at(self._clock.now + seconds, lambda: self._report(job, version))

    def _end(self, job: _Job, result: dict[str, Any], *, is_stopped: bool) -> None:
        self._leave(job)
        if not is_stopped:
            self._scheduler.on_trial_complete(None, job.trial, result)
        self._searcher.on_trial_complete(job.trial.trial_id, result)
        if "result" in result:
            known = TrialResult(**json.loads(result["result"]))
            self._note(job, "COMPLETE", known.worst, known.costs["verification"])
        else:
            self._note(job, "STOPPED" if result["state"] == "RUNG" else "FAILED")

    def _note(
        self, job: _Job, state: str, objectives: tuple[float, float] | None = None, verification_s: float | None = None
    ) -> None:
        self._outcomes.append(
            Outcome(self._clock.now, self._spent, job.key, state, objectives, job.held, verification_s),
        )

    def _plan_loss(self, node: int, count: int) -> None:
        if math.isfinite(self._hardware.node_hours):
            draw = np.random.default_rng(derive_seed(self._seed, "node", node, count))
            hours = draw.exponential(self._hardware.node_hours)
            self._at(self._clock.now + hours * 3600, lambda: self._lose(node, count))

    def _lose(self, node: int, count: int) -> None:
        self._lost[node] = True
        self._at(self._clock.now + self._hardware.repair_s, lambda: self._repair(node, count + 1))
        for job in [job for jobs in self._on_gpu for job in jobs if self._hardware.node(job.gpu) == node]:
            job.work += (self._clock.now - job.since) * job.rate
            self._leave(job)
            self._scheduler.on_trial_error(None, job.trial)
            self._roll_back(job)
            self._hears_of_loss(job.trial.trial_id)
            self._searcher.on_trial_complete(job.trial.trial_id, error=True)
            if job.key in self._files.failed:
                self._note(job, "FAILED")
            else:
                self._left[job.key] = job

    def _roll_back(self, job: _Job) -> None:
        """What it reported since its last state it reports again, as a worker that goes on from that state does."""
        state = job.work
        if job.checkpoint_s > 0:
            state = math.floor(job.work / job.checkpoint_s) * job.checkpoint_s
        if state > job.begun:  # when that was, at the pace of the end
            self._files.stored[job.key] = self._clock.now - (job.work - state) / job.rate
        job.work = state
        job.next = next(n for n, report in enumerate(job.reports) if report.seconds >= job.work)

    def _repair(self, node: int, count: int) -> None:
        self._lost[node] = False
        self._plan_loss(node, count)
