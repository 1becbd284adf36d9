"""Reports of no trial and of very many: what is folded, sampled and averaged, and that nothing is said wrongly then."""

import dataclasses
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_report import Page, many, rendered, study, table_rows, traces, trial, unfinished

from ccdist.config import VerificationOptions
from search.results.configurations import study_front
from search.results.figures import BARS, untitled_front
from search.results.page import write_report
from search.results.page_tables import BLOCK_ROWS, OPEN_ROWS
from search.results.report import SHOWN_MEMBERS
from search.results.report_text import by_standard_accuracy, setting, spread
from search.results.trial_figures import (
    BARS as COST_BARS,
)
from search.results.trial_figures import (
    COLOURED_LINES,
    LINES_BELOW,
    MARKED,
    MEANS,
    costs_figure,
    costs_text,
    hypervolume_figure,
    parameters_figure,
    parameters_text_of,
)
from search.studies.records import StudyRecord
from search.studies.study_record import verifier_text

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def falling(count: int, **changes: Any) -> StudyRecord:
    """Trials that are all on the front."""
    trials = [
        trial(i, 0.9 - 0.3 * i / count, 0.2 + 0.3 * (i / count) ** 0.5, params={"alpha": i}) for i in range(count)
    ]
    return study(*trials, **changes)


# ---- what every figure says ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rungs": ["ibp"]}, "IBP, no time limit"),
        (
            {"attack": {"steps": 40, "step_size": 0.035, "restarts": 3}, "rungs": ["pgd", "crown"]},
            "PGD (40 steps of 0.035 of the radius, 3 restarts), CROWN, no time limit",
        ),
        (
            {"rungs": ["ensemble", "alpha_crown", "branch_and_bound"]},
            (
                "attack ensemble (100 steps, 1 restart, 9 targets, 5,000 queries), alpha-CROWN (20 steps), "
                "branch and bound (20 s an image)"
            ),
        ),
        (
            {
                "rungs": ["branch_and_bound"],
                "branch_and_bound": {"timeout_s": 1.5, "max_branches": 2000, "total_timeout_s": 600},
            },
            "branch and bound (1.5 s an image, 2,000 branches an image, 600 s in all)",
        ),
        (
            {"rungs": ["branch_and_bound"], "branch_and_bound": {"timeout_s": None}},
            "branch and bound (no limit)",
        ),
    ],
)
def test_the_verifier_is_named_with_its_limits(options: dict[str, Any], text: str) -> None:
    given = {"attack": {"steps": 40, "step_size": 0.035}} | options
    assert verifier_text(VerificationOptions.model_validate(given)) == text


def test_the_split_is_named() -> None:
    record = study(trial(0, 0.9, 0.3), split="test")
    assert setting(study_front(record)).startswith("1,797 test images of digits; ")
    assert "1,797 test images of digits" in rendered(record)


def test_a_threat_is_explained(tmp_path: Path) -> None:
    for threat, text in {
        "linf 2/255": "of every pixel by at most 2/255 of the range from black to white (the threat, linf 2/255)",
        "l2 1/2": "of all pixels together by at most 1/2 in Euclidean length, with black 0 and white 1",
        "other <b>": "within the threat, other <b>",
    }.items():
        write_report(study(threat=threat), tmp_path / "report.html")
        assert text in Page(tmp_path / "report.html").text.replace("\n", " ")


# ---- nothing yet -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trials", [(), (unfinished(0, "RUNNING"), unfinished(1, "FAILED", "why"))])
def test_a_study_in_which_nothing_has_finished_says_so(tmp_path: Path, trials: Any) -> None:
    record = study(*trials, num_images=0)
    write_report(record, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "No trial has finished yet" in page.text
    assert "on the front0" in page.text
    assert "0 validation" not in page.text
    assert "0 images" not in page.text
    assert ("why" in page.text) == bool(trials)
    assert (tmp_path / "report.html").stat().st_size < 20_000  # nothing to draw, so nothing that draws
    text = rendered(record)
    assert text.startswith("digits: no complete trial yet\n")
    assert "\nvalidation images of digits; threat: linf 8/255" in text
    assert "standard" not in text


# ---- very many -------------------------------------------------------------------------------------------------


@pytest.mark.timeout(20)
def test_a_page_of_many_trials_is_small_and_folded(tmp_path: Path) -> None:
    record = many(1200)
    write_report(record, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 7e6
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    folds = html.split("<details")[1:]
    assert len(folds) == 3
    assert max(fold.split("</details>")[0].count("<tr") for fold in folds) == BLOCK_ROWS + 1  # and the heads
    assert "<summary>Trials 1,001 to 1,200 of 1,200</summary>" in html
    assert not any(fold.startswith(" open") for fold in folds)
    assert html.count('class="member"') == len(study_front(record).members)
    # The front is there to be read, also when it is long; what follows is folded.
    write_report(falling(OPEN_ROWS + BLOCK_ROWS), tmp_path / "report.html")
    folds = (tmp_path / "report.html").read_text(encoding="utf-8").split("<details")[1:]
    assert [fold.startswith(" open") for fold in folds] == [True, False, False, False]


def test_beyond_some_number_dominated_trials_have_no_bars() -> None:
    few, more = (study(trial(0, 0.95, 0.6), *(trial(i, 0.9, 0.3) for i in range(1, 1 + n))) for n in (BARS, BARS + 1))
    for record, is_brief in ((few, False), (more, True)):
        others = traces(untitled_front(study_front(record)))["other trials"]
        assert len(others.x) == len(record.trials) - 1
        assert ("alpha" in others.hovertext[0]) is not is_brief
        assert (others.error_y.array is None) is is_brief
        assert "key-1" in others.hovertext[0]


def test_a_course_of_many_trials_keeps_each_step() -> None:
    record = many(3 * MARKED)
    trials = [dataclasses.replace(each, finished_at=1000.0 + each.number) for each in record.trials]
    found = study_front(dataclasses.replace(record, trials=tuple(trials)))
    (line,) = hypervolume_figure(found).data
    assert len(line.x) < MARKED
    assert line.x[-1] * 60 == pytest.approx(3 * MARKED - 1)
    assert line.y[-1] == pytest.approx(found.hypervolume_bounds[0], rel=1e-12)
    for end in (1, 10, 100, 400):
        shown = max(y for x, y in zip(line.x, line.y, strict=True) if x * 60 <= end - 1 + 1e-9)
        part = study_front(dataclasses.replace(record, trials=tuple(trials[:end])))
        assert shown == pytest.approx(part.hypervolume_bounds[0], rel=1e-12)


def test_of_many_trials_the_front_is_coloured_and_a_sample_is_below_it() -> None:
    record = many(1000)
    found = study_front(record)
    (lines,) = parameters_figure(record).data
    members = sorted(each.certified_accuracy for each in found.members)
    colours = list(lines.line.color)
    below = lines.line.cmin
    assert below < members[0]
    assert lines.line.cmax == pytest.approx(members[-1])
    assert sorted(colour for colour in colours if colour != below) == pytest.approx(members)
    assert colours.count(below) == LINES_BELOW
    left_out = 1000 - len(members) - LINES_BELOW
    assert f"{LINES_BELOW} others, evenly by number; {left_out:,} are left out" in parameters_text_of(found)
    # The axis of certified accuracy still shows each line at its own value.
    certified = lines.dimensions[-1]["values"]
    assert all(colour in (below, value) for colour, value in zip(colours, certified, strict=True))
    assert len(set(certified)) > LINES_BELOW / 2
    few = parameters_figure(falling(COLOURED_LINES)).data[0].line
    assert few.cmin is None
    assert "One line for each complete trial" in parameters_text_of(study_front(falling(COLOURED_LINES)))


def test_costs_of_many_trials_are_means_that_add_up() -> None:
    trials = [
        trial(i, 0.9, 0.3, costs={"student": 1.0 + i % 7, "teacher": 5.0 * (i % 10 == 0)})
        for i in range(5 * COST_BARS)
        if i % 11
    ]
    record = study(*trials)
    bars = traces(costs_figure(record))
    width = bars["student"].x[1] - bars["student"].x[0]
    assert costs_text(record).endswith(f"each bar is the mean of {width:g} consecutive ones.")
    assert len(bars["student"].x) <= MEANS
    counts = [int(text.split()[2]) for text in bars["student"].customdata]
    assert sum(counts) == len(trials)
    for part in ("student", "teacher"):
        total = sum(count * mean for count, mean in zip(counts, bars[part].y, strict=True))
        assert total == pytest.approx(sum(each.costs[part] for each in trials))
    assert bars["student"].x[0] == (width - 1) / 2
    assert costs_text(study(*trials[:COST_BARS])) == "What each trial spent on its parts, failed trials included."


def test_a_terminal_shows_a_long_front_from_end_to_end() -> None:
    record = falling(500)
    rows = [row.split()[0] for row in table_rows(rendered(record))]
    assert len(rows) <= SHOWN_MEMBERS
    assert (rows[0], rows[-1]) == ("key-0", "key-499")
    text = rendered(record).replace("\n", " ")
    assert f"{len(rows)} of the 500 members of the front, spread over it; python -m search.front digits --all" in text
    assert "--all" not in rendered(falling(SHOWN_MEMBERS))
    assert len(table_rows(rendered(falling(SHOWN_MEMBERS)))) == SHOWN_MEMBERS


def test_a_spread_leaves_no_gap_where_the_front_has_none() -> None:
    # 400 members crowd at one end; by number nearly all shown would lie there.
    crowd = [trial(i, 0.9 - i * 1e-5, 0.2 + i * 1e-5) for i in range(400)]
    rest = [trial(400 + i, 0.89 - 0.03 * i, 0.21 + 0.03 * i) for i in range(10)]
    members = by_standard_accuracy(study_front(study(*crowd, *rest)).members)
    shown = [member.number for member in spread(members, 20)]
    assert shown == sorted(shown)
    assert {0, *range(400, 410)} <= set(shown)
    assert len(shown) <= 20
    same = [trial(i, 0.5, 0.5) for i in range(5)]  # equal points are all on the front
    assert len(spread(study_front(study(*same)).members, 3)) <= 3


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_browser_draws_ten_thousand_trials(tmp_path: Path) -> None:
    record = many(10_000)
    write_report(record, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 12e6
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=20000",
        "--dump-dom",
    ]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [*command, profile, f"file://{tmp_path / 'report.html'}"],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    # One mark for each trial in the figure, one row for each in the tables, and no error instead of a figure.
    assert done.stdout.count('class="point"') >= 10_000
    assert done.stdout.count("</tr>") >= 10_000
    assert done.stdout.count('class="main-svg"') >= 4
