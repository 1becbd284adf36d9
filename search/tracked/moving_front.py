"""The front of a study and its hypervolume, followed from one finished trial to the next.

What `search.results.configurations.study_front` says of the trials so far, without looking at all of them each time:
a trial that is dominated, as most are, is compared with the members of the front only.
"""

from dataclasses import replace

from search.pareto import front, hypervolume
from search.results.configurations import Configuration, as_compared, configurations
from search.studies.records import StudyRecord, TrialRecord

_Point = tuple[float, float]


class _Stairs:
    """Points by name, and those of them that no other dominates."""

    def __init__(self) -> None:
        self._points: dict[str, _Point] = {}
        self.members: dict[str, _Point] = {}

    def put(self, name: str, point: _Point) -> None:
        """Add a point, or move it."""
        before = self._points.get(name)
        self._points[name] = point
        # A member that moves may free points that it has dominated; without it, none of these can come forward.
        candidates = self._points if name in self.members and before != point else self.members | {name: point}
        names = list(candidates)
        found = front(as_compared(list(candidates.values()))).tolist()
        self.members = {names[index]: candidates[names[index]] for index in found}


class MovingFront:
    """The front of the configurations of the trials that were added.

    Args:
        study: whose trials they are; only what it says of itself is read.
    """

    def __init__(self, study: StudyRecord) -> None:
        self._study = replace(study, trials=())
        self._trials: dict[str, dict[str, TrialRecord]] = {}  # by configuration, by key
        self._known: dict[str, Configuration] = {}
        self._lower, self._upper = _Stairs(), _Stairs()

    def add(self, trial: TrialRecord) -> None:
        """A COMPLETE trial, or one whose interval has become narrower."""
        name = trial.configuration or trial.key
        together = self._trials.setdefault(name, {})
        together[trial.key] = trial
        in_order = tuple(sorted(together.values(), key=lambda each: each.number))
        (known,) = configurations(replace(self._study, trials=in_order))
        self._known[name] = known
        self._lower.put(name, known.objectives)
        self._upper.put(name, (known.standard_accuracy, known.certified_upper))

    @property
    def keys(self) -> frozenset[str]:
        """The trials of the configurations on the front."""
        return frozenset(trial.key for name in self._lower.members for trial in self._known[name].trials)

    @property
    def hypervolume_bounds(self) -> tuple[float, float]:
        """Hypervolume of the lower ends, and of the upper ends of certified accuracy."""
        reference = self._study.reference
        low, high = (hypervolume(list(each.members.values()), reference) for each in (self._lower, self._upper))
        return low, max(low, high)
