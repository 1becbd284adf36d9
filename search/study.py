"""The study in Optuna's RDB storage: the one truth of a search.

Parameters and states are Optuna's own; results, reasons and keys are user attributes. Ray and MLflow hold views
that can be thrown away. Both objectives are maximised; this module alone says so to Optuna.
"""

import json
import time
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from ccdist.config import fingerprint
from search.config import (
    GPConfig,
    NSGA2Config,
    NSGA3Config,
    RandomConfig,
    SamplerConfig,
    SearchConfig,
    TPEConfig,
)
from search.database import StudyError as StudyError
from search.database import open_storage, sqlite_file, without_password
from search.recipe import derive_seed
from search.records import OBJECTIVES, StudyRecord, TrialRecord, TrialResult
from search.records import TrialState as RecordState
from search.space import Space

FORMAT_VERSION = 1
DIRECTIONS: list[Literal["maximize", "minimize"]] = ["maximize", "maximize"]
_STATES: dict[TrialState, RecordState] = {
    TrialState.COMPLETE: "COMPLETE",
    TrialState.FAIL: "FAILED",
    TrialState.RUNNING: "RUNNING",
    TrialState.WAITING: "WAITING",
}


@dataclass(frozen=True)
class Assignment:
    """A trial to run: its place in the study and its parameters."""

    number: int
    key: str
    params: dict[str, Any]


class Study:
    """A study opened for running: asks, tells, and remembers what it asked."""

    def __init__(self, config: SearchConfig, space: Space, optuna_study: optuna.Study) -> None:
        self.config, self.space, self._study = config, space, optuna_study

    @classmethod
    def open(cls, config: SearchConfig, space: Space, url: str, data_fingerprint: str) -> "Study":
        """Create the study, or continue the stored one after checking that it is the same.

        Raises:
            StudyError: the stored study has another space, other data or other directions.
        """
        study = optuna.create_study(
            study_name=config.study_name, storage=open_storage(url), directions=DIRECTIONS, load_if_exists=True
        )
        _check_directions(study)
        attributes = study.user_attrs
        if "identity" not in attributes:
            # The identity is written last: a study whose making was interrupted has none, and is made again.
            study.set_user_attr("format_version", FORMAT_VERSION)
            study.set_user_attr("id", uuid.uuid4().hex)
            study.set_user_attr("data_fingerprint", data_fingerprint)
            study.set_user_attr("started_at", time.time())
            study.set_user_attr("space", config.model_dump(mode="json"))
            study.set_user_attr("identity", config.identity)
        else:
            _check_same(study, config)
            if attributes["data_fingerprint"] != data_fingerprint:
                raise StudyError(
                    f"study {study.study_name} was made from other images than those of {config.data.name} now; "
                    f"{_ADVICE}"
                )
        opened = cls(config, space, study)
        opened._enqueue_points()
        return opened

    @property
    def identifier(self) -> str:
        """Random, made with the study: tells its artefacts from those of another study of the same name."""
        return str(self._study.user_attrs["id"])

    def record(self) -> StudyRecord:
        """The study as plain values."""
        return _record(self._study)

    def unfinished(self) -> list[int]:
        """Numbers of trials that were started and have no result, from whatever driver."""
        return [trial.number for trial in self._trials(TrialState.RUNNING)]

    def num_complete(self) -> int:
        return len(self._trials(TrialState.COMPLETE))

    def num_failed(self) -> int:
        """Failed trials, without those that were given up because nobody needed them."""
        return sum(not trial.user_attrs.get("given_up") for trial in self._trials(TrialState.FAIL))

    def ask(self) -> Assignment:
        """Start a new trial: a waiting point if there is one, else what the sampler suggests."""
        waiting = self._trials(TrialState.WAITING)
        number = waiting[0].number if waiting else len(self._study.get_trials(deepcopy=False))
        self._study.sampler = self._sampler(number)
        return self._assign(self._study.ask())

    def adopt(self, number: int) -> Assignment:
        """Take over a trial that an earlier driver started; parameters it had not drawn yet are drawn now."""
        frozen = self._study.get_trials(deepcopy=False)[number]
        self._study.sampler = self._sampler(number)
        return self._assign(optuna.trial.Trial(self._study, frozen._trial_id))

    def tell(self, number: int, result: TrialResult) -> None:
        """Store a trial's result; the objectives are told to the sampler.

        Floors become constraints (satisfied at or below 0) before the state changes, as Optuna wants them.
        """
        trial = self._handle(number)
        trial.set_user_attr("result", asdict(result))
        trial.set_user_attr("finished_at", time.time())
        for name, floor in self.config.search.floors.items():
            trial.set_constraint(name, floor - getattr(result, name))
        self._study.tell(number, [getattr(result, name) for name in OBJECTIVES])

    def tell_failed(self, number: int, reason: str, *, given_up: bool = False) -> None:
        """Store that a trial failed, and why; `given_up`: not by its own fault."""
        trial = self._handle(number)
        trial.set_user_attr("given_up", given_up)
        trial.set_user_attr("reason", reason)
        trial.set_user_attr("finished_at", time.time())
        self._study.tell(number, state=TrialState.FAIL)

    def _trials(self, state: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(state,))

    def _handle(self, number: int) -> optuna.trial.Trial:
        return optuna.trial.Trial(self._study, self._study.get_trials(deepcopy=False)[number]._trial_id)

    def _assign(self, trial: optuna.trial.Trial) -> Assignment:
        params = self.space.suggest(trial)
        key = trial_key(self._study.study_name, trial.number)
        trial.set_user_attr("configuration", self.space.configuration(params))
        trial.set_user_attr("seed", self.space.recipe(params, trial.number).student.seed)
        return Assignment(trial.number, key, params)

    def _sampler(self, number: int) -> BaseSampler:
        """A fresh sampler whose randomness depends on (study seed, trial number) only, so no restart replays it."""
        return make_sampler(self.config.search.sampler, derive_seed(self.config.search.seed, "sampler", number))

    def _enqueue_points(self) -> None:
        """Each point once, also when an earlier driver died between two of them."""
        present = {trial.user_attrs.get("point") for trial in self._study.get_trials(deepcopy=False)}
        for index, point in enumerate(self.space.points()):
            if index not in present:
                self._study.enqueue_trial(point, user_attrs={"point": index})


def trial_key(study_name: str, number: int) -> str:
    """The name of a trial everywhere: study, artefacts, MLflow."""
    return f"{study_name}-{number:04d}"


def make_sampler(config: SamplerConfig, seed: int) -> BaseSampler:
    """The sampler by its configuration."""
    match config:
        case TPEConfig(startup_trials=startup):
            return optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed)
        case NSGA2Config(population=population):
            return optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
        case NSGA3Config(population=population):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # chosen knowingly
                return optuna.samplers.NSGAIIISampler(population_size=population, seed=seed)
        case GPConfig(startup_trials=startup):
            return optuna.samplers.GPSampler(n_startup_trials=startup, seed=seed, warn_independent_sampling=False)
        case RandomConfig():
            return optuna.samplers.RandomSampler(seed=seed)


def stored_record(config: SearchConfig, url: str) -> StudyRecord | None:
    """The stored study of this space file, or None: writes nothing.

    Raises:
        StudyError: a study of that name exists with another space.
    """
    database = sqlite_file(url)
    if database is not None and not database.is_file():
        return None
    storage = open_storage(url)
    if config.study_name not in optuna.get_all_study_names(storage):
        return None
    study = optuna.load_study(study_name=config.study_name, storage=storage)
    if "identity" not in study.user_attrs:
        return None
    _check_same(study, config)
    return _record(study)


def load_record(url: str, name: str) -> StudyRecord:
    """A stored study as plain values, for reading only.

    Raises:
        StudyError: there is no such study.
    """
    database = sqlite_file(url)
    if database is not None and not database.is_file():
        raise StudyError(f"there is no study database {database}; run a search first, or name its --storage")
    storage = open_storage(url)
    names = optuna.get_all_study_names(storage)
    if name not in names:
        raise StudyError(
            f"no study {name!r} in {without_password(url)}; studies there: {', '.join(sorted(names)) or 'none'}"
        )
    return _record(optuna.load_study(study_name=name, storage=storage))


_ADVICE = "choose another name (--set name=...) or another --storage"


def _check_same(study: optuna.Study, config: SearchConfig) -> None:
    attributes = study.user_attrs
    _check_version(study)
    _check_directions(study)
    if fingerprint(attributes["identity"]) != config.identity_hash:
        difference = _first_difference(attributes["identity"], json.loads(json.dumps(config.identity)))
        raise StudyError(f"study {study.study_name} exists with another space ({difference}); {_ADVICE}")


def _check_version(study: optuna.Study) -> None:
    version = study.user_attrs.get("format_version")
    if version != FORMAT_VERSION:
        raise StudyError(f"study {study.study_name} has format {version}; this program reads {FORMAT_VERSION}")


def _check_directions(study: optuna.Study) -> None:
    if [direction.name.lower() for direction in study.directions] != DIRECTIONS:
        raise StudyError(f"study {study.study_name} exists with other directions; {_ADVICE}")


def _first_difference(stored: Any, given: Any, path: str = "") -> str:
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in sorted(stored.keys() | given.keys()):
            if stored.get(key) != given.get(key):
                return _first_difference(stored.get(key), given.get(key), f"{path}.{key}".lstrip("."))
    return f"{path}: stored {json.dumps(stored)}, given {json.dumps(given)}"


def _record(study: optuna.Study) -> StudyRecord:
    attributes = study.user_attrs
    if "identity" not in attributes:
        raise StudyError(f"study {study.study_name} was interrupted while it was made; run its search again")
    _check_version(study)
    config = SearchConfig.model_validate(attributes["space"])
    trials = tuple(_trial_record(study.study_name, trial) for trial in study.get_trials(deepcopy=False))
    attack = config.verification.attack
    rungs = [
        f"pgd {attack.steps}x{attack.step_size}x{attack.restarts}" if rung == "pgd" else rung
        for rung in config.verification.rungs
    ]
    num_images = next((t.num_images for t in trials if t.num_images is not None), 0)
    return StudyRecord(
        name=study.study_name,
        reference=config.search.hypervolume_reference,
        trials=trials,
        dataset=config.data.name,
        threat=str(config.threat),
        num_images=num_images,
        verifier=", ".join(rungs),
        started_at=attributes["started_at"],
    )


def _trial_record(study_name: str, trial: FrozenTrial) -> TrialRecord:
    attributes: Mapping[str, Any] = trial.user_attrs
    result: dict[str, Any] = attributes.get("result", {}) if trial.state is TrialState.COMPLETE else {}
    return TrialRecord(
        key=trial_key(study_name, trial.number),
        number=trial.number,
        state=_STATES[trial.state],
        params=dict(trial.params),
        configuration=attributes.get("configuration", ""),
        seed=attributes.get("seed", 0),
        standard_accuracy=result.get("standard_accuracy"),
        adversarial_accuracy=result.get("adversarial_accuracy"),
        certified_accuracy=result.get("certified_accuracy"),
        certified_upper=result.get("certified_upper"),
        verification_state=result.get("verification_state"),
        seconds=result.get("seconds"),
        costs=dict(result.get("costs", {})),
        num_images=result.get("num_images"),
        finished_at=attributes.get("finished_at"),
        reason=attributes.get("reason"),
    )
