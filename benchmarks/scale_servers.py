"""MLflow's server of the load tests' own, in front of any store."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.live_search import Server, wait_for
from search.studies.database import postgres_url


class StoreServer(Server):
    """The server of the UI with another store; None: its own."""

    def __init__(self, folder: Path, log: Path, store: str | None) -> None:
        super().__init__(folder, log)
        if store is not None:
            self._command[self._command.index("--backend-store-uri") + 1] = store


@contextmanager
def running_mlflow(folder: Path, store: str | None) -> Iterator[Server]:
    server = StoreServer(folder / "server", folder / "log", None if store is None else postgres_url(store))
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    server.start()
    try:
        wait_for(server.answers, "the tracking server answers")
        yield server
    finally:
        server.kill()
