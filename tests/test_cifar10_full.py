"""The full CIFAR-10 benchmark in calls of minutes: stopped and continued calls end where one call would have."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import cifar10_full, step_paths, training_step
from benchmarks.cifar10_full import BAD_INPUT, FINISHED, MORE_TO_DO, Deadline
from ccdist import checkpoint
from ccdist.config import StudentConfig, VerifyConfig
from ccdist.data import load_dataset, load_test_set, to_pixels
from ccdist.recipe import load_recipe_file
from ccdist.training import train_student, train_teacher
from ccdist.verification import SCHEMA, verify

ROOT = Path(__file__).parent.parent
# The first optimiser of a process imports torch's compiler, which takes seconds.
pytestmark = pytest.mark.timeout(60)

TRAIN, TEST, LOSSLESS = 64, 32, 10
SETTINGS = {
    "network.width": 2,
    "teacher.epochs": 2,
    "teacher.batch_size": 32,
    "teacher.attack.steps": 1,
    "student.epochs": 3,
    "student.batch_size": 32,
    "student.attack.steps": 1,
    "verification.attack.steps": 3,
}
# Packages of this project that a bare machine with a GPU lacks.
NOT_NEEDED = ("ray", "optuna", "mlflow", "rich", "sklearn", "torchvision", "matplotlib", "plotly", "scipy")
# 4 TFLOP/s in float32 and ten times that in bfloat16, from the last of the three products.
PEAKS = {
    f"{name} {dtype}": value * 1e12
    for dtype, values in {"float32": (1, 2, 4), "bfloat16": (40, 3, 1)}.items()
    for name, value in zip(("matmul", "product", "convolution"), values, strict=True)
}


def write_images(file: Path, labels: np.ndarray, images: np.ndarray) -> None:
    cells = []
    for pixels in images:
        stored = io.BytesIO()
        PIL.Image.fromarray(pixels).save(stored, "PNG")
        cells.append({"bytes": stored.getvalue(), "path": "x.png"})
    pq.write_table(pa.table({"image": cells, "label": labels}), file)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise around a brightness that its class has; the lossless images are the first test images."""
    folder = tmp_path_factory.mktemp("cifar10")
    generator = np.random.default_rng(0)
    for name, count in {"train": TRAIN, "test": TEST}.items():
        labels = np.arange(count) % 10
        images = (25 * labels[:, None, None, None] + generator.integers(0, 20, (count, 32, 32, 3))).astype(np.uint8)
        write_images(folder / f"{name}.parquet", labels, images)
    write_images(folder / "test_lossless.parquet", labels[:LOSSLESS], images[:LOSSLESS])
    return folder


def arguments(stage: str, data: Path, out: Path, *more: str) -> list[str]:
    return [stage, "--data", str(data), "--out", str(out), "--device", "cpu", *more]


def settings() -> list[str]:
    return [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]


def run_python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def without(*packages: str) -> str:
    """The command as `python -m` runs it, where these packages are not installed."""
    lines = ["import runpy, sys, importlib.util as util", f"missing = {packages!r}"]
    lines += ["sys.modules.update(dict.fromkeys(missing))", "find = util.find_spec"]
    lines += ["util.find_spec = lambda name: None if name in missing else find(name)"]
    return "\n".join([*lines, "runpy.run_module('benchmarks.cifar10_full', run_name='__main__', alter_sys=True)"])


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training in as many calls as there are epochs, the first of them in a process of its own."""
    out = tmp_path_factory.mktemp("out")
    first = run_python(without(*NOT_NEEDED), *arguments("train", data, out, "--minutes", "0", *settings()))
    assert first.returncode == MORE_TO_DO, first.stderr
    assert "teacher 1/2" in first.stdout
    assert "left: 1 of 2 teacher epochs, about 0 s; 3 of 3 student epochs" in first.stdout
    codes = []
    while not codes or (codes[-1] == MORE_TO_DO and len(codes) < 10):
        codes.append(cifar10_full.main(arguments("train", data, out, "--minutes", "0")))
    assert codes == [MORE_TO_DO] * 3 + [FINISHED]
    return out


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "out"))


def test_a_training_in_many_calls_has_the_weights_of_one_in_one(trained: Path, data: Path) -> None:
    recipe = load_recipe_file(trained / "run" / "recipe.yaml")
    assert recipe.teacher is not None
    dataset = load_dataset(recipe.data)
    assert len(dataset.train) == TRAIN  # all of them
    teacher = train_teacher(dataset, recipe.threat, recipe.teacher).network
    student = train_student(dataset, recipe.threat, recipe.student, teacher).network
    for name, network in {"teacher": teacher, "student": student}.items():
        stored = checkpoint.load(trained / "run" / name)
        assert checkpoint.weights_sha256(stored) == checkpoint.weights_sha256(network)


def test_the_recipe_is_the_published_one_but_for_the_settings(trained: Path) -> None:
    ours = load_recipe_file(trained / "run" / "recipe.yaml")
    published = load_recipe_file(ROOT / "spaces" / "recipes" / "cifar_2_255_cc_dist.yaml")
    assert (published.student.epochs, published.network.width, published.data.validation) == (160, 64, 0)
    assert ours.student.loss == published.student.loss
    assert ours.threat == published.threat
    assert ours.data.model_copy(update={"path": None}) == published.data


def test_a_finished_training_is_not_done_again(
    out: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar10_full, "load_dataset", lambda *_: pytest.fail("images were read"))
    assert cifar10_full.main(arguments("train", data, out)) == FINISHED
    assert "is trained" in capsys.readouterr().out


def test_other_settings_are_refused_for_a_training_that_is_there(
    out: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cifar10_full.main(arguments("train", data, out, "--set", "student.epochs=4")) == BAD_INPUT
    assert "student.epochs is 3, now it is 4" in capsys.readouterr().err


def verdicts(file: Path) -> list[dict[str, Any]]:
    columns = ["index", "label", "prediction", "verdict", "method", "branches"]
    return list(pq.read_table(file, columns=columns).to_pylist())


def expected_verdicts(out: Path, chunk: int) -> list[dict[str, Any]]:
    """Of the test images by the verifier itself; each chunk's attack starts are seeded by its first image."""
    recipe = load_recipe_file(out / "run" / "recipe.yaml")
    assert recipe.verification is not None
    network, images = checkpoint.load(out / "run" / "student"), load_test_set(recipe.data)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(images), chunk):
        part = slice(start, start + chunk)
        config = VerifyConfig(threat=recipe.threat, seed=start, **dict(recipe.verification))
        table = verify(network, to_pixels(images.images[part]), images.labels[part], config)
        rows += [row | {"index": start + row["index"]} for row in table.to_pylist()]
    return [{key: row[key] for key in row if key not in ("seconds", "lower_bound")} for row in rows]


def test_verification_goes_on_chunk_by_chunk(out: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = arguments("verify", data, out, "--minutes", "0", "--chunk", "12")
    codes = [cifar10_full.main(call)]
    first = out / "verdicts" / "test" / "000000.parquet"
    written = first.stat().st_mtime_ns
    while codes[-1] == MORE_TO_DO and len(codes) < 10:
        codes.append(cifar10_full.main(call))
    assert codes == [MORE_TO_DO] * 3 + [FINISHED]  # 12 + 12 + 8 test images, then 10 lossless ones
    assert "left: 20 of 32 images of set test" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == written
    assert sorted(file.name for file in (out / "verdicts" / "test").iterdir()) == [
        "000000.parquet",
        "000012.parquet",
        "000024.parquet",
    ]
    assert verdicts(out / "verdicts_test.parquet") == expected_verdicts(out, 12)
    # The lossless images are here those of the test set, and a clean prediction has no random start.
    clean = [row["prediction"] for row in verdicts(out / "verdicts_test.parquet")]
    assert [row["prediction"] for row in verdicts(out / "verdicts_lossless.parquet")] == clean[:LOSSLESS]


def test_verdicts_about_another_verification_are_made_again(out: Path, data: Path) -> None:
    assert cifar10_full.main(arguments("verify", data, out, "--minutes", "0", "--chunk", "12")) == MORE_TO_DO
    batches = ("--set", "verification.batch_size=5")
    assert cifar10_full.main(arguments("verify", data, out, "--minutes", "0", "--chunk", "20", *batches)) == MORE_TO_DO
    rows = [pq.read_table(file).num_rows for file in sorted((out / "verdicts" / "test").iterdir())]
    assert rows == [12, 20]  # another batch size, and another chunk, go on
    steps = ("--set", "verification.attack.steps=2")
    assert cifar10_full.main(arguments("verify", data, out, "--chunk", "16", *steps)) == FINISHED
    assert [row["index"] for row in verdicts(out / "verdicts_test.parquet")] == list(range(TEST))


def test_too_little_memory_halves_the_batch(out: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def small_machine(network: Any, images: Any, labels: Any, config: VerifyConfig) -> pa.Table:
        sizes.append(config.batch_size)
        if config.batch_size > 16:
            raise torch.OutOfMemoryError("a GPU is full")
        return verify(network, images, labels, config)

    monkeypatch.setattr(cifar10_full, "verify", small_machine)
    assert cifar10_full.main(arguments("verify", data, out, "--chunk", "32")) == FINISHED
    assert sizes == [64, 32, 16] * 2  # once for each set


def test_verification_needs_a_trained_student(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cifar10_full.main(arguments("verify", data, tmp_path)) == BAD_INPUT
    assert "run stage train until it is finished" in capsys.readouterr().err


def test_benchmark_compares_the_rate_with_the_time_at_the_peak(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_step, "peaks", lambda threads, device: PEAKS)
    precisions = ("teacher.precision.attack=float32", "student.precision={attack: bfloat16, teacher: float32}")
    more = [word for setting in precisions for word in ("--set", setting)]
    assert cifar10_full.main(arguments("benchmark", data, tmp_path, *settings(), *more)) == FINISHED
    rows = [json.loads(line) for line in (tmp_path / "benchmarks.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["rounds"], row["images_a_round"]) for row in rows] == [
        ("teacher", 5, TRAIN),
        ("student", 5, TRAIN),
    ]
    # Attacks of one step that keep the best point: 3 passes. The student's: 9 differentiated, 1 of the teacher.
    assert [row["passes"] for row in rows] == [{"float32": 6, "bfloat16": 0}, {"float32": 10, "bfloat16": 3}]
    # CNN7 of width 2, multiplications of an image. Convolutions: 3 and 2 to 2 channels at 32 x 32, 2 to 4 and twice
    # 4 to 4 at 16 x 16, 9 taps each; linear: 4 * 256 = 1024 to 16 to 10.
    products = 9 * (1024 * (3 * 2 + 2 * 2) + 256 * (2 * 4 + 2 * 4 * 4)) + 1024 * 16 + 16 * 10
    for row, at_peak in zip(rows, (6 / 4e12, 10 / 4e12 + 3 / 40e12), strict=True):
        ideal_rate = 1 / (2 * products * at_peak)
        assert row["fraction_of_peak"] == pytest.approx(row["images_per_second"] / ideal_rate)
        assert row["lowest"] <= row["images_per_second"] <= row["highest"]


def test_a_benchmark_ends_by_its_limit(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "peaks", lambda threads, device: PEAKS)
    assert cifar10_full.main(arguments("benchmark", data, tmp_path, "--minutes", "0", *settings())) == FINISHED
    rows = [json.loads(line) for line in (tmp_path / "benchmarks.jsonl").read_text().splitlines()]
    assert [row["rounds"] for row in rows] == [1, 1]


def test_passes_are_those_of_the_step_benchmark() -> None:
    config = step_paths.student_config(8)
    counts = cifar10_full.passes(config, torch.device("cpu"))
    assert sum(counts.values()) == training_step.passes(8, reference=False)
    last = StudentConfig.model_validate(config.model_dump() | {"attack": {"steps": 1, "step_size": 10, "keep": "last"}})
    counts = cifar10_full.passes(last, torch.device("cpu"))
    assert sum(counts.values()) == training_step.passes(1, reference=False)


def cells(text: str, *first: str) -> list[str]:
    """The table row that begins with these cells."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {' | '.join(first)} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def decided_by_label(network: Any, images: Any, labels: torch.Tensor, config: VerifyConfig) -> pa.Table:
    """Verdicts by hand: 0 misclassified, 1 falls to the attack, 2 certified by IBP, 3 by CROWN, no other is decided."""
    falsified, certified = "falsified", "certified"
    outcomes = [(falsified, "clean"), (falsified, "pgd"), (certified, "ibp"), (certified, "crown")]
    rows = [(outcomes[label] if label < 4 else ("undecided", "")) for label in labels.tolist()]
    values = {"label": labels.tolist(), "verdict": [row[0] for row in rows], "method": [row[1] for row in rows]}
    zeros = [0] * len(labels)
    return pa.table([pa.array(values.get(field.name, zeros), field.type) for field in SCHEMA], SCHEMA)


def test_report_has_the_numbers_of_the_files(
    out: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_step, "peaks", lambda threads, device: PEAKS)
    monkeypatch.setattr(cifar10_full, "verify", decided_by_label)
    assert cifar10_full.main(arguments("verify", data, out, "--chunk", "20")) == FINISHED
    assert cifar10_full.main(arguments("benchmark", data, out)) == FINISHED
    capsys.readouterr()
    assert cifar10_full.main(["report", "--out", str(out)]) == FINISHED
    text = capsys.readouterr().out
    assert (out / "report.md").read_text() == text
    # Labels 0 and 1 have 4 of the 32 test images, the others 3; of the first 10 each label has one.
    assert cells(text, "CIFAR-10-JPEG")[1:-1] == ["32", "0.8750", "0.7500", "0.0938", "0.1875", "0.7500"]
    by_label = ["10", "0.9000", "0.8000", "0.1000", "0.2000", "0.8000"]
    assert cells(text, "lossless subset")[1:-1] == by_label
    assert cells(text, "CIFAR-10-JPEG, the images of that subset")[1:-1] == by_label
    summary = json.loads((out / "run" / "summary.json").read_text())
    assert cells(text, "teacher", "2 of 2")[2] == f"{summary['seconds']['teacher']:.0f}"
    assert cells(text, "student", "3 of 3")[2] == f"{summary['seconds']['student']:.0f}"
    rates = [json.loads(line) for line in (out / "benchmarks.jsonl").read_text().splitlines()]
    (row,) = [line for line in text.splitlines() if line.startswith("| student | ") and "float32" in line]
    assert f" {rates[1]['images_per_second']:.0f} ({rates[1]['lowest']:.0f} to " in row
    assert f" | {rates[1]['fraction_of_peak']:.3f} | " in row
    assert cells(text, "train")[5] == "5"  # calls
    assert torch.__version__ in cells(text, "benchmark")[2]
    assert "| PGD-3 |" in text
    assert "`network.width=2`" in text
    assert "data.path" not in text
    assert cells(text, "CC-IBP")[1:] == ["0.8009", "0.6378"]
    assert cells(text, "MTL-IBP")[1:] == ["0.8011", "0.6324"]
    assert cells(text, "Exp-IBP")[1:] == ["0.8061", "0.6165"]
    assert "on original data with complete verification" in text


def test_report_of_an_unfinished_training(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cifar10_full.main(["report", "--out", str(tmp_path)]) == BAD_INPUT
    assert cifar10_full.main(arguments("train", data, tmp_path, "--minutes", "0", *settings())) == MORE_TO_DO
    capsys.readouterr()
    assert cifar10_full.main(["report", "--out", str(tmp_path)]) == FINISHED
    text = capsys.readouterr().out
    assert cells(text, "teacher", "1 of 2")[2] == "not finished"
    assert cells(text, "student", "0 of 3")[2] == "not finished"


def test_a_missing_package_is_named() -> None:
    failed = run_python(without("jaxtyping", "PIL"), "report", "--out", "nowhere")
    assert failed.returncode == 1
    assert "cannot start; missing: jaxtyping, pillow." in failed.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["train", "--out", "x"], "--data is missing"),
        (["train", "--data", "nowhere", "--out", "x", "--set", "student.epoch=1"], "student.epoch"),
        (["report", "--out", "nowhere"], "holds no training"),
    ],
)
def test_wrong_input_is_told_in_a_line(
    words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cifar10_full.main([*words, "--device", "cpu"]) == BAD_INPUT
    assert text in capsys.readouterr().err


def test_a_deadline_expects_the_longest_unit_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(cifar10_full, "time", SimpleNamespace(monotonic=lambda: now))
    deadline = Deadline(60)
    assert deadline.allows_another()
    now = 110.0  # reading images is no unit of work
    deadline.begin()
    now = 130.0
    deadline.lap()
    now = 135.0
    deadline.lap()
    assert deadline.longest == 20
    assert deadline.allows_another()  # 35 + 22 <= 60
    assert not deadline.allows_another(2.0)
    now = 139.0  # 39 + 22
    assert not deadline.allows_another()
