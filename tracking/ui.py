"""The MLflow pages of a storage folder, on this machine only.

python -m tracking.ui [--storage DIR] [--study NAME] [--port 5000] [--host 127.0.0.1]

Prints a link to the front of the study that changed last, and one for each other study, before the server starts.
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from tracking.mlflow_tracker import local_store, open_client, prepare_environment
from tracking.views import WORKFLOW, StudyPage, study_pages


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


def stored_pages(storage: Path) -> list[StudyPage]:
    """The pages of all studies of a storage folder, the one that changed last first."""
    return study_pages(open_client(local_store(storage)[0]))


def chosen(pages: Sequence[StudyPage], study: str | None) -> list[StudyPage]:
    """The pages with the one to open first: of the study that is asked for, else of the latest one with a front.

    Raises:
        ValueError: there is no such study.
    """
    if study is not None and study not in {page.name for page in pages}:
        names = ", ".join(sorted({page.name for page in pages})) or "none"
        raise ValueError(f"there is no study {study!r}: give --study one of {names}")
    wanted = [page for page in pages if (page.kind == "study" if study is None else page.name == study)]
    return [*wanted[:1], *(page for page in pages if page not in wanted[:1])]


def welcome(pages: Sequence[StudyPage], address: str) -> str:
    """What to open, as text: the first page, and a line for each other one."""
    first = pages[0].page if pages else f"#/experiments?{WORKFLOW}"
    lines = [f"open {address}/{first} (in about 20 s; Ctrl-C ends it)"]
    width = max((len(_label(page)) for page in pages), default=0)
    lines += [f"  {_label(page):{width}}  {address}/{page.page}" for page in pages[1:]]
    return "\n".join(lines)


def _label(page: StudyPage) -> str:
    kind = "" if page.kind == "study" else f"{page.kind}, "
    return f"{page.name} ({kind}{page.experiment})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tracking.ui", description="Show searches in the MLflow UI.")
    parser.add_argument(
        "--storage", type=Path, default=Path("runs"), help="the folder given to the search as --storage (default: runs)"
    )
    parser.add_argument("--study", metavar="NAME", help="the study to open (default: the one that changed last)")
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
    try:
        pages = chosen(stored_pages(options.storage), options.study)
    except ValueError as error:
        return _complain(str(error))
    print(welcome(pages, f"http://{options.host}:{options.port}"), flush=True)
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
