"""python -m search.front STUDY: the front as a table and an HTML report, from what is stored, at any time."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from search.config import SpaceFileError, load_search_config
from search.page import write_report
from search.report import front_json, front_table
from search.storage import DEFAULT_STORAGE, StorageError, default_study_url
from search.study import StudyError, load_record


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    folder = Path(args.storage).resolve()
    try:
        name = _study_name(args.study)
        record = load_record(args.study_url or default_study_url(folder), name)
        report = folder / "artifacts" / name / "report.html"
        try:
            report.parent.mkdir(parents=True, exist_ok=True)
            write_report(record, report)
        except OSError as error:
            raise StorageError(f"report {report} cannot be written ({error.strerror})") from error
    except (StudyError, StorageError, SpaceFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(front_json(record), indent=1, allow_nan=False))
    else:
        console = Console()
        console.print(front_table(record))
        console.print(f"report: {report}", soft_wrap=True, highlight=False)
    return 0


def _study_name(text: str) -> str:
    """A study's name, or that of the study of a space file."""
    path = Path(text)
    return load_search_config(path).study_name if path.suffix in (".yaml", ".yml") and path.is_file() else text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m search.front", description=__doc__)
    parser.add_argument("study", metavar="STUDY", help="the study's name, as search.run prints it, or its space file")
    parser.add_argument("--storage", metavar="DIR", default=DEFAULT_STORAGE, help="the search's storage folder")
    parser.add_argument("--study-url", metavar="URL", help="the study's database, when it is not in that folder")
    parser.add_argument("--json", action="store_true", help="print the front and all trials as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
