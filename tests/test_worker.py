"""What a worker tells Tune: one flat report for each thing that happens, and no exception."""

import errno
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from studies import config_of, result

from ccdist.data import Dataset, ImageSet
from search import worker
from search.artifacts.disk_space import DiskFullError, StorageAwayError
from search.artifacts.places import TrialPlaces, save_result
from search.artifacts.workplace import Workplace
from search.attempts.shares import Share
from search.config import ResourcesConfig, StoppingConfig
from search.space import Space
from search.studies.records import RungValues
from search.trial import TrialTask
from search.trials.reports import Reports, WaitingForTeacher
from search.worker import SharedDataset, Suggestion, TuneReports, next_timeout_factor, share_of, trainable

PARAMS = {"loss": "no_distillation", "alpha": 0.5, "warm_up": 0.05, "steps": 1}
KEY = "tiny-0003"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr(worker.tune, "report", reports.append)
    monkeypatch.setattr(worker, "keep_freed_memory", lambda: None)
    return reports


def dataset() -> Dataset:
    images = ImageSet(torch.zeros((2, 1, 4, 4), dtype=torch.uint8), torch.tensor([0, 1]))
    return Dataset("noise", images, images, 2, (0.0,), (1.0,), False, 0, "fingerprint")


def suggestion(folder: Path, *, resume: bool = False) -> Suggestion:
    return Suggestion(KEY, PARAMS, Space(config_of(folder)).recipe(PARAMS, 3), resume)


def work(folder: Path, *, resume: bool = False) -> None:
    threads = torch.get_num_threads()
    try:
        trainable(
            suggestion(folder, resume=resume).to_config(),
            workplace=Workplace(str(folder), "tiny"),
            shared=SharedDataset.of(dataset()),
            resources=ResourcesConfig(),
            stopping=StoppingConfig(training="fractions"),
        )
    finally:
        torch.set_num_threads(threads)


def running(act: Callable[[Reports], Any]) -> Callable[..., Any]:
    """A run_trial that does something with its reports."""
    return lambda task, dataset, *, device, reports: act(reports)


def test_a_suggestion_survives_its_configuration(tmp_path: Path) -> None:
    for resume in (False, True):
        sent = suggestion(tmp_path, resume=resume)
        config = sent.to_config()
        assert Suggestion.from_config(json.loads(json.dumps(config))) == sent
        assert all(isinstance(value, str) for value in config.values())
    assert share_of(config) is None
    sent = replace(sent, share=Share(2.0, 0.5, None), deaths="1 node lost; 4 s lost")
    assert Suggestion.from_config(sent.to_config()) == sent
    assert share_of(sent.to_config()) == sent.share


@pytest.mark.parametrize(("gpu", "fraction"), [(0.25, 0.25), (1.0, 1.0), (2.0, 1.0)])
def test_a_process_takes_what_its_trial_holds(gpu: float, fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a larger share was found to be needed: the space file's is not read then."""
    done: list[tuple[Any, ...]] = []
    for name in ("set_per_process_memory_fraction", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, name=name: done.append((name, *arguments)))
    monkeypatch.setattr(worker, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: done.append(("threads", number)))
    device = torch.device("cuda", 0)
    assert worker.prepare_process(Share(3.5, gpu)) == device
    assert done == [
        ("threads", 3),
        ("set_per_process_memory_fraction", fraction, device),
        ("reset_peak_memory_stats", device),
    ]
    done.clear()
    assert worker.prepare_process(Share(0.5, 0.0)) == torch.device("cpu")
    assert done == [("threads", 1)]


def test_a_trial_runs_with_the_share_that_it_was_sent(
    tmp_path: Path, told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Any] = []
    monkeypatch.setattr(worker, "prepare_process", lambda share: held.append(share) or torch.device("cpu"))
    monkeypatch.setattr(worker, "run_trial", lambda *_, **__: result())
    for sent in (suggestion(tmp_path), replace(suggestion(tmp_path), share=Share(2.0, 0.0, 3.0))):
        trainable(
            sent.to_config(),
            workplace=Workplace(str(tmp_path), "tiny"),
            shared=SharedDataset.of(dataset()),
            resources=ResourcesConfig(cpu=1.5),
            stopping=StoppingConfig(),
        )
    assert held == [Share(1.5, 0.0), Share(2.0, 0.0, 3.0)]


def test_a_result_is_reported_with_its_key(
    tmp_path: Path, told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[TrialTask] = []

    def finish(task: TrialTask, data: Dataset, *, device: torch.device, reports: Reports) -> Any:
        tasks.append(task)
        assert torch.equal(data.validation.labels, torch.tensor([0, 1]))
        return result(0.9, 0.5)

    monkeypatch.setattr(worker, "run_trial", finish)
    work(tmp_path)
    assert [(each["key"], each["state"]) for each in told] == [(KEY, "COMPLETE")]
    assert json.loads(told[0]["result"]) == asdict(result(0.9, 0.5))
    assert tasks[0].places == TrialPlaces.of(tmp_path, "tiny", KEY)
    assert tasks[0].stopping.training == "fractions"


@pytest.mark.parametrize(
    ("error", "report"),
    [
        (WaitingForTeacher("abc", "tiny-0001"), {"state": "WAITING", "teacher": "abc"}),
        (DiskFullError("the disk of /x is full"), {"state": "PAUSED", "reason": "the disk of /x is full"}),
        (StorageAwayError("/x: Stale"), {"state": "INTERRUPTED", "reason": "storage away: /x: Stale"}),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried 2 GiB"),
            {"state": "OUT_OF_MEMORY", "reason": "out of memory: CUDA out of memory. Tried 2 GiB", "on_gpu": True},
        ),
        (MemoryError(), {"state": "OUT_OF_MEMORY", "reason": "out of memory", "on_gpu": False}),
        (ValueError("two\nlines"), {"state": "FAILED", "reason": "ValueError: two lines"}),
        (OSError(errno.EIO, "broken"), {"state": "FAILED", "reason": "OSError: [Errno 5] broken"}),
    ],
)
def test_whatever_goes_wrong_is_a_report(
    error: Exception,
    report: dict[str, str],
    tmp_path: Path,
    told: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(reports: Reports) -> None:
        raise error

    monkeypatch.setattr(worker, "run_trial", running(fail))
    work(tmp_path)
    assert told == [{"key": KEY} | report]


def test_a_stop_ends_the_worker_without_another_report(
    tmp_path: Path, told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(report: dict[str, Any]) -> None:
        told.append(report)
        raise SystemExit(0)

    monkeypatch.setattr(worker.tune, "report", stop)
    monkeypatch.setattr(worker, "run_trial", running(lambda reports: reports.rung("1/9", RungValues(0.5, 0.25, 2.0))))
    with pytest.raises(SystemExit):
        work(tmp_path)
    assert told == [
        {
            "key": KEY,
            "state": "RUNG",
            "rung": "1/9",
            "values": json.dumps({"standard_accuracy": 0.5, "certified_accuracy": 0.25, "seconds": 2.0}),
        }
    ]


def test_only_progress_waits_for_its_second(told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(worker.time, "monotonic", lambda: now[0])
    reports = TuneReports(KEY)
    partial = replace(result(), verification_state="stopped", expected_certified=0.6)
    for epoch, now[0] in enumerate([0.0, 0.4, 0.9, 1.1, 1.2], start=1):
        reports.advanced("student", epoch, 9)
    now[0] = 1.5
    reports.rung("after-ramp 0", RungValues(0.5, 0.25, 2.0))
    reports.verifying(partial, "pgd", 40, 100)
    reports.advanced("student", 9, 9)
    assert [(each["state"], each.get("step")) for each in told] == [
        ("RUNNING", 1),
        ("RUNNING", 4),
        ("RUNG", None),
        ("VERIFYING", 40),
    ]
    assert told[0] == {"key": KEY, "state": "RUNNING", "phase": "student", "step": 1, "steps": 9}
    assert json.loads(told[3]["result"]) == asdict(partial)
    assert (told[3]["phase"], told[3]["steps"]) == ("pgd", 100)


def test_a_driver_that_answers_slowly_is_asked_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    now, sent = [0.0], []

    def answered_late(_content: dict[str, Any]) -> None:
        sent.append(now[0])
        now[0] += 0.5

    monkeypatch.setattr(worker.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(worker.tune, "report", answered_late)
    reports = TuneReports(KEY)
    for _ in range(300):
        reports.advanced("student", 1, 9)
        now[0] += 0.1
    assert len(sent) == 4
    assert all(10.0 <= later - earlier < 10.2 for earlier, later in pairwise(sent))
    reports.advanced("verification", 1, 9)  # a phase that begins is told at once
    assert len(sent) == 5
    now[0] += 1000.0
    reports.advanced("verification", 2, 9)
    now[0] += 59.0  # after a driver that slept for an hour, too
    monkeypatch.setattr(worker.tune, "report", lambda _content: now.__setitem__(0, now[0] + 3600.0))
    reports.rung("after-ramp 0", RungValues(0.5, 0.25, 2.0))
    monkeypatch.setattr(worker.tune, "report", answered_late)
    now[0] += 60.0
    reports.advanced("verification", 3, 9)
    assert len(sent) == 7


def test_a_resumed_verification_gets_more_time_each_time(
    tmp_path: Path, told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    factors: list[float] = []

    def resume(task: TrialTask, data: Dataset, *, timeout_factor: float, **rest: Any) -> Any:
        factors.append(timeout_factor)
        refined = replace(result(), provenance={"timeout_factor": f"{timeout_factor:g}"})
        save_result(task.places, refined)
        return refined

    monkeypatch.setattr(worker, "resume_verification", resume)
    places = TrialPlaces.of(tmp_path, "tiny", KEY)
    places.folder.mkdir(parents=True)
    save_result(places, replace(result(), verification_state="stopped"))
    for _ in range(3):
        work(tmp_path, resume=True)
    assert factors == [1.0, 4.0, 16.0]
    assert [each["state"] for each in told] == ["COMPLETE"] * 3
    assert next_timeout_factor(result()) == 4.0
    assert next_timeout_factor(None) == 1.0
