"""The study in Optuna's RDB storage: the one truth of a search.

Parameters and states are Optuna's own; results, rungs, reasons and keys are user attributes. Ray and MLflow hold views
that can be thrown away. One driver writes a study at a time, so the database is read when it is opened and written
from then on: a trial of a study of 10,000 costs what the first one did.

A trial is created whole, in one transaction, and ends with the change of its state, which is the last of the writes
that end it. Whatever was written before a kill is written again.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.config import SearchConfig
from search.space import Space
from search.studies.advisory_lock import DRIVER
from search.studies.database import StudyError as StudyError
from search.studies.database import open_storage
from search.studies.driver_lock import DriverLock
from search.studies.patient_storage import PatientStorage
from search.studies.records import Death, RungValues, StudyRecord, TrialRecord, TrialResult
from search.studies.records import TrialState as RecordState
from search.studies.study_record import (
    ARTIFACTS,
    DIED,
    HELD,
    REFINED,
    SHARES,
    empty_record,
    made_or_checked,
    not_finite,
    stored_attributes,
    trial_record,
    with_result,
    with_trials,
)
from search.studies.study_record import load_record as load_record
from search.studies.study_record import stored_record as stored_record
from search.studies.study_record import trial_key as trial_key
from search.suggestions.proposal import Proposal as Proposal
from search.suggestions.sampling import Suggested
from search.suggestions.sampling_view import (
    TELL_STOPPED,
    History,
    TellStopped,
    constraint_attributes,
    floor_constraints,
    kept_attributes,
)


@dataclass(frozen=True)
class Assignment:
    """A trial to run: its place in the study and its parameters."""

    number: int
    key: str
    params: dict[str, Any]
    configuration: str


class Study:
    """A study opened for running: asks, tells, and remembers what it asked."""

    tell_stopped_as: TellStopped = TELL_STOPPED

    def __init__(
        self,
        config: SearchConfig,
        space: Space,
        study: optuna.Study,
        storage: BaseStorage,
        lock: DriverLock | None = None,
    ) -> None:
        self.config, self.space, lock = config, space, lock or DriverLock()
        self._storage = PatientStorage(storage, study._study_id, lock.regained)
        if lock.mark is not None:  # before anything else is written
            self._storage.set_study_attribute(DRIVER, lock.mark)
        attributes = stored_attributes(study)
        self.identifier = str(attributes["id"])  # random: tells its artefacts from those of another of the same name
        self._empty = empty_record(study)
        self._shares: dict[str, Any] = dict(attributes.get(SHARES, {}))
        self._artifacts: str | None = attributes.get(ARTIFACTS)
        self._trials: list[TrialRecord] = []
        self._snapshot: tuple[TrialRecord, ...] | None = None  # of them, until one changes
        self._numbers: dict[RecordState, set[int]] = {
            state: set() for state in ("COMPLETE", "STOPPED", "FAILED", "RUNNING", "WAITING")
        }
        self._ids: list[int] = []  # the storage's own
        self._given_up: set[int] = set()
        self._attributes: dict[int, Mapping[str, Any]] = {}  # what suggestions left for later ones
        points: set[int] = set()
        for trial in self._storage.trials():
            self._remember(trial, attributes)
            points.add(trial.user_attrs.get("point", -1))
        self._enqueue_points(points)

    @classmethod
    def open(
        cls,
        config: SearchConfig,
        space: Space,
        storage: str | BaseStorage,
        data_fingerprint: str,
        lock: DriverLock | None = None,
    ) -> "Study":
        """Create the study, or continue the stored one after checking that it is the same.

        Args:
            config: the space file.
            space: its space.
            storage: a database's URL, or an Optuna storage.
            data_fingerprint: of the images that trials are trained and measured on.
            lock: the driver's; None: there is no other driver.

        Raises:
            StudyError: the stored study has another space, other data or other directions.
        """
        opened = open_storage(storage) if isinstance(storage, str) else storage
        if lock is not None:
            lock.guard(opened)
        return cls(config, space, made_or_checked(config, opened, data_fingerprint), opened, lock)

    # ---- what is there ---------------------------------------------------------------------------------------------

    def record(self) -> StudyRecord:
        """The study as plain values."""
        return with_trials(self._empty, tuple(self._trials))

    def trials(self) -> Sequence[TrialRecord]:
        """The trials by number; a snapshot that later changes do not reach, the same one until there is a change."""
        if self._snapshot is None:
            self._snapshot = tuple(self._trials)
        return self._snapshot

    def waiting(self) -> list[int]:
        """Trials that were asked ahead and not started; points come first, as they were stored first."""
        return sorted(self._numbers["WAITING"])

    def unfinished(self) -> list[int]:
        """Trials that were started and have no result, from whatever driver."""
        return sorted(self._numbers["RUNNING"])

    def num_done(self) -> int:
        """Trials that count towards the budget."""
        return self.num_complete() + len(self._numbers["STOPPED"])

    def num_complete(self) -> int:
        return len(self._numbers["COMPLETE"])

    def num_failed(self) -> int:
        """Failed trials, without those that were given up because nobody needed them."""
        return len(self._numbers["FAILED"] - self._given_up)

    # ---- asking ----------------------------------------------------------------------------------------------------

    def prepare(self) -> Proposal:
        """What the next suggestion needs. `Proposal.suggest` may then run in a thread; `enqueue` takes its answer."""
        history = History(tuple(self._trials), dict(self._attributes))
        return Proposal(len(self._trials), self.config.search, history, self.space, self.tell_stopped_as)

    def enqueue(self, proposal: Proposal, suggested: Suggested) -> int | None:
        """Store a trial that was asked ahead; its number, or None when another trial has taken that meanwhile."""
        if proposal.number != len(self._trials):
            return None
        return self._create(TrialState.WAITING, suggested)

    def start(self, number: int) -> Assignment:
        """Start a waiting trial.

        Raises:
            StudyError: it does not wait any more, as another driver has started it.
        """
        try:
            started = self._storage.set_state(self._ids[number], TrialState.RUNNING)
        except UpdateFinishedTrialError:
            started = False
        if not started:
            raise StudyError(f"trial {self._trials[number].key} was started already; only one search may run a study")
        self._put(replace(self._trials[number], state="RUNNING"))
        return self.adopt(number)

    def ask(self) -> Assignment:
        """Start a new trial: a waiting one if there is one, else what is suggested."""
        waiting = self.waiting()
        if waiting:
            return self.start(waiting[0])
        return self.assignment(self._create(TrialState.RUNNING, self.prepare().suggest()))

    def adopt(self, number: int) -> Assignment:
        """Take over a trial that an earlier driver started or stored; of studies of older versions, parameters that
        were not drawn yet are drawn now."""
        record = self._trials[number]
        if not (record.configuration and record.seed):
            self._draw_rest(number)
        return self.assignment(number)

    def assignment(self, number: int) -> Assignment:
        """A trial's place and parameters, in whatever state it is."""
        record = self._trials[number]
        return Assignment(number, record.key, dict(record.params), record.configuration)

    # ---- telling ---------------------------------------------------------------------------------------------------

    def note_rung(self, number: int, rung: str, values: RungValues) -> None:
        """Store what a trial showed at a rung; a rung that is stored already stays as it is.

        Raises:
            ValueError: a value is not finite.
        """
        record = self._trials[number]
        if record.state != "RUNNING" or rung in record.rungs:
            return
        if wrong := not_finite(values):
            raise ValueError(f"trial {record.key}, rung {rung}: {wrong}; a rung holds finite numbers only")
        rungs = record.rungs | {rung: values}
        stored = {name: asdict(reached) for name, reached in rungs.items()}
        self._storage.set_attribute(self._ids[number], "rungs", stored)
        self._put(replace(record, rungs=rungs))

    def tell(self, number: int, result: TrialResult) -> None:
        """Store a trial's result; one with a number that is not finite is stored as a failure.

        What Optuna holds as objectives is what the sampler is told, and floors are constraints on the worst end.
        """
        if wrong := not_finite(result):
            self.tell_failed(number, f"not finite: {wrong}")
            return
        now = time.time()
        constraints = constraint_attributes(floor_constraints(self.config.search.floors, result.worst))
        record = with_result(self._trials[number], result)
        self._finish(
            replace(record, state="COMPLETE", finished_at=now),
            TrialState.COMPLETE,
            {"result": asdict(result) | {"finished_at": now}},
            constraints,
            result.told,
        )

    def tell_stopped(self, number: int, reason: str, seconds: float) -> None:
        """Store that a trial's training was stopped after so many seconds, and why."""
        if not math.isfinite(seconds):
            self.tell_failed(number, f"not finite: stopped after {seconds} s")
            return
        now = time.time()
        ended = {"reason": reason, "seconds": seconds, "finished_at": now}
        record = replace(self._trials[number], state="STOPPED", reason=reason, seconds=seconds, finished_at=now)
        self._finish(record, TrialState.PRUNED, {"stopped": ended})

    def tell_failed(self, number: int, reason: str, *, given_up: bool = False) -> None:
        """Store that a trial failed, and why; `given_up`: not by its own fault."""
        now = time.time()
        record = replace(self._trials[number], state="FAILED", reason=reason, finished_at=now)
        ended = {"given_up": given_up, "reason": reason, "finished_at": now}
        if self._finish(record, TrialState.FAIL, ended) and given_up:
            self._given_up.add(number)

    def refine(self, number: int, result: TrialResult) -> None:
        """A narrower interval for a COMPLETE trial whose verification went on.

        Optuna's finished trials cannot change, so it is kept beside them. A result that is wider at either end is an
        older one, told again, and is left.

        Raises:
            ValueError: the trial is not COMPLETE, or a number is not finite.
        """
        record = self._trials[number]
        if record.certified_accuracy is None or record.certified_upper is None:
            raise ValueError(f"trial {record.key} is {record.state}; only a COMPLETE one has a result to refine")
        if wrong := not_finite(result):
            raise ValueError(f"trial {record.key}: {wrong}; a result holds finite numbers only")
        if result.certified_accuracy < record.certified_accuracy or result.certified_upper > record.certified_upper:
            return
        self._storage.set_study_attribute(f"{REFINED}{number}", asdict(result))
        self._put(with_result(record, result))

    # ---- attempts --------------------------------------------------------------------------------------------------

    @property
    def shares(self) -> dict[str, Any]:
        """What `store_shares` was told last, by whatever driver."""
        return dict(self._shares)

    def store_shares(self, shares: Mapping[str, Any]) -> None:
        """Keep what classes of trials need (`search.attempts.shares`)."""
        self._storage.set_study_attribute(SHARES, dict(shares))
        self._shares = dict(shares)

    def note_artifacts(self, place: str) -> None:
        """Store where this search keeps its artefacts, for who looks at the study by its name."""
        if place != self._artifacts:
            self._storage.set_study_attribute(ARTIFACTS, place)
            self._artifacts = place

    def begin_again(self, number: int) -> None:
        """The run of an unfinished trial that is to start is another attempt: of the last one nobody knows the end."""
        record = self._trials[number]
        self._storage.set_attribute(self._ids[number], "attempt", record.attempt + 1)
        self._put(replace(record, attempt=record.attempt + 1))

    def note_accelerators(self, number: int, accelerators: float) -> None:
        """Store that a trial holds more than the space file says; of a COMPLETE one beside it, as in `note_death`."""
        record = self._trials[number]
        if record.accelerators == accelerators:
            return
        if record.state == "RUNNING":
            self._storage.set_attribute(self._ids[number], "accelerators", accelerators)
        else:
            self._storage.set_study_attribute(f"{HELD}{number}", accelerators)
        self._put(replace(record, accelerators=accelerators))

    def note_death(self, number: int, death: Death) -> None:
        """Store that an attempt ended without a result. A COMPLETE trial, whose verification had been resumed, cannot
        change in Optuna: its deaths are kept beside it."""
        record = self._trials[number]
        record = replace(record, deaths=(*record.deaths, death), attempt=death.attempt + 1)
        stored = [asdict(each) for each in record.deaths]
        if record.state == "RUNNING":
            self._storage.set_attribute(self._ids[number], "deaths", stored)
        else:
            self._storage.set_study_attribute(f"{DIED}{number}", stored)
        self._put(record)

    # ---- storing ---------------------------------------------------------------------------------------------------

    def _create(self, state: TrialState, suggested: Suggested, **user_attrs: Any) -> int:
        """Store a trial whole, in one transaction."""
        number, params = len(self._trials), suggested.params
        user_attrs |= {"configuration": self.space.configuration(params), "seed": self._seed(params, number)}
        template = create_trial(
            state=state,
            params=params,
            distributions=suggested.distributions,
            user_attrs=user_attrs,
            system_attrs=suggested.system_attrs,
        )
        trial_id = self._storage.create(number, template)
        if trial_id is None:
            raise StudyError(
                f"study {self._empty.name} got trials from another program while this search runs; run it again"
            )
        template.number, template._trial_id = number, trial_id
        self._remember(template, {})
        return number

    def _finish(
        self,
        record: TrialRecord,
        state: TrialState,
        attributes: Mapping[str, Any],
        constraints: Mapping[str, float] | None = None,
        values: Sequence[float] | None = None,
    ) -> bool:
        """End a trial; False when it has an end already, which is kept."""
        number = record.number
        if self._trials[number].state not in ("RUNNING", "WAITING"):
            return False
        trial_id = self._ids[number]
        try:
            for key, value in attributes.items():
                self._storage.set_attribute(trial_id, key, value)
            for key, value in (constraints or {}).items():
                self._storage.set_system_attribute(trial_id, key, value)
            self._storage.set_state(trial_id, state, values)
        except UpdateFinishedTrialError:  # an earlier call was stored, although its answer was an error
            self._remember(self._storage.trial(trial_id), {})
            return False
        self._put(record)
        return True

    def _remember(self, trial: FrozenTrial, study: Mapping[str, Any]) -> None:
        record = trial_record(self._empty.name, trial, study)
        if record.number == len(self._ids):
            self._ids.append(trial._trial_id)
        if record.state == "FAILED" and trial.user_attrs.get("given_up"):  # else a kill came between the two
            self._given_up.add(record.number)
        if kept := kept_attributes(trial.system_attrs):
            self._attributes[record.number] = kept
        self._put(record)

    def _put(self, record: TrialRecord) -> None:
        self._snapshot = None
        if record.number == len(self._trials):
            self._trials.append(record)
        else:
            self._numbers[self._trials[record.number].state].discard(record.number)
            self._trials[record.number] = record
        self._numbers[record.state].add(record.number)

    def _seed(self, params: Mapping[str, Any], number: int) -> int:
        return self.space.recipe(params, number).student.seed

    def _draw_rest(self, number: int) -> None:
        """Complete a trial that a driver of an older version left half-drawn; what was drawn is kept."""
        trial_id = self._ids[number]
        stored = self._storage.trial(trial_id)
        fixed = stored.system_attrs.get("fixed_params", {}) | stored.params
        drawn = replace(self.prepare(), number=number).draw(self.config.search.sampler, 0, fixed)
        for name, value in drawn.params.items():
            if name not in stored.params:
                self._storage.set_param(trial_id, name, value, drawn.distributions[name])
        params = drawn.params
        configuration, seed = self.space.configuration(params), self._seed(params, number)
        self._storage.set_attribute(trial_id, "configuration", configuration)
        self._storage.set_attribute(trial_id, "seed", seed)
        self._put(replace(self._trials[number], params=params, configuration=configuration, seed=seed))

    def _enqueue_points(self, present: set[int]) -> None:
        """Each point once, also when an earlier driver died between two of them."""
        for index, point in enumerate(self.space.points()):
            if index not in present:
                suggested = self.prepare().draw(self.config.search.sampler, 0, point)
                self._create(TrialState.WAITING, suggested, point=index)
