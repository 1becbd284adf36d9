"""The figures about single trials: hypervolume as they finish, their parameters, what they cost.

They stay readable with thousands of trials: of the parameters of trials below the front a sample is drawn, and a bar of
costs is then a mean of consecutive trials.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.colors import get_colorscale

from search.results.axes import axis_of
from search.results.configurations import Front, check_finite, hypervolume_course, study_front
from search.results.figure_style import BELOW, FRONT, OTHER, empty_figure, time_unit
from search.results.report_text import seconds_spent, varied_parameters
from search.studies.records import OBJECTIVES, StudyRecord, TrialRecord

UNTIL_STOPPED = "until stopped"


class Fill(NamedTuple):
    """How the bars of one part are filled: hatching tells apart what some eyes see in one colour."""

    colour: str
    hatching: str = ""


COSTS = {"teacher": Fill("#0072B2"), "student": Fill("#E69F00"), "verification": Fill("#56B4E9")}
FURTHER_COSTS = (Fill("#CC79A7", "x"), Fill("#009E73", "."), Fill("#D55E00", "-"))
STOPPED_COSTS = Fill(OTHER, "/")

MARKED = 200  # a course of more steps has no marks, and nothing where it is level
COLOURED_LINES = 60  # of more trials only the front is coloured by certified accuracy
LINES_BELOW = 300  # so many of the trials below the front are drawn then
BARS = 200  # costs of more trials are drawn as means of consecutive ones
MEANS = 100  # so many of them at most


# ---- Hypervolume -----------------------------------------------------------------------------------------------


def hypervolume_figure(found: Front) -> go.Figure:
    """Hypervolume after each COMPLETE trial with a time of finishing, over the wall time of the study."""
    study = found.study
    trials = [trial for each in found.configurations for trial in each.trials]
    finished = [(trial.finished_at, trial) for trial in trials if trial.finished_at is not None]
    finished.sort(key=lambda item: (item[0], item[1].number))
    course = hypervolume_course([trial for _, trial in finished], study.reference).tolist()
    elapsed = [max(at - study.started_at, 0.0) for at, _ in finished]
    divisor, unit = time_unit(max(elapsed, default=0.0))
    steps = [(0.0, 0.0, "start")]
    steps += [
        (seconds / divisor, value, f"after trial #{trial.number}")
        for seconds, value, (_, trial) in zip(elapsed, course, finished, strict=True)
    ]
    if len(steps) > MARKED:
        steps = [steps[0], *(now for before, now in pairwise(steps[:-1]) if now[1] != before[1]), steps[-1]]
    figure = empty_figure(f"wall time since the start of the study ({unit})", "hypervolume")
    figure.add_scatter(
        x=[step[0] for step in steps], y=[step[1] for step in steps],
        mode="lines+markers" if len(finished) <= MARKED else "lines",
        line={"shape": "hv", "color": FRONT, "width": 2}, marker_size=5, showlegend=False,
        text=[step[2] for step in steps], hovertemplate="%{text}: %{y:.4f}<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(rangemode="tozero")
    return figure


# ---- Parameters ------------------------------------------------------------------------------------------------


class _Lines(NamedTuple):
    trials: list[TrialRecord]  # by rising certified accuracy
    members: set[int]  # numbers of those on the front
    num_left_out: int  # trials below the front that are not drawn


def _lines(found: Front) -> _Lines:
    """The trials to draw: all of the front, and of the others a sample that their number spreads evenly."""
    members = {trial.number for member in found.members for trial in member.trials}
    below = [trial for trial in found.study.complete if trial.number not in members]
    step = max(len(below) / LINES_BELOW, 1.0)
    drawn = [below[int(index * step)] for index in range(int(len(below) / step))]
    front = [trial for trial in found.study.complete if trial.number in members]
    # The best are drawn on top.
    trials = sorted([*drawn, *front], key=lambda trial: (trial.certified_accuracy or 0.0, trial.number))
    return _Lines(trials, members, len(below) - len(drawn))


def parameters_figure(study: StudyRecord) -> go.Figure:
    """Parallel coordinates of the parameters that varied, coloured by certified accuracy."""
    check_finite(study)
    trials, members, _ = _lines(study_front(study))
    axes = [axis_of(name, [trial.params.get(name) for trial in trials]) for name in varied_parameters(study.complete)]
    axes += [
        axis_of(name.replace("_", " "), [getattr(trial, name) for trial in trials], log_span=math.inf)
        for name in OBJECTIVES
    ]
    figure = empty_figure("", "")
    figure.add_parcoords(
        dimensions=[axis.dimension() for axis in axes],
        line=_all_coloured(trials) if len(trials) <= COLOURED_LINES else _front_coloured(trials, members),
        labelangle=-30, labelside="top", labelfont={"size": 12}, tickfont={"size": 10}, rangefont={"size": 1},
    )  # fmt: skip
    # The labels of the first axis are left of it, and would be cut off.
    longest = max((len(text) for _, text in axes[0].ticks), default=0)
    figure.update_layout(margin={"l": min(max(80, 20 + 7 * longest), 240), "r": 60, "t": 130, "b": 30}, height=520)
    return figure


def parameters_text_of(found: Front) -> str:
    """What the colours of the lines mean, and whether all trials are there, in sentences."""
    trials, _, num_left_out = _lines(found)
    if len(trials) <= COLOURED_LINES:
        return "One line for each complete trial: the brighter, the more certified accuracy."
    drawn = "one line for each complete trial"
    if num_left_out:
        drawn = f"all trials on the front, and {LINES_BELOW} others, evenly by number; {num_left_out:,} are left out"
    return (
        f"Coloured lines are the front: the brighter, the more certified accuracy. Pale lines are below it ({drawn})."
    )


def _all_coloured(trials: Sequence[TrialRecord]) -> dict[str, Any]:
    return {
        "color": [trial.certified_accuracy for trial in trials],
        "colorscale": "Cividis",
        "showscale": len(trials) > 1,
        "colorbar": {"title": {"text": "certified"}, "thickness": 14, "outlinewidth": 0},
    }


def _front_coloured(trials: Sequence[TrialRecord], members: set[int]) -> dict[str, Any]:
    """Colours of the front by certified accuracy; what is below it has one number below all of these, and is pale."""
    certified = [trial.certified_accuracy or 0.0 for trial in trials if trial.number in members]
    low, high = min(certified), max(certified)
    span = max(high - low, 1e-3)
    below, share = low - 0.08 * span, 0.07 / 1.08  # the pale part of the bar, which names it
    scale = [(share + (1 - share) * place, colour) for place, colour in get_colorscale("Cividis")]
    ticks = [low + part * span for part in (0, 0.25, 0.5, 0.75, 1)]
    return {
        "color": [(trial.certified_accuracy if trial.number in members else below) for trial in trials],
        "cmin": below,
        "cmax": low + span,
        "colorscale": [(0.0, BELOW), (share, BELOW), *scale],
        "showscale": True,
        "colorbar": {
            "title": {"text": "certified"},
            "thickness": 14,
            "outlinewidth": 0,
            "tickvals": [below + 0.03 * span, *ticks],
            "ticktext": ["below", *(f"{tick:.3f}" for tick in ticks)],
        },
    }


# ---- Costs -----------------------------------------------------------------------------------------------------


def costs_figure(study: StudyRecord) -> go.Figure:
    """Seconds of each trial by part, stacked; those of a trial that was stopped early in one part."""
    bars = _cost_bars(study)
    divisor, unit = time_unit(max((sum(bar.seconds.values()) for bar in bars), default=0.0))
    width = bars[0].width if bars else 1
    figure = empty_figure("trial number", f"cost ({unit})" if width == 1 else f"mean cost of a trial ({unit})")
    for name, fill in _fills([bar.seconds for bar in bars]).items():
        figure.add_bar(
            x=[bar.first + (width - 1) / 2 if width > 1 else bar.first for bar in bars],
            y=[bar.seconds.get(name, 0.0) / divisor for bar in bars],
            name=escape(name),
            marker={
                "color": fill.colour, "line_width": 0,
                "pattern": {"shape": fill.hatching, "fgcolor": "white", "size": 6, "solidity": 0.25},
            },
            customdata=[bar.text for bar in bars],
            hovertemplate=f"%{{customdata}}, {escape(name)}: %{{y:.3g}} {unit}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(barmode="stack", bargap=0.15)
    figure.update_xaxes(showgrid=False, tickvals=[bar.first for bar in bars] if len(bars) <= 20 else None)
    return figure


def costs_text(study: StudyRecord) -> str:
    """What a bar of costs is."""
    width = _bar_width([trial.number for trial in study.trials if known_costs(trial)])
    if width == 1:
        return "What each trial spent on its parts, failed trials included."
    return (
        f"What trials spent on their parts, failed trials included: each bar is the mean of {width} consecutive ones."
    )


class _CostBar(NamedTuple):
    first: int  # number of its first trial
    width: int  # in numbers of trials
    seconds: Mapping[str, float]  # mean, by part
    text: str


def _cost_bars(study: StudyRecord) -> list[_CostBar]:
    costs = {trial.number: parts for trial in study.trials if (parts := known_costs(trial))}
    width = _bar_width(list(costs))
    if width == 1:
        return [_CostBar(number, 1, parts, f"trial {number}") for number, parts in costs.items()]
    grouped: dict[int, list[Mapping[str, float]]] = {}
    for number, parts in costs.items():
        grouped.setdefault(number // width * width, []).append(parts)
    return [
        _CostBar(first, width, _means(group), f"mean of {len(group)} trials, {first} to {first + width - 1}")
        for first, group in sorted(grouped.items())
    ]


def _bar_width(numbers: Sequence[int]) -> int:
    """How many consecutive trials share a bar: a round number that leaves at most so many bars as are told apart."""
    if len(numbers) <= BARS:
        return 1
    least = (max(numbers) + 1) / MEANS
    power = int(10 ** math.floor(math.log10(least)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


def _means(group: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for parts in group for name in parts)
    return {name: math.fsum(parts.get(name, 0.0) for parts in group) / len(group) for name in names}


def known_costs(trial: TrialRecord) -> dict[str, float]:
    """Seconds of a trial by part; nobody tells apart what a trial spent until it was stopped."""
    if trial.costs or trial.state != "STOPPED":
        return trial.costs
    spent = seconds_spent(trial)
    return {} if spent is None else {UNTIL_STOPPED: spent}


def _fills(costs: Iterable[Mapping[str, float]]) -> dict[str, Fill]:
    names = {name for parts in costs for name in parts}
    stopped = {UNTIL_STOPPED: STOPPED_COSTS} if UNTIL_STOPPED in names else {}
    further = sorted(names - COSTS.keys() - stopped.keys())
    return COSTS | {name: FURTHER_COSTS[i % len(FURTHER_COSTS)] for i, name in enumerate(further)} | stopped
