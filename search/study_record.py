"""Optuna's trials and studies as records, and the checks that a stored study is the one that is meant."""

import json
import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from ccdist.config import fingerprint
from search.config import OPEN_TO_CHANGE, SearchConfig
from search.database import StudyError, open_storage, sqlite_file, without_password
from search.records import RungValues, StudyRecord, TrialRecord, TrialResult
from search.records import TrialState as RecordState
from search.sampling import DIRECTIONS

FORMAT_VERSION = 1
_ADVICE = "choose another name (--set name=...) or another --storage"
REFINED = "refined:"  # + trial number: study attribute with a result that is better known than when the trial ended
_STATES: dict[TrialState, RecordState] = {
    TrialState.COMPLETE: "COMPLETE",
    TrialState.PRUNED: "STOPPED",
    TrialState.FAIL: "FAILED",
    TrialState.RUNNING: "RUNNING",
    TrialState.WAITING: "WAITING",
}


def trial_key(study_name: str, number: int) -> str:
    """The name of a trial everywhere: study, artefacts, MLflow."""
    return f"{study_name}-{number:04d}"


# ---- reading only --------------------------------------------------------------------------------------------------


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
    return study_record(study)


def load_record(url: str, name: str) -> StudyRecord:
    """A stored study as plain values, for reading only.

    Raises:
        StudyError: there is no such study.
    """
    return study_record(_load(url, name))


def stored_config(url: str, name: str) -> SearchConfig:
    """The space file with which a stored study was made.

    Raises:
        StudyError: there is no such study.
    """
    return SearchConfig.model_validate(_load(url, name).user_attrs["space"])


def _load(url: str, name: str) -> optuna.Study:
    database = sqlite_file(url)
    if database is not None and not database.is_file():
        raise StudyError(f"there is no study database {database}; run a search first, or name its --storage")
    storage = open_storage(url)
    names = optuna.get_all_study_names(storage)
    if name not in names:
        raise StudyError(
            f"no study {name!r} in {without_password(url)}; studies there: {', '.join(sorted(names)) or 'none'}"
        )
    return optuna.load_study(study_name=name, storage=storage)


# ---- making and checking -------------------------------------------------------------------------------------------


def made_or_checked(config: SearchConfig, storage: BaseStorage, data_fingerprint: str) -> optuna.Study:
    """The study of a space file, made if there is none.

    Raises:
        StudyError: there is one with another space, other data or other directions.
    """
    study = optuna.create_study(
        study_name=config.study_name, storage=storage, directions=DIRECTIONS, load_if_exists=True
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
                f"study {study.study_name} was made from other images than those of {config.data.name} now; {_ADVICE}"
            )
    return study


def _check_same(study: optuna.Study, config: SearchConfig) -> None:
    """Refuse a study that was made by another format, with other directions or from another space."""
    attributes = study.user_attrs
    _check_version(study)
    _check_directions(study)
    stored = dict(attributes["identity"])
    # Versions before this one counted the sampler as part of what a study is.
    stored["search"] = {name: value for name, value in stored["search"].items() if name not in OPEN_TO_CHANGE}
    if fingerprint(stored) != config.identity_hash:
        difference = _first_difference(stored, json.loads(json.dumps(config.identity)))
        raise StudyError(f"study {study.study_name} exists with another space ({difference}); {_ADVICE}")


def _check_directions(study: optuna.Study) -> None:
    """Refuse a study that does not maximise both objectives; Optuna would keep its directions without a word."""
    if [direction.name.lower() for direction in study.directions] != DIRECTIONS:
        raise StudyError(f"study {study.study_name} exists with other directions; {_ADVICE}")


def _check_version(study: optuna.Study) -> None:
    version = study.user_attrs.get("format_version")
    if version != FORMAT_VERSION:
        raise StudyError(f"study {study.study_name} has format {version}; this program reads {FORMAT_VERSION}")


def _first_difference(stored: Any, given: Any, path: str = "") -> str:
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in sorted(stored.keys() | given.keys()):
            if stored.get(key) != given.get(key):
                return _first_difference(stored.get(key), given.get(key), f"{path}.{key}".lstrip("."))
    return f"{path}: stored {json.dumps(stored)}, given {json.dumps(given)}"


def not_finite(values: Any) -> str | None:
    """The first number in a result or in a rung's values that is not finite, with its name; None: all are."""
    for name, value in asdict(values).items():
        for part in value.values() if isinstance(value, dict) else [value]:
            if isinstance(part, float) and not math.isfinite(part):
                return f"{name} is {part}"
    return None


# ---- records -------------------------------------------------------------------------------------------------------


def study_record(study: optuna.Study) -> StudyRecord:
    """The study as plain values.

    Raises:
        StudyError: it has another format, or was never completely made.
    """
    attributes = study.user_attrs
    trials = study.get_trials(deepcopy=False)
    return with_trials(
        empty_record(study),
        tuple(trial_record(study.study_name, trial, attributes.get(f"{REFINED}{trial.number}")) for trial in trials),
    )


def empty_record(study: optuna.Study) -> StudyRecord:
    """The study without its trials."""
    attributes = study.user_attrs
    if "identity" not in attributes:
        raise StudyError(f"study {study.study_name} was interrupted while it was made; run its search again")
    _check_version(study)
    config = SearchConfig.model_validate(attributes["space"])
    attack = config.verification.attack
    rungs = [
        f"pgd {attack.steps}x{attack.step_size}x{attack.restarts}" if rung == "pgd" else rung
        for rung in config.verification.rungs
    ]
    return StudyRecord(
        name=study.study_name,
        reference=config.search.hypervolume_reference,
        trials=(),
        dataset=config.data.name,
        threat=str(config.threat),
        num_images=0,
        verifier=", ".join(rungs),
        started_at=attributes["started_at"],
    )


def with_trials(record: StudyRecord, trials: tuple[TrialRecord, ...]) -> StudyRecord:
    """The study with these trials."""
    num_images = next((trial.num_images for trial in trials if trial.num_images is not None), 0)
    return replace(record, trials=trials, num_images=num_images)


def trial_record(study_name: str, trial: FrozenTrial, refined: Mapping[str, Any] | None = None) -> TrialRecord:
    """A stored trial as plain values; `refined`: the result that stands in place of its own."""
    attributes: Mapping[str, Any] = trial.user_attrs
    state = _STATES[trial.state]
    # Studies of older versions have the time of the end among the attributes, as failed trials still do.
    result = dict(attributes.get("result", {})) if state == "COMPLETE" else {}
    ended = {"STOPPED": attributes.get("stopped", {}), "COMPLETE": {**attributes, **result}}.get(state, attributes)
    record = TrialRecord(
        key=trial_key(study_name, trial.number),
        number=trial.number,
        state=state,
        params=dict(trial.params),
        configuration=attributes.get("configuration", ""),
        seed=attributes.get("seed", 0),
        finished_at=ended.get("finished_at"),
        reason=ended.get("reason"),
        seconds=ended.get("seconds"),
        rungs={name: RungValues(**values) for name, values in attributes.get("rungs", {}).items()},
    )
    result.pop("finished_at", None)
    known = refined or result
    return with_result(record, TrialResult(**known)) if state == "COMPLETE" and known else record


def with_result(record: TrialRecord, result: TrialResult) -> TrialRecord:
    """The trial with this result."""
    return replace(
        record,
        standard_accuracy=result.standard_accuracy,
        adversarial_accuracy=result.adversarial_accuracy,
        certified_accuracy=result.certified_accuracy,
        certified_upper=result.certified_upper,
        expected_certified=result.expected_certified,
        verification_state=result.verification_state,
        seconds=result.seconds,
        costs=dict(result.costs),
        num_images=result.num_images,
        reason=result.reason,
    )
