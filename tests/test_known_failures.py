"""Known failures of a search that is put together from stock parts, and the test that each cannot happen here.

| failure | tests |
|---|---|
| a NaN or a missing metric leaves an Optuna trial RUNNING for ever | test_no_metric_and_no_number_ends_a_trial, \
test_study.py::test_what_is_not_finite_is_never_stored_and_leaves_no_trial_running |
| one report without a metric aborts the whole fit | test_reports_may_hold_what_they_like |
| a trial that was stopped early is told as if complete | test_a_stopped_training_has_no_values, \
test_a_stopped_verification_is_told_by_its_interval, test_sampling.py::test_what_is_told_of_a_stopped_trial |
| an errored trial that succeeds when it is tried again never reaches the study | \
test_a_trial_whose_worker_died_succeeds_under_its_own_number, \
test_searcher.py::test_a_worker_that_died_after_its_result_has_finished |
| the scheduler's state is lost on restart | test_a_new_scheduler_has_every_rung_of_the_last_one, \
test_scheduler.py::test_one_made_from_the_study_decides_as_the_one_that_lived |
| MLflow shows six runs for four trials after a kill, two of them RUNNING for ever | \
test_end_to_end.py::test_a_killed_driver_loses_and_doubles_nothing, test_kills.py::test_twelve_kills_change_nothing, \
test_tracking_mlflow.py::test_runs_doubled_by_a_repeated_request_become_one |
| an existing study silently keeps other directions, or another space | \
test_study.py::test_other_directions_are_refused, \
test_study.py::test_another_space_is_refused_with_the_first_difference |
| `seed=0` is treated as unset | test_seed_zero_is_a_seed, \
test_study.py::test_random_suggestions_depend_on_seed_and_number_only |
| points to try first raise with two objectives | \
test_study.py::test_each_point_is_enqueued_once_also_after_a_kill_between_two |
| repeating a configuration with other seeds raises with two objectives | \
test_sampling.py::test_the_front_of_the_means_gets_further_seeds |
| Tune's own state, torn by a kill, starts a fresh search without a word | test_nothing_of_tune_is_left_to_restore, \
test_searcher.py::test_pickling_carries_nothing |
| a journal with a torn last line cannot be opened after the next append | \
test_tracking_journal.py::test_a_torn_last_line_is_ignored_and_cut_by_the_next_writer |
| a study kept in MLflow cannot be read once a run has further metrics | \
test_end_to_end.py::test_mlflow_holds_the_whole_study |

What lies in Ray Tune is shown by one real search of seven trials, one after the other, whose trainings are scripts.
"""

import ast
import functools
import io
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState
from ray import cloudpickle, tune
from ray.tune.schedulers import TrialScheduler
from rich.console import Console
from studies import FINGERPRINT, config_of, open_study, result

from ccdist.data import Dataset, ImageSet
from search import execution, worker
from search.clusters import cluster
from search.execution import Outcome, execute
from search.scheduler import StudyScheduler
from search.space import Space
from search.storage import Storage
from search.studies.records import RungValues, TrialResult
from search.suggestions.sampling import suggest
from search.suggestions.sampling_view import History
from search.trial import TrialTask
from search.trials.reports import Reports
from search.worker import Suggestion

pytestmark = pytest.mark.timeout(300)  # Ray, and two workers that import torch, on a machine that may be busy

NAN = float("nan")
RUNG = "after-ramp 0"
CERTIFIED_FLOOR = 0.3

# The trials by number. Those that fail come early, as the search ends with its fifth result.
WHOLE, SILENT, NO_NUMBER, STOPPED, CUT, DYING, BLIND = range(7)
WHOLE_RESULT = result(0.9, 0.5)
# Nobody can reach the other's worst corner from here, and its lower end is below the floor.
CUT_RESULT = result(0.7, 0.1, certified_upper=0.3, verification_state="stopped", expected_certified=0.2)
AT_RUNG = {
    WHOLE: RungValues(0.8, 0.5, 2.0),
    STOPPED: RungValues(0.5, 0.1, 7.0),
    DYING: RungValues(0.7, 0.6, 2.0),
    BLIND: RungValues(NAN, 0.6, 2.0),
}
RESULTS = {
    WHOLE: WHOLE_RESULT,
    NO_NUMBER: result(0.6, 0.4, expected_certified=NAN),
    DYING: result(0.8, 0.6),
    BLIND: result(0.6, 0.7),
}


# ---- one search with Ray Tune --------------------------------------------------------------------------------------


def scripted(task: TrialTask, dataset: Dataset, *, device: torch.device, reports: Reports) -> TrialResult:
    """In the place of a trial's training and verification: what its number stands for."""
    number, folder = int(task.key[-4:]), task.places.folder
    folder.mkdir(parents=True, exist_ok=True)
    if number == WHOLE:
        tune.report({"loss": NAN})  # neither a key nor a state
        reports.advanced("student", 1, 2)
    if number in AT_RUNG:
        reports.rung(RUNG, AT_RUNG[number])
    if number == WHOLE:
        reports.verifying(replace(WHOLE_RESULT, verification_state="stopped"), "crown", 50, 100)
    if number == CUT:
        reports.verifying(CUT_RESULT, "crown", 50, 100)
    if number == DYING and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "end").touch()
    return RESULTS.get(number, WHOLE_RESULT)


def trainable(config: dict[str, Any], **given: Any) -> None:
    """The worker's own, around a script; one trial returns without a word."""
    if int(Suggestion.from_config(config).key[-4:]) == SILENT:
        return
    worker.run_trial = scripted
    worker.trainable(config, **given)


@dataclass(frozen=True)
class Finished:
    """A search that is over."""

    outcome: Outcome
    storage: Storage
    printed: str
    left_by_tune: list[Path]

    @property
    def trials(self) -> list[FrozenTrial]:
        """As Optuna has them."""
        return optuna.load_study(study_name="tiny", storage=self.storage.study_url).trials

    def reached_its_end(self, number: int) -> bool:
        return (self.storage.artifacts / "tiny" / "trials" / f"tiny-{number:04d}" / "end").exists()


@pytest.fixture(scope="module", autouse=True)
def without_margin() -> Iterator[None]:
    """These searches are too short for anybody to know what a trial may hope for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(StudyScheduler.__init__.__kwdefaults__, "margin", None)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder, scratch = tmp_path_factory.mktemp("search"), tmp_path_factory.mktemp("scratch")
    config = config_of(
        folder,
        budget__trials=5,
        search__floors={"certified_accuracy": CERTIFIED_FLOOR},
        stopping__peers=1,
        resources__concurrency=1,
        tracking__enabled=False,
    )
    images = ImageSet(torch.zeros((2, 1, 8, 8), dtype=torch.uint8), torch.tensor([0, 1]))
    dataset = Dataset("noise", images, images, 2, (0.0,), (1.0,), False, 0, FINGERPRINT)
    storage, printed = Storage.of(config, str(folder / "storage")), io.StringIO()
    storage.prepare()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster._ENVIRONMENT.items():  # taken back at the end, as `connected` sets them for good
            patch.setenv(name, value)
        patch.setenv("TUNE_MAX_PENDING_TRIALS_PG", "1")
        patch.setenv("RAY_prestart_worker_first_driver", "0")  # a process for each core, none of which runs a trial
        for name in ("RAY_ADDRESS", "TUNE_DISABLE_STRICT_METRIC_CHECKING"):
            patch.delenv(name, raising=False)
        patch.setattr("search.clusters.addresses.read_ray_address", lambda: None)
        patch.setattr(tempfile, "tempdir", str(scratch))
        patch.setattr(execution, "trainable", trainable)
        patch.setattr(execution, "close_study", lambda *anything: None)  # figures take seconds
        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not find the tests
        try:
            with storage.only_driver("tiny") as lock:
                outcome = execute(config, Space(config), storage, dataset, Console(file=printed, width=1000), lock)
        finally:
            cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    return Finished(outcome, storage, printed.getvalue(), list(scratch.iterdir()))


def test_no_metric_and_no_number_ends_a_trial(finished: Finished) -> None:
    trials, records = finished.trials, finished.outcome.record.trials
    assert [trial.state for trial in trials if not trial.state.is_finished()] == []
    assert (trials[SILENT].state, trials[NO_NUMBER].state) == (TrialState.FAIL, TrialState.FAIL)
    assert "worker died: it ended without a report" in (records[SILENT].reason or "")
    assert records[NO_NUMBER].reason == "not finite: expected_certified is nan"
    # A rung's values are only a stand-in: without them the trial is not judged there, and goes on.
    assert (trials[BLIND].state, trials[BLIND].values) == (TrialState.COMPLETE, [0.6, 0.7])
    assert records[BLIND].rungs == {}
    assert f"warning: trial tiny-{BLIND:04d} could not be judged" in finished.printed
    assert "nan" not in json.dumps([[trial.values, trial.user_attrs.get("rungs")] for trial in trials]).lower()


def test_reports_may_hold_what_they_like(finished: Finished) -> None:
    """The first trial reports no key, then progress, a rung, an interval and a result: no two have the same fields."""
    assert finished.outcome.stop_reason is None
    assert (len(finished.outcome.record.done), len(finished.trials)) == (5, 7)
    whole = finished.trials[WHOLE]
    assert (whole.state, whole.values) == (TrialState.COMPLETE, [0.9, 0.5])
    assert finished.outcome.record.trials[WHOLE].rungs == {RUNG: AT_RUNG[WHOLE]}


def test_a_stopped_training_has_no_values(finished: Finished) -> None:
    stopped, record = finished.trials[STOPPED], finished.outcome.record.trials[STOPPED]
    assert (stopped.state, stopped.values) == (TrialState.PRUNED, None)
    assert (record.state, record.objectives, record.seconds) == ("STOPPED", None, 7.0)
    assert record.reason == (
        f"rung {RUNG}: not among the best 1 of 2; tiny-0000 has (0.8000, 0.5000) (standard, certified), "
        "this trial (0.5000, 0.1000)"
    )
    assert not finished.reached_its_end(STOPPED)
    assert finished.reached_its_end(WHOLE)


def test_a_stopped_verification_is_told_by_its_interval(finished: Finished) -> None:
    cut, record = finished.trials[CUT], finished.outcome.record.trials[CUT]
    assert (cut.state, cut.values) == (TrialState.COMPLETE, list(CUT_RESULT.told))
    assert cut.constraints == {"certified_accuracy": pytest.approx(CERTIFIED_FLOOR - CUT_RESULT.worst[1])}
    assert finished.trials[WHOLE].constraints == {"certified_accuracy": pytest.approx(CERTIFIED_FLOOR - 0.5)}
    assert (record.objectives, record.certified_upper) == (CUT_RESULT.worst, 0.3)
    assert record.verification_state == "stopped"
    assert (record.reason or "").startswith("cannot reach the front: tiny-0000")
    assert not finished.reached_its_end(CUT)


def test_a_trial_whose_worker_died_succeeds_under_its_own_number(finished: Finished) -> None:
    retried, record = finished.trials[DYING], finished.outcome.record.trials[DYING]
    assert (retried.state, retried.values) == (TrialState.COMPLETE, [0.8, 0.6])
    assert (record.key, record.rungs) == (f"tiny-{DYING:04d}", {RUNG: AT_RUNG[DYING]})
    assert record.reason is None
    (death,) = record.deaths
    assert (death.reason, death.attempt) == ("worker killed", 1)
    assert f"{record.key}  worker killed: it goes on from its last state" in finished.printed


def test_nothing_of_tune_is_left_to_restore(finished: Finished) -> None:
    assert finished.left_by_tune == []
    assert list(finished.storage.folder.rglob("experiment_state*")) == []
    assert list(finished.storage.folder.rglob("*.pkl")) == []


# ---- without Ray's processes ---------------------------------------------------------------------------------------


def at_rung(key: str, standard: float, certified: float) -> dict[str, Any]:
    return {"key": key, "state": "RUNG", "rung": RUNG, "values": json.dumps(asdict(RungValues(standard, certified, 1)))}


def test_a_new_scheduler_has_every_rung_of_the_last_one(tmp_path: Path) -> None:
    """Three trials are at the rung when the driver dies; the next one's trial is judged against all three."""
    config = config_of(tmp_path, stopping__peers=3)
    killed = open_study(config, tmp_path / "study.db")
    scheduler = StudyScheduler(killed)
    for standard, certified in ((0.9, 0.3), (0.8, 0.5), (0.7, 0.2)):
        report = at_rung(killed.ask().key, standard, certified)
        assert scheduler.on_trial_result(None, None, report) == TrialScheduler.CONTINUE
    study = open_study(config, tmp_path / "study.db")
    later = study.ask()
    again = StudyScheduler(study)
    assert again.on_trial_result(None, None, at_rung(later.key, 0.6, 0.1)) == TrialScheduler.STOP
    assert "not among the best 2 of 4" in again.stopped[later.key]
    # A trial that goes on under the new driver reports its rung again: it is there once, as it was.
    assert again.on_trial_result(None, None, at_rung("tiny-0001", 0.1, 0.1)) == TrialScheduler.CONTINUE
    assert [len(trial.rungs) for trial in study.trials()] == [1, 1, 1, 1]
    assert study.trials()[1].rungs[RUNG].standard_accuracy == 0.8


@pytest.mark.parametrize("kind", ["tpe", "nsga2", "nsga3", "gp", "random"])
def test_seed_zero_is_a_seed(kind: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, search__sampler=kind)
    space = Space(config)
    first, again, other = (
        suggest(config.search.sampler, seed, History(), space, floors={}).params for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


# ---- the table -----------------------------------------------------------------------------------------------------


@functools.cache
def default_tests(path: Path) -> set[str]:
    """The tests of a file that the default suite runs."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    slow = {node.name for node in functions if any("slow" in ast.unparse(each) for each in node.decorator_list)}
    return {node.name for node in functions if node.name.startswith("test_")} - slow


def test_every_named_test_exists() -> None:
    rows = [line for line in (__doc__ or "").splitlines() if line.startswith("|")][2:]
    assert len(rows) == 13
    folder = Path(__file__).parent
    for row in rows:
        named = re.findall(r"(?:(\w+\.py)::)?(test_\w+)", row)
        assert named, row
        for file, name in named:
            assert name in default_tests(folder / (file or Path(__file__).name)), f"{file}::{name}"
