"""A worker with an object store: what it stores and when, its scratch folder, and what its death costs."""

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from studies import result
from trial_moments import (
    FOLDER,
    KEY,
    Told,
    opened,
    state,
    trained,
    work,
)

from search.artifacts import workplace
from search.artifacts.artifact_place import ArtifactPlace
from search.artifacts.disk_space import DiskFullError, StorageAwayError
from search.artifacts.manifests import StoredFiles, SupersededError
from search.artifacts.mirror import Mirror
from search.artifacts.places import TrialPlaces
from search.artifacts.trial_copies import LocalFiles, pull
from search.artifacts.trial_files import TrialFiles
from search.artifacts.workplace import Workplace
from search.studies.records import RungValues, TrialResult

pytest_plugins = ("trial_fixtures",)
pytestmark = pytest.mark.usefixtures("no_waiting")


def test_what_a_report_speaks_of_is_stored_before_it(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workplace, "VERIFYING_S", 0.0)
    monkeypatch.setattr(workplace, "RESTS", 0.0)
    looked = 0

    def look() -> str:
        nonlocal looked
        looked += 1
        local = LocalFiles(tmp_path / f"look{looked}", KEY)
        pull(StoredFiles(*opened(uri), KEY), local, lambda _: lambda _path: True)
        file = local.root / FOLDER / "state.safetensors"
        return file.read_text() if file.exists() else ""

    def act(places: TrialPlaces, reports: Any) -> None:
        for epoch in (1, 2):
            state(places, f"epoch {epoch}")
            reports.advanced("student", epoch, 3)
        reports.rung("1/3", RungValues(0.5, 0.5, 1.0))
        state(places, "epoch 3")
        reports.verifying(result(0.5, 0.5), "crown", 1, 2)

    told = Told(look)
    work(uri, 1, act, told)
    assert told.seen == [("advanced", ""), ("advanced", ""), ("rung", "epoch 2"), ("verifying", "epoch 3")]
    monkeypatch.setattr(workplace, "PUSH_S", 0.0)
    told = Told(look)
    work(uri, 2, act, told)
    assert [seen for _, seen in told.seen] == ["epoch 1", "epoch 2", "epoch 2", "epoch 3"]
    assert not list((tmp_path / "scratch").rglob(f"*{KEY}*"))


@pytest.mark.parametrize("end", [SystemExit, KeyError("x"), None])
def test_a_trial_that_leaves_its_worker_is_stored(uri: str, tmp_path: Path, end: Any) -> None:
    def act(places: TrialPlaces, reports: Any) -> None:
        state(places, "last")
        if end is not None:
            raise end

    told = Told(lambda: None)
    if end is None:
        work(uri, 1, act, told)
    else:
        with pytest.raises((SystemExit, KeyError)):
            work(uri, 1, act, told)
    again: list[str] = []
    work(uri, 2, lambda places, _: again.append(places.state.read_text()), told)
    assert again == ["last"]


def test_a_worker_that_was_overtaken_stops_without_a_word(uri: str, tmp_path: Path) -> None:
    def overtaken(places: TrialPlaces, reports: Any) -> None:
        state(places, "old")
        work(uri, 2, lambda new, _: state(new, "new"), Told(lambda: None))
        reports.rung("1/3", RungValues(0.5, 0.5, 1.0))

    told = Told(lambda: None)
    with pytest.raises(StorageAwayError, match="another process has taken"):
        work(uri, 1, overtaken, told)
    assert told.seen == []
    local = LocalFiles(tmp_path / "look", KEY)
    pull(StoredFiles(*opened(uri), KEY), local, lambda _: lambda _path: True)
    assert (local.root / FOLDER / "state.safetensors").read_text() == "new"


def test_scratch_of_dead_processes_is_deleted_and_of_living_ones_not(uri: str, tmp_path: Path) -> None:
    def look(places: TrialPlaces, _reports: Any) -> None:
        dead = places.folder.parents[3] / "tiny-0001-dead"
        dead.mkdir()
        (dead / "lock").touch()
        state(places, "mine")
        work(uri, 2, lambda *_: None, Told(lambda: None))
        assert not dead.exists()
        assert places.state.exists()

    with pytest.raises(SupersededError):
        work(uri, 1, look, Told(lambda: None))


def test_a_scratch_folder_that_others_can_write_is_refused(uri: str, tmp_path: Path) -> None:
    own_folder = tmp_path / "scratch" / f"ccdist-{os.getuid()}"
    own_folder.mkdir(parents=True)
    for folder in (own_folder, own_folder.parent):  # in the second, others can put another in its place
        folder.chmod(0o777)
        with pytest.raises(PermissionError, match="can be written by others; set CCDIST_SCRATCH_DIR"):
            work(uri, 1, lambda *_: None, Told(lambda: None))
        folder.chmod(0o755)
    own_folder.rmdir()
    own_folder.symlink_to(tmp_path)
    with pytest.raises(PermissionError, match="can be written by others; set CCDIST_SCRATCH_DIR"):
        work(uri, 1, lambda *_: None, Told(lambda: None))


def test_scratch_files_may_lie_where_everybody_has_some(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder as /tmp is, and behind a link."""
    (tmp_path / "local").mkdir()
    (tmp_path / "local").chmod(0o1777)
    (tmp_path / "link").symlink_to("local")
    monkeypatch.setenv(workplace.SCRATCH, str(tmp_path / "link"))
    work(uri, 1, trained, Told(lambda: None))
    (folder,) = (tmp_path / "local").iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


class Unheard:
    """Reports of a trial to nobody."""

    def advanced(self, phase: str, done: int, of: int) -> None: ...
    def rung(self, name: str, values: RungValues) -> None: ...
    def verifying(self, result: TrialResult, phase: str, done: int, of: int) -> None: ...


def test_a_state_is_as_old_as_in_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver has no copies of states, and its copies of the rest are as old as their bringing."""
    monkeypatch.setenv(workplace.SCRATCH, str(tmp_path / "scratch"))
    uri, store = f"file://{tmp_path}/store", tmp_path / "store"
    mirror = Mirror(ArtifactPlace.of(uri), "tiny", tmp_path / "driver", None)
    files = TrialFiles(tmp_path / "driver", "tiny", mirror)
    assert files.stored_at(KEY, "teacher") is None
    with Workplace(uri, "tiny", 1).trial(KEY, 1, Unheard()) as (places, reports):
        places.folder.mkdir(parents=True, exist_ok=True)
        places.state.write_text("epoch 60 of 100")
        reports.rung("1/3", RungValues(0.5, 0.5, 36000.0))
        (state,) = store.rglob("state.safetensors")
        os.utime(state, (1000, 1000))
        (places.folder / "student").mkdir()
        (places.folder / "student" / "network.json").write_text("mlp")
    assert next(store.rglob("network.json")).stat().st_mtime > 1000
    mirror.pull()
    assert files.stored_at(KEY, None) == 1000
    for name, at in (("state.safetensors", 2000), ("teacher.json", 1500)):
        file = store / "teachers" / "teacher" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (at, at))
    assert files.stored_at(KEY, "teacher") == 2000
    monkeypatch.setattr(mirror, "stored_at", lambda *_: 1 / 0)
    assert files.stored_at(KEY, "teacher") is None


def test_a_full_scratch_disk_is_a_matter_of_its_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search goes on elsewhere; before, one such node paused all of it."""
    monkeypatch.setenv(workplace.SCRATCH, str(tmp_path / "scratch"))
    place = Workplace(f"file://{tmp_path}/store", "tiny", 1)
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StorageAwayError, match="is full"), place.trial(KEY, 1, Unheard()):
        raise DiskFullError("the disk of /scratch is full")
    with pytest.raises(StorageAwayError, match=r"the disk of \S+ is full"), place.trial(KEY, 2, Unheard()):
        raise full
    for owner, name in ((workplace.tempfile, "mkdtemp"), (workplace, "scratch_root")):
        monkeypatch.setattr(owner, name, lambda **_: (_ for _ in ()).throw(full))
        with pytest.raises(StorageAwayError, match="is full"), place.trial(KEY, 3, Unheard()):
            pass
