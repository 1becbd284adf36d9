"""The report of a study as one HTML file that opens anywhere, without a network."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from search.axes import NOT_SET
from search.configurations import Front, study_front
from search.figure_style import FAINT, FONT, GRID, INK, PLOTLY_CONFIG, replace_file
from search.figures import marks, untitled_front
from search.records import StudyRecord, TrialRecord
from search.report_text import (
    ABSENT,
    ResultsText,
    by_standard_accuracy,
    doubts,
    hypervolume_text,
    is_number,
    keys_text,
    means_text,
    parameter_text,
    parameters_text,
    results_text,
    rungs_text,
    setting,
    shared_parameters,
    stopped_summary,
    varied_parameters,
)
from search.trial_figures import costs_figure, hypervolume_figure, known_costs, parameters_figure

OPEN_ROWS = 100  # a longer table of trials starts folded


def write_report(study: StudyRecord, path: Path | str) -> None:
    """Write one HTML file that needs nothing else, not even a network; replaces `path` in one step."""
    page = _page(study)
    replace_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _page(study: StudyRecord) -> str:
    found, styles = study_front(study), _parameter_styles(study.trials)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(study.name)}: front</title>",
            f"<style>{_CSS}</style>",
            f"<script>{get_plotlyjs()}</script>",
            "</head><body><main>",
            f"<h1>{escape(study.name)}</h1>",
            _summary(found),
            _explanation(found),
            *_figures(found),
            "<h2>Front members</h2>",
            _members_table(found, styles),
            f"<h2>All trials</h2><details{' open' if len(study.trials) <= OPEN_ROWS else ''}>",
            f"<summary>{len(study.trials):,} {'trial' if len(study.trials) == 1 else 'trials'}</summary>",
            _trials_table(found, styles),
            "</details></main></body></html>\n",
        ]
    )


def _summary(found: Front) -> str:
    study = found.study
    counts: dict[str, int] = dict.fromkeys(("COMPLETE", "STOPPED", "FAILED", "RUNNING", "WAITING"), 0)
    for trial in study.trials:
        counts[trial.state] += 1
    facts = {
        "on the front": f"{len(found.members)}",
        "hypervolume": hypervolume_text(found),
        "reference": f"({study.reference[0]:g}, {study.reference[1]:g})",
        **{state.lower(): f"{count:,}" for state, count in counts.items() if count or state == "COMPLETE"},
    }
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(fact)}</dd></div>" for name, fact in facts.items())
    return f'<p class="setting">{escape(setting(found))}</p><dl>{cells}</dl>'


def _explanation(found: Front) -> str:
    study = found.study
    points = "Each point is one training run with one seed"
    if found.repeated:
        points = "Each point is the mean of a configuration's training runs, which differ in their seed"
    return f"""<p>Each trial of this study trained one image classifier and measured it on {study.num_images:,} images
that it had not been trained on. <b>Standard accuracy</b> is the share of these images that it labels correctly.
<b>Adversarial accuracy</b> is the share that it still labels correctly after an attack has searched for small changes
of the pixels (within the threat, {escape(study.threat)}) that mislead it. <b>Certified accuracy</b> is the share for
which a proof shows that no such change can mislead it, whatever the attack; where the verifier left images undecided,
it is an interval, and its lower end, the proved part, is what counts here. Certified is never above adversarial, nor
adversarial above standard.</p>
<p>Training for more certified accuracy usually costs standard accuracy, so no single trial is the best. The
<b>front</b> is the choice that remains: a trial is on it if no other is at least as good in both accuracies and better
in one. Decide how much standard accuracy you need, and take the front member with the most certified accuracy among
those that have it. The <b>hypervolume</b> sums the front up in one number, the area between it and the reference point;
larger is better, and only numbers with the same reference compare. {points}:
differences of a few images may be chance.</p>"""


def _figures(found: Front) -> list[str]:
    study = found.study
    shared = parameters_text(shared_parameters(study.complete))
    stopped = stopped_summary(study)
    untimed = sum(trial.finished_at is None for trial in study.complete)
    further_marks = "".join(f"{sentence} " for sentence in marks(found))
    captions = {
        "front": "Right and up is better. Blue points are the front, the shaded area is the hypervolume. A line "
        "upwards from a point ends where its certified accuracy would be if all its undecided images were "
        f"proved. {further_marks}#5 is the trial whose key ends in 0005.",
        "progress": "Hypervolume of the trials finished so far. Wall time includes pauses between continuations."
        + (f" Trials left out because their time of finishing is not known: {untimed}." if untimed else ""),
        "parameters": "One line for each complete trial: the brighter, the more certified accuracy. Drag along an axis "
        f"to keep only the trials that cross there. \u201c{NOT_SET}\u201d: the parameter did not apply."
        + (f" Equal in all trials, so not drawn: {shared}." if shared else ""),
        "costs": "What each trial spent on its parts, failed trials included. A teacher is trained once and shared: "
        "the trial that trained it bears its cost." + (f" {stopped}." if stopped else ""),
    }
    some, several = bool(study.complete), len(study.complete) > 1
    figures = {
        "front": untitled_front(found) if some else None,
        "progress": hypervolume_figure(found) if untimed < len(study.complete) else None,
        "parameters": parameters_figure(study) if several else None,
        "costs": costs_figure(study) if any(map(known_costs, study.trials)) else None,
    }
    return [_section(found, name, figures[name], caption) for name, caption in captions.items()]


def _section(found: Front, name: str, figure: go.Figure | None, caption: str) -> str:
    # Axes without data look like an error, so their place says why it is empty.
    body = '<p class="empty">Not enough trials to show yet.</p>'
    if figure is not None:
        body = figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"figure-{name}", config=PLOTLY_CONFIG)
    caption = f"{escape(caption)} {escape(setting(found))}"
    return f"<h2>{name.capitalize()}</h2><figure>{body}<figcaption>{caption}</figcaption></figure>"


class _Column(NamedTuple):
    name: str
    cells: list[str]
    css: str = "number"


def _members_table(found: Front, styles: Mapping[str, str]) -> str:
    members = by_standard_accuracy(found.members)
    firsts = [member.trials[0] for member in members]
    columns = [
        _Column("trial", [keys_text(found, member) for member in members], "key"),
        *_parameter_columns(styles, firsts),
        _Column("seed", ["\n".join(str(trial.seed) for trial in member.trials) for member in members]),
    ]
    return _table(found, firsts, columns, [means_text(member) for member in members], doubts(found))


def _trials_table(found: Front, styles: Mapping[str, str]) -> str:
    trials = found.study.trials
    states = [_state(trial) for trial in trials]
    columns = [
        _Column("trial", [trial.key for trial in trials], "key"),
        *([_Column("state", states, "state")] if any(state != "complete" for state in states) else []),
        *_parameter_columns(styles, trials),
        _Column("seed", [str(trial.seed) for trial in trials]),
    ]
    return _table(found, trials, columns, [results_text(trial) for trial in trials])


def _state(trial: TrialRecord) -> str:
    """The state, and that of the verification where it did not go to the end."""
    verification = trial.verification_state
    return trial.state.lower() + (f", verification {verification}" if verification not in (None, "finished") else "")


def _parameter_styles(trials: Sequence[TrialRecord]) -> dict[str, str]:
    """The class of the cells of each parameter that varies: numbers are aligned."""
    return {
        name: "number" if all(is_number(trial.params.get(name, 0)) for trial in trials) else "parameter"
        for name in varied_parameters(trials)
    }


def _parameter_columns(styles: Mapping[str, str], trials: Sequence[TrialRecord]) -> list[_Column]:
    return [_Column(name, [parameter_text(trial, name) for trial in trials], css) for name, css in styles.items()]


def _table(
    found: Front,
    trials: Sequence[TrialRecord],
    columns: Sequence[_Column],
    results: Sequence[ResultsText],
    notes: Sequence[str] = (),
) -> str:
    """One row for each trial; why a trial has no results stands where these would be."""
    if not trials:
        return '<p class="empty">None yet.</p>'
    # A long name may be folded at its underscores.
    heads = [(column.name, column.css) for column in columns] + [(name, "number") for name in ResultsText._fields]
    head = "".join(f'<th class="{css}">{escape(name).replace("_", "_<wbr>")}</th>' for name, css in heads)
    marked = [[_cell(text, column.css) for text in column.cells] for column in columns]
    rows = "".join(
        f'<tr class="{trial.state.lower()}">{"".join(cells)}{_results(trial, result)}</tr>\n'
        for trial, result, *cells in zip(trials, results, *marked, strict=True)
    )
    shared = parameters_text(shared_parameters(found.study.trials))
    absent = any(text == ABSENT for column in columns for text in column.cells)
    below = [
        *notes,
        *([f"\u201c{ABSENT}\u201d: the parameter did not apply."] if absent else []),
        *([f"In all trials: {shared}."] if shared else []),
        setting(found),
    ]
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="setting">{escape(" ".join(below))}</p>'
    )


def _results(trial: TrialRecord, results: ResultsText) -> str:
    """The cells of a trial's results, or one cell with the reason why it has none and what its training had shown."""
    if trial.objectives is None:
        why = "; ".join(part for part in (trial.reason, rungs_text(trial)) if part)
        if why:
            return f'<td class="reason" colspan="{len(results)}">{escape(why)}</td>'
    return "".join(_cell(text, "number") for text in results)


def _cell(text: str, css: str) -> str:
    return f'<td class="{css}">{escape(text).replace(chr(10), "<br>")}</td>'


_CSS = f"""
:root {{ color: {INK}; font: 15px/1.55 {FONT}; }}
body {{ margin: 0; background: white; }}
main {{ max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }}
h1 {{ font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }}
h2 {{ font-size: 19px; margin: 40px 0 8px; }}
p {{ max-width: 54em; }}
.setting, figcaption, .empty {{ color: {FAINT}; font-size: 13px; line-height: 1.45; max-width: none; }}
dl {{ display: flex; flex-wrap: wrap; gap: 12px 36px; margin: 20px 0; padding: 14px 0;
     border: solid {GRID}; border-width: 1px 0; }}
dt {{ color: {FAINT}; font-size: 12.5px; }}
dd {{ margin: 0; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }}
figure {{ margin: 0; }}
figcaption {{ margin-top: 6px; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13px; line-height: 1.4; }}
th, td {{ text-align: left; vertical-align: top; padding: 5px 10px 5px 0; border-bottom: 1px solid {GRID}; }}
th:last-child, td:last-child {{ padding-right: 0; }}
th {{ font-weight: 600; border-bottom-color: #AFB8C1; vertical-align: bottom; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
td.number {{ white-space: nowrap; }}
td.parameter {{ max-width: 16em; overflow-wrap: break-word; }}
td.reason {{ overflow-wrap: anywhere; }}
td.key {{ font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 12px; white-space: nowrap; }}
tr.failed td {{ color: #8A3B00; }}
tr.stopped td {{ color: {FAINT}; }}
summary {{ cursor: pointer; margin-bottom: 8px; }}
@page {{ size: A4 landscape; margin: 12mm; }}
@media print {{
  main {{ padding: 0; }}
  h2 {{ break-after: avoid; }}
  figure, tr {{ break-inside: avoid; }}
  .scroll {{ overflow: visible; }}
  .modebar {{ display: none; }}
  table {{ font-size: 10px; }}
  td.key {{ font-size: 9px; }}
}}
"""
