"""Trials of which only the ends were recorded, as a workload: final values and hours by a surrogate.

A file has the columns dataset, architecture, method, epsilon, standard_accuracy, certified_accuracy, gpu_hours and
parameters (JSON). Its rows of one data set, architecture and epsilon are one table; the method is a parameter.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from sklearn.ensemble import ExtraTreesRegressor

from search.config import SearchConfig
from search.errors import UserError
from search.simulation.surrogates import Array, Column, Error, Surrogate, cross_validated
from search.simulation.timelines import Teacher, Timeline, TrainingMode, VerificationState, verification
from search.space import Parameter, Space, Suggester
from search.studies.records import OBJECTIVES

TARGETS = (*OBJECTIVES, "gpu_hours")
COLUMNS = ("dataset", "architecture", "method", "epsilon", *TARGETS, "parameters")
METHOD = "method"
NUM_IMAGES = 10_000  # the resolution to which a surrogate's accuracies are rounded
CHECKPOINTS = 100  # states of a training to go on from
FOLDS = 5


class RecordedTableError(UserError):
    """The file cannot be used; the text says why."""


@dataclass(frozen=True)
class RecordedTable:
    """Recorded trials of one problem."""

    name: str
    params: tuple[dict[str, Any], ...]
    targets: Array  # [N, 3]: standard accuracy, certified accuracy, GPU-hours

    @property
    def reference(self) -> tuple[float, float]:
        """What nine trials in ten surpass in each objective, rounded down to 0.05."""
        low = np.quantile(self.targets[:, :2], 0.1, axis=0)
        standard, certified = (np.floor(low * 20) / 20).tolist()
        return standard, certified


def read_tables(path: Path) -> list[RecordedTable]:
    """The tables of a file, by name.

    Raises:
        RecordedTableError: there is no such file, or a column is missing.
    """
    if not path.is_file():
        raise RecordedTableError(f"there is no file {path}; expected a Parquet file of recorded trials")
    missing = set(COLUMNS) - set(pq.read_schema(path).names)
    if missing:
        raise RecordedTableError(
            f"{path} lacks {', '.join(sorted(missing))}; expected the columns {', '.join(COLUMNS)}"
        )
    problems: dict[str, list[dict[str, Any]]] = {}
    for row in pq.read_table(path, columns=list(COLUMNS)).to_pylist():
        problems.setdefault(f"{row['dataset']} {row['architecture']} {row['epsilon']:.4g}", []).append(row)
    return [_table(name, rows) for name, rows in sorted(problems.items())]


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> RecordedTable:
    targets = np.array([[row[target] for target in TARGETS] for row in rows], dtype=np.float64)
    return RecordedTable(name, tuple({METHOD: row[METHOD]} | json.loads(row["parameters"]) for row in rows), targets)


class Forest:
    """Extremely randomised trees: on the recorded tables no worse than random forests and boosting.

    A search asks for one trial at a time, which takes scikit-learn twenty times as long as the trees themselves.
    """

    def __init__(self) -> None:
        self._model = ExtraTreesRegressor(n_estimators=100, min_samples_leaf=2, random_state=0, n_jobs=1)

    def fit(self, features: Array, targets: Array) -> None:
        self._model.fit(features, targets)

    def predict(self, features: Array) -> Array:
        inputs = features.astype(np.float32)
        votes = [tree.tree_.predict(inputs).ravel() for tree in self._model.estimators_]
        return np.asarray(np.mean(votes, axis=0))


class RecordedWorkload:
    """Trials that end after the surrogate's hours with the surrogate's values, and report nothing before."""

    def __init__(self, table: RecordedTable) -> None:
        self.table = table
        self._surrogate = Surrogate(table.params, table.targets, Forest)

    def teacher(self, params: Mapping[str, Any]) -> Teacher | None:
        return None

    def timeline(self, params: Mapping[str, Any], seed: int, mode: TrainingMode) -> Timeline:
        standard, certified, hours = self._surrogate(params).tolist()
        proved = round(min(certified, standard) * NUM_IMAGES)
        state = VerificationState(0.0, "recorded", proved, NUM_IMAGES - proved)
        reports = verification(hours * 3600, [state], standard=standard, num_images=NUM_IMAGES)
        return Timeline(reports, checkpoint_s=hours * 3600 / CHECKPOINTS)

    def errors(self) -> list[Error]:
        """Of the surrogate, cross-validated."""
        table = self.table
        predicted = cross_validated(table.params, table.targets, Forest, folds=FOLDS)
        columns = zip(TARGETS, predicted.T, table.targets.T, strict=True)
        return [Error.of(target, guess, measured) for target, guess, measured in columns]


class RecordedSpace(Space):
    """The ranges that a table's trials cover; a method's parameters exist where it is chosen.

    A recorded parameter is no value of a recipe of ours, so every trial has the same recipe but for its seed.
    """

    def __init__(self, config: SearchConfig, table: RecordedTable) -> None:
        super().__init__(config)
        methods = sorted({params[METHOD] for params in table.params})
        self._of_method = {method: _names_of(table, method) for method in methods}
        names = {name: None for known in self._of_method.values() for name in known}
        self.parameters = {METHOD: Parameter(METHOD, (METHOD,), CategoricalDistribution(methods), ())}
        for name in names:
            among = tuple((METHOD, method) for method in methods if name in self._of_method[method])
            branch = among if len(among) < len(methods) else ()
            distribution = _distribution([params[name] for params in table.params if name in params])
            self.parameters[name] = Parameter(name, (name,), distribution, branch)

    def suggest(self, trial: Suggester) -> dict[str, Any]:
        chosen = {METHOD: _suggest(trial, METHOD, self.parameters[METHOD].distribution)}
        for name in self._of_method[chosen[METHOD]]:
            chosen[name] = _suggest(trial, name, self.parameters[name].distribution)
        return chosen


def recorded_config(table: RecordedTable, *, floors: bool = False) -> SearchConfig:
    """A space file for a recorded table; its reference, and the floors if there are to be any, are the table's."""
    standard, certified = table.reference
    return SearchConfig.model_validate(
        {
            "name": "recorded",
            "data": {"name": "digits", "validation": 0.2},
            "threat": {"norm": "linf", "epsilon": "1/10"},
            "network": {"name": "mlp", "width": 8},
            "teacher": {"epochs": 1, "batch_size": 64},
            "student": {"epochs": 1, "batch_size": 64, "loss": {"kind": "cc_ibp", "alpha": 0.5}},
            "search": {
                "reference": [standard, certified],
                "floors": {OBJECTIVES[0]: standard, OBJECTIVES[1]: certified} if floors else {},
            },
            "budget": {"trials": 100},
        }
    )


def _names_of(table: RecordedTable, method: str) -> tuple[str, ...]:
    rows = [params for params in table.params if params[METHOD] == method]
    return tuple(sorted({name for params in rows for name in params} - {METHOD}))


def _distribution(values: Sequence[Any]) -> BaseDistribution:
    column = Column.of("", values)
    if column.categories:
        return CategoricalDistribution(column.categories)
    if all(isinstance(value, int) for value in values):
        return IntDistribution(int(column.low), int(column.high), log=column.log)
    return FloatDistribution(column.low, column.high, log=column.log)


def _suggest(trial: Suggester, name: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case FloatDistribution(low=low, high=high, log=log):
            return trial.suggest_float(name, low, high, log=log)
        case IntDistribution(low=low, high=high, log=log):
            return trial.suggest_int(name, low, high, log=log)
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(name, list(choices))
    raise AssertionError(distribution)
