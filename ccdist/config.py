"""What one training and one verification are made of: frozen, validated, hashable.

Units: epsilon in pixels of [0, 1] (for l2 a Euclidean length), read as an exact fraction ("2/255"); durations as
fractions of all epochs, so that a recipe shortened by `epochs` keeps its shape; accuracies as fractions.
"""

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from ccdist.activations import Activation
from ccdist.attacks import Keep
from ccdist.fields import Config as Config
from ccdist.fields import Share, as_text
from ccdist.fields import exact_fraction as exact_fraction
from ccdist.fields import fingerprint as fingerprint
from ccdist.loss_config import LossConfig, SABRConfig
from ccdist.networks import ARCHITECTURES, Initialization
from ccdist.optimizer_config import (
    AdamConfig,
    LearningRateConfig,
    MultiStepConfig,
    OptimizerConfig,
    WeightAveragingConfig,
)
from ccdist.threats import Norm

# The diameter of an image is the root of its number of values: 111 for 64 x 64 pixels in colour.
LARGEST_L2_EPSILON = 1000


def _linf_epsilon(value: Any) -> Fraction:
    epsilon = exact_fraction(value)
    if not 0 < epsilon < 1 or float(epsilon) == 0:
        hint = f"; write {epsilon}/255 if that is what you mean" if epsilon >= 1 else ""
        raise ValueError(f"epsilon is {value}; expected a radius above 0 and below 1, since pixels are in [0, 1]{hint}")
    return epsilon


def _l2_epsilon(value: Any) -> Fraction:
    epsilon = exact_fraction(value)
    if not 0 < epsilon <= LARGEST_L2_EPSILON or float(epsilon) == 0:
        raise ValueError(
            f"epsilon is {value}; expected a Euclidean radius above 0 and up to {LARGEST_L2_EPSILON}, "
            "since pixels are in [0, 1]"
        )
    return epsilon


class ThreatModel(Config):
    """Which perturbations count, always inside the pixel range."""

    norm: Norm = Field(
        "linf", description="linf: every pixel moves by at most epsilon; l2: the image by a Euclidean length of epsilon"
    )
    epsilon: Annotated[Fraction, as_text] = Field(
        description="radius in pixel units, exact: 2/255, never 2; below 1 for linf, for l2 it may exceed 1"
    )

    @field_validator("epsilon", mode="before")
    @classmethod
    def _in_the_range_of_its_norm(cls, value: Any, info: Any) -> Fraction:
        # info is a ValidationInfo, a protocol that the run-time check of the tests cannot read.
        return _l2_epsilon(value) if info.data.get("norm") == "l2" else _linf_epsilon(value)

    @property
    def radius(self) -> float:
        """Epsilon as a float."""
        return float(self.epsilon)

    def __str__(self) -> str:
        return f"{self.norm} {self.epsilon}"


class DataConfig(Config):
    """Which images, and how they are split."""

    name: str = Field(description="a name of data.KNOWN; any other needs a path")
    path: str | None = Field(None, description="folder with Parquet files, image folders or npz batches")
    validation: float = Field(0.2, ge=0, lt=1, description="share of the training set held out; 0: train on all of it")
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
    activation: Activation = Field("relu", description="after every layer but the head")

    @model_validator(mode="after")
    def _known(self) -> "NetworkConfig":
        if self.name not in ARCHITECTURES:
            raise ValueError(f"unknown network {self.name!r}; known: {', '.join(ARCHITECTURES)}")
        return self


class AttackConfig(Config):
    """PGD: steps relative to the half width of the box, or to the radius of the l_2 ball."""

    steps: int = Field(ge=1, description="gradient steps")
    step_size: float = Field(
        gt=0, description="relative to the box's half width (2 or more reaches a corner) or the ball's radius"
    )
    restarts: int = Field(1, ge=1, description="independent random starts")


class TrainingAttackConfig(AttackConfig):
    """The attack inside a training step."""

    kind: Literal["pgd"] = "pgd"
    kappa: float = Field(1.0, gt=0, le=4, description="the box is that of kappa * epsilon")
    keep: Keep = Field("best", description="the iterate with the highest loss, or the last one")

    @model_validator(mode="after")
    def _last_has_one_start(self) -> "TrainingAttackConfig":
        if self.keep == "last" and self.restarts != 1:
            raise ValueError(f"keep: last has no meaning with restarts: {self.restarts}; use keep: best")
        return self


class NoisyFGSMConfig(Config):
    """N-FGSM: uniform noise, then one signed gradient step; not projected to the epsilon box, only to the pixels.

    The gradient reads running batch norm statistics, as for PGD; the published code reads those of the noisy batch.
    """

    kind: Literal["n_fgsm"] = "n_fgsm"
    noise: float = Field(2.0, ge=0, description="half width of the noise relative to epsilon")
    step_size: float = Field(1.0, gt=0, description="the step relative to epsilon")


class NoAttackConfig(Config):
    """Training on the images as they are."""

    kind: Literal["none"] = "none"


def _attack_kind(value: Any) -> str:
    """PGD needs no `kind`: it is what every attack of a student is."""
    kind = value.get("kind", "pgd") if isinstance(value, dict) else getattr(value, "kind", "pgd")
    return str(kind)


TeacherAttackConfig = Annotated[
    Annotated[TrainingAttackConfig, Tag("pgd")]
    | Annotated[NoisyFGSMConfig, Tag("n_fgsm")]
    | Annotated[NoAttackConfig, Tag("none")],
    Discriminator(_attack_kind),
]


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


class PrecisionConfig(Config):
    """In which arithmetic a training computes; what it stores, and every certificate, is float32.

    `auto` is bfloat16 where the processor or GPU multiplies it faster than float32, float32 elsewhere. A training
    that goes on on another machine keeps the precision that it began with.
    """

    attack: Literal["auto", "float32", "bfloat16"] = Field("auto", description="the search for adversarial points")
    teacher: Literal["auto", "float32", "bfloat16"] = Field("auto", description="the teacher's forward pass")
    training: Literal["float32", "bfloat16"] = Field(
        "float32", description="the passes that are differentiated: adversarial points and interval bounds"
    )
    tf32: bool = Field(False, description="float32 products of a GPU with 10 bits of mantissa, in training only")


class TrainConfig(Config):
    """What teacher and student training have in common."""

    network: NetworkConfig = NetworkConfig()
    epochs: int = Field(ge=1)
    batch_size: int = Field(128, ge=2)
    optimizer: OptimizerConfig = AdamConfig()
    learning_rate: LearningRateConfig = MultiStepConfig()
    l1: float = Field(0.0, ge=0, description="coefficient of the sum of |weights|")
    gradient_clip: float = Field(10.0, gt=0, description="largest global norm of the gradient")
    weight_averaging: WeightAveragingConfig | None = Field(None, description="None: the last weights are kept")
    precision: PrecisionConfig = PrecisionConfig()
    seed: int = Field(0, ge=0, description="feeds separate generators for weights, order, augmentation, attack")

    @field_validator("weight_averaging")
    @classmethod
    def _averages_something(cls, value: WeightAveragingConfig | None) -> WeightAveragingConfig | None:
        if value is not None and value.start == 1:
            raise ValueError("start is 1, after the last epoch: nothing would be averaged; expected a share below 1")
        return value


class TeacherConfig(TrainConfig):
    """An adversarially trained teacher; by N-FGSM or on clean images for comparison."""

    attack: TeacherAttackConfig = TrainingAttackConfig(steps=8, step_size=0.25)
    epsilon_factor: float = Field(1.0, gt=0, le=4, description="epsilon of its attack, relative to the threat's")
    initialization: Initialization = "default"

    def check_threat(self, threat: ThreatModel) -> None:
        """Refuse a threat that this training has no form for.

        Raises:
            ValueError: the attack moves inside boxes only.
        """
        if isinstance(self.attack, NoisyFGSMConfig) and threat.norm != "linf":
            raise ValueError(f"attack n_fgsm has no form for norm {threat.norm}: it moves by signs; use pgd")


class StudentConfig(TrainConfig):
    """A student trained with bounds and, for cc_dist, a teacher's features."""

    loss: LossConfig
    attack: TrainingAttackConfig = TrainingAttackConfig(steps=8, step_size=0.25)
    natural_weight: float = Field(
        0.0, ge=0, lt=1, description="share of the cross-entropy at clean images; the loss has the rest"
    )
    epsilon_schedule: EpsilonScheduleConfig = EpsilonScheduleConfig()
    shi_weight: float = Field(0.5, ge=0, description="Shi regulariser, faded out over the ramp")
    batch_norm: Literal["adversarial", "clean"] = Field(
        "adversarial", description="which batch's statistics the attack's forward pass and the bounds use"
    )
    population_statistics: bool = Field(
        False, description="recompute running statistics over the training set after each epoch"
    )
    initialization: Literal["ibp", "default", "teacher"] = "ibp"

    @model_validator(mode="after")
    def _shrinks_what_is_there(self) -> "StudentConfig":
        loss, activation = self.loss, self.network.activation
        if isinstance(loss, SABRConfig) and loss.relu_shrink < 1 and activation != "relu":
            raise ValueError(
                f"relu_shrink {loss.relu_shrink} has no effect on activation {activation}: it shrinks the bounds of "
                "relu only; leave it out, or use activation relu"
            )
        return self

    def check_threat(self, threat: ThreatModel) -> None:
        """Refuse a threat that this training has no form for.

        Raises:
            ValueError: the loss reads boxes only.
        """
        if isinstance(self.loss, SABRConfig) and threat.norm != "linf":
            raise ValueError(f"loss sabr has no form for norm {threat.norm}: its small box is one of l_inf; use linf")


class EnsembleConfig(Config):
    """The AutoAttack ensemble: APGD-CE, targeted APGD-DLR, targeted FAB, Square; the defaults are its standard ones."""

    steps: int = Field(100, ge=1, description="gradient steps of APGD and FAB")
    restarts: int = Field(1, ge=1, description="independent random starts of APGD-CE and of each target")
    targets: int = Field(9, ge=1, description="classes with the highest logits that the targeted attacks aim at")
    square_queries: int = Field(5000, ge=1, description="forward passes of Square for one image")


class AlphaCrownConfig(Config):
    """alpha-CROWN: the slopes of each specification improved by projected gradient steps."""

    steps: int = Field(20, ge=1, description="gradient steps of the slopes")


class BranchAndBoundConfig(Config):
    """Branch and bound over the signs of ReLUs; an image that meets a limit stays undecided."""

    timeout_s: float | None = Field(20.0, gt=0, description="seconds of work for one image; None: no limit")
    total_timeout_s: float | None = Field(None, gt=0, description="seconds for the whole set; None: no limit")
    max_branches: int | None = Field(None, ge=1, description="sub-problems of one image; None: no limit")
    root_steps: int = Field(20, ge=1, description="gradient steps of the slopes before the first branch")
    steps: int = Field(5, ge=1, description="gradient steps of slopes and beta in each sub-problem")
    candidates: int = Field(6, ge=1, description="neurons whose branches are bounded before one is chosen")
    round_size: int = Field(64, ge=1, description="sub-problems of one image that a round splits, at first")


# Activations that are piecewise linear with their kink at 0.
KINKED: tuple[Activation, ...] = ("relu", "leaky_relu")

Rung = Literal["pgd", "ensemble", "ibp", "crown", "alpha_crown", "branch_and_bound"]
# What the adversarial accuracy is about.
ATTACK_RUNGS: tuple[Rung, ...] = ("pgd", "ensemble")


class VerificationOptions(Config):
    """The ladder of a verification; each rung takes the images that are still open, in this order."""

    attack: AttackConfig = AttackConfig(steps=40, step_size=0.035)
    ensemble: EnsembleConfig = EnsembleConfig()
    alpha_crown: AlphaCrownConfig = AlphaCrownConfig()
    branch_and_bound: BranchAndBoundConfig = BranchAndBoundConfig()
    rungs: tuple[Rung, ...] = Field(
        ("pgd", "ibp", "crown"), description="after the clean prediction; attacks before branch_and_bound"
    )
    batch_size: int = Field(256, ge=1, description="images at once; CROWN holds K - 1 specifications of each")

    @field_validator("rungs")
    @classmethod
    def _is_a_ladder(cls, value: tuple[Rung, ...]) -> tuple[Rung, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"{list(value)} name one twice; each is climbed once")
        after = value[value.index("branch_and_bound") :] if "branch_and_bound" in value else ()
        late = [rung for rung in after if rung in ATTACK_RUNGS]
        if late:
            # What branch and bound falsifies counts as no attack's: the adversarial accuracy would come out too high.
            raise ValueError(f"attacks come before branch_and_bound; move {' and '.join(late)} before it")
        return value

    def check_activation(self, activation: Activation) -> None:
        """Refuse a rung that networks with this activation cannot climb, before anything is trained.

        Raises:
            ValueError: branch and bound meets an activation without a kink.
        """
        if "branch_and_bound" in self.rungs and activation not in KINKED:
            raise ValueError(
                f"rung branch_and_bound splits {' and '.join(KINKED)} at 0; activation {activation} has no such point: "
                "leave the rung out"
            )


class VerifyConfig(VerificationOptions):
    """One verification: its ladder, and what the images are perturbed by."""

    threat: ThreatModel
    seed: int = Field(0, ge=0, description="feeds the attack's random starts")
