"""python -m search.confirm STUDY: train the front's members anew, with several seeds, and verify them on the test set.

The same command again goes on. Exit codes: 0 all runs are there; 2 something asked for is wrong, nothing was started;
3 runs keep failing; 130 stopped by Ctrl-C.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ccdist.checkpoint import CorruptCheckpointError
from ccdist.data import Dataset, final_dataset, load_dataset, load_test_set
from search.config import SearchConfig
from search.confirming.confirm_close import Closing
from search.confirming.confirm_estimate import Images, estimate
from search.confirming.confirm_report import FILES, terminal_table
from search.confirming.confirm_table import plan_table
from search.confirming.confirmation import (
    MOST_SEEDS,
    ConfirmationSpace,
    ConfirmationStudy,
    Member,
    check_is_search,
    chosen_members,
    members_of,
    num_seeds,
    planned,
    runs_left,
    with_target,
)
from search.confirming.confirmation_config import (
    TIMEOUT_S,
    ConfirmationConfig,
    ConfirmError,
    confirmation_config,
    with_settings,
)
from search.errors import UserError
from search.run import ADDRESS_HELP
from search.space import Space
from search.storage import DEFAULT_STORAGE, Storage, default_study_url
from search.studies.database import StudyError, without_password
from search.studies.records import StudyRecord
from search.studies.study_record import StoredStudy, load_stored, stored_config, stored_record
from search.tracked.bookkeeping import is_settled, tracked
from search.tracked.study_files import draw

OK, BAD_INPUT, FAILING, INTERRUPTED = 0, 2, 3, 130
DEFAULT_SEEDS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # a server that is away is nothing to tell: rows wait for it
    command = _command(sys.argv[1:] if arguments is None else arguments)
    console = Console()
    try:
        confirming = _Confirming(args, console, command)
        return confirming.show_plan() if args.dry_run else confirming.run()
    except (UserError, CorruptCheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:  # before or after Tune, which has a handler of its own
        print(f"stopped; go on with: {command}", file=sys.stderr)
        return INTERRUPTED


class _Confirming:
    """One command: what it is about, read and checked before anything is written.

    Raises:
        UserError: something asked for is wrong.
    """

    def __init__(self, args: argparse.Namespace, console: Console, command: str) -> None:
        self.console, self.command, self.address = console, command, args.address
        url = args.study_url or default_study_url(Path(args.storage or DEFAULT_STORAGE).resolve())
        self.searched = load_stored(url, args.study)
        check_is_search(self.searched.config)
        if args.seeds is not None and not 1 <= args.seeds <= MOST_SEEDS:
            raise ConfirmError(f"--seeds {args.seeds}: expected 1 to {MOST_SEEDS}")
        self.members = chosen_members(self.searched.record, args.members)
        self.config = _config(args, self.searched.config, url)
        self.storage = replace(Storage.of(self.config, args.storage), study_url=url)
        stored = stored_record(self.config, url)  # other options are refused here
        self.seeds = args.seeds or num_seeds(stored) or DEFAULT_SEEDS
        searched = _search_data(self.searched, self.config)
        self.dataset = _final_data(searched, self.config)
        self.images = Images(
            len(searched.train), len(searched.validation), len(self.dataset.train), len(self.dataset.validation)
        )

    def show_plan(self) -> int:
        """What would run and what it would cost."""
        stored = stored_record(self.config, self.storage.study_url)
        space = self._prepare(stored)
        if stored is not None and not runs_left(space.plan, stored):
            self._tell_complete(stored)
        return OK

    def run(self) -> int:
        """Bring the confirmation to all its runs."""
        storage = self.storage
        storage.prepare()
        with storage.only_driver(self.config.study_name) as lock:
            stored = stored_record(self.config, storage.study_url)
            space = self._prepare(stored)
            config, closing = self._targeted(space), self._closing(space)
            if stored is not None and not runs_left(space.plan, stored):
                return self._settle(config, closing, stored)
            if stored is not None:
                storage.check_unfinished(stored.name, [trial.key for trial in stored.unfinished])
            from search.execution import execute  # takes seconds, see there

            outcome = execute(
                config,
                space,
                storage,
                self.dataset,
                self.console,
                lock,
                study_type=ConfirmationStudy,
                close=closing.close,
                address=self.address,
            )
        self._show(outcome.record, closing)
        if outcome.where is not None:
            self.console.print(outcome.where, soft_wrap=True, highlight=False, markup=False)
        if outcome.stop_reason is not None:
            print(f"error: {outcome.stop_reason}", file=sys.stderr)
            return FAILING
        left = len(runs_left(space.plan, outcome.record))
        if left:
            done = f"{len(space.plan) - left} of {len(space.plan)} runs"
            text = f"stopped after {done}; go on with: {self.command}"
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)
            return INTERRUPTED
        return OK

    def _prepare(self, stored: StudyRecord | None) -> ConfirmationSpace:
        """The runs that are to be there, told with what those that are missing will cost."""
        plan = planned(self.members, self.seeds, stored)
        space, search_space = ConfirmationSpace(self.config, plan), Space(self.searched.config)
        left = runs_left(plan, stored)
        if not left:
            return space
        members = self._all_members(space)
        cost = estimate(
            members,
            left,
            self.searched.record,
            lambda pair: space.recipe(pair.params, 0),
            lambda trial: search_space.recipe(trial.params, trial.number),
            self.images,
        )
        self.console.print(plan_table(self.config, self.searched.record, members, plan, cost, self.images))
        return space

    def _all_members(self, space: ConfirmationSpace) -> tuple[Member, ...]:
        """Those that are asked for, and those of earlier commands."""
        return members_of(self.searched.record, [pair.configuration for pair in space.plan])

    def _targeted(self, space: ConfirmationSpace) -> ConfirmationConfig:
        return with_target(self.config, space.plan)

    def _closing(self, space: ConfirmationSpace) -> Closing:
        rungs = self.searched.config.verification.rungs
        return Closing(self.config, self.searched.record, self._all_members(space), rungs)

    def _settle(self, config: ConfirmationConfig, closing: Closing, stored: StudyRecord) -> int:
        """All runs are there: only what an interrupted driver left untold is told now."""
        if is_settled(config, self.storage):
            closing.write(stored, self.storage)
            draw(stored, self.storage.study_folder(stored.name))  # without tracking nobody knows whether it was
        else:
            with tracked(config, self.storage, live_keys=set()):
                closing.close(stored, self.storage, "FINISHED")
        self._tell_complete(stored)
        self._show(stored, closing)
        return OK

    def _tell_complete(self, stored: StudyRecord) -> None:
        text = f"confirmation {stored.name} has its {len(stored.done)} runs already"
        self.console.print(text, highlight=False, soft_wrap=True)

    def _show(self, record: StudyRecord, closing: Closing) -> None:
        self.console.print(terminal_table(closing.result(record, self.storage)))
        folder = self.storage.study_folder(record.name)
        self.console.print(f"{', '.join(FILES)} in {folder}", soft_wrap=True, highlight=False, markup=False)


def _command(arguments: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "search.confirm", *map(without_password, arguments)])


def _config(args: argparse.Namespace, searched: SearchConfig, url: str) -> ConfirmationConfig:
    """The confirmation that is asked for; options that are not given are those of the stored one, if there is one."""
    stored = _stored(url, args.name or f"{searched.study_name}-confirm")
    test_images, timeout_s = args.test_images, args.timeout
    if stored is not None:
        test_images = stored.confirmation.test_images if test_images is None else test_images
        timeout_s = stored.verification.branch_and_bound.timeout_s if timeout_s is None else timeout_s
    data = searched.data if args.data is None else searched.data.model_copy(update={"path": args.data})
    config = confirmation_config(
        searched.model_copy(update={"data": data}),
        name=args.name,
        test_images=test_images,
        timeout_s=TIMEOUT_S if timeout_s is None else timeout_s,
    )
    return with_settings(config, args.set)


def _stored(url: str, name: str) -> ConfirmationConfig | None:
    try:
        stored = stored_config(url, name)
    except (StudyError, KeyError):  # there is none, or the one that was begun has not even a configuration yet
        return None
    if not isinstance(stored, ConfirmationConfig):
        raise ConfirmError(f"study {name} exists and is no confirmation; choose another --name")
    return stored


def _search_data(searched: StoredStudy, config: ConfirmationConfig) -> Dataset:
    """The images of the search, after checking that they are what they were."""
    try:
        dataset = load_dataset(config.data)
    except ValueError as error:
        raise ConfirmError(" ".join(str(error).split())) from error
    if dataset.fingerprint != searched.data_fingerprint:
        raise ConfirmError(
            f"study {searched.record.name} was made from other images than those of {config.data.name} now; give the "
            "folder of those images with --data DIR"
        )
    return dataset


def _final_data(searched: Dataset, config: ConfirmationConfig) -> Dataset:
    try:
        return final_dataset(searched, load_test_set(config.data, config.confirmation.test_images))
    except ValueError as error:
        raise ConfirmError(" ".join(str(error).split())) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m search.confirm",
        description="Train the members of a study's front anew on training and validation images, with several seeds, "
        "and verify them on the test set. The same command again goes on; more seeds or members extend it.",
    )
    parser.add_argument("study", metavar="STUDY", help="the study's name, as search.run prints it")
    parser.add_argument("--storage", metavar="DIR", help=f"the search's storage folder (default: {DEFAULT_STORAGE})")
    parser.add_argument("--study-url", metavar="URL", help="the study's database, when it is not in that folder")
    parser.add_argument(
        "--seeds",
        metavar="N",
        type=int,
        help=f"runs of each member (default: {DEFAULT_SEEDS}, or as many as there are)",
    )
    parser.add_argument(
        "--members", metavar="TRIAL", nargs="+", default=[], help="numbers or keys of trials instead of the front"
    )
    parser.add_argument("--test-images", metavar="N", type=int, help="the first so many test images (default: all)")
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=float,
        help=f"seconds of branch and bound for an image (default: {TIMEOUT_S:g})",
    )
    parser.add_argument("--data", metavar="DIR", help="the folder of the images, when it is another one now")
    parser.add_argument("--name", metavar="NAME", help="the confirmation's name (default: STUDY-confirm)")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change resources or tracking of the space file, for example --set resources.gpu=1",
    )
    parser.add_argument("--address", metavar="ADDRESS", help=ADDRESS_HELP)
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run, with its hours; start and write nothing"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
