"""python -m ccdist.train RECIPE: one training, or go on with it.

Exit codes: 0 it is done; 2 something asked for is wrong, or the system refuses it (a full disk); 3 a loss stopped being
finite; 130 stopped by Ctrl-C; 143 by a termination signal.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ccdist.command_line import (
    BAD_INPUT,
    NOT_FINITE,
    OK,
    Terminated,
    chosen_device,
    failed,
    refused,
    stopped,
    terminable,
)
from ccdist.data import Dataset, load_dataset, load_test_set
from ccdist.host_memory import keep_freed_memory
from ccdist.recipe import KIND, RecipeFile, load_recipe_file
from ccdist.train_progress import TrainProgress, duration
from ccdist.train_run import Evaluation, Part, Run, claimed, finished_summary
from ccdist.training import NonFiniteLossError
from ccdist.yaml_files import find_file

DEFAULT_OUT = Path("runs") / "train"


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    keep_freed_memory()
    try:
        with terminable():
            return _train(args, Console())
    except ValueError as error:  # what ccdist raises for a mistake of its user
        return refused(error, BAD_INPUT)
    except NonFiniteLossError as error:
        return refused(error, NOT_FINITE)
    except OSError as error:  # a full disk, a folder taken away
        return failed(error, _command(args))
    except (KeyboardInterrupt, Terminated) as stop:
        return stopped(stop, _command(args))


def _train(args: argparse.Namespace, console: Console) -> int:
    recipe = load_recipe_file(find_file(args.recipe, kind=KIND, shipped="spaces/recipes"), args.set)
    device = chosen_device(args.device, args.threads)
    part = _evaluated_part(recipe, args.test)
    folder = Path(args.out) if args.out else DEFAULT_OUT / recipe.name
    with claimed(folder, recipe), TrainProgress(console) as progress:
        summary = finished_summary(folder, recipe, part)
        if summary is not None:
            progress.note(f"{folder} is finished")
        else:
            dataset = load_dataset(recipe.data)
            run = Run(recipe, folder, dataset, _evaluation(recipe, dataset, part), device, progress)
            summary = run.finish()
    console.print(summary_line(summary), highlight=False, markup=False, soft_wrap=True)
    return OK


def _evaluated_part(recipe: RecipeFile, test: bool) -> Part | None:
    if test and recipe.verification is None:
        raise ValueError(
            "--test evaluates on the test set, but verification is null: nothing is evaluated; leave one of them out"
        )
    if test:
        return "test"
    if recipe.data.validation > 0:
        return "validation"
    if recipe.verification is not None:
        raise ValueError(
            "data.validation is 0, so there are no images to verify; --test evaluates on the test set, "
            "--set verification=null only trains"
        )
    return None


def _evaluation(recipe: RecipeFile, dataset: Dataset, part: Part | None) -> Evaluation | None:
    match part:
        case "test":
            return Evaluation(part, load_test_set(recipe.data))
        case "validation":
            return Evaluation(part, dataset.validation)
    return None


def summary_line(summary: dict[str, Any]) -> str:
    """A finished run in one line; certified accuracy from what is proved to what is not falsified."""
    student, seconds = summary["student"], summary["seconds"]
    if student is None:
        measured = "not evaluated"
    else:
        measured = (
            f"standard {student['standard_accuracy']:.4f}  adversarial {student['adversarial_accuracy']:.4f}  "
            f"certified {student['certified_accuracy']:.4f} to {student['certified_upper']:.4f}  "
            f"({student['num_images']} {summary['evaluated_on']} images)"
        )
    total = sum(seconds.values()) + sum(
        measured["verification_seconds"] for measured in (student, summary["teacher"]) if measured is not None
    )
    return f"{summary['name']}: {measured}  {duration(total)}, {summary['images_per_second']:.0f} images/s"


def _command(args: argparse.Namespace) -> str:
    words = ["python", "-m", "ccdist.train", args.recipe]
    for setting in args.set:
        words += ["--set", setting]
    words += ["--out", args.out] if args.out else []
    words += ["--device", args.device] if args.device != "auto" else []
    words += ["--threads", str(args.threads)] if args.threads is not None else []
    words += ["--test"] if args.test else []
    return shlex.join(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ccdist.train",
        description="Train one network as a recipe says: its teacher if it reads one, the network, its verification. "
        "The same command again goes on with a training that was stopped.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of one in spaces/recipes")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change a value of the recipe, for example --set student.epochs=10",
    )
    parser.add_argument("--out", metavar="DIR", help=f"where everything goes (default: {DEFAULT_OUT}/NAME)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--test", action="store_true", help="evaluate on the test set instead of the validation images")
    return parser


if __name__ == "__main__":
    sys.exit(main())
