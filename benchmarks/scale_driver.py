"""The driver's loop at a size: searcher, scheduler, standings, study and front log as a search puts them together.

Workers, Tune and MLflow are left out: the calls are those that Tune's loop makes, one after the other, with as many
trials RUNNING as there are slots and so many finished ones in the study before them.

    report      a RUNNING report of a trial, as each sends at most once in `search.trials.verifying.REPORT_INTERVAL_S`
    verifying   a report of a verification, which is judged against all results
    rung        a report at a rung, which is stored and judged
    idle        Tune asks for a trial and no slot is free, as it does after each report
    start       the next trial: suggested (at random: samplers are measured by `database`), stored, started
    end         a trial has its result: told to the study, the front and the journal
"""

import io
import itertools
import json
import random
import sqlite3
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.bookkeeping import FINGERPRINT, fill, outcome, reached
from benchmarks.scale_measure import Measured, apart, measured, resident_mb, timed
from search.config import SearchConfig, find_space_file, load_search_config
from search.results.progress import Progress
from search.scheduler import StudyScheduler
from search.scheduling.budget import Budget
from search.scheduling.waiting import TeacherQueue
from search.searcher import StudySearcher
from search.simulation.virtual_time import TrialStub, VirtualFiles, VirtualTeachers
from search.space import Space
from search.study import Assignment, Study
from search.suggestions.asking import Asker
from search.teachers import teacher_key
from search.tracked.front_log import FrontLog
from search.tracked.listeners import Listeners
from search.tracked.redrawing import Redrawing
from tracking.journal import STUDY_JOURNAL

PART = "driver"


def config_of(space: str, trials: int, sampler: str = "random") -> SearchConfig:
    settings = [f"search.sampler={sampler}", "search.points=[]", f"budget.trials={trials}"]
    return load_search_config(find_space_file(space), settings)


def filled(folder: Path, config: SearchConfig, trials: int, running: int) -> str:
    """The URL of a study of so many ended trials, and some that a killed driver has left running."""
    database = folder / "study.db"
    fill(database, config, trials + running)
    with sqlite3.connect(database) as connection:
        left = "SELECT trial_id FROM trials WHERE number >= ?"
        for table in ("trial_values", "trial_user_attributes"):
            also = " AND key IN ('result', 'stopped')" if "attributes" in table else ""
            connection.execute(f"DELETE FROM {table} WHERE trial_id IN ({left}){also}", (trials,))
        connection.execute("UPDATE trials SET state = 'RUNNING', datetime_complete = NULL WHERE number >= ?", (trials,))
    connection.close()
    return f"sqlite:///{database}"


class AllTeachers(VirtualTeachers):
    """Every teacher is there, as in a search that has run for a while."""

    def has(self, key: str) -> bool:
        return True


class Loop:
    """A search without Tune: the same objects, called in its order."""

    def __init__(self, config: SearchConfig, study: Study, folder: Path, slots: int) -> None:
        self.study = study
        self.scheduler = StudyScheduler(study)
        record = study.record()
        results = {trial.key: trial.objectives for trial in record.complete if trial.objectives is not None}
        progress = Progress(Console(file=io.StringIO()), config.budget.trials, record.reference, results)
        self.front_log = FrontLog(folder / STUDY_JOURNAL, study, Redrawing(lambda _: {}), lambda: True)
        self.searcher = StudySearcher(
            study,
            Budget(config.budget, config.resources, study.trials),
            lambda: slots,
            VirtualFiles(),
            Listeners([progress, self.front_log]),
            self.scheduler,
            Asker.of(config.search.sampler.kind),
            TeacherQueue(partial(_teacher_of, study), AllTeachers()),
        )
        self.trials: dict[str, TrialStub] = {}
        self._ids = itertools.count()

    def suggest(self) -> bool:
        """What Tune asks; whether a trial was started."""
        trial_id = f"{next(self._ids):08d}"
        config = self.searcher.suggest(trial_id)
        if not isinstance(config, dict):
            return False
        key = json.loads(config["trial"])["key"]
        self.trials[key] = TrialStub(trial_id, config)
        self.searcher.on_trial_start(trial_id)
        return True

    def report(self, key: str, **content: Any) -> None:
        """What Tune does with a report."""
        trial, result = self.trials[key], {"key": key, "training_iteration": 1, **content}
        if self.scheduler.on_trial_result(None, trial, result) == "CONTINUE":
            self.searcher.on_trial_result(trial.trial_id, result)

    def end(self, key: str) -> None:
        trial = self.trials.pop(key)
        result = {"key": key, "state": "COMPLETE", "result": json.dumps(asdict(outcome(int(key.rpartition("-")[2]))))}
        self.scheduler.on_trial_complete(None, trial, result)
        self.searcher.on_trial_complete(trial.trial_id, result)


def measure(space: str, trials: int, slots: int, repeats: int) -> list[Measured]:
    """One size; the study is written and driven by a process each."""
    config = config_of(space, 10 * trials + 10 * slots)
    with tempfile.TemporaryDirectory() as folder:
        url = apart(filled, Path(folder), config, trials, slots)
        found: list[Measured] = apart(_driven, config, url, Path(folder), trials, slots, repeats)
    return found


def _driven(config: SearchConfig, url: str, folder: Path, trials: int, slots: int, repeats: int) -> list[Measured]:
    opened: list[Study] = []
    open_it = timed(PART, "open the study", trials, lambda: opened.append(_open(config, url)), 1, uncounted=0)
    loop = Loop(config, opened[0], folder, slots)
    with loop.front_log:
        while len(loop.trials) < slots and loop.suggest():
            pass
        found = [open_it, *_calls(loop, trials, repeats)]
    return [*found, measured(PART, "memory of the driver", trials, [resident_mb()], "MB")]


def _teacher_of(study: Study, assignment: Assignment) -> str | None:
    recipe = study.space.recipe(assignment.params, assignment.number)
    return teacher_key(FINGERPRINT, recipe.threat, recipe.teacher) if recipe.needs_teacher else None


def _open(config: SearchConfig, url: str) -> Study:
    return Study.open(config, Space(config), url, FINGERPRINT)


def _calls(loop: Loop, size: int, repeats: int) -> list[Measured]:
    keys = list(loop.trials)
    draw = random.Random(0)

    def one() -> str:
        return draw.choice(keys)

    def running() -> None:
        loop.report(one(), state="RUNNING", phase="student", step=3, steps=160)

    def verifying() -> None:
        key = one()
        stopped = asdict(outcome(int(key.rpartition("-")[2]), noise=0.0)) | {"verification_state": "stopped"}
        loop.report(key, state="VERIFYING", result=json.dumps(stopped), phase="crown", step=1, steps=2)
        loop.scheduler.stopped.clear()

    def rung() -> None:
        key = one()
        number = int(key.rpartition("-")[2])
        name, values = list(reached(outcome(number), 3).items())[draw.randrange(3)]
        loop.report(key, state="RUNG", rung=name, values=json.dumps(asdict(values)))
        loop.scheduler.stopped.clear()

    def end() -> None:
        loop.end(keys.pop(draw.randrange(len(keys))))

    def start() -> None:
        known = set(loop.trials)
        assert loop.suggest()
        keys.extend(loop.trials.keys() - known)

    found = [
        timed(PART, "report", size, running, 10 * repeats, uncounted=3),
        timed(PART, "verifying", size, verifying, repeats, uncounted=3),
        timed(PART, "rung", size, rung, repeats, uncounted=3),
        timed(PART, "idle", size, loop.suggest, repeats, uncounted=3),
    ]
    ends, starts = _in_turn(end, start, min(repeats, len(keys)))
    return [*found, measured(PART, "end", size, ends), measured(PART, "start", size, starts)]


def _in_turn(end: Callable[[], None], start: Callable[[], None], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of each: a slot becomes free and is filled again."""
    pairs = [
        (timed(PART, "", 0, end, 1, uncounted=0).median, timed(PART, "", 0, start, 1, uncounted=0).median)
        for _ in range(repeats)
    ]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
