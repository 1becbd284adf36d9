"""Locks on files: one holder, freed by its end or its death."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from search.artifacts.locks import LockedError, exclusive

# A fresh interpreter: a fork would carry the threads of whatever ran before.
SPAWN = multiprocessing.get_context("spawn")
pytestmark = pytest.mark.timeout(30)


def hold(path: Path, held: Event) -> None:
    with exclusive(path, wait=True):
        held.set()
        signal.pause()


def test_the_holder_is_named_and_the_end_frees_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "a.lock"  # its folder is made
    for _ in range(2):
        with exclusive(path, wait=False):
            with (
                pytest.raises(LockedError, match=rf"a\.lock is held by process {os.getpid()}:"),
                exclusive(path, wait=False),
            ):
                pass
            with exclusive(tmp_path / "locks" / "b.lock", wait=False):
                pass


def test_an_error_inside_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(KeyError), exclusive(tmp_path / "lock", wait=False):
        raise KeyError
    with exclusive(tmp_path / "lock", wait=False):
        pass


def test_a_waiting_caller_gets_the_lock_next(tmp_path: Path) -> None:
    path, order = tmp_path / "lock", []

    def wait_and_hold() -> None:
        with exclusive(path, wait=True):
            order.append("second")

    with exclusive(path, wait=True):
        thread = threading.Thread(target=wait_and_hold)
        thread.start()
        thread.join(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_killed_holders_lock_dies_with_it(tmp_path: Path) -> None:
    held = SPAWN.Event()
    holder = SPAWN.Process(target=hold, args=(tmp_path / "lock", held))
    holder.start()
    assert held.wait(20)
    with pytest.raises(LockedError, match=f"process {holder.pid}"), exclusive(tmp_path / "lock", wait=False):
        pass
    holder.kill()
    holder.join()
    with exclusive(tmp_path / "lock", wait=False):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_child_process_does_not_inherit_the_lock(tmp_path: Path) -> None:
    with exclusive(tmp_path / "lock", wait=False):
        child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        with exclusive(tmp_path / "lock", wait=False):  # raises LockedError if the child holds it
            assert child.poll() is None
    finally:
        child.communicate()
