"""What the benchmarks of real searches compute: replays of verifications, and curves of hypervolume."""

import random
from pathlib import Path

import numpy as np
import pytest
from studies import result

from benchmarks.real_search import curve_of, done_seconds, driver_line, table_lines
from benchmarks.verification_cost import Report, Timeline, replay, report_lines
from search.studies.records import StudyRecord, TrialRecord


def timeline(number: int, standard: float, attacked: float, certified: float, seconds: float) -> Timeline:
    """An attack first, which takes a second, then bounds that decide everything."""
    after_attack = result(standard, 0.0, certified_upper=attacked, adversarial_accuracy=attacked)
    whole = result(standard, certified, certified_upper=certified, adversarial_accuracy=attacked)
    return Timeline(number, (Report(1.0, after_attack),), Report(seconds, whole))


def test_what_the_attack_has_beaten_is_not_verified_further() -> None:
    """The second trial can have (0.8, 0.5) at best, the first has (0.9, 0.6): it costs its attack only."""
    pool = [timeline(0, 0.9, 0.7, 0.6, 10.0), timeline(1, 0.8, 0.5, 0.4, 20.0), timeline(2, 0.95, 0.5, 0.3, 5.0)]
    done = replay(pool)
    assert (done.seconds, done.stopped) == (16.0, 1)
    assert done.front == {(0.9, 0.6), (0.95, 0.3)}
    assert replay(pool[::-1]).front == done.front
    assert replay(pool, slots=3).seconds == 35.0  # nobody has finished when the others are asked
    lines = report_lines(pool, 20, 0)
    assert "35.0 verifier seconds without dominance" in lines[0]
    assert "front is identical" in lines[2]
    assert "0 wrong drops" in lines[3]


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_no_order_drops_a_point_of_the_front(slots: int) -> None:
    rng = random.Random(slots)
    for _ in range(30):
        pool = []
        for number in range(12):
            standard, attacked, certified = sorted((rng.randrange(1, 8) / 8 for _ in range(3)), reverse=True)
            pool.append(timeline(number, standard, attacked, certified, 1 + rng.random()))
        points = {each.point for each in pool}
        truth = {p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)}
        rng.shuffle(pool)
        assert replay(pool, slots).front == truth


def record(*trials: tuple[float | None, float | None, float]) -> StudyRecord:
    """Trials of ten seconds each: standard, certified (None: stopped in training), when they finished."""
    return StudyRecord(
        "tiny",
        (0.0, 0.0),
        tuple(
            TrialRecord(
                f"tiny-{number}",
                number,
                "STOPPED" if standard is None else "COMPLETE",
                {},
                str(number),
                number,
                standard,
                certified_accuracy=certified,
                certified_upper=certified,
                seconds=10.0,
                finished_at=at,
            )
            for number, (standard, certified, at) in enumerate(trials)
        ),
        "digits",
        "linf 1/10",
        80,
        "ibp",
        0.0,
    )


def test_a_curve_follows_the_order_in_which_trials_ended() -> None:
    """Areas 0.25, then a stopped trial that adds nothing, then 0.5 * 0.5 + 0.5 * 0.25 = 0.375."""
    study = record((1.0, 0.25, 3.0), (0.5, 0.5, 1.0), (None, None, 2.0))
    curve = curve_of(study)
    np.testing.assert_allclose(curve.seconds, [10, 20, 30])
    np.testing.assert_allclose(curve.area, [0.25, 0.25, 0.375])
    assert (curve.at(5.0), curve.at(10.0), curve.at(100.0)) == (0.0, 0.25, 0.375)
    assert (curve.seconds_to(0.3), curve.seconds_to(0.4)) == (30.0, float("inf"))
    (_, _, row, _) = table_lines({"without stopping": study, "with stopping": study})
    assert row.startswith("| without stopping | 3 | 1 / 0 | 30 | 2 | 0.0000 | 0.2500 | 0.2500 | 0.3750 | 30 |")


def test_a_drivers_share_is_what_it_does_beyond_start_and_report(tmp_path: Path) -> None:
    assert "is 1.50% of the 200 s of its trials" in driver_line("with stopping", 9.0, 6.0, 200.0)
    assert done_seconds(tmp_path, "with stopping", 0) == 0  # nothing is there yet
