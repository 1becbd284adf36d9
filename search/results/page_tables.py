"""The tables of a study's page: the front, and all trials with their parameters, results and reasons.

A table may have 10,000 rows. What a browser has to lay out at once is bounded, the rest lies in folds; and as HTML lets
the end tags of cells and rows be left out, they are, which makes a long table half as large.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple, TypeVar

from search.results.configurations import Configuration, Front
from search.results.report_text import (
    ABSENT,
    ResultsText,
    by_standard_accuracy,
    doubts,
    is_number,
    keys_text,
    means_text,
    parameter_text,
    parameters_text,
    results_text,
    rungs_text,
    setting,
    shared_parameters,
    varied_parameters,
)
from search.studies.records import TrialRecord

OPEN_ROWS = 100  # a longer table starts folded,
BLOCK_ROWS = 500  # in folds of so many rows, each of which a browser lays out when it is opened
_Row = TypeVar("_Row")


def tables(found: Front) -> list[str]:
    """The front and all trials, each with a heading, and what holds for both."""
    trials, styles = found.study.trials, _parameter_styles(found.study.trials)
    members = by_standard_accuracy(found.members)
    return [
        "<h2>Front members</h2>",
        *_folded(members, "Members", lambda some: _members_table(found, some, styles), is_open=True),
        *_below([*doubts(found), setting(found)] if members else []),
        "<h2>All trials</h2>",
        *_folded(trials, "Trials", lambda some: _trials_table(found, some, styles)),
        *_below(_notes(found) if trials else []),
    ]


def _folded(
    rows: Sequence[_Row], noun: str, table: Callable[[Sequence[_Row]], str], *, is_open: bool = False
) -> list[str]:
    """One table, or where it would be long several in folds.

    Args:
        is_open: the first fold is not closed.
    """
    if not rows:
        return ['<p class="empty">None yet.</p>']
    if len(rows) <= OPEN_ROWS:
        return [table(rows)]
    folds = []
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        summary = f"{noun} {start + 1:,} to {start + len(block):,} of {len(rows):,}"
        is_first = " open" if is_open and start == 0 else ""
        folds.append(f"<details{is_first}><summary>{summary}</summary>{table(block)}</details>")
    return folds


def _below(sentences: Sequence[str]) -> list[str]:
    return [f'<p class="setting">{escape(" ".join(sentences))}</p>'] if sentences else []


def _notes(found: Front) -> list[str]:
    """How the table of all trials is read."""
    trials, shared = found.study.trials, parameters_text(shared_parameters(found.study.trials))
    varied = varied_parameters(trials)
    absent = any(name not in trial.params for trial in trials for name in varied)
    return [
        *(["What is folded is not printed."] if len(trials) > OPEN_ROWS else []),
        *(["Keys in bold are on the front."] if found.members else []),
        *([f"\u201c{ABSENT}\u201d: the parameter did not apply."] if absent else []),
        *([f"In all trials: {shared}."] if shared else []),
        setting(found),
    ]


class _Column(NamedTuple):
    name: str
    cells: list[str]
    css: str = ""  # numbers, which most columns hold, need none


def _members_table(found: Front, members: Sequence[Configuration], styles: Mapping[str, str]) -> str:
    firsts = [member.trials[0] for member in members]
    columns = [
        *_parameter_columns(styles, firsts),
        _Column("seed", ["\n".join(str(trial.seed) for trial in member.trials) for member in members]),
    ]
    keys = [_Column("trial", [keys_text(found, member) for member in members], "key")]
    return _table(firsts, keys, [means_text(member) for member in members], columns)


def _trials_table(found: Front, trials: Sequence[TrialRecord], styles: Mapping[str, str]) -> str:
    members = {trial.number for member in found.members for trial in member.trials}
    has_states = any(_state(trial) != "complete" for trial in found.study.trials)
    columns = [
        _Column("trial", [trial.key for trial in trials], "key"),
        *([_Column("state", [_state(trial) for trial in trials], "state")] if has_states else []),
    ]
    further = [*_parameter_columns(styles, trials), _Column("seed", [str(trial.seed) for trial in trials])]
    return _table(trials, columns, [results_text(trial) for trial in trials], further, members)


def _state(trial: TrialRecord) -> str:
    """The state, and that of the verification where it did not go to the end."""
    verification = trial.verification_state
    return trial.state.lower() + (f", verification {verification}" if verification not in (None, "finished") else "")


def _parameter_styles(trials: Sequence[TrialRecord]) -> dict[str, str]:
    """The class of the cells of each parameter that varies: numbers are aligned."""
    return {
        name: "" if all(is_number(trial.params.get(name, 0)) for trial in trials) else "parameter"
        for name in varied_parameters(trials)
    }


def _parameter_columns(styles: Mapping[str, str], trials: Sequence[TrialRecord]) -> list[_Column]:
    return [_Column(name, [parameter_text(trial, name) for trial in trials], css) for name, css in styles.items()]


def _table(
    trials: Sequence[TrialRecord],
    columns: Sequence[_Column],
    results: Sequence[ResultsText],
    further: Sequence[_Column],
    bold: Container[int] = (),
) -> str:
    """One row for each trial, results first; why a trial has none stands where they would be."""
    heads = [(column.name, column.css) for column in columns]
    heads += [(name, "") for name in ResultsText._fields] + [(column.name, column.css) for column in further]
    # A long name may be folded at its underscores.
    head = "".join(f"<th{_class(css)}>{escape(name).replace('_', '_<wbr>')}" for name, css in heads)
    before, after = ([[_cell(text, each.css) for text in each.cells] for each in group] for group in (columns, further))
    rows = "".join(
        f"<tr{_class(' '.join(_row_classes(trial, bold)))}>{''.join(left)}{_results(trial, result)}{''.join(right)}\n"
        for trial, result, left, right in zip(trials, results, _rows(before), _rows(after), strict=True)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</thead><tbody>{rows}</tbody></table></div>'


def _rows(columns: Sequence[Sequence[str]]) -> Iterator[tuple[str, ...]]:
    return zip(*columns, strict=True)


def _row_classes(trial: TrialRecord, bold: Container[int]) -> list[str]:
    state = [] if trial.state == "COMPLETE" else [trial.state.lower()]
    return [*state, "member"] if trial.number in bold else state


def _results(trial: TrialRecord, results: ResultsText) -> str:
    """The cells of a trial's results, or one cell with the reason why it has none and what its training had shown."""
    if trial.objectives is None:
        why = "; ".join(part for part in (trial.reason, rungs_text(trial)) if part)
        if why:
            return f'<td class="reason" colspan="{len(results)}">{escape(why)}'
    return "".join(_cell(text, "") for text in results)


def _cell(text: str, css: str) -> str:
    return f"<td{_class(css)}>{escape(text).replace(chr(10), '<br>')}"


def _class(css: str) -> str:
    return f' class="{css}"' if css else ""
