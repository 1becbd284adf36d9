"""python -m ccdist.second_opinion VERDICTS RESULTS.csv: our verdicts against those of another verifier.

VERDICTS is the folder of a verification, or its verdicts.parquet.

The results are the lines that VNN-COMP's scripts write for the instances of `ccdist.export`: category, onnx, vnnlib,
seconds to prepare, result, seconds to run. A contradiction, one proof against one counter-example, means that one of
the two verifiers is wrong; undecided contradicts nothing.

Exit codes: 0 no contradiction; 1 a contradiction; 2 something asked for is wrong.
"""

import argparse
import csv
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ccdist.atomic_files import write_table
from ccdist.command_line import BAD_INPUT, OK, Parser, place, refused
from ccdist.verdicts import SCHEMA, Verdict

CONTRADICTION = 1  # exit code
KNOWN_RESULTS = "sat or violated; unsat, holds or verified; timeout, unknown, error"
# What a verification and an export say about themselves.
VERDICTS_FILE, VERIFICATIONS, EXPORT = "verdicts.parquet", ("verification.json", "summary.json"), "export.json"
COLUMNS = ("category", "onnx", "vnnlib", "prepare-time", "result", "run-time")

# A property describes a counter-example: "sat" is one, "unsat" a proof. In any case, as the years of VNN-COMP spell it.
ANSWERS = {
    "sat": Verdict.FALSIFIED,
    "violated": Verdict.FALSIFIED,
    "unsat": Verdict.CERTIFIED,
    "holds": Verdict.CERTIFIED,
    "verified": Verdict.CERTIFIED,
    "unknown": Verdict.UNDECIDED,
    "timeout": Verdict.UNDECIDED,
    "error": Verdict.UNDECIDED,
    "run_instance_timeout": Verdict.UNDECIDED,
    "prepare_instance_error": Verdict.UNDECIDED,
    "no_result_in_file": Verdict.UNDECIDED,
}
# What VNN-COMP's scripts write when a tool crashed goes on with the exit code.
_CRASHES = ("error_", "prepare_instance_error_")

NEEDED = ("index", "label", "verdict", "method")  # of our columns

RESULTS_SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("other_verdict", pa.string()),
        ("other_result", pa.string()),  # as the file has it
        ("other_seconds", pa.float32()),
    ]
)


class SecondOpinionError(ValueError):
    """A file cannot be compared; one line says which, why, and what to do."""


def read_results(path: Path) -> pa.Table:
    """The answers of a VNN-COMP results file by image, as a table of `RESULTS_SCHEMA` in ascending order.

    Raises:
        SecondOpinionError: a line is not of the form, the images are not those of one network, or one stands twice.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = [(number, line) for number, line in enumerate(csv.reader(file), 1) if any(line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SecondOpinionError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    rows: dict[int, tuple[Verdict, str, float]] = {}
    networks: set[str] = set()
    for number, line in lines:
        where = f"{path}, line {number}"
        if number == lines[0][0] and _is_header(line):
            raise SecondOpinionError(f"{where} is a header; remove the header")
        if len(line) != len(COLUMNS):
            raise SecondOpinionError(f"{where} has {len(line)} values; expected {len(COLUMNS)}: {', '.join(COLUMNS)}")
        _, onnx, vnnlib, _, result, seconds = (value.strip() for value in line)
        index = _index(vnnlib, where)
        if index in rows:
            raise SecondOpinionError(f"{where}: image {index} stands there twice; keep one of its lines")
        networks.add(onnx)
        if len(networks) > 1:
            raise SecondOpinionError(f"{where}: {onnx} is another network than the lines before; compare one at a time")
        rows[index] = (_verdict(result, where), result, _seconds(seconds, where))
    if not rows:
        raise SecondOpinionError(f"{path} has no lines; expected one for each image: {', '.join(COLUMNS)}")
    return pa.Table.from_pylist(
        [dict(zip(RESULTS_SCHEMA.names, (index, *rows[index]), strict=True)) for index in sorted(rows)], RESULTS_SCHEMA
    )


def _is_header(line: Sequence[str]) -> bool:
    """Every line about an image has numbers in it."""
    return len(line) == len(COLUMNS) and not any(character.isdigit() for value in line for character in value)


def _index(vnnlib: str, where: str) -> int:
    name = re.search(r"(?:^|[/\\])prop_(\d{1,9})\.vnnlib(?:\.gz)?$", vnnlib, re.ASCII)
    if name is None:
        raise SecondOpinionError(
            f"{where}: {vnnlib[:80]!r} is no property of ccdist.export; expected prop_INDEX.vnnlib"
        )
    return int(name[1])


def _verdict(result: str, where: str) -> Verdict:
    word = result.lower()
    if word in ANSWERS:
        return ANSWERS[word]
    if word.startswith(_CRASHES):
        return Verdict.UNDECIDED
    raise SecondOpinionError(f"{where}: unknown result {result[:40]!r}; known: {KNOWN_RESULTS}")


def _seconds(text: str, where: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise SecondOpinionError(f"{where}: the run time is {text[:40]!r}; expected seconds")
    return seconds


def read_verdicts(path: Path) -> pa.Table:
    """The table of a verification, as `ccdist.verification.verify` makes it: a file.

    Raises:
        SecondOpinionError: it is damaged, or another table.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise SecondOpinionError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    missing = [name for name in NEEDED if name not in table.column_names]
    if missing:
        raise SecondOpinionError(f"{path} has no column {missing[0]}; expected the table of a verification")
    taken = [name for name in table.column_names if name.startswith("other_")]
    if taken:
        raise SecondOpinionError(f"{path} has a column {taken[0]}: it is compared already; give the verification's own")
    for name in NEEDED:
        kind, expected = table.schema.field(name).type, SCHEMA.field(name).type
        if not any(of_kind(kind) and of_kind(expected) for of_kind in (pa.types.is_integer, _is_text)):
            raise SecondOpinionError(f"{path}: the column {name} holds {kind}; expected {expected}")
        if table[name].null_count:
            raise SecondOpinionError(f"{path}: the column {name} has empty values; expected one for each image")
    unknown = set(table["verdict"].to_pylist()) - set(Verdict)
    if unknown:
        raise SecondOpinionError(f"{path} has the verdict {min(map(str, unknown))!r}; expected {', '.join(Verdict)}")
    indices = table["index"].to_pylist()
    if len(set(indices)) < len(indices):
        raise SecondOpinionError(f"{path} has two rows about the same image; expected one for each")
    return table


def _is_text(kind: pa.DataType) -> bool:
    return kind in (pa.string(), pa.large_string())


def compared(verdicts: pa.Table, results: pa.Table) -> pa.Table:
    """Both answers about each image that is in both tables: our columns, then those of `RESULTS_SCHEMA`.

    Raises:
        SecondOpinionError: there is no such image.
    """
    rows = {row["index"]: row for row in results.to_pylist()}
    own = [index in rows for index in verdicts["index"].to_pylist()]
    ours = verdicts.filter(pa.array(own, pa.bool_())).sort_by("index")
    if ours.num_rows == 0:
        raise SecondOpinionError("the two files have no image in common; are they about the same images?")
    for column in list(RESULTS_SCHEMA)[1:]:
        values = [rows[index][column.name] for index in ours["index"].to_pylist()]
        ours = ours.append_column(column, pa.array(values, column.type))
    return ours


def contradictions(table: pa.Table) -> pa.Table:
    """The rows of a compared table in which one verifier proves what the other one refutes."""
    decided = {str(Verdict.CERTIFIED), str(Verdict.FALSIFIED)}
    pairs = zip(table["verdict"].to_pylist(), table["other_verdict"].to_pylist(), strict=True)
    return table.filter(pa.array([{*pair} == decided for pair in pairs], pa.bool_()))


def report(table: pa.Table, *, only_ours: int, only_other: int) -> list[str]:
    """Lines of text: how often each pair of answers was given, who alone decided what, every contradiction."""
    rows = table.to_pylist()
    pairs = [(row["verdict"], row["other_verdict"]) for row in rows]
    lines = [f"{len(rows)} images in both files, {only_ours} only in ours, {only_other} only in the results"]
    lines.append(f"{'ours / other':>14}" + "".join(f"{other:>12}" for other in Verdict))
    lines += [f"{own:>14}" + "".join(f"{pairs.count((own, other)):12}" for other in Verdict) for own in Verdict]
    agreed = sum(own == other != Verdict.UNDECIDED for own, other in pairs)
    lines.append(f"agreed on {agreed}, undecided by both {pairs.count((Verdict.UNDECIDED,) * 2)}")
    for who, decided, other in (("ours", "verdict", "other_verdict"), ("the other", "other_verdict", "verdict")):
        alone = [row for row in rows if row[decided] != Verdict.UNDECIDED == row[other]]
        listed = "".join(f"; {verdict}: {_listed(alone, decided, verdict)}" for verdict in list(Verdict)[:2])
        lines.append(f"decided only by {who}: {len(alone)}{listed if alone else ''}")
    found = contradictions(table).to_pylist()
    lines.append(f"contradictions: {len(found)}")
    lines += [
        f"  image {row['index']} (label {row['label']}): ours {row['verdict']} by {row['method']}, the other "
        f"{row['other_result']}"
        for row in found
    ]
    return lines


def check_export(folder: Path, verdicts_path: Path, verdicts: pa.Table, results: pa.Table) -> None:
    """Refuse an export of another network, threat or data set than the verification's.

    Both may be about some of the other's images: then the fingerprints of their data differ, and labels are compared.

    Args:
        folder: as `python -m ccdist.export` wrote it.
        verdicts_path: the verification's table; verification.json or summary.json lies beside it.

    Raises:
        SecondOpinionError: they differ, one does not say what it is about, or a result is about no exported image.
    """
    exported, file = _description(folder / EXPORT), _beside(verdicts_path)
    about = _description(file)
    try:
        asked = {"weights": about["weights_sha256"], "threat": dict(about["verification"]["threat"])}
        written = {"weights": exported["weights_sha256"], "threat": dict(exported["threat"])}
        for key in ("data", "split"):
            asked[key], written[key] = about[key], exported[key]
        images, verified = list(exported["images"]), list(range(*about["images"]))
        if images == verified:
            asked["data_fingerprint"], written["data_fingerprint"] = (
                about["data_fingerprint"],
                exported["data_fingerprint"],
            )
        labels = dict(zip(images, exported["labels"], strict=True))
    except (LookupError, TypeError, ValueError) as error:
        told = f"{folder / EXPORT} or {file}"
        raise SecondOpinionError(
            f"{told} does not say what it is about ({error!r}); expected those of ccdist"
        ) from error
    for key, ours in asked.items():
        if written[key] != ours:
            raise SecondOpinionError(
                f"--export {folder} is of another verification: there {key} is {_short(written[key])}, in {file} it is "
                f"{_short(ours)}"
            )
    for index, label in zip(verdicts["index"].to_pylist(), verdicts["label"].to_pylist(), strict=True):
        if labels.get(index, label) != label:
            raise SecondOpinionError(f"--export {folder}: image {index} has label {labels[index]}, ours has {label}")
    others = [index for index in results["index"].to_pylist() if index not in labels]
    if others:
        raise SecondOpinionError(f"--export {folder} has no image {others[0]}, which the results are about")


def _beside(verdicts: Path) -> Path:
    for name in VERIFICATIONS:
        if (verdicts.parent / name).exists():
            return verdicts.parent / name
    raise SecondOpinionError(
        f"beside {verdicts} is no {' or '.join(VERIFICATIONS)} to compare with the export; leave --export out"
    )


def _description(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise SecondOpinionError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _short(value: Any) -> str:
    return " ".join(map(str, value.values())) if isinstance(value, dict) else str(value)[:16]


def _listed(rows: list[dict[str, object]], column: str, verdict: str) -> str:
    indices = [str(row["index"]) for row in rows if row[column] == verdict]
    return " ".join(indices) or "none"


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        args = _parser().parse_args(arguments)
        path = Path(args.verdicts)
        if path.is_dir():
            path = path / VERDICTS_FILE
        if args.out is not None:
            _check_replaceable(Path(args.out), path, Path(args.results))
        verdicts, results = read_verdicts(path), read_results(Path(args.results))
        if args.export is not None:
            check_export(Path(args.export), path, verdicts, results)
        table = compared(verdicts, results)
        if args.out is not None:
            _write(table, Path(args.out))
    except ValueError as error:
        return refused(error, BAD_INPUT)
    both = table.num_rows
    print("\n".join(report(table, only_ours=verdicts.num_rows - both, only_other=results.num_rows - both)))
    return CONTRADICTION if contradictions(table).num_rows else OK


def _check_replaceable(path: Path, *inputs: Path) -> None:
    """Refuse to write over what is compared, or over anything but an earlier compared table.

    Raises:
        SecondOpinionError: the file is one of these.
    """
    try:
        same, there = path.resolve() in [each.resolve() for each in inputs], path.exists()
    except OSError as error:
        raise SecondOpinionError(f"--out {path} cannot be written: {error.strerror or error}") from error
    if same:
        raise SecondOpinionError(f"--out {path} is one of the files to compare; choose another file")
    if not there:
        return
    try:
        names = pq.read_schema(path).names
    except (OSError, pa.ArrowException):
        names = []
    if not set(RESULTS_SCHEMA.names) <= set(names):
        raise SecondOpinionError(f"--out {path} holds something else than a compared table; choose another file")


def _write(table: pa.Table, path: Path) -> None:
    try:
        write_table(path, table)
    except OSError as error:
        raise SecondOpinionError(f"--out {path} cannot be written: {error.strerror or error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m ccdist.second_opinion",
        description="Compare a verification with the results of another verifier on the same images, as exported by "
        "python -m ccdist.export.",
    )
    parser.add_argument("verdicts", metavar="VERDICTS", help="the folder of a verification, or its verdicts.parquet")
    parser.add_argument("results", metavar="RESULTS.csv", help=f"lines of {', '.join(COLUMNS)}, without a header")
    parser.add_argument(
        "--export",
        metavar="DIR",
        type=place,
        help="the folder of ccdist.export: refused if it is of another network, threat or data set than VERDICTS",
    )
    parser.add_argument("--out", metavar="FILE.parquet", type=place, help="write both answers about each image here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
