"""Small space files, and trials whose results are a formula: what the tests of `search` share."""

import copy
import functools
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from search.config import SearchConfig, load_search_config
from search.space import Space
from search.studies.database import open_storage
from search.studies.records import TrialResult
from search.study import Study

FINGERPRINT = "0123456789abcdef"

# Two branches, a conditional parameter, a number on either scale, an integer; points for both branches.
TREE: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "digits", "validation": 0.2},
    "threat": {"norm": "linf", "epsilon": "1/10"},
    "network": {"name": "mlp", "width": 8},
    "teacher": {"epochs": 1, "batch_size": 64},
    "student": {
        "epochs": 2,
        "batch_size": 64,
        "loss": {
            "choices": {
                "cc_dist": {
                    "kind": "cc_dist",
                    "alpha": {"low": 0.01, "high": 1.0, "log": True},
                    "beta": {"low": 0.5, "high": 50, "log": True},
                },
                "no_distillation": {"kind": "cc_ibp", "alpha": {"low": 0.01, "high": 1.0, "log": True}},
            }
        },
        "epsilon_schedule": {"warm_up": {"low": 0, "high": 0.1}, "ramp": 0.5},
        "attack": {"steps": {"low": 1, "high": 4, "integer": True}, "step_size": 0.25},
        "l1": 1.0e-6,
    },
    "search": {
        "sampler": "random",
        "reference": [0.2, 0.1],
        "points": [
            {"loss": "cc_dist", "alpha": 0.5, "beta": 5, "warm_up": "1/20", "steps": 2},
            {"loss": "no_distillation", "alpha": 0.1, "warm_up": 0, "steps": 1},
        ],
    },
    "budget": {"trials": 8},
}


def tree(**changes: Any) -> dict[str, Any]:
    """A copy of TREE; a name like student__epochs changes what lies deeper, a value of None takes it away."""
    copied = copy.deepcopy(TREE)
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = copied
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is None:
            del node[last]
        else:
            node[last] = value
    return copied


def write_space(path: Path, content: Mapping[str, Any] | str) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(dict(content), sort_keys=False))
    return path


def config_of(folder: Path, settings: Sequence[str] = (), **changes: Any) -> SearchConfig:
    """The configuration of TREE, changed, through a file as every configuration goes."""
    return load_search_config(write_space(folder / "space.yaml", tree(**changes)), settings)


def space_of(config: SearchConfig) -> Space:
    """The space of a configuration, which never changes: to build all its corners takes as long as to open a study."""
    return _space_of(config.model_dump_json())


@functools.cache
def _space_of(dumped: str) -> Space:
    return Space(SearchConfig.model_validate_json(dumped))


@functools.cache
def empty_database() -> bytes:
    """A database with Optuna's tables and no study: to make them takes ten times as long as to copy them."""
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(f"sqlite:///{folder}/study.db")
        storage.remove_session()
        storage.engine.dispose()
        return (Path(folder) / "study.db").read_bytes()


def open_study(config: SearchConfig, database: Path, fingerprint: str = FINGERPRINT) -> Study:
    if not database.exists():
        database.write_bytes(empty_database())
    return Study.open(config, space_of(config), f"sqlite:///{database}", fingerprint)


def result(standard: float = 0.9, certified: float = 0.5, **changes: Any) -> TrialResult:
    """A result; the other numbers lie where they must."""
    fields: dict[str, Any] = {
        "standard_accuracy": standard,
        "adversarial_accuracy": (standard + certified) / 2,
        "certified_accuracy": certified,
        "certified_upper": (standard + certified) / 2,
        "verification_state": "finished",
        "num_images": 100,
        "costs": {"teacher": 0.0, "student": 2.0, "verification": 1.0},
        "seconds": 3.0,
        "provenance": {"device": "none"},
    }
    return TrialResult(**fields | changes)


def closed_form(params: Mapping[str, Any]) -> TrialResult:
    """A known front: a larger alpha gives up standard accuracy for certified accuracy, a warm-up costs both."""
    share = math.log(params["alpha"] / 0.01) / math.log(100)
    loss = params["warm_up"] + (0.05 if params.get("loss") == "no_distillation" else 0.0)
    return result(1 - 0.5 * share**2 - loss, 0.8 * share**0.5 * (1 - loss))
