"""`python -m search.fetch`: a model's files from MLflow, exact to the bit, all of them or none."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from contracts import STUDY
from mlflow import MlflowClient, artifacts
from mlflow.entities import FileInfo
from studies import config_of, space_of

from ccdist import checkpoint, verify
from ccdist.networks import Network, build_network
from ccdist.program import save_program
from search.fetch import BAD_INPUT, main
from tracking.mlflow_tracker import MlflowTracker, local_store
from tracking.tracker import ModelInfo

pytestmark = pytest.mark.timeout(60)  # the first test that touches MLflow pays for its import and a database

NAME = "digits-linf-1_10"
SHAPE = (1, 8, 8)
PARAMS = {"loss": "cc_dist", "alpha": 0.5, "beta": 5.0, "warm_up": 0.05, "steps": 1}


@pytest.fixture(scope="module")
def network() -> Network:
    return build_network("mlp", input_shape=SHAPE, num_classes=10, width=8, seed=1)


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory, network: Network) -> Path:
    """A storage folder with the models of two trials, and a registered model of both."""
    storage = tmp_path_factory.mktemp("storage")
    recipe = space_of(config_of(storage)).recipe(PARAMS, 0)
    checkpoint.save(storage / "student", network, {"recipe": recipe.model_dump(mode="json")})
    other = build_network("mlp", input_shape=SHAPE, num_classes=10, width=8, seed=2)
    checkpoint.save(storage / "other", other)
    tracker = MlflowTracker(*local_store(storage))
    tracker.open_study(STUDY)
    for key, folder in (("tiny-0000", "student"), ("tiny-0001", "other")):
        save_program(storage / f"{folder}.pt2", checkpoint.load(storage / folder), SHAPE)
        files = tuple(storage / folder / name for name in (checkpoint.WEIGHTS, checkpoint.NETWORK))
        program = storage / f"{folder}.pt2"
        version = str(torch.__version__)
        tracker.log_model(key, ModelInfo(key, program, version, files, SHAPE, 10, "digits-validation", "d"))
    aliases = {"best-certified": "tiny-0000", "best-standard": "tiny-0001"}
    tracker.register(NAME, {"tiny-0000": {}, "tiny-0001": {}}, aliases, "")
    return storage


def fetch(storage: Path, reference: str, out: Path) -> int:
    return main([reference, str(out), "--storage", str(storage)])


@pytest.fixture
def refused(
    registered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Fetch in vain; nothing is written. Returns what was said."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def run(reference: str, out: str = "out", *options: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main([reference, str(tmp_path / out), *(options or ("--storage", str(registered)))]) == BAD_INPUT
        assert sorted(tmp_path.rglob("*")) == before
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        return said.err

    return run


@pytest.mark.parametrize("reference", [f"models:/{NAME}@best-certified", f"models:/{NAME}/1", "tiny-0000"])
def test_the_network_comes_back_exact_to_the_bit(
    registered: Path, network: Network, tmp_path: Path, capsys: pytest.CaptureFixture[str], reference: str
) -> None:
    out = tmp_path / "deep" / "model"
    assert fetch(registered, reference, out) == 0
    assert {path.name for path in out.iterdir()} == {checkpoint.WEIGHTS, checkpoint.NETWORK}
    for name in (checkpoint.WEIGHTS, checkpoint.NETWORK):
        assert (out / name).read_bytes() == (registered / "student" / name).read_bytes()
    loaded = checkpoint.load(out).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in network.state_dict().items())
    assert "tiny-0000" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_what_was_fetched_can_be_verified(registered: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()  # an empty folder is as good as none
    assert fetch(registered, f"models:/{NAME}@best-certified", tmp_path / "model") == 0
    arguments = [str(tmp_path / "model"), "--images", ":4", "--rungs", "ibp", "--out", str(tmp_path / "verified")]
    assert verify.main(arguments) == 0
    assert (tmp_path / "verified" / "verdicts.parquet").exists()


def test_an_alias_names_another_model(registered: Path, tmp_path: Path) -> None:
    assert fetch(registered, f"models:/{NAME}@best-standard", tmp_path / "model") == 0
    own = (tmp_path / "model" / checkpoint.WEIGHTS).read_bytes()
    assert own == (registered / "other" / checkpoint.WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("models:/nothing@best", f"no registered model 'nothing'; there is {NAME}"),
        ("models:/nothing/1", f"no registered model 'nothing'; there is {NAME}"),
        (f"models:/{NAME}@best", f"{NAME} has no alias 'best'; it has best-certified, best-standard"),
        (f"models:/{NAME}/7", f"{NAME} has no version 7; it has 1, 2"),
        ("tiny-0009", "no model of a trial 'tiny-0009'"),
        ("models:/a'b@x", 'no registered model "a\'b"'),
        (f"models:/{NAME}", "names no model; expected models:/NAME@ALIAS"),
        ("runs:/1/model", "names no model; expected models:/NAME@ALIAS"),
        ("", "names no model"),
    ],
)
def test_a_wrong_reference_is_told_what_there_is(refused: Callable[..., str], reference: str, said: str) -> None:
    assert said in refused(reference)


def test_a_folder_with_something_in_it_is_left_alone(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("1")
    assert "not an empty folder" in refused("tiny-0000", "full")
    assert "not an empty folder" in refused("tiny-0000", "full/mine")


def test_a_place_that_cannot_be_written_is_named(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "out cannot be written (File exists)" in refused("tiny-0000", "file/out")


def test_no_store_is_made_where_none_is(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "holds no MLflow store" in refused("tiny-0000", "out", "--storage", str(tmp_path))


def test_a_server_that_is_away_is_one_line(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert "MLflow does not give tiny-0000" in refused("tiny-0000", "out", "--tracking-uri", "http://127.0.0.1:9")
    assert "scheme" not in refused("tiny-0000", "out", "--tracking-uri", "http://")


@pytest.mark.parametrize(
    "path", ["extra_files/../../escaped", "extra_files/..", "extra_files/.hidden", "extra_files/a\nb", "/etc/"]
)
def test_a_file_that_would_leave_the_folder_is_refused(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    original = artifacts.list_artifacts

    def hostile(*args: object, **kwargs: object) -> list[FileInfo]:
        return [*original(*args, **kwargs), FileInfo(path, is_dir=False, file_size=1)]

    monkeypatch.setattr(artifacts, "list_artifacts", hostile)
    assert "no plain file" in refused("tiny-0000")


def test_damaged_weights_are_not_left_behind(
    refused: Callable[..., str], registered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = artifacts.download_artifacts

    def damaged(uri: str, dst_path: str, tracking_uri: str) -> str:
        path = Path(original(uri, dst_path=dst_path, tracking_uri=tracking_uri))
        if path.name == checkpoint.WEIGHTS:
            path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        return str(path)

    monkeypatch.setattr(artifacts, "download_artifacts", damaged)
    assert "model of trial tiny-0000 is no network of this project: weights.safetensors is damaged" in refused(
        "tiny-0000"
    )


def test_a_broken_download_leaves_nothing(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = artifacts.download_artifacts, []

    def second_fails(uri: str, dst_path: str, tracking_uri: str) -> str:
        calls.append(uri)
        if len(calls) == 2:
            raise ConnectionError("the server\nis gone")
        return str(original(uri, dst_path=dst_path, tracking_uri=tracking_uri))

    monkeypatch.setattr(artifacts, "download_artifacts", second_fails)
    assert "MLflow does not give tiny-0000: ConnectionError: the server is gone" in refused("tiny-0000")


def test_a_model_of_somebody_else_holds_no_such_files(
    refused: Callable[..., str], registered: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    client = MlflowClient(local_store(registered)[0])
    foreign = tmp_path_factory.mktemp("foreign")
    (foreign / "MLmodel").write_text("flavors: {}\n")
    client.create_registered_model("foreign")
    client.create_model_version("foreign", str(foreign))
    assert "foreign version 1 holds no extra_files" in refused("models:/foreign/1")
    shutil.rmtree(foreign)
    assert "foreign" in refused("models:/foreign/1")
