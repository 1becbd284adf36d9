"""Teachers: one training for each recipe under any number of callers, whoever dies, in any storage."""

import multiprocessing
import os
import random
import signal
import time
from itertools import product
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem as FsspecLocal
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

from ccdist import checkpoint
from ccdist.checkpoint import CorruptCheckpointError
from ccdist.config import TeacherConfig, ThreatModel
from ccdist.networks import Network, build_network
from ccdist.training import TrainingResult
from search import teachers
from search.artifacts.leases import Held, Lease, Leases
from search.errors import UserError
from search.teachers import Teacher, TeacherStore, get_or_train, teacher_key

# Real processes from a server that has imported all they need: a fork of pytest would carry its threads along.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "search.teachers", "fsspec.implementations.local"])
pytestmark = pytest.mark.timeout(60)

THREAT = ThreatModel(epsilon="1/10")
EPOCHS = 6


def network(seed: int = 0) -> Network:
    return build_network("mlp", input_shape=(1, 4, 4), num_classes=3, width=4, seed=seed).eval()


class Mortal(FSSpecHandler):  # type: ignore[misc]
    """A storage whose user is killed before a random one of its operations."""

    def __init__(self, seed: str) -> None:
        super().__init__(FsspecLocal())
        self.left = random.Random(f"{seed} {os.getpid()}").randrange(90)

    def __getattribute__(self, name: str) -> Any:
        if name in ("open_output_stream", "open_input_stream", "move", "delete_file", "get_file_info", "create_dir"):
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__getattribute__(name)


def storage(kind: str) -> FileSystem:
    """A storage of that kind; the processes of a test share those that are on disk."""
    if kind == "folder":
        return LocalFileSystem()
    if kind.startswith("mortal"):
        return PyFileSystem(Mortal(kind))
    return PyFileSystem(FSSpecHandler(FsspecLocal() if kind == "fsspec" else MemoryFileSystem()))


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> TeacherStore:
    return TeacherStore(storage(request.param), str(tmp_path / "teachers"))


def note(directory: Path, text: str) -> None:
    with (directory / "events").open("a") as file:
        file.write(f"{text}\n")


def events(directory: Path, kind: str = "") -> list[str]:
    file = directory / "events"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line for line in lines if line.startswith(kind)]


def ask(directory: Path, name: str, kind: str, epoch_s: float, expiry_s: float) -> None:
    """Demand the teacher; its training notes who starts it at which epoch, and who ends it."""
    teachers.POLL_S = 0.1
    store = TeacherStore(storage(kind), str(directory / "teachers"), expiry_s=expiry_s, state_interval_s=0.01)

    def train(state: Path) -> TrainingResult:
        first = checkpoint.load_state(state)[1]["epoch"] if state.exists() else 0
        note(directory, f"start {name} {first}")
        for epoch in range(first, EPOCHS):
            time.sleep(epoch_s)
            checkpoint.save_state(state, {"weight": torch.ones(1)}, {"epoch": epoch + 1})
        note(directory, f"end {name}")
        return TrainingResult(network(int(name)), [{"loss": 1.0}], 5.0)

    note(directory, f"ready {name}")
    while not (directory / "all ready").exists():
        time.sleep(0.001)
    teacher = get_or_train(store, "key", train, holder=name)
    note(directory, f"has {name} {teacher.seconds:g} {checkpoint.weights_sha256(teacher.network)}")


def process(*arguments: object) -> BaseProcess:
    caller: BaseProcess = PROCESSES.Process(target=ask, args=arguments)
    caller.start()
    return caller


def demand(
    directory: Path, kind: str, *, epoch_s: float = 0.02, expiry_s: float = 30.0, count: int = 16
) -> dict[str, BaseProcess]:
    """So many processes that demand one teacher at once, by name."""
    directory.mkdir(exist_ok=True)
    callers = {str(i): process(directory, str(i), kind, epoch_s, expiry_s) for i in range(count)}
    while len(events(directory, "ready")) < count:
        time.sleep(0.01)
    (directory / "all ready").touch()
    return callers


def kill_trainer(directory: Path, callers: dict[str, BaseProcess], start: int, after_s: float | None) -> str:
    """Kill the one that was the so many-th to start, that long after it did or once its state is stored; its name."""
    state = directory / "teachers" / "key" / "state.safetensors"
    while len(events(directory, "start")) <= start or (after_s is None and not state.exists()):
        time.sleep(0.005)
    time.sleep(after_s or 0.0)
    name = events(directory, "start")[start].split()[1]
    callers[name].kill()
    callers[name].join()
    return name


def check_one_teacher(directory: Path, survivors: list[str]) -> None:
    """Each survivor has the same teacher, and one of them at most trained it."""
    has = [line.split()[1:] for line in events(directory, "has")]
    assert sorted(name for name, _, _ in has) == sorted(survivors)
    assert len({weights for _, _, weights in has}) == 1
    assert [seconds for _, seconds, _ in has].count("5") <= 1


def test_sixteen_processes_that_ask_at_once_train_once(tmp_path: Path) -> None:
    callers = demand(tmp_path, "folder")
    for caller in callers.values():
        caller.join()
    assert [caller.exitcode for caller in callers.values()] == [0] * 16
    assert len(events(tmp_path, "start")) == len(events(tmp_path, "end")) == 1
    check_one_teacher(tmp_path, list(callers))


def test_trainers_killed_at_random_and_started_again_go_on_at_once(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    callers, chance = demand(tmp_path, "fsspec", epoch_s=0.25), random.Random(seed)
    for kill in range(3):
        name = kill_trainer(tmp_path, callers, kill, chance.random() * 0.35)
        callers[name] = process(tmp_path, name, "fsspec", 0.25, 30.0)  # the claim of its predecessor has not expired
    for caller in callers.values():
        caller.join()
    assert [caller.exitcode for caller in callers.values()] == [0] * 16
    first_epochs = [int(line.split()[2]) for line in events(tmp_path, "start")]
    assert len(first_epochs) == 4
    assert first_epochs == sorted(first_epochs)
    assert len(events(tmp_path, "end")) == 1
    check_one_teacher(tmp_path, list(callers))


@pytest.mark.parametrize("kind", ["fsspec", pytest.param("folder", marks=pytest.mark.slow)])
def test_a_dead_trainer_is_replaced_after_its_expiry(kind: str, tmp_path: Path) -> None:
    callers = demand(tmp_path, kind, epoch_s=0.2, expiry_s=2.0, count=3)
    killed = kill_trainer(tmp_path, callers, 0, None)
    for caller in callers.values():
        caller.join()
    (first, _), (second, epoch) = (line.split()[1:] for line in events(tmp_path, "start"))
    assert first == killed != second
    assert int(epoch) >= 1
    assert len(events(tmp_path, "end")) == 1
    check_one_teacher(tmp_path, [name for name in callers if name != killed])
    assert not [path for path in (tmp_path / "teachers" / "key").iterdir() if "state" in path.name]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_processes_killed_at_any_file_operation(tmp_path: Path) -> None:
    """Also while they ask, while they store and while they give back; a last caller finds what they left."""
    num_killed = 0
    for seed in range(12):
        directory = tmp_path / str(seed)
        callers = demand(directory, f"mortal {seed}", epoch_s=0.01, expiry_s=2.0, count=8)
        for caller in callers.values():
            caller.join()
        num_killed += sum(caller.exitcode == -signal.SIGKILL for caller in callers.values())
        (last,) = demand(directory, "fsspec", epoch_s=0.01, expiry_s=2.0, count=1).values()
        last.join()
        lines = events(directory)
        assert {caller.exitcode for caller in callers.values()} <= {0, -signal.SIGKILL}, f"seed {seed}: {lines}"
        assert last.exitcode == 0, f"seed {seed}: {lines}"
        assert len({line.split()[3] for line in lines if line.startswith("has")}) == 1, f"seed {seed}: {lines}"
        first = next(i for i, line in enumerate(lines) if line.startswith("has"))
        assert not [line for line in lines[first:] if line.startswith(("start", "end"))], f"seed {seed}: {lines}"
    assert num_killed > 12


def never(state: Path) -> TrainingResult:
    raise AssertionError("a stored teacher was trained again")


def trained(seed: int = 0) -> TrainingResult:
    return TrainingResult(network(seed), [{"loss": 0.5}], 2.0)


def test_a_stored_teacher_is_the_one_that_was_trained(store: TeacherStore) -> None:
    assert not store.has("key")
    first = get_or_train(store, "key", lambda state: trained(3), holder="trial")
    loaded = get_or_train(store, "key", never, holder="other trial")
    assert store.has("key")
    assert (first.seconds, loaded.seconds) == (2.0, 0.0)
    assert loaded.key == first.key == "key"
    images = torch.rand(5, 1, 4, 4)
    assert torch.equal(loaded.network(images), first.network(images))
    assert not any(module.training for module in loaded.network.modules())
    store.check()


def test_who_does_not_get_the_lease_is_told_at_once(store: TeacherStore) -> None:
    lease = store.acquire("key", "trial 1")
    assert isinstance(lease, Lease)
    assert store.acquire("key", "trial 2") == Held("trial 1")
    assert store.holder("key") == "trial 1"
    with pytest.raises(TimeoutError, match="still trained by trial 1"):
        get_or_train(store, "key", never, holder="trial 2", wait_s=0.0)
    store.train(lease, lambda state: trained())
    assert store.holder("key") is None
    assert isinstance(store.acquire("key", "trial 2"), Teacher)


def test_a_teacher_stored_while_this_one_asked_is_not_trained_again(
    store: TeacherStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_for_lease = Leases.acquire

    def overtaken(leases: Leases, key: str, holder: str) -> Lease | Held:
        monkeypatch.setattr(Leases, "acquire", ask_for_lease)
        get_or_train(store, "key", lambda state: trained(1), holder="trial 2")
        return ask_for_lease(leases, key, holder)

    monkeypatch.setattr(Leases, "acquire", overtaken)
    assert get_or_train(store, "key", never, holder="trial 1").seconds == 0.0
    assert store.holder("key") is None


def test_a_failed_training_leaves_its_state_and_no_teacher(store: TeacherStore) -> None:
    def fail(state: Path) -> TrainingResult:
        checkpoint.save_state(state, {"weight": torch.ones(1)}, {"epoch": 3})
        raise ArithmeticError("the loss is not finite")

    def go_on(state: Path) -> TrainingResult:
        assert checkpoint.load_state(state)[1]["epoch"] == 3
        return trained()

    with pytest.raises(ArithmeticError):
        get_or_train(store, "key", fail, holder="trial 1")
    assert not store.has("key")
    assert store.holder("key") is None
    store.check()
    assert get_or_train(store, "key", go_on, holder="trial 2").seconds == 2.0


def test_one_that_was_taken_for_dead_keeps_the_teacher_that_is_there(store: TeacherStore) -> None:
    lease = store.acquire("key", "trial")
    assert isinstance(lease, Lease)

    def overtaken(state: Path) -> TrainingResult:
        get_or_train(store, "key", lambda state: trained(1), holder="trial")  # the same name: takes over
        return trained(2)

    late = store.train(lease, overtaken)
    assert late.seconds == 2.0
    for teacher in (late, store.load("key")):
        assert checkpoint.weights_sha256(teacher.network) == checkpoint.weights_sha256(network(1))


def test_a_store_is_a_folder_or_a_uri(tmp_path: Path) -> None:
    get_or_train(TeacherStore.of(tmp_path), "key", lambda state: trained(), holder="trial")
    assert TeacherStore.of(str(tmp_path)).has("key")
    assert TeacherStore.of(tmp_path.as_uri()).has("key")
    with pytest.raises(UserError, match="nowhere://teachers is no storage") as error:
        TeacherStore.of("nowhere://teachers")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *product((checkpoint.WEIGHTS, checkpoint.NETWORK), ("cut", "flipped", "gone")),
        *product(("teacher.json",), ("cut", "flipped")),  # without it there is no teacher
    ],
)
def test_a_damaged_teacher_is_refused_and_not_trained_over(file: str, damage: str, tmp_path: Path) -> None:
    store = TeacherStore.of(tmp_path)
    get_or_train(store, "key", lambda state: trained(), holder="trial")
    (path,) = (tmp_path / "key").rglob(file)
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        path.write_bytes(content[:middle] if damage == "cut" else flipped)
    for refused in (store.check, lambda: get_or_train(store, "key", never, holder="trial")):
        with pytest.raises(CorruptCheckpointError, match=f"{tmp_path}/key is damaged.*delete it"):
            refused()


def test_a_damaged_state_is_refused(store: TeacherStore) -> None:
    def fail(state: Path) -> TrainingResult:
        state.write_bytes(b"not what was written")
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        get_or_train(store, "key", fail, holder="trial")
    with pytest.raises(CorruptCheckpointError, match=r"key/state.safetensors is damaged.*delete it"):
        store.check()


def test_the_key_holds_everything_that_a_teacher_depends_on() -> None:
    config = TeacherConfig(epochs=2)
    keys = {
        teacher_key("data", THREAT, config),
        teacher_key("other data", THREAT, config),
        teacher_key("data", ThreatModel(epsilon="2/10"), config),
        teacher_key("data", THREAT, TeacherConfig(epochs=3)),
        teacher_key("data", THREAT, TeacherConfig(epochs=2, seed=1)),
        teacher_key("data", THREAT, TeacherConfig(epochs=2, network={"name": "mlp"})),
        teacher_key("data", THREAT, TeacherConfig(epochs=2, epsilon_factor=1.5)),
    }
    assert len(keys) == 7
    assert teacher_key("data", THREAT, TeacherConfig(epochs=2, batch_size=128)) == teacher_key("data", THREAT, config)
    assert teacher_key("data", ThreatModel(epsilon=0.1), config) == teacher_key("data", THREAT, config)
