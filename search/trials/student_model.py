"""A trial's student as MLflow is to keep it: a program that runs without this project, and what was measured on it.

The worker writes the program as soon as the student is there, before its verification: whoever ends the trial, the
driver included, finds it. A student that cannot be exported costs its trial nothing but the model in MLflow.
"""

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from ccdist import atomic_files, checkpoint
from ccdist.data import Dataset
from ccdist.program import save_program
from search.artifacts.disk_space import is_of_disk
from search.artifacts.places import TrialPlaces
from search.recipe import Recipe
from search.studies.records import TrialResult
from search.tracked import run_names
from tracking.journal import Journal
from tracking.tracker import ModelInfo

log = logging.getLogger(__name__)

PROGRAM, DESCRIPTION = "model.pt2", "model.json"


def export_student(places: TrialPlaces, key: str, recipe: Recipe, dataset: Dataset) -> None:
    """Write the program of the stored student, unless an earlier run of the trial did, and why there is none.

    Raises:
        OSError: the disk is full.
    """
    if (places.model / DESCRIPTION).exists():
        return
    staging = Path(tempfile.mkdtemp(prefix=f".{places.model.name}.", dir=places.folder))
    description: dict[str, Any] = {
        "torch_version": str(torch.__version__),
        "input_shape": dataset.input_shape,
        "num_outputs": dataset.num_classes,
        "dataset": f"{dataset.name}-{dataset.split}",
        "dataset_digest": dataset.fingerprint,
        "metadata": {
            "trial": key,
            "data": dataset.name,
            "threat": str(recipe.threat),
            "network": recipe.student.network.name,
        },
    }
    try:
        save_program(staging / PROGRAM, checkpoint.load(places.student), dataset.input_shape, graphs=places.graphs)
    except Exception as error:
        if is_of_disk(error):
            shutil.rmtree(staging, ignore_errors=True)
            raise
        # Whatever it is, the trial is worth more than its model in MLflow.
        description["failure"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        log.warning("trial %s gets no model in MLflow: its student cannot be exported: %s", key, description["failure"])
        (staging / PROGRAM).unlink(missing_ok=True)
    atomic_files.write_text(staging / DESCRIPTION, json.dumps(description, indent=1))
    shutil.rmtree(places.model, ignore_errors=True)
    staging.chmod(0o755)
    staging.rename(places.model)


def journal_model(places: TrialPlaces, journal: Journal, result: TrialResult) -> dict[str, str]:
    """Tell the journal of the student's model, if there is a program of it; returns tags of the trial."""
    try:
        description = json.loads((places.model / DESCRIPTION).read_text())
    except FileNotFoundError:
        return {}
    metadata = description.pop("metadata")
    if "failure" in description:
        return {run_names.MODEL_FAILURE: description["failure"]}
    journal.model(
        ModelInfo(
            name=journal.key,
            program=places.model / PROGRAM,
            files=(places.student / checkpoint.WEIGHTS, places.student / checkpoint.NETWORK),
            metrics=run_names.accuracies(result),
            metadata=metadata,
            **description,
        )
    )
    return {}
