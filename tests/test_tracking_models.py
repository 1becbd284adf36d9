"""Logged models and the registry in a real MLflow: made once, complete, linked, and loadable without this project."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow.pytorch
import numpy as np
import pytest
import torch
from contracts import STUDY
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

from ccdist import checkpoint
from ccdist.networks import Network, build_network
from ccdist.program import export_program, save_program
from tracking.journal import Journal, ModelRow, read_rows, save_study_info
from tracking.mlflow_tracker import MlflowTracker, local_store
from tracking.models import write_model
from tracking.sender import Delivery
from tracking.tracker import ModelInfo, RefusedError

# The first test that touches MLflow pays for its import and the creation of a database.
pytestmark = [
    pytest.mark.timeout(60),
    # MLflow's loaders import classes of its own that it warns of.
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
]

SHAPE = (1, 4, 4)
NAME = "digits-linf-1_10"


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creating the tables takes a second, copying them nothing."""
    storage = tmp_path_factory.mktemp("empty")
    MlflowTracker(*local_store(storage))
    return storage / "mlflow" / "mlflow.db"


@pytest.fixture
def storage(tmp_path: Path, empty_database: Path) -> Path:
    (tmp_path / "storage" / "mlflow").mkdir(parents=True)
    shutil.copy(empty_database, tmp_path / "storage" / "mlflow" / "mlflow.db")
    return tmp_path / "storage"


@pytest.fixture
def tracker(storage: Path) -> MlflowTracker:
    opened = MlflowTracker(*local_store(storage))
    opened.open_study(STUDY)
    return opened


@pytest.fixture
def client(storage: Path) -> MlflowClient:
    return MlflowClient(local_store(storage)[0])


@pytest.fixture(scope="module")
def network() -> Network:
    return build_network("mlp", input_shape=SHAPE, num_classes=3, width=8, seed=1).requires_grad_(False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, network: Network) -> ModelInfo:
    """What a trial leaves of its student."""
    folder = tmp_path_factory.mktemp("trial")
    checkpoint.save(folder / "student", network)
    save_program(folder / "program.pt2", network, SHAPE)
    return ModelInfo(
        name="t1",
        program=folder / "program.pt2",
        torch_version=str(torch.__version__),
        files=tuple(folder / "student" / name for name in (checkpoint.WEIGHTS, checkpoint.NETWORK)),
        input_shape=SHAPE,
        num_outputs=3,
        dataset="digits-validation",
        dataset_digest="0123456789" * 7,
        metrics={"standard_accuracy": 0.75, "certified_accuracy": 0.5},
        metadata={"threat": "linf 1/10"},
    )


def logged(client: MlflowClient) -> list[LoggedModel]:
    experiments = [each.experiment_id for each in client.search_experiments()]
    return list(client.search_logged_models(experiments))


def folder_of(model: LoggedModel) -> Path:
    return Path(model.artifact_location)


def failing(original: Callable[..., Any], failures: int) -> Callable[..., Any]:
    """A call whose first answers are lost before anything happens."""
    left = [failures]

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise ConnectionError("the server is gone")
        return original(*args, **kwargs)

    return call


def doubled(original: Callable[..., Any]) -> Callable[..., Any]:
    """A request that is repeated because its answer was lost."""

    def call(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        return original(*args, **kwargs)

    return call


# --- the folder of a model ---


def test_the_folder_is_what_mlflow_itself_would_write(tmp_path: Path, trained: ModelInfo, network: Network) -> None:
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    own.mkdir()
    write_model(own, trained)
    float32 = np.dtype("float32")
    schemas = [Schema([TensorSpec(float32, shape)]) for shape in ((-1, *SHAPE), (-1, 3))]
    mlflow.pytorch.save_model(
        export_program(network, SHAPE).module(),
        theirs,
        signature=ModelSignature(*schemas),
        input_example=np.full((2, *SHAPE), 0.5),
        extra_files=[str(path) for path in trained.files],
        pip_requirements=(own / "requirements.txt").read_text().split(),
        metadata=dict(trained.metadata),
        serialization_format="pt2",
    )
    files = [{str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} for root in (own, theirs)]
    assert files[0] == files[1]
    written, expected = ({**Model.load(root).to_dict()} for root in (own, theirs))
    for content in (written, expected):
        for name in ("model_uuid", "utc_time_created", "model_size_bytes"):
            content.pop(name)
        content["flavors"]["python_function"].pop("pickle_module_name", None)  # MLflow names it although none is used
    assert written == expected
    assert (
        Model.load(own).load_input_example(str(own)).tolist()
        == Model.load(theirs).load_input_example(str(theirs)).tolist()
    )
    serving = [json.loads((root / "serving_input_example.json").read_text()) for root in (own, theirs)]
    assert serving[0] == serving[1]
    requirements = (own / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in requirements] == ["torch", "mlflow", "numpy"]
    assert "+" not in "".join(requirements)


# --- a logged model ---


def test_a_model_is_linked_to_its_run_and_to_what_was_measured(
    tracker: MlflowTracker, client: MlflowClient, trained: ModelInfo
) -> None:
    tracker.start_trial("t1", {"alpha": 0.5}, {})
    for _ in range(2):
        tracker.log_model("t1", trained, time_ms=1000)
    (model,) = logged(client)
    run = client.get_run(model.source_run_id)
    assert run.data.tags["cert.trial"] == "t1"
    assert (model.name, model.status.value, model.params) == ("t1", "READY", {"alpha": "0.5"})
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    (dataset,) = [each.dataset for each in run.inputs.dataset_inputs]
    assert (dataset.name, dataset.digest) == ("digits-validation", trained.dataset_digest[:36])
    metrics = {each.key: (each.value, each.dataset_name, each.dataset_digest) for each in model.metrics}
    assert metrics == {name: (value, dataset.name, dataset.digest) for name, value in trained.metrics.items()}
    assert run.data.metrics == trained.metrics
    found = client.search_logged_models(
        [run.info.experiment_id],
        "metrics.certified_accuracy > 0.4",
        datasets=[{"dataset_name": dataset.name, "dataset_digest": dataset.digest}],
    )
    assert [each.model_id for each in found] == [model.model_id]
    for path in trained.files:
        assert (folder_of(model) / "extra_files" / path.name).read_bytes() == path.read_bytes()
    assert not any(path.is_symlink() for path in folder_of(model).rglob("*"))


def test_a_later_measurement_goes_to_the_same_model(
    tracker: MlflowTracker, client: MlflowClient, trained: ModelInfo, storage: Path
) -> None:
    tracker.log_model("t1", trained, time_ms=1000)
    again = MlflowTracker(*local_store(storage))
    again.open_study(STUDY)
    again.log_model("t1", replace(trained, metrics={"certified_accuracy": 0.625}), time_ms=2000)
    (model,) = logged(client)
    latest = {each.key: each.value for each in sorted(model.metrics, key=lambda each: each.timestamp)}
    assert latest == {"standard_accuracy": 0.75, "certified_accuracy": 0.625}
    assert client.get_run(model.source_run_id).data.metrics == latest


@pytest.mark.parametrize("call", ["log_model_artifacts", "finalize_logged_model", "log_outputs", "log_batch"])
def test_a_model_that_was_cut_off_is_completed(
    tracker: MlflowTracker, client: MlflowClient, trained: ModelInfo, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    own = tracker._client
    monkeypatch.setattr(own, call, failing(getattr(own, call), 1))
    with pytest.raises(ConnectionError):
        tracker.log_model("t1", trained, time_ms=1000)
    assert len(logged(client)) == 1
    tracker.log_model("t1", trained, time_ms=1000)
    (model,) = logged(client)
    assert model.status.value == "READY"
    assert len(model.metrics) == 2
    images = torch.rand(3, *SHAPE)
    logits = [
        torch.export.load(path).module()(images) for path in (folder_of(model) / "data/model.pt2", trained.program)
    ]
    assert torch.equal(*logits)


def test_a_model_made_twice_by_a_repeated_request_is_one(
    tracker: MlflowTracker, client: MlflowClient, trained: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker._client, "create_logged_model", doubled(tracker._client.create_logged_model))
    tracker.log_model("t1", trained)
    (model,) = logged(client)
    assert model.status.value == "READY"


def test_models_of_two_studies_and_odd_names_do_not_mix(
    tracker: MlflowTracker, client: MlflowClient, trained: ModelInfo
) -> None:
    for study in (STUDY, replace(STUDY, name="study-b")):
        tracker.open_study(study)
        tracker.log_model("v1.0-t1", replace(trained, name="v1.0-t1"))
    models = logged(client)
    assert [model.name for model in models] == ["v1_0-t1"] * 2
    assert len({model.source_run_id for model in models}) == 2


def test_a_journal_carries_a_model(
    tracker: MlflowTracker, client: MlflowClient, trained: ModelInfo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journals = trained.program.parent / "journal"
    save_study_info(journals, STUDY)
    with Journal(journals / "t1.jsonl") as journal:
        journal.start("t1", {"alpha": 0.5}, {})
        journal.model(trained)
        journal.model(replace(trained, name="gone", program=journals.parent / "gone.pt2"))
        journal.end("FINISHED", {}, {})
    (row,) = [line.row for line in read_rows(journals / "t1.jsonl")[0] if isinstance(line.row, ModelRow)][:1]
    Delivery(journals, tracker).send()
    (model,) = logged(client)
    assert {each.timestamp for each in model.metrics} == {row.time_ms}
    assert model.status.value == "READY"
    assert "gone.pt2, which is not there" in caplog.text
    assert client.get_run(model.source_run_id).info.status == "FINISHED"


# --- the registry ---


def versions(client: MlflowClient) -> dict[str, str]:
    """Number of version -> trial."""
    return {str(each.version): each.tags["cert.trial"] for each in client.search_model_versions(f"name = '{NAME}'")}


def test_versions_are_made_once_and_aliases_move(
    tracker: MlflowTracker, client: MlflowClient, trained: ModelInfo, network: Network
) -> None:
    for key in ("t1", "t2"):
        tracker.log_model(key, replace(trained, name=key))
    for _ in range(2):
        tracker.register(NAME, {"t1": {"n": "1"}}, {"knee": "t1"}, "first")
    tracker.register(NAME, {"t1": {"n": "3"}, "t2": {"n": "2"}}, {"knee": "t2", "best-standard": "t1"}, "second")
    assert versions(client) == {"1": "t1", "2": "t2"}
    registered = client.get_registered_model(NAME)
    assert {alias: str(version) for alias, version in registered.aliases.items()} == {"knee": "2", "best-standard": "1"}
    assert registered.description == "second"
    for _ in range(2):
        tracker.register(NAME, {"t1": {"n": "3"}}, {"knee": "", "best-standard": "t1"}, "")
    assert set(client.get_registered_model(NAME).aliases) == {"best-standard"}
    assert client.get_model_version(NAME, "1").tags["n"] == "3"
    models = {model.name: model for model in logged(client)}
    assert json.loads(models["t2"].tags["mlflow.modelVersions"]) == [{"name": NAME, "version": "2"}]
    place = client.get_model_version_download_uri(NAME, "2")
    assert place == models["t2"].artifact_location
    images = torch.rand(4, *SHAPE)
    assert torch.equal(mlflow.pytorch.load_model(place)(images), network(images))


def test_a_version_made_twice_by_a_repeated_request_is_one(
    tracker: MlflowTracker, client: MlflowClient, trained: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker.log_model("t1", trained)
    monkeypatch.setattr(tracker._client, "create_model_version", doubled(tracker._client.create_model_version))
    tracker.register(NAME, {"t1": {}}, {"knee": "t1"}, "")
    assert versions(client) == {"1": "t1"}
    assert client.get_model_version_by_alias(NAME, "knee").version == 1


def test_registering_leaves_no_store_in_the_working_directory(
    tracker: MlflowTracker, trained: ModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own lookup of a model asks the address of the process, and would make a database here."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    tracker.log_model("t1", trained)
    tracker.register(NAME, {"t1": {}}, {}, "")
    assert list((tmp_path / "here").iterdir()) == []


def test_a_trial_without_a_model_waits_or_is_refused(
    tracker: MlflowTracker, client: MlflowClient, trained: ModelInfo
) -> None:
    tracker.log_model("t1", trained)
    tracker.start_trial("t2", {}, {})
    with pytest.raises(RuntimeError, match="t2 have not arrived"):
        tracker.register(NAME, {"t1": {}, "t2": {}}, {"knee": "t2"}, "")
    tracker.end_trial("t2", "FINISHED", {})
    with pytest.raises(RefusedError, match=f"registered in {NAME}: t2"):
        tracker.register(NAME, {"t1": {}, "t2": {}}, {"knee": "t2", "best": "t1"}, "")
    assert versions(client) == {"1": "t1"}
    assert set(client.get_registered_model(NAME).aliases) == {"best"}


def test_a_model_whose_run_was_deleted_is_registered_and_its_run_stays_deleted(
    storage: Path, tracker: MlflowTracker, client: MlflowClient, trained: ModelInfo
) -> None:
    tracker.log_model("t1", trained)
    tracker.start_trial("t2", {}, {})
    for run in client.search_runs(["1"], "tags.`cert.kind` = 'trial'"):
        client.delete_run(run.info.run_id)
    later = MlflowTracker(*local_store(storage))
    later.open_study(STUDY)
    later.mark_front(["t1", "t2"])
    with pytest.raises(RefusedError, match=f"registered in {NAME}: t2"):  # not "it has not arrived yet", for ever
        later.register(NAME, {"t1": {}, "t2": {}}, {"knee": "t1"}, "")
    assert versions(client) == {"1": "t1"}
    assert client.search_runs(["1"], "tags.`cert.kind` = 'trial'") == []


# --- without this project ---

# Reads a model's folder and images, prints the accuracy by both of MLflow's loaders.
LOADER = """
import importlib.abc, json, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ccdist", "search", "tracking"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
import numpy, mlflow.pyfunc, mlflow.pytorch, torch
folder, data = sys.argv[1:]
data = numpy.load(data)
images = data["images"]
logits = mlflow.pytorch.load_model(folder)(torch.from_numpy(images))
predicted = mlflow.pyfunc.load_model(folder).predict(images)
assert (predicted == logits.detach().numpy()).all()
correct = int((predicted.argmax(1) == data["labels"]).sum())
print(json.dumps({"correct": correct, "logits": logits.tolist(), "file": mlflow.__file__}))
"""


def load_elsewhere(python: str, folder: Path, images: torch.Tensor, labels: torch.Tensor, scratch: Path) -> Any:
    """What LOADER says in a process that can import nothing of this project and unpickle nothing."""
    np.savez(scratch / "data.npz", images=images.numpy(), labels=labels.numpy())
    closed = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    closed |= {name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS") if name in os.environ}
    command = [python, "-W", "ignore", "-c", LOADER, str(folder), str(scratch / "data.npz")]
    done = subprocess.run(command, cwd=scratch, env=closed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_model_loads_without_this_project_and_without_pickle(
    tracker: MlflowTracker, client: MlflowClient, trained: ModelInfo, network: Network, tmp_path: Path
) -> None:
    tracker.log_model("t1", trained)
    images, labels = torch.rand(9, *SHAPE), torch.arange(9) % 3
    (model,) = logged(client)
    told = load_elsewhere(sys.executable, folder_of(model), images, labels, tmp_path)
    assert torch.equal(torch.tensor(told["logits"]), network(images))
    assert told["correct"] == int((network(images).argmax(1) == labels).sum())
