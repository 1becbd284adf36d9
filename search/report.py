"""The report of a study: its front as a table, as plain JSON, as figures and as one HTML file.

Everything is a function of a `StudyRecord`, so a report can be made from what is stored, at any time, and the same
record gives the same bytes. The hypervolume of a study is that of its COMPLETE trials' objectives.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from plotly.offline import get_plotlyjs
from rich.table import Table
from rich.text import Text

from search.pareto import front, hypervolume, hypervolume_trace
from search.records import OBJECTIVES, StudyRecord, TrialRecord

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

LOG_SPAN = 30.0  # a positive parameter is drawn on a logarithmic axis when max / min exceeds this
REACH = 1.5  # the view includes a reference that is at most this many spans of the trials away
LABEL_WIDTH, LABEL_HEIGHT = 0.075, 0.05  # room for the label of a point, as shares of the view
MANY = 300  # more points than this are drawn smaller and paler
MIN_SPAN = 0.04  # the view of a single trial, or of trials that hardly differ, is this wide
OPEN_ROWS = 100  # a longer table of trials starts folded
NOT_SET = "not set"


# ---- The front -------------------------------------------------------------------------------------------------


def front_trials(study: StudyRecord) -> tuple[TrialRecord, ...]:
    """The COMPLETE trials that no other dominates, in the study's order.

    Raises:
        ValueError: a result is NaN or infinite; the text names the trial.
    """
    complete = study.complete
    return tuple(complete[index] for index in front(_objectives(study)))


def study_hypervolume(study: StudyRecord) -> float:
    """Area that the COMPLETE trials dominate, counted from the study's reference."""
    return hypervolume(_objectives(study), study.reference)


def front_table(study: StudyRecord) -> Table:
    """The front for a terminal, best standard accuracy first."""
    members = _by_standard_accuracy(front_trials(study))
    table = Table(
        title=Text(f"{study.name}: {_front_summary(study, len(members))}"),
        caption=Text(_setting(study)),
        caption_justify="left",
        title_justify="left",
    )
    table.add_column("trial", justify="right")
    table.add_column("parameters", overflow="fold", ratio=1)
    for name in ("standard", "adversarial", "certified", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for trial in members:
        # Text, not str: a parameter's value in square brackets is no markup.
        cells = (str(trial.number), _parameters(trial), *_results(trial))
        table.add_row(*(Text(cell) for cell in cells))
    return table


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


def _objectives(study: StudyRecord) -> list[tuple[float, float]]:
    """Objectives of the COMPLETE trials; refuses any trial whose numbers would be ranked or drawn wrongly."""
    for trial in study.trials:
        for name in (*OBJECTIVES, "adversarial_accuracy", "certified_upper", "seconds"):
            value = getattr(trial, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"trial {trial.key} has {name} = {value}: a report shows finite results only")
    return [trial.objectives for trial in study.complete if trial.objectives is not None]


def _by_standard_accuracy(trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    return sorted(trials, key=lambda trial: (-(trial.standard_accuracy or 0.0), trial.number))


def _front_summary(study: StudyRecord, num_members: int) -> str:
    complete = len(study.complete)
    return (
        f"{num_members} of {complete} complete {'trial' if complete == 1 else 'trials'} on the front, "
        f"hypervolume {study_hypervolume(study):.4f} above ({study.reference[0]:g}, {study.reference[1]:g})"
    )


def _setting(study: StudyRecord) -> str:
    """What every figure and table has to say about its numbers."""
    return (
        f"{study.num_images:,} validation images of {study.dataset}; threat: {study.threat}; "
        f"verifier: {study.verifier}."
    )


# ---- Values as text --------------------------------------------------------------------------------------------


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _parameters(trial: TrialRecord) -> str:
    return ", ".join(f"{name} = {_value(value)}" for name, value in trial.params.items())


def _fraction(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _certified(trial: TrialRecord) -> str:
    """The proved share, and what it could still become where images are left undecided."""
    lower, upper = trial.certified_accuracy, trial.certified_upper
    if upper is None or lower is None or _fraction(upper) == _fraction(lower):
        return _fraction(lower)
    return f"{_fraction(lower)}\u2013{_fraction(upper)}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _results(trial: TrialRecord) -> tuple[str, str, str, str]:
    return (
        _fraction(trial.standard_accuracy),
        _fraction(trial.adversarial_accuracy),
        _certified(trial),
        _seconds(trial.seconds),
    )


# ---- Figures ---------------------------------------------------------------------------------------------------


def front_figure(study: StudyRecord) -> go.Figure:
    """All COMPLETE trials, the front among them as a staircase, and the reference."""
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
    if not (ranges[0][0] <= x <= ranges[0][1] and ranges[1][0] <= y <= ranges[1][1]):
        figure.add_annotation(
            text=f"reference ({x:g}, {y:g}) lies outside this view", xref="paper", yref="paper", x=0.01, y=0.02,
            showarrow=False, font={"size": 12, "color": FAINT},
        )  # fmt: skip
    return figure


def hypervolume_figure(study: StudyRecord) -> go.Figure:
    """Hypervolume after each COMPLETE trial with a time of finishing, over the wall time of the study."""
    timed = zip(study.complete, _objectives(study), strict=True)
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
    _objectives(study)
    trials = sorted(study.complete, key=lambda trial: trial.certified_accuracy or 0.0)  # the best are drawn on top
    axes = [_axis(name, [trial.params.get(name) for trial in trials]) for name in varied_parameters(study)]
    axes += [_axis(name.replace("_", " "), [getattr(trial, name) for trial in trials]) for name in OBJECTIVES]
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
    figure.update_layout(margin={"l": 80, "r": 40, "t": 110, "b": 30}, height=480)
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


def varied_parameters(study: StudyRecord) -> list[str]:
    """Names of the parameters with more than one value among COMPLETE trials (of one trial: all), in order."""
    trials = study.complete
    names = dict.fromkeys(name for trial in trials for name in trial.params)
    if len(trials) < 2:
        return list(names)
    return [name for name in names if len({repr(trial.params.get(name)) for trial in trials}) > 1]


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
    title = f"{study.name}: {_front_summary(study, len(members))}"
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, parse_math=False)
    figure.supxlabel(_setting(study), fontsize=8, color=FAINT, x=0.01, ha="left", parse_math=False)
    _replace(path, lambda temporary: figure.savefig(temporary, format="png"))


def _members_and_others(study: StudyRecord) -> tuple[list[TrialRecord], list[TrialRecord]]:
    """The front by rising standard accuracy, and the COMPLETE trials that are not on it."""
    members = _by_standard_accuracy(front_trials(study))[::-1]
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
    standard, adversarial, certified, seconds = _results(trial)
    lines = [f"<b>trial {trial.number}</b> ({escape(trial.key)}), seed {trial.seed}"]
    lines.append(f"standard {standard}, adversarial {adversarial or '?'}, certified {certified}")
    lines += [f"{escape(name)} = {escape(_value(value))}" for name, value in trial.params.items()]
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
        values = [pair[axis] for pair in _objectives(study)]
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


class _Axis(NamedTuple):
    """One axis of parallel coordinates: where each trial crosses it, and which places are labelled."""

    label: str
    positions: list[float]
    low: float
    high: float
    ticks: list[tuple[float, str]]

    def dimension(self) -> dict[str, Any]:
        return {
            "label": escape(self.label),
            "values": self.positions,
            "range": [self.low, self.high],
            "tickvals": [position for position, _ in self.ticks],
            "ticktext": [escape(text) for _, text in self.ticks],
        }


def _axis(name: str, values: Sequence[Any]) -> _Axis:
    """An axis for numbers, logarithmic where they span much, or for categories; absent values get a place below."""
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        return _numeric_axis(name, values, present)
    categories = sorted({_value(value) for value in present})
    if len(present) < len(values):
        categories.insert(0, NOT_SET)
    places = {category: float(place) for place, category in enumerate(categories)}
    positions = [places[NOT_SET if value is None else _value(value)] for value in values]
    return _Axis(name, positions, -0.25, max(len(categories) - 0.75, 0.25), [(p, c) for c, p in places.items()])


def _numeric_axis(name: str, values: Sequence[Any], present: Sequence[float]) -> _Axis:
    low, high = float(min(present)), float(max(present))
    logarithmic = low > 0 and high > LOG_SPAN * low
    place: Callable[[float], float] = math.log10 if logarithmic else float
    label = f"{name} (log)" if logarithmic else name
    ticks = [(place(tick), _value(float(tick))) for tick in _ticks(low, high, logarithmic)]
    bottom, top = place(low), place(high)
    if bottom == top:
        bottom, top = bottom - max(abs(bottom), 1.0) / 10, top + max(abs(top), 1.0) / 10
    absent = bottom - 0.15 * (top - bottom)
    if len(present) < len(values):
        ticks.insert(0, (absent, NOT_SET))
        bottom = absent
    positions = [absent if value is None else place(value) for value in values]
    return _Axis(label, positions, bottom, top, ticks)


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Both ends, which a reader wants to know, and round values between them that do not crowd the ends."""
    if low == high:
        return [low]
    if logarithmic:
        place: Callable[[float], float] = math.log10
        between = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    else:
        place = float
        step = 10.0 ** math.floor(math.log10((high - low) / 2))
        step *= next(factor for factor in (1, 2, 5) if (high - low) / (step * factor) <= 7)
        between = [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    margin = 0.08 * (place(high) - place(low))
    inner = [t for t in between if place(low) + margin < place(t) < place(high) - margin]
    return [low, *inner, high]


# ---- The HTML file ---------------------------------------------------------------------------------------------


def write_report(study: StudyRecord, path: Path | str) -> None:
    """Write one HTML file that needs nothing else, not even a network; replaces `path` in one step."""
    page = _page(study)
    _replace(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _replace(path: Path | str, write: Callable[[Path], Any]) -> None:
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


def _page(study: StudyRecord) -> str:
    members = _by_standard_accuracy(front_trials(study))
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
            _table(study, members, _MEMBER_COLUMNS),
            f"<h2>All trials</h2><details{' open' if len(study.trials) <= OPEN_ROWS else ''}>",
            f"<summary>{len(study.trials):,} {'trial' if len(study.trials) == 1 else 'trials'}</summary>",
            _table(study, study.trials, _TRIAL_COLUMNS),
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
    return f'<p class="setting">{escape(_setting(study))}</p><dl>{cells}</dl>'


def _explanation(study: StudyRecord) -> str:
    return f"""<p>Each trial of this study trained one image classifier and measured it on {study.num_images:,} images
that it had not been trained on. <b>Standard accuracy</b> is the share of these images that it labels correctly.
<b>Adversarial accuracy</b> is the share that it still labels correctly after an attack has searched for small changes
of the pixels (within the threat, {escape(study.threat)}) that mislead it. <b>Certified accuracy</b> is the share for
which a proof shows that no such change can mislead it, whatever the attack; where the verifier left images undecided,
it is an interval, and its lower end, the proved part, is what counts here. Certified is never above adversarial, nor
adversarial above standard. Training for more certified accuracy usually costs standard accuracy, so no single trial is
the best. The <b>front</b> is the choice that remains: a trial is on it if no other is at least as good in both
accuracies and better in one. Decide how much standard accuracy you need, and take the front member with the most
certified accuracy among those that have it. The <b>hypervolume</b> sums the front up in one number, the area between
it and the reference point; larger is better, and only numbers with the same reference compare. Each point is one
training run with one seed: differences of a few images may be chance.</p>"""


def _figures(study: StudyRecord) -> list[str]:
    varied = varied_parameters(study)
    fixed = [name for name in dict.fromkeys(n for t in study.complete for n in t.params) if name not in varied]
    untimed = sum(trial.finished_at is None for trial in study.complete)
    captions = {
        "front": "Right and up is better. Blue points are the front, the shaded area is the hypervolume. A line "
        "upwards from a point ends where its certified accuracy would be if all its undecided images were proved.",
        "progress": "Hypervolume of the trials finished so far. Wall time includes pauses between continuations."
        + (f" Trials left out because their time of finishing is not known: {untimed}." if untimed else ""),
        "parameters": "One line for each complete trial: the brighter, the more certified accuracy. Drag along an axis "
        f"to keep only the trials that cross there. \u201c{NOT_SET}\u201d: the parameter did not apply."
        + (f" Equal in all trials, so not drawn: {', '.join(fixed)}." if fixed else ""),
        "costs": "What each trial spent on its parts, failed trials included. A teacher is trained once and shared: "
        "the trial that trained it bears its cost.",
    }
    some, several = bool(study.complete), len(study.complete) > 1
    figures = {
        "front": front_figure(study) if some else None,
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
    caption = f"{escape(caption)} {escape(_setting(study))}"
    return f"<h2>{name.capitalize()}</h2><figure>{body}<figcaption>{caption}</figcaption></figure>"


_Column = tuple[str, Callable[[TrialRecord], str]]
_NUMBERS = ("trial", "standard", "adversarial", "certified", "seconds", "seed")
_MEMBER_COLUMNS: tuple[_Column, ...] = (
    ("trial", lambda trial: str(trial.number)),
    ("parameters", _parameters),
    ("seed", lambda trial: str(trial.seed)),
    ("standard", lambda trial: _results(trial)[0]),
    ("adversarial", lambda trial: _results(trial)[1]),
    ("certified", lambda trial: _results(trial)[2]),
    ("seconds", lambda trial: _results(trial)[3]),
    ("key", lambda trial: trial.key),
)
_TRIAL_COLUMNS: tuple[_Column, ...] = (
    *_MEMBER_COLUMNS[:1],
    ("state", lambda trial: trial.state),
    *_MEMBER_COLUMNS[1:],
    ("remarks", lambda trial: trial.reason or trial.verification_state or ""),
)


def _table(study: StudyRecord, trials: Sequence[TrialRecord], columns: Sequence[_Column]) -> str:
    if not trials:
        return '<p class="empty">None yet.</p>'
    head = "".join(f'<th class="{_css_class(name)}">{escape(name)}</th>' for name, _ in columns)
    rows = "".join(
        f'<tr class="{trial.state.lower()}">'
        + "".join(f'<td class="{_css_class(name)}">{escape(text(trial))}</td>' for name, text in columns)
        + "</tr>\n"
        for trial in trials
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="setting">{escape(_setting(study))}</p>'
    )


def _css_class(column: str) -> str:
    return "number" if column in _NUMBERS else column


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
th, td {{ text-align: left; vertical-align: top; padding: 5px 12px 5px 0; border-bottom: 1px solid {GRID}; }}
th {{ font-weight: 600; border-bottom-color: #AFB8C1; white-space: nowrap; }}
.number {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }}
td.parameters {{ min-width: 19em; overflow-wrap: anywhere; }}
td.remarks {{ min-width: 12em; overflow-wrap: anywhere; }}
td.key {{ font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 11.5px;
  min-width: 8em; overflow-wrap: anywhere; }}
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
