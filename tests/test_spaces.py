"""Every file in `spaces/` is a space that can be searched from end to end."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

import spaces
from ccdist.config import fingerprint
from search.config import load_search_config
from search.recipe import Recipe
from search.space import Space

FOLDER = Path(spaces.__file__).parent
FILES = sorted(FOLDER.glob("*.yaml"))
LOADED = {file.stem: Space(load_search_config(file)) for file in FILES}

# What must be searched in every space.
SEARCHED = {"alpha", "beta", "warm_up", "ramp", "train_epsilon_factor"}

# The first point of a space is the recipe as published: alpha, epsilon schedule in epochs of all, and the threat.
PUBLISHED = {
    "cifar": {"epsilon": Fraction(2, 255), "alpha": 0.01, "epochs": 160, "warm_up": 1, "ramp": 80},
    "cifar_8_255": {"epsilon": Fraction(8, 255), "alpha": 0.5, "epochs": 260, "warm_up": 1, "ramp": 80},
}


@pytest.fixture(params=LOADED)
def space(request: pytest.FixtureRequest) -> Space:
    return LOADED[request.param]


class Drawn:
    """Answers with what hypothesis draws, uniform on the range's own scale."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        share = self.data.draw(st.floats(0, 1), label=name)
        value = math.exp(math.log(low) + share * math.log(high / low)) if log else low + share * (high - low)
        return min(high, max(low, value))

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return self.data.draw(st.integers(low, high), label=name)

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        return self.data.draw(st.sampled_from(choices), label=name)


def test_there_is_a_space_for_each_of_the_promised_data_sets() -> None:
    assert set(LOADED) >= {"digits", "mnist", "fashion_mnist", "cifar", "cifar_8_255"}


def test_a_file_is_named_like_its_study(space: Space) -> None:
    assert FOLDER / f"{space.config.name}.yaml" in FILES


def test_what_must_be_searched_is_searched(space: Space) -> None:
    assert set(space.parameters) >= SEARCHED
    for name in SEARCHED:
        distribution = space.parameters[name].distribution
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        assert distribution.low < distribution.high
        assert space.parameters[name].path[0] == "student"


def test_no_distillation_is_a_choice_and_beta_depends_on_it(space: Space) -> None:
    (choice,) = space.parameters["beta"].branch
    assert choice[0] == "loss"
    assert "loss" in space.parameters
    kinds = {recipe.student.loss.kind for recipe in corner_recipes(space)}
    assert kinds == {"cc_dist", "cc_ibp"}


def corner_recipes(space: Space) -> list[Recipe]:
    return [space.recipe(corner, 0) for corner in space.corners()]


def test_every_corner_is_a_recipe(space: Space) -> None:
    recipes = corner_recipes(space)
    assert len({fingerprint(recipe) for recipe in recipes}) == len(recipes) > 2
    for recipe in recipes:
        schedule = recipe.student.epsilon_schedule
        assert schedule.warm_up + schedule.ramp <= 1
        assert recipe.threat == recipe.verification.threat == space.config.threat


def test_the_points_are_whole_and_inside(space: Space) -> None:
    points = space.points()
    assert points
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for number, point in enumerate(points):
        study.enqueue_trial(point)
        params = space.suggest(study.ask())
        assert params == point  # nothing was left for the sampler to draw
        space.recipe(params, number)
        for name, value in point.items():
            distribution = space.parameters[name].distribution
            if isinstance(distribution, CategoricalDistribution):
                assert value in distribution.choices
            else:
                assert distribution.low <= value <= distribution.high


def test_the_first_point_has_a_teacher(space: Space) -> None:
    recipe = space.recipe(space.points()[0], 0)
    assert recipe.student.loss.kind == "cc_dist"
    assert recipe.needs_teacher


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_recipe_comes_first(name: str) -> None:
    expected = PUBLISHED[name]
    recipe = LOADED[name].recipe(LOADED[name].points()[0], 0)
    assert recipe.threat.epsilon == expected["epsilon"]
    assert recipe.student.loss.alpha == expected["alpha"]
    assert recipe.student.epochs == expected["epochs"]
    schedule = recipe.student.epsilon_schedule
    assert float(schedule.warm_up) * recipe.student.epochs == pytest.approx(expected["warm_up"])
    assert float(schedule.ramp) * recipe.student.epochs == pytest.approx(expected["ramp"])
    assert schedule.train_epsilon_factor == 1.0
    assert recipe.teacher.epochs == 30
    assert recipe.student.gradient_clip == 10
    assert recipe.student.learning_rate.initial == 5e-4


def test_epsilon_is_exact_and_written_as_a_fraction_of_255(space: Space) -> None:
    (file,) = [file for file in FILES if file.stem == space.config.name]
    written = str(yaml.safe_load(file.read_text())["threat"]["epsilon"])
    assert space.config.threat.epsilon == Fraction(written)
    assert space.config.threat.radius == float(Fraction(written))
    if space.config.name.startswith("cifar"):
        assert written.endswith("/255")


def test_what_a_search_is_measured_by_is_written_down(space: Space) -> None:
    config = space.config
    assert config.search.reference is not None
    assert config.search.seed == 0
    assert config.budget.trials > len(space.points())
    assert config.resources.cpu > 0
    written = yaml.safe_load((FOLDER / f"{config.name}.yaml").read_text())
    assert {"budget", "resources", "search", "verification"} <= set(written)
    for name, floor in config.search.floors.items():
        index = ("standard_accuracy", "certified_accuracy").index(name)
        assert floor == config.search.reference[index]


def test_the_threat_and_the_verification_are_those_of_every_other_recipe_of_the_space(space: Space) -> None:
    recipes = [space.recipe(point, number) for number, point in enumerate(space.points())]
    assert len({fingerprint(recipe.verification) for recipe in recipes}) == 1
    assert recipes[0].verification.rungs == ("pgd", "ibp", "crown")


@pytest.mark.parametrize("name", LOADED)
@given(data=st.data())
def test_any_point_of_the_space_is_a_recipe(name: str, data: st.DataObject) -> None:
    space = LOADED[name]
    params = space.suggest(Drawn(data))
    recipe = space.recipe(params, 5)
    assert recipe.student.loss.alpha == params["alpha"]
    assert float(recipe.student.epsilon_schedule.ramp) == params["ramp"]
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
