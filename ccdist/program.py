"""A network as an exported program, which runs wherever PyTorch is, without this project.

The file is that of `torch.export.save`: an archive of the graph, in PyTorch's own operators, and of the weights as
plain bytes. The graph follows from the layers and the shape of the images alone. To trace it costs a process 1.5
seconds and 190 MB once, so it can be kept, and other weights be put beside it.

Shapes: `B` batch, `C H W` image, `K` classes.
"""

import copy
import hashlib
import io
import itertools
import json
import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from ccdist import atomic_files
from ccdist.networks import Network, describe

_WEIGHTS, _WEIGHTS_CONFIG = "data/weights/", "data/weights/model_weights_config.json"


def save_program(path: Path, network: Network, input_shape: Sequence[int], *, graphs: Path | None = None) -> None:
    """Write the program of a network in one atomic step; the network itself stays as it is.

    Args:
        input_shape: of one image, (C, H, W).
        graphs: a folder where graphs are kept, which several processes may use; None: it is traced.

    Raises:
        ValueError: the network is in train mode, where a forward pass means something else.
        OSError: the file cannot be written.
        Exception: whatever PyTorch raises for a network that it cannot trace.
    """
    _check_mode(network)
    if graphs is None:
        atomic_files.write_bytes(path, _archive(export_program(network, input_shape)))
        return
    kept = graphs / f"{_graph_key(network, input_shape)}.pt2"
    try:
        content = _with_weights(kept.read_bytes(), network.state_dict())
    except (FileNotFoundError, zipfile.BadZipFile, KeyError, ValueError):  # none yet, or a damaged one
        content = _archive(export_program(network, input_shape))
        _keep(kept, _with_weights(content, None))
    atomic_files.write_bytes(path, content)


def export_program(network: Network, input_shape: Sequence[int]) -> ExportedProgram:
    """The network on the CPU as a program of images [B, C, H, W], for any B, traced by PyTorch.

    Raises: as `save_program`.
    """
    _check_mode(network)
    own = copy.deepcopy(network).cpu().requires_grad_(False)
    for tensor in itertools.chain(own.parameters(), own.buffers()):
        tensor.data = tensor.data.contiguous()  # a program says how its weights lie in memory
    # Two images: PyTorch takes a batch of one for a constant.
    example = torch.zeros(2, *input_shape, dtype=next(own.parameters()).dtype)
    with torch.no_grad():
        program = torch.export.export(own, (example,), dynamic_shapes=({0: Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # where the source files lie on this machine
    return program


def _keep(kept: Path, content: memoryview) -> None:
    """Write a graph by a way of one's own: another process may be writing the same one at this moment."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=kept.parent) as own:
        atomic_files.write_bytes(Path(own) / kept.name, content)
        os.replace(Path(own) / kept.name, kept)


def _check_mode(network: Network) -> None:
    if any(module.training for module in network.modules()):
        raise ValueError("the network is in train mode; what is deployed is in eval mode: call network.eval()")


def _graph_key(network: Network, input_shape: Sequence[int]) -> str:
    """Equal for networks with the same graph."""
    tensors = {name: (str(value.dtype), list(value.shape)) for name, value in network.state_dict().items()}
    parts = [describe(network), list(input_shape), tensors, str(torch.__version__)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _archive(program: ExportedProgram) -> memoryview:
    # PyTorch's own writer would tell of a full disk without its error number.
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getbuffer()


def _with_weights(archive: bytes | memoryview, weights: dict[str, Tensor] | None) -> memoryview:
    """The archive of a program with other weights, or with none.

    Raises:
        ValueError: it is the program of other weights.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as new:
        root = old.namelist()[0].partition("/")[0]
        config = json.loads(old.read(f"{root}/{_WEIGHTS_CONFIG}"))["config"]
        if weights is not None and weights.keys() != config.keys():
            raise ValueError(f"the program has the weights {sorted(config)}; these are {sorted(weights)}")
        names = {f"{root}/{_WEIGHTS}{entry['path_name']}": name for name, entry in config.items()}
        if weights is not None and len(names) < len(config):
            raise ValueError("weights of the program are one and the same; those of another network may differ")
        for info in old.infolist():
            name = names.get(info.filename)
            if name is None:
                record = old.read(info)
            else:
                record = b"" if weights is None else _plain_bytes(weights[name])
            new.writestr(zipfile.ZipInfo(info.filename), record)  # not the name alone, which would add the time
    return content.getbuffer()


def _plain_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
