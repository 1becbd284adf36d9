"""Hypervolume per accelerator-hour of this project's search and its rivals, in virtual time.

OMP_NUM_THREADS=1 python -m benchmarks.search --curves tests/assets/search [--half odd] [--seeds 20] [--jobs 2]
OMP_NUM_THREADS=1 python -m benchmarks.search --recorded FILE.parquet --budget-trials 60
OMP_NUM_THREADS=1 python -m benchmarks.search --compare wide:keep=0.7 margin1:margin=1 quiet:tell_stopped=nothing

Trials are those of a workload: learning curves and verifications modelled on measured runs, or final values and hours
by a surrogate of recorded trials (then nobody has rungs, and ASHA is left out). Every search has the same seeds, slots,
points, floors and verifier, and runs until the same budget is spent: what --budget-trials whole trials cost on average
when all slots are busy. What had not ended by then does not count. `--compare` shows variants of ours, by default on
the runs with even numbers, so that a choice among them can be tested on those with odd ones.

With --out FILE each finished search leaves a file in FILE.parts, in a folder for its settings, and is not run again;
the code is no part of the settings: delete the folder after a change. Hypervolumes count the lower end of certified
accuracy. Ratios are of means over seeds, resampled in pairs for their intervals.
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import optuna

from benchmarks.machine import machine_lines
from benchmarks.rivals import OURS, Rival, asha_rivals, stock_rivals, variant
from benchmarks.search_tables import GRID, Found, table
from ccdist import atomic_files
from ccdist.config import fingerprint
from search.config import SearchConfig
from search.errors import UserError
from search.simulation.curve_tables import Half, read_curves
from search.simulation.curves import CurveWorkload, curve_config
from search.simulation.hardware import Hardware
from search.simulation.recorded import RecordedSpace, RecordedWorkload, read_tables, recorded_config
from search.simulation.simulator import simulate
from search.simulation.surrogates import Error
from search.simulation.timelines import Workload
from search.space import Space

CURVES = "tests/assets/search"
UNLIMITED = 100_000  # trials: the budget ends every search
COST_DRAWS = 200  # random trials for the mean cost of one


@dataclass(frozen=True)
class Problem:
    """What is searched, in plain values, so that a process can make it again."""

    kind: str  # curves, or a table of a recorded file
    path: str
    name: str
    floors: bool = False  # of a recorded table

    def workload(self) -> Workload:
        return _workload(self)

    def config(self, rival: Rival, seed: int) -> SearchConfig:
        """The problem's space file with a rival's changes laid over it."""
        tree = _base(self).model_dump(mode="json")
        tree["search"] |= {"seed": seed, **rival.search}
        tree["stopping"] |= rival.stopping
        tree["budget"] = {"trials": UNLIMITED}
        return SearchConfig.model_validate(tree)

    def space(self, config: SearchConfig) -> Space:
        workload = self.workload()
        return RecordedSpace(config, workload.table) if isinstance(workload, RecordedWorkload) else Space(config)

    @property
    def reference(self) -> tuple[float, float]:
        return _base(self).search.hypervolume_reference

    @property
    def title(self) -> str:
        return f"learning curves, {self.name} runs" if self.kind == "curves" else f"recorded trials, {self.name}"


@cache
def _workload(problem: Problem) -> Workload:
    if problem.kind == "curves":
        return CurveWorkload.of(Path(problem.path), _half(problem.name))
    (found,) = [found for found in read_tables(Path(problem.path)) if found.name == problem.name]
    return RecordedWorkload(found)


@cache
def _base(problem: Problem) -> SearchConfig:
    workload = problem.workload()
    if isinstance(workload, CurveWorkload):
        return curve_config(workload.tables)
    assert isinstance(workload, RecordedWorkload)
    return recorded_config(workload.table, floors=problem.floors)


def _half(name: str) -> Half:
    return {"even": "even", "odd": "odd", "all": "all"}[name]  # type: ignore[return-value]


@cache
def mean_cost_s(problem: Problem) -> float:
    """Seconds of a whole random trial that has an accelerator for itself, teachers apart."""
    config = problem.config(OURS, 0)
    space, workload = problem.space(config), problem.workload()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return float(np.mean([workload.timeline(space.suggest(study.ask()), n, "off").seconds for n in range(COST_DRAWS)]))


def budget_s(problem: Problem, hardware: Hardware, trials: int) -> float:
    """Accelerator seconds of so many whole trials that share full accelerators."""
    return trials * mean_cost_s(problem) * hardware.share * hardware.slowdown(hardware.per_gpu)


def search_once(problem: Problem, rival: Rival, seed: int, hardware: Hardware, budget: float) -> Found:
    """One simulated search."""
    started = time.process_time()
    config = problem.config(rival, seed)
    history = simulate(
        config,
        problem.space(config),
        problem.workload(),
        hardware,
        budget_s=budget,
        make_scheduler=rival.make_scheduler,
        tell_stopped=rival.tell_stopped,
    )
    return Found(
        hypervolumes=history.hypervolumes(problem.reference, np.array(GRID) * budget).tolist(),
        states=dict(Counter(outcome.state for outcome in history.outcomes)),
        virtual_hours=history.seconds / 3600,
        seconds=time.process_time() - started,
    )


# ---- many searches -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """All searches of one problem."""

    problem: Problem
    rivals: tuple[Rival, ...]
    seeds: int
    gp_seeds: int  # its suggestions take a second each
    hardware: Hardware
    budget: float

    def seeds_of(self, rival: Rival) -> range:
        return range(self.gp_seeds if rival.is_gp else self.seeds)

    def folder(self, parts: Path) -> Path:
        """Of results that these settings share."""
        settings = {"problem": asdict(self.problem), "hardware": repr(self.hardware), "budget": self.budget}
        return parts / fingerprint(settings)

    def run(self, jobs: int, parts: Path | None) -> dict[str, list[Found]]:
        """Every search that has no file yet, by rival, seeds in order."""
        wanted = {(rival.name, seed): rival for rival in self.rivals for seed in self.seeds_of(rival)}
        files = {each: self._file(rival, each[1], parts) for each, rival in wanted.items()} if parts else {}
        found = {each: Found(**json.loads(file.read_text())) for each, file in files.items() if file.is_file()}
        missing = {each: rival for each, rival in wanted.items() if each not in found}
        for each, result in self._searches(missing, jobs):
            found[each] = result
            if each in files:
                atomic_files.write_text(files[each], json.dumps(asdict(result)))
            _tell(f"{self.problem.title}, {each[0]}, seed {each[1]}: {result.brief}")
        return {rival.name: [found[rival.name, seed] for seed in self.seeds_of(rival)] for rival in self.rivals}

    def _searches(self, missing: Mapping[tuple[str, int], Rival], jobs: int) -> Iterator[tuple[tuple[str, int], Found]]:
        """In the order in which they end."""
        if jobs == 1:
            for each, rival in missing.items():
                yield each, search_once(self.problem, rival, each[1], self.hardware, self.budget)
            return
        # Threads of a library do not survive a fork.
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            futures = {
                pool.submit(search_once, self.problem, rival, each[1], self.hardware, self.budget): each
                for each, rival in missing.items()
            }
            for future in as_completed(futures):
                yield futures[future], future.result()

    def _file(self, rival: Rival, seed: int, parts: Path) -> Path:
        folder = self.folder(parts) / f"{rival.name}-{fingerprint(asdict(rival))[:8]}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{seed}.json"


def _tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# ---- what is printed -----------------------------------------------------------------------------------------------


def workload_errors(problem: Problem) -> list[str]:
    """How far the workload's model is from what was measured."""
    workload = problem.workload()
    lines: list[str] = []
    if isinstance(workload, RecordedWorkload):
        return _error_rows("surrogate, 5-fold cross-validation", workload.errors())
    assert isinstance(workload, CurveWorkload)
    lines += _error_rows("model, 3-fold cross-validation", workload.errors())
    if problem.name != "all":
        other: Half = "odd" if problem.name == "even" else "even"
        lines += _error_rows(
            f"model, on the {other} runs", workload.errors_on(read_curves(Path(problem.path), other).runs)
        )
    lines += ["", "| rung | rank correlation with the end: standard | certified | simulated: standard | certified |"]
    lines += ["|---|---|---|---|---|"]
    for rung, values in workload.agreements().items():
        lines.append(f"| {rung} | {' | '.join(f'{value:.2f}' for value in values)} |")
    return lines


def _error_rows(what: str, errors: Sequence[Error]) -> list[str]:
    rows = [f"| {each.target} | {each.r2:.2f} | {each.mae:.4f} | {each.spearman:.2f} |" for each in errors]
    return ["", f"| {what}, n = {errors[0].trials} | R2 | MAE | Spearman |", "|---|---|---|---|", *rows]


def report(plan: Plan, found: Mapping[str, Sequence[Found]], baseline: str) -> str:
    """Markdown."""
    hardware, budget = plan.hardware, plan.budget / 3600
    limits = f"budget {budget:.3g} accelerator-hours; reference {plan.problem.reference}"
    lines = [
        f"### {plan.problem.title}",
        "",
        f"{plan.seeds} seeds; {hardware}; {hardware.slots} slots; {limits}.",
        *workload_errors(plan.problem),
        "",
        *table(found, baseline),
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        texts = [*machine_lines(), ""]
        for problem in _problems(args):
            hardware = _hardware(args)
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            budget = budget_s(problem, hardware, args.budget_trials)
            gp_seeds = min(args.seeds, args.gp_seeds or args.seeds)
            plan = Plan(problem, tuple(_rivals(args, problem)), args.seeds, gp_seeds, hardware, budget)
            parts = Path(f"{args.out}.parts") if args.out else None
            texts.append(report(plan, plan.run(args.jobs, parts), OURS.name))
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = "\n".join(texts)
    print(text)
    if args.out:
        atomic_files.write_text(Path(args.out), text)
    return 0


def _problems(args: argparse.Namespace) -> list[Problem]:
    if args.recorded is not None:
        return [
            Problem("recorded", args.recorded, found.name, args.floors) for found in read_tables(Path(args.recorded))
        ]
    return [Problem("curves", args.curves, args.half or ("even" if args.compare else "odd"))]


def _hardware(args: argparse.Namespace) -> Hardware:
    return Hardware(
        gpus=args.gpus,
        share=args.share,
        crowding=args.crowding,
        node_hours=args.node_hours or math.inf,
        stragglers=args.stragglers,
    )


def _rivals(args: argparse.Namespace, problem: Problem) -> list[Rival]:
    if args.compare:
        return [OURS, *map(variant, args.compare)]
    known = [OURS, *stock_rivals(), *(asha_rivals() if problem.kind == "curves" else [])]
    if not args.rivals:
        return known
    chosen = [rival for rival in known if rival is OURS or any(rival.name.startswith(name) for name in args.rivals)]
    if len(chosen) == 1:
        raise UserError(f"no rival begins with {', '.join(args.rivals)}; there are {', '.join(r.name for r in known)}")
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recorded", metavar="FILE", help="recorded trials instead of learning curves")
    parser.add_argument("--floors", action="store_true", help="a recorded table's reference is its floors, too")
    parser.add_argument("--curves", metavar="DIR", default=CURVES, help=f"measured curves (default: {CURVES})")
    parser.add_argument("--half", choices=("even", "odd", "all"), help="runs that the curves are modelled on")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--gp-seeds", type=int, metavar="N", help="fewer seeds for gp, paired with ours' first ones")
    parser.add_argument("--jobs", type=int, default=2, help="searches at once")
    parser.add_argument("--budget-trials", type=int, default=80, help="whole trials that the budget pays for")
    parser.add_argument("--gpus", type=int, default=4, help="accelerators")
    parser.add_argument("--share", type=float, default=0.25, help="of an accelerator, for each trial")
    parser.add_argument("--crowding", type=float, default=0.1, help="slowdown by each neighbour on an accelerator")
    parser.add_argument("--stragglers", type=float, default=0.05, help="share of starts that are three times as slow")
    parser.add_argument("--node-hours", type=float, default=0.0, help="mean time between losses of a node; 0: none")
    parser.add_argument("--rivals", nargs="+", metavar="NAME", help="beginnings of names; ours is always there")
    parser.add_argument("--compare", nargs="+", metavar="NAME:KEY=VALUE,...", help="variants of ours instead of rivals")
    parser.add_argument("--out", metavar="FILE", help="Markdown; finished searches are kept beside it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
