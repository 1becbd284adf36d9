"""What Ray runs for a trial: unpack, run, report. Every failure becomes a report, so no trial ends a search.

A report is a flat dictionary with the trial's `key` and a `state`:

    RUNNING    phase, step, steps            at most one a second
    RUNG       rung, values                  JSON of RungValues
    VERIFYING  result, phase, step, steps    JSON of the TrialResult if it is stopped here
    WAITING    teacher                       another process trains it; the trial can be started again later
    PAUSED     reason                        the disk is full; the trial can be started again later
    OUT_OF_MEMORY  reason, on_gpu            the trial can be started again with more of it
    INTERRUPTED  reason                      the storage did not answer, or this node's scratch disk is full; as a
                                             death, the trial is tried again
    COMPLETE   result                        JSON of the TrialResult
    FAILED     reason
"""

import json
import time
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from ray import tune

from ccdist.data import Dataset, ImageSet
from ccdist.host_memory import keep_freed_memory
from search.artifacts.disk_space import DiskFullError, StorageAwayError
from search.artifacts.places import load_result
from search.artifacts.workplace import Workplace
from search.attempts.deaths import STORAGE_AWAY
from search.attempts.shares import Share
from search.config import ResourcesConfig, StoppingConfig
from search.recipe import Recipe
from search.studies.records import RungValues, TrialResult
from search.trial import TrialTask, resume_verification, run_trial
from search.trials.endings import failure_reason, is_of_gpu, is_out_of_memory
from search.trials.reports import WaitingForTeacher
from search.trials.verifying import REPORT_INTERVAL_S, rest_after

_PLAIN = ("key", "params", "resume", "configuration", "deaths", "start", "avoid")
# An undecided image that gets more time gets so many times what it had.
TIMEOUT_GROWTH = 4.0


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
    """What the searcher sends to a worker, as a Tune configuration of plain values.

    resume: the trial is COMPLETE, and its verification is to go on with larger limits.
    configuration: hash of the parameters.
    share: what it holds; None: as the space file says.
    deaths: what became of its attempts before, in a line.
    start: when, by the driver's clock of nanoseconds that only grow: of two runs of a trial the later one counts.
    avoid: Ray's ids of nodes where it must not run.
    """

    key: str
    params: dict[str, Any]
    recipe: Recipe
    resume: bool = False
    configuration: str = ""
    share: Share | None = None
    deaths: str = ""
    start: int = field(default_factory=time.monotonic_ns)
    avoid: tuple[str, ...] = ()

    def to_config(self) -> dict[str, Any]:
        # One text: Tune would spell nested values into the trial's name and merge them with its own.
        content = {name: getattr(self, name) for name in _PLAIN}
        share = None if self.share is None else asdict(self.share)
        return {"trial": json.dumps(content | {"recipe": self.recipe.model_dump_json(), "share": share})}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Suggestion":
        content = json.loads(config["trial"])
        recipe = Recipe.model_validate_json(content["recipe"])
        content |= {"avoid": avoid_of(config)}
        return cls(recipe=recipe, share=share_of(config), **{name: content[name] for name in _PLAIN})


def share_of(config: dict[str, Any]) -> Share | None:
    """What the trial of a Tune configuration holds, without reading the rest of it."""
    share = json.loads(config["trial"])["share"]
    return None if share is None else Share(**share)


def avoid_of(config: dict[str, Any]) -> tuple[str, ...]:
    """Where the trial of a Tune configuration must not run."""
    return tuple(json.loads(config["trial"])["avoid"])


class TuneReports:
    """The reports of one trial, as flat Tune metrics. Tune blocks here until the driver has decided.

    Where the decision is to stop, Tune raises SystemExit out of the report.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._last = -REPORT_INTERVAL_S
        self._rest = 0.0  # after the last report
        self._phase = ""

    def advanced(self, phase: str, done: int, of: int) -> None:
        # Whoever waits for this trial's teacher is told of its end at once.
        rest = self._rest if phase == self._phase else 0.0
        if time.monotonic() - self._last >= max(REPORT_INTERVAL_S, rest):
            self._phase = phase
            # Not "done": Tune takes a metric of that name for the end of the trial.
            self.send("RUNNING", phase=phase, step=done, steps=of)

    def rung(self, name: str, values: RungValues) -> None:
        self.send("RUNG", rung=name, values=json.dumps(asdict(values)))

    def verifying(self, result: TrialResult, phase: str, done: int, of: int) -> None:
        self.send("VERIFYING", result=json.dumps(asdict(result)), phase=phase, step=done, steps=of)

    def send(self, state: str, **fields: str | int) -> None:
        """One report now."""
        self._last = time.monotonic()
        tune.report({"key": self._key, "state": state, **fields})
        self._rest = rest_after(time.monotonic() - self._last)


def trainable(
    config: dict[str, Any],
    *,
    workplace: Workplace,
    shared: SharedDataset,
    resources: ResourcesConfig,
    stopping: StoppingConfig,
    exports: bool = False,
) -> None:
    """Run one trial, or resume its verification, and report its result, or why there is none."""
    suggestion = Suggestion.from_config(config)
    reports = TuneReports(suggestion.key)
    try:
        device = prepare_process(suggestion.share or Share.of(resources))
        dataset = shared.dataset()
        with workplace.trial(suggestion.key, suggestion.start, reports) as (places, storing):
            task = TrialTask(
                suggestion.key,
                suggestion.recipe,
                suggestion.params,
                places,
                stopping,
                suggestion.configuration,
                exports,
                suggestion.deaths,
            )
            if suggestion.resume:
                factor = next_timeout_factor(load_result(places))
                result = resume_verification(task, dataset, device=device, timeout_factor=factor, reports=storing)
            else:
                result = run_trial(task, dataset, device=device, reports=storing)
    except WaitingForTeacher as waiting:
        reports.send("WAITING", teacher=waiting.key)
    except DiskFullError as full:
        reports.send("PAUSED", reason=str(full))
    except StorageAwayError as away:
        reports.send("INTERRUPTED", reason=f"{STORAGE_AWAY}: {away}")
    except Exception as error:
        if is_out_of_memory(error):
            reports.send("OUT_OF_MEMORY", reason=failure_reason(error), on_gpu=is_of_gpu(error))
        else:
            reports.send("FAILED", reason=failure_reason(error))
    else:
        reports.send("COMPLETE", result=json.dumps(asdict(result)))
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # the process is reused; what it keeps, a neighbour on the GPU lacks


def next_timeout_factor(result: TrialResult | None) -> float:
    """With which limits a verification goes on: those of the recipe if it was stopped, else larger ones each time."""
    if result is None or result.verification_state == "stopped":
        return 1.0
    return TIMEOUT_GROWTH * float(result.provenance.get("timeout_factor", 1.0))


def prepare_process(held: ResourcesConfig | Share) -> torch.device:
    """Threads and memory as what the trial holds; Ray itself only keeps the books."""
    torch.set_num_threads(max(1, int(held.cpu)))
    keep_freed_memory()
    if held.gpu == 0:
        return torch.device("cpu")
    device = torch.device("cuda", 0)
    torch.cuda.set_per_process_memory_fraction(min(1.0, held.gpu), device)
    torch.cuda.reset_peak_memory_stats(device)
    return device
