"""The load tests run at their smallest, and what they conclude is worked out by hand. Times are not looked at."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from studies import config_of, empty_database

from benchmarks import scale, scale_driver, scale_store, scale_tracking, scale_tune
from benchmarks.scale import Load, shares
from benchmarks.scale_measure import Measured, measured, timed
from search.study import load_record

pytestmark = pytest.mark.timeout(30)


def test_repeats_are_counted_and_the_first_ones_are_not() -> None:
    calls: list[int] = []
    found = timed("driver", "report", 10, lambda: calls.append(1), 4, each=2, uncounted=3)
    assert (len(calls), len(found.values)) == (7, 4)
    assert found.values == tuple(sorted(found.values))
    assert str(measured("driver", "end", 1000, [0.002, 0.001, 0.004])).split()[:5] == [
        "driver",
        "1,000",
        "end",
        "2",
        "ms",
    ]
    assert "(1 to 4), n = 3" in str(measured("driver", "end", 1000, [0.002, 0.001, 0.004]))


def test_how_busy_a_part_is() -> None:
    """4,000 trials of 3,600 s begin and end 10/9 times a second and report 4,000 times, 1,000 of a verification."""
    load = Load()
    times = {"idle": 1e-5, "report": 1e-4, "verifying": 2e-4, "rung": 3e-3, "start": 0.01, "end": 0.02}
    found = [measured("driver", name, 1000, [seconds]) for name, seconds in times.items()]
    found += [measured("tune", "report through Tune's loop", 4, [0.0005])]
    found += [measured("tune", "choice among the calls of all", 4000, [0.0017])]
    found += [measured("driver", "end", 10, [99.0])]  # of a smaller study: not the one that counts
    found += [measured("database", "suggest by gp", 1000, [0.9])]
    busiest, sampler, ours = shares(load, found)
    assert (busiest.what, busiest.busy) == ("driver's loop, Tune's own", pytest.approx(8.8))
    assert (sampler.what, sampler.busy) == ("suggestions by gp", pytest.approx(1.0))
    assert ours.busy == pytest.approx(4000 * 1e-5 + 3000 * 1e-4 + 1000 * 2e-4 + 10 / 9 * (3 * 3e-3 + 0.01 + 0.02))
    assert ours.size == 1000
    assert busiest.line(load.slots).endswith("full at about 450 trials at once")  # of 454.5


def test_a_summary_reads_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "store.json"
    file.write_text(json.dumps([asdict(measured("store", "disk: pull", 500, [0.002]))]))
    assert scale.main(["summary", str(file), "--slots", "100"]) == 0
    told = capsys.readouterr().out
    assert "100 trials at once of 3600 s" in told
    assert "0.9%  driver's copy of artefacts on disk" in told  # 100 / 3600 trials a second of 160 epochs


def test_the_drivers_loop_is_that_of_a_search(tmp_path: Path) -> None:
    """What is timed has happened: the study has the ends, the rungs and the new trials."""
    (tmp_path / "study.db").write_bytes(empty_database())
    config = config_of(tmp_path, budget={"trials": 100}, search__points=None)
    url = scale_driver.filled(tmp_path, config, 16, 4)
    before = load_record(url, "tiny")
    assert (len(before.done), len(before.unfinished)) == (16, 4)
    found = scale_driver._driven(config, url, tmp_path, 16, 4, 3)
    parts = {each.name for each in found}
    assert parts >= {"open the study", "report", "verifying", "rung", "idle", "end", "start", "memory of the driver"}
    assert all(each.size == 16 and each.values[0] > 0 for each in found)
    after = load_record(url, "tiny")
    assert len(after.done) == 16 + 3
    assert len([trial for trial in after.trials if trial.state == "RUNNING"]) == 4
    assert len((tmp_path / "_study.jsonl").read_text().splitlines()) >= 3


def test_the_drivers_copy_of_a_store_follows_it() -> None:
    found = {each.name: each for each in scale_store._measure("disk", 3, 2)}
    assert set(found) == {"disk: put", "disk: get", "disk: list", "disk: look", "disk: pull"}
    assert found["disk: pull"].size == 3


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_tune_s_loop_is_measured(capfd: pytest.CaptureFixture[str]) -> None:
    report, choice = scale_tune.measure([2], 50, 4.0, 3)
    assert (report.size, choice.size, len(choice.values)) == (2, 50, 3)
    assert 0 < choice.median < 0.1
    assert 0 < report.median < 0.1


def test_a_sender_looks_at_many_journals() -> None:
    (found,) = scale_tracking._idle(5, 2)
    assert (found.size, len(found.values)) == (5, 2)


def test_every_part_can_be_asked_for() -> None:
    for part in scale.PARTS:
        args = scale._parser().parse_args([part, "--trials", "1", "2"])
        assert (args.part, args.trials) == (part, [1, 2])
    with pytest.raises(SystemExit):
        scale._parser().parse_args(["mlflow"])
    assert Measured("tune", "x", 1, (1.0,)).median == 1.0
