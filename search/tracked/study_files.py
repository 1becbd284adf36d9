"""What a study leaves behind beside its trials: the files of its parent run in MLflow.

The space file and the environment are written when a search begins. The rest follows from the study's record and can be
drawn again at any time.
"""

import json
import os
import platform
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import yaml

from ccdist import atomic_files
from ccdist.provenance import source_commit
from search.config import SearchConfig
from search.results.configurations import study_front
from search.results.figures import PLOTLY_CONFIG, front_figure, save_front_png, with_title
from search.results.page import write_report
from search.results.report import front_trials
from search.results.trial_figures import hypervolume_figure
from search.studies.records import StudyRecord, TrialRecord
from search.tracked import run_names
from tracking.tables import table_json

# Whatever may change a result or how it is stored.
PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "ray", "optuna", "mlflow", "pyarrow", "plotly")
DRAWN = (
    run_names.FRONT_PAGE,
    run_names.FRONT_PICTURE,
    run_names.HYPERVOLUME_PAGE,
    run_names.TRIALS,
    run_names.TRIALS_SHOWN,
    run_names.REPORT,
)


# ---- When a search begins ------------------------------------------------------------------------------------------


def write_settings(config: SearchConfig, folder: Path) -> dict[str, Path]:
    """Write what a search starts from; artifact's name -> file."""
    space, environment = folder / run_names.SPACE_FILE, folder / run_names.ENVIRONMENT
    folder.mkdir(parents=True, exist_ok=True)
    atomic_files.write_text(space, space_text(config))
    atomic_files.write_text(environment, json.dumps(describe_environment(), indent=1))
    return {path.name: path for path in (space, environment)}


def space_text(config: SearchConfig) -> str:
    """The space file as it was used, `--set` included, without the places where things are kept."""
    tree = config.model_dump(mode="json", exclude={"storage", "tracking"})
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def describe_environment() -> dict[str, Any]:
    """Versions, machine and source of the driver; a trial says its own in its tags."""
    commit = source_commit()
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "gpus": torch.cuda.device_count(),  # their names would take memory of one; trials say theirs
        "commit": commit.removesuffix("-dirty"),
        "dirty": commit.endswith("-dirty"),
    }


def environment_tags() -> dict[str, str]:
    """What of it is worth a column, named as for trials."""
    packages = ("torch", "ray", "optuna", "mlflow")
    return {
        "cert.python": platform.python_version(),
        **{f"cert.{name}": _version(name) or "missing" for name in packages},
        "cert.platform": platform.platform(),
        "cert.commit": source_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# ---- While it goes on, and at its end ------------------------------------------------------------------------------


def draw(record: StudyRecord, folder: Path) -> dict[str, Path]:
    """Write report, figures and tables anew, each in one atomic step; artifact's name -> file."""
    front, picture, hypervolume, trials, shown, report = (folder / name for name in DRAWN)
    table = trials_table(record)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_files.write_table(trials, table)
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    atomic_files.write_text(shown, table_json(table.column_names, rows))
    save_front_png(record, picture)
    found = study_front(record)
    figures = {front: front_figure(record), hypervolume: with_title(hypervolume_figure(found), found)}
    for path, figure in figures.items():
        # The script is inside: the page has to open where there is no network.
        atomic_files.write_text(path, figure.to_html(include_plotlyjs=True, config=PLOTLY_CONFIG))
    write_report(record, report)
    return {name: folder / name for name in DRAWN}


def trials_table(record: StudyRecord) -> pa.Table:
    """One row for each trial: results, parameters as `params.NAME`, costs as `cost.PART`; seconds and fractions."""
    members = {trial.key for trial in front_trials(record)}
    trials = record.trials
    columns: dict[str, list[Any]] = {
        "trial": [trial.key for trial in trials],
        "state": [trial.state for trial in trials],
        "on_front": [trial.key in members for trial in trials],
        **{name: [getattr(trial, name) for trial in trials] for name in _RESULTS},
        **_spread("params", [trial.params for trial in trials]),
        **_spread("cost", [trial.costs for trial in trials]),
        "configuration": [trial.configuration for trial in trials],
        "finished_at": [_time(trial) for trial in trials],
        "reason": [trial.reason for trial in trials],
    }
    about = {"study": record.name, "dataset": record.dataset, "threat": record.threat, "split": record.split}
    about |= {"verifier": record.verifier, "reference": json.dumps(record.reference)}
    arrays = {name: _array(name, values) for name, values in columns.items()}
    return pa.table(arrays).replace_schema_metadata(about)


# Attributes of a trial; the types of columns must not depend on whether a trial has finished.
_RESULTS: dict[str, pa.DataType] = {
    "standard_accuracy": pa.float64(),
    "adversarial_accuracy": pa.float64(),
    "certified_accuracy": pa.float64(),
    "certified_upper": pa.float64(),
    "num_images": pa.int64(),
    "verification_state": pa.string(),
    "seconds": pa.float64(),
    "seed": pa.int64(),
}
_TYPES = _RESULTS | {"configuration": pa.string(), "finished_at": pa.string(), "reason": pa.string()}


def _spread(prefix: str, parts: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """A column for each name that any of these has."""
    names = dict.fromkeys(name for each in parts for name in each)
    return {f"{prefix}.{name}": [each.get(name) for each in parts] for name in names}


def _array(name: str, values: Sequence[Any]) -> pa.Array:
    """Numbers as numbers; a parameter whose values are of several kinds as text."""
    if name in _TYPES:
        return pa.array(values, _TYPES[name])
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) > 1:
        values = [None if value is None else value if kinds <= {int, float} else str(value) for value in values]
        return pa.array(values, pa.float64() if kinds <= {int, float} else pa.string())
    return pa.array(values)


def _time(trial: TrialRecord) -> str | None:
    if trial.finished_at is None:
        return None
    return datetime.fromtimestamp(trial.finished_at, UTC).isoformat(timespec="seconds")
