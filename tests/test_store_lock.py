"""One driver for a study's folder in an object store, also with copies of its database."""

import functools
from pathlib import Path
from typing import Any

import pytest

from search.artifacts import leases, store_lock
from search.artifacts.artifact_place import ArtifactPlace
from search.artifacts.leases import Lease, Leases
from search.artifacts.locks import LockedError

pytest_plugins = ("trial_fixtures",)


def test_copies_of_a_database_do_not_write_one_store(uri: str, tmp_path: Path) -> None:
    """Their own locks know nothing of each other."""
    now = [0.0]
    living: list[Lease] = []

    def sleep(seconds: float) -> None:
        now[0] += seconds
        for lease in living:
            lease.beat()

    locked = functools.partial(store_lock.store_lock, clock=lambda: now[0], sleep=sleep)
    place, one, copy = ArtifactPlace.of(uri), f"sqlite:///{tmp_path}/one.db", f"sqlite:///{tmp_path}/copy.db"
    with locked(place, "tiny", one) as lock:
        living.append(lock.lease)
        assert lock.still_held()
        with pytest.raises(LockedError, match="which still runs"), locked(place, "tiny", copy):
            pass
        assert now[0] > leases.EXPIRY_S
        assert lock.still_held()
        with locked(place, "other", copy):
            pass
    living.clear()
    dead = Leases(*_opened_lock(place)).acquire("driver", "another database")
    assert isinstance(dead, Lease)  # and no sign of life ever after
    with locked(place, "tiny", copy):
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
