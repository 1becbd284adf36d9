"""python -m search.rerun STUDY TRIAL: run one trial of a study once more, from nothing, and compare.

Exit codes: 0 the result is the stored one; 1 it differs; 2 something asked for is wrong, nothing was started.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from ccdist.data import load_dataset
from search.config import SearchConfig, StoppingConfig
from search.errors import UserError
from search.space import Space
from search.storage import DEFAULT_STORAGE, default_study_url
from search.studies.records import RungValues, StudyRecord, TrialRecord, TrialResult
from search.studies.study_record import load_record, stored_config
from search.trial import TrialPlaces, TrialTask, run_trial

SAME, DIFFERENT, BAD_INPUT = 0, 1, 2


class RerunError(UserError):
    """The trial cannot be run again; the text says what to do."""


class _Shown:
    """Reports of a trial, on the terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def advanced(self, phase: str, done: int, of: int) -> None:
        self._console.print(f"{phase} {done}/{of}", highlight=False)

    def rung(self, name: str, values: RungValues) -> None: ...

    def verifying(self, result: TrialResult, phase: str, done: int, of: int) -> None:
        self._console.print(f"{phase}: {done}/{of} images decided", highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    url = args.study_url or default_study_url(Path(args.storage).resolve())
    try:
        record, config = load_record(url, args.study), stored_config(url, args.study)
        if args.data is not None:
            config = config.model_copy(update={"data": config.data.model_copy(update={"path": args.data})})
        if config.kind != "study":
            raise RerunError(
                f"{args.study} is a confirmation; search.confirm runs its trials again under another --name"
            )
        trial = chosen_trial(record, args.trial)
        out = Path(args.out or f"reruns/{trial.key}").resolve()
        if out.exists() and any(out.iterdir()):
            raise RerunError(f"{out} is not empty; a re-run starts from nothing: delete it, or choose another --out")
        return rerun(config, trial, out, Console())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def chosen_trial(record: StudyRecord, name: str) -> TrialRecord:
    """The trial of a number or key.

    Raises:
        RerunError: there is none, or it has no parameters.
    """
    for trial in record.trials:
        if name in (trial.key, str(trial.number)):
            if not trial.params:
                raise RerunError(
                    f"trial {trial.key} is {trial.state} and has no parameters yet; there is nothing to run"
                )
            return trial
    numbers = f"0 to {len(record.trials) - 1}" if record.trials else "none"
    raise RerunError(f"study {record.name} has no trial {name!r}; its trials are {numbers}")


def rerun(config: SearchConfig, trial: TrialRecord, out: Path, console: Console) -> int:
    """Train and verify a trial's recipe, its teacher included, and print both results."""
    torch.set_num_threads(max(1, int(config.resources.cpu)))
    device = torch.device("cuda" if config.resources.gpu and torch.cuda.is_available() else "cpu")
    try:
        dataset = load_dataset(config.data)
    except ValueError as error:
        raise RerunError(" ".join(str(error).split())) from error
    recipe = Space(config).recipe(trial.params, trial.number)
    # Nothing stops a re-run: it is to find out what the whole recipe gives.
    stopping = StoppingConfig(verification=False, training="off")
    task = TrialTask(trial.key, recipe, trial.params, TrialPlaces.of(out, "rerun", trial.key), stopping)
    result = run_trial(task, dataset, device=device, reports=_Shown(console))
    for line in comparison(trial, result):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"student and verdicts: {task.places.folder}", highlight=False, soft_wrap=True)
    return SAME if agrees(trial, result) else DIFFERENT


def agrees(trial: TrialRecord, result: TrialResult) -> bool:
    """Whether a new result is the stored one.

    Verdicts that a time limit decides may differ: then, as for a verification that was stopped, the two intervals of
    certified accuracy must have a point in common. A trial without a stored result agrees with whatever comes.
    """
    if trial.objectives is None or trial.certified_upper is None:
        return True
    standard, lower = trial.objectives
    same = result.standard_accuracy == standard
    return same and max(lower, result.certified_accuracy) <= min(trial.certified_upper, result.certified_upper)


def comparison(trial: TrialRecord, result: TrialResult) -> list[str]:
    """Both results as text."""
    again = _result_line("again ", result.standard_accuracy, result.certified_accuracy, result.certified_upper)
    if trial.standard_accuracy is None or trial.certified_accuracy is None or trial.certified_upper is None:
        return [f"stored: {trial.state}, {trial.reason or 'no result'}", again]
    stored = _result_line("stored", trial.standard_accuracy, trial.certified_accuracy, trial.certified_upper)
    return [stored, again, "the same" if agrees(trial, result) else "they differ"]


def _result_line(name: str, standard: float, lower: float, upper: float) -> str:
    certified = f"{lower:.4f}" if lower == upper else f"{lower:.4f} to {upper:.4f}"
    return f"{name}: standard {standard:.4f}, certified {certified}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m search.rerun", description="Run one trial of a study once more.")
    parser.add_argument("study", metavar="STUDY", help="the study's name")
    parser.add_argument("trial", metavar="TRIAL", help="the trial's number or key")
    parser.add_argument("--storage", metavar="DIR", default=DEFAULT_STORAGE, help="as given to search.run")
    parser.add_argument("--study-url", metavar="URL", help="the study's database, if it is not in the storage folder")
    parser.add_argument("--out", metavar="DIR", help="an empty folder for the new trial (default: reruns/KEY)")
    parser.add_argument("--data", metavar="DIR", help="where the images are, if not where they were")
    return parser


if __name__ == "__main__":
    sys.exit(main())
