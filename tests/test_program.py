"""Exported programs: every layer kind, any batch, the same bits, and nothing of the machine that wrote them."""

import copy
import errno
import io
import os
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from ccdist.activations import ACTIVATIONS
from ccdist.networks import _LAYER_FIELDS, ARCHITECTURES, Network, Normalize, Residual, build_network
from ccdist.program import export_program, save_program
from tracking.program_check import copy_program

pytestmark = pytest.mark.timeout(60)  # the first export imports a second's worth of PyTorch

SHAPE = (3, 8, 8)
FLAT = [nn.Flatten(), nn.Linear(3 * 8 * 8, 6)]
# Every kind of layer that a stored network may be made of, each with options that are not PyTorch's own.
LAYERS: dict[str, list[nn.Module]] = {
    "conv2d": [nn.Conv2d(3, 6, 3, 2, 1, dilation=2, groups=3, bias=False), nn.ReLU(), nn.Flatten()],
    "linear": [nn.Flatten(), nn.Linear(192, 6, bias=False)],
    "batch_norm1d": [*FLAT, nn.BatchNorm1d(6, eps=1e-2)],
    "batch_norm2d": [nn.BatchNorm2d(3, affine=False), nn.Flatten()],
    "relu": [*FLAT, nn.ReLU()],
    "leaky_relu": [*FLAT, nn.LeakyReLU(0.3)],
    "tanh": [*FLAT, nn.Tanh()],
    "sigmoid": [*FLAT, nn.Sigmoid()],
    "gelu": [*FLAT, nn.GELU("tanh")],
    "flatten": [nn.Flatten(2), nn.Linear(64, 2), nn.Flatten(1)],
    "avg_pool2d": [nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), nn.Flatten()],
    "identity": [nn.Identity(), nn.Flatten()],
    "normalize": [Normalize([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]), nn.Flatten()],
    "residual": [Residual(nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1), nn.Tanh())), nn.Flatten()],
    "residual with a shortcut": [Residual(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 4, 1, 2)), nn.Flatten()],
}


def network_of(layers: list[nn.Module]) -> Network:
    """The layers with random weights and statistics, and a head."""
    features = nn.Sequential(*layers).eval()
    size = features(torch.zeros(1, *SHAPE)).shape[1]
    network = Network(features, nn.Linear(size, 5))
    generator = torch.Generator().manual_seed(0)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return network


def check_same(path: Path, network: Network, shape: tuple[int, ...]) -> None:
    loaded = torch.export.load(path).module()
    for batch in (1, 2, 7):
        images = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(batch))
        logits = network(images)
        assert logits.std() > 0
        assert torch.equal(loaded(images), logits)


def test_every_kind_of_layer_has_a_case() -> None:
    assert _LAYER_FIELDS.keys() <= LAYERS.keys()


@pytest.mark.parametrize("name", LAYERS)
def test_a_program_computes_the_same_bits_for_any_batch(tmp_path: Path, name: str) -> None:
    """Also the one that is sent."""
    network = network_of(LAYERS[name])
    save_program(tmp_path / "model.pt2", network, SHAPE)
    copy_program(tmp_path / "model.pt2", tmp_path / "sent.pt2", SHAPE)
    for path in (tmp_path / "model.pt2", tmp_path / "sent.pt2"):
        check_same(path, network, SHAPE)


@pytest.mark.parametrize(("name", "activation"), list(zip(ARCHITECTURES, [*ACTIVATIONS, "relu", "gelu"], strict=True)))
def test_the_networks_of_the_space_files(tmp_path: Path, name: str, activation: str) -> None:
    network = build_network(name, input_shape=SHAPE, num_classes=10, width=3, activation=activation)  # type: ignore[arg-type]
    save_program(tmp_path / "model.pt2", network, SHAPE)
    copy_program(tmp_path / "model.pt2", tmp_path / "sent.pt2", SHAPE)
    check_same(tmp_path / "sent.pt2", network, SHAPE)


@pytest.mark.parametrize("name", ["residual", "batch_norm1d", "batch_norm2d", "normalize"])
def test_a_kept_graph_with_other_weights_is_the_other_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    first, other = network_of(LAYERS[name]), copy.deepcopy(network_of(LAYERS[name]))
    save_program(tmp_path / "first.pt2", first, SHAPE, graphs=tmp_path / "graphs")
    with torch.no_grad():
        for value in other.state_dict().values():
            value += 1
    traced = export_program(other, SHAPE)
    monkeypatch.setattr(torch.export, "export", None)  # whoever traces fails
    save_program(tmp_path / "other.pt2", other, SHAPE, graphs=tmp_path / "graphs")
    check_same(tmp_path / "other.pt2", other, SHAPE)
    check_same(tmp_path / "first.pt2", first, SHAPE)
    loaded = torch.export.load(tmp_path / "other.pt2")
    assert loaded.graph_module.code == traced.graph_module.code
    assert loaded.state_dict.keys() == traced.state_dict.keys()
    assert all(torch.equal(loaded.state_dict[key], value) for key, value in traced.state_dict.items())
    (kept,) = (tmp_path / "graphs").iterdir()
    assert kept.stat().st_size < 100_000


def test_other_layers_have_another_graph(tmp_path: Path) -> None:
    """Of the same sizes, with an option or an order of their own."""
    variants = [
        nn.LeakyReLU(0.1),
        nn.LeakyReLU(0.2),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.BatchNorm1d(6),
        nn.BatchNorm1d(6, 0.1),
    ]
    for variant in variants:
        network = network_of([*FLAT, variant])
        save_program(tmp_path / "model.pt2", network, SHAPE, graphs=tmp_path / "graphs")
        check_same(tmp_path / "model.pt2", network, SHAPE)
    assert len(list((tmp_path / "graphs").iterdir())) == len(variants)


@pytest.mark.parametrize("content", [b"", b"not an archive"])
def test_a_damaged_graph_is_made_again(tmp_path: Path, content: bytes) -> None:
    network = network_of(LAYERS["relu"])
    for _ in range(2):
        save_program(tmp_path / "model.pt2", network, SHAPE, graphs=tmp_path / "graphs")
        (kept,) = (tmp_path / "graphs").iterdir()
        assert kept.stat().st_size > 1000
        kept.write_bytes(content)
    check_same(tmp_path / "model.pt2", network, SHAPE)


def test_processes_that_keep_the_same_graph_at_the_same_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, sync, others = network_of(LAYERS["relu"]), os.fsync, ["other.pt2"]

    def sync_while_another_writes(descriptor: int) -> None:
        while others:
            save_program(tmp_path / others.pop(), network, SHAPE, graphs=tmp_path / "graphs")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_while_another_writes)
    save_program(tmp_path / "model.pt2", network, SHAPE, graphs=tmp_path / "graphs")
    for name in ("model.pt2", "other.pt2"):
        check_same(tmp_path / name, network, SHAPE)
    assert len(list((tmp_path / "graphs").iterdir())) == 1


def test_a_kept_graph_does_not_depend_on_how_weights_lay_in_memory(tmp_path: Path) -> None:
    network = network_of([nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten()])
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, each in (("last", last), ("plain", network), ("last again", last)):
        save_program(tmp_path / name, each, SHAPE, graphs=tmp_path / "graphs")
        check_same(tmp_path / name, each, SHAPE)
    assert len(list((tmp_path / "graphs").iterdir())) == 1


def test_a_graph_whose_layers_share_weights_is_not_that_of_others(tmp_path: Path) -> None:
    shared = network_of([*FLAT, nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)])
    other = copy.deepcopy(shared)
    shared.features[4].weight = shared.features[2].weight
    for name, each in (("shared", shared), ("other", other), ("shared again", shared)):
        save_program(tmp_path / name, each, SHAPE, graphs=tmp_path / "graphs")
        check_same(tmp_path / name, each, SHAPE)


def test_the_same_network_is_the_same_file(tmp_path: Path) -> None:
    network = network_of(LAYERS["relu"])
    for name in ("traced", "one", "two"):
        save_program(tmp_path / name, network, SHAPE, graphs=tmp_path / "graphs")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_export_leaves_the_network_as_it_was() -> None:
    network = network_of(LAYERS["batch_norm1d"])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    program = export_program(network, SHAPE)
    with torch.no_grad():
        network.head.weight.zero_()
    assert program.state_dict["head.weight"].abs().sum() > 0  # its own weights
    assert all(parameter.requires_grad for parameter in network.parameters())
    del before["head.weight"]
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())


def test_a_network_in_train_mode_is_refused(tmp_path: Path) -> None:
    network = network_of(LAYERS["relu"])
    network.features[1].train()
    with pytest.raises(ValueError, match="train mode"):
        save_program(tmp_path / "model.pt2", network, SHAPE)
    assert list(tmp_path.iterdir()) == []


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    save_program(path, network_of(LAYERS["residual"]), SHAPE)
    with zipfile.ZipFile(path) as archive:
        for place in (os.fsencode(Path(torch.__file__).parent), os.fsencode(Path(__file__).parents[1])):
            assert [name for name in archive.namelist() if place in archive.read(name)] == []


def test_a_full_disk_leaves_no_file_and_says_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(bytes(data[:10]))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_room)
    with pytest.raises(OSError, match="No space left") as raised:
        save_program(tmp_path / "model.pt2", network_of(LAYERS["relu"]), SHAPE)
    assert raised.value.errno == errno.ENOSPC
    assert not (tmp_path / "model.pt2").exists()


def test_the_program_is_read_without_pickle() -> None:
    """No record but the example input is one that unpickling reads, and that holds tensors only."""
    content = io.BytesIO()
    torch.export.save(export_program(network_of(LAYERS["conv2d"]), SHAPE), content)
    with zipfile.ZipFile(content) as archive:
        pickled = [name for name in archive.namelist() if name.endswith(".pt")]
        for name in pickled:
            torch.load(io.BytesIO(archive.read(name)), weights_only=True)
        configs = [archive.read(name) for name in archive.namelist() if name.endswith("_config.json")]
    assert pickled
    assert configs
    assert not any(b'"use_pickle": true' in config for config in configs)
