"""Copies of one trial that run at once, each in a process of its own, and what all of them together get done.

Copies are started once and kept. For a measurement each warms up, they begin together, and work until all
have got far enough; what is read of a copy lies within the time in which all of them worked.
"""

import multiprocessing
import os
import pickle
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NoReturn

import torch

from ccdist import device_usage
from ccdist.device_usage import host_memory
from search.config import ResourcesConfig
from search.scheduling.budget import SECONDS_PER_HOUR
from search.sharing.packing import (
    GIB,
    ROUNDS,
    Level,
    Machine,
    NoTimeError,
    OutOfMemoryHere,
    Packing,
    PackingError,
    Reading,
    choose,
    explore,
    levels,
)
from search.sharing.probe import TrialSample, TrialUsage
from search.sharing.side_process import ALONE, STUDENT, VERIFICATION, Part, serve

# Of a window: a search spends most of a trial in its student's steps.
_SHARES = {STUDENT: 0.6, VERIFICATION: 0.4}
# A unit is an epoch of the sample, or a chunk of images; of a single one too much could lie outside the common time.
_FEWEST_UNITS = 2
_LOOK_S = 1.0  # between two looks at the GPU
_END_S = 5.0
# Seconds of a reading: fewer are mostly noise, more are better spent on another reading.
_SHORTEST, _LONGEST = 1.0, 10.0
# Of a reading's time, what is not its window: warming up, waiting for the slowest.
_OVERHEAD = 0.4


def this_machine(
    resources: ResourcesConfig, data_bytes: int, cores: int | None = None, gpus: int | None = None
) -> Machine:
    """What this process may use; of a machine with several GPUs the share of one.

    Args:
        resources: without a GPU in them the cores are shared out.
        data_bytes: what the images of the search will take, once for all trials.
        cores: for the trials of one GPU; None: its part of all that this process may run on.
        gpus: of the machine; None: as many as this process sees.
    """
    free, load = max(0, host_memory().free - data_bytes), os.getloadavg()[0]
    found = len(os.sched_getaffinity(0))
    if resources.gpu == 0 or not torch.cuda.is_available():
        return Machine(cores or found, free, load=load)
    count = gpus or torch.cuda.device_count()
    cores = cores or max(1, found // count)
    if told := device_usage.gpus(os.environ.get("CUDA_VISIBLE_DEVICES")):
        gpu = told[0]
        return Machine(cores, free // count, gpu.name, gpu.memory, gpu.memory - gpu.used, load)
    free_there, total = torch.cuda.mem_get_info(0)  # CUDA itself then lies in this process as well
    return Machine(cores, free // count, torch.cuda.get_device_name(0), total, free_there, load)


def measure_packing(
    typical: TrialSample,
    largest: TrialSample | None,
    machine: Machine,
    *,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Packing:
    """What one trial takes on this machine, and how many at once get most done.

    Args:
        largest: of a space whose networks or batches differ, the trial that decides how many fit.
        seconds: for everything.

    Raises:
        PackingError: not even one fits, or nothing was measured in that time.
    """
    end = clock() + seconds
    whole = Level(1, machine.cores, 1.0 if machine.gpu else 0.0)
    usages = []
    if largest is not None:
        with Copies(largest, lambda: end - clock()) as copies:
            usages.append(_alone(copies, whole, machine))
    with Copies(typical, lambda: end - clock()) as copies:
        usages.insert(0, _alone(copies, whole, machine))
        host, device = (max(getattr(usage, name) for usage in usages) for name in ("host_bytes", "device_bytes"))
        candidates = levels(machine, host, device)
        left = end - clock()
        share = left / len(candidates) / ROUNDS * (1 - _OVERHEAD)
        copies.window = min(_LONGEST, max(_SHORTEST, share))
        found = explore(candidates, lambda level: copies.read(level, usages[0]), seconds=left, clock=clock)
    return Packing(machine, tuple(usages), found, choose(found.measured))


def _alone(copies: "Copies", level: Level, machine: Machine) -> TrialUsage:
    try:
        return copies.alone(level)
    except OutOfMemoryHere as error:
        what = f"the GPU's {machine.gpu_free / GIB:.3g} GiB" if machine.gpu else f"{machine.host_free / GIB:.3g} GiB"
        raise PackingError(
            f"{copies.sample.name}: not even one trial fits into {what} that are free ({error}); lower "
            "student.batch_size or network.width"
        ) from error


@dataclass
class Copies:
    """Processes that run one sample; as many as were asked for so far.

    time_left: seconds until everything has to be over.
    window: seconds of a measurement, more where steps are slow.
    """

    sample: TrialSample
    time_left: Callable[[], float]
    window: float = 3.0
    _running: list[tuple[SpawnProcess, Connection]] = field(default_factory=list)

    def __enter__(self) -> "Copies":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def alone(self, level: Level) -> TrialUsage:
        """What one trial takes, with nobody beside it.

        Raises:
            OutOfMemoryHere: it does not fit.
            PackingError: it failed, or did not come to an end in time.
        """
        (connection,) = self._started(1)
        try:
            self._tell(connection, (ALONE, level.resources))
            usage: TrialUsage = self._answer(connection, "usage")
        except (OutOfMemoryHere, PackingError):
            self.close()
            raise
        return usage

    def read(self, level: Level, alone: TrialUsage) -> Reading:
        """What so many copies get done at once. A teacher's steps are taken to slow down as its student's do.

        Raises:
            OutOfMemoryHere, PackingError: as `alone`.
        """
        try:
            return self._read(level, alone)
        except (OutOfMemoryHere, PackingError):
            self.close()  # the others wait for the one that failed
            raise

    def _read(self, level: Level, alone: TrialUsage) -> Reading:
        connections = self._started(level.copies)
        busy: list[float] = []
        students, steps = self._phase(STUDENT, connections, level, busy)
        others, images = self._phase(VERIFICATION, connections, level, busy)
        trials = (
            self.sample.trial_seconds(step, image, alone.teacher_step * step / alone.step)
            for step, image in zip(steps, images, strict=True)
        )
        return Reading(
            sum(SECONDS_PER_HOUR / seconds for seconds in trials),
            sum(part.cpu_seconds / part.seconds for part in students) / (level.copies * level.cpu),
            statistics.fmean(busy) if busy else None,
            max(part.host_bytes for part in (*students, *others)),
        )

    def _phase(
        self, name: str, connections: Sequence[Connection], level: Level, busy: list[float]
    ) -> tuple[list[Part], list[float]]:
        """One phase of all copies, and the seconds of a step or image of each."""
        for connection in connections:
            self._tell(connection, (name, level.resources))
        for connection in connections:
            self._answer(connection, "ready")
        for connection in connections:
            self._tell(connection, "go")
        started, looked = time.monotonic(), time.monotonic()
        units = dict.fromkeys(connections, 0)
        while min(units.values()) < _FEWEST_UNITS or time.monotonic() - started < self.window * _SHARES[name]:
            self._check_time()
            ready = wait(connections, timeout=_LOOK_S)
            for connection in connections:
                if connection in ready:
                    self._answer(connection, "unit")
                    units[connection] += 1
            if level.gpu and time.monotonic() - looked >= _LOOK_S:
                looked = time.monotonic()
                busy.extend(gpu.busy for gpu in device_usage.gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))[:1])
        until = time.monotonic()
        for connection in connections:
            self._tell(connection, "enough")
        parts: list[Part] = [self._answer(connection, "part") for connection in connections]
        return parts, [part.each(until) for part in parts]

    def _tell(self, connection: Connection, message: object) -> None:
        try:
            connection.send(message)
        except OSError:  # it is gone; why is what it said last, or how it ended
            self._answer(connection, "nothing more")

    def _answer(self, connection: Connection, kind: str) -> Any:
        """The next message of that kind; units that were under way may come before it."""
        while True:
            if not connection.poll(max(0.0, self.time_left())):
                self._check_time()
            try:
                told, content = connection.recv()
            except (EOFError, OSError):
                self._died(connection)
            if told == kind:
                return content
            if told == "failed":
                is_memory, text = content
                raise OutOfMemoryHere(text) if is_memory else PackingError(f"a trial fails: {text}")

    def _check_time(self) -> None:
        if self.time_left() <= 0:
            raise NoTimeError(
                f"{self.sample.name}: a few steps and images took longer than the time limit; give --seconds more, or "
                "a smaller trial (--set)"
            )

    def _died(self, connection: Connection) -> NoReturn:
        (process,) = [process for process, own in self._running if own is connection]
        process.join(_END_S)
        if process.exitcode == -signal.SIGKILL:  # as the system does where memory is short
            raise OutOfMemoryHere("a process was killed, as the system does when memory runs out")
        raise PackingError(f"a process of the measurement ended with exit code {process.exitcode}")

    def _started(self, count: int) -> list[Connection]:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        # As bytes: tensors would go through shared memory, which is counted to whoever touches it.
        content = pickle.dumps(self.sample)
        while len(self._running) < count:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, content), daemon=True)
            process.start()
            theirs.close()
            self._running.append((process, ours))
        return [connection for _, connection in self._running[:count]]

    def close(self) -> None:
        """End all copies."""
        for process, connection in self._running:
            connection.close()
            process.terminate()
        for process, _ in self._running:
            process.join(_END_S)
            if process.is_alive():
                process.kill()
                process.join()
        self._running.clear()
