"""Comparing stored studies: what is refused, which are runs of one method, and numbers against slow calculations."""

import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import plotly.graph_objects as go
import pytest
from studies import config_of, open_study, result, write_space

from search import compare as command
from search.comparing.comparability import ComparisonError
from search.comparing.comparison import Comparison, compare
from search.comparing.comparison_figures import fronts_figure, hours_figure, styles
from search.comparing.comparison_text import comparison_json, notes, setting
from search.config import find_space_file, load_search_config
from search.storage import default_study_url
from search.studies.study_record import StoredStudy, load_stored

ROOT = Path(__file__).parent.parent
DOCS = (ROOT / "docs" / "COMPARE.md").read_text()
REFERENCE = (0.2, 0.1)  # of the space that the tests share

pytestmark = pytest.mark.timeout(30)  # the studies are made for the first test

# Each trial: (standard, certified, seconds), or what else became of it.
STOPPED, FAILED = ("stopped", 30.0), ("failed",)
Outcome = tuple[Any, ...]
DIGITS: dict[int, list[Outcome]] = {
    0: [(0.9, 0.3, 60), (0.7, 0.5, 120), STOPPED, (0.8, 0.45, 60)],
    1: [(0.85, 0.4, 90), FAILED, (0.6, 0.6, 30), (0.5, 0.5, 60)],
    2: [(0.95, 0.2, 30), (0.7, 0.55, 30), (0.9, 0.25, 60), STOPPED],
}
RANDOM: dict[int, list[Outcome]] = {
    0: [(0.8, 0.3, 120), (0.6, 0.4, 120)],
    1: [(0.75, 0.35, 60), STOPPED, (0.7, 0.3, 120)],
}


def make(folder: Path, outcomes: list[Outcome], scratch: Path, upper: float = 0.0, **changes: Any) -> str:
    """A stored study whose trials end in the reverse of their order; its name."""
    folder.mkdir(exist_ok=True)
    config = config_of(scratch, **changes)
    study = open_study(config, folder / "study.db")
    asked = [study.ask() for _ in outcomes]
    for assignment, outcome in reversed(list(zip(asked, outcomes, strict=True))):
        if outcome[0] == "stopped":
            study.tell_stopped(assignment.number, "dominated", outcome[1])
        elif outcome[0] == "failed":
            study.tell_failed(assignment.number, "out of memory")
        else:
            standard, certified, seconds = outcome
            told = result(standard, certified, seconds=float(seconds), certified_upper=min(standard, certified + upper))
            study.tell(assignment.number, told)
    return config.study_name


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of one method and two of another, as docs/COMPARE.md names them."""
    folder, scratch = tmp_path_factory.mktemp("compared") / "runs", tmp_path_factory.mktemp("spaces")
    for seed, outcomes in DIGITS.items():
        make(folder, outcomes, scratch, name="digits", search__seed=seed)
    for seed, outcomes in RANDOM.items():
        make(folder, outcomes, scratch, name="digits-random", search__seed=seed, student__l1=0.0, upper=0.02)
    return folder


@pytest.fixture(scope="module")
def stored(storage: Path) -> dict[str, StoredStudy]:
    names = ("digits", "digits-seed1", "digits-seed2", "digits-random", "digits-random-seed1")
    return {name: load_stored(default_study_url(storage), name) for name in names}


@pytest.fixture(scope="module")
def compared(stored: dict[str, StoredStudy]) -> Comparison:
    return compare(stored)


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = command.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def points_of(outcomes: list[Outcome]) -> list[tuple[float, float]]:
    return [(each[0], each[1]) for each in outcomes if len(each) == 3]


def area(points: list[tuple[float, float]]) -> float:
    return float(moocore.hypervolume(np.array(points).reshape(-1, 2), ref=REFERENCE, maximise=True)) if points else 0.0


def hours_and_areas(outcomes: list[Outcome]) -> tuple[list[float], list[float]]:
    """After each trial in the order in which they ended, which is that of `make`: a trial holds one core."""
    spent, points, hours, areas = 0.0, [], [], []
    for outcome in reversed(outcomes):
        spent += outcome[2] if len(outcome) == 3 else outcome[1] if outcome[0] == "stopped" else 0.0
        points += points_of([outcome])
        hours.append(spent / 3600)
        areas.append(area(points))
    return hours, areas


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_studies_that_differ_in_their_seed_only_are_runs_of_one_method(compared: Comparison) -> None:
    digits, chance = compared.methods
    assert [study.title for study in digits.studies] == ["digits", "digits-seed1", "digits-seed2"]
    assert [study.seed for study in chance.studies] == [0, 1]
    assert (digits.label, chance.label) == ("digits", "digits-random")


def test_final_hypervolumes_and_hours_are_those_of_a_slow_calculation(compared: Comparison) -> None:
    for method, runs in zip(compared.methods, (DIGITS, RANDOM), strict=True):
        areas = [area(points_of(outcomes)) for outcomes in runs.values()]
        assert [low for low, _ in method.hypervolumes] == pytest.approx(areas)
        assert method.hypervolume == pytest.approx(np.mean(areas))
        assert method.hours == pytest.approx(np.mean([hours_and_areas(outcomes)[0][-1] for outcomes in runs.values()]))
    chance = compared.methods[1]
    upper = [area([(x, y + 0.02) for x, y in points_of(outcomes)]) for outcomes in RANDOM.values()]
    assert [high for _, high in chance.hypervolumes] == pytest.approx(upper)


def test_hypervolume_follows_what_ended_in_the_order_in_which_it_ended(compared: Comparison) -> None:
    for method, runs in zip(compared.methods, (DIGITS, RANDOM), strict=True):
        for study, outcomes in zip(method.studies, runs.values(), strict=True):
            hours, areas = hours_and_areas(outcomes)
            assert study.course.spent == pytest.approx(hours)
            assert study.course.values == pytest.approx(areas)


def test_the_accelerators_that_a_trial_holds_count(stored: dict[str, StoredStudy]) -> None:
    one, other = stored["digits"], stored["digits-random"]
    held = one.config.resources.model_copy(update={"gpu": 0.25})
    packed = one._replace(config=one.config.model_copy(update={"resources": held}))
    both = compare({"packed": packed, "other": other})
    assert both.methods[0].hours == pytest.approx(0.25 * compare({"one": one, "other": other}).methods[0].hours)
    assert any("0.25 GPUs in packed, 1 cores in other" in note for note in notes(both))


def test_equal_costs_and_hours_to_reach(compared: Comparison) -> None:
    digits, chance = compared.methods
    totals = [hours_and_areas(outcomes)[0][-1] for runs in (DIGITS, RANDOM) for outcomes in runs.values()]
    common = min(totals)
    assert compared.common_hours == pytest.approx(common) == 150 / 3600

    def mean_at(runs: dict[int, list[Outcome]], spent: float) -> float:
        values = []
        for outcomes in runs.values():
            hours, areas = hours_and_areas(outcomes)
            values.append(max([0.0, *(a for h, a in zip(hours, areas, strict=True) if h <= spent + 1e-12)]))
        return float(np.mean(values))

    assert compared.at_common_hours(digits) == pytest.approx(mean_at(DIGITS, common))
    assert compared.at_common_hours(chance) == pytest.approx(mean_at(RANDOM, common))
    target = float(np.mean([area(points_of(outcomes)) for outcomes in RANDOM.values()]))
    moments = sorted({h for outcomes in DIGITS.values() for h in hours_and_areas(outcomes)[0]})
    expected = next(moment for moment in moments if mean_at(DIGITS, moment) >= target)
    assert compared.hours_to_reach(digits, chance) == pytest.approx(expected)
    assert compared.hours_to_reach(chance, digits) is None


def test_bands_are_what_runs_attained(compared: Comparison) -> None:
    digits = compared.methods[0]
    for standard in np.arange(0.3, 1.0, 0.025):
        best = sorted(
            max([y for x, y in points_of(each) if x >= standard], default=-math.inf) for each in DIGITS.values()
        )
        assert [digits.attained.at([standard], k)[0] for k in (3, 2, 1)] == best


def test_the_order_of_studies_changes_no_number_and_not_the_name(stored: dict[str, StoredStudy]) -> None:
    def numbers(comparison: Comparison) -> Any:
        found = comparison_json(comparison)
        return sorted(json.dumps(method, sort_keys=True) for method in found["methods"]), found["name"]

    assert numbers(compare(dict(reversed(stored.items())))) == numbers(compare(stored))
    assert compare(stored).name == ("digits-vs-digits-random-vs-digits-random-seed1-vs-digits-seed1-vs-digits-seed2")


def test_names_of_comparisons_tell_them_apart_and_stay_short(stored: dict[str, StoredStudy]) -> None:
    one, other = stored["digits"], stored["digits-seed1"]
    named_alike = {"a": one, "b": one._replace(identifier="another")}
    assert re.fullmatch(r"digits-vs-digits-[0-9a-f]{8}", compare(named_alike).name)
    assert compare(named_alike).name != compare({"a": one, "b": one._replace(identifier="a third")}).name
    long = {f"{n}": other._replace(identifier=f"{n}") for n in range(30)}
    assert len(compare(long).name) == 100


# ---- what is refused -----------------------------------------------------------------------------------------------


def with_data(stored: StoredStudy, **changes: Any) -> StoredStudy:
    data = stored.config.data.model_copy(update=changes)
    return stored._replace(config=stored.config.model_copy(update={"data": data}))


def with_record(stored: StoredStudy, **changes: Any) -> StoredStudy:
    return stored._replace(record=replace(stored.record, **changes))


REFUSED = {
    "data sets": (lambda s: with_record(s, dataset="mnist"), "digits and mnist", "one data set"),
    "threats": (lambda s: with_record(s, threat="linf 8/255"), "linf 1/10 and linf 8/255", "one norm and epsilon"),
    "numbers of images": (lambda s: with_record(s, num_images=50), "100 and 50", "the same images"),
    "choices of images": (lambda s: with_data(s, split_seed=3), "split_seed: 0", "one choice in `data`"),
    "splits": (lambda s: with_record(s, split="test"), "validation and test", "results on test images"),
    "data fingerprints": (
        lambda s: s._replace(data_fingerprint="fedcba"), "0123456789abcdef and fedcba", "augmentation"
    ),
    "hypervolume references": (
        lambda s: with_record(s, reference=(0.2000001, 0.1)), "(0.2, 0.1) and (0.2000001, 0.1)", "one search.reference"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_means_something_else_is_refused(what: str, stored: dict[str, StoredStudy]) -> None:
    change, values, advice = REFUSED[what]
    studies = {name: stored[name] for name in ("digits", "digits-seed1", "digits-random")}
    compare(studies)  # as they are, they may be compared
    with pytest.raises(ComparisonError) as caught:
        compare(studies | {"digits-random": change(stored["digits-random"])})
    text = str(caught.value)
    assert text.startswith(f"digits and digits-random cannot be compared: their {what} differ (")
    assert values in text
    assert advice in text
    assert "\n" not in text


def test_nothing_to_compare_is_refused(stored: dict[str, StoredStudy]) -> None:
    digits, other = stored["digits"], stored["digits-seed1"]
    with pytest.raises(ComparisonError, match=r"nothing to be compared with; name two or more"):
        compare({"digits": digits})
    with pytest.raises(ComparisonError, match="a and b are one study; name each once"):
        compare({"a": digits, "b": digits})
    unfinished = with_record(other, trials=tuple(each for each in other.record.trials if each.state == "FAILED"))
    with pytest.raises(ComparisonError, match="study b has no complete trial to compare yet; go on with its search"):
        compare({"a": digits, "b": unfinished})


def test_another_verifier_is_a_note(stored: dict[str, StoredStudy]) -> None:
    digits, other = stored["digits"], stored["digits-random"]
    options = other.config.verification
    limit = options.branch_and_bound.model_copy(update={"timeout_s": 5.0})
    options = options.model_copy(update={"branch_and_bound": limit, "rungs": (*options.rungs, "branch_and_bound")})
    slower = with_record(other, verifier="PGD, branch and bound (5 s an image)")
    slower = slower._replace(config=other.config.model_copy(update={"verification": options}))
    both = compare({"a": digits, "b": slower})
    (note,) = [note for note in notes(both) if note.startswith("Verification differs")]
    assert "branch_and_bound.timeout_s is 20.0 in a, 5.0 in b" in note
    assert "no time limit" in setting(both)
    assert "no time limit or PGD, branch and bound (5 s an image);" in setting(both)
    assert not any("Verification differs" in note for note in notes(compare({"a": digits, "b": other})))


def test_notes_say_what_to_mind(compared: Comparison, stored: dict[str, StoredStudy]) -> None:
    text = "\n".join(notes(compared))
    assert "digits-random has two studies: its line is the better of both at each place." in text
    assert "Runs of digits have different numbers of finished trials: 4 in digits, 3 in digits-seed1" in text
    assert "Failed trials count their cost up to their last rung only: 1 in digits-seed1." in text
    assert "Undecided images leave certified accuracies as intervals" in text
    twice = compare({"a": stored["digits"], "b": stored["digits"]._replace(identifier="copied")})
    assert "2 studies of digits have the seed 0: they are not independent." in notes(twice)
    alone = compare({"a": stored["digits"], "b": stored["digits-random"]})
    assert sum("is one study (n = 1)" in note for note in notes(alone)) == 2


# ---- methods and labels --------------------------------------------------------------------------------------------


def test_methods_of_one_name_are_told_apart(stored: dict[str, StoredStudy]) -> None:
    """The sampler is no part of a study's identity, and yet two samplers are no runs of one method."""
    digits = stored["digits"]
    search = digits.config.search.model_copy(update={"sampler": {"kind": "tpe", "startup_trials": 5}})
    config = digits.config.model_copy(update={"search": search})
    with pytest.warns(UserWarning, match="serialized value"):  # a mapping stands in for the sampler's model
        other = compare({"a": digits, "b": digits._replace(config=config, identifier="b")})
    assert [method.num_runs for method in other.methods] == [1, 1]
    assert [method.label for method in other.methods] == [
        "digits (sampler.kind = random, sampler.startup_trials = None)",
        "digits (sampler.kind = tpe, sampler.startup_trials = 5)",
    ]
    assert [method.slug for method in other.methods] == ["digits", "digits-2"]


def test_labels(stored: dict[str, StoredStudy]) -> None:
    def labels(chosen: dict[str, str]) -> list[str]:
        return [method.label for method in compare(stored, chosen).methods]

    assert labels({"digits": "GP"}) == ["GP", "digits-random"]
    assert labels({"digits-random-seed1": "chance", "digits-seed2": "GP"}) == ["GP", "chance"]
    with pytest.raises(
        ComparisonError, match="--label dgits=x: dgits names no method; use one of digits, digits-seed1"
    ):
        labels({"dgits": "x"})
    with pytest.raises(ComparisonError, match="2 methods have the label x; give each its own"):
        labels({"digits": "x", "digits-random": "x"})


# ---- page and figures ----------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would load and show."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._skipped = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in {"src", "href", "srcset", "data"}]
        self._skipped = tag if tag in ("script", "style") else self._skipped
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._skipped = "" if tag == self._skipped else self._skipped

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.text += data
            if self.rows and self.rows[-1]:
                self.rows[-1][-1] += data


def traces(figure: go.Figure) -> dict[str, Any]:
    return {trace.name: trace for trace in figure.data}


@pytest.fixture(scope="module")
def written(storage: Path) -> Path:
    """The folder of a comparison that the command wrote."""
    names = ["digits", "digits-seed1", "digits-seed2", "digits-random", "digits-random-seed1"]
    out = storage.parent / "written" / "page.html"
    assert command.main([*names, "--storage", str(storage), "--no-mlflow", "--out", str(out)]) == 0
    return out.parent


def test_the_page_needs_no_network_and_has_the_numbers(written: Path, compared: Comparison) -> None:
    page = Page(written / "page.html")
    assert page.loads == []
    areas = {"digits": [area(points_of(o)) for o in DIGITS.values()], "digits-random": [
        area(points_of(o)) for o in RANDOM.values()
    ]}  # fmt: skip
    rows = {row[0]: row for row in page.rows if row[0] in areas and len(row) == 8}
    for label, values in areas.items():
        assert rows[label][3] == f"{np.mean(values):.4f}"
        assert rows[label][5] == f"{min(values):.4f}\u2013{max(values):.4f}"
    text = " ".join(page.text.split())
    for said in ("100 validation images of digits", "threat: linf 1/10", "no time limit", "above (0.2, 0.1)",
                 "digits n = 3, digits-random n = 2", "13 complete trials of 5 studies"):  # fmt: skip
        assert text.count(said) >= 5, said  # once for each figure and table, and above all
    assert "attainment band" in text
    assert {each.name for each in written.iterdir()} == {"page.html", "page.json"}


def test_the_numbers_beside_the_page(written: Path, compared: Comparison) -> None:
    found = json.loads((written / "page.json").read_text())
    assert found == json.loads(json.dumps(comparison_json(compared)))
    digits = found["methods"][0]
    assert digits["attainment"]["best"]["corners"] == digits["attainment"]["upper"]["corners"]  # fewer than four runs
    assert digits["studies"][1]["front"] == [[0.85, 0.4, 0.4], [0.6, 0.6, 0.6]]
    assert found["methods"][1]["hours_to_reach"]["digits"] is None


def test_the_same_studies_give_the_same_bytes(written: Path, storage: Path, tmp_path: Path) -> None:
    names = ["digits", "digits-seed1", "digits-seed2", "digits-random", "digits-random-seed1"]
    out = tmp_path / "page.html"
    assert command.main([*names, "--storage", str(storage), "--no-mlflow", "--out", str(out)]) == 0
    assert out.with_suffix(".json").read_bytes() == (written / "page.json").read_bytes()
    assert out.read_bytes() == (written / "page.html").read_bytes()


def test_a_band_encloses_its_median_and_its_area_is_between_the_surfaces(compared: Comparison) -> None:
    drawn = traces(fronts_figure(compared))
    band, median = drawn["digits: from the worst to the best of 3 runs"], drawn["digits: median (n = 3)"]
    assert band.fill == "toself"
    outline = list(zip(band.x, band.y, strict=True))
    turns = zip(outline, outline[1:] + outline[:1], strict=True)
    shoelace = abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in turns)) / 2
    low = (min(band.x), min(band.y))
    attained = compared.methods[0].attained
    best, worst = (float(moocore.hypervolume(attained.corners(k), ref=low, maximise=True)) for k in (1, 3))
    assert shoelace == pytest.approx(best - worst)
    assert list(zip(median.x, median.y, strict=True)) == [tuple(corner) for corner in attained.corners(2)]
    assert median.line.shape == "vh"


def test_a_single_study_is_its_front_with_intervals(stored: dict[str, StoredStudy]) -> None:
    drawn = traces(fronts_figure(compare({"a": stored["digits"], "b": stored["digits-random"]})))
    front = drawn["digits-random: front (n = 1)"]
    assert list(zip(front.x, front.y, strict=True)) == [(0.6, 0.4), (0.8, 0.3)]
    assert list(front.error_y.array) == pytest.approx([0.02, 0.02])
    assert not drawn["digits: front (n = 1)"].error_y.visible


def test_methods_differ_in_more_than_their_colour(compared: Comparison) -> None:
    for figure, suffix in ((fronts_figure(compared), "median"), (hours_figure(compared), "mean")):
        drawn = traces(figure)
        digits, chance = drawn[f"digits: {suffix} (n = 3)"], drawn[f"digits-random: {suffix} (n = 2)"]
        assert digits.line.color != chance.line.color
        assert digits.line.dash != chance.line.dash
        assert digits.marker.symbol != chance.marker.symbol
    assert len(set(styles(compared).values())) == 2


def test_hours_are_drawn_as_steps_up_to_what_all_runs_spent(compared: Comparison) -> None:
    drawn = traces(hours_figure(compared))
    digits = drawn["digits: mean (n = 3)"]
    assert digits.line.shape == "hv"
    assert digits.x[-1] * 60 == pytest.approx(150)  # in minutes; the third run is the shortest
    assert digits.y[-1] == pytest.approx(compared.at_common_hours(compared.methods[0]))
    assert list(digits.y) == sorted(digits.y)


def test_runs_of_one_method_have_nobody_to_reach(
    stored: dict[str, StoredStudy], storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    code, printed, _ = run(capsys, "digits", "digits-seed1", "--storage", storage, "--no-mlflow", "--out", out)
    assert code == 0
    assert "reach" not in printed
    assert "Hours to reach" not in Page(out).text


def test_hostile_labels_are_text(stored: dict[str, StoredStudy], tmp_path: Path, storage: Path) -> None:
    hostile = '</script><script>alert("x")</script><b>[red]'
    out = tmp_path / "page.html"
    options = ["--storage", str(storage), "--no-mlflow", "--out", str(out), "--label", f"digits={hostile}"]
    assert command.main(["digits", "digits-random", *options]) == 0
    assert "<script>alert" not in out.read_text()
    assert hostile in Page(out).text
    for studies in (("digits", "digits-random"), tuple(stored)):  # a front, and bands
        comparison = compare({name: stored[name] for name in studies}, {"digits": hostile})
        for figure in (fronts_figure(comparison), hours_figure(comparison)):
            shown = "".join(f"{trace.name}{trace.hovertemplate}" for trace in figure.data).replace("<extra>", "")
            assert not re.search(r"<(script|b)>", shown)
            assert "&lt;b&gt;" in shown


# ---- the command line ----------------------------------------------------------------------------------------------


def test_wrong_input_is_one_line(
    capsys: pytest.CaptureFixture[str], storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(storage / "study.db", elsewhere / "study.db")
    there = ("--storage", storage)
    for arguments, expected in [
        (("digits", "dgits", *there), "no study 'dgits' in sqlite:///"),
        (("digits", "digits-random"), "there is no study database"),
        (("digits", *there), "one study has nothing to be compared with"),
        (("digits", "digits", *there), "digits is named 2 times; name each study once"),
        (
            ("digits", "digits-random", *there, "--storage", elsewhere),
            f"study digits is in {storage} and in {elsewhere}",
        ),
        ((f"{storage}:digits", f"{elsewhere}:digits"), "are one study; name each once"),
        (("digits", "digits-random", *there, "--label", "digits"), "--label digits: expected NAME=TEXT"),
        (
            ("digits", "digits-random", *there, "--out", "page.json"),
            "--out page.json: expected a file that ends in .html",
        ),
        (("digits", "nowhere.yaml", *there), "no space file nowhere.yaml"),
        (("digits", "digits-random", *there, "--out", "elsewhere/study.db/page.html"), "cannot be written"),
    ]:
        code, out, err = run(capsys, *arguments, "--no-mlflow")
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert expected in err
    assert not (storage / "artifacts").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def documented() -> list[list[str]]:
    """The commands of docs/COMPARE.md, without python -m."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", DOCS, flags=re.DOTALL))
    return [shlex.split(line, comments=True)[2:] for line in text.splitlines() if line]


def test_the_documented_searches_make_the_studies_that_are_compared() -> None:
    made = set()
    for program, space, *flags in documented():
        if program == "search.run":
            settings = [text for flag, text in zip(flags[::2], flags[1::2], strict=True) if flag == "--set"]
            made.add(load_search_config(find_space_file(space), settings).study_name)
    assert made == {"digits", "digits-seed1", "digits-seed2", "digits-random", "digits-random-seed1"}


@pytest.mark.timeout(120)  # MLflow is imported, and makes its tables
def test_the_documented_commands_work_and_mlflow_has_one_run_of_each_comparison(
    capsys: pytest.CaptureFixture[str], storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    from tracking.mlflow_tracker import local_store
    from tracking.replay import main as replay_main

    monkeypatch.chdir(tmp_path)
    shutil.copytree(storage, tmp_path / "runs")
    for name in ("digits", "digits-other"):
        make(tmp_path / "elsewhere", [(0.7, 0.2, 60)], tmp_path, name=name, search__seed=0, upper=0.01)
    (tmp_path / "spaces").mkdir()
    shutil.copy(ROOT / "spaces" / "digits.yaml", tmp_path / "spaces")
    comparisons = [rest for program, *rest in documented() if program == "search.compare"]
    assert len(comparisons) == 6
    for arguments in comparisons:
        code, out, err = run(capsys, *arguments)
        assert code == 0
        # MLflow itself may say something of a new database, but nothing is wrong, and JSON stands alone.
        assert "error" not in err
        told = err if "--json" in arguments else out
        assert (f"MLflow: python -m tracking.ui --storage {tmp_path / 'runs'}\n" in told) == (
            "--no-mlflow" not in arguments
        )
        if "--json" in arguments:
            assert json.loads(out)["name"] == "digits-vs-digits-random"
        assert "hypervolume" in out
    assert Page(tmp_path / "comparison.html").loads == []

    client = MlflowClient(local_store(tmp_path / "runs")[0])
    (experiment,) = [each for each in client.search_experiments() if each.name != "Default"]
    assert experiment.name == "digits-linf-1_10"
    found = {each.data.tags["cert.study"]: each for each in client.search_runs([experiment.experiment_id])}
    assert len(found) == len(client.search_runs([experiment.experiment_id])) == 4
    (latest,) = [each for name, each in found.items() if name == "digits-vs-digits-random"]  # logged twice
    assert latest.data.tags["cert.kind"] == "comparison"
    assert latest.info.status == "FINISHED"
    assert latest.data.metrics["hypervolume/digits"] == pytest.approx(area(points_of(DIGITS[0])))
    assert {file.path for file in client.list_artifacts(latest.info.run_id)} == {"compare.html", "compare.json"}
    (replayed,) = [rest for program, *rest in documented() if program == "tracking.replay"]
    assert replay_main(replayed) == 0
    assert "comparisons/digits-vs-digits-random: 0 rows sent, 0 left" in capsys.readouterr().out


@pytest.mark.timeout(120)  # MLflow is imported, and makes its tables
def test_a_server_that_is_away_leaves_the_comparison_in_its_journal(
    capsys: pytest.CaptureFixture[str], storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    from tracking.mlflow_tracker import local_store
    from tracking.replay import main as replay_main

    shutil.copytree(storage, tmp_path / "runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    code, out, err = run(capsys, "digits", "digits-random", "--storage", tmp_path / "runs")
    assert (code, err) == (0, "")
    assert "MLflow was not reached" in out
    (line,) = re.findall(r"python -m tracking\.replay (\S+) --study (\S+) sends", out)
    assert replay_main([line[0], "--study", line[1], "--tracking-uri", local_store(tmp_path / "runs")[0]]) == 0
    client = MlflowClient(local_store(tmp_path / "runs")[0])
    experiments = [each.experiment_id for each in client.search_experiments()]
    (sent,) = client.search_runs(experiments)
    assert sent.data.tags["cert.study"] == "digits-vs-digits-random"


def test_the_table_on_the_terminal(capsys: pytest.CaptureFixture[str], storage: Path, tmp_path: Path) -> None:
    space = write_space(tmp_path / "space.yaml", (ROOT / "spaces" / "digits.yaml").read_text())
    code, out, err = run(
        capsys, space, f"{storage}:digits-random", "--storage", storage, "--no-mlflow", "--out", tmp_path / "p.html"
    )
    assert (code, err) == (0, "")
    assert re.search(rf"^digits +1 +4 +{area(points_of(DIGITS[0])):.4f}", out, flags=re.MULTILINE)
    assert f"comparison: {tmp_path / 'p.html'}" in out.replace("\n", "")
