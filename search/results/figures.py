"""The front of a study: an interactive figure for the page and for MLflow, and a PNG.

A point is a configuration. The bar above it ends where its certified accuracy would be if all undecided images were
proved; a cross spans its seeds; a hollow point is one whose place on the front is not certain yet.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from search.results.configurations import Configuration, Front, study_front
from search.results.figure_style import (
    AREA,
    FAINT,
    FRONT,
    GRID,
    INK,
    OTHER,
    REFERENCE,
    SEEDS,
    empty_figure,
    replace_file,
)
from search.results.figure_style import PLOTLY_CONFIG as PLOTLY_CONFIG
from search.results.report_text import (
    by_standard_accuracy,
    front_summary,
    hypervolume_summary,
    means_text,
    open_text,
    setting,
    value_text,
)
from search.studies.records import StudyRecord

REACH = 1.5  # the view includes a reference that is at most this many spans of the trials away
LABEL_WIDTH, LABEL_HEIGHT = 0.075, 0.05  # room for the label of a point, as shares of the view
MANY = 300  # more points than this are drawn smaller and paler
BARS = 1_000  # of more other points than this no bars are drawn, and hovering is short: the table has the rest
MIN_SPAN = 0.04  # the view of a single trial, or of trials that hardly differ, is this wide
PLOTLY_LINE, PNG_LINE = 115, 140  # characters of small print in one line of a figure
TITLE_LINE = 95  # characters of a line of the picture's title
DOUBT = "not certain: undecided images of another trial could push it off the front"
HOPE = "its undecided images could bring it to the front"


class _Groups(NamedTuple):
    """The points of a figure by how they are drawn."""

    members: list[Configuration]  # by rising standard accuracy
    possible: list[Configuration]
    others: list[Configuration]


def front_figure(study: StudyRecord) -> go.Figure:
    """The front, and above it what its numbers are, for a place that has no caption."""
    found = study_front(study)
    return with_title(untitled_front(found), found)


def untitled_front(found: Front) -> go.Figure:
    """All configurations with a COMPLETE trial, the front among them as a staircase, and the reference."""
    reference = found.study.reference
    members, possible, others = _groups(found)
    figure = empty_figure("standard accuracy", "certified accuracy")
    area = _dominated_area(members, reference)
    if area:
        corners = {"x": [x for x, _ in area], "y": [y for _, y in area]}
        style = {"mode": "lines", "line_width": 0, "fill": "toself", "fillcolor": AREA}
        figure.add_scatter(**corners, **style, hoverinfo="skip", name="hypervolume")
    if found.repeated:
        figure.add_scatter(**_spreads(found.repeated), name="lowest to highest seed")
    figure.add_scatter(
        **_points(found, others, OTHER, is_brief=len(others) > BARS),
        mode="markers",
        name="other trials",
        marker=_other_marker(len(others)),
    )
    if possible:
        hollow = {"symbol": "diamond", "color": "white", "size": 8, "line": {"color": FRONT, "width": 1.5}}
        figure.add_scatter(
            **_points(found, possible, FRONT, HOPE), mode="markers", name="possibly on the front", marker=hollow
        )
    ranges = _view(found)
    labelled = {each.number for each in _labelled(members, ranges)}
    figure.add_scatter(
        **_points(found, members, FRONT),
        mode="lines+markers+text",
        name="front",
        line={"shape": "vh", "color": FRONT, "width": 2},
        marker=_member_marker([each.number in found.doubtful for each in members]),
        text=[f"#{each.number}" if each.number in labelled else "" for each in members],
        textposition="top right",
        textfont_color=FRONT,
    )
    x, y = reference
    cross = {"symbol": "x-thin", "size": 11, "line": {"width": 2, "color": REFERENCE}}
    hover = f"reference ({x:g}, {y:g})<extra></extra>"
    figure.add_scatter(x=[x], y=[y], mode="markers", name="reference", marker=cross, hovertemplate=hover)
    figure.update_xaxes(range=ranges[0])
    figure.update_yaxes(range=ranges[1])
    if not _shows(ranges, reference):
        figure.add_annotation(
            text=_reference_outside(found.study), xref="paper", yref="paper", x=0.01, y=0.02,
            showarrow=False, font={"size": 12, "color": FAINT},
        )  # fmt: skip
    return figure


def save_front_png(study: StudyRecord, path: Path | str) -> None:
    """The front as a picture for places that show no interactive figure; replaces `path` in one step."""
    found = study_front(study)
    groups = _groups(found)
    figure = Figure(figsize=(8, 5.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory and, unlike pyplot, leaves no global state
    axes = figure.add_subplot()
    _draw(axes, found, groups)
    view = _view(found)
    for member in _labelled(groups.members, view):
        text, place = f"#{member.number}", member.objectives
        axes.annotate(text, place, color=FRONT, xytext=(6, 5), textcoords="offset points", zorder=5)
    axes.plot(*study.reference, marker="x", color=REFERENCE, markersize=8, linestyle="none")
    axes.annotate("reference", study.reference, xytext=(8, 4), textcoords="offset points", color=INK)
    axes.set(xlim=view[0], ylim=view[1])
    axes.set_xlabel("standard accuracy", color=INK)
    axes.set_ylabel("certified accuracy", color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # A dollar sign in a name is no formula.
    title = wrap(f"{study.name}: {front_summary(found)}, {hypervolume_summary(found)}", TITLE_LINE)
    axes.set_title("\n".join(title), loc="left", fontsize=10.5, color=INK, parse_math=False)
    legend = " ".join(["Blue: the front. Grey: other trials. Lines upwards: images left undecided.", *marks(found)])
    if not _shows(view, study.reference):
        legend += f" The {_reference_outside(study)}."
    small_print = "\n".join([*wrap(legend, PNG_LINE), *wrap(setting(found), PNG_LINE)])
    figure.supxlabel(small_print, fontsize=8, color=FAINT, x=0.01, ha="left", parse_math=False)
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))


def marks(found: Front) -> list[str]:
    """What the marks of this study mean, apart from colours and the bars of undecided images."""
    sentences = []
    if found.doubtful:
        sentences.append("Hollow circles: undecided images of other trials could push them off the front.")
    if found.possible:
        sentences.append("Hollow diamonds: their undecided images could bring them to the front.")
    if found.repeated:
        sentences.append("Orange crosses: from the lowest to the highest of several seeds, around their mean.")
    if len(_groups(found).others) > BARS:
        sentences.append("The lines of the other trials, which are many, are left out.")
    return sentences


def _groups(found: Front) -> _Groups:
    shown = {each.number for each in (*found.members, *found.possible)}
    others = [each for each in found.configurations if each.number not in shown]
    return _Groups(by_standard_accuracy(found.members)[::-1], list(found.possible), others)


def _coordinates(points: Sequence[Configuration]) -> tuple[list[float], list[float]]:
    return [each.standard_accuracy for each in points], [each.certified_accuracy for each in points]


def with_title(figure: go.Figure, found: Front) -> go.Figure:
    """A figure of the study with what its numbers are above it, for a place that has no caption."""
    lines = [f"{front_summary(found)}, {hypervolume_summary(found)}", *wrap(setting(found), PLOTLY_LINE)]
    title = {
        "text": escape(found.study.name),
        "subtitle": {"text": "<br>".join(escape(line) for line in lines), "font": {"size": 12, "color": FAINT}},
        "x": 0.01, "y": 0.97, "yanchor": "top", "yref": "container",
    }  # fmt: skip
    added = 50 + 16 * len(lines)
    return figure.update_layout(
        title=title, margin_t=figure.layout.margin.t + added, height=figure.layout.height + added
    )


def _points(
    found: Front, points: Sequence[Configuration], colour: str, note: str = "", *, is_brief: bool = False
) -> dict[str, Any]:
    """Where points are, their intervals of certified accuracy, and everything known about them on hover.

    Args:
        is_brief: no intervals, and on hover no more than which trial it is and its results.
    """
    x, y = _coordinates(points)
    if is_brief:
        keys = [f"<b>{escape(each.trials[0].key)}</b>" for each in points]
        hover = "%{hovertext}: standard %{x:.4f}, certified %{y:.4f}<extra></extra>"
        return {"x": x, "y": y, "hovertext": keys, "hovertemplate": hover}
    above = [each.certified_upper - each.certified_accuracy for each in points]
    bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": [0.0] * len(above)}
    return {
        "x": x,
        "y": y,
        "error_y": bars | {"thickness": 1, "width": 2, "color": colour, "visible": any(above)},
        "hovertext": [_hover(each, found, note) for each in points],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }


def _spreads(points: Sequence[Configuration]) -> dict[str, Any]:
    """A thin cross through each mean, from the lowest to the highest of its seeds in both objectives."""
    x, y = _coordinates(points)

    def bars(means: Sequence[float], ranges: Sequence[tuple[float, float]]) -> dict[str, Any]:
        above = [high - value for value, (_, high) in zip(means, ranges, strict=True)]
        below = [value - low for value, (low, _) in zip(means, ranges, strict=True)]
        ends = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
        return ends | {"thickness": 1.5, "width": 0, "color": SEEDS}

    return {
        "x": x,
        "y": y,
        "error_x": bars(x, [each.standard_range for each in points]),
        "error_y": bars(y, [each.certified_range for each in points]),
        "mode": "markers",
        "marker": {"symbol": "cross-thin", "size": 9, "line": {"width": 1.5, "color": SEEDS}},
        "hoverinfo": "skip",
    }


def _other_marker(num_trials: int) -> dict[str, Any]:
    return {"color": OTHER, "size": 7 if num_trials <= MANY else 5, "opacity": 1.0 if num_trials <= MANY else 0.6}


def _member_marker(doubtful: Sequence[bool]) -> dict[str, Any]:
    marker: dict[str, Any] = {"color": FRONT, "size": 11, "line": {"color": "white", "width": 1}}
    if any(doubtful):
        marker["color"] = ["white" if hollow else FRONT for hollow in doubtful]
        marker["line"] = {
            "color": [FRONT if hollow else "white" for hollow in doubtful],
            "width": [2 if hollow else 1 for hollow in doubtful],
        }
    return marker


def _hover(point: Configuration, found: Front, note: str) -> str:
    standard, adversarial, certified, seconds = means_text(point)
    lines = [f"<b>trial {each.number}</b> ({escape(each.key)}), seed {each.seed}" for each in point.trials]
    if point.num_seeds > 1:
        lines.append(f"mean of n = {point.num_seeds} seeds")
    results = f"standard {standard}, adversarial {adversarial or '?'}, certified {certified}"
    lines.append(results.replace("\n", ", "))
    if point.certified_upper > point.certified_accuracy:
        opens = [(trial.number, open_text(trial, found.study.num_images)) for trial in point.trials]
        named = [text if point.num_seeds == 1 else f"trial {number}: {text}" for number, text in opens if text]
        lines += map(escape, named)
    if point.number in found.doubtful:
        lines.append(DOUBT)
    if note:
        lines.append(note)
    lines += [f"{escape(name)} = {escape(value_text(value))}" for name, value in point.trials[0].params.items()]
    return "<br>".join([*lines, f"{seconds} s" if seconds else ""])


def _dominated_area(members: Sequence[Configuration], reference: tuple[float, float]) -> list[tuple[float, float]]:
    """Corners of the region between the reference and a front sorted by rising standard accuracy."""
    inside = [(x, y) for x, y in (each.objectives for each in members) if x > reference[0] and y > reference[1]]
    if not inside:
        return []
    corners, left = [reference], reference[0]
    for x, y in inside:
        corners += [(left, y), (x, y)]
        left = x
    return [*corners, (left, reference[1]), reference]


_View = tuple[tuple[float, float], tuple[float, float]]


def _view(found: Front) -> _View:
    """Ranges of both axes around all marks, wide enough for the reference unless that would crowd them."""
    x, y = _coordinates(found.configurations)
    x += [end for each in found.repeated for end in each.standard_range]
    y += [end for each in found.repeated for end in each.certified_range]
    y += [each.certified_upper for each in found.configurations]
    ranges = []
    for values, corner in zip((x, y), found.study.reference, strict=True):
        low, high = min(values, default=corner), max(values, default=corner + 0.2)
        missing = max(MIN_SPAN - (high - low), 0.0)
        low, high = low - missing / 2, high + missing / 2
        span = high - low
        if low - REACH * span <= corner <= high:
            low = min(low, corner)
        ranges.append((low - 0.08 * span, high + 0.12 * span))
    return ranges[0], ranges[1]


def _shows(view: _View, point: tuple[float, float]) -> bool:
    return all(low <= value <= high for (low, high), value in zip(view, point, strict=True))


def _reference_outside(study: StudyRecord) -> str:
    return f"reference ({study.reference[0]:g}, {study.reference[1]:g}) lies outside this view"


def _labelled(members: Sequence[Configuration], view: _View) -> list[Configuration]:
    """The members whose labels fit without covering each other; both ends of the front come first."""
    (left, right), (bottom, top) = view
    places = [
        ((x - left) / (right - left), (y - bottom) / (top - bottom))
        for x, y in zip(*_coordinates(members), strict=True)
    ]
    chosen: list[int] = []
    for index in dict.fromkeys([0, len(members) - 1, *range(len(members))] if members else []):
        x, y = places[index]
        others = [places[other] for other in chosen]
        if all(abs(x - other[0]) >= LABEL_WIDTH or abs(y - other[1]) >= LABEL_HEIGHT for other in others):
            chosen.append(index)
    return [members[index] for index in chosen]


def _draw(axes: Axes, found: Front, groups: _Groups) -> None:
    """Area, bars, crosses and points of the picture."""
    area = _dominated_area(groups.members, found.study.reference)
    if area:
        axes.fill(*zip(*area, strict=True), color=FRONT, alpha=0.10, linewidth=0)
    for each in found.repeated:
        axes.hlines(each.certified_accuracy, *each.standard_range, color=SEEDS, linewidth=1.4, zorder=2.5)
        axes.vlines(each.standard_accuracy, *each.certified_range, color=SEEDS, linewidth=1.4, zorder=2.5)
    few, bars = len(groups.others) <= MANY, len(groups.others) <= BARS
    _draw_points(axes, groups.others, OTHER, 24 if few else 12, has_bars=bars)
    _draw_points(axes, groups.possible, FRONT, 40, marker="D", is_hollow=True)
    doubtful = [each for each in groups.members if each.number in found.doubtful]
    certain = [each for each in groups.members if each.number not in found.doubtful]
    _draw_points(axes, certain, FRONT, 64)
    _draw_points(axes, doubtful, FRONT, 64, is_hollow=True)
    axes.step(*_coordinates(groups.members), where="pre", color=FRONT, linewidth=1.8, zorder=3)


def _draw_points(
    axes: Axes,
    points: Sequence[Configuration],
    colour: str,
    size: float,
    *,
    marker: str = "o",
    is_hollow: bool = False,
    has_bars: bool = True,
) -> None:
    x, y = _coordinates(points)
    if has_bars:
        axes.vlines(x, y, [each.certified_upper for each in points], color=colour, linewidth=0.9, alpha=0.6, zorder=2)
    face, edge = ("white", colour) if is_hollow else (colour, "white")
    width = 1.4 if is_hollow else 0.6
    axes.scatter(x, y, s=size, marker=marker, facecolor=face, edgecolor=edge, linewidth=width, zorder=4)
