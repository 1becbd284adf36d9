"""What a search would do, what it would cost, and what it would store: `search.run --dry-run`. Writes nothing."""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from rich.console import Console

from ccdist.data import Dataset, num_batches, to_pixels
from ccdist.verification import verify
from search.config import ResourcesConfig, SearchConfig
from search.scheduling.budget import SECONDS_PER_HOUR, accelerator_hours
from search.sharing.probe import PROBE_BATCHES, searches_teacher, timed_student, timed_teacher, training_part, typical
from search.space import Space
from search.storage import Storage
from search.studies.records import StudyRecord

# Images of a verification that is measured.
PROBE_IMAGES = 32
BYTES_PER_WEIGHT = 4
# Adam keeps two numbers for each weight beside the weight itself and its copy in the student's folder.
STATE_COPIES = 3
# A verdict row as Parquet, a trial's journal and its rows in the two databases, as seen in finished searches.
BYTES_PER_VERDICT, BYTES_PER_TRIAL = 12, 60_000
COSTS = ("student", "verification")


@dataclass(frozen=True)
class TrialCost:
    """Seconds of one trial on one of the slots, and where the number comes from."""

    teacher: float  # paid once for each teacher recipe
    student: float
    verification: float
    weights: int  # numbers in one network
    source: str

    @property
    def seconds(self) -> float:
        return self.student + self.verification


def measured_cost(config: SearchConfig, space: Space, dataset: Dataset, record: StudyRecord | None) -> TrialCost:
    """What a trial costs: the mean of the study's finished ones, else a few batches of the first point, timed here."""
    recipe = space.recipe(typical(space), 0)
    torch.set_num_threads(max(1, int(config.resources.cpu)))  # as a trial has
    device = torch.device("cuda" if config.resources.gpu and torch.cuda.is_available() else "cpu")
    part = training_part(dataset, recipe)
    teacher_step, teacher = timed_teacher(part, recipe, device) if recipe.needs_teacher else (0.0, None)
    seconds, network = timed_student(part, recipe, teacher, device)
    weights = sum(parameter.numel() for parameter in network.parameters())
    finished = _finished_costs(record)
    if finished:
        means = {part: sum(costs.get(part, 0.0) for costs in finished) / len(finished) for part in COSTS}
        dearest = max(costs.get("teacher", 0.0) for costs in finished)
        source = f"the study's {len(finished)} finished trials"
        return TrialCost(dearest, means["student"], means["verification"], weights, source)
    batches = num_batches(len(dataset.train), recipe.student.batch_size)
    images = to_pixels(dataset.validation.images[:PROBE_IMAGES]).to(device)
    started = time.perf_counter()
    verify(network, images, dataset.validation.labels[:PROBE_IMAGES], recipe.verification)
    verification = (time.perf_counter() - started) / len(images) * len(dataset.validation)
    return TrialCost(
        teacher_step * num_batches(len(dataset.train), recipe.teacher.batch_size) * recipe.teacher.epochs,
        seconds * batches * recipe.student.epochs,
        verification,
        weights,
        f"{PROBE_BATCHES} batches and {len(images)} images on this machine",
    )


def show_plan(
    config: SearchConfig, space: Space, storage: Storage, dataset: Dataset, record: StudyRecord | None, console: Console
) -> None:
    """Print the plan."""
    cost = measured_cost(config, space, dataset, record)
    for line in plan_lines(config, space, storage, dataset, record, cost, slots_here(config.resources)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def plan_lines(
    config: SearchConfig,
    space: Space,
    storage: Storage,
    dataset: Dataset,
    record: StudyRecord | None,
    cost: TrialCost,
    slots: int,
) -> Iterator[str]:
    """The plan as text, one fact a line."""
    done = len(record.done) if record else 0
    left = max(0, config.budget.trials - done)
    state = f"{done} of {config.budget.trials} trials done" if record else "new"
    yield f"study {config.study_name} ({state}) in {storage.workers_artifacts}; nothing is started or written"
    yield (
        f"{config.data.name}: {len(dataset.train):,} training and {len(dataset.validation):,} validation images; "
        f"threat {config.threat}"
    )
    yield "searched:"
    for name, parameter in space.parameters.items():
        yield f"  {name}: {_range(parameter.distribution)}"
    stops = {"training": config.stopping.training != "off", "verification": config.stopping.verification}
    yield (
        f"sampler {config.search.sampler.kind}, seed {config.search.seed}, {len(config.search.points)} points first; "
        f"stopped early: {' and '.join(kind for kind, on in stops.items() if on) or 'nothing'}"
    )
    yield (
        f"one trial: {duration(cost.student)} student, {duration(cost.verification)} verification; a teacher: "
        f"{duration(cost.teacher)}, once for each recipe (from {cost.source})"
    )
    teachers = _num_teachers(space, left)
    seconds = left * cost.seconds + teachers * cost.teacher
    unit = "GPU" if config.resources.gpu else "core"
    yield (
        f"{left} trials to run, {slots} at once on this machine: about {duration(seconds / slots)}, "
        f"{seconds / SECONDS_PER_HOUR * (config.resources.gpu or config.resources.cpu):.2g} {unit}-hours, "
        "less what stopping early saves"
    )
    if config.budget.hours is not None:
        yield f"after {config.budget.hours:g} hours of this command what runs is cut off, and goes on with the next one"
    if config.budget.accelerator_hours is not None:
        spent = accelerator_hours(record.trials if record else (), config.resources)
        yield f"{spent:.3g} of {config.budget.accelerator_hours:g} accelerator-hours are spent; then nothing new starts"
    artifacts, mlflow = _weight_copies(config, storage)
    weights, rows = cost.weights * BYTES_PER_WEIGHT, len(dataset.validation) * BYTES_PER_VERDICT + BYTES_PER_TRIAL
    finished, running = left * ((artifacts + mlflow) * weights + rows), slots * weights * STATE_COPIES
    if storage.artifacts_uri is None:
        yield f"disk: about {_size(finished)} in the end, and {_size(running)} while trials run"
        return
    stored = left * (artifacts * weights + rows)
    yield (
        f"in the store: about {_size(stored)} in the end, and {_size(running)} while trials run; disk of this machine, "
        f"with its copies of the artefacts: at most about {_size(finished)}"
    )


def _weight_copies(config: SearchConfig, storage: Storage) -> tuple[int, int]:
    """How often the artefacts hold the weights of a finished trial, its student and program, and a local MLflow."""
    if not config.tracking.enabled:
        return 1, 0
    models = config.tracking.models
    # The trial's artifact; of its model the program and the extra files.
    in_mlflow = 3 if models else 1
    return 2 if models else 1, in_mlflow if storage.tracking_uri is None else 0


def slots_here(resources: ResourcesConfig) -> int:
    """Trials at once on this machine, at least one."""
    slots = math.floor((os.cpu_count() or 1) / resources.cpu + 1e-9)
    if resources.gpu:
        gpus = torch.cuda.device_count()
        per_gpu = math.floor(1 / resources.gpu + 1e-9) if resources.gpu <= 1 else 1
        slots = min(slots, gpus * per_gpu if resources.gpu <= 1 else gpus // int(resources.gpu))
    if resources.concurrency != "auto":
        slots = min(slots, resources.concurrency)
    return max(1, slots)


def _finished_costs(record: StudyRecord | None) -> list[dict[str, float]]:
    complete = record.complete if record else ()
    return [trial.costs for trial in complete if trial.verification_state == "finished"]


def _num_teachers(space: Space, trials: int) -> int:
    """One, unless something that a teacher depends on is searched."""
    return trials if searches_teacher(space) else min(trials, 1)


def _range(distribution: BaseDistribution) -> str:
    match distribution:
        case FloatDistribution(low=low, high=high, log=log) | IntDistribution(low=low, high=high, log=log):
            whole = "whole numbers, " if isinstance(distribution, IntDistribution) else ""
            return f"{whole}{low:g} to {high:g}{', logarithmic' if log else ''}"
        case CategoricalDistribution(choices=choices):
            return f"one of {', '.join(map(str, choices))}"
    raise AssertionError(distribution)


def duration(seconds: float) -> str:
    """Seconds in the unit that fits."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / SECONDS_PER_HOUR:.1f} h"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"
