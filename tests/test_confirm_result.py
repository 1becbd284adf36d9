"""Means, spreads, gaps, dominance, the knee, the estimate and the tables of a confirmation, against worked numbers."""

import io
import json
import math
import re
import statistics
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from studies import TREE

from ccdist.config import VerifyConfig
from ccdist.recipe import Recipe
from search.config import SearchConfig
from search.confirming.confirm_estimate import Images, ensemble_passes, estimate, run_cost
from search.confirming.confirm_report import as_json, latex, markdown, rows, terminal_table, tex_escaped
from search.confirming.confirmation import SEED, ConfirmationSpace, Pair, members_of
from search.confirming.confirmation_config import confirmation_config
from search.confirming.confirmed import Point, Result, Spread, knee, result_of
from search.results.configurations import study_front
from search.space import Space
from search.studies.records import StudyRecord, TrialRecord

CONFIG = SearchConfig.model_validate(TREE | {"network": {"name": "mlp", "width": 8}})


def trial(number: int, name: str, standard: float, certified: float, upper: float | None = None, **more: Any) -> Any:
    """A COMPLETE trial of the configuration `name`; with `seed`, a run of a confirmation."""
    seed = more.pop("seed", None)
    params = {"alpha": 0.5} | ({} if seed is None else {SEED: seed})
    study = "s" if seed is None else "s-confirm"
    fields = {
        "standard_accuracy": standard,
        "adversarial_accuracy": certified if upper is None else upper,
        "certified_accuracy": certified,
        "certified_upper": certified if upper is None else upper,
        "num_images": 100,
    }
    return TrialRecord(f"{study}-{number:04d}", number, "COMPLETE", params, name, number + 1, **fields | more)


def study(name: str, *trials: TrialRecord, split: Any = "test") -> StudyRecord:
    return StudyRecord(name, (0.0, 0.0), trials, "digits_&_co", "linf 1/10", 100, "pgd, ibp", 0.0, split)


SEARCHED = study(
    "s", trial(0, "a", 0.95, 0.30), trial(1, "b", 0.90, 0.50), trial(2, "c", 0.80, 0.60), split="validation"
)
CONFIRMED = study(
    "s-confirm",
    trial(0, "a", 0.90, 0.20, seed=0),
    trial(1, "a", 0.92, 0.25, 0.29, seed=1),
    trial(2, "b", 0.88, 0.52, seed=0),
    trial(3, "b", 0.84, 0.48, seed=1),
    trial(4, "c", 0.79, 0.47, seed=0),
    replace(trial(5, "c", 0.0, 0.0, seed=1), state="FAILED", reason="not finite: a_b", standard_accuracy=None),
)


def found(record: StudyRecord = CONFIRMED, alike: dict[str, float] | None = None) -> Result:
    return result_of(record, SEARCHED, members_of(SEARCHED, ["a", "b", "c"]), alike or {})


def test_means_spreads_and_gaps_by_hand() -> None:
    a, b, c = found().members
    assert (a.key, b.key, c.key) == ("s-0000", "s-0001", "s-0002")
    assert a.standard is not None
    assert a.certified is not None
    assert a.certified_upper is not None
    assert (a.num_seeds, b.num_seeds, c.num_seeds) == (2, 2, 1)
    assert a.standard.mean == pytest.approx(0.91)
    assert (a.standard.lowest, a.standard.highest) == (0.90, 0.92)
    assert a.certified.mean == pytest.approx(0.225)
    assert a.certified_upper.mean == pytest.approx(0.245)
    assert a.gap == pytest.approx((0.04, 0.075))
    assert b.gap == pytest.approx((0.04, 0.0))
    assert c.gap == pytest.approx((0.01, 0.13))
    assert [run.params[SEED] for run in c.failed] == [1]


def test_a_run_that_failed_once_and_then_went_well_is_no_failure() -> None:
    again = study("s-confirm", *CONFIRMED.trials, trial(6, "c", 0.81, 0.49, seed=1))
    c = found(again).members[-1]
    assert (c.num_seeds, c.failed) == (2, ())


def test_a_gap_with_the_rungs_of_the_search_needs_all_verdicts() -> None:
    alike = {"s-confirm-0000": 0.10, "s-confirm-0001": 0.20, "s-confirm-0002": 0.5}
    a, b, _ = found(alike=alike).members
    assert a.gap_alike == pytest.approx(0.15)
    assert b.gap_alike is None


def test_dominance_and_roles_by_hand() -> None:
    result = found()
    a, b, c = result.members
    assert (a.dominated_by, b.dominated_by, c.dominated_by) == ((), (), ("s-0001",))
    assert [member.key for member in result.front] == ["s-0000", "s-0001"]
    assert (result.best_standard, result.best_certified, result.knee) == ("s-0000", "s-0001", None)


def test_equal_means_dominate_nobody() -> None:
    record = study("s-confirm", *(trial(index, name, 0.9, 0.5, seed=0) for index, name in enumerate("ab")))
    result = result_of(record, SEARCHED, members_of(SEARCHED, ["a", "b"]), {})
    assert all(member.is_on_front for member in result.members)
    assert result.roles == {"best-standard": "s-0000", "best-certified": "s-0000"}


def test_rounding_makes_nobody_better() -> None:
    """267 + 267 + 208 images are as many as 264 + 208 + 270, but the means of their shares are not equal floats."""
    counts = {"a": (267, 267, 208), "b": (264, 208, 270)}
    runs = [
        trial(3 * index + seed, name, count / 270, 0.5, seed=seed)
        for index, (name, each) in enumerate(counts.items())
        for seed, count in enumerate(each)
    ]
    record = study("s-confirm", *runs)
    result = result_of(record, SEARCHED, members_of(SEARCHED, ["a", "b"]), {})
    a, b = result.members
    assert a.point != b.point
    assert [each.dominated_by for each in (a, b)] == [(), ()]
    assert len(study_front(record).members) == 2, "nor in the report"


def test_a_member_whose_verification_was_stopped_has_no_gap_with_the_same_rungs() -> None:
    """The search proved what it had time for, the confirmation what the rungs can."""
    stopped = replace(SEARCHED.trials[1], verification_state="stopped", certified_upper=0.8)
    searched = replace(SEARCHED, trials=(SEARCHED.trials[0], stopped, SEARCHED.trials[2]))
    alike = {run.key: 0.4 for run in CONFIRMED.trials}
    a, b, _ = result_of(CONFIRMED, searched, members_of(searched, ["a", "b", "c"]), alike).members
    assert a.gap_alike == pytest.approx(-0.1)
    assert b.gap_alike is None
    assert b.gap is not None


def test_no_gap_is_minus_nothing() -> None:
    before = replace(SEARCHED.trials[0], standard_accuracy=0.91 - 1e-9)
    searched = replace(SEARCHED, trials=(before, *SEARCHED.trials[1:]))
    result = result_of(CONFIRMED, searched, members_of(searched, ["a"]), {})
    assert rows(result)[0].gap_standard == "+0.0000"


def test_without_runs_nothing_is_said_of_their_images() -> None:
    assert "| test images of digits_&_co" in markdown(found(replace(study("s-confirm"), num_images=0))).replace(
        "\n", "| "
    )


def test_members_without_runs_come_last_and_have_no_point() -> None:
    result = found(study("s-confirm", trial(0, "c", 0.7, 0.4, seed=0)))
    assert [member.key for member in result.members] == ["s-0002", "s-0000", "s-0001"]
    assert [member.is_on_front for member in result.members] == [True, False, False]
    assert rows(result)[1].standard == "-"


accuracy = st.integers(0, 1000).map(lambda count: count / 1000)


@given(st.lists(accuracy, min_size=1, max_size=5))
def test_a_spread_is_that_of_the_standard_library(values: list[float]) -> None:
    spread = Spread(tuple(values))
    assert spread.mean == pytest.approx(statistics.fmean(values))
    assert spread.lowest <= spread.mean + 1e-12
    assert spread.mean <= spread.highest + 1e-12
    expected = statistics.stdev(values) if len(values) > 1 else None
    assert spread.deviation == (expected if expected is None else pytest.approx(expected, abs=1e-12))


@given(st.lists(st.tuples(accuracy, accuracy), min_size=1, max_size=3))
def test_dominance_is_the_definition(points: list[Point]) -> None:
    record = study("s-confirm", *(trial(i, "abc"[i], *point, seed=0) for i, point in enumerate(points)))
    result = result_of(record, SEARCHED, members_of(SEARCHED, list("abc"[: len(points)])), {})
    for member in result.members:
        own = points[member.member.number]
        naive = {
            f"s-{index:04d}"
            for index, other in enumerate(points)
            if other[0] >= own[0] and other[1] >= own[1] and (other[0] > own[0] or other[1] > own[1])
        }
        assert set(member.dominated_by) == naive


# ---- The knee --------------------------------------------------------------------------------------------------


def test_the_knee_by_hand() -> None:
    """The line goes from (1, 0) to (0, 1): (0.6, 0.6) lies 0.2 / sqrt(2) beyond it, (0.9, 0.2) 0.1 / sqrt(2)."""
    ends = {"standard": (1.0, 0.0), "certified": (0.0, 1.0)}
    front = ends | {"near": (0.9, 0.2), "knee": (0.6, 0.6), "dent": (0.2, 0.7)}
    assert knee(front) == "knee"
    assert knee({name: point for name, point in front.items() if name != "knee"}) == "near"
    assert knee({name: front[name] for name in ("standard", "dent", "certified")}) is None


@pytest.mark.parametrize("points", [{}, {"a": (0.5, 0.5)}, {"a": (0.9, 0.1), "b": (0.1, 0.9)}])
def test_without_anything_between_the_ends_there_is_no_knee(points: dict[str, Point]) -> None:
    assert knee(points) is None


def test_on_the_line_there_is_no_knee() -> None:
    assert knee({"a": (0.9, 0.1), "b": (0.7, 0.3), "c": (0.3, 0.7), "d": (0.1, 0.9)}) is None


@given(st.sets(st.integers(1, 99), min_size=3, max_size=8), st.data(), st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_knee_is_the_farthest_and_knows_no_scale(
    standards: set[int], data: st.DataObject, wide: float, tall: float
) -> None:
    """Against the distance by Heron's formula: twice the triangle's area over its base."""
    size = len(standards)
    certified = data.draw(st.sets(st.integers(1, 99), min_size=size, max_size=size))
    pairs = zip(sorted(standards, reverse=True), sorted(certified), strict=True)
    front = {str(index): (x / 100, y / 100) for index, (x, y) in enumerate(pairs)}
    ends = front["0"], front[str(size - 1)]

    def heron(point: Point) -> float:
        a, b, c = math.dist(ends[0], ends[1]), math.dist(point, ends[0]), math.dist(point, ends[1])
        s = (a + b + c) / 2
        return 2 * math.sqrt(max(0.0, s * (s - a) * (s - b) * (s - c))) / a

    def is_beyond(point: Point) -> bool:
        slope = (ends[1][1] - ends[0][1]) / (ends[1][0] - ends[0][0])
        return point[1] > ends[0][1] + slope * (point[0] - ends[0][0]) + 1e-6

    beyond = {key: heron(point) for key, point in front.items() if is_beyond(point)}
    chosen = knee(front)
    if not beyond:
        assert chosen is None
        return
    assert chosen is not None
    assert beyond[chosen] == pytest.approx(max(beyond.values()), abs=1e-6)
    if sorted(beyond.values())[-1] - sorted([0.0, *beyond.values()])[-2] > 1e-6:
        assert knee({key: (x * wide, y * tall) for key, (x, y) in front.items()}) == chosen


# ---- The estimate ----------------------------------------------------------------------------------------------

IMAGES = Images(train=800, validation=200, final_train=1000, test=100)


def verifier(*rungs: str, timeout: float | None = 20.0) -> VerifyConfig:
    return VerifyConfig.model_validate(
        {
            "threat": {"epsilon": 0.1},
            "attack": {"steps": 10, "step_size": 0.1},
            "ensemble": {"steps": 10, "targets": 2, "square_queries": 30},
            "branch_and_bound": {"timeout_s": timeout},
            "rungs": rungs,
        }
    )


def test_the_cost_of_a_run_by_hand() -> None:
    """200 images in 4 s: 0.02 s each. 10 of 100 stay open. The ensemble makes 10 * 5 + 30 / 3 passes, PGD 10."""
    whole = verifier("pgd", "ensemble", "branch_and_bound")
    assert ensemble_passes(whole) == 60
    cost = run_cost(8.0, 4.0, 0.1, whole, IMAGES)
    assert cost.student == 10.0
    assert cost.verification == pytest.approx(100 * 0.02 + 10 * 0.02 * 6)
    assert cost.at_most == pytest.approx(cost.verification + 10 * 20)
    plain = run_cost(8.0, 4.0, 0.1, verifier("pgd", "ibp"), IMAGES)
    assert plain.verification == plain.at_most == pytest.approx(2.0)
    assert run_cost(8.0, 4.0, 0.0, whole, IMAGES).at_most == pytest.approx(2.0)
    assert run_cost(8.0, 4.0, 0.1, verifier("branch_and_bound", timeout=None), IMAGES).at_most == math.inf


def test_the_estimate_counts_each_teacher_once_and_only_what_is_left() -> None:
    space = Space(CONFIG)
    distilled, plain = space.points()
    costs = {"teacher": 40.0, "student": 8.0, "verification": 4.0}
    trials = (
        replace(trial(0, "a", 0.9, 0.5, 0.6), params=distilled, costs=costs),
        replace(trial(1, "b", 0.8, 0.6, 0.6), params=plain, costs=costs | {"teacher": 0.0, "student": 16.0}),
    )
    searched = study("s", *trials, split="validation")
    confirming = ConfirmationSpace(confirmation_config(CONFIG, name=None, test_images=None, timeout_s=20))
    left = [
        Pair("a", 0, distilled | {SEED: 0}),
        Pair("a", 1, distilled | {SEED: 1}),
        Pair("b", 1, plain | {SEED: 1}),
    ]

    def recipe_of(pair: Pair) -> Recipe:
        return confirming.recipe(pair.params, 0)

    def search_recipe_of(record: TrialRecord) -> Recipe:
        return space.recipe(record.params, record.number)

    cost = estimate(members_of(searched, ["a", "b"]), left, searched, recipe_of, search_recipe_of, IMAGES)
    assert cost.num_runs == {"a": 2, "b": 1}
    assert (cost.num_teachers, cost.teachers) == (2, 2 * 40.0 * 1.25)  # plain CC-IBP needs none
    assert cost.runs["a"].student == 10.0
    assert cost.runs["b"].student == 20.0
    a, b = cost.runs["a"], cost.runs["b"]
    assert cost.seconds == pytest.approx(100 + 2 * (10 + a.verification) + 20 + b.verification)
    assert cost.at_most == pytest.approx(cost.seconds + 2 * 10 * 20)
    nothing = estimate(members_of(searched, ["a", "b"]), [], searched, recipe_of, search_recipe_of, IMAGES)
    assert nothing.seconds == nothing.at_most == 0.0


# ---- The forms -------------------------------------------------------------------------------------------------


def test_every_form_says_what_its_numbers_are_about() -> None:
    result = found()
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table(result))
    printed = console.export_text()
    assert max(map(len, printed.splitlines())) <= 80
    for text in (printed, markdown(result), latex(result).replace("\\", "")):
        flat = " ".join(text.split())
        for fact in ("100 test images of digits_&_co", "linf 1/10", "pgd, ibp", "lowest to highest", "1 to 2 seeds"):
            assert fact in flat
        assert "search s on its validation images" in flat
        assert "0.9100" in flat
        assert "0.2450" in flat, "the upper end, where it differs"
        assert "best-standard" in flat
        assert "dominated" in flat
        assert "seed 1 failed" in flat


def test_json_holds_every_number() -> None:
    told = json.loads(json.dumps(as_json(found()), allow_nan=False))
    assert (told["split"], told["num_images"], told["study"]) == ("test", 100, "s")
    a, _, c = told["members"]
    assert a["certified_accuracy"]["values"] == [0.20, 0.25]
    assert a["standard_accuracy"]["sd"] == pytest.approx(0.02 / math.sqrt(2))
    assert a["runs"][1] == {"key": "s-confirm-0001", "seed_index": 1, "seed": 2}
    assert c["dominated_by"] == ["s-0001"]
    assert c["failed"][0]["reason"] == "not finite: a_b"


def test_the_markdown_table_has_as_many_cells_in_each_line() -> None:
    table = [line for line in markdown(found()).splitlines() if line.startswith("|")]
    assert len(table) == 5
    assert len({line.count("|") for line in table}) == 1


def test_the_latex_table_is_well_formed() -> None:
    """No LaTeX here, so its rules: balanced groups and environments, as many cells as columns, nothing unescaped."""
    text = latex(found())
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert re.findall(r"\\begin{(\w+)}", body) == ["table", "tabular"]
    assert re.findall(r"\\end{(\w+)}", body) == ["tabular", "table"]
    bare = re.sub(r"\\[&%$#_{}\\]", "", body)
    assert bare.count("{") == bare.count("}")
    columns = re.search(r"\\begin{tabular}{(\w+)}", body)
    assert columns is not None
    cells = [line.count("&") + 1 for line in re.sub(r"\\&", "", body).splitlines() if line.endswith("\\\\")]
    assert cells == [len(columns[1])] * 4
    assert not re.search(r"(?<!\\)[_#%]", body)
    assert bare.count("$") % 2 == 0


@given(st.text(alphabet=st.characters(codec="ascii"), max_size=20))
def test_escaped_text_reads_as_it_was(text: str) -> None:
    named = {"textbackslash{}": "\\", "textasciitilde{}": "~", "textasciicircum{}": "^", "textless{}": "<"}
    named["textgreater{}"] = ">"
    escaped = tex_escaped(text)
    read = re.sub(r"\\([a-z]+\{\}|[&%$#_{}])", lambda match: named.get(match[1], match[1]), escaped)
    assert read == " ".join(text.split())
    assert not re.search(r"(?<!\\)[&%$#_~^]", re.sub(r"\\[&%$#_]", "", escaped))
