"""A study's database that goes away in the middle of a search: the search goes on, and every trial counts once.

The default suite breaks each operation of a study in turn, before and after it took effect; the slow tests stop a real
server under real searches.
"""

import errno
import re
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import Machine, SharedStudy, faults_of_epochs, interrupt, new_machines, wait_for_the_middle
from optuna.storages import InMemoryStorage
from studies import FINGERPRINT, closed_form, config_of, open_study, result, space_of

from benchmarks.kills import study_faults
from benchmarks.live_search import PATIENCE_S, wait_for
from benchmarks.postgres_server import PostgresServer
from search.artifacts.disk_space import when_it_answers
from search.artifacts.trial_files import TrialFiles
from search.config import SearchConfig
from search.studies import database, patience
from search.studies.database import DatabaseAwayError
from search.studies.driver_lock import DriverLock, file_lock
from search.studies.patience import Patience, interruptible
from search.studies.records import RungValues, StudyRecord
from search.studies.study_record import made_or_checked
from search.study import Study, StudyError
from search.suggestions.asking import Asker, Inline

pytest_plugins = ("postgres_server",)

OPERATIONS = (
    "create_new_trial",
    "get_all_trials",
    "get_trial",
    "get_trial_id_from_study_id_trial_number",
    "get_trial_number_from_id",
    "set_study_user_attr",
    "set_trial_param",
    "set_trial_state_values",
    "set_trial_system_attr",
    "set_trial_user_attr",
)


class BreakingStorage(InMemoryStorage):
    """Its connection breaks at some calls, by their order: before they take effect, or before their answer comes."""

    def __init__(self, breaks: dict[int, str]) -> None:
        super().__init__()
        self.breaks, self.calls, self.is_armed, self._depth = breaks, 0, False, 0

    def call(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if not self.is_armed or self._depth:  # a call of the storage's own
            return method(self, *args, **options)
        when = self.breaks.get(self.calls)
        self.calls += 1
        if when == "before":
            raise DatabaseAwayError("gone before")
        self._depth += 1
        try:
            answer = method(self, *args, **options)
        finally:
            self._depth -= 1
        if when == "after":
            raise DatabaseAwayError("gone after")
        return answer


def _breaking(name: str) -> Callable[..., Any]:
    method = getattr(InMemoryStorage, name)
    return lambda self, *args, **options: self.call(method, *args, **options)


for _name in OPERATIONS:
    setattr(BreakingStorage, _name, _breaking(_name))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Times that are the same in every run, and none spent on waiting."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> SearchConfig:
    return config_of(tmp_path_factory.mktemp("space"), search__floors={"standard_accuracy": 0.2})


def story(config: SearchConfig, storage: BreakingStorage) -> Study:
    """Everything that a driver does with a study."""
    stored = made_or_checked(config, storage, FINGERPRINT)
    storage.is_armed = True
    study = Study(config, space_of(config), stored, storage, DriverLock())
    first, second, third = study.ask(), study.ask(), study.ask()  # two points that waited, and a new one
    study.note_rung(first.number, "1/2", RungValues(0.5, 0.25, 1.0))
    study.tell(first.number, closed_form(first.params))
    study.tell_stopped(second.number, "hopeless", 2.0)
    study.tell_failed(third.number, "no luck")
    ahead = study.enqueue(proposal := study.prepare(), proposal.suggest())
    assert ahead is not None
    study.tell(study.start(ahead).number, result(0.75, 0.25, verification_state="stopped", certified_upper=0.75))
    study.refine(ahead, result(0.75, 0.5, certified_upper=0.5))
    study.tell_failed(study.ask().number, "nobody needs it", given_up=True)
    study.ask()
    return study


def told(record: StudyRecord) -> Any:
    """What must not depend on outages: all but the times."""
    return [
        (trial.key, trial.state, trial.params, trial.seed, trial.reason, trial.rungs, trial.objectives)
        for trial in record.trials
    ]


def check(config: SearchConfig, breaks: dict[int, str], expected: StudyRecord) -> None:
    study = story(config, storage := BreakingStorage(breaks))
    storage.is_armed = False
    again = Study.open(config, space_of(config), storage, FINGERPRINT)
    assert told(study.record()) == told(again.record()) == told(expected)
    for one in (study, again):
        assert (one.num_done(), one.num_failed(), one.unfinished(), one.waiting()) == (3, 1, [5], [])


def test_every_operation_is_effective_once_wherever_the_connection_breaks(config: SearchConfig) -> None:
    reference = story(config, counted := BreakingStorage({}))
    assert counted.calls > 30
    assert [trial.state for trial in reference.trials()] == [
        *("COMPLETE", "STOPPED", "FAILED", "COMPLETE", "FAILED", "RUNNING")
    ]
    for call in range(counted.calls):
        for when in ("before", "after"):
            check(config, {call: when}, reference.record())


@given(st.dictionaries(st.integers(0, 60), st.sampled_from(["before", "after"]), max_size=30))
def test_outages_upon_outages_change_nothing(config: SearchConfig, breaks: dict[int, str]) -> None:
    check(config, breaks, story(config, BreakingStorage({})).record())


def test_trials_of_another_program_are_not_taken_for_our_own(config: SearchConfig) -> None:
    """It stored its trial while the connection was broken."""
    storage = BreakingStorage({})
    study = Study(config, space_of(config), made_or_checked(config, storage, FINGERPRINT), storage)
    foreign = BreakingStorage.create_new_trial

    def regained() -> bool:
        storage.is_armed = False
        foreign(storage, study._storage._study_id)
        return True

    study._storage._regained = regained
    study.ask(), study.ask()
    storage.is_armed, storage.breaks, storage.calls = True, {0: "before"}, 0
    with pytest.raises(StudyError, match="got trials from another program"):
        study.ask()


def test_what_stays_away_ends_the_search_with_its_reason(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(patience.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    study = story(config, storage := BreakingStorage({}))
    storage.breaks = dict.fromkeys(range(1000), "before")
    with pytest.raises(DatabaseAwayError, match="gone before"):
        study.tell_failed(5, "x")
    assert 300 <= now[0] < 310
    assert [row.getMessage() for row in caplog.records] == ["gone before; the search waits for it"]


def test_what_cannot_be_told_yet_is_asked_again(config: SearchConfig) -> None:
    study = story(config, storage := BreakingStorage({}))
    storage.breaks, storage.calls = {0: "before"}, 0
    answers: list[bool | DatabaseAwayError] = [DatabaseAwayError("a session does not end"), True]

    def regained() -> bool:
        answer = answers.pop(0)
        if isinstance(answer, DatabaseAwayError):
            raise answer
        return answer

    study._storage._regained = regained
    study.tell_failed(5, "x")
    assert answers == []
    assert study.trials()[5].state == "FAILED"


def test_a_lock_that_could_not_be_looked_at_is_not_told_to_be_another_drivers(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(patience.time, "monotonic", lambda: now[0])
    study = story(config, storage := BreakingStorage({}))
    storage.breaks, storage.calls = {0: "before"}, 0

    def waited() -> bool:
        now[0] += 301
        raise DatabaseAwayError("did not come back within 300 s")

    study._storage._regained = waited
    with pytest.raises(DatabaseAwayError, match="did not come back within 300 s"):
        study.tell_failed(5, "x")


def test_nothing_is_written_once_another_driver_may_have_come(config: SearchConfig) -> None:
    study = story(config, storage := BreakingStorage({}))
    storage.breaks, storage.calls = {0: "before"}, 0
    study._storage._regained = lambda: False
    with pytest.raises(StudyError, match=r"the lock on the study was lost while its database was away: gone before"):
        study.tell_failed(5, "x")
    assert storage.calls == 1


def test_a_commit_whose_answer_is_lost_makes_one_trial(
    config: SearchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna itself would make up to five of them."""
    lost: Iterator[bool] = iter([])

    class Losing(database._Durable):
        def commit(self) -> None:
            super().commit()
            if next(lost, False):
                error = sqlite3.OperationalError("database is locked")
                error.sqlite_errorcode = sqlite3.SQLITE_BUSY
                raise error

    monkeypatch.setattr(database, "_Durable", Losing)
    study = open_study(config, tmp_path / "study.db")
    study.ask(), study.ask()
    lost = iter([True])
    assert study.ask().number == 2
    assert next(lost, False) is False
    assert len(open_study(config, tmp_path / "study.db").trials()) == 3


def test_a_suggestion_that_could_not_be_stored_is_stored_later(config: SearchConfig) -> None:
    study = story(config, BreakingStorage({}))
    asker, enqueue, calls = Asker(Inline(), ahead=False), study.enqueue, [0]

    def away(*args: Any) -> int | None:
        calls[0] += 1
        if calls[0] == 1:
            raise DatabaseAwayError("gone")
        return enqueue(*args)

    study.enqueue = away  # type: ignore[method-assign]
    with pytest.raises(DatabaseAwayError):
        asker.take(study)
    assert asker._asked is not None
    future = asker._asked[1]
    number = asker.take(study)
    assert number is not None
    assert study.trials()[number].params == future.result().params


# ---- Waiting ---------------------------------------------------------------------------------------------------


def test_attempts_come_at_once_then_rarely_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(patience.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    times = list(Patience(limit_s=20, first_pause_s=1, longest_pause_s=4).attempts())
    assert times == [0, 1, 3, 7, 11, 15, 19]


def test_ctrl_c_ends_a_wait_although_ray_tune_only_notes_it() -> None:
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        with pytest.raises(KeyboardInterrupt), interruptible():
            signal.raise_signal(signal.SIGINT)
        assert noted == []
        signal.raise_signal(signal.SIGINT)
        assert noted == [signal.SIGINT]
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a command started with nohup
        with interruptible():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    thread = threading.Thread(target=lambda: interruptible().__enter__())
    thread.start()
    thread.join()


def test_a_lock_file_is_held_while_its_file_system_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: Iterator[OSError | None] = iter([OSError(5, "EIO"), OSError(116, "ESTALE"), None])
    stat = Path.stat

    def hanging(path: Path, **options: Any) -> Any:
        if (error := next(answers, None)) is not None:
            raise error
        return stat(path, **options)

    with file_lock(tmp_path / "lock") as lock:
        with monkeypatch.context() as patched:
            patched.setattr(Path, "stat", hanging)
            assert lock.still_held()
        (tmp_path / "lock").unlink()
        assert not lock.still_held()


def test_the_driver_writes_an_end_once_the_folder_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, errors = TrialFiles(tmp_path, "tiny"), [OSError(errno.ESTALE, "stale"), OSError(errno.EIO, "broken")]
    monkeypatch.setattr("search.artifacts.trial_files.discard", lambda places: raised(errors))
    files.end_failed("tiny-0000", "no luck", silent=True)
    assert errors == []
    with pytest.raises(PermissionError):
        when_it_answers(lambda: raised([PermissionError(errno.EACCES, "no")]))
    with pytest.raises(OSError, match="for ever"):
        when_it_answers(lambda: raised([OSError(errno.EIO, "for ever")]), Patience(limit_s=0.01))


def raised(errors: list[OSError]) -> None:
    """Fail with the next of these errors, if there is one left."""
    if errors:
        raise errors.pop()


# ---- Real searches and a real server -----------------------------------------------------------------------------

OUTAGE_S = 20.0
TRIALS = 5


@pytest.fixture
def shared(postgres_server: PostgresServer, tmp_path: Path) -> SharedStudy:
    if not postgres_server.runs:  # a test has failed during its outage
        postgres_server.start()
    return SharedStudy("outage", postgres_server.new_database(f"outage-{tmp_path.name}"), tmp_path / "shared")


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Callable[[str], Machine]]:
    with new_machines(tmp_path) as new:
        yield new


@pytest.fixture
def machine(machines: Callable[[str], Machine]) -> Machine:
    return machines("machine")


def faults_of(study: SharedStudy, trials: int = TRIALS) -> list[str]:
    record = study.record
    faults = study_faults(record, trials)
    return faults + [fault for trial in record.trials for fault in faults_of_epochs(study, trial.key)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_outlives_a_restart_of_its_database(
    shared: SharedStudy, machine: Machine, postgres_server: PostgresServer
) -> None:
    driver = machine.start(shared, TRIALS)
    wait_for_the_middle(shared)
    postgres_server.stop()
    time.sleep(OUTAGE_S)
    assert driver.poll() is None
    postgres_server.start()
    ours = f"SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'search pid {driver.pid} on %'"
    wait_for(lambda: postgres_server.execute(ours) == [(1,)], "the driver has its lock again")
    refused = machine.run(shared, TRIALS)
    assert refused[0] == 2
    assert f"held by search pid {driver.pid} on" in refused[2]
    out, err = driver.communicate(timeout=PATIENCE_S)
    print(out, err)
    assert driver.returncode == 0, out + err
    assert err.count("is away (") == 1
    assert err.count("no other driver came; the search goes on") == 1
    assert shared.password not in err
    assert faults_of(shared) == []
    assert [trial.state for trial in shared.record.trials] == ["COMPLETE"] * TRIALS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_driver_that_finds_another_one_after_an_outage_ends(
    shared: SharedStudy,
    machine: Machine,
    machines: Callable[[str], Machine],
    postgres_server: PostgresServer,
    tmp_path: Path,
) -> None:
    """It was asleep when the database came back. The other shares nothing but the database with it."""
    driver = machine.start(shared, TRIALS)
    wait_for_the_middle(shared)
    postgres_server.stop()
    driver.send_signal(signal.SIGSTOP)
    postgres_server.start()
    code, out, err = machines("other").run(replace(shared, artifacts=tmp_path / "elsewhere"), TRIALS)
    assert code == 0, out + err
    before = shared.record
    driver.send_signal(signal.SIGCONT)
    out, err = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 3, out + err
    assert re.search(r"error: .*the lock on (the study|study outage) was lost", err)
    assert shared.record == before
    assert study_faults(before, TRIALS) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_ends_a_search_that_waits_for_its_database(
    shared: SharedStudy, machine: Machine, postgres_server: PostgresServer
) -> None:
    driver = machine.start(shared, TRIALS)
    wait_for_the_middle(shared)
    postgres_server.stop()
    assert driver.stderr is not None
    assert any("is away (" in line for line in driver.stderr)  # read no further than that
    began = time.monotonic()
    interrupt(driver)
    out, err = driver.communicate(timeout=PATIENCE_S)
    print(f"ended after {time.monotonic() - began:.1f} s", out, err)
    assert driver.returncode == 130, out + err
    assert "go on with: python -m search.run space.yaml" in out + err
    postgres_server.start()
    code, out, err = machine.run(shared, TRIALS)
    assert code == 0, out + err
    assert faults_of(shared) == []
