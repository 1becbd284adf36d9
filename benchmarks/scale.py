"""Which part of a search saturates first, on 1,000 GPUs and with 100,000 trials: each part on its own, under load.

    python -m benchmarks.scale PART [--trials 1000 10000 100000] [--slots 4000] [--repeats 50] [--json FILE]
    python -m benchmarks.scale summary FILE ...

PART is one of

    driver      searcher, scheduler, study and front log, as Tune's loop calls them   (benchmarks.scale_driver)
    simulation  a whole search in virtual time                                        (benchmarks.scale_simulation)
    tune        Ray Tune's own loop, with --actors, and its choice among --slots      (benchmarks.scale_tune)
    database    SQLite and PostgreSQL, and the samplers                               (benchmarks.scale_database)
    tracking    a real `mlflow server`, by the search's own sender                    (benchmarks.scale_tracking)
    store       artefacts on a disk and in an S3 server                               (benchmarks.scale_store)
    reports     page, figures and tables                                              (benchmarks.scale_reports)

Each line is the median of n repeats, with the lowest and the highest. `summary` reads files of --json and says, for the
load that it states, what share of its time each part is busy: at 100 % it is full.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.machine import machine_lines
from benchmarks.scale_measure import Measured

PARTS = ("driver", "simulation", "tune", "database", "tracking", "store", "reports")


@dataclass(frozen=True)
class Load:
    """What a search of a thousand GPUs asks of its parts.

    Args:
        slots: trials at once, four on a GPU.
        trial_s: seconds of a trial, from its start to its end.
        report_s: between two reports of one trial.
        verifying: share of a trial's time in which its reports are those of a verification.
        epochs: of a trial; each is a row for MLflow, and a change of the trial's files.
        rungs: of a trial.
    """

    slots: int = 4000
    trial_s: float = 3600.0
    report_s: float = 1.0
    verifying: float = 0.25
    epochs: int = 160
    rungs: int = 3

    @property
    def trials_per_s(self) -> float:
        return self.slots / self.trial_s

    @property
    def reports_per_s(self) -> float:
        return self.slots / self.report_s

    def __str__(self) -> str:
        return (
            f"{self.slots:,} trials at once of {self.trial_s:g} s: {self.trials_per_s:.3g} begin and end each second, "
            f"{self.reports_per_s:,.4g} reports a second (one of each trial every {self.report_s:g} s, "
            f"{self.verifying:.0%} of a verification), {self.epochs} epochs and {self.rungs} rungs a trial"
        )


@dataclass(frozen=True)
class Share:
    """How busy a part is under a load."""

    what: str
    size: int
    busy: float  # seconds each second

    def line(self, slots: int) -> str:
        # No more than two digits: medians of few repeats, and the share need not grow as the trials do.
        room = f"full at about {float(f'{slots / self.busy:.2g}'):,.0f} trials at once" if self.busy > 0 else ""
        return f"{self.busy:9.1%}  {self.what:<58} {self.size:>8,}  {room}"


def shares(load: Load, found: Sequence[Measured]) -> list[Share]:
    """The busiest first; for each thing the largest size that was measured."""
    largest: dict[tuple[str, str], Measured] = {}
    for each in found:
        if (each.part, each.name) not in largest or each.size >= largest[each.part, each.name].size:
            largest[each.part, each.name] = each
    parts = []
    for what, terms in _demands(load):
        if all(name in largest for name, _ in terms):
            busy = sum(largest[name].median * times for name, times in terms)
            parts.append(Share(what, max(largest[name].size for name, _ in terms), busy))
    return sorted(parts, key=lambda share: -share.busy)


def _demands(load: Load) -> Iterator[tuple[str, list[tuple[tuple[str, str], float]]]]:
    """What each part is asked for: the thing measured, and how often a second."""
    trials, reports = load.trials_per_s, load.reports_per_s
    own = [
        ("idle", reports),  # Tune asks for a trial at each of its steps, which are reports for the most part
        ("report", reports * (1 - load.verifying)),
        ("verifying", reports * load.verifying),
        ("rung", trials * load.rungs),
        ("start", trials),
        ("end", trials),
    ]
    yield "driver's loop, our calls", [(("driver", name), times) for name, times in own]
    steps = ("report through Tune's loop", "choice among the calls of all")
    yield "driver's loop, Tune's own", [(("tune", step), reports) for step in steps]
    for database in ("SQLite", "PostgreSQL"):
        writes = ("store", "start", "rungs", "tell")
        yield f"study in {database}", [(("database", f"{database}: {write}"), trials) for write in writes]
        rows = [
            (("tracking", f"{database}: trial"), trials),
            (("tracking", f"{database}: epoch"), load.epochs * trials),
        ]
        yield f"sender to MLflow on {database}", rows
    for sampler in ("random", "tpe", "nsga2", "gp"):
        yield f"suggestions by {sampler}", [(("database", f"suggest by {sampler}"), trials)]
    for place in ("disk", "S3"):
        yield f"driver's copy of artefacts on {place}", [(("store", f"{place}: pull"), load.epochs * trials)]


# ---- the command line ----------------------------------------------------------------------------------------------


def run(part: str, args: argparse.Namespace) -> Iterator[Measured]:
    """Measure one part, at each size."""
    if part == "tune":
        from benchmarks import scale_tune

        yield from scale_tune.measure(args.actors, args.slots, args.seconds, args.repeats)
        return
    for size in args.trials:
        yield from _measure(part, size, args)


def _measure(part: str, size: int, args: argparse.Namespace) -> list[Measured]:
    # Imported here: each part has libraries of its own, some of which take seconds.
    if part == "driver":
        from benchmarks import scale_driver

        return scale_driver.measure(args.space, size, args.slots, args.repeats)
    if part == "simulation":
        from benchmarks import scale_simulation

        return scale_simulation.measure(args.space, size, args.slots)
    if part == "database":
        from benchmarks import scale_database

        return scale_database.measure(args.space, size, args.repeats, postgres=not args.without_servers)
    if part == "tracking":
        from benchmarks import scale_tracking

        return scale_tracking.measure(size, args.repeats, postgres=not args.without_servers)
    if part == "store":
        from benchmarks import scale_store

        return scale_store.measure(size, args.repeats, s3=not args.without_servers)
    from benchmarks import scale_reports

    return scale_reports.measure(args.space, size, max(1, args.repeats // 10))


def summary(load: Load, files: Sequence[Path], tell: Callable[[str], None]) -> None:
    found = [
        Measured(**{**each, "values": tuple(each["values"])}) for file in files for each in json.loads(file.read_text())
    ]
    tell(str(load))
    tell(f"{'busy':>9}  {'part':<58} {'measured at':>11}  both extrapolated from there")
    for share in shares(load, found):
        tell(share.line(load.slots))


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    tell: Callable[[str], None] = lambda text: print(text, flush=True)  # noqa: E731
    if args.part == "summary":
        load = Load(slots=args.slots, trial_s=args.trial_s, report_s=args.report_s)
        summary(load, args.files, tell)
        return 0
    for line in machine_lines():
        tell(line)
    found = []
    for each in run(args.part, args):
        tell(str(each))
        found.append(each)
    if args.json:
        args.json.write_text(json.dumps([asdict(each) for each in found], indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=(*PARTS, "summary"), metavar="PART")
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="of --json, for the summary")
    parser.add_argument("--trials", type=int, nargs="+", default=[200], help="sizes (default: 200, for a look)")
    parser.add_argument("--slots", type=int, default=4000, help="trials at once")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--actors", type=int, nargs="+", default=[2, 4], help="of Tune's loop")
    parser.add_argument("--seconds", type=float, default=10.0, help="for which actors report")
    parser.add_argument("--trial-s", type=float, default=3600.0, help="seconds of a trial, for the summary")
    parser.add_argument("--report-s", type=float, default=1.0, help="between reports of a trial, for the summary")
    parser.add_argument("--space", default="cifar", help="space file, or the name of one of the project's")
    parser.add_argument("--without-servers", action="store_true", help="no PostgreSQL, no S3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every repeat there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
