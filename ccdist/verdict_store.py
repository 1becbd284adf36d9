"""A verification on disk: where a killed one goes on from, its rows while it runs, its counter-examples.

The state is a folder of `rows.parquet`, all rows and how far the ladder is, written whole in one atomic step, and
`counterexamples/`, appended to before the rows that they falsify are written. Parts of rows and counter-examples are
numbered files `part-00000.parquet`, each complete from the moment that it is there.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccdist import checkpoint
from ccdist.atomic_files import write_table
from ccdist.config import VerifyConfig
from ccdist.networks import Network
from ccdist.run_folders import differing_keys
from ccdist.verdicts import SCHEMA, CounterExample, Progress, Rows, Verdict

FORMAT_VERSION = 1  # of a state; one that names none is of version 1
COUNTEREXAMPLES = pa.schema(
    [
        ("index", pa.int32()),
        ("method", pa.string()),
        ("pixels", pa.list_(pa.float32())),  # row by row, as its shape says
        ("shape", pa.list_(pa.int32())),  # channels, height, width
    ]
)


class StateError(ValueError):
    """A state is damaged, or one of another verification."""


@dataclass
class Position:
    """How far a ladder is.

    ahead: images that the rung after the finished ones still has to handle; None: it has not begun.
    entered: with how many images that rung began.
    seconds: spent on it so far.
    """

    rows: Rows
    finished: list[Progress] = field(default_factory=list)
    ahead: list[int] | None = None
    entered: int = 0
    seconds: float = 0.0


class LadderState:
    """The folder from which a killed verification goes on."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.branch_and_bound = folder / "branch_and_bound"  # its own file, or whatever it makes of this path
        self._identity = identity
        self._rows = folder / "rows.parquet"
        self._examples = Parts(folder / "counterexamples")

    def load(self) -> tuple[Position, list[CounterExample]] | None:
        """Where it stopped, and the counter-examples of its falsified rows; None: nothing is there.

        Raises:
            StateError: it is damaged, or about another network, other images or another ladder.
            NewerFormatError: a newer program wrote it.
        """
        if not self._rows.exists():
            return None
        try:
            table = pq.read_table(self._rows)
            stored = json.loads(table.schema.metadata[b"state"])
            checkpoint.check_format(stored.get("format_version", 1), self.folder, newest=FORMAT_VERSION)
            place = stored["position"]
            finished = [Progress(**each) for each in place.pop("finished")]
            position = Position(rows=Rows.of(table), finished=finished, **place)
            identity = dict(stored["identity"])
            examples = counterexamples_of(self._examples.read(COUNTEREXAMPLES))
        except checkpoint.NewerFormatError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's own errors are among them
            told = " ".join(str(error).split())
            raise StateError(f"{self.folder} is damaged ({told}); delete it to begin again") from error
        for key, there, asked in differing_keys(identity, self._identity):
            raise StateError(
                f"{self.folder} belongs to another verification: there {key} is {there}, now it is {asked}; "
                "choose another folder, or delete that one"
            )
        without = falsified_by_point(table) - {each.index for each in examples}
        if without:
            raise StateError(
                f"{self.folder} is damaged (image {min(without)} is falsified without a counter-example); delete it to "
                "begin again"
            )
        # One that was written just before a kill is about a row that is still open: it is found again.
        falsified = {index for index in range(len(position.rows)) if position.rows.verdict[index] == Verdict.FALSIFIED}
        return position, [each for each in examples if each.index in falsified]

    def save(self, position: Position, found: Sequence[CounterExample]) -> None:
        """Write how far it is, with the counter-examples found since the last time."""
        if found:
            self._examples.append(counterexample_table(found))
        self.folder.mkdir(parents=True, exist_ok=True)
        place = {name: getattr(position, name) for name in ("ahead", "entered", "seconds")}
        content = {
            "format_version": FORMAT_VERSION,
            "identity": self._identity,
            "position": {**place, "finished": [asdict(each) for each in position.finished]},
        }
        write_table(self._rows, position.rows.table().replace_schema_metadata({"state": json.dumps(content)}))

    def forget_branch_and_bound(self) -> None:
        """Remove its own state: it is done, and its rows are here."""
        if self.branch_and_bound.is_dir():
            shutil.rmtree(self.branch_and_bound)
        else:
            self.branch_and_bound.unlink(missing_ok=True)


class Parts:
    """Tables of one schema as numbered files in a folder; appended to, and readable at any time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def files(self) -> list[Path]:
        """In the order in which they were written."""
        return sorted(path for path in self.folder.glob("part-*.parquet") if re.search(r"-\d+$", path.stem))

    def read(self, schema: pa.Schema) -> pa.Table:
        """All that was appended."""
        return pa.concat_tables([schema.empty_table(), *(pq.read_table(path) for path in self.files())])

    def drop_unreadable(self, schema: pa.Schema) -> None:
        """Delete the files that are damaged or of another schema."""
        for path in self.files():
            if _readable(path, schema) is None:
                path.unlink()

    def append(self, table: pa.Table) -> None:
        """Write one more file, complete from the moment that it is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files = self.files()
        number = int(files[-1].stem.removeprefix("part-")) + 1 if files else 0
        write_table(self.folder / f"part-{number:05d}.parquet", table)


class VerdictStream:
    """The rows of a running verification, appended as images get decided; `index` is that in the split.

    What cannot be read there is deleted: its rows are told again, and written again.
    """

    def __init__(self, folder: Path, indices: range) -> None:
        self._parts = Parts(folder)
        self._indices = indices
        self._parts.drop_unreadable(SCHEMA)
        self._written = set(self._parts.read(SCHEMA)["index"].to_pylist())

    def add(self, rows: pa.Table) -> None:
        """Append the rows that are not there yet: a resumed verification tells them all again."""
        rows = in_split(rows, self._indices)
        fresh = [position for position, index in enumerate(rows["index"].to_pylist()) if index not in self._written]
        if fresh:
            rows = rows.take(fresh)
            self._parts.append(rows)
            self._written.update(rows["index"].to_pylist())


def is_whole(verdicts: Path, counterexamples: Path, indices: range) -> bool:
    """Whether the two tables of a finished verification of these images can be read and lack nothing."""
    rows, examples = _readable(verdicts, SCHEMA), _readable(counterexamples, COUNTEREXAMPLES)
    if rows is None or examples is None:
        return False
    return rows["index"].to_pylist() == list(indices) and falsified_by_point(rows) <= set(examples["index"].to_pylist())


def _readable(path: Path, schema: pa.Schema) -> pa.Table | None:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException):
        return None
    return table if table.schema.equals(schema) else None


def falsified_by_point(rows: pa.Table) -> set[int]:
    """Indices of the rows that need a counter-example: falsified, and not by the image itself."""
    columns = (rows[name].to_pylist() for name in ("index", "verdict", "method"))
    return {
        index
        for index, verdict, method in zip(*columns, strict=True)
        if verdict == Verdict.FALSIFIED and method != "clean"
    }


def in_split(rows: pa.Table, indices: range) -> pa.Table:
    """The same rows, `index` counted in the split instead of among the images that were verified."""
    moved = pa.array([indices[index] for index in rows["index"].to_pylist()], pa.int32())
    return rows.set_column(0, SCHEMA.field("index"), moved)


def counterexample_table(examples: Iterable[CounterExample]) -> pa.Table:
    """Counter-examples as rows of `COUNTEREXAMPLES`, sorted by index; of two for one image the later."""
    latest = {each.index: each for each in examples}
    rows = [
        {
            "index": each.index,
            "method": each.method,
            "pixels": each.point.flatten().numpy(),
            "shape": list(each.point.shape),
        }
        for _, each in sorted(latest.items())
    ]
    return pa.Table.from_pylist(rows, COUNTEREXAMPLES)


def counterexamples_of(table: pa.Table) -> list[CounterExample]:
    """The counter-examples in a table, one for each image."""
    examples = {
        row["index"]: CounterExample(
            row["index"],
            row["method"],
            torch.from_numpy(np.asarray(row["pixels"], dtype=np.float32)).view(row["shape"]),
        )
        for row in table.to_pylist()
    }
    return list(examples.values())


def identity_of(
    network: Network, images: Float[Tensor, "N C H W"], labels: Int[Tensor, " N"], config: VerifyConfig
) -> dict[str, Any]:
    """What a verification is about: hashes of the network and of the images, and the ladder."""
    layers = hashlib.sha256(repr(network).encode()).hexdigest()  # strides and slopes are no weights
    digest = hashlib.sha256(repr((tuple(images.shape), images.dtype)).encode())
    for tensor in (images, labels):
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return {
        "layers": layers[:16],
        "weights": checkpoint.weights_sha256(network)[:16],
        "images": digest.hexdigest()[:16],
        "config": config.model_dump(mode="json"),
    }
