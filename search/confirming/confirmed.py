"""What a confirmation found: means over seeds on the test set, and how they compare. Plain values, nothing is read.

Accuracies are fractions of the test images. A mean is over the COMPLETE runs of a member; its spread is from the lowest
to the highest of them. A member's point is (standard accuracy, lower end of certified accuracy), as in the search.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from search.confirming.confirmation import SEED, Member
from search.studies.records import StudyRecord, TrialRecord

Point = tuple[float, float]

ALIASES = ("best-standard", "best-certified", "knee")  # in the registry and in tables


@dataclass(frozen=True)
class Spread:
    """One accuracy over the seeds."""

    values: tuple[float, ...]  # by seed index

    @property
    def mean(self) -> float:
        # math.fsum rounds once, so the mean of lower ends is never above that of upper ends.
        return math.fsum(self.values) / len(self.values)

    @property
    def lowest(self) -> float:
        return min(self.values)

    @property
    def highest(self) -> float:
        return max(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the sample, n - 1 in the denominator; None with one value."""
        if len(self.values) < 2:
            return None
        return math.sqrt(math.fsum((value - self.mean) ** 2 for value in self.values) / (len(self.values) - 1))


@dataclass(frozen=True)
class Confirmed:
    """One member with its runs.

    runs: COMPLETE, by seed index. Everything else is None while there are none.
    gap: (standard, certified) of the search on its validation images minus the means on the test set; positive: the
        search saw too much in it. None: the search has no result of it.
    gap_alike: the same of certified accuracy, with what the search's own rungs proved of the test images; the ladder
        of a confirmation proves more, which hides what the selection did. None: also where verdicts are missing, or
        the search did not verify the member to the end.
    """

    member: Member
    runs: tuple[TrialRecord, ...]
    failed: tuple[TrialRecord, ...]  # failed runs of seed indices without a result
    standard: Spread | None = None
    adversarial: Spread | None = None
    certified: Spread | None = None  # lower ends
    certified_upper: Spread | None = None
    gap: Point | None = None
    gap_alike: float | None = None
    dominated_by: tuple[str, ...] = ()  # keys of the members whose means are at least as good, one of them better

    @property
    def key(self) -> str:
        return self.member.key

    @property
    def num_seeds(self) -> int:
        return len(self.runs)

    @property
    def point(self) -> Point | None:
        if self.standard is None or self.certified is None:
            return None
        return self.standard.mean, self.certified.mean

    @property
    def is_on_front(self) -> bool:
        return self.point is not None and not self.dominated_by

    @property
    def first_run(self) -> TrialRecord | None:
        """The run whose model stands for the member: the first seed's, so that nobody chose it by its test result."""
        return next((run for run in self.runs if run.params[SEED] == 0), None)


@dataclass(frozen=True)
class Result:
    """A confirmation and who is best in what; each of these is a member's key, None: there is none."""

    record: StudyRecord
    searched: StudyRecord
    members: tuple[Confirmed, ...]  # best standard accuracy first, members without runs last
    best_standard: str | None
    best_certified: str | None
    knee: str | None

    @property
    def front(self) -> tuple[Confirmed, ...]:
        return tuple(member for member in self.members if member.is_on_front)

    @property
    def roles(self) -> dict[str, str]:
        """Alias -> key of a member."""
        named = dict(zip(ALIASES, (self.best_standard, self.best_certified, self.knee), strict=True))
        return {alias: key for alias, key in named.items() if key is not None}

    def roles_of(self, key: str) -> list[str]:
        return [alias for alias, chosen in self.roles.items() if chosen == key]


def result_of(
    record: StudyRecord, searched: StudyRecord, members: Sequence[Member], proved_alike: Mapping[str, float]
) -> Result:
    """The means of these members' runs, compared with one another and with the search.

    Args:
        record: the confirmation.
        searched: the study that it confirms.
        proved_alike: key of a run -> share of its test images that the rungs of the search proved, where it is known.
    """
    found = _with_dominance([_confirmed(member, record, proved_alike) for member in members])
    found = sorted(found, key=lambda each: (-(each.standard.mean if each.standard else -1.0), each.member.number))
    points = {each.key: each.point for each in found if each.is_on_front and each.point is not None}
    return Result(
        record,
        searched,
        tuple(found),
        best_standard=_best(points, 0),
        best_certified=_best(points, 1),
        knee=knee(points),
    )


def knee(points: Mapping[str, Point]) -> str | None:
    """The point of a front that lies farthest beyond the line through the front's two ends, on its better side.

    With a and b the ends of best standard and of best certified accuracy, and p a point, the distance is

        cross(a - b, p - b) / |a - b|

    Who it is does not depend on the axes' scales. None: no point lies beyond the line, as with fewer than three.
    """
    ends = _best(points, 0), _best(points, 1)
    if ends[0] is None or ends[1] is None or ends[0] == ends[1]:
        return None
    (ax, ay), (bx, by) = points[ends[0]], points[ends[1]]

    def distance(point: Point) -> float:
        return ((ax - bx) * (point[1] - by) - (ay - by) * (point[0] - bx)) / math.hypot(ax - bx, ay - by)

    inner = {key: distance(point) for key, point in points.items() if key not in ends}
    farthest = max(inner, key=inner.__getitem__, default=None)  # of equals the first
    return farthest if farthest is not None and inner[farthest] > _ROUNDING else None


# Accuracies are shares of at most some ten thousand images; a distance below this is rounding.
_ROUNDING = 1e-9


def _best(points: Mapping[str, Point], objective: int) -> str | None:
    """Best in one objective, of equals in the other, then the first."""
    return max(points, key=lambda key: (points[key][objective], points[key][1 - objective]), default=None)


def _confirmed(member: Member, record: StudyRecord, proved_alike: Mapping[str, float]) -> Confirmed:
    own = [trial for trial in record.trials if trial.configuration == member.configuration]
    runs = tuple(sorted((trial for trial in own if trial.objectives is not None), key=_seed))
    present = {_seed(trial) for trial in own if trial.state != "FAILED"}
    failed = {_seed(trial): trial for trial in own if trial.state == "FAILED" and _seed(trial) not in present}
    if not runs:
        return Confirmed(member, (), tuple(failed.values()))
    standard, adversarial = _spread(runs, "standard_accuracy"), _spread(runs, "adversarial_accuracy")
    certified, upper = _spread(runs, "certified_accuracy"), _spread(runs, "certified_upper")
    before = member.searched
    gap = gap_alike = None
    if before is not None:
        gap = before.standard_accuracy - standard.mean, before.certified_accuracy - certified.mean
        alike = Spread(tuple(proved_alike[run.key] for run in runs if run.key in proved_alike))
        finished = all(trial.verification_state != "stopped" for trial in before.trials)
        gap_alike = before.certified_accuracy - alike.mean if finished and len(alike.values) == len(runs) else None
    return Confirmed(member, runs, tuple(failed.values()), standard, adversarial, certified, upper, gap, gap_alike)


def _with_dominance(found: Sequence[Confirmed]) -> list[Confirmed]:
    points = {each.key: each.point for each in found if each.point is not None}
    return [replace(each, dominated_by=_dominating(each.point, points)) for each in found]


def _dominating(point: Point | None, points: Mapping[str, Point]) -> tuple[str, ...]:
    """The keys of the points that are at least as good in both accuracies, and better in one.

    Means of equally many images may differ in their last digit: rounding makes nobody better.
    """
    if point is None:
        return ()
    ahead = {key: (its[0] - point[0], its[1] - point[1]) for key, its in points.items()}
    return tuple(key for key, by in ahead.items() if min(by) >= -_ROUNDING and max(by) > _ROUNDING)


def _spread(runs: Sequence[TrialRecord], name: str) -> Spread:
    return Spread(tuple(float(getattr(run, name)) for run in runs))


def _seed(trial: TrialRecord) -> int:
    return int(trial.params[SEED])
