"""The driver's side of artefacts in an object store: a local folder that follows what workers store there.

The driver's own code, its sender to MLflow and its reports read the local folder as they read a shared one. A thread
brings what workers have stored, the files before the journal that names them; states of trials that run stay where
they are. What the driver writes itself, the ends of trials and the study's own files, goes to the store.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from pathlib import Path

from search.artifacts import remote_files
from search.artifacts.artifact_place import ArtifactPlace
from search.artifacts.locks import exclusive
from search.artifacts.manifests import Manifest, StoredStudy, Version
from search.artifacts.periodic import repeated
from search.artifacts.trial_copies import (
    SENT_FILE,
    STUDY_KEY,
    Choice,
    Chosen,
    LocalFiles,
    Writer,
    everything,
    is_record,
    is_state,
    is_visible,
    nothing,
    pull,
)
from search.clusters.sight import STUDY_MARK
from search.studies.patience import interruptible
from tracking.journal import end_dead_trials, replace_text
from tracking.sender import sent_path

log = logging.getLogger(__name__)

# Seconds between two looks at the store, and between two copies of the study's own files to it.
LOOK_S, STUDY_S = 3.0, 120.0
# A look that took t seconds is followed by at least RESTS * t without one.
RESTS = 10.0
# Trials that are brought at once.
THREADS = 8


def whole(_manifest: Manifest) -> Chosen:
    """All files of a trial but its states."""
    return is_visible


def verdicts(_manifest: Manifest) -> Chosen:
    """What a front is counted from."""
    return lambda path: path.endswith("/verdicts.parquet")


class Mirror:
    """A study's artefacts in an object store, and their local copy.

    Args:
        place: the store's folder.
        study: the study's name.
        artifacts: the local folder of all studies.
        destination: where the study is tracked: what is said to be sent was sent there. None: a store on this machine.
    """

    def __init__(self, place: ArtifactPlace, study: str, artifacts: Path, destination: str | None) -> None:
        self.place, self.study = place, study
        self.root = artifacts / study
        filesystem, folder = place.open()
        self._filesystem, self._folder = filesystem, f"{folder}/{study}"
        self._stored = StoredStudy(filesystem, self._folder)
        self._destination = destination
        self._brought: dict[str, tuple[Manifest, frozenset[str]]] = {}  # by trial: its version, and what is not here
        self._epoch_lock = threading.Lock()
        self._study_writer: Writer | None = None
        self._epoch: int | None = None
        self._due = 0.0
        self._study_due = 0.0
        self._told = False

    # ---- Whose it is ---------------------------------------------------------------------------------------------

    def owner(self) -> str | None:
        """The identifier of the study that the folder in the store belongs to."""
        mark = remote_files.read(self._filesystem, f"{self._folder}/{STUDY_MARK}")
        return None if mark is None else mark.decode(errors="replace")

    def is_empty(self) -> bool:
        """Whether the store has no trial of a study of that name."""
        return not self._stored.newest()

    def lacking(self) -> list[str]:
        """The trials with files in this machine's folder of which the store has nothing: they were never there."""
        local = {path.name for path in self.root.glob("trials/*")} | {
            path.stem for path in self.root.glob("journal/*.jsonl")
        }
        keys = sorted(local - {STUDY_KEY} - self._stored.newest().keys())
        return [key for key in keys if LocalFiles(self.root, key).paths()]

    def set_owner(self, identifier: str) -> None:
        """Make it this study's; the caller sees to it that nobody does the same at the same time."""
        remote_files.publish(self._filesystem, f"{self._folder}/{STUDY_MARK}", identifier.encode())

    @property
    def epoch(self) -> int:
        """The number of this driver, greater than those of all before it. To be asked for by the only driver."""
        with self._epoch_lock:
            if self._epoch is None:
                self._epoch = self._next_epoch()
            return self._epoch

    def _next_epoch(self) -> int:
        folder = f"{self._folder}/drivers"
        before = sorted(name for name in remote_files.names(self._filesystem, folder) if name.isdigit())
        number = int(before[-1]) + 1 if before else 1
        remote_files.publish(self._filesystem, f"{folder}/{number:06d}", b"")
        for name in before:
            remote_files.remove(self._filesystem, f"{folder}/{name}")
        return number

    # ---- From the store ------------------------------------------------------------------------------------------

    def pull(self, choice: Choice | None = None) -> None:
        """Bring what the store has and this folder lacks.

        Args:
            choice: the files that are needed; None: all but states, and of trials whose rows were all sent no networks.

        Raises:
            UnreachableError: the store stays away.
            CorruptCheckpointError: it has something else than what was written there; of other trials all is brought.
        """
        found = sorted(self._stored.newest().items())
        new = {
            key: wanted
            for key, version in found
            if key != STUDY_KEY and not self._has(key, version, wanted := choice or self._not_sent(key))
        }
        with ThreadPoolExecutor(max(1, min(THREADS, len(new)))) as threads:
            runs = [threads.submit(copy_context().run, self.pull_trial, key, new[key]) for key in new]
        for run in runs:
            run.result()

    def pull_trial(self, key: str, choice: Choice = whole) -> None:
        """Bring what the store has of a trial."""
        local = LocalFiles(self.root, key)
        with self._lock(key):
            self._brought.pop(key, None)
            before = _content(local.journal)
            pull(self._stored.trial(key), local, choice)
            if not _content(local.journal).startswith(before):
                # Rows that were never stored have reached MLflow: the trial has gone on from before them.
                sent_path(local.journal).unlink(missing_ok=True)

    def pull_study(self) -> None:
        """Bring the study's own files, before this driver writes any."""
        local = LocalFiles(self.root, STUDY_KEY)
        with self._lock(STUDY_KEY):
            before = _content(local.journal)
            pull(self._stored.trial(STUDY_KEY), local, lambda _manifest: everything)
            stored = _content(local.journal)
            if before.startswith(stored) and before != stored:
                local.journal.write_bytes(before)  # this folder is where the last driver ran: it knows more
            elif not stored.startswith(before):
                sent_path(local.journal).unlink(missing_ok=True)
        self._believe_sent()

    def check(self, keys: Iterable[str]) -> list[str]:
        """What is missing of some trials in the store, one line each."""
        lines = []
        newest = self._stored.newest()
        for key in keys:
            if key in newest:
                stored = self._stored.trial(key)
                manifest = stored.newest()
                if manifest is not None:
                    lines += [f"{path} of trial {key}" for path in stored.missing(manifest)]
        return lines

    def stored_at(self, key: str, teacher: Sequence[str]) -> float | None:
        """Unix time, by the store's clock, of the last state of a trial there, or of these files of teachers.

        Of states no copies are here, and what was brought is as old as its bringing.
        """
        stored = self._stored.trial(key)
        manifest = stored.newest()
        teachers, _, _ = self._folder.rpartition("/")
        times = [
            None if manifest is None else stored.stored_at(manifest, is_state),
            remote_files.newest(self._filesystem, [f"{teachers}/teachers/{file}" for file in teacher]),
        ]
        return max((time for time in times if time is not None), default=None)

    # ---- To the store --------------------------------------------------------------------------------------------

    @contextmanager
    def changing(self, key: str, wanted: Chosen = is_visible, *, ends: bool = False) -> Iterator[None]:
        """Write a trial's local files in place of its worker, which is dead or waits; they are stored afterwards.

        Args:
            wanted: the files that are needed here.
            ends: the trial does not go on, so its states are deleted.
        """
        number = (self.epoch, time.monotonic_ns())
        with self._lock(key):
            self._brought.pop(key, None)
            writer = Writer(self._stored.trial(key), LocalFiles(self.root, key), number, wanted)
            writer.begin()
            yield
            writer.push(without=is_state if ends else nothing)
            writer.note_copied()

    def push_ends(self, keys: Iterable[str]) -> None:
        """Store the ends that the driver has written into the journals of trials that nobody works on."""
        for key in keys:
            journal = LocalFiles(self.root, key).journal
            ours = _content(journal)
            with self.changing(key, is_record):
                if ours.startswith(_content(journal)):
                    journal.parent.mkdir(parents=True, exist_ok=True)
                    journal.write_bytes(ours)
                else:  # its worker has stored something since
                    end_dead_trials(journal.parent, {path.stem for path in journal.parent.glob("*.jsonl")} - {key})

    def push_study(self) -> None:
        """Store the study's own files, where they have changed; nothing, where it does not have the store's folder."""
        if not (own := _content(self.root / STUDY_MARK)) or self.owner() != own.decode():
            return
        with self._lock(STUDY_KEY):
            self._note_sent()
            if self._study_writer is None:
                # All of them were brought before, or are made anew by this driver.
                stored, local = self._stored.trial(STUDY_KEY), LocalFiles(self.root, STUDY_KEY)
                writer = Writer(stored, local, (self.epoch, time.monotonic_ns()))
                writer.begin(fetch=False)
                self._study_writer = writer
            self._study_writer.push()
            self._study_writer.note_copied()

    # ---- While a search runs -------------------------------------------------------------------------------------

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow the store, in a thread."""
        with repeated(self._look, LOOK_S / 2):
            yield

    def _look(self) -> None:
        if time.monotonic() < self._due:
            return
        # One trial that cannot be brought keeps nothing else from its place.
        errors, self._due = _timed(self.pull, LOOK_S)
        if time.monotonic() >= self._study_due:
            more, self._study_due = _timed(self.push_study, STUDY_S)
            errors += more
        if errors and not self._told:
            # The next look brings it; the end of the search waits for it.
            log.warning("artefacts in %s cannot be followed for now (%s)", self.place, remote_files.one_line(errors[0]))
        self._told = bool(errors)

    # ---- What tracking has of it ---------------------------------------------------------------------------------

    def _has(self, key: str, version: Version, choice: Choice) -> bool:
        """Whether the wanted files of that version are here; of what was brought before only the version is read."""
        known = self._brought.get(key)
        if known is None or known[0].version != version:
            manifest = LocalFiles(self.root, key).copied()
            if manifest is None or manifest.version != version:
                return False
            absent = frozenset(path for path in manifest.files if not (self.root / path).exists())
            known = self._brought[key] = (manifest, absent)
        manifest, absent = known
        return not any(map(choice(manifest), absent))

    def _not_sent(self, key: str) -> Choice:
        """What MLflow may still need of a trial: networks, too, unless it has all rows of its journal."""
        sent = _number(sent_path(LocalFiles(self.root, key).journal))

        def choice(manifest: Manifest) -> Chosen:
            journal = manifest.files.get(f"journal/{key}.jsonl")
            return is_record if journal is not None and 0 < journal.size <= sent else is_visible

        return choice

    def _note_sent(self) -> None:
        """Write down what tracking has accepted of the rows that are in the store."""
        journals = self.root / "journal"
        offsets = {}
        for path in sorted(journals.glob("*.jsonl")):
            if (sent := _number(sent_path(path))) > 0:
                offsets[path.name] = min(sent, path.stat().st_size)
        text = json.dumps({"tracking": self._destination, "sent": offsets}, indent=1)
        file = journals / SENT_FILE
        if _content(file) != text.encode():
            journals.mkdir(parents=True, exist_ok=True)
            replace_text(file, text)

    def _believe_sent(self) -> None:
        """Take over what another machine's driver has sent to the same server; a folder's own notes come first."""
        try:
            noted = json.loads(_content(self.root / "journal" / SENT_FILE))
        except ValueError:
            return
        if self._destination is None or noted.get("tracking") != self._destination:
            return
        for name, offset in noted["sent"].items():
            place = self.root / "journal" / f"{name}.sent"
            if "/" not in name and isinstance(offset, int) and not place.exists():
                replace_text(place, str(offset))

    @contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        """Of a trial's local files: a report, or a doctor, may follow the store in the folder of a driver at work."""
        with ExitStack() as stack:
            with interruptible():
                stack.enter_context(exclusive(self.root / "copies" / f"{key}.lock", wait=True))
            yield


def _timed(act: Callable[[], None], interval_s: float) -> tuple[list[Exception], float]:
    """Try it once: what it raised, and the moment from which on it may be done again."""
    began, errors = time.monotonic(), []
    try:
        with remote_files.impatient():
            act()
    except Exception as error:
        errors.append(error)
    return errors, time.monotonic() + max(interval_s, RESTS * (time.monotonic() - began))


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""


def _number(file: Path) -> int:
    try:
        return int(file.read_text())
    except (FileNotFoundError, ValueError):
        return 0
