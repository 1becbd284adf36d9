"""A trained student from its trial to a fresh environment and back: the recorded accuracies, and nothing less."""

import importlib.metadata
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from contracts import STUDY
from mlflow import MlflowClient
from studies import config_of, space_of
from test_tracking_models import NAME, load_elsewhere
from test_tracking_server import free_port, ui_server
from test_trial import Recorder

from ccdist import checkpoint
from ccdist.data import Dataset, load_dataset, to_pixels
from search.artifacts.places import TrialPlaces
from search.fetch import main as fetch_main
from search.recipe import Recipe
from search.studies.records import TrialResult
from search.trial import TrialTask, run_trial
from search.trials.verifying import Spent, verify_trial
from tracking.journal import STUDY_JOURNAL, Journal, save_study_info
from tracking.mlflow_tracker import MlflowTracker, local_store
from tracking.sender import Delivery

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

UV = Path(__file__).parents[1] / ".uv" / "bin" / "uv"
KEY = "tiny-0000"
PARAMS = {"loss": "cc_dist", "alpha": 0.5, "beta": 5.0, "warm_up": 0.05, "steps": 1}


class Trained:
    """A real trial on the digits, in a storage folder that tracking has not seen yet."""

    def __init__(self, storage: Path) -> None:
        config = config_of(storage, student__epochs=6, network__width=32, data__validation=0.1)
        self.storage = storage
        self.recipe: Recipe = space_of(config).recipe(PARAMS, 0)
        self.dataset: Dataset = load_dataset(config.data)
        self.places = TrialPlaces.of(storage / "artifacts", STUDY.name, KEY)
        save_study_info(self.places.journal.parent, STUDY)
        task = TrialTask(KEY, self.recipe, PARAMS, self.places, config.stopping, exports=True)
        self.result: TrialResult = run_trial(task, self.dataset, device=torch.device("cpu"), reports=Recorder())
        with Journal(self.places.journal.parent / STUDY_JOURNAL) as journal:
            journal.register(NAME, {KEY: {}}, {"best-certified": KEY}, "")

    def send(self, uri: str, artifact_root: str | None) -> None:
        delivery = Delivery(self.places.journal.parent, MlflowTracker(uri, artifact_root), resume=False)
        delivery.send()
        assert delivery.rows_left() == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("storage"))


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of a new environment that has PyTorch, MLflow and what they need."""
    if not UV.exists():
        pytest.skip(f"{UV} is not there: make setup puts it there")
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    python = str(folder / "bin" / "python")
    packages = [f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "mlflow")]
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    subprocess.run([UV, "pip", "install", "--quiet", "--python", python, *packages], check=True)
    known = subprocess.run([UV, "pip", "list", "--python", python], check=True, capture_output=True, text=True).stdout
    assert "ccdist" not in known
    return python


def test_the_recorded_accuracies_come_back(trained: Trained, fresh_python: str, tmp_path: Path) -> None:
    trained.send(*local_store(trained.storage))
    uri = local_store(trained.storage)[0]
    client = MlflowClient(uri)
    validation, recorded = trained.dataset.validation, trained.result
    assert 0 < recorded.certified_accuracy < recorded.standard_accuracy < 1  # else anything would do
    # In the fresh environment: the standard accuracy, to the last image.
    place = Path(client.get_model_version_download_uri(NAME, "1"))
    images = to_pixels(validation.images)
    told = load_elsewhere(fresh_python, place, images, validation.labels, tmp_path)
    assert Path(told["file"]).is_relative_to(Path(fresh_python).parents[1])
    assert told["correct"] / len(validation) == recorded.standard_accuracy
    experiment = client.get_run(client.get_model_version(NAME, "1").run_id).info.experiment_id
    (model,) = client.search_logged_models([experiment])
    values = {each.key: each.value for each in model.metrics}
    assert values["standard_accuracy"] == recorded.standard_accuracy
    assert values["certified_accuracy"] == recorded.certified_accuracy
    # Through this project's loader: every verdict of the recorded ladder.
    out = tmp_path / "model"
    assert fetch_main([f"models:/{NAME}@best-certified", str(out), "--storage", str(trained.storage)]) == 0
    network = checkpoint.load(out)
    assert torch.equal(network(images), checkpoint.load(trained.places.student)(images))
    places = TrialPlaces.of(tmp_path, STUDY.name, KEY)
    places.folder.mkdir(parents=True)
    ladder = trained.recipe.verification
    again = verify_trial(network, validation, ladder, places, spent=Spent({}, {}), reports=Recorder())
    assert again.certified_accuracy == recorded.certified_accuracy
    columns = ["index", "label", "prediction", "verdict", "method", "lower_bound"]
    tables = [pq.read_table(each.verdicts, columns=columns).to_pylist() for each in (places, trained.places)]
    assert tables[0] == tables[1]


def test_through_a_server(trained: Trained, tmp_path: Path) -> None:
    port = free_port()
    MlflowTracker(*local_store(tmp_path))  # the server's database
    for name in ("weights.safetensors", "network.json"):
        assert (trained.places.student / name).exists()
    with ui_server(tmp_path, port, signal.SIGTERM):
        uri = f"http://127.0.0.1:{port}"
        for path in trained.places.journal.parent.glob("*.sent"):
            path.unlink()
        for _ in range(2):
            trained.send(uri, None)
            for path in trained.places.journal.parent.glob("*.sent"):
                path.unlink()
        client = MlflowClient(uri)
        (version,) = client.search_model_versions(f"name = '{NAME}'")
        experiment = client.get_run(version.run_id).info.experiment_id
        (model,) = client.search_logged_models([experiment])
        assert (model.status.value, version.source) == ("READY", f"models:/{model.model_id}")
        assert {each.key: each.value for each in model.metrics}.items() <= asdict(trained.result).items()
        for number, reference in enumerate((f"models:/{NAME}@best-certified", f"models:/{NAME}/1", KEY)):
            out = tmp_path / f"model{number}"
            assert fetch_main([reference, str(out), "--tracking-uri", uri]) == 0
            for path in out.iterdir():
                assert path.read_bytes() == (trained.places.student / path.name).read_bytes()
        loads = "import sys, mlflow.pytorch; print(mlflow.pytorch.load_model(sys.argv[1]))"
        environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
        command = [sys.executable, "-W", "ignore", "-c", loads, f"models:/{NAME}@best-certified"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert "GraphModule" in done.stdout, done.stderr
