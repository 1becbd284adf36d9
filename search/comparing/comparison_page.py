"""A comparison as one HTML file that opens anywhere, without a network."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from search.comparing.comparison import Comparison
from search.comparing.comparison_figures import fronts_figure, hours_figure
from search.comparing.comparison_text import Rows, notes, reach_rows, results_rows, setting, studies_rows
from search.results.figure_style import FAINT, FONT, GRID, INK, PLOTLY_CONFIG, replace_file
from search.results.report_text import images_text


def write_comparison(comparison: Comparison, path: Path | str) -> None:
    """Write one HTML file that needs nothing else, not even a network; replaces `path` in one step."""
    page = _page(comparison)
    replace_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _page(comparison: Comparison) -> str:
    title = " and ".join(method.label for method in comparison.methods)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}: comparison</title>",
            f"<style>{_CSS}</style>",
            f"<script>{get_plotlyjs()}</script>",
            "</head><body><main>",
            f"<h1>{escape(title)}</h1>",
            f'<p class="setting">{escape(setting(comparison))}</p>',
            _notes(notes(comparison)),
            _explanation(comparison),
            _section("Fronts", "fronts", fronts_figure(comparison), _FRONTS_CAPTION, comparison),
            _section("Hypervolume per accelerator-hour", "hours", hours_figure(comparison), _HOURS_CAPTION, comparison),
            "<h2>Results</h2>",
            _table(results_rows(comparison), _RESULTS_CAPTION, comparison),
            *_reach(comparison),
            "<h2>Studies</h2>",
            _table(studies_rows(comparison), _STUDIES_CAPTION, comparison),
            "</main></body></html>\n",
        ]
    )


_FRONTS_CAPTION = (
    "Right and up is better. A method with one study is its front; a line upwards from a point ends where its "
    "certified accuracy would be if all its undecided images were proved. A method with several is the staircase that "
    "at least half of its runs attained, with a shaded band: of four or more runs between what at least a quarter and "
    "what at least three quarters attained, of fewer between the best and the worst."
)
_HOURS_CAPTION = (
    "The best so far for what was spent: hypervolume of the lower ends of certified accuracy after each trial that "
    "ended, over the accelerator-hours of these trials (hours times what a trial holds: its GPUs, or its cores where "
    "it has none); stopped and failed ones are cost. Of several runs the mean, with a band between their quartiles "
    "(fewer than four: lowest to highest), drawn up to what all of them spent. Hours are those of the machines used."
)
_RESULTS_CAPTION = (
    "Hypervolume: mean over runs of what is proved; \u201cup to\u201d: if all undecided images were. Trials: complete "
    "and stopped ones. Hours: mean accelerator-hours of a run. The column with a time is the mean hypervolume when a "
    "run had spent so many accelerator-hours, the most that every study has spent: it compares methods at equal cost."
)
_REACH_CAPTION = (
    "Row: accelerator-hours until that method's mean hypervolume was at least the column's final one; "
    "\u201cnever\u201d: not with what it spent."
)
_STUDIES_CAPTION = "One study is one run with one seed."


def _notes(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<div class="notes"><b>Before you compare</b><ul>{items}</ul></div>'


def _explanation(comparison: Comparison) -> str:
    record = comparison.studies[0].record
    return f"""<p>Each study searched for image classifiers that are accurate and provably robust, and each trial of it
trained one and measured it on {escape(images_text(record))}. <b>Standard accuracy</b> is the
share of these images that it labels correctly; <b>certified accuracy</b> is the share for which a proof shows that no
change within the threat ({escape(record.threat)}) can mislead it. The <b>front</b> of a study holds the trials
that no other trial of it beats in both. Its <b>hypervolume</b> is the area between front and reference point; larger is
better. The same data, threat, images and reference were used in all these studies, or they would not be on one
page.</p>
<p>A search is a matter of luck, too: with another seed the same method finds another front. Studies that differ in
nothing but their seed are therefore <b>runs of one method</b>. A run <b>attains</b> a pair of accuracies if it found a
trial that is at least as good in both. The line of such a method borders all pairs that at least half of its runs
attained: what you may expect of one more run. The <b>attainment band</b> around it says how much luck there is: below
it, most runs got there; above it, few did. Where the bands of two methods overlap, the difference may be chance; with
few runs even bands apart are no proof.</p>"""


def _reach(comparison: Comparison) -> list[str]:
    if len(comparison.methods) < 2:
        return []
    return ["<h2>Hours to reach another's result</h2>", _table(reach_rows(comparison), _REACH_CAPTION, comparison)]


def _section(title: str, name: str, figure: go.Figure, caption: str, comparison: Comparison) -> str:
    body = figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"figure-{name}", config=PLOTLY_CONFIG)
    caption = f"{escape(caption)} {escape(setting(comparison))}"
    return f"<h2>{escape(title)}</h2><figure>{body}<figcaption>{caption}</figcaption></figure>"


def _table(rows: Rows, caption: str, comparison: Comparison) -> str:
    head = "".join(f'<th class="{_css(index)}">{escape(text)}</th>' for index, text in enumerate(rows.heads))
    body = "".join(
        "<tr>" + "".join(f'<td class="{_css(i)}">{escape(text)}</td>' for i, text in enumerate(cells)) + "</tr>\n"
        for cells in rows.cells
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="setting">{escape(caption)} {escape(setting(comparison))}</p>'
    )


def _css(column: int) -> str:
    return "number" if column else "name"


_CSS = f"""
:root {{ color: {INK}; font: 15px/1.55 {FONT}; }}
body {{ margin: 0; background: white; }}
main {{ max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }}
h1 {{ font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }}
h2 {{ font-size: 19px; margin: 40px 0 8px; }}
p {{ max-width: 54em; }}
.setting, figcaption {{ color: {FAINT}; font-size: 13px; line-height: 1.45; max-width: none; }}
.notes {{ border-left: 3px solid #E69F00; padding: 2px 0 2px 14px; margin: 18px 0; font-size: 14px; }}
.notes ul {{ margin: 4px 0; padding-left: 20px; }}
figure {{ margin: 0; }}
figcaption {{ margin-top: 6px; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; line-height: 1.4; }}
th, td {{ text-align: left; vertical-align: top; padding: 5px 22px 5px 0; border-bottom: 1px solid {GRID}; }}
th {{ font-weight: 600; border-bottom-color: #AFB8C1; vertical-align: bottom; }}
.name {{ overflow-wrap: anywhere; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
@page {{ size: A4 landscape; margin: 12mm; }}
@media print {{
  main {{ padding: 0; }}
  h2 {{ break-after: avoid; }}
  figure, tr, .notes {{ break-inside: avoid; }}
  .scroll {{ overflow: visible; }}
  .modebar {{ display: none; }}
  table {{ font-size: 10px; }}
}}
"""
