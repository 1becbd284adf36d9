"""Send what a search recorded and its tracking server has not got, at any later time.

    python -m tracking.replay STORAGE [--study NAME] [--tracking-uri URI] [--from-start]

Exit code: 0 nothing is left, 1 rows are left, 2 wrong input.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tracking.journal import STUDY_FILE, load_study_info
from tracking.mlflow_tracker import MlflowTracker, local_store
from tracking.sender import Delivery, forget_sent


@dataclass(frozen=True)
class Outcome:
    """What became of one study's rows."""

    sent: int
    left: int
    reason: str


def journals_of(storage: Path) -> dict[str, Path]:
    """Name of study -> its journal folder, for each study of a storage folder."""
    return {path.parents[1].name: path.parent for path in sorted(storage.glob(f"artifacts/*/journal/{STUDY_FILE}"))}


def replay(journals: Path, uri: str, artifact_root: str | None, *, from_start: bool = False) -> Outcome:
    """Send the rows of one study that wait; again and again gives the same runs."""
    if from_start:
        forget_sent(journals)
    delivery = Delivery(journals, MlflowTracker(uri, artifact_root), resume=False)
    waiting = delivery.rows_left()
    reason = ""
    if waiting:
        try:
            delivery.send()
        except Exception as error:  # whatever the server's trouble is, the rows stay and are counted
            reason = f"{type(error).__name__}: {error}"
    left = delivery.rows_left()
    return Outcome(sent=waiting - left, left=left, reason=reason)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tracking.replay", description="Send recorded rows to MLflow.")
    parser.add_argument("storage", type=Path, help="the folder given to the search as --storage")
    parser.add_argument("--study", help="only this study; default: all")
    parser.add_argument("--tracking-uri", help="default: where the search logged")
    parser.add_argument("--from-start", action="store_true", help="send every row again, e.g. to a new server")
    options = parser.parse_args(arguments)
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
