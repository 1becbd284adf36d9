"""Ray Tune's own loop: how many reports a second it hands to a searcher and a scheduler that do nothing.

So many actors as the machine carries, each of which reports as fast as it is answered: a report blocks until the driver
has decided, as it does in a search. What the driver's loop can take from thousands of actors that report once a second
is this number of reports, if it does not depend on how many actors there are; two numbers of actors show that.
"""

import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.scale_measure import Measured, apart, measured

PART = "tune"
CPU = 0.001  # of an actor: the machine's cores do not limit how many there are


def measure(actors: int, seconds: float) -> list[Measured]:
    """Reports a second, in a process with a Ray of its own."""
    found: list[Measured] = apart(_measure, actors, seconds)
    return found


def _measure(actors: int, seconds: float) -> list[Measured]:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AIR_NEW_OUTPUT": "0", "TUNE_MAX_PENDING_TRIALS_PG": str(actors)}
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1"}
    import ray
    from ray import tune
    from ray.tune.schedulers import FIFOScheduler

    from search.clusters.local_ray import kept_private

    class Counting(FIFOScheduler):  # type: ignore[misc]
        """When reports came."""

        _supports_buffered_results = False
        times: list[float] = []  # noqa: RUF012 - one for each process

        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            self.times.append(time.perf_counter())
            return str(self.CONTINUE)

        def __getstate__(self) -> dict[str, Any]:
            return {}

    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        options = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        with kept_private():
            ray.init(address="local", num_cpus=1, object_store_memory=100 * 2**20, _temp_dir=folder, **options)
        try:
            bound = tune.with_parameters(_reporting, seconds=seconds)
            tuner = tune.Tuner(
                tune.with_resources(bound, {"cpu": CPU}),
                tune_config=tune.TuneConfig(num_samples=actors, scheduler=Counting(), reuse_actors=True),
                run_config=tune.RunConfig(name="scale", storage_path=str(Path(folder) / "tune"), verbose=0),
            )
            tuner.fit()
        finally:
            ray.shutdown()
    return _rates(Counting.times, actors, seconds)


def _rates(times: list[float], actors: int, seconds: float) -> list[Measured]:
    """Seconds for a report in each whole second in which all actors reported."""
    middle = (times[0] + times[-1]) / 2
    half = min(seconds, times[-1] - times[0]) / 4
    counts = [0] * max(1, int(2 * half))
    for moment in times:
        index = int(moment - (middle - half)) if moment >= middle - half else -1
        if 0 <= index < len(counts):
            counts[index] += 1
    return [measured(PART, "report through Tune's loop", actors, [1 / max(count, 1) for count in counts])]


def _reporting(config: dict[str, Any], *, seconds: float) -> None:
    """A trainable that has nothing else to do."""
    from ray import tune

    until = time.monotonic() + seconds
    step = 0
    while time.monotonic() < until:
        step += 1
        tune.report({"key": "trial", "state": "RUNNING", "phase": "student", "step": step, "steps": 160})
