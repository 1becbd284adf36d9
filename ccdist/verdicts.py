"""What a verification answers: three verdicts, one row for each image, and the accuracies that follow from them.

Certified means proved with a margin above a rounding allowance; falsified means that a plain forward pass
misclassifies a point of the region; anything else is undecided, and counts as not certified.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pyarrow as pa
from torch import Tensor

from ccdist.attack_ensemble import MEMBERS

SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("label", pa.int16()),
        ("prediction", pa.int16()),  # null where memory did not suffice for one image's forward pass
        ("verdict", pa.string()),
        ("method", pa.string()),  # the rung that decided, of the ensemble its member; "" while undecided
        # Best proved lower bound of the margin, in logits, less rounding; null without one. Of a proof by branch and
        # bound only what the margin is above, which may be tiny.
        ("lower_bound", pa.float32()),
        ("seconds", pa.float32()),  # this image's share of the rungs it went through
        ("branches", pa.int32()),  # sub-problems of branch and bound
    ]
)

# Whose counter-examples count against the adversarial accuracy; those of branch and bound do not.
ATTACKS = ("pgd", *MEMBERS)


class Verdict(StrEnum):
    CERTIFIED = "certified"
    FALSIFIED = "falsified"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Finding:
    """What a rung has to say about one image.

    lower_bound: proved lower bound of the margin, in logits; nan or infinite: none.
    point: [C, H, W], where a plain forward pass errs; None for the image itself, and where nothing is falsified.
    """

    verdict: Verdict = Verdict.UNDECIDED
    method: str = ""
    prediction: int | None = None
    lower_bound: float | None = None
    branches: int = 0
    point: Tensor | None = None


@dataclass(frozen=True)
class CounterExample:
    """A point [C, H, W] of an image's region, float32 on the CPU, that a plain forward pass misclassifies."""

    index: int
    method: str
    point: Tensor


@dataclass(frozen=True)
class Progress:
    """How far a verification is; the counts are exact at any time: proved + falsified + open = images.

    entered: images that the rung began with; handled: those among them that it is done with, decided or not.
    seconds: spent on the rung so far, in all processes together.
    """

    rung: str
    proved: int
    falsified: int
    open: int
    entered: int
    handled: int
    seconds: float


@dataclass
class Rows:
    """The columns of the table while the ladder runs; a row is decided once and its bound only rises."""

    label: list[int]
    prediction: list[int | None]
    verdict: list[str]
    method: list[str]
    lower_bound: list[float | None]
    seconds: list[float]
    branches: list[int]

    @classmethod
    def undecided(cls, labels: list[int]) -> "Rows":
        """A row for each label, with nothing known."""
        count = len(labels)
        undecided = [str(Verdict.UNDECIDED)] * count
        return cls(labels, [None] * count, undecided, [""] * count, [None] * count, [0.0] * count, [0] * count)

    @classmethod
    def of(cls, table: pa.Table) -> "Rows":
        """The rows of a whole table of `SCHEMA`."""
        return cls(*(table[name].to_pylist() for name in SCHEMA.names[1:]))

    def __len__(self) -> int:
        return len(self.label)

    def is_open(self, index: int) -> bool:
        return self.verdict[index] == Verdict.UNDECIDED

    def open(self) -> list[int]:
        """Indices of the undecided images, ascending."""
        return [index for index in range(len(self)) if self.is_open(index)]

    def count(self, verdict: Verdict) -> int:
        return self.verdict.count(str(verdict))

    def add(self, index: int, finding: Finding) -> None:
        """Take what a rung found; a row that is decided keeps its verdict."""
        if finding.prediction is not None:
            self.prediction[index] = finding.prediction
        before, bound = self.lower_bound[index], finding.lower_bound
        if bound is not None and math.isfinite(bound):
            self.lower_bound[index] = bound if before is None else max(before, bound)
        self.branches[index] = max(self.branches[index], finding.branches)
        if self.is_open(index):
            self.verdict[index], self.method[index] = str(finding.verdict), finding.method

    def table(self) -> pa.Table:
        """All rows as a table of `SCHEMA`; bounds are rounded downward, so that they stay bounds."""
        columns = [
            list(range(len(self))),
            self.label,
            self.prediction,
            self.verdict,
            self.method,
            [None if bound is None else float32_below(bound) for bound in self.lower_bound],
            self.seconds,
            self.branches,
        ]
        return pa.table([pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], SCHEMA)


def float32_below(value: float) -> float:
    """The largest float32 number that is not above the value."""
    with np.errstate(over="ignore"):
        rounded = np.float32(value)
    return float(np.nextafter(rounded, np.float32(-np.inf)) if float(rounded) > value else rounded)


@dataclass(frozen=True)
class Accuracies:
    """Fractions of N images. certified <= certified_upper <= adversarial <= standard for each image."""

    standard: float
    adversarial: float
    certified: float  # proved / N
    certified_upper: float  # (N - falsified) / N
    num_images: int


def accuracies(table: pa.Table) -> Accuracies:
    """Standard, adversarial and certified accuracy of a table of verdicts.

        standard = 1 - #(falsified by clean) / N,   adversarial = 1 - #(falsified by clean or an attack) / N
        certified in [#certified / N, 1 - #falsified / N]

    Attacks are PGD and the ensemble's members; what branch and bound falsifies counts against certified_upper only.
    Of a ladder without an attack, adversarial equals standard, and says nothing.

    Raises:
        ValueError: the table has no rows.
    """
    count = table.num_rows
    if count == 0:
        raise ValueError("no images were verified; accuracies of an empty table are not defined")
    verdicts, methods = table["verdict"].to_pylist(), table["method"].to_pylist()
    falsified = [method for verdict, method in zip(verdicts, methods, strict=True) if verdict == Verdict.FALSIFIED]
    clean = falsified.count("clean")
    # Counts are subtracted before the division: 1 - 10/24 is less than 14/24, which would turn the order around.
    return Accuracies(
        standard=(count - clean) / count,
        adversarial=(count - clean - sum(method in ATTACKS for method in falsified)) / count,
        certified=verdicts.count(Verdict.CERTIFIED) / count,
        certified_upper=(count - len(falsified)) / count,
        num_images=count,
    )
