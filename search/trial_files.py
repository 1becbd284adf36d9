"""The trials' folders and journals as the driver sees them: results found, and ends that no worker can write."""

from dataclasses import dataclass
from pathlib import Path

from search.records import TrialResult
from search.run_names import end_tags
from search.trial import TrialPlaces, conclude_stopped, conclude_training_stopped, discard, load_result
from tracking.journal import Journal


@dataclass(frozen=True)
class TrialFiles:
    """The files of one study's trials."""

    artifacts: Path
    study: str

    def places(self, key: str) -> TrialPlaces:
        return TrialPlaces.of(self.artifacts, self.study, key)

    def result(self, key: str) -> TrialResult | None:
        """The result that a trial left behind, if it finished."""
        return load_result(self.places(key))

    def end_stopped_verification(self, key: str, result: TrialResult) -> None:
        conclude_stopped(self.places(key), result)

    def end_stopped_training(self, key: str, reason: str) -> None:
        conclude_training_stopped(self.places(key), reason)

    def end_failed(self, key: str, reason: str, *, silent: bool) -> None:
        """A trial has failed for good; `silent`: its worker could not write its own end."""
        places = self.places(key)
        if silent and places.journal.exists():
            with Journal(places.journal) as journal:
                journal.end("FAILED", {}, end_tags("FAILED", reason))
        discard(places)
