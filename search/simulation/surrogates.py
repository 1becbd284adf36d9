"""Models of what trials give as a function of their parameters, fitted on trials that were run.

Legend: N trials, F features, T targets.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.stats import spearmanr

from search.space import Parameter

# A positive parameter that spans more than this factor is read on a logarithmic scale.
LOG_SPAN = 20.0

Params = Mapping[str, Any]
Array = NDArray[np.float64]


class Regressor(Protocol):
    """The part of a scikit-learn regressor that is used."""

    def fit(self, features: Array, targets: Array, /) -> Any: ...
    def predict(self, features: Array, /) -> Any: ...


@dataclass(frozen=True)
class Column:
    """How one parameter becomes features: a number in [0, 1] and whether it is absent, or one column a category."""

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    has_gaps: bool = False
    categories: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, values: Sequence[Any]) -> "Column":
        """Fitted on the values of a parameter; None where it is absent."""
        present = [value for value in values if value is not None]
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
            return cls(name, categories=tuple(sorted({str(value) for value in present})))
        low, high = float(min(present)), float(max(present))
        return cls(name, low, high, low > 0 and high > LOG_SPAN * low, len(present) < len(values))

    @classmethod
    def of_distribution(cls, name: str, distribution: BaseDistribution, *, has_gaps: bool) -> "Column":
        """Of a parameter whose range is known."""
        if isinstance(distribution, CategoricalDistribution):
            return cls(name, categories=tuple(sorted(map(str, distribution.choices))))
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        return cls(name, float(distribution.low), float(distribution.high), distribution.log, has_gaps)

    def features(self, value: Any) -> list[float]:
        """Absent numbers lie in the middle, so that only their own column tells them apart."""
        if self.categories:
            return [float(str(value) == category) for category in self.categories]
        absent = [float(value is None)] if self.has_gaps else []
        return [0.5 if value is None else self._scaled(float(value)), *absent]

    def _scaled(self, value: float) -> float:
        if self.low == self.high:
            return 0.5
        if self.log:
            return math.log(max(value, 1e-300) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Encoder:
    """Parameters as features."""

    columns: tuple[Column, ...]

    @classmethod
    def of(cls, params: Sequence[Params]) -> "Encoder":
        names = sorted({name for each in params for name in each})
        return cls(tuple(Column.of(name, [each.get(name) for each in params]) for name in names))

    @classmethod
    def of_space(cls, parameters: Mapping[str, Parameter]) -> "Encoder":
        """Over the ranges of a space, which scatter of a few trials does not show."""
        ordered = sorted(parameters.items())
        return cls(tuple(Column.of_distribution(k, p.distribution, has_gaps=bool(p.branch)) for k, p in ordered))

    def features(self, params: Params) -> Array:
        """Shape [F]."""
        return np.array([part for column in self.columns for part in column.features(params.get(column.name))])

    def matrix(self, params: Sequence[Params]) -> Array:
        """Shape [N, F]."""
        return np.stack([self.features(each) for each in params])


class Error(NamedTuple):
    """How far predictions are from what was measured."""

    target: str
    r2: float  # 1 - squared error / variance
    mae: float  # mean absolute error, in the target's unit
    spearman: float  # rank correlation
    trials: int

    @classmethod
    def of(cls, target: str, predicted: Array, measured: Array) -> "Error":
        variance = float(np.mean((measured - measured.mean()) ** 2))
        squared = float(np.mean((predicted - measured) ** 2))
        ranks = 0.0
        if np.ptp(predicted) > 0 and np.ptp(measured) > 0:  # the correlation of a constant is undefined
            ranks = float(spearmanr(predicted, measured)[0])
        r2 = 1 - squared / variance if variance > 0 else 0.0
        return cls(target, r2, float(np.mean(np.abs(predicted - measured))), ranks, len(measured))


class Surrogate:
    """Several targets, shape [N, T], each by a regressor of its own.

    Args:
        make: a fresh regressor for each target.
        encoder: None: one that is fitted on the parameters.
    """

    def __init__(
        self,
        params: Sequence[Params],
        targets: Array,
        make: Callable[[], Regressor],
        encoder: Encoder | None = None,
    ) -> None:
        self.encoder = encoder or Encoder.of(params)
        features = self.encoder.matrix(params)
        self._models = [make() for _ in range(targets.shape[1])]
        for model, target in zip(self._models, targets.T, strict=True):
            model.fit(features, target)

    def __call__(self, params: Params) -> Array:
        """Expected targets, shape [T]."""
        return np.asarray(self.predict([params])[0])

    def predict(self, params: Sequence[Params]) -> Array:
        """Expected targets, shape [N, T]."""
        features = self.encoder.matrix(params)
        return np.stack([np.asarray(model.predict(features)) for model in self._models], axis=1)


def cross_validated(
    params: Sequence[Params], targets: Array, make: Callable[[], Regressor], *, folds: int, seed: int = 0
) -> Array:
    """What a surrogate that has not seen a trial predicts for it, shape [N, T]."""
    fold = np.random.default_rng(seed).permutation(len(params)) % folds
    predicted = np.empty_like(targets)
    for held_out in range(folds):
        inside = np.flatnonzero(fold != held_out).tolist()
        outside = np.flatnonzero(fold == held_out).tolist()
        model = Surrogate([params[i] for i in inside], targets[inside], make)
        predicted[outside] = model.predict([params[i] for i in outside])
    return predicted
