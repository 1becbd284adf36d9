"""A search in virtual time: searcher, scheduler, sampler and study as they are, with workers that only report.

No Ray cluster, no training, no files; the study lies in memory. Trials come from a `Workload`. Everything random
follows from the study's seed, so the same search gives the same history.
"""

import math
from collections.abc import Callable

import optuna
from optuna.storages import InMemoryStorage

from search.attempts.deaths import NODE_LOST, Cause
from search.config import SearchConfig
from search.scheduler import StudyScheduler
from search.scheduling.budget import Budget
from search.scheduling.waiting import TeacherQueue
from search.searcher import StudySearcher
from search.simulation.hardware import Hardware
from search.simulation.timelines import Workload
from search.simulation.virtual_time import Clock, History, Simulation, VirtualFiles, VirtualTeachers
from search.space import Space
from search.studies.records import TrialResult
from search.study import Assignment, Study
from search.suggestions.asking import Asker, Inline
from search.suggestions.sampling_view import TELL_STOPPED, TellStopped


class NoListener:
    """Nobody watches."""

    def started(self, key: str) -> None:
        pass

    def lost(self, key: str, reason: str, *, goes_on: bool = True) -> None:
        pass

    def advanced(self, key: str, phase: str, done: int, of: int) -> None:
        pass

    def finished(self, key: str, result: TrialResult) -> None:
        pass

    def stopped(self, key: str, reason: str) -> None:
        pass

    def failed(self, key: str, reason: str) -> None:
        pass


def simulate(
    config: SearchConfig,
    space: Space,
    workload: Workload,
    hardware: Hardware,
    *,
    budget_s: float = math.inf,
    make_scheduler: Callable[[Study], StudyScheduler] | None = None,
    tell_stopped: TellStopped = TELL_STOPPED,
) -> History:
    """A whole search of a space file on simulated hardware.

    Args:
        config: trials, sampler and stopping as for a real search; its seed is that of everything random.
        budget_s: accelerator seconds after which the search is cut off.
        make_scheduler: who stops trials; None: the search's own.
        tell_stopped: how samplers are told of stopped trials.

    Raises:
        RuntimeError: the searcher gave up.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = Study.open(config, space, InMemoryStorage(), "simulated")
    study.tell_stopped_as = tell_stopped
    scheduler = StudyScheduler(study) if make_scheduler is None else make_scheduler(study)
    teachers, files, clock = VirtualTeachers(), VirtualFiles(), Clock()

    def teacher_of(assignment: Assignment) -> str | None:
        teacher = workload.teacher(assignment.params)
        return None if teacher is None else teacher.key

    searcher = StudySearcher(
        study,
        Budget(config.budget, config.resources, study.trials, clock),
        lambda: hardware.slots,
        files,
        NoListener(),
        scheduler,
        Asker(Inline(), ahead=False),  # a suggestion takes no virtual time
        TeacherQueue(teacher_of, teachers, clock),
        clock=clock,
    )
    simulation = Simulation(
        searcher,
        scheduler,
        workload,
        hardware,
        mode=config.stopping.training,
        teachers=teachers,
        clock=clock,
        seed=config.search.seed,
        files=files,
        started=searcher.on_trial_start,
        lost=lambda trial_id: scheduler.causes.update({trial_id: Cause(NODE_LOST)}),
    )
    history = simulation.run(budget_s)
    if searcher.stop_reason is not None or scheduler.error is not None:
        raise RuntimeError(f"the simulated search went wrong: {searcher.stop_reason or scheduler.error}")
    return history
