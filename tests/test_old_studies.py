"""Studies that earlier versions of the program made and left, killed in the middle: read, upgraded, gone on with.

Each folder of `tests/assets/studies` is a storage folder as that version wrote it, its space file, and what its own
`search.front --json` said. Newer formats than today's are refused, and nothing of them is changed.
"""

import functools
import hashlib
import importlib
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
import pytest
import torch
from alembic.script import ScriptDirectory
from studies import config_of, space_of

from ccdist import checkpoint
from ccdist.checkpoint import NewerFormatError
from ccdist.config import DataConfig
from ccdist.data import Dataset, load_dataset
from ccdist.verdict_store import LadderState, Position
from ccdist.verdicts import Rows
from search import doctor, front, run
from search.config import SearchConfig, load_search_config
from search.results.report import front_json
from search.storage import Storage, default_study_url
from search.studies import formats
from search.studies.records import RungValues, StudyRecord, TrialResult
from search.studies.study_record import load_stored
from search.study import Study, load_record, stored_record
from search.trial import TrialPlaces, TrialTask, run_trial
from tracking import replay
from tracking.journal import STUDY_FILE, load_study_info

ASSETS = Path(__file__).parent / "assets" / "studies"
NAMES = sorted(path.name for path in ASSETS.glob("v*"))
NAME = "old"  # of the study, in all of them


@functools.cache
def dataset_of(data: str) -> Dataset:
    return load_dataset(DataConfig.model_validate_json(data))


def fingerprint_of(config: SearchConfig) -> str:
    return dataset_of(config.data.model_dump_json()).fingerprint


@pytest.fixture(autouse=True, scope="module")
def migrations_are_read_once() -> Iterator[None]:
    """Optuna runs every migration script at each opening, half of what that costs, to learn the newest version."""
    newest = functools.cache(lambda folder: ScriptDirectory(folder).get_heads()[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptDirectory, "get_current_head", lambda scripts: newest(scripts.dir))
        yield


class Old:
    """A copy of a stored study."""

    def __init__(self, name: str, folder: Path) -> None:
        self.assets = ASSETS / name
        self.folder = folder / "storage"
        shutil.copytree(self.assets / "storage", self.folder)
        self.url = default_study_url(self.folder)
        self.space = self.assets / "space.yaml"
        self.root = self.folder / "artifacts" / NAME

    @property
    def config(self) -> SearchConfig:
        return load_search_config(self.space, ["tracking.enabled=false"])

    @property
    def said(self) -> dict[str, Any]:
        """What the program that made it said of it."""
        return dict(json.loads((self.assets / "front.json").read_text()))

    def record(self) -> StudyRecord:
        return load_record(self.url, NAME)

    def attributes(self) -> dict[str, Any]:
        return dict(optuna.load_study(study_name=NAME, storage=self.url).user_attrs)

    def open(self) -> Study:
        config = self.config
        return Study.open(config, space_of(config), self.url, fingerprint_of(config))

    def database_hash(self) -> str:
        return hashlib.sha256((self.folder / "study.db").read_bytes()).hexdigest()

    def files(self) -> dict[str, bytes]:
        """Everything but locks, and what SQLite keeps beside its file while somebody reads it."""
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        passing = (".lock", "-wal", "-shm")
        return {str(path): path.read_bytes() for path in paths if not path.name.endswith(passing)}


@pytest.fixture(params=NAMES)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Old:
    return Old(request.param, tmp_path)


@pytest.fixture
def engine(tmp_path: Path) -> Old:
    """The latest of version 1: with rungs, stopped trials, teachers as they are stored today."""
    return Old("v1-engine", tmp_path)


def contains(now: Any, then: Any) -> bool:
    """Whether a JSON value says all that another one said; it may say more."""
    if isinstance(then, dict):
        return all(name in now and contains(now[name], value) for name, value in then.items())
    if isinstance(then, list):
        return len(now) == len(then) and all(map(contains, now, then))
    return bool(now == then)


def set_attribute(url: str, name: str, value: Any) -> None:
    """As another program writes it; in the file itself, so that its bytes can be compared afterwards."""
    with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
        changed = database.execute(
            "UPDATE study_user_attributes SET value_json = ? WHERE key = ?", (json.dumps(value), name)
        )
        assert changed.rowcount == 1
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()


def test_there_is_a_step_and_a_stored_study_for_each_earlier_version() -> None:
    earlier = set(range(1, formats.FORMAT_VERSION))
    assert set(formats.STEPS) == earlier
    assert {int(name[1:].partition("-")[0]) for name in NAMES} == earlier


# ---- reading -------------------------------------------------------------------------------------------------------


def test_the_front_is_the_one_that_the_old_program_showed(old: Old) -> None:
    before, shown = old.database_hash(), front_json(old.record())
    said = old.said
    assert len(said["front"]) == 1
    assert contains(shown, said)
    assert sum(trial["standard_accuracy"] is not None for trial in shown["trials"]) >= 2
    stored = load_stored(old.url, NAME)
    assert stored.data_fingerprint == fingerprint_of(old.config)
    assert stored.identifier == str(formats.upgraded(NAME, old.attributes())["id"])
    assert old.database_hash() == before


def test_times_of_ends_are_known(old: Old) -> None:
    for trial in old.record().trials:
        ended = trial.state in ("COMPLETE", "STOPPED", "FAILED")
        assert (trial.finished_at is not None) == ended
        assert not ended or (trial.finished_at or 0) > old.record().started_at


def test_the_doctor_finds_nothing_wrong(old: Old, capsys: pytest.CaptureFixture[str]) -> None:
    before = old.files()
    assert doctor.main([NAME, "--storage", str(old.folder), "--no-mlflow"]) == 0
    told = capsys.readouterr().out
    assert "all is well" in told
    assert "is unfinished" in told
    assert old.files() == before


# ---- going on ------------------------------------------------------------------------------------------------------


def test_a_search_goes_on_and_keeps_what_was_there(old: Old) -> None:
    before = old.record()
    known = stored_record(old.config, old.url)
    assert known == before
    study = old.open()
    assert old.attributes()["format_version"] == formats.FORMAT_VERSION
    assert old.attributes()["oldest_format"] == 1
    assert study.record() == before == old.record()
    assert study.unfinished() == [trial.number for trial in before.unfinished]
    for number in study.unfinished():
        drawn, assignment = before.trials[number].params, study.adopt(number)
        assert assignment.params.items() >= drawn.items()
        assert assignment.params.keys() >= {"loss", "alpha", "epochs", "l1"}
        assert assignment.configuration == space_of(old.config).configuration(assignment.params)
        study.tell(number, result_like(before))
    waiting, new = study.waiting(), len(before.trials)
    assert [study.ask().number for _ in range(2)] == [*waiting, new, new + 1][:2]
    again = old.open().record()
    assert again == study.record() == old.record()
    assert [trial for trial in again.trials if trial.key in {each.key for each in before.complete}] == list(
        before.complete
    )


def result_like(record: StudyRecord) -> TrialResult:
    trial = record.complete[0]
    assert trial.standard_accuracy is not None
    assert trial.certified_accuracy is not None
    return TrialResult(
        trial.standard_accuracy, 0.1, trial.certified_accuracy, 0.1, "finished", 60, {"student": 1.0}, 1.0, {}
    )


def test_a_point_that_was_half_drawn_gets_the_rest_of_the_point(tmp_path: Path) -> None:
    old = Old("v1-marked", tmp_path)
    assert old.record().trials[4].params == {"loss": "no_distillation", "epochs": 3}
    point = {"loss": "no_distillation", "alpha": 0.9, "epochs": 3, "l1": 1e-5}
    assert old.open().adopt(4).params == pytest.approx(point)


def test_the_folder_belongs_to_the_study_also_where_it_was_not_marked(old: Old) -> None:
    marked = (old.root / "study.id").exists()
    assert marked == (old.assets.name != "v1-first")
    storage = Storage.of(old.config, str(old.folder))
    for _ in range(2):
        storage.claim(NAME, old.open().identifier)
    with pytest.raises(ValueError, match="holds the trials of another study"):
        storage.claim(NAME, "0123456789abcdef")


# ---- the upgrade itself --------------------------------------------------------------------------------------------


def test_upgraded_twice_is_upgraded_once(old: Old, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = old.attributes()
    once = formats.upgraded(NAME, stored)
    assert stored == old.attributes()
    assert once.keys() >= stored.keys()
    assert formats.upgraded(NAME, once) == once
    assert formats.changes(NAME, once) == []
    # Also where an earlier upgrade had come so far, but for the version.
    assert formats.upgraded(NAME, once | {"format_version": 1}) == once
    for trial in optuna.load_study(study_name=NAME, storage=old.url).trials:
        first = formats.upgraded_trial(trial.user_attrs, once)
        assert formats.upgraded_trial(first, once) == first
    old.open()
    assert old.attributes() == once
    monkeypatch.setattr(optuna.Study, "set_user_attr", lambda *_: pytest.fail("it is upgraded already"))
    old.open()


class Died(Exception):
    """Stands for the moment at which a driver is killed."""


@pytest.mark.parametrize("name", ["v1-first", "v1-engine"])
def test_an_upgrade_may_be_cut_off_after_every_write(name: str, tmp_path: Path) -> None:
    whole = Old(name, tmp_path / "whole")
    record, num_writes = whole.record(), len(formats.changes(NAME, whole.attributes()))
    whole.open()
    for done in range(num_writes):
        old, left = Old(name, tmp_path / str(done)), done
        original = optuna.Study.set_user_attr

        def dying(*args: Any, original: Callable[..., None] = original) -> None:
            nonlocal left
            if left == 0:
                raise Died
            left -= 1
            original(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optuna.Study, "set_user_attr", dying)
            with pytest.raises(Died):
                old.open()
        assert old.attributes()["format_version"] == 1
        assert old.record() == record
        assert old.open().record() == record
        assert old.attributes() == whole.attributes()


def test_a_study_that_is_refused_is_not_upgraded(engine: Old) -> None:
    before = engine.database_hash()
    other = load_search_config(engine.space, ["threat.epsilon=1/10"])
    with pytest.raises(ValueError, match="exists with another space"):
        Study.open(other, space_of(other), engine.url, fingerprint_of(other))
    with pytest.raises(ValueError, match="made from other images"):
        Study.open(engine.config, space_of(engine.config), engine.url, "another")
    assert engine.database_hash() == before


@pytest.mark.timeout(60)
def test_a_training_that_another_version_began_begins_anew(tmp_path: Path) -> None:
    """The state of another training stands for one whose configuration had other fields."""
    config = config_of(tmp_path, stopping=False, data__train_images=64, data__validation_images=20)
    dataset, space = dataset_of(config.data.model_dump_json()), space_of(config)
    params = {"loss": "no_distillation", "alpha": 0.1, "warm_up": 0.0, "steps": 1}

    def weights(folder: str, *others: dict[str, Any]) -> str:
        places = TrialPlaces.of(tmp_path / folder, "tiny", "tiny-0000")
        for other in others:
            task = TrialTask("tiny-0000", space.recipe(params | other, 0), params, places, config.stopping)
            with pytest.raises(Died):
                run_trial(task, dataset, device=torch.device("cpu"), reports=Reports(dies=True))
            assert places.state.exists()
        task = TrialTask("tiny-0000", space.recipe(params, 0), params, places, config.stopping)
        run_trial(task, dataset, device=torch.device("cpu"), reports=Reports())
        return checkpoint.weights_sha256(checkpoint.load(places.student))

    assert weights("undisturbed") == weights("begun", {"alpha": 0.2})


class Reports:
    def __init__(self, *, dies: bool = False) -> None:
        self.dies = dies

    def advanced(self, phase: str, done: int, of: int) -> None:
        if self.dies:
            raise Died

    def rung(self, name: str, values: RungValues) -> None: ...
    def verifying(self, result: TrialResult, phase: str, done: int, of: int) -> None: ...


# ---- newer ones ----------------------------------------------------------------------------------------------------

COMMANDS: dict[str, Callable[[Old], list[str]]] = {
    "run": lambda old: [str(old.space), "--storage", str(old.folder)],
    "front": lambda old: [NAME, "--storage", str(old.folder), "--json"],
    "rerun": lambda old: [NAME, "0", "--storage", str(old.folder), "--out", str(old.folder.parent / "rerun")],
    "doctor": lambda old: [NAME, "--storage", str(old.folder), "--repair", "--no-mlflow"],
    "compare": lambda old: [NAME, "--storage", str(old.folder), "--no-mlflow"],
    "confirm": lambda old: [NAME, "--storage", str(old.folder)],
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_newer_study_in_one_line(
    command: str, engine: Old, capsys: pytest.CaptureFixture[str]
) -> None:
    set_attribute(engine.url, "format_version", 99)
    before = engine.files()
    main = importlib.import_module(f"search.{command}").main
    assert main(COMMANDS[command](engine)) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert "study old has storage format 99; this program reads 1 to 2: update this program" in said
    assert engine.files() == before


@pytest.mark.parametrize("version", [None, 0, "2", 1.5])
def test_what_is_no_version_is_refused(version: object, engine: Old) -> None:
    set_attribute(engine.url, "format_version", version)
    with pytest.raises(ValueError, match=r"storage format .*; this program reads 1 to 2: restore it"):
        engine.record()


def test_a_newer_study_whose_making_was_cut_off_is_not_made_again(engine: Old) -> None:
    set_attribute(engine.url, "format_version", 99)
    with sqlite3.connect(engine.folder / "study.db") as database:
        database.execute("DELETE FROM study_user_attributes WHERE key = 'identity'")
    database.close()
    with pytest.raises(ValueError, match="storage format 99"):
        engine.open()
    assert engine.attributes()["format_version"] == 99


def newer_network(folder: Path) -> None:
    content = json.loads((folder / checkpoint.NETWORK).read_text())
    (folder / checkpoint.NETWORK).write_text(json.dumps(content | {"format_version": 9}))


def newer_student(old: Old) -> None:
    unfinished = old.root / "trials" / "old-0009"
    shutil.copytree(old.root / "trials" / "old-0000" / "student", unfinished / "student")
    newer_network(unfinished / "student")


def newer_state(old: Old) -> None:
    path = old.root / "trials" / "old-0009" / "state.safetensors"
    checkpoint.save_state(path, {"a": torch.zeros(1)}, {"format_version": 9})


def newer_teacher(old: Old) -> None:
    (mark,) = (old.folder / "artifacts" / "teachers").glob("*/teacher.json")
    content = json.loads(mark.read_text())
    newer_network(mark.parent / content["folder"])
    network = mark.parent / content["folder"] / checkpoint.NETWORK
    content["sha256"][checkpoint.NETWORK] = hashlib.sha256(network.read_bytes()).hexdigest()
    mark.write_text(json.dumps(content))


@pytest.mark.parametrize("make", [newer_student, newer_state, newer_teacher])
def test_a_search_refuses_newer_checkpoints_and_leaves_them(
    make: Callable[[Old], None], engine: Old, capsys: pytest.CaptureFixture[str]
) -> None:
    make(engine)
    before = engine.files()
    assert run.main([str(engine.space), "--storage", str(engine.folder)]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert "has format version 9; this program reads 1: use the version that wrote it, or a newer one" in said
    assert "delete" not in said
    assert engine.files() == before


def newer_journals(old: Old) -> None:
    path = old.root / "journal" / STUDY_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 9}))


@pytest.mark.parametrize("make", [newer_teacher, newer_journals])
def test_the_doctor_repairs_nothing_newer(
    make: Callable[[Old], None], engine: Old, capsys: pytest.CaptureFixture[str]
) -> None:
    make(engine)
    before = engine.files()
    assert doctor.main([NAME, "--storage", str(engine.folder), "--repair", "--no-mlflow"]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert "has format version 9; this program reads 1" in said
    assert engine.files() == before


def test_replay_refuses_newer_journals_and_leaves_their_rows(engine: Old, capsys: pytest.CaptureFixture[str]) -> None:
    newer_journals(engine)
    before = engine.files()
    assert replay.main([str(engine.folder)]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert "study.json has format version 9; this program reads 1 to 2: use the version that wrote it" in said
    assert engine.files() == before


def test_a_study_file_of_any_earlier_version_is_read_and_unknown_keys_are_left_out(old: Old) -> None:
    path = old.root / "journal" / STUDY_FILE
    content = json.loads(path.read_text())
    assert "format_version" not in content
    known = load_study_info(path.parent)
    assert known.name == NAME
    path.write_text(json.dumps(content | {"format_version": 2, "later": {"more": [1]}}))
    assert load_study_info(path.parent) == known


def test_the_state_of_a_verification_says_its_version(tmp_path: Path) -> None:
    state = LadderState(tmp_path, {"weights": "abc"})
    state.save(Position(Rows.undecided([0, 1])), [])
    assert state.load() is not None

    def rewrite(**changes: Any) -> None:
        table = pq.read_table(tmp_path / "rows.parquet")
        content = json.loads(table.schema.metadata[b"state"]) | changes
        content = {name: value for name, value in content.items() if value is not None}
        pq.write_table(table.replace_schema_metadata({"state": json.dumps(content)}), tmp_path / "rows.parquet")

    rewrite(format_version=None)  # as it was written before it said a version
    assert state.load() is not None
    rewrite(format_version=9, position={"of": "another kind"})
    with pytest.raises(NewerFormatError, match="has format version 9; this program reads 1: use the version that"):
        state.load()


# ---- the real command ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_goes_on_with_an_old_study_to_its_end(old: Old, capsys: pytest.CaptureFixture[str]) -> None:
    before, budget = old.record(), old.config.budget.trials
    command = [sys.executable, "-m", "search.run", str(old.space), "--storage", str(old.folder)]
    subprocess.run([*command, "--set", "tracking.enabled=false"], check=True, timeout=540)
    after = old.record()
    assert len(after.done) == budget
    assert after.unfinished == ()
    assert [each for each in after.trials if each.key in {trial.key for trial in before.done}] == list(before.done)
    assert doctor.main([NAME, "--storage", str(old.folder), "--no-mlflow"]) == 0
    assert front.main([NAME, "--storage", str(old.folder)]) == 0
    assert "all is well" in capsys.readouterr().out
