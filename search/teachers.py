"""Teachers by content hash: each recipe is trained once, whoever asks on whatever node, and stored whole or not at all.

A store is a folder of any storage that `pyarrow.fs` reaches. In a key's folder:

    teacher.json       written last, in one step: the folder that holds the teacher, and the hashes of its files
    ID/                a network as `ccdist.checkpoint` writes it; one that teacher.json does not name is a leftover
                       of a process that died while it stored the teacher
    state.safetensors  how far the training came
    *.claim, *.beat    the lease of the one that trains (`search.artifacts.leases`)
"""

import hashlib
import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pyarrow import ArrowException
from pyarrow.fs import FileSystem, FileType, LocalFileSystem

from ccdist import checkpoint
from ccdist.checkpoint import CorruptCheckpointError, NewerFormatError
from ccdist.config import TeacherConfig, ThreatModel, fingerprint
from ccdist.networks import Network
from ccdist.training import TrainingResult
from search.artifacts import remote_files
from search.artifacts.leases import EXPIRY_S, Held, Lease, Leases
from search.artifacts.periodic import repeated
from search.errors import UserError

# Raised when teacher training changes what it computes: older teachers are then no longer the same recipe.
RECIPE_VERSION = 1
# How much of a training a dead node may take with it, where its state is copied to the storage.
STATE_INTERVAL_S = 30.0
POLL_S = 0.5

_MARK, _STATE = "teacher.json", "state.safetensors"
_FILES = (checkpoint.WEIGHTS, checkpoint.NETWORK)

# Trains a teacher, going on from the state file if it exists.
TrainTeacher = Callable[[Path], TrainingResult]


@dataclass(frozen=True)
class Teacher:
    """A teacher, and the seconds that this call spent to train it: 0 when it was there."""

    network: Network
    key: str
    seconds: float


def teacher_key(data_fingerprint: str, threat: ThreatModel, config: TeacherConfig) -> str:
    """Hash of all that a teacher depends on."""
    return fingerprint(
        {
            "data": data_fingerprint,
            "threat": threat.model_dump(mode="json"),
            "teacher": config.model_dump(mode="json"),
            "version": RECIPE_VERSION,
        }
    )


class TeacherStore:
    """The teachers below one folder of a storage.

    Args:
        filesystem: the storage; its listings are fresh (an fsspec file system is made without a listings cache).
        root: the folder in it.
        expiry_s: seconds without a heartbeat after which one that trains counts as dead; equal for all processes.
        state_interval_s: seconds between copies of a training's state to a storage that is no folder.
    """

    def __init__(
        self,
        filesystem: FileSystem,
        root: str,
        *,
        expiry_s: float = EXPIRY_S,
        state_interval_s: float = STATE_INTERVAL_S,
    ) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._state_interval_s = state_interval_s
        self._leases = Leases(filesystem, self._root, expiry_s=expiry_s)

    @classmethod
    def of(cls, place: str | Path) -> "TeacherStore":
        """The store in a local folder, or at the URI of one in a storage.

        Raises:
            UserError: the URI names no storage.
            UnreachableError: it stays away.
        """
        if "://" not in str(place):
            return cls(LocalFileSystem(), str(Path(place).absolute()))
        try:
            return cls(*remote_files.connected(str(place)))
        except (ArrowException, OSError, ImportError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{place} is no storage that can be used ({reason}); give a folder or another URI"
            ) from None

    def has(self, key: str) -> bool:
        """Whether the teacher is there."""
        return remote_files.exists(self._filesystem, self._mark(key))

    def holder(self, key: str) -> str | None:
        """Who trains that teacher now; None: nobody who lives, so one that waited can be started again.

        A death shows after `expiry_s` of calls on this same object.
        """
        return self._leases.holder(key)

    def forget(self, key: str, holder: str) -> None:
        """Give back the lease of a dead process; another one goes on from its state.

        A storage that does not answer is no error: the lease then ends by itself.
        """
        with suppress(OSError, remote_files.UnreachableError), remote_files.impatient():
            self._leases.forget(key, holder)

    def load(self, key: str) -> Teacher:
        """The stored teacher, in eval mode, on the CPU, exact to the bit.

        Raises:
            CorruptCheckpointError: it is damaged, or not there.
        """
        try:
            return Teacher(self._read(key), key, 0.0)
        except NewerFormatError as error:
            raise NewerFormatError(f"teacher {self._folder(key)}: {error}") from error
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(
                f"teacher {self._folder(key)} is damaged: {error}; restore that folder from a copy, or delete it and "
                "the teacher is trained again"
            ) from error

    def acquire(self, key: str, holder: str) -> Teacher | Lease | Held:
        """The teacher if it is there, the lease to train it if nobody does, or who trains it now; never waits for it.

        Args:
            key: its `teacher_key`.
            holder: the name under which this process trains. A process that asks again under the name of a dead one
                takes over at once; that the other is dead is the caller's to know, for example by a lock.

        Raises:
            CorruptCheckpointError: the stored teacher is damaged.
        """
        if self.has(key):
            return self.load(key)
        lease = self._leases.acquire(key, holder)
        if isinstance(lease, Lease) and self.has(key):  # stored by one that gave its lease back a moment ago
            with lease:
                return self.load(key)
        return lease

    def train(self, lease: Lease, train: TrainTeacher) -> Teacher:
        """Train the teacher of a lease, from where a dead predecessor stopped, store it and give the lease back.

        Raises:
            CorruptCheckpointError: the predecessor's training state is damaged.
        """
        key = lease.resource
        with lease:
            with self._state(lease) as state:
                result = train(state)
            if not self.has(key):  # else this lease was lost meanwhile, and the other was faster
                self._store(key, result)
                return Teacher(result.network, key, result.seconds)
            return Teacher(self.load(key).network, key, result.seconds)

    def check(self) -> None:
        """Read every teacher and training state of the store.

        Raises:
            CorruptCheckpointError: one is damaged.
        """
        for key in remote_files.names(self._filesystem, self._root, kind=FileType.Directory):
            if self.has(key):
                self.load(key)
                continue
            with tempfile.TemporaryDirectory() as folder:
                state = Path(folder) / _STATE
                if remote_files.download(self._filesystem, self._state_file(key), state):
                    self._check_state(key, state)

    def _check_state(self, key: str, state: Path) -> None:
        try:
            checkpoint.load_state(state)
        except NewerFormatError as error:
            raise NewerFormatError(f"training state {self._state_file(key)}: {error}") from None
        except CorruptCheckpointError:
            raise CorruptCheckpointError(
                f"training state {self._state_file(key)} is damaged; delete it to start this training again"
            ) from None

    @contextmanager
    def _state(self, lease: Lease) -> Iterator[Path]:
        """Where a training keeps its state: in the store itself if that is a folder, else in a copy."""
        stored = self._state_file(lease.resource)
        if isinstance(self._filesystem, LocalFileSystem):
            yield Path(stored)
            return
        with tempfile.TemporaryDirectory(prefix="teacher-") as folder:
            state = Path(folder) / _STATE
            if remote_files.download(self._filesystem, stored, state):
                self._check_state(lease.resource, state)
            copied = _version(state)

            def copy() -> None:
                nonlocal copied
                version = _version(state)
                if version != copied and not lease.lost:
                    remote_files.upload(self._filesystem, state, stored)
                    copied = version

            with repeated(copy, self._state_interval_s):
                yield state

    def _store(self, key: str, result: TrainingResult) -> None:
        """Store a teacher so that it is there whole or not at all: its files under a new name, then the mark."""
        name = uuid.uuid4().hex
        target = f"{self._folder(key)}/{name}"
        remote_files.make_folder(self._filesystem, target)
        with tempfile.TemporaryDirectory(prefix="teacher-") as folder:
            local = Path(folder) / "teacher"
            checkpoint.save(local, result.network, {"seconds": result.seconds, "history": result.history})
            for file in _FILES:
                remote_files.upload(self._filesystem, local / file, f"{target}/{file}")
            mark = {"folder": name, "sha256": {file: _sha256(local / file) for file in _FILES}}
        remote_files.replace(self._filesystem, self._mark(key), json.dumps(mark, indent=1).encode())
        for file in remote_files.names(self._filesystem, self._folder(key)):
            if _STATE in file:  # what dead processes left unfinished of it, too
                remote_files.remove(self._filesystem, f"{self._folder(key)}/{file}")

    def _read(self, key: str) -> Network:
        content = remote_files.read(self._filesystem, self._mark(key)) or b""
        try:
            mark = json.loads(content)
            name, hashes = str(mark["folder"]), {file: str(mark["sha256"][file]) for file in _FILES}
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptCheckpointError(f"{_MARK} cannot be read") from error
        with tempfile.TemporaryDirectory(prefix="teacher-") as folder:
            for file, expected in hashes.items():
                local = Path(folder) / file
                if not remote_files.download(self._filesystem, f"{self._folder(key)}/{name}/{file}", local):
                    raise CorruptCheckpointError(f"{name}/{file} is missing")
                if _sha256(local) != expected:
                    raise CorruptCheckpointError(f"{name}/{file} has another hash than {_MARK} says")
            return checkpoint.load(Path(folder))

    def _folder(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _mark(self, key: str) -> str:
        return f"{self._folder(key)}/{_MARK}"

    def _state_file(self, key: str) -> str:
        return f"{self._folder(key)}/{_STATE}"


def get_or_train(
    store: TeacherStore, key: str, train: TrainTeacher, *, holder: str, wait_s: float | None = None
) -> Teacher:
    """The teacher of that key, trained now if nobody has; waits while another trains it, for ever if `wait_s` is None.

    If that one dies, one of those who wait goes on from its last stored state.

    Raises:
        CorruptCheckpointError: the stored teacher, or its training state, is damaged.
        TimeoutError: another still trains it after `wait_s` seconds.
    """
    until = None if wait_s is None else time.monotonic() + wait_s
    while True:
        found = store.acquire(key, holder)
        if isinstance(found, Teacher):
            return found
        if isinstance(found, Lease):
            return store.train(found, train)
        if until is not None and time.monotonic() >= until:
            raise TimeoutError(f"teacher {key} is still trained by {found.holder} after {wait_s:g} s")
        time.sleep(POLL_S)


def _sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _version(file: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced; None if there is none."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns
