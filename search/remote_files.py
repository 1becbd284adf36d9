"""Whole files in any storage that `pyarrow.fs` reaches: a local folder, a network mount, an object store.

Used is only what all of them have: a file appears with its whole content once it is closed or moved, a move puts one
file over another, a listing shows every file that was there before it began and was not deleted meanwhile.
"""

import os
import shutil
import uuid
from pathlib import Path

from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem


def exists(filesystem: FileSystem, path: str) -> bool:
    """Whether there is a file of that name."""
    return bool(filesystem.get_file_info(path).type == FileType.File)


def names(filesystem: FileSystem, folder: str, *, kind: FileType = FileType.File) -> list[str]:
    """The names of the files in a folder, sorted; none if there is no such folder, or it was made during the call."""
    try:
        found = filesystem.get_file_info(FileSelector(folder, allow_not_found=True))
    except (FileNotFoundError, NotADirectoryError):  # the second from fsspec, for one made during the call
        return []
    return sorted(info.base_name for info in found if info.type == kind)


def read(filesystem: FileSystem, path: str) -> bytes | None:
    """The content of a small file, or None if there is none."""
    try:
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())
    except FileNotFoundError:
        return None


def write(filesystem: FileSystem, path: str, content: bytes) -> None:
    """Write a small file into a folder that is there; a reader may see a part of it."""
    with filesystem.open_output_stream(path) as stream:
        stream.write(content)


def replace(filesystem: FileSystem, path: str, content: bytes) -> None:
    """Write a small file in one atomic step."""
    unfinished = _unfinished(path)
    write(filesystem, unfinished, content)
    _sync(filesystem, unfinished)
    filesystem.move(unfinished, path)


def upload(filesystem: FileSystem, file: Path, path: str) -> None:
    """Copy a local file into a folder of the storage, in one atomic step."""
    unfinished = _unfinished(path)
    with open(file, "rb") as source, filesystem.open_output_stream(unfinished) as target:
        shutil.copyfileobj(source, target, 1 << 20)
    _sync(filesystem, unfinished)
    filesystem.move(unfinished, path)


def download(filesystem: FileSystem, path: str, file: Path) -> bool:
    """Copy a file of the storage to a local one; False if there is none."""
    try:
        with filesystem.open_input_stream(path) as source, open(file, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except FileNotFoundError:
        file.unlink(missing_ok=True)
        return False
    return True


def remove(filesystem: FileSystem, path: str) -> None:
    """Delete a file, if it is there."""
    try:
        filesystem.delete_file(path)
    except FileNotFoundError:
        return


def _unfinished(path: str) -> str:
    return f"{path}.{uuid.uuid4().hex}.unfinished"


def _sync(filesystem: FileSystem, path: str) -> None:
    """A local file survives a power failure only once it is flushed; other storages flush on closing."""
    if isinstance(filesystem, LocalFileSystem):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
