"""Configurations from YAML files: read, laid over with `key=value` settings, checked; each mistake told in one line.

A `kind` is what the file is called in messages: "space file" or "recipe".
"""

import difflib
import types
import typing
from collections.abc import Collection, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

_Model = TypeVar("_Model", bound=BaseModel)

# The largest file that comes with the project has 4 kB and 200 values. Whoever is sent a file that fills the memory,
# or keeps a processor busy for hours, should read a line instead.
MOST_BYTES, MOST_VALUES, LONGEST_VALUE = 256 * 1024, 5_000, 4096


class YamlFileError(ValueError):
    """A YAML file, or a --set, is wrong; the text is one line that says what to do."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but for tags, on which it stumbles, and keys that stand twice: there the last would win."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if (tag := getattr(event, "tag", None)) is not None:
            line = event.start_mark.line + 1
            raise yaml.MarkedYAMLError(problem=f"tag {tag[:60]} in line {line} is not allowed; write the value alone")
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Before merge keys (<<) are resolved: a value that overrides a merged one is no mistake.
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                raise yaml.MarkedYAMLError(problem=f"key {key.value} stands twice, again in line {line}; remove one")
            seen.add((key.tag, key.value))
        return node

    def get_single_node(self) -> yaml.Node | None:
        # Before anything is built of it: merge keys copy what their aliases stand for.
        node: yaml.Node | None = super().get_single_node()
        if node is not None and (count := _expanded(node, {})) > MOST_VALUES:
            raise yaml.MarkedYAMLError(problem=f"its aliases stand for more than {MOST_VALUES:,} values ({count:.0e})")
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number: int = super().construct_yaml_int(node)
        if number.bit_length() > 63:  # Python does not even spell the largest
            raise yaml.MarkedYAMLError(problem=f"{node.value[:20]}... is too large for a number")
        return number


# PyYAML's own table knows its own function.
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of values with each alias in place of its name; one that stands in itself counts nothing there."""
    if isinstance(node, yaml.ScalarNode):
        if len(node.value) > LONGEST_VALUE:
            raise yaml.MarkedYAMLError(problem=f"a value of {len(node.value):,} characters is too long")
        return 1
    if id(node) not in known:
        known[id(node)] = 0
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]


def find_file(name: str, *, kind: str, shipped: str) -> Path:
    """The file of that path, or the one of that name that is installed with the project in the folder `shipped`.

    Raises:
        YamlFileError: there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    with resources.as_file(resources.files("spaces")) as package:
        folder = Path(package).parent / shipped
        stem = path.name.removesuffix(".yaml")
        file = folder / f"{stem}.yaml"
        if file.is_file() and path in (Path(stem), Path(file.name), Path(shipped) / file.name):
            return file
        known = sorted(each.stem for each in folder.glob("*.yaml"))
    raise YamlFileError(f"no {kind} {name}; give a path, or the name of a shipped one: {', '.join(known)}")


def read_tree(path: Path, settings: Sequence[str] = (), *, kind: str) -> dict[Any, Any]:
    """The keys and values of a file, with `key=value` settings laid over them.

    Raises:
        YamlFileError: the file cannot be read, or a setting does not fit it.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES // 1024} kB")
        tree = _parse(content.decode())
    except (OSError, ValueError, yaml.YAMLError) as error:  # also what PyYAML makes of a date such as 2020-99-99
        raise YamlFileError(f"{kind} {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise YamlFileError(f"{kind} {path} holds a {type(tree).__name__}; expected keys and values")
    for setting in settings:
        apply_setting(tree, setting)
    return tree


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def apply_setting(tree: dict[Any, Any], setting: str) -> None:
    """Lay one `key=value` over a tree, in place.

    Raises:
        YamlFileError: it is none, or does not fit the tree.
    """
    key, separator, text = setting.partition("=")
    if not separator or not key:
        raise YamlFileError(f"--set {setting}: expected key=value, for example --set student.epochs=10")
    try:
        value = _parse(text)
    except (ValueError, yaml.YAMLError) as error:
        raise YamlFileError(f"--set {setting}: {text!r} is not a YAML value") from error
    node: Any = tree
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise YamlFileError(
                f"--set {setting}: {'.'.join(parents[: depth + 1])} is the value {node!r} and has no keys of its own"
            )
    node[last] = value


def validated(model: type[_Model], tree: dict[Any, Any], path: Path, *, kind: str) -> _Model:
    """The configuration that a file's keys and values spell.

    Raises:
        YamlFileError: something in it is wrong.
    """
    try:
        return model.model_validate(tree)
    except RecursionError:
        raise YamlFileError(f"{kind} {path} contains itself: a YAML alias refers to what it stands in") from None
    except ValidationError as error:
        raise YamlFileError(explain(error, model)) from error


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "", *, whole_number: str = "") -> str:
    """The first mistake in one line: where, what came, what was expected, and the nearest known name.

    Args:
        prefix: where the model stands in its file.
        whole_number: what to add where a whole number was expected.
    """
    errors = error.errors()
    # A misspelled key is both unknown and missing under its right name; the first of these says what to do.
    first = next((each for each in errors if each["type"] in ("extra_forbidden", "invalid_key")), errors[0])
    # Tags of a union ("cc_dist") are part of pydantic's location, but not of the user's file.
    path = [part for part in first["loc"] if isinstance(part, int) or part not in _tags(model)]
    where = " ".join(".".join(str(part) for part in ([prefix] if prefix else []) + path).split())
    at = f"{where}: " if where else ""
    match first["type"]:
        case "extra_forbidden":
            return f"unknown key {where}{nearest(str(path[-1]), known_keys(model, first['loc'][:-1]), where)}"
        case "missing":
            return f"{where} is missing; it needs a value"
        case "union_tag_invalid" | "union_tag_not_found":
            tags = first["ctx"].get("expected_tags", "one of its kinds")
            return f"{at}{_shown(first['input'])} names no known kind; expected kind: {tags}"
        case "int_from_float":
            return f"{at}{_shown(first['input'])} is not allowed: expected a whole number{whole_number}"
        case "model_attributes_type" if isinstance(first["input"], str):
            name = first["input"]
            return f"{at}{_shown(name)} is a name where a mapping is expected, such as {{kind: {name}}}"
        case "value_error":
            return f"{at}{first['msg'].removeprefix('Value error, ')}"
        case _:
            return f"{at}{_shown(first['input'])} is not allowed: {first['msg'][0].lower()}{first['msg'][1:]}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def nearest(name: str, known: Collection[str], where: str) -> str:
    """ "; did you mean X?" for the nearest known name, or the list of them."""
    parent = where.rpartition(".")[0]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {f'{parent}.' if parent else ''}{close[0]}?"
    return f"; known keys here: {', '.join(sorted(known))}" if known else "; nothing is expected there"


def known_keys(model: type[BaseModel], path: Sequence[str | int]) -> set[str]:
    """The field names that may stand at a path inside a model; a tag in the path picks one kind of a union."""
    models = [model]
    for part in path:
        of_kind = [each for each in models if part == _tag(each)]
        if of_kind:
            models = of_kind
            continue
        annotations = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        models = [inner for annotation in annotations for inner in _models(annotation)]
    return {name for inner in models for name in inner.model_fields}


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated, tuple):
        return [inner for part in typing.get_args(annotation) for inner in _models(part)]
    return []


def _tags(model: type[BaseModel]) -> set[str]:
    """The `kind` values of every union inside a model."""
    found: set[str] = set()
    for field in model.model_fields.values():
        for inner in _models(field.annotation):
            tag = _tag(inner)
            found |= _tags(inner) | ({tag} if tag is not None else set())
    return found


def _tag(model: type[BaseModel]) -> str | None:
    """The `kind` that picks this model out of a union."""
    kind = model.model_fields.get("kind")
    return None if kind is None else str(kind.default)
