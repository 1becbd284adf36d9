"""A trial's files in an object store: whatever is cut off, delayed, repeated or overtaken, what counts is whole."""

import json
from pathlib import Path

import pytest
from object_store import Disk, Killed, Store, Turns
from trial_moments import FOLDER, JOURNAL, KEY, MOMENTS, at, counted, every, garbage, got, live, put, stored, writer

from ccdist.checkpoint import CorruptCheckpointError, NewerFormatError
from search.artifacts import remote_files
from search.artifacts.manifests import Entry, Manifest, SupersededError, Version
from search.artifacts.remote_files import UnreachableError
from search.artifacts.trial_copies import LocalFiles, Writer, is_record, is_state, is_visible, pull

pytest_plugins = ("trial_fixtures",)
pytestmark = pytest.mark.usefixtures("no_waiting")


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


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(200)])])
@pytest.mark.parametrize("late", [False, True])
def test_who_is_killed_while_it_begins_hides_nothing(tmp_path: Path, step: int, late: bool) -> None:
    """The one before, which is taken for dead, stores something meanwhile; late: it goes on when the third is done."""
    for looked in range(6):
        for dies in range(looked + 1, 7, 2 * step - 1):
            for stored_until in range(0, 10, step):
                disk, folder = Disk(), tmp_path / f"{looked} {dies} {stored_until}"
                old = writer(Store(disk), folder / "old", 1)
                old.begin()
                put(folder / "old", MOMENTS[0])
                old.push()
                put(folder / "old", MOMENTS[1])
                phases = [("killed", looked), ("old", stored_until), ("killed", 1000), ("third", 1000), ("old", 1000)]
                turns = Turns(*phases if late else [*phases[:3], phases[4], phases[3]])

                def begin(number: int, turns: Turns = turns, dies: int = dies) -> None:
                    turns.wait("killed")
                    at(dies, Killed())(number)

                old.stored._filesystem._before = lambda _, turns=turns: turns.wait("old")
                killed = writer(Store(disk, before=begin), folder / "killed", 2)
                third = Store(disk, before=lambda _, turns=turns: turns.wait("third"))
                turns.run(
                    old=old.push,
                    killed=killed.begin,
                    third=lambda store=third, root=folder / "third": live(store, root, 3, MOMENTS[2:]),
                )
                assert isinstance(turns.errors.pop("old", SupersededError("")), SupersededError)
                assert isinstance(turns.errors.pop("killed", Killed()), Killed)
                assert turns.errors == {}
                assert counted(disk, folder) == MOMENTS[-1]


def test_who_is_overtaken_while_it_begins_deletes_nothing(tmp_path: Path) -> None:
    ends = set()
    for until in range(14):
        disk, folder = Disk(), tmp_path / str(until)
        live(Store(disk), folder / "old", 1, MOMENTS[:2])
        turns = Turns(("slow", until), ("next", 1000), ("slow", 1000))
        slow = writer(Store(disk, before=lambda _, turns=turns: turns.wait("slow")), folder / "slow", 2)
        following = Store(disk, before=lambda _, turns=turns: turns.wait("next"))
        turns.run(
            slow=slow.begin, next=lambda store=following, root=folder / "next": live(store, root, 3, MOMENTS[1:3])
        )
        assert turns.errors.keys() <= {"slow"}, turns.errors
        assert counted(disk, folder) == MOMENTS[2]
        ends.add(type(turns.errors.get("slow")))
    assert SupersededError in ends


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
    for start in (6, 7):  # one moment lets one writer begin
        with pytest.raises(SupersededError, match=f"another process has taken trial {KEY} over"):
            writer(Store(disk), tmp_path / "earlier", start).begin()
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
    disk.objects[manifest] = json.dumps({"format_version": 3, "files": {}}).encode()
    with pytest.raises(NewerFormatError, match="format version 3; this program reads 1 to 2"):
        counted(disk, tmp_path)
    disk.objects[manifest] = b"{"
    with pytest.raises(CorruptCheckpointError, match="is no manifest"):
        counted(disk, tmp_path)


def test_which_files_are_whose() -> None:
    paths = [path for moment in MOMENTS for path in moment]
    states = {f"{FOLDER}/state.safetensors", f"{FOLDER}/rungs.json", f"{FOLDER}/verification/rows.parquet"}
    assert {path for path in paths if is_state(path)} == states
    assert {path for path in paths if is_visible(path) and not is_record(path)} == {f"{FOLDER}/student/network.json"}
