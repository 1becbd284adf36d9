"""python -m ccdist.verify: what it leaves, whatever stops it, and every wrong input answered in a line."""

import errno
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from train_cases import ROOT

from ccdist import checkpoint, train, verification, verify, verify_progress
from ccdist.config import DataConfig
from ccdist.data import load_test_set, to_pixels
from ccdist.locks import exclusive
from ccdist.networks import Network, build_network
from ccdist.verdicts import SCHEMA, Progress
from ccdist.verify_progress import VerifyProgress

pytestmark = pytest.mark.timeout(30)
RUNGS = ("pgd", "ibp", "crown", "alpha_crown")
COLUMNS = ["index", "label", "prediction", "verdict", "method", "lower_bound", "branches"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that classifies most digits, some of them robustly: each class's mean image, compared with."""
    folder = tmp_path_factory.mktemp("models") / "digits"
    checkpoint.save(folder, prototypes(), {})
    return folder


def prototypes() -> Network:
    """One hidden layer of random features, and the least-squares head on them."""
    part = load_test_set(DataConfig(name="digits"))
    images, labels = to_pixels(part.images), part.labels
    network = build_network("mlp", input_shape=(1, 8, 8), num_classes=10, width=24).eval()
    with torch.no_grad():
        features = network.features(images).double()
        targets = torch.nn.functional.one_hot(labels, 10).double()
        gram = features.T @ features + 0.1 * torch.eye(features.shape[1], dtype=torch.float64)
        network.head.weight.copy_(torch.linalg.solve(gram, features.T @ targets).T)
        network.head.bias.zero_()
    return network


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def arguments(model: Path, out: Path | None, *more: Any, rungs: tuple[str, ...] = RUNGS) -> list[str]:
    words = [model, "--data", "digits", "--epsilon", "1/50", "--device", "cpu", "--threads", 1, "--rungs", *rungs]
    return [str(word) for word in (*words, *(("--out", out) if out is not None else ()), *more)]


def run(model: Path, out: Path | None, *more: Any, rungs: tuple[str, ...] = RUNGS) -> int:
    return verify.main(arguments(model, out, *more, rungs=rungs))


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The one line that the command answers with."""
    capsys.readouterr()
    assert verify.main(words) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    assert line.startswith("error: ")
    return line.removeprefix("error: ").strip()


def verdicts(out: Path) -> pa.Table:
    return pq.read_table(out / "verdicts.parquet", columns=COLUMNS)


# ---- a whole verification -------------------------------------------------------------------------------------------


def test_it_leaves_rows_counter_examples_and_a_summary(
    model: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, out, "--images", "20:80", "--batch-size", 25) == 0
    told = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "lock",
        "verification.json",
        "verdicts.parquet",
        "counterexamples.parquet",
        "summary.json",
    }
    table, summary = pq.read_table(out / "verdicts.parquet"), json.loads((out / "summary.json").read_text())
    assert table.schema.equals(SCHEMA)
    assert table["index"].to_pylist() == list(range(20, 80))
    check_counter_examples(model, table, pq.read_table(out / "counterexamples.parquet"))
    check_summary(model, table, summary)

    lines = told.splitlines()
    assert [line.split(":")[0] for line in lines[:5]] == ["clean", *RUNGS]
    assert lines[-1] == f"results: {out}"
    for number, word in ((-4, "standard"), (-3, "adversarial"), (-2, "certified")):
        accuracy = summary[f"{word}_accuracy"]
        assert lines[number].startswith(f"{word} accuracy")
        assert f" {round(accuracy * 60)}/60 = {accuracy:.4f}" in lines[number]
    assert "(PGD, 40 steps, restarts: 1)" in lines[-3]
    assert "undecided; no branch and bound)" in lines[-2]

    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "lock"}
    assert run(model, out, "--images", "20:80", "--batch-size", 25) == 0
    assert capsys.readouterr().out.splitlines() == [f"{out} is finished", *lines[5:]]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def check_counter_examples(model: Path, table: pa.Table, examples: pa.Table) -> None:
    """Each falsified row but the clean ones has a point in its region that a plain forward pass gets wrong."""
    part, network = load_test_set(DataConfig(name="digits")), checkpoint.load(model)
    rows = [row for row in table.to_pylist() if row["verdict"] == "falsified" and row["method"] != "clean"]
    assert rows
    assert examples["index"].to_pylist() == [row["index"] for row in rows]
    assert examples["method"].to_pylist() == [row["method"] for row in rows]
    for example in examples.to_pylist():
        point = torch.tensor(example["pixels"]).view(1, *example["shape"])
        image, label = to_pixels(part.images[example["index"], None]), int(part.labels[example["index"]])
        assert int(network(point).argmax()) != label
        assert float((point.double() - image.double()).abs().max()) <= 1 / 50


def check_summary(model: Path, table: pa.Table, summary: dict[str, Any]) -> None:
    rows = table.to_pylist()
    counts = {
        verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("certified", "falsified", "undecided")
    }
    assert (summary["num_images"], summary["verdicts"]) == (60, counts)
    assert min(counts["certified"], counts["falsified"]) > 0
    for verdict in ("certified", "falsified"):
        methods = [row["method"] for row in rows if row["verdict"] == verdict]
        assert summary["methods"][verdict] == {method: methods.count(method) for method in methods}
    open_images = 60
    for rung in summary["rungs"]:
        assert rung["images"] == open_images
        assert rung["proved"] + rung["falsified"] == sum(row["method"] == rung["rung"] for row in rows)
        open_images -= rung["proved"] + rung["falsified"]
    assert open_images == counts["undecided"]
    clean = summary["methods"]["falsified"].get("clean", 0)
    attacked = summary["methods"]["falsified"].get("pgd", 0)
    assert summary["standard_accuracy"] == (60 - clean) / 60
    assert summary["adversarial_accuracy"] == (60 - clean - attacked) / 60
    assert summary["certified_accuracy"] == counts["certified"] / 60
    assert summary["certified_upper"] == (60 - counts["falsified"]) / 60
    assert summary["verification"]["threat"] == {"norm": "linf", "epsilon": "1/50"}
    assert (summary["data"], summary["split"], summary["images"]) == ("digits", "test", [20, 80])
    assert summary["weights_sha256"] == checkpoint.weights_sha256(checkpoint.load(model))
    assert (summary["threads"], summary["versions"]["torch"]) == (1, torch.__version__)
    assert summary["seconds"] == pytest.approx(sum(rung["seconds"] for rung in summary["rungs"]))
    assert summary["images_per_second"] == pytest.approx(60 / summary["seconds"])
    assert {"commit", "device", "data_fingerprint", "model"} <= summary.keys()


def test_two_ranges_make_one_table(model: Path, tmp_path: Path) -> None:
    for number, images in enumerate(("0:30", "30:50", "0:50")):
        assert run(model, tmp_path / str(number), "--images", images, rungs=("ibp", "crown")) == 0
    joined = pa.concat_tables([verdicts(tmp_path / "0"), verdicts(tmp_path / "1")])
    whole = verdicts(tmp_path / "2")
    assert joined.drop_columns("lower_bound").equals(whole.drop_columns("lower_bound"))
    bounds = [np.array(table["lower_bound"].to_pylist(), dtype=float) for table in (joined, whole)]
    np.testing.assert_allclose(*bounds, atol=1e-6)


def test_without_an_attack_there_is_no_adversarial_accuracy(
    model: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, out, "--images", "0:10", rungs=("ibp",)) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["adversarial_accuracy"] is None
    assert summary["standard_accuracy"] > 0
    assert "adversarial accuracy  not measured (no attack)" in capsys.readouterr().out.splitlines()
    assert run(model, out, "--images", "0:10", rungs=("ibp",)) == 0
    assert "adversarial accuracy  not measured (no attack)" in capsys.readouterr().out.splitlines()


def test_the_readme_replays_counter_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    assets = Path("tests/assets/verification")
    words = [assets / "fashion_mnist_cnn3", "--path", assets / "images" / "fashion_mnist", "--images", "0:20"]
    assert verify.main([*map(str, words), "--rungs", "pgd", "--threads", "1", "--out", "runs/verify"]) == 0
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (code,) = [block for block in blocks if "counterexamples.parquet" in block]
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    replayed = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {row["index"]: row for row in pq.read_table("runs/verify/verdicts.parquet").to_pylist()}
    assert replayed
    for index, method, predicted in replayed:
        row = rows[int(index)]
        assert (row["verdict"], row["method"]) == ("falsified", method)
        assert int(predicted) != row["label"]


def test_the_default_folder_is_one_for_each_question(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, None, "--images", "0:5", rungs=("ibp",)) == 0
    assert run(model, None, "--images", "5:10", rungs=("ibp",)) == 0
    assert run(model, None, "--images", "5:10", rungs=("ibp",)) == 0
    told = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("results: "))
    assert told.parent == model / "verification"
    assert (told / "summary.json").exists()
    folders = list((model / "verification").iterdir())
    assert len(folders) == 2
    assert all((folder / "summary.json").exists() for folder in folders)


def test_the_ensemble_is_a_rung_after_pgd(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verification.RUNGS, "ensemble", verification.RUNGS["pgd"])
    assert run(model, out, "--images", "0:10", "--ensemble", rungs=("pgd,ibp", "crown")) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert [each["rung"] for each in summary["rungs"]] == ["clean", "pgd", "ensemble", "ibp", "crown"]
    assert list(summary["worst_case"]) == ["clean", "pgd", "apgd_ce", "apgd_dlr", "fab", "square"]
    assert sum(summary["worst_case"].values()) == summary["verdicts"]["falsified"]
    broken = ", ".join(f"{name} {count}" for name, count in summary["worst_case"].items())
    assert f"falsified by          {broken}" in verify.report(summary).splitlines()


# ---- while it runs --------------------------------------------------------------------------------------------------


def test_rows_can_be_read_while_it_runs(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "SAVE_INTERVAL_S", 0)
    seen: list[set[int]] = []

    def look(self: VerifyProgress, progress: Progress) -> None:
        parts = sorted((out / "verdicts").glob("part-*.parquet"))
        rows = [row for path in parts for row in pq.read_table(path).to_pylist()]
        assert all(row["verdict"] in ("certified", "falsified") for row in rows)
        indices = [row["index"] for row in rows]
        assert len(set(indices)) == len(indices)
        seen.append(set(indices))

    monkeypatch.setattr(VerifyProgress, "progress", look)
    monkeypatch.setattr(VerifyProgress, "rung", lambda *_: None)
    assert run(model, out, "--images", "100:160", "--batch-size", 16) == 0
    assert all(before <= after for before, after in itertools.pairwise(seen))
    assert len({len(each) for each in seen}) > 4
    decided = {row["index"] for row in verdicts(out).to_pylist() if row["verdict"] != "undecided"}
    assert seen[-1] == decided
    assert min(decided) >= 100


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_live_line() -> None:
    console = terminal()
    with VerifyProgress(console) as progress:
        progress.progress(Progress("crown", 120, 30, 50, 100, 40, 8.0))
        line = progress._render().plain
        progress.rung("crown", 50)
    assert line == "crown  proved 120  falsified 30  open 50  5 images/s  12 s left"
    assert "crown: 150 of 100 images decided" in printed(console)  # all of them, since no rung was told before


def test_the_time_left_of_branch_and_bound_ends_with_its_limit() -> None:
    progress = VerifyProgress(terminal(), total_timeout_s=30.0)
    assert progress.line(Progress("branch_and_bound", 0, 0, 9, 9, 0, 10.0)).endswith("0 images/s  20 s left")
    assert progress.line(Progress("branch_and_bound", 0, 1, 8, 9, 1, 10.0)).endswith("0.1 images/s  20 s left")
    assert progress.line(Progress("branch_and_bound", 4, 4, 1, 9, 8, 10.0)).endswith("1 s left")
    assert progress.line(Progress("pgd", 0, 0, 9, 9, 0, 0.0)).endswith("0 images/s")


def test_without_a_terminal_lines_come_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with VerifyProgress(console) as progress:
        progress.progress(Progress("pgd", 0, 1, 9, 10, 5, 1.0))
        monkeypatch.setattr(verify_progress, "LINE_INTERVAL_S", 0)
        progress.progress(Progress("pgd", 0, 2, 8, 10, 10, 2.0))
    assert printed(console) == "pgd  proved 0  falsified 2  open 8  5 images/s  0 s left\n"


# ---- stopped at any moment ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_says_how_to_go_on(
    how: signal.Signals,
    code: int,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, rest = tmp_path / "a folder", ("--images", "0:60", "--batch-size", 16)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without

    def stop(self: VerifyProgress, progress: Progress) -> None:
        if (progress.rung, progress.handled) == ("ibp", 0):
            os.kill(os.getpid(), how)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(VerifyProgress, "progress", stop)
            patch.setattr(VerifyProgress, "rung", lambda *_: None)
            assert run(model, out, *rest) == code
    finally:
        signal.signal(signal.SIGINT, before)
    command = " ".join(arguments(model, out, *rest)).replace(str(out), f"'{out}'")
    assert capsys.readouterr().err == f"stopped; go on with: python -m ccdist.verify {command}\n"
    assert not (out / "summary.json").exists()

    def not_again(_: Any) -> Any:
        raise AssertionError("the attack is done")

    monkeypatch.setitem(verification.RUNGS, "pgd", not_again)
    assert run(model, out, *rest) == 0
    decided = [line for line in capsys.readouterr().out.splitlines() if line.startswith("going on: ")]
    assert len(decided) == 1
    assert re.fullmatch(r"going on: [1-9]\d* of 60 images decided", decided[0])
    monkeypatch.undo()
    assert run(model, tmp_path / "whole", *rest) == 0
    assert verdicts(out).equals(verdicts(tmp_path / "whole"))
    examples = [pq.read_table(each / "counterexamples.parquet") for each in (out, tmp_path / "whole")]
    assert examples[0].equals(examples[1])
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


# Forks a child for each delay that runs the command and is killed after it: importing anew each time takes seconds.
KILLER = """
import os, signal, sys, time
from ccdist import verification, verify
verification.SAVE_INTERVAL_S = 0.01
delays, words = [float(each) for each in sys.argv[1].split()], sys.argv[2:]
for delay in delays:
    child = os.fork()
    if child == 0:
        os._exit(verify.main(words))
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print("ended", status, flush=True)
"""


def killed(words: list[str], delays: list[float]) -> list[int]:
    """The status of each child; 9 where the kill came in time."""
    command = [sys.executable, "-c", KILLER, " ".join(map(str, delays)), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("ended ")]


def check_killed(model: Path, tmp_path: Path, kills: int, latest: float) -> None:
    """Killed so often, each time up to this share of the whole run's seconds after it began: the same files."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    rest = ("--images", "0:100", "--batch-size", 8, "--timeout", "none", "--max-branches", 40)
    ladder = (*RUNGS, "branch_and_bound")
    started = time.perf_counter()
    assert run(model, whole, *rest, rungs=ladder) == 0
    seconds = time.perf_counter() - started
    delays = [random.uniform(0.05, latest) * seconds for _ in range(kills)]
    statuses = killed(arguments(model, out, *rest, rungs=ladder), delays)
    assert statuses.count(signal.SIGKILL) >= 1, (statuses, delays)
    assert run(model, out, *rest, rungs=ladder) == 0
    assert verdicts(out).equals(verdicts(whole))
    assert "branch_and_bound" in verdicts(out)["method"].to_pylist()
    examples = [pq.read_table(each / "counterexamples.parquet") for each in (out, whole)]
    assert examples[0].equals(examples[1])
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.timeout(60)
def test_killed_at_random_moments_it_ends_like_an_uninterrupted_run(model: Path, tmp_path: Path) -> None:
    check_killed(model, tmp_path, kills=4, latest=0.7)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_again_and_again_it_ends_like_an_uninterrupted_run(model: Path, tmp_path: Path) -> None:
    for number in range(5):
        check_killed(model, tmp_path / str(number), kills=20, latest=0.3)


# ---- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (["--images", "0:0"], "--images 0:0 leaves no image"),
        (["--images", "5000:6000"], "--images 5000:6000 leaves no image"),
        (["--data", "nothing"], "unknown --data 'nothing'"),
        (["--data", "mnist", "--path", "nowhere"], "--path nowhere has no test.parquet"),
        (["--epsilon", "8"], "epsilon is 8; expected a radius above 0 and below 1"),
        (["--rungs", "pgd", "crowns"], "--rungs: 'crowns' is not allowed"),
        (["--rungs", "ibp", "ibp"], "name one twice"),
        (["--rungs", "branch_and_bound", "pgd"], "--rungs: attacks come before branch_and_bound; move pgd before it"),
        (["--timeout", "0"], "--timeout: '0' is not allowed"),
        (["--timeout", "soon"], "--timeout: 'soon' is not allowed"),
        (["--max-branches", "0"], "--max-branches: '0' is not allowed"),
        (["--batch-size", "0"], "--batch-size: '0' is not allowed"),
        (["--threads", "0"], "--threads 0; expected at least 1"),
        (["--seed", "-1"], "--seed: '-1' is not allowed"),
        (["--images", "-3:"], "argument --images: expected one argument; see python -m ccdist.verify --help"),
        (["--rungs"], "argument --rungs: expected at least one argument"),
        (["--threads", "abc"], "argument --threads: invalid int value: 'abc'"),
        (["--rungs", ""], "--rungs names no rung"),
        (["--out", ""], "argument --out: it is empty"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(
    change: list[str], answer: str, model: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer in refused(capsys, arguments(model, out, *change))
    assert not out.exists()


def test_a_model_that_is_none(model: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere is not there" in refused(capsys, arguments(tmp_path / "nowhere", out))
    assert "holds no network.json" in refused(capsys, arguments(tmp_path, out))
    damaged = tmp_path / "damaged"
    checkpoint.save(damaged, prototypes(), {})
    (damaged / checkpoint.WEIGHTS).write_bytes(b"no weights")
    assert "is damaged" in refused(capsys, arguments(damaged, out))


def test_a_folder_of_something_else(model: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--images", "0:5")
    assert run(model, out, *few, rungs=("ibp",)) == 0
    other = arguments(model, out, *few, "--seed", 3, rungs=("ibp",))
    answer = refused(capsys, other)
    assert answer.startswith(f"{out} holds another verification: there verification.seed is 0, now it is 3; choose")
    assert "there images is [0, 5], now it is [0, 6]" in refused(
        capsys, arguments(model, out, "--images", "0:6", rungs=("ibp",))
    )
    (out / "verification.json").write_text("{")
    assert "verification.json is damaged" in refused(capsys, arguments(model, out, *few, rungs=("ibp",)))
    (out / "verification.json").unlink()
    answer = refused(capsys, arguments(model, out, *few, rungs=("ibp",)))
    assert (
        answer == f"{out} holds counterexamples.parquet but no verification.json; choose another folder with --out DIR"
    )


def test_a_folder_in_use_or_not_writable(
    model: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with exclusive(out / "lock", wait=False):
        assert "is held by process" in refused(capsys, arguments(model, out))
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(capsys, arguments(model, tmp_path / "file" / "out"))
    assert f"{tmp_path / 'file'} cannot be written: it is a file" in refused(
        capsys, arguments(model, tmp_path / "file")
    )
    (tmp_path / "other" / "lock").mkdir(parents=True)
    assert "lock is a folder" in refused(capsys, arguments(model, tmp_path / "other"))


def test_nothing_is_added_to_a_foreign_folder(model: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out.mkdir()
    (out / "notes.txt").touch()
    assert "holds notes.txt but no verification.json" in refused(capsys, arguments(model, out))
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["summary.json", "verdicts.parquet", "verdicts", "state"])
def test_a_file_in_the_place_of_a_folder_or_the_other_way_around(
    name: str, model: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = arguments(model, out, "--images", "0:5", rungs=("ibp",))
    assert verify.main(few) == 0
    (out / name).unlink(missing_ok=True)
    if name in ("verdicts", "state"):
        (out / name).touch()
    else:
        (out / name).mkdir()
    assert str(out / name) in refused(capsys, few)


def test_a_refused_ladder_claims_no_folder(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smooth = tmp_path / "smooth"
    network = build_network("mlp", input_shape=(1, 8, 8), num_classes=10, width=4, activation="tanh")
    checkpoint.save(smooth, network.eval(), {})
    few = ("--images", "0:5")
    answer = refused(capsys, arguments(smooth, out, *few, rungs=("ibp", "branch_and_bound")))
    assert "leave branch_and_bound out of the rungs" in answer
    assert not out.exists()
    assert run(smooth, out, *few, rungs=("ibp",)) == 0


@pytest.mark.parametrize("damage", ["no rows", "half a table", "no points", "no rungs"])
def test_a_finished_folder_without_its_tables_is_made_again(damage: str, model: Path, out: Path) -> None:
    few = ("--images", "20:50")
    assert run(model, out, *few, rungs=("pgd", "ibp")) == 0
    before = verdicts(out)
    points = pq.read_table(out / "counterexamples.parquet")
    assert points.num_rows
    match damage:
        case "no rows":
            (out / "verdicts.parquet").unlink()
        case "half a table":
            (out / "verdicts.parquet").write_bytes((out / "verdicts.parquet").read_bytes()[:100])
        case "no points":
            pq.write_table(points.slice(1), out / "counterexamples.parquet")
        case "no rungs":
            summary = json.loads((out / "summary.json").read_text())
            del summary["rungs"]
            (out / "summary.json").write_text(json.dumps(summary))
    assert run(model, out, *few, rungs=("pgd", "ibp")) == 0
    assert verdicts(out).equals(before)
    assert pq.read_table(out / "counterexamples.parquet").equals(points)
    assert "rungs" in json.loads((out / "summary.json").read_text())


def test_a_full_disk_is_told_in_a_line(
    model: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    few = arguments(model, out, "--images", "0:5", rungs=("ibp",))
    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        answer = refused(capsys, few)
    assert answer == (
        f"{out / 'state' / 'rows.parquet'}: No space left on device; once that is mended, go on with: "
        f"python -m ccdist.verify {' '.join(few)}"
    )
    assert verify.main(few) == 0


def test_a_training_on_a_full_disk_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x")

    monkeypatch.setattr(train, "_train", full)
    assert train.main(["digits", "--out", str(tmp_path)]) == 2
    told = "runs/x: No space left on device; once that is mended, go on with: python -m ccdist.train digits"
    assert capsys.readouterr().err == f"error: {told} --out {tmp_path}\n"


def test_a_damaged_state_is_named(
    model: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: VerifyProgress, rung: str, still_open: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(VerifyProgress, "rung", stop)
        assert run(model, out, "--images", "0:5", rungs=("ibp",)) == 130
    (out / "state" / "rows.parquet").write_bytes(b"")
    answer = refused(capsys, arguments(model, out, "--images", "0:5", rungs=("ibp",)))
    assert answer.startswith(f"{out / 'state'} is damaged (")
    assert answer.endswith("; delete it to begin again")


def test_a_failure_of_the_program_is_no_wrong_input(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setitem(verification.RUNGS, "ibp", broken)
    with pytest.raises(RuntimeError, match="a bug"):  # which ends the process with 1
        run(model, out, "--images", "0:5", rungs=("ibp",))
