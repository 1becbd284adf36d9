"""python -m search.run SPACE: run a search, or go on with it.

Exit codes: 0 the study has all its trials, or was handed over (--detach); 2 something asked for is wrong, nothing was
started; 3 trials keep failing; 130 stopped by Ctrl-C.
"""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ccdist.checkpoint import CorruptCheckpointError
from search.config import SearchConfig, find_space_file, load_search_config
from search.errors import UserError
from search.plan import show_plan
from search.results.page import write_report
from search.results.report import front_table
from search.sharing.probe import searched_data
from search.space import Space
from search.storage import DEFAULT_STORAGE, Storage
from search.studies.database import without_password
from search.studies.records import StudyRecord
from search.study import stored_record
from search.tracked.bookkeeping import close_study, is_settled, tracked
from tracking.address import shown

OK, BAD_INPUT, FAILING, INTERRUPTED = 0, 2, 3, 130
# Holds what to type to go on with a search that another command has handed over.
GO_ON = "CCDIST_GO_ON"
ADDRESS_HELP = (
    "the Ray cluster: auto (the one that ray start left running here), HOST:PORT of its head, or local (a new one); "
    "default: RAY_ADDRESS, else auto or local"
)


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # a server that is away is nothing to tell: rows wait for it
    settings = args.set if args.trials is None else [*args.set, f"budget.trials={args.trials}"]
    try:
        file = find_space_file(args.space)
        config = load_search_config(file, settings)
        space = Space(config)
        storage = Storage.asked_for(config, args.storage, args.set)
        if args.detach:
            return _detach(config, file, args)
        if args.dry_run:
            return _show_plan(config, space, storage, Console())
        return run(config, space, storage, Console(), command=_command(args), address=args.address)
    except (UserError, CorruptCheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:  # before or after Tune, which has a handler of its own
        print(f"stopped; go on with: {_command(args)}", file=sys.stderr)
        return INTERRUPTED


def run(
    config: SearchConfig,
    space: Space,
    storage: Storage,
    console: Console,
    *,
    command: str,
    address: str | None = None,
) -> int:
    """Bring the study to its number of trials.

    Args:
        command: what to type to go on, if this is stopped.
        address: of the Ray cluster, as in search.clusters.addresses.

    Returns:
        The exit code.

    Raises:
        UserError, CorruptCheckpointError: something asked for is wrong; nothing was started.
    """
    storage.prepare()
    with storage.only_driver(config.study_name) as lock:
        record = stored_record(config, storage.study_url)
        if record is not None and len(record.done) >= config.budget.trials and not record.unfinished:
            return _settle(record, config, storage, console)
        if record is not None:
            storage.check_unfinished(record.name, [trial.key for trial in record.unfinished])
        dataset = searched_data(config)
        from search.execution import execute  # takes seconds, see there

        outcome = execute(config, space, storage, dataset, console, lock, address=address)
    record = outcome.record
    _show(record, storage, console)
    if outcome.where is not None:
        console.print(outcome.where, soft_wrap=True, highlight=False)
    if outcome.stop_reason is not None:
        print(f"error: {outcome.stop_reason}", file=sys.stderr)
        return FAILING
    done = f"{len(record.done)} of {config.budget.trials} trials"
    if outcome.budget_reason is not None:
        go_on = "" if len(record.done) >= config.budget.trials else f"; go on with: {command}"
        console.print(f"{outcome.budget_reason}, after {done}{go_on}", soft_wrap=True, highlight=False)
    elif len(record.done) < config.budget.trials:
        console.print(f"stopped after {done}; go on with: {command}", soft_wrap=True, highlight=False)
        return INTERRUPTED
    return OK


def _show_plan(config: SearchConfig, space: Space, storage: Storage, console: Console) -> int:
    """--dry-run."""
    show_plan(config, space, storage, searched_data(config), stored_record(config, storage.study_url), console)
    return OK


def _settle(record: StudyRecord, config: SearchConfig, storage: Storage, console: Console) -> int:
    """A study that has all its trials: only what an interrupted driver left untold is told now."""
    if not is_settled(config, storage):
        with tracked(config, storage, live_keys=set()):
            close_study(record, storage, "FINISHED")
    write_report(record, storage.study_folder(record.name) / "report.html")
    console.print(f"study {record.name} has its {len(record.done)} trials already", highlight=False)
    _show(record, storage, console)
    return OK


def _show(record: StudyRecord, storage: Storage, console: Console) -> None:
    console.print(front_table(record))
    console.print(f"report: {storage.study_folder(record.name) / 'report.html'}", soft_wrap=True, highlight=False)


def _detach(config: SearchConfig, file: Path, args: argparse.Namespace) -> int:
    """--detach."""
    from search.clusters.detached import detach  # Ray takes seconds to import

    detach(config, file, _options(args), {GO_ON: _command(args)}, args.address)
    return OK


def _command(args: argparse.Namespace) -> str:
    """What to type to go on."""
    address = ["--address", shown(args.address)] if args.address else []
    detached = ["--detach"] if args.detach else []
    words = ["python", "-m", "search.run", args.space, *map(without_password, _options(args)), *address, *detached]
    return os.environ.get(GO_ON) or shlex.join(words)


def _options(args: argparse.Namespace) -> list[str]:
    """What was asked for, but for where it runs."""
    words = ["--storage", args.storage] if args.storage else []
    words += ["--trials", str(args.trials)] if args.trials is not None else []
    return words + [word for setting in args.set for word in ("--set", setting)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m search.run",
        description="Search for networks that trade standard against certified accuracy. "
        "The same command again goes on with the study.",
    )
    parser.add_argument("space", metavar="SPACE", help="a space file, or the name of a shipped one: digits, cifar, ...")
    parser.add_argument(
        "--storage", metavar="DIR", help=f"where study, artefacts and MLflow store go (default: {DEFAULT_STORAGE})"
    )
    parser.add_argument("--trials", metavar="N", type=int, help="finished trials to reach, instead of the file's")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change a value of the space file, for example --set student.epochs=10",
    )
    parser.add_argument("--address", metavar="ADDRESS", help=ADDRESS_HELP)
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--detach",
        action="store_true",
        help="hand the search over to the head of the cluster (--address http://HEAD:8265 or auto) and return; paths "
        "are then the head's, relative ones in the home folder there",
    )
    how.add_argument(
        "--dry-run", action="store_true", help="print the plan with its hours and disk space; start and write nothing"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
