"""python -m search.fetch MODEL DIR: a model's weights and architecture from MLflow, as this project stores networks.

MODEL is `models:/NAME@ALIAS` or `models:/NAME/VERSION` of the registry, or the key of a trial. DIR is what
`ccdist.checkpoint.load` and `python -m ccdist.verify` read: the network exactly as it was verified.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from search.errors import UserError
from search.storage import DEFAULT_STORAGE

OK, BAD_INPUT = 0, 2


class FetchError(UserError):
    """The model cannot be fetched."""


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        title = fetch(args.model, Path(args.directory), args.storage, args.tracking_uri)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(f"{args.directory}: {title}; python -m ccdist.verify {args.directory} verifies it again")
    return OK


def fetch(model: str, directory: Path, storage: str | None, tracking_uri: str | None) -> str:
    """Write the model's files into a folder, which holds all of them afterwards or is as it was; returns its title.

    Args:
        directory: absent or empty.
        storage: folder of a local store; None: the tracking URI, MLflow's own variable, or the default folder.

    Raises:
        FetchError: whatever is wrong, in one line.
    """
    from tracking.download import download, find, store_uri

    _check_free(directory)
    with _told(model):
        uri = None if storage else tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        found = find(uri or store_uri(Path(storage or DEFAULT_STORAGE)), model)
    with _staged(directory) as staging:
        with _told(model):
            download(found, staging)
        _check_network(staging, found.title)
    return found.title


@contextmanager
def _told(model: str) -> Iterator[None]:
    """Whatever MLflow raises becomes one line: it has as many kinds of error as it has stores."""
    from tracking.address import AddressError
    from tracking.download import NoSuchModelError
    from tracking.sender import why

    try:
        yield
    except (NoSuchModelError, AddressError) as error:
        raise FetchError(str(error)) from error
    except Exception as error:
        raise FetchError(f"MLflow does not give {model}: {why(error)}") from error


@contextmanager
def _staged(directory: Path) -> Iterator[Path]:
    """A folder beside the one that is asked for, which takes its place when all went well.

    Raises:
        FetchError: it cannot be made or moved.
    """
    staging: Path | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        yield staging
        staging.chmod(0o755)  # as a folder made by hand; a temporary one is closed to others
        os.rename(staging, directory)
    except OSError as error:
        raise FetchError(f"{directory} cannot be written ({error.strerror}); choose another folder") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _check_free(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FetchError(f"{directory} is not an empty folder; delete it, or choose another")


def _check_network(folder: Path, title: str) -> None:
    from ccdist import checkpoint

    try:
        checkpoint.load(folder)
    except checkpoint.CorruptCheckpointError as error:
        reason = str(error).replace(f"{folder}/", "").replace(str(folder), "it")
        raise FetchError(f"{title} is no network of this project: {reason}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m search.fetch", description="Write a model's weights and architecture into a folder."
    )
    parser.add_argument("model", metavar="MODEL", help="models:/NAME@ALIAS, models:/NAME/VERSION or a trial's key")
    parser.add_argument("directory", metavar="DIR", help="a folder that is empty or not there yet")
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--storage", metavar="DIR", help=f"the search's storage folder (default: {DEFAULT_STORAGE}), with its own store"
    )
    place.add_argument(
        "--tracking-uri", metavar="URI", help="where else the models are, e.g. http://host:5000 (MLFLOW_TRACKING_URI)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
