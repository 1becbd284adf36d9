"""The files that a project keeps with its models in MLflow, on this machine again."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tracking.mlflow_tracker import local_store, open_client
from tracking.models import EXTRA_FILES, is_ready
from tracking.tracker import TAG_TRIAL

if TYPE_CHECKING:
    from mlflow import MlflowClient

_VERSION = re.compile(r"models:/(?P<name>[^/@]+)/(?P<version>[0-9]+)")
_ALIAS = re.compile(r"models:/(?P<name>[^/@]+)@(?P<alias>[\w.-]+)")
_KEY = re.compile(r"[\w.-]+")
_FILE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_SHOWN = 10
_MOST_NAMES = 1000


class NoSuchModelError(ValueError):
    """There is no such model, or it holds none of the files; the text says what there is."""


@dataclass(frozen=True)
class Found:
    """A model in MLflow: at which address, where its files lie, and what it is called there."""

    uri: str
    location: str
    title: str


def store_uri(storage: Path) -> str:
    """The local store of a storage folder.

    Raises:
        NoSuchModelError: it has none; none is made.
    """
    uri, _ = local_store(storage)
    if not Path(uri.removeprefix("sqlite:///")).exists():
        raise NoSuchModelError(
            f"{storage} holds no MLflow store; give the folder that was the search's --storage, or --tracking-uri"
        )
    return uri


def find(uri: str, reference: str) -> Found:
    """The model of `models:/NAME@ALIAS`, `models:/NAME/VERSION` or the key of a trial.

    Raises:
        NoSuchModelError: there is none, or the reference is none of these.
        Exception: whatever MLflow raises when the server or database cannot be read.
    """
    client = open_client(uri)
    if match := _ALIAS.fullmatch(reference):
        name = match["name"]
        aliases = _aliases(client, name)
        if match["alias"] not in aliases:
            raise NoSuchModelError(f"{name} has no alias {match['alias']!r}; it has {_listed(aliases)}")
        return _version(client, name, aliases[match["alias"]])
    if match := _VERSION.fullmatch(reference):
        _aliases(client, match["name"])  # the name exists
        return _version(client, match["name"], match["version"])
    if _KEY.fullmatch(reference):
        return _trial(client, reference)
    raise NoSuchModelError(
        f"{reference!r} names no model; expected models:/NAME@ALIAS, models:/NAME/VERSION or the key of a trial"
    )


def download(found: Found, folder: Path) -> list[str]:
    """Copy the model's extra files into a folder that is there; returns their names.

    Raises:
        NoSuchModelError: it has none, or one whose name is no plain file's.
        Exception: whatever MLflow raises when they cannot be read.
    """
    from mlflow import artifacts

    place = f"{found.location.rstrip('/')}/{EXTRA_FILES}"
    entries = artifacts.list_artifacts(place, tracking_uri=found.uri)
    if not entries:
        raise NoSuchModelError(f"{found.title} holds no {EXTRA_FILES}: it was not logged by a search of this project")
    # What a server calls a path decides nothing about where a file goes.
    names = [entry.path.rpartition("/")[2] for entry in entries]
    for entry, name in zip(entries, names, strict=True):
        if entry.is_dir or ".." in entry.path.split("/") or not _FILE_NAME.fullmatch(name):
            raise NoSuchModelError(f"{found.title} holds {entry.path!r}, which is no plain file; nothing was written")
    for name in names:
        artifacts.download_artifacts(f"{place}/{name}", dst_path=str(folder), tracking_uri=found.uri)
    return names


def _aliases(client: "MlflowClient", name: str) -> dict[str, str]:
    """Alias -> version of a registered model."""
    registered = {model.name: model for model in client.search_registered_models(max_results=_MOST_NAMES)}
    if name not in registered:
        raise NoSuchModelError(f"no registered model {name!r}; there is {_listed(registered)}")
    return {alias: str(version) for alias, version in registered[name].aliases.items()}


def _version(client: "MlflowClient", name: str, version: str) -> Found:
    found = client.search_model_versions(f"name = '{name}'")
    versions = {str(each.version): each for each in sorted(found, key=lambda each: int(each.version))}
    if version not in versions:
        raise NoSuchModelError(f"{name} has no version {version}; it has {_listed(versions)}")
    trial = versions[version].tags.get(TAG_TRIAL)
    title = f"{name} version {version}" + (f" (trial {trial})" if trial else "")
    return Found(client.tracking_uri, client.get_model_version_download_uri(name, version), title)


def _trial(client: "MlflowClient", key: str) -> Found:
    experiments = [each.experiment_id for each in client.search_experiments()]
    found = client.search_logged_models(experiments, f"tags.`{TAG_TRIAL}` = '{key}'")
    ready = [model for model in found if is_ready(model)]
    if not ready:
        raise NoSuchModelError(f"no model of a trial {key!r}; a trial's key is the name of its run in MLflow")
    if len(ready) > 1:
        runs = _listed(str(model.source_run_id) for model in ready)
        raise NoSuchModelError(f"several models of a trial {key!r}, of the runs {runs}; register the one that is meant")
    return Found(client.tracking_uri, ready[0].artifact_location, f"model of trial {key}")


def _listed(names: Iterable[str]) -> str:
    """The first names, in their order; "none" where there is none."""
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more if every else "none"
