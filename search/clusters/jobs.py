"""Commands of this project on the head of a cluster, as jobs that its dashboard takes.

A job runs the code of this machine, which is sent along, in the head's home folder: that is what its relative paths
mean. The folder that Ray gives a job goes when the job does.
"""

import http.client
import json
import logging
import os
import re
import shlex
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray._private import ray_constants
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from search.artifacts.artifact_place import ArtifactPlace, PlaceError
from search.clusters.addresses import (
    CONNECT_S,
    VARIABLE,
    Address,
    ClusterError,
    check_own_token,
    cluster_address,
    token_text,
)
from search.clusters.shipping import runtime_env
from search.studies.database import is_postgres, without_password
from tracking.address import Address as Place
from tracking.address import AddressError, is_server, shown

# Ray's own client lets these win over what it is given.
_OVERRIDES = (VARIABLE, "RAY_API_SERVER_ADDRESS")
_STUDY = "ccdist_study"
_URL = re.compile(r"[A-Za-z][\w+.-]*://\S*")
# Where a job finds the file that came with it.
_FILE = '"$PWD"/'


class Jobs:
    """The jobs of one cluster.

    Raises:
        ClusterError: its dashboard does not answer, or asks for another token.
    """

    def __init__(self, asked: Address) -> None:
        self.url = dashboard_url(asked)
        self._client = _client(self.url, asked.words or self.url)

    def running(self, study: str) -> str | None:
        """The job in which a driver of that study is at work, or waits to be."""
        return next((job for job, ended in self._of(study) if not ended), None)

    def submit(self, study: str, entrypoint: str, file: Path | None, variables: Mapping[str, str]) -> str:
        """Hand over a driver of a study; returns the job's name: that of the study, and a number."""
        numbers = [int(job.rpartition("-")[2]) for job, _ in self._of(study)]
        name = f"{study}-{max(numbers, default=0) + 1}"
        return self._submit(entrypoint, file, variables, submission_id=name, metadata={_STUDY: study})

    def start(self, entrypoint: str, file: Path | None) -> str:
        """Hand over a command that is no driver; returns the job's name."""
        return self._submit(entrypoint, file, {})

    def has_ended(self, job: str) -> bool:
        with _one_line(self.url):
            return bool(self._client.get_job_status(job).is_terminal())

    def failure(self, job: str) -> str | None:
        """What Ray says of an ended job; None: it went well."""
        with _one_line(self.url):
            found = self._client.get_job_info(job)
        return None if found.status == "SUCCEEDED" else str(found.message or found.status)

    def logs(self, job: str) -> str:
        with _one_line(self.url):
            return str(self._client.get_job_logs(job))

    def stop(self, job: str) -> None:
        with _one_line(self.url):
            self._client.stop_job(job)

    def forget(self, job: str) -> None:
        """Take one that has ended off the cluster's list."""
        with _one_line(self.url):
            self._client.delete_job(job)

    def _of(self, study: str) -> list[tuple[str, bool]]:
        """Jobs of a study, and whether they have ended."""
        with _one_line(self.url):
            jobs = self._client.list_jobs()
        return [
            (job.submission_id, job.status.is_terminal())
            for job in jobs
            if job.submission_id and (job.metadata or {}).get(_STUDY) == study
        ]

    def _submit(self, entrypoint: str, file: Path | None, variables: Mapping[str, str], **options: Any) -> str:
        with tempfile.TemporaryDirectory(prefix="ccdist-job-") as folder, _one_line(self.url):
            if file is not None:
                shutil.copyfile(file, Path(folder) / file.name)
            environment = runtime_env(variables) | {"working_dir": folder}
            return str(self._client.submit_job(entrypoint=entrypoint, runtime_env=environment, **options))


def command(module: str, arguments: Sequence[str], file: Path | None = None) -> str:
    """What the shell of a job runs.

    Args:
        arguments: those of the module; `file` stands for the copy that comes with the job.
    """
    words = " ".join(
        _FILE + shlex.quote(file.name) if file and Path(word) == file else _quoted(word) for word in arguments
    )
    # The home folder is no place to import from (-P): it may well have a folder named ccdist.
    return f'{{ set -- {words}; cd; }} && exec python -P -m {module} "$@"'


def _quoted(word: str) -> str:
    """For the shell, which may still put the head's home in place of a leading ~/."""
    return "~/" + shlex.quote(word[2:]) if word.startswith("~/") else shlex.quote(word)


def check_no_login(arguments: Sequence[str]) -> None:
    """Whoever sees a cluster's dashboard reads the commands of its jobs.

    Raises:
        ClusterError: there is a login in one, or what may be.
    """
    for argument in arguments:
        if without_password(argument) != argument or any(map(_may_hold_login, _URL.findall(argument))):
            raise ClusterError(
                f"{_without_login(argument)}: a login in a job's command is shown on the cluster's dashboard; leave it "
                "out and use PGPASSWORD or ~/.pgpass on the head, or the variables of the store's or MLflow's own "
                "tools there"
            )


def _without_login(argument: str) -> str:
    """An argument in which everything that may be a login, from the first address on, is hidden."""
    first = _URL.search(argument)
    begin = len(argument) if first is None else first.start()
    return without_password(argument[:begin]) + shown(argument[begin:])


def _may_hold_login(url: str) -> bool:
    url = url.rstrip("\"'}],")  # of a list or a mapping in YAML
    try:
        if is_server(url) or is_postgres(url) or url.startswith(("mysql", "sqlite:")):
            return Place.of(url).has_secret
        ArtifactPlace.of(url)
    except (AddressError, PlaceError):  # who knows what it is
        return True
    return False


def dashboard_url(asked: Address) -> str:
    """The dashboard's address; of a cluster, its head says where its dashboard is.

    Raises:
        ClusterError: no cluster was asked for or is here, or it has no dashboard.
    """
    if asked.is_dashboard:
        return asked.value.rstrip("/")
    address = cluster_address(asked)
    if address is None:
        raise ClusterError(
            "no Ray cluster is there to hand a job to; give --address http://HEAD:8265, or start one with "
            "ray start --head"
        )
    with _one_line(address):
        found = GcsClient(address=address).internal_kv_get(
            ray_constants.DASHBOARD_ADDRESS.encode(), ray_constants.KV_NAMESPACE_DASHBOARD, timeout=CONNECT_S
        )
    if not found:
        raise ClusterError(
            f"the Ray cluster at {address} has no dashboard, which takes jobs; install ray[default] there"
        )
    return f"http://{found.decode()}"


def _client(url: str, words: str) -> Any:
    _check_dashboard(url)
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)  # each has set its own
    kept = {name: os.environ.pop(name) for name in _OVERRIDES if name in os.environ}
    try:
        with _one_line(words):
            return JobSubmissionClient(url)
    finally:
        os.environ.update(kept)


def _check_dashboard(url: str) -> None:
    """Ray's own client waits without a limit."""
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=CONNECT_S) as answer:
            if "ray_version" in json.load(answer):
                return
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # a dashboard that wants its token
            return
    except (OSError, ValueError, http.client.HTTPException):
        pass
    raise ClusterError(f"no Ray dashboard answers at {url}; give --address http://HEAD:8265, or a tunnel to it")


@contextmanager
def _one_line(words: str) -> Iterator[None]:
    try:
        check_own_token()
        yield
    except ClusterError:
        raise
    except AuthenticationError as error:
        raise ClusterError(token_text(words)) from error
    except Exception as error:  # of many kinds, requests' own among them
        raise ClusterError(f"the Ray cluster at {words} refuses ({' '.join(str(error).split())[:500]})") from error
