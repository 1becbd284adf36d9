"""The benchmark of searches: its statistics against known cases, its rivals' rules, and that it goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
from optuna.storages import InMemoryStorage
from simulated import write_curves, write_recorded
from studies import config_of

from benchmarks.rivals import OURS, AshaScheduler, Rival, asha_rivals, certified, chebyshev, stock_rivals, variant
from benchmarks.search import Problem, budget_s, main, mean_cost_s
from benchmarks.search_tables import GRID, STEPS, Found, bootstrap, ratio_of_means, share_to_reach, table
from search.errors import UserError
from search.simulation.hardware import Hardware
from search.simulation.timelines import rung
from search.simulation.virtual_time import TrialStub
from search.space import Space
from search.studies.records import RungValues
from search.study import Study
from search.suggestions.sampling_view import is_by_values


def test_paired_ratio_has_no_spread_where_seeds_agree() -> None:
    second = np.random.default_rng(0).uniform(1, 2, (20, 1))
    ratio = bootstrap(ratio_of_means, 1.1 * second, second)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.1, 1.1, 1.1))


def test_interval_is_that_of_a_mean() -> None:
    """Over a constant the ratio is a mean: its percentiles lie 1.96 standard errors away."""
    first = np.random.default_rng(1).normal(5, 1, (200, 1))
    ratio = bootstrap(ratio_of_means, first, np.ones((200, 1)))
    error = first.std() / np.sqrt(200)
    assert ratio.value == pytest.approx(first.mean())
    assert (ratio.low, ratio.high) == pytest.approx((ratio.value - 1.96 * error, ratio.value + 1.96 * error), abs=0.02)


def test_share_of_the_budget_to_reach_a_value() -> None:
    rising = np.linspace(0, 2, STEPS + 1)[None]
    assert share_to_reach(rising, np.full((1, 3), 1.0)).tolist() == [0.5]
    assert share_to_reach(rising, np.full((1, 3), 3.0)).tolist() == [np.inf]


def test_table_names_the_best_asha_and_what_is_never_reached() -> None:
    def found(value: float) -> list[Found]:
        return [Found([value * share for share in GRID], {"COMPLETE": 3}, 1.0, 2.0) for _ in range(3)]

    every = {"ours": found(1), "random": found(2), "asha-a": found(1), "asha-b": found(4), "gp": found(1)[:2]}
    lines = table(every, "ours")
    assert "| gp (2 seeds) |" in lines[6]
    assert "| random | 0.5000 ± 0.0000 | 1.0000 ± 0.0000 | 2.0000 ± 0.0000 |" in lines[3]
    assert "| 0.500 [0.500, 0.500] | 3 complete |" in lines[3]
    assert "Best ASHA at the end: asha-b." in lines
    assert any("after a share never [never, never]" in line for line in lines)


def test_asha_keeps_the_upper_third_of_each_rung(tmp_path: Path) -> None:
    config = config_of(tmp_path, ["budget.trials=20"])
    study = Study.open(config, Space(config), InMemoryStorage(), "simulated")
    scheduler = AshaScheduler(study, certified)
    decisions = []
    for value in (0.3, 0.2, 0.5, 0.4, 0.6):
        assignment = study.ask()
        result = {"key": assignment.key} | rung(1.0, "after-ramp 0", 0.9, value).content
        decisions.append(scheduler.on_trial_result(None, TrialStub(assignment.key, {}), result))
    # Cuts at two thirds of those before: none, 0.3, 0.267, 0.367, 0.433.
    assert decisions == ["CONTINUE", "STOP", "CONTINUE", "CONTINUE", "CONTINUE"]
    assert list(scheduler.stopped) == [study.trials()[1].key]
    assert study.trials()[3].rungs["after-ramp 0"].certified_accuracy == 0.4


def test_scalarisation_takes_the_worse_share() -> None:
    assert chebyshev(RungValues(0.9, 0.4, 1.0), (0.6, 0.2)) == pytest.approx(0.25)


def test_variants_are_spelled_in_words() -> None:
    found = variant("wide:keep=0.7,tell_stopped=nothing,margin=1.5,sampler=random")
    assert found == Rival("wide", {"sampler": "random"}, {"keep": "0.7"}, tell_stopped="nothing", margin=1.5)
    with pytest.raises(UserError, match="unknown key 'kept'"):
        variant("wide:kept=0.7")
    with pytest.raises(UserError, match="has no value"):
        variant("wide:keep")


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_curves(tmp_path_factory.mktemp("curves"))


def test_rivals_differ_in_sampler_and_stopping_alone(curves: Path) -> None:
    problem = Problem("curves", str(curves), "even")
    ours = problem.config(OURS, 3).model_dump(mode="json")
    assert ours["search"]["points"]
    for rival in (*stock_rivals(), *asha_rivals(), variant("narrow:keep=0.2,training=fractions")):
        tree = problem.config(rival, 3).model_dump(mode="json")
        assert tree["search"] | {"sampler": ours["search"]["sampler"]} == ours["search"]
        assert tree | {"search": ours["search"], "stopping": ours["stopping"]} == ours
    assert problem.config(variant("narrow:keep=0.2"), 3).stopping.keep == 0.2


@pytest.mark.timeout(30)
def test_budget_pays_for_whole_trials_on_full_accelerators(curves: Path) -> None:
    problem = Problem("curves", str(curves), "even")
    hardware = Hardware(gpus=2, share=0.25, crowding=0.1)
    assert budget_s(problem, hardware, 40) == pytest.approx(40 * mean_cost_s(problem) * 0.25 * 1.3)


@pytest.mark.timeout(30)
def test_benchmark_goes_on_where_it_was(curves: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.md"
    # So few trials that the dear sampler of the space file is not asked for one.
    words = ["--curves", str(curves), "--seeds", "2", "--jobs", "1", "--budget-trials", "4", "--gpus", "1"]
    words += ["--compare", "narrow:keep=0.2", "--out", str(out)]
    assert main(words) == 0
    first = out.read_text()
    assert "### learning curves, even runs" in first
    assert "| narrow |" in first
    assert capsys.readouterr().out.strip() == first.strip()
    parts = sorted((tmp_path / "table.md.parts").rglob("*.json"))
    assert len(parts) == 4
    changed = json.loads(parts[0].read_text()) | {"states": {"COMPLETE": 77}}
    parts[0].write_text(json.dumps(changed))
    parts[1].unlink()
    assert main(words) == 0
    assert len(capsys.readouterr().err.splitlines()) == 1  # the one that was missing
    assert "complete" in out.read_text()
    assert parts[1].is_file()


@pytest.mark.timeout(30)
def test_recorded_trials_are_searched_by_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_recorded(tmp_path / "trials.parquet")
    words = ["--recorded", str(file), "--seeds", "1", "--jobs", "1", "--budget-trials", "5", "--rivals", "random"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "### recorded trials, cifar10 cnn7 0.03137" in told
    assert "surrogate, 5-fold cross-validation, n = 60" in told
    assert "| random |" in told
    assert main(["--recorded", str(tmp_path / "none")]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_stock_rivals_see_what_optunas_own_study_would_hold() -> None:
    """Ours alone is told what is expected: else the rival would have half of what it is compared with."""
    for rival in stock_rivals():
        assert not is_by_values(rival.tell_stopped)
        assert rival.stopping == {"verification": False, "training": "off"}
    assert is_by_values(OURS.tell_stopped)
