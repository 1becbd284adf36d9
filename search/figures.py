"""The figures of a study: interactive ones for the page and for MLflow, and the front as a PNG."""

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from textwrap import wrap
from typing import Any

import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from search.axes import axis_of
from search.pareto import hypervolume_trace
from search.records import OBJECTIVES, StudyRecord, TrialRecord
from search.report import (
    by_standard_accuracy,
    finite_objectives,
    front_summary,
    front_trials,
    hypervolume_summary,
    results_text,
    setting,
    value_text,
    varied_parameters,
)

# Okabe and Ito's palette, whose colours are told apart with any colour vision.
FRONT, OTHER, REFERENCE, AREA = "#0072B2", "#8C8C8C", "#000000", "rgba(0, 114, 178, 0.10)"
COSTS = {"teacher": "#0072B2", "student": "#E69F00", "verification": "#56B4E9"}
FURTHER_COSTS = ("#CC79A7", "#009E73", "#D55E00")
INK, FAINT, GRID = "#1F2328", "#57606A", "#E4E7EB"
FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"

# By default plotly offers to upload a figure with its data: a report talks to nobody.
PLOTLY_CONFIG = {
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "displaylogo": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["select2d", "lasso2d"],
}

REACH = 1.5  # the view includes a reference that is at most this many spans of the trials away
LABEL_WIDTH, LABEL_HEIGHT = 0.075, 0.05  # room for the label of a point, as shares of the view
MANY = 300  # more points than this are drawn smaller and paler
MIN_SPAN = 0.04  # the view of a single trial, or of trials that hardly differ, is this wide
PLOTLY_LINE, PNG_LINE = 115, 140  # characters of small print in one line of a figure


def front_figure(study: StudyRecord, *, titled: bool = True) -> go.Figure:
    """All COMPLETE trials, the front among them as a staircase, and the reference.

    Args:
        titled: say above the figure what its numbers are, for a place that has no caption.
    """
    members, others = _members_and_others(study)
    figure = _figure("standard accuracy", "certified accuracy")
    area = _dominated_area(members, study.reference)
    if area:
        corners = {"x": [x for x, _ in area], "y": [y for _, y in area]}
        style = {"mode": "lines", "line_width": 0, "fill": "toself", "fillcolor": AREA}
        figure.add_scatter(**corners, **style, hoverinfo="skip", name="hypervolume")
    figure.add_scatter(**_points(others), mode="markers", name="other trials", marker=_other_marker(len(others)))
    ranges = _view(study)
    labelled = {trial.key for trial in _labelled(members, ranges)}
    figure.add_scatter(
        **_points(members),
        mode="lines+markers+text",
        name="front",
        line={"shape": "vh", "color": FRONT, "width": 2},
        marker={"color": FRONT, "size": 11, "line": {"color": "white", "width": 1}},
        text=[f"#{trial.number}" if trial.key in labelled else "" for trial in members],
        textposition="top right",
        textfont_color=FRONT,
    )
    x, y = study.reference
    cross = {"symbol": "x-thin", "size": 11, "line": {"width": 2, "color": REFERENCE}}
    hover = f"reference ({x:g}, {y:g})<extra></extra>"
    figure.add_scatter(x=[x], y=[y], mode="markers", name="reference", marker=cross, hovertemplate=hover)
    figure.update_xaxes(range=ranges[0])
    figure.update_yaxes(range=ranges[1])
    if not _shows(ranges, study.reference):
        figure.add_annotation(
            text=_reference_outside(study), xref="paper", yref="paper", x=0.01, y=0.02,
            showarrow=False, font={"size": 12, "color": FAINT},
        )  # fmt: skip
    return _with_title(figure, study) if titled else figure


def hypervolume_figure(study: StudyRecord) -> go.Figure:
    """Hypervolume after each COMPLETE trial with a time of finishing, over the wall time of the study."""
    timed = zip(study.complete, finite_objectives(study), strict=True)
    finished = [(trial.finished_at, trial, pair) for trial, pair in timed if trial.finished_at is not None]
    finished.sort(key=lambda item: (item[0], item[1].number))
    trace = hypervolume_trace([pair for _, _, pair in finished], study.reference)
    elapsed = [max(at - study.started_at, 0.0) for at, _, _ in finished]
    divisor, unit = _time_unit(max(elapsed, default=0.0))
    figure = _figure(f"wall time since the start of the study ({unit})", "hypervolume")
    figure.add_scatter(
        x=[0.0, *(seconds / divisor for seconds in elapsed)], y=[0.0, *trace.tolist()],
        mode="lines+markers" if len(finished) <= 200 else "lines",
        line={"shape": "hv", "color": FRONT, "width": 2}, marker_size=5, showlegend=False,
        text=["start", *(f"after trial #{trial.number}" for _, trial, _ in finished)],
        hovertemplate="%{text}: %{y:.4f}<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(rangemode="tozero")
    return figure


def parameters_figure(study: StudyRecord) -> go.Figure:
    """Parallel coordinates of the parameters that varied, coloured by certified accuracy."""
    finite_objectives(study)
    trials = sorted(study.complete, key=lambda trial: trial.certified_accuracy or 0.0)  # the best are drawn on top
    axes = [axis_of(name, [trial.params.get(name) for trial in trials]) for name in varied_parameters(study.complete)]
    axes += [
        axis_of(name.replace("_", " "), [getattr(trial, name) for trial in trials], log_span=math.inf)
        for name in OBJECTIVES
    ]
    certified = [trial.certified_accuracy for trial in trials]
    figure = _figure("", "")
    figure.add_parcoords(
        dimensions=[axis.dimension() for axis in axes],
        line={
            "color": certified,
            "colorscale": "Cividis",
            "showscale": len(trials) > 1,
            "colorbar": {"title": {"text": "certified"}, "thickness": 14, "outlinewidth": 0},
        },
        labelangle=-18, labelside="top", labelfont={"size": 12}, tickfont={"size": 11}, rangefont={"size": 1},
    )  # fmt: skip
    # The labels of the first axis are left of it, and would be cut off.
    longest = max((len(text) for _, text in axes[0].ticks), default=0)
    figure.update_layout(margin={"l": min(max(80, 20 + 7 * longest), 240), "r": 40, "t": 110, "b": 30}, height=480)
    return figure


def costs_figure(study: StudyRecord) -> go.Figure:
    """Seconds of each trial by part, stacked."""
    trials = [trial for trial in study.trials if trial.costs]
    divisor, unit = _time_unit(max((sum(trial.costs.values()) for trial in trials), default=0.0))
    figure = _figure("trial number", f"cost ({unit})")
    for name, colour in _cost_colours(trials).items():
        figure.add_bar(
            x=[trial.number for trial in trials], y=[trial.costs.get(name, 0.0) / divisor for trial in trials],
            name=escape(name), marker={"color": colour, "line_width": 0},
            hovertemplate=f"trial %{{x}}, {escape(name)}: %{{y:.3g}} {unit}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(barmode="stack", bargap=0.15 if len(trials) < 200 else 0)
    figure.update_xaxes(showgrid=False, dtick=1 if len(trials) <= 20 else None)
    return figure


def save_front_png(study: StudyRecord, path: Path | str) -> None:
    """The front as a picture for places that show no interactive figure; replaces `path` in one step."""
    members, others = _members_and_others(study)
    figure = Figure(figsize=(8, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory and, unlike pyplot, leaves no global state
    axes = figure.add_subplot()
    area = _dominated_area(members, study.reference)
    if area:
        axes.fill(*zip(*area, strict=True), color=FRONT, alpha=0.10, linewidth=0)
    _draw_points(axes, others, OTHER, 24 if len(others) <= MANY else 12)
    _draw_points(axes, members, FRONT, 64)
    axes.step(*_coordinates(members), where="pre", color=FRONT, linewidth=1.8, zorder=3)
    x_range, y_range = _view(study)
    for trial in _labelled(members, (x_range, y_range)):
        x, y = trial.objectives or (math.nan, math.nan)
        axes.annotate(f"#{trial.number}", (x, y), color=FRONT, xytext=(6, 5), textcoords="offset points", zorder=5)
    axes.plot(*study.reference, marker="x", color=REFERENCE, markersize=8, linestyle="none")
    axes.annotate("reference", study.reference, xytext=(8, 4), textcoords="offset points", color=INK)
    axes.set(xlim=x_range, ylim=y_range)
    axes.set_xlabel("standard accuracy", color=INK)
    axes.set_ylabel("certified accuracy", color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # A dollar sign in a name is no formula.
    title = f"{study.name}: {front_summary(study)}, {hypervolume_summary(study)}"
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, parse_math=False)
    legend = "Blue: the front. Grey: other trials. Lines upwards: images left undecided."
    if not _shows((x_range, y_range), study.reference):
        legend += f" The {_reference_outside(study)}."
    small_print = "\n".join([legend, *wrap(setting(study), PNG_LINE)])
    figure.supxlabel(small_print, fontsize=8, color=FAINT, x=0.01, ha="left", parse_math=False)
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))


def replace_file(path: Path | str, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path` and move it there: a reader sees the old file or the new one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _members_and_others(study: StudyRecord) -> tuple[list[TrialRecord], list[TrialRecord]]:
    """The front by rising standard accuracy, and the COMPLETE trials that are not on it."""
    members = by_standard_accuracy(front_trials(study))[::-1]
    on_front = {trial.key for trial in members}
    return members, [trial for trial in study.complete if trial.key not in on_front]


def _coordinates(trials: Sequence[TrialRecord]) -> tuple[list[float], list[float]]:
    pairs = [trial.objectives for trial in trials if trial.objectives is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _figure(x_title: str, y_title: str) -> go.Figure:
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": "#AFB8C1", "ticks": "outside", "tickcolor": "#AFB8C1"}
    return go.Figure(
        layout={
            "font": {"family": FONT, "size": 13, "color": INK},
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "margin": {"l": 70, "r": 20, "t": 40, "b": 60},
            "height": 460,
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "hoverlabel": {"align": "left", "font_size": 12},
            "xaxis": axis | {"title": {"text": x_title}},
            "yaxis": axis | {"title": {"text": y_title}},
        }
    )


def _with_title(figure: go.Figure, study: StudyRecord) -> go.Figure:
    lines = [f"{front_summary(study)}, {hypervolume_summary(study)}", *wrap(setting(study), PLOTLY_LINE)]
    title = {
        "text": escape(study.name),
        "subtitle": {"text": "<br>".join(escape(line) for line in lines), "font": {"size": 12, "color": FAINT}},
        "x": 0.01, "y": 0.97, "yanchor": "top", "yref": "container",
    }  # fmt: skip
    added = 50 + 16 * len(lines)
    return figure.update_layout(
        title=title, margin_t=figure.layout.margin.t + added, height=figure.layout.height + added
    )


def _points(trials: Sequence[TrialRecord]) -> dict[str, Any]:
    """Where trials are, their intervals of certified accuracy, and everything known about them on hover."""
    x, y = _coordinates(trials)
    above = [_open_share(trial) for trial in trials]
    bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": [0.0] * len(above)}
    return {
        "x": x,
        "y": y,
        "error_y": bars | {"thickness": 1, "width": 2, "visible": any(above)},
        "hovertext": [_hover(trial) for trial in trials],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }


def _other_marker(num_trials: int) -> dict[str, Any]:
    return {"color": OTHER, "size": 7 if num_trials <= MANY else 5, "opacity": 1.0 if num_trials <= MANY else 0.6}


def _open_share(trial: TrialRecord) -> float:
    """The share of images that verification left undecided: the length of the interval of certified accuracy."""
    if trial.certified_upper is None or trial.certified_accuracy is None:
        return 0.0
    return max(trial.certified_upper - trial.certified_accuracy, 0.0)


def _hover(trial: TrialRecord) -> str:
    standard, adversarial, certified, seconds = results_text(trial)
    lines = [f"<b>trial {trial.number}</b> ({escape(trial.key)}), seed {trial.seed}"]
    lines.append(f"standard {standard}, adversarial {adversarial or '?'}, certified {certified}")
    lines += [f"{escape(name)} = {escape(value_text(value))}" for name, value in trial.params.items()]
    return "<br>".join([*lines, f"{seconds} s" if seconds else ""])


def _dominated_area(members: Sequence[TrialRecord], reference: tuple[float, float]) -> list[tuple[float, float]]:
    """Corners of the region between the reference and a front sorted by rising standard accuracy."""
    inside = [t.objectives for t in members if t.objectives is not None]
    inside = [(x, y) for x, y in inside if x > reference[0] and y > reference[1]]
    if not inside:
        return []
    corners, left = [reference], reference[0]
    for x, y in inside:
        corners += [(left, y), (x, y)]
        left = x
    return [*corners, (left, reference[1]), reference]


_View = tuple[tuple[float, float], tuple[float, float]]


def _view(study: StudyRecord) -> _View:
    """Ranges of both axes around the trials, wide enough for the reference unless that would crowd the trials."""
    ranges = []
    for axis, corner in enumerate(study.reference):
        values = [pair[axis] for pair in finite_objectives(study)]
        if axis == 1:
            values += [trial.certified_upper for trial in study.complete if trial.certified_upper is not None]
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


def _time_unit(seconds: float) -> tuple[float, str]:
    """The unit in which the largest of several times reads well, and its length in seconds."""
    if seconds < 180:
        return 1.0, "seconds"
    return (60.0, "minutes") if seconds < 3 * 3600 else (3600.0, "hours")


def _cost_colours(trials: Sequence[TrialRecord]) -> dict[str, str]:
    further = sorted({name for trial in trials for name in trial.costs} - COSTS.keys())
    return COSTS | {name: FURTHER_COSTS[i % len(FURTHER_COSTS)] for i, name in enumerate(further)}


def _labelled(members: Sequence[TrialRecord], view: _View) -> list[TrialRecord]:
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


def _draw_points(axes: Axes, trials: Sequence[TrialRecord], colour: str, size: float) -> None:
    x, y = _coordinates(trials)
    tops = [low + _open_share(trial) for low, trial in zip(y, trials, strict=True)]
    axes.vlines(x, y, tops, color=colour, linewidth=0.9, alpha=0.6, zorder=2)
    axes.scatter(x, y, s=size, color=colour, edgecolor="white", linewidth=0.6, zorder=4)
