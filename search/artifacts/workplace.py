"""Where a worker keeps the files of the trial that it runs: in the folder that all share, or in one of its own.

With an object store a trial gets a scratch folder on the worker's disk, with what the store has of it. What changes is
stored before every report at which the driver may end the trial, when the trial ends, and now and then between; so a
worker that dies takes at most `PUSH_S` of work with it. The folder is deleted when the trial leaves the worker; that of
a dead process, by the next trial on the node.

Environment: CCDIST_SCRATCH_DIR, in which they are, each user's in a folder of its own, instead of the temporary folder.
"""

import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ccdist import locks
from search.artifacts import remote_files
from search.artifacts.artifact_place import ArtifactPlace
from search.artifacts.disk_space import DiskFullError, StorageAwayError, pausing_on_full_disk
from search.artifacts.manifests import StoredStudy, SupersededError
from search.artifacts.places import TrialPlaces
from search.artifacts.remote_files import UnreachableError
from search.artifacts.trial_copies import LocalFiles, Writer
from search.clusters.sight import check_sight
from search.studies.records import RungValues, TrialResult
from search.trials.reports import Reports

log = logging.getLogger(__name__)

SCRATCH = "CCDIST_SCRATCH_DIR"
# Work that a dead worker may take with it, and between reports of a verification, each of which has its state stored.
PUSH_S, VERIFYING_S = 60.0, 5.0
# Storing that took t seconds is followed by at least RESTS * t without: it may have 5 % of a trial's time.
RESTS = 20.0


@dataclass(frozen=True)
class Workplace:
    """What every worker of a study is told.

    Args:
        artifacts: a folder, or the address of one in an object store.
        epoch: number of the driver, with an object store.
        identifier: what the driver wrote into the study's folder, to be found there; empty: it wrote nothing.
    """

    artifacts: str
    study: str
    epoch: int = 0
    identifier: str = ""

    @contextmanager
    def trial(self, key: str, start: int, reports: Reports) -> Iterator[tuple[TrialPlaces, Reports]]:
        """The trial's places and whom it reports to; what it leaves there is stored when the context ends.

        Args:
            start: moment of the driver's clock at which it started this trial here.

        Raises:
            SupersededError: the driver has the trial run elsewhere; nothing of this run counts.
            UnreachableError: the store stays away; the trial can go on from what was stored last.
            CorruptCheckpointError: the store has something else than what was written there.
            StorageAwayError: this node does not see the study's folder, or has no room for scratch files; others may.
        """
        if "://" not in self.artifacts:
            check_sight(Path(self.artifacts) / self.study, self.identifier)
            yield TrialPlaces.of(Path(self.artifacts), self.study, key), reports
            return
        place = ArtifactPlace(self.artifacts)
        with ExitStack() as stack:
            stack.enter_context(_full_here_only())
            folder = stack.enter_context(_scratch(self.artifacts, key))
            stack.enter_context(pausing_on_full_disk(folder))
            _share_graphs(folder, self.study)
            filesystem, root = place.open()
            stored = StoredStudy(filesystem, f"{root}/{self.study}").trial(key)
            pushing = _Pushing(Writer(stored, LocalFiles(folder / self.study, key), (self.epoch, start)), reports)
            pushing.writer.begin()
            places = TrialPlaces.of(folder, self.study, key, place.below("teachers"))
            try:
                yield places, pushing
            except SupersededError:
                raise
            except Exception:
                pushing.push()  # its journal says why it ended; a full disk or an absent store keeps nothing from it
                raise
            except BaseException:
                # Stopped in a report. If the driver has not ended the trial, what was done since is worth keeping.
                with suppress(Exception):
                    pushing.push_if_possible()
                raise
            pushing.push()


@dataclass
class _Pushing:
    """Reports that store what they speak of before they tell it."""

    writer: Writer
    reports: Reports
    pushed_at: float = field(default_factory=time.monotonic)
    rest_s: float = 0.0

    def advanced(self, phase: str, done: int, of: int) -> None:
        if self._is_due(PUSH_S):
            self.push_if_possible()
        self.reports.advanced(phase, done, of)

    def rung(self, name: str, values: RungValues) -> None:
        self.push()
        self.reports.rung(name, values)

    def verifying(self, result: TrialResult, phase: str, done: int, of: int) -> None:
        if self._is_due(VERIFYING_S):
            self.push()
            self.reports.verifying(result, phase, done, of)
        else:  # nobody may end the trial here
            self.reports.advanced(phase, done, of)

    def push(self) -> None:
        """Store what has changed; waits for a store that is away.

        Raises:
            UnreachableError: it stays away.
            SupersededError: the driver has the trial run elsewhere.
        """
        began = time.monotonic()
        self.writer.push()
        self.pushed_at = time.monotonic()
        self.rest_s = RESTS * (self.pushed_at - began)

    def push_if_possible(self) -> None:
        """The same, once: training goes on while the store is away."""
        try:
            with remote_files.impatient():
                self.push()
        except UnreachableError as error:
            self.pushed_at = time.monotonic()
            log.warning("trial %s goes on; its state is not stored for now (%s)", self.writer.stored.key, error)

    def _is_due(self, interval_s: float) -> bool:
        return time.monotonic() - self.pushed_at >= max(interval_s, self.rest_s)


@contextmanager
def _full_here_only() -> Iterator[None]:
    """A full disk of this node ends no search: what the store has, a trial can go on from elsewhere."""
    try:
        yield
    except DiskFullError as full:
        raise StorageAwayError(str(full)) from full


@contextmanager
def _scratch(artifacts: str, key: str) -> Iterator[Path]:
    """A new folder for a trial, deleted at the end of the context."""
    with ExitStack() as stack:
        with pausing_on_full_disk(_scratch_place()):
            root = scratch_root() / hashlib.sha256(artifacts.encode()).hexdigest()[:16]
            root.mkdir(mode=0o700, exist_ok=True)
        with pausing_on_full_disk(root), locks.exclusive(root / "lock", wait=True):
            _sweep(root)
            folder = Path(tempfile.mkdtemp(prefix=f"{key}-", dir=root))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.enter_context(locks.exclusive(folder / "lock", wait=False))
        yield folder


def _share_graphs(folder: Path, study: str) -> None:
    """Let the trials of a node use the programs' graphs that one of them has traced."""
    graphs = folder.parent / f"graphs-{study}"
    graphs.mkdir(exist_ok=True)
    (folder / study).mkdir()
    (folder / study / "graphs").symlink_to(graphs)


def _scratch_place() -> Path:
    return Path(os.environ.get(SCRATCH) or tempfile.gettempdir())


def scratch_root() -> Path:
    """The folder of this user's scratch files, which nobody else can write.

    Raises:
        PermissionError: somebody else can.
    """
    place = _scratch_place()
    place.mkdir(parents=True, exist_ok=True)
    root = place / f"ccdist-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    status, above = root.lstat(), place.stat().st_mode
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    if not is_own or (above & stat.S_IWOTH and not above & stat.S_ISVTX):  # who may rename it can put another there
        raise PermissionError(f"scratch folder {root} can be written by others; set {SCRATCH} to another place")
    return root


def _sweep(root: Path) -> None:
    """Delete the folders of processes that are dead."""
    for folder in root.iterdir():
        if (folder / "lock").exists():
            try:
                with locks.exclusive(folder / "lock", wait=False):
                    shutil.rmtree(folder, ignore_errors=True)
            except locks.LockedError:
                continue
