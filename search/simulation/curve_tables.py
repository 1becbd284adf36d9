"""Measured learning curves and verifications of random configurations: the tables of `benchmarks.learning_curves`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from search.errors import UserError
from search.simulation.timelines import VerificationState
from search.trials.rung_values import AFTER_RAMP, STAGES

Half = Literal["even", "odd", "all"]
TABLES = ("runs", "curves", "verification")
SCALES = {"1/9": "ninth", "1/3": "third"}  # by the rung at its end
RUNGS = (*AFTER_RAMP, *STAGES)


class CurveTableError(UserError):
    """The tables cannot be used; the text says why."""


@dataclass(frozen=True)
class RungPoint:
    """What a run showed at a rung."""

    standard: float
    certified: float
    seconds: float  # of its training until then, without the probe
    probe_s: float


@dataclass(frozen=True)
class Run:
    """One configuration, measured."""

    number: int
    params: dict[str, Any]
    standard: float
    certified: float
    certified_upper: float
    num_images: int
    teacher_s: float  # 0: its loss reads none
    epoch_seconds: tuple[float, ...]  # of the whole recipe, without probes
    rungs: dict[str, RungPoint]
    verification: tuple[VerificationState, ...]  # by time, at most one a second within a rung of the ladder

    @property
    def training_s(self) -> float:
        return sum(self.epoch_seconds)

    @property
    def epochs(self) -> int:
        return len(self.epoch_seconds)


@dataclass(frozen=True)
class CurveTables:
    """Runs, and the space that they were drawn from."""

    runs: tuple[Run, ...]
    space: str
    settings: tuple[str, ...]


def read_curves(folder: Path, half: Half = "all") -> CurveTables:
    """The runs with even numbers, odd numbers, or all.

    Raises:
        CurveTableError: a table is missing, or there are too few runs.
    """
    for name in TABLES:
        if not (folder / f"{name}.parquet").is_file():
            raise CurveTableError(f"{folder} lacks {name}.parquet; record it with python -m benchmarks.learning_curves")
    runs, curves, states = (pq.read_table(folder / f"{name}.parquet") for name in TABLES)
    metadata = {key.decode(): value.decode() for key, value in (runs.schema.metadata or {}).items()}
    curve_of, states_of = _by_number(curves.to_pylist()), _by_number(states.to_pylist())
    found = [
        _run(row, curve_of[row["number"]], states_of[row["number"]])
        for row in sorted(runs.to_pylist(), key=lambda row: int(row["number"]))
        if half == "all" or row["number"] % 2 == ("even", "odd").index(half)
    ]
    if len(found) < 4:
        raise CurveTableError(f"{folder} has {len(found)} runs in half {half!r}; a model needs at least 4")
    return CurveTables(tuple(found), metadata["space"], tuple(json.loads(metadata["settings"])))


def _by_number(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    grouped: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row["number"], []).append(row)
    return grouped


def _run(row: Mapping[str, Any], curve: Sequence[Mapping[str, Any]], states: Sequence[Mapping[str, Any]]) -> Run:
    epochs = {
        scale: sorted((each for each in curve if each["scale"] == scale), key=lambda each: int(each["epoch"]))
        for scale in (*SCALES.values(), "full")
    }
    full = epochs["full"]
    rungs = {
        name: _point(full, rung_epoch(share, full[0]["ramp_end"], len(full))) for name, share in AFTER_RAMP.items()
    }
    rungs |= {name: _point(epochs[scale], len(epochs[scale])) for name, scale in SCALES.items()}
    return Run(
        number=row["number"],
        params=json.loads(row["params"]),
        standard=row["standard"],
        certified=row["certified"],
        certified_upper=row["certified_upper"],
        num_images=row["num_images"],
        teacher_s=row["teacher_seconds"],
        epoch_seconds=tuple(each["seconds"] for each in full),
        rungs=rungs,
        verification=_thinned(states),
    )


def rung_epoch(share: Fraction, ramp_end: float, epochs: int) -> int:
    """The epoch, from 1, at whose end so much of the time after the ramp has passed."""
    return min(epochs, max(1, math.ceil((ramp_end + float(share) * (1 - ramp_end)) * epochs - 1e-6)))


def _point(curve: Sequence[Mapping[str, Any]], epoch: int) -> RungPoint:
    last = curve[epoch - 1]
    return RungPoint(
        standard=last["standard"],
        certified=max(last["crown_certified"], last["ibp_certified"]),
        seconds=sum(each["seconds"] for each in curve[:epoch]),
        probe_s=last["crown_seconds"],
    )


def _thinned(rows: Sequence[Mapping[str, Any]]) -> tuple[VerificationState, ...]:
    """The end of each rung of the ladder, and between them what lies a second or more apart."""
    kept: list[VerificationState] = []
    for index, row in enumerate(rows):
        ends = index + 1 == len(rows) or rows[index + 1]["rung"] != row["rung"]
        if ends or row["seconds"] - (kept[-1].seconds if kept else 0.0) >= 1:
            kept.append(VerificationState(row["seconds"], row["rung"], row["proved"], row["falsified"]))
    return tuple(kept)
