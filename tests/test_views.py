"""What MLflow's pages are given: saved views, links, colours. tests/test_ui.py looks at the pages themselves."""

import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from search.storage import Storage
from search.tracked.bookkeeping import where_to_look
from tracking.mlflow_tracker import MlflowTracker, local_store
from tracking.tracker import StudyInfo
from tracking.ui import chosen, stored_pages, welcome
from tracking.ui import main as ui_main
from tracking.view_state import all_trials, decoded, encoded, front_members, fronts_side_by_side
from tracking.views import StudyPage

# The first test that touches MLflow pays for its import and the creation of a database.
pytestmark = pytest.mark.timeout(60)

STUDY = StudyInfo("a_study.of-1", "digits-linf", parameters=("alpha", "ramp", "beta"), conditional=("beta",))
VIEW = "mlflow.sharedViewState."
NOTE = "mlflow.note.content"


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creating the tables takes a second, copying them nothing."""
    storage = tmp_path_factory.mktemp("empty")
    MlflowTracker(*local_store(storage))
    return storage / "mlflow" / "mlflow.db"


@pytest.fixture
def storage(tmp_path: Path, empty_database: Path) -> Path:
    (tmp_path / "mlflow").mkdir()
    shutil.copy(empty_database, tmp_path / "mlflow" / "mlflow.db")
    return tmp_path


@pytest.fixture
def tracker(storage: Path) -> MlflowTracker:
    return MlflowTracker(*local_store(storage))


@pytest.fixture
def client(storage: Path) -> MlflowClient:
    return MlflowClient(local_store(storage)[0])


def tags(client: MlflowClient, experiment: str = STUDY.experiment) -> dict[str, str]:
    return dict(client.get_experiment_by_name(experiment).tags)


def views(client: MlflowClient) -> dict[str, dict[str, Any]]:
    """State of each saved view by its name in the menu."""
    return dict(decoded(text) for name, text in tags(client).items() if name.startswith(VIEW))


def found(client: MlflowClient, view: str) -> set[str]:
    """The names of the runs that a saved view asks the server for."""
    return {run.info.run_name for run in client.search_runs(["1"], views(client)[view]["searchFilter"])}


def runs(client: MlflowClient) -> dict[str, Run]:
    return {run.info.run_name: run for run in client.search_runs(["1"])}


def front(client: MlflowClient) -> dict[str, str]:
    """cert.on_front of the trials that have it."""
    return {
        name: run.data.tags["cert.on_front"] for name, run in runs(client).items() if "cert.on_front" in run.data.tags
    }


def color(client: MlflowClient, run: str) -> str:
    return runs(client)[run].data.tags["mlflow.runColor"]


class Counting:
    """A client that counts its calls, and refuses some."""

    def __init__(self, client: MlflowClient, refused: str = "") -> None:
        self._client, self._refused = client, refused
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        if name == self._refused:
            raise PermissionError("not for you:\n no view here")
        return getattr(self._client, name)


# --- what a view holds ---


@pytest.mark.parametrize("state", [all_trials(STUDY), front_members(STUDY), fronts_side_by_side("test")])
def test_the_front_is_the_first_chart_and_every_chart_has_a_section(state: dict[str, Any]) -> None:
    charts, sections = state["compareRunCharts"], state["compareRunSections"]
    first = charts[0]
    assert (first["type"], first["xaxis"]["key"], first["yaxis"]["key"]) == (
        "SCATTER",
        "standard_accuracy",
        "certified_accuracy",
    )
    assert first["metricSectionId"] == sections[0]["uuid"]
    for things in (charts, sections):
        assert len({each["uuid"] for each in things}) == len(things)
    assert {chart["metricSectionId"] for chart in charts} == {each["uuid"] for each in sections if each["display"]}
    assert all("charts" not in section for section in sections)


def test_a_parameter_that_some_trials_lack_hides_no_trial() -> None:
    parallel = [chart for chart in all_trials(STUDY)["compareRunCharts"] if chart["type"] == "PARALLEL"]
    assert [chart["selectedParams"] for chart in parallel] == [["alpha", "ramp"], ["alpha", "ramp", "beta"]]
    (contour, _) = [chart for chart in all_trials(STUDY)["compareRunCharts"] if chart["type"] == "CONTOUR"]
    assert (contour["xaxis"]["key"], contour["yaxis"]["key"]) == ("alpha", "ramp")


@pytest.mark.parametrize("parameters", [(), ("alpha",)])
def test_a_study_with_hardly_a_parameter(parameters: tuple[str, ...]) -> None:
    kinds = [chart["type"] for chart in all_trials(StudyInfo("s", "e", parameters=parameters))["compareRunCharts"]]
    assert kinds == ["SCATTER", *["PARALLEL"] * len(parameters), "LINE", "LINE", "LINE"]


def test_a_view_of_many_parameters_fits_into_a_tag() -> None:
    names = tuple(f"student/epsilon_schedule/parameter_{number**7 % 10**9}" for number in range(100))
    state = all_trials(StudyInfo("s" * 100, "e", parameters=names, conditional=names[50:]))
    text = encoded("s" * 100, state, 0)
    assert len(text) < 20_000
    assert decoded(text) == ("s" * 100, state)


# --- a study in a store ---


@pytest.mark.parametrize("name", ["a_study.of-1", "2.trials-front", "étude (2)"])
def test_views_find_the_trials_they_are_about(tracker: MlflowTracker, client: MlflowClient, name: str) -> None:
    for study in (StudyInfo(name, "digits-linf"), StudyInfo("other", "digits-linf", split="test")):
        tracker.open_study(study)
        for number in range(3):
            tracker.start_trial(f"{study.name}-{number}", {}, {})
        tracker.mark_front([f"{study.name}-1"])
    assert found(client, f"{name}: all trials") == {f"{name}-{number}" for number in range(3)}
    assert found(client, f"{name}: front") == {f"{name}-1"}
    assert found(client, "all fronts (validation images)") == {f"{name}-1"}
    assert found(client, "all fronts (test images)") == {"other-1"}


def test_links_lead_to_views_that_exist(tracker: MlflowTracker, client: MlflowClient) -> None:
    for name in ("étude (2)", "étude [2]"):  # nothing of them that an address may not hold, and yet two views
        tracker.open_study(StudyInfo(name, STUDY.experiment, description="A search."))
    first, *_ = tags(client)[NOTE].splitlines()
    description = runs(client)["étude (2)"].data.tags[NOTE]
    assert description.endswith("\n\nA search.")
    links = re.findall(r"\]\((#[^)]+)\)", first + description.splitlines()[0])
    assert len(set(links)) == 4  # both studies, all fronts; members of the one
    for link in [*links, str(tracker.front_url()).split("/", 3)[-1]]:
        page, key = link.split("&viewStateShareKey=")
        assert page == "#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART"
        assert re.fullmatch(r"[\w.-]+", key, re.ASCII)
        assert VIEW + key in tags(client)
    assert len(views(client)) == 5


def test_what_people_write_into_the_note_stays(tracker: MlflowTracker, client: MlflowClient) -> None:
    experiment = client.create_experiment(STUDY.experiment)
    client.set_experiment_tag(experiment, NOTE, "Ours.\n\nMore of it.")
    tracker.open_study(STUDY)
    tracker.open_study(StudyInfo("second", STUDY.experiment))
    first, *others = tags(client)[NOTE].splitlines()
    assert others == ["", "Ours.", "", "More of it."]
    assert first.startswith("**Fronts:** [second](#/")
    assert f"[{STUDY.name}](#/" in first


def test_opening_it_again_writes_nothing(tracker: MlflowTracker, client: MlflowClient) -> None:
    tracker.open_study(STUDY)
    before = tags(client)
    tracker._client = counting = Counting(tracker._client)
    tracker.open_study(STUDY)
    assert tags(client) == before
    assert "set_experiment_tag" not in counting.calls


def test_a_server_that_refuses_a_view_stops_nothing(
    tracker: MlflowTracker, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    tracker._client = Counting(tracker._client, refused="set_experiment_tag")
    with caplog.at_level(logging.WARNING):
        tracker.open_study(STUDY)
        tracker.start_trial("t1", {"alpha": 0.5}, {})
        tracker.mark_front(["t1"])
    (warning,) = caplog.messages
    assert "no saved views of study a_study.of-1 (PermissionError: not for you: no view here)" in warning
    assert front(client) == {"t1": "true"}


def test_a_comparison_has_no_views_and_its_own_page(tracker: MlflowTracker, client: MlflowClient) -> None:
    tracker.open_study(StudyInfo("both", STUDY.experiment, description="Two studies.", kind="comparison"))
    assert views(client) == {}
    run = runs(client)["both"]
    assert run.data.tags[NOTE] == "Two studies."
    assert str(tracker.front_url()).endswith(f"/#/experiments/1/runs/{run.info.run_id}?workflowType=machine_learning")


# --- the front moves ---


def test_the_front_moves_and_its_colours_with_it(tracker: MlflowTracker, client: MlflowClient) -> None:
    tracker.open_study(STUDY)
    for key in ("t1", "t2", "t3"):
        tracker.start_trial(key, {}, {})
    grey = color(client, "t1")
    tracker.mark_front(["t1", "t2"])
    tracker.mark_front(["t2", "t3"])
    assert front(client) == {"t1": "false", "t2": "true", "t3": "true"}
    own = color(client, STUDY.name)
    assert [color(client, key) for key in ("t1", "t2", "t3")] == [grey, own, own]
    assert own != grey


def test_a_front_that_stays_costs_one_request_and_leaves_peoples_colours(
    tracker: MlflowTracker, client: MlflowClient
) -> None:
    tracker.open_study(STUDY)
    for key in ("t1", "t2"):
        tracker.start_trial(key, {}, {})
    tracker.mark_front(["t1"])
    client.set_tag(runs(client)["t1"].info.run_id, "mlflow.runColor", "#123456")
    tracker._client = counting = Counting(tracker._client)
    tracker.mark_front(["t1"])
    assert counting.calls == ["search_runs"]
    tracker.mark_front(["t1", "t2"])
    assert counting.calls[1:] == ["search_runs", "search_runs", "log_batch"]
    assert color(client, "t1") == "#123456"


def test_an_empty_front_and_another_studys(tracker: MlflowTracker, client: MlflowClient) -> None:
    for name in ("one", "two"):
        tracker.open_study(StudyInfo(name, STUDY.experiment))
        tracker.start_trial(f"{name}-t", {}, {})
        tracker.mark_front([f"{name}-t"])
    tracker.mark_front([])
    assert front(client) == {"one-t": "true", "two-t": "false"}


def test_studies_of_an_experiment_have_colours_of_their_own(tracker: MlflowTracker, client: MlflowClient) -> None:
    names = [f"study-{number}" for number in range(9)]
    for name in names:
        tracker.open_study(StudyInfo(name, STUDY.experiment))
    assert len({color(client, name) for name in names[:7]}) == 7
    before = [color(client, name) for name in names]
    tracker.open_study(StudyInfo(names[3], STUDY.experiment))
    assert [color(client, name) for name in names] == before


# --- links on the command line ---


def page(name: str, changed_ms: int, kind: str = "study", experiment: str = "digits") -> StudyPage:
    return StudyPage(name, kind, experiment, changed_ms, f"#/{name}")


def test_the_pages_of_a_store_with_several_experiments(
    storage: Path, tracker: MlflowTracker, client: MlflowClient
) -> None:
    assert stored_pages(storage) == []
    for name, experiment, ended_ms in (("one", "digits", 3000), ("two", "mnist", 9000), ("three", "digits", 6000)):
        tracker.open_study(StudyInfo(name, experiment))
        tracker.close_study("FINISHED", time_ms=ended_ms)
    client.delete_experiment_tag("2", f"{VIEW}trials-two")  # as an earlier version of this program left it
    two, three, one = stored_pages(storage)
    assert [(each.name, each.experiment, each.changed_ms) for each in (two, three, one)] == [
        ("two", "mnist", 9000),
        ("three", "digits", 6000),
        ("one", "digits", 3000),
    ]
    assert re.fullmatch(r"#/experiments/2/runs/\w+\?workflowType=machine_learning", two.page)
    assert one.page.endswith(
        "/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=trials-one"
    )


def test_which_page_is_opened() -> None:
    pages = [page("both", 9, "comparison"), page("new", 8), page("old", 7)]
    assert [each.name for each in chosen(pages, None)] == ["new", "both", "old"]
    assert [each.name for each in chosen(pages, "both")] == ["both", "new", "old"]
    assert chosen(pages[:1], None) == pages[:1]
    with pytest.raises(ValueError, match="no study 'ol': give --study one of both, new, old"):
        chosen(pages, "ol")


def test_what_the_ui_prints() -> None:
    pages = [page("new", 8), page("both", 9, "comparison")]
    assert welcome(pages, "http://h:1") == (
        "open http://h:1/#/new (in about 20 s; Ctrl-C ends it)\n  both (comparison, digits)  http://h:1/#/both"
    )
    assert welcome([], "http://h:1").startswith("open http://h:1/#/experiments?workflowType=machine_learning (")


def test_an_unknown_study_is_refused_before_anything_starts(
    storage: Path, tracker: MlflowTracker, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker.open_study(STUDY)
    assert ui_main(["--storage", str(storage), "--study", "other", "--port", "0"]) == 2
    assert capsys.readouterr().err == f"there is no study 'other': give --study one of {STUDY.name}\n"


def test_where_a_search_says_to_look(storage: Path, tracker: MlflowTracker) -> None:
    tracker.open_study(STUDY)
    view = "workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=trials-a_study.of-1"
    link = f"/#/experiments/1/runs?{view}"
    local = Storage(storage, "sqlite://", storage, None)
    assert where_to_look(tracker, local) == (
        f"MLflow: python -m tracking.ui --storage {storage}\n  shows http://127.0.0.1:5000{link}"
    )
    remote = Storage(storage, "sqlite://", storage, "http://me:secret@server:5000")
    there = SimpleNamespace(front_url=lambda: f"http://server:5000{link}")
    assert where_to_look(there, remote) == f"MLflow: http://server:5000{link}"  # type: ignore[arg-type]


def test_a_view_is_json_as_the_pages_read_it() -> None:
    view = json.loads(encoded("name", {"searchFilter": ""}, 1700000000000))
    assert view.keys() == {"name", "createdAt", "updatedAt", "state"}
    assert view["state"].startswith("deflate;")
