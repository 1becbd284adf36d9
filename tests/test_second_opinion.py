"""python -m ccdist.second_opinion: results of another verifier against ours."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ccdist import second_opinion
from ccdist.verdicts import SCHEMA

# index -> our verdict, and what the other verifier says
CASES = {
    10: ("certified", "unsat"),
    11: ("falsified", "sat"),
    12: ("undecided", "holds"),
    13: ("undecided", "Violated"),
    14: ("certified", "TIMEOUT"),
    15: ("falsified", "unknown"),
    16: ("undecided", "error"),
    17: ("undecided", "error_exit_code_1"),
    18: ("certified", "verified"),
}


def write_verdicts(path: Path, verdicts: dict[int, str]) -> Path:
    rows = [
        {"index": index, "label": index % 10, "prediction": 0, "verdict": verdict, "method": "crown", "seconds": 0.1}
        | {"lower_bound": None, "branches": 0}
        for index, verdict in verdicts.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)
    return path


def line(index: Any, result: str, *, onnx: str = "model.onnx", seconds: str = "1.5") -> str:
    return f"digits,{onnx},./vnnlib/prop_{index}.vnnlib,0.2,{result},{seconds}\n"


@pytest.fixture
def verdicts(tmp_path: Path) -> Path:
    return write_verdicts(tmp_path / "verdicts.parquet", {index: ours for index, (ours, _) in CASES.items()})


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "results.csv"
    path.write_text("".join(line(index, result) for index, (_, result) in CASES.items()))
    return path


def run(*arguments: Any) -> int:
    return second_opinion.main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert run(*arguments) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    assert text.startswith("error: ")
    return text


def test_agreement_and_what_only_one_decided(verdicts: Path, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verdicts, results) == 0
    assert capsys.readouterr().out.splitlines() == [
        "9 images in both files, 0 only in ours, 0 only in the results",
        "  ours / other   certified   falsified   undecided",
        "     certified           2           0           1",
        "     falsified           0           1           1",
        "     undecided           1           1           2",
        "agreed on 3, undecided by both 2",
        "decided only by ours: 2; certified: 14; falsified: 15",
        "decided only by the other: 2; certified: 12; falsified: 13",
        "contradictions: 0",
    ]


def test_a_contradiction_is_listed_and_is_exit_code_1(
    tmp_path: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts = write_verdicts(
        tmp_path / "mine.parquet", {10: "falsified", 11: "certified", 12: "certified", 99: "certified"}
    )
    assert run(verdicts, results) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 images in both files, 1 only in ours, 6 only in the results"
    assert lines[-3:] == [
        "contradictions: 2",
        "  image 10 (label 0): ours falsified by crown, the other unsat",
        "  image 11 (label 1): ours certified by crown, the other sat",
    ]


def test_both_answers_are_written_as_a_table(verdicts: Path, results: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.parquet"
    assert run(verdicts, results, "--out", out) == 0
    table = pq.read_table(out)
    assert table.column_names == [*SCHEMA.names, "other_verdict", "other_result", "other_seconds"]
    assert table["index"].to_pylist() == sorted(CASES)
    assert table["other_result"].to_pylist() == [result for _, result in CASES.values()]
    assert set(table["other_seconds"].to_pylist()) == {1.5}
    assert set(tmp_path.iterdir()) == {out, verdicts, results}


def test_order_spaces_and_empty_lines_do_not_matter(verdicts: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("\n" + "".join(line(index, f" {CASES[index][1]} ") for index in reversed(CASES)) + "\n\n")
    assert run(verdicts, path) == 0
    table = second_opinion.read_results(path)
    assert table["index"].to_pylist() == sorted(CASES)
    assert table["other_verdict"].to_pylist()[:4] == ["certified", "falsified", "certified", "falsified"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "has no lines; expected one for each image: category, onnx"),
        (line(1, "maybe"), "line 1: unknown result 'maybe'; known: sat or violated; unsat, holds or verified; timeout"),
        (line(1, "falsified"), "line 1: unknown result 'falsified'"),
        (line(1, "sat") + line(2, "certified"), "line 2: unknown result 'certified'"),
        (
            "category,onnx,vnnlib,prepare-time,result,run-time\n" + line(1, "sat"),
            "line 1 is a header; remove the header",
        ),
        (line(1, ""), "line 1: unknown result ''"),
        (line(1, "sat") + line(1, "sat"), "line 2: image 1 stands there twice"),
        (line(1, "sat") + line(2, "sat", onnx="b.onnx"), "line 2: b.onnx is another network"),
        (line("one", "sat"), "is no property of ccdist.export; expected prop_INDEX.vnnlib"),
        (line(1, "sat", seconds="soon"), "line 1: the run time is 'soon'; expected seconds"),
        (line(1, "sat", seconds="nan"), "the run time is 'nan'"),
        ("a,b,c\n", "line 1 has 3 values; expected 6: category, onnx, vnnlib, prepare-time, result, run-time"),
        (line(1, "sat"), "the two files have no image in common"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_wrong_results_have_their_line(
    verdicts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | bytes, expected: str
) -> None:
    path = tmp_path / "wrong.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert expected in refused(capsys, verdicts, path)


def test_out_never_replaces_what_is_compared_nor_something_else(
    verdicts: Path, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deep").mkdir()
    before = {path: path.read_bytes() for path in (verdicts, results)}
    for path in (verdicts, results, tmp_path / "deep" / ".." / verdicts.name):
        assert "is one of the files to compare" in refused(capsys, verdicts, results, "--out", path)
    other = write_verdicts(tmp_path / "mine.parquet", {1: "certified"})
    for path in (other, tmp_path / "deep"):
        assert "holds something else than a compared table" in refused(capsys, verdicts, results, "--out", path)
    assert {path: path.read_bytes() for path in before} == before
    assert "cannot be written: File name too long" in refused(capsys, verdicts, results, "--out", "x" * 300)
    both = tmp_path / "both.parquet"
    assert run(verdicts, results, "--out", both) == run(verdicts, results, "--out", both) == 0


def test_verdicts_of_another_kind(
    verdicts: Path, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both, listed = tmp_path / "both.parquet", tmp_path / "listed.parquet"
    assert run(verdicts, results, "--out", both) == 0
    assert "has a column other_verdict: it is compared already" in refused(capsys, both, results)
    table = pq.read_table(verdicts)
    lists = pa.array([[index] for index in table["index"].to_pylist()])
    pq.write_table(table.set_column(0, "index", lists), listed)
    assert "the column index holds list" in refused(capsys, listed, results)
    nulls = pa.nulls(table.num_rows, pa.int32())
    pq.write_table(table.set_column(0, "index", nulls), listed)
    assert "the column index has empty values" in refused(capsys, listed, results)


# ---- --export --------------------------------------------------------------------------------------------------------

THREAT = {"norm": "linf", "epsilon": "1/50"}
ABOUT = {"data": "digits", "data_fingerprint": "f" * 16, "split": "test", "weights_sha256": "a" * 64}
VERIFIED = ABOUT | {"images": [10, 19], "verification": {"threat": THREAT, "seed": 0}}
EXPORTED = ABOUT | {"images": list(range(10, 19)), "threat": THREAT, "labels": [index % 10 for index in range(10, 19)]}


def exported(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "export.json").write_text(json.dumps(EXPORTED | changes))
    return folder


@pytest.mark.parametrize("name", ["verification.json", "summary.json"])
def test_an_export_of_the_same_verification(verdicts: Path, results: Path, tmp_path: Path, name: str) -> None:
    verdicts.with_name(name).write_text(json.dumps(VERIFIED))
    for given in (verdicts, verdicts.parent):
        assert run(given, results, "--export", exported(tmp_path / "export")) == 0


def test_an_export_of_some_of_the_images(verdicts: Path, tmp_path: Path) -> None:
    verdicts.with_name("verification.json").write_text(json.dumps(VERIFIED))
    results = tmp_path / "some.csv"
    results.write_text(line(10, "unsat"))
    folder = exported(tmp_path / "export", images=[10, 11], labels=[0, 1], data_fingerprint="e" * 16)
    assert run(verdicts, results, "--export", folder) == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"weights_sha256": "b" * 64}, f"there weights is {'b' * 16}, in "),
        ({"threat": THREAT | {"epsilon": "1/40"}}, "there threat is linf 1/40, in "),
        ({"data_fingerprint": "e" * 16}, f"there data_fingerprint is {'e' * 16}, in "),
        ({"data": "mnist"}, "there data is mnist, in "),
        ({"split": "train"}, "there split is train, in "),
        ({"labels": [0, 1, 3, 3, 4, 5, 6, 7, 8]}, "image 12 has label 3, ours has 2"),
        ({"images": [10], "labels": [0]}, "has no image 11, which the results are about"),
        ({"labels": [0]}, "does not say what it is about"),
        ({"threat": None}, "does not say what it is about"),
    ],
)
def test_an_export_of_another_verification_is_refused(
    verdicts: Path,
    results: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    expected: str,
) -> None:
    verdicts.with_name("verification.json").write_text(json.dumps(VERIFIED))
    assert expected in refused(capsys, verdicts, results, "--export", exported(tmp_path / "export", **changes))


def test_an_export_that_is_none(
    verdicts: Path, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(tmp_path / "export")
    assert "is no verification.json or summary.json" in refused(capsys, verdicts, results, "--export", folder)
    (tmp_path / "summary.json").write_text(json.dumps({"standard_accuracy": 0.5}))  # of a training
    assert "does not say what it is about" in refused(capsys, verdicts, results, "--export", folder)
    assert "export.json cannot be read: No such file" in refused(capsys, verdicts, results, "--export", tmp_path / "x")


def test_a_folder_stands_for_its_verdicts(verdicts: Path, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verdicts.parent, results) == 0
    assert "is one of the files to compare" in refused(capsys, verdicts.parent, results, "--out", verdicts)


def test_a_wrong_use_is_told_in_a_line(verdicts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "arguments are required: RESULTS.csv; see python -m ccdist.second_opinion --help" in refused(
        capsys, verdicts
    )
    assert "argument --out: it is empty" in refused(capsys, verdicts, "x", "--out", "")


def test_files_that_are_not_there_or_something_else(
    verdicts: Path, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "No such file" in refused(capsys, verdicts, tmp_path / "none.csv")
    assert "none.parquet cannot be read" in refused(capsys, tmp_path / "none.parquet", results)
    assert "results.csv cannot be read" in refused(capsys, results, results)
    assert "cannot be written" in refused(capsys, verdicts, results, "--out", tmp_path / "none" / "x.parquet")
    pq.write_table(pa.table({"index": [1]}), tmp_path / "other.parquet")
    assert "has no column label" in refused(capsys, tmp_path / "other.parquet", results)
    odd = write_verdicts(tmp_path / "odd.parquet", {10: "maybe"})
    assert "has the verdict 'maybe'; expected certified, falsified, undecided" in refused(capsys, odd, results)
    table = pq.read_table(verdicts)
    pq.write_table(pa.concat_tables([table, table]), tmp_path / "twice.parquet")
    assert "two rows about the same image" in refused(capsys, tmp_path / "twice.parquet", results)
