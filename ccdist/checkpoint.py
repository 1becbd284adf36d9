"""Networks and training states on disk: safetensors and JSON, written atomically, read strictly, no pickle.

A network is a folder of `weights.safetensors` and `network.json` (its layers, the hash of its weights and what
the caller wants to keep beside it). A training state is one safetensors file whose header holds the rest.
"""

import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ccdist.networks import Network, describe, from_description

FORMAT_VERSION = 1
WEIGHTS, NETWORK = "weights.safetensors", "network.json"


class CorruptCheckpointError(ValueError):
    """A checkpoint is damaged, incomplete or of an unknown format."""


class NewerFormatError(CorruptCheckpointError):
    """A file is whole, but of a format that a newer version of this program writes: nothing is to be deleted."""


def check_format(version: Any, of: Path, *, newest: int) -> None:
    """Refuse the format version that a file names, unless it is between 1 and the newest one that is known.

    Raises:
        NewerFormatError: it is larger.
        CorruptCheckpointError: it is no version.
    """
    if isinstance(version, int) and 1 <= version <= newest:
        return
    told = f"{of} has format version {version}; this program reads {newest if newest == 1 else f'1 to {newest}'}: "
    if isinstance(version, int) and version > newest:
        raise NewerFormatError(f"{told}use the version that wrote it, or a newer one")
    raise CorruptCheckpointError(f"{told}restore it from a copy")


def save(directory: Path, network: Network, metadata: dict[str, Any] | None = None) -> None:
    """Write a network so that the folder either holds all of it or what was there before.

    The folder is made beside its place and moved there, so a reader never sees half of it. One writer at a time:
    callers that share a folder hold a lock.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
        save_file(tensors, staging / WEIGHTS)
        content = {
            "format_version": FORMAT_VERSION,
            "network": describe(network),
            "weights_sha256": _sha256(staging / WEIGHTS),
            "metadata": metadata or {},
        }
        (staging / NETWORK).write_text(json.dumps(content, indent=1))
        for file in (staging / WEIGHTS, staging / NETWORK):
            _sync(file)
        _move(staging, directory)
        _sync(directory.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _move(staging: Path, directory: Path) -> None:
    """Put a complete folder in its place; the one that was there is removed after it, never before."""
    if not directory.exists():
        os.rename(staging, directory)
        return
    if not _exchange(staging, directory):  # not every file system can: a kill between two renames leaves neither
        aside = staging.with_name(f"{staging.name}.old")
        os.rename(directory, aside)
        os.rename(staging, directory)
        staging = aside
    shutil.rmtree(staging)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one atomic step (Linux' renameat2); False where that does not exist."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def load(directory: Path) -> Network:
    """The network stored in a folder, in eval mode, on the CPU, exact to the bit.

    Raises:
        CorruptCheckpointError: a file is missing, damaged, or does not fit the other.
    """
    content = load_description(directory)
    weights = Path(directory) / WEIGHTS
    try:
        if _sha256(weights) != content["weights_sha256"]:
            raise CorruptCheckpointError(f"{weights} is damaged: its hash is not the one in {NETWORK}")
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
            network = from_description(content["network"])
        network.load_state_dict(load_file(weights), strict=True, assign=True)
    except CorruptCheckpointError:
        raise
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise CorruptCheckpointError(f"{directory} holds no usable network: {_one_line(error)}") from error
    if not isinstance(network, Network):
        raise CorruptCheckpointError(f"{directory} holds a {type(network).__name__}, not a Network")
    return network


def load_description(directory: Path) -> dict[str, Any]:
    """The JSON beside the weights: format version, layers, metadata.

    Raises:
        CorruptCheckpointError: it is missing, damaged or of a newer format.
    """
    file = Path(directory) / NETWORK
    try:
        content = json.loads(file.read_text())
        version = content["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"{file} cannot be read: {_one_line(error)}") from error
    check_format(version, file, newest=FORMAT_VERSION)
    return dict(content)


def save_state(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a training state in one atomic step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    content = {"format_version": FORMAT_VERSION, "tensors_sha256": _tensors_sha256(stored), **metadata}
    header = {"state": json.dumps(content)}
    try:
        save_file(stored, staging, metadata=header)
        _sync(staging)
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and metadata of a training state.

    Raises:
        CorruptCheckpointError: the file is damaged or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()["state"])
        check_format(metadata["format_version"], path, newest=FORMAT_VERSION)
        tensors = load_file(path)
    except NewerFormatError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CorruptCheckpointError(
            f"training state {path} is damaged ({_one_line(error)}); delete it to start this training again"
        ) from error
    if metadata.get("tensors_sha256") != _tensors_sha256(tensors):
        raise CorruptCheckpointError(
            f"training state {path} is damaged (its tensors have another hash); delete it to start this training again"
        )
    return tensors, metadata


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(network: Network) -> str:
    """Hash of a network's weights and statistics: the identity of a teacher."""
    return _tensors_sha256({name: value.detach().cpu() for name, value in network.state_dict().items()})


def _tensors_sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
