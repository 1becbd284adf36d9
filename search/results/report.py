"""What a study found: its front and hypervolume, as a table for the terminal and as plain JSON.

Everything is a function of a `StudyRecord`, so a report can be made from what is stored, at any time, and the same
record gives the same bytes. Points, front and hypervolume are those of `search.results.configurations`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from search.attempts.deaths import account
from search.pareto import hypervolume
from search.results.configurations import Configuration, Front, configurations, study_front
from search.results.report_text import (
    ResultsText,
    by_standard_accuracy,
    doubts,
    front_summary,
    hypervolume_summary,
    is_number,
    keys_text,
    means_text,
    parameter_text,
    parameters_text,
    setting,
    shared_parameters,
    spread,
    stopped_summary,
    varied_parameters,
)
from search.studies.records import OBJECTIVES, StudyRecord, TrialRecord

HEADER_WIDTH = 8  # a longer name of a parameter is folded at its underscores
SHOWN_MEMBERS = 30  # of a larger front a terminal shows so many, spread over it
UNLIMITED = 10_000  # a terminal wide enough for any table


# ---- The front -------------------------------------------------------------------------------------------------


def front_trials(study: StudyRecord) -> tuple[TrialRecord, ...]:
    """The COMPLETE trials of the configurations on the front, in the study's order.

    Raises:
        ValueError: a result is NaN or infinite; the text names the trial.
    """
    return _trials(study_front(study).members)


def _trials(members: Iterable[Configuration]) -> tuple[TrialRecord, ...]:
    return tuple(sorted((trial for member in members for trial in member.trials), key=lambda trial: trial.number))


def study_hypervolume(study: StudyRecord) -> float:
    """Area that the configurations dominate, counted from the study's reference."""
    return hypervolume([each.objectives for each in configurations(study)], study.reference)


# ---- As a table for the terminal -------------------------------------------------------------------------------


class _Column(NamedTuple):
    header: str
    cells: list[str]
    is_numeric: bool = True


@dataclass(frozen=True)
class FrontTable:
    """One table where the terminal is wide enough for it, else the results and below them the parameters."""

    heading: str
    key: _Column
    results: list[_Column]
    parameters: list[_Column]
    caption: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text | Table]:
        # Text, not str: a parameter's value in square brackets is no markup.
        yield Text(self.heading, style="bold")
        for columns in self._split(console, options) if self.key.cells else []:
            yield Text()
            yield _terminal_table(columns)
        yield Text()
        yield Text(self.caption, style="dim")

    def _split(self, console: Console, options: ConsoleOptions) -> list[list[_Column]]:
        def fits(columns: list[_Column]) -> bool:
            table = _terminal_table(columns)
            return console.measure(table, options=options.update(width=UNLIMITED)).maximum <= options.max_width

        everything = [self.key, *self.results, *self.parameters]
        if fits(everything):
            return [everything]
        tables = [[self.key, *self.results]]
        for parameter in self.parameters:
            if len(tables) > 1 and fits([*tables[-1], parameter]):
                tables[-1].append(parameter)
            else:
                tables.append([self.key, parameter])
        return tables


def front_table(study: StudyRecord, most: int | None = SHOWN_MEMBERS) -> FrontTable:
    """The front for a terminal, best standard accuracy first; a configuration with several seeds is one row.

    Args:
        most: of a front with more members only so many are listed, spread over it; None: all are.
    """
    found = study_front(study)
    members = by_standard_accuracy(found.members)
    left_out = ""
    if most is not None and len(members) > most:
        members = spread(members, most)
        left_out = (
            f"{len(members)} of the {len(found.members):,} members of the front, spread over it; "
            f"python -m search.front {study.name} --all lists them all."
        )
    results = [means_text(member) for member in members]
    seeds = [_Column("seeds", [str(member.num_seeds) for member in members])] if found.repeated else []
    shared = parameters_text(shared_parameters(study.complete))
    stopped = stopped_summary(study)
    firsts = [member.trials[0] for member in members]
    notes = [*filter(None, [left_out]), *doubts(found), *([f"{stopped}."] if stopped else []), setting(found)]
    notes += [f"{lost}." for lost in [account(study)] if lost]
    return FrontTable(
        heading=f"{study.name}: {front_summary(found)}\n{hypervolume_summary(found)}",
        key=_Column("trial", [keys_text(found, member) for member in members], is_numeric=False),
        results=seeds + [_Column(name, [getattr(result, name) for result in results]) for name in ResultsText._fields],
        parameters=[_parameter_column(firsts, name) for name in varied_parameters(study.complete)],
        caption="\n".join([*notes, *([f"In all trials: {shared}."] if shared else [])]),
    )


def _parameter_column(trials: Sequence[TrialRecord], name: str) -> _Column:
    cells = [parameter_text(trial, name, digits=3) for trial in trials]
    width = max(HEADER_WIDTH, *(len(cell) for cell in cells)) if cells else HEADER_WIDTH
    header = "\n".join(wrap(name.replace("_", "_ "), width, break_long_words=False)).replace("_ ", "_")
    return _Column(header, cells, all(is_number(trial.params.get(name, 0)) for trial in trials))


def _terminal_table(columns: Sequence[_Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    for column in columns:
        table.add_column(
            Text(column.header), justify="right" if column.is_numeric else "left", vertical="bottom", overflow="fold"
        )
    for cells in zip(*(column.cells for column in columns), strict=True):
        # Headers stand at the bottom and Rich aligns cells likewise: a row of several lines is filled up from below.
        below = max(cell.count("\n") for cell in cells)
        table.add_row(*(Text(cell + "\n" * (below - cell.count("\n"))) for cell in cells))
    return table


# ---- As JSON ---------------------------------------------------------------------------------------------------


def front_json(study: StudyRecord) -> dict[str, Any]:
    """The study and its front as plain values; the keys of the front are in the order of the trials."""
    found = study_front(study)
    return {
        "study": study.name,
        "objectives": list(OBJECTIVES),
        "hypervolume": found.hypervolume_bounds[0],
        "hypervolume_bounds": list(found.hypervolume_bounds),
        "reference": list(study.reference),
        "trials": [_trial_json(trial) for trial in study.trials],
        "front": [trial.key for trial in _trials(found.members)],
        "configurations": _configurations_json(found),
    }


def _trial_json(trial: TrialRecord) -> dict[str, Any]:
    return {
        "key": trial.key,
        "state": trial.state,
        "params": dict(trial.params),
        "standard_accuracy": trial.standard_accuracy,
        "certified_accuracy": trial.certified_accuracy,
        "certified_upper": trial.certified_upper,
        "adversarial_accuracy": trial.adversarial_accuracy,
        "seconds": trial.seconds,
        "configuration": trial.configuration,
        "seed": trial.seed,
        "verification_state": trial.verification_state,
        "reason": trial.reason,
        "deaths": [asdict(death) for death in trial.deaths],
        "rungs": {name: asdict(values) for name, values in trial.rungs.items()},
    }


def _configurations_json(found: Front) -> list[dict[str, Any]]:
    """Means and ranges of the configurations; `certain`: whatever the undecided images are, `on_front` stays."""
    members, possible = ({each.number for each in group} for group in (found.members, found.possible))
    return [
        {
            "configuration": each.trials[0].configuration,
            "trials": [trial.key for trial in each.trials],
            "num_seeds": each.num_seeds,
            "standard_accuracy": each.standard_accuracy,
            "certified_accuracy": each.certified_accuracy,
            "certified_upper": each.certified_upper,
            "standard_range": list(each.standard_range),
            "certified_range": list(each.certified_range),
            "on_front": each.number in members,
            "certain": each.number not in possible and each.number not in found.doubtful,
        }
        for each in found.configurations
    ]
