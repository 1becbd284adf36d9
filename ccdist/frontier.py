"""The open sub-problems of one image, the one with the worst bound first, each packed into a row of bytes.

A row holds what the next split needs: the specification, the signs given, slopes and multipliers to start from, and
the neurons worth splitting. Slopes and multipliers are kept in float16: any value is sound, they only start a search.

Shapes: `N` rows, `U` neurons of the image, `K` candidates.
"""

import heapq
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int, Int8, UInt8
from numpy import ndarray


@dataclass(frozen=True)
class Row:
    """N sub-problems of one image, unpacked.

    lower, upper: of the neurons' inputs, where the margin may be too small (see `ccdist.clipping`).
    candidates: neurons worth splitting, best first; -1 where there is none.
    """

    specs: Int[ndarray, " N"]
    signs: Int8[ndarray, "N U"]
    lower: Float[ndarray, "N U"]
    upper: Float[ndarray, "N U"]
    alpha: Float[ndarray, "N U"]
    beta: Float[ndarray, "N U"]
    candidates: Int[ndarray, "N K"]

    def packed(self) -> UInt8[ndarray, "N bytes"]:
        parts = (
            self.specs.astype(np.int32)[:, None],
            self.signs.astype(np.int8),
            self.lower.astype(np.float32),
            self.upper.astype(np.float32),
            self.alpha.astype(np.float16),
            self.beta.clip(max=np.finfo(np.float16).max).astype(np.float16),
            self.candidates.astype(np.int32),
        )
        count = len(self.specs)
        return np.concatenate([np.ascontiguousarray(part).view(np.uint8).reshape(count, -1) for part in parts], axis=1)

    @classmethod
    def unpacked(cls, rows: UInt8[ndarray, "N bytes"], neurons: int) -> "Row":
        count, start, values = len(rows), 0, []
        num_candidates = (rows.shape[1] - 4 - 13 * neurons) // 4
        for dtype, width in (
            (np.int32, 1),
            (np.int8, neurons),
            (np.float32, neurons),
            (np.float32, neurons),
            (np.float16, neurons),
            (np.float16, neurons),
            (np.int32, num_candidates),
        ):
            size = width * np.dtype(dtype).itemsize
            values.append(np.ascontiguousarray(rows[:, start : start + size]).view(dtype).reshape(count, width))
            start += size
        specs, signs, lower, upper, alpha, beta, candidates = values
        return cls(specs[:, 0], signs, lower, upper, alpha.astype(np.float32), beta.astype(np.float32), candidates)


@dataclass
class Frontier:
    """A heap of rows by bound; among equal bounds the older one first, so that a search repeats itself exactly."""

    heap: list[tuple[float, int, bytes]] = field(default_factory=list)
    pushed: int = 0

    def __len__(self) -> int:
        return len(self.heap)

    @property
    def num_bytes(self) -> int:
        """Of all rows, which are of one size, with what Python adds to each."""
        return len(self.heap) * (len(self.heap[0][2]) + 200) if self.heap else 0

    @property
    def lowest(self) -> float:
        """The worst bound; infinity where nothing is open."""
        return self.heap[0][0] if self.heap else float("inf")

    def push(self, bounds: Float[ndarray, " N"], rows: UInt8[ndarray, "N bytes"]) -> None:
        for bound, row in zip(bounds.tolist(), rows, strict=True):
            heapq.heappush(self.heap, (bound, self.pushed, row.tobytes()))
            self.pushed += 1

    def pop(self, count: int) -> tuple[Float[ndarray, " N"], UInt8[ndarray, "N bytes"]]:
        """Up to `count` rows with the worst bounds; they leave the frontier."""
        taken = [heapq.heappop(self.heap) for _ in range(min(count, len(self.heap)))]
        return _arrays(taken)

    def arrays(self) -> tuple[Float[ndarray, " N"], Int[ndarray, " N"], UInt8[ndarray, "N bytes"]]:
        """Everything, to be stored: bounds, ages, rows."""
        bounds, rows = _arrays(self.heap)
        return bounds, np.array([age for _, age, _ in self.heap], dtype=np.int64), rows

    @classmethod
    def restored(
        cls, bounds: Float[ndarray, " N"], ages: Int[ndarray, " N"], rows: UInt8[ndarray, "N bytes"], pushed: int
    ) -> "Frontier":
        heap = [
            (bound, age, row.tobytes()) for bound, age, row in zip(bounds.tolist(), ages.tolist(), rows, strict=True)
        ]
        return cls(heap, pushed)


def _arrays(heap: list[tuple[float, int, bytes]]) -> tuple[Float[ndarray, " N"], UInt8[ndarray, "N bytes"]]:
    bounds = np.array([bound for bound, _, _ in heap], dtype=np.float64)
    rows = np.frombuffer(b"".join(row for _, _, row in heap), dtype=np.uint8)
    return bounds, rows.reshape(len(heap), -1 if heap else 0)
