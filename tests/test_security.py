"""What docs/SECURITY.md claims, each claim by attacking it. Other files prove the rest; that page names every test."""

import ast
import functools
import importlib.util
import io
import json
import os
import pickle
import re
import runpy
import socket
import stat
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy
import torch
import yaml
from contracts import STUDY
from optuna.storages._rdb import models
from studies import config_of, result, tree, write_space
from test_tracking_sender import RecordingTracker

from benchmarks.live_search import LiveSearch, processes_of
from ccdist import atomic_files, checkpoint
from ccdist.image_sources import _npz_array
from ccdist.networks import Network, build_network
from ccdist.program import save_program
from ccdist.search_state import SearchState
from ccdist.yaml_files import MOST_VALUES, YamlFileError, _Loader, read_tree
from search import run as search_run
from search.artifacts.manifests import Manifest, Version
from search.artifacts.places import TrialPlaces, discard, load_result, save_result
from search.artifacts.trial_copies import LocalFiles
from search.clusters.cluster import connected
from search.clusters.local_ray import keys_stay_here, private_token
from search.config import ResourcesConfig
from search.searcher import StudySearcher
from search.storage import Storage
from search.teachers import TeacherStore
from search.tracked.bookkeeping import study_info
from search.tracked.study_files import describe_environment, write_settings
from search.trials.rung_values import RungLog
from search.trials.verifying import load_verdicts
from tracking import ui
from tracking.journal import STUDY_JOURNAL, Journal, read_rows, save_study_info
from tracking.program_check import UnsafeProgramError, copy_program
from tracking.sender import Delivery

ROOT = Path(__file__).parents[1]
PACKAGES = ("ccdist", "search", "tracking")
SHAPE = (1, 4, 4)


# ---- nothing that is read can run ----------------------------------------------------------------------------------

_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
_NAMES = {"eval", "exec", "__import__"}
_CALLS = {
    *("os.system", "os.popen", "tempfile.mktemp", "pickle_load", "read_pickle", "unsafe_load", "full_load"),
    *("torch.jit.load", "torch.export.load", "torch.hub.load", "mlflow.load", "pyfunc.load_model", "load_model"),
    *("Tuner.restore", "ray.cloudpickle"),
}


# What a process sends to children that it started itself, through a pipe that nobody else has.
BETWEEN_OWN_PROCESSES = {"search/sharing/side_by_side.py import pickle", "search/sharing/side_process.py import pickle"}


def dotted(node: ast.expr) -> str:
    """a.b.c of an expression that is one; else what of it is."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangers(source: str) -> Iterator[str]:
    """Line and name of everything in a source that runs what it reads, or takes a predictable temporary name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            own = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = own + [each.name for each in node.names]
            if found := _MODULES & {part for name in names for part in name.split(".")}:
                yield f"{node.lineno}: import {found.pop()}"
        if not isinstance(node, ast.Call):
            continue
        name, given = dotted(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
        wrong = (
            name in _NAMES
            or any(f".{name}".endswith(f".{call}") for call in _CALLS)
            or (name == "torch.load" and given.get("weights_only") != "True")
            or (name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False")
            or (name in ("yaml.load", "yaml.load_all") and given.get("Loader") not in ("_Loader", "yaml.SafeLoader"))
            or given.get("shell", "False") != "False"
        )
        if wrong:
            yield f"{node.lineno}: {name}"


def test_no_code_runs_what_it_reads() -> None:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 100
    found = [f"{path.relative_to(ROOT)}:{each}" for path in files for each in dangers(path.read_text())]
    assert [each for each in found if re.sub(r":\d+: ", " ", each) not in BETWEEN_OWN_PROCESSES] == []
    assert issubclass(_Loader, yaml.SafeLoader)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "from ray import cloudpickle",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "x = eval(text)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "name = tempfile.mktemp()",
        "mlflow.pyfunc.load_model(uri)",
        "torch.export.load(path)",
        "tune.Tuner.restore(path)",
    ],
)
def test_a_planted_danger_is_seen(source: str) -> None:
    assert len(list(dangers(f"def f():\n    {source}\n"))) == 1


class Bomb:
    """Unpickled, it leaves a folder behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it-was-run"


@pytest.fixture
def bomb(mark: Path) -> bytes:
    content = pickle.dumps(Bomb(mark))
    pickle.loads(content)  # it works
    mark.rmdir()
    return content


def _network() -> Network:
    return build_network("mlp", input_shape=SHAPE, num_classes=3, width=4).eval()


def _state(folder: Path, bomb: bytes) -> None:
    (folder / "state.safetensors").write_bytes(bomb)
    checkpoint.load_state(folder / "state.safetensors")


def _weights(folder: Path, bomb: bytes) -> None:
    checkpoint.save(folder / "student", _network())
    file = folder / "student" / checkpoint.WEIGHTS
    file.write_bytes(bomb)
    _set_hash(folder / "student")
    checkpoint.load(folder / "student")


def _set_hash(folder: Path) -> None:
    """As whoever plants weights would: the description's hash is theirs."""
    description = json.loads((folder / checkpoint.NETWORK).read_text())
    description["weights_sha256"] = checkpoint._sha256(folder / checkpoint.WEIGHTS)
    (folder / checkpoint.NETWORK).write_text(json.dumps(description))


def _torch_weights(folder: Path, bomb: bytes) -> None:
    """What `torch.save` writes, under the name of weights."""
    checkpoint.save(folder / "student", _network())
    with zipfile.ZipFile(folder / "student" / checkpoint.WEIGHTS, "w") as archive:
        archive.writestr("archive/data.pkl", bomb)
    _set_hash(folder / "student")
    checkpoint.load(folder / "student")


def _teacher(folder: Path, bomb: bytes) -> None:
    (folder / "0123").mkdir()
    for name in ("teacher.json", "mark.json", "done.json"):
        (folder / "0123" / name).write_bytes(bomb)
    TeacherStore.of(folder).load("0123")


def _rounds(folder: Path, bomb: bytes) -> None:
    (folder / "rounds.safetensors").write_bytes(bomb)
    SearchState(folder, {}).load()


def _verdicts(folder: Path, bomb: bytes) -> None:
    places = TrialPlaces(folder, folder / "j", folder / "t")
    places.verdicts.write_bytes(bomb)
    load_verdicts(places)


def _rungs(folder: Path, bomb: bytes) -> None:
    (folder / "rungs.json").write_bytes(bomb)
    assert RungLog(folder / "rungs.json").passed


def _npz(folder: Path, bomb: bytes) -> None:
    np.savez(folder / "data.npz", data=np.array([1]))
    with zipfile.ZipFile(folder / "data.npz", "w") as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (1,)})
        archive.writestr("data.npy", header.getvalue() + bomb)
    _npz_array(folder / "data.npz", "data")


def _space(folder: Path, bomb: bytes) -> None:
    text = "name: !!python/object/apply:os.mkdir [%s]\n" % (folder / "it-was-run")
    read_tree(write_space(folder / "space.yaml", text), kind="space file")


@pytest.mark.parametrize("read", [_state, _weights, _torch_weights, _teacher, _rounds, _verdicts, _rungs, _npz, _space])
def test_a_planted_pickle_is_refused_in_one_line(
    read: Callable[[Path, bytes], None], tmp_path: Path, bomb: bytes, mark: Path
) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        read(tmp_path, bomb)
    assert not mark.exists()
    assert str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_a_type_in_a_parquet_file_is_not_unpickled(tmp_path: Path, bomb: bytes, mark: Path) -> None:
    """What Arrow once did with a type that says it is Python's."""
    told = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": bomb}
    schema = pa.schema([pa.field("verdict", pa.string(), metadata=told)])
    pq.write_table(pa.table([["certified"]], schema=schema), tmp_path / "verdicts.parquet")
    table = load_verdicts(TrialPlaces(tmp_path, tmp_path / "j", tmp_path / "t"))
    assert table.column_names == ["verdict"]
    assert not mark.exists()


@pytest.mark.timeout(30)  # PyTorch's first export of a process
def test_a_planted_result_is_made_anew(tmp_path: Path, bomb: bytes, mark: Path) -> None:
    """A trial's result, its journal and the kept graph of its program: what cannot be read is not there."""
    places = TrialPlaces(tmp_path, tmp_path / "j.jsonl", tmp_path / "t")
    places.result.write_bytes(bomb)
    assert load_result(places) is None
    places.journal.write_bytes(bomb + b"\n")
    assert read_rows(places.journal)[0] == []
    network, graphs = _network(), tmp_path / "graphs"
    save_program(tmp_path / "first.pt2", network, SHAPE, graphs=graphs)
    (kept,) = graphs.iterdir()
    kept.write_bytes(bomb)
    save_program(tmp_path / "second.pt2", network, SHAPE, graphs=graphs)
    assert (tmp_path / "second.pt2").read_bytes() == (tmp_path / "first.pt2").read_bytes()
    assert not mark.exists()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    save_program(path, _network(), SHAPE)
    return path


@pytest.mark.timeout(30)  # as above
def test_a_program_of_ours_may_be_sent(program: Path, tmp_path: Path) -> None:
    copy_program(program, tmp_path / "model.pt2", SHAPE)
    images = torch.rand(3, *SHAPE)
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(images), _network()(images))


def changed(program: Path, path: Path, records: dict[str, Callable[[bytes], bytes]]) -> Path:
    """The program with other contents of some records, new ones at the end."""
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            change = records.get(name.partition("/")[2], lambda content: content)
            new.writestr(zipfile.ZipInfo(name), change(old.read(name)))
        for record in records:
            if f"archive/{record}" not in old.namelist():
                new.writestr(zipfile.ZipInfo(f"archive/{record}"), records[record](b""))
    return path


def graph(change: Callable[[Any], None]) -> dict[str, Callable[[bytes], bytes]]:
    """Another description of the graph."""

    def write(content: bytes) -> bytes:
        description = json.loads(content)
        change(description)
        return json.dumps(description).encode()

    return {"models/model.json": write}


def _sizes(code: str) -> Callable[[Any], None]:
    def change(description: Any) -> None:
        for value in description["graph_module"]["graph"]["tensor_values"].values():
            for size in (size for size in value["sizes"] if "as_expr" in size):
                size["as_expr"]["expr_str"] = f"{code} or {size['as_expr']['expr_str']}"

    return change


def _planted_node(name: str, value: Any) -> Callable[[Any], None]:
    return lambda description: description["graph_module"]["graph"]["nodes"][-1].update({name: value})


def _planted_tree(description: Any) -> None:
    context = {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}
    tree = {"type": "collections.defaultdict", "context": context, "children_spec": []}
    description["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps([1, tree])


_CODE = "__import__('os').system('x')"
_POISONED = json.dumps({"config": {"w": {"path_name": "weight_0", "use_pickle": True}}}).encode()
_OPAQUE = json.dumps({"config": {"w": {"path_name": "opaque_obj_0", "use_pickle": False}}}).encode()


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ({"data/weights/model_weights_config.json": lambda _: _POISONED}, "names a pickle"),
        ({"data/constants/model_constants_config.json": lambda _: _OPAQUE}, "'opaque_obj_0' as path_name"),
        ({"data/weights/model.pt": lambda _: b"a pickle"}, "data/weights/model.pt is no record"),
        ({"data/constants/model.pt": lambda _: b"a pickle"}, "data/constants/model.pt is no record"),
        ({"DATA/SAMPLE_INPUTS/MODEL.PT": lambda _: b"a pickle"}, "MODEL.PT is no record"),
        ({"data/aotinductor/model/a.so": lambda _: b"\x7fELF"}, "a.so is no record"),
        ({"models/other.json": lambda _: b"{}"}, "other.json is no record"),
        (graph(_sizes(_CODE)), "as expr_str"),
        (graph(lambda all: all.update(guards_code=["True"])), "'True' as guards_code"),
        (graph(lambda all: all.update({_CODE: 1})), "has a key"),
        (graph(_planted_tree), "as in_spec"),
        (graph(_planted_node("target", "torch.ops.aten.from_file.default")), "as target"),
        (graph(_planted_node("target", "os.system")), "as target"),
        (graph(_planted_node("inputs", [{"arg": {"as_operator": "torch.load"}}])), "'as_operator'"),
        (graph(_planted_node("name", "x, y=print()")), "as name"),
        ({"models/model.json": lambda _: b"[" * 100_000}, "cannot be read"),
    ],
)
def test_a_program_that_would_run_when_it_is_loaded_is_not_sent(
    records: dict[str, Callable[[bytes], bytes]], told: str, program: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsafeProgramError) as caught:
        copy_program(changed(program, tmp_path / "model.pt2", records), tmp_path / "copy.pt2", SHAPE)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_program_is_not_sent(program: Path, tmp_path: Path, bomb: bytes) -> None:
    packed, damaged = tmp_path / "packed.pt2", tmp_path / "damaged.pt2"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/weights/weight_0", bytes(10**6))
    with zipfile.ZipFile(program) as archive:
        weights = archive.read("archive/data/weights/weight_0")
    damaged.write_bytes(program.read_bytes().replace(weights, weights[::-1]))
    (tmp_path / "bomb.pt2").write_bytes(bomb)
    for name, told in (("packed", "larger than the file"), ("damaged", "Bad CRC"), ("bomb", "cannot be read")):
        with pytest.raises(UnsafeProgramError, match=told):
            copy_program(tmp_path / f"{name}.pt2", tmp_path / "copy.pt2", SHAPE)


def _examples(mark: Path) -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    """What PyTorch unpickles in the place of an example, of which Python's reader of archives sees an honest one."""

    def pickled(**options: Any) -> bytes:
        content = io.BytesIO()
        torch.save(Bomb(mark), content, **options)
        return content.getvalue()

    def beside(honest: bytes) -> bytes:
        content = io.BytesIO(honest)
        with zipfile.ZipFile(content, "a") as archive:
            archive.writestr("archive/DATA.PKL", pickle.dumps(Bomb(mark), 2))
        return content.getvalue()

    yield "in its place", lambda _: pickled()
    yield "in front of it", lambda honest: pickled(_use_new_zipfile_serialization=False) + honest
    yield "an archive in front of it", lambda honest: pickled() + honest
    yield "beside it", beside


@pytest.mark.timeout(30)  # as above
def test_pytorch_itself_would_run_a_planted_example(program: Path, tmp_path: Path, mark: Path) -> None:
    """Why the example that is sent is the sender's: the day this fails, `tracking.program_check` may be looked at."""
    ran = {}
    for name, change in _examples(mark):
        planted = changed(program, tmp_path / "model.pt2", {"data/sample_inputs/model.pt": change})
        copy_program(planted, tmp_path / "copy.pt2", SHAPE)
        torch.export.load(tmp_path / "copy.pt2")
        assert not mark.exists(), name
        with suppress(Exception):  # whatever it makes of the folder's None
            torch.export.load(planted)
        ran[name] = mark.exists()
        with suppress(FileNotFoundError):
            mark.rmdir()
    assert ran["in its place"]
    assert ran["in front of it"]


@pytest.mark.timeout(30)  # as above
def test_pytorch_itself_would_run_a_planted_size(program: Path, tmp_path: Path, mark: Path) -> None:
    """Why the description of the graph is looked at."""
    planted = changed(program, tmp_path / "model.pt2", graph(_sizes(f"__import__('os').mkdir({str(mark)!r})")))
    with suppress(Exception):
        torch.export.load(planted)
    assert mark.exists()


def test_the_studys_database_has_no_place_for_a_pickle() -> None:
    tables = models.BaseModel.metadata.tables
    columns = [(table.name, column) for table in tables.values() for column in table.columns]
    assert len(columns) > 20
    assert [
        (table, column.name)
        for table, column in columns
        if isinstance(column.type, sqlalchemy.PickleType | sqlalchemy.LargeBinary)
    ] == []


def test_nothing_of_tune_is_read_back() -> None:
    searcher = StudySearcher.__new__(StudySearcher)
    assert searcher.__getstate__() == {}
    with pytest.raises(NotImplementedError, match="a search goes on from its study"):
        searcher.restore("/tmp/anything")
    source = ast.parse((ROOT / "search" / "execution.py").read_text())
    scratch = [
        item.optional_vars.id
        for node in ast.walk(source)
        if isinstance(node, ast.With)
        for item in node.items
        if isinstance(item.context_expr, ast.Call)
        and dotted(item.context_expr.func) == "tempfile.TemporaryDirectory"
        and isinstance(item.optional_vars, ast.Name)
    ]
    given = [
        keyword.value.id
        for node in ast.walk(source)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "storage_path" and isinstance(keyword.value, ast.Name)
    ]
    assert given
    assert set(given) <= set(scratch)


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


# ---- secrets -------------------------------------------------------------------------------------------------------

SECRETS = {
    "RAY_AUTH_TOKEN": "ray-t0ken-of-the-test",
    "AWS_ACCESS_KEY_ID": "AKIAOFTHETEST",
    "AWS_SECRET_ACCESS_KEY": "aws/s3cret+of=the-test",
    "AWS_SESSION_TOKEN": "aws-sess10n-of-the-test",
    "GOOGLE_APPLICATION_CREDENTIALS": "/nowhere/g00gle-of-the-test.json",
    "PGPASSWORD": "pg-passw0rd-of-the-test",
    "MLFLOW_TRACKING_PASSWORD": "mlflow-passw0rd-of-the-test",
}


def marks_in(content: bytes) -> list[str]:
    return [name for name, secret in SECRETS.items() if secret.encode() in content]


def test_no_secret_of_the_environment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    config = config_of(tmp_path)
    storage = Storage.of(config, str(tmp_path / "storage"))
    files = write_settings(config, tmp_path / "written")
    told = f"{storage} {study_info(config, storage)} {describe_environment()}".encode()
    assert marks_in(told + b"".join(path.read_bytes() for path in files.values())) == []


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_login_in_an_object_storages_address_is_never_told(
    scheme: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    address = f"{scheme}://AKIAOFTHETEST:s3cret-of-the-test@bucket/artifacts"
    space = write_space(tmp_path / "space.yaml", tree(storage={"artifacts": address}))
    code = search_run.main([str(space), "--dry-run"])
    told = "".join(capfd.readouterr())
    assert "s3cret" not in told
    assert code == 2
    assert told.count("\n") == 1


def test_tune_puts_no_key_on_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would: what Tune passes on to workers is an argument of theirs."""
    from ray.tune.execution import class_cache

    assert class_cache.__spec__ is not None
    unchanged = runpy.run_path(str(class_cache.__spec__.origin))  # an earlier test's search may have taken them out
    passed_on = set(unchanged["ENV_VARS_TO_PROPAGATE"])
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", passed_on)
    assert passed_on & SECRETS.keys()
    keys_stay_here()
    assert not passed_on & SECRETS.keys()
    assert not any(re.search("KEY|TOKEN|SECRET|PASS", name) for name in passed_on)


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


def test_temporary_files_are_for_their_user_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever mask the user has: weights on their way, and Ray's token."""
    modes: list[int] = []
    move = checkpoint._move

    def looking(staging: Path, directory: Path) -> None:
        modes.append(stat.S_IMODE(staging.stat().st_mode))
        move(staging, directory)

    monkeypatch.setattr(checkpoint, "_move", looking)
    before = os.umask(0)
    try:
        checkpoint.save(tmp_path / "student", _network())
        private_token(tmp_path / ".ray" / "auth_token")
        (tmp_path / "wide").write_text("t0ken")
        private_token(tmp_path / "wide")
    finally:
        os.umask(before)
    made = tmp_path / ".ray" / "auth_token"
    assert modes == [0o700]
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    assert re.fullmatch(r"[0-9a-f]{64}", made.read_text())
    assert [path.name for path in made.parent.iterdir()] == ["auth_token"]
    assert stat.S_IMODE((tmp_path / "wide").stat().st_mode) == 0o600
    assert (tmp_path / "wide").read_text() == "t0ken"


# ---- who listens ---------------------------------------------------------------------------------------------------


def test_a_ray_of_ones_own_has_no_address_but_this_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray decides by a variable that its processes inherit; a connection to a cluster afterwards is not concerned."""
    from ray._private import ray_constants, services

    seen: list[tuple[str | None, str]] = []

    def init(**options: Any) -> None:
        seen.append((os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"), services.get_node_ip_address()))
        assert options["include_dashboard"] is False

    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("search.clusters.addresses.read_ray_address", lambda: None)
    monkeypatch.setattr("search.clusters.cluster.ray.init", init)
    node = {"Alive": True, "Resources": {"CPU": 2.0}}
    monkeypatch.setattr("search.clusters.cluster.ray.nodes", lambda: [node])
    monkeypatch.setattr("search.clusters.cluster.ray.shutdown", lambda: None)
    with connected(ResourcesConfig(), 1000):
        pass
    assert seen == [("0", "127.0.0.1")]
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ
    assert ray_constants.ENABLE_RAY_CLUSTER
    assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600


def test_the_pages_are_for_this_machine_unless_asked_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def started(program: str, command: list[str], *more: Any) -> None:
        commands.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(ui.os, "execv", started, raising=False)
    monkeypatch.setattr(ui.os, "execve", started, raising=False)
    monkeypatch.setattr(ui, "stored_pages", lambda storage: [])
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").touch()
    with pytest.raises(SystemExit):
        ui.main(["--storage", str(tmp_path), "--port", "5999"])
    (command,) = commands
    assert command[command.index("--host") + 1] == "127.0.0.1"


# As the kernel spells 127.0.0.1, ::1, and the first as an address of the second's kind.
LOOPBACK = {"0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F"}


def listening(pid: int) -> set[str]:
    """The addresses on which a process listens, as the kernel spells them."""
    sockets = set()
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                sockets.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
        tables = [Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    except OSError:  # it has ended meanwhile
        return set()
    rows = [row.split() for table in tables for row in table]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in sockets}


def test_who_listens_is_seen() -> None:
    with socket.socket() as own, socket.socket() as wide:
        own.bind(("127.0.0.1", 0))
        own.listen()
        assert listening(os.getpid()) <= LOOPBACK
        wide.bind(("0.0.0.0", 0))
        wide.listen()
        assert listening(os.getpid()) - LOOPBACK == {"00000000"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_search_leaves_no_secret_and_listens_on_this_machine_only(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    small = ["student.epochs=3", "teacher.epochs=2", "data.train_images=300", "data.validation_images=60"]
    secrets = {name: secret for name, secret in SECRETS.items() if name != "RAY_AUTH_TOKEN"}
    log = tmp_path / "log"
    foreign: set[str] = set()
    num_seen = 0
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray, log.open("w") as output:
        search = LiveSearch("digits", tmp_path / "storage", Path(ray), small, secrets | {"HOME": str(home)})
        try:
            driver = search.start(2, output)
            while driver.poll() is None:
                for process in processes_of(driver.pid):
                    places = listening(process.pid)
                    num_seen += len(places)
                    foreign |= places - LOOPBACK
                    assert marks_in(process.title.encode()) == [], process.title
                time.sleep(0.2)
            assert driver.returncode == 0, log.read_text()
        finally:
            search.clean_up()
    assert num_seen > 10
    assert foreign == set()
    token = home / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    files = [path for path in (tmp_path / "storage").rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [
        path for path in (*files, log) if marks_in(path.read_bytes()) or token.read_bytes() in path.read_bytes()
    ] == []


# ---- dependencies --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audit() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "audit", module)
        spec.loader.exec_module(module)
        yield module


def test_the_lock_holds_versions_and_hashes_only(audit: ModuleType) -> None:
    pins, wrong = audit.read_lock((ROOT / "requirements.lock").read_text())
    assert wrong == []
    assert len(pins) > 100
    assert {"torch", "ray", "optuna", "mlflow"} <= {pin.name for pin in pins}


@pytest.mark.parametrize(
    "line",
    [
        "torch==2.14.1",
        "torch>=2.14 --hash=sha256:" + "0" * 64,
        "torch==2.14.1 --hash=md5:" + "0" * 32,
        "torch @ https://host/torch.whl --hash=sha256:" + "0" * 64,
        "git+https://host/torch",
        "-e .",
        "--extra-index-url https://host/simple",
        "./torch.whl --hash=sha256:" + "0" * 64,
    ],
)
def test_a_line_that_pins_nothing_is_found(audit: ModuleType, line: str) -> None:
    pins, wrong = audit.read_lock(f"numpy==2.0 \\\n    --hash=sha256:{'1' * 64}\n{line}\n")
    assert [pin.name for pin in pins] == ["numpy"]
    assert len(wrong) == 1


def test_an_environment_that_differs_is_found(audit: ModuleType) -> None:
    hashes = f" --hash=sha256:{'0' * 64}\n"
    lock = f"one==1.0{hashes}Two_x==2.0{hashes}three==3.0 ; sys_platform == 'win32'{hashes}four==4.0{hashes}"
    pins, wrong = audit.read_lock(lock)
    assert wrong == []
    installed = {"one": "1.0", "two-x": "2.1", "five": "5", "ccdist-search": "0.1.0"}
    told = ["two-x 2.0 is locked, 2.1 is installed", "four is missing", "five is not in the lock"]
    assert audit.differences(pins, [], installed) == told
    cloud, _ = audit.read_lock(f"five==5{hashes}six==6.0{hashes}")  # a part of it, which may be there
    assert audit.differences(pins, cloud, installed) == told[:2]
    assert audit.differences(pins, cloud, installed | {"six": "6.1"}) == [*told[:2], "six is not in the lock"]
    assert audit.installed_packages()["pytest"] == pytest.__version__


ADVISORY = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["1.1"]}


@pytest.mark.parametrize(
    ("answer", "strict", "code", "told"),
    [
        ({"dependencies": [{"name": "one", "version": "1.0", "vulns": []}]}, "0", 0, "no advisory names any"),
        ({"dependencies": [{"name": "one", "version": "1.0", "vulns": [ADVISORY]}]}, "0", 1, "one 1.0: CVE-1 PYSEC-1"),
        (None, "0", 0, "advisories were not checked: no answer (no route to host)"),
        (None, "1", 1, "advisories were not checked"),
    ],
)
def test_advisories_are_told_and_their_absence_too(
    audit: ModuleType,
    answer: Any,
    strict: str,
    code: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """pip-audit in the place of whose answer a file is."""
    script = "#!/bin/sh\nwhile [ $# -gt 0 ]; do case $1 in --output) out=$2;; esac; shift; done\n"
    script += "echo no route to host >&2; exit 1\n" if answer is None else f"cp {tmp_path}/answer $out; exit 1\n"
    (tmp_path / "answer").write_text(json.dumps(answer))
    (tmp_path / "uv").write_text(script)
    (tmp_path / "uv").chmod(0o700)
    (tmp_path / "lock").write_text(f"one==1.0 --hash=sha256:{'0' * 64}\n")
    monkeypatch.setenv("AUDIT_STRICT", strict)
    monkeypatch.setattr(audit, "installed_packages", lambda: {"one": "1.0", "two": "2.0"})
    (tmp_path / "cloud.lock").write_text(f"two==2.0 --hash=sha256:{'0' * 64}\n")
    places = ["--lock", str(tmp_path / "lock"), "--further", str(tmp_path / "cloud.lock")]
    assert audit.main([*places, "--uv", str(tmp_path / "uv")]) == code
    assert told in capsys.readouterr().out


# ---- the document --------------------------------------------------------------------------------------------------


@functools.cache
def names_of_tests(file: Path) -> set[str]:
    found = ast.walk(ast.parse(file.read_text()))
    return {node.name for node in found if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_claim_names_a_test_that_exists_and_every_test_here_a_claim() -> None:
    text = (ROOT / "docs" / "SECURITY.md").read_text()
    named = re.findall(r"(?:(test_\w+)\.py::|`)(test_\w+)`", text)
    assert len(named) > 40
    last = ""
    missing, here = [], set()
    for file, test in named:
        last = file or last  # the tests of one file follow each other in a claim
        if test not in names_of_tests(ROOT / "tests" / f"{last}.py"):
            missing.append(f"{last}.py::{test}")
        elif last == "test_security":
            here.add(test)
    assert missing == []
    assert names_of_tests(Path(__file__)) - here == set()
    claims = text.partition("## Claims")[2].partition("## Found")[0].split("\n- ")[1:]
    assert len(claims) > 15
    assert [claim for claim in claims if "`test_" not in claim] == []
