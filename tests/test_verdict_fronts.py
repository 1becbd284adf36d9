"""Accuracies counted from files of verdicts are those of `ccdist.verdicts`, and what differs from a study is said."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from studies import config_of, open_study

from benchmarks.reports import made_study
from ccdist.atomic_files import write_table
from ccdist.verdicts import ATTACKS, SCHEMA, Accuracies, Verdict, accuracies
from search import front
from search.artifacts.places import TrialPlaces
from search.results.verdict_fronts import (
    DamagedVerdictsError,
    accuracies_of_counts,
    file_accuracies,
    front_from_verdicts,
    pair_counts,
)
from search.studies.records import StudyRecord, TrialResult
from search.study import load_record
from search.trials.verifying import Spent, result_of

# What a ladder can decide and by which rung: attacks, members of the ensemble, bounds, branch and bound both ways.
DECIDED = [
    (Verdict.FALSIFIED, "clean"),
    *((Verdict.FALSIFIED, attack) for attack in (*ATTACKS, "branch_and_bound")),
    *((Verdict.CERTIFIED, rung) for rung in ("ibp", "crown", "alpha_crown", "branch_and_bound")),
    (Verdict.UNDECIDED, ""),
]
WITH_NULL: list[tuple[str | None, str | None]] = [(None, None), (None, "clean"), ("falsified", None)]
SPENT = Spent({"teacher": 1.0, "student": 2.0, "verification": 3.0}, {"device": "none"})


def verdicts(rows: list[tuple[str | None, str | None]]) -> pa.Table:
    """A whole table of verdicts with these columns; the others are of no account here."""
    count = len(rows)
    columns = {name: pa.nulls(count, SCHEMA.field(name).type) for name in SCHEMA.names}
    columns["index"] = pa.array(range(count), pa.int32())
    columns |= {name: pa.array([row[i] for row in rows], pa.string()) for i, name in enumerate(("verdict", "method"))}
    return pa.table(columns, SCHEMA)


def drawn(seed: int, count: int) -> pa.Table:
    chosen = np.random.default_rng(seed).integers(0, len(DECIDED), count)
    return verdicts([DECIDED[index] for index in chosen])


# ---- counting --------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([*DECIDED, ("falsified", "no_attack"), *WITH_NULL]), min_size=1))
@example([("falsified", "clean"), ("certified", "ibp"), *WITH_NULL])
def test_counts_give_the_numbers_of_the_table(rows: list[tuple[str | None, str | None]]) -> None:
    table = verdicts(rows)
    assert accuracies_of_counts(pair_counts(table)) == accuracies(table)


@given(st.lists(st.lists(st.sampled_from(DECIDED)), min_size=1).filter(any))
def test_dictionaries_of_parts_may_differ(parts: list[list[tuple[str, str]]]) -> None:
    # Columns whose chunks end elsewhere, each with a dictionary in the order of its own rows.
    rows = [row for part in parts for row in part]
    by_part = pa.chunked_array([pa.array([row[0] for row in part], pa.string()).dictionary_encode() for part in parts])
    halves = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    by_half = pa.chunked_array([pa.array([row[1] for row in half], pa.string()).dictionary_encode() for half in halves])
    table = pa.table({"verdict": by_part, "method": by_half})
    assert accuracies_of_counts(pair_counts(table)) == accuracies(verdicts(rows))


def test_the_numbers_by_hand(tmp_path: Path) -> None:
    # 10 images: one wrong at once, two broken by attacks (one by a member of the ensemble), one by branch and bound,
    # four proved, two left open.
    rows = [("falsified", "clean"), ("falsified", "pgd"), ("falsified", "square"), ("falsified", "branch_and_bound")]
    rows += [("certified", "ibp")] * 3 + [("certified", "branch_and_bound")] + [("undecided", "")] * 2
    assert "square" in ATTACKS
    write_table(tmp_path / "verdicts.parquet", verdicts(rows))
    assert file_accuracies(tmp_path / "verdicts.parquet") == Accuracies(0.9, 0.7, 0.4, 0.6, 10)


@pytest.mark.parametrize("compression", ["zstd", "none"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_however_a_file_is_written(tmp_path: Path, compression: str, dictionary: bool) -> None:
    path, table = tmp_path / "verdicts.parquet", drawn(0, 3000)
    pq.write_table(table, path, compression=compression, use_dictionary=dictionary, row_group_size=700)
    assert file_accuracies(path) == accuracies(table)


def test_what_is_no_table_of_verdicts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.parquet"
    with pytest.raises(FileNotFoundError):
        file_accuracies(path)
    write_table(path, verdicts([]))
    with pytest.raises(DamagedVerdictsError, match="has no rows"):
        file_accuracies(path)
    for wrong in (drawn(0, 5).drop_columns("method"), pa.table({"verdict": [1, 2], "method": ["a", "b"]})):
        write_table(path, wrong)
        with pytest.raises(DamagedVerdictsError, match=r"is damaged \(expected columns of text verdict and method"):
            file_accuracies(path)
    write_table(path, drawn(0, 5).select(["verdict", "method"]))
    whole = path.read_bytes()
    for content in (whole[:-20], whole[:100], b"", b"PAR1", whole[:4] + b"\0" * 100 + whole[104:]):
        path.write_bytes(content)
        with pytest.raises(DamagedVerdictsError, match="is damaged") as caught:
            file_accuracies(path)
        assert "\n" not in str(caught.value)


# ---- a study ---------------------------------------------------------------------------------------------------


class Stored:
    """A study of some finished trials, in its database and with its files."""

    def __init__(self, storage: Path, num_trials: int, num_images: int = 40) -> None:
        storage.mkdir()
        self.url, self.artifacts, self.storage = f"sqlite:///{storage}/study.db", storage / "artifacts", storage
        study = open_study(config_of(storage), storage / "study.db")
        self.results: list[TrialResult] = []
        for number in range(num_trials):
            assignment, table = study.ask(), drawn(number, num_images)
            self.results.append(result_of(table, SPENT, 1.0))
            self.path(number).parent.mkdir(parents=True)
            write_table(self.path(number), table)
            study.tell(assignment.number, self.results[-1])
        study.tell_failed(study.ask().number, "why")
        study.tell_stopped(study.ask().number, "beaten", 1.0)
        study.ask()

    def path(self, number: int) -> Path:
        return TrialPlaces.of(self.artifacts, "tiny", f"tiny-{number:04d}").verdicts

    def record(self) -> StudyRecord:
        return load_record(self.url, "tiny")


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return Stored(tmp_path / "runs", 6)


def test_a_study_is_found_again_in_its_verdicts(stored: Stored) -> None:
    record = stored.record()
    found = front_from_verdicts(record, stored.artifacts)
    assert (found.record, found.num_counted, found.differences) == (record, 6, ())
    # Nothing is taken from the study: with results taken away or wrong, the same comes out of the files.
    wrong = dataclasses.replace(
        record,
        trials=tuple(
            dataclasses.replace(trial, standard_accuracy=0.5, certified_accuracy=0.1, certified_upper=0.2)
            if trial.state == "COMPLETE"
            else trial
            for trial in record.trials
        ),
    )
    again = front_from_verdicts(wrong, stored.artifacts)
    results = [
        (each.standard_accuracy, each.adversarial_accuracy, each.certified_accuracy, each.certified_upper)
        for each in again.record.complete
    ]
    expected = [
        (each.standard_accuracy, each.adversarial_accuracy, each.certified_accuracy, each.certified_upper)
        for each in stored.results
    ]
    assert results == expected
    assert len(again.differences) >= 6


def test_one_line_when_all_agrees(stored: Stored, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path for path in stored.storage.rglob("*") if path.is_file())
    assert front.main(["tiny", "--storage", str(stored.storage), "--from-verdicts"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[-1] == (
        "verdicts: front and accuracies counted from those of 6 trials, 40 images each, are the study's"
    )
    assert out.startswith("tiny: ")
    # It only looks: no report is written.
    assert not set(stored.storage.rglob("*.html"))
    assert {path for path in before if path.suffix == ".parquet"} == set(stored.storage.rglob("*.parquet"))


def test_a_line_for_each_trial_that_differs(stored: Stored, capsys: pytest.CaptureFixture[str]) -> None:
    stored.path(1).unlink()
    stored.path(2).write_bytes(b"no table")
    better = verdicts([("certified", "ibp")] * 39 + [("undecided", "")])
    write_table(stored.path(5), better)
    arguments = ["tiny", "--storage", str(stored.storage), "--from-verdicts"]
    assert front.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()[-4:]
    told = stored.results[5]
    assert lines[0] == "tiny-0001: verdicts.parquet is missing; only a verification of the student makes it anew"
    assert lines[1].startswith("tiny-0002: verdicts.parquet is damaged (")
    assert lines[2] == (
        f"tiny-0005: verdicts.parquet gives standard_accuracy 1, not {told.standard_accuracy:.6g}, "
        f"adversarial_accuracy 1, not {told.adversarial_accuracy:.6g}, "
        f"certified_accuracy 0.975, not {told.certified_accuracy:.6g}, "
        f"certified_upper 1, not {told.certified_upper:.6g}"
    )
    # It now beats all others, of which tiny-0003 beat the rest.
    assert lines[3] == "front: by the verdicts it is one without tiny-0003 and with tiny-0005"
    assert front.main([*arguments, "--json"]) == 1
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert shown["front"] == ["tiny-0005"]
    assert [trial["certified_accuracy"] for trial in shown["trials"][1:6:2]] == [
        None,
        stored.results[3].certified_accuracy,
        0.975,
    ]
    assert err.splitlines() == lines


def test_a_study_without_a_finished_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = Stored(tmp_path / "runs", 0)
    assert front.main(["tiny", "--storage", str(stored.storage), "--from-verdicts"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "verdicts: no trial has a result yet"


def test_artefacts_may_lie_elsewhere(stored: Stored, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = tmp_path / "elsewhere"
    stored.artifacts.rename(elsewhere)
    arguments = ["tiny", "--storage", str(stored.storage), "--from-verdicts"]
    assert front.main(arguments) == 1
    assert front.main([*arguments, "--artifacts", str(elsewhere)]) == 0
    assert "are the study's" in capsys.readouterr().out


def test_the_benchmark_measures_a_study_that_agrees_with_its_files(tmp_path: Path) -> None:
    made_study(tmp_path / "runs", config_of(tmp_path, search__points=[]), 9, 50)
    record = load_record(f"sqlite:///{tmp_path}/runs/study.db", "tiny")
    assert [trial.state for trial in record.trials] == ["COMPLETE"] * 7 + ["STOPPED"] + ["COMPLETE"] * 2
    found = front_from_verdicts(record, tmp_path / "runs" / "artifacts")
    assert (found.num_counted, found.differences, found.record) == (9, (), record)
    assert len({trial.finished_at for trial in record.trials}) == 10
