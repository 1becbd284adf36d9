"""Who competes in `benchmarks.search`: the stock samplers without stopping, ASHA, and this project's search.

All run through the same searcher, study and simulator. ASHA is the asynchronous successive halving of Li et al.
(MLSys 2020) as Ray Tune and others ship it: one metric, and at each rung the best 1 / REDUCTION of those that have
reached it go on. Two objectives are made one by a scalarisation, and the best of all its variants is shown.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from search.config import StoppingConfig
from search.errors import UserError
from search.scheduler import MARGIN, StudyScheduler
from search.studies.records import RungValues
from search.study import Study
from search.suggestions.sampling_view import TELL_STOPPED, TellStopped

REDUCTION = 3
# With Optuna's own defaults.
STOCK_SAMPLERS: Mapping[str, Any] = {
    "random": "random",
    "tpe": {"kind": "tpe", "startup_trials": 10},
    "nsga2": {"kind": "nsga2", "population": 50},
    "gp": {"kind": "gp", "startup_trials": 10},
}
NO_STOPPING = {"verification": False, "training": "off"}
Score = Callable[[RungValues, tuple[float, float]], float]


def certified(values: RungValues, reference: tuple[float, float]) -> float:
    return values.certified_accuracy


def mean(values: RungValues, reference: tuple[float, float]) -> float:
    return (values.standard_accuracy + values.certified_accuracy) / 2


def chebyshev(values: RungValues, reference: tuple[float, float]) -> float:
    """The worse of the two shares of the way from the reference to 1."""
    shares = zip((values.standard_accuracy, values.certified_accuracy), reference, strict=True)
    return min((value - low) / (1 - low) for value, low in shares)


SCORES: Mapping[str, Score] = {"certified": certified, "mean": mean, "chebyshev": chebyshev}


class AshaScheduler(StudyScheduler):
    """Stops whatever is below the upper 1 / `reduction` of the scores at its rung so far.

    stop if score < quantile(scores before, 1 - 1 / reduction); the first one at a rung goes on
    """

    def __init__(self, study: Study, score: Score, *, reduction: int = REDUCTION) -> None:
        super().__init__(study)
        self._told, self._score, self._reduction = study, score, reduction
        self._reference = study.config.search.hypervolume_reference
        self._scores: dict[str, dict[int, float]] = {}

    def _judge(self, key: str, result: dict[str, Any]) -> str | None:
        if result["state"] != "RUNG":
            return None
        rung, number = result["rung"], int(key.rpartition("-")[2])
        scores = self._scores.setdefault(rung, {})
        if number in scores:
            return None  # told again after its node was lost
        values = RungValues(**json.loads(result["values"]))
        self._told.note_rung(number, rung, values)
        score = self._score(values, self._reference)
        others = list(scores.values())
        scores[number] = score
        if others and score < np.quantile(others, 1 - 1 / self._reduction):
            return f"rung {rung}: {score:.4f} is not among the best 1/{self._reduction} of {len(others)}"
        return None


@dataclass(frozen=True)
class Rival:
    """One way to search; `search` and `stopping` are laid over the space file's sections."""

    name: str
    search: Mapping[str, Any] = field(default_factory=dict)
    stopping: Mapping[str, Any] = field(default_factory=dict)
    asha: str | None = None  # the scalarisation
    tell_stopped: TellStopped = TELL_STOPPED
    margin: float | None = MARGIN  # as for `search.scheduling.stopping.judge_rung`

    @property
    def is_gp(self) -> bool:
        """Whether its suggestions take long."""
        sampler = self.search.get("sampler")
        return "gp" in (sampler, sampler.get("kind") if isinstance(sampler, Mapping) else None)

    def make_scheduler(self, study: Study) -> StudyScheduler:
        if self.asha is not None:
            return AshaScheduler(study, SCORES[self.asha])
        return StudyScheduler(study, margin=self.margin)


OURS = Rival("ours")
"""The space file's own settings."""


def stock_rivals() -> list[Rival]:
    """Without stopping; they see what Optuna's own study would hold."""
    return [
        Rival(name, {"sampler": sampler}, NO_STOPPING, tell_stopped="pruned")
        for name, sampler in STOCK_SAMPLERS.items()
    ]


def asha_rivals() -> list[Rival]:
    """Every scalarisation with the two samplers that ASHA is commonly run with; verification is never stopped."""
    stopping = {"verification": False, "training": "rungs"}
    return [
        Rival(
            f"asha-{score}-{sampler}", {"sampler": STOCK_SAMPLERS[sampler]}, stopping, asha=score, tell_stopped="pruned"
        )
        for sampler in ("random", "tpe")
        for score in SCORES
    ]


def variant(text: str) -> Rival:
    """Ours with changes, spelled NAME:KEY=VALUE,...

    Keys are the fields of `stopping`, `sampler`, `tell_stopped` and `margin`.

    Raises:
        UserError: it is spelled otherwise, or a key is unknown.
    """
    name, _, changes = text.partition(":")
    search: dict[str, Any] = {}
    stopping: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for change in filter(None, changes.split(",")):
        key, is_given, value = change.partition("=")
        if not is_given:
            raise UserError(f"{change!r} in {text!r} has no value; spell variants NAME:KEY=VALUE,...")
        if key == "sampler":
            search[key] = value
        elif key == "margin":
            others[key] = None if value == "none" else float(value)
        elif key == "tell_stopped":
            others[key] = value
        elif key in StoppingConfig.model_fields:
            stopping[key] = value
        else:
            known = ", ".join((*StoppingConfig.model_fields, "sampler", "tell_stopped", "margin"))
            raise UserError(f"unknown key {key!r} in {text!r}; known are {known}")
    return Rival(name, search, stopping, **others)
