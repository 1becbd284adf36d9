"""Axes of parallel coordinates: where each trial crosses the axis of a parameter, and which places are labelled."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

from search.results.report_text import is_number, value_text

LOG_SPAN = 20.0  # a positive parameter is drawn on a logarithmic axis when max / min exceeds this
NOT_SET = "not set"


class Axis(NamedTuple):
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


def axis_of(name: str, values: Sequence[Any], *, log_span: float = LOG_SPAN) -> Axis:
    """An axis for numbers, logarithmic where they span much, or for categories; absent values get a place below."""
    present = [value for value in values if value is not None]
    if present and all(is_number(value) for value in present):
        return _numeric_axis(name, values, present, log_span)
    categories = sorted({value_text(value) for value in present})
    if len(present) < len(values):
        categories.insert(0, NOT_SET)
    places = {category: float(place) for place, category in enumerate(categories)}
    positions = [places[NOT_SET if value is None else value_text(value)] for value in values]
    return Axis(name, positions, -0.25, max(len(categories) - 0.75, 0.25), [(p, c) for c, p in places.items()])


def _numeric_axis(name: str, values: Sequence[Any], present: Sequence[float], log_span: float) -> Axis:
    low, high = float(min(present)), float(max(present))
    logarithmic = low > 0 and high > log_span * low
    place: Callable[[float], float] = math.log10 if logarithmic else float
    label = f"{name} (log)" if logarithmic else name
    ticks = [(place(tick), value_text(float(tick))) for tick in _ticks(low, high, logarithmic)]
    bottom, top = place(low), place(high)
    if bottom == top:
        bottom, top = bottom - max(abs(bottom), 1.0) / 10, top + max(abs(top), 1.0) / 10
    absent = bottom - 0.15 * (top - bottom)
    if len(present) < len(values):
        ticks.insert(0, (absent, NOT_SET))
        bottom = absent
    positions = [absent if value is None else place(value) for value in values]
    return Axis(label, positions, bottom, top, ticks)


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
