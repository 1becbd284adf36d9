"""Artefacts in an object store: whatever is cut off, delayed, repeated or overtaken, what counts there is whole."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from object_store import Disk, Killed, Store, Turns
from pyarrow.fs import LocalFileSystem
from studies import config_of, result

from ccdist.checkpoint import CorruptCheckpointError, NewerFormatError
from ccdist.networks import build_network
from ccdist.training import TrainingResult
from search.artifacts import leases, remote_files, store_lock, workplace
from search.artifacts.artifact_place import ArtifactPlace, PlaceError, probe
from search.artifacts.disk_space import DiskFullError, StorageAwayError
from search.artifacts.leases import Lease, Leases
from search.artifacts.locks import LockedError
from search.artifacts.manifests import Entry, Manifest, StoredFiles, SupersededError, Version
from search.artifacts.mirror import Mirror, verdicts
from search.artifacts.places import TrialPlaces, load_result, save_result
from search.artifacts.remote_files import UnreachableError
from search.artifacts.trial_copies import STUDY_KEY, LocalFiles, Writer, is_record, is_state, is_visible, pull
from search.artifacts.trial_files import TrialFiles
from search.artifacts.workplace import Workplace
from search.errors import UserError
from search.storage import Storage, StorageError
from search.studies.records import RungValues, TrialResult
from search.teachers import TeacherStore
from tracking.journal import Journal, StartRow, end_dead_trials, read_rows
from tracking.sender import sent_path

KEY = "tiny-0003"
FOLDER = f"trials/{KEY}"
JOURNAL = f"journal/{KEY}.jsonl"

# What a trial has on its disk at the moments at which it is stored.
MOMENTS: list[dict[str, str]] = [
    {JOURNAL: "start\n", f"{FOLDER}/state.safetensors": "epoch 1"},
    {JOURNAL: "start\n1\n2\n", f"{FOLDER}/state.safetensors": "epoch 2", f"{FOLDER}/rungs.json": "{}"},
    {
        JOURNAL: "start\n1\n2\n3\n",
        f"{FOLDER}/rungs.json": "{}",
        f"{FOLDER}/student/network.json": "mlp",
        f"{FOLDER}/verification/rows.parquet": "rows",
    },
    {
        JOURNAL: "start\n1\n2\n3\nend\n",
        f"{FOLDER}/student/network.json": "mlp",
        f"{FOLDER}/verdicts.parquet": "all",
        f"{FOLDER}/result.json": "0.9",
    },
]


every = pytest.mark.parametrize("step", [5, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(200)])])


def stored(store: Store) -> StoredFiles:
    return StoredFiles(store, "bucket/tiny", KEY)


def put(root: Path, content: dict[str, str]) -> None:
    """Make these a trial's local files, as code that writes whole files does."""
    for path in LocalFiles(root, KEY).paths():
        if path not in content:
            (root / path).unlink()
    for path, text in content.items():
        file = root / path
        if not file.exists() or file.read_text() != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            (file.parent / ".new").write_text(text)
            (file.parent / ".new").replace(file)


def got(root: Path) -> dict[str, str]:
    return {path: (root / path).read_text() for path in LocalFiles(root, KEY).paths()}


def writer(store: Store, root: Path, start: int, epoch: int = 1) -> Writer:
    return Writer(stored(store), LocalFiles(root, KEY), (epoch, start))


def live(store: Store, root: Path, start: int, moments: list[dict[str, str]] = MOMENTS) -> list[dict[str, str]]:
    """A worker's life, from what the store has on; returns what it found."""
    own = writer(store, root, start)
    own.begin()
    found = got(root)
    for moment in moments:
        put(root, moment)
        own.push()
    return [found]


def counted(disk: Disk, tmp_path: Path) -> dict[str, str]:
    """What somebody finds who looks now."""
    tmp_path.mkdir(exist_ok=True)
    folder = tmp_path / f"look {len(list(tmp_path.iterdir()))}"
    return got(folder) if pull(stored(Store(disk)), LocalFiles(folder, KEY), lambda _: lambda _path: True) else {}


def garbage(disk: Disk) -> list[str]:
    """Objects that no manifest that counts names."""
    newest = stored(Store(disk)).newest()
    assert newest is not None
    named = {
        f"bucket/tiny/trials/{KEY}/{each.version}/{path.removeprefix(f'{FOLDER}/')}"
        for path, each in newest.files.items()
    }
    return sorted(disk.objects.keys() - named - {f"bucket/tiny/manifests/{KEY}/{newest.version}.json"})


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "PATIENCE_S", 0.02)
    monkeypatch.setattr(remote_files, "_FIRST_PAUSE_S", 0.001)


def at(number: int, error: BaseException) -> Callable[[int], None]:
    def hook(operation: int) -> None:
        if operation == number:
            raise error

    return hook


@every
@pytest.mark.parametrize("whole", [True, False])
def test_a_kill_between_any_two_operations_leaves_a_whole_moment(tmp_path: Path, whole: bool, step: int) -> None:
    """Of a first worker, and of a second one that goes on where the first was killed: both at every operation."""
    counting = Store(Disk(), whole=whole)
    live(counting, tmp_path / "count", 1)
    for cut in range(0, counting.operations, step):
        disk, folder = Disk(), tmp_path / f"{whole} {cut}"
        with pytest.raises(Killed):
            live(Store(disk, whole=whole, before=at(cut, Killed())), folder / "first", 1)
        found = counted(disk, folder)
        assert found in [{}, *MOMENTS]
        position = 0 if found == {} else MOMENTS.index(found) + 1
        second = Store(disk, whole=whole, before=at(cut % 9, Killed()))
        with pytest.raises(Killed):
            live(second, folder / "second", 2, MOMENTS[position:] + [{JOURNAL: "never"}] * 9)
        later = counted(disk, folder)
        assert later in [found, *MOMENTS[position:], {JOURNAL: "never"}]
        LocalFiles(folder / "third", KEY).note_copied(Manifest(Version(0, 0, 1), {}))
        put(folder / "third", {f"{FOLDER}/leftover": "of somebody else"})
        (first,) = live(Store(disk, whole=whole), folder / "third", 3)
        assert first == later
        assert counted(disk, folder) == MOMENTS[-1]
        assert garbage(disk) == []


@every
@pytest.mark.parametrize("done", [True, False])
def test_an_operation_that_fails_once_changes_nothing(tmp_path: Path, done: bool, step: int) -> None:
    """Whether or not the store had done what it reported as failed."""
    counting = Store(Disk())
    live(counting, tmp_path / "count", 1)
    for number in range(0, counting.operations, step):
        disk, hook = Disk(), at(number, OSError("AWS Error NETWORK_CONNECTION"))
        live(Store(disk, after=hook) if done else Store(disk, before=hook), tmp_path / f"{done} {number}", 1)
        assert counted(disk, tmp_path) == MOMENTS[-1]
        assert garbage(disk) == []


@pytest.mark.parametrize("done", [True, False])
def test_work_goes_on_after_an_outage_at_any_operation(tmp_path: Path, done: bool) -> None:
    """Storing fails for good, later it works: what counts is whole in between, and complete afterwards."""
    for number in range(60):
        disk, folder = Disk(), tmp_path / str(number)
        store = Store(disk)
        own = writer(store, folder, 1)
        own.begin()
        put(folder, MOMENTS[0])
        own.push()
        put(folder, MOMENTS[1])
        began = store.operations

        def failing(operation: int, first: int = began + number) -> None:
            if operation >= first:
                raise OSError("AWS Error NETWORK_CONNECTION during PutObject")

        if done:
            store._after = failing
        else:
            store._before = failing
        with remote_files.impatient():
            try:
                own.push()
            except UnreachableError:
                pass
            else:
                return  # every operation has failed once
        assert counted(disk, tmp_path) in MOMENTS[:2]
        store._before = store._after = lambda _operation: None
        put(folder, MOMENTS[2])
        own.push()
        assert counted(disk, tmp_path) == MOMENTS[2]
        assert disk.changed == set()  # whoever reads what was stored by half finds what its manifest says
        live(Store(disk), folder / "next", 2)
        assert garbage(disk) == []
    raise AssertionError("a push has more operations than were tried")


@every
def test_who_was_overtaken_changes_nothing_that_counts(tmp_path: Path, step: int) -> None:
    """A worker that is taken for dead and lives, in the middle of storing, at every pair of operations."""
    found: set[str] = set()
    for first in range(0, 14, step):
        for second in range(0, 20, step):
            disk, folder = Disk(), tmp_path / f"{first} {second}"
            old = writer(Store(disk), folder / "old", 1)
            old.begin()
            put(folder / "old", MOMENTS[0])
            old.push()
            turns = Turns(("old", first), ("new", second), ("old", 1000), ("new", 1000))
            old.stored._filesystem._before = lambda _, turns=turns: turns.wait("old")
            put(folder / "old", MOMENTS[1])

            def go_on(own: Writer = old, root: Path = folder / "old") -> None:
                own.push()
                put(root, {JOURNAL: "of the overtaken"})
                own.push()

            new = Store(disk, before=lambda _, turns=turns: turns.wait("new"))
            seen: list[dict[str, str]] = []

            def overtake(store: Store = new, root: Path = folder / "new", seen: list[dict[str, str]] = seen) -> None:
                seen.extend(live(store, root, 2, MOMENTS[2:]))

            turns.run(old=go_on, new=overtake)
            assert turns.errors.keys() <= {"old"}, turns.errors
            assert isinstance(turns.errors.get("old", SupersededError("")), SupersededError)
            assert seen[0] in [*MOMENTS[:2], {JOURNAL: "of the overtaken"}]
            assert counted(disk, folder) == MOMENTS[-1]
            found.add(seen[0][JOURNAL] + str("old" in turns.errors))
    assert len(found) >= 3  # it was overtaken early and late, and not at all


@every
def test_a_reader_finds_a_whole_moment_while_another_is_stored(tmp_path: Path, step: int) -> None:
    for first in range(0, 8, step):
        for second in range(0, 24, step):
            disk, folder = Disk(), tmp_path / f"{first} {second}"
            own = writer(Store(disk), folder / "own", 1)
            own.begin()
            put(folder / "own", MOMENTS[0])
            own.push()
            turns = Turns(("reader", first), ("own", second), ("reader", 1000), ("own", 1000))
            own.stored._filesystem._before = lambda _, turns=turns: turns.wait("own")

            def go_on(own: Writer = own, root: Path = folder / "own") -> None:
                for moment in MOMENTS[1:]:
                    put(root, moment)
                    own.push()

            reader = stored(Store(disk, before=lambda _, turns=turns: turns.wait("reader")))
            local = LocalFiles(folder / "reader", KEY)
            turns.run(own=go_on, reader=lambda r=reader, lo=local: pull(r, lo, lambda _: lambda _path: True))
            assert turns.errors == {}
            assert got(folder / "reader") in MOMENTS


def test_an_earlier_start_does_not_begin_after_a_later_one(tmp_path: Path) -> None:
    disk = Disk()
    live(Store(disk), tmp_path / "later", 7)
    with pytest.raises(SupersededError, match=f"another process has taken trial {KEY} over"):
        writer(Store(disk), tmp_path / "earlier", 6).begin()
    writer(Store(disk), tmp_path / "next driver's", 1, epoch=2).begin()
    assert counted(disk, tmp_path) == MOMENTS[-1]


def test_only_what_has_changed_is_stored(tmp_path: Path) -> None:
    disk = Disk()
    own = writer(Store(disk), tmp_path / "own", 1)
    own.begin()
    put(tmp_path / "own", MOMENTS[2])
    assert own.push()
    before = dict(disk.objects)
    assert not own.push()
    assert disk.objects == before
    put(tmp_path / "own", MOMENTS[2] | {JOURNAL: "start\nmore\n"})
    assert own.push()
    kept = {path for path in before if "student" in path or "rows" in path}
    assert kept
    assert kept <= disk.objects.keys()
    assert sum(path.endswith(".jsonl") for path in disk.objects) == 1


@pytest.mark.parametrize(
    ("path", "fits"),
    [
        ("../../x", False),
        ("/etc/x", False),
        (f"{FOLDER}/../x", False),
        ("trials/other/x", False),
        (f"{FOLDER}/x", True),
    ],
)
def test_a_manifest_leads_nowhere_else(tmp_path: Path, path: str, fits: bool) -> None:
    """Whoever can write the bucket must not write this machine's files."""
    disk, version = Disk(), Version(1, 1, 0)
    entry = Entry(str(version), 1, "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881")
    disk.objects[f"bucket/tiny/trials/{KEY}/{version}/x"] = b"x"
    disk.objects[f"bucket/tiny/manifests/{KEY}/{version}.json"] = Manifest(version, {path: entry}).to_json()
    if fits:
        assert counted(disk, tmp_path) == {path: "x"}
        return
    with pytest.raises(CorruptCheckpointError):
        counted(disk, tmp_path)
    assert not [file for file in tmp_path.rglob("x") if file.is_file()]


def test_damage_is_told(tmp_path: Path) -> None:
    disk = Disk()
    live(Store(disk), tmp_path / "own", 1)
    (weights,) = (path for path in disk.objects if path.endswith("network.json"))
    disk.objects[weights] = b"mlq"
    with pytest.raises(CorruptCheckpointError, match="another hash than its manifest says"):
        counted(disk, tmp_path)
    del disk.objects[weights]
    with pytest.raises(CorruptCheckpointError, match="is not there"):
        counted(disk, tmp_path)
    (manifest,) = (path for path in disk.objects if "manifests" in path)
    disk.objects[manifest] = json.dumps({"format_version": 2, "files": {}}).encode()
    with pytest.raises(NewerFormatError, match="format version 2; this program reads 1"):
        counted(disk, tmp_path)
    disk.objects[manifest] = b"{"
    with pytest.raises(CorruptCheckpointError, match="is no manifest"):
        counted(disk, tmp_path)


def test_which_files_are_whose() -> None:
    paths = [path for moment in MOMENTS for path in moment]
    states = {f"{FOLDER}/state.safetensors", f"{FOLDER}/rungs.json", f"{FOLDER}/verification/rows.parquet"}
    assert {path for path in paths if is_state(path)} == states
    assert {path for path in paths if is_visible(path) and not is_record(path)} == {f"{FOLDER}/student/network.json"}


# ---- The address ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("s3://AKIA:hush@bucket/x", "AWS_ACCESS_KEY_ID"),
        ("s3://hush@bucket/x", "AWS_ACCESS_KEY_ID"),
        ("gs://hush@bucket/x", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("abfs://box:hush@account.dfs.core.windows.net/x", "holds a login"),
        ("s3://bucket/x?secret_key=hush", "an option that is not known"),
        ("s3://bucket/x#hush", "expected a folder, or an address"),
        ("s3://", "expected a folder, or an address"),
    ],
)
def test_an_address_with_a_secret_is_refused_without_it(tmp_path: Path, uri: str, text: str) -> None:
    with pytest.raises(PlaceError, match=text) as refused:
        Storage.of(config_of(tmp_path, storage={"artifacts": uri}), None)
    assert "hush" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_addresses_that_are_read(tmp_path: Path) -> None:
    options = "endpoint_override=localhost:1&scheme=http&region=eu-west-1"
    for uri in (f"s3://bucket/a/b?{options}", "gs://anonymous@bucket/a", "abfs://box@a.dfs.core.windows.net/x"):
        storage = Storage.of(config_of(tmp_path, storage={"artifacts": uri}), None)
        assert storage.workers_artifacts == uri
    storage = Storage.of(config_of(tmp_path, storage={"artifacts": f"s3://bucket/a/?{options}"}), None)
    assert storage.teachers == f"s3://bucket/a/teachers?{options}"


def test_a_storage_is_tried_in_one_line(tmp_path: Path) -> None:
    assert probe(f"file://{tmp_path}/store") is None
    assert list((tmp_path / "store").iterdir()) == []
    (tmp_path / "file").touch()
    told = probe(f"file://{tmp_path}/file/below")
    assert told is not None
    assert "cannot be used" in told
    assert "\n" not in told
    assert "is no storage that can be used" in str(probe("nosuch://bucket/x"))


def test_a_store_that_refuses_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = Store(Disk(), before=lambda number: at(number, OSError("AWS Error NO_SUCH_BUCKET\nhush"))(number))
    monkeypatch.setattr(ArtifactPlace, "open", lambda _self: (refusing, "bucket/x"))
    told = str(probe("s3://bucket/x?region=eu-west-1"))
    assert told.startswith("storage s3://bucket/x?*** cannot be used (AWS Error NO_SUCH_BUCKET")
    assert "AWS_ACCESS_KEY_ID" in told
    assert "\n" not in told


def test_a_refusal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "PATIENCE_S", 100.0)
    calls: list[int] = []

    def refuse(number: int) -> None:
        calls.append(number)
        raise OSError("AWS Error ACCESS_DENIED during HeadObject (Request ID: 123)")

    with pytest.raises(UnreachableError, match=r"ACCESS_DENIED during HeadObject$"):
        remote_files.exists(Store(Disk(), before=refuse), "bucket/x")
    assert calls == [0]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT])
def test_a_mount_that_comes_back_is_waited_for(number: int) -> None:
    store = Store(Disk(), before=at(0, OSError(number, os.strerror(number))))
    assert not remote_files.exists(store, "bucket/x")


class NoFolders(Store):
    """A store in which to make a folder fails once, as one that was away for a moment."""

    failed = False

    def create_dir(self, path: str, *, recursive: bool) -> None:
        if not self.failed:
            self.failed = True
            raise OSError("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7")


def test_a_lease_and_a_teacher_survive_an_outage_at_the_making_of_a_folder() -> None:
    assert isinstance(Leases(NoFolders(Disk()), "bucket/teachers").acquire("key", "trial"), Lease)
    disk = Disk()
    lease = TeacherStore(Store(disk), "bucket/teachers").acquire("key", "trial")
    assert isinstance(lease, Lease)
    network = build_network("mlp", input_shape=(1, 2, 2), num_classes=2, width=2, seed=0).eval()
    store = TeacherStore(NoFolders(disk), "bucket/teachers")
    store.train(lease, lambda _state: TrainingResult(network, [], 1.0))
    assert torch.equal(store.load("key").network(torch.ones(1, 1, 2, 2)), network(torch.ones(1, 1, 2, 2)))


class Resolver:
    """In place of `FileSystem`: its first answers are errors."""

    def __init__(self, folder: Path, errors: list[str]) -> None:
        self.folder, self.errors, self.calls = folder, errors, 0

    def from_uri(self, uri: str) -> tuple[LocalFileSystem, str]:
        self.calls += 1
        if self.errors:
            raise OSError(self.errors.pop(0))
        return LocalFileSystem(), f"{self.folder}/{uri.partition('://')[2].partition('?')[0]}"


REGION = "When resolving region for bucket 'b': AWS Error NETWORK_CONNECTION during HeadBucket operation: curlCode: 6"


def test_a_worker_waits_for_a_store_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is raised in the end says that the store is away: no trial fails of it."""
    monkeypatch.setenv(workplace.SCRATCH, str(tmp_path / "scratch"))
    resolver = Resolver(tmp_path, [REGION] * 3)
    monkeypatch.setattr(remote_files, "FileSystem", resolver)
    work("s3://b/waited", 1, lambda places, _: state(places, "last"), Told(lambda: None))
    assert resolver.calls == 4
    resolver.errors = [REGION] * 2
    assert not TeacherStore.of("s3://b/waited/teachers").has("key")
    resolver.errors = [REGION] * 10_000
    for act in (lambda: work("s3://b/away", 1, trained, Told(lambda: None)), lambda: TeacherStore.of("s3://b/t")):
        with pytest.raises(StorageAwayError, match="NETWORK_CONNECTION"):
            act()


def test_a_driver_does_not_wait_for_a_store_that_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "PATIENCE_S", 100.0)
    resolver = Resolver(tmp_path, [REGION] * 3)
    monkeypatch.setattr(remote_files, "FileSystem", resolver)
    assert "cannot be used (When resolving region" in str(probe("s3://b/driver"))
    monkeypatch.chdir(tmp_path)
    storage = Storage.of(config_of(tmp_path, storage={"artifacts": "s3://b/driver"}), None)
    for act in (storage.prepare, lambda: storage.mirror("tiny")):
        with pytest.raises(UserError, match=r"^storage s3://b/driver cannot be used \(When resolving region") as caught:
            act()
        assert "\n" not in str(caught.value)
    assert resolver.calls == 3


def test_a_bucket_that_is_not_there_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "PATIENCE_S", 100.0)
    resolver = Resolver(tmp_path, ["Bucket 'b' not found"])
    monkeypatch.setattr(remote_files, "FileSystem", resolver)
    with pytest.raises(UnreachableError, match="not found"):
        TeacherStore.of("s3://b/none")


# ---- A worker ------------------------------------------------------------------------------------------------------


class Told:
    """Reports, with what the store has when each is told."""

    def __init__(self, look: Callable[[], Any], stop_at: str = "") -> None:
        self._look, self._stop_at = look, stop_at
        self.seen: list[tuple[str, Any]] = []

    def _tell(self, kind: str) -> None:
        self.seen.append((kind, self._look()))
        if kind == self._stop_at:
            raise SystemExit

    def advanced(self, phase: str, done: int, of: int) -> None:
        self._tell("advanced")

    def rung(self, name: str, values: RungValues) -> None:
        self._tell("rung")

    def verifying(self, result: TrialResult, phase: str, done: int, of: int) -> None:
        self._tell("verifying")


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(workplace.SCRATCH, str(tmp_path / "scratch"))
    return f"file://{tmp_path}/store"


def mirror(uri: str, folder: Path, destination: str | None = None) -> Mirror:
    return Mirror(ArtifactPlace.of(uri), "tiny", folder, destination)


def own(mirror: Mirror) -> None:
    """As a driver does that has claimed the study."""
    mirror.set_owner("id")
    mirror.root.mkdir(parents=True, exist_ok=True)
    (mirror.root / "study.id").write_text("id")


def work(uri: str, start: int, act: Callable[[TrialPlaces, Any], None], told: Told) -> None:
    with Workplace(uri, "tiny", 1).trial(KEY, start, told) as (places, reports):
        act(places, reports)


def state(places: TrialPlaces, text: str) -> None:
    places.folder.mkdir(parents=True, exist_ok=True)
    places.state.with_name(".new").write_text(text)
    places.state.with_name(".new").replace(places.state)


def test_what_a_report_speaks_of_is_stored_before_it(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workplace, "VERIFYING_S", 0.0)
    monkeypatch.setattr(workplace, "RESTS", 0.0)
    looked = 0

    def look() -> str:
        nonlocal looked
        looked += 1
        local = LocalFiles(tmp_path / f"look{looked}", KEY)
        pull(StoredFiles(*_opened(uri), KEY), local, lambda _: lambda _path: True)
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


def _opened(uri: str) -> tuple[Any, str]:
    filesystem, root = ArtifactPlace.of(uri).open()
    return filesystem, f"{root}/tiny"


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
    pull(StoredFiles(*_opened(uri), KEY), local, lambda _: lambda _path: True)
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
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch").chmod(0o777)
    with pytest.raises(PermissionError, match="can be written by others; set CCDIST_SCRATCH_DIR"):
        work(uri, 1, lambda *_: None, Told(lambda: None))


# ---- The driver ----------------------------------------------------------------------------------------------------


def trained(places: TrialPlaces, _reports: Any) -> None:
    """A trial with a student, in the middle of its verification."""
    with Journal(places.journal) as journal:
        journal.start(KEY, {"alpha": 0.5}, {})
        journal.metrics(1, {"loss": 1.0})
    state(places, "last")
    places.student.mkdir()
    for name in ("network.json", "weights.safetensors"):
        (places.student / name).write_text(name)


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
    newest = StoredFiles(*_opened(uri), KEY).newest()
    assert newest is not None
    assert not any(map(is_state, newest.files))
    filesystem, root = _opened(uri)
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
    told = rf"holds 1 trials that \S+ lacks, such as {KEY}: .*; go on where"
    with pytest.raises(StorageError, match=told) as caught, storage.only_driver("tiny"):
        raise AssertionError("the driver began")
    assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="holds 1 trials"):
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
    filesystem, root = _opened(uri)
    for key in (".", "..", "a/b"):
        path = f"{root}/manifests/{key}/{Version(1, 1, 1)}.json"
        remote_files.publish(filesystem, path, b'{"format_version": 1, "files": {}}')
    before = got(tmp_path / "one" / "tiny")
    one.pull()
    assert one.is_empty()
    assert got(tmp_path / "one" / "tiny") == before


def test_two_studies_of_one_name_do_not_meet(uri: str, tmp_path: Path) -> None:
    storages = []
    for name in ("here", "there"):
        places = {"artifacts": uri, "study": f"sqlite:///{tmp_path}/{name}.db"}
        (tmp_path / name).mkdir()
        os.chdir(tmp_path / name)
        storages.append(Storage.of(config_of(tmp_path, storage=places), None))
    storages[0].claim("tiny", "one")
    with pytest.raises(StorageError, match="holds the trials of another study named tiny"):
        storages[1].claim("tiny", "two")
    storages[1].claim("tiny", "one")
    assert storages[1].identifier("tiny") == "one"


def test_copies_of_a_database_do_not_write_one_store(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own locks know nothing of each other."""
    monkeypatch.setattr(leases, "EXPIRY_S", 0.3)
    monkeypatch.setattr(store_lock, "_POLL_S", 0.05)
    place, one, copy = ArtifactPlace.of(uri), f"sqlite:///{tmp_path}/one.db", f"sqlite:///{tmp_path}/copy.db"
    with store_lock.store_lock(place, "tiny", one) as lock:
        assert lock.still_held()
        with pytest.raises(LockedError, match="which still runs"), store_lock.store_lock(place, "tiny", copy):
            pass
        assert lock.still_held()
        with store_lock.store_lock(place, "other", copy):
            pass
    dead = Leases(*_opened_lock(place)).acquire("driver", "another database")
    assert isinstance(dead, Lease)  # and no sign of life ever after
    with store_lock.store_lock(place, "tiny", copy):
        dead.beat()
        assert dead.lost


def test_a_database_with_a_long_name_can_be_locked(uri: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/{'x' * 120}/{'ö' * 100}/study.db"
    with store_lock.store_lock(ArtifactPlace.of(uri), "tiny", url) as lock:
        assert lock.still_held()
    with store_lock.store_lock(ArtifactPlace.of(uri), "tiny", url):
        pass


def test_a_database_of_another_machine_has_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers of one image have one host name and one path."""
    names = set()
    for number in ("1", "2", ""):
        (tmp_path / "id").write_text(number)
        monkeypatch.setattr(store_lock, "_MACHINE_ID", tmp_path / "id")
        names.add(store_lock._holder("sqlite:////study.db"))
    monkeypatch.setattr(store_lock, "_MACHINE_ID", tmp_path / "none")
    assert store_lock._holder("sqlite:////study.db") in names
    assert len(names) == 3


def test_a_server_that_does_not_say_which_it_is_goes_by_its_address() -> None:
    names = [store_lock._holder(f"postgresql://me:word@127.0.0.1:{port}/x") for port in (1, 2)]
    assert len(set(names)) == 2
    assert not any("word" in name for name in names)


def _opened_lock(place: ArtifactPlace) -> tuple[Any, str]:
    filesystem, root = place.open()
    return filesystem, f"{root}/tiny/lock"


def test_a_driver_without_the_folder_stores_nothing(uri: str, tmp_path: Path) -> None:
    """One that was refused must not write over what belongs to another study."""
    own(mirror(uri, tmp_path / "owner"))
    stranger = mirror(uri, tmp_path / "stranger")
    stranger.root.mkdir(parents=True)
    (stranger.root / "study.id").write_text("other")
    (stranger.root / "report.html").write_text("other")
    stranger.push_study()
    filesystem, root = _opened(uri)
    assert sorted(remote_files.paths(filesystem, root)) == ["study.id"]


# ---- What a death costs ----------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(workplace.tempfile, "mkdtemp", lambda **_: (_ for _ in ()).throw(full))
    with pytest.raises(StorageAwayError, match="is full"), place.trial(KEY, 3, Unheard()):
        pass
