"""Verification of the stored networks: certified counts and speed by rung, by time limit, and batched over images.

    python -m benchmarks.verification [--model NAME ...] [--images N] [--timeouts 1 5 20] [--threads 2] [--repeats 5]
                                      [--ensemble] [--device cpu] [--data DIR] [--json FILE]

Four tables for each network of tests/assets/verification:

    figures       how hard the case is, as benchmarks.verification_models counts it
    rungs         the ladder PGD, IBP, CROWN, alpha-CROWN: counts after each rung, seconds of the rung on what was open
    time limits   the whole ladder with branch and bound under each limit of an image
    batching      the same open images in one call against one call for each image

Seconds are medians of n repeats (lowest to highest) after one that is not counted. In the last table the two sides take
turns and a ratio is taken within a repeat. Branch and bound is limited by `--max-branches` there, so that both sides do
equal work, whatever the machine. One image at a time has the round size (sub-problems split at once) that measured
fastest for it; the batched side keeps the default. What a call makes of the network before it starts is taken off the
one-image side for all calls but the first, since a program that takes one image at a time needs it once, too.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.step_paths import Clock
from benchmarks.training_step import _processor
from benchmarks.verification_models import ASSETS, ATTACK, MODELS, NUM_STORED, figures, stored_images
from ccdist import checkpoint
from ccdist.branch_and_bound import branch_and_bound
from ccdist.config import AlphaCrownConfig, BranchAndBoundConfig, Rung, ThreatModel, VerifyConfig
from ccdist.counterexamples import float64_copy
from ccdist.host_memory import keep_freed_memory
from ccdist.networks import Network
from ccdist.precision import exact_float32
from ccdist.proof_network import ProofNetwork, exact_region
from ccdist.proved_bounds import proved_bounds
from ccdist.provenance import source_commit
from ccdist.verdicts import Progress, Verdict
from ccdist.verification import verify

BOUND_RUNGS: tuple[Rung, ...] = ("ibp", "crown", "alpha_crown")
RUNGS: tuple[Rung, ...] = ("pgd", *BOUND_RUNGS)
# What the project asks of the case that other verifiers were measured on; docs/RESULTS.md says where it stands.
REFERENCE, REFERENCE_IMAGES, REFERENCE_LIMIT_S = "fashion_mnist_cnn3", 200, 20.0
BOUNDS_GOAL_S, LADDER_GOAL_S, SURVIVORS_GOAL = 10.0, 60.0, 2
SLOPE_STEPS = 20
# Of a batched call against one call for each image, in images per second.
BATCHING_GOAL = {"cpu": 1.0, "cuda": 5.0}
# Runs of each round size before the one-image side has its own, the least of them counts.
CALIBRATION_RUNS = 2
SAMPLE_INTERVAL_S = 0.02


@dataclass(frozen=True)
class Case:
    """A network and the images that it is verified on, on one device."""

    name: str
    network: Network
    images: Tensor
    labels: Tensor
    threat: ThreatModel

    @property
    def device(self) -> torch.device:
        return self.images.device

    @property
    def is_reference(self) -> bool:
        return self.name == REFERENCE and len(self.labels) == REFERENCE_IMAGES

    def of(self, rows: Sequence[int]) -> "Case":
        """Some of the images."""
        return replace(self, images=self.images[list(rows)], labels=self.labels[list(rows)])

    def config(self, rungs: Sequence[Rung], timeout_s: float | None = None) -> VerifyConfig:
        return VerifyConfig(
            threat=self.threat,
            attack=ATTACK,
            rungs=tuple(rungs),
            alpha_crown=AlphaCrownConfig(steps=SLOPE_STEPS),
            branch_and_bound=BranchAndBoundConfig(timeout_s=timeout_s),
        )


# ---- the ladder ----------------------------------------------------------------------------------------------------


class Climb(NamedTuple):
    """One call of `verify`: where each rung ended, its wall seconds, and the verdict of each image."""

    ends: dict[str, Progress]
    seconds: float
    verdicts: list[str]

    @classmethod
    def of(cls, case: Case, config: VerifyConfig) -> "Climb":
        ends: dict[str, Progress] = {}
        clock = Clock(case.device)
        clock.start()
        table = verify(
            case.network, case.images, case.labels, config, on_progress=lambda told: ends.update({told.rung: told})
        )
        return cls(ends, clock.total(), table["verdict"].to_pylist())

    def rows(self, *verdicts: Verdict) -> list[int]:
        return [row for row, verdict in enumerate(self.verdicts) if verdict in verdicts]


def rungs(case: Case, repeats: int) -> dict[str, Any]:
    """Counts after each rung, and its seconds in n repeats."""
    climbs = [Climb.of(case, case.config(RUNGS)) for _ in range(repeats + 1)][1:]
    last = climbs[-1].ends
    return {
        name: {
            "entered": last[name].entered,
            "certified": last[name].proved,
            "falsified": last[name].falsified,
            "open": last[name].open,
            "seconds": [climb.ends[name].seconds for climb in climbs],
        }
        for name in ("clean", *RUNGS)
    }


def bounds_for_all(case: Case, repeats: int) -> dict[str, Any]:
    """IBP, CROWN and alpha-CROWN of every image that is classified correctly: no attack takes any of them away."""
    climbs = [Climb.of(case, case.config(BOUND_RUNGS)) for _ in range(repeats)]
    ends = climbs[-1].ends
    return {
        "images": len(case.labels),
        "certified": ends["alpha_crown"].proved,
        "slopes_improved_on": ends["alpha_crown"].entered,
        "steps": SLOPE_STEPS,
        "seconds": [climb.seconds for climb in climbs],
    }


def limits(case: Case, timeouts: Sequence[float]) -> list[dict[str, Any]]:
    """The whole ladder, once under each time limit; `certified_rows` says which images."""
    found = []
    for timeout_s in timeouts:
        climb = Climb.of(case, case.config((*RUNGS, "branch_and_bound"), timeout_s))
        end = climb.ends["branch_and_bound"]
        found.append(
            {
                "timeout_s": timeout_s,
                "entered": end.entered,
                "certified": end.proved,
                "falsified": end.falsified,
                "open": end.open,
                "branch_and_bound_seconds": end.seconds,
                "seconds": climb.seconds,
                "certified_rows": climb.rows(Verdict.CERTIFIED),
            }
        )
    return found


def survivors(case: Case, certified: Sequence[int], *, ask_all: bool) -> dict[str, Any]:
    """Images that the attack ensemble does not break.

    A certified image survives every attack, so only the others are asked about, unless all are; then a certified image
    that breaks anyhow is told of.
    """
    asked = [row for row in range(len(case.labels)) if ask_all or row not in set(certified)]
    if not asked:
        return {"asked": 0, "survivors": len(certified), "broken_though_certified": [], "seconds": 0.0}
    climb = Climb.of(case.of(asked), case.config(("ensemble",)))
    broken = {asked[row] for row in climb.rows(Verdict.FALSIFIED)}
    return {
        "asked": len(asked),
        "survivors": len(case.labels) - len(broken),
        "broken_though_certified": sorted(broken & set(certified)),
        "entered": climb.ends["ensemble"].entered,
        "seconds": climb.ends["ensemble"].seconds,
    }


# ---- batched against one at a time ---------------------------------------------------------------------------------


class Tally(NamedTuple):
    """What became of some images."""

    certified: int = 0
    falsified: int = 0
    open: int = 0
    branches: int = 0

    def plus(self, other: "Tally") -> "Tally":
        return Tally(*(one + another for one, another in zip(self, other, strict=True)))


# Decides some images in one call; the number is the round size, where there is one.
Work = Callable[[Case, int | None], Tally]


def alpha_crown_work(proof: ProofNetwork) -> Work:
    def decide(case: Case, _: int | None) -> Tally:
        region = exact_region(case.images, case.threat)
        with torch.no_grad():
            lower, allowance = proved_bounds("alpha_crown", proof, region, case.labels, steps=SLOPE_STEPS)
        proved = int((lower > allowance).all(1).sum())
        return Tally(certified=proved, open=len(case.labels) - proved)

    return decide


def branch_and_bound_work(max_branches: int) -> Work:
    def decide(case: Case, round_size: int | None) -> Tally:
        config = BranchAndBoundConfig(timeout_s=None, max_branches=max_branches)
        if round_size is not None:
            config = BranchAndBoundConfig(timeout_s=None, max_branches=max_branches, round_size=round_size)
        outcomes = branch_and_bound(case.network, case.images, case.labels, threat=case.threat, config=config)
        certified, falsified = sum(each.certified for each in outcomes), sum(each.falsified for each in outcomes)
        branches = sum(each.branches for each in outcomes)
        return Tally(certified, falsified, len(outcomes) - certified - falsified, branches)

    return decide


def prepare(case: Case) -> ProofNetwork:
    """What a call of branch and bound makes of the network before it starts."""
    float64_copy(case.network)
    return ProofNetwork.of(case.network, tuple(case.images.shape[1:]))


class Side(NamedTuple):
    """One run of one side."""

    seconds: float
    tally: Tally
    cores: float
    utilisation: float | None


def compare(
    case: Case, work: Work, repeats: int, *, round_sizes: Sequence[int | None], preparation: bool
) -> dict[str, Any]:
    """The images of a case in one call against one call for each, in turns.

    Args:
        round_sizes: what the one-image side may choose from, by measurement.
        preparation: whether each call prepares the network; then that is taken off the one-image side.
    """
    device, single = case.device, [case.of([row]) for row in range(len(case.labels))]

    def batched() -> Side:
        return _timed(device, lambda: work(case, None))

    def alone(round_size: int | None) -> Side:
        def each() -> Tally:
            total = Tally()
            for one in single:
                total = total.plus(work(one, round_size))
            return total

        return _timed(device, each)

    batched()
    calibration = {size: min(alone(size).seconds for _ in range(CALIBRATION_RUNS)) for size in round_sizes}
    own_best = min(calibration, key=calibration.__getitem__)
    together: list[Side] = []
    separate: list[Side] = []
    prepared: list[float] = []
    for number in range(repeats):
        # Who begins changes, so that a machine that slows down or speeds up favours neither.
        if number % 2:
            separate.append(alone(own_best))
        together.append(batched())
        if not number % 2:
            separate.append(alone(own_best))
        if preparation:
            clock = Clock(device)
            clock.start()
            prepare(case)
            prepared.append(clock.total())
    spared = (len(single) - 1) * statistics.median(prepared) if preparation else 0.0
    separate_seconds = [side.seconds - spared for side in separate]
    return {
        "images": len(case.labels),
        "round_size": own_best,
        "calibration": {str(size): seconds for size, seconds in calibration.items()},
        "preparation_seconds": statistics.median(prepared) if preparation else None,
        "batched": _told(together, [side.seconds for side in together]),
        "one_at_a_time": _told(separate, separate_seconds),
        "ratios": [alone / both.seconds for alone, both in zip(separate_seconds, together, strict=True)],
    }


def _told(sides: list[Side], seconds: list[float]) -> dict[str, Any]:
    known = [side.utilisation for side in sides if side.utilisation is not None]
    return {
        "seconds": seconds,
        "tally": sides[-1].tally._asdict(),
        "cores": statistics.median(side.cores for side in sides),
        "utilisation": statistics.median(known) if known else None,
    }


def _timed(device: torch.device, work: Callable[[], Tally]) -> Side:
    clock = Clock(device)
    with exact_float32(), _utilisation(device) as samples:
        busy = time.process_time()
        clock.start()
        tally = work()
        seconds = clock.total()
        busy = time.process_time() - busy
    return Side(seconds, tally, busy / seconds, statistics.mean(samples) if samples else None)


def utilisation_is_known(device: torch.device) -> bool:
    """Whether the driver can be asked how much of the time the device had something to do."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.utilization(device)
    except (ModuleNotFoundError, RuntimeError):  # no pynvml, or it finds no driver
        return False
    return True


@contextmanager
def _utilisation(device: torch.device) -> Iterator[list[float]]:
    """Shares of the time that the device was busy, asked now and then; empty where nobody knows."""
    samples: list[float] = []
    if not utilisation_is_known(device):
        yield samples
        return
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(SAMPLE_INTERVAL_S):
            samples.append(torch.cuda.utilization(device) / 100)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield samples
    finally:
        stop.set()
        watcher.join()


def batching(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """alpha-CROWN and branch and bound of what CROWN leaves open, and branch and bound of what alpha-CROWN leaves."""
    after = {rung: Climb.of(case, case.config(RUNGS[: RUNGS.index(rung) + 1])) for rung in ("crown", "alpha_crown")}
    open_rows = {rung: climb.rows(Verdict.UNDECIDED) for rung, climb in after.items()}
    branch = branch_and_bound_work(args.max_branches)
    contests: dict[str, tuple[str, Work, Sequence[int | None], bool]] = {
        "alpha_crown, open after crown": ("crown", alpha_crown_work(prepare(case)), (None,), False),
        "branch_and_bound, open after crown": ("crown", branch, args.round_sizes, True),
        "branch_and_bound, open after alpha_crown": ("alpha_crown", branch, args.round_sizes, True),
    }
    found = {}
    for name, (rung, work, sizes, preparation) in contests.items():
        rows = open_rows[rung]
        if len(rows) < 2:  # one call against the same call
            found[name] = {"images": len(rows)}
            continue
        found[name] = compare(case.of(rows), work, args.repeats, round_sizes=sizes, preparation=preparation)
    return found


# ---- telling -------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def per_second(count: int, seconds: Sequence[float]) -> str:
    median = statistics.median(seconds)
    return f"{count / median:.1f}" if count and median else ""


def show(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns as wide as their widest cell, the first to the left."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        first, *others = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(["  " + first, *others]).rstrip())


def verdict_on(met: bool) -> str:
    return "met" if met else "MISSED"


def tell_rungs(found: dict[str, Any], repeats: int) -> None:
    print(f"\nrungs, n = {repeats}")
    header = ("rung", "entered", "certified", "falsified", "open", "seconds", "images/s")
    rows = [
        (
            name,
            *(rung[key] for key in ("entered", "certified", "falsified", "open")),
            spread(rung["seconds"], 3),
            per_second(rung["entered"], rung["seconds"]),
        )
        for name, rung in found.items()
    ]
    show(header, rows)


def tell_bounds(found: dict[str, Any], *, is_goal: bool) -> None:
    median = statistics.median(found["seconds"])
    goal = f"; goal: under {BOUNDS_GOAL_S:g} s, {verdict_on(median < BOUNDS_GOAL_S)}" if is_goal else ""
    print(
        f"\nIBP + CROWN + alpha-CROWN ({found['steps']} iterations on each of the {found['slopes_improved_on']} images "
        f"that CROWN leaves open, no attack before) for all {found['images']} images: "
        f"{spread(found['seconds'])} s, n = {len(found['seconds'])}, {found['certified']} certified{goal}"
    )


def tell_limits(found: list[dict[str, Any]], attacked: dict[str, Any], *, is_goal: bool) -> None:
    print("\ntime limits, the whole ladder with branch and bound, n = 1")
    keys = ("entered", "certified", "falsified", "open")
    show(
        ("limit of an image", *keys, "seconds", "of these branch and bound", "images/s"),
        [
            (
                f"{row['timeout_s']:g} s",
                *(row[key] for key in keys),
                f"{row['seconds']:.2f}",
                f"{row['branch_and_bound_seconds']:.2f}",
                per_second(row["entered"], [row["branch_and_bound_seconds"]]),
            )
            for row in found
        ],
    )
    print(
        f"  attack ensemble: {attacked['survivors']} survivors, asked about {attacked['asked']} images "
        f"in {attacked['seconds']:.1f} s"
    )
    if attacked["broken_though_certified"]:
        print(f"  UNSOUND: certified and broken by an attack: images {attacked['broken_though_certified']}")
    longest = max(found, key=lambda row: row["timeout_s"])
    if is_goal and longest["timeout_s"] == REFERENCE_LIMIT_S:
        wanted = attacked["survivors"] - SURVIVORS_GOAL
        print(
            f"  goal: whole ladder at {REFERENCE_LIMIT_S:g} s under {LADDER_GOAL_S:g} s, "
            f"{verdict_on(longest['seconds'] < LADDER_GOAL_S)}; at least {wanted} certified (survivors - "
            f"{SURVIVORS_GOAL}), {verdict_on(longest['certified'] >= wanted)}"
        )


def tell_batching(found: dict[str, Any], args: argparse.Namespace, device: torch.device) -> None:
    print(f"\nbatching, n = {args.repeats}; branch and bound limited by {args.max_branches} branches an image")
    header = ("rung and images", "", "images", "certified/falsified/open", "branches", "seconds", "images/s", "cores")
    rows: list[tuple[Any, ...]] = []
    lines = []
    for name, contest in found.items():
        if "ratios" not in contest:
            lines.append(f"{name}: nothing to batch ({contest['images']} open)")
            continue
        own = "" if contest["round_size"] is None else f", round size {contest['round_size']}"
        for side, told in (("batched", contest["batched"]), (f"one at a time{own}", contest["one_at_a_time"])):
            tally = told["tally"]
            rows.append(
                (
                    name,
                    side,
                    contest["images"],
                    f"{tally['certified']}/{tally['falsified']}/{tally['open']}",
                    tally["branches"],
                    spread(told["seconds"], 3),
                    per_second(contest["images"], told["seconds"]),
                    f"{told['cores']:.1f}"
                    + ("" if told["utilisation"] is None else f", GPU {told['utilisation']:.0%}"),
                )
            )
        median, goal = statistics.median(contest["ratios"]), BATCHING_GOAL[device.type]
        lines.append(
            f"{name}: {spread(contest['ratios'])} times the images per second; goal {goal:g}, "
            f"{verdict_on(median >= goal)}" + _calibration_in_words(contest)
        )
    if rows:
        show(header, rows)
    for line in lines:
        print(f"  {line}")
    if device.type == "cuda" and not utilisation_is_known(device):
        print("  device utilisation: unknown, the package pynvml (nvidia-ml-py) is not there")


def _calibration_in_words(contest: dict[str, Any]) -> str:
    if contest["preparation_seconds"] is None:
        return ""
    tried = ", ".join(f"{size}: {seconds:.2f} s" for size, seconds in contest["calibration"].items())
    return (
        f" (one at a time by round size: {tried}; network prepared in {1000 * contest['preparation_seconds']:.1f} ms)"
    )


# ---- all of it -----------------------------------------------------------------------------------------------------


def measure(name: str, args: argparse.Namespace, assets: Path) -> dict[str, Any]:
    """All tables of one network, told while they are measured."""
    model = MODELS[name] if args.images is None else replace(MODELS[name], num_images=args.images)
    network, device = checkpoint.load(ASSETS / name), torch.device(args.device)
    images, labels = stored_images(model, assets)
    if len(labels) < model.num_images:
        raise ValueError(f"{name}: {len(labels)} images are there, expected {model.num_images}; --data DIR has more")
    case = Case(name, network.to(device), images.to(device), labels.to(device), model.recipe.threat)
    print(f"\n==== {name}, {len(labels)} images, {model.recipe.threat}")
    known = figures(network.cpu(), model, assets)
    network.to(device)
    print("figures: " + ", ".join(f"{key} {value}" for key, value in known.items()), flush=True)
    ladder = rungs(case, args.repeats)
    tell_rungs(ladder, args.repeats)
    bounds = bounds_for_all(case, args.repeats)
    tell_bounds(bounds, is_goal=case.is_reference)
    limited = limits(case, args.timeouts)
    attacked = survivors(case, limited[-1]["certified_rows"], ask_all=args.ensemble)
    tell_limits(limited, attacked, is_goal=case.is_reference)
    sys.stdout.flush()
    together = batching(case, args)
    tell_batching(together, args, device)
    sys.stdout.flush()
    return {
        "figures": known,
        "rungs": ladder,
        "bounds": bounds,
        "limits": limited,
        "survivors": attacked,
        "batching": together,
    }


@contextmanager
def image_folder(args: argparse.Namespace) -> Iterator[Path]:
    """Where the images are: the assets, or as many as asked for from the data sets' own files, laid out like those."""
    if args.data is None:
        yield ASSETS
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in args.model:
            data = MODELS[name].recipe.data.name
            if data not in NUM_STORED:  # it comes with a package
                continue
            source, file = Path(args.data) / data / "test.parquet", Path(folder) / "images" / data / "test.parquet"
            # Models share data sets, and each is cut to what the model is measured on afterwards.
            count = args.images or max(NUM_STORED[data], MODELS[name].num_images)
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pq.read_table(source, columns=["image", "label"]).slice(0, count), file)
        yield Path(folder)


def circumstances(args: argparse.Namespace, words: Sequence[str]) -> dict[str, str]:
    device = torch.device(args.device)
    host = f"{os.cpu_count()} cores of {_processor()}"
    return {
        "command": shlex.join(["python", "-m", "benchmarks.verification", *words]),
        "device": f"{torch.cuda.get_device_name(device)}, {host}" if device.type == "cuda" else host,
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "commit": source_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "load": f"{os.getloadavg()[0]:.1f}",
        "threads": str(args.threads),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = _parser().parse_args(words)
    args.timeouts = sorted(args.timeouts)
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    about = circumstances(args, words)
    print("\n".join(f"{key}: {value}" for key, value in about.items()), flush=True)
    with image_folder(args) as assets:
        models = {name: measure(name, args, assets) for name in args.model}
    seconds = time.perf_counter() - started
    ratios = {
        f"{name}, {contest}": statistics.median(told["ratios"])
        for name, found in models.items()
        for contest, told in found["batching"].items()
        if "ratios" in told
    }
    print(f"\n{seconds:.0f} s in all", end="")
    if ratios:
        least = min(ratios, key=ratios.__getitem__)
        print(f"; least ratio of batched to one at a time: {ratios[least]:.2f} ({least})", end="")
    # Above the number of cores at the end: others used them too, and the times are worth nothing.
    about["load_at_the_end"] = f"{os.getloadavg()[0]:.1f}"
    print(f"; load at the end {about['load_at_the_end']}")
    if args.json is not None:
        Path(args.json).write_text(json.dumps(about | {"seconds": seconds, "models": models}, indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.verification",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="NAME", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--images", type=int, help="the first N; default: as many as the stored figures are about")
    parser.add_argument("--timeouts", metavar="SECONDS", type=float, nargs="+", default=[1.0, 5.0, REFERENCE_LIMIT_S])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ensemble", action="store_true", help="ask the attack ensemble about certified images, too")
    parser.add_argument("--max-branches", type=int, default=256, help="of an image, where batching is measured")
    parser.add_argument(
        "--round-sizes", type=int, nargs="+", default=[16, 64, 256], help="one at a time takes the fastest"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", metavar="DIR", help="folder of the data sets' folders: more images than are stored")
    parser.add_argument("--json", metavar="FILE", help="everything that was measured")
    return parser


if __name__ == "__main__":
    sys.exit(main())
