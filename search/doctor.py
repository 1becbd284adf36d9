"""python -m search.doctor STUDY: compares a study with its files, journals and MLflow runs, and repairs those.

    python -m search.doctor --cluster SPACE     looks at the cluster that a search would run on, before it starts

Exit codes: 0 all is well, or was repaired; 1 something is left; 2 there is no such study, space or cluster; 130 stopped
by Ctrl-C.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from ccdist.checkpoint import CorruptCheckpointError
from search.artifacts.locks import LockedError
from search.artifacts.mirror import whole
from search.config import find_space_file, load_search_config
from search.errors import UserError, check_seconds
from search.space import Space
from search.storage import DEFAULT_STORAGE, Storage, place_of
from search.studies.checkup import Checkup, check_database
from search.studies.consistency import Finding
from search.studies.database import StudyError, missing_file, sqlite_file
from search.studies.records import StudyRecord
from search.study import load_record

OK, LEFT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
# Of the measurement of a trial on a node.
CLUSTER_SECONDS = 120.0
# A repair may show what was hidden before: rows that were not sent hide what else the runs lack.
_ROUNDS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        if args.cluster:
            return examine_cluster(args)
        _refuse_options(args, ("set", "address"), "belongs to --cluster")
        storage, study = place_of(args.study, args.storage, args.study_url, args.artifacts)
        return examine(storage, study, repair=args.repair, mlflow=not args.no_mlflow)
    except (UserError, CorruptCheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED


def examine(storage: Storage, study: str, *, repair: bool, mlflow: bool = True) -> int:
    """Look, repair if asked to, look again, and say what was found.

    Returns:
        The exit code.

    Raises:
        UserError, CorruptCheckpointError: there is no such study, or its artefacts cannot be read.
    """
    if (missing := missing_file(storage.study_url)) is not None:
        raise StudyError(f"there is no study database {missing}; name its --storage, or its --study-url")
    database = sqlite_file(storage.study_url)
    if database is not None:
        damage = check_database(database)
        if damage:
            return _tell(study, damage, [])
    if repair and storage.artifacts_uri is not None:
        raise StudyError(
            f"the artefacts of {study} are in {storage.artifacts_uri}, where nothing is repaired yet; look without "
            "--repair, and run search.run again: it writes anew what a trial lacks"
        )
    record = partial(load_record, storage.study_url, study)
    print(_summary(record()))
    with ExitStack() as stack:
        driver = None
        try:
            stack.enter_context(storage.only_driver(study))  # none starts meanwhile
        except LockedError as error:
            driver = str(error)
            storage.pull(study, whole)
        else:
            storage.pull(study, whole)
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


def examine_cluster(args: argparse.Namespace) -> int:
    """Look at the cluster, and say what was found; nothing is repaired.

    Raises:
        UserError: the space file is wrong, or the cluster cannot be used.
    """
    _refuse_options(args, ("repair", "no_mlflow", "study_url", "artifacts"), "is not for --cluster")
    check_seconds(args.seconds)
    config = load_search_config(find_space_file(args.study), args.set)
    space, storage = Space(config), Storage.asked_for(config, args.storage, args.set)
    from search.clusters.cluster_checkup import examine_cluster as look  # Ray: seconds to import

    examined = look(config, space, storage, address=args.address, seconds=args.seconds)
    _print(examined.findings)
    print(examined.summary)
    return LEFT if any(not finding.fine for finding in examined.findings) else OK


def _refuse_options(args: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    for name in names:
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} {reason}; leave one of them out")


def _tell(study: str, found: Sequence[Finding], repaired: Sequence[Finding]) -> int:
    for finding in repaired:
        print(f"repaired  {finding.subject}: {finding.text}")
    _print(found)
    num_left = sum(not finding.fine for finding in found)
    print(f"study {study}: {f'findings left: {num_left}' if num_left else 'all is well'}")
    return LEFT if num_left else OK


def _print(found: Sequence[Finding]) -> None:
    for finding in sorted(found, key=lambda each: not each.fine):
        advice = f" ({finding.repair.value})" if finding.repair else ""
        print(f"{'fine  ' if finding.fine else 'broken'}    {finding.subject}: {finding.text}{advice}")


def _summary(record: StudyRecord) -> str:
    states = Counter(trial.state for trial in record.trials)
    told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return f"study {record.name}: {len(record.trials)} trials ({told})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m search.doctor",
        description="Compare a study with its files, journals and MLflow runs. The study's database is never changed. "
        "With --cluster: look at the nodes that a search would run on.",
    )
    parser.add_argument("study", metavar="STUDY", help="the study's name, as search.run prints it, or its space file")
    parser.add_argument("--storage", metavar="DIR", help=f"the search's storage folder (default: {DEFAULT_STORAGE})")
    parser.add_argument("--study-url", metavar="URL", help="the study's database, when it is not in that folder")
    parser.add_argument("--artifacts", metavar="PLACE", help="folder or address of the artefacts, if not there")
    parser.add_argument("--repair", action="store_true", help="write anew what differs from the study")
    parser.add_argument("--no-mlflow", action="store_true", help="do not look at MLflow")
    cluster = parser.add_argument_group("before a search")
    cluster.add_argument(
        "--cluster", action="store_true", help="STUDY is a space file: look at the cluster that it would run on"
    )
    cluster.add_argument("--address", metavar="ADDRESS", help="of the cluster; as for search.run")
    cluster.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="as for search.run")
    cluster.add_argument(
        "--seconds",
        metavar="S",
        type=float,
        default=CLUSTER_SECONDS,
        help=f"limit of measuring a trial on a node (default: {CLUSTER_SECONDS:g})",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
