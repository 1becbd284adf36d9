"""The MLflow pages of a storage folder, on this machine only.

python -m tracking.ui --storage DIR [--port 5000] [--host 127.0.0.1]
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from tracking.mlflow_tracker import experiment_ids, local_store, prepare_environment

_WORKFLOW = "workflowType=machine_learning"  # without it the pages open on the trace dashboard


def server_command(storage: Path, host: str, port: int) -> list[str]:
    """The command line of a server with two processes instead of MLflow's fifteen."""
    uri, artifact_root = local_store(storage)
    options = {
        "--host": host,
        "--port": str(port),
        "--workers": "1",
        "--backend-store-uri": uri,
        "--artifacts-destination": artifact_root,
    }
    return [sys.executable, "-m", "mlflow", "server", *(text for pair in options.items() for text in pair)]


def page_url(storage: Path, host: str, port: int) -> str:
    """The page to open: the runs of the only experiment, else the list of experiments."""
    ids = experiment_ids(local_store(storage)[0])
    page = f"experiments/{ids[0]}/runs" if len(ids) == 1 else "experiments"
    return f"http://{host}:{port}/#/{page}?{_WORKFLOW}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tracking.ui", description="Show searches in the MLflow UI.")
    parser.add_argument("--storage", type=Path, required=True, help="the folder given to the search as --storage")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--host", default="127.0.0.1", help="there is no login: keep it local and use an SSH tunnel")
    options = parser.parse_args(arguments)
    database = options.storage / "mlflow" / "mlflow.db"
    if not database.is_file():
        return _complain(
            f"{database} is not there: expected the storage folder of a search; run `make search` first,"
            " or give that folder with --storage"
        )
    if reason := _why_taken(options.host, options.port):
        return _complain(f"cannot listen on {options.host}:{options.port} ({reason}): give another --port or --host")
    prepare_environment()
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    print(
        f"open {page_url(options.storage, options.host, options.port)} (in about 20 s; Ctrl-C ends it)",
        flush=True,
    )
    command = server_command(options.storage, options.host, options.port)
    return os.execv(command[0], command)


def _why_taken(host: str, port: int) -> str:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            return str(error)
    return ""


def _complain(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
