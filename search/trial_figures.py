"""The figures about single trials: hypervolume as they finish, their parameters, what they cost."""

import math
from collections.abc import Iterable, Mapping
from html import escape

import plotly.graph_objects as go

from search.axes import axis_of
from search.configurations import Front, check_finite, hypervolume_course
from search.figure_style import FRONT, OTHER, empty_figure, time_unit
from search.records import OBJECTIVES, StudyRecord, TrialRecord
from search.report_text import seconds_spent, varied_parameters

COSTS = {"teacher": "#0072B2", "student": "#E69F00", "verification": "#56B4E9"}
FURTHER_COSTS = ("#CC79A7", "#009E73", "#D55E00")
UNTIL_STOPPED = "until stopped"


def hypervolume_figure(found: Front) -> go.Figure:
    """Hypervolume after each COMPLETE trial with a time of finishing, over the wall time of the study."""
    study = found.study
    trials = [trial for each in found.configurations for trial in each.trials]
    finished = [(trial.finished_at, trial) for trial in trials if trial.finished_at is not None]
    finished.sort(key=lambda item: (item[0], item[1].number))
    course = hypervolume_course([trial for _, trial in finished], study.reference)
    elapsed = [max(at - study.started_at, 0.0) for at, _ in finished]
    divisor, unit = time_unit(max(elapsed, default=0.0))
    figure = empty_figure(f"wall time since the start of the study ({unit})", "hypervolume")
    figure.add_scatter(
        x=[0.0, *(seconds / divisor for seconds in elapsed)], y=[0.0, *course.tolist()],
        mode="lines+markers" if len(finished) <= 200 else "lines",
        line={"shape": "hv", "color": FRONT, "width": 2}, marker_size=5, showlegend=False,
        text=["start", *(f"after trial #{trial.number}" for _, trial in finished)],
        hovertemplate="%{text}: %{y:.4f}<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(rangemode="tozero")
    return figure


def parameters_figure(study: StudyRecord) -> go.Figure:
    """Parallel coordinates of the parameters that varied, coloured by certified accuracy."""
    check_finite(study)
    trials = sorted(study.complete, key=lambda trial: trial.certified_accuracy or 0.0)  # the best are drawn on top
    axes = [axis_of(name, [trial.params.get(name) for trial in trials]) for name in varied_parameters(study.complete)]
    axes += [
        axis_of(name.replace("_", " "), [getattr(trial, name) for trial in trials], log_span=math.inf)
        for name in OBJECTIVES
    ]
    certified = [trial.certified_accuracy for trial in trials]
    figure = empty_figure("", "")
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
    """Seconds of each trial by part, stacked; those of a trial that was stopped early in one part."""
    costs = {trial.number: parts for trial in study.trials if (parts := known_costs(trial))}
    divisor, unit = time_unit(max((sum(parts.values()) for parts in costs.values()), default=0.0))
    figure = empty_figure("trial number", f"cost ({unit})")
    for name, colour in _cost_colours(costs.values()).items():
        figure.add_bar(
            x=list(costs), y=[parts.get(name, 0.0) / divisor for parts in costs.values()],
            name=escape(name), marker={"color": colour, "line_width": 0},
            hovertemplate=f"trial %{{x}}, {escape(name)}: %{{y:.3g}} {unit}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(barmode="stack", bargap=0.15 if len(costs) < 200 else 0)
    figure.update_xaxes(showgrid=False, dtick=1 if len(costs) <= 20 else None)
    return figure


def known_costs(trial: TrialRecord) -> dict[str, float]:
    """Seconds of a trial by part; nobody tells apart what a trial spent until it was stopped."""
    if trial.costs or trial.state != "STOPPED":
        return trial.costs
    spent = seconds_spent(trial)
    return {} if spent is None else {UNTIL_STOPPED: spent}


def _cost_colours(costs: Iterable[Mapping[str, float]]) -> dict[str, str]:
    names = {name for parts in costs for name in parts}
    stopped = {UNTIL_STOPPED: OTHER} if UNTIL_STOPPED in names else {}
    further = sorted(names - COSTS.keys() - stopped.keys())
    return COSTS | {name: FURTHER_COSTS[i % len(FURTHER_COSTS)] for i, name in enumerate(further)} | stopped
