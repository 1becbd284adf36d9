"""Whole files in any storage that `pyarrow.fs` reaches: a local folder, a network mount, an object store.

Used is only what all of them have: a file appears with its whole content once it is closed or moved, a move puts one
file over another, a listing shows every file that was there before it began and was not deleted meanwhile.

A storage behind a network may be away for a while. Each function here does something that may be done twice, and does
it again, at growing intervals, until `PATIENCE_S` are over; in `impatient()` it tries once.
"""

import errno
import functools
import hashlib
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar, cast

from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from search.artifacts.disk_space import StorageAwayError, is_full_disk
from search.studies.patience import interruptible

log = logging.getLogger(__name__)

PATIENCE_S = 300.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 20.0
# What no waiting mends, in the words of pyarrow's S3, Google and Azure.
_REFUSED = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID"
    r"|MISSING_AUTHENTICATION_TOKEN|EXPIRED_TOKEN|HTTP status 40[13]|UNAUTHENTICATED|PERMISSION_DENIED"
    r"|Bucket '[^']*' not found|AuthenticationFailed|AuthorizationFailure|ContainerNotFound"
)
# Of a local disk or a network, an error with another number says something about the file.
_PASSING = frozenset(
    {
        errno.ETIMEDOUT,
        errno.ECONNRESET,
        errno.ECONNREFUSED,
        errno.ECONNABORTED,
        errno.EPIPE,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.ENETDOWN,
        errno.ENOTCONN,
        errno.ESTALE,
        errno.EAGAIN,
        errno.EIO,
    }
)
# Storages in which a file is there once it is closed, and not before.
_WHOLE_ONCE_CLOSED = ("s3", "gcs", "abfs")

_P = ParamSpec("_P")
_S = TypeVar("_S")
_T = TypeVar("_T")
_patience_s: ContextVar[float | None] = ContextVar("patience_s", default=None)


class UnreachableError(StorageAwayError):
    """The storage does not answer, or refuses; the text is one line without a secret."""


@contextmanager
def impatient() -> Iterator[None]:
    """In this context, and this thread, a storage that does not answer is an error at once."""
    token = _patience_s.set(0.0)
    try:
        yield
    finally:
        _patience_s.reset(token)


def one_line(error: BaseException) -> str:
    """What a storage says is wrong, in one line of bearable length."""
    text = re.sub(r"\s*\(Request ID: [^)]*\)", "", " ".join(str(error).split()))
    return text if len(text) <= 300 else f"{text[:300]}..."


def _is_away(error: OSError) -> bool:
    """Whether it says something about the storage, not about a file in it or about the local disk."""
    return not is_full_disk(error) and (error.errno is None or error.errno in _PASSING)


def _patiently(
    function: Callable[Concatenate[_S, _P], _T],
) -> Callable[Concatenate[_S, _P], _T]:
    """The function, done again while the storage is away.

    Raises:
        UnreachableError: it stays away, or refuses.
    """

    @functools.wraps(function)
    def patient(filesystem: _S, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        if isinstance(filesystem, LocalFileSystem):
            return function(filesystem, *args, **kwargs)
        patience_s = _patience_s.get()
        until = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
        pause, told = _FIRST_PAUSE_S, False
        while True:
            try:
                return function(filesystem, *args, **kwargs)
            except OSError as error:
                if not _is_away(error):
                    raise
                if time.monotonic() >= until or _REFUSED.search(str(error)):
                    raise UnreachableError(one_line(error)) from error
                if not told and pause > 4 * _FIRST_PAUSE_S:
                    log.warning("storage of the artefacts is away, waiting for it: %s", one_line(error))
                    told = True
            with interruptible():
                time.sleep(min(pause, max(0.0, until - time.monotonic())))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    return cast(Callable[Concatenate[_S, _P], _T], patient)


@_patiently
def connected(uri: str) -> tuple[FileSystem, str]:
    """The storage behind an address, and the folder in it; of S3 it may be asked where the bucket is."""
    return cast(tuple[FileSystem, str], FileSystem.from_uri(uri))


@_patiently
def make_folder(filesystem: FileSystem, path: str) -> None:
    """Make a folder, where the storage has folders, with those above it."""
    filesystem.create_dir(path, recursive=True)


@_patiently
def exists(filesystem: FileSystem, path: str) -> bool:
    """Whether there is a file of that name."""
    return bool(filesystem.get_file_info(path).type == FileType.File)


@_patiently
def is_there(filesystem: FileSystem, path: str) -> bool:
    """Whether there is something of that name: a file, a folder or a bucket."""
    return bool(filesystem.get_file_info(path).type != FileType.NotFound)


@_patiently
def names(filesystem: FileSystem, folder: str, *, kind: FileType = FileType.File) -> list[str]:
    """The names of the files in a folder, sorted; none if there is no such folder, or it was made during the call."""
    try:
        found = filesystem.get_file_info(FileSelector(folder, allow_not_found=True))
    except (FileNotFoundError, NotADirectoryError):  # the second from fsspec, for one made during the call
        return []
    return sorted(info.base_name for info in found if info.type == kind)


@_patiently
def read(filesystem: FileSystem, path: str) -> bytes | None:
    """The content of a small file, or None if there is none."""
    try:
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())
    except FileNotFoundError:
        return None


@_patiently
def write(filesystem: FileSystem, path: str, content: bytes) -> None:
    """Write a small file into a folder that is there; a reader may see a part of it."""
    with filesystem.open_output_stream(path) as stream:
        stream.write(content)


@_patiently
def paths(filesystem: FileSystem, folder: str) -> dict[str, int]:
    """The files below a folder and their sizes, by their paths from there; none if there is no such folder."""
    try:
        found = filesystem.get_file_info(FileSelector(folder, allow_not_found=True, recursive=True))
    except (FileNotFoundError, NotADirectoryError):  # of a folder that was deleted during the call
        return {}
    start = len(folder.rstrip("/")) + 1
    return {info.path[start:]: info.size for info in found if info.type == FileType.File}


@_patiently
def newest(filesystem: FileSystem, paths: Sequence[str]) -> float | None:
    """Unix time, by the storage's clock, at which the last of some files was written; None: none is there."""
    found = filesystem.get_file_info(list(paths))
    times = [info.mtime_ns / 1e9 for info in found if info.type == FileType.File and info.mtime_ns is not None]
    return max(times, default=None)


@_patiently
def publish(filesystem: FileSystem, path: str, content: bytes) -> None:
    """Write a small file that is there whole or not at all, by the shortest way that the storage has for it."""
    if filesystem.type_name in _WHOLE_ONCE_CLOSED:
        write(filesystem, path, content)
    else:
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        replace(filesystem, path, content)


@_patiently
def fill(filesystem: FileSystem, path: str, file: Path) -> tuple[int, str]:
    """Copy what a local file holds now to a new name in the storage, that nobody reads before it is whole.

    Returns:
        Its bytes, and their SHA-256.
    """
    if filesystem.type_name not in _WHOLE_ONCE_CLOSED:
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    digest = hashlib.sha256()
    with open(file, "rb") as source, filesystem.open_output_stream(path) as target:
        size = left = os.fstat(source.fileno()).st_size  # a journal may grow meanwhile
        while left > 0 and (part := source.read(min(left, 1 << 20))):
            digest.update(part)
            target.write(part)
            left -= len(part)
    _sync(filesystem, path)
    return size - left, digest.hexdigest()


@_patiently
def replace(filesystem: FileSystem, path: str, content: bytes) -> None:
    """Write a small file in one atomic step."""
    unfinished = _unfinished(path)
    write(filesystem, unfinished, content)
    _sync(filesystem, unfinished)
    filesystem.move(unfinished, path)


@_patiently
def upload(filesystem: FileSystem, file: Path, path: str) -> None:
    """Copy a local file into a folder of the storage, in one atomic step."""
    unfinished = _unfinished(path)
    with open(file, "rb") as source, filesystem.open_output_stream(unfinished) as target:
        shutil.copyfileobj(source, target, 1 << 20)
    _sync(filesystem, unfinished)
    filesystem.move(unfinished, path)


@_patiently
def download(filesystem: FileSystem, path: str, file: Path) -> bool:
    """Copy a file of the storage to a local one; False if there is none."""
    try:
        with filesystem.open_input_stream(path) as source, open(file, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except FileNotFoundError:
        file.unlink(missing_ok=True)
        return False
    return True


@_patiently
def remove(filesystem: FileSystem, path: str) -> None:
    """Delete a file, if it is there."""
    with suppress(FileNotFoundError):
        filesystem.delete_file(path)


def remove_folder(filesystem: FileSystem, path: str) -> None:
    """Delete a folder that nobody needs, and whatever is in it, if the storage has folders; says nothing."""
    with suppress(OSError):
        filesystem.delete_dir(path)


def _unfinished(path: str) -> str:
    return f"{path}.{uuid.uuid4().hex}.unfinished"


def _sync(filesystem: FileSystem, path: str) -> None:
    """A local file survives a power failure only once it is flushed; other storages flush on closing."""
    if isinstance(filesystem, LocalFileSystem):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
