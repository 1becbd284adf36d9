"""Optuna's trials and studies as records, and the checks that a stored study is the one that is meant."""

import json
import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from ccdist.config import VerificationOptions, fingerprint
from search.config import SearchConfig
from search.confirming.confirmation_config import config_of
from search.studies import formats
from search.studies.database import StudyError, missing_file, open_storage, without_password
from search.studies.records import Death, RungValues, StudyRecord, TrialRecord, TrialResult
from search.studies.records import TrialState as RecordState
from search.suggestions.sampling import DIRECTIONS
from tracking.address import Address

_OTHER = {"study": "another space", "confirmation": "other options, with which a result means something else"}
_ADVICE = {
    "study": "choose another name (--set name=...) or another --storage",
    "confirmation": "give it the same options again, or choose another --name",
}
DIED = "died:"  # + trial number: study attribute with the deaths of a trial whose resumed verification died
HELD = "accelerators:"  # + trial number: study attribute with those of a trial whose resumed verification held more
REFINED = "refined:"  # + trial number: study attribute with a result that is better known than when the trial ended
SHARES = "shares"  # study attribute: what classes of trials were found to need
ARTIFACTS = "artifacts"  # study attribute: where they were kept when a search last opened it
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
    if missing_file(url) is not None:
        return None
    storage = open_storage(url)
    if config.study_name not in optuna.get_all_study_names(storage):
        return None
    study = optuna.load_study(study_name=config.study_name, storage=storage)
    if "identity" not in study.user_attrs:
        return None
    _check_same(study, stored_attributes(study), config)
    return study_record(study)


def load_record(url: str, name: str) -> StudyRecord:
    """A stored study as plain values, for reading only.

    Raises:
        StudyError: there is no such study.
    """
    return study_record(_load(url, name))


class StoredStudy(NamedTuple):
    """A stored study with what it was made from."""

    record: StudyRecord
    config: SearchConfig
    data_fingerprint: str
    identifier: str


def load_stored(url: str, name: str) -> StoredStudy:
    """A stored study as plain values with what it was made from, for reading only.

    Raises:
        StudyError: there is no such study.
    """
    study = _load(url, name)
    record, attributes = study_record(study), stored_attributes(study)
    config = config_of(attributes["space"])
    return StoredStudy(record, config, str(attributes["data_fingerprint"]), str(attributes["id"]))


def stored_config(url: str, name: str) -> SearchConfig:
    """The space file with which a stored study was made.

    Raises:
        StudyError: there is no such study.
    """
    return config_of(stored_attributes(_load(url, name))["space"])


def stored_artifacts(url: str, name: str) -> str | None:
    """The folder or address at which a stored study last kept its artefacts; None: in its storage folder.

    Raises:
        StudyError: there is no such study.
    """
    attributes = stored_attributes(_load(url, name))
    if ARTIFACTS in attributes:
        return str(attributes[ARTIFACTS])
    return config_of(attributes["space"]).storage.artifacts  # of a study that was not opened since


def stored_identifier(url: str, name: str) -> str | None:
    """What tells the study of that name from others of its name; None: there is none.

    Raises:
        StudyError: the database cannot be read.
    """
    if missing_file(url) is not None:
        return None
    storage = open_storage(url)
    if name not in optuna.get_all_study_names(storage):
        return None
    return str(stored_attributes(optuna.load_study(study_name=name, storage=storage))["id"])


def _load(url: str, name: str) -> optuna.Study:
    if (database := missing_file(url)) is not None:
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
    """The study of a space file, made if there is none, and brought to today's format if it has an earlier one.

    Raises:
        StudyError: there is one with another space, other data or other directions.
    """
    study = optuna.create_study(
        study_name=config.study_name, storage=storage, directions=DIRECTIONS, load_if_exists=True
    )
    _check_directions(study)
    if "identity" not in study.user_attrs:
        if formats.VERSION in study.user_attrs:
            formats.check_version(study.study_name, study.user_attrs)
        # The identity is written last: a study whose making was interrupted has none, and is made again.
        study.set_user_attr(formats.VERSION, formats.FORMAT_VERSION)
        study.set_user_attr("id", uuid.uuid4().hex)
        study.set_user_attr("data_fingerprint", data_fingerprint)
        study.set_user_attr("started_at", time.time())
        study.set_user_attr("space", _without_logins(config))
        study.set_user_attr("identity", config.identity)
    else:
        attributes = stored_attributes(study)
        _check_same(study, attributes, config)
        if attributes["data_fingerprint"] != data_fingerprint:
            raise StudyError(
                f"study {study.study_name} was made from other images than those of {config.data.name} now; "
                f"{_ADVICE[config.kind]}"
            )
        for name, value in formats.changes(study.study_name, study.user_attrs):
            study.set_user_attr(name, value)
    return study


def _without_logins(config: SearchConfig) -> dict[str, Any]:
    """The space file as it is kept: whoever opens a database again finds its password where the first did."""
    tree = config.model_dump(mode="json")
    for section, name in (("storage", "study"), ("tracking", "uri")):
        if tree[section][name] is not None:
            tree[section][name] = Address.of(tree[section][name]).open
    return tree


def _check_same(study: optuna.Study, attributes: Mapping[str, Any], config: SearchConfig) -> None:
    """Refuse a study that was made with other directions or from another space."""
    _check_directions(study)
    stored = attributes["identity"]
    if fingerprint(stored) != config.identity_hash:
        difference = _first_difference(stored, json.loads(json.dumps(config.identity)))
        other, advice = _OTHER[config.kind], _ADVICE[config.kind]
        raise StudyError(f"study {study.study_name} exists with {other} ({difference}); {advice}")


def _check_directions(study: optuna.Study) -> None:
    """Refuse a study that does not maximise both objectives; Optuna would keep its directions without a word."""
    if [direction.name.lower() for direction in study.directions] != DIRECTIONS:
        raise StudyError(f"study {study.study_name} exists with other directions; {_ADVICE['study']}")


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
    attributes = stored_attributes(study)
    trials = study.get_trials(deepcopy=False)
    return with_trials(
        empty_record(study),
        tuple(trial_record(study.study_name, trial, attributes) for trial in trials),
    )


def stored_attributes(study: optuna.Study) -> dict[str, Any]:
    """What is stored of the study itself, in today's format; nothing is written.

    Raises:
        StudyError: it has a newer format, or was never completely made.
    """
    attributes = study.user_attrs
    if formats.VERSION in attributes:
        formats.check_version(study.study_name, attributes)
    if "identity" not in attributes:
        raise StudyError(f"study {study.study_name} was interrupted while it was made; run its search again")
    return formats.upgraded(study.study_name, attributes)


def empty_record(study: optuna.Study) -> StudyRecord:
    """The study without its trials."""
    attributes = stored_attributes(study)
    config = config_of(attributes["space"])
    return StudyRecord(
        name=study.study_name,
        reference=config.search.hypervolume_reference,
        trials=(),
        dataset=config.data.name,
        threat=str(config.threat),
        num_images=0,
        verifier=verifier_text(config.verification),
        started_at=attributes["started_at"],
        split=config.split,
    )


def verifier_text(options: VerificationOptions) -> str:
    """The ladder as figures and tables name it, with what its answers depend on: steps, restarts and limits."""
    attack, ensemble, limits = options.attack, options.ensemble, options.branch_and_bound
    bounded = [
        f"{limits.timeout_s:g} s an image" if limits.timeout_s else "",
        f"{limits.max_branches:,} branches an image" if limits.max_branches else "",
        f"{limits.total_timeout_s:g} s in all" if limits.total_timeout_s else "",
    ]
    spelled = {
        "pgd": f"PGD ({attack.steps} steps of {attack.step_size:g} of the radius, {_counted(attack.restarts)})",
        "ensemble": f"attack ensemble ({ensemble.steps} steps, {_counted(ensemble.restarts)}, {ensemble.targets} "
        f"targets, {ensemble.square_queries:,} queries)",
        "ibp": "IBP",
        "crown": "CROWN",
        "alpha_crown": f"alpha-CROWN ({options.alpha_crown.steps} steps)",
        "branch_and_bound": f"branch and bound ({', '.join(filter(None, bounded)) or 'no limit'})",
    }
    rungs = [spelled[rung] for rung in options.rungs]
    return ", ".join(rungs if "branch_and_bound" in options.rungs else [*rungs, "no time limit"])


def _counted(restarts: int) -> str:
    return "1 restart" if restarts == 1 else f"{restarts} restarts"


def with_trials(record: StudyRecord, trials: tuple[TrialRecord, ...]) -> StudyRecord:
    """The study with these trials."""
    num_images = next((trial.num_images for trial in trials if trial.num_images is not None), 0)
    return replace(record, trials=trials, num_images=num_images)


def trial_record(study_name: str, trial: FrozenTrial, study: Mapping[str, Any]) -> TrialRecord:
    """A stored trial as plain values; study: the attributes of its study, in today's format."""
    attributes = formats.upgraded_trial(trial.user_attrs, study)
    state = _STATES[trial.state]
    result = dict(attributes.get("result", {})) if state == "COMPLETE" else {}
    ended = {"STOPPED": attributes.get("stopped", {}), "COMPLETE": result}.get(state, attributes)
    known_deaths = study.get(f"{DIED}{trial.number}") or attributes.get("deaths", [])
    deaths = tuple(Death(**death) for death in known_deaths)
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
        deaths=deaths,
        attempt=max(attributes.get("attempt", 1), deaths[-1].attempt + 1 if deaths else 1),
        accelerators=study.get(f"{HELD}{trial.number}", attributes.get("accelerators")),
    )
    result.pop("finished_at", None)
    known = study.get(f"{REFINED}{trial.number}") or result
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
