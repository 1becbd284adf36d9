"""Files that hold either all of what is written or what they held before, whenever the process dies."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write_text(path: Path, text: str) -> None:
    """Write a text file in one atomic step."""
    unfinished = _unfinished(path)
    unfinished.write_text(text)
    _put(unfinished, path)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file in one atomic step."""
    unfinished = _unfinished(path)
    pq.write_table(table, unfinished, compression="zstd")
    _put(unfinished, path)


def leaves(node: Any, path: str = "") -> dict[str, Any]:
    """Nested keys joined by dots, with their values."""
    if not isinstance(node, dict):
        return {path: node}
    inner = [leaves(value, f"{path}.{key}" if path else str(key)) for key, value in node.items()]
    return {key: value for each in inner for key, value in each.items()}


def differing_keys(there: dict[str, Any], asked: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value there, value asked) of every leaf that is not the same in two trees."""
    flat_there, flat_asked = leaves(there), leaves(asked)
    keys = dict.fromkeys([*flat_there, *flat_asked])
    pairs = [(key, flat_there.get(key), flat_asked.get(key)) for key in keys]
    return [(key, one, other) for key, one, other in pairs if one != other]


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.unfinished")


def _put(unfinished: Path, path: Path) -> None:
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)
