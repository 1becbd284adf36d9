"""What a report shows of undecided images, of trials that were stopped and of several seeds of a configuration."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from test_report import HOSTILE, Page, rendered, study, table_rows, traces, trial

from search.pareto import hypervolume
from search.results.configurations import configurations, hypervolume_course, study_front
from search.results.figures import front_figure, save_front_png
from search.results.page import write_report
from search.results.report import front_json, front_trials, study_hypervolume
from search.results.report_text import doubts, hypervolume_summary, setting, stopped_summary
from search.results.trial_figures import costs_figure, hypervolume_figure
from search.studies.records import RungValues, StudyRecord, TrialRecord

# Above (0.5, 0.0), lower ends: 0.40 x 0.30 + 0.36 x 0.05 + 0.35 x 0.05 + 0.30 x 0.10 = 0.1855.
# Upper ends: 0.40 x 0.30 + 0.36 x 0.12 + 0.30 x 0.08 + 0.20 x 0.05 = 0.1972.
# Trial 3 leaves the front if 4 rises above it; 2 enters it above 0.5; 5 is beaten by 1 whatever it becomes.
OPEN = study(
    trial(0, 0.90, 0.30),
    trial(1, 0.80, 0.50),
    trial(2, 0.70, 0.45, certified_upper=0.55, num_images=200, verification_state="stopped", reason=HOSTILE),
    trial(3, 0.85, 0.40),
    trial(4, 0.86, 0.35, certified_upper=0.42, num_images=200),
    trial(5, 0.75, 0.40, certified_upper=0.45),
)


def seed_of(number: int, seed: int, standard: float, certified: float, **changes: Any) -> TrialRecord:
    return trial(number, standard, certified, seed=seed, configuration="repeated", **changes)


# The first is repeated by trials 2 and 3: its mean (0.8, 0.4) is on the front, its third seed alone would not be.
SEEDS = study(
    seed_of(0, 0, 0.90, 0.30),
    trial(1, 0.85, 0.20),
    seed_of(2, 2, 0.80, 0.40, certified_upper=0.46),
    seed_of(3, 3, 0.70, 0.50),
    trial(4, 0.75, 0.45),
)


def stopped(number: int, seconds: float | None, **changes: Any) -> TrialRecord:
    rungs = {"after-ramp 0": RungValues(0.5, 0.1, 10.0), "after-ramp 1/3": RungValues(0.61, 0.23, 15.0)}
    reason = "9 of 12 trials are better at after-ramp 1/3"
    unknown = dict.fromkeys(["standard_accuracy", "adversarial_accuracy", "certified_accuracy", "certified_upper"])
    state = {"state": "STOPPED", "verification_state": None, "costs": {}, "reason": reason, "rungs": rungs}
    return trial(number, 0.0, 0.0, **unknown, **state, seconds=seconds, **changes)


def test_the_table_of_a_study_without_intervals_stops_or_further_seeds() -> None:
    text = rendered(study(trial(0, 0.9, 0.3), trial(1, 0.8, 0.5), trial(3, 0.7, 0.5)), 80)
    assert text == (
        "digits: 2 of 3 complete trials on the front\n"
        "hypervolume 0.1800 above (0.5, 0)\n"
        "\n"
        "trial  standard  adversarial  certified  seconds\n"
        "────────────────────────────────────────────────\n"
        "key-0    0.9000       0.3100     0.3000       60\n"
        "key-1    0.8000       0.5100     0.5000       60\n"
        "\n"
        "1,797 validation images of digits; threat: linf 8/255; verifier: pgd, ibp, \n"
        "crown; each point: n = 1 seed.\n"
        "In all trials: alpha = 0.5, network = cnn3.\n"
    )


def test_the_front_is_that_of_the_lower_ends_and_says_what_could_change() -> None:
    found = study_front(OPEN)
    assert [each.number for each in found.members] == [0, 1, 3, 4]
    assert found.doubtful == {3}
    assert [each.number for each in found.possible] == [2]
    assert found.hypervolume_bounds == pytest.approx((0.1855, 0.1972), rel=1e-12)
    assert hypervolume_summary(found) == "hypervolume 0.1855 to 0.1972 above (0.5, 0)"
    text = rendered(OPEN)
    assert "key-3 ? 0.8500 0.4100 0.4000 60" in table_rows(text)
    assert "“?”: undecided images of another trial could push it off the front." in text
    assert "Possibly on the front, by their undecided images: key-2 (0.7000, 0.4500\u20130.5500).\n" in text
    value = front_json(OPEN)
    assert value["hypervolume_bounds"] == pytest.approx([0.1855, 0.1972])
    assert value["front"] == ["key-0", "key-1", "key-3", "key-4"]
    assert [each["certain"] for each in value["configurations"]] == [True, True, False, False, True, True]


def test_a_long_list_of_possible_members_is_cut() -> None:
    possible = [trial(i, 0.7 + i / 1000, 0.4, certified_upper=0.6) for i in range(1, 9)]
    (sentence,) = doubts(study_front(study(trial(0, 0.9, 0.5), *possible)))
    assert sentence.count("key-") == 5
    assert sentence.endswith(", and 3 more.")


def test_bars_reach_from_the_lower_to_the_upper_end() -> None:
    parts = traces(front_figure(OPEN))
    front, hopeful, others = parts["front"], parts["possibly on the front"], parts["other trials"]
    assert list(front.x) == [0.8, 0.85, 0.86, 0.9]
    assert list(front.error_y.array) == pytest.approx([0, 0, 0.07, 0])
    assert list(front.error_y.arrayminus) == [0, 0, 0, 0]
    assert front.error_y.visible
    assert list(front.marker.color) == [front.line.color, "white", front.line.color, front.line.color]
    assert (list(hopeful.x), list(hopeful.y), list(hopeful.error_y.array)) == ([0.7], [0.45], pytest.approx([0.1]))
    assert list(others.x) == [0.75]
    assert "lowest to highest seed" not in parts


def test_hovering_tells_both_ends_and_why() -> None:
    parts = traces(front_figure(OPEN))
    by_x = dict(zip(parts["front"].x, parts["front"].hovertext, strict=True))
    assert "certified 0.3500\u20130.4200<br>14 images undecided<br>" in by_x[0.86]
    assert "undecided images of another trial could push it off the front" in by_x[0.85]
    assert "undecided" not in by_x[0.9]
    (hopeful,) = parts["possibly on the front"].hovertext
    assert "certified 0.4500\u20130.5500<br>20 images undecided; verification stopped: &lt;/script&gt;" in hopeful
    assert "<script>" not in hopeful


def test_several_seeds_are_one_point_with_a_cross() -> None:
    found = study_front(SEEDS)
    (repeated,) = found.repeated
    assert [each.key for each in repeated.trials] == ["key-0", "key-2", "key-3"]
    assert (repeated.standard_accuracy, repeated.certified_accuracy) == pytest.approx((0.8, 0.4))
    assert repeated.certified_upper == pytest.approx(0.42)
    figure = front_figure(SEEDS)
    parts = traces(figure)
    assert list(parts["front"].x) == pytest.approx([0.75, 0.8, 0.85])
    assert list(parts["front"].error_y.array) == pytest.approx([0, 0.02, 0])
    assert "mean of n = 3 seeds<br>standard 0.8000, 0.7000 to 0.9000" in parts["front"].hovertext[1]
    assert "trial 2: 108 images undecided" in parts["front"].hovertext[1]
    cross = parts["lowest to highest seed"]
    assert (list(cross.x), list(cross.y)) == (pytest.approx([0.8]), pytest.approx([0.4]))
    assert (list(cross.error_x.arrayminus), list(cross.error_x.array)) == (pytest.approx([0.1]), pytest.approx([0.1]))
    assert (list(cross.error_y.arrayminus), list(cross.error_y.array)) == (pytest.approx([0.1]), pytest.approx([0.1]))
    for axis, ends in ((figure.layout.xaxis, (0.7, 0.9)), (figure.layout.yaxis, (0.3, 0.5))):
        assert axis.range[0] < ends[0] < ends[1] < axis.range[1]


def test_several_seeds_are_one_row_and_count_as_one() -> None:
    text = rendered(SEEDS, 80)
    assert text.startswith("digits: 3 of 3 configurations (5 complete trials) on the front\n")
    rows = [" ".join(line.split()) for line in text.splitlines()]
    start = rows.index("key-0 3 0.8000 0.4100 0.4000\u20130.4200 60")
    assert rows[start + 1 : start + 3] == ["key-2 0.7000 to 0.9000 0.3000 to 0.5000", "key-3"]
    assert "each point: the mean of n = 1 to 3 seeds." in setting(study_front(SEEDS))
    # Above (0.5, 0): (0.85, 0.2), (0.8, 0.4), (0.75, 0.45) give 0.07 + 0.06 + 0.0125.
    assert study_hypervolume(SEEDS) == pytest.approx(0.1425, rel=1e-12)
    value = front_json(SEEDS)
    assert value["front"] == [each.key for each in front_trials(SEEDS)] == [f"key-{i}" for i in range(5)]
    assert value["configurations"][0]["standard_range"] == [0.7, 0.9]
    assert value["configurations"][0]["num_seeds"] == 3


def test_one_seed_twice_is_one_measurement_of_which_the_narrower_interval_counts() -> None:
    wide, narrow = seed_of(0, 7, 0.9, 0.3, certified_upper=0.5), seed_of(1, 7, 0.9, 0.4)
    (only,) = configurations(study(wide, narrow))
    assert only.trials == (narrow,)
    assert only.num_seeds == 1


def test_trials_without_a_stored_configuration_stand_alone() -> None:
    assert len(configurations(study(*(trial(i, 0.9, 0.3, configuration="") for i in range(3))))) == 3


def test_the_course_of_the_hypervolume_follows_the_means() -> None:
    (line,) = hypervolume_figure(study_front(SEEDS)).data
    # 0.4 x 0.3, twice; its mean (0.85, 0.35) holds trial 1; its mean (0.8, 0.4) does not; trial 4 adds 0.25 x 0.05.
    assert list(line.y) == pytest.approx([0, 0.12, 0.12, 0.1225, 0.13, 0.1425])


def test_the_course_of_the_hypervolume_agrees_with_counting_anew() -> None:
    draw = random.Random(0)
    trials = [trial(i, draw.random(), draw.random(), configuration=str(draw.randrange(25)), seed=i) for i in range(60)]
    course = hypervolume_course(trials, (0.1, 0.1))
    for end in range(1, len(trials) + 1):
        points = [each.objectives for each in configurations(study(*trials[:end]))]
        assert course[end - 1] == pytest.approx(hypervolume(points, (0.1, 0.1)), rel=1e-12)


def test_stopped_trials_are_counted_with_their_share_of_seconds() -> None:
    record = study(trial(0, 0.9, 0.3), trial(1, 0.8, 0.5), stopped(2, 21.0), stopped(3, None))
    sentence = "2 of 4 trials stopped early after 30 % of the seconds of a finished one"
    assert stopped_summary(record) == sentence  # (21 + 15) / 2 of 60
    assert f"{sentence}." in rendered(record)
    assert stopped_summary(study(stopped(0, 21.0))) == "1 of 1 trial stopped early"
    assert [each["rungs"] for each in front_json(record)["trials"]][2]["after-ramp 1/3"]["seconds"] == 15.0
    bars = {name: list(bar.y) for name, bar in traces(costs_figure(record)).items()}
    assert bars["until stopped"] == [0, 0, 21.0, 15.0]
    assert bars["student"] == [40.0, 40.0, 0, 0]
    assert not any("stopped" in name for name in traces(front_figure(record)))


def test_the_page_lists_reasons_doubts_and_seeds(tmp_path: Path) -> None:
    wide = trial(6, 0.7, 0.4, certified_upper=0.6)
    record = study(*SEEDS.trials, stopped(5, 21.0), wide)
    write_report(record, tmp_path / "report.html")
    save_front_png(record, tmp_path / "front.png")
    text = Page(tmp_path / "report.html").text
    assert "9 of 12 trials are better at after-ramp 1/3; at after-ramp 1/3: standard 0.6100, certified 0.2300" in text
    assert "1 of 7 trials stopped early after 35 % of the seconds of a finished one." in text
    assert "Possibly on the front, by their undecided images: key-6" in text
    assert "Orange crosses" in text
    assert "stopped1" in text  # the number in the summary
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "key-0<br>key-2<br>key-3" in html
    assert json.dumps(front_json(record), allow_nan=False)


def test_a_picture_of_everything_can_be_drawn(tmp_path: Path) -> None:
    record: StudyRecord = study(*OPEN.trials, *(seed_of(6 + i, i, 0.6 + i / 100, 0.52) for i in range(3)))
    save_front_png(record, tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 10_000
