"""MLflow at a size: what a real `mlflow server` takes through the search's own journals and sender.

    trial     the seconds that the sender needs for one whole trial: its run, EPOCHS rows of CURVES values, an artifact,
              its end; models, whose weights weigh what the network does, apart
    pass      one look of the sender at so many journals that hold nothing new
    epoch     the seconds for one more row of each of some trials that run, per trial
    page      a page of 100 runs, as the UI asks for it, with so many runs stored

The server has the two processes of `make ui`; its store is an SQLite file, or a PostgreSQL server without fsync.
"""

import secrets
import tempfile
from contextlib import nullcontext
from pathlib import Path

from benchmarks.postgres_server import running_postgres
from benchmarks.scale_measure import Measured, apart, timed
from benchmarks.scale_servers import running_mlflow
from tracking.journal import Journal, save_study_info
from tracking.sender import Delivery
from tracking.tracker import NullTracker, StudyInfo

PART = "tracking"
EPOCHS, CURVES = 40, 6
LIVE = 50  # trials that run while epochs are sent
BATCH = 10  # trials sent at a time
STUDY = StudyInfo("scale", "digits-linf-1_10")


def measure(runs: int, repeats: int, *, postgres: bool) -> list[Measured]:
    """Both stores with so many runs, in processes of their own, and the sender alone."""
    found = list(apart(_idle, 10 * runs, repeats))
    for database in ("SQLite", *(["PostgreSQL"] if postgres else [])):
        with running_postgres(secrets.token_hex()) if database == "PostgreSQL" else nullcontext(None) as server:
            found += apart(_sent, database, None if server is None else server.url(), runs, repeats)
    return found


def _idle(journals: int, repeats: int) -> list[Measured]:
    """A sender that has nothing to send."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "artifacts" / STUDY.name / "journal"
        save_study_info(folder, STUDY)
        for number in range(journals):
            with Journal(folder / f"scale-{number:04d}.jsonl") as journal:
                journal.start(journal.key, {}, {})
                journal.end("FINISHED", {}, {})
        delivery = Delivery(folder, NullTracker())
        delivery.send()
        return [timed(PART, "pass over journals that are sent", journals, delivery.send, repeats)]


def _sent(database: str, store: str | None, runs: int, repeats: int) -> list[Measured]:
    from tracking.mlflow_tracker import MlflowTracker, open_client

    with tempfile.TemporaryDirectory() as name, running_mlflow(Path(name), store) as server:
        folder = Path(name) / "storage" / "artifacts" / STUDY.name / "journal"
        save_study_info(folder, STUDY)
        delivery = Delivery(folder, MlflowTracker(server.url, None))
        written = 0

        def batch() -> None:
            nonlocal written
            for _ in range(BATCH):
                _write_trial(folder, written)
                written += 1
            delivery.send()

        early = timed(PART, f"{database}: trial", 0, batch, repeats, each=BATCH)
        while written < runs:
            batch()
        client = open_client(server.url)
        experiment = client.get_experiment_by_name(STUDY.experiment).experiment_id
        journals = [_begun(folder, written + number) for number in range(LIVE)]
        delivery.send()

        def epoch() -> None:
            for journal in journals:
                journal.metrics(1, {f"curve_{index}": 0.5 for index in range(CURVES)})
            delivery.send()

        found = [
            early,
            timed(PART, f"{database}: trial", runs, batch, repeats, each=BATCH),
            timed(PART, f"{database}: epoch", runs, epoch, repeats, each=LIVE),
            timed(PART, f"{database}: page", runs, lambda: client.search_runs([experiment], max_results=100), repeats),
        ]
        for journal in journals:
            journal.close()
    return found


def _write_trial(folder: Path, number: int) -> None:
    with _begun(folder, number) as journal:
        for step in range(EPOCHS):
            journal.metrics(step, {f"curve_{index}": step + index / 10 for index in range(CURVES)})
        file = folder.parent / "network.json"
        file.write_text("x" * 10_000)
        journal.artifact(file, "student")
        journal.end("FINISHED", {"standard_accuracy": 0.9, "certified_accuracy": 0.5}, {"cert.state": "COMPLETE"})


def _begun(folder: Path, number: int) -> Journal:
    journal = Journal(folder / f"scale-{number:04d}.jsonl")
    journal.start(journal.key, {"alpha": number, "beta": 5}, {"cert.state": "RUNNING"})
    return journal
