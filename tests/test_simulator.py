"""Virtual time with hand-made trials; whole searches over formulae; the models of measured and recorded trials."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated import (
    Formula,
    Scripted,
    ScriptedSearcher,
    StopsAtFirstReport,
    contents,
    times,
    write_curves,
    write_recorded,
)
from studies import config_of

from search.attempts.deaths import OTHER_DEATHS, lost_seconds
from search.config import SearchConfig
from search.recipe import derive_seed
from search.scheduler import StudyScheduler
from search.scheduling.budget import accelerator_hours
from search.simulation.curve_tables import CurveTableError, read_curves
from search.simulation.curves import CurveWorkload
from search.simulation.hardware import Hardware
from search.simulation.recorded import RecordedSpace, RecordedTableError, RecordedWorkload, read_tables, recorded_config
from search.simulation.simulator import simulate
from search.simulation.surrogates import Column, Error
from search.simulation.timelines import Report, Timeline, TrainingMode, VerificationState, verification
from search.simulation.virtual_time import Clock, History, Outcome, Simulation, VirtualTeachers
from search.space import Space
from search.study import Study


@pytest.fixture(autouse=True)
def without_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests have too few finished trials for anybody to know what a trial may hope for."""
    monkeypatch.setitem(StudyScheduler.__init__.__kwdefaults__, "margin", None)


REFERENCE = (0.2, 0.1)


def run(
    workload: Scripted,
    hardware: Hardware,
    *,
    stops: tuple[str, ...] = (),
    budget_s: float = float("inf"),
    seed: int = 0,
) -> tuple[History, ScriptedSearcher]:
    """Scripted trials, all of them, under a scheduler that stops those of these keys at once."""
    clock = Clock()
    searcher = ScriptedSearcher(len(workload.lengths), clock)
    simulation = Simulation(
        searcher,  # type: ignore[arg-type]
        StopsAtFirstReport(*stops),
        workload,
        hardware,
        mode="off",
        teachers=VirtualTeachers(),
        clock=clock,
        seed=seed,
    )
    return simulation.run(budget_s), searcher


def ends(history: History) -> list[tuple[str, float, str]]:
    return [(outcome.key, outcome.seconds, outcome.state) for outcome in history.outcomes]


# ---- virtual time --------------------------------------------------------------------------------------------------


def test_events_come_in_the_order_of_their_time() -> None:
    history, searcher = run(Scripted([30, 10, 20]), Hardware(gpus=2))
    assert ends(history) == [("t-1", 10, "COMPLETE"), ("t-0", 30, "COMPLETE"), ("t-2", 30, "COMPLETE")]
    assert searcher.told == [
        (5, "t-1", "RUNNING"),
        (10, "t-1", "COMPLETE"),
        (10, "t-1", "end"),
        (15, "t-0", "RUNNING"),
        (20, "t-2", "RUNNING"),
        (30, "t-0", "COMPLETE"),
        (30, "t-0", "end"),
        (30, "t-2", "COMPLETE"),
        (30, "t-2", "end"),
    ]
    assert (history.seconds, history.accelerator_s) == (30, 60)


def test_stopped_trial_frees_its_slot_and_the_searcher_hears_of_its_end_alone() -> None:
    history, searcher = run(Scripted([30, 10]), Hardware(gpus=1), stops=("t-0",))
    assert [outcome.seconds for outcome in history.outcomes] == [15, 25]
    assert [told for told in searcher.told if told[1] == "t-0"] == [(15, "t-0", "end")]


def test_crowded_accelerator_slows_down_those_that_share_it() -> None:
    """Both do 10 s of work in 20 s; the longer one then has the accelerator, half of it paid, for 20 s alone."""
    history, _ = run(Scripted([10, 30]), Hardware(gpus=1, share=0.5, crowding=1.0))
    assert [(each.seconds, each.work_s) for each in history.outcomes] == [(20, 10), (40, 20)]
    assert history.accelerator_s == 30


def test_search_is_cut_off_at_its_budget() -> None:
    history, searcher = run(Scripted([10] * 9), Hardware(gpus=2), budget_s=50)
    assert len(history.outcomes) == 4
    assert (history.seconds, history.accelerator_s) == (25, 50)
    assert searcher.asked == 6


def test_first_who_comes_trains_the_teacher() -> None:
    history, _ = run(Scripted([10, 10], teacher_s=5), Hardware(gpus=1))
    assert [outcome.seconds for outcome in history.outcomes] == [15, 25]


def test_straggler_takes_longer() -> None:
    history, _ = run(Scripted([10]), Hardware(gpus=1, stragglers=1.0, straggler_slowdown=3.0))
    assert history.seconds == pytest.approx(30)


def test_lost_node_sends_its_trial_back_to_its_last_state() -> None:
    draws = [np.random.default_rng(derive_seed(0, "node", 0, count)).exponential(1.0) * 3600 for count in range(3)]
    hardware = Hardware(gpus=1, gpus_per_node=1, node_hours=1.0, repair_s=7)
    first, second = draws[0], draws[0] + 7 + draws[1]
    # One trial that the first loss hits after a state at 0.8 of the time, and that ends before the second.
    checkpoint = 0.8 * first
    length = first + 0.1 * draws[1]
    history, searcher = run(Scripted([length], checkpoint_s=checkpoint), hardware)
    assert ends(history) == [("t-0", pytest.approx(first + 7 + length - checkpoint), "COMPLETE")]
    assert history.accelerator_s == pytest.approx(first + length - checkpoint)
    # One that the second loss hits, too, after a state, and that ends before the third.
    checkpoint, length = first, first + draws[1] + 0.1 * draws[2]
    history, searcher = run(Scripted([length], checkpoint_s=checkpoint / 2), hardware)
    left = length - checkpoint - math.floor(draws[1] / (checkpoint / 2)) * checkpoint / 2
    assert ends(history) == [("t-0", pytest.approx(second + 7 + left), "COMPLETE")]
    assert [told[0] for told in searcher.told if told[2] == "error"] == pytest.approx([first, second])


def test_a_lost_trial_does_not_train_a_teacher_that_is_there_by_then() -> None:
    """Both nodes train it; one is lost meanwhile, and its trial goes on with the other's where that one has ended."""
    draws = [np.random.default_rng(derive_seed(9, "node", node, 0)).exponential(1.0) * 3600 for node in range(2)]
    lost, hit = min(draws), draws.index(min(draws))
    assert max(draws) > 2 * lost  # of this seed
    hardware = Hardware(gpus=2, gpus_per_node=1, node_hours=1.0, repair_s=9 * lost)
    history, _ = run(Scripted([0.1 * lost] * 2, teacher_s=1.5 * lost), hardware, seed=9)
    assert ends(history) == [
        (f"t-{1 - hit}", pytest.approx(1.6 * lost), "COMPLETE"),
        (f"t-{hit}", pytest.approx(1.7 * lost), "COMPLETE"),
    ]
    assert history.outcomes[1].work_s == pytest.approx(1.1 * lost)


def test_hypervolume_counts_what_had_ended() -> None:
    def ended(accelerator_s: float, objectives: tuple[float, float] | None) -> Outcome:
        return Outcome(0.0, accelerator_s, "key", "COMPLETE", objectives, 0.0)

    history = History((ended(10, (0.6, 0.3)), ended(15, None), ended(20, (0.4, 0.5))), 30, 30)
    # 0.4 x 0.2, and beside it 0.2 x 0.2.
    expected = [0, 0.08, 0.08, 0.12, 0.12]
    assert history.hypervolumes(REFERENCE, np.array([9.9, 10, 19.9, 20, 30])) == pytest.approx(expected)


def test_timeline_without_order_is_refused() -> None:
    with pytest.raises(ValueError, match="ascend from 0"):
        Timeline((Report(2.0, {}), Report(1.0, {})))


def test_stopped_verification_expects_what_its_last_rung_showed() -> None:
    """Clean: 20 of 100 wrong. Then 10 of 80 proved, 30 falsified: of the 40 open ones a quarter is expected."""
    states = [
        VerificationState(1, "clean", 0, 20),
        VerificationState(2, "crown", 10, 50),
        VerificationState(3, "bab", 40, 60),
    ]
    reports = verification(5.0, states, standard=0.8, num_images=100)
    assert [report.seconds for report in reports] == [6, 7, 8]
    clean, crown = (json.loads(text) for text in contents(reports, "VERIFYING", "result"))
    assert (clean["certified_accuracy"], clean["certified_upper"], clean["expected_certified"]) == (0, 0.8, 0)
    assert (crown["certified_accuracy"], crown["certified_upper"]) == (0.1, 0.5)
    assert crown["expected_certified"] == pytest.approx(0.1 + 0.4 * 0.25)
    assert (crown["verification_state"], crown["seconds"]) == ("stopped", 7)
    (last,) = (json.loads(text) for text in contents(reports, "COMPLETE", "result"))
    assert (last["certified_accuracy"], last["certified_upper"], last["expected_certified"]) == (0.4, 0.4, None)


# ---- whole searches ------------------------------------------------------------------------------------------------


def search(folder: Path, hardware: Hardware, *, settings: tuple[str, ...] = (), seed: int = 0) -> History:
    config = config_of(folder, [*settings, f"search.seed={seed}"])
    return simulate(config, Space(config), Formula(), hardware)


def test_search_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    hardware = Hardware(gpus=2, share=0.5, crowding=0.2, gpus_per_node=1, node_hours=0.1, repair_s=60, stragglers=0.3)
    settings = ("budget.trials=16", "search.sampler=tpe")
    history = search(tmp_path, hardware, settings=settings)
    assert search(tmp_path, hardware, settings=settings) == history
    assert search(tmp_path, hardware, settings=settings, seed=1) != history


def test_lost_nodes_lose_no_trial(tmp_path: Path) -> None:
    hardware = Hardware(gpus=8, gpus_per_node=1, node_hours=0.03, repair_s=30)
    history = search(tmp_path, hardware, settings=("budget.trials=40",))
    states = Counter(outcome.state for outcome in history.outcomes)
    assert states["COMPLETE"] + states["STOPPED"] == len(history.outcomes) == 40
    assert any(each.work_s > 100 + 1e-6 for each in history.outcomes)  # since it was lost after a state
    numbers = [int(outcome.key.rpartition("-")[2]) for outcome in history.outcomes]
    assert sorted(numbers) == list(range(len(numbers)))


class NeverStored(Formula):
    """As its trials, but the first point stores no state."""

    def timeline(self, params: Mapping[str, Any], seed: int, mode: TrainingMode) -> Timeline:
        known = super().timeline(params, seed, mode)
        return replace(known, checkpoint_s=1e9) if params["alpha"] == 0.5 else known


def test_losses_are_counted_as_in_a_search_with_workers(tmp_path: Path) -> None:
    """Nodes last ten seconds: a trial of 100 s that stores a state each 5 s goes on after any number of losses, what it
    lost is paid, and one that stores none is given up."""
    studies: list[Study] = []

    def scheduler(study: Study) -> StudyScheduler:
        studies.append(study)
        return StudyScheduler(study)

    config = config_of(tmp_path, ["budget.trials=6", "stopping=false"])
    hardware = Hardware(gpus=2, gpus_per_node=1, node_hours=0.002, repair_s=1)
    history = simulate(config, Space(config), NeverStored(), hardware, make_scheduler=scheduler)
    (study,) = studies
    assert Counter(outcome.state for outcome in history.outcomes) == {"COMPLETE": 6, "FAILED": 1}
    (given_up,) = [outcome for outcome in history.outcomes if outcome.state == "FAILED"]
    assert given_up.key == study.trials()[0].key
    assert len(study.trials()[0].deaths) == OTHER_DEATHS + 1
    assert max(len(trial.deaths) for trial in study.trials()[1:]) > OTHER_DEATHS
    assert accelerator_hours(study.trials(), config.resources) == pytest.approx(history.accelerator_s / 3600)
    for trial, outcome in zip(study.trials(), sorted(history.outcomes, key=lambda each: each.key), strict=True):
        assert (trial.seconds or 0.0) + lost_seconds(trial.deaths) == pytest.approx(outcome.work_s)


def test_rules_stop_trials_and_their_seconds_are_saved(tmp_path: Path) -> None:
    stopping = search(tmp_path, Hardware(gpus=4), settings=("budget.trials=30",))
    whole = search(tmp_path, Hardware(gpus=4), settings=("budget.trials=30", "stopping=false"))
    assert {outcome.state for outcome in whole.outcomes} == {"COMPLETE"}
    assert whole.accelerator_s == pytest.approx(30 * 100)
    stopped = [outcome for outcome in stopping.outcomes if outcome.state == "STOPPED"]
    assert {outcome.work_s for outcome in stopped} <= {30, 40, 50}
    ended_early = [each for each in stopping.outcomes if each.verification_s is not None and each.verification_s < 40]
    assert stopped
    assert ended_early
    assert stopping.accelerator_s < 0.8 * whole.accelerator_s
    # The same random trials, of which none that could reach the front was stopped.
    end = np.array([np.inf])
    assert stopping.hypervolumes(REFERENCE, end) == pytest.approx(whole.hypervolumes(REFERENCE, end), rel=0.02)


# ---- models --------------------------------------------------------------------------------------------------------


def test_parameters_as_features() -> None:
    assert Column.of("rate", [0.001, 0.1]).features(0.01) == [pytest.approx(0.5)]  # logarithmic
    assert Column.of("epochs", [10, 30, None]).features(15) == [0.25, 0.0]
    assert Column.of("epochs", [10, 30, None]).features(None) == [0.5, 1.0]
    assert Column.of("loss", ["b", "a", "b"]).features("b") == [0.0, 1.0]


def test_error_of_predictions() -> None:
    error = Error.of("x", np.array([1.0, 3.0, 2.0]), np.array([1.0, 2.0, 3.0]))
    assert error == ("x", pytest.approx(0.0), pytest.approx(2 / 3), pytest.approx(0.5), 3)


@pytest.mark.timeout(30)
def test_recorded_trials_become_a_workload(tmp_path: Path) -> None:
    (table,) = read_tables(write_recorded(tmp_path / "trials.parquet"))
    workload = RecordedWorkload(table)
    standard, _, hours = workload.errors()
    assert standard.spearman > 0.7
    assert hours.r2 > 0.8
    config = recorded_config(table)
    space = RecordedSpace(config, table)
    assert set(space.parameters) == {"method", "learning_rate", "epochs", "optimizer", "alpha"}
    assert space.parameters["alpha"].branch == (("method", "mtl_ibp"),)
    whole = config.model_dump(mode="json")
    tree = whole | {"budget": {"trials": 12}, "search": whole["search"] | {"sampler": {"kind": "random"}}}
    short = SearchConfig.model_validate(tree)
    history = simulate(short, RecordedSpace(short, table), workload, Hardware(gpus=4))
    found = [outcome.objectives for outcome in history.outcomes]
    assert len(found) == 12
    low, high = table.targets[:, :2].min(axis=0) - 1e-3, table.targets[:, :2].max(axis=0) + 1e-3
    assert np.all((np.array(found) >= low) & (np.array(found) <= high))


def test_recorded_file_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordedTableError, match="there is no file"):
        read_tables(tmp_path / "none.parquet")
    with pytest.raises(RecordedTableError, match="lacks architecture, certified_accuracy"):
        read_tables(write_curves(tmp_path) / "runs.parquet")
    with pytest.raises(CurveTableError, match=r"lacks runs\.parquet"):
        read_curves(tmp_path / "none")


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_curves(tmp_path_factory.mktemp("curves"))


def params(**changes: Any) -> dict[str, Any]:
    fixed = {"loss": "cc_dist", "alpha": 0.1, "beta": 5.0, "warm_up": 0.0, "ramp": 0.25, "train_epsilon_factor": 1.5}
    return fixed | {"l1": 1e-6} | changes


def test_curves_are_split_by_parity(curves: Path) -> None:
    even, odd = (read_curves(curves, half).runs for half in ("even", "odd"))  # type: ignore[arg-type]
    assert [run.number for run in even] == list(range(0, 32, 2))
    assert [run.number for run in odd] == list(range(1, 32, 2))
    assert [run.number for run in read_curves(curves).runs] == list(range(32))


@pytest.mark.timeout(30)
def test_curves_become_a_workload(curves: Path) -> None:
    workload = CurveWorkload.of(curves)
    for measured_standard, measured_certified, standard, certified in workload.agreements().values():
        assert (standard, certified) == pytest.approx((measured_standard, measured_certified), abs=0.06)
    by_name = {error.target: error for error in workload.errors()}
    assert by_name["certified_accuracy"].spearman > 0.9
    half = CurveWorkload.of(curves, "even")
    assert half.errors_on(read_curves(curves, "odd").runs)[1].spearman > 0.9

    timeline = workload.timeline(params(), 7, "rungs")
    assert timeline == workload.timeline(params(), 7, "rungs")
    assert timeline != workload.timeline(params(), 8, "rungs")
    # Epochs 5, 9 and 14 of 18 end at or after a quarter, a half and three quarters of the epochs.
    assert contents(timeline.reports, "RUNG", "rung") == ["after-ramp 0", "after-ramp 1/3", "after-ramp 2/3"]
    seconds = times(timeline, "RUNG")
    assert (seconds[1] - 0.2) / (seconds[0] - 0.1) == pytest.approx(9 / 5, rel=0.01)
    assert (seconds[2] - 0.3) / (seconds[0] - 0.1) == pytest.approx(14 / 5, rel=0.01)
    assert workload.teacher(params(loss="no_distillation")) is None
    assert timeline.teacher is not None
    assert timeline.teacher.seconds == 10
    whole = workload.timeline(params(), 7, "off")
    fractions = workload.timeline(params(), 7, "fractions")
    assert times(whole, "RUNG") == []
    assert contents(fractions.reports, "RUNG", "rung") == ["1/9", "1/3"]
    assert fractions.seconds > whole.seconds + 5
    # A longer ramp: its last rung would be the training's end.
    late = workload.timeline(params(ramp=0.85), 7, "rungs")
    assert contents(late.reports, "RUNG", "rung") == ["after-ramp 0", "after-ramp 1/3"]


def test_verification_of_a_modelled_trial_narrows_to_its_end(curves: Path) -> None:
    workload = CurveWorkload.of(curves, "even")
    for seed in range(5):
        reports = workload.timeline(params(alpha=0.02), seed, "off").reports
        told = [json.loads(report.content["result"]) for report in reports]
        for before, after in itertools.pairwise(told):
            assert before["certified_accuracy"] <= after["certified_accuracy"]
            assert before["certified_upper"] >= after["certified_upper"]
        last = told[-1]
        assert last["certified_accuracy"] <= last["certified_upper"] <= last["standard_accuracy"]
        assert reports[-1].content["state"] == "COMPLETE"
