"""The report of a study as one HTML file that opens anywhere, without a network."""

from html import escape
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from search.results.axes import NOT_SET
from search.results.configurations import Front, study_front
from search.results.figure_style import FAINT, FONT, GRID, INK, PLOTLY_CONFIG, replace_file
from search.results.figures import marks, untitled_front
from search.results.page_tables import tables
from search.results.report_text import (
    ABSENT,
    hypervolume_text,
    parameters_text,
    setting,
    shared_parameters,
    stopped_summary,
)
from search.results.trial_figures import (
    costs_figure,
    costs_text,
    hypervolume_figure,
    known_costs,
    parameters_figure,
    parameters_text_of,
)
from search.studies.records import StudyRecord


def write_report(study: StudyRecord, path: Path | str) -> None:
    """Write one HTML file that needs nothing else, not even a network; replaces `path` in one step."""
    page = _page(study)
    replace_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _page(study: StudyRecord) -> str:
    found = study_front(study)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(study.name)}: front</title>",
            f"<style>{_CSS}</style>",
            f"<script>{get_plotlyjs()}</script>" if _has_figures(study) else "",
            "</head><body><main>",
            f"<h1>{escape(study.name)}</h1>",
            _summary(found),
            _explanation(found),
            *_figures(found),
            *tables(found),
            f"</main><script>{_PRINT_SCRIPT}</script></body></html>\n",
        ]
    )


def _has_figures(study: StudyRecord) -> bool:
    return bool(study.complete) or any(map(known_costs, study.trials))


def _summary(found: Front) -> str:
    study = found.study
    counts: dict[str, int] = dict.fromkeys(("COMPLETE", "STOPPED", "FAILED", "RUNNING", "WAITING"), 0)
    for trial in study.trials:
        counts[trial.state] += 1
    facts = {
        "on the front": f"{len(found.members):,}",
        "hypervolume": hypervolume_text(found) if found.members else ABSENT,
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
    images = f"{study.num_images:,} images" if study.num_images else "images"
    return f"""<p>Each trial of this study trains one image classifier and measures it on {images}
that it has not been trained on. <b>Standard accuracy</b> is the share of these images that it labels correctly.
<b>Adversarial accuracy</b> is the share that it still labels correctly after an attack has searched for small changes
of the pixels that mislead it: {escape(_reach(study.threat))}. <b>Certified accuracy</b> is the share for
which a proof shows that no such change can mislead it, whatever the attack; where the verifier left images undecided,
it is an interval, and its lower end, the proved part, is what counts here. Certified is never above adversarial, nor
adversarial above standard.</p>
<p>Training for more certified accuracy usually costs standard accuracy, so no single trial is the best. The
<b>front</b> is the choice that remains: a trial is on it if no other is at least as good in both accuracies and better
in one. Decide how much standard accuracy you need, and take the front member with the most certified accuracy among
those that have it. The <b>hypervolume</b> sums the front up in one number, the area between it and the reference point;
larger is better, and only numbers with the same reference compare. {points}:
differences of a few images may be chance.</p>"""


def _reach(threat: str) -> str:
    """What a threat allows, for readers who do not know its notation."""
    norm, _, epsilon = threat.partition(" ")
    sizes = {
        "linf": f"of every pixel by at most {epsilon} of the range from black to white",
        "l2": f"of all pixels together by at most {epsilon} in Euclidean length, with black 0 and white 1",
    }
    return f"{sizes[norm]} (the threat, {threat})" if norm in sizes else f"within the threat, {threat}"


def _figures(found: Front) -> list[str]:
    study = found.study
    if not _has_figures(study):
        return ['<p class="empty">No trial has finished yet, so there is nothing to draw.</p>']
    shared = parameters_text(shared_parameters(study.complete))
    stopped = stopped_summary(study)
    untimed = sum(trial.finished_at is None for trial in study.complete)
    further_marks = "".join(f"{sentence} " for sentence in marks(found))
    captions = {
        "front": "Right and up is better. Blue points on the line are the front, the shaded area is the hypervolume. A "
        "line upwards from a point ends where its certified accuracy would be if all its undecided images were "
        f"proved. {further_marks}#5 is the trial whose key ends in 0005.",
        "progress": "Hypervolume of the trials finished so far. Wall time includes pauses between continuations."
        + (f" Trials left out because their time of finishing is not known: {untimed}." if untimed else ""),
        "parameters": f"{parameters_text_of(found)} Drag along an axis to keep only the trials that cross there. "
        f"\u201c{NOT_SET}\u201d: the parameter did not apply."
        + (f" Equal in all trials, so not drawn: {shared}." if shared else ""),
        "costs": f"{costs_text(study)} A teacher is trained once and shared: the trial that trained it bears its cost."
        + (f" {stopped}." if stopped else ""),
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
    if figure is None:  # axes without data look like an error
        return f'<h2>{name.capitalize()}</h2><p class="empty">Not enough trials to show yet.</p>'
    body = figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"figure-{name}", config=PLOTLY_CONFIG)
    caption = f"{escape(caption)} {escape(setting(found))}"
    return f"<section><h2>{name.capitalize()}</h2><figure>{body}<figcaption>{caption}</figcaption></figure></section>"


# A figure is drawn for the window; on paper it is as wide as the page.
_PRINT_SCRIPT = """
addEventListener("beforeprint", () => document.querySelectorAll(".plotly-graph-div").forEach(
  figure => Plotly.relayout(figure, {width: 1020})));
addEventListener("afterprint", () => document.querySelectorAll(".plotly-graph-div").forEach(
  figure => Plotly.relayout(figure, {width: null, autosize: true})));
"""
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
th, td {{ text-align: right; vertical-align: top; padding: 5px 10px 5px 0; border-bottom: 1px solid {GRID};
         font-variant-numeric: tabular-nums; }}
td {{ white-space: nowrap; }}
th:last-child, td:last-child {{ padding-right: 0; }}
th {{ font-weight: 600; border-bottom-color: #AFB8C1; vertical-align: bottom; }}
.key, .state, .parameter, .reason {{ text-align: left; }}
.parameter, .reason, .state {{ white-space: normal; overflow-wrap: break-word; }}
td.parameter {{ max-width: 16em; }}
td.reason {{ overflow-wrap: anywhere; }}
.key {{ position: sticky; left: 0; background: white; }}
td.key {{ font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 12px; }}
.member td.key {{ font-weight: 700; }}
.failed td {{ color: #8A3B00; }}
.stopped td {{ color: {FAINT}; }}
summary {{ cursor: pointer; margin-bottom: 4px; }}
@page {{ size: A4 landscape; margin: 12mm; }}
@media print {{
  main {{ padding: 0; max-width: none; }}
  h2 {{ break-after: avoid; margin-top: 16px; }}
  section, tr {{ break-inside: avoid; }}
  .plotly-graph-div {{ width: 1020px !important; }}
  .scroll {{ overflow: visible; }}
  .modebar {{ display: none; }}
  .key {{ position: static; }}
  table {{ font-size: 8.5px; }}
  th, td {{ padding: 2px 6px 2px 0; white-space: normal; overflow-wrap: anywhere; }}
  td.key {{ font-size: 8px; }}
  td.reason, td.parameter {{ max-width: 22em; }}
}}
"""
