"""What a trial leaves of its student for MLflow: written once, told before the trial ends, never a reason to fail."""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from studies import config_of
from test_trial import CPU, KEY, PARAMS, Fakes, Recorder, images_of

from ccdist import checkpoint
from ccdist.data import Dataset
from search.artifacts.disk_space import DiskFullError
from search.artifacts.places import TrialPlaces, save_result
from search.space import Space
from search.studies.records import TrialResult
from search.trial import TrialTask, resume_verification, run_trial
from search.trials import student_model
from search.trials.endings import conclude_stopped
from search.trials.student_model import PROGRAM
from tracking.journal import EndRow, ModelRow, Row, read_rows

pytestmark = pytest.mark.timeout(60)  # the first import of the verifier, and of what an export needs of PyTorch


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return Dataset("noise", images_of(32, 0), images_of(16, 1), 3, (0.0,), (1.0,), False, 0, "fingerprint", "test")


def task_of(folder: Path, *, exports: bool = True, **changes: Any) -> TrialTask:
    config = config_of(folder, **changes)
    places = TrialPlaces.of(folder / "artifacts", "tiny", KEY)
    return TrialTask(KEY, Space(config).recipe(PARAMS, 0), PARAMS, places, config.stopping, exports=exports)


def run(task: TrialTask, dataset: Dataset, reports: Recorder | None = None) -> TrialResult:
    fakes, reports = Fakes(), reports or Recorder()
    trainings = {"train_teacher_fn": fakes.teacher, "train_student_fn": fakes.student}
    return run_trial(task, dataset, device=CPU, reports=reports, **trainings)


def rows_of(task: TrialTask) -> list[Row]:
    return [line.row for line in read_rows(task.places.journal)[0]]


def models_of(task: TrialTask) -> list[ModelRow]:
    return [row for row in rows_of(task) if isinstance(row, ModelRow)]


def check_program(task: TrialTask, row: ModelRow) -> None:
    """The row's files are the stored student, and compute what it computes."""
    own, *files = [(task.places.journal.parent / path).resolve() for path in (row.program, *row.files)]
    images = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    student = checkpoint.load(task.places.student)
    assert torch.equal(torch.export.load(own).module()(images), student(images))
    assert files == [task.places.student / name for name in (checkpoint.WEIGHTS, checkpoint.NETWORK)]


def test_a_finished_trial_tells_of_its_model_before_its_end(tmp_path: Path, dataset: Dataset) -> None:
    task = task_of(tmp_path)
    result = run(task, dataset)
    *_, last = rows_of(task)
    (row,) = models_of(task)
    assert isinstance(last, EndRow)
    assert "cert.model_failure" not in last.tags
    assert last.values["cost/export_seconds"] is not None
    assert (row.name, row.dataset, row.dataset_digest) == (KEY, "noise-test", "fingerprint")
    assert (row.input_shape, row.num_outputs, row.torch_version) == ([1, 4, 4], 3, torch.__version__)
    assert row.values == {name: getattr(result, name) for name in row.values}
    assert {"standard_accuracy", "certified_accuracy"} <= row.values.keys()
    assert row.metadata["threat"] == "linf 1/10"
    check_program(task, row)


def test_trials_of_a_study_share_a_graph(tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    run(task_of(tmp_path), dataset)
    monkeypatch.setattr(torch.export, "export", None)  # whoever traces fails
    other = replace(
        task_of(tmp_path), key="tiny-0001", places=TrialPlaces.of(tmp_path / "artifacts", "tiny", "tiny-0001")
    )
    run(other, dataset)
    (row,) = models_of(other)
    check_program(other, row)


def test_a_search_that_wants_no_models_writes_none(tmp_path: Path, dataset: Dataset) -> None:
    task = task_of(tmp_path, exports=False)
    run(task, dataset)
    assert models_of(task) == []
    assert not task.places.model.exists()


def test_a_trial_whose_verification_is_stopped_has_a_model(tmp_path: Path, dataset: Dataset) -> None:
    """The driver ends it; the program is there, because the worker wrote it first."""
    task = task_of(tmp_path)
    reports = Recorder(lambda kind, what: kind == "verifying")
    with pytest.raises(SystemExit):
        run(task, dataset, reports)
    assert models_of(task) == []
    ((partial, *_),) = reports.of("verifying")
    conclude_stopped(task.places, partial, "dominated")
    (row,) = models_of(task)
    assert row.values["certified_upper"] == partial.certified_upper
    check_program(task, row)


def test_what_is_there_is_not_exported_again(tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(tmp_path)
    with pytest.raises(SystemExit):
        run(task, dataset, Recorder(lambda kind, what: kind == "verifying"))
    monkeypatch.setattr(student_model, "save_program", None)  # a call would be a failure of the export
    run(task, dataset)
    (row,) = models_of(task)
    check_program(task, row)


def test_a_resumed_verification_adds_to_the_model(tmp_path: Path, dataset: Dataset) -> None:
    """Also where the trial ran before there were models."""
    task = task_of(tmp_path, exports=False)
    run(task, dataset)
    for count in (1, 2):
        again = task_of(tmp_path)
        resume_verification(again, dataset, device=CPU, timeout_factor=2.0, reports=Recorder())
        assert len(models_of(again)) == count
    assert {row.name for row in models_of(again)} == {KEY}


def test_a_reason_goes_when_the_verification_goes_on(tmp_path: Path, dataset: Dataset) -> None:
    task = task_of(tmp_path)
    result = run(task, dataset)
    save_result(task.places, replace(result, reason="dominated by another", verification_state="stopped"))
    refined = resume_verification(task, dataset, device=CPU, timeout_factor=2.0, reports=Recorder())
    first, last = [row.tags for row in rows_of(task) if isinstance(row, EndRow)]
    assert refined.reason is None
    assert "cert.reason" not in first
    assert last["cert.reason"] == ""  # MLflow has no other way to take back what a tag says


def raising(error: Exception) -> Callable[..., None]:
    def save(path: Path, *rest: Any, **options: Any) -> None:
        path.write_bytes(b"half")
        raise error

    return save


def test_an_export_that_fails_costs_the_model_and_nothing_else(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task = task_of(tmp_path)
    monkeypatch.setattr(student_model, "save_program", raising(RuntimeError("no such\noperator")))
    result = run(task, dataset)
    assert result.verification_state == "finished"
    assert models_of(task) == []
    *_, last = rows_of(task)
    assert isinstance(last, EndRow)
    assert last.status == "FINISHED"
    assert last.tags["cert.model_failure"] == "RuntimeError: no such operator"
    assert len(caplog.records) == 1
    assert not (task.places.model / PROGRAM).exists()


def test_a_full_disk_pauses_the_trial_and_the_next_run_has_the_model(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(student_model, "save_program", raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(DiskFullError):
            run(task, dataset)
    assert not task.places.model.exists()
    run(task, dataset)
    (row,) = models_of(task)
    check_program(task, row)
    assert [path.name for path in task.places.folder.iterdir() if path.name.startswith(".")] == []
