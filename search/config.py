"""The space file: what is searched, with what budget, where it is kept. Read, checked, and told in one line.

A space file is YAML. `network`, `teacher` and `student` are the configurations of `ccdist.config` in which any
value may be a range (see `search.space`); everything else is fixed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator

from ccdist import yaml_files
from ccdist.config import (
    Config,
    DataConfig,
    NetworkConfig,
    ThreatModel,
    VerificationOptions,
    VerifyConfig,
    exact_fraction,
    fingerprint,
)
from ccdist.data import Split as Split
from ccdist.recipe import NAME_PATTERN
from ccdist.yaml_files import nearest as nearest
from search.errors import UserError
from search.studies.records import OBJECTIVES

KIND = "space file"
# How a search goes on may change from command to command; what a trial's result depends on may not.
OPEN_TO_CHANGE = ("sampler", "seeds")
# Resources of Ray's that a trial has fields for.
RAYS_OWN = {"cpu": "cpu", "gpu": "gpu", "memory": "memory_gb"}
# Others of its own: a trial cannot hold room in the object store, and computes on none of these accelerators.
_NOT_HELD = {"object_store_memory", "furiosa", "hpu", "mblt", "neuron_cores", "npu", "rbln", "tpu", "ttnpu"}
# Ray counts in these steps.
_LEAST_AMOUNT = 0.0001
StudyKind = Literal["study", "confirmation"]


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
    sampler: SamplerConfig = GPConfig()
    floors: dict[str, float] = Field(
        default_factory=dict, description="least useful value of an objective; told to the sampler as a constraint"
    )
    reference: tuple[float, float] | None = Field(
        None, description="hypervolume reference (standard, certified), fractions; None: the floors, else (0, 0)"
    )
    points: tuple[dict[str, Any], ...] = Field((), description="configurations to try first, by parameter name")
    seeds: int = Field(
        1, ge=1, description="configurations near the front are repeated until they have so many seeds; 1: never"
    )

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
    """When a search ends: at the first limit that is reached. Time left after the last trial goes to verification."""

    trials: int = Field(ge=1, description="trials to reach, stopped ones included; failed ones are extra")
    hours: float | None = Field(None, gt=0, description="wall-clock hours of this command; then trials are cut off")
    accelerator_hours: float | None = Field(
        None,
        gt=0,
        description="hours of all trials, each times its GPUs (without GPUs: its cores), over all commands",
    )


class StoppingConfig(Config):
    """What ends early. A trial that nobody dominates is never stopped."""

    verification: bool = Field(True, description="stop verifying what cannot reach the front whatever is still open")
    training: Literal["rungs", "fractions", "off"] = Field(
        "rungs",
        description="rungs: judged at the target epsilon while training; fractions: judged after shortened recipes",
    )
    keep: float = Field(
        0.5, gt=0, lt=1, description="share of a rung's trials that goes on, those that nobody dominates always"
    )
    peers: int = Field(4, ge=1, description="trials that must have reached a rung before it stops anybody")
    agreement: float = Field(
        0.3, ge=-1, le=1, description="rank agreement of a rung with finished trials below which it stops nobody"
    )

    @field_validator("training", mode="before")
    @classmethod
    def _off_in_yaml(cls, value: Any) -> Any:
        """YAML reads `off` as false."""
        return "off" if value is False else value


def _on_or_off(value: Any) -> Any:
    """`stopping: false` is short for turning every kind off, `true` for the defaults."""
    if isinstance(value, bool):
        return {} if value else {"verification": False, "training": "off"}
    if not isinstance(value, dict | StoppingConfig):
        raise ValueError("expected true, false, or a mapping such as {training: off}")
    return value


class ResourcesConfig(Config):
    """What one trial holds; a fraction of a GPU is a share of its memory, enforced in the process."""

    cpu: float = Field(1.0, ge=0.001, description="cores of a trial; Ray counts to four decimals")
    gpu: float = Field(0.0, ge=0, description="0.25 packs four trials on a GPU")
    memory_gb: float | None = Field(
        None, ge=0.001, description="host memory that Ray keeps for a trial, GiB; None: none is kept"
    )
    custom: dict[str, float] = Field(
        default_factory=dict, description="Ray's custom resources of a trial, such as {vram_gb: 12}"
    )
    concurrency: int | Literal["auto"] = Field("auto", description="trials at once; auto: as many as fit")

    @field_validator("concurrency")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{value} trials at once; expected at least 1, or auto")
        return value

    @field_validator("custom")
    @classmethod
    def _custom(cls, value: dict[str, float]) -> dict[str, float]:
        for name, amount in value.items():
            if name.lower() in RAYS_OWN:
                raise ValueError(f"{name} has a field of its own: resources.{RAYS_OWN[name.lower()]}")
            if not name.strip() or name.lower() in _NOT_HELD:
                raise ValueError(f"{name!r} is no resource that a trial can hold; expected a name of your own")
            if amount < _LEAST_AMOUNT:
                raise ValueError(f"{name}: {amount}; expected a number above 0, at least {_LEAST_AMOUNT}")
        return value

    @field_validator("gpu")
    @classmethod
    def _fraction_or_whole(cls, value: float) -> float:
        if 0 < value < _LEAST_AMOUNT:
            raise ValueError(f"{value} GPUs for a trial; expected 0, or at least {_LEAST_AMOUNT}: Ray counts no less")
        if value > 1 and value != int(value):
            raise ValueError(f"{value} GPUs for a trial; above 1 only whole GPUs can be held")
        return value


class StorageConfig(Config):
    """Where the study (a database) and the artefacts (files) are; --storage DIR sets both."""

    study: str | None = Field(None, description="database URL; None: study.db in the storage folder")
    artifacts: str | None = Field(
        None, description="folder, or s3://BUCKET/PREFIX, gs://BUCKET/PREFIX; None: artifacts in the storage folder"
    )


class TrackingConfig(Config):
    uri: str | None = Field(None, description="MLflow server; None: a local store in the storage folder")
    enabled: bool = True
    models: bool = Field(True, description="whether the students become logged models, weights included")


class SearchConfig(Config):
    """A whole space file."""

    split: ClassVar[Split] = "validation"
    kind: ClassVar[StudyKind] = "study"

    name: str = Field(
        max_length=100, pattern=NAME_PATTERN, description="the study's name, with the seed if it is not 0"
    )
    data: DataConfig
    threat: ThreatModel
    network: dict[str, Any] = Field(description="NetworkConfig; shared by teacher and student; may hold ranges")
    teacher: dict[str, Any] = Field(description="TeacherConfig without network and seed; may hold ranges")
    student: dict[str, Any] = Field(description="StudentConfig without network and seed; may hold ranges")
    verification: VerificationOptions = VerificationOptions()
    search: SearchOptions = SearchOptions()
    budget: BudgetConfig
    stopping: Annotated[StoppingConfig, BeforeValidator(_on_or_off)] = StoppingConfig()
    resources: ResourcesConfig = ResourcesConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("data")
    @classmethod
    def _something_to_measure(cls, value: DataConfig) -> DataConfig:
        if value.validation == 0:
            raise ValueError("validation is 0; a search measures its trials on held-out images, so it needs some")
        return value

    @property
    def study_name(self) -> str:
        """The study of this space and seed: the space's name, and the seed behind it when it is not 0."""
        return self.name if self.search.seed == 0 else f"{self.name}-seed{self.search.seed}"

    @property
    def verifier(self) -> VerifyConfig:
        """The ladder that every trial goes through."""
        return VerifyConfig(threat=self.threat, **dict(self.verification))

    @property
    def training_data(self) -> DataConfig:
        """The images of a trial, as its recipe names them."""
        return self.data

    def verifier_of(self, network: NetworkConfig) -> VerifyConfig:
        """The ladder that trials of this network go through."""
        return self.verifier

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a study to be continued: everything that a result depends on."""
        full = self.model_dump(mode="json", exclude={"budget", "stopping", "resources", "storage", "tracking"})
        for name in OPEN_TO_CHANGE:
            full["search"].pop(name)
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
    with _space_file_errors():
        return yaml_files.find_file(name, kind=KIND, shipped="spaces")


def load_search_config(path: Path, settings: Sequence[str] = ()) -> SearchConfig:
    """A space file with `key=value` settings laid over it, both through the same validation.

    Raises:
        SpaceFileError: the file cannot be read, or something in it is wrong.
    """
    with _space_file_errors():
        return yaml_files.validated(SearchConfig, yaml_files.read_tree(path, settings, kind=KIND), path, kind=KIND)


@contextmanager
def _space_file_errors() -> Iterator[None]:
    try:
        yield
    except yaml_files.YamlFileError as error:
        raise SpaceFileError(str(error)) from error


def explain(error: ValidationError, model: type[BaseModel], section: str) -> str:
    """The first mistake in a section that may hold ranges, in one line."""
    return yaml_files.explain(error, model, section, whole_number=" (a range: integer: true)")


def as_float(value: Any, where: str) -> float:
    """A number of a space file, fractions like 1/160 included.

    Raises:
        SpaceFileError: it is no number.
    """
    try:
        return float(exact_fraction(value))
    except (ValueError, OverflowError) as error:
        raise SpaceFileError(f"{where}: {error}") from None
