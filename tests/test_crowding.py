"""Places that were tried often enough: `search.suggestions.crowding`."""

from typing import Any

import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from studies import config_of

from search.config import GPConfig, TPEConfig
from search.space import Space
from search.studies.records import TrialRecord, TrialState
from search.suggestions.crowding import CROWD, LATEST, is_crowded, is_near
from search.suggestions.proposal import Proposal
from search.suggestions.sampling import Suggested
from search.suggestions.sampling_view import History, distributions

KNOWN: dict[str, BaseDistribution] = {
    "alpha": FloatDistribution(0.01, 1.0, log=True),
    "ramp": FloatDistribution(0.2, 0.7),
    "steps": IntDistribution(1, 21),
    "loss": CategoricalDistribution(["a", "b"]),
    "fixed": FloatDistribution(2.0, 2.0),
}
HERE: dict[str, Any] = {"alpha": 0.1, "ramp": 0.5, "steps": 5, "loss": "a", "fixed": 2.0}


@pytest.mark.parametrize(
    ("change", "near"),
    [
        ({}, True),
        ({"alpha": 0.157}, True),  # a fifth of a decade of two
        ({"alpha": 0.160}, False),
        ({"ramp": 0.451}, True),
        ({"ramp": 0.449}, False),
        ({"steps": 7}, True),
        ({"steps": 8}, False),
        ({"loss": "b"}, False),
    ],
)
def test_near_is_a_tenth_of_each_range_on_its_own_scale(change: dict[str, Any], near: bool) -> None:
    assert is_near(HERE, HERE | change, KNOWN) == near
    assert is_near(HERE | change, HERE, KNOWN) == near


def test_trials_with_other_parameters_are_not_near() -> None:
    assert not is_near(HERE, {name: value for name, value in HERE.items() if name != "ramp"}, KNOWN)


def trial(number: int, params: dict[str, Any], state: TrialState = "COMPLETE", name: str = "") -> TrialRecord:
    return TrialRecord(f"s-{number:04d}", number, state, params, name or f"c{number}", number)


def test_a_crowd_is_so_many_configurations_of_the_latest_trials() -> None:
    def crowded(trials: list[TrialRecord]) -> bool:
        return is_crowded(HERE, KNOWN, trials)

    states: list[TrialState] = ["COMPLETE", "STOPPED", "RUNNING"]
    crowd = [trial(number, HERE | {"ramp": 0.5 + number / 100}, state) for number, state in enumerate(states)]
    assert len(crowd) == CROWD
    assert crowded(crowd)
    assert not crowded(crowd[1:])
    assert not crowded([*crowd[1:], trial(0, HERE, "FAILED")])
    assert not crowded([*crowd[1:], trial(3, dict(crowd[1].params), name="c1")])  # a further seed
    far = [trial(3 + number, HERE | {"loss": "b"}) for number in range(LATEST)]
    assert crowded([*crowd, *far[:-3]])
    assert not crowded([*crowd, *far])


def test_a_crowded_suggestion_of_a_gaussian_process_is_replaced(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    space = Space(config)
    here = {"loss": "cc_dist", "alpha": 0.5, "beta": 5.0, "warm_up": 0.05, "steps": 2}
    there, nowhere = here | {"alpha": 0.01}, here | {"alpha": 0.1}
    asked = []

    def stubborn(**answers: dict[str, Any]) -> Any:
        def draw(self: Proposal, sampler: Any, attempt: int, fixed: Any = None) -> Suggested:
            asked.append((sampler.kind, attempt))
            return Suggested(answers[sampler.kind], distributions(space, answers[sampler.kind]))

        return draw

    crowd = tuple(trial(number, here | {"alpha": 0.5 + number / 100}) for number in range(1, 4))
    crowd += tuple(trial(number, there | {"beta": number / 2.0}) for number in range(10, 13))

    def suggestion(sampler: Any, **answers: dict[str, Any]) -> dict[str, Any]:
        monkeypatch.setattr(Proposal, "draw", stubborn(**answers))
        search = config.search.model_copy(update={"sampler": sampler})
        return Proposal(len(crowd), search, History(crowd), space).suggest().params

    assert suggestion(GPConfig(), gp=nowhere) == nowhere
    assert suggestion(TPEConfig(), tpe=here) == here
    monkeypatch.setattr("search.suggestions.proposal.is_by_values", lambda tell_stopped: False)
    assert suggestion(GPConfig(), gp=here) == here  # as Optuna's own
    monkeypatch.undo()
    assert suggestion(GPConfig(), gp=here, tpe=nowhere, random=there) == nowhere
    assert suggestion(GPConfig(), gp=here, tpe=here | {"beta": 5.1}, random=nowhere) == nowhere
    asked.clear()
    assert suggestion(GPConfig(), gp=here, tpe=here | {"beta": 5.1}, random=there | {"beta": 5.1}) == here
    assert len({attempt for _, attempt in asked}) == len(asked) == 3  # each with a seed of its own
