"""python -m ccdist.train: one training in one folder, whatever stops it, and every wrong input answered in a line."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from train_cases import QUICK, ROOT, TINY, curves, refused, run

from ccdist import checkpoint, train
from ccdist.config import DataConfig
from ccdist.data import ImageSet, load_test_set
from ccdist.locks import exclusive
from ccdist.networks import build_network
from ccdist.provenance import source_commit
from ccdist.recipe import load_recipe_file
from ccdist.train_progress import TrainProgress, duration
from ccdist.training import EpochReport

# What a clock decides, and no two runs share.
TIMES = ("seconds", "images_per_second")
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TINY)
    assert run(folder / "tiny.yaml", "--out", folder / "out", *QUICK) == 0
    return folder / "out"


@pytest.fixture
def finished(trained_once: Path, out: Path) -> Path:
    """A folder of its own in which the recipe is finished as QUICK says."""
    return Path(shutil.copytree(trained_once, out))


# ---- stopped at any moment ------------------------------------------------------------------------------------------


def stopped_at(
    recipe: Path, out: Path, rows: int, how: signal.Signals, pause: float
) -> subprocess.CompletedProcess[str]:
    """Start the command, and send it a signal some time after its curves have so many rows."""
    command = [sys.executable, "-m", "ccdist.train", str(recipe), "--out", str(out), "--threads", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(curves(out)) < rows and process.poll() is None:
        time.sleep(0.002)
    time.sleep(pause)
    process.send_signal(how)
    output, errors = process.communicate(timeout=30)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def check_like_an_uninterrupted_run(recipe: Path, out: Path, whole: Path) -> None:
    for path in (out, whole):
        assert run(recipe, "--out", path, "--threads", 1) == 0
    for phase in ("teacher", "student"):
        assert (out / phase / checkpoint.WEIGHTS).read_bytes() == (whole / phase / checkpoint.WEIGHTS).read_bytes()
    rows = [(row["phase"], row["epoch"]) for row in curves(out)]
    assert rows == [("teacher", n) for n in range(1, 21)] + [("student", n) for n in range(1, 26)]
    for mine, expected in zip(curves(out), curves(whole), strict=True):
        # A row that a kill kept from being told has what the training's state remembers, and no more.
        assert mine.items() <= {k: v for k, v in expected.items() if k not in TIMES}.items() | {
            (name, mine.get(name)) for name in TIMES
        }
    columns = ["verdict", "method", "lower_bound", "prediction"]
    verdicts = [pq.read_table(path / "verdicts.parquet", columns=columns).to_pylist() for path in (out, whole)]
    assert verdicts[0] == verdicts[1]
    left = {path.name for path in out.iterdir()}
    assert left == {path.name for path in whole.iterdir()}
    assert not [name for name in left if "state" in name or name.startswith(".")]


@pytest.mark.timeout(180)
def test_terminated_and_killed_it_ends_like_an_uninterrupted_run(
    recipe: Path, out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ways = [(2, signal.SIGTERM, 143), (32, signal.SIGKILL, -9)]
    for rows, how, code in ways:
        stopped = stopped_at(recipe, out, rows, how, random.uniform(0, 0.02))
        assert stopped.returncode == code
        if how is signal.SIGKILL:
            continue
        assert stopped.stderr == (f"stopped; go on with: python -m ccdist.train {recipe} --out {out} --threads 1\n")
        assert "teacher " in stopped.stdout
    check_like_an_uninterrupted_run(recipe, out, tmp_path / "whole")
    assert "loss " in capfd.readouterr().out


def test_ctrl_c_ends_with_the_command_to_go_on_with(
    recipe: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without
    try:
        with monkeypatch.context() as patch:
            patch.setattr(TrainProgress, "epoch", lambda *_: os.kill(os.getpid(), signal.SIGINT))
            assert run(recipe, "--out", out, *QUICK) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    told = capsys.readouterr().err
    command = f"stopped; go on with: python -m ccdist.train {recipe} --set teacher.epochs=1 --set student.epochs=2"
    assert told == f"{command} --out {out}\n"
    assert run(recipe, "--out", out, *QUICK) == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_random_moments_it_ends_like_an_uninterrupted_run(recipe: Path, out: Path, tmp_path: Path) -> None:
    for _ in range(25):
        rows = min(len(curves(out)) + random.randint(0, 4), 45)
        stopped_at(recipe, out, rows, signal.SIGKILL, random.uniform(0, 0.1))
    check_like_an_uninterrupted_run(recipe, out, tmp_path / "whole")


# ---- one run, in this process ---------------------------------------------------------------------------------------


def test_a_run_leaves_everything_and_the_same_command_only_tells_it(
    recipe: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe, "--out", out, *QUICK) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("teacher 1/1  loss ")
    assert told[2].startswith("teacher, pgd: ")
    for word in ("student 2/2", "loss ", "adversarial ", "images/s", "elapsed", "left"):
        assert any(word in line for line in told)
    summary = json.loads((out / "summary.json").read_text())
    student = summary["student"]
    assert student["certified_accuracy"] <= student["certified_upper"] <= student["adversarial_accuracy"]
    assert student["adversarial_accuracy"] <= student["standard_accuracy"]
    assert (summary["evaluated_on"], student["num_images"], summary["seed"]) == ("validation", 40, 3)
    assert summary["teacher"]["adversarial_accuracy"] <= summary["teacher"]["standard_accuracy"]
    assert told[-1].startswith(f"tiny: standard {student['standard_accuracy']:.4f}  adversarial ")
    assert told[-1].endswith("images/s")
    assert pq.read_table(out / "verdicts.parquet").num_rows == 40
    assert set(pq.read_table(out / "teacher_verdicts.parquet")["method"].to_pylist()) <= {"", "clean", "pgd"}
    resolved = load_recipe_file(out / "recipe.yaml")
    assert resolved == load_recipe_file(recipe, [each for each in QUICK if each != "--set"])
    network = checkpoint.load(out / "student")
    assert network.num_features == 16
    check_it_says_what_made_it(out, summary)

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "lock"}
    assert run(recipe, "--out", out, *QUICK) == 0
    assert capsys.readouterr().out.splitlines() == [f"{out} is finished", told[-1]]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def check_it_says_what_made_it(out: Path, summary: dict[str, Any]) -> None:
    metadata = checkpoint.load_description(out / "student")["metadata"]
    assert summary["precision"]["student"] == metadata["precision"]
    assert metadata["precision"]["attack"] == metadata["precision"]["training"] == "float32"
    assert summary["precision"]["teacher"]["teacher"] in ("float32", "bfloat16")  # auto, decided
    assert summary["commit"] == {"teacher": metadata["commit"], "student": metadata["commit"]}
    assert summary["student"]["verification_commit"] == metadata["commit"] == source_commit()
    assert summary["weights_sha256"] == checkpoint.weights_sha256(checkpoint.load(out / "student"))
    assert metadata["teacher"] == checkpoint.weights_sha256(checkpoint.load(out / "teacher"))


def changed_weights(place: Path) -> None:
    """Another network in the place of one, as a training with another number of threads leaves it."""
    network, metadata = checkpoint.load(place), checkpoint.load_description(place)["metadata"]
    with torch.no_grad():
        network.head.bias += torch.linspace(-1, 1, 10)
    checkpoint.save(place, network, metadata)


def test_verdicts_are_about_the_network_that_is_there(
    recipe: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = pq.read_table(finished / "verdicts.parquet")["lower_bound"].to_pylist()
    changed_weights(finished / "student")
    capsys.readouterr()
    assert run(recipe, "--out", finished, *QUICK) == 0
    told = capsys.readouterr().out
    assert "is finished" not in told
    assert "student, clean: " in told
    assert "teacher, clean: " not in told  # the teacher's are still about the teacher
    assert pq.read_table(finished / "verdicts.parquet")["lower_bound"].to_pylist() != before


def test_a_student_that_was_taken_away_is_trained_again(
    recipe: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(finished / "student")
    (finished / "curves.jsonl").unlink()
    capsys.readouterr()
    assert run(recipe, "--out", finished, *QUICK) == 0
    told = capsys.readouterr().out
    assert "is finished" not in told
    assert "student 2/2" in told
    assert (finished / "student" / checkpoint.WEIGHTS).exists()
    assert [row["phase"] for row in curves(finished)] == ["teacher", "student", "student"]


def test_a_student_of_another_teacher_is_refused(
    recipe: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed_weights(finished / "teacher")
    (finished / "summary.json").unlink()
    answer = refused(capsys, recipe, "--out", finished, *QUICK)
    assert f"{finished / 'student'} was trained with another teacher than the one beside it; delete" in answer


def test_verdicts_are_about_the_images_that_are_there(
    recipe: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(recipe, "--out", out, *QUICK, "--test") == 0
    capsys.readouterr()

    def mirrored(config: DataConfig) -> ImageSet:
        images = load_test_set(config)
        return ImageSet(images.images.flip(3), images.labels)

    monkeypatch.setattr(train, "load_test_set", mirrored)
    (out / "summary.json").unlink()
    assert run(recipe, "--out", out, *QUICK, "--test") == 0
    told = capsys.readouterr().out
    assert "student, clean: " in told
    assert "teacher, clean: " in told


def test_images_in_another_place_are_looked_at_first(
    recipe: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished folder, too: its numbers are about the images that were in the old place."""
    elsewhere = ["--set", f"data.path={tmp_path / 'elsewhere'}"]
    assert "has no train.parquet" in refused(capsys, recipe, "--out", out, *QUICK, *elsewhere)
    assert not (out / "recipe.yaml").exists()
    assert run(recipe, "--out", out, *QUICK) == 0
    written = (out / "recipe.yaml").read_bytes()
    capsys.readouterr()
    assert "has no train.parquet" in refused(capsys, recipe, "--out", out, *QUICK, *elsewhere)
    batches = ["--set", "verification.batch_size=7"]
    assert "has no train.parquet" in refused(capsys, recipe, "--out", out, *QUICK, *elsewhere, *batches)
    assert (out / "recipe.yaml").read_bytes() == written


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("curves.jsonl", b"{\n"),
        ("curves.jsonl", b"[1]\n"),
        ("curves.jsonl", b"\xff"),
        ("verdicts.parquet", b"{\n"),
        ("verdicts.parquet", b""),
    ],
)
def test_a_damaged_file_is_named_and_made_again(
    file: str, content: bytes, recipe: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = curves(finished)
    (finished / file).write_bytes(content)
    (finished / "summary.json").unlink()
    capsys.readouterr()
    answer = refused(capsys, recipe, "--out", finished, *QUICK)
    assert answer.startswith(f"error: {finished / file} is damaged (")
    assert answer.endswith("; delete it to make it again")
    (finished / file).unlink()
    assert run(recipe, "--out", finished, *QUICK) == 0
    assert [row.keys() & {"loss"} for row in curves(finished)] == [row.keys() & {"loss"} for row in before]


def test_the_test_set_is_read_when_asked_for(recipe: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = (finished / "student" / checkpoint.WEIGHTS).stat().st_mtime_ns
    assert run(recipe, "--out", finished, *QUICK, "--test") == 0
    assert "(270 test images)" in capsys.readouterr().out.splitlines()[-1]
    # measured again, not trained again
    assert (finished / "student" / checkpoint.WEIGHTS).stat().st_mtime_ns == weights
    assert json.loads((finished / "summary.json").read_text())["evaluated_on"] == "test"


def test_all_images_may_be_trained_on(recipe: Path, out: Path) -> None:
    assert run(recipe, "--out", out, *QUICK, "--set", "data.validation=0", "--test") == 0
    assert json.loads((out / "summary.json").read_text())["student"]["num_images"] == 270


def test_another_verification_is_no_other_training(
    recipe: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What runs out of memory at the end of a training is asked for again in smaller batches."""
    weights = (finished / "student" / checkpoint.WEIGHTS).stat().st_mtime_ns
    assert run(recipe, "--out", finished, *QUICK) == 0
    first = capsys.readouterr().out.splitlines()[-1]
    assert run(recipe, "--out", finished, *QUICK, "--set", "verification.batch_size=7") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("student, clean: ")
    assert told[-1].split(")")[0] == first.split(")")[0]
    assert load_recipe_file(finished / "recipe.yaml").verification.batch_size == 7
    assert run(recipe, "--out", finished, *QUICK, "--set", "verification=null") == 0
    assert capsys.readouterr().out.startswith("tiny: not evaluated  ")
    assert (finished / "student" / checkpoint.WEIGHTS).stat().st_mtime_ns == weights


def test_the_default_folder_has_the_recipes_name(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(recipe, *QUICK, "--set", "name=other", "--set", "verification=null") == 0
    assert (tmp_path / "runs" / "train" / "other" / "summary.json").exists()
    assert not (tmp_path / "runs" / "train" / "other" / "verdicts.parquet").exists()


def test_a_student_that_reads_no_teacher_has_none(recipe: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--set", "student.loss={kind: ibp}", "--set", "teacher=null"]
    assert run(recipe, "--out", out, *QUICK[2:], *settings) == 0
    assert not (out / "teacher").exists()
    assert {row["phase"] for row in curves(out)} == {"student"}


def test_the_teacher_has_a_seed_of_its_own(recipe: Path) -> None:
    loaded = load_recipe_file(recipe)
    assert loaded.teacher is not None
    assert (loaded.student.seed, loaded.teacher.seed) == (3, 4)
    assert loaded.student.network == loaded.teacher.network == loaded.network


def test_a_terminal_of_80_columns_shows_all_that_a_line_does() -> None:
    shown = io.StringIO()
    network = build_network("mlp", width=4, input_shape=(1, 8, 8), num_classes=10)
    with TrainProgress(Console(file=shown, force_terminal=True, width=80)) as progress:
        for phase, epochs in (("teacher", 20), ("student", 1000)):
            report = EpochReport(phase, epochs, epochs, {}, 4000.0, network)
            progress.epoch(report, {"loss": 1.5, "adversarial_accuracy": 0.25, "images_per_second": 123456.0})
        progress.note("a note")
    for text in ("teacher", "1000/1000", "123456 images/s", "1 h 06 min elapsed", "0 s left", "loss 1.500", "a note"):
        assert text in shown.getvalue()


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7505, "2 h 05 min")]
)
def test_durations_are_told_in_the_unit_that_fits(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_device_that_is_not_there(
    recipe: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "PyTorch finds no GPU here; use --device cpu" in refused(capsys, recipe, "--out", out, "--device", "cuda")
    assert "--threads 0; expected at least 1" in refused(capsys, recipe, "--out", out, "--threads", 0)


def test_data_that_are_not_there(recipe: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no train.parquet" in refused(capsys, recipe, "--out", out, "--set", f"data.path={tmp_path}")


def test_a_test_of_nothing(recipe: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = refused(capsys, recipe, "--out", out, "--test", "--set", "verification=null")
    assert answer.startswith("error: --test evaluates on the test set, but verification is null")
    assert not out.exists()


def test_a_loss_that_is_not_finite(recipe: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = refused(capsys, recipe, "--out", out, *QUICK, "--set", "student.l1=1.0e39", code=3)
    assert "the student's loss or gradient is not finite at step 0" in answer


def test_another_recipe_in_the_same_folder(recipe: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    answer = refused(capsys, recipe, "--out", finished, *QUICK, "--set", "student.loss.beta=7")
    assert f"{finished} holds another training: there student.loss.beta is 5.0, now it is 7.0; choose another" in answer
    (finished / "recipe.yaml").write_text("name: [")
    assert f"recipe {finished / 'recipe.yaml'} cannot be read" in refused(capsys, recipe, "--out", finished)


def test_a_folder_with_something_else_in_it(recipe: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out.mkdir()
    (out / "thesis.tex").touch()
    assert f"{out} holds thesis.tex but no recipe.yaml" in refused(capsys, recipe, "--out", out)
    assert f"{recipe} cannot be written" in refused(capsys, recipe, "--out", recipe)


def test_a_folder_that_another_process_works_in(recipe: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with exclusive(out / "lock", wait=False):
        assert f"lock is held by process {os.getpid()}" in refused(capsys, recipe, "--out", out)


def test_a_damaged_network(recipe: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    (finished / "summary.json").unlink()
    (finished / "student" / checkpoint.WEIGHTS).write_bytes(b"")
    answer = refused(capsys, recipe, "--out", finished, *QUICK)
    assert "is damaged" in answer
    assert answer.endswith(f"; delete {finished / 'student'} to make it again")
