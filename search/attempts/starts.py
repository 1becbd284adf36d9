"""Tells the searcher when the worker of a trial begins: Tune has no such call for searchers, only for its callbacks."""

from typing import Any

from ray.tune import Callback

from search.searcher import StudySearcher


class Starts(Callback):  # type: ignore[misc]
    """Passes on that an actor runs; between the suggestion and that its trial waits in Ray's queue."""

    def __init__(self, searcher: StudySearcher) -> None:
        self._searcher = searcher

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._searcher.on_trial_start(trial.trial_id)

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks with the experiment; nothing of the searcher goes there."""
        return {}
