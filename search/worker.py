"""What Ray runs for a trial: unpack, run, report. Every failure becomes a report, so no trial ends a search."""

import json
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import tune

from ccdist.data import Dataset, ImageSet
from ccdist.host_memory import keep_freed_memory
from search.config import ResourcesConfig
from search.recipe import Recipe
from search.trial import TrialPlaces, TrialTask, failure_reason, run_trial

# Seconds between progress reports: each one passes through the driver's loop.
REPORT_INTERVAL = 1.0


@dataclass(frozen=True)
class SharedDataset:
    """A data set as numpy arrays, which Ray's object store shares between the workers of a node without copies."""

    arrays: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    fields: dict[str, Any]

    @classmethod
    def of(cls, dataset: Dataset) -> "SharedDataset":
        parts = (dataset.train, dataset.validation)
        arrays = tuple(tensor.numpy() for part in parts for tensor in (part.images, part.labels))
        fields = {name: getattr(dataset, name) for name in Dataset.__dataclass_fields__}
        fields = {name: value for name, value in fields.items() if not isinstance(value, ImageSet)}
        return cls((arrays[0], arrays[1], arrays[2], arrays[3]), fields)

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def dataset(self) -> Dataset:
        with warnings.catch_warnings():
            # The store's memory is read-only, and nothing writes to a data set.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensors = [torch.from_numpy(array) for array in self.arrays]
        return Dataset(train=ImageSet(*tensors[:2]), validation=ImageSet(*tensors[2:]), **self.fields)


@dataclass(frozen=True)
class Suggestion:
    """What the searcher sends to a worker, as a Tune configuration of plain values."""

    key: str
    params: dict[str, Any]
    recipe: Recipe

    def to_config(self) -> dict[str, Any]:
        # One text: Tune would spell nested values into the trial's name and merge them with its own.
        return {"trial": json.dumps({"key": self.key, "params": self.params, "recipe": self.recipe.model_dump_json()})}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Suggestion":
        content = json.loads(config["trial"])
        return cls(content["key"], content["params"], Recipe.model_validate_json(content["recipe"]))


def trainable(
    config: dict[str, Any], *, study: str, artifacts: str, shared: SharedDataset, resources: ResourcesConfig
) -> None:
    """Run one trial and report its result, or why it failed."""
    suggestion = Suggestion.from_config(config)
    last_report = 0.0

    def on_progress(phase: str, done: int, of: int) -> None:
        nonlocal last_report
        if time.monotonic() - last_report >= REPORT_INTERVAL:
            last_report = time.monotonic()
            # Not "done": Tune takes a metric of that name for the end of the trial.
            tune.report({"state": "RUNNING", "phase": phase, "step": done, "steps": of})

    try:
        device = _prepare(resources)
        places = TrialPlaces.of(Path(artifacts), study, suggestion.key)
        task = TrialTask(suggestion.key, suggestion.recipe, suggestion.params, places)
        result = run_trial(task, shared.dataset(), device=device, on_progress=on_progress)
    except Exception as error:
        tune.report({"state": "FAILED", "reason": failure_reason(error)})
        return
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # the process is reused; what it keeps, a neighbour on the GPU lacks
    tune.report({"state": "COMPLETE", "result": json.dumps(asdict(result))})


def _prepare(resources: ResourcesConfig) -> torch.device:
    """Threads and memory as the trial's resources say; Ray itself only keeps the books."""
    torch.set_num_threads(max(1, int(resources.cpu)))
    keep_freed_memory()
    if resources.gpu == 0:
        return torch.device("cpu")
    device = torch.device("cuda", 0)
    if resources.gpu < 1:
        torch.cuda.set_per_process_memory_fraction(resources.gpu, device)
    return device
