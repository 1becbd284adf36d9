"""The plan of a search: what it says, and that nothing is started or written."""

from pathlib import Path

import pytest
from studies import closed_form, config_of, open_study, tree, write_space

from ccdist.data import load_dataset
from search import run
from search.config import ResourcesConfig
from search.plan import TrialCost, plan_lines, slots_here
from search.space import Space
from search.storage import Storage

COST = TrialCost(teacher=100.0, student=50.0, verification=10.0, weights=1_000_000, source="a test")


def lines_of(folder: Path, **changes: object) -> list[str]:
    config = config_of(folder, **changes)
    storage = Storage.of(config, None if "storage" in changes else str(folder / "storage"))
    return list(plan_lines(config, Space(config), storage, load_dataset(config.data), None, COST, slots=2))


def test_the_plan_counts_trials_teachers_hours_and_bytes(tmp_path: Path) -> None:
    """8 trials of 60 s and one teacher of 100 s: 580 core-seconds; 4 MB of weights each, five times: see below."""
    text = "\n".join(lines_of(tmp_path))
    assert "8 trials to run, 2 at once on this machine: about 5 min, 0.16 core-hours" in text
    assert "alpha: 0.01 to 1, logarithmic" in text
    assert "steps: whole numbers, 1 to 4" in text
    assert "loss: one of cc_dist, no_distillation" in text
    assert "sampler random, seed 0, 2 points first; stopped early: training and verification" in text
    assert "disk: about 161 MB in the end, and 24 MB while trials run" in text


@pytest.mark.parametrize(
    ("tracking", "size"),
    [({"enabled": False}, "33 MB"), ({"models": False}, "65 MB"), ({"uri": "http://127.0.0.1:5000"}, "65 MB")],
)
def test_copies_of_the_weights_are_counted(tmp_path: Path, tracking: dict[str, object], size: str) -> None:
    """8 trials of 4 MB: the student; with MLflow its program; in a store of one's own student, program, extra files."""
    assert f"disk: about {size} in the end" in "\n".join(lines_of(tmp_path, tracking=tracking))


def test_what_goes_into_an_object_store_is_said_to(tmp_path: Path) -> None:
    """8 trials of 4 MB: student and program there; here three copies more, in MLflow's local store."""
    lines = lines_of(tmp_path, storage={"artifacts": "s3://bucket/ccdist"})
    assert lines[0] == "study tiny (new) in s3://bucket/ccdist; nothing is started or written"
    assert lines[-1] == (
        "in the store: about 65 MB in the end, and 24 MB while trials run; disk of this machine, with its copies of "
        "the artefacts: at most about 161 MB"
    )


def test_a_teacher_that_is_searched_is_paid_for_by_every_trial(tmp_path: Path) -> None:
    text = "\n".join(lines_of(tmp_path, teacher__epochs={"low": 1, "high": 2, "integer": True}, stopping=False))
    assert "about 11 min, 0.36 core-hours" in text
    assert "stopped early: nothing" in text


def test_other_limits_are_named(tmp_path: Path) -> None:
    text = "\n".join(lines_of(tmp_path, budget__hours=2, budget__accelerator_hours=3))
    assert "after 2 hours of this command what runs is cut off" in text
    assert "0 of 3 accelerator-hours are spent" in text


def test_slots_of_this_machine() -> None:
    assert slots_here(ResourcesConfig(cpu=0.001, concurrency=3)) == 3
    assert slots_here(ResourcesConfig(cpu=10_000)) == 1


@pytest.mark.timeout(60)
def test_a_dry_run_measures_a_trial_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space, storage = write_space(tmp_path / "space.yaml", tree()), tmp_path / "storage"
    assert run.main([str(space), "--storage", str(storage), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "study tiny (new)" in printed
    assert "nothing is started or written" in printed
    assert "from 3 batches and 32 images on this machine" in printed
    assert not storage.exists()


@pytest.mark.timeout(60)
def test_a_study_that_has_trials_says_what_they_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = tmp_path / "storage"
    storage.mkdir()
    study = open_study(config_of(tmp_path), storage / "study.db")
    for _ in range(2):
        assignment = study.ask()
        study.tell(assignment.number, closed_form(assignment.params))
    assert run.main([str(tmp_path / "space.yaml"), "--storage", str(storage), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "study tiny (2 of 8 trials done)" in printed
    assert "one trial: 2 s student, 1 s verification" in printed
    assert "from the study's 2 finished trials" in printed
    assert "6 trials to run" in printed
