"""The doctor: each view of a study broken on purpose is found, repaired from the study, and then all is well."""

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from studies import config_of, open_study

from ccdist import checkpoint
from ccdist.networks import build_network
from ccdist.training import TrainingResult
from ccdist.verdicts import SCHEMA, Finding, Rows, Verdict, accuracies
from search.artifacts.places import TrialPlaces
from search.config import SearchConfig
from search.doctor import main
from search.storage import Storage, place_of
from search.studies.records import TrialResult
from search.study import load_record
from search.teachers import TeacherStore, get_or_train
from search.tracked.bookkeeping import study_info
from search.trials.endings import conclude
from tracking.audit import study_runs
from tracking.journal import STUDY_JOURNAL, Journal, read_rows, save_study_info
from tracking.mlflow_tracker import MlflowTracker, local_store, open_client
from tracking.sender import Delivery

pytestmark = pytest.mark.timeout(60)  # the first import of MLflow, and its tables

KEYS = [f"tiny-{number:04d}" for number in range(8)]
NUM_COMPLETE = 6
FAILED, RUNNING = KEYS[6:]
NETWORK = build_network("mlp", input_shape=(1, 2, 2), num_classes=2, width=2, seed=0).eval().requires_grad_(False)
RESULT = TrialResult(0.75, 0.5, 0.25, 0.5, "finished", 4, {"student": 2.0}, 2.0, {"device": "none"})


def verdicts(*found: tuple[Verdict, str]) -> pa.Table:
    rows = Rows.undecided([0] * len(found))
    for index, (verdict, method) in enumerate(found):
        rows.add(index, Finding(verdict, method, prediction=0))
    return rows.table()


# One image each: misclassified, attacked, open, proved.
TABLE = verdicts(
    (Verdict.FALSIFIED, "clean"), (Verdict.FALSIFIED, "pgd"), (Verdict.UNDECIDED, ""), (Verdict.CERTIFIED, "crown")
)


def places_of(storage: Path, key: str) -> TrialPlaces:
    return TrialPlaces.of(storage / "artifacts", "tiny", key)


def journal_of(storage: Path, key: str) -> Path:
    return places_of(storage, key).journal


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of six COMPLETE trials, a FAILED and a RUNNING one, as their workers and a killed driver left it."""
    folder = tmp_path_factory.mktemp("doctor")
    config = config_of(folder)
    storage = Storage.of(config, str(folder / "runs"))
    storage.prepare()
    study = open_study(config, folder / "runs" / "study.db")
    save_study_info(storage.journals("tiny"), study_info(config, storage))
    for number in range(len(KEYS)):
        assignment = study.ask()
        places = places_of(storage.folder, assignment.key)
        with Journal(places.journal) as journal:
            journal.start(assignment.key, {"alpha": 0.5}, {})
            if number < NUM_COMPLETE:
                checkpoint.save(places.student, NETWORK)
                pq.write_table(TABLE, places.verdicts)
                conclude(places, journal, RESULT, {})
                study.tell(number, RESULT)
            elif KEYS[number] == FAILED:
                journal.end("FAILED", {}, {"cert.state": "FAILED"})
                study.tell_failed(number, "no luck")
    train = lambda state: TrainingResult(NETWORK, [], 1.0)  # noqa: E731
    get_or_train(TeacherStore.of(storage.teachers), "t1", train, holder="nobody")
    return storage.folder


@pytest.fixture
def storage(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "runs"))


Doctor = Callable[..., tuple[int, str]]


@pytest.fixture
def doctor(storage: Path, capsys: pytest.CaptureFixture[str]) -> Doctor:
    def run(*options: str) -> tuple[int, str]:
        code = main(["tiny", "--storage", str(storage), *options])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_the_numbers_of_the_template() -> None:
    measured = accuracies(TABLE)
    names = ("standard", "adversarial", "certified", "certified_upper")
    assert [getattr(measured, name) for name in names] == [0.75, 0.5, 0.25, 0.5]


def test_a_study_that_was_killed_is_well(doctor: Doctor, storage: Path) -> None:
    before = {
        path: path.stat().st_mtime_ns for path in storage.rglob("*") if path.is_file() and "lock" not in path.name
    }
    code, told = doctor("--no-mlflow")
    assert code == 0
    assert "study tiny: 8 trials (6 COMPLETE, 1 FAILED, 1 RUNNING)" in told
    assert "fine      tiny-0007: is unfinished, no driver is at work; the next search.run goes on with it" in told
    assert told.endswith("study tiny: all is well\n")
    after = {path: path.stat().st_mtime_ns for path in before if path.exists()}
    assert {path for path in before if before[path] != after.get(path)} <= {storage / "study.db"}


def rewrite_result(places: TrialPlaces, **changes: object) -> None:
    places.result.write_text(json.dumps(asdict(RESULT) | changes))


def spoil_table(table: pa.Table, column: str, row: int, value: str) -> pa.Table:
    values = table[column].to_pylist()
    values[row] = value
    position = SCHEMA.get_field_index(column)
    return table.set_column(position, SCHEMA.field(column), pa.array(values, pa.string()))


def leave_unknown_trial(storage: Path) -> None:
    places = places_of(storage, "tiny-0099")
    places.folder.mkdir()
    (places.folder / "file").write_text("something")


def leave_lease(storage: Path) -> None:
    (storage / "artifacts" / "teachers" / "t2").mkdir()
    for suffix in ("claim", "beat"):
        file = storage / "artifacts" / "teachers" / "t2" / f"host%2F1.abc.{suffix}"
        file.write_text("1")
        os.utime(file, times=(time.time() - 1000,) * 2)


def damage_teacher(storage: Path) -> None:
    (file,) = (storage / "artifacts" / "teachers" / "t1").glob("*/weights.safetensors")
    file.write_bytes(file.read_bytes()[:-1])


def add_line(storage: Path, key: str, line: bytes) -> None:
    path = journal_of(storage, key)
    path.write_bytes(line + path.read_bytes() if line.endswith(b"\n") else path.read_bytes() + line)


# How to break a view, and what is said of it; each on a trial of its own.
REPAIRABLE: list[tuple[Callable[[Path], object], str]] = [
    (lambda at: places_of(at, KEYS[0]).result.unlink(), f"{KEYS[0]}: result.json is missing"),
    (lambda at: places_of(at, KEYS[1]).result.write_text("{"), f"{KEYS[1]}: result.json is damaged"),
    (
        lambda at: rewrite_result(places_of(at, KEYS[2]), standard_accuracy=0.8, seconds=1.0),
        f"{KEYS[2]}: result.json differs from the study in standard_accuracy, seconds",
    ),
    (
        lambda at: rewrite_result(places_of(at, KEYS[3]), certified_accuracy=0.2),
        f"{KEYS[3]}: result.json differs from the study in certified_accuracy",
    ),
    (leave_unknown_trial, "trials/tiny-0099: belongs to no trial of the study"),
    (
        lambda at: journal_of(at, "tiny-0099").write_text(""),
        "journal/tiny-0099.jsonl: belongs to no trial of the study",
    ),
    (damage_teacher, "teacher t1: is damaged"),
    (leave_lease, "t2/host%2F1.abc.claim: was left by a process that died: no heartbeat for 10"),
    (lambda at: add_line(at, KEYS[4], b'{"t": 1'), f"journal/{KEYS[4]}.jsonl: ends in 7 bytes of an unfinished"),
    (
        lambda at: add_line(at, KEYS[5], b"\0\0\0\n"),
        f"journal/{KEYS[5]}.jsonl: has lines that are no rows: 1, at byte 0",
    ),
]


def test_broken_views_are_found_and_repaired(doctor: Doctor, storage: Path) -> None:
    study = load_record(f"sqlite:///{storage}/study.db", "tiny")
    for spoil, _ in REPAIRABLE:
        spoil(storage)
    for _ in range(2):  # without --repair nothing changes
        code, printed = doctor("--no-mlflow")
        assert code == 1
        assert [told for _, told in REPAIRABLE if f"broken    {told}" not in printed] == []
        assert f"study tiny: findings left: {len(REPAIRABLE)}" in printed
    code, printed = doctor("--no-mlflow", "--repair")
    assert code == 0
    assert [told for _, told in REPAIRABLE if f"repaired  {told}" not in printed] == []
    code, printed = doctor("--no-mlflow", "--repair")
    assert (code, "repaired" in printed, "broken" in printed) == (0, False, False)

    assert load_record(f"sqlite:///{storage}/study.db", "tiny") == study
    for key in KEYS[:NUM_COMPLETE]:
        stored = TrialResult(**json.loads(places_of(storage, key).result.read_text()))
        assert replace(stored, provenance=RESULT.provenance) == RESULT
        assert len(read_rows(journal_of(storage, key))[0]) == 5
    assert journal_of(storage, KEYS[5]).with_suffix(".jsonl.damaged").read_bytes() == b"\0\0\0\n"
    kept = storage / "artifacts" / "tiny" / "set-aside"  # it may be all that is left of a lost study
    assert (kept / "trials" / "tiny-0099" / "file").read_text() == "something"
    assert (kept / "teachers" / "t1").is_dir()


ONLY_TOLD: list[tuple[Callable[[Path], object], str]] = [
    (lambda at: shutil.rmtree(places_of(at, KEYS[0]).student), f"{KEYS[0]}: student is missing; only a rerun"),
    (
        lambda at: (places_of(at, KEYS[1]).student / "weights.safetensors").write_bytes(b"0"),
        f"{KEYS[1]}: student is damaged",
    ),
    (lambda at: places_of(at, KEYS[2]).verdicts.unlink(), f"{KEYS[2]}: verdicts.parquet is missing"),
    (lambda at: places_of(at, KEYS[3]).verdicts.write_bytes(b"PAR1"), f"{KEYS[3]}: verdicts.parquet is damaged"),
    (
        lambda at: pq.write_table(spoil_table(TABLE, "verdict", 3, "undecided"), places_of(at, KEYS[4]).verdicts),
        f"{KEYS[4]}: verdicts.parquet gives 0.75, 0, 0.5, 0.5 of 4 images, the study holds 0.75, 0.25, 0.5, 0.5 of 4",
    ),
]


def test_what_the_study_does_not_hold_is_only_told(doctor: Doctor, storage: Path) -> None:
    for spoil, _ in ONLY_TOLD:
        spoil(storage)
    code, printed = doctor("--no-mlflow", "--repair")
    assert code == 1
    assert [told for _, told in ONLY_TOLD if f"broken    {told}" not in printed] == []
    assert f"study tiny: findings left: {len(ONLY_TOLD)}" in printed


def test_a_verification_that_went_on_is_no_damage(doctor: Doctor, storage: Path) -> None:
    """A worker was killed between its narrower verdicts and the study: they stay."""
    further = spoil_table(TABLE, "verdict", 2, "certified")
    pq.write_table(further, places_of(storage, KEYS[0]).verdicts)
    rewrite_result(places_of(storage, KEYS[0]), certified_accuracy=0.5)
    code, printed = doctor("--no-mlflow", "--repair")
    assert code == 0
    assert printed.count(f"fine      {KEYS[0]}: ") == 2
    assert pq.read_table(places_of(storage, KEYS[0]).verdicts).equals(further)


def test_a_damaged_database_is_told(doctor: Doctor, storage: Path) -> None:
    with sqlite3.connect(storage / "study.db") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        page = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'trials'").fetchone()[0]
        size = connection.execute("PRAGMA page_size").fetchone()[0]
    connection.close()
    content = bytearray((storage / "study.db").read_bytes())
    content[(page - 1) * size : page * size] = b"\xff" * size
    (storage / "study.db").write_bytes(content)
    code, printed = doctor("--repair")
    assert code == 1
    assert "is damaged (" in printed
    assert "restore it from a copy" in printed


def test_with_a_driver_at_work_nothing_is_repaired(doctor: Doctor, storage: Path, tmp_path: Path) -> None:
    places_of(storage, KEYS[0]).result.unlink()
    with Storage.of(config_of(tmp_path), str(storage)).only_driver("tiny"):
        code, printed = doctor("--repair")
    assert code == 1
    assert f"a driver is at work ({storage}/study.db.tiny.lock is held by process {os.getpid()}" in printed
    assert f"{RUNNING}: is unfinished, a driver is at work on it" in printed
    assert not places_of(storage, KEYS[0]).result.exists()


@pytest.mark.parametrize("study", ["nothing", "tiny"])
def test_no_such_study(study: str, storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "elsewhere" if study == "tiny" else storage
    assert main([study, "--storage", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.usefixtures("storage")
def test_a_study_is_found_by_its_name_and_by_its_space_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options count for both, and so does the object store that the study remembers: nothing is asked of it here."""
    monkeypatch.chdir(tmp_path)
    open_study(config_of(tmp_path), tmp_path / "runs" / "study.db").note_artifacts("s3://bucket/x")
    for name in ("tiny", str(tmp_path / "space.yaml")):
        assert main([name, "--repair", "--no-mlflow"]) == 2
        assert "the artefacts of tiny are in s3://bucket/x, where nothing is repaired yet" in capsys.readouterr().err
        found, study = place_of(name, None, "sqlite:////tmp/other.db", "s3://b/y")
        assert (study, found.study_url, found.artifacts_uri) == ("tiny", "sqlite:////tmp/other.db", "s3://b/y")
        assert main([name, "--study-url", f"sqlite:///{tmp_path}/other.db"]) == 2
        assert f"there is no study database {tmp_path}/other.db" in capsys.readouterr().err


def test_ctrl_c(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("search.doctor.examine", interrupted)
    assert doctor() == (130, "stopped\n")


def test_mlflow_is_compared_and_repaired(doctor: Doctor, storage: Path, tmp_path: Path) -> None:
    config: SearchConfig = config_of(tmp_path)
    info, journals = study_info(config, Storage.of(config, str(storage))), journal_of(storage, KEYS[0]).parent
    assert "fine      MLflow: has no store" in doctor()[1]
    uri, root = local_store(storage)
    tracker = MlflowTracker(uri, root)  # makes the store; rows are still to be sent
    code, printed = doctor()
    assert code == 1
    assert "broken    MLflow: lacks rows of the journals: 33 (--repair sends them)" in printed
    code, printed = doctor("--repair")
    assert (code, "repaired  MLflow: lacks rows" in printed) == (0, True)

    with Journal(journals / STUDY_JOURNAL) as journal:
        journal.study({"hypervolume": 0.5}, {}, {})
    Delivery(journals, tracker).send()
    client = open_client(uri)
    runs = {run.key: run.run_id for run in study_runs(uri, info)}
    tags = client.get_run(runs[KEYS[1]]).data.tags
    (experiment,) = {client.get_run(each).info.experiment_id for each in runs.values()}
    double = client.create_run(experiment, tags={name: tags[name] for name in tags if name.startswith("cert.")})
    client.log_metric(runs[KEYS[0]], "certified_accuracy", 0.9)
    client.update_run(runs[FAILED], status="RUNNING")
    code, printed = doctor()
    assert code == 1
    assert f"{KEYS[0]}: differs from its run in MLflow in certified_accuracy" in printed
    assert f"{KEYS[1]}: has two runs in MLflow, {runs[KEYS[1]]} and {double.info.run_id}" in printed
    assert f"{FAILED}: is FAILED, but its run in MLflow is RUNNING" in printed
    assert "findings left: 3" in printed
    code, printed = doctor("--repair")
    assert (code, printed.count("repaired  ")) == (0, 3)
    repaired = {run.key: run for run in study_runs(uri, info)}
    assert {key: run.run_id for key, run in repaired.items()} == runs
    assert repaired[KEYS[0]].metrics["certified_accuracy"] == 0.25

    client.delete_run(runs[KEYS[1]])
    client.delete_run(runs[None])
    stranger = client.create_run(experiment, tags=tags | {"cert.trial": "tiny-0099"})
    printed = doctor("--repair")[1]
    assert f"repaired  {KEYS[1]}: has no run in MLflow" in printed
    assert "repaired  MLflow: has no run of the study itself" in printed
    assert f"broken    tiny-0099: has a run {stranger.info.run_id} in MLflow, but is no trial of the study" in printed
    client.delete_run(stranger.info.run_id)
    code, printed = doctor("--repair")
    assert (code, "repaired" in printed) == (0, False)
    remade = {run.key: run for run in study_runs(uri, info)}
    assert remade.keys() == runs.keys()
    assert remade[KEYS[1]].metrics == repaired[KEYS[1]].metrics
    assert remade[None].metrics["hypervolume"] == 0.5
