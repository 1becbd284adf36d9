"""What a study found, as numbers, as text, as a table for the terminal and as plain JSON.

Everything is a function of a `StudyRecord`, so a report can be made from what is stored, at any time, and the same
record gives the same bytes. The hypervolume of a study is that of its COMPLETE trials' objectives.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from textwrap import wrap
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from search.pareto import front, hypervolume
from search.records import OBJECTIVES, StudyRecord, TrialRecord

ABSENT = "-"  # in tables: the trial does not have the parameter
HEADER_WIDTH = 8  # a longer name of a parameter is folded at its underscores
UNLIMITED = 10_000  # a terminal wide enough for any table


# ---- The front -------------------------------------------------------------------------------------------------


def front_trials(study: StudyRecord) -> tuple[TrialRecord, ...]:
    """The COMPLETE trials that no other dominates, in the study's order.

    Raises:
        ValueError: a result is NaN or infinite; the text names the trial.
    """
    complete = study.complete
    return tuple(complete[index] for index in front(finite_objectives(study)))


def study_hypervolume(study: StudyRecord) -> float:
    """Area that the COMPLETE trials dominate, counted from the study's reference."""
    return hypervolume(finite_objectives(study), study.reference)


def finite_objectives(study: StudyRecord) -> list[tuple[float, float]]:
    """Objectives of the COMPLETE trials; refuses any trial whose numbers would be ranked or drawn wrongly."""
    for trial in study.trials:
        for name in (*OBJECTIVES, "adversarial_accuracy", "certified_upper", "seconds"):
            value = getattr(trial, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"trial {trial.key} has {name} = {value}: a report shows finite results only")
    return [trial.objectives for trial in study.complete if trial.objectives is not None]


def by_standard_accuracy(trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    """The best standard accuracy first."""
    return sorted(trials, key=lambda trial: (-(trial.standard_accuracy or 0.0), trial.number))


def varied_parameters(trials: Iterable[TrialRecord]) -> list[str]:
    """Names of the parameters with more than one value among these trials (of one trial: all), in order."""
    given = [trial.params for trial in trials if trial.params]
    names = dict.fromkeys(name for params in given for name in params)
    if len(given) < 2:
        return list(names)
    return [name for name in names if any(repr(a.get(name)) != repr(b.get(name)) for a, b in pairwise(given))]


def shared_parameters(trials: Sequence[TrialRecord]) -> dict[str, Any]:
    """The parameters that `varied_parameters` leaves out, which have one value in all these trials."""
    varied = set(varied_parameters(trials))
    return {name: value for trial in trials for name, value in trial.params.items() if name not in varied}


# ---- As text ---------------------------------------------------------------------------------------------------


def setting(study: StudyRecord) -> str:
    """What every figure and table has to say about its numbers."""
    return (
        f"{study.num_images:,} validation images of {study.dataset}; threat: {study.threat}; "
        f"verifier: {study.verifier}; each point: n = 1 seed."
    )


def front_summary(study: StudyRecord) -> str:
    complete = len(study.complete)
    noun = "trial" if complete == 1 else "trials"
    return f"{len(front_trials(study))} of {complete} complete {noun} on the front"


def hypervolume_summary(study: StudyRecord) -> str:
    return f"hypervolume {study_hypervolume(study):.4f} above ({study.reference[0]:g}, {study.reference[1]:g})"


def value_text(value: Any, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def parameters_text(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value_text(value)}" for name, value in params.items())


def parameter_text(trial: TrialRecord, name: str, digits: int = 4) -> str:
    return value_text(trial.params[name], digits) if name in trial.params else ABSENT


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class ResultsText(NamedTuple):
    """A trial's results, each empty while it is unknown."""

    standard: str
    adversarial: str
    certified: str  # the proved share, and what it could still become where images are left undecided
    seconds: str


def results_text(trial: TrialRecord) -> ResultsText:
    lower, upper = _fraction(trial.certified_accuracy), _fraction(trial.certified_upper)
    seconds = trial.seconds
    return ResultsText(
        _fraction(trial.standard_accuracy),
        _fraction(trial.adversarial_accuracy),
        f"{lower}\u2013{upper}" if lower and upper and lower != upper else lower,
        "" if seconds is None else f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}",
    )


def _fraction(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


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
        for columns in self._split(console, options):
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


def front_table(study: StudyRecord) -> FrontTable:
    """The front for a terminal, best standard accuracy first."""
    members = by_standard_accuracy(front_trials(study))
    results = [results_text(trial) for trial in members]
    shared = parameters_text(shared_parameters(study.complete))
    return FrontTable(
        heading=f"{study.name}: {front_summary(study)}\n{hypervolume_summary(study)}",
        key=_Column("trial", [trial.key for trial in members], is_numeric=False),
        results=[_Column(name, [getattr(result, name) for result in results]) for name in ResultsText._fields],
        parameters=[_parameter_column(members, name) for name in varied_parameters(study.complete)],
        caption=setting(study) + (f"\nIn all trials: {shared}." if shared else ""),
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
        table.add_row(*(Text(cell) for cell in cells))
    return table


# ---- As JSON ---------------------------------------------------------------------------------------------------


def front_json(study: StudyRecord) -> dict[str, Any]:
    """The study and its front as plain values; the keys of the front are in the order of the trials."""
    return {
        "study": study.name,
        "objectives": list(OBJECTIVES),
        "hypervolume": study_hypervolume(study),
        "reference": list(study.reference),
        "trials": [
            {
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
            }
            for trial in study.trials
        ],
        "front": [trial.key for trial in front_trials(study)],
    }
