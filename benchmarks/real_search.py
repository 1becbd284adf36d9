"""python -m benchmarks.real_search --out DIR: the same search with and without stopping, on Fashion-MNIST.

Two studies of one space, seed and machine: hypervolume against core-seconds, as a table and as a figure. The studies
are real ones under DIR: the same command goes on with them, `search.front` shows them.

What a driver costs is printed, too: its processor seconds less those of a second call, which finds nothing to do, and
their share of the seconds that its trials took in this call (which a trial that was interrupted before it belongs to,
too: measure in a fresh DIR).
"""

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.learning_curves import SETTINGS as RECORDED
from benchmarks.learning_curves import SPACE
from benchmarks.machine import machine_lines
from search import run as search_run
from search.errors import UserError
from search.pareto import front, hypervolume_trace
from search.studies.records import StudyRecord
from search.study import load_record

# The small trainings that were recorded as learning curves, with a verification as searches have it.
SETTINGS = (*(each for each in RECORDED if not each.startswith("verification.batch_size")), "tracking.enabled=false")
ARMS = {"without stopping": ("stopping=false",), "with stopping": ()}
COLOURS = {"without stopping": "#8C8C8C", "with stopping": "#0072B2"}
SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Curve:
    """Hypervolume after so many core-seconds, a step for each trial that ended."""

    seconds: NDArray[np.float64]
    area: NDArray[np.float64]

    def at(self, seconds: float) -> float:
        done = int(np.searchsorted(self.seconds, seconds, side="right"))
        return float(self.area[done - 1]) if done else 0.0

    def seconds_to(self, area: float) -> float:
        reached = np.flatnonzero(self.area >= area)
        return float(self.seconds[reached[0]]) if len(reached) else float("inf")


def folder_of(out: Path, arm: str, seed: int) -> Path:
    return out / f"{arm.replace(' ', '-')}-{seed}"


def search_arguments(out: Path, arm: str, seed: int, trials: int) -> list[str]:
    """Of `search.run`."""
    settings = [*SETTINGS, *ARMS[arm], f"search.seed={seed}"]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    return [SPACE, "--storage", str(folder_of(out, arm, seed)), "--trials", str(trials), *flags]


def stored(out: Path, arm: str, seed: int) -> StudyRecord:
    name = SPACE if seed == 0 else f"{SPACE}-seed{seed}"
    return load_record(f"sqlite:///{folder_of(out, arm, seed) / 'study.db'}", name)


def curve_of(record: StudyRecord) -> Curve:
    """Trials in the order in which they ended; stopped ones cost and add nothing."""
    done = sorted(record.done, key=lambda trial: (trial.finished_at or 0.0, trial.number))
    seconds = np.cumsum([trial.seconds or 0.0 for trial in done])
    # A trial without objectives stands where it adds nothing.
    points = [record.reference if trial.objectives is None else trial.objectives for trial in done]
    return Curve(seconds, hypervolume_trace(points, record.reference))


def drive(arguments: Sequence[str]) -> float:
    """Run a search in a process of its own; its driver's processor seconds, without those of Ray and the workers."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        code, seconds = pool.submit(timed_search, list(arguments)).result()
    if code != 0:
        raise SystemExit(f"search.run {' '.join(arguments)} ended with exit code {code}")
    return seconds


def timed_search(arguments: list[str]) -> tuple[int, float]:
    code = search_run.main(arguments)
    return code, time.process_time()


def run_search(out: Path, arm: str, seed: int, trials: int) -> str:
    """Bring a study to so many trials; what its driver cost in one line."""
    known = done_seconds(out, arm, seed)
    arguments = search_arguments(out, arm, seed, trials)
    busy = drive(arguments)
    spent = done_seconds(out, arm, seed) - known
    if spent == 0:
        return f"{arm}: all trials were there"
    return driver_line(arm, busy, drive(arguments), spent)


def driver_line(arm: str, busy: float, idle: float, spent: float) -> str:
    return (
        f"{arm}: driver {busy:.1f} s of a processor, {idle:.1f} s of them to start and to report; the rest is "
        f"{(busy - idle) / spent:.2%} of the {spent:.0f} s of its trials"
    )


def done_seconds(out: Path, arm: str, seed: int) -> float:
    """Of all trials that have ended; 0 before there is a study."""
    try:
        return sum(trial.seconds or 0.0 for trial in stored(out, arm, seed).done)
    except UserError:
        return 0.0


def table_lines(records: dict[str, StudyRecord]) -> list[str]:
    """One row for each arm: trials, cost, front, and the hypervolume at shares of the dearer arm's seconds."""
    curves = {arm: curve_of(record) for arm, record in records.items()}
    whole = max(curve.seconds[-1] for curve in curves.values())
    final = next(iter(curves.values())).area[-1]
    lines = [
        "| search | trials | stopped in training / in verification | core-seconds | front | "
        + " | ".join(f"hypervolume at {share:.0%}" for share in SHARES)
        + " | core-seconds to the first row's final hypervolume |",
        "|---" * (6 + len(SHARES)) + "|",
    ]
    for arm, record in records.items():
        curve = curves[arm]
        halted = sum(trial.state == "STOPPED" for trial in record.done)
        cut = sum(trial.verification_state == "stopped" for trial in record.complete)
        points = [trial.objectives for trial in record.complete if trial.objectives is not None]
        areas = " | ".join(f"{curve.at(share * whole):.4f}" for share in SHARES)
        lines.append(
            f"| {arm} | {len(record.done)} | {halted} / {cut} | {curve.seconds[-1]:.0f} | "
            f"{len(front(points))} | {areas} | "
            f"{curve.seconds_to(final):.0f} |"
        )
    return lines


def draw(records: dict[str, StudyRecord], path: Path) -> None:
    """The curves as a PNG."""
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for arm, record in records.items():
        curve = curve_of(record)
        label = f"{arm}: {len(record.done)} trials"
        axes.step(np.append(0, curve.seconds), np.append(0, curve.area), where="post", color=COLOURS[arm], label=label)
        axes.plot(curve.seconds[-1], curve.area[-1], "o", color=COLOURS[arm])
    record = next(iter(records.values()))
    axes.set_xlabel("core-seconds spent on trials")
    axes.set_ylabel(f"hypervolume above ({record.reference[0]:g}, {record.reference[1]:g})")
    axes.set_title(f"{record.dataset}, {record.threat}, {record.num_images} validation images", fontsize=10)
    axes.grid(color="#E4E7EB")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_search", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=1, help="searches of each kind")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS), help="only these kinds")
    parser.add_argument("--figure", type=Path, help="where the first seed's curves are drawn")
    options = parser.parse_args(arguments)
    print("\n".join(machine_lines()))
    for seed in range(options.seeds):
        for arm in options.arms:
            print(run_search(options.out, arm, seed, options.trials))
        records = {arm: stored(options.out, arm, seed) for arm in options.arms}
        print(f"\nseed {seed}\n" + "\n".join(table_lines(records)))
        if options.figure is not None and seed == 0:
            draw(records, options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
