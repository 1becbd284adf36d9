"""One trial: what it leaves behind, where it goes on, and how it fails. Training is faked but for one test."""

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError
from studies import config_of

from ccdist import checkpoint
from ccdist.activations import Activation
from ccdist.config import DataConfig, StudentConfig, TeacherConfig, ThreatModel, VerifyConfig
from ccdist.data import Dataset, ImageSet, load_dataset, to_pixels
from ccdist.networks import Network, build_network
from ccdist.training import EpochReport, NonFiniteLossError, TrainingResult, train_student
from ccdist.verification import accuracies, verify
from search.artifacts.disk_space import DiskFullError, StorageAwayError
from search.artifacts.leases import Lease
from search.artifacts.places import TrialPlaces, discard, load_result
from search.config import StoppingConfig
from search.space import Space
from search.studies.records import RungValues, TrialResult
from search.teachers import TeacherStore, teacher_key
from search.trial import TrialTask, resume_verification, run_trial
from search.trials import endings, verifying
from search.trials.endings import conclude_stopped, conclude_training_stopped, failure_reason
from search.trials.reports import WaitingForTeacher
from search.trials.rung_values import common_order
from tracking.journal import ArtifactRow, EndRow, MetricsRow, StartRow, read_rows

CPU = torch.device("cpu")
KEY = "tiny-0000"
PARAMS = {"loss": "cc_dist", "alpha": 0.5, "beta": 5.0, "warm_up": 0.05, "steps": 1}
pytestmark = pytest.mark.timeout(20)  # the first import of the verifier


def images_of(count: int, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.randint(3, (count,), generator=generator))


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return Dataset("noise", images_of(32, 0), images_of(16, 1), 3, (0.0,), (1.0,), False, 0, "fingerprint")


def task_of(folder: Path, params: dict[str, Any] = PARAMS, **changes: Any) -> TrialTask:
    config = config_of(folder, **changes)
    places = TrialPlaces.of(folder / "artifacts", "tiny", KEY)
    return TrialTask(KEY, Space(config).recipe(params, 0), params, places, config.stopping)


def network_of(dataset: Dataset, seed: int) -> Network:
    shape, classes = dataset.input_shape, dataset.num_classes
    network = build_network("mlp", input_shape=shape, num_classes=classes, width=8, seed=seed)
    return network.eval().requires_grad_(False)


class Recorder:
    """Reports as they come: (kind, what). Raises SystemExit, as Tune does, at the first that `stops` says yes to."""

    def __init__(self, stops: Callable[[str, Any], bool] = lambda kind, what: False) -> None:
        self.seen: list[tuple[str, Any]] = []
        self.stops = stops

    def advanced(self, phase: str, done: int, of: int) -> None:
        self._take("advanced", (phase, done, of))

    def rung(self, name: str, values: RungValues) -> None:
        self._take("rung", (name, values))

    def verifying(self, result: TrialResult, phase: str, done: int, of: int) -> None:
        self._take("verifying", (result, phase, done, of))

    def of(self, kind: str) -> list[Any]:
        return [what for each, what in self.seen if each == kind]

    def _take(self, kind: str, what: Any) -> None:
        self.seen.append((kind, what))
        if self.stops(kind, what):
            raise SystemExit(0)


class Killed(BaseException):
    """In the place of a signal."""


class Fakes:
    """Trainings that take no time, and how often each was asked for."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[str] = []
        self.error = error

    def teacher(self, dataset: Dataset, threat: ThreatModel, config: TeacherConfig, **rest: Any) -> TrainingResult:
        self.calls.append("teacher")
        return self._train("teacher", dataset, config, rest["on_epoch"])

    def student(
        self,
        dataset: Dataset,
        threat: ThreatModel,
        config: StudentConfig,
        teacher: Network | None,
        *,
        state_path: Path,
        on_epoch: Callable[[EpochReport], None],
        device: torch.device,
    ) -> TrainingResult:
        self.calls.append("student" if teacher is None else "student with teacher")
        checkpoint.save_state(state_path, {}, {"seconds": 0.0, "epoch": 0})
        if self.error is not None:
            raise self.error
        return self._train("student", dataset, config, on_epoch)

    def _train(self, phase: Any, dataset: Dataset, config: Any, on_epoch: Callable[[EpochReport], None]) -> Any:
        network = network_of(dataset, config.seed)
        history = []
        for epoch in range(1, config.epochs + 1):
            history.append({"loss": 1 / epoch})
            on_epoch(EpochReport(phase, epoch, config.epochs, history[-1], 0.25, network))
        return TrainingResult(network, history, 0.25 * config.epochs)


def run(task: TrialTask, dataset: Dataset, fakes: Fakes, reports: Recorder | None = None) -> TrialResult:
    return run_trial(
        task,
        dataset,
        device=CPU,
        reports=reports or Recorder(),
        train_teacher_fn=fakes.teacher,
        train_student_fn=fakes.student,
    )


def journal_rows(task: TrialTask) -> list[Any]:
    return [line.row for line in read_rows(task.places.journal)[0]]


def test_a_trial_leaves_everything_behind(tmp_path: Path, dataset: Dataset) -> None:
    task, fakes = task_of(tmp_path), Fakes()
    result = run(task, dataset, fakes)
    assert fakes.calls == ["teacher", "student with teacher"]
    assert sorted(path.name for path in task.places.folder.iterdir()) == [
        "lock",
        "result.json",
        "student",
        "verdicts.parquet",
        "verdicts_head.json",
    ]
    assert json.loads(task.places.result.read_text()) == asdict(result)
    assert load_result(task.places) == result
    table = pq.read_table(task.places.verdicts)
    measured = accuracies(table)
    assert table.num_rows == result.num_images == 16
    assert result.standard_accuracy == measured.standard
    assert result.adversarial_accuracy == measured.adversarial
    assert result.certified_accuracy == measured.certified
    assert result.certified_upper == measured.certified_upper
    student = checkpoint.load(task.places.student)
    order = common_order(16)
    images, labels = dataset.validation.images[order], dataset.validation.labels[order]
    again = verify(student, to_pixels(images), labels, task.recipe.verification)
    assert again["verdict"].equals(table["verdict"].take(order))  # the table is in the order of the images
    assert table["label"].to_pylist() == dataset.validation.labels.tolist()
    assert result.costs["teacher"] == 0.25
    assert result.costs["student"] == pytest.approx(0.5, abs=0.2)  # and what it took to judge it at its rung
    assert result.seconds == pytest.approx(sum(result.costs.values()))
    assert result.verification_state == "finished"
    assert set(result.provenance) >= {"python", "torch", "ray", "optuna", "device", "commit"}
    metadata = checkpoint.load_description(task.places.student)["metadata"]
    assert metadata["key"] == KEY
    assert metadata["recipe"] == task.recipe.model_dump(mode="json")
    assert len(list(task.places.teachers.glob("*/teacher.json"))) == 1


def test_the_journal_tells_the_whole_trial(tmp_path: Path, dataset: Dataset) -> None:
    task = task_of(tmp_path)
    result = run(task, dataset, Fakes())
    rows = journal_rows(task)
    assert isinstance(rows[0], StartRow)
    assert rows[0].params == {name: str(value) for name, value in PARAMS.items()}
    assert json.loads(rows[0].tags["cert.recipe"])["threat"]["epsilon"] == "1/10"
    epochs = [row for row in rows if isinstance(row, MetricsRow)]
    assert [row.step for row in epochs] == [1, 1, 1, 2]
    assert set(epochs[2].values) == {"rung/standard_accuracy", "rung/certified_accuracy", "rung/seconds"}
    assert set(epochs[0].values) == {"teacher/loss", "teacher/epoch_seconds"}
    assert set(epochs[1].values) == {
        "student/loss",
        "student/epoch_seconds",
        "validation/standard_accuracy",
        "validation/ibp_certified_accuracy",
    }
    assert [(row.folder, Path(row.path).name) for row in rows if isinstance(row, ArtifactRow)] == [
        ("student", "student"),
        ("verification", "verdicts.parquet"),
        ("verification", "verdicts_head.json"),
    ]
    end = rows[-1]
    assert isinstance(end, EndRow)
    assert end.status == "FINISHED"
    assert end.values["standard_accuracy"] == result.standard_accuracy
    assert end.values["certified_accuracy"] == result.certified_accuracy
    assert end.values["certified_upper"] == result.certified_upper
    assert end.values["seconds"] == result.seconds
    assert set(end.values) >= {f"cost/{part}_seconds" for part in ("teacher", "student", "verification", "waiting")}
    assert end.tags["cert.state"] == "COMPLETE"
    assert (rows[0].tags["cert.state"], rows[0].tags["cert.method"]) == ("RUNNING", "cc_dist")
    assert rows[0].tags["cert.seed"] == str(task.recipe.student.seed)
    assert "cert.configuration" not in rows[0].tags  # it belongs to no study


def test_the_first_verdicts_can_be_shown_as_a_table(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "HEAD_ROWS", 5)
    task = replace(task_of(tmp_path), configuration="0123")
    run(task, dataset, Fakes())
    shown = json.loads(task.places.verdicts_shown.read_text())
    table = pq.read_table(task.places.verdicts)
    assert shown["columns"] == table.column_names
    assert shown["data"] == [list(row.values()) for row in table.slice(0, 5).to_pylist()]
    start, *_, end = journal_rows(task)
    assert start.tags["cert.configuration"] == "0123"
    assert json.loads(end.tags["mlflow.loggedArtifacts"]) == [
        {"path": "verification/verdicts_head.json", "type": "table"}
    ]


def test_reports_name_phases_and_rungs(tmp_path: Path, dataset: Dataset) -> None:
    reports = Recorder()
    result = run(task_of(tmp_path), dataset, Fakes(), reports)
    assert reports.of("advanced") == [("teacher", 1, 1), ("student", 1, 2), ("student", 2, 2)]
    assert [kind for kind, _ in reports.seen[:4]] == ["advanced", "advanced", "rung", "advanced"]
    told = reports.of("verifying")
    assert [phase for _, phase, _, _ in told] == ["clean", "pgd", "ibp", "crown"]
    assert all(0 <= done <= of == 16 for _, _, done, of in told)
    for partial, _, _, _ in told:
        assert partial.verification_state == "stopped"
        assert partial.certified_accuracy <= result.certified_accuracy
        assert partial.certified_upper >= result.certified_upper
        assert partial.standard_accuracy == result.standard_accuracy
    assert told[-1][0].worst == result.worst
    assert told[-1][0].best == result.best


def test_a_second_call_returns_the_stored_result(tmp_path: Path, dataset: Dataset) -> None:
    task, fakes = task_of(tmp_path), Fakes()
    first = run(task, dataset, fakes)
    rows = journal_rows(task)
    assert run(task, dataset, fakes) == first
    assert fakes.calls == ["teacher", "student with teacher"]
    assert journal_rows(task) == rows


def test_a_trial_cut_off_after_its_student_is_verified_only(tmp_path: Path, dataset: Dataset) -> None:
    task, fakes = task_of(tmp_path), Fakes()
    first = run(task, dataset, fakes)
    task.places.result.unlink()
    task.places.verdicts.unlink()
    second = run(task, dataset, fakes)
    assert fakes.calls == ["teacher", "student with teacher"]
    assert second.standard_accuracy == first.standard_accuracy
    assert second.certified_accuracy == first.certified_accuracy
    assert second.costs["student"] == first.costs["student"]
    assert second.costs["teacher"] == 0.0
    assert load_result(task.places) == second


def test_a_result_that_cannot_be_read_is_made_again(tmp_path: Path, dataset: Dataset) -> None:
    task, fakes = task_of(tmp_path), Fakes()
    first = run(task, dataset, fakes)
    for content in ("", '{"standard_accuracy": 0.5', "[]", '{"unknown": 1}', "null"):
        task.places.result.write_text(content)
        assert load_result(task.places) is None
        assert not task.places.result.exists()
    assert run(task, dataset, fakes).certified_accuracy == first.certified_accuracy
    assert fakes.calls == ["teacher", "student with teacher"]


def test_a_teacher_is_shared_and_paid_for_once(tmp_path: Path, dataset: Dataset) -> None:
    fakes, first = Fakes(), task_of(tmp_path)
    places = TrialPlaces.of(tmp_path / "artifacts", "tiny", "tiny-0001")
    second = TrialTask("tiny-0001", Space(config_of(tmp_path)).recipe(PARAMS, 1), PARAMS, places, StoppingConfig())
    results = [run(task, dataset, fakes) for task in (first, second)]
    assert fakes.calls == ["teacher", "student with teacher", "student with teacher"]
    assert [result.costs["teacher"] for result in results] == [0.25, 0.0]
    teachers = {checkpoint.load_description(t.places.student)["metadata"]["teacher"] for t in (first, second)}
    assert len(teachers) == 1


@pytest.mark.parametrize("cut_off_in", ["student", "verifying"])
def test_a_trial_that_was_cut_off_still_bears_the_cost_of_its_teacher(
    cut_off_in: str, tmp_path: Path, dataset: Dataset
) -> None:
    task, fakes = task_of(tmp_path), Fakes()
    with pytest.raises(SystemExit):
        run(task, dataset, fakes, Recorder(lambda kind, what: cut_off_in in (kind, what[0])))
    assert run(task, dataset, fakes).costs["teacher"] == 0.25
    assert fakes.calls.count("teacher") == 1
    assert not task.places.teacher_seconds.exists()


def test_a_student_without_distillation_has_no_teacher(tmp_path: Path, dataset: Dataset) -> None:
    fakes = Fakes()
    params = {"loss": "no_distillation", "alpha": 0.5, "warm_up": 0.05, "steps": 1}
    result = run(task_of(tmp_path, params), dataset, fakes)
    assert fakes.calls == ["student"]
    assert result.costs["teacher"] == 0.0
    assert not (tmp_path / "artifacts" / "teachers").exists()


def test_a_failure_is_raised_and_written_down_and_can_be_tried_again(tmp_path: Path, dataset: Dataset) -> None:
    task = task_of(tmp_path)
    fakes = Fakes(NonFiniteLossError("the student's loss is not finite at step 7"))
    with pytest.raises(NonFiniteLossError):
        run(task, dataset, fakes)
    assert load_result(task.places) is None
    end = journal_rows(task)[-1]
    assert isinstance(end, EndRow)
    assert end.status == "FAILED"
    assert end.tags["cert.reason"] == "not finite: the student's loss is not finite at step 7"
    assert task.places.state.exists()  # the next run goes on from it
    fakes.error = None
    result = run(task, dataset, fakes)
    assert load_result(task.places) == result
    assert not task.places.state.exists()
    assert [row.kind for row in journal_rows(task) if row.kind in ("start", "end")] == ["start", "end"] * 2


def test_a_network_with_numbers_that_are_not_finite_certifies_nothing(tmp_path: Path, dataset: Dataset) -> None:
    class Broken(Fakes):
        def _train(self, phase: Any, dataset: Dataset, config: Any, on_epoch: Any) -> TrainingResult:
            network = network_of(dataset, 0)
            network.head.weight.fill_(float("nan"))
            return TrainingResult(network, [], 1.0)

    result = run(task_of(tmp_path), dataset, Broken())
    assert (result.standard_accuracy, result.certified_accuracy, result.certified_upper) == (0, 0, 0)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to\n allocate 2 GiB"), "out of memory: CUDA out of memory."),
        (MemoryError(), "out of memory"),
        (NonFiniteLossError("at step 3"), "not finite: at step 3"),
        (ValueError("two\nlines"), "ValueError: two lines"),
        (KeyError("x"), "KeyError: 'x'"),
        (RuntimeError("y" * 1000), "RuntimeError: " + "y" * 500),
    ],
)
def test_a_reason_is_one_line_of_kind_and_text(error: Exception, reason: str) -> None:
    told = failure_reason(error)
    assert told.startswith(reason)
    assert "\n" not in told
    assert len(told) < 600


@pytest.mark.timeout(60)
def test_digits_are_really_trained(tmp_path: Path) -> None:
    """The whole chain on real images, and the same result from the same recipe in another place."""
    digits = load_dataset(DataConfig(name="digits", train_images=192, validation_images=48))
    params = PARAMS | {"alpha": 0.1}
    results = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rate = {"kind": "multi_step", "initial": 0.01}
        task = task_of(tmp_path / name, params, student__epochs=4, student__learning_rate=rate, network__width=32)
        results.append(run_trial(task, digits, device=CPU, reports=Recorder()))
    first, second = (
        {name: getattr(result, name) for name in ("standard_accuracy", "adversarial_accuracy", "certified_accuracy")}
        for result in results
    )
    assert first == second
    assert first["standard_accuracy"] > 0.3  # ten classes: guessing is right one time in ten
    history = checkpoint.load_description(task.places.student)["metadata"]["history"]
    assert len(history) == 4
    assert history[-1]["epsilon"] == pytest.approx(0.1)


def test_a_students_last_epoch_is_not_trained_twice(tmp_path: Path) -> None:
    """Killed between two epochs, a real training goes on from its state and ends as if it had not been killed."""
    digits = load_dataset(DataConfig(name="digits", train_images=96, validation_images=32))
    epochs: list[int] = []

    def die_in_the_second_epoch(*args: Any, **kwargs: Any) -> TrainingResult:
        inner = kwargs.pop("on_epoch")

        def on_epoch(report: EpochReport) -> None:
            epochs.append(report.epoch)
            inner(report)
            if len(epochs) == 1:
                raise Killed

        return train_student(*args, on_epoch=on_epoch, **kwargs)

    params = {"loss": "no_distillation", "alpha": 0.1, "warm_up": 0.0, "steps": 1}
    task = task_of(tmp_path, params, student__epochs=3, stopping=False)
    for _ in range(2):
        try:
            result = run_trial(task, digits, device=CPU, reports=Recorder(), train_student_fn=die_in_the_second_epoch)
        except Killed:
            assert task.places.state.exists()
    assert epochs == [1, 2, 3]
    (tmp_path / "whole").mkdir()
    whole = run_trial(task_of(tmp_path / "whole", params, student__epochs=3), digits, device=CPU, reports=Recorder())
    assert result.standard_accuracy == whole.standard_accuracy
    assert result.certified_upper == whole.certified_upper
    metrics = [row for row in journal_rows(task) if isinstance(row, MetricsRow)]
    assert [row.step for row in metrics] == [1, 2, 3]


def curve(task: TrialTask, name: str) -> dict[int, float | None]:
    rows = [row for row in journal_rows(task) if isinstance(row, MetricsRow) and name in row.values]
    assert len({row.step for row in rows}) == len(rows), "a step was told twice"
    return {row.step: row.values[name] for row in rows}


def test_an_epoch_killed_before_its_row_is_told_later(tmp_path: Path, digits: Dataset) -> None:
    """The state of an epoch is stored first; whoever goes on from it finds the epoch's metrics there."""
    whole, task = digits_task(tmp_path / "whole"), digits_task(tmp_path / "cut")
    run_trial(whole, digits, device=CPU, reports=Recorder())
    deaths = {2, 6}  # in mid-training, and after the last epoch

    def train(*args: Any, on_epoch: Callable[[EpochReport], None], **kwargs: Any) -> TrainingResult:
        def told(report: EpochReport) -> None:
            if report.epoch in deaths:
                deaths.remove(report.epoch)
                raise Killed
            on_epoch(report)

        return train_student(*args, on_epoch=told, **kwargs)

    for _ in range(2):
        with pytest.raises(Killed):
            run_trial(task, digits, device=CPU, reports=Recorder(), train_student_fn=train)
    run_trial(task, digits, device=CPU, reports=Recorder(), train_student_fn=train)
    assert curve(task, "student/loss") == curve(whole, "student/loss")
    assert sorted(curve(task, "student/loss")) == [1, 2, 3, 4, 5, 6]


def digits_task(folder: Path, **changes: Any) -> TrialTask:
    """A real training that is over in a moment: six epochs, epsilon at its target after three."""
    folder.mkdir(exist_ok=True)
    params = {"loss": "no_distillation", "alpha": 0.1, "warm_up": 0.0, "steps": 1}
    rate = {"kind": "multi_step", "initial": 0.01}
    return task_of(folder, params, student__epochs=6, student__learning_rate=rate, **changes)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DataConfig(name="digits", train_images=96, validation_images=48))


def accuracies_of(values: RungValues) -> tuple[float, float]:
    return values.standard_accuracy, values.certified_accuracy


def is_rung(name: str) -> Callable[[str, Any], bool]:
    return lambda kind, what: kind == "rung" and what[0] == name


def test_a_trial_stopped_at_a_rung_goes_on_from_there(tmp_path: Path, digits: Dataset) -> None:
    """Stopped, then killed before a rung was written down: the same rungs, and the result of a trial left alone."""
    whole, names = Recorder(), ["after-ramp 0", "after-ramp 1/3", "after-ramp 2/3"]
    expected = run_trial(digits_task(tmp_path / "whole"), digits, device=CPU, reports=whole)
    rungs = dict(whole.of("rung"))
    assert list(rungs) == names
    assert [values.seconds for values in rungs.values()] == sorted(values.seconds for values in rungs.values())
    task = digits_task(tmp_path / "cut")
    first, second, third = (Recorder(is_rung("after-ramp 1/3")), Recorder(is_rung("after-ramp 1/3")), Recorder())
    for reports in (first, second):
        with pytest.raises(SystemExit):
            run_trial(task, digits, device=CPU, reports=reports)
    assert first.of("rung") == second.of("rung")
    assert second.of("advanced") == []  # nothing was trained again
    assert task.places.state.exists()
    assert [row.kind for row in journal_rows(task) if row.kind in ("start", "end")] == ["start"] * 2
    kept = json.loads(task.places.rungs.read_text())
    task.places.rungs.write_text(json.dumps({"after-ramp 0": kept["after-ramp 0"]}))  # killed before the next one
    result = run_trial(task, digits, device=CPU, reports=third)
    assert {name: accuracies_of(values) for name, values in third.of("rung")} == {
        name: accuracies_of(values) for name, values in rungs.items()
    }
    assert [step[1] for step in third.of("advanced")] == [5, 6]
    assert (result.worst, result.best) == (expected.worst, expected.best)
    assert result.costs["student"] >= third.of("rung")[-1][1].seconds


def test_shortened_recipes_come_first_and_once(tmp_path: Path, dataset: Dataset) -> None:
    task = task_of(tmp_path, student__epochs=9, stopping={"training": "fractions"})
    fakes, first, second = Fakes(), Recorder(is_rung("1/3")), Recorder()
    with pytest.raises(SystemExit):
        run(task, dataset, fakes, first)
    assert [kind for kind, _ in first.seen[1:]] == ["advanced", "rung", *["advanced"] * 3, "rung"]
    assert first.of("advanced")[1:] == [("student 1/9", 1, 1), *[("student 1/3", epoch, 3) for epoch in (1, 2, 3)]]
    result = run(task, dataset, fakes, second)
    assert fakes.calls == ["teacher", *["student with teacher"] * 3]
    assert [name for name, _ in second.of("rung")] == ["1/9", "1/3"]
    assert second.of("rung") == first.of("rung")
    assert second.of("advanced") == [("student", epoch, 9) for epoch in range(1, 10)]
    assert result.costs["student"] == pytest.approx((1 + 3 + 9) * 0.25, abs=0.3)
    assert not task.places.stages.exists()
    curves = {name for row in journal_rows(task) if isinstance(row, MetricsRow) for name in row.values}
    assert {"student_1_9/loss", "student_1_3/loss", "student/loss"} <= curves


def test_without_stopping_nothing_is_judged(tmp_path: Path, dataset: Dataset) -> None:
    reports = Recorder()
    run(task_of(tmp_path, stopping={"training": "off"}), dataset, Fakes(), reports)
    assert reports.of("rung") == []


def test_what_a_report_counts_is_on_disk(tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk: the interval narrows, its verdicts are stored, and one stopped there ends as if it were not."""
    monkeypatch.setattr(verifying, "REPORT_INTERVAL_S", 0.0)
    monkeypatch.setattr(verifying, "RESTS", 0.0)  # the fake driver reads files before it answers
    tasks = []
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        tasks.append(task_of(tmp_path / name, verification={"batch_size": 3}))
    whole, cut = tasks
    stored: list[bool] = []

    def look(kind: str, what: Any) -> bool:
        if kind == "verifying":
            table = verifying.partial_verdicts(whole.places)
            assert table is not None
            measured, result = accuracies(table), what[0]
            stored.append((measured.certified, measured.certified_upper) == (result.worst[1], result.best[1]))
        return False

    reports = Recorder(look)
    expected = run(whole, dataset, Fakes(), reports)
    told = [result for result, *_ in reports.of("verifying")]
    assert len(told) > 10
    assert stored == [True] * len(told)
    lower, upper = ([getattr(result, name) for result in told] for name in ("certified_accuracy", "certified_upper"))
    assert lower == sorted(lower)
    assert upper == sorted(upper, reverse=True)
    fakes = Fakes()
    for decided in (11, 13):
        with pytest.raises(SystemExit):
            run(
                cut,
                dataset,
                fakes,
                Recorder(lambda kind, what, least=decided: kind == "verifying" and what[2] >= least),
            )
    result = run(cut, dataset, fakes)
    assert fakes.calls == ["teacher", "student with teacher"]
    assert (result.worst, result.best) == (expected.worst, expected.best)
    tables = [pq.read_table(task.places.verdicts) for task in tasks]
    assert tables[0]["verdict"].equals(tables[1]["verdict"])


def stopped_trial(task: TrialTask, dataset: Dataset, phase: str, reason: str = "cannot reach the front") -> TrialResult:
    """The result of a trial whose verification is stopped at the end of a rung."""
    reports = Recorder(lambda kind, what: kind == "verifying" and what[1] == phase)
    with pytest.raises(SystemExit):
        run(task, dataset, Fakes(), reports)
    return conclude_stopped(task.places, reports.of("verifying")[-1][0], reason)


def test_a_stopped_verification_keeps_its_interval(tmp_path: Path, dataset: Dataset) -> None:
    task = task_of(tmp_path)
    result = stopped_trial(task, dataset, "ibp")
    assert (result.verification_state, result.reason) == ("stopped", "cannot reach the front")
    measured = accuracies(pq.read_table(task.places.verdicts))
    assert (measured.certified, measured.certified_upper) == (result.certified_accuracy, result.certified_upper)
    assert result.certified_accuracy < result.certified_upper
    # The rung of intervals decides by proofs alone: all that is open is expected to be proved as well.
    assert result.expected_certified == (result.certified_upper if result.certified_accuracy else 0)
    assert load_result(task.places) == result
    assert run(task, dataset, Fakes()) == conclude_stopped(task.places, result, "another") == result
    assert sorted(path.name for path in task.places.folder.iterdir()) == [
        "lock",
        "result.json",
        "student",
        "verdicts.parquet",
        "verdicts_head.json",
    ]
    end = journal_rows(task)[-1]
    assert isinstance(end, EndRow)
    assert (end.status, end.tags["cert.state"], end.tags["cert.verification"]) == ("FINISHED", "COMPLETE", "stopped")
    assert end.tags["cert.reason"] == "cannot reach the front"


def test_expected_accuracy_follows_the_rung_that_decided() -> None:
    """Of 8 images 2 are proved, 2 falsified, 4 open; of what the rung decided, 2 of 3 were proved: 2/8 + 4/8 * 2/3."""
    verdicts = ["certified"] * 2 + ["falsified"] * 2 + ["undecided"] * 4
    table = pa.table({"verdict": verdicts, "method": ["crown"] * 2 + ["clean", "crown"] + [""] * 4})
    spent = verifying.Spent({"teacher": 1.0, "student": 2.0}, {})
    result = verifying.result_of(table, spent, 0.5, state="stopped", share=2 / 3)
    assert result.expected_certified == pytest.approx(2 / 8 + 4 / 8 * 2 / 3)
    assert result.told == (7 / 8, result.expected_certified)
    assert (result.worst, result.best) == ((7 / 8, 2 / 8), (7 / 8, 6 / 8))
    assert (result.costs, result.seconds) == ({"teacher": 1.0, "student": 2.0, "verification": 0.5}, 3.5)


@pytest.mark.parametrize("rungs", [["ibp"], ["pgd", "ibp", "branch_and_bound"]])
def test_a_resumed_verification_decides_what_was_open(tmp_path: Path, dataset: Dataset, rungs: list[str]) -> None:
    """Of a ladder that came to its end, and of one that was stopped before it had proved anything."""
    limits = {"max_branches": 1, "root_steps": 1, "steps": 1}
    task = task_of(tmp_path, verification={"rungs": rungs, "branch_and_bound": limits})
    before = stopped_trial(task, dataset, "pgd") if len(rungs) == 3 else run(task, dataset, Fakes())
    known = pq.read_table(task.places.verdicts)
    assert before.certified_accuracy < before.certified_upper

    def resume(reports: Recorder) -> TrialResult:
        return resume_verification(task, dataset, device=CPU, timeout_factor=1000.0, reports=reports)

    with pytest.raises(SystemExit):
        resume(Recorder(lambda kind, what: kind == "verifying"))
    assert load_result(task.places) == before
    reports = Recorder()
    after = resume(reports)
    assert load_result(task.places) == after
    assert after.verification_state == "finished"
    assert after.certified_accuracy == after.certified_upper  # networks of 8 units hide nothing
    told = [result for result, *_ in reports.of("verifying")]
    assert all(before.certified_accuracy <= each.certified_accuracy <= after.certified_accuracy for each in told)
    table = pq.read_table(task.places.verdicts)
    decided = [index for index, verdict in enumerate(known["verdict"].to_pylist()) if verdict != "undecided"]
    assert table["verdict"].take(decided).equals(known["verdict"].take(decided))
    assert table["method"].take(decided).equals(known["method"].take(decided))
    assert accuracies(table).certified == after.certified_accuracy
    assert after.costs["verification"] > before.costs["verification"]
    assert after.provenance["timeout_factor"] == "1000"
    assert not task.places.verification.exists()


def test_limits_grow_where_they_can() -> None:
    limits = {"timeout_s": 20.0, "total_timeout_s": None, "max_branches": 10}
    ladder = VerifyConfig(threat={"epsilon": "1/10"}, rungs=["pgd", "crown"], branch_and_bound=limits)

    def larger(activation: Activation, *, done: bool) -> VerifyConfig:
        return verifying.with_larger_limits(ladder, 2.5, activation, rungs_are_done=done)

    grown = larger("relu", done=True).branch_and_bound
    assert (grown.timeout_s, grown.total_timeout_s, grown.max_branches) == (50.0, None, 25)
    assert larger("relu", done=True).rungs == ("branch_and_bound",)
    assert larger("relu", done=False).rungs == ("pgd", "crown")  # its own ladder, to the end
    assert larger("tanh", done=True).rungs == ()


def test_a_stopped_training_leaves_nothing_heavy(tmp_path: Path, digits: Dataset) -> None:
    task = digits_task(tmp_path)
    with pytest.raises(SystemExit):
        run_trial(task, digits, device=CPU, reports=Recorder(is_rung("after-ramp 0")))
    conclude_training_stopped(task.places, "dominated")
    assert [path.name for path in task.places.folder.iterdir()] == ["lock"]
    end = journal_rows(task)[-1]
    assert isinstance(end, EndRow)
    assert (end.status, end.tags) == ("FINISHED", {"cert.state": "STOPPED", "cert.reason": "dominated"})


def test_what_kills_left_unfinished_is_discarded(tmp_path: Path, dataset: Dataset) -> None:
    task = task_of(tmp_path)
    with pytest.raises(NonFiniteLossError):
        run(task, dataset, Fakes(NonFiniteLossError("at step 7")))
    (task.places.folder / ".student.abc").mkdir()
    (task.places.folder / ".state.safetensors.7").write_text("half")
    discard(task.places)
    assert [path.name for path in task.places.folder.iterdir()] == ["lock"]


def test_a_trial_steps_aside_while_another_trains_its_teacher(tmp_path: Path, dataset: Dataset) -> None:
    task, fakes = task_of(tmp_path), Fakes()
    key = teacher_key(dataset.fingerprint, task.recipe.threat, task.recipe.teacher)
    lease = TeacherStore.of(task.places.teachers).acquire(key, "another search")
    assert isinstance(lease, Lease)
    with lease:
        with pytest.raises(WaitingForTeacher, match="another search") as waiting:
            run(task, dataset, fakes)
        assert waiting.value.key == key
        assert fakes.calls == []
    assert [row.kind for row in journal_rows(task)] == ["start"]
    run(task, dataset, fakes)
    assert fakes.calls == ["teacher", "student with teacher"]


def test_a_trial_stopped_in_its_teacher_gives_it_back(tmp_path: Path, dataset: Dataset) -> None:
    first, fakes = task_of(tmp_path), Fakes()
    with pytest.raises(SystemExit):
        run(first, dataset, fakes, Recorder(lambda kind, what: what[0] == "teacher"))
    places = TrialPlaces.of(tmp_path / "artifacts", "tiny", "tiny-0001")
    run(TrialTask("tiny-0001", first.recipe, PARAMS, places, first.stopping), dataset, fakes)
    assert fakes.calls == ["teacher", "teacher", "student with teacher"]


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("ccdist.checkpoint.save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
        ("ccdist.atomic_files.pq.write_table", OSError(errno.EDQUOT, "Disk quota exceeded")),
        ("tracking.journal.os.write", OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_a_full_disk_is_no_failure(
    target: str, error: Exception, tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, fakes = task_of(tmp_path), Fakes()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(target, refuse)
        with pytest.raises(DiskFullError, match=rf"disk of {task.places.folder} is .* \([\d.]+ MiB free\)") as full:
            run(task, dataset, fakes)
    assert "\n" not in str(full.value)
    assert [row.kind for row in journal_rows(task) if row.kind == "end"] == []
    result = run(task, dataset, fakes)
    assert load_result(task.places) == result


@pytest.mark.parametrize("target", ["ccdist.atomic_files.pq.write_table", "tracking.journal.os.write"])
def test_a_folder_that_does_not_answer_is_no_failure(
    target: str, tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker waits until it does, so that the trial's next attempt finds it."""
    task, fakes, waits = task_of(tmp_path), Fakes(), []

    def stale(*args: Any, **kwargs: Any) -> None:
        if len(waits) < 4:
            raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(target, stale)
        patch.setattr("search.artifacts.disk_space.tempfile.NamedTemporaryFile", lambda dir: nullcontext(stale()))
        patch.setattr("search.studies.patience.time.sleep", waits.append)
        with pytest.raises(StorageAwayError, match=rf"^{task.places.folder}: Stale file handle$"):
            run(task, dataset, fakes)
    assert waits == [0.1, 0.2, 0.4, 0.8]
    assert [row.kind for row in journal_rows(task) if row.kind == "end"] == []
    assert load_result(task.places) is None
    result = run(task, dataset, fakes)
    assert load_result(task.places) == result


def test_other_errors_of_files_are_failures(tmp_path: Path, dataset: Dataset) -> None:
    task = task_of(tmp_path)
    with pytest.raises(PermissionError):
        run(task, dataset, Fakes(PermissionError(errno.EACCES, "Permission denied")))
    assert journal_rows(task)[-1].kind == "end"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full_loses_nothing(small_disk: Path, tmp_path: Path, digits: Dataset) -> None:
    """Filled after each epoch in turn, and freed again: the trial ends as one that never met a full disk."""
    expected = run_trial(digits_task(tmp_path / "roomy"), digits, device=CPU, reports=Recorder())
    task, ballast = digits_task(small_disk / "tight"), small_disk / "ballast"

    def fill(kind: str, what: Any) -> bool:
        if not ballast.exists() and (kind == "rung" or (kind == "verifying" and what[1] == "pgd")):
            free = os.statvfs(small_disk)
            ballast.write_bytes(bytes(free.f_bavail * free.f_bsize))
        return False

    pauses = 0
    while not task.places.result.exists():
        try:
            result = run_trial(task, digits, device=CPU, reports=Recorder(fill if pauses < 3 else lambda *_: False))
        except DiskFullError:
            pauses += 1
            ballast.unlink()
    assert pauses >= 2
    assert (result.worst, result.best) == (expected.worst, expected.best)
    ends = [row for row in journal_rows(task) if isinstance(row, EndRow)]
    assert [end.status for end in ends] == ["FINISHED"]
