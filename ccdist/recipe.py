"""What one training computes from, and the YAML file that describes one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from ccdist import yaml_files
from ccdist.config import (
    Config,
    DataConfig,
    NetworkConfig,
    StudentConfig,
    TeacherConfig,
    ThreatModel,
    VerificationOptions,
    VerifyConfig,
)

KIND = "recipe"
NAME_PATTERN = r"^[a-z0-9][a-z0-9_.-]*$"
# Written once for both networks of a file, in a place of their own.
_SHARED = {"network": "the network stands beside it under `network`", "seed": "seeds follow from the recipe's `seed`"}


def _needs_teacher(student: StudentConfig) -> bool:
    return student.loss.reads_teacher or student.initialization == "teacher"


class Recipe(Config):
    """Everything that one trial computes from: the same recipe gives the same result."""

    data: DataConfig
    threat: ThreatModel
    teacher: TeacherConfig
    student: StudentConfig
    verification: VerifyConfig

    @model_validator(mode="after")
    def _fits_its_threat(self) -> "Recipe":
        self.student.check_threat(self.threat)
        if self.needs_teacher:
            self.teacher.check_threat(self.threat)
        self.verification.check_activation(self.student.network.activation)
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether this student reads a teacher at all."""
        return _needs_teacher(self.student)


class RecipeFile(Config):
    """A training of its own: all of it in one file.

    `teacher` and `student` are written without network and seed, and hold both once the file is read. The student has
    the file's seed, the teacher the one after it: two networks from one stream of random numbers would be alike.
    """

    name: str = Field(max_length=100, pattern=NAME_PATTERN, description="the folder that its results lie in")
    data: DataConfig
    threat: ThreatModel
    network: NetworkConfig = Field(description="shared by teacher and student")
    teacher: TeacherConfig | None = Field(None, description="trained when the student reads it")
    student: StudentConfig
    verification: VerificationOptions | None = Field(None, description="at the end; None: training only")
    seed: int = Field(0, ge=0, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _hand_out_what_is_shared(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        seed = tree.get("seed", 0)
        if type(seed) is not int or seed < 0:
            seed = 0  # refused under its own name, not under two that the file does not have
        seeds = {"student": seed, "teacher": seed + 1}
        return tree | {
            section: _completed(section, tree[section], tree.get("network"), seeds[section])
            for section in seeds
            if isinstance(tree.get(section), dict)
        }

    @model_validator(mode="after")
    def _goes_together(self) -> "RecipeFile":
        self.student.check_threat(self.threat)
        if self.needs_teacher and self.teacher is None:
            raise ValueError(
                f"teacher is missing: a student with loss {self.student.loss.kind} and initialization "
                f"{self.student.initialization} reads one"
            )
        if self.needs_teacher and self.teacher is not None:
            self.teacher.check_threat(self.threat)
        if self.verification is not None:
            self.verification.check_activation(self.network.activation)
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether the student reads a teacher at all."""
        return _needs_teacher(self.student)

    def tree(self) -> dict[str, Any]:
        """Every value of the file, defaults included, as it may be written to YAML and read again."""
        return self.model_dump(mode="json", exclude={"teacher": set(_SHARED), "student": set(_SHARED)})


def _completed(section: str, values: dict[str, Any], network: Any, seed: Any) -> dict[str, Any]:
    for key, instead in _SHARED.items():
        if key in values:
            raise ValueError(f"{section}.{key} is not set there: {instead}")
    shared = {"seed": seed} if network is None else {"network": network, "seed": seed}
    return values | shared


def load_recipe_file(path: Path, settings: Sequence[str] = ()) -> RecipeFile:
    """A recipe with `key=value` settings laid over it, both through the same validation.

    Raises:
        YamlFileError: the file cannot be read, or something in it is wrong.
    """
    if {"search", "budget"} & yaml_files.read_tree(path, (), kind=KIND).keys():
        raise yaml_files.YamlFileError(
            f"{path} is a space file: python -m search.run {path} searches its ranges; a recipe has values only"
        )
    return yaml_files.validated(RecipeFile, yaml_files.read_tree(path, settings, kind=KIND), path, kind=KIND)
