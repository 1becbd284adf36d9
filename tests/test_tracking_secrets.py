"""Logins of tracking servers and databases: they work, and are nowhere to be found afterwards."""

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import pytest
from contracts import STUDY
from studies import FINGERPRINT, config_of, tree, write_space

from benchmarks.live_search import ROOT, LiveSearch, Server, wait_for
from benchmarks.tracking_outage import contents, lost_rows, rows_left, running_server
from benchmarks.tracking_proxy import Proxy, basic, bearer
from search import run as search_run
from search.space import Space
from search.storage import Storage, StorageError
from search.studies.study_record import stored_config
from search.study import Study
from search.tracked.bookkeeping import study_info
from tracking.address import Address, AddressError, shown, to_open, without_secrets
from tracking.journal import Journal, save_study_info
from tracking.mlflow_tracker import MlflowTracker, open_client
from tracking.replay import main as replay_main
from tracking.sender import Delivery, Sender, why
from tracking.tracker import LoginError

# The first test that touches MLflow pays for its import.
pytestmark = pytest.mark.timeout(60)

USER, SECRET, TOKEN = "mallory-the-user", "s3cret/p@ss:word", "t0ken-of-the-test"
LOGIN = f"{USER}:{quote(SECRET, safe='')}"
MARKS = (
    SECRET,
    TOKEN,
    quote(SECRET, safe=""),
    quote(SECRET),
    base64.b64encode(f"{USER}:{SECRET}".encode()).decode(),
)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No login of the user's own; what a test sets is taken back, whoever sets it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")


def found_in(*folders: Path) -> list[str]:
    """The files that hold a secret, in any spelling."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    assert files
    return [str(file) for file in files if any(mark.encode() in file.read_bytes() for mark in MARKS)]


# ---- Addresses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("full", "stored"),
    [
        ("http://host:5000", "http://host:5000"),
        ("https://host/team/", "https://host/team/"),
        (f"http://{LOGIN}@host:5000/team", "http://host:5000/team"),
        (f"https://{TOKEN}@host", "https://host"),
        ("http://user:a@b:c@host", "http://host"),
        ("http://[::1]:5000", "http://[::1]:5000"),
        ("sqlite:////a/b@c:d.db", "sqlite:////a/b@c:d.db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        (f"postgresql+psycopg://me:{quote(SECRET, safe='')}@host:5432/db", "postgresql+psycopg://me@host:5432/db"),
        (f"postgresql://me@host/db?password={TOKEN}&sslmode=require", "postgresql://me@host/db?sslmode=require"),
        (f"postgresql://me@host/db?password={TOKEN}", "postgresql://me@host/db"),
        (f"postgresql://me@host/db?sslkey=/k&sslpassword={TOKEN}", "postgresql://me@host/db?sslkey=%2Fk"),
        (f"mysql+pymysql://me@host/db?ssl_key_password={TOKEN}", "mysql+pymysql://me@host/db"),
        ("postgresql:///db?host=/run/pg", "postgresql:///db?host=/run/pg"),
        (f"mysql+pymysql://me:{TOKEN}@host/db", "mysql+pymysql://me@host/db"),
    ],
)
def test_what_is_stored_of_an_address(full: str, stored: str) -> None:
    address = Address.of(full)
    assert address.open == stored
    assert address.has_secret == (full != stored)
    assert Address.of(stored) == Address(stored, stored)
    assert not any(mark in repr(address) for mark in MARKS)


@pytest.mark.parametrize(
    "uri",
    [
        f"http://host:5000?token={TOKEN}",
        f"http://host:5000/#{TOKEN}",
        f"http://user:{SECRET}@host:5000",  # its slash ends the host
        f"http://:{TOKEN}",
        f"http://user:{TOKEN}@",
        "http://",
    ],
)
def test_an_address_that_cannot_be_used_is_refused_without_its_secret(uri: str) -> None:
    with pytest.raises(AddressError) as caught:
        Address.of(uri)
    text = str(caught.value)
    assert "expected an address" in text or "leave it out" in text
    assert not any(mark in text for mark in MARKS)
    assert "\n" not in text


def test_a_login_is_used_where_it_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert to_open("http://host:1") == "http://host:1"
    assert "MLFLOW_TRACKING_USERNAME" not in os.environ
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{LOGIN}@host:1/")
    assert to_open("http://other:1") == "http://other:1"
    assert "MLFLOW_TRACKING_USERNAME" not in os.environ
    assert to_open("http://host:1") == "http://host:1/"
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == (USER, SECRET)
    assert without_secrets(f"it said {SECRET}") == "it said ***"
    whole = f"postgresql://me:{TOKEN}@host/db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", whole)
    assert to_open("postgresql://me@host/db") == whole
    assert to_open("postgresql://me@host/other") == "postgresql://me@host/other"


# ---- Space files, studies, messages ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "advice", "enabled"),
    [
        (f"http://{LOGIN}@host:5000", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD", "true"),
        (f"http://{LOGIN}@host:5000", "write http://host:5000 and set MLFLOW_TRACKING_USERNAME", "false"),
        (f"http://{TOKEN}@host:5000", "MLFLOW_TRACKING_TOKEN", "true"),
        (f"http://host:5000?token={TOKEN}", "MLFLOW_TRACKING_TOKEN", "true"),
        (f"http://me:{SECRET}@host", "expected an address", "true"),
        (f"postgresql://me:{TOKEN}@host/db", "PGPASSWORD", "true"),
        (f"postgresql://me:{TOKEN}@host/db", "PGPASSWORD", "false"),
        (f"ftp://me:{TOKEN}@host", "expected a server", "true"),
        (f"{TOKEN}@host", "expected a server", "true"),
    ],
)
def test_a_login_in_a_space_file_is_refused(
    uri: str, advice: str, enabled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when tracking is off: the study keeps its space file."""
    space = write_space(tmp_path / "tiny.yaml", tree())
    settings = ["--set", f"tracking.uri={uri}", "--set", f"tracking.enabled={enabled}"]
    code = search_run.main([str(space), "--storage", str(tmp_path / "storage"), *settings, "--dry-run"])
    told = "".join(capsys.readouterr())
    assert code == 2
    assert told.count("\n") == 1
    assert advice in told
    assert not any(mark in told for mark in MARKS)
    assert not (tmp_path / "storage").exists()


def test_a_login_in_the_environment_is_used_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{LOGIN}@host:5000")
    storage = Storage.of(config, str(tmp_path / "storage"))
    assert storage.tracking_uri == "http://host:5000"
    assert not any(mark in f"{storage} {study_info(config, storage)}" for mark in MARKS)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://host:5000?token={TOKEN}")
    with pytest.raises(StorageError) as caught:
        Storage.of(config, str(tmp_path / "storage"))
    assert TOKEN not in str(caught.value)


def test_a_study_does_not_keep_its_database_password(tmp_path: Path) -> None:
    places = {"study": f"postgresql://me:{quote(SECRET, safe='')}@host/studies?password={TOKEN}"}
    database = tmp_path / "storage" / "study.db"
    database.parent.mkdir()
    config, url = config_of(tmp_path, storage=places), f"sqlite:///{database}"
    Study.open(config, Space(config), url, FINGERPRINT)
    assert stored_config(url, config.study_name).storage.study == "postgresql://me@host/studies"
    assert found_in(database.parent) == []


def test_the_command_to_go_on_hides_a_password(tmp_path: Path) -> None:
    url = f"postgresql://me:{quote(SECRET, safe='')}@host/studies"
    arguments = search_run._parser().parse_args(["digits", "--set", f"storage.study={url}"])
    told = search_run._command(arguments)
    assert "storage.study=postgresql://me:***@host/studies" in told
    assert not any(mark in told for mark in MARKS)


def test_shown_hides_whatever_may_be_a_secret() -> None:
    for uri in (f"x://{SECRET}@h", f"http://me:{SECRET}@h?{TOKEN}", f"http://h/?a=b&c={TOKEN}", f"http://h#{TOKEN}"):
        assert not any(mark in shown(uri) for mark in MARKS)


# ---- A server that wants a login -------------------------------------------------------------------------------


def write_journals(storage: Path) -> Path:
    journals = storage / "artifacts" / STUDY.name / "journal"
    save_study_info(journals, STUDY)
    with Journal(journals / "t1.jsonl") as journal:
        journal.start("t1", {"alpha": 0.5}, {})
        journal.metrics(0, {"loss": 1.0})
        journal.end("FINISHED", {}, {})
    return journals


@pytest.mark.parametrize(
    "refusal",
    [
        (401, "You are not authenticated."),
        (403, "Permission denied"),
        (401, json.dumps({"detail": "Unauthorized"})),
        (403, json.dumps({"error_code": "PERMISSION_DENIED", "message": "no"})),
    ],
)
def test_a_wrong_login_is_told_once_and_rows_wait(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    refusal: tuple[int, str],
) -> None:
    journals = write_journals(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    status, text = refusal
    with Proxy("", accepted=(), refusal=(status, text.replace("no", f"no, {TOKEN}"))) as proxy:
        with pytest.raises(LoginError, match="MLFLOW_TRACKING_USERNAME"):
            Delivery(journals, MlflowTracker(proxy.url, None)).send()
        sender = Sender(journals, MlflowTracker(proxy.url, None), interval_s=0.01)
        sender.start()
        deadline = time.monotonic() + 10
        while proxy.refused < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        start = time.monotonic()
        assert sender.stop(30.0) == 3
        assert time.monotonic() - start < 10  # waiting longer would only be more wrong logins
        told = [record.getMessage() for record in caplog.records if "accept the login" in record.getMessage()]
        assert len(told) == 1
        assert f"tracking server {proxy.url} does not accept the login: set MLFLOW_TRACKING_USERNAME" in told[0]
        assert "3 rows waiting" in told[0]
        assert "\n" not in told[0]
        assert replay_main([str(tmp_path), "--tracking-uri", proxy.url]) == 1
    out, err = capsys.readouterr()
    assert "0 rows sent, 3 left" in out
    assert "set MLFLOW_TRACKING_USERNAME" in out
    assert not any(mark in caplog.text + out + err for mark in MARKS)


@pytest.mark.parametrize("password", [TOKEN, SECRET])
def test_a_message_of_mlflow_hides_the_password_of_a_database(password: str) -> None:
    """`postgres:` is no scheme of MLflow, which says so with the whole address."""
    with pytest.raises(Exception, match="unsupported URI") as caught:
        open_client(f"postgres://me:{quote(password, safe='')}@host/db")
    told = why(caught.value)
    assert "postgres://me:***@host/db" in told
    assert not any(mark in told for mark in MARKS)


def test_replay_refuses_an_address_with_a_query(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_journals(tmp_path)
    assert replay_main([str(tmp_path), "--tracking-uri", f"http://host?token={TOKEN}"]) == 2
    told = "".join(capsys.readouterr())
    assert told.count("\n") == 1
    assert "MLFLOW_TRACKING_TOKEN" in told
    assert TOKEN not in told


# ---- The whole flow, with a real server behind a login -----------------------------------------------------------


@pytest.fixture(scope="module")
def server_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(server_folder: Path) -> Iterator[Server]:
    with running_server(server_folder) as server:
        wait_for(server.answers, "the tracking server answers")
        yield server


def replayed(storage: Path, environment: Mapping[str, str], *options: str) -> "subprocess.CompletedProcess[str]":
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_TRACKING")}
    command = [sys.executable, "-m", "tracking.replay", str(storage), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=plain | dict(environment), check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_login_is_left_anywhere(server: Server, server_folder: Path, tmp_path: Path) -> None:
    """A search that may not in, the replays of what it kept with each kind of login, and a search that may."""
    home, ray = tmp_path / "home", Path("/tmp") / f"ray-login-{os.getpid()}"
    home.mkdir()
    settings = ["student.epochs=3", "teacher.epochs=2", "data.train_images=300", "data.validation_images=60"]
    right = (basic(USER, SECRET), bearer(TOKEN))
    with Proxy(server.url, accepted=right) as proxy:
        own = {"MLFLOW_TRACKING_URI": f"http://{LOGIN}@{proxy.place}", "HOME": str(home)}
        wrong = own | {"MLFLOW_TRACKING_URI": own["MLFLOW_TRACKING_URI"].replace(USER, f"not-{USER}")}
        storage = tmp_path / "storage"
        search = LiveSearch("digits", storage, ray, settings, wrong)
        log = tmp_path / "log"
        journals = storage / "artifacts" / "digits" / "journal"
        try:
            with log.open("w") as output:
                assert search.start(2, output).wait() == 0, log.read_text()
            assert log.read_text().count("does not accept the login: set MLFLOW_TRACKING_USERNAME") == 1
            assert proxy.passed == []
            waiting = rows_left(journals)
            assert waiting > 10

            refused = replayed(storage, {"MLFLOW_TRACKING_TOKEN": f"not-{TOKEN}"})
            assert (refused.returncode, rows_left(journals)) == (1, waiting)
            assert refused.stdout.count("\n") == 1
            by_token = replayed(storage, {"MLFLOW_TRACKING_TOKEN": TOKEN})
            assert by_token.returncode == 0, by_token.stdout + by_token.stderr
            kept = contents(server.url)
            assert lost_rows(journals, kept) == []
            files = {run["name"]: [name for name, _ in run["files"]] for run in kept["runs"].values()}
            assert "report.html" in files["digits"]
            assert any("verdicts.parquet" in name for name in files["digits-0000"])
            models = sum('"kind":"model"' in file.read_text() for file in journals.glob("*.jsonl"))
            assert len(kept["models"]) == models

            (home / ".netrc").write_text(f"machine 127.0.0.1 login {USER} password {SECRET}\n")
            (home / ".netrc").chmod(0o600)
            outputs = [refused, by_token]
            for environment in (
                {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": SECRET},
                own,
                {"HOME": str(home)},
            ):
                done = replayed(storage, environment, "--from-start")
                assert done.returncode == 0, done.stdout + done.stderr
                assert contents(server.url) == kept
                outputs.append(done)
            (home / ".netrc").unlink()

            search.environment = own
            with log.open("a") as output:
                assert search.start(3, output).wait() == 0, log.read_text()
            assert log.read_text().count("does not accept the login") == 1
            assert f"MLflow: {proxy.url}/#/experiments/" in log.read_text()
            assert rows_left(journals) == 0
            assert sum(run["name"].startswith("digits-") for run in contents(server.url)["runs"].values()) == 3
            for number, done in enumerate(outputs):
                (tmp_path / f"replay-{number}").write_text(done.stdout + done.stderr)
            assert found_in(tmp_path, server_folder, ray) == []
        finally:
            search.clean_up()
            subprocess.run(["rm", "-rf", str(ray)], check=False)
