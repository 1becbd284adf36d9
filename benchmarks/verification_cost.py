"""python -m benchmarks.verification_cost STUDY --storage DIR --out DIR: verifier seconds saved by dominance.

The pool is every COMPLETE trial of a search that verified them all to the end (`stopping: {verification: false}`), in
the order in which they came. Each student is verified once more with the search's own ladder, chunks and order of
images, and what its worker would report is written down with the seconds spent until then. The rule of
`search.scheduling.stopping.judge_verification` is then replayed over these reports: in the order of arrival, and in
random orders with 1 to 8 trials at once. A drop is wrong if the front of what the replay knows lacks a point of the
whole pool's.
"""

import argparse
import heapq
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.machine import machine_lines
from ccdist import checkpoint
from ccdist.atomic_files import write_text
from ccdist.checkpoint import CorruptCheckpointError
from ccdist.data import load_dataset
from search.artifacts.places import TrialPlaces
from search.errors import UserError
from search.pareto import front
from search.scheduling.standings import Standings
from search.scheduling.stopping import judge_verification
from search.studies.records import RungValues, TrialRecord, TrialResult
from search.studies.study_record import load_record, stored_config
from search.trials.verifying import Spent, verify_trial

SLOTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Report:
    """What a worker tells while it verifies: seconds of this verification so far, and the result as of then."""

    seconds: float
    result: TrialResult


@dataclass(frozen=True)
class Timeline:
    """One trial's verification from start to end."""

    number: int
    reports: tuple[Report, ...]
    whole: Report

    @property
    def point(self) -> tuple[float, float]:
        return self.whole.result.worst


@dataclass(frozen=True)
class Replay:
    """What a verification of the pool with dominance costs and finds."""

    seconds: float
    stopped: int
    front: frozenset[tuple[float, float]]


class _Recorder:
    """Reports of a worker, kept with the time of the verification alone: telling takes none of it."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self._started = time.perf_counter()

    def advanced(self, phase: str, done: int, of: int) -> None: ...

    def rung(self, name: str, values: RungValues) -> None: ...

    def verifying(self, result: TrialResult, phase: str, done: int, of: int) -> None:
        self.reports.append(Report(self.seconds(), result))

    def seconds(self) -> float:
        return time.perf_counter() - self._started


def record_pool(url: str, artifacts: Path, study: str, out: Path) -> list[Timeline]:
    """The timelines of a study's COMPLETE trials by arrival; each is recorded once, into a file of its own."""
    config = stored_config(url, study)
    trials = sorted(load_record(url, study).complete, key=lambda trial: (trial.finished_at or 0.0, trial.number))
    dataset = load_dataset(config.data)
    timelines = []
    for trial in trials:
        path = out / f"{trial.key}.json"
        if not path.exists():
            network = checkpoint.load(TrialPlaces.of(artifacts, study, trial.key).student)
            verifier = config.verifier
            with tempfile.TemporaryDirectory() as folder:
                places = TrialPlaces.of(Path(folder), study, trial.key)
                places.folder.mkdir(parents=True)
                recorder = _Recorder()
                result = verify_trial(
                    network, dataset.validation, verifier, places, spent=Spent({}, {}), reports=recorder
                )
                whole = Report(recorder.seconds(), result)
            content = {"number": trial.number, "reports": [*map(asdict, recorder.reports)], "whole": asdict(whole)}
            write_text(path, json.dumps(content))
            print(f"{trial.key}: {whole.seconds:.1f} s, {len(recorder.reports)} reports", flush=True)
        timelines.append(_timeline(json.loads(path.read_text())))
    return timelines


def _timeline(content: dict[str, object]) -> Timeline:
    def report(values: dict[str, object]) -> Report:
        return Report(values["seconds"], TrialResult(**values["result"]))  # type: ignore[arg-type]

    return Timeline(content["number"], tuple(map(report, content["reports"])), report(content["whole"]))  # type: ignore[arg-type]


def replay(pool: Sequence[Timeline], slots: int = 1) -> Replay:
    """Verify a pool in its order, so many at once, each until it is done or cannot reach the front any more."""
    standings, waiting = Standings(), list(reversed(pool))
    records: dict[int, TrialRecord] = {}
    running: list[tuple[float, int, int]] = []  # time of the next report, place in the pool, its index
    known: dict[int, TrialResult] = {}
    seconds, stopped, place = 0.0, 0, {timeline.number: index for index, timeline in enumerate(pool)}
    now = 0.0
    while waiting or running:
        while waiting and len(running) < slots:
            timeline = waiting.pop()
            heapq.heappush(running, (now + _seconds_at(timeline, 0), place[timeline.number], 0))
        now, index, step = heapq.heappop(running)
        timeline = pool[index]
        is_last = step == len(timeline.reports)
        result = timeline.whole.result if is_last else timeline.reports[step].result
        if not is_last and judge_verification(timeline.number, result, standings) is None:
            further = _seconds_at(timeline, step + 1) - _seconds_at(timeline, step)
            heapq.heappush(running, (now + further, index, step + 1))
            continue
        seconds, stopped = seconds + _seconds_at(timeline, step), stopped + (not is_last)
        known[timeline.number] = result
        records[timeline.number] = _record(timeline.number, result)
        standings.update([records[number] for number in sorted(records)])
    points = [result.worst for result in known.values()]
    return Replay(seconds, stopped, frozenset(points[index] for index in front(points)))


def _seconds_at(timeline: Timeline, step: int) -> float:
    return timeline.whole.seconds if step == len(timeline.reports) else timeline.reports[step].seconds


def _record(number: int, result: TrialResult) -> TrialRecord:
    return TrialRecord(
        key=f"trial {number}",
        number=number,
        state="COMPLETE",
        params={},
        configuration=str(number),
        seed=number,
        standard_accuracy=result.standard_accuracy,
        certified_accuracy=result.certified_accuracy,
        certified_upper=result.certified_upper,
        num_images=result.num_images,
    )


def report_lines(pool: Sequence[Timeline], replays: int, seed: int) -> list[str]:
    """The whole cascade, the replay in the order of arrival, and the random ones."""
    whole = sum(timeline.whole.seconds for timeline in pool)
    points = [timeline.point for timeline in pool]
    truth = frozenset(points[index] for index in front(points))
    arrival = replay(pool)
    rng = random.Random(seed)
    shares, wrong = [], 0
    for _ in range(replays):
        order = list(pool)
        rng.shuffle(order)
        done = replay(order, rng.choice(SLOTS))
        shares.append(done.seconds / whole)
        wrong += len(truth - done.front)
    middle = statistics.quantiles(shares, n=20) if len(shares) > 1 else [shares[0]] * 19
    return [
        f"pool: {len(pool)} trials, {len(truth)} points on the front, {whole:.1f} verifier seconds without dominance",
        f"in the order of arrival: {arrival.seconds:.1f} s, {arrival.seconds / whole:.3f} of that",
        f"  {arrival.stopped} stopped; the front is {'identical' if arrival.front == truth else 'DIFFERENT'}",
        f"{replays} random orders with 1 to 8 at once (seed {seed}): {wrong} wrong drops",
        f"  share {statistics.median(shares):.3f} in the median, 90 % between {middle[0]:.3f} and {middle[-1]:.3f}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verification_cost", description=__doc__)
    parser.add_argument("study", metavar="STUDY")
    parser.add_argument("--storage", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="where the timelines are kept")
    parser.add_argument("--replays", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    url = f"sqlite:///{options.storage.resolve() / 'study.db'}"
    try:
        pool = record_pool(url, options.storage / "artifacts", options.study, options.out)
    except (UserError, CorruptCheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([*machine_lines(), *report_lines(pool, options.replays, options.seed)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
