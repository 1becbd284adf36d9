"""A trial's program as it goes to MLflow: written anew of what was looked at, so that loading it runs nothing.

`torch.export.load` unpickles: weights and constants that are marked so, and the example input, which it reads without
restrictions when it cannot be read with them. It evaluates the sizes in the description of the graph, and whoever calls
the network executes its guards; both are text in Python. A file of that name that holds such things does not come from
a trial, but from somebody who can write to its folder, and they would be run by whoever loads the model from MLflow.
MLflow itself looks only for pickles, and only where MLFLOW_ALLOW_PICKLE_DESERIALIZATION is false.

So only what a trial's program consists of is sent: weights as plain bytes, and descriptions in which every text is a
name, or one of few forms. The example is the sender's own. That the file is written anew means that all readers find in
it what was looked at: PyTorch's reader of archives and Python's differ in what they make of a crooked one.
"""

import io
import json
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

# What `torch.export.save` writes for a network of this project.
_DESCRIPTIONS = re.compile(r"models/model\.json|data/(weights/model_weights|constants/model_constants)_config\.json")
_PLAIN = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|data/weights/weight_\d+", re.A
)
_EXAMPLE = "data/sample_inputs/model.pt"
_MOST_BYTES = 1 << 26  # of a description

# What a text in a description may be, by its key: nowhere a call.
_NAME, _NAMES = re.compile(r"[\w.]*", re.A), re.compile(r"[\w.,;+]*", re.A)
# Other kinds of trees import what they name.
_TREE = re.compile(r'(1|null|"(type|context|children_spec|builtins\.(tuple|dict)|null|\[\])"|[\[\]{}:, ])*')
_FORMS = {
    "target": re.compile(
        r"torch\.ops\.aten\.((add|sub|div)\.Tensor|flatten\.using_ints"
        r"|(linear|conv2d|batch_norm|avg_pool2d|relu|leaky_relu|tanh|sigmoid|gelu)\.default)"
    ),
    "expr_str": re.compile(r"s\d+|Symbol\('s\d+', positive=True, integer=True\)", re.A),
    "guards_code": re.compile(r"(?!)"),  # none at all
    "path_name": re.compile(r"(weight|tensor)_\d+", re.A),  # others are pickles by their names
    "nn_module_stack": _NAMES,
    "torch_fn": _NAMES,
    "torch_version": _NAMES,
    "in_spec": _TREE,
    "out_spec": _TREE,
}
_KINDS = {"as_bool", "as_expr", "as_float", "as_int", "as_ints", "as_none", "as_string", "as_tensor"}


class UnsafeProgramError(ValueError):
    """A file is no program of a network, or would run when it is loaded; the text says why in a few words."""


def copy_program(source: Path, target: Path, input_shape: Sequence[int]) -> None:
    """Write anew what a trial's program consists of.

    Args:
        input_shape: of one image, for the example.

    Raises:
        UnsafeProgramError: there is something else in it, or it cannot be read.
        OSError: the target cannot be written.
    """
    with open(source, "rb") as file:
        try:
            archive = zipfile.ZipFile(file)
            descriptions = _descriptions(archive, os.fstat(file.fileno()).st_size)
        except Exception as error:  # whatever somebody has put there
            told = str(error) if isinstance(error, UnsafeProgramError) else f"it cannot be read ({error})"
            raise UnsafeProgramError(" ".join(told.split())) from error
        with zipfile.ZipFile(target, "w") as new:
            for info in archive.infolist():
                record = _record(info)
                with new.open(f"archive/{record}", "w", force_zip64=True) as own:
                    if record == _EXAMPLE:
                        own.write(_example(input_shape))
                    elif record in descriptions:
                        own.write(descriptions[record])
                    else:
                        _copy(archive, info, own)


def _descriptions(archive: zipfile.ZipFile, size: int) -> dict[str, bytes]:
    """The records that say something, as they were understood; the others are plain bytes.

    Raises:
        UnsafeProgramError: one does not belong there.
    """
    records = [_record(info) for info in archive.infolist()]
    if len(set(records)) < len(records):
        raise UnsafeProgramError("two records have one name")
    if sum(info.file_size for info in archive.infolist()) > size:
        raise UnsafeProgramError("its records are larger than the file")
    found = {}
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise UnsafeProgramError("its records are packed")  # PyTorch packs none
    for info, record in zip(archive.infolist(), records, strict=True):
        with archive.open(info) as content:
            if _DESCRIPTIONS.fullmatch(record):
                if info.file_size > _MOST_BYTES:
                    raise UnsafeProgramError(f"{record} is too large")
                description = json.load(content)
                _check(description, record)
                found[record] = json.dumps(description).encode()
            elif record != _EXAMPLE and not _PLAIN.fullmatch(record):
                raise UnsafeProgramError(f"{record} is no record of a network")
    return found


def _check(part: Any, record: str, key: str = "") -> None:
    """Look at every name and text in a description."""
    if key == "use_pickle" and part is not False:
        raise UnsafeProgramError(f"{record} names a pickle")
    if isinstance(part, dict):
        for name, inner in part.items():
            if not _NAME.fullmatch(name) or (name.startswith("as_") and name not in _KINDS):
                raise UnsafeProgramError(f"{record} has a key {name[:60]!r}")
            _check(inner, record, name)
    elif isinstance(part, list):
        for inner in part:
            _check(inner, record, key)
    elif isinstance(part, str) and not _FORMS.get(key, _NAME).fullmatch(part):
        raise UnsafeProgramError(f"{record} has {part[:60]!r} as {key or 'a text'}")


def _record(info: zipfile.ZipInfo) -> str:
    """The name below the archive's own."""
    return info.filename.partition("/")[2]


def _copy(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: IO[bytes]) -> None:
    with archive.open(info) as content:
        while piece := _piece(content):
            target.write(piece)


def _piece(content: IO[bytes]) -> bytes:
    try:
        return content.read(1 << 20)
    except Exception as error:  # whatever somebody has put there
        raise UnsafeProgramError(f"it cannot be read ({error})") from error


def _example(input_shape: Sequence[int]) -> bytes:
    """The arguments of a call, as `torch.export.save` stores them."""
    import torch

    content = io.BytesIO()
    torch.save(((torch.zeros(2, *input_shape),), {}), content)
    return content.getvalue()
