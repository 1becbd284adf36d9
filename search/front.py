"""python -m search.front STUDY: the front as a table and an HTML report, from what is stored, at any time.

With --from-verdicts the front is counted anew from the proofs of single images, and compared with what the study says.
Exit codes: 0; 1 the verdicts say otherwise than the study, or some are missing; 2 there is no such study; 130 stopped
by Ctrl-C.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ccdist.checkpoint import CorruptCheckpointError
from search.artifacts.mirror import verdicts
from search.errors import UserError
from search.results.report import SHOWN_MEMBERS, front_json, front_table
from search.storage import DEFAULT_STORAGE, StorageError, place_of
from search.studies.records import StudyRecord
from search.study import load_record

OK, DIFFERENT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        if args.address:
            from search.clusters.detached import front_there  # Ray takes seconds to import

            return front_there(args)
        storage, name = place_of(args.study, args.storage, args.study_url, args.artifacts)
        record = load_record(storage.study_url, name)
        if args.from_verdicts:
            storage.pull(name, verdicts)
            return _from_verdicts(record, storage.artifacts, args)
        report = _written_report(record, storage.study_folder(name))
    except (UserError, CorruptCheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    _show(record, args)
    if not args.json:
        Console().print(f"report: {report}", soft_wrap=True, highlight=False)
    return OK


def _written_report(record: StudyRecord, folder: Path) -> Path:
    from search.results.page import write_report  # plotly takes its time to import

    report = folder / "report.html"
    try:
        write_report(record, report)
    except OSError as error:
        raise StorageError(f"report {report} cannot be written ({error.strerror})") from error
    return report


def _from_verdicts(study: StudyRecord, artifacts: Path, args: argparse.Namespace) -> int:
    """Show the front of the verdicts, and say whether it is that of the study."""
    from search.results.verdict_fronts import front_from_verdicts

    found = front_from_verdicts(study, artifacts)
    _show(found.record, args)
    told = sys.stderr if args.json else sys.stdout
    for difference in found.differences:
        print(f"{difference.key}: {difference.text}", file=told)
    if found.differences:
        return DIFFERENT
    text = "no trial has a result yet"
    if found.num_counted:
        trials = f"{found.num_counted:,} trial{'' if found.num_counted == 1 else 's'}"
        images = f"{found.record.num_images:,} images each"
        text = f"front and accuracies counted from those of {trials}, {images}, are the study's"
    print(f"verdicts: {text}", file=told)
    return OK


def _show(record: StudyRecord, args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(front_json(record), indent=1, allow_nan=False))
    else:
        Console().print(front_table(record, None if args.all else SHOWN_MEMBERS))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m search.front", description=__doc__.split("\n")[0])
    parser.add_argument("study", metavar="STUDY", help="the study's name, as search.run prints it, or its space file")
    parser.add_argument("--storage", metavar="DIR", help=f"the search's storage folder (default: {DEFAULT_STORAGE})")
    parser.add_argument("--study-url", metavar="URL", help="the study's database, when it is not in that folder")
    parser.add_argument("--artifacts", metavar="PLACE", help="folder or address of the artefacts, if not there")
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help="read the study on the head of that Ray cluster (http://HEAD:8265, or auto); paths are then the head's",
    )
    parser.add_argument("--json", action="store_true", help="print the front and all trials as JSON")
    parser.add_argument(
        "--all", action="store_true", help=f"list the whole front, also when it has more than {SHOWN_MEMBERS} members"
    )
    parser.add_argument(
        "--from-verdicts",
        action="store_true",
        help="count the front anew from each trial's verdicts.parquet, and compare it with the study",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
