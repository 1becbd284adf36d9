"""Teachers: one training for each recipe under any number of callers, whoever dies."""

import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch

from ccdist import checkpoint
from ccdist.checkpoint import CorruptCheckpointError
from ccdist.config import TeacherConfig, ThreatModel
from ccdist.networks import Network, build_network
from ccdist.training import TrainingResult
from search.teachers import get_or_train, teacher_key

# Real processes from a server that has imported all they need: a fork of pytest would carry its threads along.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["search.teachers"])
pytestmark = pytest.mark.timeout(60)

THREAT = ThreatModel(epsilon="1/10")


def network(seed: int = 0) -> Network:
    return build_network("mlp", input_shape=(1, 4, 4), num_classes=3, width=4, seed=seed).eval()


def note(directory: Path, text: str) -> None:
    with (directory / "events").open("a") as file:
        file.write(f"{text}\n")


def events(directory: Path) -> list[str]:
    return (directory / "events").read_text().splitlines()


def ask(directory: Path, name: str, start: Event, asked: Event) -> None:
    def train(state: Path) -> TrainingResult:
        note(directory, f"{name} trains")
        time.sleep(0.3)
        note(directory, f"{name} is done")
        return TrainingResult(network(), [{"loss": 1.0}], 5.0)

    asked.set()
    start.wait(30)
    teacher = get_or_train(directory / "teachers", "key", train)
    note(directory, f"{name} has {teacher.seconds:g}")


def test_two_processes_that_ask_at_once_train_once(tmp_path: Path) -> None:
    start, asked = PROCESSES.Event(), [PROCESSES.Event(), PROCESSES.Event()]
    callers = [PROCESSES.Process(target=ask, args=(tmp_path, f"p{i}", start, asked[i])) for i in range(2)]
    for caller in callers:
        caller.start()
    assert all(event.wait(30) for event in asked)
    start.set()
    for caller in callers:
        caller.join()
    first, second = ("p0", "p1") if events(tmp_path)[0] == "p0 trains" else ("p1", "p0")
    done = [f"{first} trains", f"{first} is done"]
    assert events(tmp_path)[:2] == done
    assert sorted(events(tmp_path)[2:]) == sorted([f"{first} has 5", f"{second} has 0"])
    assert [caller.exitcode for caller in callers] == [0, 0]


def train_until_killed(directory: Path, reached: Event) -> None:
    def train(state: Path) -> TrainingResult:
        checkpoint.save_state(state, {"weight": torch.ones(1)}, {"epoch": 3})
        reached.set()
        signal.pause()
        raise AssertionError

    get_or_train(directory, "key", train)


def test_a_killed_trainers_successor_goes_on_from_its_last_epoch(tmp_path: Path) -> None:
    reached = PROCESSES.Event()
    trainer = PROCESSES.Process(target=train_until_killed, args=(tmp_path, reached))
    trainer.start()
    assert reached.wait(30)
    assert trainer.pid is not None
    os.kill(trainer.pid, signal.SIGKILL)
    found: list[int] = []

    def go_on(state: Path) -> TrainingResult:
        found.append(checkpoint.load_state(state)[1]["epoch"])
        return TrainingResult(network(), [], 7.0)

    teacher = get_or_train(tmp_path, "key", go_on)  # waits for the death, and not longer
    trainer.join()
    assert found == [3]
    assert teacher.seconds == 7.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]  # the state is gone


def never(state: Path) -> TrainingResult:
    raise AssertionError("a stored teacher was trained again")


def test_a_stored_teacher_is_the_one_that_was_trained(tmp_path: Path) -> None:
    trained = get_or_train(tmp_path, "key", lambda state: TrainingResult(network(3), [{"loss": 0.5}], 2.0))
    loaded = get_or_train(tmp_path, "key", never)
    assert loaded.key == trained.key == "key"
    images = torch.rand(5, 1, 4, 4)
    assert torch.equal(loaded.network(images), trained.network(images))
    assert not any(module.training for module in loaded.network.modules())
    assert checkpoint.load_description(tmp_path / "key")["metadata"] == {"seconds": 2.0, "history": [{"loss": 0.5}]}


@pytest.mark.parametrize("file", [checkpoint.WEIGHTS, checkpoint.NETWORK])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_teacher_is_refused_and_not_trained_over(file: str, damage: str, tmp_path: Path) -> None:
    get_or_train(tmp_path, "key", lambda state: TrainingResult(network(), [], 2.0))
    path = tmp_path / "key" / file
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        path.write_bytes(content[:middle] if damage == "cut" else flipped)
    with pytest.raises(CorruptCheckpointError):
        get_or_train(tmp_path, "key", never)


def test_a_training_that_fails_leaves_no_teacher(tmp_path: Path) -> None:
    def fail(state: Path) -> TrainingResult:
        raise ArithmeticError("the loss is not finite")

    with pytest.raises(ArithmeticError):
        get_or_train(tmp_path, "key", fail)
    assert get_or_train(tmp_path, "key", lambda state: TrainingResult(network(), [], 1.0)).seconds == 1.0


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
