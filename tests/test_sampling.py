"""Suggestions as a pure function: what the sampler is told, what it answers, and what is run instead of a repeat."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState
from studies import closed_form, config_of

from search import pareto
from search.config import GPConfig, NSGA2Config, NSGA3Config, RandomConfig, SearchConfig, TPEConfig
from search.recipe import derive_seed
from search.space import Space
from search.studies.records import RungValues, TrialRecord
from search.suggestions.proposal import DRAWS, Proposal, repetition
from search.suggestions.sampling import DIRECTIONS, Suggested, make_sampler, suggest
from search.suggestions.sampling_view import (
    EARLY_FROM,
    VIEW_SIZES,
    Expectations,
    History,
    frozen_trials,
    shown_trials,
    thinned,
)

FLOORS = {"standard_accuracy": 0.6, "certified_accuracy": 0.3}
SAMPLERS: list[dict[str, Any]] = [
    {"kind": "tpe", "startup_trials": 4},
    {"kind": "nsga2", "population": 4},
    {"kind": "nsga3", "population": 4},
    {"kind": "gp", "startup_trials": 4},
    {"kind": "random"},
]


def record(
    number: int, state: Any = "COMPLETE", standard: float = 0.8, certified: float = 0.4, **changes: Any
) -> TrialRecord:
    """A trial of a study with one number."""
    params = changes.pop("params", {"x": float(number)})
    objectives = {"standard_accuracy": standard, "certified_accuracy": certified} if state == "COMPLETE" else {}
    fields: dict[str, Any] = {
        "key": f"t-{number}",
        "number": number,
        "state": state,
        "params": params,
        "seed": number + 1,
    }
    return TrialRecord(**fields | {"configuration": str(sorted(params.items()))} | objectives | changes)


def rungs(**values: tuple[float, float]) -> dict[str, RungValues]:
    return {name: RungValues(*pair, seconds=1.0) for name, pair in values.items()}


def told(space: Space, history: History, suggested: Suggested, state: Any = "COMPLETE") -> History:
    """The history after the suggested trial has run."""
    number, result = len(history.trials), closed_form(suggested.params)
    trial = record(
        number,
        state,
        result.standard_accuracy,
        result.certified_accuracy,
        params=suggested.params,
        configuration=space.configuration(suggested.params),
    )
    attributes = dict(history.attributes) | ({number: suggested.system_attrs} if suggested.system_attrs else {})
    return History((*history.trials, trial), attributes)


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    return config_of(tmp_path)


# ---- the view ------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(60)  # the first suggestion of a Gaussian process pays for an import
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler["kind"])
def test_the_view_answers_as_optunas_own_study_does(sampler: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: Optuna asked and told in its own in-memory study, with the same seed before each question.

    The Gaussian process gets a space without switches: where some are, it is told more than Optuna's own study holds.
    """
    loss = {"kind": "cc_dist", "alpha": {"low": 0.01, "high": 1.0, "log": True}, "beta": {"low": 1, "high": 9}}
    changes = {"student__loss": loss, "search__points": None} if sampler["kind"] == "gp" else {}
    config = config_of(tmp_path, search__sampler=sampler, **changes)
    space, options = Space(config), config.search
    study, history = optuna.create_study(directions=DIRECTIONS), History()
    for number in range(6 if sampler["kind"] == "gp" else 17):
        seed = derive_seed(number)
        study.sampler = make_sampler(options.sampler, seed)
        trial = study.ask()
        expected = space.suggest(trial)
        result = closed_form(expected)
        for name, floor in FLOORS.items():
            trial.set_constraint(name, floor - getattr(result, name))
        study.tell(trial, [result.standard_accuracy, result.certified_accuracy])
        suggested = suggest(options.sampler, seed, history, space, floors=FLOORS)
        assert suggested.params == expected
        assert suggested.distributions == trial.distributions
        history = told(space, history, suggested)
    assert suggest(options.sampler, 5, history, space, floors={}) == suggest(
        options.sampler, 5, history, space, floors={}
    )


def test_genetic_generations_follow_each_other_and_only_the_last_are_shown(tmp_path: Path) -> None:
    config = config_of(tmp_path, search__sampler={"kind": "nsga2", "population": 4})
    space, sampler, history = Space(config), config.search.sampler, History()
    for number in range(26):
        history = told(space, history, suggest(sampler, number, history, space, floors={}))
    generations = [attributes["NSGAIISampler:generation"] for attributes in history.attributes.values()]
    assert generations == [number // 4 for number in range(26)]
    parents = [shown.number for shown in shown_trials(sampler, history, {}) if generations[shown.number] < 5]
    assert len(shown_trials(sampler, history, {})) == 6 + len(parents) < 16
    earlier = {(name, value) for trial in history.trials[:20] for name, value in trial.params.items()}
    for child in history.trials[20:24]:  # most of a child's values are a parent's
        assert sum(pair in earlier for pair in child.params.items()) >= 2
    late = [pareto.hypervolume([trial.objectives], (0, 0)) for trial in history.trials[16:] if trial.objectives]
    first = [pareto.hypervolume([trial.objectives], (0, 0)) for trial in history.trials[:8] if trial.objectives]
    assert sum(late) / len(late) > sum(first) / len(first)


def test_a_genetic_generation_goes_on_when_the_trial_that_noted_its_parents_has_failed(tmp_path: Path) -> None:
    config = config_of(tmp_path, search__sampler={"kind": "nsga2", "population": 4})
    space, sampler, history = Space(config), config.search.sampler, History()
    for number in range(14):
        suggested = suggest(sampler, number, history, space, floors={})
        history = told(space, history, suggested, "FAILED" if number in (4, 9) else "COMPLETE")
    noting = {number for number, attributes in history.attributes.items() if "sampler_notes" in attributes}
    assert noting == {4, 9, 13} or noting == {4, 9}
    assert suggest(sampler, 14, history, space, floors={}).system_attrs["NSGAIISampler:generation"] == 3


@pytest.mark.parametrize("running", ["RUNNING", "WAITING"])
def test_tpe_keeps_away_from_what_runs_or_waits(running: Any, config: SearchConfig) -> None:
    space, history = Space(config), History()
    for number in range(12):
        history = told(space, history, suggest(RandomConfig(), number, history, space, floors={}))
    before = suggest(TPEConfig(), 5, history, space, floors={})
    after = suggest(TPEConfig(), 5, told(space, history, before, running), space, floors={})
    assert after != before
    assert suggest(TPEConfig(), 5, told(space, history, before, "FAILED"), space, floors={}) == before


def test_what_is_told_of_a_stopped_trial(config: SearchConfig) -> None:
    """Finished trials gained (0.2, 0.1) and (0.1, 0.1) after rung a: the stopped one is told 0.4 + 0.15, 0.3 + 0.1."""
    params = [Space(config).points()[0] | {"beta": 1.0 + number} for number in range(5)]
    finished = [
        record(0, standard=0.7, certified=0.5, rungs=rungs(a=(0.5, 0.4)), params=params[0]),
        record(1, standard=0.6, certified=0.3, rungs=rungs(a=(0.5, 0.2)), params=params[1]),
        record(2, standard=0.9, certified=0.9, params=params[2]),
    ]
    stopped = record(3, "STOPPED", rungs=rungs(z=(0.9, 0.9), a=(0.4, 0.3)), params=params[3])
    history = History((*finished, stopped, record(4, "RUNNING", params=params[4])))

    def view(tell_stopped: Any, floors: Mapping[str, float] = FLOORS) -> list[optuna.trial.FrozenTrial]:
        shown = shown_trials(TPEConfig(), history, floors)
        return list(frozen_trials(shown, history, Space(config), floors, tell_stopped))

    seen = view("constraint")
    assert [trial.state for trial in seen] == [TrialState.COMPLETE] * 4 + [TrialState.RUNNING]
    assert seen[1].values == [0.6, 0.3]
    assert seen[1].constraints == pytest.approx({"standard_accuracy": 0, "certified_accuracy": 0, "stopped": 0})
    assert seen[3].values == pytest.approx([0.55, 0.4])
    assert seen[3].constraints == pytest.approx({"standard_accuracy": 0.05, "certified_accuracy": -0.1, "stopped": 1})
    assert [set(trial.constraints) for trial in view("constraint", {})[:4]] == [{"stopped"}] * 4
    seen = view("values")
    assert seen[3].values == pytest.approx([0.55, 0.4])
    assert seen[3].constraints == pytest.approx({"standard_accuracy": 0.05, "certified_accuracy": -0.1})
    seen = view("pruned")
    assert [trial.number for trial in seen] == [1, 2, 3, 4, 5]
    assert (seen[3].state, seen[3].values, seen[3].intermediate_values) == (TrialState.PRUNED, None, {})
    assert [trial.number for trial in view("nothing", {})] == [1, 2, 3, 5]
    assert not any(trial.constraints for trial in view("nothing", {}))


def test_a_running_trial_with_a_rung_is_told_with_what_is_expected_of_it(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    space = Space(config)
    params = [suggest(RandomConfig(), number, History(), space, floors={}).params for number in range(4)]
    trials = (
        record(0, "STOPPED", params=params[0], rungs=rungs(a=(0.4, 0.1))),
        record(1, "RUNNING", params=params[1], rungs=rungs(a=(0.4, 0.2))),
        record(2, "RUNNING", params=params[2]),
        record(3, "RUNNING", params=params[3], rungs=rungs(b=(0.4, 0.2))),
    )
    finished = tuple(
        record(4 + k, standard=0.6, certified=0.3, params=params[0], rungs=rungs(a=(0.5, 0.1)))
        for k in range(EARLY_FROM)
    )
    history = History((*trials, *finished))

    def view(tell_stopped: Any, early: bool) -> list[optuna.trial.FrozenTrial]:
        return list(frozen_trials(trials, history, space, FLOORS, tell_stopped, early=early))

    told = view("values", True)
    assert [trial.state for trial in told] == [TrialState.COMPLETE] * 2 + [TrialState.RUNNING] * 2
    assert told[1].values == pytest.approx([0.5, 0.4])  # all finished trials gained (0.1, 0.2)
    assert told[1].params == params[1]
    assert set(told[1].constraints) == set(FLOORS)
    assert [trial.constraints["stopped"] for trial in view("constraint", True) if trial.values] == [1, 0]
    assert view("values", False)[1].state == TrialState.RUNNING
    history = History((*trials, *finished[1:]))
    assert view("values", True)[1].state == TrialState.RUNNING  # too few have finished


def test_nothing_is_expected_to_be_proved_that_is_not_classified_correctly() -> None:
    running = record(0, "RUNNING", rungs=rungs(a=(0.4, 0.5)))
    finished = record(1, standard=0.5, certified=0.5, rungs=rungs(a=(0.5, 0.4)))
    assert Expectations([finished]).of(running) == pytest.approx((0.4, 0.4))


def test_a_gaussian_process_models_parameters_that_some_trials_lack(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, history = Space(config), History()
    for number in range(6):
        history = told(space, history, suggest(RandomConfig(), number, history, space, floors={}))
    assert {"beta" in trial.params for trial in history.trials} == {True, False}
    filled = list(frozen_trials(history.trials, history, space, {}, "values", filled=True))
    assert all(set(trial.params) == set(trial.distributions) == set(space.parameters) for trial in filled)
    for number, trial in enumerate(history.trials):
        assert filled[number].params.items() >= trial.params.items()
    # Equal ones would make all other places of the switched-off branch look unexplored.
    absent = [filled[trial.number].params["beta"] for trial in history.trials if "beta" not in trial.params]
    assert len(set(absent)) == len(absent) > 1
    assert list(frozen_trials(history.trials, history, space, {}, "values", filled=True)) == filled

    def by_chance(self: Any, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        raise AssertionError(f"{name} is drawn at random")

    monkeypatch.setattr(optuna.samplers.RandomSampler, "sample_independent", by_chance)
    for seed in range(3):
        suggest(GPConfig(startup_trials=5), seed, history, space, floors={})


def test_what_each_sampler_is_told_beyond_optunas_own_study(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = []

    def watched(*args: Any, **options: Any) -> Any:
        early.append((options["early"], options["filled"]))
        return frozen_trials(*args, **options)

    monkeypatch.setattr("search.suggestions.sampling.frozen_trials", watched)
    for sampler in (TPEConfig(), GPConfig(), NSGA2Config(), NSGA3Config()):
        suggest(sampler, 0, History(), Space(config), floors={})
    suggest(GPConfig(), 0, History(), Space(config), floors={}, tell_stopped="pruned")
    assert early == [(True, False), (True, True), (False, False), (False, False), (False, False)]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler["kind"])
def test_every_sampler_takes_stopped_trials(sampler: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(tmp_path, search__sampler=sampler)
    space, history = Space(config), History()
    for number in range(9):
        state = {3: "FAILED", 8: "RUNNING"}.get(number, "COMPLETE")
        history = told(space, history, suggest(RandomConfig(), number, history, space, floors={}), state)
    stopped = [record(n, "STOPPED", params=history.trials[n].params, rungs=rungs(a=(0.5, 0.2))) for n in (5, 6)]
    history = History((*history.trials[:5], *stopped, *history.trials[7:]))
    for tell_stopped in (
        ("values", "constraint") if sampler["kind"] == "gp" else ("values", "constraint", "pruned", "nothing")
    ):
        suggested = suggest(config.search.sampler, 7, history, space, floors=FLOORS, tell_stopped=tell_stopped)
        space.recipe(suggested.params, 9)  # valid, whatever the sampler was told
        assert set(suggested.params) == set(suggested.distributions) != set()


def test_what_is_expected_stays_within_fractions_and_needs_no_finished_trial() -> None:
    stopped = record(0, "STOPPED", rungs=rungs(a=(0.9, 0.1)))
    assert Expectations([stopped]).of(stopped) == (0.9, 0.1)
    changed = record(1, standard=0.9, certified=0.1, rungs=rungs(a=(0.4, 0.6)))
    assert Expectations([changed]).of(stopped) == (1.0, 0.0)
    assert Expectations([record(2, rungs=rungs(b=(0.1, 0.1)))]).of(stopped) == (0.9, 0.1)


def test_what_is_expected_of_a_verification_that_was_stopped() -> None:
    """Its rung's values and the only gain of 0.1, or 0.3 / 0.6 of its upper end; never outside of its interval."""
    finished = record(0, standard=0.7, certified=0.3, adversarial_accuracy=0.6, rungs=rungs(a=(0.5, 0.2)))
    interval = {"certified": 0.1, "certified_upper": 0.5, "verification_state": "stopped", "expected_certified": 0.12}
    with_rung = record(1, standard=0.8, rungs=rungs(a=(0.5, 0.25)), **interval)
    without = record(2, standard=0.8, **interval)
    trials = [finished, with_rung, without]
    assert Expectations(trials).of(with_rung) == pytest.approx((0.8, 0.35))
    assert Expectations(trials).of(without) == pytest.approx((0.8, 0.25))
    assert Expectations(trials[1:]).of(without) == (0.8, 0.12)  # nobody has finished: what its own rungs of proof say
    assert Expectations(trials).of(record(3, rungs=rungs(a=(0.5, 0.9)), **interval))[1] == 0.5
    assert Expectations(trials).of(record(3, rungs=rungs(a=(0.5, -0.9)), **interval))[1] == 0.1
    assert Expectations(trials).of(finished) == (0.7, 0.3)


eighths = st.integers(1, 8).map(lambda count: count / 8)  # whose means are exact


@given(st.lists(st.tuples(eighths, eighths, st.booleans()), min_size=1, max_size=60), st.integers(2, 40))
def test_the_front_and_the_most_recent_stay_in_view(points: list[tuple[float, float, bool]], size: int) -> None:
    trials = [
        record(number, "STOPPED" if stopped else "COMPLETE", *point) for number, (*point, stopped) in enumerate(points)
    ]
    kept = thinned(trials, {}, size)
    assert len(kept) == min(size, len(trials))
    complete = [trial for trial in trials if trial.objectives is not None]
    layers = pareto.layers([trial.objectives for trial in complete]).tolist()
    best = sorted(zip(layers, [-trial.number for trial in complete], strict=True))[: size // 2]
    assert {-number for _, number in best} <= kept
    others = [trial.number for trial in trials if -trial.number not in [number for _, number in best]]
    assert set(others[len(others) - (len(kept) - len(best)) :]) <= kept


def test_a_long_history_is_thinned_but_what_runs_is_always_shown(config: SearchConfig) -> None:
    size = VIEW_SIZES["tpe"]
    running = [record(0, "RUNNING"), record(1, "WAITING"), record(2, "FAILED"), record(3, "RUNNING", configuration="")]
    history = History((*running, *(record(number) for number in range(4, size + 50))))
    shown = shown_trials(TPEConfig(), history, {})
    assert [trial.number for trial in shown[:3]] == [0, 1, 50]
    assert len(shown) == size + 2
    assert len(shown_trials(NSGA2Config(), history, {})) == 0  # none has a generation
    assert shown_trials(RandomConfig(), history, {}) == []


# ---- what was tried already ----------------------------------------------------------------------------------------


class Cells(Space):
    """A space of so many cells, without a space file."""

    def __init__(self, count: int) -> None:
        self.choices = list(range(count))
        distribution = CategoricalDistribution(self.choices)
        self.parameters: Any = {"cell": type("Cell", (), {"distribution": distribution})}

    def suggest(self, trial: Any) -> dict[str, Any]:
        return {"cell": trial.suggest_categorical("cell", self.choices)}


def proposal(cells: int, trials: Sequence[TrialRecord], config: SearchConfig, **options: Any) -> Proposal:
    search = config.search.model_copy(update=options)
    return Proposal(len(trials), search, History(tuple(trials)), Cells(cells))


def cell(number: int, which: int, state: Any = "COMPLETE", **changes: Any) -> TrialRecord:
    params = {"cell": which}
    return record(number, state, params=params, configuration=Cells(1).configuration(params), **changes)


def test_a_suggestion_that_was_tried_is_drawn_again(config: SearchConfig) -> None:
    trials: list[TrialRecord] = []
    for number in range(24):
        suggested = proposal(40, trials, config).suggest()
        trials.append(cell(number, suggested.params["cell"], ("COMPLETE", "RUNNING", "WAITING", "STOPPED")[number % 4]))
    assert len({trial.params["cell"] for trial in trials}) == 24  # chance: one in thirty thousand


def test_a_failed_configuration_may_be_tried_again(config: SearchConfig) -> None:
    drawn = proposal(9, [], config).suggest()
    failed = [cell(0, drawn.params["cell"], "FAILED")]
    again = Proposal(0, config.search, History(tuple(failed)), Cells(9)).suggest()
    assert again == drawn


def test_an_exhausted_space_gets_further_seeds_but_not_of_what_was_stopped(config: SearchConfig) -> None:
    full = [cell(0, 0), cell(1, 1, "STOPPED"), cell(2, 2, "STOPPED")]
    for number in range(3, 30):
        found = Proposal(number, config.search, History(tuple(full)), Cells(3)).suggest()
        assert found.params == {"cell": 0}
    stopped = [cell(0, 0, "STOPPED"), cell(1, 1, "STOPPED")]
    assert proposal(2, stopped, config).suggest().params["cell"] in (0, 1)  # there is nothing else


def test_a_sampler_that_insists_is_asked_so_often_and_no_more(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def insisting(self: Proposal, sampler: Any, attempt: int, fixed: Any = None) -> Suggested:
        asked.append(attempt)
        return Suggested({"cell": 5}, {})

    monkeypatch.setattr(Proposal, "draw", insisting)
    assert proposal(9, [cell(0, 5)], config).suggest().params == {"cell": 5}
    assert asked == list(range(DRAWS + 1))
    assert proposal(9, [cell(0, 5, "STOPPED")], config).suggest().params == {"cell": 5}
    assert len(set(asked)) == 2 * DRAWS + 1


# ---- further seeds -------------------------------------------------------------------------------------------------


def test_the_front_of_the_means_gets_further_seeds() -> None:
    """Cells 0 (0.9, 0.1) and 1 (mean 0.5, 0.5 of two runs) are the front; 2 is behind, 3 runs, 4 failed."""
    trials = [
        cell(0, 0, standard=0.9, certified=0.1),
        cell(1, 1, standard=0.4, certified=0.6),
        cell(2, 1, standard=0.6, certified=0.4),
        cell(3, 2, standard=0.45, certified=0.45),
        cell(4, 4, "FAILED"),
        cell(5, 3, "RUNNING"),
    ]
    assert repetition(trials, seeds=1, startup=1) is None
    assert repetition(trials, seeds=2, startup=5) is None
    assert repetition(trials, seeds=2, startup=4) == 0
    assert repetition([*trials, cell(6, 0, "WAITING")], seeds=3, startup=4) is None  # a repetition came last
    repeated = [*trials, cell(6, 0, "WAITING"), cell(7, 9, "RUNNING")]
    assert repetition(repeated, seeds=2, startup=4) is None
    assert repetition(repeated, seeds=3, startup=4) == 0  # two runs each: the smaller number
    assert repetition([*repeated, cell(8, 0, "FAILED"), cell(9, 8, "RUNNING")], seeds=4, startup=4) == 1


@given(st.lists(st.tuples(eighths, eighths), min_size=1, max_size=12), st.integers(2, 4))
def test_racing_ends_when_every_configuration_of_the_front_has_its_seeds(
    points: list[tuple[float, float]], seeds: int
) -> None:
    trials = [cell(which, which, standard=point[0], certified=point[1]) for which, point in enumerate(points)]
    while (number := repetition(trials, seeds=seeds, startup=1)) is not None:
        which = trials[number].params["cell"]
        trials.append(cell(len(trials), which, standard=points[which][0], certified=points[which][1]))
        assert repetition(trials, seeds=seeds, startup=1) is None  # never two in a row
        trials.append(cell(len(trials), 100 + len(trials), "FAILED"))
    runs = [sum(trial.params["cell"] == which for trial in trials) for which in range(len(points))]
    front = set(pareto.front(points).tolist())
    assert runs == [seeds if which in front else 1 for which in range(len(points))]


def test_a_repetition_is_the_same_configuration_as_a_new_trial(config: SearchConfig) -> None:
    trials = [cell(number, number, standard=0.1 * number, certified=0.5 - 0.1 * number) for number in range(4)]
    repeated = proposal(40, trials, config, seeds=3, sampler=TPEConfig(startup_trials=2)).suggest()
    assert repeated == Suggested({"cell": 0}, {"cell": CategoricalDistribution(list(range(40)))})
