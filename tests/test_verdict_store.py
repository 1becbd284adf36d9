"""What a verification leaves on disk: its state, its parts, its counter-examples."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ccdist.config import VerifyConfig
from ccdist.networks import build_network
from ccdist.verdict_store import (
    COUNTEREXAMPLES,
    LadderState,
    Parts,
    Position,
    StateError,
    VerdictStream,
    counterexample_table,
    counterexamples_of,
    identity_of,
    in_split,
    is_whole,
)
from ccdist.verdicts import SCHEMA, CounterExample, Finding, Progress, Rows, Verdict, float32_below

IDENTITY = {"weights": "abc", "config": {"seed": 0, "rungs": ["pgd"]}}


def some_rows() -> Rows:
    rows = Rows.undecided([3, 1, 4, 1])
    rows.add(0, Finding(Verdict.CERTIFIED, "ibp", 3, 0.1))
    rows.add(1, Finding(Verdict.FALSIFIED, "pgd", 1, point=torch.zeros(1, 2, 2)))
    rows.add(2, Finding(prediction=4, lower_bound=-2.5, branches=17))
    return rows


def example(index: int, method: str = "pgd") -> CounterExample:
    return CounterExample(index, method, torch.arange(4.0).view(1, 2, 2) / 7 + index)


# ---- rows ---------------------------------------------------------------------------------------------------------


def test_a_row_is_decided_once_and_its_bound_only_rises() -> None:
    rows = some_rows()
    for finding in (
        Finding(Verdict.FALSIFIED, "pgd", lower_bound=float("nan")),
        Finding(Verdict.CERTIFIED, "crown", lower_bound=0.05),
        Finding(lower_bound=float("inf")),
    ):
        rows.add(0, finding)
    assert (rows.verdict[0], rows.method[0], rows.lower_bound[0]) == ("certified", "ibp", 0.1)
    assert rows.open() == [2, 3]
    assert [rows.count(verdict) for verdict in Verdict] == [1, 1, 2]


def test_rows_and_their_table() -> None:
    rows = some_rows()
    table = rows.table()
    assert table.schema.equals(SCHEMA)
    assert table["prediction"].to_pylist() == [3, 1, 4, None]
    assert table["branches"].to_pylist() == [0, 0, 17, 0]
    assert Rows.of(table).table().equals(table)


@pytest.mark.parametrize("value", [0.1, -0.1, 1 / 3, 0.0, 16777217.0, 1e-50, -1e-50])
def test_a_bound_stored_in_float32_is_still_a_bound(value: float) -> None:
    stored = float32_below(value)
    assert stored <= value
    assert stored == torch.tensor(stored).item()
    assert value - stored <= 1.2e-7 * abs(value) + 1e-44


# ---- the state ------------------------------------------------------------------------------------------------------


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = LadderState(tmp_path / "deep" / "state", IDENTITY)
    assert state.load() is None
    done = [Progress("clean", 0, 0, 4, 4, 4, 0.5), Progress("pgd", 0, 1, 3, 4, 4, 1.5)]
    position = Position(some_rows(), done, ahead=[2, 3], entered=3, seconds=0.25)
    state.save(position, [example(1)])
    state.save(position, [])
    loaded = LadderState(tmp_path / "deep" / "state", IDENTITY).load()
    assert loaded is not None
    back, found = loaded
    assert (back.finished, back.ahead, back.entered, back.seconds) == (done, [2, 3], 3, 0.25)
    assert back.rows.table().equals(position.rows.table())
    assert [(each.index, each.method) for each in found] == [(1, "pgd")]
    assert torch.equal(found[0].point, example(1).point)


def test_a_state_without_a_counter_example_is_damaged(tmp_path: Path) -> None:
    state = LadderState(tmp_path, IDENTITY)
    state.save(Position(some_rows()), [example(3)])
    with pytest.raises(StateError, match=r"image 1 is falsified without a counter-example\); delete it"):
        state.load()


def test_a_counter_example_whose_row_was_not_written_is_found_again(tmp_path: Path) -> None:
    """Counter-examples are written first; a kill between the two leaves one of a row that is still open."""
    state = LadderState(tmp_path, IDENTITY)
    state.save(Position(some_rows()), [example(1)])
    Parts(tmp_path / "counterexamples").append(counterexample_table([example(3)]))
    loaded = state.load()
    assert loaded is not None
    assert [each.index for each in loaded[1]] == [1]


def test_a_state_of_something_else_or_damaged_is_refused(tmp_path: Path) -> None:
    state = LadderState(tmp_path, IDENTITY)
    state.save(Position(some_rows()), [example(1)])
    other = {**IDENTITY, "config": {"seed": 1, "rungs": ["pgd"]}}
    with pytest.raises(StateError, match=r"another verification: there config\.seed is 0, now it is 1; choose another"):
        LadderState(tmp_path, other).load()
    (tmp_path / "counterexamples" / "part-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(StateError, match=r"is damaged .*; delete it to begin again"):
        state.load()
    for content in (b"", b"PAR1"):
        (tmp_path / "rows.parquet").write_bytes(content)
        with pytest.raises(StateError, match=r"is damaged .*; delete it to begin again"):
            state.load()
    pq.write_table(some_rows().table(), tmp_path / "rows.parquet")  # rows that do not say how far they are
    with pytest.raises(StateError, match="is damaged"):
        state.load()


@pytest.mark.parametrize("folder", [False, True])
def test_the_state_of_branch_and_bound_is_forgotten(folder: bool, tmp_path: Path) -> None:
    state = LadderState(tmp_path, IDENTITY)
    state.forget_branch_and_bound()
    if folder:
        state.branch_and_bound.mkdir()
        (state.branch_and_bound / "file").touch()
    else:
        state.branch_and_bound.touch()
    state.forget_branch_and_bound()
    assert list(tmp_path.iterdir()) == []


def test_the_identity_names_what_differs() -> None:
    network = build_network("mlp", input_shape=(1, 2, 2), num_classes=3, width=4).eval()
    images, labels = torch.zeros(2, 1, 2, 2), torch.tensor([0, 1])
    config = VerifyConfig.model_validate({"threat": {"epsilon": "1/10"}})
    one = identity_of(network, images, labels, config)
    assert one == identity_of(network, images, labels, config)
    with torch.no_grad():
        network.head.bias[0] += 1e-7
    others = [
        identity_of(network, images, labels, config),
        identity_of(network, images, labels.flip(0), config),
        identity_of(network, images, labels, config.model_copy(update={"seed": 4})),
    ]
    differing = [{key for key in one if one[key] != other[key]} for other in others]
    assert differing == [{"weights"}, {"weights", "images"}, {"weights", "config"}]


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_parts_are_appended_and_none_is_half(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts")
    assert parts.read(SCHEMA).equals(SCHEMA.empty_table())
    table = some_rows().table()
    parts.append(table.slice(0, 1))
    (tmp_path / "parts" / ".part-00001.parquet.unfinished").write_bytes(b"PA")  # a kill in mid-write
    parts.append(table.slice(1))
    assert [path.name for path in parts.files()] == ["part-00000.parquet", "part-00001.parquet"]
    assert parts.read(SCHEMA).equals(table)


def test_rows_that_are_told_twice_are_written_once(tmp_path: Path) -> None:
    table = some_rows().table()
    VerdictStream(tmp_path, range(100, 104)).add(table.slice(0, 2))
    stream = VerdictStream(tmp_path, range(100, 104))
    stream.add(table)
    stream.add(table)
    written = [pq.read_table(path)["index"].to_pylist() for path in Parts(tmp_path).files()]
    assert written == [[100, 101], [102, 103]]


def test_a_damaged_part_is_written_again(tmp_path: Path) -> None:
    table = some_rows().table()
    for first in (0, 2):
        VerdictStream(tmp_path, range(4)).add(table.slice(first, 2))
    (tmp_path / "part-00000.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"index": [3]}), tmp_path / "part-00002.parquet")
    VerdictStream(tmp_path, range(4)).add(table)
    assert sorted(Parts(tmp_path).read(SCHEMA)["index"].to_pylist()) == [0, 1, 2, 3]


def test_whole_tables_have_every_row_and_every_point(tmp_path: Path) -> None:
    verdicts, points = tmp_path / "verdicts.parquet", tmp_path / "points.parquet"
    assert not is_whole(verdicts, points, range(4))
    pq.write_table(some_rows().table(), verdicts)
    pq.write_table(counterexample_table([example(1)]), points)
    assert is_whole(verdicts, points, range(4))
    assert not is_whole(verdicts, points, range(5))
    pq.write_table(counterexample_table([example(0)]), points)
    assert not is_whole(verdicts, points, range(4))
    points.write_bytes(b"")
    assert not is_whole(verdicts, points, range(4))


def test_rows_of_two_ranges_are_one_table() -> None:
    rows = some_rows().table()
    both = pa.concat_tables([in_split(rows, range(4)), in_split(rows, range(4, 8))])
    assert both.schema.equals(SCHEMA)
    assert both["index"].to_pylist() == list(range(8))


def test_counter_examples_keep_their_shape_and_the_later_of_two_stays() -> None:
    table = counterexample_table([example(5, "pgd"), example(2, "fab"), example(5, "square")])
    assert table.schema.equals(COUNTEREXAMPLES)
    assert table["shape"].to_pylist() == [[1, 2, 2]] * 2
    back = counterexamples_of(table)
    assert [(each.index, each.method) for each in back] == [(2, "fab"), (5, "square")]
    assert torch.equal(back[1].point, example(5).point)
    assert counterexample_table([]).num_rows == 0
