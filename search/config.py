"""The space file: what is searched, with what budget, where it is kept. Read, checked, and told in one line.

A space file is YAML. `network`, `teacher` and `student` are the configurations of `ccdist.config` in which any
value may be a range (see `search.space`); everything else is fixed.
"""

import difflib
import types
import typing
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator

from ccdist.config import AttackConfig, Config, DataConfig, Rung, ThreatModel, exact_fraction, fingerprint
from search.errors import UserError
from search.records import OBJECTIVES


class SpaceFileError(UserError):
    """The space file, or a --set, is wrong; the text is one line that says what to do."""


class TPEConfig(Config):
    kind: Literal["tpe"] = "tpe"
    startup_trials: int = Field(10, ge=1, description="random trials before the model is used")


class NSGA2Config(Config):
    kind: Literal["nsga2"] = "nsga2"
    population: int = Field(16, ge=2)


class NSGA3Config(Config):
    kind: Literal["nsga3"] = "nsga3"
    population: int = Field(16, ge=2)


class GPConfig(Config):
    kind: Literal["gp"] = "gp"
    startup_trials: int = Field(10, ge=1, description="random trials before the model is used")


class RandomConfig(Config):
    kind: Literal["random"] = "random"


def _named_sampler(value: Any) -> Any:
    """`sampler: tpe` is short for `sampler: {kind: tpe}`."""
    return {"kind": value} if isinstance(value, str) else value


SamplerConfig = Annotated[
    Annotated[TPEConfig | NSGA2Config | NSGA3Config | GPConfig | RandomConfig, Field(discriminator="kind")],
    BeforeValidator(_named_sampler),
]


class SearchOptions(Config):
    """How the space is searched, and how its result is measured."""

    seed: int = Field(0, ge=0, description="the study's seed: every trial's seed and suggestion follow from it")
    sampler: SamplerConfig = TPEConfig()
    floors: dict[str, float] = Field(
        default_factory=dict, description="least useful value of an objective; told to the sampler as a constraint"
    )
    reference: tuple[float, float] | None = Field(
        None, description="hypervolume reference (standard, certified), fractions; None: the floors, else (0, 0)"
    )
    points: tuple[dict[str, Any], ...] = Field((), description="configurations to try first, by parameter name")

    @field_validator("reference")
    @classmethod
    def _fractions(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not all(0 <= part < 1 for part in value):
            raise ValueError(f"{list(value)} are not fractions in [0, 1)")
        return value

    @field_validator("floors")
    @classmethod
    def _objectives(cls, value: dict[str, float]) -> dict[str, float]:
        for name, floor in value.items():
            if name not in OBJECTIVES:
                raise ValueError(f"unknown objective {name!r}; objectives are {', '.join(OBJECTIVES)}")
            if not 0 <= floor < 1:
                raise ValueError(f"{name}: {floor} is not a fraction in [0, 1)")
        return value

    @property
    def hypervolume_reference(self) -> tuple[float, float]:
        """The reference point, from itself or the floors."""
        if self.reference is not None:
            return self.reference
        return self.floors.get(OBJECTIVES[0], 0.0), self.floors.get(OBJECTIVES[1], 0.0)


class BudgetConfig(Config):
    trials: int = Field(ge=1, description="finished trials to reach; failed ones are extra")


class ResourcesConfig(Config):
    """What one trial holds; a fraction of a GPU is a share of its memory, enforced in the process."""

    cpu: float = Field(1.0, ge=0.001, description="cores of a trial; Ray counts to four decimals")
    gpu: float = Field(0.0, ge=0, description="0.25 packs four trials on a GPU")
    concurrency: int | Literal["auto"] = Field("auto", description="trials at once; auto: as many as fit")

    @field_validator("concurrency")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{value} trials at once; expected at least 1, or auto")
        return value

    @field_validator("gpu")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError(f"{value} GPUs for a trial; above 1 only whole GPUs can be held")
        return value


class StorageConfig(Config):
    """Where the study (a database) and the artefacts (files) are; --storage DIR sets both."""

    study: str | None = Field(None, description="database URL; None: study.db in the storage folder")
    artifacts: str | None = Field(None, description="folder; None: artifacts in the storage folder")


class TrackingConfig(Config):
    uri: str | None = Field(None, description="MLflow server; None: a local store in the storage folder")
    enabled: bool = True


class VerificationOptions(Config):
    """The ladder on the validation images; the threat is the space file's own."""

    attack: AttackConfig = AttackConfig(steps=40, step_size=0.035)
    rungs: tuple[Rung, ...] = ("pgd", "ibp", "crown")
    batch_size: int = Field(256, ge=1)


class SearchConfig(Config):
    """A whole space file."""

    name: str = Field(
        max_length=100, pattern=r"^[a-z0-9][a-z0-9_.-]*$", description="the study's name, with the seed if it is not 0"
    )
    data: DataConfig
    threat: ThreatModel
    network: dict[str, Any] = Field(description="NetworkConfig; shared by teacher and student; may hold ranges")
    teacher: dict[str, Any] = Field(description="TeacherConfig without network and seed; may hold ranges")
    student: dict[str, Any] = Field(description="StudentConfig without network and seed; may hold ranges")
    verification: VerificationOptions = VerificationOptions()
    search: SearchOptions = SearchOptions()
    budget: BudgetConfig
    resources: ResourcesConfig = ResourcesConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def study_name(self) -> str:
        """The study of this space and seed: the space's name, and the seed behind it when it is not 0."""
        return self.name if self.search.seed == 0 else f"{self.name}-seed{self.search.seed}"

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a study to be continued: everything that a result depends on."""
        full = self.model_dump(mode="json", exclude={"budget", "resources", "storage", "tracking"})
        full["data"].pop("path")  # where the images lie is no part of what they are: their fingerprint is checked
        return full

    @property
    def identity_hash(self) -> str:
        return fingerprint(self.identity)


def find_space_file(name: str) -> Path:
    """The space file of that path, or the one of that name that is installed with the project.

    Raises:
        SpaceFileError: there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    with resources.as_file(resources.files("spaces")) as folder:
        shipped = Path(folder) / f"{path.stem}.yaml"
        if shipped.is_file() and path in (Path(path.stem), Path(shipped.name), Path("spaces") / shipped.name):
            return shipped
        known = sorted(file.stem for file in Path(folder).glob("*.yaml"))
    raise SpaceFileError(f"no space file {name}; give a path, or the name of a shipped one: {', '.join(known)}")


def load_search_config(path: Path, settings: typing.Sequence[str] = ()) -> SearchConfig:
    """A space file with `key=value` settings laid over it, both through the same validation.

    Raises:
        SpaceFileError: the file cannot be read, or something in it is wrong.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpaceFileError(f"space file {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise SpaceFileError(f"space file {path} holds a {type(tree).__name__}; expected keys and values")
    for setting in settings:
        _apply(tree, setting)
    try:
        return SearchConfig.model_validate(tree)
    except RecursionError:
        raise SpaceFileError(f"space file {path} contains itself: a YAML alias refers to what it stands in") from None
    except ValidationError as error:
        raise SpaceFileError(explain(error, SearchConfig)) from error


def _apply(tree: dict[str, Any], setting: str) -> None:
    key, separator, text = setting.partition("=")
    if not separator or not key:
        raise SpaceFileError(f"--set {setting}: expected key=value, for example --set student.epochs=10")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpaceFileError(f"--set {setting}: {text!r} is not a YAML value") from error
    node: Any = tree
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise SpaceFileError(
                f"--set {setting}: {'.'.join(parents[: depth + 1])} is the value {node!r} and has no keys of its own"
            )
    node[last] = value


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """The first mistake in one line: where, what came, what was expected, and the nearest known name."""
    errors = error.errors()
    # A misspelled key is both unknown and missing under its right name; the first of these says what to do.
    first = next((each for each in errors if each["type"] in ("extra_forbidden", "invalid_key")), errors[0])
    # Tags of a union ("cc_dist") are part of pydantic's location, but not of the user's file.
    path = [part for part in first["loc"] if isinstance(part, int) or part not in _tags(model)]
    where = " ".join(".".join(str(part) for part in ([prefix] if prefix else []) + path).split())
    match first["type"]:
        case "extra_forbidden":
            return f"unknown key {where}{nearest(str(path[-1]), known_keys(model, path[:-1]), where)}"
        case "missing":
            return f"{where} is missing; it needs a value"
        case "union_tag_invalid" | "union_tag_not_found":
            tags = first["ctx"].get("expected_tags", "one of its kinds")
            return f"{where}: {_shown(first['input'])} names no known kind; expected kind: {tags}"
        case "int_from_float":
            return f"{where}: {_shown(first['input'])} is not allowed: expected a whole number (a range: integer: true)"
        case "value_error":
            return f"{where}: {first['msg'].removeprefix('Value error, ')}"
        case _:
            return f"{where}: {_shown(first['input'])} is not allowed: {first['msg'][0].lower()}{first['msg'][1:]}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def nearest(name: str, known: typing.Collection[str], where: str) -> str:
    """ "; did you mean X?" for the nearest known name, or the list of them."""
    parent = where.rpartition(".")[0]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {f'{parent}.' if parent else ''}{close[0]}?"
    return f"; known keys here: {', '.join(sorted(known))}" if known else "; nothing is expected there"


def known_keys(model: type[BaseModel], path: typing.Sequence[str | int]) -> set[str]:
    """The field names that may stand at a path inside a model."""
    models = [model]
    for part in path:
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
            kind = inner.model_fields.get("kind")
            found |= _tags(inner) | ({kind.default} if kind is not None else set())
    return found


def as_float(value: Any, where: str) -> float:
    """A number of a space file, fractions like 1/160 included.

    Raises:
        SpaceFileError: it is no number.
    """
    try:
        return float(exact_fraction(value))
    except (ValueError, OverflowError) as error:
        raise SpaceFileError(f"{where}: {error}") from None
