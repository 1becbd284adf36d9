"""The figures of a comparison: fronts with their attainment bands, and hypervolume over accelerator-hours.

A method has a colour, a marker and a dash of its own, so that it is known without colours, too.
"""

from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from search.comparing.attainment import Array, band_runs, median_runs
from search.comparing.comparison import ComparedStudy, Comparison, Method
from search.comparing.comparison_text import band_text, median_text
from search.results.configurations import Configuration
from search.results.figure_style import FAINT, REFERENCE, empty_figure
from search.results.report_text import by_standard_accuracy

# Okabe and Ito's palette without yellow, which is too pale for lines. Three lists of different lengths repeat together
# after 168 methods only.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "star", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
BAND_OPACITY = 0.16
REACH = 1.5  # the view includes a reference that is at most this many spans of the points away
MIN_SPAN = 0.04  # the view of points that hardly differ is this wide


class Style(NamedTuple):
    """How a method is drawn wherever it is."""

    colour: str
    symbol: str
    dash: str

    @property
    def area(self) -> str:
        red, green, blue = (int(self.colour[at : at + 2], 16) for at in (1, 3, 5))
        return f"rgba({red}, {green}, {blue}, {BAND_OPACITY})"


def styles(comparison: Comparison) -> dict[str, Style]:
    """The style of each method, by label."""
    return {
        method.label: Style(COLOURS[i % len(COLOURS)], SYMBOLS[i % len(SYMBOLS)], DASHES[i % len(DASHES)])
        for i, method in enumerate(comparison.methods)
    }


# ---- fronts --------------------------------------------------------------------------------------------------------


def fronts_figure(comparison: Comparison) -> go.Figure:
    """Of a method with one run its front, of one with several the median attainment surface and its band."""
    figure = empty_figure("standard accuracy", "certified accuracy")
    figure.update_layout(height=560)
    floor = _floor(comparison)
    for method in comparison.methods:
        style = styles(comparison)[method.label]
        if method.num_runs == 1:
            _add_front(figure, method, style)
        else:
            _add_attainment(figure, method, style, floor)
    _add_reference(figure, comparison.reference)
    ranges = _view(comparison)
    figure.update_xaxes(range=ranges[0])
    figure.update_yaxes(range=ranges[1])
    if not all(low <= corner <= high for (low, high), corner in zip(ranges, comparison.reference, strict=True)):
        x, y = comparison.reference
        figure.add_annotation(
            text=f"reference ({x:g}, {y:g}) lies outside this view", xref="paper", yref="paper", x=0.01, y=0.02,
            showarrow=False, font={"size": 12, "color": FAINT},
        )  # fmt: skip
    return figure


def _add_front(figure: go.Figure, method: Method, style: Style) -> None:
    """A single run's front, with the intervals of its certified accuracies."""
    (study,) = method.studies
    members = by_standard_accuracy(study.front.members)[::-1]
    above = [member.certified_upper - member.certified_accuracy for member in members]
    bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": [0.0] * len(above)}
    figure.add_scatter(
        x=[member.standard_accuracy for member in members],
        y=[member.certified_accuracy for member in members],
        error_y=bars | {"thickness": 1, "width": 2, "color": style.colour, "visible": any(above)},
        hovertext=[_member_text(study, member) for member in members],
        hovertemplate="%{hovertext}<extra></extra>",
        name=f"{escape(method.label)}: front (n = 1)",
        **_stairs(style, "vh"),
    )


def _add_attainment(figure: go.Figure, method: Method, style: Style, floor: tuple[float, float]) -> None:
    upper, lower = (method.attained.corners(runs) for runs in band_runs(method.num_runs))
    outline = np.concatenate([_outline(upper, floor), _outline(lower, floor)[::-1]])
    _add_band(figure, method, style, outline, band_text(method.num_runs))
    runs = median_runs(method.num_runs)
    corners = method.attained.corners(runs)
    text = f"{escape(method.label)}: {escape(median_text(method.num_runs))}"
    figure.add_scatter(
        x=corners[:, 0],
        y=corners[:, 1],
        hovertemplate=f"{text}<br>standard %{{x:.4f}}, certified %{{y:.4f}}<extra></extra>",
        name=f"{escape(method.label)}: median (n = {method.num_runs})",
        **_stairs(style, "vh"),
    )


def _outline(corners: Array, floor: tuple[float, float]) -> Array:
    """The whole staircase from the left edge to the bottom, every turn written out, shape [2 P + 1, 2]."""
    x = np.repeat(np.append(floor[0], corners[:, 0]), 2)[1:]
    y = np.repeat(np.append(corners[:, 1], floor[1]), 2)[:-1]
    return np.column_stack([x, y])


def _floor(comparison: Comparison) -> tuple[float, float]:
    """Left of and below all that is drawn."""
    points = np.concatenate([_points(comparison), [comparison.reference]])
    low = points.min(axis=0) - MIN_SPAN
    return float(low[0]), float(low[1])


def _points(comparison: Comparison) -> Array:
    return np.array([member.objectives for study in comparison.studies for member in study.front.members])


def _member_text(study: ComparedStudy, member: Configuration) -> str:
    certified = f"{member.certified_accuracy:.4f}"
    if member.certified_upper > member.certified_accuracy:
        certified += f" to {member.certified_upper:.4f}"
    keys = ", ".join(trial.key for trial in member.trials)
    return f"<b>{escape(keys)}</b><br>standard {member.standard_accuracy:.4f}, certified {certified}"


def _add_reference(figure: go.Figure, reference: tuple[float, float]) -> None:
    x, y = reference
    cross = {"symbol": "x-thin", "size": 11, "line": {"width": 2, "color": REFERENCE}}
    hover = f"reference ({x:g}, {y:g})<extra></extra>"
    figure.add_scatter(x=[x], y=[y], mode="markers", name="reference", marker=cross, hovertemplate=hover)


def _view(comparison: Comparison) -> list[tuple[float, float]]:
    """Ranges of both axes around all fronts, wide enough for the reference unless that would crowd them."""
    points = _points(comparison)
    tops = [member.certified_upper for study in comparison.studies for member in study.front.members]
    highs = (float(points[:, 0].max()), max(tops))
    ranges = []
    for low, high, corner in zip(points.min(axis=0).tolist(), highs, comparison.reference, strict=True):
        missing = max(MIN_SPAN - (high - low), 0.0)
        low, high = low - missing / 2, high + missing / 2
        span = high - low
        if low - REACH * span <= corner <= high:
            low = min(low, corner)
        ranges.append((low - 0.08 * span, high + 0.12 * span))
    return ranges


# ---- over accelerator-hours ----------------------------------------------------------------------------------------


def hours_figure(comparison: Comparison) -> go.Figure:
    """Mean hypervolume of each method over the accelerator-hours that a run had spent, and its band over runs."""
    unit, name = _hour_unit(max(float(method.course.spent[-1]) for method in comparison.methods))
    figure = empty_figure(f"accelerator-{name} spent", "hypervolume")
    for method in comparison.methods:
        style, course = styles(comparison)[method.label], method.course
        spent = course.spent / unit
        if method.num_runs > 1:
            top, bottom = _steps(spent, course.high), _steps(spent, course.low)
            _add_band(figure, method, style, np.concatenate([top, bottom[::-1]]), _spread_text(method))
        figure.add_scatter(
            x=spent,
            y=course.mean,
            hovertemplate=f"{escape(method.label)}: %{{y:.4f}} after %{{x:.3g}} {name}<extra></extra>",
            name=f"{escape(method.label)}: mean (n = {method.num_runs})" if method.num_runs > 1 else _alone(method),
            **_stairs(style, "hv", markers=len(spent) <= 60),
        )
    if comparison.common_hours > 0:
        line = {"dash": "dot", "width": 1, "color": FAINT}
        figure.add_vline(x=comparison.common_hours / unit, line=line, annotation={"text": "all spent so much"})
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(rangemode="tozero")
    return figure


def _hour_unit(hours: float) -> tuple[float, str]:
    """The unit in which the largest of several times reads well, and its length in hours."""
    if hours >= 3:
        return 1.0, "hours"
    return (1 / 60, "minutes") if hours >= 0.05 else (1 / 3600, "seconds")


def _steps(x: Array, y: Array) -> Array:
    """A curve that keeps each value until the next, every turn written out, shape [2 T - 1, 2]."""
    return np.column_stack([np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]])


def _alone(method: Method) -> str:
    return f"{escape(method.label)} (n = 1)"


def _spread_text(method: Method) -> str:
    few = band_runs(method.num_runs) == (1, method.num_runs)
    share = "from the lowest to the highest" if few else "from the lower to the upper quartile"
    return f"{share} of {method.num_runs} runs"


# ---- both ----------------------------------------------------------------------------------------------------------


def _stairs(style: Style, shape: str, *, markers: bool = True) -> Mapping[str, Any]:
    return {
        "mode": "lines+markers" if markers else "lines",
        "line": {"shape": shape, "color": style.colour, "width": 2, "dash": style.dash},
        "marker": {"symbol": style.symbol, "size": 8, "color": style.colour, "line": {"color": "white", "width": 1}},
    }


def _add_band(figure: go.Figure, method: Method, style: Style, outline: Array, text: str) -> None:
    figure.add_scatter(
        x=outline[:, 0],
        y=outline[:, 1],
        mode="lines",
        line={"color": style.colour, "width": 0.6, "dash": style.dash},
        fill="toself",
        fillcolor=style.area,
        hoverinfo="skip",
        name=f"{escape(method.label)}: {escape(text)}",
    )
