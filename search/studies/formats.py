"""The form in which a study is stored: its version, and how a study of an earlier version becomes one of today's.

A study names its version in the attribute `format_version`. `STEPS` has one step for each earlier version, which turns
what that version stored into what the next one does: a function of the stored values alone, which may be repeated and
takes nothing away, since Optuna cannot. Readers (`search.front`, `compare`, `rerun`, `doctor`) apply the steps in
memory and write nothing. The driver of `search.run` writes what they give for the study itself, its version last, so
that a study whose upgrade was cut off is upgraded again. Optuna's finished trials cannot change: a study says in
`oldest_format` which version its oldest trials may have, and the steps of trials are applied whenever one is read.

docs/FORMATS.md says what else a storage folder holds, and how a version is added.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ccdist.config import fingerprint
from search.studies.database import StudyError

# 1: everything up to the search that stops early. 2: what is written now.
FORMAT_VERSION = 2
VERSION, OLDEST = "format_version", "oldest_format"
# Begins the identifiers of studies that marked no folder as their own; see `Storage.claim`.
UNMARKED = "unmarked-"

Attributes = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """From one version to the next: the attributes of a study, and those of a trial."""

    study: Callable[[Attributes], dict[str, Any]]
    trial: Callable[[Attributes], dict[str, Any]]


def check_version(study: str, attributes: Attributes) -> int:
    """The version of a stored study.

    Raises:
        StudyError: a newer program made it, or none that is known.
    """
    version = attributes.get(VERSION)
    if isinstance(version, int) and 1 <= version <= FORMAT_VERSION:
        return version
    newer = isinstance(version, int) and version > FORMAT_VERSION
    advice = "update this program to at least the version that wrote it" if newer else "restore it from a copy"
    raise StudyError(f"study {study} has storage format {version}; this program reads 1 to {FORMAT_VERSION}: {advice}")


def upgraded(study: str, attributes: Attributes) -> dict[str, Any]:
    """The attributes of a study as today's version stores them; nothing is written.

    Raises:
        StudyError: a newer program made it, or none that is known.
    """
    first = check_version(study, attributes)
    if first == FORMAT_VERSION:
        return dict(attributes)
    result = {OLDEST: first} | dict(attributes)
    for version in range(first, FORMAT_VERSION):
        result = STEPS[version].study(result)
    return result | {VERSION: FORMAT_VERSION}


def changes(study: str, attributes: Attributes) -> list[tuple[str, Any]]:
    """What is to be written for an upgrade, in this order: the version comes last."""
    after = upgraded(study, attributes)
    changed = [(name, value) for name, value in after.items() if name not in attributes or attributes[name] != value]
    return sorted(changed, key=lambda change: change[0] == VERSION)


def upgraded_trial(attributes: Attributes, study: Attributes) -> Attributes:
    """The attributes of a trial as today's version stores them.

    Args:
        study: those of its study, upgraded.
    """
    for version in range(study.get(OLDEST, FORMAT_VERSION), FORMAT_VERSION):
        attributes = STEPS[version].trial(attributes)
    return attributes


# ---- version 1 -----------------------------------------------------------------------------------------------------

# What the ladder got later; studies without these rungs have never read them.
_LATER_OPTIONS: dict[str, dict[str, Any]] = {
    "ensemble": {"steps": 100, "restarts": 1, "targets": 9, "square_queries": 5000},
    "alpha_crown": {"steps": 20},
    "branch_and_bound": {
        "timeout_s": 20.0,
        "total_timeout_s": None,
        "max_branches": None,
        "root_steps": 20,
        "steps": 5,
        "candidates": 6,
        "round_size": 64,
    },
}


def _study_of_1(attributes: Attributes) -> dict[str, Any]:
    """The first studies had no identifier, a shorter ladder, and the sampler as a part of what they are."""
    space, identity = dict(attributes["space"]), dict(attributes["identity"])
    for tree in (space, identity):
        tree["verification"] = _LATER_OPTIONS | dict(tree["verification"])
    identity["search"] = {name: value for name, value in identity["search"].items() if name not in ("sampler", "seeds")}
    # Of what never changes: whoever upgrades the study finds the same one.
    made = {name: attributes[name] for name in ("data_fingerprint", "started_at")}
    return {"id": f"{UNMARKED}{fingerprint(made)}"} | dict(attributes) | {"space": space, "identity": identity}


def _trial_of_1(attributes: Attributes) -> dict[str, Any]:
    """The time of a finished trial's end stood beside its result, which had less in it.

    What a driver had not drawn yet of a trial when it was killed is drawn by the one that takes it over
    (`Study.adopt`): that needs the space.
    """
    if "result" not in attributes:
        return dict(attributes)
    added = {"expected_certified": None, "reason": None, "finished_at": attributes.get("finished_at")}
    return dict(attributes) | {"result": added | dict(attributes["result"])}


STEPS = {1: Step(_study_of_1, _trial_of_1)}
