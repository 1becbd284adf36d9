"""python -m ccdist.export: the same logits from the written network, a whole folder, a line for each mistake."""

import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from vnnlib_reader import parse

from ccdist import checkpoint, export
from ccdist.activations import ACTIVATIONS
from ccdist.bounds import INTERVAL_RULES, UnsupportedLayerError
from ccdist.config import DataConfig
from ccdist.data import load_test_set, to_pixels
from ccdist.export import ONNX_RULES, ExportError, onnx_logits, onnx_model
from ccdist.networks import ARCHITECTURES, Network, Normalize, Residual, build_network

ROOT = Path(__file__).parent.parent
SHAPE = (3, 8, 8)
TOLERANCE = 1e-5  # two orders of the same float32 sums


def images(shape: tuple[int, int, int] = SHAPE, count: int = 4) -> torch.Tensor:
    return torch.rand((count, *shape), generator=torch.Generator().manual_seed(1))


def unsettled(network: Network) -> Network:
    """Batch norm as after a training: nothing in it is 0 or 1."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
                for name, values in (*module.named_parameters(), *module.named_buffers()):
                    if values.is_floating_point():
                        drawn = torch.rand(values.shape, generator=generator)
                        values.copy_(drawn + 0.5 if name in ("weight", "running_var") else drawn - 0.5)
    return network


def check_round_trip(network: Network, shape: tuple[int, int, int] = SHAPE) -> onnx.ModelProto:
    model = onnx_model(unsettled(network), shape)
    points = images(shape)
    with torch.no_grad():
        expected = network(points)
    assert float(expected.std()) > 1e-4  # logits that say something
    torch.testing.assert_close(onnx_logits(model.SerializeToString(), points), expected, rtol=TOLERANCE, atol=TOLERANCE)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gives_the_same_logits(name: str) -> None:
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    network = build_network(name, input_shape=SHAPE, num_classes=5, width=4, mean=mean, std=std, seed=1)
    check_round_trip(network)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_gives_the_same_logits(activation: Any) -> None:
    check_round_trip(build_network("cnn3", input_shape=SHAPE, num_classes=5, width=4, seed=1, activation=activation))


BEGINNINGS: dict[str, list[nn.Module]] = {
    "gelu by tanh": [nn.GELU(approximate="tanh")],
    "leaky relu": [nn.LeakyReLU(0.3)],
    "leaky relu that rises to the left": [nn.LeakyReLU(-0.2)],
    "grouped convolution": [nn.Conv2d(3, 6, 3, (2, 1), (0, 1), (1, 2), groups=3, bias=False)],
    "batch norm without weights": [nn.BatchNorm2d(3, affine=False, eps=0.01)],
    "pool": [nn.AvgPool2d(2)],
    "pool with padding": [nn.AvgPool2d((3, 2), stride=(2, 1), padding=(1, 0))],
    "pool that leaves the padding out": [nn.AvgPool2d(3, padding=1, count_include_pad=False)],
    "pool with a divisor": [nn.AvgPool2d(3, stride=1, padding=1, divisor_override=5)],
    "pool with ceil mode that changes nothing": [nn.AvgPool2d(2, ceil_mode=True)],
    "identity": [nn.Identity()],
    "partly flattened": [nn.Flatten(2), nn.Flatten(-2)],
    "flattened rows": [nn.Flatten(1, 2)],
    "nested": [nn.Sequential(nn.Sequential(nn.Tanh()), nn.Sigmoid())],
    "residual": [Residual(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()))],
    "residual in both branches": [Residual(nn.Conv2d(3, 2, 1), Residual(nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)))],
    "one normalisation for all channels": [Normalize([0.3], [0.7])],
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_every_layer_kind_gives_the_same_logits(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        begin = nn.Sequential(*BEGINNINGS[name], nn.Flatten()).eval()
        size = unsettled(Network(begin, nn.Linear(1, 1))).features(images()).shape[1]
        features = nn.Sequential(*begin, nn.Linear(size, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU())
        check_round_trip(Network(features, nn.Linear(6, 4)))


def test_a_layer_in_two_places_is_two_nodes() -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    model = check_round_trip(Network(nn.Sequential(shared, nn.ReLU(), shared, nn.Flatten()), nn.Linear(192, 3)))
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu", "Conv", "Flatten", "Gemm"]


def test_every_layer_with_an_interval_rule_has_one_here() -> None:
    assert set(INTERVAL_RULES) <= set(ONNX_RULES)


def test_one_input_one_output_and_normalisation_inside() -> None:
    network = build_network("cnn3", input_shape=SHAPE, num_classes=5, width=4, mean=[0.4] * 3, std=[0.2] * 3)
    model = onnx_model(network, SHAPE)
    (given,), (made,) = model.graph.input, model.graph.output
    sizes = [[each.dim_value for each in value.type.tensor_type.shape.dim] for value in (given, made)]
    assert sizes == [[1, 3, 8, 8], [1, 5]]
    assert [node.op_type for node in model.graph.node][:4] == ["Sub", "Div", "Conv", "BatchNormalization"]
    assert {weights.data_type for weights in model.graph.initializer} == {onnx.TensorProto.FLOAT}
    assert model == onnx_model(network, SHAPE)  # the same network is the same file


class _Shifted(nn.ReLU):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


class _Backward(nn.Sequential):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(-input)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.MaxPool2d(2), "no ONNX rule for MaxPool2d at features.0; layers with a rule: Linear"),
        (_Shifted(), "no ONNX rule for _Shifted at features.0"),
        (_Backward(nn.ReLU()), "no ONNX rule for _Backward at features.0"),
        (nn.ReLU(inplace=True), "no ONNX rule for ReLU in place at features.0"),
        (nn.Conv2d(3, 3, 3, padding="same"), "Conv2d at features.0 with padding_mode='zeros', padding='same'"),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.AvgPool2d(3, ceil_mode=True), "AvgPool2d at features.0 with a last window cut by ceil_mode"),
        (nn.BatchNorm2d(3, track_running_stats=False), "BatchNorm2d at features.0 without running statistics"),
        (nn.Flatten(0), "Flatten at features.0 from dimension 0"),
        (nn.Linear(8, 8), "Linear at features.0 on values of shape (1, 3, 8, 8)"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(layer: nn.Module, expected: str) -> None:
    network = Network(nn.Sequential(layer, nn.Flatten()), nn.Linear(192, 3))
    with pytest.raises(UnsupportedLayerError, match=re.escape(expected)):
        onnx_model(network, SHAPE)


def test_only_float32_is_written() -> None:
    network = build_network("mlp", input_shape=SHAPE, num_classes=3, width=4).double()
    with pytest.raises(ExportError, match=r"weights are torch\.float64; expected float32"):
        onnx_model(network, SHAPE)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    network = build_network("cnn3", input_shape=(1, 8, 8), num_classes=10, width=2, initialization="default", seed=3)
    recipe = {"data": {"name": "digits"}, "threat": {"norm": "linf", "epsilon": "2/255"}}
    checkpoint.save(folder, unsettled(network), {"recipe": recipe})
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line that the command answers with."""
    assert export.main([str(argument) for argument in arguments]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    assert line.startswith("error: ")
    return line


@pytest.mark.timeout(30)
def test_the_command_writes_a_folder_that_a_verifier_can_run(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    command = [sys.executable, "-W", "error", "-m", "ccdist.export", model, "--images", "5:25", "--out", out]
    done = subprocess.run([*command, "--timeout", "7.5"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert "20 test images of digits, linf 2/255" in done.stdout
    assert {path.name for path in out.parent.iterdir()} == {"out"}  # nothing unfinished is left
    assert {path.name for path in out.iterdir()} == {"model.onnx", "vnnlib", "instances.csv", "export.json"}
    assert len(list((out / "vnnlib").iterdir())) == 20

    test = load_test_set(DataConfig(name="digits"))
    pixels, network = to_pixels(test.images), checkpoint.load(model)
    about = json.loads((out / "export.json").read_text())
    wrong = 0
    for index, line in enumerate((out / "instances.csv").read_text().splitlines(), 5):
        onnx_file, vnnlib, timeout = line.split(",")
        assert (vnnlib, timeout) == (f"vnnlib/prop_{index}.vnnlib", "7.5")
        found = parse((out / vnnlib).read_text())
        stored = [Fraction(value, 255) for value in test.images[index].flatten().tolist()]
        centers = [(found.lower[name] + found.upper[name]) / 2 for name in found.inputs]
        assert all(
            abs(center - k) <= Fraction(1, 255) + Fraction(1, 10**9) for center, k in zip(centers, stored, strict=True)
        )
        (logits,) = onnx_logits((out / onnx_file).read_bytes(), pixels[index][None])
        torch.testing.assert_close(logits, network(pixels[index][None])[0], rtol=TOLERANCE, atol=TOLERANCE)
        misclassified = int(logits.argmax()) != int(test.labels[index])
        assert found.holds(stored, logits.tolist()) == misclassified
        assert about["predictions"][index - 5] == int(logits.argmax())
        wrong += misclassified
    assert 0 < wrong < 20  # a misclassified image is exported too
    assert about["weights_sha256"] == checkpoint.weights_sha256(network)
    assert about["images"] == list(range(5, 25))
    assert about["threat"] == {"norm": "linf", "epsilon": "2/255"}


def test_an_empty_folder_is_used_and_a_full_one_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    arguments = (model, "--images", "3", "--out", out)
    assert export.main([str(argument) for argument in arguments]) == 0
    capsys.readouterr()
    before = (out / "model.onnx").stat().st_mtime_ns
    assert f"--out {out} is not empty; choose another folder" in refused(capsys, *arguments)
    assert (out / "model.onnx").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (("--norm", "l2", "--epsilon", "1/2"), "the threat is l2 1/2, but VNN-LIB describes boxes only"),
        (("--timeout", "0"), "--timeout 0.0; expected a number of seconds above 0"),
        (("--timeout", "nan"), "--timeout nan"),
        (("--epsilon", "8"), "write 8/255 if that is what you mean"),
        (("--images", "900"), "--images 900 leaves no image"),
        (("--data", "digit"), "unknown --data 'digit'"),
        (("--images", "-3:"), "argument --images: expected one argument; see python -m ccdist.export --help"),
        (("--timeout", "soon"), "argument --timeout: invalid float value: 'soon'"),
        (("--out", ""), "argument --out: it is empty"),
    ],
)
def test_each_mistake_has_its_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: tuple[str, ...], expected: str
) -> None:
    assert expected in refused(capsys, model, "--images", ":2", "--out", tmp_path / "out", *extra)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in refused(capsys, model, "--images", "1", "--out", file)
    assert "cannot be written" in refused(capsys, model, "--images", "1", "--out", file / "out")
    assert "cannot be written: File name too long" in refused(capsys, model, "--images", "1", "--out", "x" * 300)
    assert "File name too long" in refused(capsys, "x" * 300, "--out", file / "out")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_names_the_extra(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    line = refused(capsys, model, "--images", "1", "--out", tmp_path / "out")
    assert f"the package {package} is not installed" in line
    assert "pip install 'ccdist-search[export]'" in line
    assert list(tmp_path.iterdir()) == []


def test_other_logits_are_never_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgotten(graph: Any, layer: nn.Module, x: Any, name: str) -> str:
        return str(x.name)

    monkeypatch.setitem(ONNX_RULES, nn.BatchNorm2d, forgotten)
    assert "the written network is not the one given" in refused(
        capsys, model, "--images", ":9", "--out", tmp_path / "out"
    )
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "robustness_property", interrupted)
    assert export.main([str(model), "--images", "1", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "stopped; nothing was written\n"
    assert os.listdir(tmp_path) == []
