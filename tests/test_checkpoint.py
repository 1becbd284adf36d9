"""Networks and training states on disk: exact, atomic, and strict about damage."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import strategies
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from ccdist import checkpoint
from ccdist.activations import Activation
from ccdist.checkpoint import NETWORK, WEIGHTS, CorruptCheckpointError
from ccdist.networks import Network, build_network


def small(seed: int = 0, width: int = 4) -> Network:
    return build_network("cnn3", input_shape=(1, 8, 8), num_classes=3, width=width, seed=seed, mean=[0.3], std=[0.7])


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(drawn=strategies.networks())
def test_a_network_comes_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[Network, tuple[int, int, int], int]
) -> None:
    network, shape, seed = drawn  # float64: nothing may be rounded on the way
    folder = tmp_path_factory.mktemp("networks") / "one"
    checkpoint.save(folder, network, {"seed": seed})
    before = torch.get_rng_state()
    loaded = checkpoint.load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(loaded, network)
    x = torch.rand(2, *shape, dtype=torch.float64)
    assert torch.equal(loaded(x), network(x))
    assert not any(module.training for module in loaded.modules())
    assert checkpoint.load_description(folder)["metadata"] == {"seed": seed}


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_every_activation_comes_back(tmp_path: Path, name: str, activation: Activation) -> None:
    network = build_network(name, input_shape=(1, 8, 8), num_classes=3, width=2, activation=activation)
    checkpoint.save(tmp_path / "n", network)
    loaded = checkpoint.load(tmp_path / "n")
    x = torch.rand(2, 1, 8, 8)
    assert same(loaded, network)
    assert repr(loaded) == repr(network)
    assert torch.equal(loaded(x), network(x))


def test_special_values_survive(tmp_path: Path) -> None:
    network = small()
    with torch.no_grad():
        network.head.bias.copy_(torch.tensor([float("inf"), -0.0, 1e-45]))
    checkpoint.save(tmp_path / "n", network)
    bias = checkpoint.load(tmp_path / "n").head.bias.detach()
    assert torch.equal(bias.view(torch.int32), network.head.bias.detach().view(torch.int32))


def test_a_loaded_network_can_be_trained_and_saved_again(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "n", small())
    loaded = checkpoint.load(tmp_path / "n")
    loaded(torch.rand(2, 1, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())
    checkpoint.save(tmp_path / "n", loaded)
    assert same(checkpoint.load(tmp_path / "n"), small())


def test_saving_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    for seed in (0, 1):
        checkpoint.save(tmp_path / "deep" / "n", small(seed))
    assert same(checkpoint.load(tmp_path / "deep" / "n"), small(1))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["n"]
    assert sorted(path.name for path in (tmp_path / "deep" / "n").iterdir()) == [NETWORK, WEIGHTS]


def test_saving_replaces_where_folders_cannot_be_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_exchange", lambda one, other: False)
    for seed in (0, 1):
        checkpoint.save(tmp_path / "n", small(seed))
    assert same(checkpoint.load(tmp_path / "n"), small(1))
    assert [path.name for path in tmp_path.iterdir()] == ["n"]


def test_a_failed_save_keeps_what_was_there(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "n", small())
    with pytest.raises(TypeError, match="JSON serializable"):
        checkpoint.save(tmp_path / "n", small(1), {"bad": object()})
    with pytest.raises(TypeError, match="no stored form for Softplus"):
        checkpoint.save(tmp_path / "n", Network(nn.Sequential(nn.Softplus()), nn.Linear(1, 2)))
    assert same(checkpoint.load(tmp_path / "n"), small())
    assert [path.name for path in tmp_path.iterdir()] == ["n"]


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / NETWORK).read_text())
    change(content)
    (folder / NETWORK).write_text(json.dumps(content))


def flip_a_bit(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(bytes(data))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of the weights": (lambda f: flip_a_bit(f / WEIGHTS, -9), "is damaged"),
    "a bit of the header": (lambda f: flip_a_bit(f / WEIGHTS, 12), "is damaged"),
    "truncated weights": (lambda f: truncate(f / WEIGHTS), "is damaged"),
    "missing weights": (lambda f: (f / WEIGHTS).unlink(), "holds no usable network"),
    "truncated description": (lambda f: truncate(f / NETWORK), "cannot be read"),
    "missing description": (lambda f: (f / NETWORK).unlink(), "cannot be read"),
    "description of another kind": (lambda f: (f / NETWORK).write_text("[1]"), "cannot be read"),
    "newer format": (lambda f: edit(f, lambda c: c.update(format_version=2)), "format version 2; this program reads 1"),
    "no format": (lambda f: edit(f, lambda c: c.pop("format_version")), "cannot be read"),
    "no hash": (lambda f: edit(f, lambda c: c.pop("weights_sha256")), "holds no usable network"),
    "no layers": (lambda f: edit(f, lambda c: c.pop("network")), "holds no usable network"),
    "unknown layer": (
        lambda f: edit(f, lambda c: c["network"]["features"]["layers"][2].update(kind="x")),
        "layer kind",
    ),
    "other layers": (lambda f: edit(f, lambda c: c["network"]["features"]["layers"].pop(1)), "holds no usable network"),
    "other sizes": (
        lambda f: edit(f, lambda c: c["network"]["head"].update(out_features=4)),
        "holds no usable network",
    ),
    "no network": (lambda f: edit(f, lambda c: c.update(network=c["network"]["head"])), "holds no usable network"),
    "weights of another network": (
        lambda f: checkpoint.save(f / "x", small(1)) or (f / "x" / WEIGHTS).replace(f / WEIGHTS),
        "is damaged",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    folder = tmp_path / "n"
    checkpoint.save(folder, small())
    damage(folder)
    with pytest.raises(CorruptCheckpointError, match=message):
        checkpoint.load(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path / "nothing")


def test_a_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.safetensors"
    tensors = {"a": torch.randn(3, 4).T, "b": torch.get_rng_state(), "c": torch.tensor(2.0, dtype=torch.float64)}
    for epoch in (1, 2):
        checkpoint.save_state(path, tensors, {"epoch": epoch, "history": [{"loss": 0.1 + 0.2}]})
    loaded, metadata = checkpoint.load_state(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert (metadata["epoch"], metadata["history"]) == (2, [{"loss": 0.1 + 0.2}])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_state_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the one rename that puts the new state in place, the old one is whole; after a failure it stays."""
    path = tmp_path / "state.safetensors"
    checkpoint.save_state(path, {"a": torch.zeros(3)}, {"epoch": 1})
    old = path.read_bytes()

    def fail(source: Path, target: Path) -> None:
        assert target == path
        assert path.read_bytes() == old
        assert checkpoint.load_state(source)[1]["epoch"] == 2
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save_state(path, {"a": torch.ones(3)}, {"epoch": 2})
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        lambda path: flip_a_bit(path, 12),  # inside the header
        lambda path: flip_a_bit(path, path.stat().st_size - 3),  # inside a tensor
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: path.write_text("hello, this is not a state"),
        lambda path: checkpoint.save_state(path, {}, {"format_version": 2}),
    ],
    ids=["truncated", "header", "tensor", "empty", "missing", "text", "version"],
)
def test_a_damaged_state_is_refused(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    path = tmp_path / "state.safetensors"
    checkpoint.save_state(path, {"a": torch.randn(3)}, {"epoch": 1})
    damage(path)
    with pytest.raises(CorruptCheckpointError, match="state"):
        checkpoint.load_state(path)


WRITER = """
import sys
from pathlib import Path
import torch
from ccdist import checkpoint
from ccdist.networks import build_network

torch.set_num_threads(1)
folder, state = Path(sys.argv[1]) / "network", Path(sys.argv[1]) / "state.safetensors"
networks = [build_network("mlp", input_shape=(1, 8, 8), num_classes=10, seed=seed) for seed in range(2)]
number = 0
while True:
    network = networks[number % 2]
    checkpoint.save(folder, network, {"number": number})
    checkpoint.save_state(state, dict(network.state_dict()), {"number": number})
    number += 1
    print(number, flush=True)
"""


@pytest.mark.timeout(40)
def test_a_process_killed_while_saving_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """Killed at several moments of an endless row of saves; what is on disk is always one whole save."""
    networks = [build_network("mlp", input_shape=(1, 8, 8), num_classes=10, seed=seed) for seed in range(2)]
    for attempt in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(0.05 + 0.0131 * attempt)  # some saves later, at an arbitrary point of one
            writer.send_signal(signal.SIGKILL)
        number = checkpoint.load_description(tmp_path / "network")["metadata"]["number"]
        assert same(checkpoint.load(tmp_path / "network"), networks[number % 2])
        tensors, metadata = checkpoint.load_state(tmp_path / "state.safetensors")
        expected = networks[metadata["number"] % 2].state_dict()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        assert 0 <= number - metadata["number"] <= 1


def test_at_every_moment_of_a_save_the_folder_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without chance: look at the folder before each call that changes the file system."""
    folder = tmp_path / "n"
    checkpoint.save(folder, small(0))
    if not checkpoint._exchange(folder, folder) and not sys.platform.startswith("linux"):
        pytest.skip("this system cannot swap folders")
    seen: list[int] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.extend(seed for seed in range(2) if same(checkpoint.load(folder), small(seed)))
            result = function(*args, **kwargs)
            assert any(same(checkpoint.load(folder), small(seed)) for seed in range(2))
            return result

        return call

    for owner, name in ((checkpoint.os, "rename"), (checkpoint.shutil, "rmtree"), (checkpoint, "_exchange")):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    checkpoint.save(folder, small(1))
    assert seen == [0, 1]  # before the swap, and before the old folder is removed
