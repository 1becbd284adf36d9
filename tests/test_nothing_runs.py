"""Nothing that is read can run: pickles, programs and arrays of others, and what our own code calls."""

import ast
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy
import torch
import yaml
from optuna.storages._rdb import models
from studies import write_space

from ccdist import checkpoint
from ccdist.image_sources import _npz_array
from ccdist.networks import Network, build_network
from ccdist.program import save_program
from ccdist.search_state import SearchState
from ccdist.yaml_files import _Loader, read_tree
from search.artifacts.places import TrialPlaces, load_result
from search.searcher import StudySearcher
from search.teachers import TeacherStore
from search.trials.rung_values import RungLog
from search.trials.verifying import load_verdicts
from tracking.journal import read_rows
from tracking.program_check import UnsafeProgramError, copy_program

ROOT = Path(__file__).parents[1]
PACKAGES = ("ccdist", "search", "tracking")
SHAPE = (1, 4, 4)


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
    with zipfile.ZipFile(tmp_path / "deflated.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/weights/weight_0", os.urandom(1000))
    reasons = {
        "packed": "larger than the file",
        "deflated": "records are packed",
        "damaged": "Bad CRC",
        "bomb": "cannot be read",
    }
    for name, told in reasons.items():
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
