"""A real MLflow server: the pages it serves, and a search that outlives it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from contracts import STUDY

from tracking.journal import STUDY_JOURNAL, Journal, save_study_info
from tracking.mlflow_tracker import MlflowTracker, local_store
from tracking.sender import Delivery, Sender

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        content: bytes = answer.read()
        return content


@contextmanager
def ui_server(storage: Path, port: int, end: signal.Signals) -> Iterator[str]:
    """The UI as a user starts it; yields what it printed first."""
    command = [sys.executable, "-m", "tracking.ui", "--storage", str(storage), "--port", str(port)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as server:
        try:
            assert server.stdout is not None
            first_line = server.stdout.readline()
            deadline = time.monotonic() + 120
            while True:
                try:
                    get(f"http://127.0.0.1:{port}/health")
                    break
                except OSError:
                    assert server.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
            yield first_line
        finally:
            os.killpg(server.pid, end)


def write_study(storage: Path) -> Path:
    journals = storage / "artifacts" / STUDY.name / "journal"
    save_study_info(journals, STUDY)
    figure = journals.parent / "front.png"
    figure.write_bytes(b"a picture")
    with Journal(journals / "t1.jsonl") as journal:
        journal.start("t1", {"alpha": 0.5}, {})
        journal.metrics(0, {"loss": 1.0})
        journal.artifact(figure, "figures")
        journal.end("FINISHED", {}, {})
    with Journal(journals / STUDY_JOURNAL) as journal:
        journal.study({}, {}, {"front.png": figure}, description="![front](artifact:front.png)")
    return journals


def test_the_ui_serves_what_a_search_stored_without_a_server(tmp_path: Path) -> None:
    port = free_port()
    Delivery(write_study(tmp_path), MlflowTracker(*local_store(tmp_path))).send()
    with ui_server(tmp_path, port, signal.SIGTERM) as first_line:
        base = f"http://127.0.0.1:{port}"
        assert f"open {base}/#/experiments/1/runs?workflowType=machine_learning" in first_line
        query = json.dumps({"experiment_ids": ["1"]}).encode()
        request = urllib.request.Request(
            f"{base}/api/2.0/mlflow/runs/search", query, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            found = {run["info"]["run_name"]: run for run in json.load(answer)["runs"]}
        assert found.keys() == {STUDY.name, "t1"}
        trial_id = found["t1"]["info"]["run_id"]
        listed = json.loads(get(f"{base}/api/2.0/mlflow/artifacts/list?run_id={trial_id}&path=figures"))
        assert [file["path"] for file in listed["files"]] == ["figures/front.png"]
        assert get(f"{base}/get-artifact?path=figures/front.png&run_uuid={trial_id}") == b"a picture"
        tags = {tag["key"]: tag["value"] for tag in found[STUDY.name]["data"]["tags"]}
        link = tags["mlflow.note.content"].partition("![front](")[2].removesuffix(")")
        assert get(f"{base}/{link}") == b"a picture"


def test_a_killed_server_delays_rows_and_loses_none(tmp_path: Path) -> None:
    port = free_port()
    local_tracker = MlflowTracker(*local_store(tmp_path))
    journals = write_study(tmp_path)
    tracker = MlflowTracker(f"http://127.0.0.1:{port}", None)
    sender = Sender(journals, tracker, interval_s=0.1)
    with Journal(journals / "t2.jsonl") as journal:
        journal.start("t2", {"alpha": 0.1}, {})
        with ui_server(tmp_path, port, signal.SIGKILL):
            sender.start()
            assert sender.flush(60) == 0
            url = tracker.study_url()
            assert url is not None
            assert url.startswith(f"http://127.0.0.1:{port}/#/experiments/1/runs/")
            journal.metrics(0, {"loss": 1.0})
        # The server is gone, perhaps before that row reached it.
        for step in range(1, 50):
            journal.metrics(step, {"loss": 1.0 / step})
        journal.end("FINISHED", {"certified_accuracy": 0.25}, {})
        assert sender.flush(3) > 0
        with ui_server(tmp_path, port, signal.SIGKILL):
            assert sender.stop(120) == 0
    local_tracker.open_study(STUDY)
    client = local_tracker._client
    found = client.search_runs(["1"], "tags.`cert.trial` = 't2'")
    assert [run.info.status for run in found] == ["FINISHED"]
    history = client.get_metric_history(found[0].info.run_id, "loss")
    assert [each.step for each in history] == list(range(50))
