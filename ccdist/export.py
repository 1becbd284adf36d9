"""python -m ccdist.export MODEL --out DIR: a network and images as any VNN-COMP verifier reads them.

In the folder: `model.onnx`; `vnnlib/prop_INDEX.vnnlib` for each image, INDEX its position in its split;
`instances.csv`, a line `onnx,vnnlib,timeout` for each; `export.json`, what was exported. A misclassified image is
exported too: its own pixels are the counter-example, and the verifier should find it.

Exit codes: 0 it is written; 2 something asked for is wrong; 130 stopped by Ctrl-C; 143 by a termination signal.
"""

import argparse
import importlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ccdist import checkpoint, selection
from ccdist.bounds import UnsupportedLayerError, check_rules_describe
from ccdist.command_line import BAD_INPUT, INTERRUPTED, OK, TERMINATED, Parser, Terminated, place, refused, terminable
from ccdist.networks import Network, Normalize, Residual
from ccdist.selection import Selection
from ccdist.vnnlib import robustness_property

MODEL_FILE, INSTANCES_FILE, DESCRIPTION_FILE = "model.onnx", "instances.csv", "export.json"
PROPERTIES_FOLDER = "vnnlib"
INPUT_NAME, OUTPUT_NAME = "X", "Y"
# Old enough for the readers of VNN-COMP's tools, new enough for every operator of the table below.
OPSET, IR_VERSION = 13, 7
# The written network computes in another order than PyTorch: allowed difference of logits, relative to their size.
LOGIT_TOLERANCE = 1e-5


class ExportError(ValueError):
    """Something cannot be exported; one line says what and what to do."""


# ---- network -> ONNX graph -------------------------------------------------------------------------------------------


@dataclass
class _Graph:
    """Nodes and constants of an ONNX graph as they are added; names of values are those of the layers."""

    onnx: Any
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)

    def constant(self, name: str, value: Tensor) -> str:
        self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(value.detach().numpy()), name))
        return name

    def node(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name


@dataclass(frozen=True)
class _Value:
    """A value of the graph: its name, and its shape with one image."""

    name: str
    shape: torch.Size


# (graph, layer, what enters it, the layer's name) -> the name of its output
Rule = Callable[[_Graph, Any, _Value, str], str]


def _normalize(graph: _Graph, layer: Normalize, x: _Value, name: str) -> str:
    mean, std = (graph.constant(f"{name}.{key}", getattr(layer, key).unsqueeze(0)) for key in ("mean", "std"))
    return graph.node("Div", [graph.node("Sub", [x.name, mean], f"{name}/centered"), std], name)


def _linear(graph: _Graph, layer: nn.Linear, x: _Value, name: str) -> str:
    if len(x.shape) != 2:
        raise UnsupportedLayerError(f"no ONNX rule for Linear at {name} on values of shape {tuple(x.shape)}; flatten")
    parameters = [graph.constant(f"{name}.{key}", value) for key, value in layer.named_parameters()]
    return graph.node("Gemm", [x.name, *parameters], name, transB=1)


def _conv2d(graph: _Graph, layer: nn.Conv2d, x: _Value, name: str) -> str:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise UnsupportedLayerError(
            f"no ONNX rule for Conv2d at {name} with padding_mode={layer.padding_mode!r}, padding={layer.padding!r}; "
            "use zero padding given as numbers"
        )
    parameters = [graph.constant(f"{name}.{key}", value) for key, value in layer.named_parameters()]
    return graph.node(
        "Conv",
        [x.name, *parameters],
        name,
        kernel_shape=list(layer.kernel_size),
        strides=list(layer.stride),
        pads=[*layer.padding, *layer.padding],
        dilations=list(layer.dilation),
        group=layer.groups,
    )


def _batch_norm(graph: _Graph, layer: nn.BatchNorm1d | nn.BatchNorm2d, x: _Value, name: str) -> str:
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        raise UnsupportedLayerError(f"no ONNX rule for {type(layer).__name__} at {name} without running statistics")
    scale = torch.ones_like(mean) if layer.weight is None else layer.weight
    shift = torch.zeros_like(mean) if layer.bias is None else layer.bias
    values = {"weight": scale, "bias": shift, "running_mean": mean, "running_var": var}
    constants = [graph.constant(f"{name}.{key}", value) for key, value in values.items()]
    return graph.node("BatchNormalization", [x.name, *constants], name, epsilon=layer.eps)


def _relu(graph: _Graph, layer: nn.ReLU | nn.LeakyReLU, x: _Value, name: str) -> str:
    if layer.inplace:  # in PyTorch it overwrites what a shortcut still reads
        raise UnsupportedLayerError(f"no ONNX rule for {type(layer).__name__} in place at {name}; use inplace=False")
    if isinstance(layer, nn.LeakyReLU):
        return graph.node("LeakyRelu", [x.name], name, alpha=layer.negative_slope)
    return graph.node("Relu", [x.name], name)


def _tanh(graph: _Graph, _: nn.Tanh, x: _Value, name: str) -> str:
    return graph.node("Tanh", [x.name], name)


def _sigmoid(graph: _Graph, _: nn.Sigmoid, x: _Value, name: str) -> str:
    return graph.node("Sigmoid", [x.name], name)


def _gelu(graph: _Graph, layer: nn.GELU, x: _Value, name: str) -> str:
    """x (1 + s(x)) / 2, s = erf(x / sqrt(2)) or tanh(sqrt(2 / pi) (x + 0.044715 x^3)); Gelu came with opset 20."""

    def number(key: str, value: float) -> str:
        return graph.constant(f"{name}.{key}", torch.tensor(value))

    if layer.approximate == "none":
        scaled = graph.node("Div", [x.name, number("sqrt_two", math.sqrt(2))], f"{name}/scaled")
        s = graph.node("Erf", [scaled], f"{name}/erf")
    else:
        square = graph.node("Mul", [x.name, x.name], f"{name}/square")
        cubic = graph.node("Mul", [square, number("cubic", 0.044715)], f"{name}/cubic")
        factor = graph.node("Add", [cubic, number("linear", 1.0)], f"{name}/factor")
        inner = graph.node("Mul", [x.name, factor], f"{name}/inner")
        scaled = graph.node("Mul", [inner, number("sqrt_two_over_pi", math.sqrt(2 / math.pi))], f"{name}/scaled")
        s = graph.node("Tanh", [scaled], f"{name}/tanh")
    raised = graph.node("Add", [s, number("one", 1.0)], f"{name}/raised")
    halved = graph.node("Mul", [x.name, number("half", 0.5)], f"{name}/halved")
    return graph.node("Mul", [halved, raised], name)


def _flatten(graph: _Graph, layer: nn.Flatten, x: _Value, name: str) -> str:
    start, end = (dimension % len(x.shape) for dimension in (layer.start_dim, layer.end_dim))
    if start == 0:
        raise UnsupportedLayerError(f"no ONNX rule for Flatten at {name} from dimension 0, which joins images")
    if (start, end) == (1, len(x.shape) - 1):
        return graph.node("Flatten", [x.name], name, axis=1)
    shape = graph.constant(f"{name}.shape", torch.tensor([1, *torch.zeros(x.shape).flatten(start, end).shape[1:]]))
    return graph.node("Reshape", [x.name, shape], name)


def _avg_pool2d(graph: _Graph, layer: nn.AvgPool2d, x: _Value, name: str) -> str:
    def pair(value: Any) -> list[int]:
        return [value, value] if isinstance(value, int) else list(value)

    kernel, stride, padding = pair(layer.kernel_size), pair(layer.stride), pair(layer.padding)
    floored = [(x.shape[axis - 2] + 2 * padding[axis] - kernel[axis]) // stride[axis] + 1 for axis in (0, 1)]
    if list(layer(torch.zeros(x.shape)).shape[-2:]) != floored:  # what PyTorch and ONNX divide by there differs
        raise UnsupportedLayerError(f"no ONNX rule for AvgPool2d at {name} with a last window cut by ceil_mode=True")
    divisor = layer.divisor_override
    pooled = graph.node(
        "AveragePool",
        [x.name],
        name if divisor is None else f"{name}/mean",
        kernel_shape=kernel,
        strides=stride,
        pads=[*padding, *padding],
        count_include_pad=int(layer.count_include_pad or divisor is not None),
    )
    if divisor is None:
        return pooled
    return graph.node("Mul", [pooled, graph.constant(f"{name}.scale", torch.tensor(math.prod(kernel) / divisor))], name)


def _identity(graph: _Graph, _: nn.Identity, x: _Value, name: str) -> str:
    return x.name


ONNX_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    Normalize: _normalize,
    nn.ReLU: _relu,
    nn.LeakyReLU: _relu,
    nn.Tanh: _tanh,
    nn.Sigmoid: _sigmoid,
    nn.GELU: _gelu,
    nn.AvgPool2d: _avg_pool2d,
    nn.Flatten: _flatten,
    nn.Identity: _identity,
}


def _add(graph: _Graph, module: nn.Module, x: _Value, name: str) -> _Value:
    """Add the nodes of a module and all that it is made of."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        # Not named_children(), which leaves out a layer that stands in two places.
        for key, layer in module._modules.items():
            assert layer is not None
            x = _add(graph, layer, x, f"{name}.{key}")
        return x
    if isinstance(module, Residual) and type(module).forward is Residual.forward:
        body, short = (_add(graph, getattr(module, key), x, f"{name}.{key}") for key in ("body", "shortcut"))
        shape = torch.broadcast_shapes(body.shape, short.shape)
        return _Value(graph.node("Add", [body.name, short.name], name), shape)
    rule = ONNX_RULES.get(type(module))
    if rule is None:
        known = ", ".join(layer.__name__ for layer in ONNX_RULES)
        raise UnsupportedLayerError(f"no ONNX rule for {type(module).__name__} at {name}; layers with a rule: {known}")
    return _Value(rule(graph, module, x, name), module(torch.zeros(x.shape)).shape)


@torch.no_grad()
def onnx_model(network: Network, input_shape: tuple[int, int, int]) -> Any:
    """The network as an ONNX model of float32: X [1, C, H, W] with pixels in [0, 1] -> Y [1, K], its logits.

    One image at a time, which every verifier reads; normalisation and batch norm are nodes of the graph, so that it is
    the deployed network layer by layer.

    Args:
        network: on the CPU, in eval mode.
        input_shape: (C, H, W).

    Raises:
        ExportError: onnx is not installed, or the network is not in float32.
        UnsupportedLayerError: a layer has no rule.
    """
    onnx = _package("onnx")
    check_rules_describe(network)
    other = next((value.dtype for value in network.parameters() if value.dtype != torch.float32), None)
    if other is not None:
        raise ExportError(f"the network's weights are {other}; expected float32, in which it is written")
    graph = _Graph(onnx)
    features = _add(graph, network.features, _Value(INPUT_NAME, torch.Size((1, *input_shape))), "features")
    logits = _add(graph, network.head, features, "head")
    graph.nodes[-1].output[0] = OUTPUT_NAME  # the head's node is the last one
    kind = onnx.TensorProto.FLOAT
    content = onnx.helper.make_graph(
        graph.nodes,
        "network",
        [onnx.helper.make_tensor_value_info(INPUT_NAME, kind, [1, *input_shape])],
        [onnx.helper.make_tensor_value_info(OUTPUT_NAME, kind, list(logits.shape))],
        initializer=graph.constants,
    )
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model(content, opset_imports=[opset], ir_version=IR_VERSION, producer_name="ccdist")
    onnx.checker.check_model(model, full_check=True)
    return model


def onnx_logits(model: bytes, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
    """Logits of a serialised model by onnxruntime, image by image."""
    runtime = _package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    rows = [session.run([OUTPUT_NAME], {INPUT_NAME: image.numpy()})[0] for image in images.split(1)]
    return torch.from_numpy(np.concatenate(rows))


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ExportError(
            f"the package {name} is not installed; it comes with the extra export: pip install 'ccdist-search[export]'"
        ) from None


# ---- the folder ------------------------------------------------------------------------------------------------------


def export(chosen: Selection, folder: Path, *, timeout: float) -> None:
    """Write the network and the images of a selection, so that the folder either holds all of it or is not there.

    The written network is run once for each image: it must give the logits of the network in PyTorch.

    Args:
        folder: does not exist, or is empty.
        timeout: seconds for each image, as `instances.csv` tells the verifier.

    Raises:
        ExportError: the threat is no box, the folder is in use, a package is missing, or the logits differ.
        UnsupportedLayerError: a layer has no rule.
    """
    threat = chosen.threat
    if threat.norm != "linf":
        raise ExportError(f"the threat is {threat}, but VNN-LIB describes boxes only; give --norm linf and --epsilon")
    if not (math.isfinite(timeout) and timeout > 0):
        raise ExportError(f"--timeout {timeout}; expected a number of seconds above 0")
    if not all(bool(((part >= 0) & (part <= 1)).all()) for part in chosen.images.split(256)):
        raise ExportError("the images have pixels outside [0, 1]")
    channels, height, width = chosen.images.shape[1:]
    with _complete(folder) as unfinished:
        model = onnx_model(chosen.network, (channels, height, width)).SerializeToString()
        predictions = _checked_logits(model, chosen).argmax(1).tolist()
        (unfinished / MODEL_FILE).write_bytes(model)
        (unfinished / PROPERTIES_FOLDER).mkdir()
        instances = []
        for image, label, index in zip(chosen.images, chosen.labels.tolist(), chosen.indices, strict=True):
            file = f"{PROPERTIES_FOLDER}/prop_{index}.vnnlib"
            title = f"{chosen.data_name}, {chosen.split} image {index}, label {label}, {threat}"
            text = robustness_property(
                image, label, epsilon=threat.epsilon, num_classes=chosen.network.num_classes, title=title
            )
            (unfinished / file).write_text(text)
            instances.append(f"{MODEL_FILE},{file},{timeout:g}\n")
        (unfinished / INSTANCES_FILE).write_text("".join(instances))
        about = {
            "data": chosen.data_name,
            "data_fingerprint": chosen.data_fingerprint,
            "split": chosen.split,
            "threat": {"norm": threat.norm, "epsilon": str(threat.epsilon)},
            "weights_sha256": checkpoint.weights_sha256(chosen.network),
            "images": list(chosen.indices),
            "labels": chosen.labels.tolist(),
            "predictions": predictions,
        }
        (unfinished / DESCRIPTION_FILE).write_text(json.dumps(about))


@torch.no_grad()
def _checked_logits(model: bytes, chosen: Selection) -> Tensor:
    """Logits of the written network, once they are those of the network in PyTorch."""
    logits = torch.cat([chosen.network(part) for part in chosen.images.split(256)])
    written = onnx_logits(model, chosen.images)
    allowed = LOGIT_TOLERANCE * logits.abs().amax(1).clamp(min=1)
    misses = (written - logits).abs().amax(1)
    if not bool((misses <= allowed).all()):  # NaN is no agreement
        worst = int((misses / allowed).nan_to_num(nan=math.inf).argmax())
        raise ExportError(
            f"the written network is not the one given: at image {chosen.indices[worst]} its logits differ by "
            f"{float(misses[worst]):.2g}, allowed are {float(allowed[worst]):.2g}"
        )
    return written


@contextmanager
def _complete(folder: Path) -> Iterator[Path]:
    """A folder to write to, beside its place and moved there once all went well."""
    staging = None
    try:
        target = folder.resolve()
        if target.exists() and not target.is_dir():
            raise ExportError(f"--out {folder} is a file; choose a folder that does not exist or is empty")
        if target.exists() and any(target.iterdir()):
            raise ExportError(f"--out {folder} is not empty; choose another folder, or delete what is there")
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".export.", dir=target.parent))
        whole = staging / target.name  # one level deeper: mkdtemp's own folder is closed to everybody else
        whole.mkdir()
        yield whole
        os.rename(whole, target)
    except OSError as error:
        raise ExportError(f"--out {folder} cannot be written: {error.strerror}; choose another folder") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


# ---- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        args = _parser().parse_args(arguments)
        with terminable():
            chosen = selection.load(args)
            export(chosen, Path(args.out), timeout=args.timeout)
    except ValueError as error:  # what ccdist raises for a mistake of its user
        return refused(error, BAD_INPUT)
    except OSError as error:
        return refused(ExportError(f"{error.filename or 'a file'} cannot be read: {error.strerror}"), BAD_INPUT)
    except (KeyboardInterrupt, Terminated) as stop:
        print("stopped; nothing was written", file=sys.stderr)
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
    print(
        f"{len(chosen)} {chosen.split} images of {chosen.data_name}, {chosen.threat}: {args.out}/{MODEL_FILE}, "
        f"{args.out}/{PROPERTIES_FOLDER}, {args.out}/{INSTANCES_FILE}"
    )
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m ccdist.export",
        description="Write a network as ONNX and a robustness property in VNN-LIB for each image, for any VNN-COMP "
        "verifier. Its results are compared with ours by python -m ccdist.second_opinion.",
    )
    selection.add_arguments(parser)
    parser.add_argument("--out", metavar="DIR", type=place, required=True, help="a new or empty folder")
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=20.0, help="for each image, in instances.csv (default: 20)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
