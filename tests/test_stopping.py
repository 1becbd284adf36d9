"""The rules that end trials early: hand examples, and what must hold for any history. No Ray, no Optuna."""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from search.config import StoppingConfig
from search.pareto import dominates
from search.scheduling.resumption import expected_seconds, resumption
from search.scheduling.standings import Standings, Witnesses
from search.scheduling.stopping import agreement, hoped, judge_rung, judge_verification, place
from search.studies.records import RungValues, TrialRecord, TrialResult, TrialState

Point = tuple[float, float]
RUNG = "after-ramp 0"
ORIGIN = (0.0, 0.0)


def record(
    number: int,
    state: TrialState = "RUNNING",
    *,
    rung: Point | None = None,
    worst: Point | None = None,
    upper: float | None = None,
    configuration: str | None = None,
    seconds: float = 100.0,
) -> TrialRecord:
    """A trial of 100 images; `worst` makes it COMPLETE, `upper` the best certified accuracy if it is above."""
    shown = {} if rung is None else {RUNG: RungValues(*rung, seconds=1.0)}
    made = TrialRecord(f"s-{number:04d}", number, state, {}, configuration or f"c{number}", 0, rungs=shown)
    if worst is None:
        return made
    high = worst[1] if upper is None else upper
    return replace(
        made,
        state="COMPLETE",
        standard_accuracy=worst[0],
        certified_accuracy=worst[1],
        certified_upper=high,
        num_images=100,
        costs={"verification": seconds},
    )


def result(standard: float, lower: float, upper: float) -> TrialResult:
    return TrialResult(standard, upper, lower, upper, "stopped", 100, {}, 1.0, {})


# ---- verification --------------------------------------------------------------------------------------------------


def test_verification_stops_when_its_best_corner_is_dominated_and_the_reason_says_by_whom() -> None:
    trials = [record(0, worst=(0.9, 0.1)), record(1, worst=(0.7, 0.4), upper=0.6), record(2)]
    assert judge_verification(2, result(0.7, 0.0, 0.45), Standings(trials)) is None
    assert judge_verification(2, result(0.7, 0.3, 0.35), Standings(trials)) == (
        "cannot reach the front: s-0001 has at least (0.7000, 0.4000) (standard, certified), "
        "this trial at most (0.7000, 0.3500)"
    )


def test_of_equal_corners_only_the_later_trial_stops() -> None:
    trials = [record(0), record(1, worst=(0.7, 0.4)), record(2)]
    assert judge_verification(0, result(0.7, 0.1, 0.4), Standings(trials)) is None
    assert judge_verification(2, result(0.7, 0.1, 0.4), Standings(trials)) is not None


def test_only_complete_trials_count_and_never_the_trial_itself() -> None:
    better = record(0, worst=(0.9, 0.9))
    states: tuple[TrialState, ...] = ("RUNNING", "FAILED", "STOPPED", "WAITING")
    for state in states:
        assert judge_verification(1, result(0.5, 0.1, 0.2), Standings([replace(better, state=state)])) is None
    assert judge_verification(0, result(0.5, 0.1, 0.2), Standings([better])) is None


@pytest.mark.parametrize(
    ("twin", "stops"),
    [
        (record(1, worst=(0.8, 0.5), configuration="a"), False),  # the other seed is on the front
        (record(1, worst=(0.6, 0.3), configuration="a"), True),  # beaten too
        (record(1, "RUNNING", configuration="a"), False),  # not known yet
        (record(1, "STOPPED", configuration="a"), True),
        (record(1, "FAILED", configuration="a"), True),  # no run
    ],
)
def test_a_configuration_that_may_get_more_seeds_stops_when_all_its_runs_are_beaten(
    twin: TrialRecord, stops: bool
) -> None:
    trials = [record(0, worst=(0.7, 0.4)), twin, record(2, configuration="a")]
    known = result(0.7, 0.1, 0.3)
    assert (judge_verification(2, known, Standings(trials), seeds=3) is not None) == stops
    assert judge_verification(2, known, Standings(trials), seeds=1) is not None
    if twin.state != "FAILED":  # two runs are all that it gets: each is judged for itself
        assert judge_verification(2, known, Standings(trials), seeds=2) is not None


@dataclass(eq=False)
class Verification:
    """A trial's images in the order in which they are decided: 1 proved, 0 falsified, None never decided."""

    number: int
    standard: float
    verdicts: list[int | None]
    fails: bool  # before its verification is finished, unless that is stopped first
    decided: int = 0

    def result(self, share: int | None = None) -> TrialResult:
        seen = self.verdicts[: self.decided if share is None else share]
        size = len(self.verdicts)
        return result(self.standard, seen.count(1) / size, 1 - seen.count(0) / size)


def final_front(trials: Sequence[Verification]) -> list[tuple[Point, int]]:
    """Points by worst corner when all is verified that can be, of equal points the smallest number."""
    return smallest_of_front([(t.result(len(t.verdicts)).worst, t.number) for t in trials if not t.fails])


def smallest_of_front(ends: Sequence[tuple[Point, int]]) -> list[tuple[Point, int]]:
    points = {point: min(n for p, n in ends if p == point) for point, _ in ends}
    return sorted((p, n) for p, n in points.items() if not any(dominates(q, p) for q in points))


def replay(trials: Sequence[Verification], slots: int, rng: random.Random) -> tuple[list[tuple[Point, int]], int]:
    """Verify in arrival order, `slots` at once, with stopping; -> the front of what is stored, images saved."""
    waiting, saved = list(trials), 0
    running: list[Verification] = []
    records = [record(trial.number) for trial in sorted(trials, key=lambda trial: trial.number)]
    standings = Standings(records)
    while waiting or running:
        while waiting and len(running) < slots:
            running.append(waiting.pop(0))
        trial = rng.choice(running)
        trial.decided = min(len(trial.verdicts), trial.decided + rng.randint(1, 4))
        known = trial.result()
        reason = judge_verification(trial.number, known, standings)
        if reason is not None or trial.decided == len(trial.verdicts):
            running.remove(trial)
            saved += len(trial.verdicts) - trial.decided
            records[trial.number] = (
                record(trial.number, "FAILED")
                if reason is None and trial.fails
                else record(trial.number, worst=known.worst, upper=known.certified_upper)
            )
            standings.update(records)
    stored = [(trial.objectives, trial.number) for trial in records if trial.objectives is not None]
    return smallest_of_front(stored), saved


@pytest.mark.parametrize("slots", [1, 4])
def test_stopping_never_changes_the_front_whatever_the_order_of_events(slots: int) -> None:
    saved = 0
    for seed in range(150):
        rng = random.Random(seed)
        trials = [
            # Few images and standard accuracies, so that equal corners are common.
            Verification(
                number,
                rng.randint(4, 8) / 8,
                rng.choices([1, 0, None], [rng.random(), 0.4, 0.1], k=8),
                fails=rng.random() < 0.1,
            )
            for number in range(rng.randint(2, 10))
        ]
        expected = final_front(trials)
        rng.shuffle(trials)
        found, images = replay(trials, slots, rng)
        assert found == expected, f"seed {seed}"
        saved += images
    assert saved > 500  # the rule did something


# ---- rungs ---------------------------------------------------------------------------------------------------------

RULE = StoppingConfig(peers=4, keep=0.5, agreement=0.3)

#  Layers at the rung: 0: (.9, .1), (.7, .5), (.2, .6)   1: (.6, .4), (.1, .6)   2: (.5, .3)
SIX = [(0.9, 0.1), (0.6, 0.4), (0.5, 0.3), (0.7, 0.5), (0.1, 0.6), (0.2, 0.6)]


def at_rung(points: Sequence[Point]) -> list[TrialRecord]:
    return [record(number, rung=point) for number, point in enumerate(points)]


def test_the_best_layers_go_on_then_the_largest_contributions_then_the_smaller_number() -> None:
    values = np.array(SIX)
    # Alone in layer 0, (.9, .1) holds .2 * .1, (.7, .5) holds .5 * .4, (.2, .6) holds .2 * .1: rounding may decide.
    assert [place(values, index, ORIGIN) for index in (3, 1, 4, 2)] == [0, 3, 4, 5]
    assert sorted(place(values, index, ORIGIN) for index in (0, 5)) == [1, 2]
    assert place(np.array([*SIX, (0.5, 0.3)]), 6, ORIGIN) == 6  # equal to number 2, which is before it
    assert place(values, 4, (0.05, 0.0)) == 4
    # Above (.15, .3), number 4 contributes nothing and number 0 neither: both are last in their layers.
    assert [place(values, index, (0.15, 0.3)) for index in (0, 1, 4)] == [2, 3, 4]


def test_a_rung_stops_what_is_not_among_its_best_and_says_who_is_better() -> None:
    standings = Standings(at_rung(SIX))
    assert [n for n in range(6) if judge_rung(n, RUNG, standings, RULE, ORIGIN)] == [1, 2, 4]
    assert judge_rung(2, RUNG, standings, RULE, ORIGIN) == (
        "rung after-ramp 0: not among the best 3 of 6; s-0001 has (0.6000, 0.4000) (standard, certified), "
        "this trial (0.5000, 0.3000)"
    )
    two_thirds = RULE.model_copy(update={"keep": 2 / 3})
    assert [n for n in range(6) if judge_rung(n, RUNG, standings, two_thirds, ORIGIN)] == [2, 4]


def test_a_rung_waits_for_peers_and_failed_trials_are_none() -> None:
    trials = at_rung(SIX[:5])
    assert judge_rung(2, RUNG, Standings(trials), RULE, ORIGIN) is not None
    assert judge_rung(2, RUNG, Standings([*trials[:4], replace(trials[4], state="FAILED")]), RULE, ORIGIN) is None
    assert judge_rung(2, RUNG, Standings([*trials[:4], replace(trials[4], state="STOPPED")]), RULE, ORIGIN) is not None


def test_a_trial_without_values_and_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="trial 3 has no values at rung 'after-ramp 0'"):
        judge_rung(3, RUNG, Standings([record(3)]), RULE, ORIGIN)
    with pytest.raises(ValueError, match="s-0003: rung after-ramp 0 holds"):
        Standings([record(3, rung=(0.5, math.nan))])
    with pytest.raises(ValueError, match="s-0003: its result holds"):
        Standings([record(3, worst=(0.5, 0.2), upper=math.inf)])


def witnesses(rung: Sequence[Point], worst: Sequence[Point], upper: Sequence[float] | None = None) -> Witnesses:
    low = np.array(worst)
    best = low if upper is None else np.stack([low[:, 0], np.array(upper)], axis=1)
    return Witnesses(np.array(rung), low, best, low)


def test_agreement_is_the_share_of_kept_minus_reversed_orders() -> None:
    chain = [(0.1, 0.1), (0.2, 0.2), (0.3, 0.3), (0.4, 0.4), (0.5, 0.5)]  # 10 ordered pairs
    assert agreement(witnesses(chain, chain)) == 1
    assert agreement(witnesses(chain, chain[::-1])) == -1
    # The front (k, 1 - k) orders no pair: what the rung tells apart is equally good.
    assert agreement(witnesses(chain, [(x, 1 - x) for x, _ in chain])) == 0
    # The last two change places: one of the ten is reversed.
    assert agreement(witnesses(chain, [*chain[:3], chain[4], chain[3]])) == pytest.approx(0.8)
    # The same, but intervals leave open which of the last two is better: nine pairs, all kept.
    swapped = [*chain[:3], (0.5, 0.35), (0.6, 0.35)]
    assert agreement(witnesses(chain, swapped, [0.1, 0.2, 0.3, 0.5, 0.5])) == 1
    assert agreement(witnesses(chain[:4], chain[:4])) is None
    assert agreement(witnesses([(x, 1 - x) for x, _ in chain], chain)) is None  # the rung orders no pair


def test_agreement_of_noise_is_near_zero_however_few_results_can_be_ordered() -> None:
    rng = np.random.default_rng(3)
    rung = rng.random((200, 2))
    for slope in (0.0, -0.8):  # results in a square, or along a front
        first, second = rng.random((2, 200))
        noise = agreement(Witnesses(rung, *[np.stack([first, second + slope * first], axis=1)] * 3))
        assert noise is not None
        assert abs(noise) < 0.15


def test_a_rung_that_misleads_stops_nobody() -> None:
    chain = [(k / 10, k / 10) for k in range(1, 6)]
    good = [record(n, rung=p, worst=p) for n, p in enumerate(chain)]
    bad = [record(n, rung=p, worst=q) for n, (p, q) in enumerate(zip(chain, reversed(chain), strict=True))]
    new = record(5, rung=(0.05, 0.05))
    assert judge_rung(5, RUNG, Standings([*good, new]), RULE, ORIGIN) is not None
    assert judge_rung(5, RUNG, Standings([*bad, new]), RULE, ORIGIN) is None
    assert judge_rung(5, RUNG, Standings([*bad[1:], new]), RULE, ORIGIN) is not None  # four results measure nothing


def test_a_margin_lets_go_on_what_may_still_reach_the_front() -> None:
    # From the rung on, the five gained (0, .1), (0, .3), (0, .5), (0, .3), (0, .1): as they are symmetric, the slope
    # is the identity, the forecast a gain of .26, and the residual sqrt(.112 / (4 - 10 / 9)).
    rungs = [(0.5, 0.1), (0.6, 0.1), (0.7, 0.1), (0.8, 0.1), (0.9, 0.1)]
    finals = [(x, y + gain) for (x, y), gain in zip(rungs, (0.1, 0.3, 0.5, 0.3, 0.1), strict=True)]
    told, residual = witnesses(rungs, finals), math.sqrt(0.112 / (4 - 10 / 9))
    wider = math.sqrt(1 + 1 / 5 + 0.2**2 / (0.1 + 4 * 0.02))  # it lies 0.2 from the mean in the first objective
    assert hoped(np.array([0.5, 0.1]), told, 2.0) == pytest.approx([0.5, 0.36 + 2 * residual * wider])
    assert hoped(np.array([0.5, 0.2]), witnesses(rungs[:4], finals[:4]), 2.0) is None
    # A verification that was stopped has no result: the other four are too few, a sixth is as if it were not there.
    assert hoped(np.array([0.5, 0.1]), told._replace(final=np.array([*finals[:4], (0.9, np.nan)])), 2.0) is None
    sixth = Witnesses(*[np.array([*each, (0.1, np.nan)]) for each in told])
    assert hoped(np.array([0.5, 0.1]), sixth, 2.0) == pytest.approx(hoped(np.array([0.5, 0.1]), told, 2.0))
    done = [record(n, rung=p, worst=q) for n, (p, q) in enumerate(zip(rungs, finals, strict=True))]
    standings = Standings([*done, record(5, rung=(0.55, 0.05))])
    # It may hope for (.55, .31 + .334 * margin); the front holds (.7, .6).
    for margin, stops in [(None, True), (0.0, True), (0.8, True), (0.9, False), (2.0, False)]:
        assert (judge_rung(5, RUNG, standings, RULE, ORIGIN, margin=margin) is not None) == stops


TENTHS = st.integers(0, 6).map(lambda tenths: tenths / 10)
POINTS = st.tuples(TENTHS, TENTHS)
STATES: tuple[TrialState, ...] = ("RUNNING", "COMPLETE", "STOPPED", "FAILED")


@st.composite
def histories(draw: st.DrawFn) -> list[TrialRecord]:
    drawn = draw(
        st.lists(st.tuples(POINTS, POINTS, TENTHS, st.sampled_from(STATES), st.booleans()), min_size=1, max_size=14)
    )
    return [
        record(n, rung=rung if shown else None, worst=worst, upper=worst[1] + width)
        if state == "COMPLETE"
        else record(n, state, rung=rung if shown else None)
        for n, (rung, worst, width, state, shown) in enumerate(drawn)
    ]


RULES = st.builds(
    StoppingConfig,
    keep=st.sampled_from([1e-6, 1 / 3, 0.5, 0.9]),
    peers=st.integers(1, 6),
    agreement=st.sampled_from([-1.0, 0.3]),
)


@settings(max_examples=max(60, settings.default.max_examples))  # each has many parts
@given(histories(), RULES, POINTS, st.sampled_from([None, 0.0, 1.0]), st.randoms())
def test_what_nobody_dominates_goes_on_and_the_order_of_records_does_not_matter(
    trials: list[TrialRecord],
    rule: StoppingConfig,
    reference: Point,
    margin: float | None,
    rng: random.Random,
) -> None:
    standings = Standings(trials)
    shuffled = Standings(rng.sample(trials, len(trials)))
    grown = Standings()
    for count in range(len(trials) + 1):
        grown.update(trials[:count])
    shown = {
        t.number: (t.rungs[RUNG].standard_accuracy, t.rungs[RUNG].certified_accuracy)
        for t in trials
        if t.rungs and t.state != "FAILED"
    }
    for number, point in shown.items():
        reason = judge_rung(number, RUNG, standings, rule, reference, margin=margin)
        for other in (shuffled, grown):
            assert judge_rung(number, RUNG, other, rule, reference, margin=margin) == reason
        if not any(dominates(peer, point) for peer in shown.values()):
            assert reason is None
    for number, trial in enumerate(trials):
        known = result(*(trial.objectives or (0.3, 0.2)), upper=0.6)
        reason = judge_verification(number, known, standings)
        assert judge_verification(number, known, shuffled) == judge_verification(number, known, grown) == reason
        others = [t.objectives for t in trials if t.number != number and t.objectives is not None]
        if not any(q == known.best or dominates(q, known.best) for q in others):
            assert reason is None


def naive_order(values: NDArray[np.float64], reference: Point) -> list[int]:
    """Peel fronts one after the other; area by counting the tenths-cells that only this point covers."""
    left, order = list(range(len(values))), []
    while left:
        layer = [i for i in left if not any(dominates(values[j], values[i]) for j in left)]

        def share(i: int, layer: list[int] = layer) -> int:
            cells = itertools.product(np.arange(0.05, 0.7, 0.1), repeat=2)
            above = [c for c in cells if c[0] > reference[0] and c[1] > reference[1]]
            covers = [{c for c in above if c[0] < values[k][0] and c[1] < values[k][1]} for k in range(len(values))]
            return len(covers[i].difference(*[covers[k] for k in layer if tuple(values[k]) != tuple(values[i])]))

        order += sorted(layer, key=lambda i: (-share(i), i))
        left = [i for i in left if i not in layer]
    return order


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=9), POINTS)
def test_place_agrees_with_peeling(tenths: list[tuple[int, int]], reference: Point) -> None:
    # Whole numbers: equal shares stay equal, where rounded products could order them.
    values = np.array(tenths, dtype=np.float64)
    corner = (round(reference[0] * 10), round(reference[1] * 10))
    order = naive_order(values / 10, reference)
    assert [place(values, index, corner) for index in order] == list(range(len(order)))


# ---- resumption ----------------------------------------------------------------------------------------------------


def test_verification_resumes_where_the_front_becomes_known_fastest() -> None:
    known = record(0, worst=(0.9, 0.3))
    dear = record(1, worst=(0.5, 0.5), upper=0.7, seconds=800)  # 80 decided, 20 open: 200 s
    cheap = record(2, worst=(0.8, 0.4), upper=0.5, seconds=90)  # 90 decided, 10 open: 10 s
    beaten = record(3, worst=(0.7, 0.1), upper=0.3, seconds=1)
    assert [expected_seconds(trial) for trial in (dear, cheap)] == pytest.approx([200, 10])
    trials = [known, dear, cheap, beaten, record(4), record(5, "STOPPED")]
    assert resumption(trials, ORIGIN) == resumption(trials[::-1], ORIGIN) == 2
    assert resumption(trials, ORIGIN, without=[2]) == 1
    assert resumption(trials, ORIGIN, without=[1, 2]) is None  # what is surely dominated is never chosen
    assert resumption(trials, (0.85, 0.0)) is None  # nothing open reaches beyond the reference
    # Seconds spent in vain make it dearer until the other one is the better bargain.
    assert resumption([known, dear, replace(cheap, costs={"verification": 9000.0})], ORIGIN) == 1
    # Without a recorded cost an image counts one second: 10 s against 200 s.
    assert resumption([known, dear, replace(cheap, costs={})], ORIGIN) == 2
    assert resumption([], ORIGIN) is None
