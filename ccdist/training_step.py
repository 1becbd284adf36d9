"""One training step of teacher and student: from a batch to a loss.

Only the passes that the configured loss reads are computed; one pass of interval bounds serves the loss, the
distillation and the Shi regulariser. `ccdist.reference` computes the same step in the plain order of the public codes.

Shapes: `B` batch, `K` classes, `J = K - 1` other classes, `D` features.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ccdist.attacks import LossOf, noisy_fgsm, pgd
from ccdist.batch_norm import Statistics
from ccdist.bounds import Trace, elided_lower_bounds, logit_differences, propagate
from ccdist.config import (
    EpsilonScheduleConfig,
    NoAttackConfig,
    NoisyFGSMConfig,
    StudentConfig,
    TeacherConfig,
    ThreatModel,
    TrainConfig,
    TrainingAttackConfig,
)
from ccdist.folded import Fold, Recorded, Step, folded_forward, folded_interval
from ccdist.interval import Interval
from ccdist.loss_config import (
    ADCertConfig,
    CCDistConfig,
    CCIBPConfig,
    ExpIBPConfig,
    IBPConfig,
    LossConfig,
    MTLIBPConfig,
    SABRConfig,
)
from ccdist.losses import (
    ad_cert_loss,
    cc_dist_loss,
    cc_ibp_loss,
    exp_ibp_loss,
    ibp_loss,
    mtl_ibp_loss,
    small_box,
    soft_label_divergence,
)
from ccdist.networks import Network, Normalize
from ccdist.precision import Resolved, lower_precision
from ccdist.regularizers import l1_norm, shi_regularizer_of_centers
from ccdist.schedules import smoothed_epsilon
from ccdist.threats import L2Ball, Region, perturbation_set

# The Shi regulariser compares widths, which a box of width 0 does not have.
SMALLEST_BOX = 1e-6


@dataclass(frozen=True)
class Batch:
    """One optimiser step's inputs."""

    index: int  # of the step over the whole training, 0-based
    images: Tensor  # pixels in [0, 1], augmented
    labels: Tensor
    attack_generator: torch.Generator


@dataclass(frozen=True)
class StepPrecision:
    """`PrecisionConfig` with `auto` decided for a device."""

    attack: Resolved = "float32"
    teacher: Resolved = "float32"
    training: Resolved = "float32"


# (loss, metrics to average over the epoch)
StepResult = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class FoldedNetwork:
    """A network with its batch norms fixed and without gradients for its weights: what attacks and teachers need."""

    steps: list[Step]
    head_weight: Tensor
    head_bias: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, network: Network, precision: Resolved, statistics: Statistics | None = None) -> "FoldedNetwork":
        steps = Fold(lower_precision(precision)).fixed(network.features, statistics, name="features")
        head = network.head
        return cls(steps, head.weight.detach(), None if head.bias is None else head.bias.detach())

    def features(self, images: Tensor) -> Tensor:
        return folded_forward(self.steps, images).to(self.head_weight.dtype)

    def logits(self, images: Tensor) -> Tensor:
        return F.linear(self.features(images), self.head_weight, self.head_bias)


def _pgd_points(
    network: FoldedNetwork,
    batch: Batch,
    region: Region,
    config: TrainingAttackConfig,
    loss_of: LossOf | None = None,
) -> Tensor:
    return pgd(
        network.logits,
        batch.labels,
        region=region,
        steps=config.steps,
        step_size=config.step_size,
        restarts=config.restarts,
        keep=config.keep,
        generator=batch.attack_generator,
        loss_of=loss_of,
    )


def _attack_set(images: Tensor, threat: ThreatModel, epsilon: float, kappa: float) -> Region:
    radius = kappa * epsilon
    return perturbation_set(images, threat.norm, min(1.0, radius) if threat.norm == "linf" else radius)


class TeacherStep:
    """Cross-entropy at attacked points, epsilon constant.

    The attack reads running statistics; the pass that is differentiated uses, and adds to them, those of the
    attacked batch.
    """

    def __init__(self, network: Network, config: TeacherConfig, threat: ThreatModel, precision: StepPrecision) -> None:
        config.check_threat(threat)
        self.network, self.config, self.threat, self.precision = network, config, threat, precision

    def __call__(self, batch: Batch) -> StepResult:
        network = self.network
        attacked = self._attacked(batch)
        steps = Fold(lower_precision(self.precision.training)).collecting(network.features, {})
        logits = network.head(folded_forward(steps, attacked).to(network.head.weight.dtype))
        loss = F.cross_entropy(logits, batch.labels)
        metrics = {"loss": loss.detach(), "adversarial_accuracy": _accuracy(logits, batch.labels)}
        return with_l1(loss, network, self.config), metrics

    def _attacked(self, batch: Batch) -> Tensor:
        config = self.config.attack
        if isinstance(config, NoAttackConfig):
            return batch.images
        network = FoldedNetwork.of(self.network, self.precision.attack)
        epsilon = self.config.epsilon_factor * self.threat.radius
        if isinstance(config, NoisyFGSMConfig):
            return noisy_fgsm(
                network.logits,
                batch.images,
                batch.labels,
                epsilon=epsilon,
                noise=config.noise,
                step_size=config.step_size,
                generator=batch.attack_generator,
            )
        return _pgd_points(network, batch, _attack_set(batch.images, self.threat, epsilon, config.kappa), config)

    def describe(self, step: int) -> str:
        """What an error about this step should say."""
        return ""

    def epsilon(self, step: int) -> float | None:
        """The scheduled epsilon; a teacher has none."""
        return None


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == labels).float().mean()


def with_l1(loss: Tensor, network: Network, config: TrainConfig) -> Tensor:
    return loss + config.l1 * l1_norm(network) if config.l1 else loss


class EpsilonSchedule:
    """The smoothed ramp of a student's epsilon, from shares of the epochs to steps, once."""

    def __init__(self, config: EpsilonScheduleConfig, threat: ThreatModel, num_steps: int) -> None:
        self.start = round(config.warm_up * num_steps)
        self.length = round(config.ramp * num_steps)
        radius = threat.radius * config.train_epsilon_factor
        self.epsilon_max = min(1.0, radius) if threat.norm == "linf" else radius  # 1 is already the whole range

    def __call__(self, step: int) -> float:
        return smoothed_epsilon(step, start=self.start, length=self.length, epsilon_max=self.epsilon_max)


@dataclass(frozen=True)
class Terms:
    """What a student's loss may read; None where its configuration says that it does not."""

    adv_features: Tensor | None
    adv_diffs: Tensor | None
    feature_box: Interval | None
    lower_diffs: Tensor | None
    teacher_features: Tensor | None
    divergence: Tensor | None


class StudentStep:
    """The student's loss for one batch."""

    def __init__(
        self,
        network: Network,
        teacher: Network | None,
        config: StudentConfig,
        threat: ThreatModel,
        schedule: EpsilonSchedule,
        precision: StepPrecision,
    ) -> None:
        config.check_threat(threat)
        self.network, self.config, self.threat, self.schedule = network, config, threat, schedule
        self.precision = precision
        self.teacher = None
        if teacher is not None and config.loss.reads_teacher:
            self.teacher = FoldedNetwork.of(teacher, precision.teacher)

    def __call__(self, batch: Batch) -> StepResult:
        network, config = self.network, self.config
        dtype = lower_precision(self.precision.training)
        fold = Fold(dtype, shrink=config.loss.relu_shrink if isinstance(config.loss, SABRConfig) else 1.0)
        epsilon = self.schedule(batch.index)
        statistics: Statistics = {}
        clean_features = adv_features = None
        if self._collects_clean:
            clean_features = self._features(fold.collecting(network.features, statistics), batch.images)
        attacked = self._attacked(batch, epsilon, statistics if self._collects_clean else None)
        if not self._collects_clean:
            # De Palma's code also runs a clean train-mode pass for its log, which mixes clean batches into the
            # running statistics; it costs a forward pass and is left out here.
            adv_features = self._features(fold.collecting(network.features, statistics), attacked)
        elif config.loss.reads_attacked_outputs:
            adv_features = self._features(fold.fixed(network.features, statistics), attacked)
        if clean_features is None and self._reads_clean:
            clean_features = self._features(fold.fixed(network.features, statistics), batch.images)

        metrics: dict[str, Tensor] = {}
        feature_box = lower_diffs = regularizer = None
        shi_weight = config.shi_weight * (1 - epsilon / self.schedule.epsilon_max)
        if config.loss.reads_bounds or shi_weight > 0:
            recorded: list[tuple[Tensor, Tensor]] | None = [] if shi_weight > 0 else None
            region = self._bounded_region(batch, attacked, epsilon)
            feature_box = self._feature_box(fold, region, statistics, recorded)
            if recorded is not None:
                regularizer = shi_weight * shi_regularizer_of_centers(_input_radius(network, region), recorded)
            if config.loss.reads_bounds:
                lower_diffs = elided_lower_bounds(network.head, feature_box, batch.labels)
            else:
                feature_box = None
        adv_logits = None if adv_features is None else network.head(adv_features)
        clean_logits = None if clean_features is None else network.head(clean_features)
        terms = Terms(
            adv_features=adv_features,
            adv_diffs=None if adv_logits is None else logit_differences(adv_logits, batch.labels),
            feature_box=feature_box,
            lower_diffs=lower_diffs,
            teacher_features=self._teacher_features(batch.images),
            divergence=self._divergence(batch.images, attacked, clean_logits, adv_logits),
        )
        loss = student_loss(config.loss, terms)
        if config.natural_weight and clean_logits is not None:
            natural = F.cross_entropy(clean_logits, batch.labels)
            loss = config.natural_weight * natural + (1 - config.natural_weight) * loss
        metrics["loss"] = loss.detach()
        if adv_logits is not None:
            metrics["adversarial_accuracy"] = _accuracy(adv_logits, batch.labels)
        if lower_diffs is not None:
            metrics["ibp_certified_accuracy"] = (lower_diffs.detach().amin(1) > 0).float().mean()
        if regularizer is not None:
            loss = loss + regularizer
        return with_l1(loss, network, config), metrics

    @property
    def _collects_clean(self) -> bool:
        """Whether the clean batch's statistics are the ones in use; the attacked batch's where there is one else."""
        return self.config.batch_norm == "clean" or not self.config.loss.reads_attack

    @property
    def _reads_clean(self) -> bool:
        loss = self.config.loss
        return self.config.natural_weight > 0 or (
            isinstance(loss, ADCertConfig) and loss.alpha < 1 and loss.student_input != "adversarial"
        )

    def _features(self, steps: list[Step], images: Tensor) -> Tensor:
        return folded_forward(steps, images).to(self.network.head.weight.dtype)

    def _attacked(self, batch: Batch, epsilon: float, statistics: Statistics | None) -> Tensor:
        config = self.config
        if epsilon == 0 or not config.loss.reads_attack:
            return batch.images
        network = FoldedNetwork.of(self.network, self.precision.attack, statistics)
        region = _attack_set(batch.images, self.threat, epsilon, config.attack.kappa)
        return _pgd_points(network, batch, region, config.attack, self._soft_loss(batch.images))

    def _soft_loss(self, images: Tensor) -> LossOf | None:
        """What the attack raises where it is not the cross-entropy."""
        loss = self.config.loss
        if not (isinstance(loss, ADCertConfig) and loss.soft_attack and self.teacher is not None):
            return None
        with torch.no_grad():
            teacher_logits = self.teacher.logits(images)
        return lambda logits: soft_label_divergence(logits, teacher_logits)

    def _bounded_region(self, batch: Batch, attacked: Tensor, epsilon: float) -> Region:
        loss = self.config.loss
        if isinstance(loss, SABRConfig):
            box = _attack_set(batch.images, self.threat, max(epsilon, SMALLEST_BOX), self.config.attack.kappa)
            assert isinstance(box, Interval)
            return small_box(attacked, box, subbox=loss.subbox)
        return perturbation_set(batch.images, self.threat.norm, max(epsilon, SMALLEST_BOX))

    def _feature_box(self, fold: Fold, region: Region, statistics: Statistics, recorded: Recorded) -> Interval:
        features, dtype = self.network.features, self.network.head.weight.dtype
        if isinstance(region, L2Ball):
            trace = Trace()
            box = propagate(features, region, statistics=statistics, trace=trace, name="features")
            if recorded is not None:
                recorded += [(entered.center, entered.radius) for entered in trace.activation_inputs()]
            return box
        center, radius = folded_interval(fold.fixed(features, statistics, name="features"), region, recorded)
        return Interval.from_center(center.to(dtype), radius.to(dtype))

    @torch.no_grad()
    def _teacher_features(self, images: Tensor) -> Tensor | None:
        if self.teacher is None or not isinstance(self.config.loss, CCDistConfig):
            return None
        return self.teacher.features(images)

    def _divergence(
        self, images: Tensor, attacked: Tensor, clean_logits: Tensor | None, adv_logits: Tensor | None
    ) -> Tensor | None:
        loss = self.config.loss
        if not isinstance(loss, ADCertConfig) or self.teacher is None:
            return None
        with torch.no_grad():
            teacher_logits = self.teacher.logits(images if loss.teacher_input == "clean" else attacked)
        weights = {"clean": (1.0, 0.0), "adversarial": (0.0, 1.0), "rslad": (1 / 6, 5 / 6)}[loss.student_input]
        read = [(w, logits) for w, logits in zip(weights, (clean_logits, adv_logits), strict=True) if w]
        return sum(
            (w * soft_label_divergence(logits, teacher_logits) for w, logits in read if logits is not None),
            start=torch.zeros((), device=images.device),
        )

    def describe(self, step: int) -> str:
        """What an error about this step should say."""
        return f", epsilon {self.schedule(step):.6g}, {self.config.loss.model_dump(mode='json')}"

    def epsilon(self, step: int) -> float | None:
        return self.schedule(step)


def _input_radius(network: Network, region: Region) -> Tensor:
    """Radius of the normalised input: what enters the first layer that is not the normalisation."""
    radius = (region.box if isinstance(region, L2Ball) else region).radius
    first = network.features[0]
    return radius / first.std if isinstance(first, Normalize) else radius


def student_loss(config: LossConfig, terms: Terms) -> Tensor:
    """The configured loss; the one place where a `loss: {kind: ...}` becomes a function of `ccdist.losses`.

    Where a term has no weight it is not computed, and the loss is the one that is left.
    """
    match config:
        case IBPConfig() | SABRConfig():
            return ibp_loss(_given(terms.lower_diffs))
        case ADCertConfig(alpha=alpha):
            return ad_cert_loss(terms.lower_diffs, terms.divergence, alpha=alpha)
        case _:
            pass
    adv_diffs, lower_diffs = terms.adv_diffs, terms.lower_diffs
    if adv_diffs is None:  # alpha is 1
        adv_diffs = _given(lower_diffs)
    if lower_diffs is None:  # alpha is 0
        lower_diffs = adv_diffs
    match config:
        case CCDistConfig(beta=0):
            return cc_ibp_loss(adv_diffs, lower_diffs, alpha=config.alpha)
        case CCDistConfig():
            box = terms.feature_box
            features = terms.adv_features
            if features is None:
                features = _given_box(box).center
            return cc_dist_loss(
                adv_diffs,
                lower_diffs,
                features,
                Interval(features, features) if box is None else box,
                _given(terms.teacher_features),
                alpha=config.alpha,
                beta=config.beta,
                alpha_dist=config.distillation_alpha,
            )
        case CCIBPConfig():
            return cc_ibp_loss(adv_diffs, lower_diffs, alpha=config.alpha)
        case MTLIBPConfig():
            return mtl_ibp_loss(adv_diffs, lower_diffs, alpha=config.alpha)
        case ExpIBPConfig():
            return exp_ibp_loss(adv_diffs, lower_diffs, alpha=config.alpha)


def _given(term: Tensor | None) -> Tensor:
    assert term is not None, "a loss reads a term that its configuration says it does not"
    return term


def _given_box(box: Interval | None) -> Interval:
    assert box is not None, "a loss reads bounds that its configuration says it does not"
    return box
