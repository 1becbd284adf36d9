"""Ranges: their names, their ends, their conditions, and the recipes and seeds that come of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from studies import TREE, config_of, tree, write_space

from ccdist.loss_config import CCDistConfig, CCIBPConfig
from search.config import SpaceFileError, load_search_config
from search.recipe import derive_seed
from search.space import FULL_CORNERS, Space


class FakeTrial:
    """Answers from a table, else with one end of the range; remembers what it was asked."""

    def __init__(self, answers: Mapping[str, Any] | None = None, *, high: bool = False) -> None:
        self.answers, self.high = dict(answers or {}), high
        self.asked: dict[str, tuple[Any, ...]] = {}

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        assert name not in self.asked
        self.asked[name] = ("float", low, high, log)
        return float(self.answers.get(name, high if self.high else low))

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        assert name not in self.asked
        self.asked[name] = ("int", low, high, log)
        return int(self.answers.get(name, high if self.high else low))

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        assert name not in self.asked
        self.asked[name] = ("choice", *choices)
        return self.answers.get(name, choices[0])


def space_of(folder: Path, **changes: Any) -> Space:
    return Space(config_of(folder, **changes))


def mistake(folder: Path, **changes: Any) -> str:
    with pytest.raises(SpaceFileError) as caught:
        space_of(folder, **changes)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_parameter_has_the_name_of_its_key(tmp_path: Path) -> None:
    parameters = space_of(tmp_path).parameters
    assert {name: parameter.distribution for name, parameter in parameters.items()} == {
        "loss": CategoricalDistribution(("cc_dist", "no_distillation")),
        "alpha": FloatDistribution(0.01, 1.0, log=True),
        "beta": FloatDistribution(0.5, 50.0, log=True),
        "warm_up": FloatDistribution(0.0, 0.1),
        "steps": IntDistribution(1, 4),
    }
    assert parameters["beta"].branch == (("loss", "cc_dist"),)
    assert parameters["warm_up"].branch == ()


def test_two_paths_with_the_same_key_have_their_whole_names(tmp_path: Path) -> None:
    space = space_of(
        tmp_path,
        teacher__epochs={"low": 1, "high": 2, "integer": True},
        student__epochs={"low": 2, "high": 3, "integer": True},
    )
    assert {"teacher.epochs", "student.epochs", "alpha"} <= set(space.parameters)
    assert "epochs" not in space.parameters
    recipe = space.recipe(space.suggest(FakeTrial({"teacher.epochs": 2, "student.epochs": 3})), 0)
    assert (recipe.teacher.epochs, recipe.student.epochs) == (2, 3)


def test_a_conditional_parameter_is_asked_for_where_it_exists(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    with_teacher, without = FakeTrial({"loss": "cc_dist"}), FakeTrial({"loss": "no_distillation"})
    assert set(space.suggest(with_teacher)) == {"loss", "alpha", "beta", "warm_up", "steps"}
    assert set(space.suggest(without)) == {"loss", "alpha", "warm_up", "steps"}
    assert with_teacher.asked["alpha"] == without.asked["alpha"] == ("float", 0.01, 1.0, True)
    assert without.asked["steps"] == ("int", 1, 4, False)


def test_a_name_in_two_branches_has_one_range(tmp_path: Path) -> None:
    content = tree()
    content["student"]["loss"]["choices"]["no_distillation"]["alpha"]["high"] = 0.5
    with pytest.raises(SpaceFileError, match=r"student\.loss\.alpha has different ranges in different choices"):
        Space(load_search_config(write_space(tmp_path / "space.yaml", content)))


def test_the_branch_decides_the_configuration(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    distilled = space.recipe(space.suggest(FakeTrial({"loss": "cc_dist", "alpha": 0.25, "beta": 2.0})), 0)
    assert distilled.student.loss == CCDistConfig(alpha=0.25, beta=2.0)
    assert distilled.needs_teacher
    plain = space.recipe(space.suggest(FakeTrial({"loss": "no_distillation", "alpha": 0.25})), 0)
    assert plain.student.loss == CCIBPConfig(alpha=0.25)
    assert not plain.needs_teacher


def test_choices_may_be_plain_values(tmp_path: Path) -> None:
    space = space_of(
        tmp_path, network__width={"choices": [4, 8]}, student__initialization={"choices": ["ibp", "teacher"]}
    )
    recipe = space.recipe(
        space.suggest(FakeTrial({"width": 4, "initialization": "teacher", "loss": "no_distillation"})), 0
    )
    assert recipe.teacher.network == recipe.student.network
    assert recipe.student.network.width == 4
    assert recipe.needs_teacher  # its weights are the student's first ones


def test_both_ends_can_be_reached_and_are_valid(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    low, high = space.suggest(FakeTrial()), space.suggest(FakeTrial(high=True))
    assert (low["alpha"], low["warm_up"], low["steps"]) == (0.01, 0.0, 1)
    assert (high["alpha"], high["warm_up"], high["steps"]) == (1.0, 0.1, 4)
    assert space.recipe(low, 0).student.epsilon_schedule.warm_up == 0
    assert str(space.recipe(high, 0).student.epsilon_schedule.warm_up) == "1/10"  # exact, as written


@pytest.mark.parametrize("end", [0, 1])
def test_optuna_reaches_both_ends(end: int, tmp_path: Path) -> None:
    space = space_of(tmp_path)
    fixed = {"loss": "cc_dist", "alpha": (0.01, 1.0)[end], "beta": (0.5, 50)[end]}
    fixed |= {"warm_up": (0, 0.1)[end], "steps": (1, 4)[end]}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(fixed)
    assert space.suggest(study.ask()) == fixed


def test_integers_reach_both_ends_by_sampling(tmp_path: Path) -> None:
    space = space_of(tmp_path, student__attack__steps={"low": 1, "high": 3, "integer": True, "log": True})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.suggest(study.ask())["steps"] for _ in range(40)]
    assert set(drawn) == {1, 2, 3}
    assert all(type(steps) is int for steps in drawn)


def test_a_range_of_one_value_is_that_value(tmp_path: Path) -> None:
    space = space_of(
        tmp_path,
        student__l1={"low": 1e-5, "high": 1e-5, "log": True},
        student__attack__steps={"low": 2, "high": 2, "integer": True},
        search__points=[],
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    params = space.suggest(study.ask())
    assert (params["l1"], params["steps"]) == (1e-5, 2)


def test_the_corners_are_every_combination_of_ends(tmp_path: Path) -> None:
    corners = list(space_of(tmp_path).corners())
    assert len(corners) == 2**4 + 2**3
    assert len({tuple(sorted(corner.items(), key=str)) for corner in corners}) == len(corners)
    assert {"loss": "cc_dist", "alpha": 1.0, "beta": 0.5, "warm_up": 0.1, "steps": 1} in corners
    assert {"loss": "no_distillation", "alpha": 0.01, "warm_up": 0.0, "steps": 4} in corners


def test_many_parameters_have_fewer_corners(tmp_path: Path) -> None:
    unit = {"low": 0.1, "high": 0.5}
    names = ("l1", "shi_weight", "gradient_clip", "attack__step_size", "attack__kappa", "epsilon_schedule__ramp")
    space = space_of(tmp_path, **{f"student__{name}": unit for name in names})
    numbers = {"alpha", "beta", "warm_up", "steps", *(name.rpartition("__")[2] for name in names)}
    assert len(numbers) > FULL_CORNERS
    corners = [corner for corner in space.corners() if corner["loss"] == "cc_dist"]
    assert len(corners) == len(numbers) + 2
    for name in numbers:
        distribution = space.parameters[name].distribution
        assert {corner[name] for corner in corners} == {distribution.low, distribution.high}


def test_a_corner_that_is_no_configuration_is_shown(tmp_path: Path) -> None:
    answer = mistake(tmp_path, student__epsilon_schedule={"warm_up": {"low": 0, "high": 0.6}, "ramp": 0.5})
    assert "warm_up 3/5 + ramp 1/2 is more than 1" in answer
    assert "warm_up=0.6" in answer
    assert answer.endswith("a corner of the space)")


BALL = {"norm": "l2", "epsilon": 0.5}


def test_a_loss_without_a_form_for_the_threat_is_refused_before_the_search(tmp_path: Path) -> None:
    loss = {"choices": {"small_box": {"kind": "sabr", "subbox": 0.5}, "plain": {"kind": "ibp"}}}
    changes = {"student__loss": loss, "search__points": []}
    assert "loss" in space_of(tmp_path, **changes).parameters
    answer = mistake(tmp_path, threat=BALL, **changes)
    assert answer.startswith("loss sabr has no form for norm l2: its small box is one of l_inf; use linf (at ")
    assert "loss=small_box" in answer


def test_an_attack_without_a_form_for_the_threat_is_refused_before_the_search(tmp_path: Path) -> None:
    attack = {"choices": {"signs": {"kind": "n_fgsm"}, "pgd": {"steps": 3, "step_size": 0.5}}}
    assert "attack" in space_of(tmp_path, teacher__attack=attack).parameters
    answer = mistake(tmp_path, threat=BALL, teacher__attack=attack)
    assert answer.startswith("attack n_fgsm has no form for norm l2: it moves by signs; use pgd (at ")
    plain = {"kind": "cc_ibp", "alpha": 0.5}  # reads no teacher, so none is trained
    assert space_of(tmp_path, threat=BALL, teacher__attack=attack, student__loss=plain, search__points=[])


def test_a_mistake_of_all_corners_is_told_without_one(tmp_path: Path) -> None:
    answer = mistake(tmp_path, student__batch_size=1)
    assert "student.batch_size: 1 is not allowed" in answer
    assert "corner" not in answer


def test_a_range_that_leaves_what_a_value_may_be_is_refused(tmp_path: Path) -> None:
    answer = mistake(tmp_path, student__loss={"kind": "cc_ibp", "alpha": {"low": 0.5, "high": 1.5}}, search__points=[])
    assert "student.loss.alpha: 1.5 is not allowed" in answer
    assert "(at alpha=1.5" in answer


def test_points_lose_what_is_fixed_and_fractions_become_numbers(tmp_path: Path) -> None:
    points = [{"loss": "cc_dist", "alpha": 0.5, "warm_up": "1/20", "ramp": "1/2", "l1": 1e-6, "epochs": 2}]
    space = space_of(tmp_path, search__points=points)
    assert space.points() == [{"loss": "cc_dist", "alpha": 0.5, "warm_up": 0.05}]
    assert space_of(tmp_path, search__points=[]).points() == []


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ({"alpa": 0.5}, "unknown parameter search.points[0].alpa; did you mean alpha?"),
        ({"alpha": 2}, "search.points[0].alpha is 2, outside the range of alpha: 0.01 to 1.0"),
        ({"alpha": "1/200"}, "search.points[0].alpha is '1/200', outside the range of alpha"),
        ({"alpha": float("nan")}, "outside the range of alpha"),
        ({"alpha": True}, "outside the range of alpha"),
        ({"alpha": None}, "outside the range of alpha"),
        ({"alpha": "high"}, "alpha: expected a number or a fraction"),
        ({"steps": 5}, "search.points[0].steps is 5, outside the range of steps: 1 to 4"),
        ({"steps": 1.5}, "search.points[0].steps is 1.5, outside the range of steps"),
        ({"loss": "cc"}, "search.points[0].loss is 'cc', outside the range of loss: one of cc_dist, no_distillation"),
        ({"loss": ["cc_dist"]}, "search.points[0].loss is ['cc_dist'], outside the range of loss"),
    ],
)
def test_a_wrong_point_is_refused(point: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert expected in mistake(tmp_path, search__points=[point])


def test_a_point_that_names_one_of_two_parameters_must_say_which(tmp_path: Path) -> None:
    answer = mistake(
        tmp_path,
        teacher__epochs={"low": 1, "high": 2, "integer": True},
        student__epochs={"low": 2, "high": 3, "integer": True},
        search__points=[{"epochs": 2}],
    )
    assert "unknown parameter search.points[0].epochs" in answer
    assert answer.endswith(("did you mean student.epochs?", "did you mean teacher.epochs?"))


def test_a_points_whole_number_may_be_written_as_a_float(tmp_path: Path) -> None:
    space = space_of(tmp_path, search__points=[{"steps": 2.0}])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(space.points()[0])
    params = space.suggest(study.ask())
    assert params["steps"] == 2
    assert space.recipe(params, 0).student.attack.steps == 2


def test_equal_parameters_have_one_configuration_hash(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    params = space.suggest(FakeTrial())
    assert space.configuration(params) == space.configuration(dict(reversed(params.items())))
    assert space.configuration(params) != space.configuration(params | {"alpha": 0.02})


def test_the_teachers_seed_is_shared_and_the_students_is_the_trials_own(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    params = space.suggest(FakeTrial())
    recipes = [space.recipe(params, number) for number in range(20)]
    assert len({recipe.teacher.seed for recipe in recipes}) == 1
    assert len({recipe.student.seed for recipe in recipes}) == 20
    assert recipes[0].teacher.seed not in {recipe.student.seed for recipe in recipes}
    assert space.recipe(params, 3) == recipes[3]


def test_another_study_seed_is_other_seeds_zero_included(tmp_path: Path) -> None:
    params = space_of(tmp_path).suggest(FakeTrial())
    first, second = (space_of(tmp_path, search__seed=seed).recipe(params, 0) for seed in (0, 1))
    assert first.teacher.seed != second.teacher.seed
    assert first.student.seed != second.student.seed


def test_derived_seeds_never_change() -> None:
    # A stored study is continued with these: another value would be another trial under the same key.
    assert derive_seed(0, "teacher") == 1255405023
    assert derive_seed(0, "trial", 0) == 455225419
    assert derive_seed(1, "trial", 10) != derive_seed(11, "trial", 0)


@given(parts=st.lists(st.integers() | st.text(), min_size=1, max_size=4))
def test_derived_seeds_are_what_every_generator_takes(parts: list[int | str]) -> None:
    assert 0 <= derive_seed(*parts) < 2**31
    assert derive_seed(*parts) == derive_seed(*parts)


def test_two_recipes_that_are_equal_are_one_key(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    params = space.suggest(FakeTrial())
    first, second = space.recipe(params, 1), Space(config_of(tmp_path)).recipe(params, 1)
    assert first == second
    assert hash(first.student) == hash(second.student)
    assert type(first).model_validate_json(first.model_dump_json()) == first


def test_the_tree_of_the_file_is_not_changed(tmp_path: Path) -> None:
    before = repr(TREE)
    space = space_of(tmp_path)
    given_tree = repr(space.tree)
    space.recipe(space.suggest(FakeTrial()), 0)
    assert repr(space.tree) == given_tree
    assert repr(TREE) == before


def test_a_range_of_a_whole_number_needs_to_say_so(tmp_path: Path) -> None:
    """Both ends are whole, so the corners alone would pass."""
    text = mistake(tmp_path, student__epochs={"low": 2, "high": 4})
    assert "student.epochs" in text
    assert "integer: true" in text
    assert space_of(tmp_path, student__epochs={"low": 2, "high": 4, "integer": True})
