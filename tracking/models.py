"""Trained networks as MLflow's logged models: an exported program that loads without this project and without pickle.

    MLmodel               what `mlflow.pytorch.load_model` and `mlflow.pyfunc.load_model` read
    data/model.pt2        the program that the trial wrote, looked at and written anew
    extra_files/          the trial's own files, from which the project rebuilds the network exactly
    input_example.json    two images; requirements.txt, conda.yaml, python_env.yaml: what loading needs

The folder is written here and not by `mlflow.pytorch.save_model`, which would load and trace the program once more,
in the process that drives the search; a test compares the two.
"""

import importlib.metadata
import json
import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tracking.program_check import UnsafeProgramError, copy_program
from tracking.tracker import TAG_TRIAL, ModelInfo, RefusedError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Dataset, LoggedModel

EXTRA_FILES = "extra_files"
MODEL_TYPE = "certified-classifier"
_DATA, _PROGRAM = "data", "model.pt2"
_EXAMPLE, _SERVING_EXAMPLE = "input_example.json", "serving_input_example.json"
_REQUIREMENTS, _CONDA_ENV, _PYTHON_ENV = "requirements.txt", "conda.yaml", "python_env.yaml"
_DIGEST_LENGTH = 36
_EXAMPLE_IMAGES = 2  # whoever exports again by an example of one image gets a program of exactly one


def log_model(
    client: "MlflowClient", experiment_id: str, run_id: str, key: str, model: ModelInfo, *, time_ms: int
) -> None:
    """Make the model of a trial, or add to the metrics of the one that is there.

    One that a kill left half made is completed.
    """
    logged = find_model(client, experiment_id, run_id, model.name)
    if logged is None:
        params = client.get_run(run_id).data.params
        tags = {TAG_TRIAL: key}
        client.create_logged_model(experiment_id, logged_name(model.name), run_id, tags, params, MODEL_TYPE)
        # The client repeats a request whose answer was lost, and each repetition makes a model.
        logged = find_model(client, experiment_id, run_id, model.name)
    if logged is None:
        raise RuntimeError(f"the model {model.name} was made, but MLflow does not show it")
    if not is_ready(logged):
        with tempfile.TemporaryDirectory() as folder:
            try:
                write_model(Path(folder), model, logged.model_id)
            except UnsafeProgramError as error:
                raise RefusedError(
                    f"{model.program} is no program of a network, or would run when it is loaded: {error}"
                ) from error
            client.log_model_artifacts(logged.model_id, folder)
        client.finalize_logged_model(logged.model_id, "READY")
    _link(client, run_id, logged.model_id, model, time_ms)


def find_model(client: "MlflowClient", experiment_id: str, run_id: str, name: str) -> "LoggedModel | None":
    """The model of that name that the run has made, ready or not; doubles are deleted."""
    query = f"name = '{logged_name(name)}' AND source_run_id = '{run_id}'"
    found = client.search_logged_models([experiment_id], query)
    ranked = sorted(found, key=lambda model: (not is_ready(model), model.creation_timestamp, model.model_id))
    for double in ranked[1:]:
        client.delete_logged_model(double.model_id)
    return ranked[0] if ranked else None


def logged_name(name: str) -> str:
    """A trial's key, or any other name, as MLflow accepts it for a model."""
    return "".join("_" if sign in "/:.%\"'" else sign for sign in name)


def is_ready(model: "LoggedModel") -> bool:
    """Whether all of its files are there."""
    return str(model.status.value) == "READY"


def write_model(folder: Path, model: ModelInfo, model_id: str | None = None) -> None:
    """Write a model's folder; the trial's other files are linked, not copied: weights may be large.

    Raises:
        UnsafeProgramError: the program is none, or would run when it is loaded.
    """
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    program = folder / _DATA / _PROGRAM
    for part in (_DATA, EXTRA_FILES):
        (folder / part).mkdir()
    copy_program(model.program, program, model.input_shape)
    for path in model.files:
        (folder / EXTRA_FILES / path.name).symlink_to(path.resolve())
    example = np.full((_EXAMPLE_IMAGES, *model.input_shape), 0.5).tolist()
    (folder / _EXAMPLE).write_text(json.dumps(example))
    (folder / _SERVING_EXAMPLE).write_text(json.dumps({"inputs": example}))
    _write_environment(folder, model.torch_version)
    float32 = np.dtype("float32")
    images, logits = TensorSpec(float32, (-1, *model.input_shape)), TensorSpec(float32, (-1, model.num_outputs))
    content = Model(
        model_id=model_id,
        signature=ModelSignature(Schema([images]), Schema([logits])),
        saved_input_example_info={
            "artifact_path": _EXAMPLE,
            "serving_input_path": _SERVING_EXAMPLE,
            "type": "ndarray",
        },
        metadata=dict(model.metadata),
        model_size_bytes=sum(path.stat().st_size for path in (program, *model.files)),
    )
    content.add_flavor(
        "pytorch",
        model_data=_DATA,
        pytorch_version=str(model.torch_version),  # PyTorch has a class of its own for it
        code=None,
        extra_files=[{"path": f"{EXTRA_FILES}/{path.name}"} for path in model.files],
    )
    content.add_flavor(
        "python_function",
        loader_module="mlflow.pytorch",
        data=_DATA,
        env={"conda": _CONDA_ENV, "virtualenv": _PYTHON_ENV},
        config={"device": None},
        python_version=platform.python_version(),
    )
    content.save(str(folder / "MLmodel"))


def _write_environment(folder: Path, torch_version: str) -> None:
    """What loads the model: PyTorch (of any build), MLflow, NumPy; nothing of this project."""
    import yaml

    versions = {"torch": torch_version.partition("+")[0]}
    versions |= {name: importlib.metadata.version(name) for name in ("mlflow", "numpy")}
    requirements = [f"{name}=={version}" for name, version in versions.items()]
    python = platform.python_version()
    conda = {
        "name": "mlflow-env",
        "channels": ["conda-forge"],
        "dependencies": [f"python={python}", "pip", {"pip": requirements}],
    }
    virtual = {"python": python, "build_dependencies": ["pip"], "dependencies": [f"-r {_REQUIREMENTS}"]}
    (folder / _REQUIREMENTS).write_text("\n".join(requirements) + "\n")
    (folder / _CONDA_ENV).write_text(yaml.safe_dump(conda, sort_keys=False))
    (folder / _PYTHON_ENV).write_text(yaml.safe_dump(virtual, sort_keys=False))


def _link(client: "MlflowClient", run_id: str, model_id: str, model: ModelInfo, time_ms: int) -> None:
    """Tie the model to its run, and what was measured to the model and to the images."""
    from mlflow.entities import DatasetInput, InputTag, LoggedModelOutput, Metric

    digest = model.dataset_digest[:_DIGEST_LENGTH]
    outputs = client.get_run(run_id).outputs
    # MLflow refuses to be told of an output again.
    if model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    client.log_inputs(run_id, [DatasetInput(_dataset(model, digest), [InputTag("mlflow.data.context", "evaluation")])])
    metrics = [
        Metric(name, value, time_ms, 0, model_id=model_id, dataset_name=model.dataset, dataset_digest=digest)
        for name, value in model.metrics.items()
    ]
    if metrics:
        client.log_batch(run_id, metrics)


def _dataset(model: ModelInfo, digest: str) -> "Dataset":
    from mlflow.entities import Dataset

    spec = [{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, *model.input_shape]}}]
    schema = {"mlflow_tensorspec": {"features": json.dumps(spec), "targets": None}}
    # Of MLflow's kinds of source the one that only says which program brought the images.
    source = {"tags": {"mlflow.source.name": "ccdist.data", "mlflow.source.type": "LOCAL"}}
    return Dataset(model.dataset, digest, "code", json.dumps(source), json.dumps(schema))
