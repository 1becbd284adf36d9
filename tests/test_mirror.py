"""The driver's copy of what an object store has: what it follows, what it writes, and whose study it is."""

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from studies import config_of, open_study, result
from trial_moments import (
    FOLDER,
    JOURNAL,
    KEY,
    MOMENTS,
    Told,
    got,
    mirror,
    opened,
    own,
    put,
    trained,
    work,
)

from search.artifacts import remote_files
from search.artifacts.manifests import Manifest, StoredFiles, Version
from search.artifacts.mirror import verdicts
from search.artifacts.places import TrialPlaces, load_result, save_result
from search.artifacts.remote_files import UnreachableError
from search.artifacts.trial_copies import STUDY_KEY, LocalFiles, is_record, is_state, is_visible
from search.artifacts.trial_files import TrialFiles
from search.storage import Storage, StorageError
from tracking.journal import Journal, StartRow, end_dead_trials, read_rows
from tracking.sender import sent_path

pytest_plugins = ("trial_fixtures",)
pytestmark = pytest.mark.usefixtures("no_waiting")


def test_the_driver_ends_a_trial_in_the_store(uri: str, tmp_path: Path) -> None:
    work(uri, 1, trained, Told(lambda: None))
    one = mirror(uri, tmp_path / "one")
    files = TrialFiles(tmp_path / "one", "tiny", one)
    assert files.result(KEY) is None
    assert not files.places(KEY).state.exists()
    files.end_stopped_training(KEY, "dominated")
    another = mirror(uri, tmp_path / "another")
    another.pull()
    places = TrialPlaces.of(tmp_path / "another", "tiny", KEY)
    rows = [line.row.kind for line in read_rows(places.journal)[0]]
    assert rows == ["start", "metrics", "end"]
    assert (places.student / "weights.safetensors").exists()
    newest = StoredFiles(*opened(uri), KEY).newest()
    assert newest is not None
    assert not any(map(is_state, newest.files))
    filesystem, root = opened(uri)
    assert not [path for path in remote_files.paths(filesystem, root) if "state" in path]


def test_a_result_is_found_wherever_the_driver_is(uri: str, tmp_path: Path) -> None:
    final = result(0.9, 0.5)
    work(uri, 1, lambda places, _: (trained(places, _), save_result(places, final)), Told(lambda: None))  # type: ignore[func-returns-value]
    files = TrialFiles(tmp_path / "one", "tiny", mirror(uri, tmp_path / "one"))
    assert files.result(KEY) == final
    assert files.result("tiny-0009") is None
    assert load_result(files.places(KEY)) == final


def test_ends_of_dead_trials_and_what_was_sent_come_to_the_next_machine(uri: str, tmp_path: Path) -> None:
    work(uri, 1, trained, Told(lambda: None))
    one = mirror(uri, tmp_path / "one", "http://server:5000")
    own(one)
    one.pull()
    journals = tmp_path / "one" / "tiny" / "journal"
    assert end_dead_trials(journals, set()) == [KEY]
    one.push_ends([KEY])
    with Journal(journals / f"{STUDY_KEY}.jsonl") as journal:
        journal.close_study("KILLED")
    for path in journals.glob("*.jsonl"):
        sent_path(path).write_text(str(path.stat().st_size))
    one.push_study()
    for destination, sent in (("http://server:5000", True), ("http://other:5000", False), (None, False)):
        folder = tmp_path / f"to {destination}".replace("/", "-")
        two = mirror(uri, folder, destination)
        two.pull_study()
        two.pull()
        there = folder / "tiny" / "journal"
        assert [line.row.kind for line in read_rows(there / f"{KEY}.jsonl")[0]] == ["start", "metrics", "end"]
        for path in there.glob("*.jsonl"):
            assert sent_path(path).exists() == sent
            assert not sent or int(sent_path(path).read_text()) == path.stat().st_size
        student = folder / "tiny" / FOLDER / "student" / "weights.safetensors"
        assert student.exists() == (not sent)  # MLflow has it
        two.pull(lambda _manifest: is_visible)
        assert student.exists()


def test_a_claim_that_a_kill_left_takes_no_end_away(uri: str, tmp_path: Path) -> None:
    """The trial is followed as what it was before; and a program that knows no claims refuses one."""
    work(uri, 1, trained, Told(lambda: None))
    one = mirror(uri, tmp_path / "one")
    one.pull()
    filesystem, root = opened(uri)
    StoredFiles(filesystem, root, KEY).publish(Manifest(Version(2, 1, 0), {}))
    (claim,) = (path for path in remote_files.paths(filesystem, f"{root}/manifests") if path.endswith("-000000.json"))
    content = remote_files.read(filesystem, f"{root}/manifests/{claim}")
    assert content is not None
    assert json.loads(content)["format_version"] == 2
    journals = tmp_path / "one" / "tiny" / "journal"
    assert end_dead_trials(journals, set()) == [KEY]
    one.pull()
    assert [line.row.kind for line in read_rows(journals / f"{KEY}.jsonl")[0]] == ["start", "metrics", "end"]


def test_rows_that_were_sent_and_never_stored_are_sent_anew(uri: str, tmp_path: Path) -> None:
    work(uri, 1, trained, Told(lambda: None))
    one = mirror(uri, tmp_path / "one")
    one.pull()
    journal = tmp_path / "one" / "tiny" / JOURNAL
    with Journal(journal) as open_journal:
        open_journal.end("KILLED", {}, {})  # killed before it was stored
    sent_path(journal).write_text(str(journal.stat().st_size))

    def go_on(places: TrialPlaces, _reports: Any) -> None:
        with Journal(places.journal) as rows:
            rows.start(KEY, {"alpha": 0.5}, {"another": "row"})

    work(uri, 2, go_on, Told(lambda: None))
    again = mirror(uri, tmp_path / "one")
    again.pull()
    assert [type(line.row) for line in read_rows(journal)[0]].count(StartRow) == 2
    assert not sent_path(journal).exists()


def test_a_copy_that_knows_more_of_the_study_keeps_it(uri: str, tmp_path: Path) -> None:
    one = mirror(uri, tmp_path / "one")
    own(one)
    path = tmp_path / "one" / "tiny" / "journal" / f"{STUDY_KEY}.jsonl"
    with Journal(path) as journal:
        journal.front(["a"])
        one.push_study()
        journal.front(["a", "b"])
    mirror(uri, tmp_path / "one").pull_study()
    assert len(read_rows(path)[0]) == 2
    path.write_text("")
    mirror(uri, tmp_path / "one").pull_study()
    assert len(read_rows(path)[0]) == 1


def test_verdicts_alone_can_be_brought_first(uri: str, tmp_path: Path) -> None:
    def act(places: TrialPlaces, reports: Any) -> None:
        trained(places, reports)
        places.verdicts.write_text("all")

    work(uri, 1, act, Told(lambda: None))
    one = mirror(uri, tmp_path / "one")
    one.pull(verdicts)
    assert LocalFiles(tmp_path / "one" / "tiny", KEY).paths() == [f"{FOLDER}/verdicts.parquet"]
    one.pull(verdicts)
    one.pull()
    assert JOURNAL in LocalFiles(tmp_path / "one" / "tiny", KEY).paths()
    assert (tmp_path / "one" / "tiny" / FOLDER / "student" / "weights.safetensors").exists()


def test_who_reads_in_the_drivers_folder_waits_for_what_it_writes(uri: str, tmp_path: Path) -> None:
    """As `search.front --from-verdicts` and `search.doctor` do beside it."""
    work(uri, 1, trained, Told(lambda: None))
    driver, reader = mirror(uri, tmp_path / "one"), mirror(uri, tmp_path / "one")
    with driver.changing(KEY, is_record, ends=True):
        put(driver.root, got(driver.root) | {f"{FOLDER}/verdicts.parquet": "all", f"{FOLDER}/result.json": "0.9"})
        reading = threading.Thread(target=reader.pull_trial, args=(KEY, verdicts))
        reading.start()
        reading.join(0.2)
    reading.join()
    another = mirror(uri, tmp_path / "another")
    another.pull()
    for one in (driver, another):
        assert got(one.root)[f"{FOLDER}/result.json"] == "0.9"


def test_who_reads_in_the_drivers_folder_takes_nothing_away(uri: str, tmp_path: Path) -> None:
    work(uri, 1, trained, Told(lambda: None))
    driver, reader = mirror(uri, tmp_path / "one"), mirror(uri, tmp_path / "one")
    driver.pull()
    files = set(got(driver.root))

    def go_on(places: TrialPlaces, _reports: Any) -> None:
        with Journal(places.journal) as rows:
            rows.metrics(2, {"loss": 0.5})

    work(uri, 2, go_on, Told(lambda: None))
    reader.pull(verdicts)
    assert set(got(driver.root)) == files
    assert len(read_rows(driver.root / JOURNAL)[0]) == 3


def test_each_driver_has_a_greater_number(uri: str, tmp_path: Path) -> None:
    assert [mirror(uri, tmp_path / name).epoch for name in "abc"] == [1, 2, 3]


def kept(root: Path) -> dict[str, str]:
    """A finished trial of a study that was kept in a folder."""
    put(root, MOMENTS[-1])
    (root / "study.id").write_text("one")
    return got(root)


@pytest.mark.parametrize("is_copy", [True, False])
def test_a_study_that_is_kept_elsewhere_is_not_moved_to_a_store(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_copy: bool
) -> None:
    """Kept in a folder, or copied from another store than this one: what this one lacks, its workers would lack."""
    monkeypatch.chdir(tmp_path)
    storage = Storage.of(config_of(tmp_path, storage={"artifacts": uri}), None)
    root = storage.study_folder("tiny")
    before = kept(root)
    if is_copy:
        LocalFiles(root, KEY).note_copied(Manifest(Version(1, 1, 1), {}))
    storage.prepare()
    told = rf"holds trials that \S+ lacks \(1, such as {KEY}\): .*; go on where"
    with pytest.raises(StorageError, match=told) as caught, storage.only_driver("tiny"):
        raise AssertionError("the driver began")
    assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="holds trials"):
        storage.claim("tiny", "one")
    assert got(root) == before
    one = mirror(uri, tmp_path / "one")
    assert (one.owner(), one.is_empty()) == (None, True)
    there = mirror(uri, storage.artifacts)
    there.set_owner("one")
    with there.changing(KEY):  # a trial that it has, whatever of it
        pass
    with storage.only_driver("tiny"):
        storage.claim("tiny", "one")
    assert got(root) == before


def test_only_what_came_from_the_store_is_deleted_again(uri: str, tmp_path: Path) -> None:
    root = tmp_path / "one" / "tiny"
    before = kept(root)
    own_files = {path: text for path, text in before.items() if path != JOURNAL}
    work(uri, 1, trained, Told(lambda: None))
    one = mirror(uri, tmp_path / "one")
    one.pull()
    brought = f"{FOLDER}/student/weights.safetensors"
    assert brought in got(root)
    for start in (2, 3):
        work(uri, start, lambda places, _: (places.student / "weights.safetensors").unlink(missing_ok=True), Told(int))
        one.pull()
        assert own_files.items() - {(f"{FOLDER}/student/network.json", "mlp")} <= got(root).items()
        assert brought not in got(root)
    (root / FOLDER / "later").write_text("a leftover of a driver that died")
    with one.changing(KEY):
        pass
    assert f"{FOLDER}/later" not in got(root)
    assert f"{FOLDER}/result.json" in got(root)


def test_a_name_that_is_no_trials_is_passed_over(uri: str, tmp_path: Path) -> None:
    kept(tmp_path / "one" / "tiny")
    one = mirror(uri, tmp_path / "one")
    filesystem, root = opened(uri)
    for key in (".", "..", "a/b"):
        path = f"{root}/manifests/{key}/{Version(1, 1, 1)}.json"
        remote_files.publish(filesystem, path, b'{"format_version": 1, "files": {}}')
    before = got(tmp_path / "one" / "tiny")
    one.pull()
    assert one.is_empty()
    assert got(tmp_path / "one" / "tiny") == before


def test_two_studies_of_one_name_do_not_meet(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storages = []
    for name in ("here", "there"):
        places = {"artifacts": uri, "study": f"sqlite:///{tmp_path}/{name}.db"}
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        storages.append(Storage.of(config_of(tmp_path, storage=places), None))
    storages[0].claim("tiny", "one")
    work(uri, 1, trained, Told(lambda: None))
    refused = pytest.raises(StorageError, match="holds the trials of another study named tiny")
    with refused:
        storages[1].claim("tiny", "two")
    storages[1].prepare()
    for open_one in (lambda: None, lambda: open_study(config_of(tmp_path), tmp_path / "there.db")):
        open_one()
        with refused, storages[1].only_driver("tiny"):
            raise AssertionError("the driver began")
        assert got(storages[1].study_folder("tiny")) == {}  # else another storage.artifacts would lack them
    mirror(uri, tmp_path).pull()
    storages[1].claim("tiny", "one")
    assert storages[1].identifier("tiny") == "one"


def test_a_driver_that_died_before_it_stored_the_studys_files_has_a_successor(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine: the store has trials and their owner, and nothing else."""
    monkeypatch.chdir(tmp_path)
    places = {"artifacts": uri, "study": f"sqlite:///{tmp_path}/study.db"}
    storage = Storage.of(config_of(tmp_path, storage=places), None)
    storage.prepare()
    identifier = open_study(config_of(tmp_path), tmp_path / "study.db").identifier
    mirror(uri, tmp_path / "first").set_owner(identifier)
    work(uri, 1, trained, Told(lambda: None))
    with storage.only_driver("tiny"):
        assert (storage.study_folder("tiny") / "trials" / KEY).exists()
        storage.claim("tiny", identifier)
    assert storage.identifier("tiny") == identifier


def test_a_store_that_goes_away_is_told_in_one_line(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And hides nothing that was wrong before."""
    monkeypatch.chdir(tmp_path)
    storage = Storage.of(config_of(tmp_path, storage={"artifacts": uri}), None)
    storage.prepare()
    one = storage.mirror("tiny")
    assert one is not None

    def away(*_: Any) -> Any:
        raise UnreachableError("curlCode: 7")

    monkeypatch.setattr(one, "_next_epoch", away)
    monkeypatch.setattr(one, "check", away)
    for act in (lambda: storage.workplace("tiny"), lambda: storage.check_unfinished("tiny", [KEY])):
        with pytest.raises(StorageError, match=r"^storage \S+ cannot be used \(curlCode: 7\)$"):
            act()
    for error in (PermissionError(errno.EACCES, "Permission denied"), UnreachableError("curlCode: 7")):
        monkeypatch.setattr(one, "push_study", lambda error=error: (_ for _ in ()).throw(error))
        with pytest.raises(KeyError, match="the reason"), storage.only_driver("tiny"):
            raise KeyError("the reason")
        assert str(error) in caplog.messages[-1]
        assert "is not complete" in caplog.messages[-1]


def test_a_damaged_trial_holds_up_nothing_else(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    work(uri, 1, trained, Told(lambda: None))
    (file,) = (tmp_path / "store").rglob("weights.safetensors")
    file.write_text("damaged")
    one = mirror(uri, tmp_path / "one")
    own(one)
    pulls: list[None] = []
    pull_all = one.pull
    monkeypatch.setattr(one, "pull", lambda: (pulls.append(None), pull_all()))
    for _ in range(3):
        one._look()
    assert len(pulls) == 1  # and not again at once
    assert len(caplog.messages) == 1
    assert StoredFiles(*opened(uri), STUDY_KEY).newest() is not None


def test_a_driver_without_the_folder_stores_nothing(uri: str, tmp_path: Path) -> None:
    """One that was refused must not write over what belongs to another study."""
    own(mirror(uri, tmp_path / "owner"))
    stranger = mirror(uri, tmp_path / "stranger")
    stranger.root.mkdir(parents=True)
    (stranger.root / "study.id").write_text("other")
    (stranger.root / "report.html").write_text("other")
    stranger.push_study()
    filesystem, root = opened(uri)
    assert sorted(remote_files.paths(filesystem, root)) == ["study.id"]
