"""One trial run once more: the same result from the same parameters, and what is refused."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from studies import config_of, open_study, result

from ccdist.data import load_dataset
from search import rerun
from search.rerun import agrees
from search.space import Space
from search.studies.records import RungValues, TrialRecord, TrialResult
from search.trial import TrialPlaces, TrialTask, run_trial


class Silent:
    def advanced(self, phase: str, done: int, of: int) -> None: ...
    def rung(self, name: str, values: RungValues) -> None: ...
    def verifying(self, result: TrialResult, phase: str, done: int, of: int) -> None: ...


def record(standard: float, lower: float, upper: float) -> TrialRecord:
    return TrialRecord("tiny-0000", 0, "COMPLETE", {}, "", 0, standard, certified_accuracy=lower, certified_upper=upper)


@pytest.mark.parametrize(
    ("stored", "again", "expected"),
    [
        ((0.9, 0.5, 0.5), (0.9, 0.5, 0.5), True),
        ((0.9, 0.5, 0.5), (0.89, 0.5, 0.5), False),
        ((0.9, 0.5, 0.5), (0.9, 0.6, 0.6), False),
        ((0.9, 0.0, 0.6), (0.9, 0.5, 0.5), True),  # stopped then, finished now
        ((0.9, 0.5, 0.55), (0.9, 0.52, 0.52), True),
        ((0.9, 0.5, 0.55), (0.9, 0.56, 0.6), False),
    ],
)
def test_results_agree_where_their_intervals_meet(
    stored: tuple[float, float, float], again: tuple[float, float, float], expected: bool
) -> None:
    told = result(again[0], again[1], certified_upper=again[2], adversarial_accuracy=again[2])
    assert agrees(record(*stored), told) is expected


@pytest.mark.timeout(90)
def test_a_trial_gives_its_result_again_and_another_one_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, stopping=False)
    storage = tmp_path / "storage"
    storage.mkdir()
    study = open_study(config, storage / "study.db")
    first, second = study.ask(), study.ask()
    recipe = Space(config).recipe(first.params, first.number)
    places = TrialPlaces.of(tmp_path / "artifacts", "tiny", first.key)
    task = TrialTask(first.key, recipe, first.params, places, config.stopping)
    told = run_trial(task, load_dataset(config.data), device=rerun.torch.device("cpu"), reports=Silent())
    study.tell(first.number, told)
    study.tell(second.number, TrialResult(**asdict(told) | {"standard_accuracy": 0.123}))
    arguments = ["--storage", str(storage), "--out"]
    assert rerun.main(["tiny", "0", *arguments, str(tmp_path / "again")]) == 0
    assert "the same" in capsys.readouterr().out
    stored = json.loads(next((tmp_path / "again").rglob("result.json")).read_text())
    assert stored["certified_accuracy"] == told.certified_accuracy
    assert rerun.main(["tiny", second.key, *arguments, str(tmp_path / "other")]) == 1
    assert "they differ" in capsys.readouterr().out
    assert rerun.main(["tiny", "0", *arguments, str(tmp_path / "again")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_trial_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = tmp_path / "storage"
    storage.mkdir()
    open_study(config_of(tmp_path), storage / "study.db")
    assert rerun.main(["tiny", "7", "--storage", str(storage)]) == 2
    assert capsys.readouterr().err == "error: study tiny has no trial '7'; its trials are 0 to 1\n"
    assert rerun.main(["other", "0", "--storage", str(storage)]) == 2
    assert "no study 'other'" in capsys.readouterr().err
