"""The report of a study as one HTML file that opens anywhere, without a network."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from search.axes import NOT_SET
from search.figures import (
    FAINT,
    FONT,
    GRID,
    INK,
    PLOTLY_CONFIG,
    costs_figure,
    front_figure,
    hypervolume_figure,
    parameters_figure,
    replace_file,
)
from search.records import StudyRecord, TrialRecord
from search.report import (
    ABSENT,
    by_standard_accuracy,
    front_trials,
    is_number,
    parameter_text,
    parameters_text,
    results_text,
    setting,
    shared_parameters,
    study_hypervolume,
    varied_parameters,
)

OPEN_ROWS = 100  # a longer table of trials starts folded


def write_report(study: StudyRecord, path: Path | str) -> None:
    """Write one HTML file that needs nothing else, not even a network; replaces `path` in one step."""
    page = _page(study)
    replace_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _page(study: StudyRecord) -> str:
    members = by_standard_accuracy(front_trials(study))
    parameters = [_parameter(study.trials, name) for name in varied_parameters(study.trials)]
    states = [_STATE] if any(_state(trial) != "complete" for trial in study.trials) else []
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
            _summary(study, len(members)),
            _explanation(study),
            *_figures(study),
            "<h2>Front members</h2>",
            _table(study, members, [_KEY, *parameters, _SEED, *_RESULTS]),
            f"<h2>All trials</h2><details{' open' if len(study.trials) <= OPEN_ROWS else ''}>",
            f"<summary>{len(study.trials):,} {'trial' if len(study.trials) == 1 else 'trials'}</summary>",
            _table(study, study.trials, [_KEY, *states, *parameters, _SEED, *_RESULTS]),
            "</details></main></body></html>\n",
        ]
    )


def _summary(study: StudyRecord, num_members: int) -> str:
    counts = dict.fromkeys(("COMPLETE", "FAILED", "RUNNING", "WAITING"), 0)
    for trial in study.trials:
        counts[trial.state] += 1
    facts = {
        "on the front": f"{num_members}",
        "hypervolume": f"{study_hypervolume(study):.4f}",
        "reference": f"({study.reference[0]:g}, {study.reference[1]:g})",
        **{state.lower(): f"{count:,}" for state, count in counts.items() if count or state == "COMPLETE"},
    }
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(fact)}</dd></div>" for name, fact in facts.items())
    return f'<p class="setting">{escape(setting(study))}</p><dl>{cells}</dl>'


def _explanation(study: StudyRecord) -> str:
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
larger is better, and only numbers with the same reference compare. Each point is one training run with one seed:
differences of a few images may be chance.</p>"""


def _figures(study: StudyRecord) -> list[str]:
    shared = parameters_text(shared_parameters(study.complete))
    untimed = sum(trial.finished_at is None for trial in study.complete)
    captions = {
        "front": "Right and up is better. Blue points are the front, the shaded area is the hypervolume. A line "
        "upwards from a point ends where its certified accuracy would be if all its undecided images were "
        "proved. #5 is the trial whose key ends in 0005.",
        "progress": "Hypervolume of the trials finished so far. Wall time includes pauses between continuations."
        + (f" Trials left out because their time of finishing is not known: {untimed}." if untimed else ""),
        "parameters": "One line for each complete trial: the brighter, the more certified accuracy. Drag along an axis "
        f"to keep only the trials that cross there. \u201c{NOT_SET}\u201d: the parameter did not apply."
        + (f" Equal in all trials, so not drawn: {shared}." if shared else ""),
        "costs": "What each trial spent on its parts, failed trials included. A teacher is trained once and shared: "
        "the trial that trained it bears its cost.",
    }
    some, several = bool(study.complete), len(study.complete) > 1
    figures = {
        "front": front_figure(study, titled=False) if some else None,
        "progress": hypervolume_figure(study) if untimed < len(study.complete) else None,
        "parameters": parameters_figure(study) if several else None,
        "costs": costs_figure(study) if any(trial.costs for trial in study.trials) else None,
    }
    return [_section(study, name, figures[name], caption) for name, caption in captions.items()]


def _section(study: StudyRecord, name: str, figure: go.Figure | None, caption: str) -> str:
    # Axes without data look like an error, so their place says why it is empty.
    body = '<p class="empty">Not enough trials to show yet.</p>'
    if figure is not None:
        body = figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"figure-{name}", config=PLOTLY_CONFIG)
    caption = f"{escape(caption)} {escape(setting(study))}"
    return f"<h2>{name.capitalize()}</h2><figure>{body}<figcaption>{caption}</figcaption></figure>"


class _Column(NamedTuple):
    name: str
    text: Callable[[TrialRecord], str]
    css: str = "number"


def _state(trial: TrialRecord) -> str:
    """The state, and that of the verification where it did not go to the end."""
    verification = trial.verification_state
    return trial.state.lower() + (f", {verification}" if verification not in (None, "finished") else "")


_KEY = _Column("trial", lambda trial: trial.key, "key")
_STATE = _Column("state", _state, "state")
_SEED = _Column("seed", lambda trial: str(trial.seed))
_RESULTS = (
    _Column("standard", lambda trial: results_text(trial).standard),
    _Column("adversarial", lambda trial: results_text(trial).adversarial),
    _Column("certified", lambda trial: results_text(trial).certified),
    _Column("seconds", lambda trial: results_text(trial).seconds),
)


def _parameter(trials: Sequence[TrialRecord], name: str) -> _Column:
    numeric = all(is_number(trial.params.get(name, 0)) for trial in trials)
    return _Column(name, lambda trial: parameter_text(trial, name), "number" if numeric else "parameter")


def _row(trial: TrialRecord, columns: Sequence[_Column]) -> str:
    """One trial; the reason why it failed stands where its results would be."""
    reason = trial.reason if trial.objectives is None else None
    cells = [
        f'<td class="{column.css}">{escape(column.text(trial))}</td>'
        for column in columns
        if reason is None or column not in _RESULTS
    ]
    if reason is not None:
        cells.append(f'<td class="reason" colspan="{len(_RESULTS)}">{escape(reason)}</td>')
    return f'<tr class="{trial.state.lower()}">{"".join(cells)}</tr>\n'


def _table(study: StudyRecord, trials: Sequence[TrialRecord], columns: Sequence[_Column]) -> str:
    if not trials:
        return '<p class="empty">None yet.</p>'
    # A long name may be folded at its underscores.
    head = "".join(f'<th class="{c.css}">{escape(c.name).replace("_", "_<wbr>")}</th>' for c in columns)
    rows = "".join(_row(trial, columns) for trial in trials)
    shared = parameters_text(shared_parameters(study.trials))
    notes = [f"In all trials: {shared}."] if shared else []
    if any(column.text(trial) == ABSENT for column in columns for trial in trials):
        notes.insert(0, f"\u201c{ABSENT}\u201d: the parameter did not apply.")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="setting">{escape(" ".join([*notes, setting(study)]))}</p>'
    )


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
