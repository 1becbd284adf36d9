"""One trial: what it leaves behind, where it goes on, and how it fails. Training is faked but for one test."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from studies import config_of

from ccdist import checkpoint
from ccdist.config import DataConfig, StudentConfig, TeacherConfig, ThreatModel
from ccdist.data import Dataset, ImageSet, load_dataset, to_pixels
from ccdist.networks import Network, build_network
from ccdist.training import EpochReport, NonFiniteLossError, TrainingResult, train_student
from ccdist.verification import accuracies, verify
from search.records import TrialResult
from search.space import Space
from search.trial import TrialPlaces, TrialTask, failure_reason, load_result, run_trial
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
    recipe = Space(config_of(folder, **changes)).recipe(params, 0)
    return TrialTask(KEY, recipe, params, TrialPlaces.of(folder / "artifacts", "tiny", KEY))


def network_of(dataset: Dataset, seed: int) -> Network:
    shape, classes = dataset.input_shape, dataset.num_classes
    network = build_network("mlp", input_shape=shape, num_classes=classes, width=8, seed=seed)
    return network.eval().requires_grad_(False)


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
        state_path.parent.mkdir(parents=True, exist_ok=True)
        state_path.write_text("a state")
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


def run(task: TrialTask, dataset: Dataset, fakes: Fakes, progress: list[Any] | None = None) -> TrialResult:
    seen = [] if progress is None else progress
    return run_trial(
        task,
        dataset,
        device=CPU,
        on_progress=lambda *step: seen.append(step),
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
    again = verify(student, to_pixels(dataset.validation.images), dataset.validation.labels, task.recipe.verification)
    assert again["verdict"].equals(table["verdict"])
    assert result.costs["teacher"] == 0.25
    assert result.costs["student"] == 0.5
    assert result.seconds == pytest.approx(sum(result.costs.values()))
    assert result.verification_state == "finished"
    assert set(result.provenance) >= {"python", "torch", "ray", "optuna", "device", "commit"}
    metadata = checkpoint.load_description(task.places.student)["metadata"]
    assert metadata["key"] == KEY
    assert metadata["recipe"] == task.recipe.model_dump(mode="json")
    assert len(list(task.places.teachers.glob("*/weights.safetensors"))) == 1


def test_the_journal_tells_the_whole_trial(tmp_path: Path, dataset: Dataset) -> None:
    task = task_of(tmp_path)
    result = run(task, dataset, Fakes())
    rows = journal_rows(task)
    assert isinstance(rows[0], StartRow)
    assert rows[0].params == {name: str(value) for name, value in PARAMS.items()}
    assert json.loads(rows[0].tags["cert.recipe"])["threat"]["epsilon"] == "1/10"
    epochs = [row for row in rows if isinstance(row, MetricsRow)]
    assert [row.step for row in epochs] == [1, 1, 2]
    assert set(epochs[0].values) == {"teacher/loss", "teacher/epoch_seconds"}
    assert set(epochs[1].values) == {
        "student/loss",
        "student/epoch_seconds",
        "validation/standard_accuracy",
        "validation/ibp_certified_accuracy",
    }
    assert [row.folder for row in rows if isinstance(row, ArtifactRow)] == ["student", "verification"]
    end = rows[-1]
    assert isinstance(end, EndRow)
    assert end.status == "FINISHED"
    assert end.values["standard_accuracy"] == result.standard_accuracy
    assert end.values["certified_accuracy"] == result.certified_accuracy
    assert end.values["certified_upper"] == result.certified_upper
    assert end.values["seconds"] == result.seconds
    assert set(end.values) >= {f"cost/{part}_seconds" for part in ("teacher", "student", "verification", "waiting")}
    assert end.tags["cert.state"] == "COMPLETE"


def test_progress_names_phases_and_rungs(tmp_path: Path, dataset: Dataset) -> None:
    seen: list[tuple[str, int, int]] = []
    run(task_of(tmp_path), dataset, Fakes(), seen)
    assert seen[:3] == [("teacher", 1, 1), ("student", 1, 2), ("student", 2, 2)]
    assert [step[0] for step in seen[3:]] == ["clean", "pgd", "ibp", "crown"]
    assert all(0 <= done <= of == 16 for _, done, of in seen[3:])


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


@pytest.mark.parametrize("content", ["", '{"standard_accuracy": 0.5', "[]", '{"unknown": 1}', "null"])
def test_a_result_that_cannot_be_read_is_made_again(content: str, tmp_path: Path, dataset: Dataset) -> None:
    task, fakes = task_of(tmp_path), Fakes()
    first = run(task, dataset, fakes)
    task.places.result.write_text(content)
    second = run(task, dataset, fakes)
    assert second.certified_accuracy == first.certified_accuracy
    assert fakes.calls == ["teacher", "student with teacher"]


def test_a_teacher_is_shared_and_paid_for_once(tmp_path: Path, dataset: Dataset) -> None:
    fakes, first = Fakes(), task_of(tmp_path)
    places = TrialPlaces.of(tmp_path / "artifacts", "tiny", "tiny-0001")
    second = TrialTask("tiny-0001", Space(config_of(tmp_path)).recipe(PARAMS, 1), PARAMS, places)
    results = [run(task, dataset, fakes) for task in (first, second)]
    assert fakes.calls == ["teacher", "student with teacher", "student with teacher"]
    assert [result.costs["teacher"] for result in results] == [0.25, 0.0]
    teachers = {checkpoint.load_description(t.places.student)["metadata"]["teacher"] for t in (first, second)}
    assert len(teachers) == 1


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
        results.append(run_trial(task, digits, device=CPU, on_progress=lambda *_: None))
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

    class Killed(BaseException):
        pass

    def die_in_the_second_epoch(*args: Any, **kwargs: Any) -> TrainingResult:
        inner = kwargs.pop("on_epoch")

        def on_epoch(report: EpochReport) -> None:
            epochs.append(report.epoch)
            inner(report)
            if len(epochs) == 1:
                raise Killed

        return train_student(*args, on_epoch=on_epoch, **kwargs)

    params = {"loss": "no_distillation", "alpha": 0.1, "warm_up": 0.0, "steps": 1}
    task = task_of(tmp_path, params, student__epochs=3)
    for _ in range(2):
        try:
            result = run_trial(
                task, digits, device=CPU, on_progress=lambda *_: None, train_student_fn=die_in_the_second_epoch
            )
        except Killed:
            assert task.places.state.exists()
    assert epochs == [1, 2, 3]
    (tmp_path / "whole").mkdir()
    whole = run_trial(
        task_of(tmp_path / "whole", params, student__epochs=3), digits, device=CPU, on_progress=lambda *_: None
    )
    assert result.standard_accuracy == whole.standard_accuracy
    assert result.certified_upper == whole.certified_upper
    metrics = [row for row in journal_rows(task) if isinstance(row, MetricsRow)]
    assert [row.step for row in metrics] == [1, 2, 3]
