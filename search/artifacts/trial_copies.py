"""Local copies of what an object store has of a trial, and the changes to them that go back there.

Code that trains, verifies and tells MLflow works on local files. Here they are brought (`pull`), and what has changed
is stored in one step (`Writer.push`). Files are replaced by renaming on either side, journals are only ever added to.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ccdist import atomic_files
from ccdist.checkpoint import CorruptCheckpointError
from search.artifacts import remote_files
from search.artifacts.manifests import GoneError, Manifest, StoredFiles, SupersededError, Version
from tracking.journal import STUDY_FILE, STUDY_JOURNAL

# The study's own files are one trial more, of a name that no trial has.
STUDY_KEY = "_study"
# What a study's tracking has accepted, for a driver on another machine.
SENT_FILE = "sent.json"
# Folders of a study beside its own files.
_FOLDERS = ("trials", "journal", "graphs", "copies", "manifests")
_ATTEMPTS = 20

Chosen = Callable[[str], bool]
Choice = Callable[[Manifest], Chosen]


def everything(_path: str) -> bool:
    return True


def nothing(_path: str) -> bool:
    return False


def is_state(path: str) -> bool:
    """Whether only a trial that goes on needs the file: training and verification states, rungs, seconds so far."""
    first, *rest = path.split("/")[2:] or [""]
    return first in ("state.safetensors", "rungs.json", "teacher_seconds") or (
        bool(rest) and first in ("stages", "verification")
    )


def is_visible(path: str) -> bool:
    """Whether a trial's end, its page or MLflow needs the file."""
    return not is_state(path)


def is_record(path: str) -> bool:
    """Whether it is of a trial's small files, without its networks."""
    return is_visible(path) and path.split("/")[2:3] not in (["student"], ["model"])


@dataclass(frozen=True)
class LocalFiles:
    """A trial's files below a study's local folder, or the study's own."""

    root: Path
    key: str

    def paths(self) -> list[str]:
        """The complete files that are there, by their paths from the study's folder; its journal is the last."""
        if self.key == STUDY_KEY:
            found = [path for path in self.root.glob("*") if path.is_file()]
            journals = [self.root / "journal" / name for name in (STUDY_FILE, SENT_FILE, STUDY_JOURNAL)]
        else:
            folder = self.root / "trials" / self.key
            found = [path for path in folder.rglob("*") if path.is_file() and path != folder / "lock"]
            journals = [self.journal]
        found = sorted(found) + [path for path in journals if path.is_file()]
        names = (path.relative_to(self.root).as_posix() for path in found)
        return [name for name in names if not _is_unfinished(name)]

    @property
    def journal(self) -> Path:
        return self.root / "journal" / f"{self.key}.jsonl"

    def owns(self, path: str) -> bool:
        """Whether a path of a manifest is one of this trial's: nothing else is written, whatever a store says."""
        parts = path.split("/")
        if self.key == STUDY_KEY:
            journal = len(parts) == 2 and parts[0] == "journal" and parts[1] in (STUDY_FILE, SENT_FILE, STUDY_JOURNAL)
            return journal or (len(parts) == 1 and parts[0] not in _FOLDERS)
        return parts == ["journal", self.journal.name] or (parts[:2] == ["trials", self.key] and len(parts) > 2)

    @property
    def _copied(self) -> Path:
        return self.root / "copies" / f"{self.key}.json"

    def copied(self) -> Manifest | None:
        """The version that was pulled last."""
        try:
            content = json.loads(self._copied.read_text())
            version = Version.of(f"{content['version']}.json")
            stored = json.dumps(content["manifest"]).encode()
            return None if version is None else Manifest.of(version, stored, str(self._copied))
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None  # none yet, or not to be read: everything is fetched again

    def not_copied(self) -> frozenset[str]:
        """The files that were here before any version was: whoever follows the store has no right to delete them."""
        if self.copied() is None:
            return frozenset(self.paths())
        found = json.loads(self._copied.read_text()).get("not_copied", [])
        return frozenset(path for path in found if isinstance(path, str)) if isinstance(found, list) else frozenset()

    def note_copied(self, manifest: Manifest) -> None:
        """Note which version the local files are a copy of."""
        content = {
            "version": str(manifest.version),
            "manifest": json.loads(manifest.to_json()),
            "not_copied": sorted(self.not_copied() - manifest.files.keys()),
        }
        self._copied.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write_text(self._copied, json.dumps(content))


def _is_unfinished(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/")) or path.endswith(".unfinished")


def pull(stored: StoredFiles, local: LocalFiles, choice: Choice) -> bool:
    """Bring the chosen files of the newest version, first the others, then the journal that names them.

    A local file of the trial that the version does not have is deleted, if it was there in an earlier one or came later
    than the first: somebody else's leftover. What was here before the first version is left alone.

    Returns:
        Whether the store has the trial; if not, local files stay as they are.

    Raises:
        CorruptCheckpointError: the store has something else than what was written there.
    """
    for _ in range(_ATTEMPTS):
        manifest = stored.newest()
        if manifest is None:
            return False
        try:
            _fetch(stored, local, manifest, choice(manifest))
        except GoneError as error:
            gone = str(error)
            continue  # replaced while it was read
        return True
    raise _lost(gone, stored.key)


def _lost(path: str, key: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{path} of trial {key} is named in the storage and is not there; restore it from a copy of the storage"
    )


def _fetch(stored: StoredFiles, local: LocalFiles, manifest: Manifest, wanted: Chosen) -> None:
    known = local.copied()
    if known is None:
        local.note_copied(Manifest(Version(0, 0, 0), {}))  # before anything is brought: what is here now, is its own
    before = {} if known is None else known.files
    paths = sorted(manifest.files, key=lambda path: (path.startswith("journal/"), path.endswith(STUDY_JOURNAL), path))
    for path in paths:
        if not local.owns(path):
            raise CorruptCheckpointError(f"the storage names {path!r} among the files of trial {local.key}")
        entry, file = manifest.files[path], local.root / path
        there = before.get(path) == entry and file.is_file() and file.stat().st_size == entry.size
        # One of another version is replaced whoever wants it: somebody else who follows the store may be reading it.
        if not there and (wanted(path) or file.exists()):
            stored.download(path, entry, file)
    kept = manifest.files.keys() | local.not_copied()
    for path in local.paths():
        if path not in kept:
            (local.root / path).unlink()
    local.note_copied(manifest)


@dataclass(frozen=True)
class _Signature:
    """What changes when a file is replaced or added to."""

    inode: int
    time_ns: int
    size: int

    @classmethod
    def of(cls, file: Path) -> "_Signature":
        status = file.stat()
        return cls(status.st_ino, status.st_mtime_ns, status.st_size)


@dataclass
class Writer:
    """The one who may change what the store has of a trial, until somebody begins with a greater number.

    Args:
        number: (epoch, start) of `search.artifacts.manifests.Version`.
        wanted: the files that this writer needs here; the others stay in the store as they are.
    """

    stored: StoredFiles
    local: LocalFiles
    number: tuple[int, int]
    wanted: Chosen = everything
    _manifest: Manifest = field(init=False)
    _known: dict[str, _Signature] = field(init=False, default_factory=dict)
    _last: Version = field(init=False)  # that was tried: a storage may have stored what it reported as failed
    _is_tidy: bool = field(init=False, default=True)

    def begin(self, *, fetch: bool = True) -> bool:
        """Take the trial over, and bring the wanted files; returns whether the store has something of it.

        Args:
            fetch: else the local files are what it is to have from now on; those that are not here stay in the store.

        Raises:
            SupersededError: a later writer has it, or one with this number was there before.
            CorruptCheckpointError: the store has something else than what was written there.
        """
        claim = Version(*self.number, 0)
        self._check_newest(or_equal=True)
        self.stored.publish(Manifest(claim, {}))
        # From now on nobody reads what the one before stores. What it stored until now is not deleted by it any more.
        before = self.stored.newest(self.number)
        self._manifest = Manifest(claim.next(), {} if before is None else before.files)
        self.stored.publish(self._manifest)
        self._check_newest()
        self._last = self._manifest.version
        if fetch:
            self._fetch()
        self._clean()
        return bool(self._manifest.files)

    def _fetch(self) -> None:
        try:
            _fetch(self.stored, self.local, self._manifest, self.wanted)
        except GoneError as error:
            raise _lost(str(error), self.stored.key) from error
        self._known = {path: _Signature.of(self.local.root / path) for path in self.local.paths()}

    def push(self, *, without: Chosen = nothing) -> bool:
        """Store what has changed since the last time, in one step; nobody may write the local files meanwhile.

        Args:
            without: files that the trial has no more, of those that were left in the store.

        Returns:
            Whether something had changed.

        Raises:
            SupersededError: a later writer has the trial; what counts in the store is not changed.
        """
        before, found = self._manifest, {}
        for path in self.local.paths():
            found[path] = _Signature.of(self.local.root / path)
        gone = self._known.keys() - found.keys()
        files = {path: each for path, each in before.files.items() if path not in gone and not without(path)}
        changed = [path for path, signature in found.items() if self._known.get(path) != signature]
        if not changed and files == before.files:
            return False
        self._check_newest()
        was_tidy, self._is_tidy = self._is_tidy, False
        version = self._last = self._last.next()
        for path in changed:
            files[path] = self.stored.upload(version, path, self.local.root / path)
        self._manifest = Manifest(version, files)
        self.stored.publish(self._manifest)
        self._known = found
        self._check_newest()
        with suppress(remote_files.UnreachableError):  # it is stored; the next push, or writer, deletes what is left
            if was_tidy:
                self.stored.drop(before, self._manifest)
            else:
                self._clean()
            self._is_tidy = True
        return True

    def note_copied(self) -> None:
        """The local files are those of the version that was stored last: they need not be fetched again."""
        self.local.note_copied(self._manifest)

    def _clean(self) -> None:
        self.stored.clean(self._manifest, is_over=lambda version: version < self._manifest.version)

    def _check_newest(self, *, or_equal: bool = False) -> None:
        versions = self.stored.versions()
        if versions and (versions[-1].writer > self.number or (or_equal and versions[-1].writer == self.number)):
            raise SupersededError(self.stored.key)
