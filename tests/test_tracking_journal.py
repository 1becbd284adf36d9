"""Journals: what is written is read again, also after a kill at any moment."""

import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracking.journal import (
    ArtifactRow,
    CloseRow,
    EndRow,
    Journal,
    MetricsRow,
    StartRow,
    StudyRow,
    end_dead_trials,
    load_study_info,
    read_rows,
    save_study_info,
)
from tracking.tracker import StudyInfo


def steps(path: Path) -> list[int]:
    return [line.row.step for line in read_rows(path)[0] if isinstance(line.row, MetricsRow)]


def test_every_kind_of_row_comes_back(tmp_path: Path) -> None:
    before = time.time()
    with Journal(tmp_path / "journal" / "t1.jsonl") as journal:
        journal.start("t1", {"alpha": 0.5, "warm": True}, {"host": "here"})
        journal.metrics(3, {"train/loss": 0.25})
        journal.artifact(tmp_path / "trials" / "t1" / "weights", "models")
        journal.end("FINISHED", {"certified_accuracy/lower": 0.5}, {"end": "complete"}, step=7)
        journal.study({"hypervolume": 0.1}, {"best": "t1"}, {"front.html": tmp_path / "front.html"}, step=2)
        journal.close_study("FINISHED")
    lines, end = read_rows(journal.path)
    rows = [line.row for line in lines]
    t = [row.t for row in rows]
    times = [before, *t, time.time()]
    assert times == sorted(times)
    expected = [
        StartRow(t=t[0], kind="start", params={"alpha": "0.5", "warm": "True"}, tags={"host": "here"}),
        MetricsRow(t=t[1], kind="metrics", step=3, values={"train/loss": 0.25}),
        ArtifactRow(t=t[2], kind="artifact", path="../trials/t1/weights", folder="models"),
        EndRow(
            t=t[3],
            kind="end",
            status="FINISHED",
            step=7,
            values={"certified_accuracy/lower": 0.5},
            tags={"end": "complete"},
        ),
        StudyRow(
            t=t[4],
            kind="study",
            step=2,
            values={"hypervolume": 0.1},
            tags={"best": "t1"},
            artifacts={"front.html": "../front.html"},
            description="",
        ),
        CloseRow(t=t[5], kind="close", status="FINISHED"),
    ]
    assert rows == expected
    assert end == lines[-1].end == journal.path.stat().st_size


def test_reading_goes_on_from_an_offset(tmp_path: Path) -> None:
    with Journal(tmp_path / "t1.jsonl") as journal:
        journal.metrics(0, {"loss": 1.0})
        journal.metrics(1, {"loss": 1.0})
        first, _ = read_rows(journal.path)[0]
        lines, end = read_rows(journal.path, first.end)
        assert [line.row.step for line in lines if isinstance(line.row, MetricsRow)] == [1]
        assert read_rows(journal.path, end) == ([], end)


@pytest.mark.parametrize("tail", ['{"t":1.0,"kind":"met', "{", "x" * 200_000])
def test_a_torn_last_line_is_ignored_and_cut_by_the_next_writer(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "t1.jsonl"
    with Journal(path) as journal:
        journal.metrics(0, {"loss": 1.0})
    whole = path.stat().st_size
    with path.open("a") as file:
        file.write(tail)
    assert read_rows(path)[1] == whole
    with Journal(path) as journal:
        assert path.stat().st_size == whole
        journal.metrics(1, {"loss": 1.0})
    assert steps(path) == [0, 1]


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "t1.jsonl"
    path.write_text('{"t":')
    Journal(path).close()
    assert path.read_bytes() == b""


@given(st.floats(0, 1))
def test_cut_anywhere_the_lines_before_the_cut_stay(tmp_path_factory: pytest.TempPathFactory, fraction: float) -> None:
    path = tmp_path_factory.mktemp("cut") / "t1.jsonl"
    with Journal(path) as journal:
        for step in range(5):
            journal.metrics(step, {"loss": 1.0})
    ends = [line.end for line in read_rows(path)[0]]
    cut = int(fraction * ends[-1])
    os.truncate(path, cut)
    kept = [step for step, end in enumerate(ends) if end <= cut]
    with Journal(path) as journal:
        journal.metrics(9, {"loss": 1.0})
    assert steps(path) == [*kept, 9]


WRITER = """
import sys
from pathlib import Path
from tracking.journal import Journal

assert "mlflow" not in sys.modules
journal = Journal(Path(sys.argv[1]))
for step in range(1_000_000):
    journal.metrics(step, {f"layer/{i}": step + i / 7 for i in range(200)})
"""


@pytest.mark.timeout(60)
def test_a_killed_writer_loses_no_line_it_finished(tmp_path: Path) -> None:
    path = tmp_path / "t1.jsonl"
    for _ in range(2):
        enough = 300_000 + (path.stat().st_size if path.exists() else 0)
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)]) as writer:
            while not path.exists() or path.stat().st_size < enough:
                assert writer.poll() is None
                time.sleep(0.01)
            writer.send_signal(signal.SIGKILL)
        assert writer.returncode == -signal.SIGKILL
    found = steps(path)
    again = found.index(0, 1)
    assert found == [*range(again), *range(len(found) - again)]


def test_a_broken_line_in_the_middle_is_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "t1.jsonl"
    with Journal(path) as journal:
        journal.metrics(0, {"loss": 1.0})
    offset = path.stat().st_size
    with path.open("ab") as file:
        file.write(b'\xff{"t": 1, "kind": "metrics"}\n{"t": 1.0, "kind": "unheard of"}\n')
    with Journal(path) as journal:
        journal.metrics(1, {"loss": 1.0})
    with caplog.at_level(logging.WARNING):
        assert steps(path) == [0, 1]
    assert len(caplog.records) == 2
    assert f"{path}: skipped the line at byte {offset}," in caplog.text


def test_infinite_values_are_left_out_and_nan_is_kept_as_no_number(tmp_path: Path) -> None:
    with Journal(tmp_path / "t1.jsonl") as journal:
        journal.metrics(0, {"bound": math.inf})
        journal.metrics(1, {"bound": -math.inf, "loss": math.nan, "accuracy": 0.5})
    (line,), _ = read_rows(journal.path)
    assert isinstance(line.row, MetricsRow)
    assert line.row.values == {"loss": None, "accuracy": 0.5}


@pytest.mark.parametrize("name", ["acc@eps=2/255", "", "a//b", "/a", "a/", "../a", "a/./b", "é", "x" * 251, "a\n"])
def test_a_name_that_mlflow_refuses_is_refused_at_once(tmp_path: Path, name: str) -> None:
    with Journal(tmp_path / "t1.jsonl") as journal:
        with pytest.raises(ValueError, match="cannot name a metric"):
            journal.metrics(0, {name: 1.0})
        with pytest.raises(ValueError, match="cannot name a metric"):
            journal.end("FINISHED", {name: 1.0}, {})
    assert journal.path.read_bytes() == b""


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    with Journal(tmp_path / "t1.jsonl") as journal:
        with pytest.raises(ValueError, match="one file each"):
            journal.start("t2", {}, {})
        with pytest.raises(ValueError, match="kind"):
            journal.write("unheard of")
        with pytest.raises(ValueError, match="status"):
            journal.write("close", status="DONE")
    assert journal.path.read_bytes() == b""


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    with Journal(tmp_path / "t1.jsonl") as journal:
        journal.metrics(0, {"loss": 1.0})
        monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:10]))
        with pytest.raises(OSError, match="No space left"):
            journal.metrics(1, {"loss": 1.0})
        monkeypatch.undo()
        journal.metrics(2, {"loss": 1.0})
    assert steps(journal.path) == [0, 2]


def test_paths_survive_moving_the_storage_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk" / "storage").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "storage")
    weights = tmp_path / "link" / "weights"
    weights.write_text("w")
    with Journal(tmp_path / "link" / "journal" / "t1.jsonl") as journal:
        journal.artifact(weights)
    (tmp_path / "disk" / "storage").rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "journal"
    (line,), _ = read_rows(moved / "t1.jsonl")
    assert isinstance(line.row, ArtifactRow)
    assert (moved / line.row.path).read_text() == "w"


def test_the_last_word_of_dead_trials_is_written_once(tmp_path: Path) -> None:
    for key in ("done", "dead", "live", "retried"):
        with Journal(tmp_path / f"{key}.jsonl") as journal:
            journal.start(key, {}, {})
    for key in ("done", "retried"):
        with Journal(tmp_path / f"{key}.jsonl") as journal:
            journal.end("FAILED", {}, {})
    with Journal(tmp_path / "retried.jsonl") as journal:
        journal.start("retried", {}, {})
    with Journal(tmp_path / "_study.jsonl") as journal:
        journal.study({}, {}, {})
    assert end_dead_trials(tmp_path, {"live"}) == ["dead", "retried"]
    last = read_rows(tmp_path / "dead.jsonl")[0][-1].row
    assert isinstance(last, EndRow)
    assert last.status == "KILLED"
    assert end_dead_trials(tmp_path, {"live"}) == []


def test_study_info_comes_back(tmp_path: Path) -> None:
    study = StudyInfo("s", "digits", {"a": "b"}, {"n": 3, "x": 0.5, "y": True, "z": "é"}, "# Search", "http://h")
    save_study_info(tmp_path / "journal", study)
    save_study_info(tmp_path / "journal", study)
    assert load_study_info(tmp_path / "journal") == study
    assert [path.name for path in (tmp_path / "journal").iterdir()] == ["study.json"]


def test_a_broken_study_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"name": "s"}')
    with pytest.raises(ValueError, match=r"study\.json does not describe a study"):
        load_study_info(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_study_info(tmp_path / "nowhere")
