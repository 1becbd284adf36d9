"""Colours that carry meaning are told apart by eyes that lack one kind of cone, or something else tells them apart."""

from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from plotly.colors import get_colorscale
from test_report import SMALL, study, traces, trial
from test_report_intervals import OPEN, SEEDS, stopped

from search.results.configurations import study_front
from search.results.figure_style import BELOW, FRONT, OTHER, REFERENCE
from search.results.figure_style import SEEDS as SEED_COLOUR
from search.results.figures import untitled_front
from search.results.trial_figures import COSTS, FURTHER_COSTS, STOPPED_COSTS, costs_figure

# Machado, Oliveira and Fernandes (2009), severity 1.0; they act on linear RGB.
VISIONS = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
# CIE 1976 distance in L*a*b*: about 2 is just noticed side by side; marks that lie apart need a multiple of it.
APART = 20.0


class Mark(NamedTuple):
    colour: str
    shape: str  # symbol, hatching: what is seen without any colour


def lab(colour: str, vision: str) -> NDArray[np.float64]:
    srgb = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(VISIONS[vision]) @ linear, 0, 1)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    )
    xyz = to_xyz @ seen / np.array([0.95047, 1.0, 1.08883])
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


def distance(one: str, other: str, vision: str) -> float:
    return float(np.linalg.norm(lab(one, vision) - lab(other, vision)))


def confused(marks: dict[str, Mark]) -> list[tuple[str, str, str]]:
    """Pairs of marks of one shape that some eyes see in nearly one colour."""
    return [
        (*names, vision)
        for names in combinations(marks, 2)
        for vision in VISIONS
        if marks[names[0]].shape == marks[names[1]].shape
        and distance(marks[names[0]].colour, marks[names[1]].colour, vision) < APART
    ]


def test_the_simulation_knows_what_is_confused() -> None:
    # Grey and white look the same to everybody; the red and green of traffic lights do not to all.
    for vision in VISIONS:
        assert lab("#FFFFFF", vision) == pytest.approx([100, 0, 0], abs=0.02)
        assert lab("#808080", vision)[1:] == pytest.approx([0, 0], abs=0.02)
    red, green = "#C05040", "#808030"
    assert distance(red, green, "normal") > 40
    assert confused({"red": Mark(red, ""), "green": Mark(green, "")})


def test_marks_of_the_front_are_told_apart() -> None:
    kinds = {}
    for record in (SMALL, OPEN, SEEDS):
        for name, trace in traces(untitled_front(study_front(record))).items():
            if name != "hypervolume":
                colour = trace.marker.color if isinstance(trace.marker.color, str) else FRONT
                symbol = trace.marker.symbol or "circle"
                edge = trace.marker.line.color if "thin" in symbol else None  # such symbols are all edge
                kinds[name] = Mark(edge or colour, symbol)
    assert {"front", "other trials", "reference", "possibly on the front", "lowest to highest seed"} == kinds.keys()
    kinds["possibly on the front"] = Mark(FRONT, kinds["possibly on the front"].shape)  # its face is white
    assert {FRONT, OTHER, REFERENCE, SEED_COLOUR} == {mark.colour for mark in kinds.values()}
    assert confused(kinds) == []


def test_parts_of_costs_are_told_apart() -> None:
    fills = {**COSTS, "stopped": STOPPED_COSTS, **{f"further {i}": fill for i, fill in enumerate(FURTHER_COSTS)}}
    assert confused({name: Mark(fill.colour, fill.hatching) for name, fill in fills.items()}) == []
    # The hatching does the work for some of them.
    assert confused({name: Mark(fill.colour, "") for name, fill in fills.items()})
    bars = traces(costs_figure(study(trial(0, 0.9, 0.3), stopped(1, 20.0))))
    drawn = {name: Mark(bar.marker.color, bar.marker.pattern.shape) for name, bar in bars.items()}
    assert drawn["until stopped"] == Mark(STOPPED_COSTS.colour, STOPPED_COSTS.hatching)
    assert confused(drawn) == []


@pytest.mark.parametrize("vision", VISIONS)
def test_a_scale_of_colours_rises_in_lightness_for_all_eyes(vision: str) -> None:
    lightness = [lab(colour, vision)[0] for _, colour in get_colorscale("Cividis")]
    assert all(low < high for low, high in pairwise(lightness))
    assert all(distance(BELOW, colour, vision) > APART for _, colour in get_colorscale("Cividis"))
