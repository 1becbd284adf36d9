"""Ray Tune's own loop: how many reports a second it hands to a searcher and a scheduler that do nothing.

So many actors as the machine carries, each of which reports as fast as it is answered: a report blocks until the driver
has decided, as it does in a search. Thousands of actors do not fit on a machine, and what they add is measured apart:
before each report Tune shuffles the calls of all actors and asks Ray which of them has an answer [ray 2.60]. Here they
are calls of one actor, all but one of which wait. What else may grow with the actors is not known.
"""

import asyncio
import logging
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.scale_measure import Measured, apart, measured

PART = "tune"
CPU = 0.001  # of an actor: the machine's cores do not limit how many there are


def measure(actors: Sequence[int], slots: int, seconds: float, repeats: int) -> Iterator[Measured]:
    """A report with each number of actors, and the choice among the calls of all slots; each with a Ray of its own."""
    for number in actors:
        yield apart(_reported, number, seconds)
    yield apart(_chosen, slots, repeats)


@contextmanager
def _own_ray() -> Iterator[str]:
    """A Ray on this machine, and a folder."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
    import ray

    from search.clusters.local_ray import kept_private

    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        options = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        with kept_private():
            ray.init(address="local", num_cpus=1, object_store_memory=100 * 2**20, _temp_dir=folder, **options)
        try:
            yield folder
        finally:
            ray.shutdown()


def _reported(actors: int, seconds: float) -> Measured:
    os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_MAX_PENDING_TRIALS_PG": str(actors)}
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1"}
    from ray import tune
    from ray.tune.schedulers import FIFOScheduler

    class Counting(FIFOScheduler):  # type: ignore[misc]
        """When reports came."""

        _supports_buffered_results = False
        times: list[float] = []  # noqa: RUF012 - one for each process

        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            self.times.append(time.perf_counter())
            return str(self.CONTINUE)

        def __getstate__(self) -> dict[str, Any]:
            return {}

    with _own_ray() as folder:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_reporting, seconds=seconds), {"cpu": CPU}),
            tune_config=tune.TuneConfig(num_samples=actors, scheduler=Counting(), reuse_actors=True),
            run_config=tune.RunConfig(name="scale", storage_path=str(Path(folder) / "tune"), verbose=0),
        )
        tuner.fit()
    return _rates(Counting.times, actors, seconds)


def _rates(times: list[float], actors: int, seconds: float) -> Measured:
    """Seconds for a report in each whole second in which all actors reported."""
    middle = (times[0] + times[-1]) / 2
    half = min(seconds, times[-1] - times[0]) / 4
    counts = [0] * max(1, int(2 * half))
    for moment in times:
        index = int(moment - (middle - half)) if moment >= middle - half else -1
        if 0 <= index < len(counts):
            counts[index] += 1
    return measured(PART, "report through Tune's loop", actors, [1 / max(count, 1) for count in counts])


def _chosen(calls: int, repeats: int) -> Measured:
    """Seconds to find the one call among so many that has an answer, as Tune does."""
    with _own_ray():
        import ray

        holder = ray.remote(num_cpus=0, max_concurrency=calls + 2)(_Holder).remote()
        waiting = [holder.wait.remote(index) for index in range(calls)]
        while ray.get(holder.count.remote()) < calls:
            time.sleep(0.1)
        seconds = []
        for index in range(repeats):
            ray.get(holder.answer.remote(index % calls))
            ray.wait([waiting[index % calls]])
            start = time.perf_counter()
            futures = list(waiting)
            random.shuffle(futures)
            (ready,), _ = ray.wait(futures, num_returns=1, timeout=0.1)
            seconds.append(time.perf_counter() - start)
            waiting[ray.get(ready)] = holder.wait.remote(index % calls)
            ray.get(holder.count.remote())
    return measured(PART, "choice among the calls of all", calls, seconds)


class _Holder:
    """Calls that are answered when somebody says so."""

    def __init__(self) -> None:
        self.events: dict[int, asyncio.Event] = {}

    async def wait(self, index: int) -> int:
        event = self.events[index] = asyncio.Event()
        await event.wait()
        return index

    async def answer(self, index: int) -> None:
        self.events[index].set()

    async def count(self) -> int:
        return len(self.events)


def _reporting(config: dict[str, Any], *, seconds: float) -> None:
    """A trainable that has nothing else to do."""
    from ray import tune

    until = time.monotonic() + seconds
    step = 0
    while time.monotonic() < until:
        step += 1
        tune.report({"key": "trial", "state": "RUNNING", "phase": "student", "step": step, "steps": 160})
