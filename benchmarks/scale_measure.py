"""What the load tests of `benchmarks.scale` have in common: a measurement, and how it is taken and told."""

import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Measured:
    """Repeats of one thing.

    Args:
        part: driver, tune, database, tracking, store or reports.
        name: what was done; the summary reads some by name.
        size: trials that were there, or files, or actors.
        values: one for each repeat, ascending.
        unit: seconds for one of it, or what else.
    """

    part: str
    name: str
    size: int
    values: tuple[float, ...]
    unit: str = "s"

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        low, high = self.values[0], self.values[-1]
        scale, unit = (1e3, "ms") if self.unit == "s" and self.median < 1 else (1.0, self.unit)
        spread = f" ({scale * low:.4g} to {scale * high:.4g})" if len(self.values) > 1 else ""
        value = f"{scale * self.median:10.4g} {unit}{spread}, n = {len(self.values)}"
        return f"{self.part:<10} {self.size:>8,}  {self.name:<36} {value}"


def measured(part: str, name: str, size: int, values: Sequence[float], unit: str = "s") -> Measured:
    return Measured(part, name, size, tuple(sorted(values)), unit)


def timed(
    part: str, name: str, size: int, call: Callable[[], object], repeats: int, *, each: int = 1, uncounted: int = 1
) -> Measured:
    """Seconds of a call.

    Args:
        each: how many of the thing a call does; the seconds are of one.
        uncounted: calls before the first that counts.
    """
    seconds = []
    for _ in range(repeats + uncounted):
        start = time.perf_counter()
        call()
        seconds.append((time.perf_counter() - start) / each)
    return measured(part, name, size, seconds[uncounted:])


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call it in a process of its own, whose memory is then its own, too."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def resident_mb() -> float:
    """Memory of this process that is in RAM."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
