"""Send what a search recorded and its tracking server has not got, at any later time.

    python -m tracking.replay STORAGE [--study NAME] [--tracking-uri URI] [--from-start]

Exit code: 0 nothing is left, 1 rows are left, 2 wrong input.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tracking.address import Address, AddressError
from tracking.journal import STUDY_FILE, load_study_info
from tracking.mlflow_tracker import MlflowTracker, local_store
from tracking.sender import Delivery, forget_sent, why
from tracking.tracker import NEEDS_A_PERSON, NullTracker


@dataclass(frozen=True)
class Outcome:
    """What became of one study's rows."""

    sent: int
    left: int
    reason: str


def journals_of(storage: Path) -> dict[str, Path]:
    """Name of study -> its journal folder, for each study of a storage folder; a comparison is `comparisons/NAME`."""
    artifacts = storage / "artifacts"
    found = [*artifacts.glob(f"*/journal/{STUDY_FILE}"), *artifacts.glob(f"comparisons/*/journal/{STUDY_FILE}")]
    return {path.parents[1].relative_to(artifacts).as_posix(): path.parent for path in sorted(found)}


def replay(journals: Path, uri: str, artifact_root: str | None, *, from_start: bool = False) -> Outcome:
    """Send the rows of one study that wait; again and again gives the same runs."""
    if from_start:
        forget_sent(journals)
    waiting = left = _rows_left(journals)
    reason = ""
    if waiting:
        try:
            delivery = Delivery(journals, MlflowTracker(uri, artifact_root), resume=False)
            left = _sent_while_it_helps(delivery)
        except Exception as error:  # whatever the server's trouble is, the rows stay and are counted
            reason = str(error) if isinstance(error, NEEDS_A_PERSON) else why(error)
            left = _rows_left(journals)
    return Outcome(sent=waiting - left, left=left, reason=reason)


def _sent_while_it_helps(delivery: Delivery) -> int:
    """The rows that are left. A pass ends at journals that fail one after the other, and the next begins behind them.

    Raises: as `Delivery.send`, once nothing more can be sent.
    """
    while True:
        left = delivery.rows_left()
        try:
            delivery.send()
            return delivery.rows_left()
        except Exception:
            if delivery.rows_left() >= left:
                raise


def _rows_left(journals: Path) -> int:
    return Delivery(journals, NullTracker()).rows_left()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tracking.replay", description="Send recorded rows to MLflow.")
    parser.add_argument("storage", type=Path, help="the folder given to the search as --storage")
    parser.add_argument("--study", help="only this study; default: all")
    parser.add_argument("--tracking-uri", help="default: where the search logged")
    parser.add_argument("--from-start", action="store_true", help="send every row again, e.g. to a new server")
    options = parser.parse_args(arguments)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it would announce every repeated request
    try:
        Address.of(options.tracking_uri or "")
    except AddressError as error:
        return _complain(f"--tracking-uri {error}")
    found = journals_of(options.storage)
    if not found:
        return _complain(
            f"{options.storage} holds no recorded study (artifacts/NAME/journal/{STUDY_FILE}):"
            " expected the folder of a search; give the one that was its --storage"
        )
    if options.study is not None and options.study not in found:
        return _complain(f"no study {options.study!r} in {options.storage}: give --study one of {', '.join(found)}")
    names = [options.study] if options.study is not None else list(found)
    outcomes = []
    for name in names:
        try:
            recorded_uri = load_study_info(found[name]).tracking_uri
        except ValueError as error:
            return _complain(f"{error}; restore that file or give another --study")
        uri = options.tracking_uri or recorded_uri
        store = (uri, None) if uri else local_store(options.storage)
        outcome = replay(found[name], *store, from_start=options.from_start)
        because = f" ({outcome.reason})" if outcome.reason else ""
        print(f"{name}: {outcome.sent} rows sent, {outcome.left} left{because}")
        outcomes.append(outcome)
    return 1 if any(outcome.left for outcome in outcomes) else 0


def _complain(message: str) -> int:
    print(message.replace("\n", " "), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
