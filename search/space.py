"""Ranges in YAML -> Optuna distributions -> the configurations of one trial.

A value of `network`, `teacher` or `student` may be

    {low: 0.001, high: 1.0, log: true}      a number; both ends can be reached; `integer: true` for whole numbers
    {choices: [1, 5, 10]}                   one of these values
    {choices: {name: value, ...}}           one of these values by name; a value may hold ranges of its own,
                                            which exist only where it is chosen

A parameter has the name of its key (`alpha`), or its whole path where two paths end in the same key. Range
semantics live here and nowhere else.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import ValidationError

from ccdist.config import (
    Config,
    NetworkConfig,
    StudentConfig,
    TeacherConfig,
    fingerprint,
)
from search.config import SearchConfig, SpaceFileError, as_float, explain, nearest
from search.recipe import Recipe, derive_seed

SEARCHED_SECTIONS = ("network", "teacher", "student")
# With more parameters than this, corners are all-low, all-high and one at a time instead of every combination.
FULL_CORNERS = 8


class Suggester(Protocol):
    """The part of an Optuna trial that a space uses."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: list[Any]) -> Any: ...


@dataclass(frozen=True)
class Parameter:
    """One searched value; `branch` names the choices under which it exists."""

    name: str
    path: tuple[str, ...]
    distribution: BaseDistribution
    branch: tuple[tuple[str, str], ...]


# Chooses a value for a parameter name and distribution.
_Choose = Callable[[str, BaseDistribution], Any]


class Space:
    """The searched part of a space file.

    Raises:
        SpaceFileError: a range is wrong, or a corner of the space is no valid configuration.
    """

    def __init__(self, config: SearchConfig) -> None:
        self.config = config
        self.tree = {section: getattr(config, section) for section in SEARCHED_SECTIONS}
        self._names: dict[tuple[str, ...], str] = {}
        self._name_parameters()
        self.parameters: dict[str, Parameter] = {}
        self._collect(self.tree, (), ())
        self._check_corners()
        self._check_points()

    def suggest(self, trial: Suggester) -> dict[str, Any]:
        """Ask an Optuna trial for every parameter that exists under its choices."""
        chosen: dict[str, Any] = {}

        def choose(name: str, distribution: BaseDistribution) -> Any:
            if name not in chosen:
                chosen[name] = _suggest(trial, name, distribution)
            return chosen[name]

        self._resolve(self.tree, (), choose)
        return chosen

    def recipe(self, params: Mapping[str, Any], number: int) -> Recipe:
        """The configurations of a trial; its seeds follow from the study's seed and the trial's number.

        The teacher's seed is the study's own, so that trials with the same teacher recipe share one teacher.
        """
        seed = self.config.search.seed
        seeds = {"teacher": derive_seed(seed, "teacher"), "student": derive_seed(seed, "trial", number)}
        return self._build(lambda name, _: params[name], seeds)

    def configuration(self, params: Mapping[str, Any]) -> str:
        """Hash of the parameters: equal for trials that differ in their seed only."""
        return fingerprint(dict(params))

    def corners(self) -> Iterator[dict[str, Any]]:
        """Extreme parameter values, for every combination of choices."""
        for params in self._branches(self.tree, (), {}):
            numeric = [
                name for name in params if not isinstance(self.parameters[name].distribution, CategoricalDistribution)
            ]
            for ends in _extremes(len(numeric)):
                corner = dict(params)
                for name, end in zip(numeric, ends, strict=True):
                    distribution = self.parameters[name].distribution
                    assert isinstance(distribution, FloatDistribution | IntDistribution)
                    corner[name] = distribution.high if end else distribution.low
                yield corner

    def points(self) -> list[dict[str, Any]]:
        """The space file's points, fractions as numbers, without the values that are fixed in the file."""
        return [
            {name: self._point_value(name, value) for name, value in point.items() if name in self.parameters}
            for point in self.config.search.points
        ]

    def _point_value(self, name: str, value: Any) -> Any:
        """A point's value as its distribution wants it; a text like 1/160 is a number where a number is meant."""
        if isinstance(self.parameters[name].distribution, CategoricalDistribution) or not isinstance(value, str):
            return value
        return as_float(value, f"search.points: {name}")

    def _build(self, choose: _Choose, seeds: Mapping[str, int]) -> Recipe:
        resolved = self._resolve(self.tree, (), choose)
        config = self.config
        network: NetworkConfig = _validate(NetworkConfig, resolved["network"], "network")
        parts: dict[str, Config] = {}
        for section, model in (("teacher", TeacherConfig), ("student", StudentConfig)):
            for owned in ("network", "seed"):
                if owned in resolved[section]:
                    raise SpaceFileError(
                        f"{section}.{owned} is not set there: the network stands beside it under `network`, "
                        "seeds follow from search.seed"
                    )
            values = resolved[section] | {"network": network, "seed": seeds[section]}
            parts[section] = _validate(model, values, section)
        fixed = {"data": config.training_data, "threat": config.threat, "verification": config.verifier_of(network)}
        recipe: Recipe = _validate(Recipe, parts | fixed, "")
        return recipe

    def _resolve(self, node: Any, path: tuple[str, ...], choose: _Choose) -> Any:
        """The tree with every range replaced by its chosen value."""
        if not isinstance(node, dict):
            return node
        if _is_number(node):
            return choose(self._names[path], _number(node, path))
        if "choices" in node:
            options = node["choices"]
            chosen = choose(self._names[path], _choices(node, path))
            if isinstance(options, list):
                return chosen
            return self._resolve(options[chosen], path, choose)
        return {key: self._resolve(value, (*path, key), choose) for key, value in node.items()}

    def _name_parameters(self) -> None:
        paths = sorted(set(_range_paths(self.tree, ())))
        leaves = [path[-1] for path in paths]
        for path in paths:
            self._names[path] = path[-1] if leaves.count(path[-1]) == 1 else ".".join(path)

    def _collect(self, node: Any, path: tuple[str, ...], branch: tuple[tuple[str, str], ...]) -> None:
        if not isinstance(node, dict):
            return
        if not (_is_number(node) or "choices" in node):
            for key, value in node.items():
                self._collect(value, (*path, key), branch)
            return
        name = self._names[path]
        distribution = _number(node, path) if _is_number(node) else _choices(node, path)
        known = self.parameters.get(name)
        if known is not None and known.distribution != distribution:
            raise SpaceFileError(f"{'.'.join(path)} has different ranges in different choices; a name has one range")
        self.parameters.setdefault(name, Parameter(name, path, distribution, branch))
        if isinstance(node.get("choices"), dict):
            for option, value in node["choices"].items():
                self._collect(value, path, (*branch, (name, option)))

    def _branches(self, node: Any, path: tuple[str, ...], params: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Every combination of choices, with a None for each number that exists under it."""
        if not isinstance(node, dict):
            yield params
        elif _is_number(node):
            yield {self._names[path]: None} | params
        elif "choices" in node:
            name, options = self._names[path], node["choices"]
            for option in [params[name]] if name in params else list(options):
                inner = options[option] if isinstance(options, dict) else None
                yield from self._branches(inner, path, params | {name: option})
        else:
            combined = [params]
            for key, value in node.items():
                combined = [more for some in combined for more in self._branches(value, (*path, key), some)]
            yield from combined

    def _check_corners(self) -> None:
        """Build every corner; a mistake that only some corners show is told with the corner that shows it."""
        corners = [*self.corners(), *self._interior()]  # a whole number may be valid at both ends only
        mistakes = [(corner, error) for corner in corners if (error := self._mistake(corner)) is not None]
        if not mistakes:
            return
        corner, error = mistakes[0]
        ends = ", ".join(f"{name}={corner[name]}" for name in self.parameters if name in corner)
        raise SpaceFileError(error if len(mistakes) == len(corners) else f"{error} (at {ends}, a corner of the space)")

    def _interior(self) -> Iterator[dict[str, Any]]:
        """One point inside every range, for every combination of choices."""
        for params in self._branches(self.tree, (), {}):
            yield {name: self._inside(name) if value is None else value for name, value in params.items()}

    def _inside(self, name: str) -> float | int:
        distribution = self.parameters[name].distribution
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        if isinstance(distribution, IntDistribution):
            return distribution.low
        return distribution.low + (distribution.high - distribution.low) * 0.381966

    def _mistake(self, corner: dict[str, Any]) -> str | None:
        try:
            self._build(lambda name, _: corner[name], {"teacher": 0, "student": 0})
        except SpaceFileError as error:
            return str(error)
        return None

    def _check_points(self) -> None:
        ambiguous = {parameter.path[-1] for name, parameter in self.parameters.items() if name != parameter.path[-1]}
        known = {path[-1] for path in _all_paths(self.tree, ())} - ambiguous | set(self.parameters)
        for index, point in enumerate(self.config.search.points):
            for name, value in point.items():
                where = f"search.points[{index}].{name}"
                if name not in known:
                    raise SpaceFileError(f"unknown parameter {where}{nearest(name, set(self.parameters), '')}")
                parameter = self.parameters.get(name)
                if parameter is not None and not _contains(parameter.distribution, self._point_value(name, value)):
                    raise SpaceFileError(
                        f"{where} is {value!r}, outside the range of {name}: {_spelled(parameter.distribution)}"
                    )


def _suggest(trial: Suggester, name: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case FloatDistribution(low=low, high=high, log=log):
            return float(trial.suggest_float(name, low, high, log=log))  # an enqueued 5 comes back as an int
        case IntDistribution(low=low, high=high, log=log):
            return trial.suggest_int(name, low, high, log=log)
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(name, list(choices))
    raise AssertionError(distribution)


def _validate(model: type[Config], values: dict[str, Any], section: str) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise SpaceFileError(explain(error, model, section)) from None


def _is_number(node: dict[str, Any]) -> bool:
    return "low" in node or "high" in node


def _number(node: dict[str, Any], path: tuple[str, ...]) -> BaseDistribution:
    where = ".".join(path)
    for key in node:
        if key not in ("low", "high", "log", "integer"):
            known = {"low", "high", "log", "integer"}
            raise SpaceFileError(f"unknown key {where}.{key}{nearest(str(key), known, f'{where}.{key}')}")
    for end in ("low", "high"):
        if end not in node:
            raise SpaceFileError(f"{where} has no {end}; a range needs low and high")
    for switch in ("log", "integer"):
        if not isinstance(node.get(switch, False), bool):
            raise SpaceFileError(f"{where}.{switch} is {node[switch]!r}; expected true or false")
    low, high = as_float(node["low"], f"{where}.low"), as_float(node["high"], f"{where}.high")
    log = node.get("log", False)
    if low > high:
        raise SpaceFileError(f"{where}: low {node['low']} is above high {node['high']}; exchange them")
    if log and low <= 0:
        raise SpaceFileError(f"{where}: low {node['low']} with log: true; a logarithmic range needs low above 0")
    if not node.get("integer", False):
        return FloatDistribution(low, high, log=log)
    if low != int(low) or high != int(high):
        raise SpaceFileError(f"{where}: integer: true, but low {node['low']} or high {node['high']} is not whole")
    return IntDistribution(int(low), int(high), log=log)


def _choices(node: dict[str, Any], path: tuple[str, ...]) -> BaseDistribution:
    where, options = ".".join(path), node["choices"]
    if set(node) != {"choices"}:
        extra = next(key for key in node if key != "choices")
        raise SpaceFileError(f"{where}.{extra} stands beside choices; put it inside one of the choices")
    if not isinstance(options, list | dict) or not options:
        raise SpaceFileError(f"{where}.choices is {options!r}; expected a list of values, or names with values")
    if isinstance(options, list) and not all(isinstance(o, bool | int | float | str | None) for o in options):
        raise SpaceFileError(f"{where}.choices holds nested values; give them names: choices: {{name: value}}")
    return CategoricalDistribution(list(options))


def _range_paths(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if not isinstance(node, dict):
        return
    if _is_number(node) or "choices" in node:
        yield path
        options = node.get("choices")
        for value in options.values() if isinstance(options, dict) else ():
            yield from _range_paths(value, path)
        return
    for key, value in node.items():
        yield from _range_paths(value, (*path, str(key)))


def _all_paths(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Every key, choices passed through."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "choices" and isinstance(value, dict):
                for option in value.values():
                    yield from _all_paths(option, path)
            else:
                yield (*path, str(key))
                yield from _all_paths(value, (*path, str(key)))


def _extremes(count: int) -> Iterator[tuple[bool, ...]]:
    if count <= FULL_CORNERS:
        yield from itertools.product((False, True), repeat=count)
        return
    yield (False,) * count
    yield (True,) * count
    for index in range(count):
        yield tuple(position == index for position in range(count))


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return False
    whole = isinstance(distribution, FloatDistribution) or value == int(value)
    return whole and distribution.low <= value <= distribution.high


def _spelled(distribution: BaseDistribution) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return f"one of {', '.join(map(str, distribution.choices))}"
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return f"{distribution.low} to {distribution.high}"
