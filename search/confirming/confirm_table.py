"""What a confirmation is about to run, and what it will cost: printed before it starts."""

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from search.confirming.confirm_estimate import Estimate, Images
from search.confirming.confirmation import Member, Pair
from search.confirming.confirmation_config import ConfirmationConfig
from search.plan import duration, slots_here
from search.results.report_text import ABSENT
from search.scheduling.budget import SECONDS_PER_HOUR
from search.studies.records import StudyRecord
from search.studies.study_record import verifier_text

HEADER = ("member", "standard", "certified", "runs left", "training", "verification", "at most")


def plan_table(
    config: ConfirmationConfig,
    searched: StudyRecord,
    members: Sequence[Member],
    plan: Sequence[Pair],
    cost: Estimate,
    images: Images,
) -> Group:
    """The members with their results in the search, the runs that are left, and their hours."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in HEADER:
        table.add_column(Text(name), justify="left" if name == "member" else "right", vertical="bottom")
    for member in members:
        table.add_row(*map(Text, _row(member, plan, cost)))
    heading = f"confirmation {config.study_name} of study {searched.name}; accuracies on its validation images:"
    return Group(Text(heading, style="bold"), Text(), table, Text(), *map(Text, lines(config, plan, cost, images)))


def _row(member: Member, plan: Sequence[Pair], cost: Estimate) -> tuple[str, ...]:
    of = sum(pair.configuration == member.configuration for pair in plan)
    left, run, known = cost.num_runs.get(member.configuration, 0), cost.runs.get(member.configuration), member.searched
    accuracies = (ABSENT, ABSENT) if known is None else tuple(f"{value:.4f}" for value in known.objectives)
    costs = (ABSENT,) * 3 if run is None else tuple(map(duration, (run.student, run.verification, run.at_most)))
    return member.key, *accuracies, f"{left} of {of}", *costs


def lines(config: ConfirmationConfig, plan: Sequence[Pair], cost: Estimate, images: Images) -> list[str]:
    """What runs, on what, for how long."""
    left = sum(cost.num_runs.values())
    at_once = min(left, slots_here(config.resources))
    unit = "GPU" if config.resources.gpu else "core"
    share = config.resources.gpu or config.resources.cpu
    limit = config.verification.branch_and_bound.timeout_s
    what = (
        f"each run: training on {images.final_train:,} images (training and validation), then "
        f"{verifier_text(config.verification)} on {images.test:,} test images of {config.data.name}; threat "
        f"{config.threat}"
    )
    expected, at_most = cost.seconds / at_once, cost.at_most / at_once
    how_many = (
        f"{left} of {len(plan)} runs are left, with {cost.num_teachers} teachers ({duration(cost.teachers)}); "
        f"{at_once} at once on this machine"
    )
    hours = f"estimate: {_hours(expected)} ({duration(expected)}; {_hours(cost.seconds * share, unit)})"
    if "branch_and_bound" in config.verification.rungs:
        hours += (
            f", before branch and bound; at most {_hours(at_most)} ({duration(at_most)}), if each image that the "
            f"search left open takes its whole {limit:g} s"
        )
    return [what, how_many, hours]


def _hours(seconds: float, unit: str = "") -> str:
    return f"{seconds / SECONDS_PER_HOUR:.2g} {f'{unit}-' if unit else ''}hours"
