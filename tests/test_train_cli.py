"""python -m ccdist.train: one training in one folder, whatever stops it, and every wrong input answered in a line."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console

import spaces
from ccdist import checkpoint, train
from ccdist.data import num_batches
from ccdist.locks import exclusive
from ccdist.loss_config import CCDistConfig, ExpIBPConfig, IBPConfig, MTLIBPConfig, SABRConfig
from ccdist.networks import build_network
from ccdist.optimizer_config import RAdamConfig
from ccdist.recipe import RecipeFile, load_recipe_file
from ccdist.train_progress import TrainProgress, duration
from ccdist.training import EpochReport
from ccdist.training_step import EpsilonSchedule
from ccdist.yaml_files import YamlFileError
from search.config import SpaceFileError, load_search_config

ROOT = Path(__file__).parent.parent
RECIPES = sorted((Path(spaces.__file__).parent / "recipes").glob("*.yaml"))
TINY = """
name: tiny
data: {name: digits, validation: 0.24, train_images: 600, validation_images: 40}
threat: {norm: linf, epsilon: 1/20}
network: {name: mlp, width: 16}
teacher:
  epochs: 20
  attack: {steps: 6, step_size: 0.25}
  precision: {attack: float32}
student:
  epochs: 25
  loss: {kind: cc_dist, alpha: 0.3, beta: 5}
  attack: {steps: 6, step_size: 0.25}
  precision: {attack: float32}
verification: {attack: {steps: 3, step_size: 0.3}}
seed: 3
"""
QUICK = ["--set", "teacher.epochs=1", "--set", "student.epochs=2"]
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


def run(*arguments: Any) -> int:
    return train.main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 2) -> str:
    """The one line that the command answers with."""
    assert run(*arguments) == code
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    assert line.startswith("error: ")
    return line.strip()


def curves(out: Path) -> list[dict[str, Any]]:
    file = out / "curves.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


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
def test_stopped_in_every_way_it_ends_like_an_uninterrupted_run(
    recipe: Path, out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ways = [(2, signal.SIGTERM, 143), (9, signal.SIGKILL, -9), (23, signal.SIGINT, 130), (32, signal.SIGKILL, -9)]
    for rows, how, code in ways:
        stopped = stopped_at(recipe, out, rows, how, random.uniform(0, 0.02))
        assert stopped.returncode == code
        if how is signal.SIGKILL:
            continue
        assert stopped.stderr == (f"stopped; go on with: python -m ccdist.train {recipe} --out {out} --threads 1\n")
        assert f"{'teacher' if rows < 20 else 'student'} " in stopped.stdout
    check_like_an_uninterrupted_run(recipe, out, tmp_path / "whole")
    assert "loss " in capfd.readouterr().out


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

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "lock"}
    assert run(recipe, "--out", out, *QUICK) == 0
    assert capsys.readouterr().out.splitlines() == [f"{out} is finished", told[-1]]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_test_set_is_read_when_asked_for(recipe: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(recipe, "--out", out, *QUICK) == 0
    weights = (out / "student" / checkpoint.WEIGHTS).stat().st_mtime_ns
    assert run(recipe, "--out", out, *QUICK, "--test") == 0
    assert "(270 test images)" in capsys.readouterr().out.splitlines()[-1]
    assert (out / "student" / checkpoint.WEIGHTS).stat().st_mtime_ns == weights  # measured again, not trained again
    assert json.loads((out / "summary.json").read_text())["evaluated_on"] == "test"


def test_all_images_may_be_trained_on(recipe: Path, out: Path) -> None:
    assert run(recipe, "--out", out, *QUICK, "--set", "data.validation=0", "--test") == 0
    assert json.loads((out / "summary.json").read_text())["student"]["num_images"] == 270


def test_another_verification_is_no_other_training(recipe: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What runs out of memory at the end of a training is asked for again in smaller batches."""
    assert run(recipe, "--out", out, *QUICK) == 0
    weights = (out / "student" / checkpoint.WEIGHTS).stat().st_mtime_ns
    first = capsys.readouterr().out.splitlines()[-1]
    assert run(recipe, "--out", out, *QUICK, "--set", "verification.batch_size=7") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("student, clean: ")
    assert told[-1].split(")")[0] == first.split(")")[0]
    assert load_recipe_file(out / "recipe.yaml").verification.batch_size == 7
    assert run(recipe, "--out", out, *QUICK, "--set", "verification=null") == 0
    assert capsys.readouterr().out.startswith("tiny: not evaluated  ")
    assert (out / "student" / checkpoint.WEIGHTS).stat().st_mtime_ns == weights


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


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["student.epoch=3"], "unknown key student.epoch; did you mean student.epochs?"),
        (["studnet.epochs=3"], "unknown key studnet; did you mean student?"),
        (["budget={trials: 3}"], "unknown key budget"),
        (["network.widht=3"], "unknown key network.widht; did you mean network.width?"),
        (["student.loss.alpha={low: 0, high: 1}"], "student.loss.alpha: {'low': 0, 'high': 1} is not allowed"),
        (["student.epochs=2.5"], "student.epochs: 2.5 is not allowed: expected a whole number"),
        (["student.epochs"], "--set student.epochs: expected key=value"),
        (["threat.epsilon=8"], "write 8/255 if that is what you mean"),
        (["teacher=null"], "teacher is missing: a student with loss cc_dist and initialization ibp reads one"),
        (["teacher.seed=1"], "teacher.seed is not set there: seeds follow from the recipe's `seed`"),
        (["student.network={name: mlp}"], "student.network is not set there: the network stands beside it"),
        (["seed=-1"], "seed: -1 is not allowed"),
        (["data.validation=0"], "data.validation is 0, so there are no images to verify; --test evaluates on"),
        (["name=../up"], "name: '../up' is not allowed"),
    ],
)
def test_a_wrong_recipe_touches_nothing(
    settings: list[str], expected: str, recipe: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [flag for setting in settings for flag in ("--set", setting)]
    assert expected in refused(capsys, recipe, "--out", out, *flags)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- 1\n", "holds a list; expected keys and values"),
        ("name: [\n", "cannot be read"),
        ("name: 2020-99-99\n", "cannot be read"),
        ("[" * 5000, "cannot be read"),
        ("name: a\ndata: {name: digits}\nname: b\n", "key name stands twice, again in line 3; remove one"),
        ("name: a\ndata:\n  name: digits\n  flip: true\n  name: mnist\n", "key name stands twice, again in line 5"),
    ],
)
def test_a_file_that_is_no_recipe(
    text: str, expected: str, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    answer = refused(capsys, file, "--out", out)
    assert f"recipe {file} " in answer
    assert expected in answer


def test_a_key_that_overrides_a_merged_one_stands_once(tmp_path: Path) -> None:
    file = tmp_path / "merged.yaml"
    file.write_text(TINY.replace("teacher:\n", "teacher: &teacher\n") + "unused: {<<: *teacher, epochs: 3}\n")
    with pytest.raises(YamlFileError, match="unknown key unused"):  # and no word about epochs
        load_recipe_file(file)


def test_a_space_file_with_a_key_twice_is_refused_as_one(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("name: a\nname: b\n")
    with pytest.raises(SpaceFileError, match=r"space file .* key name stands twice, again in line 2"):
        load_search_config(file)


def test_a_search_needs_validation_images() -> None:
    with pytest.raises(SpaceFileError, match=r"data: validation is 0; a search measures"):
        load_search_config(ROOT / "spaces" / "digits.yaml", ["data.validation=0"])


def test_a_recipe_that_is_not_there(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = refused(capsys, "nowhere.yaml", "--out", out)
    assert answer.startswith("error: no recipe nowhere.yaml; give a path, or the name of a shipped one: ")
    assert "cifar_2_255_cc_ibp" in answer


def test_a_device_that_is_not_there(
    recipe: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "PyTorch finds no GPU here; use --device cpu" in refused(capsys, recipe, "--out", out, "--device", "cuda")
    assert "--threads 0; expected at least 1" in refused(capsys, recipe, "--out", out, "--threads", 0)


def test_data_that_are_not_there(recipe: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no train.parquet" in refused(capsys, recipe, "--out", out, "--set", f"data.path={tmp_path}")


def test_what_does_not_go_together(recipe: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--set", "student.loss={kind: sabr, subbox: 0.5}", "--set", "threat={norm: l2, epsilon: 0.5}"]
    assert "loss sabr has no form for norm l2" in refused(capsys, recipe, "--out", out, *settings)


def test_a_loss_that_is_not_finite(recipe: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = refused(capsys, recipe, "--out", out, *QUICK, "--set", "student.l1=1.0e39", code=3)
    assert "the student's loss or gradient is not finite at step 0" in answer


def test_another_recipe_in_the_same_folder(recipe: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(recipe, "--out", out, *QUICK) == 0
    capsys.readouterr()
    answer = refused(capsys, recipe, "--out", out, *QUICK, "--set", "student.loss.beta=7")
    assert f"{out} holds another training: there student.loss.beta is 5.0, now it is 7.0; choose another" in answer
    (out / "recipe.yaml").write_text("name: [")
    assert f"recipe {out / 'recipe.yaml'} cannot be read" in refused(capsys, recipe, "--out", out)


def test_a_folder_with_something_else_in_it(recipe: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out.mkdir()
    (out / "thesis.tex").touch()
    assert f"{out} holds thesis.tex but no recipe.yaml" in refused(capsys, recipe, "--out", out)
    assert f"{recipe} cannot be written" in refused(capsys, recipe, "--out", recipe)


def test_a_folder_that_another_process_works_in(recipe: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with exclusive(out / "lock", wait=False):
        assert f"lock is held by process {os.getpid()}" in refused(capsys, recipe, "--out", out)


def test_a_damaged_network(recipe: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(recipe, "--out", out, *QUICK) == 0
    capsys.readouterr()
    (out / "summary.json").unlink()
    (out / "student" / checkpoint.WEIGHTS).write_bytes(b"")
    assert "is damaged" in refused(capsys, recipe, "--out", out, *QUICK)


# ---- the recipes of the papers --------------------------------------------------------------------------------------


def recipe_named(name: str) -> RecipeFile:
    return load_recipe_file(next(file for file in RECIPES if file.name == f"{name}.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_a_shipped_recipe_is_complete(file: Path) -> None:
    loaded = load_recipe_file(file)
    assert loaded.name == file.name.removesuffix(".yaml")
    assert loaded.verification is not None
    assert loaded.needs_teacher == (loaded.teacher is not None)
    assert RecipeFile.model_validate(yaml.safe_load(yaml.safe_dump(loaded.tree()))) == loaded
    if file.stem != "digits":
        assert loaded.data.validation == 0
        assert (loaded.network.name, loaded.network.width) == ("cnn7", 64)


def test_every_row_of_the_papers_is_there() -> None:
    names = {file.name.removesuffix(".yaml") for file in RECIPES}
    settings = {"mnist_0.1", "mnist_0.3", "cifar_2_255", "cifar_8_255", "tiny_imagenet_1_255", "imagenet64_1_255"}
    for method in ("cc_ibp", "mtl_ibp", "cc_dist"):
        assert {f"{setting}_{method}" for setting in settings} <= names
    assert len([name for name in names if name.endswith("_ctbench")]) == 11
    assert len([name for name in names if name.endswith("_ctrain")]) == 2


IMAGES = {"mnist": 60_000, "cifar10": 50_000, "tiny_imagenet": 100_000, "imagenet64": 1_281_167}
# From the tables of the papers' code, by hand: steps an epoch; the ramp's first epoch (0-based, whole) and its length;
# epochs of the drops.
TIMETABLES = {
    "mnist_0.1_cc_ibp": (235, 0, 20, (50, 60), 70),
    "mnist_0.3_mtl_ibp": (235, 0, 20, (50, 60), 70),
    "cifar_2_255_cc_ibp": (391, 1, 80, (120, 140), 160),
    "cifar_2_255_cc_dist": (391, 1, 80, (120, 140), 160),
    "cifar_8_255_cc_ibp": (391, 1, 80, (180, 220), 260),
    "cifar_8_255_mtl_ibp_ctbench": (391, 1, 120, (200, 220), 240),
    "tiny_imagenet_1_255_exp_ibp": (782, 1, 80, (120, 140), 160),
    "tiny_imagenet_1_255_exp_ibp_ctbench": (782, 1, 20, (60, 70), 80),
    "imagenet64_1_255_mtl_ibp": (10010, 1, 20, (60, 70), 80),
    "cifar_2_255_mtl_ibp_ctrain": (98, 5, 83, (100, 129), 160),
    "cifar_2_255_sabr_ctrain": (98, 3, 104, (134, 147), 160),
}


@pytest.mark.parametrize("name", TIMETABLES)
def test_the_timetable_of_a_recipe_is_the_published_one(name: str) -> None:
    steps, start, length, drops, epochs = TIMETABLES[name]
    loaded = recipe_named(name)
    student = loaded.student
    assert student.epochs == epochs
    assert num_batches(IMAGES[loaded.data.name], student.batch_size) == steps
    schedule = EpsilonSchedule(student.epsilon_schedule, loaded.threat, epochs * steps)
    assert (schedule.start, schedule.length) == (start * steps, length * steps)
    end = start + length
    assert tuple(end + round(share * (epochs - end)) for share in student.learning_rate.drops) == drops


def test_the_numbers_of_the_cc_ibp_row_at_2_255() -> None:
    loaded = recipe_named("cifar_2_255_cc_ibp")
    student = loaded.student
    assert loaded.threat.epsilon == Fraction(2, 255)
    assert (student.loss.kind, student.loss.alpha, student.l1, student.shi_weight) == ("cc_ibp", 0.01, 3e-6, 0.5)
    attack = student.attack
    assert (attack.steps, attack.step_size, attack.kappa, attack.restarts, attack.keep) == (8, 0.25, 2.1, 1, "best")
    assert (student.learning_rate.initial, student.learning_rate.decay) == (5e-4, 0.2)
    assert (student.optimizer.kind, student.optimizer.weight_decay, student.gradient_clip) == ("adam", 0, 10)
    assert (student.batch_size, student.batch_norm, student.initialization) == (128, "adversarial", "ibp")
    assert (loaded.data.flip, loaded.data.crop_padding) == (True, 2)


def test_the_numbers_of_the_cc_ibp_row_on_mnist_at_03() -> None:
    loaded = recipe_named("mnist_0.3_cc_ibp")
    student = loaded.student
    assert (loaded.threat.epsilon, student.epsilon_schedule.train_epsilon_factor) == (Fraction(3, 10), 1.334)
    assert (student.loss.alpha, student.l1, student.batch_size) == (0.3, 3e-6, 256)
    assert (student.attack.steps, student.attack.step_size, student.attack.keep) == (1, 10, "last")
    assert (loaded.data.mean, loaded.data.std, loaded.data.flip) == ((0,), (1,), False)


def test_the_numbers_of_the_mtl_ibp_row_of_ctbench_at_2_255() -> None:
    student = recipe_named("cifar_2_255_mtl_ibp_ctbench").student
    assert student.loss == MTLIBPConfig(alpha=0.01)
    assert (student.attack.steps, student.attack.restarts, student.attack.kappa) == (1, 3, 2)
    assert (student.natural_weight, student.l1, student.batch_norm) == (0.1, 3e-6, "clean")
    assert student.population_statistics
    averaging = student.weight_averaging
    assert averaging is not None
    assert (averaging.start * student.epochs, averaging.every) == (150, 10)


def test_the_numbers_of_the_sabr_row_of_ctbench_at_2_255() -> None:
    student = recipe_named("cifar_2_255_sabr_ctbench").student
    assert student.loss == SABRConfig(subbox=0.1, relu_shrink=0.8)
    assert student.epsilon_schedule.train_epsilon_factor == 1.5  # 3/255
    assert (student.attack.steps, student.attack.restarts, student.l1) == (5, 3, 1e-6)
    assert (student.natural_weight, student.weight_averaging) == (0, None)


def test_the_numbers_of_the_exp_ibp_rows_on_tiny_imagenet() -> None:
    published, ctbench = (recipe_named(f"tiny_imagenet_1_255_exp_ibp{suffix}").student for suffix in ("", "_ctbench"))
    assert (published.loss, published.l1, published.shi_weight) == (ExpIBPConfig(alpha=0.04), 5e-5, 0.2)
    assert (ctbench.loss, ctbench.l1, ctbench.shi_weight) == (ExpIBPConfig(alpha=0.4), 1e-6, 0.2)
    assert recipe_named("cifar_2_255_ibp_ctbench").student.loss == IBPConfig()


def test_the_numbers_of_the_best_configuration_of_ctrain() -> None:
    student = recipe_named("cifar_2_255_mtl_ibp_ctrain").student
    assert (student.loss, student.l1, student.shi_weight) == (MTLIBPConfig(alpha=0.00223), 1.43e-6, 0.414)
    assert (student.attack.steps, student.attack.step_size, student.attack.kappa) == (7, 1.63, 2.27)
    assert (student.optimizer, student.batch_size) == (RAdamConfig(), 512)
    assert (student.learning_rate.initial, student.learning_rate.decay) == (5.8e-3, 0.115)
    assert student.epsilon_schedule.train_epsilon_factor == 1.17


@pytest.mark.parametrize("setting", ["mnist_0.1", "mnist_0.3", "cifar_2_255", "cifar_8_255", "imagenet64_1_255"])
def test_a_cc_dist_recipe_is_cc_ibp_with_a_teacher(setting: str) -> None:
    plain, distilled = recipe_named(f"{setting}_cc_ibp"), recipe_named(f"{setting}_cc_dist")
    assert distilled.student.loss == CCDistConfig(alpha=plain.student.loss.alpha, beta=5)
    assert distilled.student.model_copy(update={"loss": plain.student.loss}) == plain.student
    assert (distilled.data, distilled.threat, distilled.seed) == (plain.data, plain.threat, plain.seed)
    teacher = distilled.teacher
    assert teacher is not None
    assert (teacher.epochs, teacher.attack.steps, teacher.attack.step_size) == (30, 10, 0.25)


def test_the_teachers_of_ctbench() -> None:
    at_2, at_8 = (recipe_named(f"cifar_{radius}_255_cc_dist_pgd_teacher").teacher for radius in (2, 8))
    assert at_2 is not None
    assert at_8 is not None
    assert (at_2.epochs, at_2.attack.steps, at_2.attack.restarts, at_2.l1) == (160, 8, 3, 2e-5)
    assert [share * at_2.epochs for share in at_2.learning_rate.drops] == [120, 140]
    assert (at_8.epochs, at_8.attack.steps, at_8.attack.restarts, at_8.l1) == (240, 10, 3, 1e-6)
    assert [share * at_8.epochs for share in at_8.learning_rate.drops] == [200, 220]
