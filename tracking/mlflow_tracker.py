"""Studies and trials as MLflow runs.

    experiment   data set and threat
      parent run   a study
        child run    a trial

Every run is found by its tags before one is made, whatever process made it. Only MlflowClient is used: the
fluent functions keep an active run and an address for the whole process. MLflow takes seconds to import, so
it is imported when a tracker is made.
"""

import fcntl
import os
import re
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from tracking import models, registry, views
from tracking.address import HOW_TO_LOG_IN, Address, is_server, to_open, without_secrets
from tracking.tracker import (
    KIND_TRIAL,
    TAG_KIND,
    TAG_SPLIT,
    TAG_STUDY,
    TAG_STUDY_ID,
    TAG_TRIAL,
    LoginError,
    MetricRow,
    ModelInfo,
    OtherStudyError,
    ParamValue,
    RefusedError,
    Status,
    StudyInfo,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_PARENT_TAG = "mlflow.parentRunId"
_NOTE_TAG = "mlflow.note.content"
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
_PAGE = 1000
_REFUSED = "INVALID_PARAMETER_VALUE"
_SAID_LENGTH = 200
_TOO_LARGE = 413  # a limit of what stands before MLflow
_TAKEN = "RESOURCE_ALREADY_EXISTS"
_NOT_LOGGED_IN = ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED")
# What a server in front of MLflow says in JSON of its own, of which MLflow drops the status.
_LOGIN_WORDS = re.compile(r"\b(401|403|unauthori[sz]ed|forbidden|authentication|not authenticated)\b", re.IGNORECASE)
_SQLITE = "sqlite:///"

# Unasked, MLflow sends usage data, fetches a model catalogue, unpickles code, and waits minutes for a dead
# server.
CLOSED_NETWORK = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_MODEL_CATALOG_URI": "",
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def prepare_environment() -> None:
    """Set what CLOSED_NETWORK holds, where the user has not said otherwise; before MLflow is imported."""
    for name, value in CLOSED_NETWORK.items():
        os.environ.setdefault(name, value)


def local_store(directory: Path) -> tuple[str, str]:
    """The store of a storage folder: the arguments of MlflowTracker for a search without a server."""
    folder = directory.resolve() / "mlflow"
    return f"{_SQLITE}{folder / 'mlflow.db'}", str(folder / "artifacts")


class MlflowTracker:
    """The Tracker that MLflow keeps; may be used from several threads.

    Making one opens the store: a database is created or brought up to date here, so do it in the driver,
    before any other process looks at the database. A server is not contacted yet.

    Args:
        uri: a server, http://host:port, or a database, sqlite:///path/mlflow.db; a login is kept apart from it.
        artifact_root: where new experiments keep their files; None lets the server decide.
    """

    def __init__(self, uri: str, artifact_root: str | None) -> None:
        self._client = open_client(uri)
        self._uri = Address.of(uri).open
        self._artifact_root = artifact_root
        self._lock = threading.RLock()
        self._study: StudyInfo | None = None
        self._experiment_id = ""
        self._parent_id = ""
        self._run_ids: dict[str, str] = {}
        self._pages: tuple[str, str] | None = None  # experiment and parent run, once the server has named them

    def open_study(self, study: StudyInfo, *, resume: bool = True) -> None:
        with self._session():
            self._study = study
            self._forget()
            parent = self._find_or_create(self._study_tags(), study.name)
            _check_identity(study, parent.data.tags.get(TAG_STUDY_ID, ""))
            self._parent_id = parent.info.run_id
            self._pages = (self._experiment(), self._parent_id)
            if resume and parent.info.status != "RUNNING":
                self._client.update_run(self._parent_id, status="RUNNING")
            # A study without an identifier may meet another of its name: what cannot be changed stays.
            params = {name: value for name, value in study.params.items() if name not in parent.data.params}
            self._log_params_and_tags(self._parent_id, params, {**_own_tags(study), **study.tags})
            self._describe(study.description)
            views.save_views(self._client, self._experiment(), study)

    def start_trial(
        self,
        key: str,
        params: Mapping[str, ParamValue],
        tags: Mapping[str, str],
        *,
        time_ms: int | None = None,
    ) -> None:
        with self._session():
            run = self._find_or_create(self._trial_tags(key), key, time_ms)
            self._run_ids[key] = run.info.run_id
            if run.info.status != "RUNNING":
                self._client.update_run(run.info.run_id, status="RUNNING")
            # The parent again: the one under which the run was made may have been deleted.
            own = {_PARENT_TAG: self._parent(), TAG_SPLIT: self._opened_study().split}
            self._log_params_and_tags(run.info.run_id, params, own | dict(tags))

    def log_metrics(self, key: str, rows: Sequence[MetricRow]) -> None:
        with self._session():
            self._log_metrics(self._trial_id(key), rows)

    def log_artifact(self, key: str, path: Path, folder: str) -> None:
        with self._session():
            self._copy(self._trial_id(key), path, folder)

    def log_model(self, key: str, model: ModelInfo, *, time_ms: int | None = None) -> None:
        with self._session():
            at = _now_ms() if time_ms is None else time_ms
            models.log_model(self._client, self._experiment(), self._trial_id(key), key, model, time_ms=at)

    def mark_front(self, keys: Collection[str]) -> None:
        with self._session():
            run_ids = [self._trial_id(key) for key in keys if not self._deleted(key)]
            views.mark_front(self._client, self._experiment(), self._opened_study(), run_ids)

    def register(
        self, name: str, versions: Mapping[str, Mapping[str, str]], aliases: Mapping[str, str], description: str
    ) -> None:
        with self._session():
            run_ids = {key: self._deleted(key) or self._trial_id(key) for key in versions}
            registry.register(self._client, self._experiment(), name, run_ids, versions, aliases, description)

    def end_trial(self, key: str, status: Status, tags: Mapping[str, str], *, time_ms: int | None = None) -> None:
        with self._session():
            run_id = self._trial_id(key)
            self._log_params_and_tags(run_id, {}, tags)
            self._client.set_terminated(run_id, status, end_time=time_ms)

    def log_study(
        self,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        artifacts: Mapping[str, Path],
        *,
        step: int = 0,
        description: str = "",
        time_ms: int | None = None,
    ) -> None:
        with self._session():
            run_id = self._parent()
            at = _now_ms() if time_ms is None else time_ms
            self._log_metrics(run_id, [MetricRow(name, value, at, step) for name, value in metrics.items()])
            self._log_params_and_tags(run_id, {}, tags)
            for name, path in artifacts.items():
                self._copy_as(run_id, path, name)
            self._describe(description)

    def close_study(self, status: Status, *, time_ms: int | None = None) -> None:
        with self._session():
            self._client.set_terminated(self._parent(), status, end_time=time_ms)

    def close_stale(self, live_keys: Collection[str]) -> list[str]:
        with self._session():
            tags = {TAG_KIND: KIND_TRIAL, TAG_STUDY: self._opened_study().name}
            running = self._search(tags, "attributes.status = 'RUNNING'")
            stale = [run for run in running if run.data.tags[TAG_TRIAL] not in live_keys]
            for run in stale:
                self._client.set_terminated(run.info.run_id, "KILLED")
            return sorted(run.data.tags[TAG_TRIAL] for run in stale)

    def study_url(self) -> str | None:
        return self._url(self._study_page()) if is_server(self._uri) else None

    def front_url(self) -> str | None:
        if self._pages is None or not views.has_trials(self._opened_study()):
            return self._url(self._study_page())
        return self._url(views.front_page(self._pages[0], self._opened_study().name))

    def _study_page(self) -> str:
        """The study's page from what is known, for the server may be away; its first one if that is nothing."""
        return "" if self._pages is None else views.run_page(*self._pages)

    def _url(self, page: str) -> str:
        base = self._uri.rstrip("/") if is_server(self._uri) else views.LOCAL_SERVER
        return f"{base}/{page}" if page else base

    @contextmanager
    def _session(self) -> Iterator[None]:
        """One thread at a time; what goes wrong is sorted into refused and worth trying again."""
        from mlflow.exceptions import MlflowException

        with self._lock:
            try:
                yield
            except Exception as error:
                # A run may have been deleted, or the server's database replaced: look everything up again.
                self._forget()
                if _is_login(error):
                    raise LoginError(self._login_advice(error)) from error
                if isinstance(error, MlflowException) and error.error_code == _REFUSED and not _is_gone(error):
                    raise RefusedError(error.message) from error
                if _status_code(error) == _TOO_LARGE:
                    raise RefusedError(
                        f"a file is too large for {self._uri}: {' '.join(str(error).split())}"
                    ) from error
                raise

    def _login_advice(self, error: Exception) -> str:
        said = without_secrets(" ".join(str(error).split()))[:_SAID_LENGTH]
        return f"{self._uri} does not accept the login: {HOW_TO_LOG_IN}, and start again (it said: {said})"

    def _forget(self) -> None:
        self._experiment_id = self._parent_id = ""
        self._run_ids.clear()

    def _opened_study(self) -> StudyInfo:
        if self._study is None:
            raise ValueError("no study is open: call open_study before anything else")
        return self._study

    def _experiment(self) -> str:
        if not self._experiment_id:
            name = self._opened_study().experiment
            found = self._client.get_experiment_by_name(name)
            if found is None:
                self._experiment_id = self._create_experiment(name)
            else:
                self._experiment_id = found.experiment_id
                if found.lifecycle_stage == "deleted":  # its name stays taken, so it is this one or none
                    self._client.restore_experiment(found.experiment_id)
        return self._experiment_id

    def _create_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        try:
            return str(self._client.create_experiment(name, artifact_location=self._artifact_root))
        except MlflowException as error:  # another process was faster, or the answer to a first request was lost
            made = self._client.get_experiment_by_name(name) if error.error_code == _TAKEN else None
            if made is None:
                raise
            return str(made.experiment_id)

    def _parent(self) -> str:
        if not self._parent_id:
            study = self._opened_study()
            self._parent_id = self._find_or_create(self._study_tags(), study.name).info.run_id
        return self._parent_id

    def _trial_id(self, key: str) -> str:
        if key not in self._run_ids:
            self._run_ids[key] = self._find_or_create(self._trial_tags(key), key).info.run_id
        return self._run_ids[key]

    def _deleted(self, key: str) -> str | None:
        """The run of a trial, if its user deleted it: what is said about it afterwards makes no empty one anew."""
        tags = self._trial_tags(key)
        if key in self._run_ids or self._search(tags):
            return None
        runs = self._search(tags, deleted=True)
        return max(runs, key=_content).info.run_id if runs else None

    def _study_tags(self) -> dict[str, str]:
        return {TAG_KIND: self._opened_study().kind, TAG_STUDY: self._opened_study().name}

    def _trial_tags(self, key: str) -> dict[str, str]:
        return {TAG_KIND: KIND_TRIAL, TAG_STUDY: self._opened_study().name, TAG_TRIAL: key}

    def _find_or_create(self, tags: Mapping[str, str], name: str, time_ms: int | None = None) -> "Run":
        runs = self._search(tags)
        if not runs:
            is_trial = tags[TAG_KIND] == KIND_TRIAL
            new = {_PARENT_TAG: self._parent(), **views.NEW_TRIAL_TAGS} if is_trial else {}
            self._client.create_run(self._experiment(), start_time=time_ms, tags={**tags, **new}, run_name=name)
            # The client repeats a request whose answer was lost, and each repetition makes a run.
            runs = self._search(tags)
        # A request that a stopped server answers late makes its run late, so the older one may be the empty one.
        first, *doubles = sorted(runs, key=lambda run: (-_content(run), run.info.start_time, run.info.run_id))
        for double in doubles:
            self._client.delete_run(double.info.run_id)
        return first

    def _search(self, tags: Mapping[str, str], condition: str = "", *, deleted: bool = False) -> "list[Run]":
        from mlflow.entities import ViewType

        which = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
        conditions = [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
        query = " and ".join([*conditions, condition] if condition else conditions)
        runs: list[Run] = []
        token: str | None = None
        while True:
            page = self._client.search_runs([self._experiment()], query, which, max_results=_PAGE, page_token=token)
            runs += page
            token = page.token
            if not token:
                return runs

    def _log_metrics(self, run_id: str, rows: Sequence[MetricRow]) -> None:
        from mlflow.entities import Metric

        if rows:
            self._client.log_batch(run_id, [Metric(row.name, row.value, row.time_ms, row.step) for row in rows])

    def _log_params_and_tags(self, run_id: str, params: Mapping[str, ParamValue], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        # Tags first: a changed param is refused, and takes its request with it.
        if tags:
            self._client.log_batch(
                run_id, tags=[RunTag(name, _shortened(text, _TAG_LENGTH)) for name, text in tags.items()]
            )
        if params:
            texts = {name: _shortened(str(value), _PARAM_LENGTH) for name, value in params.items()}
            self._client.log_batch(run_id, params=[Param(name, text) for name, text in texts.items()])

    def _describe(self, description: str) -> None:
        if description:
            links = views.links(self._experiment(), self._opened_study())
            note = _with_artifact_links(f"{links}\n\n{description}" if links else description, self._parent())
            self._client.set_tag(self._parent(), _NOTE_TAG, _shortened(note, _TAG_LENGTH))

    def _copy(self, run_id: str, path: Path, folder: str) -> None:
        if path.is_dir():
            self._client.log_artifacts(run_id, str(path), folder or None)
        else:
            self._client.log_artifact(run_id, str(path), folder or None)

    def _copy_as(self, run_id: str, path: Path, name: str) -> None:
        if path.is_dir():
            self._copy(run_id, path, name)
            return
        folder, _, file_name = name.rpartition("/")
        if file_name == path.name:
            self._copy(run_id, path, folder)
            return
        with tempfile.TemporaryDirectory() as directory:  # MLflow keeps a file's own name
            self._copy(run_id, Path(shutil.copyfile(path, Path(directory) / file_name)), folder)


def open_client(uri: str) -> "MlflowClient":
    """A client of a server or a database; the database is made or brought up to date here.

    Raises:
        AddressError: the address is none.
    """
    prepare_environment()
    uri = to_open(uri)
    with warnings.catch_warnings():
        # MLflow 3.17 uses what SQLAlchemy 2.1 deprecates; nobody here can act on it.
        warnings.simplefilter("ignore", DeprecationWarning)
        from mlflow import MlflowClient

        if not uri.startswith(_SQLITE):
            return MlflowClient(uri)
        database = Path(uri.removeprefix(_SQLITE))
        database.parent.mkdir(parents=True, exist_ok=True)
        # Two processes that create the tables at once both fail.
        with database.with_name(database.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return MlflowClient(uri)


def _check_identity(study: StudyInfo, found: str) -> None:
    if study.identifier and found and found != study.identifier:
        raise OtherStudyError(
            f"has another study {study.name!r} in experiment {study.experiment!r}, from another storage folder: "
            "give one of them a name of its own (--set name=...), or use another server"
        )


def _own_tags(study: StudyInfo) -> dict[str, str]:
    return {TAG_SPLIT: study.split} | ({TAG_STUDY_ID: study.identifier} if study.identifier else {})


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _with_artifact_links(markdown: str, run_id: str) -> str:
    def link(match: re.Match[str]) -> str:
        return f"(get-artifact?path={quote(match[1])}&run_uuid={run_id})"

    return re.sub(r"\(artifact:([^)]+)\)", link, markdown)


def _is_login(error: Exception) -> bool:
    """Whether a server refused the login, MLflow or what stands before it."""
    from mlflow.exceptions import MlflowException, RestException

    if isinstance(error, RestException) and error.error_code == "INTERNAL_ERROR":
        return _LOGIN_WORDS.search(str(error)) is not None
    if isinstance(error, MlflowException):
        return error.error_code in _NOT_LOGGED_IN
    return _status_code(error) in (401, 403)


def _status_code(error: Exception) -> int | None:
    """Of an error of requests, which MLflow leaves as it is for artifacts."""
    code: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return code


def _is_gone(error: Exception) -> bool:
    """Whether a run was deleted meanwhile, which is no fault of the rows: they go to another run."""
    return "must be in the 'active' state" in str(error)


def _content(run: "Run") -> int:
    """How much a run holds."""
    return len(run.data.metrics) + len(run.data.params) + len(run.data.tags)


def _now_ms() -> int:
    return round(time.time() * 1000)
