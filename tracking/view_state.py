"""Saved views of MLflow's page of runs: which runs, which columns, which charts, in which order.

The format is the one that the pages of MLflow 3.17 read and write themselves. It is documented nowhere, so
tests/test_ui.py looks at the result in a browser.
"""

import base64
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tracking.tracker import KIND_TRIAL, TAG_FRONT, TAG_KIND, TAG_SPLIT, TAG_STUDY, StudyInfo

State = Mapping[str, Any]

_STANDARD, _CERTIFIED = "standard_accuracy", "certified_accuracy"
_ACCURACIES = (_STANDARD, "adversarial_accuracy", _CERTIFIED)
_METRICS = (_STANDARD, _CERTIFIED, "certified_upper", "adversarial_accuracy", "seconds")
_CURVES = ("validation/standard_accuracy", "validation/ibp_certified_accuracy", "student/loss")
# MLflow adds a chart for every metric, in sections named after what stands before a metric's last slash. Sections of
# these names that are there already are taken, and these are closed.
_AUTOMATIC = ("Model metrics", "cost", "rung", "student", "teacher")
_SHOWN_RUNS = 100  # a page of charts loads no more
_COMPRESSED = "deflate;"


def all_trials(study: StudyInfo) -> State:
    """Every trial of a study: where the front is, and what leads there."""
    return _state(
        _query({TAG_KIND: KIND_TRIAL, TAG_STUDY: study.name}),
        [*_columns(study), f"tags.`{TAG_FRONT}`"],
        [_front_section(), *_parameter_sections(study), _training_section()],
    )


def front_members(study: StudyInfo) -> State:
    """The members of a study's front."""
    return _state(
        _query({TAG_KIND: KIND_TRIAL, TAG_STUDY: study.name, TAG_FRONT: "true"}),
        _columns(study),
        [_front_section(), _accuracy_section(), *_parameter_sections(study), _training_section()],
    )


def fronts_side_by_side(split: str) -> State:
    """The members of all fronts of an experiment whose accuracies are about the same images."""
    columns = [f"tags.`{TAG_STUDY}`", *(f"metrics.`{name}`" for name in _METRICS)]
    query = _query({TAG_KIND: KIND_TRIAL, TAG_FRONT: "true", TAG_SPLIT: split})
    return _state(query, columns, [_front_section(), _accuracy_section(), _training_section()])


def encoded(name: str, state: State, time_ms: int) -> str:
    """A view as the value of its tag, which may hold 20,000 characters."""
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    return json.dumps({"name": name, "createdAt": time_ms, "updatedAt": time_ms, "state": _COMPRESSED + packed})


def decoded(text: str) -> tuple[str, State]:
    """Name and state of a view that `encoded` wrote."""
    view = json.loads(text)
    packed = view["state"].removeprefix(_COMPRESSED)
    return view["name"], json.loads(zlib.decompress(base64.b64decode(packed)))


def _query(tags: Mapping[str, str]) -> str:
    return " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())


def _columns(study: StudyInfo) -> list[str]:
    parameters = [f"params.`{name}`" for name in study.parameters]
    return [*(f"metrics.`{name}`" for name in _METRICS), *parameters]


def _state(query: str, columns: Sequence[str], sections: Iterable[Mapping[str, Any]]) -> State:
    closed = [_section(name, [], display=False) for name in _AUTOMATIC]
    listed = [{**section, "uuid": f"section-{number}"} for number, section in enumerate([*sections, *closed])]
    charts = [
        {**chart, "uuid": f"{section['uuid']}-chart-{number}", "metricSectionId": section["uuid"]}
        for section in listed
        for number, chart in enumerate(section["charts"])
    ]
    return {
        "searchFilter": query,
        "orderByKey": f"metrics.`{_CERTIFIED}`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "runsHiddenMode": "SHOW_ALL",
        "selectedColumns": list(columns),
        "isAccordionReordered": True,  # else sections are sorted by name
        "hideEmptyCharts": True,
        "compareRunSections": [{name: value for name, value in each.items() if name != "charts"} for each in listed],
        "compareRunCharts": charts,
    }


def _section(
    name: str, charts: Sequence[Mapping[str, Any]], *, columns: int = 2, height: int = 420, display: bool = True
) -> dict[str, Any]:
    return {
        "name": name,
        "display": display,
        "isReordered": True,
        "deleted": False,
        "isGenerated": False,
        "columns": columns,
        "cardHeight": height,
        "charts": list(charts),
    }


def _front_section() -> dict[str, Any]:
    return _section("Standard against certified accuracy", [_scatter(_STANDARD, _CERTIFIED)], columns=1, height=440)


def _parameter_sections(study: StudyInfo) -> list[dict[str, Any]]:
    """Parallel coordinates, and contours over the first two parameters."""
    common = [name for name in study.parameters if name not in study.conditional]
    lines = [_parallel(common)] if common else []
    if study.conditional:  # a trial that lacks a parameter is left out of such a chart, so the first one is without
        lines.append(_parallel(study.parameters))
    axes = [{"key": name, "type": "PARAM"} for name in common[:2]]
    contours = [
        _chart("CONTOUR", xaxis=axes[0], yaxis=axes[1], zaxis={"key": name, "type": "METRIC"})
        for name in (_STANDARD, _CERTIFIED)
        if len(axes) == 2
    ]
    sections = [_section("Parameters", lines, columns=1), _section("Contours", contours, columns=2, height=360)]
    return [section for section in sections if section["charts"]]


def _accuracy_section() -> dict[str, Any]:
    bars = _chart("BAR", metricKey=_STANDARD, selectedMetricKeys=list(_ACCURACIES), displayName="Accuracies")
    return _section("Accuracies", [bars], columns=1, height=420)


def _training_section() -> dict[str, Any]:
    lines = [_chart("LINE", metricKey=name, selectedMetricKeys=[name], displayName=name) for name in _CURVES]
    return _section("Training", lines, columns=3, height=300)


def _scatter(x: str, y: str) -> dict[str, Any]:
    return _chart("SCATTER", xaxis={"key": x, "type": "METRIC"}, yaxis={"key": y, "type": "METRIC"})


def _parallel(parameters: Sequence[str]) -> dict[str, Any]:
    metrics = [_STANDARD, _CERTIFIED]
    return _chart("PARALLEL", selectedParams=list(parameters), selectedMetrics=metrics, showAllRuns=False)


def _chart(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "deleted": False, "isGenerated": False, "runsCountToCompare": _SHOWN_RUNS, **fields}
