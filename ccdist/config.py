"""What one training and one verification are made of: frozen, validated, hashable.

Units: epsilon in [0, 1] pixels, read as an exact fraction ("2/255"); durations as fractions of all epochs, so
that a recipe shortened by `epochs` keeps its shape; accuracies as fractions.
"""

import hashlib
import json
import re
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from ccdist.attacks import Keep
from ccdist.networks import ARCHITECTURES, Initialization


class Config(BaseModel):
    """Base of every configuration: nothing unknown, nothing changed later, defaults checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def fingerprint(value: BaseModel | dict[str, Any]) -> str:
    """Hash of the canonical JSON: the identity of a configuration."""
    data = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def exact_fraction(value: Any) -> Fraction:
    """A number or text such as "2/255" or 0.1 as the fraction that its decimal digits spell."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Fraction):
        raise ValueError(f"expected a number or a fraction like 2/255, got {value!r}")
    text = str(value).replace(" ", "")
    try:
        # Fraction writes out what an exponent stands for: 1e300000000 would take for ever.
        exponent = re.search(r"[eE]([+-]?\d+)$", text)
        if len(text) > 1000 or (exponent is not None and abs(int(exponent[1])) > 400):
            raise ValueError
        return Fraction(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"expected a number or a fraction like 2/255, got {text[:40]}") from None


def _epsilon(value: Any) -> Fraction:
    epsilon = exact_fraction(value)
    if not 0 < epsilon < 1 or float(epsilon) == 0:
        hint = f"; write {epsilon}/255 if that is what you mean" if epsilon >= 1 else ""
        raise ValueError(f"epsilon is {value}; expected a radius above 0 and below 1, since pixels are in [0, 1]{hint}")
    return epsilon


def _share(value: Any) -> Fraction:
    share = exact_fraction(value)
    if not 0 <= share <= 1:
        raise ValueError(f"{value} is not in [0, 1]; expected a fraction of all epochs, such as 0.5 or 1/160")
    return share


_as_text = PlainSerializer(str, return_type=str)
Epsilon = Annotated[Fraction, BeforeValidator(_epsilon), _as_text]
Share = Annotated[Fraction, BeforeValidator(_share), _as_text]


class ThreatModel(Config):
    """Which perturbations count."""

    norm: Literal["linf"] = Field("linf", description="l_inf: every pixel moves by at most epsilon")
    epsilon: Epsilon = Field(description="radius in [0, 1] pixel units, exact: 2/255, never 2")

    @property
    def radius(self) -> float:
        """Epsilon as a float."""
        return float(self.epsilon)

    def __str__(self) -> str:
        return f"{self.norm} {self.epsilon}"


class DataConfig(Config):
    """Which images, and how they are split."""

    name: str = Field(description="digits, mnist, fashion_mnist, cifar10; any other name needs a path")
    path: str | None = Field(None, description="folder with train.parquet and test.parquet")
    validation: float = Field(0.2, gt=0, lt=1, description="share of the training set held out")
    split_seed: int = Field(0, ge=0, description="seed of the split; the same for every trial and study")
    train_images: int | None = Field(None, ge=2, description="use only so many training images; None: all")
    validation_images: int | None = Field(None, ge=1, description="use only so many validation images; None: all")
    flip: bool = Field(False, description="augmentation: mirror half of the training images")
    crop_padding: int = Field(0, ge=0, description="augmentation: shift by up to so many pixels, edges repeated")
    mean: tuple[float, ...] | None = Field(None, description="normalisation a channel; None: the data set's own")
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None, description="normalisation a channel; None: the data set's own"
    )


class NetworkConfig(Config):
    """The architecture, the same for teacher and student."""

    name: str = Field("cnn7", description=f"one of {', '.join(ARCHITECTURES)}")
    width: int | None = Field(None, ge=1, description="channels of the first layer; None: the network's own")

    @model_validator(mode="after")
    def _known(self) -> "NetworkConfig":
        if self.name not in ARCHITECTURES:
            raise ValueError(f"unknown network {self.name!r}; known: {', '.join(ARCHITECTURES)}")
        return self


class AttackConfig(Config):
    """PGD: steps relative to the half width of the box."""

    steps: int = Field(ge=1, description="gradient steps")
    step_size: float = Field(gt=0, description="relative to the box's half width; 2 or more reaches a corner")
    restarts: int = Field(1, ge=1, description="independent random starts")


class TrainingAttackConfig(AttackConfig):
    """The attack inside a training step."""

    kappa: float = Field(1.0, gt=0, le=4, description="the box is that of kappa * epsilon")
    keep: Keep = Field("best", description="the iterate with the highest loss, or the last one")

    @model_validator(mode="after")
    def _last_has_one_start(self) -> "TrainingAttackConfig":
        if self.keep == "last" and self.restarts != 1:
            raise ValueError(f"keep: last has no meaning with restarts: {self.restarts}; use keep: best")
        return self


class AdamConfig(Config):
    kind: Literal["adam"] = "adam"
    weight_decay: float = Field(0.0, ge=0)


class SGDConfig(Config):
    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)


class MultiStepConfig(Config):
    """Constant, multiplied by `decay` at each drop."""

    kind: Literal["multi_step"] = "multi_step"
    initial: float = Field(5e-4, gt=0, le=10, description="learning rate at the start")
    decay: float = Field(0.2, gt=0, le=1)
    drops: tuple[Share, ...] = Field(
        (), description="where to drop, as shares of the epochs that remain after the epsilon ramp"
    )


class CyclicConfig(Config):
    """A triangle over the whole training: up for half of the steps, down for the other half."""

    kind: Literal["cyclic"] = "cyclic"
    peak: float = Field(gt=0, le=10)
    floor: float = Field(0.0, ge=0, le=10)

    @model_validator(mode="after")
    def _peak_is_above(self) -> "CyclicConfig":
        if self.floor > self.peak:
            raise ValueError(f"floor {self.floor} is above peak {self.peak}; exchange them")
        return self


OptimizerConfig = Annotated[AdamConfig | SGDConfig, Field(discriminator="kind")]
LearningRateConfig = Annotated[MultiStepConfig | CyclicConfig, Field(discriminator="kind")]


class CCDistConfig(Config):
    """CC-IBP plus feature distillation."""

    kind: Literal["cc_dist"] = "cc_dist"
    alpha: float = Field(ge=0, le=1, description="weight of the bounds: 0 adversarial, 1 IBP")
    beta: float = Field(ge=0, description="distillation weight")
    alpha_dist: Literal["alpha"] | Annotated[float, Field(ge=0, le=1)] = Field(
        "alpha", description="weight of the bounds in the distillation term: alpha's own value or a number"
    )


class CCIBPConfig(Config):
    kind: Literal["cc_ibp"] = "cc_ibp"
    alpha: float = Field(ge=0, le=1, description="weight of the bounds: 0 adversarial, 1 IBP")


class MTLIBPConfig(Config):
    kind: Literal["mtl_ibp"] = "mtl_ibp"
    alpha: float = Field(ge=0, le=1, description="weight of the bounds: 0 adversarial, 1 IBP")


class ExpIBPConfig(Config):
    kind: Literal["exp_ibp"] = "exp_ibp"
    alpha: float = Field(ge=0, le=1, description="weight of the bounds: 0 adversarial, 1 IBP")


LossConfig = Annotated[CCDistConfig | CCIBPConfig | MTLIBPConfig | ExpIBPConfig, Field(discriminator="kind")]


class EpsilonScheduleConfig(Config):
    """Epsilon over training: zero, then the smoothed ramp, then constant."""

    warm_up: Share = Field(exact_fraction("1/160"), description="share of the epochs at epsilon 0")
    ramp: Share = Field(exact_fraction("1/2"), description="share of the epochs in which epsilon grows")
    train_epsilon_factor: float = Field(1.0, gt=0, le=4, description="epsilon in training, relative to the threat's")

    @model_validator(mode="after")
    def _fits(self) -> "EpsilonScheduleConfig":
        if self.warm_up + self.ramp > 1:
            raise ValueError(
                f"warm_up {self.warm_up} + ramp {self.ramp} is more than 1; together they are a share of all epochs"
            )
        return self


class TrainConfig(Config):
    """What teacher and student training have in common."""

    network: NetworkConfig = NetworkConfig()
    epochs: int = Field(ge=1)
    batch_size: int = Field(128, ge=2)
    optimizer: OptimizerConfig = AdamConfig()
    learning_rate: LearningRateConfig = MultiStepConfig()
    attack: TrainingAttackConfig = TrainingAttackConfig(steps=8, step_size=0.25)
    l1: float = Field(0.0, ge=0, description="coefficient of the sum of |weights|")
    gradient_clip: float = Field(10.0, gt=0, description="largest global norm of the gradient")
    seed: int = Field(0, ge=0, description="feeds separate generators for weights, order, augmentation, attack")


class TeacherConfig(TrainConfig):
    """An adversarially trained teacher."""

    epsilon_factor: float = Field(1.0, gt=0, le=4, description="epsilon of its attack, relative to the threat's")
    initialization: Initialization = "default"


class StudentConfig(TrainConfig):
    """A student trained with bounds and, for cc_dist, a teacher's features."""

    loss: LossConfig
    epsilon_schedule: EpsilonScheduleConfig = EpsilonScheduleConfig()
    shi_weight: float = Field(0.5, ge=0, description="Shi regulariser, faded out over the ramp")
    batch_norm: Literal["adversarial", "clean"] = Field(
        "adversarial", description="which batch's statistics the attack's forward pass and the bounds use"
    )
    population_statistics: bool = Field(
        False, description="recompute running statistics over the clean training set after each epoch"
    )
    initialization: Literal["ibp", "default", "teacher"] = "ibp"


Rung = Literal["pgd", "ibp", "crown"]


class VerifyConfig(Config):
    """The ladder of one verification; each rung takes the images that are still open, in this order."""

    threat: ThreatModel
    attack: AttackConfig = AttackConfig(steps=40, step_size=0.035)
    rungs: tuple[Rung, ...] = Field(("pgd", "ibp", "crown"), description="after the clean prediction")
    batch_size: int = Field(256, ge=1, description="images at once; CROWN holds K - 1 specifications of each")
    seed: int = Field(0, ge=0, description="feeds the attack's random starts")

    @model_validator(mode="after")
    def _rungs_differ(self) -> "VerifyConfig":
        if len(set(self.rungs)) != len(self.rungs):
            raise ValueError(f"rungs {list(self.rungs)} name one twice")
        return self
