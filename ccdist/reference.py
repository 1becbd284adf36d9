"""The CC-Dist step in the plain order of the public codes: an oracle for tests and the baseline of benchmarks.

Clean train-mode forward pass, PGD in float32 through the unfolded network, train-mode pass of the attacked points,
interval bounds with centre and radius apart in every layer, teacher. No batch norm is folded, no memory layout chosen.
`ccdist.training_step` has to give the same loss and gradients; it leaves out the first pass, which only moves the
running statistics.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ccdist.attacks import pgd
from ccdist.batch_norm import Statistics, forward, forward_collecting
from ccdist.bounds import Trace, elided_lower_bounds, logit_differences, propagate
from ccdist.config import StudentConfig, ThreatModel
from ccdist.interval import epsilon_box
from ccdist.loss_config import CCDistConfig
from ccdist.losses import cc_dist_loss
from ccdist.networks import Network, Normalize
from ccdist.regularizers import l1_norm, shi_regularizer


def reference_loss(
    network: Network,
    teacher: Network,
    images: Tensor,
    labels: Tensor,
    config: StudentConfig,
    threat: ThreatModel,
    *,
    epsilon: float,
    epsilon_max: float,
    attack_generator: torch.Generator,
    clean_pass: bool = True,
    on_phase: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> Tensor:
    """The loss of one CC-Dist step with statistics of the adversarial batch, at a given epsilon > 0.

    Args:
        clean_pass: compute the clean train-mode pass, as the public codes do for their logs; it changes running
            statistics and nothing else.
        on_phase: a context around each part of the step, for clocks.

    Raises:
        ValueError: another loss, norm or style of batch norm is configured.
    """
    loss = config.loss
    if not isinstance(loss, CCDistConfig) or threat.norm != "linf" or config.batch_norm != "adversarial":
        raise ValueError("the reference step is CC-Dist under linf with statistics of the adversarial batch")
    if clean_pass:
        with on_phase("clean"):
            forward_collecting(network, images, {})
    attack = config.attack
    with on_phase("attack"):
        attacked = pgd(
            lambda x: forward(network, x, None),
            labels,
            region=epsilon_box(images, min(1.0, attack.kappa * epsilon)),
            steps=attack.steps,
            step_size=attack.step_size,
            restarts=attack.restarts,
            keep=attack.keep,
            generator=attack_generator,
        )
    statistics: Statistics = {}
    with on_phase("forward"):
        adv_features = forward_collecting(network.features, attacked, statistics)
        adv_diffs = logit_differences(network.head(adv_features), labels)
    trace = Trace()
    with on_phase("bounds"):
        feature_box = propagate(network.features, epsilon_box(images, epsilon), statistics=statistics, trace=trace)
        lower_diffs = elided_lower_bounds(network.head, feature_box, labels)
    with on_phase("teacher"), torch.no_grad():
        teacher_features = teacher.features(images)
    total = cc_dist_loss(
        adv_diffs,
        lower_diffs,
        adv_features,
        feature_box,
        teacher_features,
        alpha=loss.alpha,
        beta=loss.beta,
        alpha_dist=loss.distillation_alpha,
    )
    shi_weight = config.shi_weight * (1 - epsilon / epsilon_max)
    if shi_weight > 0:
        input_radius = next(box for layer, box in trace.steps if not isinstance(layer, Normalize)).radius
        total = total + shi_weight * shi_regularizer(input_radius, trace.activation_inputs())
    return total + config.l1 * l1_norm(network) if config.l1 else total
