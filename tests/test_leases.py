"""Leases on files: one holder at a time, the dead replaced, clocks of two machines never compared."""

import random
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import FileSelector, FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

from search.artifacts import leases
from search.artifacts.leases import Held, Lease, Leases

EXPIRY_S = 60.0


class Clock:
    """Seconds that pass only when somebody sleeps; what happens meanwhile is an argument."""

    def __init__(self, start: float = 0.0, meanwhile: Callable[[], None] | None = None) -> None:
        self.now = start
        self.meanwhile = meanwhile

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.meanwhile is not None:
            self.meanwhile()


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[FileSystem, str]:
    if request.param == "local":
        return LocalFileSystem(), str(tmp_path)
    return PyFileSystem(FSSpecHandler(MemoryFileSystem())), str(tmp_path)


def process(storage: tuple[FileSystem, str], clock: Clock) -> Leases:
    """The leases as another process on another machine sees them."""
    return Leases(*storage, expiry_s=EXPIRY_S, clock=clock, sleep=clock.sleep)


def files(storage: tuple[FileSystem, str]) -> list[str]:
    filesystem, root = storage
    return [info.base_name for info in filesystem.get_file_info(FileSelector(f"{root}/key", allow_not_found=True))]


def acquired(leases: Leases, holder: str) -> Lease:
    lease = leases.acquire("key", holder)
    assert isinstance(lease, Lease)
    return lease


def test_one_holder_until_it_gives_back(storage: tuple[FileSystem, str]) -> None:
    one, other = process(storage, Clock()), process(storage, Clock(1e6))
    with acquired(one, "trial/1.a"):
        assert other.acquire("key", "trial 2") == Held("trial/1.a")
        assert other.holder("key") == "trial/1.a"
        assert isinstance(other.acquire("other key", "trial 2"), Lease)
    assert other.holder("key") is None
    with acquired(other, "trial 2"):
        assert one.acquire("key", "trial/1.a") == Held("trial 2")
    assert files(storage) == []


def test_a_name_of_any_length_is_held_apart_from_others(storage: tuple[FileSystem, str]) -> None:
    names = [f"{'/long' * 100} {number} {'ä' * 40}" for number in (1, 2)]
    one, other = process(storage, Clock()), process(storage, Clock(1e6))
    lease = acquired(one, names[0])
    held = other.acquire("key", names[1])
    assert isinstance(held, Held)
    assert held.holder.endswith(f"...{'?' * 40}")
    (claim,) = [name for name in files(storage) if name.endswith(".claim")]
    assert len(claim.encode()) < 255
    with storage[0].open_input_stream(f"{storage[1]}/key/{claim}") as stream:
        assert stream.read().decode() == names[0]
    lease.beat()
    assert not lease.lost
    acquired(other, names[0])  # its successor
    lease.beat()
    assert lease.lost


def test_a_holder_is_dead_once_its_beat_stands_still_for_the_watchers_expiry(storage: tuple[FileSystem, str]) -> None:
    clock = Clock(1e6)  # far from the holder's
    lease, watcher = acquired(process(storage, Clock()), "dead"), process(storage, clock)
    assert watcher.holder("key") == "dead"
    clock.now += 0.9 * EXPIRY_S
    lease.beat()
    assert watcher.acquire("key", "next") == Held("dead")  # the new beat is seen now: the time starts again
    clock.now += 0.99 * EXPIRY_S
    assert watcher.acquire("key", "next") == Held("dead")
    assert process(storage, Clock(1e9)).acquire("key", "third") == Held("dead")  # a newcomer has watched nothing yet
    clock.now += 0.02 * EXPIRY_S
    acquired(watcher, "next")


def test_a_holder_that_was_asleep_stays_dead(storage: tuple[FileSystem, str]) -> None:
    clock = Clock()
    lease, watcher = acquired(process(storage, Clock()), "asleep"), process(storage, clock)
    assert watcher.holder("key") == "asleep"
    clock.now += EXPIRY_S
    assert watcher.holder("key") is None
    successor = acquired(watcher, "next")
    assert not lease.lost
    lease.beat()
    assert lease.lost
    assert process(storage, Clock()).acquire("key", "third") == Held("next")
    with lease:  # gives back what it has lost: nothing
        pass
    assert watcher.holder("key") == "next"
    successor.beat()
    assert not successor.lost


def test_the_same_holder_takes_over_at_once(storage: tuple[FileSystem, str]) -> None:
    first = acquired(process(storage, Clock()), "trial")
    second = acquired(process(storage, Clock()), "trial")
    first.beat()
    second.beat()
    assert (first.lost, second.lost) == (True, False)


def asking(storage: tuple[FileSystem, str], identifier: str) -> str:
    """The claim of a process that asks at the same moment; its path."""
    filesystem, root = storage
    filesystem.create_dir(f"{root}/key", recursive=True)
    path = f"{root}/key/rival.{identifier}.claim"
    with filesystem.open_output_stream(path) as stream:
        stream.write(b"rival")
    return path


def test_the_lease_of_one_that_is_known_to_be_dead_is_given_back_at_once(storage: tuple[FileSystem, str]) -> None:
    one, other = process(storage, Clock()), process(storage, Clock())
    dead = acquired(one, "one")
    other.forget("key", "another")
    other.forget("elsewhere", "one")
    assert other.acquire("key", "other") == Held("one")
    other.forget("key", "one")
    acquired(other, "other")
    dead.beat()
    assert dead.lost  # were it alive after all, it would know


def test_of_two_that_ask_at_once_the_smaller_claim_stays(storage: tuple[FileSystem, str]) -> None:
    smaller = asking(storage, "0")
    assert process(storage, Clock()).acquire("key", "trial") == Held("rival")
    storage[0].delete_file(smaller)
    greater = asking(storage, "z")
    clock = Clock(meanwhile=lambda: storage[0].delete_file(greater))  # the rival sees the smaller one and withdraws
    assert isinstance(process(storage, clock).acquire("key", "trial"), Lease)


def test_one_that_died_while_it_asked_is_waited_for_once(storage: tuple[FileSystem, str]) -> None:
    asking(storage, "z")
    clock = Clock()
    watcher = process(storage, clock)
    assert watcher.acquire("key", "trial") == Held("rival")
    assert 0 < clock.now < EXPIRY_S / 2
    assert files(storage) == ["rival.z.claim"]
    clock.now = EXPIRY_S
    acquired(watcher, "trial")


def test_one_that_slept_while_it_asked_and_was_taken_for_dead_does_not_have_it(storage: tuple[FileSystem, str]) -> None:
    asking(storage, "z")

    def meanwhile() -> None:
        filesystem, root = storage
        for name in files(storage):
            filesystem.delete_file(f"{root}/key/{name}")

    assert isinstance(process(storage, Clock(meanwhile=meanwhile)).acquire("key", "trial"), Held)


def test_a_failing_storage_leaves_no_claim(storage: tuple[FileSystem, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("the storage is away")

    with monkeypatch.context() as broken:
        broken.setattr(leases._Place, "beat", fail)
        with pytest.raises(OSError, match="away"):
            process(storage, Clock()).acquire("key", "trial")
    assert files(storage) == []


def test_beats_go_on_through_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Leases(LocalFileSystem(), str(tmp_path), expiry_s=0.12)
    watcher = Leases(LocalFileSystem(), str(tmp_path), expiry_s=0.5)
    write, attempts = leases._Place.beat, count()

    def every_second_fails(place: leases._Place, claim: leases._Claim, beats: int) -> None:
        if next(attempts) % 2:
            raise OSError("the storage is away")
        write(place, claim, beats)

    monkeypatch.setattr(leases._Place, "beat", every_second_fails)
    with acquired(held, "trial"):
        until = time.monotonic() + 0.7
        while time.monotonic() < until:
            assert watcher.acquire("key", "other") == Held("trial")
            time.sleep(0.02)


def test_many_that_ask_again_and_again_never_have_it_together(tmp_path: Path) -> None:
    having: list[str] = []
    overlaps: list[list[str]] = []
    turns: list[str] = []

    def contend(name: str) -> None:
        own, chance = Leases(LocalFileSystem(), str(tmp_path)), random.Random(name)
        until = time.monotonic() + 0.6
        while time.monotonic() < until:
            lease = own.acquire("key", name)
            if isinstance(lease, Lease):
                with lease:
                    having.append(name)
                    overlaps.extend([list(having)] if len(having) > 1 else [])
                    turns.append(name)
                    time.sleep(chance.random() * 0.004)
                    having.remove(name)
            time.sleep(chance.random() * 0.002)

    contenders = [threading.Thread(target=contend, args=(f"trial {i}",)) for i in range(6)]
    for contender in contenders:
        contender.start()
    for contender in contenders:
        contender.join()
    assert overlaps == []
    assert len(turns) > 10
    assert len(set(turns)) > 1
