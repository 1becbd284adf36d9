"""YAML files, names, paths and links of somebody who means harm."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from contracts import STUDY
from studies import result, tree, write_space
from test_tracking_sender import RecordingTracker

from ccdist import atomic_files
from ccdist.yaml_files import MOST_VALUES, YamlFileError, read_tree
from search import run as search_run
from search.artifacts.manifests import Manifest, Version
from search.artifacts.places import TrialPlaces, discard, load_result, save_result
from search.artifacts.trial_copies import LocalFiles
from tracking.journal import STUDY_JOURNAL, Journal, read_rows, save_study_info
from tracking.sender import Delivery

# ---- YAML ----------------------------------------------------------------------------------------------------------


def _laughs(levels: int, merge: bool) -> str:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    for level in range(1, levels):
        nine = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} {{<<: [{nine}], z{level}: 1}}" if merge else f"a{level}: &a{level} [{nine}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: !!python/name:os.system\n", "tag tag:yaml.org,2002:python/name:os.system in line 1 is not allowed"),
        ("a: !!python/object/new:os.system [echo]\n", "is not allowed"),
        ("a: 1\nb: !!int ''\n", "tag tag:yaml.org,2002:int in line 2 is not allowed; write the value alone"),
        ("a: !!timestamp x\n", "is not allowed"),
        ("a: !!bool maybe\n", "is not allowed"),
        ("? !!bool maybe\n: 1\n", "is not allowed"),
        ("!<x>\na: 1\n", "is not allowed"),
        (_laughs(12, merge=False), "aliases stand for more than"),
        (_laughs(12, merge=True), "aliases stand for more than"),
        ("a: [" + "1," * MOST_VALUES + "]", "stand for more than"),
        ("a: " + "x" * 300_000, "larger than 256 kB"),
        ("a: " + ":".join(["1"] * 4_000), "is too long"),
        ("[" * 1500, "nested too deeply"),
        ("a: 1\na: 2\n", "stands twice"),
        ("\x00", "cannot be read"),
        ("a: \ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "cannot be read"),
    ],
)
def test_a_hostile_yaml_file_is_refused_in_one_line(text: str, told: str, tmp_path: Path) -> None:
    path = write_space(tmp_path / "space.yaml", text)
    with pytest.raises(YamlFileError, match="space file") as caught:
        read_tree(path, kind="space file")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", ["0x" + "f" * 4000, "&a [*a]", "[[[[[[[[[[1]]]]]]]]]]", "{a: !!binary aGFsbG8=}", "!!int ''"]
)
@pytest.mark.parametrize("key", ["student.epochs", "student.loss", "name", "search.points", "network", "network.name"])
def test_a_hostile_value_is_refused_in_one_line(
    key: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = write_space(tmp_path / "space.yaml", tree())
    assert search_run.main([str(space), "--set", f"{key}={value}", "--storage", str(tmp_path / "s"), "--dry-run"]) == 2
    told = "".join(capsys.readouterr())
    assert told.count("\n") == 1


# ---- names and paths -----------------------------------------------------------------------------------------------

NAMES = [
    "../../x",
    "..",
    "/etc",
    "a/b",
    "a\\b",
    ".hidden",
    "a\nb",
    "a b",
    "a'b",
    'a"b',
    "a`b",
    "a;b",
    "$(a)",
    "",
    "x" * 101,
    "<b>",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_elsewhere_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = write_space(tmp_path / "space.yaml", tree())
    before = set(tmp_path.rglob("*"))
    flags = ["--set", f"name={json.dumps(name)}", "--storage", str(tmp_path / "deep" / "storage"), "--dry-run"]
    assert search_run.main([str(space), *flags]) == 2
    told = "".join(capsys.readouterr())
    assert told.count("\n") == 1
    assert "name" in told
    assert set(tmp_path.rglob("*")) == before


@pytest.fixture
def journals(tmp_path: Path) -> Path:
    folder = tmp_path / "storage" / "artifacts" / STUDY.name / "journal"
    save_study_info(folder, STUDY)
    return folder


def _row(kind: str, **fields: Any) -> str:
    return json.dumps({"t": 1.0, "kind": kind, **fields}) + "\n"


def _model_row(target: str) -> str:
    names = ("name", "program", "torch_version", "dataset", "dataset_digest")
    content = dict.fromkeys(names, "x") | {"program": target, "files": [target], "input_shape": [1], "num_outputs": 2}
    return _row("model", values={}, metadata={}, **content)


@pytest.mark.parametrize("kind", ["artifact", "study", "model"])
@pytest.mark.parametrize("target", ["absolute", "up", "link", "folder", "nul", "own"])
def test_no_journal_sends_a_file_from_outside_its_study(
    kind: str, target: str, journals: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("SECRET")
    study = journals.parent
    (study / "own").write_text("harmless")
    (study / "link").symlink_to(secret)
    (study / "folder").mkdir()
    (study / "folder" / "weights").symlink_to(secret)
    place = {
        "absolute": str(secret),
        "up": os.path.relpath(secret, journals),
        "nul": "../own\0",
    }.get(target, f"../{target}")
    row = {
        "artifact": _row("artifact", path=place, folder=""),
        "study": _row("study", step=0, values={}, tags={}, artifacts={"a.html": place}, description=""),
        "model": _model_row(place),
    }[kind]
    file = STUDY_JOURNAL if kind == "study" else "t1.jsonl"
    (journals / file).write_text(_row("start", params={}, tags={}) + row)
    sent: list[Path] = []

    class Tracker(RecordingTracker):
        def log_artifact(self, key: str, path: Path, folder: str) -> None:
            sent.append(path)

        def log_study(self, metrics: Any, tags: Any, artifacts: Any, **more: Any) -> None:
            sent.extend(artifacts.values())

        def log_model(self, key: str, model: Any, **more: Any) -> None:
            sent.append(model.program)

    delivery = Delivery(journals, Tracker())
    delivery.send()
    assert delivery.rows_left() == 0  # it does not hold up what follows
    if target == "own":
        assert sent == [study / "own"]
    else:
        assert sent == []
        assert "skipped" in caplog.text
        assert "SECRET" not in caplog.text


@pytest.mark.parametrize("place", ["../../x", "/etc/x", "a/../../x", "a\\..\\x", "a\nb"])
def test_no_journal_writes_outside_its_run(place: str, journals: Path, caplog: pytest.LogCaptureFixture) -> None:
    (journals.parent / "own").write_text("x")
    artifact = _row("artifact", path="../own", folder=place)
    study = _row("study", step=0, values={}, tags={}, artifacts={place: "../own"}, description="")
    (journals / "t1.jsonl").write_text(artifact + study)
    assert list(read_rows(journals / "t1.jsonl")[0]) == []
    assert caplog.text.count("which is not a journal row") == 2


def test_a_link_in_the_place_of_a_file_is_not_written_through(tmp_path: Path) -> None:
    """In a folder that several users write, a link may wait where a journal or an unfinished file will be."""
    mine = tmp_path / "mine"
    mine.write_text("precious, without a line break")
    (tmp_path / "t1.jsonl").symlink_to(mine)
    with pytest.raises(OSError, match="symbolic link"):
        Journal(tmp_path / "t1.jsonl")
    places = TrialPlaces(tmp_path / "trial", tmp_path / "j", tmp_path / "t")
    places.folder.mkdir()
    (places.folder / ".result.json.unfinished").symlink_to(mine)
    save_result(places, result())
    assert load_result(places) is not None
    (places.folder / ".table.unfinished").symlink_to(mine)
    atomic_files.write_table(places.folder / "table", pa.table({"a": [1]}))
    assert mine.read_text() == "precious, without a line break"
    assert not mine.is_symlink()


def test_a_link_in_the_place_of_a_folder_is_not_emptied(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("precious")
    places = TrialPlaces(tmp_path / "trial", tmp_path / "j", tmp_path / "t")
    places.folder.mkdir()
    for name in ("stages", "verification", ".hidden"):
        (places.folder / name).symlink_to(mine)
    discard(places)
    assert (mine / "file").read_text() == "precious"


def test_a_manifest_of_a_store_writes_nowhere_else(tmp_path: Path) -> None:
    """What a bucket says of a trial's files decides nothing about where the driver writes."""
    version, local = Version(1, 1, 1), LocalFiles(tmp_path, "tiny-0001")
    entry = {"version": str(version), "size": 1, "sha256": "0" * 64}
    for path in ("../x", "/etc/x", "trials/../../x", "trials/tiny-0001/../../../x", "a//b", "a\\b", "a\0"):
        with pytest.raises(ValueError, match="no file of a study"):
            Manifest.of(version, json.dumps({"format_version": 1, "files": {path: entry}}).encode(), "there")
    assert local.owns("trials/tiny-0001/student/weights.safetensors")
    for path in ("study.id", "trials/tiny-0002/result.json", "journal/tiny-0002.jsonl", "graphs/x.pt2", "report.html"):
        assert not local.owns(path)
