"""What it takes to count a large study's front from its verdicts, to read the study, and to build its report.

    python -m benchmarks.reports [--trials 1000 10000] [--images 10000] [--repeats 5] [--space cifar]

A study of so many COMPLETE trials, and one STOPPED one for every seven of them, is written into a temporary folder:
its SQLite database, and for each COMPLETE trial a `verdicts.parquet` with a row for each image, as verification writes
it, from which the trial's result is counted. Then

    record           the study is read from the database
    verdicts         accuracies of all trials and the front, counted from the files, and compared with the study
    report           report.html is built and written
    search.front     `python -m search.front STUDY --from-verdicts` as a process of its own, imports included

Seconds are medians of n repeats (lowest to highest) after one that is not counted: files lie in the system's cache.
"""

import argparse
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.console import Console

from benchmarks.bookkeeping import fill, outcome
from benchmarks.machine import machine_lines
from ccdist.atomic_files import write_table
from ccdist.verdicts import SCHEMA, Verdict, accuracies
from search.artifacts.places import TrialPlaces
from search.config import SearchConfig, find_space_file, load_search_config
from search.results.page import write_report
from search.results.report import front_table
from search.results.verdict_fronts import front_from_verdicts
from search.studies.records import TrialResult
from search.study import load_record

ROOT = Path(__file__).parents[1]
PROVED_BY = {"ibp": 0.6, "crown": 0.25, "alpha_crown": 0.1, "branch_and_bound": 0.05}  # shares of the proofs
ATTACKED = 0.9  # share of the images that are right and not proved that PGD breaks; the others stay undecided
GOALS = {"verdicts": 2.0, "report": 20.0}
GOAL_MB = 10.0
GOAL_TRIALS = 1_000


def verdicts(number: int, num_images: int) -> pa.Table:
    """Verdicts of a trial whose accuracies are about those of `outcome`: rows in random order, as images are."""
    result, draw = outcome(number), np.random.default_rng(number)
    standard = result.standard_accuracy
    proved = min(result.certified_accuracy, standard)
    shares = {(Verdict.FALSIFIED, "clean"): 1 - standard, (Verdict.FALSIFIED, "pgd"): ATTACKED * (standard - proved)}
    shares |= {(Verdict.CERTIFIED, rung): share * proved for rung, share in PROVED_BY.items()}
    counts = np.floor(np.array(list(shares.values())) * num_images).astype(int)
    kinds = [*shares, (Verdict.UNDECIDED, "")]
    chosen = draw.permutation(np.repeat(np.arange(len(kinds)), [*counts, num_images - counts.sum()]))
    texts = [pa.array([str(kind[part]) for kind in kinds]).take(pa.array(chosen)) for part in (0, 1)]
    columns = {
        "index": np.arange(num_images),
        "label": draw.integers(0, 10, num_images),
        "prediction": draw.integers(0, 10, num_images),
        "lower_bound": draw.normal(0, 1, num_images),
        "seconds": draw.random(num_images),
        "branches": draw.integers(0, 50, num_images) * (chosen == len(shares) - 1),
    } | dict(zip(("verdict", "method"), texts, strict=True))
    return pa.table([pa.array(columns[field.name]).cast(field.type) for field in SCHEMA], SCHEMA)


def made_study(folder: Path, config: SearchConfig, num_trials: int, num_images: int) -> None:
    """A study with its database and its files."""

    def result_of(number: int) -> TrialResult:
        table = verdicts(number, num_images)
        path = TrialPlaces.of(folder / "artifacts", config.study_name, f"{config.study_name}-{number:04d}").verdicts
        path.parent.mkdir(parents=True)
        write_table(path, table)
        counted = accuracies(table)
        return replace(
            outcome(number),
            standard_accuracy=counted.standard,
            adversarial_accuracy=counted.adversarial,
            certified_accuracy=counted.certified,
            certified_upper=counted.certified_upper,
            num_images=num_images,
        )

    folder.mkdir(parents=True)
    total = num_trials + (num_trials - 1) // 7  # every eighth is STOPPED, and has no verdicts
    fill(folder / "study.db", config, total, result_of)


def seconds(action: Callable[[], object], repeats: int) -> list[float]:
    """Of every repeat; the first call is not counted."""
    times = []
    for number in range(repeats + 1):
        start = time.perf_counter()
        action()
        if number:
            times.append(time.perf_counter() - start)
    return times


def measure(folder: Path, config: SearchConfig, num_trials: int, num_images: int, repeats: int) -> None:
    """Make a study of that size, and print its times and sizes."""
    made_study(folder, config, num_trials, num_images)
    url, name, artifacts, report = (
        f"sqlite:///{folder}/study.db",
        config.study_name,
        folder / "artifacts",
        folder / "r.html",
    )
    record = load_record(url, name)
    found = front_from_verdicts(record, artifacts)
    assert not found.differences
    files = list((artifacts / name / "trials").glob("*/verdicts.parquet"))
    command = [sys.executable, "-m", "search.front", name, "--storage", str(folder), "--from-verdicts"]
    actions: dict[str, Callable[[], object]] = {
        "record": lambda: load_record(url, name),
        "verdicts": lambda: front_from_verdicts(record, artifacts),
        "report": lambda: write_report(record, report),
        "search.front": lambda: subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL),
    }
    print(
        f"\n{len(record.trials):,} trials, {found.num_counted:,} of them COMPLETE with {num_images:,} images each: "
        f"{sum(path.stat().st_size for path in files) / 2**20:,.0f} MiB of verdicts; n = {repeats}"
    )
    for part, action in actions.items():
        times = seconds(action, repeats)
        goal = f"   goal: under {GOALS[part]:g}" if part in GOALS and num_trials == GOAL_TRIALS else ""
        print(f"{part:>16} {statistics.median(times):7.2f} s ({min(times):.2f} to {max(times):.2f}){goal}", flush=True)
    goal = f"   goal: under {GOAL_MB:g}" if num_trials == GOAL_TRIALS else ""
    print(f"{'report.html':>16} {report.stat().st_size / 1e6:7.2f} MB{goal}")
    print(f"{'terminal':>16} {lines_shown(url, name):4d} lines, of the whole front {lines_shown(url, name, None)}")


def lines_shown(url: str, name: str, *most: int | None) -> int:
    """Lines that a front takes in a terminal of 120 columns."""
    shown = io.StringIO()
    Console(file=shown, width=120).print(front_table(load_record(url, name), *most))
    return shown.getvalue().count("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[1_000])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--space", default="cifar", help="space file, or the name of one of the project's")
    args = parser.parse_args()
    print(*machine_lines(), f"pyarrow {version('pyarrow')}, plotly {version('plotly')}", sep="\n")
    config = load_search_config(find_space_file(args.space), ["search.points=[]"])
    for num_trials in args.trials:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder) / "runs", config, num_trials, args.images, args.repeats)


if __name__ == "__main__":
    main()
