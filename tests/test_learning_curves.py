"""Learning curves: the committed ones are whole and in order; measuring goes on where it stopped."""

import itertools
import json
from collections import Counter
from pathlib import Path

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.learning_curves import SCALES, SCHEMAS, main

FIXTURE = Path(__file__).parent / "assets" / "search"
EPOCHS = {"ninth": 2, "third": 6, "full": 18}
TINY = (
    "student.epochs=3",
    "teacher.epochs=1",
    "network.width=8",
    "data.train_images=100",
    "data.validation_images=20",
    "verification.attack.steps=2",
)


def table(name: str, folder: Path = FIXTURE) -> pa.Table:
    return pq.read_table(folder / f"{name}.parquet")


def numbers(name: str) -> Counter[int]:
    return Counter(table(name)["number"].to_pylist())


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_committed_table_has_its_schema_and_says_where_it_comes_from(name: str) -> None:
    found = table(name)
    assert found.schema.equals(SCHEMAS[name])
    assert set(found.schema.metadata) >= {b"machine", b"versions", b"settings", b"space", b"date"}


def test_the_committed_files_are_small() -> None:
    assert sum(file.stat().st_size for file in FIXTURE.glob("*.parquet")) < 300_000


def test_every_committed_run_has_whole_curves_a_verification_and_a_verdict_for_each_image() -> None:
    runs = {run["number"]: run for run in table("runs").to_pylist()}
    assert len(runs) == table("runs").num_rows >= 30
    keys = ("number", "scale", "epoch")
    rows = [tuple(row[key] for key in keys) for row in table("curves").select(keys).to_pylist()]
    expected = {(number, scale, 1 + epoch) for number in runs for scale in SCALES for epoch in range(EPOCHS[scale])}
    assert set(rows) == expected
    assert len(rows) == len(expected)
    assert numbers("verdicts") == {number: run["num_images"] for number, run in runs.items()}
    assert set(numbers("verification")) == set(runs)


def test_committed_accuracies_are_in_order() -> None:
    for run in table("runs").to_pylist():
        assert 0 <= run["certified"] <= run["certified_upper"] <= run["adversarial"] <= run["standard"] <= 1
    for row in table("curves").to_pylist():
        assert 0 <= row["ibp_certified"] <= row["crown_certified"] <= row["standard"] <= 1


def test_a_committed_verification_narrows_to_the_final_accuracies() -> None:
    reports: dict[int, list[dict[str, float]]] = {}
    for report in table("verification").to_pylist():
        reports.setdefault(report["number"], []).append(report)
    for run in table("runs").to_pylist():
        mine, images = reports[run["number"]], run["num_images"]
        for before, after in itertools.pairwise(mine):
            assert all(before[name] <= after[name] for name in ("seconds", "proved", "falsified"))
        assert {sum(report[name] for name in ("proved", "falsified", "open")) for report in mine} == {images}
        assert mine[-1]["proved"] / images == run["certified"]
        assert (images - mine[-1]["falsified"]) / images == run["certified_upper"]


@pytest.mark.timeout(20)  # three small trainings: 2 s on an idle core, near the limit on a busy one
def test_a_measurement_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured, collected = tmp_path / "measured", tmp_path / "collected"
    command = ["--out", str(measured), "--runs", "2", "--space", "digits", "--set", *TINY]
    first, second = (measured / "configurations" / name for name in ("000.json", "001.json"))
    verbosity = optuna.logging.get_verbosity()
    try:
        assert main(command) == 0
        stopped, finished = second.read_text(), first.stat().st_mtime_ns
        second.unlink()
        assert main(command) == 0
    finally:
        optuna.logging.set_verbosity(verbosity)
    assert first.stat().st_mtime_ns == finished
    # What is drawn and trained depends on the seed and the number alone: only seconds differ.
    assert timeless(json.loads(second.read_text())) == timeless(json.loads(stopped))

    assert main(["--out", str(measured), "--collect", str(collected)]) == 0
    drawn = table("runs", collected)["params"].to_pylist()
    assert drawn[0] != drawn[1]
    scales = Counter(table("curves", collected)["scale"].to_pylist())
    assert scales == {"ninth": 2 * 1, "third": 2 * 1, "full": 2 * 3}
    assert main([*command[:-1], "verification.attack.steps=3"]) == 2
    assert "take another --out" in capsys.readouterr().err


def timeless(rows: dict[str, list[dict[str, object]]]) -> dict[str, list[dict[str, object]]]:
    return {
        name: [{key: value for key, value in row.items() if "seconds" not in key} for row in each]
        for name, each in rows.items()
    }


def test_nothing_to_collect_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--collect", str(tmp_path)]) == 2
    assert "no finished configuration" in capsys.readouterr().err
