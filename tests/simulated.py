"""Workloads with formulae for results, a scripted searcher, and tables as the benchmarks read them."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from search.simulation.timelines import (
    Report,
    Teacher,
    Timeline,
    TrainingMode,
    VerificationState,
    rung,
    running,
    verification,
)


@dataclass
class Scripted:
    """Trials that take so many seconds each, by number, and report nothing before their end."""

    lengths: list[float]
    checkpoint_s: float = 0.0
    teacher_s: float | None = None

    def teacher(self, params: Mapping[str, Any]) -> Teacher | None:
        return None if self.teacher_s is None else Teacher("one", self.teacher_s)

    def timeline(self, params: Mapping[str, Any], seed: int, mode: TrainingMode) -> Timeline:
        length = self.lengths[params["number"]]
        end = verification(length, [VerificationState(0.0, "ibp", 1, 3)], standard=0.5, num_images=4)
        return Timeline((running(length / 2, "student"), *end), self.teacher(params), self.checkpoint_s)


@dataclass
class ScriptedSearcher:
    """Suggests trials 0 to n - 1, those that were lost again, and notes what it is told and when."""

    count: int
    clock: Any
    told: list[tuple[float, str, str]] = field(default_factory=list)  # virtual seconds, trial key, what
    asked: int = 0
    live: dict[str, int] = field(default_factory=dict)
    lost: list[int] = field(default_factory=list)

    def suggest(self, trial_id: str) -> Any:
        if self.asked == self.count and not self.lost:
            return None if self.live else Searcher.FINISHED
        self.asked += not self.lost
        number = self.live[trial_id] = self.lost.pop(0) if self.lost else self.asked - 1
        return {"trial": json.dumps({"key": f"t-{number}", "params": {"number": number}})}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        self.told.append((self.clock(), result["key"], result["state"]))

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        number = self.live.pop(trial_id)
        self.told.append((self.clock(), result["key"] if result else f"t-{number}", "error" if error else "end"))
        self.lost += [number] * error


class StopsAtFirstReport(FIFOScheduler):
    """Stops the trials of these keys at their first report."""

    def __init__(self, *keys: str) -> None:
        super().__init__()
        self.keys = keys

    def on_trial_result(self, controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        return self.STOP if result["key"] in self.keys else self.CONTINUE


class Formula:
    """Trials of the tiny space (see `studies.TREE`): alpha trades standard for certified accuracy, steps cost both.

    A training takes 60 s, rungs lie at 30, 40 and 50 s, a verification takes 40 s.
    """

    def teacher(self, params: Mapping[str, Any]) -> Teacher | None:
        return None

    def timeline(self, params: Mapping[str, Any], seed: int, mode: TrainingMode) -> Timeline:
        share = math.log(params["alpha"] / 0.01) / math.log(100)
        loss = 0.1 * params["steps"] + params["warm_up"] + 0.01 * np.random.default_rng(seed).random()
        standard, certified = 0.95 - 0.3 * share**2 - loss, 0.75 - 0.5 * (1 - share) ** 2 - loss
        names = ("after-ramp 0", "after-ramp 1/3", "after-ramp 2/3") if mode == "rungs" else ()
        rungs = [rung(30.0 + 10 * n, name, standard - 0.05, certified - 0.1) for n, name in enumerate(names)]
        right, proved = round(1000 * standard), round(1000 * certified)
        states = [
            VerificationState(1.0, "clean", 0, 1000 - right),
            VerificationState(4.0, "pgd", 0, 1000 - (right + proved) // 2),
            VerificationState(10.0, "crown", proved // 2, 1000 - (right + proved) // 2),
            VerificationState(40.0, "branch_and_bound", proved, 1000 - proved),
        ]
        return Timeline((*rungs, *verification(60.0, states, standard=right / 1000, num_images=1000)), None, 5.0)


def times(timeline: Timeline, state: str) -> list[float]:
    return [report.seconds for report in timeline.reports if report.content["state"] == state]


def contents(reports: tuple[Report, ...], state: str, name: str) -> list[Any]:
    return [report.content[name] for report in reports if report.content["state"] == state]


# ---- tables --------------------------------------------------------------------------------------------------------


def write_recorded(path: Path, rows: int = 60) -> Path:
    """A table of two methods; accuracy and hours follow from the learning rate."""
    draw = np.random.default_rng(0)
    table = []
    for trial in range(rows):
        rate, epochs = float(10 ** draw.uniform(-4, -1)), int(draw.integers(10, 100))
        method = "mtl_ibp" if trial % 2 else "shi"
        own = {"alpha": float(draw.uniform(0, 1))} if trial % 2 else {}
        quality = 1 - abs(math.log10(rate) + 2.5) / 2
        table.append(
            {
                "dataset": "cifar10",
                "architecture": "cnn7",
                "method": method,
                "epsilon": 8 / 255,
                "study_seed": 0,
                "trial": trial,
                "standard_accuracy": 0.5 + 0.2 * quality - 0.1 * own.get("alpha", 0),
                "certified_accuracy": 0.25 + 0.1 * quality + 0.1 * own.get("alpha", 0),
                "gpu_hours": 0.2 + epochs / 100,
                "parameters": json.dumps({"learning_rate": rate, "epochs": epochs, "optimizer": "adam"} | own),
            }
        )
    pq.write_table(pa.Table.from_pylist(table), path)
    return path


SPACE_SETTINGS = ["data.validation_images=200", "student.epochs=18"]


def write_curves(folder: Path, runs: int = 32) -> Path:
    """Measured curves of the Fashion-MNIST space, by formula: accuracies rise with the epochs, certified with alpha."""
    draw = np.random.default_rng(1)
    rows: dict[str, list[dict[str, Any]]] = {"runs": [], "curves": [], "verification": []}
    for number in range(runs):
        share, ramp = float(draw.random()), float(draw.uniform(0.2, 0.75))
        params = {"alpha": float(0.01**share), "warm_up": 0.05, "ramp": ramp, "train_epsilon_factor": 1.5, "l1": 1e-6}
        params |= {"loss": "cc_dist", "beta": 5.0} if number % 3 else {"loss": "no_distillation"}
        luck = float(draw.normal(0, 0.01))
        standard, certified = 0.8 - 0.05 * (1 - share) + luck, 0.7 - 0.3 * share + luck
        seconds = 20.0 + 2 * number / runs
        proved, wrong = round(200 * certified), 200 - round(200 * standard)
        rows["runs"].append(
            {"number": number, "params": json.dumps(params), "standard": 1 - wrong / 200, "certified": proved / 200}
            | {"certified_upper": (proved + 3) / 200, "num_images": 200}
            | {"teacher_seconds": 10.0 if number % 3 else 0.0}
        )
        for scale, epochs in (("ninth", 2), ("third", 6), ("full", 18)):
            for epoch in range(1, epochs + 1):
                done = epochs / 18 * epoch / epochs
                shown = {"standard": standard - 0.1 * (1 - done), "crown_certified": certified * (0.5 + 0.4 * done)}
                noisy = {name: value + float(draw.normal(0, 0.005)) for name, value in shown.items()}
                rows["curves"].append(
                    {"number": number, "scale": scale, "epoch": epoch, "ramp_end": ramp + 0.05, "ibp_certified": 0.0}
                    | {"seconds": seconds / 18, "crown_seconds": 0.1}
                    | noisy
                )
        for at, name, share_proved, falsified in (
            (0.1, "clean", 0.0, wrong),
            (0.9, "crown", 0.6, wrong),
            (4.0, "branch_and_bound", 0.9, wrong),
            (9.0, "branch_and_bound", 1.0, 197 - proved),
        ):
            row = {"rung": name, "proved": round(share_proved * proved), "falsified": falsified}
            rows["verification"].append({"number": number, "seconds": at} | row)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"space": "fashion_mnist", "settings": json.dumps(SPACE_SETTINGS)}
    for name, table in rows.items():
        pq.write_table(pa.Table.from_pylist(table).replace_schema_metadata(metadata), folder / f"{name}.parquet")
    return folder
