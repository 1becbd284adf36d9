"""A whole search in virtual time on so many slots: the searcher and the scheduler as they are, the study in memory.

Its trials follow a formula and report what a real one does: phases of training, three rungs, eight states of a
verification. What a trial costs the driver's processor, Tune, database and MLflow apart, is the time of the whole
divided by the trials; two numbers of trials show how it grows.
"""

import json
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.bookkeeping import RUNGS, outcome
from benchmarks.scale_driver import config_of
from benchmarks.scale_measure import Measured, apart, measured
from ccdist.config import fingerprint
from search.simulation.hardware import Hardware
from search.simulation.simulator import simulate
from search.simulation.timelines import Teacher, Timeline, TrainingMode, VerificationState, rung, running, verification
from search.space import Space

PART = "simulation"
IMAGES, STATES, PHASES = 1000, 8, 20


class Formula:
    """Trials near a front, like those of `benchmarks.bookkeeping`, in no relation to their parameters."""

    def teacher(self, params: Mapping[str, Any]) -> Teacher | None:
        return None

    def timeline(self, params: Mapping[str, Any], seed: int, mode: TrainingMode) -> Timeline:
        result = outcome(int(fingerprint({"params": json.dumps(params, default=str)})[:8], 16))
        right, proved = round(IMAGES * result.standard_accuracy), round(IMAGES * result.certified_accuracy)
        wrong = IMAGES - right
        phases = [running(30.0 * index, "student") for index in range(PHASES)]
        values = result.standard_accuracy - 0.02, result.certified_accuracy - 0.1
        rungs = [rung(400.0 + 100 * index, name, *values) for index, name in enumerate(RUNGS)]
        states = [
            VerificationState(
                10.0 * index, "crown", proved * index // STATES, wrong + (right - proved) * index // STATES
            )
            for index in range(1, STATES + 1)
        ]
        trained = sorted((*phases, *rungs), key=lambda report: report.seconds)
        told = verification(700.0, states, standard=result.standard_accuracy, num_images=IMAGES)
        return Timeline((*trained, *told), None, 5.0)


def measure(space: str, trials: int, slots: int) -> list[Measured]:
    found: list[Measured] = apart(_measure, space, trials, slots)
    return found


def _measure(space: str, trials: int, slots: int) -> list[Measured]:
    config = config_of(space, trials)
    hardware = Hardware(gpus=max(1, slots // 4), share=0.25, stragglers=0.05)
    ready = Space(config)
    started = time.process_time()
    history = simulate(config, ready, Formula(), hardware)
    seconds = time.process_time() - started
    assert len(history.outcomes) >= trials
    return [measured(PART, f"a trial on {hardware.slots:,} slots", trials, [seconds / trials])]
