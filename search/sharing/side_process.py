"""The process of one of several copies of a trial: does what it is told, and says how far it is.

It holds what a trial's process holds: the modules of a worker, the threads and the share of the GPU of its resources.
Told are ("alone", resources), then STUDENT or VERIFICATION with resources; it answers ("usage", TrialUsage), or
("ready", None), one ("unit", None) after the other once it hears anything, and after the next word ("part", Part).
("failed", (is_memory, text)) is its last word.
"""

import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from ccdist.device_memory import is_out_of_memory
from ccdist.device_usage import peak_memory, reset_peak_memory
from ccdist.networks import Network
from ccdist.training import train_student
from search.sharing.probe import TrialSample, at_target, measure_trial, rungs, timed_student, timed_teacher

STUDENT, VERIFICATION = "student", "verification"
ALONE = "alone"
_ENDLESS = 10**6  # epochs, until the listener ends them


@dataclass(frozen=True)
class Part:
    """What one copy did in one phase; times are those of the machine's monotonic clock, the same for all copies.

    size: steps or images of a unit.
    """

    size: int
    began: float
    ends: tuple[float, ...]  # of each unit
    cpu_seconds: float
    seconds: float
    host_bytes: int

    def each(self, until: float) -> float:
        """Seconds of a step or an image, of the units that ended while all copies worked."""
        inside = [end for end in self.ends if end <= until] or list(self.ends[:1])
        return (inside[-1] - self.began) / len(inside) / self.size


def serve(connection: Connection, content: bytes) -> None:
    """The process of a copy."""
    try:
        _Copy(connection, pickle.loads(content)).answer()
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the measurement is over
        return
    except Exception as error:
        connection.send(("failed", (is_out_of_memory(error), " ".join(str(error).split())[:300])))


class _Enough(Exception):
    """Leaves a phase from inside its listener."""


@dataclass
class _Copy:
    connection: Connection
    sample: TrialSample
    _network: Network | None = None
    _teacher: Network | None = None

    def answer(self) -> None:
        # Here, and not on top: this is what a trial's process holds beside its tensors, and takes seconds to import.
        from search.worker import prepare_process

        while True:
            command, resources = self.connection.recv()
            self.device = prepare_process(resources)
            if resources.gpu:
                torch.cuda.empty_cache()  # of an earlier command
            if command == ALONE:
                self.connection.send(("usage", measure_trial(self.sample, self.device)))
            else:
                self._train_both()
                self._work(self._students if command == STUDENT else self._verifications)

    def _train_both(self) -> None:
        if self._network is None:
            part, recipe = self.sample.part, self.sample.recipe
            if recipe.needs_teacher:
                self._teacher = timed_teacher(part, recipe, self.device)[1]
            self._network = timed_student(part, recipe, self._teacher, self.device)[1]

    def _work(self, phase: Callable[[Callable[[int], None]], None]) -> None:
        """Run a phase until the other side has enough of it; its first unit is the warm-up."""
        sizes: list[int] = []
        ends: list[float] = []
        began = [0.0, 0.0, 0.0]

        def unit(size: int) -> None:
            if not sizes:
                self.connection.send(("ready", None))
                self.connection.recv()
                reset_peak_memory()
                began[:] = time.monotonic(), time.process_time(), time.perf_counter()
            else:
                ends.append(time.monotonic())
                self.connection.send(("unit", None))
                if self.connection.poll():
                    self.connection.recv()
                    raise _Enough
            sizes.append(size)

        try:
            phase(unit)
        except _Enough:
            seconds = time.perf_counter() - began[2]
            processor = time.process_time() - began[1]
            part = Part(sizes[0], began[0], tuple(ends), processor, seconds, peak_memory())
            self.connection.send(("part", part))

    def _students(self, unit: Callable[[int], None]) -> None:
        sample = self.sample
        train_student(
            sample.part,
            sample.recipe.threat,
            at_target(sample.recipe.student, _ENDLESS),
            self._teacher,
            device=self.device,
            on_epoch=lambda _: unit(sample.batches),
        )

    def _verifications(self, unit: Callable[[int], None]) -> None:
        assert self._network is not None
        images = self.sample.chunk(self.device)
        ladder = list(rungs(self._network, images, self.sample.recipe.verification))
        while True:
            for _, climb in ladder:
                climb()
            unit(len(images))
