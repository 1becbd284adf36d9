"""The report: its numbers, its escaping, that it needs no network, and that it works for none, one and many trials."""

import dataclasses
import json
import math
import os
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from rich.console import Console

from search.results.configurations import study_front
from search.results.figures import front_figure, save_front_png, untitled_front
from search.results.page import write_report
from search.results.report import front_json, front_table, front_trials, study_hypervolume
from search.results.report_text import setting, shared_parameters, varied_parameters
from search.results.trial_figures import costs_figure, hypervolume_figure, parameters_figure
from search.studies.records import StudyRecord, TrialRecord, TrialState

SETTING = "1,797 validation images of digits; threat: linf 8/255; verifier: pgd, ibp, crown; each point: n = 1 seed."
HOSTILE = '</script><script>alert("x")</script><b>&amp;[red]$x^2$'


def trial(number: int, standard: float, certified: float, **changes: Any) -> TrialRecord:
    record = TrialRecord(
        key=f"key-{number}",
        number=number,
        state="COMPLETE",
        params={"alpha": 0.5, "network": "cnn3"},
        configuration=f"configuration-{number}",
        seed=number,
        standard_accuracy=standard,
        adversarial_accuracy=certified + 0.01,
        certified_accuracy=certified,
        certified_upper=certified,
        verification_state="finished",
        seconds=60.0,
        costs={"teacher": 10.0, "student": 40.0, "verification": 10.0},
        finished_at=1000.0 + 60 * number,
    )
    return dataclasses.replace(record, **changes)


def unfinished(number: int, state: TrialState, reason: str | None = None) -> TrialRecord:
    return TrialRecord(f"key-{number}", number, state, {"alpha": 0.1}, "configuration", 0, reason=reason)


def study(*trials: TrialRecord, **changes: Any) -> StudyRecord:
    record = StudyRecord("digits", (0.5, 0.0), trials, "digits", "linf 8/255", 1797, "pgd, ibp, crown", 1000.0)
    return dataclasses.replace(record, **changes)


# Above (0.5, 0.0): slabs of height 0.3 and width 0.4, then 0.2 and 0.3, then 0.1 and 0.1: 0.12 + 0.06 + 0.01 = 0.19.
# Trial 3 is dominated by trial 1; trials 4 and 5 have no results.
SMALL = study(
    trial(0, 0.9, 0.3),
    trial(1, 0.8, 0.5),
    trial(2, 0.6, 0.6, certified_upper=0.65),
    trial(3, 0.7, 0.5),
    unfinished(4, "FAILED", HOSTILE),
    unfinished(5, "RUNNING"),
)


def many(num_trials: int) -> StudyRecord:
    draw = random.Random(0)
    trials = []
    for number in range(num_trials):
        params: dict[str, Any] = {"alpha": 10 ** draw.uniform(-3, 0), "distillation": draw.random() < 0.5}
        if params["distillation"]:
            params["beta"] = draw.uniform(0, 10)
        standard = draw.uniform(0.6, 0.9)
        trials.append(trial(number, standard, draw.uniform(0.3, 0.4) * (1.5 - standard), params=params))
    return study(*trials)


class Page(HTMLParser):
    """What a browser would run, load and show."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in {"src", "href", "srcset", "data"}]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["script"] and self.cdata_elem == "script":
            self.scripts[-1] += data
        elif self.tags[-1:] == ["style"] and self.cdata_elem == "style":
            self.loads += [data] if "url(" in data or "@import" in data else []
        else:
            self.text += data


def rendered(record: StudyRecord, width: int = 160) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(front_table(record))
    return console.export_text()


def table_rows(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines() if line.startswith("key-")]


def traces(figure: go.Figure) -> dict[str, Any]:
    return {trace.name: trace for trace in figure.data}


def test_front_and_hypervolume_by_hand() -> None:
    assert [member.number for member in front_trials(SMALL)] == [0, 1, 2]
    assert study_hypervolume(SMALL) == pytest.approx(0.19, rel=1e-12)


def test_json_has_exactly_the_promised_shape() -> None:
    value = json.loads(json.dumps(front_json(SMALL), allow_nan=False))
    trials, configurations = value.pop("trials"), value.pop("configurations")
    assert value == {
        "study": "digits",
        "objectives": ["standard_accuracy", "certified_accuracy"],
        "hypervolume": study_hypervolume(SMALL),
        "hypervolume_bounds": [study_hypervolume(SMALL), pytest.approx(0.195)],
        "reference": [0.5, 0.0],
        "front": ["key-0", "key-1", "key-2"],
    }
    assert trials[2] == {
        "key": "key-2",
        "state": "COMPLETE",
        "params": {"alpha": 0.5, "network": "cnn3"},
        "standard_accuracy": 0.6,
        "certified_accuracy": 0.6,
        "certified_upper": 0.65,
        "adversarial_accuracy": 0.61,
        "seconds": 60.0,
        "configuration": "configuration-2",
        "seed": 2,
        "verification_state": "finished",
        "reason": None,
        "deaths": [],
        "rungs": {},
    }
    assert configurations[2] == {
        "configuration": "configuration-2",
        "trials": ["key-2"],
        "num_seeds": 1,
        "standard_accuracy": 0.6,
        "certified_accuracy": 0.6,
        "certified_upper": 0.65,
        "standard_range": [0.6, 0.6],
        "certified_range": [0.6, 0.6],
        "on_front": True,
        "certain": True,
    }
    assert [each["on_front"] for each in configurations] == [True, True, True, False]
    assert [each["state"] for each in trials] == ["COMPLETE"] * 4 + ["FAILED", "RUNNING"]
    assert all(each.keys() == trials[2].keys() for each in trials)
    assert trials[4]["standard_accuracy"] is None


def test_json_of_no_trials() -> None:
    value = front_json(study())
    assert (value["hypervolume"], value["trials"], value["front"]) == (0.0, [], [])


def test_table_lists_the_front_with_intervals_that_are_open() -> None:
    text = rendered(SMALL)
    assert text.startswith("digits: 3 of 4 complete trials on the front\nhypervolume 0.1900 to 0.1950 above (0.5, 0)\n")
    assert SETTING in text
    assert "In all trials: alpha = 0.5, network = cnn3." in text
    assert "0.6000\u20130.6500" in text
    assert "0.5000\u2013" not in text  # trial 1 has nothing open
    assert table_rows(text) == [
        "key-0 0.9000 0.3100 0.3000 60",
        "key-1 0.8000 0.5100 0.5000 60",
        "key-2 0.6000 0.6100 0.6000\u20130.6500 60",
    ]


def test_table_has_one_column_for_each_parameter_and_two_parts_where_the_terminal_is_narrow() -> None:
    params = [
        {"loss": "no_distillation", "alpha": 0.0335217, "train_epsilon_factor": 1.2361, "l1": 1.012e-7, "epochs": 60},
        {"loss": "cc_dist", "alpha": 0.5, "beta": 5.0, "train_epsilon_factor": 1.0, "l1": 1e-6, "epochs": 60},
    ]
    record = study(trial(0, 0.9, 0.3, params=params[0]), trial(1, 0.8, 0.5, params=params[1]))
    results = ["key-0 0.9000 0.3100 0.3000 60", "key-1 0.8000 0.5100 0.5000 60"]
    values = ["no_distillation 0.0335 1.24 1.01e-07 -", "cc_dist 0.5 1 1e-06 5"]
    for width in (80, 120):
        text = rendered(record, width)
        assert all(len(line.rstrip()) <= width for line in text.splitlines())
        # At 80 columns the parameters follow in a table of their own, each row with its trial again.
        apart = [f"key-{i} {each}" for i, each in enumerate(values)]
        together = [f"{left} {right}" for left, right in zip(results, values, strict=True)]
        assert table_rows(text) == (results + apart if width == 80 else together)
        assert "train_" in text
        assert "epochs = 60" in text


def test_table_of_many_parameters_is_continued_below() -> None:
    many_params = [{f"parameter_{i}": 0.123456 * (i + 1) * k for i in range(30)} for k in (1, 2)]
    record = study(trial(0, 0.9, 0.3, params=many_params[0]), trial(1, 0.8, 0.5, params=many_params[1]))
    text = rendered(record, 80)
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    rows = [row.split()[1:] for row in table_rows(text) if row.startswith("key-0")]
    assert len(rows) > 2
    assert [cell for row in rows[1:] for cell in row] == [f"{0.123456 * (i + 1):.3g}" for i in range(30)]


def test_table_shows_text_as_it_is() -> None:
    assert "[red]x" in rendered(study(trial(0, 0.9, 0.3, params={"network": "[red]x"})))


@pytest.mark.parametrize("num_trials", [0, 1, 2, 2000])
@pytest.mark.timeout(15)
def test_report_works_for_any_number_of_trials(tmp_path: Path, num_trials: int) -> None:
    record = many(num_trials)
    write_report(record, tmp_path / "report.html")
    save_front_png(record, tmp_path / "front.png")
    page = Page(tmp_path / "report.html")
    assert page.text.count("key-") == len(front_trials(record)) + num_trials
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert rendered(record)


def test_report_loads_nothing_and_has_plotly_once(tmp_path: Path) -> None:
    write_report(SMALL, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.loads == []
    libraries = [script for script in page.scripts if len(script) > 1_000_000]
    assert len(libraries) == 1
    own = "".join(script for script in page.scripts if len(script) <= 1_000_000)
    assert own.count("Plotly.newPlot") == 4
    assert "cdn" not in own
    assert "http:" not in own
    assert "https:" not in own
    assert own.count('"showSendToCloud": false') == 4  # else each figure offers to upload itself
    assert set(page.tags).isdisjoint({"link", "img", "iframe", "object", "embed", "base"})


def test_text_from_the_study_is_text_in_the_page(tmp_path: Path) -> None:
    record = study(
        trial(0, 0.9, 0.3, key=HOSTILE, params={HOSTILE: HOSTILE, "a": 1}, costs={HOSTILE: 1.0}),
        trial(1, 0.8, 0.5, params={HOSTILE: 2.0, "a": 2}),
        unfinished(2, "FAILED", HOSTILE),
        name=HOSTILE,
        dataset=HOSTILE,
        threat=HOSTILE,
        verifier=HOSTILE,
    )
    write_report(record, tmp_path / "hostile.html")
    write_report(SMALL, tmp_path / "usual.html")
    hostile, usual = Page(tmp_path / "hostile.html"), Page(tmp_path / "usual.html")
    assert len(hostile.scripts) == len(usual.scripts)
    assert set(hostile.tags) == set(usual.tags)
    assert HOSTILE in hostile.text
    save_front_png(record, tmp_path / "hostile.png")
    # What plotly shows on hover and along axes is markup of its own, in which links would work.
    for figure in (front_figure(record), parameters_figure(record), costs_figure(record)):
        assert "<b>&amp;[red]" not in json.dumps(figure.to_plotly_json(), default=list)


def test_every_figure_says_what_its_numbers_are(tmp_path: Path) -> None:
    write_report(SMALL, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    captions = [part.split("</figcaption>")[0] for part in html.split("<figcaption>")[1:]]
    assert len(captions) == 4
    for caption in captions:
        assert SETTING in caption


def test_the_front_alone_says_what_its_numbers_are() -> None:
    title = front_figure(SMALL).layout.title
    assert title.text == "digits"
    assert "3 of 4 complete trials on the front, hypervolume 0.1900 to 0.1950 above (0.5, 0)" in title.subtitle.text
    assert setting(study_front(SMALL)) == SETTING
    assert SETTING in title.subtitle.text.replace("<br>", " ")
    assert untitled_front(study_front(SMALL)).layout.title.text is None


def test_failed_trials_are_listed_with_their_reason(tmp_path: Path) -> None:
    record = study(trial(0, 0.9, 0.3), unfinished(1, "FAILED", "NonFiniteLossError(step=3)"))
    write_report(record, tmp_path / "report.html")
    assert "NonFiniteLossError(step=3)" in Page(tmp_path / "report.html").text


def test_front_figure_has_staircase_intervals_and_reference() -> None:
    parts = traces(front_figure(SMALL))
    assert list(parts["front"].x) == [0.6, 0.8, 0.9]
    assert list(parts["front"].y) == [0.6, 0.5, 0.3]
    assert parts["front"].line.shape == "vh"
    assert list(parts["front"].error_y.array) == pytest.approx([0.05, 0, 0])
    assert list(parts["front"].error_y.arrayminus) == [0, 0, 0]
    assert (list(parts["other trials"].x), list(parts["other trials"].y)) == ([0.7], [0.5])
    assert (list(parts["reference"].x), list(parts["reference"].y)) == ([0.5], [0.0])


def test_shaded_area_is_the_hypervolume() -> None:
    area = traces(front_figure(SMALL))["hypervolume"]
    corners = list(zip(area.x, area.y, strict=True))
    steps = zip(corners, corners[1:] + corners[:1], strict=True)
    shoelace = abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in steps)) / 2
    assert shoelace == pytest.approx(study_hypervolume(SMALL), rel=1e-12)


def test_a_reference_far_away_does_not_crowd_the_trials() -> None:
    record = study(trial(0, 0.90, 0.80), trial(1, 0.95, 0.75), reference=(0.0, 0.0))
    figure = front_figure(record)
    low, high = figure.layout.xaxis.range
    assert low > 0.8
    assert high > 0.95
    assert "reference (0, 0) lies outside this view" in [note.text for note in figure.layout.annotations]


def test_hypervolume_over_time_is_in_the_order_of_finishing() -> None:
    late, early = trial(0, 0.9, 0.3, finished_at=1120.0), trial(1, 0.8, 0.5, finished_at=1030.0)
    untimed = trial(2, 0.6, 0.6, finished_at=None)
    (line,) = hypervolume_figure(study_front(study(late, early, untimed))).data
    assert list(line.x) == [0.0, 30.0, 120.0]
    assert list(line.y) == pytest.approx([0.0, 0.15, 0.18])  # 0.3 x 0.5, then 0.4 x 0.3 + 0.3 x 0.2
    assert line.line.shape == "hv"


def test_parameters_are_drawn_by_their_kind() -> None:
    params: list[dict[str, Any]] = [
        {"alpha": 0.001, "beta": 1.0, "network": "cnn3", "fixed": 1, "distillation": True},
        {"alpha": 1.0, "beta": 3.0, "network": "cnn7", "fixed": 1, "distillation": True},
        {"alpha": 0.1, "network": "cnn5", "fixed": 1, "distillation": False},
    ]
    record = study(*(trial(i, 0.9, 0.3 + i / 10, params=each) for i, each in enumerate(params)))
    assert varied_parameters(record.trials) == ["alpha", "beta", "network", "distillation"]
    assert shared_parameters(record.trials) == {"fixed": 1}
    (lines,) = parameters_figure(record).data
    axes = {axis.label: axis for axis in lines.dimensions}
    assert list(axes) == [
        "alpha (log)", "beta", "network", "distillation", "standard accuracy", "certified accuracy",
    ]  # fmt: skip
    assert list(axes["alpha (log)"]["values"]) == pytest.approx([-3, 0, -1])
    assert axes["beta"].ticktext[0] == "not set"
    assert axes["beta"]["values"][2] == axes["beta"].tickvals[0] < 1.0
    assert list(axes["network"].ticktext) == ["cnn3", "cnn5", "cnn7"]
    assert list(axes["network"]["values"]) == [0, 2, 1]
    assert list(axes["distillation"].ticktext) == ["False", "True"]
    assert list(lines.line.color) == pytest.approx([0.3, 0.4, 0.5])
    for axis in lines.dimensions:
        assert all(axis.range[0] <= value <= axis.range[1] for value in axis["values"])


def test_accuracies_are_never_on_logarithmic_axes() -> None:
    (lines,) = parameters_figure(study(trial(0, 0.9, 0.01), trial(1, 0.8, 0.5))).data
    assert [axis.label for axis in lines.dimensions] == ["standard accuracy", "certified accuracy"]


@pytest.mark.parametrize(
    ("low", "high", "logarithmic"), [(0.01, 0.2, False), (0.01, 0.21, True), (0.0, 1.0, False), (-5.0, 500.0, False)]
)
def test_logarithmic_axes_start_above_a_factor_of_twenty(low: float, high: float, logarithmic: bool) -> None:
    record = study(trial(0, 0.9, 0.3, params={"rate": low}), trial(1, 0.8, 0.5, params={"rate": high}))
    (lines,) = parameters_figure(record).data
    assert lines.dimensions[0].label == ("rate (log)" if logarithmic else "rate")


def test_costs_are_stacked_and_failed_trials_count() -> None:
    failed = dataclasses.replace(unfinished(1, "FAILED"), costs={"student": 5.0, "upload": 1.0})
    figure = costs_figure(study(trial(0, 0.9, 0.3), failed))
    bars = traces(figure)
    assert figure.layout.barmode == "stack"
    assert {name: list(bar.y) for name, bar in bars.items()} == {
        "teacher": [10.0, 0.0],
        "student": [40.0, 5.0],
        "verification": [10.0, 0.0],
        "upload": [0.0, 1.0],
    }


@pytest.mark.parametrize(
    "field", ["standard_accuracy", "certified_accuracy", "certified_upper", "adversarial_accuracy", "seconds"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_result_that_is_not_finite_is_refused_by_name(tmp_path: Path, field: str, value: float) -> None:
    broken = study(trial(0, 0.9, 0.3), trial(1, 0.8, 0.5, **{field: value}))
    for use in (front_table, front_json, front_figure, study_front, parameters_figure, study_hypervolume):
        with pytest.raises(ValueError, match=f"trial key-1 has {field} = "):
            use(broken)
    for write in (write_report, save_front_png):
        with pytest.raises(ValueError, match=f"trial key-1 has {field} = "):
            write(broken, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [write_report, save_front_png])
def test_a_file_is_replaced_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    path = tmp_path / "new" / "out"
    write(SMALL, path)
    first = path.read_bytes()
    write(SMALL, path)
    assert path.read_bytes() == first  # the same record gives the same bytes
    assert [each.name for each in path.parent.iterdir()] == ["out"]

    def refuse(source: Any, target: Any) -> None:
        assert Path(source).parent == path.parent  # a move between file systems would not be atomic
        assert Path(source).stat().st_size > 0
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk gone"):
        write(study(), path)
    assert path.read_bytes() == first
    assert [each.name for each in path.parent.iterdir()] == ["out"]
