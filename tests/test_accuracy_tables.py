"""Tables of accuracies: the same budget for every method, texts that say what was measured, kills that cost nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import accuracy_tables
from benchmarks.accuracy_tables import (
    LIPSCHITZ,
    METHODS,
    SETTINGS,
    TABLES,
    Job,
    Plan,
    Report,
    Row,
    Setting,
    Table,
    difference,
    is_significant,
    mean_and_spread,
)
from ccdist.config import DataConfig, NetworkConfig, ThreatModel

ROOT = Path(__file__).parent.parent
PLAN = Plan(SETTINGS, TABLES)
# A value from the middle of each grid, where a test needs some pick.
PICKS = {pair: list(PLAN.grid(*pair))[1] for pair in PLAN.tuned}

TINY = Setting(
    title="digits",
    data=DataConfig(name="digits", validation_images=20),
    threat=ThreatModel(epsilon="1/20"),
    network=NetworkConfig(name="mlp", width=8),
    teacher={"epochs": 1, "attack": {"steps": 1, "step_size": 1}},
    student={"epochs": 12, "epsilon_schedule": {"warm_up": 0, "ramp": "1/2"}, "attack": {"steps": 1, "step_size": 1}},
    alphas=(0.5, 0.25),
    num_images=20,
)
TINY_TABLE = Table(
    "Two methods",
    (Row("CC-Dist", "tiny"), Row("CC-IBP", "tiny", "CC-IBP")),
    (("distillation: CC-Dist - CC-IBP", "CC-Dist", "CC-IBP"),),
)
TINY_PLAN = Plan({"tiny": TINY}, {"methods": TINY_TABLE})
# One method with one value: what is really trained here.
KILLED_SETTINGS = {"tiny": TINY.model_copy(update={"alphas": (0.5,)})}
KILLED_TABLES = {"one": Table("One method", (Row("CC-Dist", "tiny"),))}


def write_result(out: Path, job: Job, standard: float, adversarial: float, certified: float, by_ibp: int = 0) -> None:
    """What a finished job leaves, made up."""
    accuracies = {"standard": standard, "adversarial": adversarial, "certified": certified, "num_images": 20}
    path = out / "results" / f"{job.id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"accuracies": accuracies, "rungs": {"ibp": by_ibp}, "train_seconds": 1.0}))


# --- the plan


def test_every_method_of_a_setting_has_the_same_number_of_tries() -> None:
    tries = {pair: len(PLAN.grid(*pair)) for pair in PLAN.tuned}
    assert len(tries) == 15  # four methods in three settings, two and the 1-Lipschitz network in the Euclidean one
    assert set(tries.values()) == {3}


def test_methods_of_a_setting_differ_in_their_loss_only() -> None:
    rows = [row for row in TABLES["methods_mnist_0.1"].rows if row.alpha_of is None]
    students = [PLAN.row_jobs(row, PICKS)[0].student for row in rows]
    assert [row.label for row in rows] == list(METHODS)
    budgets = [student.model_dump(exclude={"loss"}) for student in students if student is not None]
    assert all(budget == budgets[0] for budget in budgets)


def test_tuning_reads_validation_images_and_the_tables_test_images() -> None:
    assert {job.part for job in PLAN.tuning_jobs()} == {"validation"}
    assert {job.part for job in PLAN.test_jobs(PICKS)} == {"test"}


def test_results_do_not_depend_on_what_auto_means_on_a_machine() -> None:
    jobs = [*PLAN.tuning_jobs(), *PLAN.test_jobs(PICKS)]
    assert not [job for job in jobs if "auto" in job.model_dump_json()]


def test_a_precision_row_changes_the_student_and_not_its_teacher() -> None:
    jobs = [PLAN.row_jobs(row, PICKS)[0] for row in TABLES["precision_mnist_0.1"].rows]
    precisions = [job.model_dump()["student"]["precision"] for job in jobs]
    lowered = [[name for name, value in precision.items() if value == "bfloat16"] for precision in precisions]
    assert lowered == [[], ["attack"], ["teacher"], ["training"]]
    assert all(job.teacher == jobs[0].teacher for job in jobs)


def test_what_tables_share_is_trained_once() -> None:
    shared = [
        PLAN.row_jobs(TABLES[name].rows[0], PICKS)
        for name in ("methods_mnist_0.1", "precision_mnist_0.1", "teachers", "activations")
    ]
    assert all(jobs == shared[0] for jobs in shared)
    jobs = PLAN.test_jobs(PICKS)
    assert len({job.id for job in jobs}) == len(jobs)


def test_the_network_of_the_picked_value_is_not_trained_again() -> None:
    tried = PLAN.grid("mnist_0.1", "CC-Dist")[PICKS["mnist_0.1", "CC-Dist"]]
    final = PLAN.row_jobs(TABLES["methods_mnist_0.1"].rows[0], PICKS)[0]
    assert final.network_id == tried.network_id
    assert final.id != tried.id


def test_another_activation_is_the_teachers_too() -> None:
    tanh = next(row for row in TABLES["activations"].rows if row.label == "tanh")
    for job in PLAN.row_jobs(tanh, PICKS):
        values = job.model_dump()
        assert values["teacher"]["network"]["activation"] == values["student"]["network"]["activation"] == "tanh"


# --- picks and texts


def test_the_pick_is_the_try_with_the_largest_sum_of_standard_and_certified(tmp_path: Path) -> None:
    low, high = TINY_PLAN.grid("tiny", "CC-Dist").values()
    write_result(tmp_path, low, 0.9, 0.8, 0.5)
    write_result(tmp_path, high, 0.8, 0.7, 0.65)
    assert TINY_PLAN.picks(tmp_path) == {("tiny", "CC-Dist"): 0.25}  # no result of CC-IBP: nothing to pick from


def test_a_cell_is_the_mean_and_the_sample_deviation() -> None:
    assert mean_and_spread([0.8, 0.9, 1.0]) == "0.900 ± 0.100"
    assert mean_and_spread([0.5]) == "0.500"
    assert mean_and_spread([]) == "-"


def test_a_difference_has_its_sign_and_a_star_beyond_chance() -> None:
    # mean 0.02, deviation 0.01: t = 0.02 / (0.01 / sqrt 3) = 3.46, below 4.303
    assert difference([0.01, 0.02, 0.03]) == "+0.020 ± 0.010"
    # mean -0.03, deviation 0.01: t = 5.2
    assert difference([-0.02, -0.03, -0.04]) == "-0.030 ± 0.010 *"
    assert difference([-0.001, 0.0, 0.0005]) == "+0.000 ± 0.001"
    assert difference([]) == "-"


@pytest.mark.parametrize(("values", "expected"), [([0.1], False), ([0.0] * 3, False), ([0.1] * 3, True)])
def test_significance_of_differences_without_spread(values: list[float], expected: bool) -> None:
    assert is_significant(values) is expected


def test_the_text_of_a_table(tmp_path: Path) -> None:
    picks = _made_up(tmp_path)
    assert TINY_PLAN.picks(tmp_path) == picks
    assert Report(TINY_PLAN, tmp_path).text() == EXPECTED


def _made_up(out: Path) -> dict[tuple[str, str], float]:
    """Results of all jobs but one: the third seed of CC-IBP."""
    for method in ("CC-Dist", "CC-IBP"):
        for value, job in TINY_PLAN.grid("tiny", method).items():
            write_result(out, job, 0.9, 0.8, value)
    picks = {("tiny", "CC-Dist"): 0.5, ("tiny", "CC-IBP"): 0.5}
    dist, ibp = (TINY_PLAN.row_jobs(row, picks) for row in TINY_TABLE.rows)
    for job, standard in zip(dist, (0.9, 0.8, 1.0), strict=True):
        write_result(out, job, standard, 0.75, 0.5, by_ibp=5)
        write_result(out, job.of_teacher, 1.0, 0.5, 0.0)
    for job, standard in zip(ibp[:2], (0.85, 0.75), strict=True):
        write_result(out, job, standard, 0.75, 0.25, by_ibp=5)
    return picks


EXPECTED = """\
### Values tried on validation images (seed 0; bold: picked)

| setting | method | value 1: standard / certified | value 2: standard / certified |
| --- | --- | --- | --- |
| digits | CC-Dist | **0.5: 0.900 / 0.500** | 0.25: 0.900 / 0.250 |
| digits | CC-IBP | **0.5: 0.900 / 0.500** | 0.25: 0.900 / 0.250 |

### Teachers

| setting | teacher | standard | PGD |
| --- | --- | --- | --- |
| digits | pgd, relu | 1.000 ± 0.000 | 0.500 ± 0.000 |

### Two methods

|  | alpha | standard | PGD | certified | of it by IBP | n |
| --- | --- | --- | --- | --- | --- | --- |
| CC-Dist | 0.5 | 0.900 ± 0.100 | 0.750 ± 0.000 | 0.500 ± 0.000 | 0.250 ± 0.000 | 3 |
| CC-IBP | 0.5 | 0.800 ± 0.071 | 0.750 ± 0.000 | 0.250 ± 0.000 | 0.250 ± 0.000 | 2 |

| difference, paired by seed | standard | PGD | certified | n |
| --- | --- | --- | --- | --- |
| distillation: CC-Dist - CC-IBP | +0.050 ± 0.000 * | +0.000 ± 0.000 | +0.250 ± 0.000 * | 2 |"""


def test_without_results_the_tables_are_empty_and_whole(tmp_path: Path) -> None:
    text = Report(PLAN, tmp_path).text()
    assert all(table.title in text for table in TABLES.values())
    assert "± " not in text


def test_one_and_the_same_network_is_not_compared_with_itself(tmp_path: Path) -> None:
    rows = (Row("CC-IBP", "tiny", "CC-IBP"), Row("same", "tiny", "CC-IBP", alpha_of="CC-Dist"))
    plan = Plan({"tiny": TINY}, {"methods": Table("same", rows, (("CC-IBP - same", "CC-IBP", "same"),))})
    for method in ("CC-Dist", "CC-IBP"):
        for job in plan.grid("tiny", method).values():
            write_result(tmp_path, job, 0.9, 0.8, 0.5)
    for job in plan.test_jobs(plan.picks(tmp_path)):
        write_result(tmp_path, job, 0.9, 0.8, 0.5)
    assert Report(plan, tmp_path).text().splitlines()[-1] == "| CC-IBP - same | - | - | - | 0 |"


def test_an_unknown_table_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy_tables.main(["--only", "methods_svhn"])
    assert "methods_mnist_0.1" in capsys.readouterr().err


# --- jobs


def test_a_lipschitz_job_is_certified_by_its_margins(tmp_path: Path) -> None:
    tiny = TINY.model_copy(
        update={
            "threat": ThreatModel(norm="l2", epsilon="1/10"),
            "lipschitz": {"width": 32, "depth": 1, "epochs": 5},
            "num_images": 40,
        }
    )
    job = accuracy_tables.make_job({"tiny": tiny}, Row(LIPSCHITZ, "tiny", LIPSCHITZ), 1.0, 0, "test")
    result = accuracy_tables.finish(job, tmp_path)
    accuracies, rungs = result["accuracies"], result["rungs"]
    assert 0.5 < accuracies["certified"] <= accuracies["adversarial"] <= accuracies["standard"]
    assert sum(rungs.values()) == 40
    assert rungs["lipschitz"] == round(40 * accuracies["certified"])
    assert accuracy_tables.stored_result(tmp_path, job) == result


SCRIPT = """
import sys
from benchmarks.accuracy_tables import main
from test_accuracy_tables import KILLED_SETTINGS, KILLED_TABLES

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], KILLED_SETTINGS, KILLED_TABLES))
"""


@pytest.mark.timeout(60)
def test_a_killed_call_goes_on_and_does_nothing_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed in the middle of a student: its workers end too, and the next call takes up its state."""
    out, script = tmp_path / "out", tmp_path / "tiny.py"
    script.write_text(SCRIPT)
    arguments = ["--out", str(out), "--processes", "1"]
    command = [sys.executable, str(script), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    _wait_for(lambda: list((out / "networks").glob("*.state.safetensors")) and _results(out))
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert first.stdout is not None
    first.stdout.read()  # ends when the last worker does: it holds the same pipe
    first.stdout.close()
    before, states = _results(out), list((out / "networks").glob("*.state.safetensors"))
    assert states, "the kill came after the training; give the student more epochs"

    assert accuracy_tables.main(arguments, KILLED_SETTINGS, KILLED_TABLES) == 0
    after = _results(out)
    assert {path: after[path] for path in before} == before
    assert not list((out / "networks").glob("*.state.safetensors"))
    plan = Plan(KILLED_SETTINGS, KILLED_TABLES)
    jobs = [*plan.tuning_jobs(), *plan.test_jobs(plan.picks(out))]
    teachers = {job.of_teacher.id for job in jobs if job.teacher is not None}
    assert {path.stem for path in after} == {job.id for job in jobs} | teachers
    assert Report(plan, out).text() in capsys.readouterr().out
    _check_stored(next(iter(after)))


def _results(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (out / "results").glob("*.json")}


def _wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _check_stored(path: Path) -> None:
    """What a number is made of stands beside it."""
    result = json.loads(path.read_text())
    assert Job.model_validate(result["job"]).id == path.stem
    assert {"torch", "python", "commit"} <= result["versions"].keys()
    assert sum(result["rungs"].values()) == result["accuracies"]["num_images"] == 20
    assert result["train_seconds"] > 0
