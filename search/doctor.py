"""python -m search.doctor STUDY: compares a study with its files, journals and MLflow runs, and repairs those.

Exit codes: 0 all is well, or was repaired; 1 something is left; 2 there is no such study.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from search.checkup import Checkup, check_database
from search.config import load_search_config
from search.consistency import Finding
from search.database import StudyError, sqlite_file
from search.errors import UserError
from search.locks import LockedError
from search.records import StudyRecord
from search.storage import DEFAULT_STORAGE, Storage, default_study_url
from search.study import load_record

OK, LEFT, BAD_INPUT = 0, 1, 2
# A repair may show what was hidden before: rows that were not sent hide what else the runs lack.
_ROUNDS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        return examine(*_place(args), repair=args.repair, mlflow=not args.no_mlflow)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def examine(storage: Storage, study: str, *, repair: bool, mlflow: bool = True) -> int:
    """Look, repair if asked to, look again, and say what was found.

    Returns:
        The exit code.

    Raises:
        UserError: there is no such study.
    """
    database = sqlite_file(storage.study_url)
    if database is not None:
        if not database.is_file():
            raise StudyError(f"there is no study database {database}; name its --storage, or its --study-url")
        damage = check_database(database)
        if damage:
            return _tell(study, damage, [])
    record = partial(load_record, storage.study_url, study)
    print(_summary(record()))
    with ExitStack() as stack:
        driver = None
        try:
            stack.enter_context(storage.only_driver(study))  # none starts meanwhile
        except LockedError as error:
            driver = str(error)
        checkup = Checkup(storage, study, record, live=driver is not None, mlflow=mlflow)
        before = checkup.findings()
        if driver is not None:
            print(
                f"fine      a driver is at work ({driver}): journals and MLflow are not looked at, nothing is repaired"
            )
            return _tell(study, before, [])
        found = before
        for _ in range(_ROUNDS if repair else 0):
            if all(finding.repair is None for finding in found):
                break
            checkup.repair(found)
            found = checkup.findings()
        left = {finding.identity for finding in found}
        return _tell(study, found, [finding for finding in before if finding.identity not in left])


def _tell(study: str, found: Sequence[Finding], repaired: Sequence[Finding]) -> int:
    for finding in repaired:
        print(f"repaired  {finding.subject}: {finding.text}")
    for finding in sorted(found, key=lambda each: not each.fine):
        advice = f" ({finding.repair.value})" if finding.repair else ""
        print(f"{'fine  ' if finding.fine else 'broken'}    {finding.subject}: {finding.text}{advice}")
    num_left = sum(not finding.fine for finding in found)
    print(f"study {study}: {f'findings left: {num_left}' if num_left else 'all is well'}")
    return LEFT if num_left else OK


def _summary(record: StudyRecord) -> str:
    states = Counter(trial.state for trial in record.trials)
    told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return f"study {record.name}: {len(record.trials)} trials ({told})"


def _place(args: argparse.Namespace) -> tuple[Storage, str]:
    """The storage and the study's name, from a space file or from a name and folders."""
    path = Path(args.study)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        config = load_search_config(path)
        return Storage.of(config, args.storage), config.study_name
    folder = Path(args.storage or DEFAULT_STORAGE).resolve()
    artifacts = Path(args.artifacts).resolve() if args.artifacts else folder / "artifacts"
    return Storage(folder, args.study_url or default_study_url(folder), artifacts, None), args.study


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m search.doctor",
        description="Compare a study with its files, journals and MLflow runs. The study's database is never changed.",
    )
    parser.add_argument("study", metavar="STUDY", help="the study's name, as search.run prints it, or its space file")
    parser.add_argument("--storage", metavar="DIR", help=f"the search's storage folder (default: {DEFAULT_STORAGE})")
    parser.add_argument("--study-url", metavar="URL", help="the study's database, when it is not in that folder")
    parser.add_argument("--artifacts", metavar="DIR", help="the artefacts, when they are not in that folder")
    parser.add_argument("--repair", action="store_true", help="write anew what differs from the study")
    parser.add_argument("--no-mlflow", action="store_true", help="do not look at MLflow")
    return parser


if __name__ == "__main__":
    sys.exit(main())
