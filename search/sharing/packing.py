"""How many trials share a device: which shares are worth a try, and which of those gives most trials an hour.

Pure: what a share brings is measured by the caller (`search.sharing.side_by_side`).
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from search.config import ResourcesConfig
from search.errors import UserError
from search.sharing.probe import TrialUsage

# Ray counts shares to four decimals.
_RAY = 10**4
# More processes on a GPU wait for its scheduler and hold a CUDA context each.
MOST_COPIES = 16
# Of the free memory: what is measured in seconds is not all that hours bring.
HOST_SHARE = 0.9
ROUNDS = 3
# A level that falls so far below the best is the last one; more copies have never helped after that.
FALLEN = 0.9
# Differences below that are no reason for more processes, however often they were measured.
SAME = 0.02
# What one measurement alone is taken to be uncertain by.
UNKNOWN_SPREAD = 0.05
GIB = 2**30


class PackingError(UserError):
    """Not even one trial fits, or nothing could be measured; the text is one line that says what to do."""


class NoTimeError(PackingError):
    """A measurement did not come to its end in time."""


class OutOfMemoryHere(Exception):
    """So many copies do not fit together."""


@dataclass(frozen=True)
class Machine:
    """What the trials of one GPU may use, or all trials where there is none."""

    cores: int
    host_free: int  # bytes
    gpu: str = ""  # its name; empty: there is none
    gpu_memory: int = 0
    gpu_free: int = 0
    load: float = 0.0  # of its cores, in the minute before: a measurement keeps them busy itself


@dataclass(frozen=True)
class Level:
    """So many trials at once, and what each of them holds."""

    copies: int
    cpu: int
    gpu: float = 0.0

    @property
    def resources(self) -> ResourcesConfig:
        return ResourcesConfig(cpu=self.cpu, gpu=self.gpu)


@dataclass(frozen=True)
class Reading:
    """One measurement of a level.

    busy: share of its cores; gpu_busy: share of the time in which the GPU computed, None where nobody tells.
    """

    per_hour: float  # trials of all copies together
    busy: float
    gpu_busy: float | None = None
    host_bytes: int = 0  # of the copy that held most


@dataclass(frozen=True)
class Measured:
    """All readings of a level."""

    level: Level
    readings: tuple[Reading, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self._values)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the readings; None of one."""
        return statistics.stdev(self._values) if len(self.readings) > 1 else None

    @property
    def error(self) -> float:
        """Of the mean."""
        spread = self.spread
        return UNKNOWN_SPREAD * self.mean if spread is None else spread / math.sqrt(len(self.readings))

    @property
    def _values(self) -> list[float]:
        return [reading.per_hour for reading in self.readings]


@dataclass
class Exploration:
    """What was measured, in order of copies, and why nothing more was."""

    measured: list[Measured] = field(default_factory=list)
    ended: str = ""
    out_of_time: bool = False


@dataclass(frozen=True)
class Packing:
    """What was found out about a machine.

    usages: of the typical trial, and of the largest corner of the space if its trials differ in size.
    """

    machine: Machine
    usages: tuple[TrialUsage, ...]
    exploration: Exploration
    best: Measured


def levels(machine: Machine, host_bytes: int, device_bytes: int) -> list[Level]:
    """The shares to try, fewest copies first.

    On a GPU 1, 2, 4, ... copies, as far as memory and cores go, and as many as memory holds. Without one all cores for
    a trial, half of them, ..., one; a trial's threads are its cores.

    Args:
        host_bytes, device_bytes: what one trial takes.

    Raises:
        PackingError: not even one fits.
    """
    fits, short = math.inf, ""
    for what, free, need in (
        ("memory", HOST_SHARE * machine.host_free, host_bytes),
        ("memory of the GPU", float(machine.gpu_free), device_bytes),
    ):
        room = math.floor(free / need) if need else math.inf
        if room < fits:
            fits, short = room, f"one trial takes {need / GIB:.2g} GiB of {what}, and {free / GIB:.2g} GiB are free"
    if fits < 1:
        raise PackingError(f"{short}: not even one fits; lower student.batch_size or network.width")
    if machine.gpu:
        most = int(min(fits, machine.cores, MOST_COPIES))
        counts = sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})
        return [Level(k, max(1, machine.cores // k), math.floor(_RAY / k) / _RAY) for k in counts]
    shares = {machine.cores >> power for power in range(machine.cores.bit_length())}
    found = {machine.cores // cores: cores for cores in sorted(shares)}
    if fits < max(found):
        found[int(fits)] = machine.cores // int(fits)
    # A share that Ray would give to more trials than memory holds is none.
    return [Level(k, cpu) for k, cpu in sorted(found.items()) if k <= fits and machine.cores // cpu <= fits]


def explore(
    candidates: Sequence[Level],
    measure: Callable[[Level], Reading],
    *,
    seconds: float,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.monotonic,
) -> Exploration:
    """Measure one level after the other, then all of them again, so that a machine that slows down slows each of them.

    Args:
        measure: raises `OutOfMemoryHere`, and `NoTimeError` when `seconds` are over.
        seconds: when to end; a reading is not begun if the last one like it would not end in time.

    Raises:
        PackingError: a trial fails, or not even one reading came to its end.
    """
    found, end, costs = Exploration(), clock() + seconds, dict[Level, float]()
    readings: dict[Level, list[Reading]] = {}

    def read(level: Level) -> None:
        started = clock()
        reading = measure(level)
        readings.setdefault(level, []).append(reading)
        costs[level] = clock() - started

    try:
        for level in candidates:
            if readings and clock() + max(costs.values()) > end:
                raise NoTimeError
            read(level)
            best = max(values[0].per_hour for values in readings.values())
            if readings[level][0].per_hour < FALLEN * best:
                found.ended = f"{level.copies} at once did less than fewer"
                break
    except OutOfMemoryHere as error:
        found.ended = f"{level.copies} at once do not fit ({error})"
    except NoTimeError:
        if not readings:
            raise
        found.ended, found.out_of_time = f"no time was left for {level.copies} at once", True
    with suppress(NoTimeError):
        for _ in range(rounds - 1):
            for level in list(readings):
                if clock() + costs[level] > end:
                    continue
                try:
                    read(level)
                except OutOfMemoryHere as error:  # what fits only sometimes does not fit
                    found.ended = f"{level.copies} at once do not fit ({error})"
                    readings = {fewer: values for fewer, values in readings.items() if fewer.copies < level.copies}
                    break
    found.measured = [Measured(level, tuple(values)) for level, values in readings.items()]
    return found


def choose(measured: Sequence[Measured]) -> Measured:
    """Most trials an hour; among levels that noise could exchange with the best, the one with fewest copies.

    Raises:
        PackingError: nothing was measured.
    """
    if not measured:
        raise PackingError("nothing could be measured; give --seconds more, or a smaller trial (--set)")
    best = max(measured, key=lambda each: each.mean)
    as_good = [each for each in measured if best.mean - each.mean <= _noise(best, each)]
    return min(as_good, key=lambda each: each.level.copies)


def _noise(one: Measured, other: Measured) -> float:
    if one is other:
        return 0.0
    return max(SAME * one.mean, 2 * math.hypot(one.error, other.error))


def table(measured: Sequence[Measured]) -> Iterator[str]:
    """Levels as text, one a line."""
    with_gpu = any(each.level.gpu for each in measured)
    share = "    gpu" if with_gpu else ""
    busy = "  GPU busy" if with_gpu else ""
    yield f"at once  cpu{share}  memory of one  cores busy{busy}  trials/hour"
    for each in measured:
        level, last = each.level, each.readings[-1]
        share = f"  {level.gpu:5.4g}" if with_gpu else ""
        busy = f"  {_percent(last.gpu_busy):>8}" if with_gpu else ""
        spread = "" if each.spread is None else f" ± {rate(each.spread)}"
        memory = f"{last.host_bytes / GIB:9.2f} GiB"
        cores = f"{_percent(last.busy):>10}{busy}"
        done = f"{rate(each.mean)}{spread} (n = {len(each.readings)})"
        yield f"{level.copies:7d}  {level.cpu:3d}{share}  {memory}  {cores}  {done}"


def rate(per_hour: float) -> str:
    """Trials an hour as a text."""
    return f"{per_hour:,.0f}" if per_hour >= 100 else f"{per_hour:.2g}"


def settings(level: Level) -> str:
    """What to type behind search.run."""
    return f"--set resources.gpu={level.gpu:g} --set resources.cpu={level.cpu:g}"


def memory_setting(host_bytes: int) -> str:
    """What makes Ray keep the memory of each trial: a tenth more than it took, in GiB, rounded up to hundredths."""
    return f"--set resources.memory_gb={-(-110 * host_bytes // GIB) / 100:g}"


def in_yaml(level: Level) -> str:
    """The line of a space file."""
    return f"resources: {{cpu: {level.cpu:g}, gpu: {level.gpu:g}}}"


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{share:.0%}"
