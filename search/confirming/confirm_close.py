"""What a confirmation leaves behind: its files, its row in MLflow, its models in the registry."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from ccdist.config import ATTACK_RUNGS
from ccdist.verdicts import Verdict
from search.artifacts.places import TrialPlaces
from search.confirming.confirm_report import markdown, setting, write_files
from search.confirming.confirmation import Member
from search.confirming.confirmation_config import LADDER, ConfirmationConfig
from search.confirming.confirmed import ALIASES, Confirmed, Result, result_of
from search.storage import Storage
from search.studies.records import StudyRecord
from search.tracked.bookkeeping import close_study, study_info
from search.tracked.run_names import FRONT_PICTURE
from search.trials.verifying import load_verdicts
from tracking.journal import STUDY_JOURNAL, Journal
from tracking.tracker import Status

# The rungs that prove; each proves what those before it do.
BOUNDS = tuple(rung for rung in LADDER if rung not in ATTACK_RUNGS)


@dataclass(frozen=True)
class Closing:
    """Ends a confirmation, complete or not.

    searched: the study that is confirmed, as it was when this command began.
    rungs: of that study's ladder.
    """

    config: ConfirmationConfig
    searched: StudyRecord
    members: Sequence[Member]
    rungs: Collection[str]

    def result(self, record: StudyRecord, storage: Storage) -> Result:
        """What was found so far."""
        shares = {run.key: self._proved_alike(storage, record.name, run.key) for run in record.complete}
        known = {key: share for key, share in shares.items() if share is not None}
        return result_of(record, self.searched, self.members, known)

    def _proved_alike(self, storage: Storage, name: str, key: str) -> float | None:
        """The share of a run's images that rungs of the search proved; None: its verdicts are missing or damaged.

        An image that cheap bounds prove is never open for later ones, no attack breaks it, and later bounds prove it,
        too, where the search did without the cheap ones: so these are the images that the search's ladder would have
        proved of this student, but for a larger limit of branch and bound.
        """
        try:
            verdicts = load_verdicts(TrialPlaces.of(storage.artifacts, name, key))
        except (OSError, pa.ArrowException):
            return None
        found = zip(verdicts["verdict"].to_pylist(), verdicts["method"].to_pylist(), strict=True)
        alike = BOUNDS[: max((BOUNDS.index(rung) + 1 for rung in self.rungs if rung in BOUNDS), default=0)]
        proved = sum(verdict == Verdict.CERTIFIED and method in alike for verdict, method in found)
        return float(proved / verdicts.num_rows)

    def write(self, record: StudyRecord, storage: Storage) -> dict[str, Path]:
        """The files, from what is there."""
        return write_files(self.result(record, storage), storage.study_folder(record.name))

    def close(self, record: StudyRecord, storage: Storage, status: Status) -> None:
        """Files, then what tracking is to know of them; models are registered once all runs are there."""
        paths, result = self.write(record, storage), self.result(record, storage)
        with Journal(storage.journals(record.name) / STUDY_JOURNAL) as journal:
            # The picture first: MLflow keeps 8,000 characters, which a table of thirty members fills.
            description = f"![front](artifact:{FRONT_PICTURE})\n\n{markdown(result)}"
            journal.study({}, {}, paths, step=len(record.done), description=description)
            models = registered(result)
            if status == "FINISHED" and models:
                info = study_info(self.config, storage)
                journal.register(info.experiment, models, aliases(result), setting(result))
        close_study(record, storage, status)


def registered(result: Result) -> dict[str, Mapping[str, str]]:
    """The models worth keeping -> what a user chooses by: the first seed's of each member that nobody dominates.

    The first seed's whatever its result: the best of several on the test set would look better than it is.
    """
    return {run.key: _tags(result, each) for each in result.front if (run := each.first_run) is not None}


def aliases(result: Result) -> dict[str, str]:
    """Alias -> key of the run whose model bears it, or "" where none does: one that had it before loses it."""
    first = {each.key: each.first_run for each in result.front}
    borne = {alias: run.key for alias, key in result.roles.items() if (run := first[key]) is not None}
    return dict.fromkeys(ALIASES, "") | borne


def _tags(result: Result, member: Confirmed) -> dict[str, str]:
    assert member.standard is not None
    assert member.certified is not None
    record = result.record
    return {
        "cert.confirmation": record.name,
        "cert.member": member.key,
        "cert.split": record.split,
        "cert.num_images": str(record.num_images),
        "cert.num_seeds": str(member.num_seeds),
        "cert.standard_accuracy": f"{member.standard.mean:.6g}",
        "cert.certified_accuracy": f"{member.certified.mean:.6g}",
        "cert.verifier": record.verifier,
    }
