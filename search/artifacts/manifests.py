"""What an object store has of a trial, changed in one step at a time, by one writer at a time.

A store has no folder that could be locked or renamed, and its writers die, or are taken for dead and live. So no file
in it is ever written over. For each trial of a study (and for the study's own files) it has:

    STUDY/manifests/KEY/VERSION.json    which files the trial has: the one of the greatest VERSION counts
    STUDY/trials/KEY/VERSION/PATH       a file of the trial's folder, below the version that brought it

A VERSION is a number of the driver, a moment of that driver's clock at which it let somebody write the trial, and a
count of what that one has stored. Files first, then their manifest, then what the one before it alone had is deleted:
a writer that is killed between any two steps leaves the version before or the new one, whole.

Who writes last: a writer begins with a claim, a manifest greater than all that are there, that says nothing of files.
Then it looks which one before it is the newest, and publishes that one's files under its own number. Once it has looked
that nobody has overtaken it, it deletes what is older. Whoever was there before is overtaken by the claim. It may not
know, and go on to write: nobody reads that, and it deletes nothing, since it looks for greater versions between its
manifest and the deletion, and the new writer looks, after its claim is there, which version is the last. One of the two
sees the other (as in `search.artifacts.leases`). A writer that is killed after its claim has said nothing that could be
wrong. This needs what a driver has: it alone says who writes a trial, each time with a later moment, and the study's
lock makes it the only one with its number.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pyarrow.fs import FileSystem

from ccdist.checkpoint import CorruptCheckpointError, check_format
from search.artifacts import remote_files
from search.artifacts.disk_space import StorageAwayError

FORMAT_VERSION = 1
# Programs that know no claims would take one for a trial without files.
CLAIM_FORMAT_VERSION = 2
# A file that is read may be replaced meanwhile by its trial, which deletes it: then the next version is read.
_ATTEMPTS = 20

_NAME = re.compile(r"(\d{6,})-(\d{20})-(\d{6,})\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class SupersededError(StorageAwayError):
    """Another writer has taken the trial over; what this one does is of no use any more."""

    def __init__(self, key: str) -> None:
        super().__init__(f"another process has taken trial {key} over")


class GoneError(Exception):
    """A file of a version is not there any more: there is a newer version."""


@dataclass(frozen=True, order=True)
class Version:
    """Who wrote, and how often: compared from left to right.

    Args:
        epoch: number of the driver, each one's greater than those before it.
        start: moment of that driver's clock at which it let this writer begin.
        count: of what the writer has stored; 0: its claim, or the files that an earlier program began with.
    """

    epoch: int
    start: int
    count: int

    def __str__(self) -> str:
        return f"{self.epoch:06d}-{self.start:020d}-{self.count:06d}"

    @classmethod
    def of(cls, name: str) -> "Version | None":
        """The version of a manifest's name; None: it is no manifest."""
        match = _NAME.fullmatch(name)
        return cls(*map(int, match.groups())) if match else None

    @property
    def writer(self) -> tuple[int, int]:
        return self.epoch, self.start

    def next(self) -> "Version":
        return Version(self.epoch, self.start, self.count + 1)


@dataclass(frozen=True)
class Entry:
    """A file: the version that brought it, its bytes and their hash."""

    version: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    version: Version
    files: Mapping[str, Entry]  # by path below the study's folder

    def to_json(self) -> bytes:
        files = {path: asdict(entry) for path, entry in sorted(self.files.items())}
        form = CLAIM_FORMAT_VERSION if self.is_claim else FORMAT_VERSION
        return json.dumps({"format_version": form, "files": files}, indent=1).encode()

    @property
    def is_claim(self) -> bool:
        """Whether it only says who writes from now on; earlier programs began with a number 0 that names files."""
        return self.version.count == 0 and not self.files

    @classmethod
    def of(cls, version: Version, content: bytes, where: str) -> "Manifest":
        """Read one.

        Raises:
            NewerFormatError: a newer program wrote it.
            ValueError, KeyError, TypeError, AttributeError: it is none, or only a part of one.
        """
        stored = json.loads(content)
        check_format(stored["format_version"], Path(where), newest=CLAIM_FORMAT_VERSION)
        files = {path: Entry(**entry) for path, entry in stored["files"].items()}
        for path, entry in files.items():
            if not _is_below(path) or Version.of(f"{entry.version}.json") is None:
                raise ValueError(f"{path!r} of version {entry.version!r} is no file of a study")
            if not isinstance(entry.size, int) or not _SHA256.fullmatch(entry.sha256):
                raise ValueError(f"{path!r} has no size or hash")
        return cls(version, files)


def _is_below(path: str) -> bool:
    """Whether a path leads to a file in the folder that it starts from, wherever that is."""
    parts = path.split("/")
    return "\0" not in path and "\\" not in path and not {"", ".", ".."} & set(parts)


class StoredStudy:
    """The versions of all trials of a study."""

    def __init__(self, filesystem: FileSystem, root: str) -> None:
        self.filesystem, self.root = filesystem, root

    def trial(self, key: str) -> "StoredFiles":
        return StoredFiles(self.filesystem, self.root, key)

    def newest(self) -> dict[str, Version]:
        """The version of each trial that is there: one listing for a thousand trials.

        A claim is the version of a trial that has no other.
        """
        found: dict[str, Version] = {}
        for path in remote_files.paths(self.filesystem, f"{self.root}/manifests"):
            key, _, name = path.rpartition("/")
            version = Version.of(name)
            if "/" in key or key in ("", ".", ".."):
                continue  # whoever wrote it: no trial's
            if version is not None and (key not in found or _rank(version) > _rank(found[key])):
                found[key] = version
        return found


def _rank(version: Version) -> tuple[bool, Version]:
    """Which version of a trial says what it has: a number 0 says nothing, or what the version before it says."""
    return version.count > 0, version


class StoredFiles:
    """The versions of one trial, or of the study's own files."""

    def __init__(self, filesystem: FileSystem, root: str, key: str) -> None:
        self._filesystem = filesystem
        self.key = key
        self._manifests, self._files = f"{root}/manifests/{key}", f"{root}/trials/{key}"

    def versions(self) -> list[Version]:
        """Those that are there, the greatest last."""
        found = (Version.of(name) for name in remote_files.names(self._filesystem, self._manifests))
        return sorted(version for version in found if version is not None)

    def newest(self, before: tuple[int, int] | None = None) -> Manifest | None:
        """The manifest that counts, or the last one of an earlier writer than `before`; None: there is none but claims.

        Raises:
            NewerFormatError: a newer program wrote it.
            CorruptCheckpointError: what is there cannot be read.
        """
        damage = ""
        for _ in range(_ATTEMPTS):
            versions = [each for each in self.versions() if before is None or each.writer < before]
            if not versions:
                if damage:
                    break
                return None
            for version in reversed(versions):
                place = f"{self._manifests}/{version}.json"
                content = remote_files.read(self._filesystem, place)
                if content is None:
                    break  # replaced since the listing: look again
                try:
                    manifest = Manifest.of(version, content, place)
                    if not manifest.is_claim:
                        return manifest
                except (KeyError, TypeError, AttributeError) as error:
                    damage = f"{place} is no manifest ({type(error).__name__}: {error})"
                except ValueError as error:
                    if isinstance(error, CorruptCheckpointError):
                        raise
                    damage = f"{place} is no manifest ({error})"
            else:
                if not damage:
                    return None
        raise CorruptCheckpointError(damage or f"{self._manifests} changes faster than it can be read")

    def publish(self, manifest: Manifest) -> None:
        """Make a manifest the one that counts, if it is the greatest."""
        remote_files.publish(self._filesystem, f"{self._manifests}/{manifest.version}.json", manifest.to_json())

    def upload(self, version: Version, path: str, file: Path) -> Entry:
        """Store what a local file holds now; it counts once a manifest names it."""
        size, digest = remote_files.fill(self._filesystem, f"{self._files}/{self._name(version, path)}", file)
        return Entry(str(version), size, digest)

    def download(self, path: str, entry: Entry, file: Path) -> None:
        """Fetch a file, whole or not at all.

        Raises:
            GoneError: it is not there.
            CorruptCheckpointError: it is not what was stored.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.name}.unfinished")
        try:
            for _ in range(3):
                if not remote_files.download(self._filesystem, self._place(path, entry), unfinished):
                    raise GoneError(path)
                with open(unfinished, "rb") as content:
                    digest = hashlib.file_digest(content, "sha256").hexdigest()
                if digest == entry.sha256:
                    unfinished.replace(file)
                    return
        finally:
            unfinished.unlink(missing_ok=True)
        raise CorruptCheckpointError(f"{self._place(path, entry)} has another hash than its manifest says")

    def missing(self, manifest: Manifest) -> list[str]:
        """The files of a manifest that are not there, or not in their size."""
        sizes = remote_files.paths(self._filesystem, self._files)
        return [path for path, each in manifest.files.items() if sizes.get(self._name(each.version, path)) != each.size]

    def stored_at(self, manifest: Manifest, wanted: Callable[[str], bool]) -> float | None:
        """Unix time, by the store's clock, at which the last of the wanted files was stored; None: there is none."""
        places = [self._place(path, entry) for path, entry in manifest.files.items() if wanted(path)]
        return remote_files.newest(self._filesystem, places) if places else None

    def clean(self, manifest: Manifest, *, is_over: Callable[[Version], bool]) -> None:
        """Delete the manifests and files of versions that are over, but for the files that this manifest names."""
        kept = {self._name(entry.version, path) for path, entry in manifest.files.items()}
        for name in remote_files.names(self._filesystem, self._manifests):
            version = Version.of(f"{name.partition('.')[0]}.json")  # also of one that a killed writer left unfinished
            if version is not None and is_over(version):
                remote_files.remove(self._filesystem, f"{self._manifests}/{name}")
        for path in remote_files.paths(self._filesystem, self._files):
            brought_by = Version.of(f"{path.partition('/')[0]}.json")
            if path not in kept and brought_by is not None and is_over(brought_by):
                remote_files.remove(self._filesystem, f"{self._files}/{path}")

    def drop(self, before: Manifest, now: Manifest) -> None:
        """Delete what only the version before had."""
        remote_files.remove(self._filesystem, f"{self._manifests}/{before.version}.json")
        for path, entry in before.files.items():
            if now.files.get(path) != entry:
                remote_files.remove(self._filesystem, self._place(path, entry))

    def _place(self, path: str, entry: Entry) -> str:
        return f"{self._files}/{self._name(entry.version, path)}"

    def _name(self, version: Version | str, path: str) -> str:
        return f"{version}/{path.removeprefix(f'trials/{self.key}/')}"
