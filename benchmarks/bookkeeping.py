"""What the driver of a search spends on one trial when its study is already large.

    python -m benchmarks.bookkeeping [--trials 100 1000 10000] [--samplers tpe random] [--repeats 60] [--further 300]
                                     [--space cifar] [--json FILE]

For each sampler and size a study of so many finished trials is written into an SQLite file (seven in eight COMPLETE
with three rungs, one STOPPED after the first) and opened; 16 trials run. Then, for every further trial, as the driver
does it:

    suggest   the snapshot and the sampler's suggestion, drawn again if it was tried
    store     the WAITING trial, whole
    start     WAITING to RUNNING, by compare and set
    rungs     three rungs of a trial
    tell      the result of a trial
    record    the study as every view of it is made: trials, counts, record

Milliseconds are medians of n repeats (lowest to highest) after five that are not counted; `all` is that of the sums,
and `of a processor` what the process itself was busy, which says more where others share the machine.
Memory is the growth of the resident set over the further trials. Each case has a process of its own.
"""

import argparse
import gc
import json
import math
import multiprocessing
import os
import platform
import random
import sqlite3
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from optuna.distributions import distribution_to_json

from benchmarks.training_step import _processor
from search.config import RandomConfig, SearchConfig, find_space_file, load_search_config
from search.space import Space
from search.studies.records import RungValues, TrialResult
from search.study import Study
from search.suggestions.sampling import suggest
from search.suggestions.sampling_view import History

PARTS = ("suggest", "store", "start", "rungs", "tell", "record")
RUNGS = ("after-ramp 0", "after-ramp 1/3", "after-ramp 2/3")
RUNNING, UNCOUNTED = 16, 5
GOAL_MS = 50
FINGERPRINT = "benchmark"


def outcome(number: int, *, noise: float = 0.02) -> TrialResult:
    """A trial near a front on which one objective is given up for the other."""
    draw = random.Random(number)
    share = draw.random()
    standard = 0.95 - 0.4 * share**2 - abs(draw.gauss(0, noise))
    certified = max(0.0, 0.6 * math.sqrt(share) - abs(draw.gauss(0, noise)))
    return TrialResult(
        standard_accuracy=standard,
        adversarial_accuracy=(standard + certified) / 2,
        certified_accuracy=certified,
        certified_upper=certified + 0.02,
        verification_state="finished",
        num_images=1000,
        costs={"teacher": 100.0, "student": 1000.0, "verification": 300.0},
        seconds=1400.0,
        provenance={"device": "none", "commit": "0" * 40, "torch": "0"},
    )


def reached(result: TrialResult, count: int) -> dict[str, RungValues]:
    """What the trial showed at its first rungs."""
    return {
        rung: RungValues(
            result.standard_accuracy - 0.02 * (3 - index),
            result.certified_accuracy * (0.5 + 0.1 * index),
            100.0 * index,
        )
        for index, rung in enumerate(RUNGS[:count])
    }


def fill(database: Path, config: SearchConfig, count: int, result_of: Callable[[int], TrialResult] = outcome) -> None:
    """Write so many finished trials, one a minute; through Optuna it would take 8 ms for each."""
    space = Space(config)
    study = Study.open(config, space, f"sqlite:///{database}", FINGERPRINT)
    first, started_at = len(study.trials()), study.record().started_at
    connection = sqlite3.connect(database)
    study_id = connection.execute("select study_id from studies").fetchone()[0]
    last_id = connection.execute("select coalesce(max(trial_id), 0) from trials").fetchone()[0]
    when = "2026-01-01 00:00:00.000000"
    rows: dict[str, list[tuple[Any, ...]]] = {
        "trials(trial_id, number, study_id, state, datetime_start, datetime_complete)": [],
        "trial_params(trial_id, param_name, param_value, distribution_json)": [],
        "trial_values(trial_id, objective, value, value_type)": [],
        "trial_user_attributes(trial_id, key, value_json)": [],
    }
    trials, params, values, attributes = rows.values()
    for number in range(first, first + count):
        trial_id = last_id + 1 + number - first
        drawn = suggest(RandomConfig(), number, History(), space, floors={})
        stopped, finished_at = number % 8 == 7, started_at + 60.0 * (number + 1)
        result = result_of(number)
        trials.append((trial_id, number, study_id, "PRUNED" if stopped else "COMPLETE", when, when))
        for name, value in drawn.params.items():
            distribution = drawn.distributions[name]
            stored = distribution.to_internal_repr(value)
            params.append((trial_id, name, stored, distribution_to_json(distribution)))
        told = {
            "configuration": space.configuration(drawn.params),
            "seed": number + 1,
            "rungs": {name: asdict(at) for name, at in reached(result, 1 if stopped else 3).items()},
        }
        if stopped:
            told["stopped"] = {"reason": "dominated", "seconds": 500.0, "finished_at": finished_at}
        else:
            told["result"] = asdict(result) | {"finished_at": finished_at}
            values.extend((trial_id, index, value, "FINITE") for index, value in enumerate(result.told))
        attributes.extend((trial_id, key, json.dumps(value)) for key, value in told.items())
    for table, content in rows.items():
        marks = ", ".join("?" * (table.count(",") + 1))
        connection.executemany(f"insert into {table} values ({marks})", content)
    connection.commit()
    connection.close()


class Stopwatch:
    """Seconds of each part of one trial's bookkeeping."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


def one_trial(study: Study, running: deque[int], clock: Stopwatch) -> None:
    """A trial is suggested, stored and started, and the one that has run longest reaches its rungs and ends."""
    with clock.part("suggest"):
        proposal = study.prepare()
        suggested = proposal.suggest()
    with clock.part("store"):
        number = study.enqueue(proposal, suggested)
    assert number is not None
    with clock.part("start"):
        running.append(study.start(number).number)
    ending = running.popleft()
    result = outcome(ending)
    with clock.part("rungs"):
        for rung, values in reached(result, 3).items():
            study.note_rung(ending, rung, values)
    with clock.part("tell"):
        study.tell(ending, result)
    with clock.part("record"):
        record = study.record()
        assert len(record.trials) == len(study.trials())
        study.num_done(), study.unfinished(), study.waiting()


def resident_mb() -> float:
    """Memory of this process that is in RAM."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(space: str, sampler: str, count: int, repeats: int, further: int) -> dict[str, Any]:
    """One case, in a process of its own."""
    settings = [f"search.sampler={sampler}", "search.points=[]"]
    config = load_search_config(find_space_file(space), settings)
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "study.db"
        fill(database, config, count)
        start = time.perf_counter()
        study = Study.open(config, Space(config), f"sqlite:///{database}", FINGERPRINT)
        opened = time.perf_counter() - start
        running = deque(study.ask().number for _ in range(RUNNING))
        clocks, busy = [], []
        for index in range(repeats + UNCOUNTED):
            clock, start = Stopwatch(), time.process_time()
            one_trial(study, running, clock)
            if index >= UNCOUNTED:
                clocks.append(clock.seconds)
                busy.append(time.process_time() - start)
        before = resident_mb()
        for _ in range(further):
            one_trial(study, running, Stopwatch())
        growth = resident_mb() - before
    return {
        "sampler": sampler,
        "trials": count,
        "parameters": len(Space(config).parameters),
        "open_s": opened,
        "seconds": clocks,
        "cpu_s": busy,
        "resident_mb": before,
        "growth_mb": growth,
    }


def tell(found: dict[str, Any], further: int) -> None:
    sums = [1e3 * sum(seconds.values()) for seconds in found["seconds"]]
    parts = ", ".join(f"{name} {1e3 * statistics.median(s[name] for s in found['seconds']):.1f}" for name in PARTS)
    print(
        f"{found['sampler']:>7} {found['trials']:>7} trials: all {statistics.median(sums):5.1f} ms "
        f"({min(sums):.1f} to {max(sums):.1f}), "
        f"of a processor {1e3 * statistics.median(found['cpu_s']):.1f}; {parts}; open {found['open_s']:.1f} s; "
        f"{found['resident_mb']:.0f} MB, {found['growth_mb']:+.1f} MB over {further} trials",
        flush=True,
    )


def main() -> None:
    args = _arguments()
    print(
        f"{os.cpu_count()} cores of {_processor()}; Python {platform.python_version()}, optuna {version('optuna')}, "
        f"SQLite {sqlite3.sqlite_version}, {time.strftime('%Y-%m-%d')}; load {os.getloadavg()[0]:.1f}"
    )
    print(f"space {args.space}; {RUNNING} trials run; n = {args.repeats}; goal: under {GOAL_MS} ms a trial")
    stored = []
    for sampler in args.samplers:
        for count in args.trials:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                case = (args.space, sampler, count, args.repeats, args.further)
                found = pool.apply(measure, case)
            tell(found, args.further)
            stored.append(found)
    if args.json:
        Path(args.json).write_text(json.dumps(stored))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--samplers", nargs="+", default=["tpe", "random"])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--further", type=int, default=300, help="trials over which memory may grow")
    parser.add_argument("--space", default="cifar", help="space file, or the name of one of the project's")
    parser.add_argument("--json", help="write every repeat there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
