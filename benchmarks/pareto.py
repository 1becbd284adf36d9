"""Milliseconds of every function of search.pareto, on the two clouds of points that bound what a front costs.

    python -m benchmarks.pareto [--sizes 100 1000 10000] [--repeats 15]

    uniform   points uniform in the unit square: about ln N of them on the front, about 2 sqrt N layers
    curve     points on a falling curve: all of them on the front, one layer

A box reaches up to 0.01 to either side of its point in the second objective, as certified accuracy does while a
verification goes on. Repeats take turns, so that a change of the machine's speed meets all functions.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from search import pareto

REFERENCE = (0.0, 0.0)
HALF_WIDTH = 0.01
Points = NDArray[np.float64]


def clouds(num_points: int) -> dict[str, Points]:
    generator = np.random.default_rng(num_points)
    first = generator.random(num_points)
    return {"uniform": generator.random((num_points, 2)), "curve": np.column_stack([first, np.sqrt(1 - first**2)])}


def calls(points: Points) -> dict[str, Callable[[], object]]:
    """Every function with its arguments; `beaten_by` for one trial, which is how a search asks."""
    reach = np.random.default_rng(1).uniform(0, HALF_WIDTH, (2, len(points)))
    lower, upper = points.copy(), points.copy()
    lower[:, 1] -= reach[0]
    upper[:, 1] += reach[1]
    middle = len(points) // 2
    return {
        "front": lambda: pareto.front(points),
        "layers": lambda: pareto.layers(points),
        "hypervolume": lambda: pareto.hypervolume(points, REFERENCE),
        "hypervolume_trace": lambda: pareto.hypervolume_trace(points, REFERENCE),
        "contributions": lambda: pareto.contributions(points, REFERENCE),
        "surely_dominated": lambda: pareto.surely_dominated(lower, upper),
        "possible_front": lambda: pareto.possible_front(lower, upper),
        "certain_front": lambda: pareto.certain_front(lower, upper),
        "hypervolume_bounds": lambda: pareto.hypervolume_bounds(lower, upper, REFERENCE),
        "beaten_by": lambda: pareto.beaten_by(lower, upper, middle),
        "uncertainty": lambda: pareto.uncertainty(lower, upper, REFERENCE),
    }


def measure(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every repeat; the first round warms up and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if number:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    print(
        f"{os.cpu_count()} cores of {_processor()}; numpy {np.__version__}, Python {platform.python_version()}, "
        f"{time.strftime('%Y-%m-%d')}; load {os.getloadavg()[0]:.1f}"
    )
    for cloud in clouds(1):
        times = [measure(calls(clouds(size)[cloud]), args.repeats) for size in args.sizes]
        print(f"\n{cloud}, ms a call, n = {args.repeats}: median (lowest to highest)")
        print(f"{'N':>18} " + " ".join(f"{size:>24,}" for size in args.sizes))
        for name in times[0]:
            cells = (f"{statistics.median(t[name]):.2f} ({min(t[name]):.2f} to {max(t[name]):.2f})" for t in times)
            print(f"{name:>18} " + " ".join(f"{cell:>24}" for cell in cells))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
