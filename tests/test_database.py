"""The study's database: a real PostgreSQL server, what SQLite promises, and what is said when neither works."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import sqlalchemy
from sqlalchemy.exc import OperationalError
from studies import FINGERPRINT, closed_form, config_of, empty_database, result, space_of

from search import doctor, front
from search.artifacts.locks import LockedError
from search.artifacts.store_lock import _holder
from search.clusters.cluster_checkup import check_database
from search.space import Space
from search.storage import Storage
from search.studies import advisory_lock
from search.studies.advisory_lock import AdvisoryLock, lock_number
from search.studies.database import (
    DatabaseAwayError,
    DatabaseGoneError,
    StudyError,
    open_storage,
    postgres_url,
    without_password,
)
from search.studies.driver_lock import DriverLock
from search.studies.patience import Patience
from search.study import Study, load_record

if TYPE_CHECKING:  # pytest imports it as a plugin
    from postgres_server import PostgresServer

pytest_plugins = ("postgres_server",)
pytestmark = pytest.mark.timeout(30)  # the server's first start

# A driver without a search: it holds the lock until it is killed.
HOLDER = """
import signal, sys
from search.studies.driver_lock import study_lock
with study_lock(sys.argv[1], sys.argv[2]):
    print("held", flush=True)
    signal.pause()
"""


def storage_at(folder: Path, url: str) -> Storage:
    """The storage of a driver on a machine of its own: the database is all that drivers share."""
    folder.mkdir(exist_ok=True)
    places = {"study": url, "artifacts": str(folder / "artifacts")}
    return Storage.of(config_of(folder, storage=places), None)


def test_a_study_in_postgres(tmp_path: Path, postgres_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path)
    study = Study.open(config, Space(config), postgres_url, FINGERPRINT)
    first, second = study.ask(), study.ask()
    study.tell(first.number, result(0.75, 0.5))
    study.tell_failed(second.number, "no luck")
    third = study.ask()
    record = load_record(postgres_url, "tiny")  # another connection, as another machine has one
    assert [trial.state for trial in record.trials] == ["COMPLETE", "FAILED", "RUNNING"]
    assert record.trials[0].objectives == (0.75, 0.5)
    assert record.trials[1].reason == "no luck"
    assert record.trials[2].params == third.params
    again = Study.open(config, Space(config), postgres_url, FINGERPRINT)
    assert again.adopt(third.number) == third
    assert again.identifier == study.identifier
    assert doctor.main(["tiny", "--study-url", postgres_url, "--storage", str(tmp_path), "--no-mlflow"]) == doctor.LEFT
    assert "broken    tiny-0000: student is missing" in capsys.readouterr().out


def test_a_second_driver_is_refused_until_the_first_is_dead(tmp_path: Path, postgres_url: str) -> None:
    storage = storage_at(tmp_path / "here", postgres_url)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, postgres_url, "tiny"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        who = rf"search pid {holder.pid} on {re.escape(socket.gethostname())} \(127\.0\.0\.1\) since \d{{4}}-.* UTC"
        refusal = rf"study tiny in .* is held by {who}: that search still runs"
        with pytest.raises(LockedError, match=refusal) as caught, storage.only_driver("tiny"):
            pass
        assert "word" not in str(caught.value)
        with storage.only_driver("other") as lock:  # a lock for each study
            assert lock.still_held()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    died = time.monotonic()
    while True:
        try:
            with storage.only_driver("tiny") as lock:
                assert lock.still_held()
                break
        except LockedError:
            assert time.monotonic() < died + 2
    with storage.only_driver("tiny"):  # given back at the end
        pass


def test_a_lease_in_a_store_names_the_server_and_not_its_address(postgres_server: "PostgresServer") -> None:
    """As an ordinary user sees it; a copy of the database, on another server, is another."""
    url = postgres_server.url("postgres")
    (row,) = postgres_server.execute("SELECT system_identifier FROM pg_control_system()")
    name = _holder(url)
    assert str(row[0]) in name
    assert _holder(url.replace("127.0.0.1", "localhost")) == name
    assert _holder(url.replace("postgresql://", "postgresql+psycopg://")) == name
    assert _holder(postgres_server.url("template1")) != name
    postgres_server.execute("CREATE ROLE plain LOGIN PASSWORD 'plain'")
    assert _holder(re.sub("//[^@]*@", "//plain:plain@", url)) == name
    postgres_server.execute("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM public")
    refused = _holder(re.sub("//[^@]*@", "//plain:plain@", url))
    assert refused not in ("", name)
    assert ":plain" not in refused


def end_lock_session(server: "PostgresServer") -> None:
    """As an administrator would; a restart of the server does the same to all sessions."""
    ours = f"application_name LIKE 'search pid {os.getpid()} on %'"
    assert server.execute(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {ours}")


@pytest.fixture
def drivers(tmp_path: Path, postgres_url: str) -> tuple[Storage, Storage]:
    """The storage of two machines."""
    return storage_at(tmp_path / "here", postgres_url), storage_at(tmp_path / "there", postgres_url)


def driven(storage: Storage, lock: DriverLock, name: str) -> Study:
    config = config_of(storage.artifacts.parent, name=name)
    return Study.open(config, space_of(config), storage.study_url, FINGERPRINT, lock)


def test_a_driver_notices_that_its_lock_is_lost(
    drivers: tuple[Storage, Storage], postgres_server: "PostgresServer"
) -> None:
    here, there = drivers
    with here.only_driver("tiny") as lock:
        assert lock.still_held()
        end_lock_session(postgres_server)
        with there.only_driver("tiny") as successor:
            assert not lock.still_held()
            assert successor.still_held()
        assert not lock.still_held()  # nobody has it now, but somebody had it


def test_a_server_that_stays_away_is_not_another_driver(
    postgres_url: str, postgres_server: "PostgresServer", monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = AdvisoryLock(postgres_url, "away", Patience(limit_s=0.05))
    try:
        monkeypatch.setattr(lock, "_take", lambda: (_ for _ in ()).throw(OperationalError("", {}, OSError("refused"))))
        end_lock_session(postgres_server)
        for _ in range(2):  # somebody may have come meanwhile, but nobody knows of one
            with pytest.raises(DatabaseGoneError, match="did not come back within 0 s"):
                lock.still_held()
        with pytest.raises(DatabaseGoneError):
            lock.regained()
    finally:
        lock.release()


def test_a_session_that_does_not_end_is_not_taken_for_ended(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commit is in the disk's queue, and would come after what is asked again."""
    lock = AdvisoryLock(postgres_url, "slow")
    try:
        with monkeypatch.context() as patched:
            patched.setattr(advisory_lock, "_END_OTHERS", "SELECT :name, :pid, :since")
            patched.setattr(advisory_lock, "_PAUSE_S", 0.0)
            with pytest.raises(DatabaseAwayError, match="does not end"):
                lock.regained()
        assert lock.regained()
    finally:
        lock.release()


def test_a_lock_that_nobody_else_had_meanwhile_is_taken_again(
    drivers: tuple[Storage, Storage], postgres_server: "PostgresServer", caplog: pytest.LogCaptureFixture
) -> None:
    here, there = drivers
    with here.only_driver("again") as lock:
        for _ in range(2):  # before this driver has left its mark in the study, and after it
            end_lock_session(postgres_server)
            assert lock.still_held()
            with pytest.raises(LockedError, match="that search still runs"), there.only_driver("again"):
                pass
            study = driven(here, lock, "again")
        end_lock_session(postgres_server)
        first = study.ask()  # the server refuses what is committed without the lock, so that it is taken first
        study.tell(first.number, closed_form(first.params))
    assert ["no other driver came" in row.getMessage() for row in caplog.records] == [True] * 3
    assert [trial.state for trial in load_record(here.study_url, "again").trials] == ["COMPLETE", "WAITING"]


def test_a_commit_that_is_still_under_way_is_ended_before_it_is_repeated(
    drivers: tuple[Storage, Storage], postgres_server: "PostgresServer", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection broke, of which the server does not know yet: it could make the trial a second time."""
    here, _ = drivers
    with here.only_driver("under-way") as lock:
        study = driven(here, lock, "under-way")
        assert len(study.waiting()) == 2
        study.ask(), study.ask()
        storage = study._storage._storage
        create, calls = storage.create_new_trial, iter([DatabaseAwayError("gone")])

        def breaking(*args: Any) -> int:
            if (error := next(calls, None)) is not None:
                raise error
            return int(create(*args))

        monkeypatch.setattr(storage, "create_new_trial", breaking)
        name = f"search {lock.mark}"
        with psycopg.connect(postgres_server.url("postgres"), application_name=name) as old:
            old.execute("SELECT * FROM studies WHERE study_name = 'under-way' FOR UPDATE")
            release = threading.Timer(10, old.close)  # who does not end it would wait for it for ever
            release.start()
            assert study.ask().number == 2
            release.cancel()
            with pytest.raises(psycopg.OperationalError, match="terminating connection"):
                old.execute("SELECT 1")
        assert lock.still_held()


def test_a_driver_that_was_asleep_while_another_drove_writes_nothing(
    drivers: tuple[Storage, Storage], postgres_server: "PostgresServer"
) -> None:
    """The other is gone, the lock is free, and a connection that is older than the loss is still open."""
    here, there = drivers
    with here.only_driver("asleep") as lock:
        study = driven(here, lock, "asleep")
        mine = study.ask()
        end_lock_session(postgres_server)
        with there.only_driver("asleep") as other:
            its = driven(there, other, "asleep")
            assert its.adopt(mine.number) == mine
            its.tell_failed(mine.number, "of the other driver")
        before = load_record(here.study_url, "asleep")
        for write in (study.ask, lambda: study.tell_failed(mine.number, "of this driver")):
            with pytest.raises(StudyError, match="the lock on the study was lost"):
                write()
        assert not lock.still_held()
    assert load_record(here.study_url, "asleep") == before


def test_the_number_of_a_lock_does_not_change_between_versions() -> None:
    """Two versions of this program on one study must exclude each other."""
    assert lock_number("tiny") == lock_number("tiny") != lock_number("Tiny")
    assert lock_number("tiny") == -3326061220835640171


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("password", "refuses the user or the password; correct the URL"),
        ("database", "does not exist on that server; make it with createdb"),
        ("port", r"cannot be reached \(Connection refused\); start the server"),
        ("driver", r"install the postgres extra: pip install 'ccdist-search\[postgres\]'"),
    ],
)
def test_what_is_wrong_with_a_server_is_told_in_one_line(
    case: str, told: str, tmp_path: Path, postgres_server: "PostgresServer", monkeypatch: pytest.MonkeyPatch
) -> None:
    url = {
        "password": postgres_server.url("postgres", password="wrong"),
        "database": postgres_server.url("nothing"),
        "port": replace(postgres_server, port=1).url("postgres"),
        "driver": postgres_server.url("postgres"),
    }[case]
    if case == "driver":
        monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StudyError, match=told) as opened:
        open_storage(url)
    with pytest.raises(StudyError, match=told) as locked, storage_at(tmp_path, url).only_driver("tiny"):
        pass
    for caught in (opened, locked):
        assert "\n" not in str(caught.value)
        assert "wrong" not in str(caught.value)
        assert "ss%2Fword" not in str(caught.value)


@pytest.mark.parametrize("url", ["mysql://host/db", "sqlite://", "study.db", "postgresql://"])
def test_other_addresses_are_refused_in_one_line(url: str) -> None:
    with pytest.raises(StudyError, match="study database") as caught:
        open_storage(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (
            "postgresql://me:secret@127.0.0.1:x/d",
            r"postgresql://\*\*\*@127\.0\.0\.1:x/d: expected .*@HOST:PORT/DATABASE",
        ),
        (
            "postgresql://me:s3c@ret@HOST/d",
            r"postgresql://\*\*\*@HOST/d has an @ in its user or password; write %40 for",
        ),
        ("postgresql://me:s@secret/x@HOST/d", r"postgresql://\*\*\*@HOST/d has an @"),
    ],
)
def test_a_server_that_cannot_be_read_from_its_address(
    url: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StudyError, match=told) as opened:
        open_storage(url)
    with pytest.raises(StudyError, match=told), storage_at(tmp_path, url).only_driver("tiny"):
        pass
    assert "ret" not in str(opened.value)
    found = check_database(url)
    assert (found.fine, re.search(told, found.text) is not None) == (False, True)
    for command in (doctor, front):
        assert command.main(["tiny", "--study-url", url]) == 2
        assert re.match(f"error: study database {told}", capsys.readouterr().err)


def test_a_commit_to_sqlite_is_on_the_disk(tmp_path: Path) -> None:
    """A trial that a power loss takes out of the study would leave its folder to the next one of its number."""
    (tmp_path / "study.db").write_bytes(empty_database())
    storage = open_storage(f"sqlite:///{tmp_path}/study.db")
    with storage.engine.connect() as connection:
        pragmas = {name: connection.execute(sqlalchemy.text(f"PRAGMA {name}")).scalar() for name in PRAGMAS}
    assert pragmas == PRAGMAS


PRAGMAS = {"journal_mode": "wal", "synchronous": 2}


def test_a_url_names_the_installed_driver_unless_it_names_one() -> None:
    assert postgres_url("postgresql://h/d") == postgres_url("postgres://h/d") == "postgresql+psycopg://h/d"
    assert postgres_url("postgresql+pg8000://h/d") == "postgresql+pg8000://h/d"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at postgresql://me:secret@h/d now", "at postgresql://me:***@h/d now"),
        ("postgresql://me:a@b/c@h/d", "postgresql://me:***@h/d"),
        ("postgresql://h/d?user=me&password=secret&x=1", "postgresql://h/d?user=me&password=***&x=1"),
        ("postgresql://h/d?sslpassword=secret", "postgresql://h/d?sslpassword=***"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
    ],
)
def test_passwords_are_hidden(text: str, shown: str) -> None:
    assert without_password(text) == shown
