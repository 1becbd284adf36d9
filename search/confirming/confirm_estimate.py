"""What a confirmation will cost, from what the same configurations cost in the search.

Training takes as much longer as there are more images. Verification takes as much longer as there are more images, and
images that the search's ladder left open meet the ensemble; branch and bound adds at most its limit for each of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ccdist.config import TeacherConfig, VerifyConfig
from ccdist.recipe import Recipe
from search.confirming.confirmation import Member, Pair
from search.results.configurations import open_share
from search.studies.records import StudyRecord, TrialRecord


@dataclass(frozen=True)
class Images:
    """How many images the search had, and the confirmation has."""

    train: int
    validation: int
    final_train: int
    test: int

    @property
    def training_growth(self) -> float:
        return self.final_train / self.train


@dataclass(frozen=True)
class RunCost:
    """Seconds of one run; `at_most`: if each image that the search left open takes its whole limit."""

    student: float
    verification: float
    at_most: float  # of the verification


@dataclass(frozen=True)
class Estimate:
    """Seconds of all runs that are left, on one slot."""

    runs: dict[str, RunCost]  # by configuration
    num_runs: dict[str, int]  # left, by configuration
    num_teachers: int
    teachers: float  # all of them

    @property
    def seconds(self) -> float:
        runs = (count * (self.runs[name].student + self.runs[name].verification) for name, count in self._counted())
        return self.teachers + sum(runs)

    @property
    def at_most(self) -> float:
        runs = (count * (self.runs[name].student + self.runs[name].at_most) for name, count in self._counted())
        return self.teachers + sum(runs)

    def _counted(self) -> list[tuple[str, int]]:
        return list(self.num_runs.items())


def estimate(
    members: Sequence[Member],
    left: Sequence[Pair],
    searched: StudyRecord,
    recipe_of: Callable[[Pair], Recipe],
    search_recipe_of: Callable[[TrialRecord], Recipe],
    images: Images,
) -> Estimate:
    """The costs of the runs that are left.

    A member without a cost of its own in the search gets the mean of the others. A teacher costs what the search
    spent on one of the same recipe, else the most that it spent on any; it is paid once for each recipe and seed.
    """
    costs = {member.configuration: _mean_costs(member.searched.trials if member.searched else ()) for member in members}
    anybody = _mean_costs(searched.complete)
    runs, num_runs = {}, {}
    for name in dict.fromkeys(pair.configuration for pair in left):
        pairs = [pair for pair in left if pair.configuration == name]
        cost = costs.get(name) or anybody or _Costs(0.0, 0.0, 0.0)
        runs[name] = run_cost(
            cost.student, cost.verification, cost.open_share, recipe_of(pairs[0]).verification, images
        )
        num_runs[name] = len(pairs)
    recipes = [recipe for pair in left if (recipe := recipe_of(pair)).needs_teacher]
    needed = {recipe.teacher for recipe in recipes}
    paid = _teacher_costs(searched, search_recipe_of)
    most = max(paid.values(), default=0.0)
    teachers = sum(paid.get(_without_seed(teacher), most) for teacher in needed) * images.training_growth
    return Estimate(runs, num_runs, len(needed), teachers)


def run_cost(student: float, verification: float, open_share: float, verifier: VerifyConfig, images: Images) -> RunCost:
    """Seconds of one run.

        one image    = verification / validation images
        verification = one image * test images + open images * one image * ensemble's passes / passes of PGD
        at most      = verification + open images * limit

    Args:
        student, verification: seconds in the search.
        open_share: of its validation images that its ladder left undecided.
        verifier: the confirmation's ladder.
    """
    one_image, open_images = verification / images.validation, open_share * images.test
    growth = ensemble_passes(verifier) / (verifier.attack.steps * verifier.attack.restarts)
    expected = one_image * images.test + (open_images * one_image * growth if "ensemble" in verifier.rungs else 0.0)
    limit = verifier.branch_and_bound.timeout_s if "branch_and_bound" in verifier.rungs else 0.0
    at_most = expected + open_images * (float("inf") if limit is None and open_images else limit or 0.0)
    return RunCost(student * images.training_growth, expected, at_most)


def ensemble_passes(verifier: VerifyConfig) -> float:
    """Passes forward and back that the ensemble makes for an image that survives it; a pass of Square is a third."""
    config = verifier.ensemble
    gradients = config.restarts * config.steps * (1 + 2 * config.targets)  # APGD-CE; targeted APGD and FAB
    return gradients + config.square_queries / 3


@dataclass(frozen=True)
class _Costs:
    student: float
    verification: float
    open_share: float


def _mean_costs(trials: Sequence[TrialRecord]) -> _Costs | None:
    known = [trial for trial in trials if trial.costs and trial.certified_accuracy is not None]
    if not known:
        return None
    return _Costs(
        sum(trial.costs.get("student", 0.0) for trial in known) / len(known),
        sum(trial.costs.get("verification", 0.0) for trial in known) / len(known),
        sum(open_share(trial) for trial in known) / len(known),
    )


def _teacher_costs(searched: StudyRecord, recipe_of: Callable[[TrialRecord], Recipe]) -> dict[TeacherConfig, float]:
    """What the search spent on a teacher, by its recipe without the seed."""
    paid: dict[TeacherConfig, float] = {}
    for trial in searched.complete:
        if seconds := trial.costs.get("teacher", 0.0):
            teacher = _without_seed(recipe_of(trial).teacher)
            paid[teacher] = max(seconds, paid.get(teacher, 0.0))
    return paid


def _without_seed(teacher: TeacherConfig) -> TeacherConfig:
    return teacher.model_copy(update={"seed": 0})
