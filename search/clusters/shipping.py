"""The code that workers on a cluster run: exactly the driver's, sent by Ray to every node."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ccdist
import search
import tracking
from ccdist.provenance import COMMIT, UNKNOWN, source_commit

# How Ray tells a job what it was submitted with.
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def runtime_env(variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The packages, without the space files that only a driver reads, and the commit that they were copied from.

    Args:
        variables: more of the environment.
    """
    packages = [str(Path(str(module.__file__)).parent) for module in (ccdist, search, tracking)]
    commit = source_commit()
    known = {} if commit == UNKNOWN else {COMMIT: commit}
    return {"py_modules": packages, "excludes": ["__pycache__"], "env_vars": {**known, **(variables or {})}}


def workers_env() -> dict[str, Any]:
    """What this driver sends to its workers; nothing if it was sent itself: workers of a job get what the job got."""
    return {} if _sent_with_job() else runtime_env()


def _sent_with_job() -> bool:
    job = json.loads(os.environ.get(_JOB) or "{}")
    return "py_modules" in (job.get("runtime_env") or {})
