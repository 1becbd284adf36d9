"""What `search.doctor` reads and writes: files, journals and MLflow runs of one study, beside the study itself."""

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ccdist import checkpoint
from ccdist.verdicts import Accuracies, accuracies
from search.artifacts.leases import EXPIRY_S
from search.artifacts.places import TrialPlaces, save_result
from search.errors import UserError
from search.storage import Storage
from search.studies.consistency import (
    ACCURACIES,
    MISSING,
    Finding,
    JournalView,
    Repair,
    RunView,
    TrialView,
    check_files,
    check_journal,
    check_leases,
    check_names,
    check_runs,
    check_teachers,
    check_unfinished,
    stored_result,
)
from search.studies.database import sqlite_file
from search.studies.records import StudyRecord, TrialRecord, TrialResult
from search.teachers import TeacherStore
from tracking.audit import delete_runs, journal_damage, mend_journal, study_runs
from tracking.journal import STUDY_FILE, STUDY_JOURNAL, Journal, NewerJournalError, load_study_info
from tracking.mlflow_tracker import MlflowTracker, local_store
from tracking.sender import Delivery, forget_sent, sent_path
from tracking.tracker import NullTracker, Status, StudyInfo

_OWN_JOURNAL = Path(STUDY_JOURNAL).stem
_STATUSES: dict[str, Status] = {"COMPLETE": "FINISHED", "STOPPED": "FINISHED", "FAILED": "FAILED"}


def check_database(database: Path) -> list[Finding]:
    """SQLite's own opinion of its file."""
    try:
        # As a writer: a reader alone could not open a database whose write-ahead log a killed process has left.
        connection = sqlite3.connect(f"{database.resolve().as_uri()}?mode=rw", uri=True)
        try:
            rows = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(3)")]
        finally:
            connection.close()
    except sqlite3.Error as error:
        rows = [str(error)]
    if rows == ["ok"]:
        return []
    told = "; ".join(" ".join(row.split()) for row in rows)
    return [Finding(f"database {database}", f"is damaged ({told}); restore it from a copy")]


@dataclass
class Checkup:
    """One study's views.

    Args:
        record: reads the study, again at each look.
        live: a driver is at work: journals and MLflow are behind by right, and are not looked at.
        mlflow: whether to look there.
    """

    storage: Storage
    study: str
    record: Callable[[], StudyRecord]
    live: bool = False
    mlflow: bool = True

    @property
    def _root(self) -> Path:
        return self.storage.study_folder(self.study)

    @property
    def _journals(self) -> Path:
        return self.storage.journals(self.study)

    @property
    def _teachers(self) -> Path:
        return Path(self.storage.teachers)

    def findings(self) -> list[Finding]:
        """Everything that is worth a line; writes nothing.

        Raises:
            UserError: a newer version of this program wrote the journals, a teacher or a student.
        """
        self._refuse_newer_journals()
        # Names first: a trial that starts meanwhile is in the study before its folder is there.
        folders = sorted(path.name for path in (self._root / "trials").glob("*") if path.is_dir())
        journals = sorted(path.stem for path in self._journals.glob("*.jsonl"))
        keys = [name for name in journals if name != _OWN_JOURNAL]
        record = self.record()
        found = check_unfinished(record, live=self.live)
        for trial in record.complete:
            found += check_files(trial, _trial_view(TrialPlaces.of(self.storage.artifacts, self.study, trial.key)))
        found += check_names(record, folders, keys)
        if isinstance(self.storage.teachers, Path):  # in an object store workers compare them with their hashes
            found += check_teachers(_teacher_problems(self.storage.teachers))
            found += check_leases(_lease_ages(self.storage.teachers), EXPIRY_S)
        if not self.live:
            for name in journals:
                damage = journal_damage(self._journals / f"{name}.jsonl")
                found += check_journal(name, JournalView(damage.lines, damage.torn))
            found += self._check_tracking(record, keys)
        return found

    def _refuse_newer_journals(self) -> None:
        try:
            load_study_info(self._journals)
        except NewerJournalError as error:
            raise UserError(str(error)) from error
        except (OSError, ValueError):  # a finding of its own
            return

    def repair(self, findings: Sequence[Finding]) -> None:
        """Do what the findings name; the study itself is only read."""
        trials = {trial.key: trial for trial in self.record().trials}
        for finding in findings:
            self._repair_one(finding, trials)
        if self.mlflow and any(finding.repair in _SENDING for finding in findings):
            self._send()

    def _repair_one(self, finding: Finding, trials: dict[str, TrialRecord]) -> None:
        match finding.repair:
            case Repair.REWRITE_RESULT:
                places = TrialPlaces.of(self.storage.artifacts, self.study, finding.repaired_object)
                save_result(places, stored_result(trials[finding.repaired_object], _provenance(places)))
            case Repair.SET_ASIDE:
                self._set_aside(self._root / finding.repaired_object)
            case Repair.SET_ASIDE_TEACHER:
                self._set_aside(self._teachers / finding.repaired_object)
            case Repair.DELETE_LEASE:
                for suffix in (".claim", ".beat"):
                    (self._teachers / finding.repaired_object).with_suffix(suffix).unlink(missing_ok=True)
            case Repair.MEND_JOURNAL:
                mend_journal(self._journals / f"{finding.repaired_object}.jsonl")
            case Repair.DELETE_RUN:
                delete_runs(self._store()[0], [finding.repaired_object])
                forget_sent(self._journals, finding.subject)  # what only the deleted run had goes to the other one
            case Repair.RESEND:
                forget_sent(self._journals, finding.repaired_object)
            case Repair.END_RUN:
                self._end_run(trials[finding.repaired_object])

    def _set_aside(self, path: Path) -> None:
        """Nothing is deleted: a folder may be all that is left of a study whose database was lost."""
        target = self._root / "set-aside" / path.parent.name / path.name
        number = 1
        while target.exists():
            number += 1
            target = target.with_name(f"{path.name}.{number}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
        sent_path(path).unlink(missing_ok=True)

    def _end_run(self, trial: TrialRecord) -> None:
        """Say a trial's last word in its journal, with the study's values, and send all of it."""
        with Journal(self._journals / f"{trial.key}.jsonl") as journal:
            if os.path.getsize(journal.path) == 0:
                journal.start(trial.key, trial.params, {})
            values = {name: getattr(trial, name) for name in (*ACCURACIES, "seconds")} if trial.objectives else {}
            values |= {f"cost/{name}_seconds": seconds for name, seconds in trial.costs.items()}
            tags: dict[str, str] = {"cert.state": trial.state}
            tags |= {"cert.verification": trial.verification_state} if trial.verification_state else {}
            tags |= {"cert.reason": trial.reason} if trial.reason else {}
            journal.end(_STATUSES[trial.state], values, tags)
        forget_sent(self._journals, trial.key)

    def _send(self) -> None:
        with suppress(Exception):  # whatever the server's trouble is, the next look finds it and what was not sent
            if self._store_exists():
                Delivery(self._journals, MlflowTracker(*self._store()), resume=False).send()

    def _store(self) -> tuple[str, str | None]:
        uri = load_study_info(self._journals).tracking_uri
        return (uri, None) if uri else local_store(self.storage.folder)

    def _store_exists(self) -> bool:
        """A local store is never made here: the search may have run without tracking."""
        uri = self._store()[0]
        database = sqlite_file(uri)
        return database is None or database.exists()

    def _check_tracking(self, record: StudyRecord, journals: Sequence[str]) -> list[Finding]:
        """The study in MLflow, if it is there at all."""
        try:
            info = load_study_info(self._journals)
        except FileNotFoundError:
            text = f"cannot be told of this study: there is no {self._journals / STUDY_FILE}; search.run writes it"
            return [Finding("MLflow", text, fine=not journals)]
        except ValueError as error:
            return [Finding("MLflow", f"cannot be told of this study: {_one_line(error)}; search.run writes it anew")]
        if not self.mlflow:
            return [Finding("MLflow", "was not looked at", fine=True)]
        if not self._store_exists():
            advice = f"python -m tracking.replay {self.storage.folder} --study {self.study} --from-start"
            text = f"has no store in {self.storage.folder}: tracking was off, or {advice} makes it anew"
            return [Finding("MLflow", text, fine=True)]
        found = self._check_runs(record, info, journals)
        left = Delivery(self._journals, NullTracker()).rows_left()
        if left:  # what else is missing there may be among them
            found = [finding for finding in found if finding.repair not in (Repair.END_RUN, Repair.RESEND)]
            found.append(Finding("MLflow", f"lacks rows of the journals: {left}", Repair.SEND))
        return found

    def _check_runs(self, record: StudyRecord, info: StudyInfo, journals: Sequence[str]) -> list[Finding]:
        uri = self._store()[0]
        try:
            runs = study_runs(uri, info)
        except Exception as error:  # whatever the server's trouble is
            return [Finding("MLflow", f"at {uri} does not answer ({_one_line(error)}); start it and look again")]
        found = []
        if all(run.key is not None for run in runs):
            repair = Repair.RESEND
            found.append(Finding("MLflow", "has no run of the study itself", repair, target=_OWN_JOURNAL))
        views = [
            RunView(run.run_id, run.key, run.status, run.started_ms, run.metrics) for run in runs if run.key is not None
        ]
        return found + check_runs(record, views, journals)


_SENDING = (Repair.SEND, Repair.RESEND, Repair.END_RUN, Repair.DELETE_RUN, Repair.MEND_JOURNAL)


def _trial_view(places: TrialPlaces) -> TrialView:
    return TrialView(_student_problem(places.student), _verdicts(places.verdicts), _result(places.result))


def _student_problem(folder: Path) -> str | None:
    if not folder.exists():
        return MISSING
    try:
        checkpoint.load(folder)
    except checkpoint.NewerFormatError as error:
        raise UserError(str(error)) from error
    except checkpoint.CorruptCheckpointError as error:
        return f"is damaged ({_one_line(error)})"
    return None


def _verdicts(path: Path) -> Accuracies | str:
    try:
        return accuracies(pq.read_table(path))
    except FileNotFoundError:
        return MISSING
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        return f"is damaged ({_one_line(error)})"


def _result(path: Path) -> TrialResult | str:
    try:
        return TrialResult(**json.loads(path.read_text()))
    except FileNotFoundError:
        return MISSING
    except (OSError, ValueError, TypeError) as error:
        return f"is damaged ({_one_line(error)})"


def _provenance(places: TrialPlaces) -> dict[str, str]:
    """What the file says of it; the study does not hold it."""
    result = _result(places.result)
    return dict(result.provenance) if isinstance(result, TrialResult) else {}


def _teacher_problems(folder: Path) -> dict[str, str]:
    store = TeacherStore.of(folder)
    problems = {}
    for place in sorted(path for path in folder.glob("*") if path.is_dir()):
        try:
            if store.has(place.name):
                store.load(place.name)
            elif (state := place / "state.safetensors").exists():
                checkpoint.load_state(state)
        except checkpoint.NewerFormatError as error:
            raise UserError(str(error)) from error
        except checkpoint.CorruptCheckpointError as error:
            problems[place.name] = f"is damaged ({_one_line(error)})"
    return problems


def _lease_ages(folder: Path) -> dict[str, float]:
    """Path below the folder, without suffix -> seconds since the heartbeat, by the clock of the file system."""
    claims = sorted(folder.glob("*/*.claim"))
    if not claims:
        return {}
    with tempfile.NamedTemporaryFile(dir=folder) as now:
        present = os.stat(now.name).st_mtime
    ages = {}
    for claim in claims:
        beat = claim.with_suffix(".beat")
        times = [path.stat().st_mtime for path in (claim, beat) if path.exists()]
        if times:
            ages[str(claim.relative_to(folder))] = present - max(times)
    return ages


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
