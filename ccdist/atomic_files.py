"""Files that hold either all of what is written or what they held before, whenever the process dies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def write_text(path: Path, text: str) -> None:
    """Write a text file in one atomic step.

    Raises:
        OSError: with the path, also where the system does not name one.
    """
    with _unfinished(path) as unfinished:
        unfinished.write_text(text)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file in one atomic step; raises as `write_text` does."""
    with _unfinished(path) as unfinished:
        unfinished.write_bytes(content)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file in one atomic step; raises as `write_text` does."""
    with _unfinished(path) as unfinished:
        pq.write_table(table, unfinished, compression="zstd")


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """A file beside the path, moved there once it is complete."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.unlink(missing_ok=True)  # a killed writer's, or a link that somebody else has laid there
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or " ".join(str(error).split()), str(path)) from error
