"""Trials with learning curves and verifications as a workload, modelled on measured runs.

Final values are Gaussian processes of the parameters with the seed's noise. What a trial shows at rungs follows from
its final values by a line, and from one measured run by what that run was off the line at all rungs together: so the
noise goes along a run as it did in those that were measured, and a rung orders trials as well as it did there. The
verification of a trial is that of a measured run with similar final values, stretched to its own.

Legend: N runs, R values at rungs (two for each).
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import rankdata
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from search.config import SearchConfig, find_space_file, load_search_config
from search.recipe import Recipe
from search.simulation.curve_tables import RUNGS, CurveTables, Half, Run, read_curves, rung_epoch
from search.simulation.surrogates import Array, Encoder, Error, Surrogate
from search.simulation.timelines import Report, Teacher, Timeline, TrainingMode, VerificationState, rung, verification
from search.space import Space
from search.studies.records import OBJECTIVES
from search.trials.rung_values import AFTER_RAMP, STAGES

# Accuracies 0 and 1 have no log-odds: they are moved inwards by this much.
MARGIN = 0.002
# Runs whose verification a trial may take: the nearest ones in final values.
VERIFICATION_DONORS = 3


# What the noise at rungs is multiplied by, at least and at most, and how often the interval is halved.
FACTORS = (0.2, 3.0)
BISECTIONS = 8
REPLAYS = 20  # of all runs, over which a simulated rank correlation is averaged


class Process:
    """A Gaussian process with noise, of a standardised target."""

    def __init__(self) -> None:
        self._model: GaussianProcessRegressor | None = None
        self.noise = 0.0  # standard deviation, in the target's unit

    def fit(self, features: Array, targets: Array) -> None:
        # One length for all parameters: a few dozen runs do not tell them apart.
        scale = math.sqrt(features.shape[1])
        kernel = ConstantKernel(1.0, (0.05, 50)) * RBF(scale, (0.3 * scale, 5 * scale))
        kernel += WhiteKernel(0.2, (0.02, 0.7))
        self._model = GaussianProcessRegressor(kernel, normalize_y=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # an optimum at a bound is one
            self._model.fit(features, targets)
        self.noise = math.sqrt(self._model.kernel_.k2.noise_level) * max(float(np.std(targets)), 1e-12)

    def predict(self, features: Array) -> Array:
        assert self._model is not None
        return np.asarray(self._model.predict(features))


class CurveWorkload:
    """Trials as measured runs have them.

    Args:
        tables: the runs that it is fitted on.
        space: of the same parameters.
    """

    def __init__(self, tables: CurveTables, space: Space) -> None:
        self.tables, self._space = tables, space
        self._runs = tables.runs
        self._params = [run.params for run in self._runs]
        finals = np.stack([_finals(run) for run in self._runs])
        self._processes: list[Process] = []
        encoder = Encoder.of_space(space.parameters)
        self._surrogate = Surrogate(self._params, finals, self._process, encoder)
        self._features = self._surrogate.encoder.matrix(self._params)
        self._finals = finals
        rungs = np.stack([_rung_values(run) for run in self._runs])
        self._line = np.linalg.lstsq(_with_one(finals), rungs, rcond=None)[0]  # [3, R]
        self._off_the_line = rungs - _with_one(finals) @ self._line  # [N, R]
        self._recipes: dict[frozenset[tuple[str, Any]], Recipe] = {}

    @classmethod
    def of(cls, folder: Path, half: Half = "all") -> "CurveWorkload":
        """Fitted on the runs with even numbers, odd numbers, or all.

        Raises:
            UserError: the tables or their space file cannot be read.
        """
        tables = read_curves(folder, half)
        return cls(tables, Space(curve_config(tables)))

    def teacher(self, params: Mapping[str, Any]) -> Teacher | None:
        """One for all trials that read one: no table varies it."""
        return Teacher("teacher", self._teacher_s) if self._recipe(params).needs_teacher else None

    def timeline(self, params: Mapping[str, Any], seed: int, mode: TrainingMode) -> Timeline:
        noise = np.random.default_rng(seed)
        finals = self._surrogate(params) + noise.normal(size=2) * self._spread
        donor = self._donor(params, noise)
        like = self._runs[donor]
        at_rungs = _accuracies((_with_one(finals) @ self._line + self._residuals[donor]).reshape(-1, 2))
        recipe = self._recipe(params)
        training_s = self._training_s(recipe.needs_teacher)
        pace = training_s / like.training_s
        reports, spent = self._rung_reports(mode, at_rungs, like, recipe, pace)
        standard, certified = expit(finals[0]), expit(finals[0]) * expit(finals[1])
        verified = self._verification(standard, certified, finals, noise)
        training_s += spent
        ends = verification(
            training_s, verified, standard=_of_images(standard, self._num_images), num_images=self._num_images
        )
        return Timeline((*reports, *ends), self.teacher(params), training_s / like.epochs)

    def errors(self) -> list[Error]:
        """Of predicted final values for runs that the model did not see: every third one left out."""
        predicted, measured = [], []
        for part in range(3):
            inside = tuple(run for place, run in enumerate(self._runs) if place % 3 != part)
            outside = [run for place, run in enumerate(self._runs) if place % 3 == part]
            model = CurveWorkload(CurveTables(inside, self.tables.space, self.tables.settings), self._space)
            predicted.append(model.expected([run.params for run in outside]))
            measured.append(_measured(outside))
        return _errors(np.concatenate(predicted), np.concatenate(measured))

    def errors_on(self, runs: Sequence[Run]) -> list[Error]:
        """The same for other runs."""
        return _errors(self.expected([run.params for run in runs]), _measured(runs))

    def expected(self, params: Sequence[Mapping[str, Any]]) -> Array:
        """Standard and certified accuracy without noise, shape [N, 2]."""
        return _accuracies(self._surrogate.predict(params))

    def agreements(self) -> dict[str, tuple[float, float, float, float]]:
        """Rank correlation of each rung with the end: standard and certified, measured then simulated (mean)."""
        return {
            name: (
                self._measured_agreement(place, 0),
                self._measured_agreement(place, 1),
                self._simulated_agreement(place, 0, self._residuals),
                self._simulated_agreement(place, 1, self._residuals),
            )
            for place, name in enumerate(RUNGS)
        }

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _process(self) -> Process:
        self._processes.append(Process())
        return self._processes[-1]

    @property
    def _spread(self) -> Array:
        return np.array([process.noise for process in self._processes])

    def _training_s(self, needs_teacher: bool) -> float:
        """Seconds of the whole recipe: the median of the runs that read a teacher, or of the others.

        Wall-clock seconds of single runs tell more of what else the machine did. All others of a run are therefore
        divided by how much slower its training was than this.
        """
        alike = [run.training_s for run in self._runs if (run.teacher_s > 0) == needs_teacher]
        return float(np.median(alike or [run.training_s for run in self._runs]))

    @cached_property
    def _teacher_s(self) -> float:
        return max((run.teacher_s for run in self._runs), default=0.0)

    @cached_property
    def _num_images(self) -> int:
        return self._runs[0].num_images

    def _donor(self, params: Mapping[str, Any], noise: np.random.Generator) -> int:
        """A run with similar parameters: what a rung says depends on them, too."""
        distances = np.sum((self._features - self._surrogate.encoder.features(params)) ** 2, axis=1)
        weights = np.exp(-distances / (2 * self._reach**2))
        return int(noise.choice(len(weights), p=weights / weights.sum()))

    @cached_property
    def _reach(self) -> float:
        """Half the median distance of two runs."""
        distances = np.linalg.norm(self._features[:, None] - self._features, axis=2)
        return 0.5 * float(np.median(distances[np.triu_indices(len(distances), 1)]))

    def _recipe(self, params: Mapping[str, Any]) -> Recipe:
        known = frozenset(params.items())
        if known not in self._recipes:
            self._recipes[known] = self._space.recipe(params, 0)
        return self._recipes[known]

    def _rung_reports(
        self, mode: TrainingMode, values: Array, like: Run, recipe: Recipe, pace: float
    ) -> tuple[list[Report], float]:
        """Reports of the rungs of a mode, and the seconds that they take beside the whole recipe.

        Seconds are those of the run that it is like, times the pace.
        """
        reports, beside = [], 0.0
        for name, seconds in _rung_seconds(mode, like, recipe).items():
            standard, certified = values[RUNGS.index(name)].tolist()
            beside += like.rungs[name].probe_s * pace
            if mode == "fractions":
                beside += seconds * pace
            reports.append(rung(beside + (seconds * pace if mode == "rungs" else 0.0), name, standard, certified))
        return reports, beside

    def _verification(
        self, standard: float, certified: float, finals: Array, noise: np.random.Generator
    ) -> list[VerificationState]:
        """A similar run's, its counts stretched to the trial's own ends; what it left open stays open."""
        distances = np.linalg.norm((self._finals - finals) / self._finals.std(axis=0), axis=1)
        nearest = np.argsort(distances, kind="stable")[:VERIFICATION_DONORS]
        like = self._runs[int(noise.choice(nearest))]
        states, pace = like.verification, self._training_s(like.teacher_s > 0) / like.training_s
        last, total = states[-1], self._num_images
        correct = round(standard * total)
        proved = min(round(certified * total), correct)
        left_open = min(total - last.proved - last.falsified, correct - proved)
        falsified = total - proved - left_open
        return [
            VerificationState(
                state.seconds * pace,
                state.rung,
                round(proved * state.proved / max(1, last.proved)) if state is not last else proved,
                round(falsified * state.falsified / max(1, last.falsified)) if state is not last else falsified,
            )
            for state in states
        ]

    @cached_property
    def _residuals(self) -> Array:
        """What runs are off the line at rungs, scaled so that rungs order simulated trials as well as measured ones.

        Less noise never orders trials worse but for chance, so each factor is found by bisection.
        """
        residuals = self._off_the_line.copy()
        for place in range(len(RUNGS)):
            for axis in range(2):  # the certified accuracy depends on both, and comes second
                column, measured = 2 * place + axis, self._measured_agreement(place, axis)
                low, high = FACTORS
                for _ in range(BISECTIONS):
                    factor = (low + high) / 2
                    residuals[:, column] = self._off_the_line[:, column] * factor
                    if self._simulated_agreement(place, axis, residuals) > measured:
                        low = factor
                    else:
                        high = factor
        return residuals

    @cached_property
    def _replays(self) -> tuple[Array, NDArray[np.intp]]:
        """The runs made anew D times: final values [D, N, 2], and the runs [D, N] whose residuals they have."""
        noise = np.random.default_rng(0)
        finals = self._surrogate.predict(self._params)
        donors = [[self._donor(params, noise) for params in self._params] for _ in range(REPLAYS)]
        return finals + noise.normal(size=(REPLAYS, *finals.shape)) * self._spread, np.array(donors)

    def _measured_agreement(self, place: int, axis: int) -> float:
        shown = [run.rungs[RUNGS[place]] for run in self._runs]
        values = np.array([[point.standard, point.certified] for point in shown])
        return float(_rank_correlations(values[None, :, axis], _measured(self._runs)[None, :, axis])[0])

    def _simulated_agreement(self, place: int, axis: int, residuals: Array) -> float:
        columns = slice(2 * place, 2 * place + 2)
        finals, donors = self._replays
        shown = _with_one(finals) @ self._line[:, columns] + residuals[donors, columns]
        return float(np.mean(_rank_correlations(_accuracies(shown)[..., axis], _accuracies(finals)[..., axis])))


def _rung_seconds(mode: TrainingMode, like: Run, recipe: Recipe) -> dict[str, float]:
    """Seconds that a run would have trained when it comes to a rung: of the recipe, or of the shortened one alone.

    As for a worker, of rungs that fall together the earliest stays, and one on the last epoch is none.
    """
    if mode == "off":
        return {}
    if mode == "fractions":
        return {name: like.rungs[name].seconds for name in STAGES}
    schedule = recipe.student.epsilon_schedule
    ramp_end = float(schedule.warm_up + schedule.ramp)
    epochs: dict[int, str] = {}
    for name, share in AFTER_RAMP.items():
        epoch = rung_epoch(share, ramp_end, like.epochs)
        if epoch < like.epochs:
            epochs.setdefault(epoch, name)
    return {name: sum(like.epoch_seconds[:epoch]) for epoch, name in epochs.items()}


def curve_config(tables: CurveTables, settings: Sequence[str] = ()) -> SearchConfig:
    """The space file that the runs were drawn from, with further settings.

    Raises:
        SpaceFileError: there is no such space any more, or a setting is wrong.
    """
    return load_search_config(find_space_file(tables.space), [*tables.settings, *settings])


def _log_odds(value: float) -> float:
    return float(logit(min(max(value, MARGIN), 1 - MARGIN)))


def _pair(standard: float, certified: float) -> tuple[float, float]:
    """Log-odds of standard accuracy and of the share of it that is certified: any pair of numbers is a valid trial."""
    return _log_odds(standard), _log_odds(certified / max(standard, MARGIN))


def _accuracies(values: Array) -> Array:
    """Standard and certified accuracy of pairs of log-odds, shape [..., 2]."""
    pairs = expit(values)
    return np.stack([pairs[..., 0], pairs[..., 0] * pairs[..., 1]], axis=-1)


def _finals(run: Run) -> Array:
    return np.array(_pair(run.standard, run.certified))


def _rung_values(run: Run) -> Array:
    """Shape [R]: the rungs in the order of `RUNGS`."""
    return np.array([_pair(run.rungs[name].standard, run.rungs[name].certified) for name in RUNGS]).ravel()


def _with_one(finals: Array) -> Array:
    return np.concatenate([finals, np.ones((*finals.shape[:-1], 1))], axis=-1)


def _measured(runs: Sequence[Run]) -> Array:
    return np.array([[run.standard, run.certified] for run in runs])


def _errors(predicted: Array, measured: Array) -> list[Error]:
    return [Error.of(*each) for each in zip(OBJECTIVES, predicted.T, measured.T, strict=True)]


def _rank_correlations(first: Array, second: Array) -> Array:
    """Spearman's of each row, shapes [D, N] to [D]; of a constant 0."""
    a, b = (rankdata(values, axis=1) for values in (first, second))
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    scale = np.sqrt(np.sum(a**2, axis=1) * np.sum(b**2, axis=1))
    return np.asarray(np.sum(a * b, axis=1) / np.maximum(scale, 1e-300))


def _of_images(share: float, num_images: int) -> float:
    return round(share * num_images) / num_images
