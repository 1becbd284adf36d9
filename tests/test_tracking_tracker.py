"""The names a study may have, and the tracker that keeps nothing."""

import pytest
from contracts import TrackerContract, TrialView

from tracking.tracker import NullTracker, StudyInfo, Tracker


class TestNullTracker(TrackerContract):
    @pytest.fixture
    def tracker(self) -> Tracker:
        return NullTracker()

    def observe(self, tracker: Tracker) -> dict[str, TrialView] | None:
        return None


@pytest.mark.parametrize("name", ["", "a/b", "it's", 'say "a"', ".hidden", "two\nlines"])
def test_names_that_break_a_folder_or_a_query_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name"):
        StudyInfo(name, "digits")
    with pytest.raises(ValueError, match="cannot name"):
        StudyInfo("study", name)
