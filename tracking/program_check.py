"""Whether an exported program can be loaded without anything in it being run.

`torch.export.load` unpickles: weights and constants that are marked so, and the example input, which it reads without
restrictions when it cannot be read with them. The example of a trial's program is a tensor, and the only pickle in it.
Whatever else a file of that name holds does not come from a trial, but from somebody who can write to its folder, and
would be run by whoever loads the model from MLflow. MLflow itself looks only where MLFLOW_ALLOW_PICKLE_DESERIALIZATION
is false.
"""

import io
import json
import pickletools
import re
import zipfile
from pathlib import Path

# What `torch.export.save` writes for a network of this project.
_RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|models/model\.json|data/weights/weight_\d+"
    r"|data/(weights|constants)/model_\w+_config\.json|data/sample_inputs/model\.pt"
)
_EXAMPLE = "data/sample_inputs/model.pt"
_MOST_BYTES = 1 << 26  # of a record that is read here
_OF_TENSORS = {"torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict"}
# The ways of a pickle to name what it calls, but for GLOBAL, whose names are looked at.
_CALLS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}


def wrong_record(path: Path) -> str | None:
    """What is wrong with the file of a program, in a few words; None: nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(set(names)) < len(names):
                return "two records have one name"
            for name in names:
                if wrong := _wrong(name.partition("/")[2], archive, name):
                    return f"{name} {wrong}"
    except Exception as error:  # whatever somebody has put there
        return f"it cannot be read ({' '.join(str(error).split())})"
    return None


def _wrong(record: str, archive: zipfile.ZipFile, name: str) -> str | None:
    if not _RECORDS.fullmatch(record):
        return "is no record of a network"
    if record != _EXAMPLE and not record.endswith("_config.json"):
        return None
    if archive.getinfo(name).file_size > _MOST_BYTES:
        return "is too large"
    if record.endswith("_config.json"):
        entries = json.loads(archive.read(name))["config"].values()
        if any(
            entry["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"])
            for entry in entries
        ):
            return "names a pickle"
        return None
    return None if _is_of_tensors(archive.read(name)) else "is a pickle of more than tensors"


def _is_of_tensors(example: bytes) -> bool:
    """Whether unpickling a file of `torch.save` calls nothing but what makes tensors; nothing is unpickled for that."""
    with zipfile.ZipFile(io.BytesIO(example)) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith(".pkl")]
        if len(set(names)) < len(names) or pickles != [f"{names[0].partition('/')[0]}/data.pkl"]:
            return False
        calls = [(code.name, argument) for code, argument, _ in pickletools.genops(archive.read(pickles[0]))]
    return all(name not in _CALLS and (name != "GLOBAL" or argument in _OF_TENSORS) for name, argument in calls)
