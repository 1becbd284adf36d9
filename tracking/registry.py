"""MLflow's model registry: a version for the model of a trial, and aliases."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tracking.models import find_model, is_ready
from tracking.tracker import TAG_TRIAL, RefusedError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

# By this tag the version of a model is found again: MLflow's own database does not keep which model it was made of.
TAG_MODEL = "cert.model"
_MODEL_VERSIONS_TAG = "mlflow.modelVersions"
_ALREADY_THERE = "RESOURCE_ALREADY_EXISTS"


def register(
    client: "MlflowClient",
    experiment_id: str,
    name: str,
    run_ids: Mapping[str, str],
    versions: Mapping[str, Mapping[str, str]],
    aliases: Mapping[str, str],
    description: str,
) -> None:
    """Make a version for the model of each of these runs that has none, and move the aliases.

    Raises:
        RefusedError: a trial that ended has no model; everything else was registered.
        RuntimeError: a model is still on its way.
    """
    models = {key: find_model(client, experiment_id, run_ids[key], key) for key in versions}
    missing = [key for key, model in models.items() if model is None or not is_ready(model)]
    runs = {key: client.get_run(run_ids[key]).info for key in missing}
    on_their_way = [key for key, run in runs.items() if run.status == "RUNNING" and run.lifecycle_stage == "active"]
    if on_their_way:
        raise RuntimeError(f"the models of {', '.join(on_their_way)} have not arrived yet")
    _ensure_name(client, name, description)
    numbers: dict[str, str] = {}
    for key, model in models.items():
        if model is not None and key not in missing:
            numbers[key] = _version(client, name, model, {TAG_TRIAL: key, **versions[key]})
    for alias, key in aliases.items():
        if key in numbers:
            client.set_registered_model_alias(name, alias, numbers[key])
        elif not key:
            client.delete_registered_model_alias(name, alias)
    if missing:
        raise RefusedError(f"trials without a logged model cannot be registered in {name}: {', '.join(missing)}")


def _ensure_name(client: "MlflowClient", name: str, description: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != _ALREADY_THERE:
            raise
    if description:
        client.update_registered_model(name, description)


def _version(client: "MlflowClient", name: str, model: "LoggedModel", tags: Mapping[str, str]) -> str:
    """The number of the model's version, made if there is none; of doubles the first stays."""
    found = _versions_of(client, name, model.model_id)
    if not found:
        made_of = {**tags, TAG_MODEL: model.model_id}
        # Without a server MLflow would look the model up in whatever store the process has set for good: its place
        # says the same.
        is_remote = client.tracking_uri.startswith(("http://", "https://"))
        source = f"models:/{model.model_id}" if is_remote else model.artifact_location
        client.create_model_version(name, source, model.source_run_id, made_of, model_id=model.model_id)
        found = _versions_of(client, name, model.model_id)
    first, *doubles = found
    for double in doubles:  # a request that was repeated because its answer was lost
        client.delete_model_version(name, double.version)
    for tag, value in tags.items():
        if first.tags.get(tag) != value:
            client.set_model_version_tag(name, first.version, tag, value)
    _note_version(client, name, model, str(first.version))
    return str(first.version)


def _versions_of(client: "MlflowClient", name: str, model_id: str) -> "list[ModelVersion]":
    found = client.search_model_versions(f"name = '{name}' and tags.`{TAG_MODEL}` = '{model_id}'")
    return sorted(found, key=lambda each: int(each.version))


def _note_version(client: "MlflowClient", name: str, model: "LoggedModel", number: str) -> None:
    """What the model's own page shows of its versions; a server writes this itself."""
    noted = json.loads(model.tags.get(_MODEL_VERSIONS_TAG, "[]"))
    own = {"name": name, "version": number}
    if not any({**each, "version": str(each.get("version"))} == own for each in noted):
        client.set_logged_model_tags(model.model_id, {_MODEL_VERSIONS_TAG: json.dumps([*noted, own])})
