"""The frontier: the worst bound first, the older of equals; rows that come back as they went in."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ccdist.frontier import Frontier, Row

bounds_ = st.lists(st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0, 1e-30, 3.0]), max_size=12)


def numbered(first: int, count: int) -> np.ndarray:
    """Rows of four bytes that say which push they were."""
    return np.arange(first, first + count, dtype=np.int32)[:, None].view(np.uint8).reshape(count, 4)


def numbers(rows: np.ndarray) -> list[int]:
    return np.ascontiguousarray(rows).view(np.int32).flatten().tolist() if len(rows) else []


@given(steps=st.lists(st.one_of(bounds_, st.integers(0, 15), st.just("store")), max_size=20))
def test_it_is_a_sorted_list(steps: list[list[float] | int | str]) -> None:
    """Pushes, pops and storing in any order, against a list that is sorted by bound and age."""
    frontier, model, pushed = Frontier(), [], 0
    for step in steps:
        if isinstance(step, list):
            if step:
                frontier.push(np.array(step), numbered(pushed, len(step)))
            model += [(bound, pushed + age) for age, bound in enumerate(step)]
            pushed += len(step)
        elif isinstance(step, int):
            model.sort()
            bounds, rows = frontier.pop(step)
            assert list(zip(bounds.tolist(), numbers(rows), strict=True)) == model[:step]
            model = model[step:]
        else:
            frontier = Frontier.restored(*frontier.arrays(), frontier.pushed)
        assert len(frontier) == len(model)
        assert frontier.lowest == min((bound for bound, _ in model), default=np.inf)
        assert frontier.pushed == pushed


def test_storing_keeps_the_order_of_equals() -> None:
    frontier = Frontier()
    frontier.push(np.array([0.0, -1.0, 0.0, -1.0]), numbered(0, 4))
    frontier.pop(1)
    again = Frontier.restored(*frontier.arrays(), frontier.pushed)
    for one in (frontier, again):
        one.push(np.array([-1.0, 0.0]), numbered(4, 2))
        assert numbers(one.pop(9)[1]) == [3, 4, 0, 2, 5]


def drawn_row(count: int, neurons: int, candidates: int, seed: int) -> Row:
    draw = np.random.default_rng(seed)
    ends = draw.normal(size=(2, count, neurons)).astype(np.float32)
    return Row(
        specs=draw.integers(0, 200, count),
        signs=draw.integers(-1, 2, (count, neurons)).astype(np.int8),
        lower=ends.min(0),
        upper=ends.max(0),
        alpha=draw.random((count, neurons)).astype(np.float32),
        beta=(10 ** draw.uniform(-9, 3, (count, neurons)) * (draw.random((count, neurons)) < 0.5)).astype(np.float32),
        candidates=draw.integers(-1, max(neurons, 1), (count, candidates)),
    )


@given(
    count=st.integers(1, 5), neurons=st.integers(0, 40), candidates=st.integers(1, 8), seed=st.integers(0, 2**31 - 1)
)
def test_a_row_comes_back(count: int, neurons: int, candidates: int, seed: int) -> None:
    row = drawn_row(count, neurons, candidates, seed)
    frontier = Frontier()
    frontier.push(np.arange(count, dtype=np.float64), row.packed())
    frontier = Frontier.restored(*frontier.arrays(), frontier.pushed)
    _, rows = frontier.pop(count)
    back = Row.unpacked(rows, neurons)
    for name in ("specs", "signs", "lower", "upper", "candidates"):
        np.testing.assert_array_equal(getattr(back, name), getattr(row, name), err_msg=name)
    np.testing.assert_allclose(back.alpha, row.alpha, atol=2**-11)
    np.testing.assert_allclose(back.beta, row.beta, rtol=2**-10, atol=2**-24)
    assert ((back.alpha >= 0) & (back.alpha <= 1)).all()
    assert (back.beta >= 0).all()


def test_a_multiplier_beyond_float16_stays_finite() -> None:
    row = drawn_row(1, 3, 1, 0)
    large = Row(row.specs, row.signs, row.lower, row.upper, row.alpha, np.array([[1e9, np.inf, 7e4]]), row.candidates)
    back = Row.unpacked(large.packed(), 3)
    assert back.beta.tolist() == [[65504.0] * 3]


def test_nothing_to_pop() -> None:
    frontier = Frontier()
    bounds, rows = frontier.pop(3)
    assert len(bounds) == len(rows) == 0
    assert frontier.lowest == np.inf
    assert len(Frontier.restored(*frontier.arrays(), 7)) == 0
