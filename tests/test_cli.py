"""Wrong input to the command lines: exit code 2, one line that helps, and nothing started or changed."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from studies import closed_form, config_of, open_study, result, tree, write_space

from search import front, run
from search.artifacts.locks import exclusive

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(30)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a cluster nor a server nor data of the user's own, and no network."""
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "CCDIST_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("urllib.request._opener", None)  # urllib keeps the proxies that it found first


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "storage"


@pytest.fixture
def space(tmp_path: Path) -> Path:
    return write_space(tmp_path / "tiny.yaml", tree())


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 2) -> str:
    """The one line that search.run answers with."""
    assert run.main([str(argument) for argument in arguments]) == code
    return only_line(capsys.readouterr().err)


def only_line(stderr: str) -> str:
    assert stderr.count("\n") == 1, stderr
    assert stderr.startswith("error: ")
    assert "Traceback" not in stderr
    return stderr.strip()


def rows(database: Path) -> list[Any]:
    """What the database holds, whatever file its pages lie in."""
    connection = sqlite3.connect(database)
    try:
        return list(connection.iterdump())
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["student.epoch=3"], "unknown key student.epoch; did you mean student.epochs?"),
        (["bugdet.trials=3"], "unknown key bugdet; did you mean budget?"),
        (["student.l1={low: 2, high: 1}"], "student.l1: low 2 is above high 1; exchange them"),
        (["student.l1={low: 0, high: 1, log: true}"], "a logarithmic range needs low above 0"),
        (["threat.epsilon=8"], "write 8/255 if that is what you mean"),
        (["search.sampler=cmaes"], "expected kind: 'tpe'"),
        (["budget.trials"], "expected key=value"),
        (["resources.gpu=1.5"], "above 1 only whole GPUs"),
        (["student.epochs=2", "student.epochs=0"], "student.epochs: 0 is not allowed"),
    ],
)
def test_a_wrong_space_touches_nothing(
    settings: list[str], expected: str, space: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [flag for setting in settings for flag in ("--set", setting)]
    assert expected in refused(capsys, space, "--storage", storage, *flags)
    assert not storage.exists()


def test_a_wrong_number_of_trials(space: Path, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "budget.trials: 0 is not allowed" in refused(capsys, space, "--storage", storage, "--trials", 0)
    assert not storage.exists()


def test_a_space_that_is_not_there(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = refused(capsys, "nowhere.yaml", "--storage", storage)
    assert "no space file nowhere.yaml; give a path, or the name of a shipped one: " in answer
    assert "digits" in answer
    assert not storage.exists()


def test_a_data_set_that_is_not_there(
    space: Path, storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("CCDIST_DATA_DIR", str(tmp_path / "data"))
    answer = refused(capsys, space, "--storage", storage, "--set", "data.name=mnist")
    assert "data set mnist is not in" in answer
    for way in ("data.path", "CCDIST_DATA_DIR=DIR", "with a network"):
        assert way in answer
    assert not (storage / "study.db").exists()


def test_data_that_are_not_there_or_unknown(
    space: Path, storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = refused(capsys, space, "--storage", storage, "--set", f"data.path={tmp_path}")
    assert f"data.path {tmp_path} has no train.parquet" in answer
    answer = refused(capsys, space, "--storage", storage, "--set", "data.name=imagenet")
    assert "unknown data set 'imagenet'; known: digits, mnist" in answer
    assert not (storage / "study.db").exists()


def test_a_storage_that_cannot_be_written(space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    answer = refused(capsys, space, "--storage", tmp_path / "file" / "runs")
    assert f"storage {tmp_path / 'file' / 'runs'} cannot be written" in answer
    assert "--storage DIR" in answer
    assert (tmp_path / "file").read_text() == "mine"


def test_artifacts_that_are_no_folder(space: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = refused(capsys, space, "--set", "storage.artifacts=ftp://bucket/runs")
    assert "ftp://bucket/runs is no storage that can be used (" in answer
    assert "expected a folder, or an address such as s3://BUCKET/PREFIX" in answer


def test_another_space_under_the_same_name(
    space: Path, storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage.mkdir()
    open_study(config_of(tmp_path), storage / "study.db").ask()
    before = rows(storage / "study.db")
    answer = refused(capsys, space, "--storage", storage, "--set", "student.l1=1.0e-5")
    assert "study tiny exists with another space (student.l1: stored 1e-06, given 1e-05)" in answer
    assert "--set name=" in answer
    assert rows(storage / "study.db") == before


def test_a_database_that_is_none(space: Path, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage.mkdir()
    (storage / "study.db").write_text("these are my notes, which happen to have this name")
    answer = refused(capsys, space, "--storage", storage)
    assert "study.db cannot be opened: file is not a database" in answer
    assert (storage / "study.db").read_text() == "these are my notes, which happen to have this name"


@pytest.mark.parametrize("what", ["state", "student", "teacher", "teacher state"])
def test_a_damaged_checkpoint_of_an_unfinished_trial(
    what: str, space: Path, storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage.mkdir()
    assignment = open_study(config_of(tmp_path), storage / "study.db").ask()
    trial, teachers = storage / "artifacts" / "tiny" / "trials" / assignment.key, storage / "artifacts" / "teachers"
    damaged = {
        "state": trial / "state.safetensors",
        "student": trial / "student" / "network.json",
        "teacher": teachers / "0123" / "teacher.json",
        "teacher state": teachers / "0123" / "state.safetensors",
    }[what]
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"\x00 not what was written \n" * 3)
    before, content = rows(storage / "study.db"), damaged.read_bytes()
    answer = refused(capsys, space, "--storage", storage)
    assert str(damaged.parent if damaged.name in ("network.json", "teacher.json") else damaged) in answer
    assert "delete" in answer
    assert rows(storage / "study.db") == before
    assert damaged.read_bytes() == content
    assert not (storage / "mlflow").exists()


def test_a_second_driver(space: Path, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with exclusive(storage / "study.db.tiny.lock", wait=False):
        answer = refused(capsys, space, "--storage", storage)
    assert f"tiny.lock is held by process {os.getpid()}" in answer
    assert not (storage / "study.db").exists()


def test_a_study_that_has_its_trials_is_shown(
    space: Path, storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage.mkdir()
    study = open_study(config_of(tmp_path), storage / "study.db")
    for _ in range(3):
        assignment = study.ask()
        study.tell(assignment.number, closed_form(assignment.params))
    before = rows(storage / "study.db")
    arguments = [str(space), "--storage", str(storage), "--set", "tracking.enabled=false", "--trials", "3"]
    assert run.main(arguments) == 0
    captured = capsys.readouterr()
    assert "study tiny has its 3 trials already" in captured.out
    assert captured.err == ""
    assert rows(storage / "study.db") == before


def front_of(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = front.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_front_of_a_study_that_is_not_there(
    storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = front_of(capsys, "tiny", "--storage", storage)
    assert (code, out) == (2, "")
    assert "there is no study database" in only_line(err)
    assert not storage.exists()
    storage.mkdir()
    open_study(config_of(tmp_path), storage / "study.db")
    code, out, err = front_of(capsys, "tinny", "--storage", storage, "--json")
    assert (code, out) == (2, "")
    assert "no study 'tinny'" in only_line(err)
    assert only_line(err).endswith("studies there: tiny")
    assert not (storage / "artifacts").exists()


def test_the_front_needs_neither_a_finished_study_nor_ray(
    space: Path, storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage.mkdir()
    study = open_study(config_of(tmp_path), storage / "study.db")
    assert front_of(capsys, "tiny", "--storage", storage)[0] == 0  # no trial is complete
    for told in [result(0.9, 0.3), result(0.8, 0.5), result(0.7, 0.4)]:
        study.tell(study.ask().number, told)
    study.tell_failed(study.ask().number, "why")
    study.ask()
    for name in ("tiny", space):
        code, out, err = front_of(capsys, name, "--storage", storage, "--json")
        assert (code, err) == (0, "")
        shown = json.loads(out)
        assert shown["front"] == ["tiny-0000", "tiny-0001"]
        assert [trial["state"] for trial in shown["trials"]] == ["COMPLETE"] * 3 + ["FAILED", "RUNNING"]
        assert shown["trials"][3]["standard_accuracy"] is None
        assert shown["hypervolume"] == pytest.approx(0.7 * 0.2 + 0.6 * 0.2)
    assert (storage / "artifacts" / "tiny" / "report.html").stat().st_size > 10_000


def test_as_a_program(storage: Path) -> None:
    command = [sys.executable, "-m", "search.run", "digits", "--set", "threat.epsilon=8", "--storage", str(storage)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=25)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "write 8/255" in only_line(done.stderr)
    assert not storage.exists()
